package acceptance

import (
	"context"
	"encoding/json"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// oldController has only the two methods that every Controller has.
type oldController struct {
	pubsub.UnimplementedControllerServiceServer

	mu      sync.Mutex
	rooms   map[string][]*pubsub.UserInfo
	users   map[string]string // user -> node
	lookups int
}

func (c *oldController) GetRoomInfo(_ context.Context, r *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lookups++
	users, ok := c.rooms[r.GetRoomId()]
	if !ok {
		return &pubsub.GetRoomInfoResponse{}, nil
	}
	return &pubsub.GetRoomInfoResponse{RoomInfo: &pubsub.RoomInfo{RoomId: r.GetRoomId(), Users: slices.Clone(users)}}, nil
}

func (c *oldController) GetUserNode(_ context.Context, r *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lookups++
	id, ok := c.users[r.GetUserId()]
	// The address is a trap: only etcd says where a node is.
	return &pubsub.GetUserNodeResponse{NodeId: id, NodeAddress: "127.0.0.1:1", Found: ok}, nil
}

// place says where a user is, "" for nowhere, in the user's rooms as well.
func (c *oldController) place(user, nodeID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if nodeID == "" {
		delete(c.users, user)
	} else {
		c.users[user] = nodeID
	}
	for room, users := range c.rooms {
		for i, u := range users {
			if u.GetUserId() != user {
				continue
			}
			if nodeID == "" {
				c.rooms[room] = slices.Delete(slices.Clone(users), i, i+1)
			} else {
				u.NodeId = nodeID
			}
			break
		}
	}
}

// join makes users, each of whom has been placed, members of a room.
func (c *oldController) join(room string, users ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rooms[room] == nil {
		c.rooms[room] = []*pubsub.UserInfo{}
	}
	for _, user := range users {
		c.rooms[room] = append(c.rooms[room], &pubsub.UserInfo{UserId: user, NodeId: c.users[user]})
	}
}

func (c *oldController) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lookups
}

// got is one message that reached a user.
type got struct{ room, data string }

// clients are the users of one node and what has reached them. It is the gateway
// behind a streaming node and behind a unary one.
type clients struct {
	mu          sync.Mutex
	users       map[string][]got
	traceparent string        // of the last delivery on the stream
	slow        time.Duration // how long a delivery on the stream takes after it has reached the user
	hold        chan struct{} // until when it takes, nil for no longer
}

func newClients(users ...string) *clients {
	c := &clients{users: make(map[string][]got)}
	for _, user := range users {
		c.users[user] = nil
	}
	return c
}

func (c *clients) take(user, room string, data []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, here := c.users[user]; !here {
		return false
	}
	c.users[user] = append(c.users[user], got{room, string(data)})
	return true
}

func (c *clients) all(room string, data []byte) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for user := range c.users {
		c.users[user] = append(c.users[user], got{room, string(data)})
	}
	return len(c.users)
}

// of returns what has reached a user, in order.
func (c *clients) of(user string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []string
	for _, g := range c.users[user] {
		if g.room != "" {
			g.data = g.room + ": " + g.data
		}
		list = append(list, g.data)
	}
	return list
}

// move takes a user, with what has reached it, to another node.
func (c *clients) move(user string, to *clients) {
	c.mu.Lock()
	had := c.users[user]
	delete(c.users, user)
	c.mu.Unlock()
	if to != nil {
		to.mu.Lock()
		to.users[user] = had
		to.mu.Unlock()
	}
}

// Deliver implements node.Sessions.
func (c *clients) Deliver(user string, m *node.Message) node.Outcome {
	c.mu.Lock()
	c.traceparent = m.Traceparent
	slow, hold := c.slow, c.hold
	c.mu.Unlock()
	if c.take(user, m.RoomID, m.Data) {
		time.Sleep(slow)
		if hold != nil {
			<-hold
		}
		return node.Delivered
	}
	return node.NotHere
}

// Broadcast implements node.Sessions.
func (c *clients) Broadcast(m *node.Message) (int, int) { return c.all("", m.Data), 0 }

// Online implements node.Sessions.
func (c *clients) Online() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.users)
}

// oldNode is a Connect-Node with only the unary methods, written without any code
// of ours.
type oldNode struct {
	pubsub.UnimplementedConnectNodeServiceServer
	c *clients
}

func (n oldNode) PushMessage(_ context.Context, r *pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
	return &pubsub.PushMessageResponse{Success: n.c.take(r.GetUserId(), r.GetRoomId(), r.GetContent().GetData())}, nil
}

func (n oldNode) PushMessageBatch(_ context.Context, r *pubsub.PushMessageBatchRequest) (*pubsub.PushMessageBatchResponse, error) {
	reply := &pubsub.PushMessageBatchResponse{}
	for _, user := range r.GetUserIds() {
		if n.c.take(user, r.GetRoomId(), r.GetContent().GetData()) {
			reply.DeliveredCount++
		} else {
			reply.FailedUserIds = append(reply.FailedUserIds, user)
		}
	}
	reply.Success = len(reply.FailedUserIds) == 0
	return reply, nil
}

func (n oldNode) Broadcast(_ context.Context, r *pubsub.BroadcastRequest) (*pubsub.BroadcastResponse, error) {
	return &pubsub.BroadcastResponse{Success: true, DeliveredCount: int32(n.c.all("", r.GetContent().GetData()))}, nil
}

// serve runs a gRPC server until the end of the test.
func serve(t *testing.T, s *grpc.Server) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var ended sync.WaitGroup
	ended.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() { s.Stop(); ended.Wait() })
	return l.Addr().String()
}

func serveController(t *testing.T, c *oldController) string {
	t.Helper()
	s := grpc.NewServer()
	pubsub.RegisterControllerServiceServer(s, c)
	return serve(t, s)
}

// serveStreaming runs a node on the Deliver stream.
func serveStreaming(t *testing.T, etcd *clientv3.Client, id string, c *clients) {
	t.Helper()
	n, err := node.New(node.Config{NodeID: id, Sessions: c})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	s := grpc.NewServer(node.ServerOptions()...)
	n.Attach(s)
	register(t, etcd, id, serve(t, s))
}

// serveOld runs a node that has only the unary methods.
func serveOld(t *testing.T, etcd *clientv3.Client, id string, c *clients) {
	t.Helper()
	s := grpc.NewServer()
	pubsub.RegisterConnectNodeServiceServer(s, oldNode{c: c})
	register(t, etcd, id, serve(t, s))
}

// register writes a node's key as the contract has it.
func register(t *testing.T, etcd *clientv3.Client, id, addr string) {
	t.Helper()
	value, err := json.Marshal(map[string]any{"Op": 0, "Addr": addr, "Metadata": map[string]string{"node_id": id}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Put(within(t, patience), "/services/connect-node/"+id, string(value)); err != nil {
		t.Fatal(err)
	}
}
