// Connect-node is a whole Connect-Node. Its clients are browsers, or curl, one connection
// for each user:
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
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

// client is a connection: the rooms that it is in, and its bounded queue.
type client struct {
	*membership.Member

	queue chan string
}

func (c *client) Joined(room string)       { c.send("joined " + room) } // from now on pushes arrive
func (c *client) Left(room string)         { c.send("left " + room) }
func (c *client) Refused(room, why string) { c.send("refused " + room + ": " + why) }

func (c *client) send(text string) bool {
	select { // Never wait for a client.
	case c.queue <- text:
		return true
	default:
		return false
	}
}

type gateway struct {
	users   sync.Map // of *client
	members *membership.Reporter
}

// Deliver implements node.Sessions: a push to a user, or to one member of a room.
func (g *gateway) Deliver(user string, m *node.Message) node.Outcome {
	v, _ := g.users.Load(user)
	c, here := v.(*client)
	switch {
	case !here || m.RoomID != "" && !c.In(m.RoomID):
		return node.NotHere
	case c.send(string(m.Data)):
		return node.Delivered
	}
	return node.Failed
}

// Broadcast implements node.Sessions.
func (g *gateway) Broadcast(m *node.Message) (delivered, failed int) {
	for user := range g.users.Range {
		switch g.Deliver(user.(string), m) {
		case node.Delivered:
			delivered++
		case node.Failed:
			failed++
		case node.NotHere: // it has just gone
		}
	}
	return delivered, failed
}

// Online implements node.Sessions.
func (g *gateway) Online() (n int) {
	for range g.users.Range {
		n++
	}
	return n
}

// ServeHTTP is the life of a connection: server-sent events.
func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, c := r.FormValue("user"), &client{queue: make(chan string, 64)}
	c.Member = g.members.Member(user, user, c)
	defer c.Close()
	g.users.Store(user, c)
	defer g.users.CompareAndDelete(user, c)
	if c.Join("") != nil || c.Join(r.FormValue("room")) != nil { // the user is here, and in a room
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	for {
		select {
		case text := <-c.queue:
			_, _ = fmt.Fprintf(w, "data: %s\n\n", text) // When it fails, the request ends, too.
			_ = http.NewResponseController(w).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	id, g := env("NODE_ID", "example-1"), &gateway{}
	srv := must(node.New(node.Config{NodeID: id, Sessions: g}))
	g.members = must(membership.New(membership.Config{
		NodeID: id, BootID: srv.BootID(), Registered: srv.Registered, Controller: env("CONTROLLER_ADDRESS", "localhost:50051"),
	}))
	etcd := must(clientv3.New(clientv3.Config{Endpoints: []string{env("ETCD_ENDPOINTS", "localhost:2379")}}))
	lis := must(net.Listen("tcp", env("GRPC_ADDRESS", "127.0.0.1:50060")))
	gs := grpc.NewServer(node.ServerOptions()...)
	srv.Attach(gs)
	web := &http.Server{Addr: env("HTTP_ADDRESS", "127.0.0.1:8090"), Handler: g, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = gs.Serve(lis) }()
	go func() { _ = web.ListenAndServe() }()
	g.members.Start()
	must(0, srv.Register(etcd, lis.Addr().String())) // At last: now Push-Managers come.

	<-ctx.Done()
	leave, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	_ = srv.Deregister(leave)  // nobody new is sent here
	_ = srv.Drain(leave)       // Push-Managers finish
	_ = g.members.Drain(leave) // the Controller knows that all have gone
	gs.Stop()
	srv.Close()
	_ = web.Close()
	g.members.Close()
	_ = etcd.Close()
}

func env(name, def string) string { return cmp.Or(os.Getenv(name), def) }

func must[T any](v T, err error) T {
	if err != nil {
		fail(err)
	}
	return v
}

func fail(why ...any) {
	_, _ = fmt.Fprintln(os.Stderr, why...)
	os.Exit(1)
}
