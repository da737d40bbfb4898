package refcontroller

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine/route"
	asker "github.com/push-manager/push-manager/transport/controller"
)

// told is what the directory would hear.
type told struct {
	mu      sync.Mutex
	watched bool
	rooms   []string
}

func (d *told) Invalidate(rooms, _ []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rooms = append(d.rooms, rooms...)
}

func (d *told) Moved(moves []route.Move) {
	for _, m := range moves {
		d.Invalidate([]string{m.Room}, nil)
	}
}

func (d *told) InvalidateAll() {}

func (d *told) Vouch(until time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.watched = time.Now().Before(until)
}

func (d *told) has(watched bool, room string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.watched == watched && (room == "" || slices.Contains(d.rooms, room))
}

// Push-Manager's side and ours, over a real connection.
func TestPushManagersSideUnderstandsUs(t *testing.T) {
	server, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	store := server.svc.store.(*Memory)
	const many = 100_000
	for i := range many {
		_, _ = store.Join(t.Context(), Join{Reporter: Reporter{Node: fmt.Sprint("n", i%3)}, User: fmt.Sprint("user", i), Room: "large", Name: "somebody"})
	}

	var d told
	c, err := asker.New(asker.Config{Address: lis.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	c.Start(&d)
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		server.Close()
		<-served
	}()
	eventually(t, "in sync and healthy", func() bool { return c.Healthy() && d.has(true, "") })

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	perNode := map[string]int{}
	found, _, err := c.Room(ctx, "large", func(_, node []byte) { perNode[string(node)]++ })
	if err != nil || !found || perNode["n0"] != 33334 || perNode["n1"] != 33333 || perNode["n2"] != 33333 {
		t.Fatal(found, perNode, err)
	}
	if found, _, err := c.Room(ctx, "unknown", func([]byte, []byte) {}); err != nil || found {
		t.Fatal(found, err)
	}
	users := []string{"user0", "nobody", "user4"}
	nodes := make([][]string, len(users))
	if err := c.Users(ctx, users, nodes); err != nil || fmt.Sprint(nodes) != "[[n0] [] [n1]]" {
		t.Fatal(nodes, err)
	}
	if _, err := store.Join(ctx, Join{Reporter: Reporter{Node: "n"}, User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the change is told", func() bool { return d.has(true, "r") })

	// A drain is noticed at once.
	drainCtx, cancelDrain := context.WithTimeout(ctx, 5*time.Second)
	defer cancelDrain()
	if err := server.Drain(drainCtx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no longer watched", func() bool { return d.has(false, "") })
}

// The look-up of a large room has to fit into 300 ms.
func BenchmarkLookupOfLargeRoom(b *testing.B) {
	for _, members := range []int{1000, 100_000, 1_000_000} {
		b.Run(fmt.Sprintf("members=%d", members), func(b *testing.B) {
			server, err := New(Config{})
			if err != nil {
				b.Fatal(err)
			}
			lis, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- server.Serve(lis) }()
			for i := range members {
				_, _ = server.svc.store.(*Memory).Join(b.Context(), Join{Reporter: Reporter{Node: fmt.Sprint("n", i%3)}, User: fmt.Sprintf("user-%07d", i), Room: "r"})
			}
			c, err := asker.New(asker.Config{Address: lis.Addr().String()})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				n := 0
				if _, _, err := c.Room(b.Context(), "r", func([]byte, []byte) { n++ }); err != nil || n != members {
					b.Fatal(n, err)
				}
			}
			_ = c.Close()
			server.Close()
			<-served
		})
	}
}
