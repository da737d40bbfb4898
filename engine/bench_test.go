package engine

import (
	"fmt"
	"runtime"
	"testing"
	"time"
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
