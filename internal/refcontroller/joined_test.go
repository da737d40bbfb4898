package refcontroller

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
	asker "github.com/push-manager/push-manager/transport/controller"
)

// deployment is a Controller on loopback, what a gateway needs of it, and the
// Push-Managers that ask it.
type deployment struct {
	pubsub.ControllerServiceClient

	server   *Server
	managers []*route.Directory
}

func deploy(t testing.TB, managers int) *deployment {
	t.Helper()
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
	t.Cleanup(func() {
		server.Close()
		<-served
	})
	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	d := &deployment{ControllerServiceClient: pubsub.NewControllerServiceClient(conn), server: server}
	for range managers {
		c, err := asker.New(asker.Config{Address: lis.Addr().String()})
		if err != nil {
			t.Fatal(err)
		}
		var tasks sync.WaitGroup
		dir, err := route.New(route.Config{
			Source: c, Shards: 1, Shard: func(string) int { return 0 }, LookupTimeout: 10 * time.Second,
			Go: func(_ int, task func()) error { tasks.Go(task); return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		c.Start(dir)
		t.Cleanup(func() {
			_ = c.Close()
			tasks.Wait()
			dir.Close()
		})
		d.managers = append(d.managers, dir)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		watched := 0
		for _, m := range d.managers {
			if m.Stats().Watched {
				watched++
			}
		}
		if watched == managers {
			return d
		}
		if time.Now().After(deadline) {
			t.Fatal("not in sync")
		}
	}
}

// answer waits for what a look-up brings.
type answer chan *route.Snapshot

func (answer) Lookup(ctx context.Context, _ string) (context.Context, func(error)) {
	return ctx, func(error) {}
}

func (a answer) Routed(_ []string, snaps []*route.Snapshot, _ error) {
	if len(snaps) == 0 {
		close(a)
		return
	}
	a <- snaps[0]
}

// users asks every Push-Manager at this moment, and counts the users it finds.
func (d *deployment) users(t testing.TB, room, user string) []int {
	t.Helper()
	now := time.Now()
	var counts []int
	for _, m := range d.managers {
		var s *route.Snapshot
		if room != "" {
			s = m.Rooms.Cached(0, room, now)
		} else {
			s = m.Users.Cached(0, user, now)
		}
		if s == nil {
			a := make(answer, 1)
			if room != "" {
				m.Rooms.Ask(0, []string{room}, now, a)
			} else {
				m.Users.Ask(0, []string{user}, now, a)
			}
			s = <-a
		}
		if s == nil {
			t.Fatal("a look-up failed")
		}
		n := 0
		if s.Found {
			n = s.Users
		}
		counts = append(counts, n)
	}
	return counts
}

// The answer of JoinRoom and of LeaveRoom means that a push that comes after it is
// routed by it, whichever Push-Manager takes it and whatever that has cached.
func TestPushAfterJoinedOrLeftIsRoutedByIt(t *testing.T) {
	d := deploy(t, 3)
	wrong := 0
	look := func(want int, room, user, when string) {
		t.Helper()
		for i, n := range d.users(t, room, user) {
			if n != want {
				if wrong++; wrong < 5 {
					t.Errorf("%s: Push-Manager %d finds %d users for %q%q, want %d", when, i, n, room, user, want)
				}
			}
		}
	}
	if _, err := d.JoinRoom(t.Context(), &pubsub.JoinRoomRequest{UserId: "base", RoomId: "r", NodeId: "n"}); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		user := fmt.Sprint("u", i)
		look(1, "r", "", "before")
		look(0, "", user, "before") // the absence is cached
		if _, err := d.JoinRoom(t.Context(), &pubsub.JoinRoomRequest{UserId: user, RoomId: "r", NodeId: "n"}); err != nil {
			t.Fatal(err)
		}
		look(2, "r", "", "joined")
		look(1, "", user, "joined")
		if _, err := d.LeaveRoom(t.Context(), &pubsub.LeaveRoomRequest{UserId: user, RoomId: "r", NodeId: "n"}); err != nil {
			t.Fatal(err)
		}
		look(1, "r", "", "left")
		look(0, "", user, "left")
	}
	if wrong > 0 {
		t.Errorf("%d of 1,200 answers after a report were from before it", wrong)
	}
}

// What a report costs when Push-Managers have to hear of it first.
func BenchmarkReport(b *testing.B) {
	for _, managers := range []int{0, 1, 3} {
		b.Run(fmt.Sprintf("managers=%d", managers), func(b *testing.B) {
			d := deploy(b, managers)
			var n atomic.Int64
			b.ReportAllocs()
			b.SetParallelism(16) // 32 at a time with two cores, as many as a gateway sends
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					i := n.Add(1)
					if _, err := d.JoinRoom(b.Context(), &pubsub.JoinRoomRequest{UserId: fmt.Sprint("u", i), RoomId: fmt.Sprint("r", i%1000), NodeId: "n"}); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// What a push to a large room costs its Push-Manager and the Controller when somebody comes or goes before each of them.
// Without members in the changes that is a look-up of the whole room.
func BenchmarkPushToLargeRoomThatChanges(b *testing.B) {
	const members = 200_000
	d := deploy(b, 1)
	for i := range members {
		if _, err := d.server.svc.store.(*Memory).Join(b.Context(), Join{Reporter: Reporter{Node: fmt.Sprint("n", i%20)}, User: fmt.Sprintf("user-%07d", i), Room: "r"}); err != nil {
			b.Fatal(err)
		}
	}
	want := d.users(b, "r", "")[0]
	before := d.managers[0].Stats()
	i := 0
	for b.Loop() {
		if user := fmt.Sprintf("user-%07d", i/2%members); i%2 == 0 {
			if _, err := d.LeaveRoom(b.Context(), &pubsub.LeaveRoomRequest{UserId: user, RoomId: "r", NodeId: fmt.Sprint("n", i/2%members%20)}); err != nil {
				b.Fatal(err)
			}
			want--
		} else {
			if _, err := d.JoinRoom(b.Context(), &pubsub.JoinRoomRequest{UserId: user, RoomId: "r", NodeId: fmt.Sprint("n", i/2%members%20), WithoutUsers: true}); err != nil {
				b.Fatal(err)
			}
			want++
		}
		i++
		if got := d.users(b, "r", "")[0]; got != want {
			b.Fatalf("push %d goes to %d users of %d", i, got, want)
		}
	}
	after := d.managers[0].Stats()
	b.ReportMetric(float64(after.Lookups-before.Lookups)/float64(i), "look-ups/push")
	b.ReportMetric(float64(after.Moves-before.Moves)/float64(i), "moves/push")
}
