package storetest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/refcontroller"
)

// feed is what stands between a store and a Push-Manager's routes: changes wait in it until they
// are delivered, and answers until they are let through.
type feed struct {
	suite *suite
	dir   *route.Directory
	tasks sync.WaitGroup

	mu   sync.Mutex
	read sync.Cond // of mu: a look-up has read the store
	// Guarded by mu.
	reads int                    // look-ups that have not read the store yet
	told  []refcontroller.Change // not delivered yet
	gate  chan struct{}          // answers wait for it, nil if they do not
	mute  bool                   // answers come from a Controller that tells no revision
}

func newFeed(t *testing.T, s *suite) *feed {
	f := &feed{suite: s}
	f.read.L = &f.mu
	var err error
	f.dir, err = route.New(route.Config{
		Source: f, Shards: 1, Shard: func(string) int { return 0 }, LookupTimeout: time.Hour,
		Go: func(_ int, task func()) error { f.count(1); f.tasks.Go(task); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.also = func(c refcontroller.Change) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.told = append(f.told, c)
	}
	s.mu.Unlock()
	t.Cleanup(func() {
		f.open()
		f.tasks.Wait()
		f.dir.Close()
	})
	f.sync()
	return f
}

func (f *feed) count(reads int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reads += reads
	f.read.Broadcast()
}

// sync is a change stream that begins.
func (f *feed) sync() {
	f.mu.Lock()
	f.told = nil
	f.mu.Unlock()
	f.dir.InvalidateAll()
	f.dir.Vouch(time.Now().Add(time.Hour))
}

// deliver takes the first n changes to the routes: how they are, or by name as an old Controller would.
func (f *feed) deliver(n int, byName bool) {
	f.mu.Lock()
	some := f.told[:min(n, len(f.told))]
	f.told = f.told[len(some):]
	f.mu.Unlock()
	for _, c := range some {
		f.dir.Invalidate(c.Rooms, c.Users)
		var moves []route.Move
		for _, m := range c.Moves {
			if byName {
				f.dir.Invalidate([]string{m.Room}, []string{m.User})
				continue
			}
			moves = append(moves, route.Move{Room: m.Room, User: m.User, Node: m.Node, Left: m.Left, Revision: c.Revision})
		}
		f.dir.Moved(moves)
	}
}

func (f *feed) hold() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gate == nil {
		f.gate = make(chan struct{})
	}
}

func (f *feed) open() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gate != nil {
		close(f.gate)
		f.gate = nil
	}
}

// Room implements route.Source.
func (f *feed) Room(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	f.mu.Lock()
	gate, mute := f.gate, f.mute
	f.mu.Unlock()
	info, at, err := f.suite.Room(ctx, room)
	f.count(-1)
	if err != nil {
		return false, 0, fmt.Errorf("%w: %w", route.ErrUnavailable, err)
	}
	if gate != nil {
		<-gate
	}
	for _, u := range info.GetUsers() {
		add([]byte(u.GetUserId()), []byte(u.GetNodeId()))
	}
	if mute {
		at.Number = 0
	}
	return info != nil, at.Number, nil
}

// Users implements route.Source.
func (f *feed) Users(context.Context, []string, [][]string) error { return route.ErrUnavailable }

// query is one question about a room. What was delivered by the time of asking has to be in the answer.
type query struct {
	room      string
	delivered int
	answer    chan *route.Snapshot
}

func (*query) Lookup(ctx context.Context, _ string) (context.Context, func(error)) {
	return ctx, func(error) {}
}

func (q *query) Routed(_ []string, snaps []*route.Snapshot, _ error) {
	if len(snaps) == 0 {
		q.answer <- nil
		return
	}
	q.answer <- snaps[0]
}

// history is every state that a room has been in, as the places of its members.
type history map[string][]map[[2]string]bool

func places(s *route.Snapshot) map[[2]string]bool {
	in := map[[2]string]bool{}
	for _, g := range s.Groups {
		for _, user := range g.Users {
			in[[2]string{user, g.Node}] = true
		}
	}
	return in
}

// check fails if the answer has a place in a state that is over, or does not add up.
func (h history) check(t *rapid.T, q *query, s *route.Snapshot) {
	if s == nil || s.Stale != nil {
		t.Fatalf("%s: the answer is %v", q.room, s)
	}
	got := places(s)
	for place := range got {
		if !h.possible(q, place, true) {
			t.Fatalf("%s: %v is in the answer and has left", q.room, place)
		}
	}
	users, shared := map[string]int{}, []string{}
	for place := range got {
		if users[place[0]]++; users[place[0]] == 2 {
			shared = append(shared, place[0])
		}
	}
	for _, state := range h[q.room] {
		for place := range state {
			if !got[place] && !h.possible(q, place, false) {
				t.Fatalf("%s: %v is not in the answer and has joined", q.room, place)
			}
		}
	}
	slices.Sort(shared)
	if s.Users != len(users) || !slices.Equal(s.Shared, shared) && len(shared)+len(s.Shared) > 0 || s.Found != (len(users) > 0) {
		t.Fatalf("%s: %d users, shared %v, found %v of %v", q.room, s.Users, s.Shared, s.Found, got)
	}
	for _, g := range s.Groups {
		if !slices.IsSorted(g.Users) || len(g.Users) == 0 {
			t.Fatalf("%s: group %v", q.room, g)
		}
	}
}

// possible tells whether a place has been so since what had been delivered when q was asked.
func (h history) possible(q *query, place [2]string, in bool) bool {
	return slices.ContainsFunc(h[q.room][q.delivered:], func(state map[[2]string]bool) bool { return state[place] == in })
}

// interleaving is one random order of changes, of what is told of them, and of look-ups.
type interleaving struct {
	*feed

	world world
	truth map[member]bool
	past  history
	asked []*query
}

// record notes what is true now.
func (i *interleaving) record() {
	for _, room := range i.world.rooms {
		state := map[[2]string]bool{}
		for k := range i.truth {
			if k.room == room {
				state[[2]string{k.user, k.node}] = true
			}
		}
		i.past[room] = append(i.past[room], state)
	}
}

func (i *interleaving) pending() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.told)
}

// change makes at most one change, and notes what it has come to.
func (i *interleaving) change(rt *rapid.T, do func() error) {
	before := i.pending()
	if err := do(); err != nil {
		rt.Fatal(err)
	}
	switch n := i.pending() - before; n {
	case 0:
	case 1:
		i.record()
	default:
		rt.Fatalf("one change is told as %d", n)
	}
}

func (i *interleaving) ask(room string, refresh bool) *query {
	q := &query{room: room, delivered: len(i.past[room]) - 1 - i.pending(), answer: make(chan *route.Snapshot, 1)}
	now := time.Now()
	if refresh {
		i.dir.Rooms.Refresh(0, []string{room}, route.Missing{Node: i.world.nodes[0], Users: i.world.users[:1], Since: now}, q)
	} else if s := i.dir.Rooms.Cached(0, room, now); s != nil {
		q.answer <- s
	} else {
		i.dir.Rooms.Ask(0, []string{room}, now, q)
	}
	i.mu.Lock()
	for i.reads > 0 { // what changes from now on is not in the answer
		i.read.Wait()
	}
	i.mu.Unlock()
	return q
}

func (i *interleaving) settle(rt *rapid.T) {
	i.open()
	for _, q := range i.asked {
		i.past.check(rt, q, <-q.answer)
	}
	i.asked = nil
}

// testRoutes holds routes that are kept up to date by what a store tells against the store.
func testRoutes(t *testing.T, s *suite) {
	f := newFeed(t, s)
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld()
		w.rooms = w.rooms[:1] // all that happens is about it
		f.open()
		f.sync()
		ctx := context.Background()
		i := &interleaving{feed: f, world: w, truth: map[member]bool{}, past: history{}}
		i.record()
		rt.Repeat(map[string]func(*rapid.T){
			"join": func(rt *rapid.T) {
				k, name := w.draw(rt), rapid.SampledFrom([]string{"", "name"}).Draw(rt, "name")
				i.truth[k] = true
				i.change(rt, func() error {
					_, err := s.Join(ctx, refcontroller.Join{Reporter: by(k.node), User: k.user, Room: k.room, Name: name})
					return err
				})
			},
			"leave": func(rt *rapid.T) {
				k := w.draw(rt)
				delete(i.truth, k)
				i.change(rt, func() error {
					_, err := s.Leave(ctx, refcontroller.Leave{Reporter: by(k.node), User: k.user, Room: k.room})
					return err
				})
			},
			"leave all nodes": func(rt *rapid.T) {
				k := w.draw(rt)
				maps.DeleteFunc(i.truth, func(o member, _ bool) bool { return o.user == k.user && o.room == k.room })
				i.change(rt, func() error {
					_, err := s.Leave(ctx, refcontroller.Leave{User: k.user, Room: k.room})
					return err
				})
			},
			"drop node": func(rt *rapid.T) {
				k := w.draw(rt)
				maps.DeleteFunc(i.truth, func(o member, _ bool) bool { return o.node == k.node })
				i.change(rt, func() error {
					_, err := s.DropNode(ctx, k.node)
					return err
				})
			},
			"deliver": func(rt *rapid.T) {
				f.deliver(rapid.IntRange(1, 3).Draw(rt, "how many"), rapid.IntRange(0, 9).Draw(rt, "by name") == 0)
			},
			"ask": func(rt *rapid.T) {
				if rapid.Bool().Draw(rt, "hold") {
					f.hold()
				}
				i.asked = append(i.asked, i.ask(rapid.SampledFrom(w.rooms).Draw(rt, "room"), rapid.IntRange(0, 4).Draw(rt, "refresh") == 0))
			},
			"answers come": i.settle,
			"another Controller": func(rt *rapid.T) {
				f.mu.Lock()
				f.mute = rapid.IntRange(0, 9).Draw(rt, "mute") == 0
				f.mu.Unlock()
			},
			"too much to tell": func(rt *rapid.T) {
				if rapid.IntRange(0, 9).Draw(rt, "all") == 0 {
					f.sync()
				}
			},
		})
		i.settle(rt)
		f.deliver(i.pending(), false)
		for _, room := range w.rooms {
			q := i.ask(room, false)
			i.past.check(rt, q, <-q.answer)
		}
		f.tasks.Wait()
		for _, node := range w.nodes {
			if _, err := s.DropNode(ctx, node); err != nil {
				rt.Fatal(err)
			}
		}
	})
	if n := f.dir.Stats().Moves; n == 0 {
		t.Error("no route was brought up to date")
	}
}

// testRoutesAtOnce does the same where all of it happens at once: a room is read while it changes.
func testRoutesAtOnce(t *testing.T, s *suite) {
	f := newFeed(t, s)
	for round := range 5 {
		room := fmt.Sprint("at-once-", round)
		truth := map[[2]string]bool{}
		ended := make(chan struct{})
		var others sync.WaitGroup
		others.Go(func() { // the change stream
			for {
				select {
				case <-ended:
					return
				default:
					f.deliver(10, false)
					time.Sleep(time.Millisecond)
				}
			}
		})
		others.Go(func() { // pushes, of which some are told that somebody is not there
			for i := 0; ; i++ {
				select {
				case <-ended:
					return
				default:
				}
				q := &query{answer: make(chan *route.Snapshot, 1)}
				now := time.Now()
				if i%2 == 0 {
					f.dir.Rooms.Refresh(0, []string{room}, route.Missing{Node: "n0", Users: []string{"u0"}, Since: now}, q)
				} else if s := f.dir.Rooms.Cached(0, room, now); s != nil {
					continue
				} else {
					f.dir.Rooms.Ask(0, []string{room}, now, q)
				}
				<-q.answer
			}
		})
		for i := range 120 {
			user, node := fmt.Sprint("u", (i*7+round)%40), fmt.Sprint("n", i%3)
			var err error
			if place := [2]string{user, node}; truth[place] {
				delete(truth, place)
				_, err = s.Leave(t.Context(), refcontroller.Leave{Reporter: by(node), User: user, Room: room})
			} else {
				truth[place] = true
				_, err = s.Join(t.Context(), refcontroller.Join{Reporter: by(node), User: user, Room: room})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		close(ended)
		others.Wait()
		f.deliver(1<<30, false)
		q := &query{room: room, answer: make(chan *route.Snapshot, 1)}
		got := f.dir.Rooms.Cached(0, room, time.Now())
		if got == nil {
			f.dir.Rooms.Ask(0, []string{room}, time.Now(), q)
			got = <-q.answer
		}
		if got == nil || !maps.Equal(places(got), truth) {
			t.Fatalf("round %d: the route is %v, and the room is %v", round, got, truth)
		}
	}
}
