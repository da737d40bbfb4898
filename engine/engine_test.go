package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/shard"
	"go.uber.org/goleak"
)

// ants keeps goroutines of its default pool from its initialisation on.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// world is a Controller and a set of nodes in memory, scripted by the test.
type world struct {
	mu      sync.Mutex
	rooms   map[string]map[string][]string // room -> user -> nodes
	users   map[string][]string            // user -> nodes
	down    error                          // what look-ups answer, if not nil
	gate    chan struct{}                  // look-ups wait for it, if not nil
	lookups []string
	nodes   map[string]*testNode

	delay      func() // called by each look-up before it looks, if not nil
	linksPanic bool
	tune       func(*route.Config) // before build, if not nil
	pool       int                 // places in each shard's pool; 0 means the default
	shards     int                 // 0 means 2
	revision   func() uint64       // of rooms; nil: nobody knows
	config     Config              // the rest of the engine's
}

// testNode is an engine.Link that answers by its script, on the caller's goroutine
// unless told to keep what it gets.
type testNode struct {
	id      string
	decline Reason
	answer  func(d *Delivery) // after TrySend; nil acks everybody

	mu   sync.Mutex
	got  []*Delivery
	kept []*Delivery
	keep bool // take deliveries and leave them queued

	quiet    bool // note nothing
	unscoped bool
	nudge    func(user string, seq uint64, done func(bool)) // nil: it knows no replays
}

func (n *testNode) Node() string { return n.id }
func (n *testNode) Scopes() bool { return !n.unscoped }

func (n *testNode) Describe(*Delivery) LinkState { return LinkState{State: "up", Verdict: n.decline} }

func (n *testNode) Nudge(user string, seq uint64, done func(bool)) {
	if n.nudge == nil {
		done(false)
		return
	}
	n.nudge(user, seq, done)
}

func (n *testNode) Send(d *Delivery) Reason {
	if n.decline != Sent {
		return n.decline
	}
	if n.quiet {
		d.TrySend()
		_, _ = d.Ack(Ack{Delivered: d.Targets()})
		return Sent
	}
	n.mu.Lock()
	if n.keep {
		n.kept = append(n.kept, d)
		n.mu.Unlock()
		return Sent
	}
	n.got = append(n.got, d)
	n.mu.Unlock()
	if !d.TrySend() {
		return Sent
	}
	if n.answer != nil {
		n.answer(d)
		return Sent
	}
	_, _ = d.Ack(Ack{Delivered: d.Targets()})
	return Sent
}

func (w *world) Room(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	if err := w.wait(ctx, room); err != nil {
		return false, 0, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	members, ok := w.rooms[room]
	for user, nodes := range members {
		if len(nodes) == 0 {
			add([]byte(user), nil)
		}
		for _, node := range nodes {
			add([]byte(user), []byte(node))
		}
	}
	if w.revision != nil {
		return ok, w.revision(), nil
	}
	return ok, 0, nil
}

func (w *world) Users(ctx context.Context, users []string, nodes [][]string) error {
	if err := w.wait(ctx, strings.Join(users, ",")); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, user := range users {
		nodes[i] = w.users[user]
	}
	return nil
}

func (w *world) wait(ctx context.Context, what string) error {
	w.mu.Lock()
	w.lookups = append(w.lookups, what)
	down, gate := w.down, w.gate
	w.mu.Unlock()
	if w.delay != nil {
		w.delay()
	}
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", route.ErrUnavailable, ctx.Err())
		}
	}
	if down != nil {
		return fmt.Errorf("%w: %w", route.ErrUnavailable, down)
	}
	return nil
}

func (w *world) Link(_ int, node string) Link {
	if n := w.nodes[node]; n != nil {
		return n
	}
	return nil
}

func (w *world) Links(int) []Link {
	if w.linksPanic {
		panic("links")
	}
	var links []Link
	for _, n := range w.nodes {
		links = append(links, n)
	}
	slices.SortFunc(links, func(a, b Link) int { return strings.Compare(a.Node(), b.Node()) })
	return links
}

// newWorld has the nodes A, B and C.
func newWorld() *world {
	w := &world{rooms: map[string]map[string][]string{}, users: map[string][]string{}, nodes: map[string]*testNode{}}
	for _, id := range []string{"A", "B", "C"} {
		w.nodes[id] = &testNode{id: id}
	}
	return w
}

func (w *world) engine(t *testing.T) *Engine {
	t.Helper()
	e, stop, err := w.build()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return e
}

func (w *world) build() (*Engine, func(), error) {
	shards, err := shard.New(shard.Config{Count: cmp.Or(w.shards, 2), PoolSize: w.pool})
	if err != nil {
		return nil, nil, err
	}
	config := route.Config{
		Source: w, Shards: shards.Len(),
		Shard: func(key string) int { return shards.For(key).Index() },
		Go:    func(home int, task func()) error { return shards.At(home).Go(task) },
	}
	if w.tune != nil {
		w.tune(&config)
	}
	directory, err := route.New(config)
	if err != nil {
		return nil, nil, err
	}
	w.config.Shards, w.config.Directory, w.config.Network = shards, directory, w
	e, err := New(w.config)
	return e, func() {
		directory.Close()
		if err := shards.Close(context.Background()); err != nil {
			panic(err)
		}
	}, err
}

func (w *world) lookedUp() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.lookups)
}

func push(p *Push) *Push {
	p.Payload, p.Content = []byte("x"), Content{Present: true, DataLen: 1}
	return p
}

func toRoom(room string, exclude ...string) *Push {
	return push(&Push{Request: Request{Kind: ToRoom, Room: room, Exclude: exclude}})
}
func toUser(user string) *Push { return push(&Push{Request: Request{Kind: ToUser, User: user}}) }
func toUsers(users ...string) *Push {
	return push(&Push{Request: Request{Kind: ToUsers, Users: users}})
}

func do(t *testing.T, e *Engine, p *Push) Result {
	t.Helper()
	r, err := e.Do(context.Background(), p)
	if err != nil {
		t.Fatalf("push: %v", err)
	}
	balance(t, p, r)
	return r
}

// balance checks the tally against the push's own count of its users.
func balance(t *testing.T, p *Push, r Result) {
	t.Helper()
	if r.Targets != r.Delivered+r.Offline+r.Failed+r.Unknown {
		t.Errorf("tally do not balance: %+v", r)
	}
	if p.Kind != ToAll && r.Targets != p.targets {
		t.Errorf("%d targets in the tally, %d users: %+v", r.Targets, p.targets, r)
	}
	for _, f := range r.NodeFailures {
		if strings.Contains(f.Reason, "internal") {
			t.Errorf("tally were mended: %+v", r)
		}
	}
}

func ack(a Ack) func(*Delivery) {
	return func(d *Delivery) { _, _ = d.Ack(a) }
}

// notHere answers that of the users asked for, those named are not there.
func notHere(users ...string) func(*Delivery) {
	return func(d *Delivery) {
		var a Ack
		for _, u := range d.all() {
			if slices.Contains(users, u) {
				a.NotHere = append(a.NotHere, u)
			} else {
				a.Delivered++
			}
		}
		_, _ = d.Ack(a)
	}
}

func TestOutcomesOfEachKindOfPush(t *testing.T) {
	lose := func(d *Delivery) { d.Lose(LostStream) }
	tests := map[string]struct {
		script func(w *world)
		push   *Push
		want   Result
	}{
		"room over two nodes": {
			push: toRoom("r"),
			want: Result{Found: true, Targets: 4, Delivered: 4},
		},
		"room with excluded members, strangers and duplicates": {
			push: toRoom("r", "u1", "u1", "nobody", "u3"),
			want: Result{Found: true, Targets: 2, Delivered: 2},
		},
		"room with everybody excluded": {
			push: toRoom("r", "u1", "u2", "u3", "u4"),
			want: Result{Found: true},
		},
		"unknown room": {push: toRoom("nowhere"), want: Result{}},
		"room with one node lost": {
			script: func(w *world) { w.nodes["B"].answer = lose },
			push:   toRoom("r"),
			want: Result{
				Found: true, Targets: 4, Delivered: 2, Unknown: 2,
				NodeFailures: []NodeFailure{{"B", "unknown: stream broke before the acknowledgement", 2}},
			},
		},
		"room with one node declining and a member without a node": {
			script: func(w *world) {
				w.nodes["A"].decline = DropQueueFull
				w.rooms["r"]["u9"] = nil
			},
			push: toRoom("r"),
			want: Result{
				Found: true, Targets: 5, Delivered: 2, Offline: 1, Failed: 2,
				NodeFailures: []NodeFailure{{"A", "failed: queue full", 2}},
			},
		},
		"member on two nodes counts once, and the better outcome counts": {
			script: func(w *world) {
				w.rooms["r"]["u1"] = []string{"A", "B"}
				w.nodes["A"].answer = lose
			},
			push: toRoom("r"),
			want: Result{
				Found: true, Targets: 4, Delivered: 3, Unknown: 1,
				NodeFailures: []NodeFailure{{"A", "unknown: stream broke before the acknowledgement", 1}},
			},
		},
		"ack that leaves users unexplained": {
			script: func(w *world) { w.nodes["A"].answer = ack(Ack{Delivered: 1}) },
			push:   toRoom("r"),
			want: Result{
				Found: true, Targets: 4, Delivered: 3, Unknown: 1,
				NodeFailures: []NodeFailure{{"A", "unknown: acknowledgement does not add up", 1}},
			},
		},
		"ack that claims too much": {
			script: func(w *world) { w.nodes["A"].answer = ack(Ack{Delivered: 3}) },
			push:   toRoom("r"),
			want: Result{
				Found: true, Targets: 4, Delivered: 2, Unknown: 2,
				NodeFailures: []NodeFailure{{"A", "unknown: acknowledgement does not add up", 2}},
			},
		},
		"slow client of one member": {
			script: func(w *world) {
				w.nodes["A"].answer = ack(Ack{Delivered: 1, Failed: []string{"u1"}, Text: "connection queue full"})
			},
			push: toRoom("r"),
			want: Result{
				Found: true, Targets: 4, Delivered: 3, Failed: 1,
				NodeFailures: []NodeFailure{{"A", "failed: connection queue full", 1}},
			},
		},
		"user on one node":    {push: toUser("u1"), want: Result{Found: true, Targets: 1, Delivered: 1}},
		"user on two nodes":   {push: toUser("u5"), want: Result{Found: true, Targets: 1, Delivered: 1}},
		"user without a node": {push: toUser("nobody"), want: Result{Targets: 1, Offline: 1}},
		"user on two nodes, one of them lost": {
			script: func(w *world) { w.nodes["A"].answer = lose },
			push:   toUser("u5"),
			want:   Result{Found: true, Targets: 1, Delivered: 1},
		},
		"users over nodes, one twice, one offline": {
			push: toUsers("u1", "u3", "u5", "u1", "nobody"),
			want: Result{Found: true, Targets: 4, Delivered: 3, Offline: 1},
		},
		"broadcast": {
			script: func(w *world) {
				w.nodes["A"].answer = ack(Ack{Delivered: 7})
				w.nodes["B"].answer = ack(Ack{Delivered: 3, FailedUsers: 2, Text: "slow"})
				w.nodes["C"].answer = lose
			},
			push: push(&Push{Request: Request{Kind: ToAll}}),
			want: Result{
				Found: true, Targets: 12, Delivered: 10, Failed: 2,
				NodeFailures: []NodeFailure{
					{"B", "failed: slow", 2},
					{"C", "unknown: stream broke before the acknowledgement", 0},
				},
			},
		},
		"broadcast without a node": {
			script: func(w *world) { clear(w.nodes) },
			push:   push(&Push{Request: Request{Kind: ToAll}}),
			want:   Result{},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"A"}, "u3": {"B"}, "u4": {"B"}}
			w.users = map[string][]string{"u1": {"A"}, "u3": {"B"}, "u5": {"A", "B"}}
			if tt.script != nil {
				tt.script(w)
			}
			got := do(t, w.engine(t), tt.push)
			if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", tt.want) {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

func TestStaleRoutesHealWithOneLookup(t *testing.T) {
	t.Run("user who moved is reached", func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		do(t, e, toUser("u"))
		w.users["u"] = []string{"B"}
		w.nodes["A"].answer = notHere("u")
		if r := do(t, e, toUser("u")); r.Delivered != 1 {
			t.Errorf("got %+v", r)
		}
		if n := w.lookedUp(); n != 2 {
			t.Errorf("%d look-ups, want the first and one more", n)
		}
	})
	t.Run("in a pool with one place", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			w.pool = 1
			e := w.engine(t)
			w.users["u"] = []string{"A"}
			do(t, e, toUser("u"))
			synctest.Wait() // the place of the first look-up is free a moment after its push has ended
			w.users["u"] = []string{"B"}
			w.nodes["A"].answer = notHere("u")
			if r := do(t, e, toUser("u")); r.Delivered != 1 {
				t.Errorf("got %+v", r)
			}
		})
	})
	t.Run("user who left is offline", func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		w.nodes["A"].answer = notHere("u")
		for _, now := range [][]string{{"A"}, nil} {
			w.users["u"] = []string{"A"}
			do(t, e, toUser("u"))
			w.users["u"] = now
			if r := do(t, e, toUser("u")); r.Offline != 1 || r.Failed != 0 || r.Success() {
				t.Errorf("Controller says %v: %+v", now, r)
			}
		}
	})
	t.Run("room members who moved are reached in one more delivery", func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"A"}, "u3": {"B"}}
		do(t, e, toRoom("r"))
		w.rooms["r"] = map[string][]string{"u1": {"C"}, "u3": {"B"}}
		w.nodes["A"].answer = notHere("u1", "u2")
		r := do(t, e, toRoom("r"))
		if r.Delivered != 2 || r.Offline != 1 || r.Targets != 3 {
			t.Errorf("got %+v", r)
		}
		if got := w.nodes["C"].got; len(got) != 1 || !slices.Equal(got[0].Users(), []string{"u1"}) || got[0].Room() != "r" {
			t.Errorf("node C got %v", got)
		}
	})
	t.Run("node that is gone is routed around", func(t *testing.T) {
		for _, why := range []Reason{DropUnreachable, DropDraining, DropUnknownNode} {
			w := newWorld()
			e := w.engine(t)
			w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"A"}, "u3": {"A"}}
			do(t, e, toRoom("r"))
			w.rooms["r"] = map[string][]string{"u1": {"B"}, "u3": {"A"}}
			w.nodes["A"].decline = why
			r := do(t, e, toRoom("r"))
			if r.Delivered != 1 || r.Offline != 1 || r.Failed != 1 {
				t.Errorf("%s: got %+v", why, r)
			}
		}
	})
	t.Run("Controller away", func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		do(t, e, toUser("u"))
		w.nodes["A"].answer = notHere("u")
		w.down = errors.New("away")
		// Nobody says that the user has no connection: that is not offline.
		r := do(t, e, toUser("u"))
		want := []NodeFailure{{"A", "failed: controller not reachable", 1}}
		if r.Failed != 1 || r.Offline != 0 || !slices.Equal(r.NodeFailures, want) {
			t.Errorf("got %+v", r)
		}
	})
	t.Run("only once", func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		do(t, e, toUser("u"))
		w.users["u"] = []string{"B"}
		w.nodes["A"].answer, w.nodes["B"].answer = notHere("u"), notHere("u")
		if r := do(t, e, toUser("u")); r.Offline != 1 {
			t.Errorf("got %+v", r)
		}
		if n := w.lookedUp(); n != 2 {
			t.Errorf("%d look-ups", n)
		}
	})
	t.Run("unknown is never sent again", func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		do(t, e, toUser("u"))
		w.users["u"] = []string{"B"}
		w.nodes["A"].answer = func(d *Delivery) { d.Lose(LostAck) }
		if r := do(t, e, toUser("u")); r.Unknown != 1 {
			t.Errorf("got %+v", r)
		}
		if n := len(w.nodes["B"].got); n != 0 {
			t.Errorf("%d deliveries to B", n)
		}
	})
}

func TestErrorMeansNothingWasWritten(t *testing.T) {
	ctx := context.Background()
	t.Run("Controller away", func(t *testing.T) {
		w := newWorld()
		w.down = errors.New("away")
		e := w.engine(t)
		for _, p := range []*Push{toRoom("r"), toUser("u"), toUsers("u", "v")} {
			if _, err := e.Do(ctx, p); !errors.Is(err, ErrUnavailable) {
				t.Errorf("got %v", err)
			}
		}
	})
	t.Run("deadline while queued", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			e := w.engine(t)
			w.users["u"] = []string{"A"}
			w.nodes["A"].keep = true
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			if _, err := e.Do(ctx, toUser("u")); !errors.Is(err, ErrDeadline) {
				t.Errorf("got %v", err)
			}
			if w.nodes["A"].kept[0].TrySend() {
				t.Error("the link may still write a push that has been answered")
			}
		})
	})
	t.Run("deadline while the route is looked up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			w.gate = make(chan struct{})
			e := w.engine(t)
			ctx, cancel := context.WithTimeout(ctx, time.Millisecond)
			defer cancel()
			if _, err := e.Do(ctx, toRoom("r")); !errors.Is(err, ErrDeadline) {
				t.Errorf("got %v", err)
			}
			close(w.gate)
			synctest.Wait()
			if n := len(w.nodes["A"].got); n != 0 {
				t.Errorf("%d deliveries after the answer", n)
			}
		})
	})
	t.Run("already expired or canceled", func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		gone, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := e.Do(gone, toRoom("r")); !errors.Is(err, ErrCanceled) {
			t.Errorf("got %v", err)
		}
		if n := w.lookedUp(); n != 0 {
			t.Errorf("%d look-ups", n)
		}
	})
}

func TestDeadlineAfterWritingIsUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"B"}, "u3": {"C"}}
		var late *Delivery
		w.nodes["A"].answer = func(d *Delivery) { late = d }
		w.nodes["B"].keep = true
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		p := toRoom("r")
		r, err := e.Do(ctx, p)
		if err != nil || r.Unknown != 1 || r.Failed != 1 || r.Delivered != 1 {
			t.Fatalf("got %+v, %v", r, err)
		}
		balance(t, p, r)
		if now, err := late.Ack(Ack{Delivered: 1}); now || err != nil {
			t.Errorf("late ack settled again: %v, %v", now, err)
		}
	})
}

func TestDrainWaitsForPushesInFlightAndRefusesNewOnes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		var flying *Delivery
		w.nodes["A"].answer = func(d *Delivery) { flying = d }
		answered := make(chan Result, 1)
		go func() {
			r, _ := e.Do(context.Background(), toUser("u"))
			answered <- r
		}()
		synctest.Wait()
		short, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := e.Drain(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("drain with a push in flight: %v", err)
		}
		if _, err := e.Do(context.Background(), toUser("u")); !errors.Is(err, ErrDraining) {
			t.Errorf("new push: %v", err)
		}
		drained := make(chan error, 1)
		go func() { drained <- e.Drain(context.Background()) }()
		synctest.Wait()
		_, _ = flying.Ack(Ack{Delivered: 1})
		if err := <-drained; err != nil {
			t.Error(err)
		}
		if r := <-answered; r.Delivered != 1 {
			t.Errorf("got %+v", r)
		}
	})
}

// TestPanicWhileRoutedEndsThePush lets the network panic on the caller's goroutine,
// in the pool and in a heal.
func TestPanicWhileRoutedEndsThePush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A", "B"}
		w.rooms["r"] = map[string][]string{"u": {"A"}, "v": {"B"}}
		w.nodes["B"].answer = func(*Delivery) { panic("node B") }
		for _, p := range []*Push{toUser("u"), toUser("u"), toUsers("u", "x"), toRoom("r"), push(&Push{Request: Request{Kind: ToAll}})} {
			r, err := e.Do(context.Background(), p)
			if err != nil || r.Targets != r.Delivered+r.Unknown+r.Offline+r.Failed || len(r.NodeFailures) == 0 && r.Delivered == 0 {
				t.Errorf("kind %d: %+v, %v", p.Kind, r, err)
			}
		}
		w.linksPanic = true
		if r, err := e.Do(context.Background(), push(&Push{Request: Request{Kind: ToAll}})); !errors.Is(err, ErrInternal) {
			t.Errorf("broadcast: %+v, %v", r, err)
		}
		synctest.Wait()
		w.nodes["B"].answer = nil
		if r := do(t, e, toUser("u")); r.Delivered != 1 {
			t.Errorf("afterwards: %+v", r)
		}
		w.nodes["A"].answer, w.nodes["B"].answer = notHere("u"), notHere("u")
		synctest.Wait() // look-ups of the pushes that ended early still read the users
		w.users["u"] = []string{"C"}
		w.nodes["C"].answer = func(*Delivery) { panic("node C") }
		if r, err := e.Do(context.Background(), toUser("u")); err != nil || r.Unknown != 1 {
			t.Errorf("heal: %+v, %v", r, err)
		}
		synctest.Wait()
		if s := e.Stats(); s.InFlight != 0 || s.Panics == 0 || s.Directory.Waiting != 0 {
			t.Errorf("left behind: %+v", s)
		}
	})
}

// TestPushThatEndedEarlyHoldsNothing cancels an ordered push that waits in line and
// lets the answer come afterwards: the fence must not stay up behind it.
func TestPushThatEndedEarlyHoldsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		w.gate = make(chan struct{})
		var stream Order
		ordered := func(timeout time.Duration) *Push {
			p := toUser("u")
			p.Order, p.Timeout = &stream, timeout
			return p
		}
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		if _, err := e.Do(ctx, ordered(0)); !errors.Is(err, ErrDeadline) {
			t.Errorf("got %v", err)
		}
		close(w.gate)
		synctest.Wait()
		time.Sleep(2 * time.Second)
		w.mu.Lock()
		w.users["u"] = []string{"B"}
		w.mu.Unlock()
		if r := do(t, e, ordered(0)); r.Delivered != 1 {
			t.Errorf("behind a fence that nobody holds: %+v", r)
		}
	})
}

// TestPushBehindAFenceEndsAtItsDeadline leaves the push in front in flight.
func TestPushBehindAFenceEndsAtItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		w.nodes["A"].keep = true
		var stream Order
		ordered := func(timeout time.Duration, c Completer) *Push {
			p := toUser("u")
			p.Order, p.Timeout = &stream, timeout
			if err := e.Start(p, c); err != nil {
				t.Fatal(err)
			}
			return p
		}
		var front, behind order
		ordered(0, &front)
		time.Sleep(2 * time.Second) // looked up and sent, the answer is old by now
		w.mu.Lock()
		w.users["u"] = []string{"B"}
		w.mu.Unlock()
		p := ordered(time.Second, &behind)
		time.Sleep(time.Second + time.Millisecond)
		synctest.Wait()
		if behind.done != 1 {
			t.Fatal("waits for ever behind the fence")
		}
		if _, err := p.Result(); !errors.Is(err, ErrDeadline) {
			t.Errorf("got %v", err)
		}
		for _, d := range w.nodes["A"].kept {
			d.Drop(DropStalled)
		}
		if n := e.Stats(); n.InFlight != 0 || n.Directory.Waiting != 0 || front.done != 1 {
			t.Errorf("left behind: %+v", n)
		}
	})
}

func TestTwoWhoDrainAreBothTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		w.nodes["A"].keep = true
		var o order
		if err := e.Start(toUser("u"), &o); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		drained := 0
		var both sync.WaitGroup
		var mu sync.Mutex
		for range 2 {
			both.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				if e.Drain(ctx) == nil {
					mu.Lock()
					drained++
					mu.Unlock()
				}
			})
		}
		synctest.Wait()
		w.nodes["A"].kept[0].Drop(DropStalled)
		both.Wait()
		if drained != 2 {
			t.Errorf("%d of 2", drained)
		}
	})
}

// TestHealAsksAfterTheNodesAnswer has the route looked up again while the push is in
// flight, before the user moves: that answer is not the one to ask for.
func TestHealAsksAfterTheNodesAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		w.nodes["A"].keep = true
		var o order
		p := toUser("u")
		if err := e.Start(p, &o); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		if err := e.Start(toUser("u"), &o); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(time.Millisecond)
		w.mu.Lock()
		w.users["u"] = []string{"B"}
		w.mu.Unlock()
		for _, d := range w.nodes["A"].kept {
			d.TrySend()
			_, _ = d.Ack(Ack{NotHere: []string{"u"}})
		}
		synctest.Wait()
		if r, err := p.Result(); err != nil || r.Delivered != 1 {
			t.Errorf("got %+v, %v", r, err)
		}
	})
}

// TestExpiryThatMeetsTheLastAckChangesNothingAfterwards lets the end of a push and its
// deadline race: one of them wins, and the loser touches nothing.
func TestExpiryThatMeetsTheLastAckChangesNothingAfterwards(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	w.users["u"] = []string{"A"}
	e.directory.Vouch(time.Now().Add(1000 * time.Hour)) // the route stays cached, however slow the machine
	do(t, e, toUser("u"))
	for e.directory.Users.Cached(e.shards.For("u").Index(), "u", time.Now()) == nil {
		runtime.Gosched() // who waited for the look-up is told before others see its answer
	}
	w.nodes["A"].keep = true
	for range 200 {
		p, told := toUser("u"), waiter{done: make(chan struct{}, 1)}
		if err := e.Start(p, &told); err != nil {
			t.Fatal(err)
		}
		d := w.nodes["A"].kept[len(w.nodes["A"].kept)-1]
		var both sync.WaitGroup
		both.Go(func() {
			if d.TrySend() {
				_, _ = d.Ack(Ack{Delivered: 1})
			}
		})
		both.Go(func() { p.expire(ErrDeadline) })
		<-told.done
		both.Wait()
		if r, err := p.Result(); err == nil {
			balance(t, p, r)
		} else if !errors.Is(err, ErrDeadline) {
			t.Fatal(err)
		}
	}
}
