package ingress

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

func manyRooms(n int) (rooms []string) {
	for i := range n {
		rooms = append(rooms, fmt.Sprintf("room-%04d", i))
	}
	return rooms
}

func TestListOfRoomsThatComesAgainIsTheSame(t *testing.T) {
	d := newDecoder(testLimits)
	decode := func(exclude string, rooms ...string) *engine.RoomList {
		t.Helper()
		r := &pubsub.PushToRoomsRequest{RoomIds: rooms, Content: content("x"), ExcludeUserIds: []string{exclude}}
		b, err := r.MarshalVT()
		ok(t, err)
		p := new(engine.Push)
		_, err = d.decode(toRooms, roomy(b), p)
		ok(t, err)
		same(t, p, r)
		return p.Rooms
	}
	many := manyRooms(50)
	first := decode("a", many...)
	if decode("bb", many...) != first {
		t.Error("the same rooms are taken apart again")
	}
	for i, other := range [][]string{many[:49], append(slices.Clone(many), "one-more"), append(slices.Clone(many[:49]), "another")} {
		if got := decode("a", other...); got == first || got != decode("a", other...) {
			t.Errorf("list %d that begins like another one is taken for it, or not known again", i)
		}
	}
	if decode("a", many...) != first {
		t.Error("it is not known any more")
	}
	for i := range 10 * listSets * listWays { // what is kept has a bound
		decode("a", append(manyRooms(10), fmt.Sprint(i))...)
		decode("a", append([]string{fmt.Sprint(i)}, manyRooms(10)...)...)
	}
	if decode("a", many...) == first {
		t.Error("so many lists are kept")
	}
	// Entries that stand apart are one list, as generated code has it.
	b, err := (&pubsub.PushToRoomsRequest{RoomIds: many, Content: content("x")}).MarshalVT()
	ok(t, err)
	more, err := (&pubsub.PushToRoomsRequest{RoomIds: []string{"behind"}}).MarshalVT()
	ok(t, err)
	p := new(engine.Push)
	_, err = d.decode(toRooms, roomy(slices.Concat(b, more)), p)
	ok(t, err)
	if !slices.Equal(p.Rooms.IDs(), append(slices.Clone(many), "behind")) {
		t.Errorf("%d rooms", p.Rooms.Len())
	}
}

func TestPushToSeveralRoomsByAllWaysIn(t *testing.T) {
	w := newWorld(t, nil)
	w.source.rooms["s"] = []member{{"b", "n2"}, {"d", "n1"}}
	r := &pubsub.PushToRoomsRequest{RoomIds: []string{"r", "s", "nowhere"}, Content: content("x"), ExcludeUserIds: []string{"a"}}
	reply, err := w.client.PushToRooms(w.context(), r)
	ok(t, err)
	check := func(what string, reply *pubsub.PushToRoomsResponse) {
		t.Helper()
		if !reply.GetSuccess() || reply.GetDeliveredCount() != 2 || reply.GetSummary().GetOffline() != 1 || !strings.Contains(reply.GetMessage(), "1 of 3 rooms not found") {
			t.Errorf("%s: %v", what, reply)
		}
	}
	check("unary", reply)
	stream, err := w.client.PushStream(w.context())
	ok(t, err)
	one := &pubsub.PushStreamRequest{Id: 7, Push: &pubsub.PushStreamRequest_ToRooms{ToRooms: r}}
	ok(t, stream.Send(one))
	answer, err := stream.Recv()
	ok(t, err)
	check("stream", answer.GetToRooms())
	ok(t, stream.Send(&pubsub.PushStreamRequest{Batch: []*pubsub.PushStreamRequest{one, one}}))
	for n := 0; n < 2; {
		answer, err := stream.Recv()
		ok(t, err)
		for _, a := range append(answer.GetBatch(), answer) {
			if a.GetId() == 7 {
				check("batch", a.GetToRooms())
				n++
			}
		}
	}
	ok(t, stream.CloseSend())
	if got := w.metric(`push_manager_api_requests_total{api="PushToRooms",status="success"}`); got != "4" {
		t.Errorf("%s successes are counted", got)
	}
	x, err := w.client.Explain(w.context(), &pubsub.ExplainRequest{Push: &pubsub.ExplainRequest_ToRooms{ToRooms: r}})
	ok(t, err)
	if !x.GetFound() || x.GetTargets() != 3 || len(x.GetDeliveries()) != 2 || !slices.Equal(x.GetExcludedUserIds(), []string{"a"}) {
		t.Errorf("explained: %v", x)
	}
	_, err = w.client.PushToRooms(w.context(), &pubsub.PushToRoomsRequest{RoomIds: []string{"r", "s"}, Content: content("x"), Options: &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE}})
	wantStatus(t, status.Convert(err), codes.InvalidArgument, engine.CodeUnavailable, "options.offline")
	_, err = w.client.PushToRooms(w.context(), &pubsub.PushToRoomsRequest{Content: content("x")})
	wantStatus(t, status.Convert(err), codes.InvalidArgument, engine.CodeRequired, "room_ids")
}

func TestMessageIDOfAPushToSeveralRoomsIsRemembered(t *testing.T) {
	w := newWorld(t, nil)
	w.source.rooms["s"] = []member{{"b", "n2"}, {"d", "n1"}}
	w.source.rooms["r"] = w.source.rooms["r"][:2]
	push := func(rooms ...string) *pubsub.PushToRoomsResponse {
		t.Helper()
		reply, err := w.client.PushToRooms(w.context(), &pubsub.PushToRoomsRequest{RoomIds: rooms, Content: content("x"), Options: &pubsub.PushOptions{MessageId: "m"}})
		ok(t, err)
		return reply
	}
	sent := func() int { return len(w.network.nodes[0].payloads()) + len(w.network.nodes[1].payloads()) }
	if reply := push("r", "s"); reply.GetDeliveredCount() != 3 || sent() != 2 {
		t.Fatalf("%v, %d deliveries", reply, sent())
	}
	if reply := push("r", "s"); reply.GetDeliveredCount() != 3 || sent() != 2 {
		t.Errorf("again: %v, %d deliveries", reply, sent())
	}
	for range 2 {
		if reply := push("s", "nowhere"); reply.GetDeliveredCount() != 2 || sent() != 4 || !strings.Contains(reply.GetMessage(), "1 of 2 rooms not found") {
			t.Errorf("to other rooms: %v, %d deliveries", reply, sent())
		}
	}
}

func TestRoomsOfALargeRequestAreReckoned(t *testing.T) {
	w := newWorld(t, nil)
	n1 := w.network.nodes[0]
	n1.setKeep(true)
	rooms := append(manyRooms(900), "r")
	wire := marshal(t, &pubsub.PushToRoomsRequest{RoomIds: rooms, Content: content("x")})
	var call sync.WaitGroup
	call.Go(func() { _, _ = w.raw("/pubsub.PushManagerService/PushToRooms", wire) })
	for end := time.Now().Add(10 * time.Second); n1.len() == 0 && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	if taken, _ := w.server.space.books(); taken != keptBytes(len(wire), len(rooms), 0) {
		t.Errorf("%d bytes are reckoned for %d rooms in %d bytes, want %d", taken, len(rooms), len(wire), keptBytes(len(wire), len(rooms), 0))
	}
	w.network.ackAll()
	call.Wait()
}

func TestPushToSeveralRoomsNeedsTheRightToEach(t *testing.T) {
	a := newAccess(t, authtest.New(t, policyOf(
		caller("some", `{methods: [PushToRooms], rooms: ["r", "s*"]}`),
		caller("single", `{methods: [PushToRoom], rooms: ["*"]}`))))
	w := newWorld(t, a.set)
	push := func(who string, rooms ...string) error {
		_, err := w.client.PushToRooms(w.as(a.Token(who, 0)), &pubsub.PushToRoomsRequest{RoomIds: rooms, Content: content("x")})
		return err
	}
	wantDenied(t, status.Convert(push("some", "r", "secret", "x")), "PushToRooms", "room_ids", "secret")
	wantDenied(t, status.Convert(push("single", "r", "s")), "PushToRooms", "method", "")
	w.nothingSent()
	ok(t, push("some", "r", "s1", "s2"))
	ok(t, push("some", "r", "s1", "s2"))
}

func TestRoomsOfATenantAreItsOwn(t *testing.T) {
	b, err := (&pubsub.PushToRoomsRequest{RoomIds: manyRooms(20), ExcludeUserIds: []string{"u"}, Content: &pubsub.MessageContent{}}).MarshalVT()
	ok(t, err)
	d := newDecoder(testLimits)
	var lists []*engine.RoomList
	for _, tenant := range []string{"shop", "", "bank", "bank"} {
		c := &call{tenant: tenant}
		_, err := d.decode(toRooms, roomy(b), &c.push)
		ok(t, err)
		c.enterTenant()
		ids := c.push.Rooms.IDs()
		if want := scopeOf(tenant) + "room-0000"; len(ids) != 20 || ids[0] != want || c.push.Exclude[0] != scopeOf(tenant)+"u" {
			t.Errorf("%q: %q, %q", tenant, ids, c.push.Exclude)
		}
		lists = append(lists, c.push.Rooms)
	}
	if lists[2] != lists[3] || lists[0] == lists[2] {
		t.Error("a tenant's list that comes again is another one, or that of another tenant")
	}
}
