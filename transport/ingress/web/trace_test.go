package web_test

import (
	"strings"
	"testing"

	pubsub "github.com/push-manager/push-manager/proto"
)

// A push to a room through a running server, over both protocols: the reply has the stages, and they are parts of the whole.
func TestATracedPushTellsItsStages(t *testing.T) {
	w := newWorld(t)
	r, err := w.grpc.PushToRoom(t.Context(), &pubsub.PushToRoomRequest{RoomId: "lobby", Content: &pubsub.MessageContent{Data: []byte("x")}, Options: &pubsub.PushOptions{Trace: true}})
	if err != nil {
		t.Fatal(err)
	}
	x := r.GetSummary().GetTrace()
	if len(x.GetDeliveries()) != 1 || x.GetTotalUs() == 0 || r.GetSummary().GetDelivered() != 2 {
		t.Fatalf("%v", r)
	}
	d := x.GetDeliveries()[0]
	if d.GetUsers() != 2 || d.GetOutcome() != "delivered" || d.GetNodeId() == "" || d.GetAckUs() == 0 {
		t.Errorf("%v", d)
	}
	const rounded = 6 // each is cut to a microsecond
	if sum := d.GetBeginUs() + d.GetQueueUs() + d.GetWireUs() + d.GetAckUs(); sum > x.GetTotalUs()+rounded || x.GetDecodeUs()+x.GetRouteUs() > d.GetBeginUs()+rounded {
		t.Errorf("%v", x)
	}
	for tries := 0; d.GetWireUs() == 0; tries++ { // the node may have answered before it was noted that its frame was written
		if tries == 100 {
			t.Fatal("no frame was ever written")
		}
		r, err = w.grpc.PushToRoom(t.Context(), &pubsub.PushToRoomRequest{RoomId: "lobby", Content: &pubsub.MessageContent{Data: []byte("x")}, Options: &pubsub.PushOptions{Trace: true}})
		if err != nil {
			t.Fatal(err)
		}
		d = r.GetSummary().GetTrace().GetDeliveries()[0]
	}
	_, body := post(t, clients["HTTP/1.1"], w.url+"/v1/rooms/lobby/messages", `{"text":"x","options":{"trace":true}}`)
	if !strings.Contains(body, `"trace":{`) || !strings.Contains(body, `"outcome":"delivered"`) {
		t.Errorf("%s", body)
	}
	_, body = post(t, clients["HTTP/1.1"], w.url+"/v1/rooms/lobby/messages", `{"text":"x"}`)
	if strings.Contains(body, "trace") {
		t.Errorf("nobody asked for it: %s", body)
	}
}
