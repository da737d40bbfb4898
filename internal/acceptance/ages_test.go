package acceptance

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// city is a deployment with an old Controller, and one node of each age: "new" has
// the Deliver stream, "old" the unary methods only.
type city struct {
	*manager
	controller *oldController
	nodes      map[string]*clients
}

func startCity(t *testing.T, env ...string) *city {
	t.Helper()
	c := &city{
		controller: &oldController{rooms: map[string][]*pubsub.UserInfo{}, users: map[string]string{}},
		nodes:      map[string]*clients{"new": newClients(), "old": newClients()},
	}
	etcd := etcdtest.Start(t)
	serveStreaming(t, etcd.Client(), "new", c.nodes["new"])
	serveOld(t, etcd.Client(), "old", c.nodes["old"])
	c.manager = startManager(t, etcd.Endpoint(), serveController(t, c.controller), len(c.nodes), env...)
	return c
}

// connect makes users connected to a node, in the gateway and in the Controller.
func (c *city) connect(nodeID string, users ...string) {
	for _, user := range users {
		n := c.nodes[nodeID]
		n.mu.Lock()
		n.users[user] = nil
		n.mu.Unlock()
		c.controller.place(user, nodeID)
	}
}

// TestProgramsOfEveryAgeGetTheSameResults runs the same pushes against a streaming
// and a unary node, under a Controller with two methods only.
func TestProgramsOfEveryAgeGetTheSameResults(t *testing.T) {
	c := startCity(t)
	for _, age := range []string{"new", "old"} {
		c.connect(age, age+"1", age+"2", age+"3")
		c.controller.join(age+" room", age+"1", age+"2", age+"3")
		c.controller.join("mixed", age+"1", age+"2")
	}
	c.controller.join("empty")
	c.controller.place("ghost", "new") // the Controller is wrong: nobody has this user
	c.controller.join("haunted", "new1", "ghost")
	ctx := within(t, patience)
	check := func(name string, reply proto.Message, err error, want string) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		wanted := reply.ProtoReflect().New().Interface()
		if err := protojson.Unmarshal([]byte(want), wanted); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(reply, wanted) {
			t.Errorf("%s:\ngot  %v\nwant %v", name, reply, wanted)
		}
	}
	for _, age := range []string{"new", "old"} {
		room, err := c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: age + " room", Content: text("a"), ExcludeUserIds: []string{age + "2"}})
		check(age+" room", room, err, `{"success":true,"deliveredCount":2,"message":"`+room.GetMessage()+`","summary":{"targets":2,"delivered":2}}`)
		user, err := c.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: age + "3", Content: text("b")})
		check(age+" user", user, err, `{"success":true,"message":"`+user.GetMessage()+`","summary":{"targets":1,"delivered":1}}`)
	}
	mixed, err := c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "mixed", Content: text("c")})
	check("mixed room", mixed, err, `{"success":true,"deliveredCount":4,"message":"`+mixed.GetMessage()+`","summary":{"targets":4,"delivered":4}}`)
	users, err := c.PushToUsers(ctx, &pubsub.PushToUsersRequest{UserIds: []string{"new1", "old1", "old1", "nobody"}, Content: text("d")})
	check("users", users, err, `{"success":true,"deliveredCount":2,"message":"`+users.GetMessage()+`","summary":{"targets":3,"delivered":2,"offline":1}}`)
	all, err := c.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: text("e")})
	check("broadcast", all, err, `{"success":true,"totalDelivered":6,"message":"`+all.GetMessage()+`","summary":{"targets":6,"delivered":6}}`)
	unknown, err := c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "nowhere", Content: text("f")})
	check("unknown room", unknown, err, `{"message":"room \"nowhere\" not found","summary":{}}`)
	empty, err := c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "empty", Content: text("g")})
	check("empty room", empty, err, `{"success":true,"message":"`+empty.GetMessage()+`","summary":{}}`)
	offline, err := c.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "nobody", Content: text("h")})
	check("offline user", offline, err, `{"message":"user \"nobody\" is offline","summary":{"targets":1,"offline":1}}`)
	ghost, err := c.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "ghost", Content: text("i")})
	check("user the node does not have", ghost, err, `{"message":"user \"ghost\" is offline","summary":{"targets":1,"offline":1}}`)
	haunted, err := c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "haunted", Content: text("j")})
	check("room with a member the node does not have", haunted, err,
		`{"success":true,"deliveredCount":1,"message":"`+haunted.GetMessage()+`","summary":{"targets":2,"delivered":1,"offline":1}}`)

	for user, want := range map[string][]string{
		"new1": {"new room: a", "mixed: c", "d", "e", "haunted: j"}, "old1": {"old room: a", "mixed: c", "d", "e"},
		"new2": {"mixed: c", "e"}, "old2": {"mixed: c", "e"},
		"new3": {"new room: a", "b", "e"}, "old3": {"old room: a", "b", "e"},
	} {
		if arrived := c.nodes[user[:3]].of(user); !slices.Equal(arrived, want) {
			t.Errorf("%s got %q, want %q", user, arrived, want)
		}
	}
}

// TestPushesToOneUserArriveInOrder pushes to one user of a streaming and of a unary
// node, one after the other and on a PushStream without waiting, while other pushes
// go through the same nodes.
func TestPushesToOneUserArriveInOrder(t *testing.T) {
	c := startCity(t)
	for _, age := range []string{"new", "old"} {
		c.connect(age, age+"1", age+" crowd")
		c.controller.join("crowd", age+" crowd")
	}
	stop := make(chan struct{})
	var traffic sync.WaitGroup
	var other atomic.Int64
	for i := range 4 {
		traffic.Go(func() {
			for ctx := within(t, patience); ; other.Add(1) {
				select {
				case <-stop:
					return
				default:
				}
				var err error
				if i%2 == 0 {
					_, err = c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "crowd", Content: text("x")})
				} else {
					_, err = c.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "old crowd", Content: text("y")})
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	const waiting = 200
	for user, streaming := range map[string]int{"new1": 2000, "old1": 500} { // the old node takes a call for each, one after another
		ctx := within(t, patience)
		var want []string
		for i := range waiting {
			want = append(want, fmt.Sprint("waiting ", i))
			if r, err := c.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: user, Content: text(want[i])}); err != nil || !r.GetSuccess() {
				t.Fatalf("push %d to %s: %v, %v", i, user, r, err)
			}
		}
		stream, err := c.PushStream(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var replies sync.WaitGroup
		inFlight := make(chan struct{}, 32) // so that none waits for its time to be over on a slow machine
		replies.Go(func() {
			for range streaming {
				if r, err := stream.Recv(); err != nil || !r.GetToUser().GetSuccess() {
					t.Errorf("reply of %s: %v, %v", user, r, err)
					return
				}
				<-inFlight
			}
		})
		for i := range streaming {
			want = append(want, fmt.Sprint("streaming ", i))
			push := &pubsub.PushStreamRequest{Id: uint64(i), Push: &pubsub.PushStreamRequest_ToUser{
				ToUser: &pubsub.PushToUserRequest{UserId: user, Content: text(want[waiting+i])},
			}}
			select {
			case inFlight <- struct{}{}:
			case <-ctx.Done():
				t.Fatal(ctx.Err())
			}
			if err := stream.Send(push); err != nil {
				t.Fatal(err)
			}
		}
		replies.Wait()
		if err := stream.CloseSend(); err != nil {
			t.Error(err)
		}
		if arrived := c.nodes[user[:3]].of(user); !slices.Equal(arrived, want) {
			t.Errorf("%s got %d pushes of %d, or in another order", user, len(arrived), len(want))
		}
	}
	close(stop)
	traffic.Wait()
	if other.Load() == 0 {
		t.Error("there was no other traffic")
	}
}

// TestUsersWhoMovedAreReachedWithOneMoreLookup moves users between nodes behind the
// Push-Manager's back, within the life of its cached routes.
func TestUsersWhoMovedAreReachedWithOneMoreLookup(t *testing.T) {
	c := startCity(t, "ROUTE_CACHE_TTL=1h")
	c.connect("new", "u", "v", "w")
	c.controller.join("r", "u", "v", "w")
	ctx := within(t, patience)
	user := func(what string, success bool, lookups int, want *pubsub.DeliverySummary) {
		t.Helper()
		before := c.controller.count()
		r, err := c.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "u", Content: text(what)})
		if err != nil || r.GetSuccess() != success || !proto.Equal(r.GetSummary(), want) {
			t.Errorf("%s: %v, %v", what, r, err)
		}
		if n := c.controller.count() - before; n != lookups {
			t.Errorf("%s: %d look-ups, want %d", what, n, lookups)
		}
	}
	reached := &pubsub.DeliverySummary{Targets: 1, Delivered: 1}
	user("first", true, 1, reached)
	user("cached", true, 0, reached)
	for i, to := range []string{"old", "new", "old"} {
		from := map[string]string{"old": "new", "new": "old"}[to]
		c.nodes[from].move("u", c.nodes[to])
		c.controller.place("u", to)
		user(fmt.Sprint("moved ", i), true, 1, reached)
		user(fmt.Sprint("stayed ", i), true, 0, reached)
	}
	want := []string{"first", "cached", "moved 0", "stayed 0", "moved 1", "stayed 1", "moved 2", "stayed 2"}
	if arrived := c.nodes["old"].of("u"); !slices.Equal(arrived, want) {
		t.Errorf("u got %q", arrived)
	}

	push := func(what string, lookups int, want *pubsub.DeliverySummary) {
		t.Helper()
		before := c.controller.count()
		r, err := c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "r", Content: text(what)})
		if err != nil || !proto.Equal(r.GetSummary(), want) {
			t.Errorf("%s: %v, %v", what, r, err)
		}
		if n := c.controller.count() - before; n != lookups {
			t.Errorf("%s: %d look-ups, want %d", what, n, lookups)
		}
	}
	push("room", 1, &pubsub.DeliverySummary{Targets: 3, Delivered: 3})
	c.nodes["new"].move("v", c.nodes["old"])
	c.controller.place("v", "old")
	push("room after a move", 1, &pubsub.DeliverySummary{Targets: 3, Delivered: 3})
	c.nodes["new"].move("w", nil)
	c.controller.place("w", "")
	push("room after one left", 1, &pubsub.DeliverySummary{Targets: 3, Delivered: 2, Offline: 1})
	push("room without them", 0, &pubsub.DeliverySummary{Targets: 2, Delivered: 2})

	c.nodes["old"].move("u", nil)
	user("gone, and the Controller does not know", false, 1, &pubsub.DeliverySummary{Targets: 1, Offline: 1})
	c.controller.place("u", "")
	// The node had denied it, and the Controller was asked since.
	user("gone", false, 0, &pubsub.DeliverySummary{Targets: 1, Offline: 1})
}
