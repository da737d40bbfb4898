package faultbench

import (
	"context"
	"maps"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// world is the truth about rooms and users, which Controllers tell.
type world struct {
	mu sync.Mutex
	// Guarded by mu.
	users map[string]string   // user -> node
	rooms map[string][]string // room -> users
}

func newWorld() *world { return &world{users: map[string]string{}, rooms: map[string][]string{}} }

// place says where users are, "" for nowhere.
func (w *world) place(node string, users ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, user := range users {
		if node == "" {
			delete(w.users, user)
		} else {
			w.users[user] = node
		}
	}
}

// nameless makes a user connected to a node without an id.
func (w *world) nameless(user string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.users[user] = ""
}

// join makes users members of a room.
func (w *world) join(room string, users ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rooms[room] = append(w.rooms[room], users...)
}

// at lists the users of a node.
func (w *world) at(node string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var users []string
	for user, at := range w.users {
		if at == node {
			users = append(users, user)
		}
	}
	return users
}

// freeze returns a copy that does not change any more: what a Controller believes
// that has missed the news.
func (w *world) freeze() *world {
	w.mu.Lock()
	defer w.mu.Unlock()
	return &world{users: maps.Clone(w.users), rooms: maps.Clone(w.rooms)}
}

// controller is a Controller with the two methods that every one has. It tells the
// truth unless it is told otherwise.
type controller struct {
	pubsub.UnimplementedControllerServiceServer

	t       testing.TB
	world   *world
	lookups atomic.Int64 // asked

	mu sync.Mutex
	// Guarded by mu.
	address string
	server  *grpc.Server
	ended   chan struct{}
	delay   time.Duration
	errors  float64 // share of look-ups that fail
	mute    bool    // never replies
	stale   *world  // what it tells instead of the truth
	trap    string  // the address that it tells of every node: only etcd says where one is
}

func newController(t testing.TB, w *world) *controller {
	t.Helper()
	c := &controller{t: t, world: w, address: freeport.Addr(t), trap: "127.0.0.1:1"}
	c.start()
	t.Cleanup(c.stop)
	return c
}

func (c *controller) start() {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var listener net.Listener
	eventually(c.t, "listen again", func() (err error) {
		listener, err = net.Listen("tcp", c.address)
		return err
	})
	c.address = listener.Addr().String()
	server, ended := grpc.NewServer(), make(chan struct{})
	pubsub.RegisterControllerServiceServer(server, c)
	c.server, c.ended = server, ended
	go func() {
		defer close(ended)
		_ = server.Serve(listener)
	}()
}

func (c *controller) stop() {
	c.mu.Lock()
	server, ended := c.server, c.ended
	c.mu.Unlock()
	server.Stop()
	<-ended
}

// change sets how the Controller behaves.
func (c *controller) change(set func(*controller)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	set(c)
}

// begin does to one look-up what is to be done, and returns what to tell.
func (c *controller) begin(ctx context.Context) (*world, error) {
	c.lookups.Add(1)
	c.mu.Lock()
	delay, share, mute, tell := c.delay, c.errors, c.mute, c.stale
	c.mu.Unlock()
	if tell == nil {
		tell = c.world
	}
	if mute {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if delay > 0 {
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if share > 0 && rand.Float64() < share {
		return nil, status.Error(codes.Unavailable, "by script")
	}
	return tell, nil
}

// JoinRoom learns from a gateway where a user is. Who is in a room is the script's to say.
func (c *controller) JoinRoom(_ context.Context, r *pubsub.JoinRoomRequest) (*pubsub.JoinRoomResponse, error) {
	c.world.place(r.GetNodeId(), r.GetUserId())
	return &pubsub.JoinRoomResponse{Success: true}, nil
}

// LeaveRoom is the end of that, where it is the gateway itself that a user leaves.
func (c *controller) LeaveRoom(_ context.Context, r *pubsub.LeaveRoomRequest) (*pubsub.LeaveRoomResponse, error) {
	if strings.HasPrefix(r.GetRoomId(), "@node:") {
		c.world.place("", r.GetUserId())
	}
	return &pubsub.LeaveRoomResponse{Success: true}, nil
}

// GetRoomInfo tells who is in a room.
func (c *controller) GetRoomInfo(ctx context.Context, r *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
	w, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	users, ok := w.rooms[r.GetRoomId()]
	if !ok {
		return &pubsub.GetRoomInfoResponse{}, nil
	}
	info := &pubsub.RoomInfo{RoomId: r.GetRoomId(), Users: make([]*pubsub.UserInfo, 0, len(users))}
	for _, user := range users {
		info.Users = append(info.Users, &pubsub.UserInfo{UserId: user, NodeId: w.users[user]})
	}
	return &pubsub.GetRoomInfoResponse{RoomInfo: info}, nil
}

// GetUserNode tells where a user is.
func (c *controller) GetUserNode(ctx context.Context, r *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
	w, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	id, ok := w.users[r.GetUserId()]
	c.mu.Lock()
	defer c.mu.Unlock()
	return &pubsub.GetUserNodeResponse{NodeId: id, NodeAddress: c.trap, Found: ok}, nil
}
