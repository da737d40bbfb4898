package node_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// device is a connection. In place of the channel a real one has the bounded queue of a
// socket, and cuts off a client whose queue is full.
type device chan []byte

// Deliver implements node.Conn. A real one also knows which rooms it is in.
func (d device) Deliver(m *node.Message) node.Outcome {
	if m.Prepared == nil { // The frame for clients, made once per push.
		m.Prepared = fmt.Appendf(nil, "%s: %s", m.RoomID, m.Data)
	}
	frame, _ := m.Prepared.([]byte)
	select { // Never wait for a client.
	case d <- frame:
		return node.Delivered
	default:
		return node.Failed
	}
}

func ExampleServer() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()

	// One user with one device.
	alice := make(device, 16)
	users := node.NewUsers[device]()
	users.Add("alice", alice)
	srv, err := node.New(node.Config{NodeID: "connect-node-1", Sessions: users})
	if err != nil {
		fmt.Println(err)
		return
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0") // A node listens where managers reach it.
	if err != nil {
		fmt.Println(err)
		return
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Run(ctx, node.RunConfig{Listener: lis}) }() // With Etcd and Members in earnest.

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
	fmt.Printf("%s\n", <-alice)

	_ = conn.Close()
	stop()
	fmt.Println(<-ended)
	// Output:
	// 1 [bob]
	// lobby: Hello
	// <nil>
}
