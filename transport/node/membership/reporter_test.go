package membership

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
)

// member is a connection without a socket.
type member struct {
	*Member

	mu   sync.Mutex
	last map[string]string // what it was told last about each room
}

func newMember(r *Reporter, user string) *member {
	m := &member{last: map[string]string{}}
	m.Member = r.Member(user, "name of "+user, m)
	return m
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

// startReports runs a Reporter over a connection of its own; stop ends it.
func startReports(cc *grpc.ClientConn) (r *Reporter, stop func()) {
	r = newReporter(Config{NodeID: "node-1", BootID: "boot-1", Workers: 4}, cc)
	r.Start()
	return r, r.Close
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
	r, stop := startReports(cc)
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
			m := newMember(r, fmt.Sprint("u", random.IntN(3)))
			members = append(members, m)
			_ = m.Join("")
		case n < 6:
			_ = members[random.IntN(len(members))].Join(roomNames[random.IntN(len(roomNames))])
		case n < 9:
			_ = members[random.IntN(len(members))].Leave(roomNames[random.IntN(len(roomNames))])
		default:
			i := random.IntN(len(members))
			members[i].Close()
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
			in, told := m.holds(room), m.told(m.shown(room))
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
		info, _, err := store.Room(t.Context(), room)
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
	if n := r.Stats().Pending; n != 0 {
		t.Errorf("%d reports are pending", n)
	}
	if n := r.Stats().Memberships; n != len(want) {
		t.Errorf("%d memberships are kept of %d", n, len(want))
	}
}

// quietReports are reports whose worker is the test.
func quietReports(t *testing.T) *Reporter {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///nowhere", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	r := newReporter(Config{NodeID: "node-1", BootID: "boot-1"}, cc)
	r.ready = true
	return r
}

// done is a report that the Controller has taken.
func (r *Reporter) done(m *membership) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m.busy = false
	r.slotOf(m).busy--
	m.told, m.confirmed = len(m.holders) > 0, len(m.holders) > 0
	r.countLocked(m)
	r.newsLocked(m)
	r.settleLocked(m)
}

func TestWhoComesDoesNotWaitForWhoGoes(t *testing.T) {
	r := quietReports(t)
	const users, each = 50, 100
	var goers []*member
	for u := range users {
		m := newMember(r, fmt.Sprint("goer-", u))
		goers = append(goers, m)
		for i := range each {
			if err := m.Join(fmt.Sprint("room-", i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range users * each {
		r.done(r.next())
	}
	for _, m := range goers {
		for i := range each {
			if err := m.Leave(fmt.Sprint("room-", i)); err != nil {
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
	if err := newMember(r, "newcomer").Join(""); err != nil {
		t.Fatal(err)
	}
	if m := r.next(); m.user != "newcomer" {
		t.Errorf("%s goes before the newcomer", m.user)
	} else {
		r.done(m)
	}

	// Those who come do not stop the leaves.
	for i := range each {
		if err := newMember(r, fmt.Sprint("more-", i)).Join(""); err != nil {
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
	greedy := newMember(r, "greedy")
	for i := range 100 {
		if err := greedy.Join(fmt.Sprint("room-", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := newMember(r, "modest").Join(""); err != nil {
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
	c := newMember(r, "u")
	for range 1000 {
		if err := c.Join("r"); err != nil {
			t.Fatal(err)
		}
		if err := c.Leave("r"); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.Stats().Pending; n > 2 || len(r.all) != 0 {
		t.Errorf("%d pending, %d memberships", n, len(r.all))
	}
	if err := c.Join("r"); err != nil {
		t.Fatal(err)
	}
	m := r.next()
	if m == nil || len(m.holders) != 1 {
		t.Fatal("the join is not reported")
	}
	for range 1000 { // Now a worker has it.
		_ = c.Leave("r")
		_ = c.Join("r")
	}
	if len(m.leavers) > 1 || len(m.joiners) > 1 {
		t.Errorf("%d and %d answers are owed to one client", len(m.leavers), len(m.joiners))
	}
	r.done(m)
	if n := r.Stats().Pending; n > 2 {
		t.Errorf("%d pending", n)
	}
}

// A client that leaves and joins without waiting for the answers is not told in the end
// that it has left.
func TestLastWordAboutARoomIsTrue(t *testing.T) {
	r := quietReports(t)
	c := newMember(r, "u")
	if err := c.Join("r"); err != nil {
		t.Fatal(err)
	}
	r.done(r.next())
	if err := c.Leave("r"); err != nil {
		t.Fatal(err)
	}
	if err := c.Join("r"); err != nil { // The leave is not reported yet.
		t.Fatal(err)
	}
	r.report(r.next())
	if last := c.told("r"); last != "joined" || !c.In("r") {
		t.Errorf("told %q, in the room %v", last, c.In("r"))
	}
}

// teller does something when it is told that it has joined.
type teller struct {
	*member

	then func()
}

func (c *teller) Joined(room string) {
	c.member.Joined(room)
	c.then()
}

// While a client is told, the others come and go: what they are told last is what is.
func TestLastWordIsTrueThoughSomebodyIsSlowToHear(t *testing.T) {
	r := quietReports(t)
	r.client = new(faithful)
	slow, quick := &teller{member: newMember(r, "u")}, newMember(r, "u")
	slow.Member = r.Member("u", "U", slow)
	slow.then = func() {
		slow.then = func() {}
		if err := errors.Join(slow.Leave("r"), quick.Leave("r"), slow.Join("r"), slow.Leave("r")); err != nil {
			t.Error(err)
		}
		if r.Stats().Pending > 0 { // another worker
			r.report(r.next())
		}
	}
	if err := errors.Join(slow.Join("r"), quick.Join("r")); err != nil {
		t.Fatal(err)
	}
	for r.Stats().Pending > 0 {
		r.report(r.next())
	}
	for name, c := range map[string]*member{"slow": slow.member, "quick": quick} {
		if got := c.told("r"); got != "left" {
			t.Errorf("the %s one was told %q last, and has left", name, got)
		}
	}
	if n := r.Stats().Memberships; n != 0 {
		t.Errorf("%d memberships are kept", n)
	}
}

// faithful is a Controller that takes everything.
type faithful struct{ pubsub.ControllerServiceClient }

func (*faithful) JoinRoom(context.Context, *pubsub.JoinRoomRequest, ...grpc.CallOption) (*pubsub.JoinRoomResponse, error) {
	return &pubsub.JoinRoomResponse{Success: true}, nil
}

func (*faithful) LeaveRoom(context.Context, *pubsub.LeaveRoomRequest, ...grpc.CallOption) (*pubsub.LeaveRoomResponse, error) {
	return &pubsub.LeaveRoomResponse{Success: true}, nil
}

func TestLeavingManyRoomsCostsEachOnce(t *testing.T) {
	r := quietReports(t)
	bytesPerRoom := func(n int) uint64 {
		c := newMember(r, "u")
		r.cfg.MaxRooms = n
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for i := range n {
			_ = c.Join(fmt.Sprint("room-", i))
		}
		for i := range n {
			_ = c.Leave(fmt.Sprint("room-", i))
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
	if err := newMember(r, "u").Join("r"); err != nil {
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

// A Controller that warms up holds its answers until the node has said that it was told
// everything, so a call under way must not keep the node from that. Whether the call is
// executed is not known, and what is not listed ends: it is reported again before its
// client is told.
func TestCallUnderWayDoesNotKeepTheNodeFromTellingEverything(t *testing.T) {
	store := refcontroller.NewMemory(0)
	server, err := refcontroller.New(refcontroller.Config{Store: store})
	if err != nil {
		t.Fatal(err)
	}
	cc, ended := memoryConn(t, server.Serve)
	t.Cleanup(func() {
		_ = cc.Close()
		server.Close()
		ended()
	})
	r := quietReports(t)
	r.client = pubsub.NewControllerServiceClient(cc)
	for _, user := range []string{"u", "v"} { // Another store was told of both.
		if err := newMember(r, user).Join("r"); err != nil {
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
	member := newMember(r, late)
	if err := member.Join("r"); err != nil {
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

// However often somebody comes and goes while the Controller is away, nothing is kept but
// who is still there and waits for the word that it has left, once.
func TestComingAndGoingKeepsNothingWhileTheControllerIsAway(t *testing.T) {
	r := quietReports(t)
	stays := newMember(r, "ann")
	if err := stays.Join("lobby"); err != nil {
		t.Fatal(err)
	}
	m := r.next()
	r.done(m)
	for range 1000 {
		comes := newMember(r, "ann")
		for _, c := range []*member{stays, comes} {
			if err := c.Join("lobby"); err != nil {
				t.Fatal(err)
			}
			if err := c.Leave("lobby"); err != nil {
				t.Fatal(err)
			}
		}
		comes.Close()
	}
	if got := len(m.leavers); got != 1 {
		t.Errorf("%d wait for the word that they have left, want 1", got)
	}
	if got := len(stays.leaving); got != 1 {
		t.Errorf("the connection waits for %d rooms, want 1", got)
	}
	r.mu.Lock()
	m.told = false
	r.newsLocked(m)
	r.mu.Unlock()
	if got := len(stays.leaving); got != 0 {
		t.Errorf("the connection waits for %d rooms after the answer, want 0", got)
	}
}

// faulty is a Controller, or what stands before it, and a client.
type faulty struct {
	pubsub.ControllerServiceClient

	sound bool
}

func (f *faulty) JoinRoom(context.Context, *pubsub.JoinRoomRequest, ...grpc.CallOption) (*pubsub.JoinRoomResponse, error) {
	if !f.sound {
		panic("call")
	}
	return &pubsub.JoinRoomResponse{Success: true}, nil
}

func (*faulty) Joined(string)          { panic("client") }
func (*faulty) Left(string)            { panic("client") }
func (*faulty) Refused(string, string) { panic("client") }

// A call that panics has failed, and a client that does takes the word from nobody else.
func TestPanicLeavesNobodyOut(t *testing.T) {
	r := quietReports(t)
	f := new(faulty)
	r.client = f
	bad, good := r.Member("ann", "Ann", f), newMember(r, "ann")
	if err := errors.Join(bad.Join("lobby"), good.Join("lobby")); err != nil {
		t.Fatal(err)
	}
	m := r.next()
	r.report(m)
	if m.busy || r.slotOf(m).busy != 0 || !m.inRetry || good.told("lobby") != "" {
		t.Fatalf("after a call that has panicked: busy %v, to be repeated %v, told %q", m.busy, m.inRetry, good.told("lobby"))
	}
	f.sound = true
	r.tick(time.Now().Add(time.Minute))
	r.report(r.next())
	if got := good.told("lobby"); got != "joined" {
		t.Errorf("told %q behind a client that has panicked", got)
	}
	if n := r.count.panics.Get(); n != 2 {
		t.Errorf("%d panics were counted, want 2", n)
	}
}

func TestClosedReporterDoesNotStart(t *testing.T) {
	r := quietReports(t)
	r.Close()
	r.Start() // no goroutine is left, see TestMain
}

// Two tenants may use the same ids: the Controller has them apart, and each client hears of its own.
func TestTenantsMembersAreToldOfTheirOwnNames(t *testing.T) {
	r := quietReports(t)
	join := func(tenant, user string) *member {
		m := &member{last: map[string]string{}}
		m.Member = r.TenantMember(tenant, user, "", m)
		for _, room := range []string{"", "lobby"} {
			if err := m.Join(room); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.Join(Reserved + "node-2"); !errors.Is(err, ErrReserved) {
			t.Errorf("a room of nodes: %v", err)
		}
		return m
	}
	shop, bank, none := join("shop", "alice"), join("bank", "alice"), join("", "alice")
	var got []string
	for id, m := range r.all {
		got = append(got, id.user+" "+id.room)
		if m.told {
			continue
		}
		r.mu.Lock()
		news := func() []func() { m.told, m.confirmed = true, true; return r.newsLocked(m) }()
		r.mu.Unlock()
		for _, tell := range news {
			tell()
		}
	}
	slices.Sort(got)
	want := []string{"alice @node:node-1", "alice lobby", "bank/alice @node:node-1", "bank/alice bank/lobby", "shop/alice @node:node-1", "shop/alice shop/lobby"}
	if !slices.Equal(got, want) {
		t.Errorf("the Controller is to know %q, want %q", got, want)
	}
	for m, own := range map[*member]string{shop: "shop/lobby", bank: "bank/lobby", none: "lobby"} {
		if m.told("lobby") != "joined" || m.told("") != "joined" || len(m.last) != 2 {
			t.Errorf("a client was told %v", m.last)
		}
		for _, room := range []string{"shop/lobby", "bank/lobby", "lobby", r.presence} {
			if m.In(room) != (room == own) {
				t.Errorf("who is in %q: %v for %q", own, m.In(room), room)
			}
		}
		if err := m.Leave("lobby"); err != nil || m.In(own) {
			t.Errorf("leaving: %v", err)
		}
	}
}
