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
