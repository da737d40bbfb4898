package node_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// room is a gateway whose connections are channels. A real one has bounded
// queues of sockets in their place, and cuts off a client whose queue is full.
type room struct {
	mu    sync.RWMutex
	users map[string][]chan<- []byte // several devices each
}

// Deliver implements node.Sessions.
func (r *room) Deliver(user string, m *node.Message) node.Outcome {
	r.mu.RLock()
	defer r.mu.RUnlock()
	devices, ok := r.users[user]
	if !ok {
		return node.NotHere
	}
	outcome := node.Failed
	for _, device := range devices {
		select { // Never wait for a client.
		case device <- encoded(m):
			outcome = node.Delivered
		default:
		}
	}
	return outcome
}

// Broadcast implements node.Sessions.
func (r *room) Broadcast(m *node.Message) (delivered, failed int) {
	r.mu.RLock()
	users := make([]string, 0, len(r.users))
	for user := range r.users {
		users = append(users, user)
	}
	r.mu.RUnlock()
	for _, user := range users {
		switch r.Deliver(user, m) {
		case node.Delivered:
			delivered++
		case node.Failed:
			failed++
		case node.NotHere: // Gone meanwhile.
		}
	}
	return delivered, failed
}

// Online implements node.Sessions.
func (r *room) Online() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.users)
}

// encoded is the frame for clients, made once per push.
func encoded(m *node.Message) []byte {
	if m.Prepared == nil {
		m.Prepared = fmt.Appendf(nil, "%s: %s", m.RoomID, m.Data)
	}
	frame, _ := m.Prepared.([]byte)
	return frame
}

// run is the life of a Connect-Node.
func run(ctx context.Context, gateway node.Sessions, etcd *clientv3.Client, lis net.Listener) error {
	srv, err := node.New(node.Config{NodeID: "connect-node-1", Sessions: gateway})
	if err != nil {
		return err
	}
	gs := grpc.NewServer(node.ServerOptions()...)
	srv.Attach(gs)
	served := make(chan error, 1)
	go func() { served <- gs.Serve(lis) }()
	if etcd != nil {
		if err := srv.Register(etcd, lis.Addr().String()); err != nil {
			return err
		}
	}

	<-ctx.Done()

	leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), 8*time.Second)
	defer cancel()
	_ = srv.Deregister(leave) // Its entry ends with the lease at the latest.
	_ = srv.Drain(leave)      // Whoever is left is cut off by Stop.
	gs.Stop()
	srv.Close()
	return <-served
}

func ExampleServer() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()

	// One user with one device.
	device := make(chan []byte, 16)
	gateway := &room{users: map[string][]chan<- []byte{"alice": {device}}}
	lis, err := net.Listen("tcp", "127.0.0.1:0") // A node listens where managers reach it.
	if err != nil {
		fmt.Println(err)
		return
	}
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, gateway, nil, lis) }() // With an etcd client in earnest.

	// What Push-Manager would do.
	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Println(err)
		return
	}
	reply, err := pubsub.NewConnectNodeServiceClient(conn).PushMessageBatch(ctx, &pubsub.PushMessageBatchRequest{
		UserIds: []string{"alice", "bob"},
		RoomId:  "lobby",
		Content: &pubsub.MessageContent{Data: []byte("Hello")},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(reply.GetDeliveredCount(), reply.GetFailedUserIds())
	fmt.Printf("%s\n", <-device)

	_ = conn.Close()
	stop()
	fmt.Println(<-ended)
	// Output:
	// 1 [bob]
	// lobby: Hello
	// <nil>
}
