package etcdresolver_test

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/client/clienttest"
	"github.com/push-manager/push-manager/client/etcdresolver"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

const patience = time.Minute

// instance is a Push-Manager that counts its pushes.
type instance struct {
	address string
	pushes  atomic.Int64
	stop    func()
}

func start(t *testing.T) *instance {
	t.Helper()
	listen, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{address: listen.Addr().String()}
	server := clienttest.NewServer(t)
	server.Handle(func(clienttest.Push) clienttest.Reply { i.pushes.Add(1); return clienttest.Delivered() })
	i.stop = server.Serve(listen)
	return i
}

// TestInstancesAreFoundWhateverEtcdDoes: those that come and go, after a compaction, while etcd is away, and if it was away at the start.
func TestInstancesAreFoundWhateverEtcdDoes(t *testing.T) {
	etcd := etcdtest.Start(t)
	keys := etcd.Client()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	put := func(id string, i *instance) {
		if _, err := keys.Put(ctx, "/services/push-manager/"+id, `{"Op":0,"Addr":"`+i.address+`","Metadata":{"node_id":"`+id+`"}}`); err != nil {
			t.Fatal(err)
		}
	}
	connect := func(etcd *clientv3.Client) *client.Client {
		c, err := client.New("etcd:///", client.WithResolver(etcdresolver.New(etcd)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	push := func(c *client.Client) {
		t.Helper()
		if _, err := c.PushToUser(ctx, "alice", client.Text("x")); err != nil && !errors.Is(err, client.ErrUnknown) { // on its way to one that stops
			t.Fatal(err)
		}
	}
	reaches := func(c *client.Client, i *instance) {
		t.Helper()
		for before := i.pushes.Load(); i.pushes.Load() == before; {
			push(c)
		}
	}
	first, second, third := start(t), start(t), start(t)
	put("pm-1", first)
	c := connect(etcd.Client())
	reaches(c, first)
	put("pm-2", second)
	reaches(c, second)

	if _, err := keys.Delete(ctx, "/services/push-manager/pm-1"); err != nil {
		t.Fatal(err)
	}
	for {
		before := first.pushes.Load()
		for range 20 {
			push(c)
		}
		if first.pushes.Load() == before {
			break
		}
	}

	r, err := keys.Get(ctx, "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keys.Compact(ctx, r.Header.Revision); err != nil {
		t.Fatal(err)
	}
	put("pm-3", third)
	reaches(c, third)

	etcd.Stop()
	reaches(c, second)
	late := connect(etcd.Client())
	soon, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	var failed *client.Error
	if _, err := late.PushToUser(soon, "alice", client.Text("x")); !errors.As(err, &failed) || !failed.NotSent {
		t.Errorf("without etcd: %v", err)
	}
	etcd.Restart()
	reaches(late, third)
	put("pm-1", first)
	reaches(c, first)
	reaches(late, first)
}
