package refgateway

import (
	"runtime"
	"strings"
	"testing"
	"weak"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

func TestPushToSeveralRoomsIsShownOnceInTheFirst(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	both, one, none := connect(t, g, "u", "A"), connect(t, g, "u", "B"), connect(t, g, "u", "X")
	both.say(`{"type":"join","room_id":"C"}`)
	both.want(`{"type":"joined","room_id":"C"}`)
	push := func(text string, rooms ...string) node.Outcome {
		return sessions{g.users}.Deliver("u", &node.Message{Rooms: node.NewRooms(rooms), Data: []byte(text), Timestamp: 1})
	}
	if out := push("1", "C", "B", "A"); out != node.Delivered {
		t.Errorf("outcome %v", out)
	}
	both.want(textFrame("C", "u", "1"))
	one.want(textFrame("B", "u", "1"))
	push("2", "nowhere", "A", "C")
	both.want(textFrame("A", "u", "2"))
	both.say(`{"type":"leave","room_id":"A"}`)
	both.want(`{"type":"left","room_id":"A"}`)
	push("3", "A", "C")
	both.want(textFrame("C", "u", "3"))
	if out := push("4", "nowhere", "D"); out != node.NotHere {
		t.Errorf("of rooms that it is not in: %v", out)
	}
	if out := push("5", "@node:node-1", "D"); out != node.NotHere { // all users of the node are in it
		t.Errorf("of the node's own room: %v", out)
	}
	for _, d := range []*device{both, one, none} {
		d.wantNothing()
	}
}

func TestHeldPushToSeveralRoomsIsShownInOneThatIsNotLeft(t *testing.T) {
	g, n := start(t, newController(t), nil)
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_REPLAY)
	d := acker(t, g, "u").ready("u")
	for _, room := range []string{"r", "s"} {
		d.say(`{"type":"join","room_id":"` + room + `"}`)
		d.want(`{"type":"joined","room_id":"` + room + `"}`)
	}
	asked := m.catchup(1)
	push, gone := to("1", "to the rooms", "u"), to("2", "to the room", "u")
	push.RoomIds, gone.RoomIds = []string{"r", "s"}, []string{"r", "nowhere"}
	m.wantAck(m.deliver(push, gone)+1, ack{delivered: 1})
	d.say(`{"type":"leave","room_id":"r"}`)
	d.want(`{"type":"left","room_id":"r"}`)
	m.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: asked.GetGate()}}})
	if got := d.next(); !strings.Contains(got, `"room_id":"s"`) || !strings.Contains(got, "to the rooms") {
		t.Errorf("shown: %s", got)
	}
	d.wantNothing()
}

// A message shares the memory of the frame that it came with, which may name ten thousand users.
func TestPushToSeveralRoomsThatWaitsKeepsNoMoreThanItself(t *testing.T) {
	g, _ := start(t, newController(t), nil)
	d := connect(t, g, "u", "A")
	c := g.users.Of("u")[0]
	kept, f := func() (weak.Pointer[node.Message], *frame) {
		m := &node.Message{Rooms: node.NewRooms([]string{"A", "B"}), Data: []byte("1"), Timestamp: 1}
		return weak.Make(m), c.roomFrame(m)
	}()
	runtime.GC()
	if kept.Value() != nil {
		t.Error("the message is kept")
	}
	d.say(`{"type":"join","room_id":"B"}`)
	d.want(`{"type":"joined","room_id":"B"}`)
	if other := f.inRoom("B"); string(other.head) != string(newPush(&node.Message{Data: []byte("1"), Timestamp: 1}, "B", false).head) || other.several != f.several {
		t.Errorf("in another room: %s", other.head)
	}
}
