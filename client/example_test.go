package client_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/client/clienttest"
	"github.com/push-manager/push-manager/client/etcdresolver"
)

// connect is what a program of yours does with client.New("localhost:50053").
func connect() (*client.Client, *clienttest.Server, func()) {
	t := new(exampleTB)
	server := clienttest.NewServer(t)
	return server.Client(), server, t.end
}

func Example() {
	c, _, end := connect() // client.New("localhost:50053")
	defer end()
	r, err := c.PushToRoom(context.Background(), "lobby", client.Text("Hello"))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(r.Outcome(), r.Delivered, "of", r.Targets)
	// Output: delivered 1 of 1
}

// What became of a push, and what to do about it.
func ExampleResult_Outcome() {
	c, server, end := connect()
	defer end()
	server.Reply(clienttest.Failed("connect-node-2", "queue full"))
	r, err := c.PushToUser(context.Background(), "alice", client.Text("Your order has arrived"))
	if err != nil {
		fmt.Println(err)
		return
	}
	switch r.Outcome() {
	case client.Delivered, client.Stored:
		fmt.Println("she has it, or gets it when she comes")
	case client.Offline:
		fmt.Println("send her a mail instead")
	case client.Failed:
		fmt.Println("she does not have it:", r.Failures[0].Reason)
	case client.Unknown:
		fmt.Println("she may have it: push again, with the same MessageID")
	}
	// Output: she does not have it: failed: queue full
}

// An error says whether anything was sent.
func ExampleError() {
	c, server, end := connect()
	defer end()
	server.Reply(clienttest.Refused(codes.PermissionDenied, "PERMISSION_DENIED", 0))
	_, err := c.Broadcast(context.Background(), client.Text("Hello"))
	if failed, is := errors.AsType[*client.Error](err); is {
		fmt.Println(failed.Reason, failed.NotSent, errors.Is(err, client.ErrUnknown))
	}
	// Output: PERMISSION_DENIED true false
}

// A message that matters has an id, and is stored for who is away.
func ExampleMessageID() {
	c, server, end := connect()
	defer end()
	server.Reply(clienttest.Broken(), clienttest.Offline()) // the first answer is lost
	r, err := c.PushToUser(context.Background(), "alice", client.Text("Your order has arrived"),
		client.MessageID("order-17-arrived"), client.StoreIfOffline(), client.TTL(24*time.Hour))
	fmt.Println(r.Outcome(), err, len(server.Pushes()), "tries")
	// Output: stored <nil> 2 tries
}

// Many pushes go over a Stream.
func ExampleStream() {
	c, _, end := connect()
	defer end()
	ctx := context.Background()
	s := c.Stream(client.StreamConfig{})
	var sent []*client.Pending
	for i := range 1000 {
		p, err := s.Send(ctx, client.User(fmt.Sprint("user-", i)), client.Text("Hello")) // waits while too many are open
		if err != nil {
			fmt.Println(err)
			return
		}
		sent = append(sent, p)
	}
	delivered := 0
	for _, p := range sent {
		if r, err := p.Wait(ctx); err == nil {
			delivered += r.Delivered
		}
	}
	fmt.Println(delivered, s.Close(ctx))
	// Output: 1000 <nil>
}

// Push-Managers are found in etcd, and each gets its turn.
func ExampleNew_etcd() {
	etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{"localhost:2379"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = etcd.Close() }()
	c, err := client.New("etcd:///", client.WithResolver(etcdresolver.New(etcd)))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = c.Close() }()
}

// Over TLS, with an API key from a file that may change.
func ExampleNew_secure() {
	c, err := client.New("dns:///push-manager.default.svc:50053",
		client.WithTLS(client.TLS{CAFile: "/etc/push-manager/ca.pem"}),
		client.WithTokenFile("/var/run/secrets/push-manager-key"))
	if err != nil {
		fmt.Println("the files are not there")
		return
	}
	defer func() { _ = c.Close() }()
	// Output: the files are not there
}

// exampleTB is a testing.TB for examples, which have none.
type exampleTB struct {
	testing.TB

	cleanups []func()
}

func (e *exampleTB) Helper()          {}
func (e *exampleTB) Cleanup(f func()) { e.cleanups = append(e.cleanups, f) }
func (e *exampleTB) Fatal(all ...any) { panic(fmt.Sprint(all...)) }

func (e *exampleTB) end() {
	for _, f := range slices.Backward(e.cleanups) {
		f()
	}
}
