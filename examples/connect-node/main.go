// Connect-node is a whole Connect-Node. Its clients are browsers, or curl:
//
//	go run ./examples/connect-node
//	curl -N 'localhost:8090/?user=alice&room=lobby'
//
// transport/node takes the pushes of Push-Manager, transport/node/membership tells the
// Controller who is connected here. internal/refgateway shows what a real one has besides.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

// client is a connection: the rooms that it is in, and its bounded queue.
type client struct {
	*membership.Member
	queue chan *node.Message
}

// Deliver implements node.Conn: a push to the user, to everybody, or to a room.
func (c *client) Deliver(m *node.Message) node.Outcome {
	if m.RoomID != "" && !c.In(m.RoomID) {
		return node.NotHere
	}
	select { // Never wait for a client.
	case c.queue <- m:
		return node.Delivered
	default:
		return node.Failed
	}
}

// What the Controller says. From Joined on pushes arrive.
func (c *client) Joined(room string)       { c.tell("joined " + room) }
func (c *client) Left(room string)         { c.tell("left " + room) }
func (c *client) Refused(room, why string) { c.tell("refused " + room + ": " + why) }
func (c *client) tell(text string)         { c.Deliver(&node.Message{Data: []byte(text)}) }

// serve is the life of a connection: server-sent events.
func serve(w http.ResponseWriter, r *http.Request, users *node.Users[*client], members *membership.Reporter) {
	user, c := r.FormValue("user"), &client{queue: make(chan *node.Message, 64)}
	c.Member = members.Member(user, user, c)
	defer c.Close()
	users.Add(user, c)
	defer users.Remove(user, c)
	if err := errors.Join(c.Join(""), c.Join(r.FormValue("room"))); err != nil { // The user is here, and in a room.
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	for {
		select {
		case m := <-c.queue:
			_, _ = fmt.Fprintf(w, "data: %s\n\n", m.Data) // When it fails, the request ends, too.
			_ = http.NewResponseController(w).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	users := node.NewUsers[*client]()
	srv := must(node.New(node.Config{NodeID: env("NODE_ID", "example-1"), Sessions: users}))
	reports := membership.Config{NodeID: srv.NodeID(), BootID: srv.BootID(), Registered: srv.Registered, Controller: env("CONTROLLER_ADDRESS", "localhost:50051")}
	members := must(membership.New(reports))
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serve(w, r, users, members) })
	web := &http.Server{Addr: env("HTTP_ADDRESS", "127.0.0.1:8090"), Handler: handler, ReadHeaderTimeout: 5 * time.Second}
	go func() { must(0, web.ListenAndServe()) }() // Its clients end with the process.
	lis, etcd := must(net.Listen("tcp", env("GRPC_ADDRESS", "127.0.0.1:50060"))), must(clientv3.NewFromURL(env("ETCD_ENDPOINTS", "localhost:2379")))
	must(0, srv.Run(ctx, node.RunConfig{Listener: lis, Etcd: etcd, Members: members})) // A signal drains the node.
}

func env(name, def string) string { return cmp.Or(os.Getenv(name), def) }

func must[T any](v T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return v
}
