package acceptance

import (
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// TestRoomsMeanTheSameOnOneNodeAndOnSeveral: a push to a room reaches the connections in it,
// wherever the user's others are.
func TestRoomsMeanTheSameOnOneNodeAndOnSeveral(t *testing.T) {
	etcd := startEtcd(t)
	p := freeport.Take(t, 2+2*3)
	controller := "127.0.0.1:" + p[0]
	start(t, binary(t, "controller"), []string{"GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1], "ETCD_ENDPOINTS=" + etcd})
	ready(t, p[1])
	var gateways []string
	for i := range 2 {
		p := p[2+3*i:]
		start(t, binary(t, "connect-node"), []string{
			fmt.Sprint("NODE_ID=connect-node-", i+1), "GRPC_PORT=" + p[0], "HTTP_PORT=" + p[1], "METRICS_PORT=" + p[2],
			"CONTROLLER_ADDRESS=" + controller, "ETCD_ENDPOINTS=" + etcd,
		})
		gateways = append(gateways, "127.0.0.1:"+p[1])
	}
	m := startManager(t, etcd, controller, 2)
	push := func(room, content string, want *pubsub.DeliverySummary) {
		t.Helper()
		r, err := m.PushToRoom(within(t, patience), &pubsub.PushToRoomRequest{RoomId: room, Content: &pubsub.MessageContent{Data: []byte(content), Timestamp: 1}})
		if err != nil || !proto.Equal(r.GetSummary(), want) {
			t.Errorf("%s: %v, %v; want %v", content, r.GetSummary(), err, want)
		}
	}
	one := &pubsub.DeliverySummary{Targets: 1, Delivered: 1}

	inA := connect(t, gateways[0], "alice", "A")
	beside, elsewhere := connect(t, gateways[0], "alice", "B"), connect(t, gateways[1], "alice", "B")
	inNone := connect(t, gateways[0], "alice", "")
	push("A", "to A", one)
	beside.join("A")
	push("A", "beside, too", one)
	inA.leave("A")
	push("A", "only beside", one)
	push("B", "to B", one)

	// A room that clients have not joined, although the Controller has them in it.
	filled, empty := connect(t, gateways[0], "frank", ""), connect(t, gateways[1], "frank", "")
	rooms := pubsub.NewControllerServiceClient(dial(t, controller))
	for _, user := range []string{"frank", "alice"} {
		r, err := rooms.JoinRoom(within(t, patience), &pubsub.JoinRoomRequest{UserId: user, RoomId: "filled", NodeId: "connect-node-1"})
		if err != nil || !r.GetSuccess() {
			t.Fatal(r, err)
		}
	}
	push("filled", "by the Controller", &pubsub.DeliverySummary{Targets: 2, Offline: 2})

	// Pushes to the user come last: whatever came before them has come.
	for _, user := range []string{"alice", "frank"} {
		r, err := m.PushToUser(within(t, patience), &pubsub.PushToUserRequest{UserId: user, Content: &pubsub.MessageContent{Data: []byte("end"), Timestamp: 1}})
		if err != nil || !proto.Equal(r.GetSummary(), one) {
			t.Error(r, err)
		}
	}
	inA.expect(frame("alice", "A", "to A"), frame("alice", "A", "beside, too"), frame("alice", "", "end"))
	beside.expect(frame("alice", "A", "beside, too"), frame("alice", "A", "only beside"), frame("alice", "B", "to B"), frame("alice", "", "end"))
	elsewhere.expect(frame("alice", "B", "to B"), frame("alice", "", "end"))
	inNone.expect(frame("alice", "", "end"))
	filled.expect(frame("frank", "", "end"))
	empty.expect(frame("frank", "", "end"))
}
