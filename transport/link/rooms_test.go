package link

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
)

// roomyNode takes several rooms.
func roomyNode(id string) *fakeNode {
	return &fakeNode{id: id, hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: id, BootId: "b", MaxAudienceMembers: 1000,
		Features: []pubsub.Feature{pubsub.Feature_FEATURE_ROOMS}}}
}

func (w *world) toRooms(text string, rooms ...string) *engine.Push {
	return w.push(&engine.Push{Request: engine.Request{Kind: engine.ToRooms, Rooms: engine.NewRoomList(rooms)}}, text)
}

func TestAudienceOfSeveralRoomsIsDefinedWithTheSecondPush(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", roomyNode("A"))
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", names("u", 60)...)
		w.room("s", "A", append(names("u", 20), names("v", 20)...)...)
		for i := range 3 {
			if r := w.do(w.toRooms(fmt.Sprint(i), "s", "r")); r.Delivered != 80 || !r.Success() {
				t.Fatalf("%+v", r)
			}
		}
		w.room("s", "A", append(names("u", 20), names("v", 21)...)...)
		if r := w.do(w.toRooms("one more", "s", "r")); r.Delivered != 81 {
			t.Fatalf("%+v", r)
		}
		var sent []*pubsub.Delivery
		for _, f := range n.sent() {
			sent = append(sent, f.GetDeliveries()...)
		}
		rooms := []string{"s", "r"}
		if d := sent[0]; d.GetAudience() != nil || len(d.GetUserIds()) != 80 || !slices.Equal(d.GetRoomIds(), rooms) || d.GetRoomId() != "" {
			t.Errorf("the first push: %v", d)
		}
		a := sent[1].GetAudience()
		if len(a.GetJoin()) != 80 || !slices.Equal(a.GetRoomIds(), rooms) || a.GetRoomId() != "" || len(sent[1].GetRoomIds()) > 0 {
			t.Errorf("the definition: %v", sent[1])
		}
		if b := sent[2].GetAudience(); b.GetId() != a.GetId() || b.GetVersion() != 1 || len(b.GetJoin())+len(b.GetRoomIds()) > 0 {
			t.Errorf("named: %v", sent[2])
		}
		if b := sent[3].GetAudience(); b.GetId() != a.GetId() || !slices.Equal(b.GetJoin(), []string{"v020"}) || len(b.GetRoomIds()) > 0 {
			t.Errorf("changed: %v", sent[3])
		}
		n.received(t)
	})
}

// A node of before would take a push to several rooms for one to users: it gets nothing that it does not know.
func TestNodeWithoutSeveralRoomsGetsNoneOfThem(t *testing.T) {
	for name, old := range map[string]*fakeNode{"a node of before": {id: "B"}, "a node without Deliver": unaryNode("B")} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				a := w.start("a:1", roomyNode("A"))
				w.start("b:1", old)
				w.register("A", "a:1", "B", "b:1")
				w.up(2)
				w.room("r", "A", "u1", "u2")
				w.room("s", "B", "v1")
				for range 2 { // by user ids, then by an audience
					r := w.do(w.toRooms("x", "r", "s"))
					if r.Delivered != 2 || r.Failed != 1 || r.Success() || !strings.Contains(reasons(r), engine.DropNoRooms.String()) {
						t.Errorf("%+v", r)
					}
				}
				x, err := w.engine.Explain(t.Context(), w.toRooms("x", "r", "s"), false)
				if err != nil || len(x.Planned) != 2 || x.Planned[0].Link.Verdict != engine.Sent || x.Planned[1].Link.Verdict != engine.DropNoRooms {
					t.Errorf("%+v, %v", x, err)
				}
				one, err := w.engine.Explain(t.Context(), w.toRooms("x", "s", "s"), false) // which is sent as to the room
				if err != nil || len(one.Planned) != 1 || one.Planned[0].Link.Verdict != engine.Sent {
					t.Errorf("one room, twice: %+v, %v", one, err)
				}
				if got := old.received(t); len(got) > 0 {
					t.Errorf("the node that cannot got %q", got)
				}
				if got := a.received(t); len(got) != 4 {
					t.Errorf("the node that can got %q", got)
				}
				if r := w.do(w.toRoom("s", "one room")); r.Delivered != 1 {
					t.Errorf("one room: %+v", r)
				}
			})
		})
	}
}

func TestNewerPushToTheSameRoomsTakesThePlaceOfOneWithItsCollapseKey(t *testing.T) {
	key := func(rooms ...string) *engine.Push {
		p := &engine.Push{Request: engine.Request{Kind: engine.ToRooms, Rooms: engine.NewRoomList(rooms), Options: &engine.Options{CollapseKey: "k"}}}
		return p
	}
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := roomyNode("A")
		n.gate = make(chan struct{})
		w.start("a:1", n)
		w.register("A", "a:1")
		w.room("r", "A", "u1", "u2")
		w.room("s", "A", "u2", "u3")
		w.room("t", "A", "u2", "u4")
		first := w.begin(w.push(key("r", "s"), "1"))
		other := w.begin(w.push(key("r", "t"), "2"))
		second := w.begin(w.push(key("r", "s"), "3"))
		close(n.gate)
		if r := w.end(first); r.Failed != 3 || !strings.Contains(reasons(r), engine.DropReplaced.String()) {
			t.Errorf("the first: %+v", r)
		}
		for _, p := range []*pending{other, second} {
			if r := w.end(p); r.Delivered != 3 {
				t.Errorf("%+v", r)
			}
		}
	})
}

// The node keeps the rooms of an audience as it keeps members. A list of many rooms with one member there is not as small as it looks.
func TestRoomsOfAudiencesHaveTheBoundOfMembers(t *testing.T) {
	const limit = 1000
	a := newAudiences(limit, newMeters(metrics.NewSet()))
	rooms, g := names("room", 100), &route.Group{Node: "A", Users: []string{"u"}}
	kept, now, most := map[uint32]int{}, 0, 0
	for i := range 300 {
		list := fmt.Sprint("list-", i/2)
		to := a.addressGroup(list, g, nil, rooms...)
		if ref := to.audience; len(ref.join) > 0 {
			if ref.room != "" || !slices.Equal(ref.rooms, rooms) {
				t.Fatalf("defined as of %q, %d rooms", ref.room, len(ref.rooms))
			}
			if i%7 == 0 {
				a.undo(list, &to)
				continue
			}
			kept[ref.id] = len(ref.join) + len(ref.rooms)
			now += kept[ref.id]
		}
		most = max(most, now)
		for _, id := range forgets(t, a.endFrame(nil, 1<<10), 1<<10) {
			now -= kept[id]
			delete(kept, id)
		}
	}
	if most > limit || most < limit/2 || a.members != now {
		t.Errorf("the node has kept up to %d members and rooms of at most %d, and is thought to have %d instead of %d", most, limit, a.members, now)
	}
}
