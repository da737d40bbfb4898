package engine

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// BenchmarkValidate is the check of a push against the limits.
func BenchmarkValidate(b *testing.B) {
	limits := Limits{}.withDefaults()
	ids := make([]string, 100)
	for i := range ids {
		ids[i] = fmt.Sprintf("user-%07d", i)
	}
	content := Content{Present: true, DataLen: 128, MetadataEntries: 2, MetadataBytes: 32}
	for name, p := range map[string]*Push{
		"push=user":             {Request: Request{Kind: ToUser, User: ids[0], Content: content}},
		"push=room":             {Request: Request{Kind: ToRoom, Room: "room-0000001", Content: content}},
		"push=room/exclude=100": {Request: Request{Kind: ToRoom, Room: "room-0000001", Exclude: ids, Content: content}},
		"push=users/users=100":  {Request: Request{Kind: ToUsers, Users: ids, Content: content}},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := limits.Check(&p.Request); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOrderAfterAMove is the start of a push to a room of 20 nodes whose users have all
// moved, behind 20 pushes of the same Order that have no answer yet.
func BenchmarkOrderAfterAMove(b *testing.B) {
	const nodes, users, earlier = 20, 1000, 20
	w := newWorld()
	e, stop, err := w.build()
	if err != nil {
		b.Fatal(err)
	}
	defer stop()
	members := map[string][]string{}
	w.rooms["r"] = members
	move := func(by int) {
		for n := range nodes {
			for u := range users {
				members[fmt.Sprintf("user-%d-%d", n, u)] = []string{fmt.Sprint("node-", (n+by*(1+u%(nodes-1)))%nodes)}
			}
		}
	}
	for n := range nodes {
		id := fmt.Sprint("node-", n)
		w.nodes[id] = &testNode{id: id, keep: true}
	}
	e.directory.Vouch(time.Now().Add(time.Hour))
	for b.Loop() {
		b.StopTimer()
		var o order
		var stream Order
		move(0)
		e.directory.InvalidateAll()
		begin := func() {
			p := toRoom("r")
			p.Order, p.Timeout = &stream, time.Minute
			if err := e.Start(p, &o); err != nil {
				b.Fatal(err)
			}
			for e.directory.Rooms.Cached(e.shards.For("r").Index(), "r", time.Now()) == nil {
				runtime.Gosched()
			}
		}
		for range earlier {
			begin()
		}
		move(1)
		e.directory.InvalidateAll()
		if err := e.Start(toRoom("r"), &o); err != nil { // of no Order: it has the room looked up
			b.Fatal(err)
		}
		for e.directory.Rooms.Cached(e.shards.For("r").Index(), "r", time.Now()) == nil {
			runtime.Gosched()
		}
		b.StartTimer()
		begin()
		b.StopTimer()
		for _, n := range w.nodes {
			for _, d := range n.kept {
				d.Drop(DropQueueFull)
			}
			n.kept = nil
		}
		b.StartTimer()
	}
}

// BenchmarkPush is a push to a user whose route is cached, from Start to Complete and back to use:
// without options, and with those that change nothing for a user who is reached at once.
func BenchmarkPush(b *testing.B) {
	for _, bm := range []struct {
		name    string
		options *Options
	}{
		{"options=none", nil},
		{"options=id", &Options{MessageID: "m-1", Sender: "s", PayloadHash: 1}},
		{"options=id,store", &Options{MessageID: "m-1", Sender: "s", PayloadHash: 1, Store: true}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			push := quietWorld(b, bm.options)
			b.ReportAllocs()
			for b.Loop() {
				push()
			}
		})
	}
}

// quietWorld has a user with a cached route. push starts and ends one push to it, with the same memory
// each time.
func quietWorld(tb testing.TB, o *Options) (push func()) {
	tb.Helper()
	w := newWorld()
	w.config.Spool = newSpool()
	w.users["u"] = []string{"A"}
	w.nodes["A"].quiet = true
	e, stop, err := w.build()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(stop)
	e.directory.Vouch(time.Now().Add(time.Hour))
	var p Push
	var done order
	payload := []byte("x")
	arrived := time.Now()
	push = func() {
		p.Kind, p.User, p.Payload, p.Options = ToUser, "u", payload, o
		p.Content = Content{Present: true, DataLen: 1}
		p.Arrived, p.Timeout = arrived, time.Hour
		if err := e.Start(&p, &done); err != nil {
			tb.Fatal(err)
		}
		if !p.Reusable() {
			tb.Fatal("a push that went the usual way cannot be used again")
		}
		p.Reset()
	}
	first := toUser("u")
	if _, err := e.Do(tb.Context(), first); err != nil {
		tb.Fatal(err)
	}
	for e.directory.Users.Cached(e.shards.For("u").Index(), "u", time.Now()) == nil {
		runtime.Gosched()
	}
	return push
}

// TestPushWithAnIDAllocatesNothing holds a push with a message id, which goes the usual way, against one
// without options.
func TestPushWithAnIDAllocatesNothing(t *testing.T) {
	for name, o := range map[string]*Options{"none": nil, "id": {MessageID: "m-1"}, "ttl": {MessageID: "m-1", TTL: time.Hour, CollapseKey: "k"}} {
		push := quietWorld(t, o)
		if n := testing.AllocsPerRun(1000, push); n != 0 {
			t.Errorf("options %s: %v allocations", name, n)
		}
	}
}

// BenchmarkRooms is a push whose route is cached, from Start to Complete and back to use: to one room of 10,000, and to 200 rooms
// with the same 10,000 together, each in ten of them. They take turns, so that what else runs on the machine meets both:
// ratio is the time of the second in that of the first.
func BenchmarkRooms(b *testing.B) {
	push := roomsWorld(b, 200, 10_000, 10)
	const turn = 500 // pushes
	var spent [2]time.Duration
	b.ReportAllocs()
	for b.Loop() {
		for i, kind := range []Kind{ToRoom, ToRooms} {
			begin := time.Now()
			for range turn {
				push(kind)
			}
			spent[i] += time.Since(begin)
		}
	}
	b.ReportMetric(float64(spent[0].Nanoseconds())/float64(b.N*turn), "room-ns/push")
	b.ReportMetric(float64(spent[1].Nanoseconds())/float64(b.N*turn), "rooms-ns/push")
	b.ReportMetric(float64(spent[1])/float64(spent[0]), "ratio")
}

// BenchmarkRoomsWithChurn is a push to a room of 10,000, and to 200 rooms with the same 10,000 together, after so many changes of members.
func BenchmarkRoomsWithChurn(b *testing.B) {
	for _, changes := range []int{1, 10} {
		for _, kind := range []Kind{ToRoom, ToRooms} {
			b.Run(fmt.Sprintf("rooms=%d/changes=%d", map[Kind]int{ToRoom: 1, ToRooms: 200}[kind], changes), func(b *testing.B) {
				w, push := roomsWorldOf(b, 200, 10_000, 10)
				revision, n := uint64(1), 0
				for b.Loop() {
					for range changes {
						n++
						revision++
						m := route.Move{Room: "all", User: fmt.Sprintf("guest-%d", n/2), Node: nodeIDs[n/2%3], Left: n%2 == 1, Revision: revision}
						if kind == ToRooms {
							m.Room = fmt.Sprintf("room-%03d", n/2%200)
						}
						w.directory.Moved([]route.Move{m})
					}
					push(kind)
				}
			})
		}
	}
}

// BenchmarkRoomsOnce is the first push to a list of 200 rooms, whose own answers are cached, with so many memberships.
func BenchmarkRoomsOnce(b *testing.B) {
	w, _ := roomsWorldOf(b, 200, 10_000, 10)
	list := roomList(200)
	done := &waiter{done: make(chan struct{}, 1)}
	for b.Loop() {
		list = append(list[1:], list[0])
		rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		p := push(&Push{Request: Request{Kind: ToRooms, Rooms: NewRoomList(slices.Clone(list))}})
		if err := w.Start(p, done); err != nil {
			b.Fatal(err)
		}
		<-done.done
	}
}

func roomList(n int) (list []string) {
	for i := range n {
		list = append(list, fmt.Sprintf("room-%03d", i))
	}
	return list
}

// roomsWorld has rooms with users, each in some of them, and one room with all. push starts and ends one push to it, or to all of the rooms,
// with the same memory.
func roomsWorld(tb testing.TB, rooms, users, each int) (push func(Kind)) {
	tb.Helper()
	_, push = roomsWorldOf(tb, rooms, users, each)
	return push
}

func roomsWorldOf(tb testing.TB, rooms, users, each int) (e *Engine, push func(Kind)) {
	tb.Helper()
	w := newWorld()
	w.revision = func() uint64 { return 1 }
	for _, n := range w.nodes {
		n.quiet = true
	}
	list := roomList(rooms)
	all := map[string][]string{}
	w.rooms["all"] = all
	for i := range users {
		user, nodes := fmt.Sprintf("user-%07d", i), []string{nodeIDs[i%3]}
		all[user] = nodes
		for k := range each {
			room := list[(i+k*(rooms/each))%rooms]
			if w.rooms[room] == nil {
				w.rooms[room] = map[string][]string{}
			}
			w.rooms[room][user] = nodes
		}
	}
	e, stop, err := w.build()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(stop)
	e.directory.Vouch(time.Now().Add(time.Hour))
	p, done := new(Push), &waiter{done: make(chan struct{}, 1)}
	payload, shared := []byte("x"), NewRoomList(list)
	push = func(kind Kind) {
		p.Request = Request{Kind: kind, Payload: payload, Content: Content{Present: true, DataLen: 1}}
		if kind == ToRoom {
			p.Room = "all"
		} else {
			p.Rooms = shared
		}
		if err := e.Start(p, done); err != nil {
			tb.Fatal(err)
		}
		<-done.done
		if r, err := p.Result(); err != nil || r.Delivered < users {
			tb.Fatalf("%+v, %v", r, err)
		}
		if p.Reusable() {
			p.Reset()
		} else {
			p = new(Push)
		}
	}
	for range 3 {
		push(ToRoom)
		push(ToRooms)
	}
	return e, push
}
