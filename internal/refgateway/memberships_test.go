package refgateway

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/refcontroller"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/discovery"
)

// member is a connection without a socket.
type member struct {
	mu   sync.Mutex
	last map[string]string // what it was told last about each room
}

func (m *member) Joined(room string)       { m.note(room, "joined") }
func (m *member) Left(room string)         { m.note(room, "left") }
func (m *member) Refused(room, why string) { m.note(room, why) }

func (m *member) note(room, what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last[room] = what
}

func (m *member) told(room string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last[room]
}

// joined is a member in the room.
func joined(t *testing.T, g *Gateway, user, room string) *member {
	t.Helper()
	m := &member{last: map[string]string{}}
	if err := g.members.Member(user, "", m).Join(room); err != nil {
		t.Fatal(err)
	}
	return m
}

// counted is a counter of the gateway's metrics.
func counted(g *Gateway, name string) uint64 { return g.cfg.Metrics.GetOrCreateCounter(name).Get() }

// startController runs the reference Controller on addr; an empty one takes any.
func startController(t *testing.T, addr string, cfg refcontroller.Config) (*refcontroller.Server, string) {
	t.Helper()
	server, err := refcontroller.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var lis net.Listener
	eventually(t, "controller listens", func() bool {
		lis, err = net.Listen("tcp", addr)
		return err == nil
	})
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(lis) })
	t.Cleanup(func() {
		server.Close()
		wg.Wait()
	})
	return server, lis.Addr().String()
}

func TestWhatTheControllerHasWrongIsRepaired(t *testing.T) {
	store := refcontroller.NewMemory(0)
	_, addr := startController(t, freeport.Addr(t), refcontroller.Config{Store: store})
	g, _ := start(t, &controller{addr: addr}, func(c *Config) { c.Members.SyncInterval = 20 * time.Millisecond })
	connect(t, g, "u", "r")
	users := func() string {
		info, _, err := store.Room(t.Context(), "r")
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, u := range info.GetUsers() {
			ids = append(ids, u.GetUserId()+"@"+u.GetNodeId())
		}
		slices.Sort(ids)
		return fmt.Sprint(ids)
	}
	other := refcontroller.Reporter{Node: "node-2"}
	for _, by := range []refcontroller.Reporter{{Node: "node-1"}, other} {
		if _, err := store.Join(t.Context(), refcontroller.Join{Reporter: by, User: "ghost", Room: "r"}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the ghost has gone", func() bool { return users() == "[ghost@node-2 u@node-1]" })
	if _, err := store.Leave(t.Context(), refcontroller.Leave{Reporter: refcontroller.Reporter{Node: "node-1"}, User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the one that was forgotten is back", func() bool { return users() == "[ghost@node-2 u@node-1]" })
	if _, err := store.DropNode(t.Context(), "node-1"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the node that was given up is back", func() bool { return users() == "[ghost@node-2 u@node-1]" && store.Counts().Memberships == 3 })
}

// A Controller that has forgotten everything answers nothing until it knows
// everything: no look-up ever sees a part.
func TestRestartedControllerNeverAnswersInPart(t *testing.T) {
	t.Parallel() // it waits most of the time
	etcd := etcdtest.Start(t)
	cfg := refcontroller.Config{Client: etcd.Client(), Warmup: time.Minute}
	first, addr := startController(t, freeport.Addr(t), cfg)
	var gateways []*Gateway
	for _, id := range []string{"node-1", "node-2"} {
		g, _ := start(t, &controller{addr: addr}, func(c *Config) { c.NodeID, c.Etcd = id, etcd.Client() })
		gateways = append(gateways, g)
		eventually(t, "ready", func() bool { return len(g.NotReady()) == 0 })
	}
	const each = 1500
	for _, g := range gateways {
		for i := range each {
			joined(t, g, fmt.Sprint(g.cfg.NodeID, "-", i), "r")
		}
		eventually(t, "all are reported", func() bool { return g.members.Stats().Pending == 0 })
	}
	cc, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	client := pubsub.NewControllerServiceClient(cc)
	count := func() (int, error) {
		out, err := client.GetRoomInfo(t.Context(), &pubsub.GetRoomInfoRequest{RoomId: "r"})
		return len(out.GetRoomInfo().GetUsers()), err
	}
	eventually(t, "all are known", func() bool { n, err := count(); return n == 2*each && err == nil })
	joins := counted(gateways[0], `connect_node_reports_total{kind="join",outcome="ok"}`)

	first.Close()
	startController(t, addr, cfg)
	refused := 0
	eventually(t, "all are known again", func() bool {
		n, err := count()
		if err == nil && n != 2*each {
			t.Fatalf("%d of %d members", n, 2*each)
		}
		if err != nil {
			refused++
		}
		return err == nil
	})
	if refused == 0 {
		t.Error("the test has missed the start")
	}
	if n := counted(gateways[0], `connect_node_reports_total{kind="join",outcome="ok"}`) - joins; n > each/10 {
		t.Errorf("%d were reported one by one", n)
	}
	if n := counted(gateways[0], "connect_node_rejoins_total"); n != 1 {
		t.Errorf("%d rejoins", n)
	}
}

// Its workers may all hang in reports that a Controller holds while it warms up. The
// warm-up waits for this node's comparisons, and they do not wait for the workers.
func TestReportsThatAreHeldDoNotProlongTheWarmup(t *testing.T) {
	t.Parallel() // it waits most of the time
	etcd := etcdtest.Start(t)
	cfg := refcontroller.Config{Client: etcd.Client(), Warmup: time.Hour}
	first, addr := startController(t, freeport.Addr(t), cfg)
	g, _ := start(t, &controller{addr: addr}, func(c *Config) {
		c.Etcd, c.Members.Workers, c.Members.Timeout = etcd.Client(), 4, patience
	})
	for i := range 2000 { // In nearly all slots.
		joined(t, g, fmt.Sprint("old-", i), "r")
	}
	eventually(t, "all are reported", func() bool { return len(g.NotReady()) == 0 && g.members.Stats().Pending == 0 })

	// Another node is registered and silent: the warm-up does not end by this one alone.
	other, err := discovery.Register(t.Context(), discovery.RegistrationConfig{Client: etcd.Client(), ID: "node-2", Addr: "10.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	second, _ := startController(t, addr, cfg)
	members := make([]*member, 20)
	for i := range members {
		members[i] = joined(t, g, fmt.Sprint("new-", i), "r")
	}
	eventually(t, "only the other node is awaited", func() bool { return strings.HasPrefix(second.WarmingUp(), "node-2 ") })
	for i, m := range members {
		if got := m.told("r"); got != "" {
			t.Errorf("new-%d is told %q during the warm-up", i, got)
		}
	}
	if err := other.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, m := range members {
		eventually(t, "the client is told", func() bool { return m.told("r") == "joined" })
	}
}

// lateController executes some joins after their callers have given up, as a
// Controller of others may that waits for a lock.
type lateController struct {
	*controller

	mute bool          // SyncNode
	late chan struct{} // closed when joins of the room are executed
}

func (c *lateController) JoinRoom(ctx context.Context, r *pubsub.JoinRoomRequest) (*pubsub.JoinRoomResponse, error) {
	if r.GetRoomId() == "late" {
		<-c.late
	}
	return c.controller.JoinRoom(ctx, r)
}

// SyncNode does not answer, as a proxy may do that does not know it.
func (c *lateController) SyncNode(ctx context.Context, _ *pubsub.SyncNodeRequest) (*pubsub.SyncNodeResponse, error) {
	if !c.mute {
		return nil, status.Error(codes.Unimplemented, "no such method")
	}
	<-ctx.Done()
	return nil, status.FromContextError(ctx.Err()).Err()
}

func startLateController(t *testing.T, mute bool) *lateController {
	t.Helper()
	c := &lateController{controller: &controller{members: map[string]string{}}, mute: mute, late: make(chan struct{})}
	lis, err := net.Listen("tcp", freeport.Addr(t))
	if err != nil {
		t.Fatal(err)
	}
	c.addr = lis.Addr().String()
	gs := grpc.NewServer()
	pubsub.RegisterControllerServiceServer(gs, c)
	var wg sync.WaitGroup
	wg.Go(func() { _ = gs.Serve(lis) })
	t.Cleanup(func() { gs.Stop(); wg.Wait() })
	return c
}

func TestJoinThatIsExecutedLateLeavesNoGhost(t *testing.T) {
	c := startLateController(t, false)
	g, _ := start(t, c.controller, func(c *Config) { c.Members.Timeout = 50 * time.Millisecond })
	eventually(t, "ready", func() bool { return len(g.NotReady()) == 0 })
	m := g.members.Member("u", "", &member{last: map[string]string{}})
	if err := m.Join("late"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "given up", func() bool { return counted(g, `connect_node_reports_total{kind="join",outcome="failed"}`) > 0 })
	m.Close()
	eventually(t, "the leave is executed", func() bool { return slices.Contains(c.calls("u", "late"), "leave") })
	close(c.late)
	eventually(t, "the join is executed", func() bool { return slices.Contains(c.calls("u", "late"), "join") })
	eventually(t, "the ghost has gone", func() bool { return !c.has("u", "late") })
}

func TestControllerThatDoesNotAnswerComparisonsIsToldAllTheSame(t *testing.T) {
	c := startLateController(t, true)
	g, _ := start(t, c.controller, func(c *Config) { c.Members.Timeout = 50 * time.Millisecond })
	eventually(t, "ready", func() bool { return len(g.NotReady()) == 0 })
	connect(t, g, "u", "r")
	if !c.has("u", "r") {
		t.Error("the controller does not know")
	}
}

func TestMembershipsAreReportedAgainWhenTheNodeWasLostInEtcd(t *testing.T) {
	t.Parallel() // It waits for the registration to look at its key.
	etcd := etcdtest.Start(t)
	c := newController(t)
	g, _ := start(t, c, func(cfg *Config) { cfg.Etcd, cfg.PingInterval = etcd.Client(), 200*time.Millisecond })
	eventually(t, "registered", func() bool { return len(g.NotReady()) == 0 })
	connect(t, g, "u", "r")
	// Another process takes the id for a while. The Controller gives the node up.
	rival, err := discovery.Register(t.Context(), discovery.RegistrationConfig{Client: etcd.Client(), ID: "node-1", Addr: "10.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "not registered", func() bool { return !g.node.Registered() })
	time.Sleep(100 * time.Millisecond) // the loop looks eight times in a ping interval
	c.mu.Lock()
	c.members = map[string]string{}
	c.mu.Unlock()
	if err := rival.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "known again", func() bool { return c.has("u", "r") && c.has("u", "@node:node-1") })
}

func TestRegistrationSaysWhichProcessReports(t *testing.T) {
	etcd := etcdtest.Start(t)
	seen := make(chan []discovery.Node, 16)
	w, err := discovery.New(discovery.Config{Client: etcd.Client(), OnChange: func(nodes []discovery.Node) { seen <- nodes }})
	if err != nil {
		t.Fatal(err)
	}
	w.Start()
	t.Cleanup(w.Close)
	g, _ := start(t, newController(t), func(cfg *Config) { cfg.Etcd = etcd.Client() })
	eventually(t, "registered", func() bool {
		nodes := w.Nodes()
		return len(nodes) == 1 && nodes[0].BootID == g.node.BootID()
	})
}
