package node

import (
	"context"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	pubsub "github.com/push-manager/push-manager/proto"
)

// hanging is a gateway that notes the order of all messages and hangs in those whose text
// is "slow" until it is let go.
type hanging struct {
	*gateway
	entered, let chan struct{}
	once         sync.Once

	mu    sync.Mutex
	order []string
}

// free lets it go, also where a test has failed.
func (g *hanging) free() { g.once.Do(func() { close(g.let) }) }

func newHanging() *hanging {
	return &hanging{gateway: newGateway(), entered: make(chan struct{}, 16), let: make(chan struct{})}
}

func (g *hanging) Deliver(user string, m *Message) Outcome {
	if string(m.Data) == "slow" {
		g.entered <- struct{}{}
		<-g.let
	}
	g.mu.Lock()
	g.order = append(g.order, string(m.Data))
	g.mu.Unlock()
	return g.gateway.Deliver(user, m)
}

func (g *hanging) texts() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return strings.Join(g.order, " ")
}

func hello(instance string, shard uint32, attempt uint64) *pubsub.Hello {
	return &pubsub.Hello{ProtocolVersion: 1, ManagerId: "pm", Shard: shard, Shards: 4, InstanceId: instance, Attempt: attempt}
}

func (b *bench) mustHello(t testing.TB, h *pubsub.Hello) *manager {
	t.Helper()
	m, err := b.open(t, h)
	if err != nil {
		t.Fatalf("hello %v: %v", h, err)
	}
	return m
}

// A manager gives a stream up while the gateway hangs in the middle of a frame, resets its
// connection and opens another one.
func TestReplacedStreamHandsNothingOverAfterTheNewOne(t *testing.T) {
	g := newHanging()
	b := serve(t, Config{Sessions: g, TakeoverTimeout: 50 * time.Millisecond})
	defer g.free()
	old, reset := b.overTCP(t, hello("i", 0, 1))
	old.deliver(toUsers("slow", "x"), toUsers("first", "u"))
	<-g.entered
	reset()
	for attempt := uint64(2); attempt < 4; attempt++ {
		if _, err := b.open(t, hello("i", 0, attempt)); status.Code(err) != codes.Unavailable {
			t.Fatalf("hello while the gateway hangs: %v", err)
		}
	}
	other := b.mustHello(t, hello("i", 1, 4))
	other.deliver(toUsers("other shard", "v"))
	other.waitAck(1)
	g.free()
	var fresh *manager
	eventually(t, "a new stream is taken", func() bool {
		var err error
		fresh, err = b.open(t, hello("i", 0, 5))
		return err == nil
	})
	fresh.deliver(toUsers("second", "u"))
	fresh.waitAck(1)
	eventually(t, "the old stream is gone", func() bool { return b.server.Streams() == 2 })
	if got := g.texts(); got != "other shard slow second" {
		t.Errorf("handed over: %q", got)
	}
	if n := b.server.count.superseded.Get(); n == 0 {
		t.Error("superseded streams are not counted")
	}
}

// overTCP opens a stream over a connection of its own, which reset cuts off as managers do.
func (b *bench) overTCP(t *testing.T, h *pubsub.Hello) (m *manager, reset func()) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = b.grpc.Serve(lis) })
	var raw *net.TCPConn
	conn, err := grpc.NewClient("passthrough:///"+lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			if err == nil {
				raw = c.(*net.TCPConn)
			}
			return c, err
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		_ = lis.Close()
		wg.Wait()
	})
	m = (&bench{client: pubsub.NewConnectNodeServiceClient(conn)}).mustHello(t, h)
	return m, func() {
		_ = raw.SetLinger(0)
		_ = raw.Close()
	}
}

func TestNewStreamWaitsForTheDeliveryInTheOldOnesHands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newHanging()
		b := serve(t, Config{Sessions: g})
		old := b.mustHello(t, hello("i", 0, 1))
		old.deliver(toUsers("before", "u"), toUsers("slow", "u"), toUsers("never", "u"))
		<-g.entered
		time.AfterFunc(300*time.Millisecond, g.free)
		began := time.Now()
		fresh := b.mustHello(t, hello("i", 0, 2))
		if took := time.Since(began); took != 300*time.Millisecond {
			t.Errorf("hello was answered after %v", took)
		}
		fresh.deliver(toUsers("after", "u"))
		fresh.waitAck(1)
		// Where the old stream lives, it is told what was handed over, and then ends.
		counts, _, _ := old.answers(2)
		if len(counts) != 2 || counts[1] != 1 || counts[2] != 1 {
			t.Errorf("acks of the old stream: %v", counts)
		}
		_ = old.wantEnd(codes.Aborted)
		if got := g.texts(); got != "before slow after" {
			t.Errorf("handed over: %q", got)
		}
	})
}

func TestStreamsOfOthersAreNotSuperseded(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway()})
	hellos := []*pubsub.Hello{
		hello("i", 0, 1), hello("i", 1, 2), hello("j", 0, 1), // two processes that both call themselves pm
		hello("", 0, 0), hello("", 0, 0), // old ones: their name alone says too little
		hello("i", 0, 9), // a process that looks for another node here
	}
	hellos[len(hellos)-1].NodeId = "node-2"
	var all []*manager
	for _, h := range hellos {
		all = append(all, b.mustHello(t, h))
	}
	for i, m := range all {
		m.deliver(toUsers("x", "u"))
		m.waitAck(1)
		if t.Failed() {
			t.Fatalf("stream of %v", hellos[i])
		}
	}
	if n := b.server.count.superseded.Get(); n != 0 {
		t.Errorf("%d streams are superseded", n)
	}
}

func TestIdleStreamIsSupersededAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway()
		b := serve(t, Config{Sessions: g})
		old := b.mustHello(t, hello("i", 0, 1))
		began := time.Now()
		fresh := b.mustHello(t, hello("i", 0, 0)) // a manager that does not count
		if took := time.Since(began); took != 0 {
			t.Errorf("hello was answered after %v", took)
		}
		old.deliver(toUsers("old", "u"))
		_ = old.wantEnd(codes.Aborted)
		fresh.deliver(toUsers("new", "u"))
		fresh.waitAck(1)
		if got := g.texts("u"); !slices.Equal(got, []string{"new"}) {
			t.Errorf("handed over: %q", got)
		}
	})
}

// A manager that has given a stream up may never write to it again, nor close it: it is not
// counted for ever.
func TestSupersededStreamEndsThoughNothingComesOnIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serve(t, Config{Sessions: newGateway(), MaxStreams: 2})
		old := b.mustHello(t, hello("i", 0, 1))
		old.deliver(toUsers("x", "u"))
		synctest.Wait()
		for attempt := uint64(2); attempt < 10; attempt++ {
			b.mustHello(t, hello("i", 0, attempt))
			synctest.Wait()
			if n := b.server.Streams(); n != 1 {
				t.Errorf("%d streams after hello %d", n, attempt)
			}
		}
		if counts, _, _ := old.answers(1); counts[1] != 1 {
			t.Errorf("acks of the oldest stream: %v", counts)
		}
		_ = old.wantEnd(codes.Aborted)
	})
}

func TestHelloThatComesLateIsRefused(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway()})
	m := b.mustHello(t, hello("i", 0, 7))
	if _, err := b.open(t, hello("i", 0, 6)); status.Code(err) != codes.Aborted {
		t.Errorf("an older hello: %v", err)
	}
	m.deliver(toUsers("x", "u"))
	m.waitAck(1)
}

func TestOnlyTheNewestHelloWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newHanging()
		b := serve(t, Config{Sessions: g, TakeoverTimeout: time.Hour})
		defer g.free()
		old := b.mustHello(t, hello("i", 0, 1))
		old.deliver(toUsers("slow", "u"))
		<-g.entered
		var refused atomic.Int32
		var waiting sync.WaitGroup
		for attempt := uint64(2); attempt < 10; attempt++ {
			waiting.Go(func() {
				if _, err := b.open(t, hello("i", 0, attempt)); status.Code(err) == codes.Aborted {
					refused.Add(1)
				}
			})
			synctest.Wait()
		}
		if got, streams := refused.Load(), b.server.Streams(); got != 7 || streams != 2 {
			t.Errorf("%d hellos refused, %d streams held", got, streams)
		}
		g.free()
		waiting.Wait()
		if got := refused.Load(); got != 7 {
			t.Errorf("%d hellos refused in the end", got)
		}
	})
}

func TestSeatsEndWithTheirStreams(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway()})
	m := b.mustHello(t, hello("i", 0, 1))
	_, _ = b.open(t, hello("i", 0, 0))
	b.server.mu.Lock()
	seats := len(b.server.seats)
	b.server.mu.Unlock()
	if seats != 1 {
		t.Errorf("%d seats", seats)
	}
	_ = m.stream.CloseSend()
	if _, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1, InstanceId: strings.Repeat("x", 65)}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("instance id of 65 bytes: %v", err)
	}
	b.grpc.Stop()
	b.server.Close()
	if n := len(b.server.seats); n != 0 {
		t.Errorf("%d seats are left", n)
	}
}

// napping is a gateway whose hand-overs take their time.
type napping struct {
	everyone
	nap func() time.Duration

	mu  sync.Mutex
	got []int // numbers of the streams, as their deliveries came
}

func (g *napping) Deliver(_ string, m *Message) Outcome {
	time.Sleep(g.nap())
	n, _ := strconv.Atoi(string(m.Data))
	g.mu.Lock()
	g.got = append(g.got, n)
	g.mu.Unlock()
	return Delivered
}

// Whatever a gateway's hand-overs take and whenever a manager gives up: nothing of an older
// stream comes after something of a newer one.
func TestStreamsOfASeatHandOverOneAfterTheOther(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		seed := rapid.Uint64().Draw(rt, "seed")
		naps := rapid.SliceOfN(rapid.IntRange(0, 900), 1, 20).Draw(rt, "naps")
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			var turn atomic.Int64
			g := &napping{nap: func() time.Duration {
				return time.Duration(naps[int(turn.Add(1))%len(naps)]) * time.Millisecond
			}}
			b := serve(t, Config{Sessions: g})
			opened := 0
			for n := 1; n <= 12; n++ {
				m, err := b.open(t, hello("i", 0, uint64(n)))
				if err != nil {
					continue // the gateway hangs for too long
				}
				opened++
				for range r.IntN(4) {
					var ds []*pubsub.Delivery
					for range 1 + r.IntN(8) {
						ds = append(ds, toUsers(strconv.Itoa(n), "u"))
					}
					m.deliver(ds...)
				}
				time.Sleep(time.Duration(r.IntN(1500)) * time.Millisecond)
			}
			time.Sleep(time.Minute)
			g.mu.Lock()
			defer g.mu.Unlock()
			if !slices.IsSorted(g.got) {
				t.Errorf("%d streams, handed over: %v", opened, g.got)
			}
		})
	})
}
