package refgateway

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/discovery"
)

// member is a connection without a socket.
type member struct {
	user  string
	rooms rooms

	mu   sync.Mutex
	last map[string]string // what it was told last about each room
}

func newMember(user string) *member { return &member{user: user, last: map[string]string{}} }

func (m *member) identity() (user, name string) { return m.user, "name of " + m.user }
func (m *member) roomSet() *rooms               { return &m.rooms }
func (m *member) joined(room string)            { m.note(room, "joined") }
func (m *member) left(room string)              { m.note(room, "left") }
func (m *member) refused(room, why string)      { m.note(room, why) }

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

// startReports runs reports without a gateway; stop ends them.
func startReports(t *testing.T, cc *grpc.ClientConn) (r *reports, stop func()) {
	t.Helper()
	cfg := Config{NodeID: "node-1"}.withDefaults()
	g := &Gateway{cfg: cfg, registry: newRegistry()}
	r = newReports(cfg, "boot-1", cc, &g.count)
	g.reports = r
	newCounters(g)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { r.watchLoop(ctx) })
	wg.Go(func() { r.clockLoop(ctx) })
	wg.Go(func() { r.syncLoop(ctx) })
	for range 4 {
		wg.Go(r.workLoop)
	}
	return r, func() {
		r.close()
		cancel()
		_ = cc.Close()
		wg.Wait()
	}
}

// unreliable stands between a node and its Controller: calls take long, are
// executed although nobody waits any more, or are lost on either way.
type unreliable struct {
	pubsub.ControllerServiceClient

	mu   sync.Mutex
	rand *rand.Rand // Guarded by mu.
	calm bool       // Guarded by mu.
	wg   sync.WaitGroup
}

func serve[In, Out any](ctx context.Context, u *unreliable, in In, call func(context.Context, In, ...grpc.CallOption) (Out, error)) (out Out, err error) {
	u.mu.Lock()
	delay, fate := time.Duration(0), 9
	if !u.calm {
		delay, fate = time.Duration(u.rand.IntN(50))*time.Millisecond, u.rand.IntN(10)
		if u.rand.IntN(5) == 0 {
			delay = time.Duration(u.rand.IntN(7000)) * time.Millisecond // beyond the caller's timeout
		}
	}
	u.mu.Unlock()
	done := make(chan struct{})
	u.wg.Go(func() {
		defer close(done)
		time.Sleep(delay)
		if fate > 0 {
			out, err = call(context.WithoutCancel(ctx), in)
		}
	})
	<-done
	if fate <= 1 {
		return out, status.Error(codes.Unavailable, "lost on its way")
	}
	return out, err
}

// front is unreliable as a server. Without sync it is a Controller of others: it
// does not know numbers either.
type front struct {
	pubsub.UnimplementedControllerServiceServer

	*unreliable

	sync bool
}

func (f *front) JoinRoom(ctx context.Context, in *pubsub.JoinRoomRequest) (*pubsub.JoinRoomResponse, error) {
	if !f.sync {
		in.Seq, in.BootId = 0, ""
	}
	return serve(ctx, f.unreliable, in, f.ControllerServiceClient.JoinRoom)
}

func (f *front) LeaveRoom(ctx context.Context, in *pubsub.LeaveRoomRequest) (*pubsub.LeaveRoomResponse, error) {
	if !f.sync {
		in.Seq, in.BootId = 0, ""
	}
	return serve(ctx, f.unreliable, in, f.ControllerServiceClient.LeaveRoom)
}

func (f *front) SyncNode(ctx context.Context, in *pubsub.SyncNodeRequest) (*pubsub.SyncNodeResponse, error) {
	if !f.sync {
		return nil, status.Error(codes.Unimplemented, "no such method")
	}
	return serve(ctx, f.unreliable, in, f.ControllerServiceClient.SyncNode)
}

func (f *front) GetRoomInfo(context.Context, *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
	return nil, status.Error(codes.Unimplemented, "not asked by a node")
}

func (f *front) GetUserNode(context.Context, *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
	return nil, status.Error(codes.Unimplemented, "not asked by a node")
}

func (f *front) GetUserNodes(context.Context, *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error) {
	return nil, status.Error(codes.Unimplemented, "not asked by a node")
}

func (f *front) GetRoomStats(context.Context, *pubsub.GetRoomStatsRequest) (*pubsub.GetRoomStatsResponse, error) {
	return nil, status.Error(codes.Unimplemented, "not asked by a node")
}

func (f *front) WatchRoutes(*pubsub.WatchRoutesRequest, grpc.ServerStreamingServer[pubsub.WatchRoutesResponse]) error {
	return status.Error(codes.Unimplemented, "not asked by a node")
}

// memoryConn serves gs over memory.
func memoryConn(t *testing.T, serve func(net.Listener) error) (cc *grpc.ClientConn, wait func()) {
	t.Helper()
	lis := bufconn.Listen(1 << 16)
	var wg sync.WaitGroup
	wg.Go(func() { _ = serve(lis) })
	cc, err := grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	return cc, wg.Wait
}

// Joins, leaves and ends of connections over a Controller that answers late, not at
// all, and executes what nobody waits for any more. A minute after the last of it
// the Controller has what the node has, and each client was told what is.
func TestControllersPictureBecomesTheTruth(t *testing.T) {
	for _, numbered := range []bool{true, false} {
		for seed := range uint64(6) {
			t.Run(fmt.Sprintf("numbered=%v,seed=%d", numbered, seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { becomesTheTruth(t, numbered, rand.New(rand.NewPCG(seed, 1))) })
			})
		}
	}
}

func becomesTheTruth(t *testing.T, numbered bool, random *rand.Rand) {
	store := refcontroller.NewMemory(0)
	server, err := refcontroller.New(refcontroller.Config{Store: store})
	if err != nil {
		t.Fatal(err)
	}
	behind, behindEnded := memoryConn(t, server.Serve)
	u := &unreliable{ControllerServiceClient: pubsub.NewControllerServiceClient(behind), rand: rand.New(rand.NewPCG(random.Uint64(), 2))}
	gs := grpc.NewServer()
	pubsub.RegisterControllerServiceServer(gs, &front{unreliable: u, sync: numbered})
	cc, frontEnded := memoryConn(t, gs.Serve)
	r, stop := startReports(t, cc)
	defer func() {
		stop()
		gs.Stop()
		frontEnded()
		u.wg.Wait()
		_ = behind.Close()
		server.Close()
		behindEnded()
	}()

	var members []*member
	roomNames := []string{"r1", "r2", "r3"}
	for range 300 {
		time.Sleep(time.Duration(random.IntN(200)) * time.Millisecond)
		switch n := random.IntN(10); {
		case n < 2 || len(members) == 0:
			m := newMember(fmt.Sprint("u", random.IntN(3)))
			members = append(members, m)
			_ = r.join(m, r.presence)
		case n < 6:
			_ = r.join(members[random.IntN(len(members))], roomNames[random.IntN(len(roomNames))])
		case n < 9:
			_ = r.leave(members[random.IntN(len(members))], roomNames[random.IntN(len(roomNames))])
		default:
			i := random.IntN(len(members))
			r.drop(members[i])
			members = slices.Delete(members, i, i+1)
		}
	}
	u.mu.Lock()
	u.calm = true
	u.mu.Unlock()
	time.Sleep(time.Minute)

	want := map[string]bool{}
	for _, m := range members {
		for _, room := range append(roomNames, r.presence) {
			in, told := m.rooms.has(room), m.told(room)
			if in {
				want[m.user+" "+room] = true
			}
			if (told == "joined") != in {
				t.Errorf("%s in %s: %v, was told %q", m.user, room, in, told)
			}
		}
	}
	got := map[string]bool{}
	for _, room := range append(roomNames, r.presence) {
		info, err := store.Room(t.Context(), room)
		if err != nil {
			t.Fatal(err)
		}
		for _, user := range info.GetUsers() {
			got[user.GetUserId()+" "+room] = true
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("the controller has %v\nthe node has %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
	if n := r.pending(); n != 0 {
		t.Errorf("%d reports are pending", n)
	}
	if n := r.memberships(); n != len(want) {
		t.Errorf("%d memberships are kept of %d", n, len(want))
	}
}

// quietReports are reports whose worker is the test.
func quietReports(t *testing.T) *reports {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///nowhere", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	g := &Gateway{cfg: Config{NodeID: "node-1"}.withDefaults(), registry: newRegistry()}
	r := newReports(g.cfg, "boot-1", cc, &g.count)
	g.reports = r
	newCounters(g)
	r.ready = true
	return r
}

// done is a report that the Controller has taken.
func (r *reports) done(m *membership) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m.busy = false
	r.slotOf(m).busy--
	m.told, m.confirmed = len(m.holders) > 0, len(m.holders) > 0
	r.countLocked(m)
	r.settleLocked(m)
}

func TestWhoComesDoesNotWaitForWhoGoes(t *testing.T) {
	r := quietReports(t)
	const users, each = 50, 100
	var goers []*member
	for u := range users {
		m := newMember(fmt.Sprint("goer-", u))
		goers = append(goers, m)
		for i := range each {
			if err := r.join(m, fmt.Sprint("room-", i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range users * each {
		r.done(r.next())
	}
	for _, m := range goers {
		for i := range each {
			if err := r.leave(m, fmt.Sprint("room-", i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 3 {
		if m := r.next(); len(m.holders) > 0 {
			t.Fatal("somebody joined")
		} else {
			r.done(m)
		}
	}
	if err := r.join(newMember("newcomer"), r.presence); err != nil {
		t.Fatal(err)
	}
	if m := r.next(); m.user != "newcomer" {
		t.Errorf("%s goes before the newcomer", m.user)
	} else {
		r.done(m)
	}

	// Those who come do not stop the leaves.
	for i := range each {
		if err := r.join(newMember(fmt.Sprint("more-", i)), r.presence); err != nil {
			t.Fatal(err)
		}
	}
	leaves := 0
	for range each {
		m := r.next()
		if len(m.holders) == 0 {
			leaves++
		}
		r.done(m)
	}
	if leaves < each/(2*leaveShare) || leaves > each/2 {
		t.Errorf("%d of %d were leaves", leaves, each)
	}
}

func TestUsersTakeTurns(t *testing.T) {
	r := quietReports(t)
	greedy := newMember("greedy")
	for i := range 100 {
		if err := r.join(greedy, fmt.Sprint("room-", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.join(newMember("modest"), r.presence); err != nil {
		t.Fatal(err)
	}
	var order []string
	for range 3 {
		m := r.next()
		order = append(order, m.user)
		r.done(m)
	}
	if !slices.Equal(order, []string{"greedy", "modest", "greedy"}) {
		t.Errorf("%v", order)
	}
	left := r.joins.n
	for range left {
		r.done(r.next())
	}
	if r.joins.n != 0 || len(r.joins.users) != 0 || r.joins.ring.Len() != 0 {
		t.Errorf("%d wait, %d users, %d turns", r.joins.n, len(r.joins.users), r.joins.ring.Len())
	}
}

// A client that joins and leaves without end while the Controller is away does not
// fill the lines.
func TestFlappingDoesNotFillTheLines(t *testing.T) {
	r := quietReports(t)
	c := newMember("u")
	for range 1000 {
		if err := r.join(c, "r"); err != nil {
			t.Fatal(err)
		}
		if err := r.leave(c, "r"); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.pending(); n > 2 || len(r.all) != 0 {
		t.Errorf("%d pending, %d memberships", n, len(r.all))
	}
	if err := r.join(c, "r"); err != nil {
		t.Fatal(err)
	}
	m := r.next()
	if m == nil || len(m.holders) != 1 {
		t.Fatal("the join is not reported")
	}
	for range 1000 { // Now a worker has it.
		_ = r.leave(c, "r")
		_ = r.join(c, "r")
	}
	if len(m.leavers) > 1 || len(m.joiners) > 1 {
		t.Errorf("%d and %d answers are owed to one client", len(m.leavers), len(m.joiners))
	}
	r.done(m)
	if n := r.pending(); n > 2 {
		t.Errorf("%d pending", n)
	}
}

// A client that leaves and joins without waiting for the answers is not told in the end
// that it has left.
func TestLastWordAboutARoomIsTrue(t *testing.T) {
	r := quietReports(t)
	c := newMember("u")
	if err := r.join(c, "r"); err != nil {
		t.Fatal(err)
	}
	r.done(r.next())
	if err := r.leave(c, "r"); err != nil {
		t.Fatal(err)
	}
	if err := r.join(c, "r"); err != nil { // The leave is not reported yet.
		t.Fatal(err)
	}
	r.report(r.next())
	if last := c.told("r"); last != "joined" || !c.rooms.has("r") {
		t.Errorf("told %q, in the room %v", last, c.rooms.has("r"))
	}
}

func TestLeavingManyRoomsCostsEachOnce(t *testing.T) {
	r := quietReports(t)
	bytesPerRoom := func(n int) uint64 {
		c := newMember("u")
		r.cfg.MaxRooms = n
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for i := range n {
			_ = r.join(c, fmt.Sprint("room-", i))
		}
		for i := range n {
			_ = r.leave(c, fmt.Sprint("room-", i))
		}
		runtime.ReadMemStats(&after)
		return (after.TotalAlloc - before.TotalAlloc) / uint64(n)
	}
	if few, many := bytesPerRoom(100), bytesPerRoom(5000); many > 3*few {
		t.Errorf("%d bytes a room with 5,000 rooms, %d with 100", many, few)
	}
}

// What is not listed ends: a slot is not sent while it is open whether the
// Controller has executed a join there.
func TestSlotWithACallUnderWayIsNotSent(t *testing.T) {
	r := quietReports(t)
	if err := r.join(newMember("u"), "r"); err != nil {
		t.Fatal(err)
	}
	r.syncing.complete = true
	m := r.next()
	slot := uint32(slots.Of(m.hash))
	r.unsentLocked(slot)
	if sent, err := r.send(t.Context()); sent || err != nil {
		t.Errorf("sent %v, %v", sent, err)
	}
	if _, waits := r.syncing.unsent[slot]; !waits {
		t.Error("the slot is forgotten")
	}
	r.done(m)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := r.send(ctx); err == nil { // There is no Controller.
		t.Error("the slot is not sent when the call has ended")
	}
}

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

// A Controller that warms up holds its answers until the node has said that it was told
// everything, so a call under way must not keep the node from that. Whether the call is
// executed is not known, and what is not listed ends: it is reported again before its
// client is told.
func TestCallUnderWayDoesNotKeepTheNodeFromTellingEverything(t *testing.T) {
	store := refcontroller.NewMemory(0)
	_, addr := startController(t, freeport.Addr(t), refcontroller.Config{Store: store})
	cc, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	r := quietReports(t)
	r.client = pubsub.NewControllerServiceClient(cc)
	for _, user := range []string{"u", "v"} { // Another store was told of both.
		if err := r.join(newMember(user), "r"); err != nil {
			t.Fatal(err)
		}
		r.done(r.next())
	}
	// One that joins just now has the slot in common with u, and its call is executed.
	late := ""
	for i := 0; late == ""; i++ {
		if name := fmt.Sprint("late-", i); slots.Of(slots.Hash(name, "r")) == slots.Of(slots.Hash("u", "r")) {
			late = name
		}
	}
	member := newMember(late)
	if err := r.join(member, "r"); err != nil {
		t.Fatal(err)
	}
	m := r.next()
	m.told = true
	r.seq++
	if refused, err := r.call(m.membershipID, m.name, true, r.seq); refused != "" || err != nil {
		t.Fatal(refused, err)
	}
	more, err := r.sync(t.Context())
	if !more || err != nil || !r.syncing.complete {
		t.Errorf("more %v, %v, complete %v", more, err, r.syncing.complete)
	}
	if n := store.Counts().Memberships; n != 2 {
		t.Errorf("%d memberships, want 2", n)
	}
	if more, err = r.sync(t.Context()); more || err != nil {
		t.Errorf("to say so: more %v, %v", more, err)
	}
	r.done(m)
	if got := member.told("r"); got != "" {
		t.Errorf("told %q, and the Controller has ended it", got)
	}
	if again := r.next(); again != m {
		t.Fatalf("%v is reported, not the one that was under way", again)
	}
	r.report(m)
	if n, got := store.Counts().Memberships, member.told("r"); n != 3 || got != "joined" {
		t.Errorf("%d memberships, told %q", n, got)
	}
}

func TestWhatTheControllerHasWrongIsRepaired(t *testing.T) {
	store := refcontroller.NewMemory(0)
	_, addr := startController(t, freeport.Addr(t), refcontroller.Config{Store: store})
	g, _ := start(t, &controller{addr: addr}, func(c *Config) { c.SyncInterval = 20 * time.Millisecond })
	connect(t, g, "u", "r")
	users := func() string {
		info, err := store.Room(t.Context(), "r")
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
	etcd := etcdtest.Start(t)
	cfg := refcontroller.Config{Client: etcd.Client(), Warmup: time.Minute}
	first, addr := startController(t, freeport.Addr(t), cfg)
	var gateways []*Gateway
	for _, id := range []string{"node-1", "node-2"} {
		g, _ := start(t, &controller{addr: addr}, func(c *Config) { c.NodeID, c.Etcd = id, etcd.Client() })
		gateways = append(gateways, g)
		eventually(t, "ready", func() bool { return g.Ready() == nil })
	}
	const each = 1500
	for _, g := range gateways {
		for i := range each {
			m := newMember(fmt.Sprint(g.cfg.NodeID, "-", i))
			if err := g.reports.join(m, "r"); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "all are reported", func() bool { return g.reports.pending() == 0 })
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
	joins := gateways[0].count.joins.ok.Get()

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
	if n := gateways[0].count.joins.ok.Get() - joins; n > each/10 {
		t.Errorf("%d were reported one by one", n)
	}
	if n := gateways[0].count.rejoins.Get(); n != 1 {
		t.Errorf("%d rejoins", n)
	}
}

// Its workers may all hang in reports that a Controller holds while it warms up. The
// warm-up waits for this node's comparisons, and they do not wait for the workers.
func TestReportsThatAreHeldDoNotProlongTheWarmup(t *testing.T) {
	etcd := etcdtest.Start(t)
	cfg := refcontroller.Config{Client: etcd.Client(), Warmup: time.Hour}
	first, addr := startController(t, freeport.Addr(t), cfg)
	g, _ := start(t, &controller{addr: addr}, func(c *Config) {
		c.Etcd, c.ReportWorkers, c.ControllerTimeout = etcd.Client(), 4, patience
	})
	for i := range 2000 { // In nearly all slots.
		if err := g.reports.join(newMember(fmt.Sprint("old-", i)), "r"); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all are reported", func() bool { return g.Ready() == nil && g.reports.pending() == 0 })

	// Another node is registered and silent: the warm-up does not end by this one alone.
	other, err := discovery.Register(t.Context(), discovery.RegistrationConfig{Client: etcd.Client(), ID: "node-2", Addr: "10.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	second, _ := startController(t, addr, cfg)
	members := make([]*member, 20)
	for i := range members {
		members[i] = newMember(fmt.Sprint("new-", i))
		if err := g.reports.join(members[i], "r"); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "only the other node is awaited", func() bool { return strings.HasPrefix(second.WarmingUp(), "node-2 ") })
	for _, m := range members {
		if got := m.told("r"); got != "" {
			t.Errorf("%s is told %q during the warm-up", m.user, got)
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
	g, _ := start(t, c.controller, func(c *Config) { c.ControllerTimeout = 50 * time.Millisecond })
	eventually(t, "ready", func() bool { return g.Ready() == nil })
	m := newMember("u")
	if err := g.reports.join(m, "late"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "given up", func() bool { return g.count.joins.failed.Get() > 0 })
	g.reports.drop(m)
	eventually(t, "the leave is executed", func() bool { return slices.Contains(c.calls("u", "late"), "leave") })
	close(c.late)
	eventually(t, "the join is executed", func() bool { return slices.Contains(c.calls("u", "late"), "join") })
	eventually(t, "the ghost has gone", func() bool { return !c.has("u", "late") })
}

func TestControllerThatDoesNotAnswerComparisonsIsToldAllTheSame(t *testing.T) {
	c := startLateController(t, true)
	g, _ := start(t, c.controller, func(c *Config) { c.ControllerTimeout = 50 * time.Millisecond })
	eventually(t, "ready", func() bool { return g.Ready() == nil })
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
	eventually(t, "registered", func() bool { return g.Ready() == nil })
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
		return len(nodes) == 1 && nodes[0].BootID == g.reports.boot && nodes[0].BootID == g.node.BootID()
	})
}

// However often somebody comes and goes while the Controller is away, nothing is kept but
// who is still there and waits for the word that it has left, once.
func TestComingAndGoingKeepsNothingWhileTheControllerIsAway(t *testing.T) {
	r := quietReports(t)
	stays := newMember("ann")
	if err := r.join(stays, "lobby"); err != nil {
		t.Fatal(err)
	}
	m := r.next()
	r.done(m)
	for range 1000 {
		comes := newMember("ann")
		for _, c := range []*member{stays, comes} {
			if err := r.join(c, "lobby"); err != nil {
				t.Fatal(err)
			}
			if err := r.leave(c, "lobby"); err != nil {
				t.Fatal(err)
			}
		}
		r.drop(comes)
	}
	if got := len(m.leavers); got != 1 {
		t.Errorf("%d wait for the word that they have left, want 1", got)
	}
	if got := len(stays.rooms.leaving); got != 1 {
		t.Errorf("the connection waits for %d rooms, want 1", got)
	}
	r.mu.Lock()
	m.told = false
	r.settleLocked(m)
	r.mu.Unlock()
	if got := len(stays.rooms.leaving); got != 0 {
		t.Errorf("the connection waits for %d rooms after the answer, want 0", got)
	}
}
