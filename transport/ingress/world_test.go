package ingress

import (
	"bytes"
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/shard"
)

func TestMain(m *testing.M) {
	// Summaries have one goroutine for each window, for the life of the process. Made
	// here, it is in no test's bubble and no leak.
	for _, window := range []time.Duration{time.Minute, 5 * time.Minute} {
		metrics.NewSet().NewSummaryExt("warm", window, []float64{0.5})
	}
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent())
}

// world is a Server over the real engine, with a Controller and nodes in memory.
type world struct {
	t       testing.TB
	set     *metrics.Set
	engine  *engine.Engine
	server  *Server
	dial    func(context.Context, string) (net.Conn, error)
	conn    *grpc.ClientConn
	client  pubsub.PushManagerServiceClient
	served  chan error
	network *network
	source  *source
}

// newWorld has the nodes n1 and n2; the room "r" with a on n1, b on n2 and c on
// neither; the user d on n1; the room "empty".
func newWorld(t testing.TB, change func(*Config, *engine.Config)) *world {
	t.Helper()
	w := &world{t: t, set: metrics.NewSet(), served: make(chan error, 1)}
	w.source = &source{
		rooms: map[string][]member{"r": {{"a", "n1"}, {"b", "n2"}, {"c", ""}}, "empty": nil},
		users: map[string][]string{"a": {"n1"}, "b": {"n2"}, "d": {"n1"}},
	}
	w.network = &network{nodes: []*node{{id: "n1"}, {id: "n2"}}}
	shards, err := shard.New(shard.Config{Count: 2})
	ok(t, err)
	directory, err := route.New(route.Config{
		Source: w.source, Shards: shards.Len(),
		Shard: func(key string) int { return shards.For(key).Index() },
		Go:    func(home int, task func()) error { return shards.At(home).Go(task) },
		TTL:   time.Hour, // what a test has looked up once stays on the caller's goroutine
	})
	ok(t, err)
	ec := engine.Config{Shards: shards, Directory: directory, Network: w.network}
	cfg := Config{Metrics: w.set}
	if change != nil {
		change(&cfg, &ec)
	}
	w.engine, err = engine.New(ec)
	ok(t, err)
	cfg.Engine = w.engine
	w.server, err = New(cfg)
	ok(t, err)
	listener := bufconn.Listen(1 << 20)
	w.dial = func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }
	go func() { w.served <- w.server.Serve(listener) }()
	w.conn = w.connect()
	w.client = pubsub.NewPushManagerServiceClient(w.conn)
	t.Cleanup(func() {
		_ = w.conn.Close()
		ok(t, w.server.Close())
		if err := <-w.served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("Serve returned %v", err)
		}
		w.network.ackAll()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		ok(t, shards.Close(ctx))
		directory.Close()
	})
	return w
}

func (w *world) connect(opts ...grpc.DialOption) *grpc.ClientConn {
	w.t.Helper()
	conn, err := grpc.NewClient("passthrough:///memory", append(opts,
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(w.dial))...)
	ok(w.t, err)
	return conn
}

// metric is the value of one series, "" when there is none.
func (w *world) metric(series string) string {
	w.t.Helper()
	var b strings.Builder
	w.set.WritePrometheus(&b)
	for line := range strings.Lines(b.String()) {
		if v, is := strings.CutPrefix(line, series+" "); is {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

type member struct{ user, node string }

// source is a Controller.
type source struct {
	rooms map[string][]member
	users map[string][]string

	mu      sync.Mutex
	lookups int
	down    bool
	wait    chan struct{} // look-ups wait for it, if not nil
}

func (s *source) ask(ctx context.Context) error {
	s.mu.Lock()
	s.lookups++
	down, wait := s.down, s.wait
	s.mu.Unlock()
	if wait != nil {
		select {
		case <-wait:
		case <-ctx.Done():
			return errors.Join(route.ErrUnavailable, ctx.Err())
		}
	}
	if down {
		return route.ErrUnavailable
	}
	return nil
}

func (s *source) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lookups
}

func (s *source) Room(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	if err := s.ask(ctx); err != nil {
		return false, 0, err
	}
	members, found := s.rooms[room]
	for _, m := range members {
		add([]byte(m.user), []byte(m.node))
	}
	return found, 0, nil
}

func (s *source) Users(ctx context.Context, users []string, nodes [][]string) error {
	if err := s.ask(ctx); err != nil {
		return err
	}
	for i, u := range users {
		nodes[i] = s.users[u]
	}
	return nil
}

// network is the links to its nodes, the same for all shards.
type network struct {
	nodes []*node
	panic bool
}

func (n *network) Link(_ int, id string) engine.Link {
	if n.panic {
		panic("no network at all")
	}
	for _, node := range n.nodes {
		if node.id == id {
			return node
		}
	}
	return nil
}

func (n *network) Links(int) []engine.Link {
	links := make([]engine.Link, len(n.nodes))
	for i, node := range n.nodes {
		links[i] = node
	}
	return links
}

// discard makes all nodes forget payloads.
func (n *network) discard() {
	for _, node := range n.nodes {
		node.forget = true
	}
}

// ackAll makes all nodes answer what they keep, and keep nothing from then on.
func (n *network) ackAll() {
	for _, node := range n.nodes {
		node.setKeep(false)
		for _, d := range node.take() {
			ack(d)
		}
	}
}

// node is a link that acks at once, unless it refuses, keeps or loses.
type node struct {
	id string

	mu      sync.Mutex
	refuse  engine.Reason
	keep    bool
	lose    bool // the stream breaks behind each delivery
	forget  bool // payloads are not kept
	kept    []*engine.Delivery
	payload [][]byte
}

func (n *node) Node() string                             { return n.id }
func (n *node) Scopes() bool                             { return true }
func (*node) Describe(*engine.Delivery) engine.LinkState { return engine.LinkState{} }

func (n *node) Nudge(_ string, _ uint64, done func(bool)) { done(false) }

func (n *node) Send(d *engine.Delivery) engine.Reason {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.refuse != engine.Sent {
		return n.refuse
	}
	if !n.forget {
		n.payload = append(n.payload, bytes.Clone(d.Payload())) // a push that is answered is used again
	}
	if n.keep {
		n.kept = append(n.kept, d)
		return engine.Sent
	}
	lose := n.lose
	n.mu.Unlock()
	defer n.mu.Lock()
	if lose && d.TrySend() {
		d.Lose(engine.LostStream)
		return engine.Sent
	}
	ack(d)
	return engine.Sent
}

// ack answers for connections that have no attributes.
func ack(d *engine.Delivery) {
	if d.TrySend() {
		n := d.Targets()
		if d.Everybody() {
			n = 3
		}
		if o := d.Options(); o != nil && slices.ContainsFunc(o.Filter, func(m engine.Match) bool { return !m.Not }) {
			_, _ = d.Ack(engine.Ack{Filtered: n})
			return
		}
		_, _ = d.Ack(engine.Ack{Delivered: n})
	}
}

func (n *node) setKeep(keep bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.keep = keep
}

// len is how many deliveries are kept.
func (n *node) len() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.kept)
}

// take returns what is kept, and keeps it no longer.
func (n *node) take() []*engine.Delivery {
	n.mu.Lock()
	defer n.mu.Unlock()
	kept := n.kept
	n.kept = nil
	return kept
}

func (n *node) payloads() [][]byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.payload)
}

// rawCodec is a client that sends and gets bytes.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// raw calls a method with the bytes of a request.
func (w *world) raw(method string, request []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var reply []byte
	err := w.conn.Invoke(ctx, method, &request, &reply, grpc.ForceCodecV2(rawCodec{}))
	return reply, err
}

func (w *world) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	w.t.Cleanup(cancel)
	return ctx
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantError checks the code, the reason in ErrorInfo ("" for none at all) and the
// field in BadRequest ("" for none).
func wantError(t testing.TB, err error, code codes.Code, reason, field string) {
	t.Helper()
	wantStatus(t, status.Convert(err), code, reason, field)
}

func wantStatus(t testing.TB, st *status.Status, code codes.Code, reason, field string) {
	t.Helper()
	if st.Code() != code {
		t.Fatalf("status = %v, want code %v", st, code)
	}
	var gotReason, gotField string
	retry := false
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			gotReason = d.Reason
			if d.Domain != "push-manager" {
				t.Errorf("domain = %q", d.Domain)
			}
		case *errdetails.BadRequest:
			gotField = d.FieldViolations[0].Field
		case *errdetails.RetryInfo:
			retry = d.RetryDelay.AsDuration() > 0
		}
	}
	if gotReason != reason || gotField != field {
		t.Errorf("reason %q, field %q, want %q and %q (%v)", gotReason, gotField, reason, field, st)
	}
	later := code == codes.Unavailable || code == codes.ResourceExhausted && reason != "REQUEST_TOO_LARGE"
	if want := reason != "" && later; retry != want {
		t.Errorf("RetryInfo = %v, want %v (%v)", retry, want, st)
	}
}
