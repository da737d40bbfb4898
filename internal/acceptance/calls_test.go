package acceptance

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pubsub "github.com/push-manager/push-manager/proto"
)

// callBalancer is a way in which calls are balanced one by one.
type callBalancer struct {
	name    string
	begin   func(*testing.T, []*manager) *balancer
	connect func(*testing.T, *balancer) pubsub.PushManagerServiceClient
}

// TestBalancersSpreadCallsOneByOne: a single connection of a caller reaches all instances evenly, a caller's cancel gets through,
// PushStreams work, and an instance that is drained under load fails no call that is tried twice. LONG=1: with 30,000 calls.
func TestBalancersSpreadCallsOneByOne(t *testing.T) {
	s := startSecured(t)
	plain := func(t *testing.T, b *balancer) pubsub.PushManagerServiceClient {
		t.Helper()
		conn, err := grpc.NewClient("passthrough:///"+b.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return pubsub.NewPushManagerServiceClient(conn)
	}
	secured := func(t *testing.T, b *balancer) pubsub.PushManagerServiceClient {
		t.Helper()
		return s.connect(t, b.addr, "client-billing")
	}
	for _, kind := range []struct {
		name   string
		launch func(*testing.T, ...string) *manager
		ways   []callBalancer
	}{
		{"plain", s.launchPlain, []callBalancer{
			{"HAProxy", func(t *testing.T, m []*manager) *balancer {
				t.Helper()
				return haproxy(t, example(t, "haproxy/calls.cfg"), nil, m)
			}, plain},
			{"nginx", func(t *testing.T, m []*manager) *balancer { t.Helper(); return nginx(t, "nginx/calls.conf", m) }, plain},
		}},
		{"TLS", s.launch, []callBalancer{
			{"HAProxy", func(t *testing.T, m []*manager) *balancer { t.Helper(); return s.haproxyTLS(t, m, false) }, secured},
			{"nginx", func(t *testing.T, m []*manager) *balancer { t.Helper(); return s.nginxTLS(t, m, false) }, secured},
		}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			var managers []*manager
			for i := range 3 {
				managers = append(managers, kind.launch(t, fmt.Sprintf("MANAGER_ID=pm-%d", i+1), "LINK_ACK_TIMEOUT=10m", "LINK_SILENCE=10m", "PUSH_TIMEOUT=10m", "LIMITS_DATA_BYTES=4MiB", "LIMITS_REQUEST_BYTES=5MiB"))
			}
			var clients []pubsub.PushManagerServiceClient
			for _, way := range kind.ways {
				t.Run(way.name, func(t *testing.T) {
					api := way.connect(t, way.begin(t, managers))
					callsAreSpreadEvenly(t, api, managers)
					cancelGetsThrough(t, s, api, managers)
					largeMessagesArrive(t, s, api)
				})
				clients = append(clients, way.connect(t, way.begin(t, managers)))
			}
			if len(clients) == len(kind.ways) {
				drainFailsNoCallThatIsTriedTwice(t, s, clients, managers)
			}
		})
	}
}

// callsAreSpreadEvenly: all on one connection, one call at a time. With more of them, an instance that a busy machine holds up
// gets fewer, as it should: so there are eight at a time only where LONG says that the machine is ours.
func callsAreSpreadEvenly(t *testing.T, api pubsub.PushManagerServiceClient, managers []*manager) {
	t.Helper()
	calls, atOnce := 1500, 1
	if os.Getenv("LONG") != "" {
		calls, atOnce = 30_000, 8
	}
	before := servedBy(t, managers)
	var next atomic.Int64
	var callers sync.WaitGroup
	for range atOnce {
		callers.Go(func() {
			for next.Add(1) <= int64(calls) {
				if r, err := api.PushToUser(within(t, patience), toAlice([]byte("x"))); err != nil || !r.GetSuccess() {
					t.Errorf("%v %v", r, err)
					return
				}
			}
		})
	}
	callers.Wait()
	even := float64(calls) / float64(len(managers))
	for i, served := range servedBy(t, managers) {
		got := served - before[i]
		if got < 0.9*even || got > 1.1*even {
			t.Errorf("instance %d got %v of %d calls, want %v within a tenth", i+1, got, calls, even)
		}
		t.Logf("instance %d: %v of %d calls", i+1, got, calls)
	}
}

func servedBy(t *testing.T, managers []*manager) []float64 {
	t.Helper()
	var all []float64
	for _, m := range managers {
		values, err := m.readMetrics()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, values[`push_manager_api_requests_total{api="PushToUser",status="success"}`])
	}
	return all
}

// cancelGetsThrough: of a call whose push is with a node that does not answer, and of a PushStream. Nothing else would end them. How
// soon is told, and no more: it includes reading the metrics of all instances. LONG=1: for 20 times.
func cancelGetsThrough(t *testing.T, s *secured, api pubsub.PushManagerServiceClient, managers []*manager) {
	t.Helper()
	hold := make(chan struct{})
	defer close(hold)
	s.users.setHold(hold)
	defer s.users.setHold(nil)
	open := func(want float64) {
		t.Helper()
		eventually(t, fmt.Sprintf("%v calls are open", want), func() error {
			got := 0.0
			for _, m := range managers {
				values, err := m.readMetrics()
				if err != nil {
					return err
				}
				got += values["push_manager_api_inflight"]
			}
			if got != want {
				return fmt.Errorf("%v", got)
			}
			return nil
		})
	}
	times := 1
	if os.Getenv("LONG") != "" {
		times = 20
	}
	var took []time.Duration
	for range times {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var calls sync.WaitGroup
		calls.Go(func() { _, _ = api.PushToUser(ctx, toAlice([]byte("held"))) })
		stream, err := api.PushStream(ctx)
		if err == nil {
			err = stream.Send(&pubsub.PushStreamRequest{Id: 1, Push: &pubsub.PushStreamRequest_ToUser{ToUser: toAlice([]byte("held, too"))}})
		}
		if err != nil {
			t.Fatal(err)
		}
		open(2)
		begun := time.Now()
		cancel()
		open(0)
		took = append(took, time.Since(begun))
		calls.Wait()
	}
	slices.Sort(took)
	t.Logf("the cancel of a call and of a PushStream had arrived after %v, %v at most", took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
}

func (c *clients) setHold(hold chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hold = hold
}

// drainFailsNoCallThatIsTriedTwice: a call that was refused with the word that nothing was sent is made once more.
func drainFailsNoCallThatIsTriedTwice(t *testing.T, s *secured, clients []pubsub.PushManagerServiceClient, managers []*manager) {
	t.Helper()
	before := len(s.users.of("alice"))
	stop := make(chan struct{})
	var delivered, again atomic.Int64
	var callers sync.WaitGroup
	for _, api := range clients {
		for range 4 {
			callers.Go(func() {
				pace := time.NewTicker(2 * time.Millisecond)
				defer pace.Stop()
				for {
					select {
					case <-stop:
						return
					case <-pace.C:
					}
					r, err := api.PushToUser(within(t, patience), toAlice([]byte("x")))
					if nothingSent(err) != "" {
						again.Add(1)
						r, err = api.PushToUser(within(t, patience), toAlice([]byte("x")))
					}
					if err != nil || !r.GetSuccess() {
						t.Errorf("a call: %v %v", r, err)
						return
					}
					delivered.Add(1)
				}
			})
		}
	}
	reach := func(n int64) {
		t.Helper()
		eventually(t, "calls go on", func() error {
			if got := delivered.Load(); got < n && !t.Failed() {
				return fmt.Errorf("%d of %d", got, n)
			}
			return nil
		})
	}
	reach(200)
	managers[0].signal(syscall.SIGTERM)
	if code := managers[0].exit(patience); code != 0 {
		t.Errorf("exit code %d", code)
	}
	reach(delivered.Load() + 200)
	close(stop)
	callers.Wait()
	if got := int64(len(s.users.of("alice")) - before); got != delivered.Load() {
		t.Errorf("%d messages arrived, and %d are said to be delivered", got, delivered.Load())
	}
	t.Logf("%d delivered, %d of them tried twice", delivered.Load(), again.Load())
}
