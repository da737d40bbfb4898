package node

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	pubsub "github.com/push-manager/push-manager/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// gateway records what each user got. Users are here unless they are in absent;
// those in full take nothing.
type gateway struct {
	absent, full, explosive map[string]bool

	mu       sync.Mutex
	got      map[string][]*Message
	prepared int
	online   int
	leaving  int // so many go right after a broadcast
}

func newGateway() *gateway {
	return &gateway{absent: map[string]bool{}, full: map[string]bool{}, explosive: map[string]bool{}, got: map[string][]*Message{}, online: 7}
}

func (g *gateway) Deliver(user string, m *Message) Outcome {
	g.mu.Lock()
	defer g.mu.Unlock()
	if m.Prepared == nil {
		m.Prepared = "prepared"
		g.prepared++
	}
	switch {
	case g.explosive[user]:
		panic("boom: " + user)
	case g.absent[user]:
		return NotHere
	case g.full[user]:
		return Failed
	}
	g.got[user] = append(g.got[user], m)
	return Delivered
}

func (g *gateway) Broadcast(m *Message) (delivered, failed int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.explosive["*"] {
		panic("boom: everybody")
	}
	g.got["*"] = append(g.got["*"], m)
	online := g.online
	g.online -= g.leaving
	return online, len(g.full)
}

func (g *gateway) Online() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.online
}

// texts returns the data of what a user got, in order.
func (g *gateway) texts(user string) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	var texts []string
	for _, m := range g.got[user] {
		texts = append(texts, string(m.Data))
	}
	return texts
}

// bench is a node behind an in-memory connection.
type bench struct {
	server *Server
	client pubsub.ConnectNodeServiceClient
	grpc   *grpc.Server
}

func serve(t testing.TB, cfg Config, options ...grpc.ServerOption) *bench {
	t.Helper()
	if cfg.NodeID == "" {
		cfg.NodeID = "node-1"
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if options == nil {
		options = ServerOptions()
	}
	gs := grpc.NewServer(options...)
	s.Attach(gs)
	lis := bufconn.Listen(1 << 20)
	var wg sync.WaitGroup
	wg.Go(func() { _ = gs.Serve(lis) })
	conn, err := grpc.NewClient("passthrough:///node",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		gs.Stop()
		s.Close()
		wg.Wait()
	})
	return &bench{server: s, client: pubsub.NewConnectNodeServiceClient(conn), grpc: gs}
}

// manager is the other end of a stream.
type manager struct {
	t      testing.TB
	stream grpc.BidiStreamingClient[pubsub.DeliverRequest, pubsub.DeliverResponse]
	next   uint64
	reply  *pubsub.HelloReply
}

func (b *bench) open(t testing.TB, hello *pubsub.Hello) (*manager, error) {
	t.Helper()
	return b.openFor(t, hello, 20*time.Second)
}

// openFor opens a stream that ends by itself.
func (b *bench) openFor(t testing.TB, hello *pubsub.Hello, life time.Duration) (*manager, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), life)
	t.Cleanup(cancel)
	stream, err := b.client.Deliver(ctx)
	if err != nil {
		return nil, err
	}
	m := &manager{t: t, stream: stream, next: 1}
	m.send(&pubsub.DeliverRequest{Hello: hello})
	r, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	m.reply = r.GetHello()
	return m, nil
}

func (b *bench) mustOpen(t testing.TB) *manager {
	t.Helper()
	m, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1, ManagerId: "pm", Shards: 1})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *manager) send(r *pubsub.DeliverRequest) {
	m.t.Helper()
	if err := m.stream.Send(r); err != nil && !errors.Is(err, io.EOF) {
		m.t.Fatal(err)
	}
}

// deliver sends one frame.
func (m *manager) deliver(ds ...*pubsub.Delivery) {
	m.t.Helper()
	m.send(&pubsub.DeliverRequest{FirstSeq: m.next, Deliveries: ds})
	m.next += uint64(len(ds))
}

func (m *manager) recv() *pubsub.DeliverResponse {
	m.t.Helper()
	r, err := m.stream.Recv()
	if err != nil {
		m.t.Fatal(err)
	}
	return r
}

// answers collects what each seq up to last was answered with, and the number of
// frames it took.
func (m *manager) answers(last uint64) (counts map[uint64]uint32, misses map[uint64]*pubsub.Miss, frames int) {
	m.t.Helper()
	counts, misses = map[uint64]uint32{}, map[uint64]*pubsub.Miss{}
	for uint64(len(counts)) < last {
		r := m.recv()
		frames++
		inFrame := map[uint64]bool{}
		for _, a := range r.GetAcks() {
			for i, n := range a.GetDelivered() {
				seq := a.GetFirst() + uint64(i)
				if _, twice := counts[seq]; twice {
					m.t.Fatalf("seq %d acked twice", seq)
				}
				counts[seq], inFrame[seq] = n, true
			}
		}
		for _, miss := range r.GetMisses() {
			if !inFrame[miss.GetSeq()] {
				m.t.Fatalf("miss of seq %d stands without its ack", miss.GetSeq())
			}
			misses[miss.GetSeq()] = miss
		}
	}
	return counts, misses, frames
}

// wantEnd reads until the stream ends with the code.
func (m *manager) wantEnd(code codes.Code) error {
	m.t.Helper()
	for {
		if _, err := m.stream.Recv(); err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			if got := status.Code(err); got != code {
				m.t.Fatalf("stream ended with %v (%v), want %v", got, err, code)
			}
			return err
		}
	}
}

func text(s string) *pubsub.MessageContent {
	return &pubsub.MessageContent{Data: []byte(s), Timestamp: 1}
}

func toUsers(s string, users ...string) *pubsub.Delivery {
	return &pubsub.Delivery{Content: text(s), UserIds: users}
}

func toAudience(s string, a *pubsub.Audience, except ...string) *pubsub.Delivery {
	return &pubsub.Delivery{Content: text(s), Audience: a, ExceptUserIds: except}
}

// eventually polls what another goroutine brings about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10s: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// waitAck waits for the ack of one seq.
func (m *manager) waitAck(seq uint64) {
	m.t.Helper()
	for {
		r := m.recv()
		for _, a := range r.GetAcks() {
			if a.GetFirst() <= seq && seq < a.GetFirst()+uint64(len(a.GetDelivered())) {
				return
			}
		}
	}
}

// rawCodec sends bytes as they are.
type rawCodec struct{ codec }

func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if b, ok := v.([]byte); ok {
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	}
	return c.codec.Marshal(v)
}
