package link

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
)

func names(prefix string, n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("%s%03d", prefix, i)
	}
	return list
}

func TestAudienceIsDefinedOnceAndThenNamed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A"})
		w.register("A", "a:1")
		w.up(1)
		users := names("u", 100)
		w.room("r", "A", users...)
		for i := range 3 {
			if r := w.do(w.toRoom("r", fmt.Sprint(i))); r.Delivered != 100 {
				t.Fatalf("%+v", r)
			}
		}
		w.do(w.toRoom("r", "but two", "u007", "u042"))
		var refs []*pubsub.Audience
		for _, f := range n.sent() {
			refs = append(refs, f.GetDeliveries()[0].GetAudience())
		}
		if len(refs) != 4 || len(refs[0].GetJoin()) != 100 || refs[0].GetRoomId() != "r" {
			t.Fatalf("definition: %v", refs)
		}
		for _, ref := range refs[1:] {
			if ref.GetId() != refs[0].GetId() || ref.GetVersion() != 1 || len(ref.GetJoin()) > 0 || ref.GetRoomId() != "" {
				t.Errorf("named: %v", ref)
			}
		}
		if got := len(n.received(t)); got != 398 {
			t.Errorf("%d users reached", got)
		}
	})
}

func TestChangeOfMembersIsSentAsDelta(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A"})
		w.register("A", "a:1")
		w.up(1)
		users := names("u", 100)
		w.room("r", "A", users...)
		w.do(w.toRoom("r", "1"))
		w.room("r", "A", append(users[5:], "v1", "v2")...)
		if r := w.do(w.toRoom("r", "2")); r.Delivered != 97 {
			t.Errorf("%+v", r)
		}
		ref := n.sent()[1].GetDeliveries()[0].GetAudience()
		if ref.GetVersion() != 2 || !slices.Equal(ref.GetJoin(), []string{"v1", "v2"}) || !slices.Equal(ref.GetLeave(), users[:5]) {
			t.Errorf("delta: %v", ref)
		}
		w.room("r", "A", names("x", 50)...) // all others: a new definition is shorter
		if r := w.do(w.toRoom("r", "3")); r.Delivered != 50 {
			t.Errorf("%+v", r)
		}
		f := n.sent()[2]
		if again := f.GetDeliveries()[0].GetAudience(); again.GetId() == ref.GetId() || again.GetVersion() != 1 || len(f.GetForgetAudiences()) != 1 {
			t.Errorf("new definition: %v", f)
		}
		n.received(t)
	})
}

func TestAudiencesKeepWithinTheNodesLimit(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A", hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A", MaxAudienceMembers: 50}}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		for i := range 10 {
			w.room(fmt.Sprint("r", i), "A", names(fmt.Sprint("u", i), 20)...)
		}
		w.room("big", "A", names("b", 51)...)
		for range 300 {
			if r := w.do(w.toRoom(fmt.Sprint("r", rand.N(10)), "x")); r.Delivered != 20 {
				t.Fatalf("%+v", r)
			}
		}
		if r := w.do(w.toRoom("big", "x")); r.Delivered != 51 {
			t.Errorf("beyond the limit: %+v", r)
		}
		if len(n.received(t)) != 300*20+51 { // checks the limit as the node sees it, too
			t.Error("not all arrived")
		}
		if w.set.meters.audForgotten.Get() == 0 {
			t.Error("nothing was forgotten")
		}
	})
}

func TestNodeWithoutAudiencesGetsUserIDs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A", hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A"}}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", names("u", 9)...)
		if r := w.do(w.toRoom("r", "x", "u003")); r.Delivered != 8 {
			t.Errorf("%+v", r)
		}
		d := n.sent()[0].GetDeliveries()[0]
		if d.GetRoomId() != "r" || len(d.GetUserIds()) != 8 || slices.Contains(d.GetUserIds(), "u003") {
			t.Errorf("%v", d)
		}
	})
}

func TestAudiencesStartAnewWithEachStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A"})
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", names("u", 9)...)
		w.do(w.toRoom("r", "x"))
		n.kill()
		n.start()
		w.register("A", "a:1")
		w.until("the link is back", func() bool { return n.opened() == 2 })
		w.up(1)
		if r := w.do(w.toRoom("r", "y")); r.Delivered != 9 {
			t.Errorf("%+v", r)
		}
		n.received(t)
	})
}

func TestAudienceTooLargeForAFrameIsDropped(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{MaxFrameBytes: 4096, FrameBytes: 4096})
		n := w.start("a:1", &fakeNode{id: "A"})
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", names("u", 900)...)
		r := w.do(w.toRoom("r", "x"))
		if r.Failed != 900 || reasons(r) != "failed: too large for a frame" {
			t.Errorf("%+v", r)
		}
		w.room("r", "A", names("u", 300)...) // the one that did not fit left no trace
		if r := w.do(w.toRoom("r", "y")); r.Delivered != 300 {
			t.Errorf("%+v", r)
		}
		n.received(t)
	})
}

func TestMixedTrafficKeepsFramesWithinTheirBudget(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{MaxFrameBytes: 16 << 10, FrameBytes: 8 << 10})
		n := w.start("a:1", &fakeNode{id: "A", gate: make(chan struct{})})
		w.register("A", "a:1")
		var started []*pending
		for i := range 20 {
			w.room(fmt.Sprint("r", i), "A", names(fmt.Sprint("u", i, "-"), 1+100*(i%9))...)
		}
		for i := range 200 {
			started = append(started, w.begin(w.toRoom(fmt.Sprint("r", i%20), "x")))
		}
		close(n.gate)
		for _, f := range started {
			if r := w.end(f); r.Failed+r.Unknown+r.Offline != 0 {
				t.Fatalf("%+v", r)
			}
		}
		for _, f := range n.sent() {
			if f.SizeVT() > 16<<10 {
				t.Errorf("frame of %d bytes", f.SizeVT())
			}
		}
		n.received(t)
	})
}

// TestAudiencesAgreeWithAStrictNode drives the writer's book-keeping with random
// groups and frames and compares with what a node would make of it.
func TestAudiencesAgreeWithAStrictNode(t *testing.T) {
	m := newMeters(Config{}.withDefaults().Metrics)
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(0, 40).Draw(t, "limit")
		a := newAudiences(limit, m)
		node, members, rooms := &fakeNode{}, 0, map[uint32]*fakeAudience{}
		groups := map[string]*route.Group{}
		for range rapid.IntRange(1, 30).Draw(t, "frames") {
			for range rapid.IntRange(0, 5).Draw(t, "deliveries") {
				room := rapid.SampledFrom([]string{"r1", "r2", "r3", "r4"}).Draw(t, "room")
				if groups[room] == nil || rapid.Bool().Draw(t, "changes") {
					users := rapid.SliceOfNDistinct(rapid.StringMatching("u[0-9]{1,2}"), 2, 20, rapid.ID[string]).Draw(t, "users")
					slices.Sort(users)
					groups[room] = &route.Group{Users: users}
				}
				to := a.addressGroup(room, groups[room], nil)
				if rapid.IntRange(0, 9).Draw(t, "undo") == 0 {
					a.undo(room, &to)
					continue
				}
				d := &pubsub.Delivery{UserIds: to.users}
				if ref := to.audience; ref.id != 0 {
					d.Audience = &pubsub.Audience{
						Id: ref.id, Version: ref.version, RoomId: ref.room,
						Join: slices.Clone(ref.join), Leave: slices.Clone(ref.leave),
					}
				}
				got := node.resolve(d, rooms, &members)
				if !slices.Equal(got, groups[room].Users) {
					t.Fatalf("the node reaches %q, not %q", got, groups[room].Users)
				}
				if members > limit {
					t.Fatalf("%d members, limit %d", members, limit)
				}
			}
			most := rapid.SampledFrom([]int{0, 3, 7, 1 << 10}).Draw(t, "bytes left")
			forget := forgets(t, a.endFrame(nil, most), most)
			for _, id := range forget {
				if rooms[id] == nil {
					continue // its definition was undone
				}
				members -= len(rooms[id].users)
				delete(rooms, id)
			}
			if a.members < members {
				t.Fatalf("counts %d members, the node has %d", a.members, members)
			}
		}
		if len(node.broken) > 0 {
			t.Fatalf("breaches: %q", node.broken)
		}
	})
}

// forgets reads the end of a frame.
func forgets(t fataler, b []byte, most int) []uint32 {
	var f pubsub.DeliverRequest
	if err := f.UnmarshalVT(b); err != nil || len(b) > most {
		t.Fatalf("%d bytes of %d: %v", len(b), most, err)
	}
	return f.GetForgetAudiences()
}

// heap is the memory that is in use, once nothing more of it turns out to be garbage.
func heap() int {
	var m runtime.MemStats
	for last := uint64(math.MaxUint64); ; last = m.HeapAlloc {
		runtime.GC()
		runtime.ReadMemStats(&m)
		if m.HeapAlloc >= last {
			return int(m.HeapAlloc)
		}
	}
}

// TestMemoryOfAnAudience keeps the figures of PERF.md true. An audience has nothing of
// its own but its entry: neither members nor, by way of the room's id, the request that
// defined it.
func TestMemoryOfAnAudience(t *testing.T) {
	const count, most = 1000, 160
	a := newAudiences(1<<20, newMeters(Config{}.withDefaults().Metrics))
	group := &route.Group{Users: names("u", 10)}
	before := heap()
	for i := range count {
		request := fmt.Sprint("room-", i, strings.Repeat("x", 10_000))
		a.addressGroup(request[:len(fmt.Sprint("room-", i))], group, nil)
	}
	a.endFrame(nil, 0)
	got := (heap() - before) / count
	runtime.KeepAlive(a)
	t.Logf("an audience costs %d bytes", got)
	if got > most {
		t.Errorf("an audience costs %d bytes, most are %d", got, most)
	}
}

// The ids that a frame forgets count against its bound, and go with later frames where
// they find no room: a frame beyond it would cost the stream.
func TestForgetListKeepsTheBoundOfAFrame(t *testing.T) {
	const rooms, members = 120, 8
	for size := 14400; size < 15000; size += 50 {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, Config{MaxFrameBytes: size, FrameBytes: size, CompressionMinBytes: size, AudienceMembers: 1000})
			n := w.start("a:1", &fakeNode{id: "A"})
			w.register("A", "a:1")
			w.up(1)
			for i := range rooms {
				w.room(fmt.Sprint("r", i), "A", names(fmt.Sprintf("u%d-", i), members)...)
				w.do(w.toRoom(fmt.Sprint("r", i), "x"))
			}
			w.room("big", "A", names("user-number", 900)...)
			if r := w.do(w.toRoom("big", "x")); r.Unknown > 0 {
				t.Errorf("a frame of at most %d bytes: %+v", size, r)
			}
			time.Sleep(2 * time.Second) // the heartbeats bring what is left
			told := 0
			for _, f := range n.all() {
				if f.SizeVT() > size {
					t.Errorf("a frame of %d bytes, most are %d", f.SizeVT(), size)
				}
				told += len(f.GetForgetAudiences())
			}
			if w.set.meters.audForgotten.Get() != uint64(told) || told == 0 {
				t.Errorf("%d audiences are forgotten, the node was told of %d", w.set.meters.audForgotten.Get(), told)
			}
			_ = n.received(t)
		})
	}
}

// Rooms with one member on a node cost the wire no more than others, and however many
// there are, their audiences take a bounded memory on both sides.
func TestSmallAudiencesAreNamedAndBounded(t *testing.T) {
	const limit = 800
	a := newAudiences(limit, newMeters(metrics.NewSet()))
	forgotten := 0
	for i := range limit {
		room, g := fmt.Sprint("room-", i), &route.Group{Node: "A", Users: []string{"u"}}
		if to := a.addressGroup(room, g, nil); to.audience.id == 0 || len(to.audience.join) != 1 {
			t.Fatalf("%s is not defined: %+v", room, to)
		}
		if to := a.addressGroup(room, g, nil); to.audience.id == 0 || to.audience.size() > 6 {
			t.Fatalf("%s is not named: %+v", room, to)
		}
		forgotten += len(forgets(t, a.endFrame(nil, 1<<10), 1<<10))
	}
	if most := limit/audienceWeight + 1; len(a.byRoom) > most || forgotten != limit-len(a.byRoom) || a.members != len(a.byRoom) {
		t.Errorf("%d audiences of %d members after %d were forgotten, want at most %d", len(a.byRoom), a.members, forgotten, most)
	}
}
