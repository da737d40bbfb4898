package controller

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// replica is a Controller over TLS that knows every user.
type replica struct {
	pubsub.UnimplementedControllerServiceServer

	asked atomic.Int64
}

func (r *replica) GetUserNode(context.Context, *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
	r.asked.Add(1)
	return &pubsub.GetUserNodeResponse{Found: true, NodeId: "n1"}, nil
}

func TestEachReplicaIsKnownByItsOwnName(t *testing.T) {
	ca := etcdtest.NewCA(t)
	start := func(name string) (*replica, string) {
		cert, key := ca.Issue(name)
		creds, err := credentials.NewServerTLSFromFile(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		r, gs := &replica{}, grpc.NewServer(grpc.Creds(creds))
		pubsub.RegisterControllerServiceServer(gs, r)
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- gs.Serve(lis) }()
		t.Cleanup(func() {
			gs.Stop()
			<-served
		})
		_, port, err := net.SplitHostPort(lis.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return r, net.JoinHostPort(name, port)
	}
	source, err := certs.Open(certs.Config{Files: certs.Files{CA: ca.File}, Role: "controller"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(source.Close)
	first, firstAddr := start("127.0.0.1")
	second, secondAddr := start("localhost")
	c, err := New(Config{Address: firstAddr + "," + secondAddr, Credentials: source.Client(certs.Side{})})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	for end := time.Now().Add(time.Minute); first.asked.Load() == 0 || second.asked.Load() == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("asked %d and %d times", first.asked.Load(), second.asked.Load())
		}
		nodes := make([][]string, 1)
		if err := c.Users(t.Context(), []string{"alice"}, nodes); err == nil && nodes[0][0] != "n1" {
			t.Fatal(nodes)
		}
	}
}
