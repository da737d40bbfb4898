package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/shard"
)

// ants keeps goroutines of its default pool from its initialisation on.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// world is a Push-Manager's engine and links in front of nodes in memory.
type world struct {
	t      testing.TB
	set    *Set
	engine *engine.Engine
	dir    *route.Directory
	shards *shard.Set

	mu    sync.Mutex
	rooms map[string]map[string]string // room -> user -> node
	users map[string]string            // user -> node
	nodes map[string]*fakeNode         // by address
	conns int                          // dialed
}

// newWorld starts an engine; its links have cfg. The end of the test stops it.
func newWorld(t testing.TB, cfg Config) *world {
	t.Helper()
	w := &world{
		t: t, rooms: map[string]map[string]string{}, users: map[string]string{}, nodes: map[string]*fakeNode{},
	}
	var err error
	if w.shards, err = shard.New(shard.Config{Count: max(cfg.Shards, 1)}); err != nil {
		t.Fatal(err)
	}
	w.dir, err = route.New(route.Config{
		Source: w, Shards: w.shards.Len(),
		Shard: func(key string) int { return w.shards.For(key).Index() },
		Go:    func(home int, task func()) error { return w.shards.At(home).Go(task) },
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg.ManagerID = "pm"
	if cfg.Dialer == nil {
		cfg.Dialer = w.dialNode
	}
	if cfg.Go == nil {
		cfg.Go = func(home int, task func()) error { return w.shards.At(home).Go(task) }
	}
	if w.set, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	w.engine, err = engine.New(engine.Config{
		Shards: w.shards, Directory: w.dir, Network: w.set,
		Timeout: max(5*time.Second, cfg.AckTimeout), // see patient
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.stop)
	return w
}

func (w *world) stop() {
	w.set.Close()
	w.dir.Close()
	if err := w.shards.Close(context.Background()); err != nil {
		w.t.Error(err)
	}
	w.mu.Lock()
	nodes := w.nodes
	w.nodes = map[string]*fakeNode{}
	w.mu.Unlock()
	for _, n := range nodes {
		n.kill()
	}
}

func (w *world) dialNode(ctx context.Context, addr string) (net.Conn, error) {
	w.mu.Lock()
	w.conns++
	n := w.nodes[addr]
	w.mu.Unlock()
	if n == nil {
		return nil, errors.New("connection refused")
	}
	return n.lis.DialContext(ctx)
}

// dialed is the number of connections that were tried.
func (w *world) dialed() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.conns
}

func (w *world) Room(_ context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	members, ok := w.rooms[room]
	for user, nodes := range members {
		for node := range strings.SplitSeq(nodes, ",") {
			add([]byte(user), []byte(node))
		}
	}
	return ok, 0, nil
}

func (w *world) Users(_ context.Context, users []string, nodes [][]string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, u := range users {
		if n, ok := w.users[u]; ok {
			nodes[i] = strings.Split(n, ",")
		}
	}
	return nil
}

// room makes the users of a room what is given, all on one node.
func (w *world) room(room, node string, users ...string) {
	w.mu.Lock()
	members := make(map[string]string, len(users))
	for _, u := range users {
		members[u] = node
		w.users[u] = node
	}
	w.rooms[room] = members
	w.mu.Unlock()
	w.dir.Invalidate([]string{room}, users)
}

// ofShard makes up so many users of a shard.
func (w *world) ofShard(shard, count int) (users []string) {
	for i := 0; len(users) < count; i++ {
		if user := fmt.Sprint("u", i); w.shards.For(user).Index() == shard {
			users = append(users, user)
		}
	}
	return users
}

// start runs a node at addr. The nodes that run are then registered.
func (w *world) start(addr string, n *fakeNode) *fakeNode {
	w.t.Helper()
	n.start()
	w.mu.Lock()
	w.nodes[addr] = n
	w.mu.Unlock()
	return n
}

// register tells the links which nodes there are, as id and address in turn.
func (w *world) register(idAddr ...string) {
	w.t.Helper()
	var nodes []Node
	for pair := range slices.Chunk(idAddr, 2) {
		nodes = append(nodes, Node{pair[0], pair[1]})
	}
	if err := w.set.Update(nodes); err != nil {
		w.t.Fatal(err)
	}
}

// up waits until the links are live.
func (w *world) up(links int) {
	w.t.Helper()
	w.until("links are up", func() bool { return w.set.Stats().Live == links })
}

// until waits for what must come true soon.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	w.t.Fatalf("not in time: %s; %+v", what, w.set.Stats())
}

func (w *world) push(p *engine.Push, text string) *engine.Push {
	p.Payload = content(text)
	p.Content = engine.Content{Present: true, DataLen: len(text)}
	return p
}

func (w *world) toUser(user, text string) *engine.Push {
	return w.push(&engine.Push{Request: engine.Request{Kind: engine.ToUser, User: user}}, text)
}

func (w *world) toRoom(room, text string, exclude ...string) *engine.Push {
	return w.push(&engine.Push{Request: engine.Request{Kind: engine.ToRoom, Room: room, Exclude: exclude}}, text)
}

func (w *world) toAll(text string) *engine.Push {
	return w.push(&engine.Push{Request: engine.Request{Kind: engine.ToAll}}, text)
}

// do pushes and waits.
func (w *world) do(p *engine.Push) engine.Result {
	w.t.Helper()
	r, err := w.engine.Do(context.Background(), p)
	if err != nil {
		w.t.Fatalf("push: %v", err)
	}
	w.balanced(r)
	return r
}

func (w *world) balanced(r engine.Result) {
	w.t.Helper()
	if r.Targets != r.Delivered+r.Offline+r.Failed+r.Unknown {
		w.t.Errorf("books do not balance: %+v", r)
	}
}

// pending is a push that was started.
type pending struct {
	p    *engine.Push
	done chan struct{}
	at   time.Time
}

func (p *pending) Complete(*engine.Push) {
	p.at = time.Now()
	close(p.done)
}

// begin pushes without waiting.
func (w *world) begin(p *engine.Push) *pending {
	w.t.Helper()
	f := &pending{p: p, done: make(chan struct{})}
	if err := w.engine.Start(p, f); err != nil {
		w.t.Fatalf("start: %v", err)
	}
	return f
}

// end waits for a push that was started.
func (w *world) end(f *pending) engine.Result {
	w.t.Helper()
	<-f.done
	r, err := f.p.Result()
	if err != nil {
		w.t.Fatalf("push: %v", err)
	}
	w.balanced(r)
	return r
}

func content(text string) []byte {
	b, err := (&pubsub.MessageContent{Data: []byte(text)}).MarshalVT()
	if err != nil {
		panic(err)
	}
	return b
}

type deliverStream = grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse]

// fakeNode is a Connect-Node by script. It keeps the rules of the protocol and
// notes each breach by Push-Manager.
type fakeNode struct {
	pubsub.UnimplementedConnectNodeServiceServer

	id      string
	hello   *pubsub.HelloReply                                                       // nil: a plain one
	deliver func(st deliverStream) error                                             // replaces all of the below
	answer  func(seq uint64, users []string, text string, r *pubsub.DeliverResponse) // nil: all delivered
	message func(r *pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error)  // unary
	batch   func(r *pubsub.PushMessageBatchRequest) (*pubsub.PushMessageBatchResponse, error)
	gate    chan struct{} // hello waits for it, if not nil
	deaf    bool          // answers no heartbeats

	lis *bufconn.Listener
	srv *grpc.Server

	mu      sync.Mutex
	frames  []*pubsub.DeliverRequest
	got     []string // "user text" for each user of each delivery, in order
	broken  []string // breaches of the protocol
	streams int
	calls   int // of Deliver that have not ended
}

func (n *fakeNode) start() {
	n.lis = bufconn.Listen(1 << 20)
	n.srv = grpc.NewServer(grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(17<<20), grpc.StaticStreamWindowSize(1<<16), grpc.StaticConnWindowSize(1<<20),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	pubsub.RegisterConnectNodeServiceServer(n.srv, n)
	go n.srv.Serve(n.lis)
}

func (n *fakeNode) kill() { n.srv.Stop() }

func (n *fakeNode) Deliver(st deliverStream) error {
	n.count(1)
	defer n.count(-1)
	if n.gate != nil {
		select {
		case <-n.gate:
		case <-st.Context().Done():
			return st.Context().Err()
		}
	}
	if n.deliver != nil {
		return n.deliver(st)
	}
	return n.serve(st)
}

// serve keeps the rules.
func (n *fakeNode) serve(st deliverStream) error {
	hello, err := n.greet(st)
	if err != nil {
		return err
	}
	next, rooms, members := uint64(1), map[uint32]*fakeAudience{}, 0
	for {
		f, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		n.mu.Lock()
		n.frames = append(n.frames, f)
		n.mu.Unlock()
		out := &pubsub.DeliverResponse{}
		if len(f.GetDeliveries()) > 0 && f.GetFirstSeq() != next {
			n.breach("first_seq %d, not %d", f.GetFirstSeq(), next)
		}
		for _, d := range f.GetDeliveries() {
			users := n.resolve(d, rooms, &members)
			if members > int(hello.GetMaxAudienceMembers()) {
				n.breach("%d members in audiences", members)
			}
			text := string(d.GetContent().GetData())
			n.record(users, text)
			if n.answer != nil {
				n.answer(next, users, text, out)
			} else {
				out.Acks = append(out.Acks, &pubsub.AckRange{First: next, Delivered: []uint32{uint32(len(users))}})
			}
			next++
		}
		for _, id := range f.GetForgetAudiences() {
			a, ok := rooms[id]
			if !ok {
				n.breach("forgets unknown audience %d", id)
				continue
			}
			members -= len(a.users)
			delete(rooms, id)
		}
		if !n.deaf {
			out.Heartbeat = f.GetHeartbeat()
		}
		if f.GetHeartbeat() != 0 {
			out.OnlineUsers = 3
		}
		if len(out.GetAcks()) > 0 || out.GetHeartbeat() != 0 || out.GetDrain() {
			if err := st.Send(out); err != nil {
				return err
			}
		}
		if f.GetDrain() {
			return nil
		}
	}
}

// greet answers the hello.
func (n *fakeNode) greet(st deliverStream) (*pubsub.HelloReply, error) {
	f, err := st.Recv()
	if err != nil {
		return nil, err
	}
	if f.GetHello().GetProtocolVersion() != 1 || f.GetHello().GetManagerId() != "pm" {
		n.breach("hello %v", f)
	}
	hello := n.hello
	if hello == nil {
		hello = &pubsub.HelloReply{ProtocolVersion: 1, NodeId: n.id, BootId: "b", MaxAudienceMembers: 1000, OnlineUsers: 3}
	}
	n.mu.Lock()
	n.streams++
	n.mu.Unlock()
	return hello, st.Send(&pubsub.DeliverResponse{Hello: hello})
}

type fakeAudience struct {
	version uint32
	room    string
	users   map[string]bool
}

// resolve finds for whom a delivery is, as a strict node would.
func (n *fakeNode) resolve(d *pubsub.Delivery, rooms map[uint32]*fakeAudience, members *int) []string {
	ways := 0
	if len(d.GetUserIds()) > 0 {
		ways++
	}
	if d.GetEverybody() {
		ways++
	}
	if d.GetScope() != "" {
		ways++
		if !hasScopes(n.hello) {
			n.breach("a scope for a node that has not offered it: %v", d)
		}
	}
	ref := d.GetAudience()
	if ref != nil {
		ways++
	}
	if ways != 1 {
		n.breach("%d ways to say for whom: %v", ways, d)
	}
	if d.GetEverybody() || d.GetScope() != "" {
		return []string{d.GetScope() + "*"}
	}
	if ref == nil {
		return d.GetUserIds()
	}
	a := rooms[ref.GetId()]
	if a == nil {
		if ref.GetVersion() != 1 || (ref.GetRoomId() == "") == (len(ref.GetRoomIds()) == 0) {
			n.breach("unknown audience %v", ref)
		}
		a = &fakeAudience{room: ref.GetRoomId(), users: map[string]bool{}}
		rooms[ref.GetId()] = a
	}
	for _, u := range ref.GetJoin() {
		if a.users[u] {
			n.breach("%q joins twice", u)
		}
		a.users[u] = true
		*members++
	}
	for _, u := range ref.GetLeave() {
		if !a.users[u] {
			n.breach("%q leaves and is no member", u)
		}
		delete(a.users, u)
		*members--
	}
	if len(ref.GetJoin())+len(ref.GetLeave()) > 0 {
		a.version++
	}
	if a.version != ref.GetVersion() {
		n.breach("audience %d has version %d, not %d", ref.GetId(), a.version, ref.GetVersion())
	}
	var users []string
	for u := range a.users {
		if !slices.Contains(d.GetExceptUserIds(), u) {
			users = append(users, u)
		}
	}
	for _, u := range d.GetExceptUserIds() {
		if !a.users[u] {
			n.breach("except %q is no member", u)
		}
	}
	slices.Sort(users)
	return users
}

func (n *fakeNode) record(users []string, text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, u := range users {
		n.got = append(n.got, u+" "+text)
	}
}

func (n *fakeNode) breach(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.broken = append(n.broken, fmt.Sprintf(format, args...))
}

// received returns what arrived, and fails the test when a rule was broken.
func (n *fakeNode) received(t *testing.T) []string {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, b := range n.broken {
		t.Errorf("protocol breach: %s", b)
	}
	return slices.Clone(n.got)
}

func (n *fakeNode) count(change int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls += change
}

// open is the number of streams that have not ended.
func (n *fakeNode) open() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.calls
}

// opened is the number of streams that were opened.
func (n *fakeNode) opened() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.streams
}

// all returns every frame.
func (n *fakeNode) all() []*pubsub.DeliverRequest {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.frames)
}

// sent returns the frames with deliveries.
func (n *fakeNode) sent() []*pubsub.DeliverRequest {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(n.frames), func(f *pubsub.DeliverRequest) bool { return len(f.GetDeliveries()) == 0 })
}

// unaryNode is a node without Deliver.
func unaryNode(id string) *fakeNode {
	n := &fakeNode{id: id}
	n.deliver = func(deliverStream) error { return status.Error(codes.Unimplemented, "unknown method Deliver") }
	return n
}

func (n *fakeNode) PushMessage(_ context.Context, r *pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
	n.record([]string{r.GetUserId()}, string(r.GetContent().GetData()))
	if n.message != nil {
		return n.message(r)
	}
	return &pubsub.PushMessageResponse{Success: true}, nil
}

func (n *fakeNode) PushMessageBatch(_ context.Context, r *pubsub.PushMessageBatchRequest) (*pubsub.PushMessageBatchResponse, error) {
	n.record(r.GetUserIds(), string(r.GetContent().GetData()))
	if n.batch != nil {
		return n.batch(r)
	}
	return &pubsub.PushMessageBatchResponse{Success: true, DeliveredCount: int32(len(r.GetUserIds()))}, nil
}

func (n *fakeNode) Broadcast(_ context.Context, r *pubsub.BroadcastRequest) (*pubsub.BroadcastResponse, error) {
	n.record([]string{"*"}, string(r.GetContent().GetData()))
	return &pubsub.BroadcastResponse{Success: true, DeliveredCount: 5}, nil
}
