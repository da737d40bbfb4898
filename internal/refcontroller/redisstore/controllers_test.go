package redisstore

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/redistest"
	"github.com/push-manager/push-manager/internal/refcontroller"
	pubsub "github.com/push-manager/push-manager/proto"
	asker "github.com/push-manager/push-manager/transport/controller"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/node/membership"
)

const childEnv = "REDISSTORE_TEST_CONTROLLER"

// controller is a Controller over Redis and etcd at an address.
func controller(addr, redisURL string, etcd refcontroller.Config) (server *refcontroller.Server, serve func() error, end func(), err error) {
	target, err := Parse(redisURL)
	if err != nil {
		return nil, nil, nil, err
	}
	store := New(Config{Target: target, Logger: etcd.Logger})
	etcd.Store = store
	if server, err = refcontroller.New(etcd); err != nil {
		return nil, nil, nil, err
	}
	lis, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, nil, nil, err
	}
	return server, func() error { return server.Serve(lis) }, func() { server.Close(); _ = store.Close() }, nil
}

// serveChild is a Controller as a process of its own, which can be killed.
func serveChild(args []string) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	client, err := discovery.NewClient(discovery.ClientConfig{Endpoints: []string{args[2]}})
	if err == nil {
		var serve func() error
		if _, serve, _, err = controller(args[0], args[1], refcontroller.Config{Client: client, Warmup: 15 * time.Second, Logger: log}); err == nil {
			err = serve()
		}
	}
	log.Error("ended", "err", err)
	os.Exit(1)
}

func startChild(t *testing.T, addr, redisURL, etcd string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+addr+" "+redisURL+" "+etcd)
	cmd.Stderr = io.Discard
	if testing.Verbose() {
		cmd.Stderr = os.Stderr
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(cmd) })
	return cmd
}

func kill(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// startHere is one in this process.
func startHere(t *testing.T, redisURL string, cfg refcontroller.Config) (addr string, server *refcontroller.Server) {
	t.Helper()
	addr = "127.0.0.1:" + freeport.Take(t, 1)[0]
	server, serve, end, err := controller(addr, redisURL, cfg)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- serve() }()
	t.Cleanup(func() { end(); <-served })
	return addr, server
}

func dial(t *testing.T, addr string) pubsub.ControllerServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return pubsub.NewControllerServiceClient(conn)
}

// manager is what a Push-Manager has of its Controllers.
func manager(t *testing.T, addresses string) *route.Directory {
	t.Helper()
	c, err := asker.New(asker.Config{Address: addresses, Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))})
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
	eventually(t, "the Push-Manager follows", func() bool { return dir.Stats().Watched })
	return dir
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

// online asks as a push would. known is false when no Controller answers, and there is nothing cached.
func online(m *route.Directory, user string) (on, known bool) {
	now := time.Now()
	s := m.Users.Cached(0, user, now)
	if s == nil {
		a := make(answer, 1)
		m.Users.Ask(0, []string{user}, now, a)
		s = <-a
	}
	return s != nil && s.Found, s != nil && s.Stale == nil // what could not be confirmed is said to be so
}

func TestPushAfterJoinedOrLeftIsRoutedByItAtAnyController(t *testing.T) {
	redis := redistest.Start(t)
	first, _ := startHere(t, redis.URL(), refcontroller.Config{})
	second, _ := startHere(t, redis.URL(), refcontroller.Config{})
	reports := []pubsub.ControllerServiceClient{dial(t, first), dial(t, second)}
	managers := []*route.Directory{manager(t, first), manager(t, second), manager(t, first+","+second)}
	look := func(want bool, user, when string) {
		t.Helper()
		for i, m := range managers {
			on, known := online(m, user)
			for end := time.Now().Add(15 * time.Second); !known && time.Now().Before(end); on, known = online(m, user) {
				time.Sleep(10 * time.Millisecond) // a machine without time for it makes a Controller doubt its store, and it says so
			}
			if on != want || !known {
				t.Errorf("%s: Push-Manager %d finds %q: %v, %v", when, i, user, on, known)
			}
		}
	}
	for i := range 60 {
		user := fmt.Sprint("u", i)
		look(false, user, "before") // the absence is cached
		if _, err := reports[i%2].JoinRoom(t.Context(), &pubsub.JoinRoomRequest{UserId: user, RoomId: "r", NodeId: "n"}); err != nil {
			t.Fatal(err)
		}
		look(true, user, "joined")
		if _, err := reports[i/2%2].LeaveRoom(t.Context(), &pubsub.LeaveRoomRequest{UserId: user, RoomId: "r", NodeId: "n"}); err != nil {
			t.Fatal(err)
		}
		look(false, user, "left")
	}
}

// client is a connection that hears what the Controller says.
type client struct{ joined, left chan struct{} }

func (c client) Joined(string) {
	select {
	case c.joined <- struct{}{}:
	default:
	}
}

func (c client) Left(string) {
	select {
	case c.left <- struct{}{}:
	default:
	}
}
func (c client) Refused(string, string) {}

// gateway is a node with users, registered in etcd through a line that can be cut.
type gateway struct {
	reports *membership.Reporter
	line    *etcdtest.Proxy
}

func startGateway(t *testing.T, etcd *etcdtest.Server, id string, controllers []string, users int) *gateway {
	t.Helper()
	list := manual.NewBuilderWithScheme("list")
	var state resolver.State
	for _, addr := range controllers {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: addr})
	}
	list.InitialState(state)
	g := &gateway{line: etcdtest.NewProxy(t, etcd.Endpoint())}
	r, err := discovery.Register(t.Context(), discovery.RegistrationConfig{
		Client: etcdtest.NewClient(t, g.line.Addr()), ID: id, Addr: "10.0.0.1:1", Metadata: map[string]string{"boot_id": "boot of " + id},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = r.Close(ctx)
	})
	if g.reports, err = membership.New(membership.Config{NodeID: id, BootID: "boot of " + id, Controller: "list:///controllers", DialOptions: []grpc.DialOption{grpc.WithResolvers(list)}}); err != nil {
		t.Fatal(err)
	}
	g.reports.Start()
	t.Cleanup(g.reports.Close)
	for i := range users {
		m := g.reports.Member(fmt.Sprintf("%s-u%d", id, i), "", client{})
		if err := m.Join(""); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := m.Join(fmt.Sprint("r", i%10)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return g
}

// count is how many of the gateway's users a Controller finds. The error is the Controller's.
func count(ctx context.Context, c pubsub.ControllerServiceClient, id string, users int) (int, error) {
	in := &pubsub.GetUserNodesRequest{}
	for i := range users {
		in.UserIds = append(in.UserIds, fmt.Sprintf("%s-u%d", id, i))
	}
	out, err := c.GetUserNodes(ctx, in)
	n := 0
	for _, u := range out.GetUsers() {
		if u.GetFound() {
			n++
		}
	}
	return n, err
}

func whole(t *testing.T, c pubsub.ControllerServiceClient, id string, users int) {
	t.Helper()
	eventually(t, "all users are known", func() bool {
		n, err := count(t.Context(), c, id, users)
		return err == nil && n == users
	})
}

// long is the full figure where LONG asks for it.
func long[T any](short, full T) T {
	if os.Getenv("LONG") != "" {
		return full
	}
	return short
}

// One of two Controllers is killed while users come and go and pushes are routed: nobody who is online is
// taken for offline, and what was reported as done is what is found.
func TestKilledControllerLeavesNobodyStale(t *testing.T) {
	users, lookups := 500, long[int64](20_000, 100_000)
	redis, etcd := redistest.Start(t), etcdtest.Start(t)
	ports := freeport.Take(t, 2)
	first, second := "127.0.0.1:"+ports[0], "127.0.0.1:"+ports[1]
	doomed := startChild(t, first, redis.URL(), etcd.Endpoint())
	startChild(t, second, redis.URL(), etcd.Endpoint())
	g := startGateway(t, etcd, "n1", []string{first, second}, users)
	whole(t, dial(t, second), "n1", users)
	m := []*route.Directory{manager(t, first+","+second), manager(t, second+","+first)}

	var done, failed, offline, stale, changes atomic.Int64
	var wg sync.WaitGroup
	var killed sync.Once
	for w := range 4 { // pushes
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for done.Add(1) <= lookups {
				on, known := online(m[w%2], fmt.Sprintf("n1-u%d", rng.IntN(users)))
				switch {
				case !known:
					failed.Add(1)
				case !on:
					offline.Add(1)
				}
				if done.Load() >= lookups/3 {
					killed.Do(func() { kill(doomed) })
				}
			}
		})
	}
	for w := range 2 { // users who come and go
		wg.Go(func() {
			for i := 0; i < 20 || done.Load() < lookups; i++ {
				user := fmt.Sprintf("n1-come%d-%d", w, i)
				for _, m := range m {
					online(m, user) // the absence is cached
				}
				c := client{make(chan struct{}, 1), make(chan struct{}, 1)}
				member := g.reports.Member(user, "", c)
				if err := member.Join(""); err != nil {
					t.Error(err)
					return
				}
				<-c.joined
				for _, m := range m {
					if on, known := online(m, user); known && !on {
						stale.Add(1)
					}
				}
				if err := member.Leave(""); err != nil {
					t.Error(err)
					return
				}
				<-c.left
				for _, m := range m {
					if on, known := online(m, user); known && on {
						stale.Add(1)
					}
				}
				member.Close()
				changes.Add(2)
			}
		})
	}
	wg.Wait()
	t.Logf("%d look-ups, %d without an answer; %d reports", lookups, failed.Load(), changes.Load())
	if offline.Load() > 0 || stale.Load() > 0 {
		t.Errorf("%d users who are online were taken for offline, %d answers were from before a report", offline.Load(), stale.Load())
	}
	if failed.Load() > lookups/10 {
		t.Errorf("%d of %d look-ups were not answered", failed.Load(), lookups)
	}
}

// Redis loses everything: until the nodes have told it again nobody is taken for offline.
func TestRedisThatRestartsEmptyIsWholeAgain(t *testing.T) {
	const users = 2000
	redis, etcd := redistest.Start(t), etcdtest.Start(t)
	cfg := refcontroller.Config{Client: etcd.Client(), Warmup: 15 * time.Second}
	first, _ := startHere(t, redis.URL(), cfg)
	second, server := startHere(t, redis.URL(), cfg)
	startGateway(t, etcd, "n1", []string{first}, users)
	startGateway(t, etcd, "n2", []string{second}, 10)
	asked := []pubsub.ControllerServiceClient{dial(t, first), dial(t, second)}
	for _, c := range asked {
		whole(t, c, "n1", users)
	}
	m := manager(t, first+","+second)
	if on, known := online(m, "n1-u1"); !on || !known {
		t.Fatal("not online", known)
	}

	redis.Kill()
	redis.Up()
	began, unavailable := time.Now(), 0
	again := map[int]bool{}
	for len(again) < len(asked) {
		for i, c := range asked {
			n, err := count(t.Context(), c, "n1", users)
			switch {
			case status.Code(err) == codes.Unavailable:
				unavailable++
			case err != nil:
				t.Fatal(err)
			case n != users:
				t.Fatalf("%d of %d users are online after %v", n, users, time.Since(began))
			case server.WarmingUp() == "":
				again[i] = true
			}
			if on, known := online(m, "n1-u1"); known && !on {
				t.Fatalf("offline after %v", time.Since(began))
			}
		}
		if time.Since(began) > time.Minute {
			t.Fatal("not whole within a minute")
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("whole again after %v; %d look-ups were unavailable", time.Since(began), unavailable)
	if unavailable == 0 {
		t.Error("it was never unavailable: nothing was lost")
	}
}

// A Controller that comes to a store which others have kept is believed at once; one that finds it
// without any waits for the nodes.
func TestControllerBelievesAStoreThatOthersHaveKept(t *testing.T) {
	redis, etcd := redistest.Start(t), etcdtest.Start(t)
	// A node that is registered and never says a word.
	r, err := discovery.Register(t.Context(), discovery.RegistrationConfig{Client: etcd.Client(), ID: "mute", Addr: "10.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(context.Background()) })
	cfg := refcontroller.Config{Client: etcd.Client(), Warmup: time.Hour}
	_, waits := startHere(t, redis.URL(), cfg)
	cfg.Warmup = 10 * time.Millisecond
	eventually(t, "it waits for the node", func() bool { return waits.WarmingUp() == "mute has not reported all users yet" })
	_, keeper := startHere(t, redis.URL(), cfg)
	eventually(t, "one has given up waiting", func() bool { return keeper.WarmingUp() == "" })
	eventually(t, "so the other has no need to", func() bool { return waits.WarmingUp() == "" })
}

// A Controller that starts beside others is no reason for look-ups to fail: it takes calls when it may answer them.
func TestControllerThatStartsBesideAnotherAnswersItsFirstLookUp(t *testing.T) {
	redis, etcd := redistest.Start(t), etcdtest.Start(t)
	r, err := discovery.Register(t.Context(), discovery.RegistrationConfig{Client: etcd.Client(), ID: "mute", Addr: "10.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(context.Background()) })
	_, keeper := startHere(t, redis.URL(), refcontroller.Config{Client: etcd.Client(), Warmup: 10 * time.Millisecond})
	eventually(t, "one has given up waiting", func() bool { return keeper.WarmingUp() == "" })
	for range 3 {
		addr, _ := startHere(t, redis.URL(), refcontroller.Config{Client: etcd.Client(), Warmup: time.Hour})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if _, err := dial(t, addr).GetUserNode(ctx, &pubsub.GetUserNodeRequest{UserId: "u"}, grpc.WaitForReady(true)); err != nil {
			t.Error(err)
		}
		cancel()
	}
}

// A node with many users dies: all of them are offline once its lease is over.
func TestUsersOfAKilledNodeGoWithItsLease(t *testing.T) {
	users := long(2_000, 10_000)
	redis, etcd := redistest.Start(t), etcdtest.Start(t)
	cfg := refcontroller.Config{Client: etcd.Client()}
	first, _ := startHere(t, redis.URL(), cfg)
	second, _ := startHere(t, redis.URL(), cfg)
	c := dial(t, second)
	startGateway(t, etcd, "n2", []string{second}, 10)
	g := startGateway(t, etcd, "n1", []string{first}, users)
	whole(t, c, "n1", users)
	whole(t, c, "n2", 10)

	g.reports.Close()
	g.line.Cut()
	killed := time.Now()
	var unregistered, gone time.Duration
	eventually(t, "all are offline", func() bool {
		time.Sleep(100 * time.Millisecond) // The looking is not to hold up what is looked for.
		if unregistered == 0 {
			got, err := etcd.Client().Get(t.Context(), discovery.ConnectNodePrefix+"n1")
			if err == nil && got.Count == 0 {
				unregistered = time.Since(killed)
			}
		}
		n, err := count(t.Context(), c, "n1", users)
		if err != nil {
			t.Fatal(err)
		}
		gone = time.Since(killed)
		return n == 0
	})
	t.Logf("the lease ended %v after the node, all users were offline %v after it", unregistered, gone)
	if n, err := count(t.Context(), c, "n2", 10); err != nil || n != 10 {
		t.Errorf("%d of the other node's users are online, %v", n, err)
	}
}
