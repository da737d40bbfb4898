package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

func toRooms(rooms ...string) *Push {
	return push(&Push{Request: Request{Kind: ToRooms, Rooms: NewRoomList(rooms)}})
}

func TestOutcomesOfAPushToSeveralRooms(t *testing.T) {
	lose := func(d *Delivery) { d.Lose(LostStream) }
	tests := map[string]struct {
		script func(w *world)
		push   *Push
		want   Result
	}{
		"each user once": {push: toRooms("r", "s"), want: Result{Found: true, Targets: 4, Delivered: 4}},
		"excluded members, strangers and duplicates": {
			push: push(&Push{Request: Request{Kind: ToRooms, Rooms: NewRoomList([]string{"s", "r"}), Exclude: []string{"u2", "u2", "x", "u4"}}}),
			want: Result{Found: true, Targets: 2, Delivered: 2},
		},
		"rooms that do not exist are passed by": {
			push: toRooms("r", "nowhere", "nothing"), want: Result{Found: true, Targets: 3, Delivered: 3, RoomsNotFound: 2},
		},
		"none of them exists": {push: toRooms("nowhere", "nothing"), want: Result{RoomsNotFound: 2}},
		"one room, named twice": {
			push: toRooms("r", "r"), want: Result{Found: true, Targets: 3, Delivered: 3},
		},
		"a member without a node": {
			script: func(w *world) { w.rooms["s"]["u9"] = nil },
			push:   toRooms("r", "s"), want: Result{Found: true, Targets: 5, Delivered: 4, Offline: 1},
		},
		"a member on two nodes counts once": {
			script: func(w *world) {
				w.rooms["r"]["u2"] = []string{"A"}
				w.rooms["s"]["u2"] = []string{"B"}
				w.nodes["A"].answer = lose
			},
			push: toRooms("r", "s"),
			want: Result{
				Found: true, Targets: 4, Delivered: 3, Unknown: 1,
				NodeFailures: []NodeFailure{{"A", "unknown: stream broke before the acknowledgement", 1}},
			},
		},
		"a node that does not take several rooms": {
			script: func(w *world) { w.nodes["B"].decline = DropNoRooms },
			push:   toRooms("r", "s"),
			want: Result{
				Found: true, Targets: 4, Delivered: 1, Failed: 3,
				NodeFailures: []NodeFailure{{"B", "failed: node cannot take several rooms", 3}},
			},
		},
		"a user who has moved is sent on": {
			script: func(w *world) {
				w.nodes["A"].answer = func(d *Delivery) {
					w.mu.Lock()
					w.rooms["r"]["u1"] = []string{"C"}
					w.mu.Unlock()
					notHere("u1")(d)
				}
			},
			push: toRooms("r", "s"), want: Result{Found: true, Targets: 4, Delivered: 4},
		},
		"a user who is gone is offline": {
			script: func(w *world) {
				w.nodes["B"].answer = func(d *Delivery) {
					w.mu.Lock()
					delete(w.rooms["r"], "u2")
					delete(w.rooms["s"], "u2")
					w.mu.Unlock()
					notHere("u2")(d)
				}
			},
			push: toRooms("r", "s"), want: Result{Found: true, Targets: 4, Delivered: 3, Offline: 1},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"B"}, "u3": {"B"}}
			w.rooms["s"] = map[string][]string{"u2": {"B"}, "u4": {"B"}}
			if test.script != nil {
				test.script(w)
			}
			e := w.engine(t)
			got := do(t, e, test.push)
			if !equalResults(got, test.want) {
				t.Errorf("got  %+v\nwant %+v", got, test.want)
			}
		})
	}
}

func equalResults(a, b Result) bool {
	failures := slices.Equal(a.NodeFailures, b.NodeFailures)
	a.NodeFailures, b.NodeFailures = nil, nil
	return failures && fmt.Sprintf("%+v", a) == fmt.Sprintf("%+v", b)
}

// sometimes is a world where some rooms cannot be looked up.
type sometimes struct {
	*world

	down map[string]bool
}

func (s *sometimes) Room(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	if s.down[room] {
		return false, 0, fmt.Errorf("%w: %s", route.ErrUnavailable, room)
	}
	return s.world.Room(ctx, room, add)
}

func TestRoomWithoutAnAnswerIsOneTargetThatFailed(t *testing.T) {
	w := newWorld()
	w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"B"}}
	w.rooms["s"] = map[string][]string{"u2": {"B"}, "u4": {"B"}}
	some := &sometimes{world: w, down: map[string]bool{"s": true, "t": true}}
	w.tune = func(c *route.Config) { c.Source = some }
	e := w.engine(t)
	got := do(t, e, toRooms("r", "s", "t"))
	want := Result{
		Found: true, Targets: 4, Delivered: 2, Failed: 2,
		NodeFailures: []NodeFailure{{"", "failed: controller not reachable", 2}},
	}
	if !equalResults(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if _, err := e.Do(context.Background(), toRooms("s", "t")); !errors.Is(err, ErrUnavailable) {
		t.Errorf("no room with an answer: %v", err)
	}
	delete(some.down, "s")
	if got := do(t, e, toRooms("r", "s")); got.Delivered != 3 || !got.Success() {
		t.Errorf("with an answer: %+v", got)
	}
}

// purse counts what its pushes cost.
type purse struct{ atomic.Int64 }

func (p *purse) Charge(cost int) { p.Add(int64(cost)) }

func TestPushToSeveralRoomsPaysForEachThatIsLookedUp(t *testing.T) {
	w := newWorld()
	w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"A"}}
	w.rooms["s"] = map[string][]string{"u2": {"A"}}
	w.rooms["t"] = map[string][]string{"u3": {"A"}}
	e := w.engine(t)
	e.directory.Vouch(time.Now().Add(time.Hour))
	for _, test := range []struct {
		rooms []string
		want  int64
	}{{[]string{"r", "s"}, 2 + 1}, {[]string{"r", "s"}, 1}, {[]string{"r", "s", "t", "t"}, 1 + 1}, {[]string{"x", "y"}, 2}} {
		var spent purse
		p := toRooms(test.rooms...)
		p.Budget = &spent
		do(t, e, p)
		if n := spent.Load(); n != test.want {
			t.Errorf("%v: %d, want %d", test.rooms, n, test.want)
		}
	}
}

func TestFewMembersOfSeveralRooms(t *testing.T) {
	w := newWorld()
	w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"B"}, "u3": {"B"}}
	w.rooms["s"] = map[string][]string{"u2": {"B"}, "u4": {"B"}}
	some := &sometimes{world: w, down: map[string]bool{"t": true}}
	w.tune = func(c *route.Config) { c.Source = some }
	e := w.engine(t)
	p := toRooms("r", "s")
	p.Only = []string{"u4", "u2", "stranger"}
	if r := do(t, e, p); r.Delivered != 2 || r.Targets != 2 {
		t.Errorf("%+v", r)
	}
	wantGot(t, "two of four", w.nodes["B"], []string{"u2", "u4"})
	p = toRooms("r", "s", "t")
	p.Only = []string{"u2"}
	if _, err := e.Do(t.Context(), p); !errors.Is(err, ErrUnavailable) {
		t.Errorf("who is in a room without an answer is not known: %v", err)
	}
	p = toRooms("r", "s")
	p.Only, p.Exclude = []string{"u2"}, []string{"u3"}
	if _, is := errors.AsType[*InvalidError](e.Start(p, &waiter{done: make(chan struct{}, 1)})); !is {
		t.Error("chosen and excluded")
	}
}

func TestWhatAPushToSeveralRoomsMustBe(t *testing.T) {
	l := Limits{Rooms: 3, store: true}.withDefaults()
	for name, test := range map[string]struct {
		push        *Push
		field, code string
	}{
		"no room":     {toRooms(), "room_ids", CodeRequired},
		"too many":    {toRooms("a", "b", "c", "d"), "room_ids", CodeTooMany},
		"empty id":    {toRooms("a", ""), "room_ids[1]", CodeRequired},
		"invalid id":  {toRooms("a\n"), "room_ids[0]", CodeIDMalformed},
		"stored":      {push(&Push{Request: Request{Kind: ToRooms, Rooms: NewRoomList([]string{"a", "b"}), Options: &Options{Store: true}}}), "options.offline", CodeUnavailable},
		"stored, one": {push(&Push{Request: Request{Kind: ToRooms, Rooms: NewRoomList([]string{"a", "a"}), Options: &Options{Store: true}}}), "", ""},
		"some":        {toRooms("a", "b", "a"), "", ""},
	} {
		err := l.Check(&test.push.Request)
		if invalid, is := errors.AsType[*InvalidError](err); is != (test.field != "") || is && (invalid.Field != test.field || invalid.Code != test.code) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSeveralRoomsWithChurn pushes to random lists of rooms while members come, go and move, and holds what each node
// is asked for against a model: of the union of the rooms each user once, on each node that has them, and nobody else.
func TestSeveralRoomsWithChurn(t *testing.T) {
	for seed := range many(60) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { churn(t, rand.New(rand.NewPCG(seed, 17))) })
		})
	}
}

func churn(t *testing.T, rng *rand.Rand) {
	w := newWorld()
	w.shards = 3
	revision := uint64(1)
	watched, evicting := rng.IntN(3) > 0, rng.IntN(4) == 0
	w.tune = func(c *route.Config) {
		if evicting {
			c.MaxMembers = 12
		}
	}
	w.revision = func() uint64 { return revision }
	e := w.engine(t)
	if watched {
		e.directory.Vouch(time.Now().Add(1000 * time.Hour))
	}
	var rooms []string
	for i := range 6 {
		room := fmt.Sprint("room-", i)
		rooms = append(rooms, room)
		w.rooms[room] = map[string][]string{}
	}
	change := func() {
		room, user := rooms[rng.IntN(len(rooms))], fmt.Sprint("u", rng.IntN(15))
		w.mu.Lock()
		before, now := w.rooms[room][user], []string(nil)
		if rng.IntN(3) > 0 {
			now = []string{nodeIDs[rng.IntN(3)]}
			if rng.IntN(6) == 0 {
				now = append(now, nodeIDs[rng.IntN(3)])
			}
			slices.Sort(now)
			now = slices.Compact(now)
			w.rooms[room][user] = now
		} else {
			delete(w.rooms[room], user)
		}
		w.mu.Unlock()
		var moves []route.Move
		for _, node := range before {
			if !slices.Contains(now, node) {
				revision++
				moves = append(moves, route.Move{Room: room, User: user, Node: node, Left: true, Revision: revision})
			}
		}
		for _, node := range now {
			revision++
			moves = append(moves, route.Move{Room: room, User: user, Node: node, Revision: revision})
		}
		if watched {
			e.directory.Moved(moves)
		}
	}
	for range 40 {
		change()
	}
	lists := [][]string{rooms[:3], rooms[2:], {rooms[5], rooms[0]}, append([]string{"nowhere", rooms[1]}, rooms[1:4]...)}
	for range 120 {
		for range rng.IntN(4) * rng.IntN(6) {
			change()
		}
		switch {
		case !watched:
			time.Sleep(1100 * time.Millisecond) // an answer is good for so long
		case rng.IntN(10) == 0:
			e.directory.InvalidateAll()
			e.directory.Vouch(time.Now().Add(1000 * time.Hour))
		case rng.IntN(10) == 0:
			time.Sleep(2 * time.Second)
		}
		list := lists[rng.IntN(len(lists))]
		want := map[string][]string{}
		unplaced := 0
		for _, room := range list {
			for user, nodes := range w.rooms[room] {
				for _, node := range nodes {
					if !slices.Contains(want[node], user) {
						want[node] = append(want[node], user)
					}
				}
			}
		}
		for _, id := range nodeIDs {
			w.nodes[id].got = nil
			slices.Sort(want[id])
		}
		r := do(t, e, toRooms(list...))
		users := map[string]bool{}
		for _, id := range nodeIDs {
			var got []string
			for _, d := range w.nodes[id].got {
				got = append(got, d.all()...)
			}
			if !slices.Equal(got, want[id]) {
				t.Fatalf("node %s got the push to %v for\n%v, want\n%v", id, list, got, want[id])
			}
			for _, user := range got {
				users[user] = true
			}
		}
		if r.Targets != len(users)+unplaced || r.Delivered != len(users) {
			t.Fatalf("%d users on nodes: %+v", len(users), r)
		}
	}
}

// TestSeveralRoomsKeepTheOrderOfAStream has pushes to rooms and to several rooms of one stream, over links of which each has
// its own delay, while users move. Of two pushes with a room in common a connection gets the first one first.
func TestSeveralRoomsKeepTheOrderOfAStream(t *testing.T) {
	for seed := range many(120) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { roomsOrder(t, rand.New(rand.NewPCG(seed, 23))) })
		})
	}
}

// keptPush is a push and which rooms it was for.
type keptPush struct {
	push  *Push
	rooms []string
}

func roomsOrder(t *testing.T, rng *rand.Rand) {
	w := newWorld()
	w.shards = 4
	e := w.engine(t)
	watched := rng.IntN(2) == 0
	if watched {
		e.directory.Vouch(time.Now().Add(1000 * time.Hour))
	}
	var mu sync.Mutex
	at, conn := map[string]string{}, map[string]int{}
	got := map[string][]byte{} // by user and connection
	rooms := []string{"r", "s", "t"}
	users := []string{"u0", "u1", "u2", "u3"}
	in := func(room, user string) bool { return (room[0]+user[1])%3 != 0 } // mostly
	move := func(user, node string) {
		mu.Lock()
		at[user] = node
		conn[user]++
		mu.Unlock()
		w.mu.Lock()
		for _, r := range rooms {
			if w.rooms[r] == nil {
				w.rooms[r] = map[string][]string{}
			}
			if in(r, user) {
				w.rooms[r][user] = []string{node}
			}
		}
		w.mu.Unlock()
		if watched {
			e.directory.Invalidate(rooms, []string{user})
		}
	}
	for i, u := range users {
		move(u, nodeIDs[i%3])
	}
	stop := make(chan struct{})
	var nodes sync.WaitGroup
	for _, id := range nodeIDs {
		links := make([]chan *Delivery, 4)
		for shard := range links {
			latency := time.Duration(rng.IntN(3)*rng.IntN(100)) * time.Millisecond
			links[shard] = make(chan *Delivery, 10_000)
			nodes.Go(func() {
				for {
					var d *Delivery
					select {
					case d = <-links[shard]:
					case <-stop:
						return
					}
					time.Sleep(latency / 4)
					var a Ack
					mu.Lock()
					for _, u := range d.all() {
						if at[u] != id {
							a.NotHere = append(a.NotHere, u)
							continue
						}
						a.Delivered++
						key := fmt.Sprint(u, " ", conn[u])
						got[key] = append(got[key], d.Payload()[0])
					}
					mu.Unlock()
					nodes.Go(func() {
						time.Sleep(latency)
						_, _ = d.Ack(a)
					})
				}
			})
		}
		w.nodes[id].answer = func(d *Delivery) { links[d.shard] <- d }
	}
	var o order
	var stream Order
	var pushes []keptPush
	lists := [][]string{{"r", "s"}, {"s", "r"}, {"s", "t"}, {"r", "s", "t"}}
	for i := range 100 {
		p := &Push{Request: Request{Order: &stream, Payload: []byte{byte(i)}, Content: Content{Present: true}, Budget: dawdler{}}}
		k := keptPush{push: p}
		switch rng.IntN(3) {
		case 0:
			p.Kind, p.Room = ToRoom, rooms[rng.IntN(3)]
			k.rooms = []string{p.Room}
		default:
			k.rooms = lists[rng.IntN(len(lists))]
			if rng.IntN(2) == 0 {
				k.rooms = lists[0] // often the same as before
			}
			p.Kind, p.Rooms = ToRooms, NewRoomList(k.rooms)
		}
		pushes = append(pushes, k)
		if err := e.Start(p, &o); err != nil {
			t.Fatal(err)
		}
		switch rng.IntN(8) {
		case 0:
			move(users[rng.IntN(len(users))], nodeIDs[rng.IntN(3)])
		case 1:
			time.Sleep(time.Duration(rng.IntN(200)) * time.Millisecond)
		case 2:
			synctest.Wait()
		}
	}
	time.Sleep(30 * time.Second)
	synctest.Wait()
	close(stop)
	nodes.Wait()
	if o.done != len(pushes) {
		t.Fatalf("%d of %d pushes finished", o.done, len(pushes))
	}
	arrived := 0
	for key, seq := range got {
		arrived += len(seq)
		user, _, _ := strings.Cut(key, " ")
		for i, later := range seq {
			for _, earlier := range seq[i+1:] {
				a, b := pushes[earlier], pushes[later]
				common := slices.ContainsFunc(a.rooms, func(room string) bool { return in(room, user) && slices.Contains(b.rooms, room) })
				if r, _ := a.push.Result(); earlier <= later && common && r.Unknown == 0 {
					t.Errorf("connection %s got push %d to %v before push %d to %v: %v", key, later, b.rooms, earlier, a.rooms, seq)
				}
			}
		}
	}
	if arrived < 50 {
		t.Errorf("only %d arrived", arrived)
	}
	if len(stream.lines)+len(stream.sets)+len(stream.crossed) != 0 || stream.lined.Load() != 0 {
		t.Errorf("left behind: %d lines, %d sets, %d that wait, %d counted", len(stream.lines), len(stream.sets), len(stream.crossed), stream.lined.Load())
	}
}

func TestPushesToOtherRoomsDoNotWaitForSeveral(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.place("r", "u1", "A")
		w.place("s", "u2", "A")
		w.place("x", "u3", "B")
		w.place("y", "u4", "B")
		w.nodes["A"].keep = true
		var o order
		var stream Order
		begin(t, e, &stream, toRooms("r", "s"), &o)
		begin(t, e, &stream, toRooms("x", "y"), &o)
		begin(t, e, &stream, toRoom("x"), &o)
		if o.ended() != 2 {
			t.Errorf("%d pushes to other rooms have ended, want 2", o.ended())
		}
		begin(t, e, &stream, toRooms("r", "s"), &o) // the same: on the same link
		begin(t, e, &stream, toRoom("s"), &o)       // of one of them
		wantGot(t, "while A owes its acks", w.nodes["A"], []string{"u1", "u2"}, []string{"u1", "u2"})
		w.nodes["A"].settle(func(d *Delivery) { _, _ = d.Ack(Ack{Delivered: d.Targets()}) })
		if o.ended() != 5 {
			t.Errorf("%d of 5 have ended", o.ended())
		}
	})
}

// TestPushWaitsForSeveralRoomsUntilItsDeadline has a node that never answers.
func TestPushWaitsForSeveralRoomsUntilItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.place("r", "u1", "A")
		w.place("s", "u2", "A")
		w.nodes["A"].keep = true
		var o order
		var stream Order
		begin(t, e, &stream, toRooms("r", "s"), &o)
		p := toRoom("r")
		p.Timeout = time.Second
		begin(t, e, &stream, p, &o)
		time.Sleep(1100 * time.Millisecond)
		if n := o.ended(); n != 1 {
			t.Fatalf("%d ended", n)
		}
		if _, err := p.Result(); !errors.Is(err, ErrDeadline) {
			t.Error(err)
		}
		w.nodes["A"].settle(func(d *Delivery) { _, _ = d.Ack(Ack{Delivered: d.Targets()}) })
		time.Sleep(10 * time.Second)
		if o.ended() != 2 {
			t.Errorf("%d of 2 have ended", o.ended())
		}
	})
}

func TestClientsOfRepeatedPushesToSeveralRoomsAreNamedOnce(t *testing.T) {
	w := newWorld()
	w.rooms["r"] = map[string][]string{"u1": {"A"}}
	w.rooms["s"] = map[string][]string{"u1": {"A"}, "u2": {"A"}}
	e := w.engine(t)
	e.directory.Vouch(time.Now().Add(time.Hour))
	for range 3 {
		do(t, e, toRooms("s", "r"))
	}
	got := w.nodes["A"].got
	if !got[0].Once() || got[1].Once() || got[2].Once() {
		t.Error("the first push to several rooms, and no other, is to rooms that nobody may ever push to again")
	}
	if got[1].Group() == nil || got[1].Group() != got[2].Group() || got[1].RoomKey() != got[2].RoomKey() {
		t.Error("pushes to the same rooms are for other groups")
	}
	if d := got[1]; d.Room() != "" || !slices.Equal(d.Rooms(), []string{"s", "r"}) {
		t.Errorf("room %q, rooms %q", d.Room(), d.Rooms())
	}
	do(t, e, toRooms("r", "s"))
	if other := w.nodes["A"].got[3]; other.RoomKey() == got[0].RoomKey() || !slices.Equal(other.Rooms(), []string{"r", "s"}) {
		t.Errorf("another order of the rooms is the same: %q", other.Rooms())
	}
	do(t, e, toRooms("s"))
	if one := w.nodes["A"].got[4]; one.Room() != "s" || one.Rooms() != nil {
		t.Errorf("one room: %q, %q", one.Room(), one.Rooms())
	}
}

func TestExplainOfSeveralRooms(t *testing.T) {
	w := newWorld()
	w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"B"}}
	w.rooms["s"] = map[string][]string{"u2": {"B"}, "u3": nil}
	e := w.engine(t)
	p := toRooms("r", "s", "nowhere")
	p.Exclude = []string{"u1", "x"}
	x, err := e.Explain(context.Background(), p, false)
	if err != nil {
		t.Fatal(err)
	}
	if !x.Found || x.Targets != 2 || len(x.Planned) != 1 || x.Planned[0].Node != "B" || !slices.Equal(x.Offline, []string{"u3"}) || !slices.Equal(x.Excluded, []string{"u1"}) || x.LookedUp != 3 {
		t.Errorf("%+v", x)
	}
}

// TestRepeatedPushToSeveralRoomsAllocatesNothing has 200 rooms whose answers are cached.
func TestRepeatedPushToSeveralRoomsAllocatesNothing(t *testing.T) {
	push := roomsWorld(t, 200, 2000, 10)
	if n := testing.AllocsPerRun(100, func() { push(ToRooms) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
