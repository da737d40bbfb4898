package ingress

import (
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/position"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestMessages(t *testing.T) {
	p := &engine.Push{Request: engine.Request{Room: "r\"1", User: "u", Rooms: engine.NewRoomList([]string{"a", "b", "c"})}}
	failures := []engine.NodeFailure{{Node: "n1", Reason: "failed: queue full", Users: 1}}
	place := engine.Place{Epoch: 1, Partition: 2, Seq: 3}
	for _, test := range []struct {
		api  api
		res  engine.Result
		want string
	}{
		{toRoom, engine.Result{}, `room "r\"1" not found`},
		{toRoom, engine.Result{Found: true}, "nobody to deliver to"},
		{toRoom, engine.Result{Found: true, Targets: 1, Delivered: 1}, "delivered to 1 user"},
		{toRoom, engine.Result{Found: true, Targets: 5, Delivered: 5}, "delivered to 5 users"},
		{toRoom, engine.Result{Found: true, Targets: 5, Delivered: 3, Failed: 1, Unknown: 1, NodeFailures: failures},
			"delivered to 3 of 5 users: 1 failed, 1 unknown"},
		{toRoom, engine.Result{Found: true, Targets: 2, Delivered: 1, Offline: 1}, "delivered to 1 of 2 users: 1 offline"},
		{toUser, engine.Result{Found: true, Targets: 1, Delivered: 1}, "delivered"},
		{toUser, engine.Result{Targets: 1, Offline: 1}, `user "u" is offline`},
		{toUser, engine.Result{Found: true, Targets: 1, Failed: 1, NodeFailures: failures}, "not delivered: failed: queue full"},
		{toUser, engine.Result{Found: true, Targets: 1, Unknown: 1}, "unknown whether delivered"},
		{toUser, engine.Result{Found: true, Targets: 1, Delivered: 1, NodeFailures: failures},
			"delivered, but not on every node: failed: queue full"},
		{toRoom, engine.Result{Found: true, Targets: 5, Delivered: 5, Stale: 11500 * time.Millisecond}, "delivered to 5 users; by a route of 12 s ago"},
		{toRoom, engine.Result{Found: true, Targets: 5, Delivered: 5, Stale: time.Second, Changed: true},
			"delivered to 5 users; by a route of 1 s ago, which has changed since"},
		{toUser, engine.Result{Found: true, Targets: 1, Delivered: 1, Stale: 1}, "delivered; by a route of 1 s ago"},
		{toUser, engine.Result{Found: true, Targets: 1, Delivered: 1, Stale: 1, Changed: true}, "delivered; by a route of 1 s ago, which has changed since"},
		{toUser, engine.Result{Targets: 1, Offline: 1, Stale: 1}, `user "u" is offline; by a route of 1 s ago`},
		{toUsers, engine.Result{Targets: 3, Offline: 3}, "none of the users is online"},
		{toUser, engine.Result{Targets: 1, Offline: 1, Filtered: 1}, `no connection of user "u" matches the filter`},
		{toUsers, engine.Result{Targets: 3, Offline: 3, Filtered: 1}, "none of the users has a connection that matches the filter"},
		{toRoom, engine.Result{Found: true, Targets: 5, Delivered: 1, Offline: 4, Filtered: 3}, "delivered to 1 of 5 users: 4 offline (3 filtered)"},
		{toAll, engine.Result{Found: true, Targets: 3, Offline: 3, Filtered: 3}, "delivered to nobody: 3 offline (3 filtered)"},
		{toUser, engine.Result{Targets: 1, Offline: 1, Stored: 1}, `user "u" is offline; stored`},
		{toUser, engine.Result{Targets: 1, Offline: 1, Stored: 1, Unsure: 1}, `user "u" is offline; stored`},
		{toUser, engine.Result{Targets: 1, Offline: 1, NodeFailures: []engine.NodeFailure{{Reason: "failed: store: is full", Users: 1}}}, `user "u" is offline: failed: store: is full`},
		{toUsers, engine.Result{Targets: 3, Offline: 3, Stored: 2}, "none of the users is online; 2 stored"},
		{toUsers, engine.Result{Found: true, Targets: 4, Delivered: 1, Offline: 2, Stored: 2, Failed: 1, NodeFailures: failures}, "delivered to 1 of 4 users: 2 offline (2 stored), 1 failed"},
		{toRoom, engine.Result{Found: true, Targets: 2, Offline: 2, Stored: 1}, "delivered to nobody: 2 offline (1 stored)"},
		{toRoom, engine.Result{Found: true, Targets: 2, Offline: 2, Stored: 2, Place: place}, "delivered to nobody: 2 offline (2 stored)"},
		{toRoom, engine.Result{Found: true, Targets: 3, Delivered: 1, Offline: 2, Stored: 2, Unsure: 1, Place: place}, "delivered to 1 of 3 users: 2 offline (2 stored)"},
		{toRoom, engine.Result{Found: true, Targets: 2, Delivered: 2, Place: place}, "delivered to 2 users"},
		{toRoom, engine.Result{Found: true, Place: place}, "nobody to deliver to; stored"},
		{toRoom, engine.Result{Place: place}, `room "r\"1" not found; stored`},
		{toRoom, engine.Result{Targets: 1, Offline: 1, Stored: 1, Place: place}, `room "r\"1" could not be looked up; stored`},
		{toRoom, engine.Result{Targets: 1, Failed: 1, Place: place, NodeFailures: failures}, "not delivered: failed: queue full"},
		{toRoom, engine.Result{Targets: 1, Failed: 1, NodeFailures: failures}, "not delivered: failed: queue full"},
		{toRoom, engine.Result{NodeFailures: []engine.NodeFailure{{Reason: "failed: store: is full"}}}, `room "r\"1" not found: failed: store: is full`},
		{toUsers, engine.Result{Found: true, Targets: 3, Offline: 1, Failed: 2, NodeFailures: failures}, "not delivered: 1 offline, 2 failed"},
		{toUsers, engine.Result{Found: true, Targets: 3, Offline: 1, Failed: 1, Unknown: 1, NodeFailures: failures}, "unknown whether delivered: 1 offline, 1 failed, 1 unknown"},
		{toRoom, engine.Result{Found: true, Targets: 2, Offline: 2}, "delivered to nobody: 2 offline"},
		{toRoom, engine.Result{Found: true, Targets: 2, Failed: 2, NodeFailures: failures}, "not delivered: 2 failed"},
		{toRooms, engine.Result{Found: true, Targets: 3, Delivered: 3}, "delivered to 3 users"},
		{toRooms, engine.Result{Found: true, Targets: 3, Delivered: 3, RoomsNotFound: 1}, "delivered to 3 users; 1 of 3 rooms not found"},
		{toRooms, engine.Result{RoomsNotFound: 3}, "none of the rooms found"},
		{toRooms, engine.Result{Targets: 1, Failed: 1, RoomsNotFound: 2, NodeFailures: failures}, "not delivered: 1 failed"},
		{toAll, engine.Result{}, "no connect-node is available"},
		{toAll, engine.Result{Found: true}, "nobody is connected"},
		{toAll, engine.Result{Found: true, NodeFailures: failures}, "not delivered: 1 node with failures"},
		{toAll, engine.Result{Found: true, NodeFailures: append([]engine.NodeFailure{{Node: "n2", Reason: "unknown: no ack"}}, failures...)}, "unknown whether delivered: 2 nodes with failures"},
		{toAll, engine.Result{Found: true, Targets: 9, Delivered: 9, NodeFailures: failures}, "delivered to 9 users: 1 node with failures"},
	} {
		if got := string(appendMessage(nil, test.api, p, &test.res)); got != test.want {
			t.Errorf("%v %+v: %q, want %q", test.api, test.res, got, test.want)
		}
	}
	p.Options = &engine.Options{Store: true}
	if got := string(appendMessage(nil, toRoom, p, &engine.Result{Found: true, Targets: 2, Delivered: 2, NodeFailures: failures})); got != "delivered to 2 users; not stored" {
		t.Errorf("of a room whose log was not written: %q", got)
	}
}

// The hand-written encoding is what generated code writes.
func TestRepliesAreWhatGeneratedCodeReads(t *testing.T) {
	plain := &engine.Push{Request: engine.Request{Room: "r", User: "u"}}
	empty, named := new(engine.Push), new(engine.Push)
	empty.Request, named.Request = plain.Request, plain.Request
	empty.Options, named.Options = &engine.Options{}, &engine.Options{MessageID: strings.Repeat("é", 32)}
	server := &Server{usual: newReply(toUser, new(engine.Push), &engine.Result{Found: true, Targets: 1, Delivered: 1})}
	for _, res := range []engine.Result{
		{},
		{Found: true, Targets: 3, Delivered: 3},
		{Found: true, Targets: 10, Delivered: 1, Offline: 2, Failed: 3, Unknown: 4, NodeFailures: []engine.NodeFailure{
			{Node: "n1", Reason: "failed: queue full", Users: 3}, {Node: "", Reason: "unknown: no ack", Users: 4}, {}}},
		{Found: true, Targets: math.MaxInt, Delivered: math.MaxInt, Failed: -1},
		{Found: true, Targets: 1, Failed: 1, NodeFailures: []engine.NodeFailure{
			{Node: "n\xff1", Reason: strings.Repeat("ы", 300), Users: 1 << 40}}},
		{Found: true, Targets: 1, Delivered: 1},
		{Targets: 9, Delivered: 4, Offline: 3, Failed: 2, Stored: 3, Unsure: 2, Acked: 1, Duplicates: 4},
		{Found: true, Targets: 1, Delivered: 1, Acked: math.MaxInt, Duplicates: 1},
		{Found: true, Targets: 9, Delivered: 2, Offline: 7, Filtered: 5, Place: engine.Place{Seq: 1}},
		{Found: true, Targets: 9, Offline: 9, Stored: 9, Place: engine.Place{Epoch: math.MaxUint64, Partition: 63, Seq: math.MaxUint64}},
		{Found: true, Place: engine.Place{Seq: 1}},
	} {
		for a := range apis {
			for _, p := range []*engine.Push{plain, empty, named} {
				got := pubsub.PushStreamResponse{}
				ok(t, proto.Unmarshal(server.newStreamReply(300, a, p, &res).buffer, &got))
				if want := generated(300, a, p, &res); !proto.Equal(&got, want) {
					t.Errorf("stream reply\n%v, want\n%v", &got, want)
				}
				unary := marshal(t, answerOf(generated(0, a, p, &res)))
				if string(newReply(a, p, &res).buffer) != string(unary) || string(server.reply(a, p, &res).buffer) != string(unary) {
					t.Errorf("reply of %v to %+v is not what generated code writes", a, res)
				}
			}
		}
	}
	got := pubsub.PushStreamResponse{}
	r := newStatuses().draining
	ok(t, proto.Unmarshal(newStreamError(9, r.wire).buffer, &got))
	if got.Id != 9 || !proto.Equal(got.Error, r.status.Proto()) {
		t.Errorf("stream error = %v", &got)
	}
}

func answerOf(r *pubsub.PushStreamResponse) proto.Message {
	switch x := r.Result.(type) {
	case *pubsub.PushStreamResponse_ToRoom:
		return x.ToRoom
	case *pubsub.PushStreamResponse_ToUser:
		return x.ToUser
	case *pubsub.PushStreamResponse_ToUsers:
		return x.ToUsers
	case *pubsub.PushStreamResponse_ToRooms:
		return x.ToRooms
	case *pubsub.PushStreamResponse_Broadcast:
		return x.Broadcast
	}
	return nil
}

func generated(id uint64, a api, p *engine.Push, res *engine.Result) *pubsub.PushStreamResponse {
	i32 := func(n int) int32 { return int32(min(max(n, 0), math.MaxInt32)) }
	text := func(s string) string { return plain.Line(s, maxReason) }
	sum := &pubsub.DeliverySummary{Targets: i32(res.Targets), Delivered: i32(res.Delivered),
		Offline: i32(res.Offline), Failed: i32(res.Failed), Unknown: i32(res.Unknown)}
	for _, f := range res.NodeFailures {
		sum.NodeFailures = append(sum.NodeFailures, &pubsub.NodeFailure{NodeId: text(f.Node), Reason: text(f.Reason), Users: i32(f.Users)})
	}
	if p.Options != nil {
		sum.Stored, sum.Unsure, sum.Acked, sum.Duplicates = i32(res.Stored), i32(res.Unsure), i32(res.Acked), i32(res.Duplicates)
		sum.MessageId, sum.Filtered = p.Options.MessageID, i32(res.Filtered)
		if at := res.Place; at != (engine.Place{}) {
			sum.Position = (&position.Position{Epoch: at.Epoch, Places: []position.Place{{Partition: at.Partition, Seq: at.Seq}}}).String()
		}
	}
	msg := string(appendMessage(nil, a, p, res))
	r := &pubsub.PushStreamResponse{Id: id}
	switch a {
	case toRoom:
		r.Result = &pubsub.PushStreamResponse_ToRoom{ToRoom: &pubsub.PushToRoomResponse{
			Success: res.Success(), DeliveredCount: sum.Delivered, Message: msg, Summary: sum}}
	case toRooms:
		r.Result = &pubsub.PushStreamResponse_ToRooms{ToRooms: &pubsub.PushToRoomsResponse{
			Success: res.Success(), DeliveredCount: sum.Delivered, Message: msg, Summary: sum}}
	case toUser:
		r.Result = &pubsub.PushStreamResponse_ToUser{ToUser: &pubsub.PushToUserResponse{
			Success: res.Success(), Message: msg, Summary: sum}}
	case toUsers:
		r.Result = &pubsub.PushStreamResponse_ToUsers{ToUsers: &pubsub.PushToUsersResponse{
			Success: res.Success(), DeliveredCount: sum.Delivered, Message: msg, Summary: sum}}
	default:
		r.Result = &pubsub.PushStreamResponse_Broadcast{Broadcast: &pubsub.BroadcastMessageResponse{
			Success: res.Success(), TotalDelivered: sum.Delivered, Message: msg, Summary: sum}}
	}
	return r
}

func TestUsualReplyIsOneAllocation(t *testing.T) {
	p := &engine.Push{Request: engine.Request{User: "u"}}
	res := engine.Result{Found: true, Targets: 1, Delivered: 1}
	s := &Server{usual: newReply(toUser, new(engine.Push), &res)}
	stale := res
	stale.Stale = 1
	if s.reply(toUser, p, &stale) == s.usual {
		t.Error("a push by a stale route does not say so")
	}
	if n := testing.AllocsPerRun(100, func() { s.reply(toUser, p, &res) }); n != 0 {
		t.Errorf("unary, to a user: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { s.reply(toRoom, p, &res) }); n != 1 {
		t.Errorf("unary, to a room: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { s.newStreamReply(1<<40, toUser, p, &res) }); n != 1 {
		t.Errorf("stream: %v allocations", n)
	}
}
