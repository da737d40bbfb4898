package link

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestLookingUpALinkDoesNotAllocate(t *testing.T) {
	w := newWorld(t, Config{Shards: 2})
	w.start("a:1", &fakeNode{id: "A"})
	w.register("A", "a:1")
	node := string([]byte("A"))
	if n := testing.AllocsPerRun(100, func() {
		if w.set.Link(1, node) == nil || len(w.set.Links(0)) != 1 {
			t.Fatal("no link")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestDecodingAcksDoesNotAllocate(t *testing.T) {
	b, err := proto.Marshal(&pubsub.DeliverResponse{
		Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 1, 1000, 1}}, {First: 9, Delivered: []uint32{1}}}, Heartbeat: 3, OnlineUsers: 9,
	})
	if err != nil {
		t.Fatal(err)
	}
	var r response
	if n := testing.AllocsPerRun(100, func() {
		if err := r.decode(b, 100); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// echoNode acknowledges as fast as it can, without generated code on its way.
type echoNode struct {
	pubsub.UnimplementedConnectNodeServiceServer
}

func (echoNode) Deliver(st deliverStream) error {
	if _, err := st.Recv(); err != nil {
		return err
	}
	if err := st.Send(&pubsub.DeliverResponse{Hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A", MaxAudienceMembers: 1 << 20}}); err != nil {
		return err
	}
	var ones []uint32
	var f pubsub.DeliverRequest
	for {
		if err := st.RecvMsg(&f); err != nil {
			return err
		}
		ones = ones[:0]
		for _, d := range f.GetDeliveries() {
			n := len(d.GetUserIds())
			if d.GetAudience() != nil {
				n = 100
			}
			ones = append(ones, uint32(n))
		}
		out := &pubsub.DeliverResponse{Heartbeat: f.GetHeartbeat()}
		if len(ones) > 0 {
			out.Acks = []*pubsub.AckRange{{First: f.GetFirstSeq(), Delivered: ones}}
		}
		if err := st.Send(out); err != nil {
			return err
		}
	}
}

// benchDone counts pushes of a benchmark that have ended.
type benchDone struct {
	wg     *sync.WaitGroup
	places chan struct{}
}

func (d *benchDone) Complete(*engine.Push) { <-d.places; d.wg.Done() }

func BenchmarkPush(b *testing.B) {
	for _, kind := range []string{"user", "room"} {
		for _, flight := range []int{1, 1000} {
			b.Run(fmt.Sprintf("kind=%s/flight=%d", kind, flight), func(b *testing.B) { benchmarkPush(b, kind, flight) })
		}
	}
}

func benchmarkPush(b *testing.B, kind string, flight int) {
	b.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := grpc.NewServer(grpc.StaticStreamWindowSize(1<<20), grpc.StaticConnWindowSize(1<<20))
	pubsub.RegisterConnectNodeServiceServer(srv, echoNode{})
	go srv.Serve(lis)
	defer srv.Stop()
	w := newWorld(b, Config{Dialer: func(ctx context.Context, addr string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}})
	if err := w.set.Update([]Node{{"A", lis.Addr().String()}}); err != nil {
		b.Fatal(err)
	}
	for w.set.Reachable() == 0 {
		time.Sleep(time.Millisecond)
	}
	w.room("r", "A", names("u", 100)...)
	var wg sync.WaitGroup
	done := &benchDone{&wg, make(chan struct{}, flight)}
	payload := content(string(make([]byte, 128)))
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		p := &engine.Push{Request: engine.Request{Kind: engine.ToUser, User: "u001", Payload: payload, Content: engine.Content{Present: true}}}
		if kind == "room" {
			p.Kind, p.User, p.Room = engine.ToRoom, "", "r"
		}
		wg.Add(1)
		done.places <- struct{}{}
		if err := w.engine.Start(p, done); err != nil {
			b.Fatal(err)
		}
	}
	wg.Wait()
	b.StopTimer()
	if frames := w.set.meters.frames.Get(); frames > 0 {
		b.ReportMetric(float64(b.N)/float64(frames), "pushes/frame")
	}
}

// BenchmarkAcks is a frame of 128 acks from its bytes to the window.
func BenchmarkAcks(b *testing.B) {
	const acks = 128
	counts := make([]uint32, acks)
	for i := range counts {
		counts[i] = 1
	}
	frame, err := proto.Marshal(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: counts}}})
	if err != nil {
		b.Fatal(err)
	}
	var r response
	win := newWindow(acks)
	b.ReportAllocs()
	for b.Loop() {
		win.low, win.next, win.overdue = 1, 1, 1 // a new stream's, with the memory of the one before
		for range acks {
			win.push(entry{size: 256, deadline: noDeadline})
		}
		if err := r.decode(frame, acks); err != nil {
			b.Fatal(err)
		}
		for _, a := range r.acks {
			if _, ok := win.ack(a.seq); !ok {
				b.Fatalf("seq %d is not owed", a.seq)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/acks, "ns/ack")
}

// keeper is a link that keeps what it is sent, to all nodes.
type keeper struct{ sent chan *engine.Delivery }

func (k *keeper) Link(int, string) engine.Link             { return k }
func (k *keeper) Links(int) []engine.Link                  { return []engine.Link{k} }
func (k *keeper) Node() string                             { return "A" }
func (k *keeper) Scopes() bool                             { return true }
func (*keeper) Describe(*engine.Delivery) engine.LinkState { return engine.LinkState{} }

func (k *keeper) Nudge(_ string, _ uint64, done func(bool)) { done(false) }

func (k *keeper) Send(d *engine.Delivery) engine.Reason {
	k.sent <- d
	return engine.Sent
}

// keptDeliveries are deliveries of 128 bytes as a link gets them.
func keptDeliveries(b *testing.B) map[string]*engine.Delivery {
	b.Helper()
	w, k := newWorld(b, Config{}), &keeper{make(chan *engine.Delivery, 1)}
	w.room("r", "A", names("u", 100)...)
	e, err := engine.New(engine.Config{Shards: w.shards, Directory: w.dir, Network: k})
	if err != nil {
		b.Fatal(err)
	}
	all, data := make(map[string]*engine.Delivery), string(make([]byte, 128))
	named := w.toUser("u001", data)
	named.Options = &engine.Options{MessageID: "0198f0a2-7c1e-7b4a-9d53-2f6f0c9c1a11", Sender: "billing", PayloadHash: 7}
	for name, p := range map[string]*engine.Push{"user": w.toUser("u001", data), "user-with-id": named, "room": w.toRoom("r", data), "all": w.toAll(data)} {
		f := &pending{p: p, done: make(chan struct{})}
		if err := e.Start(p, f); err != nil {
			b.Fatal(err)
		}
		all[name] = <-k.sent
		b.Cleanup(func() {
			all[name].Drop(engine.DropUnreachable)
			<-f.done
		})
	}
	return all
}

// BenchmarkEnqueue is a delivery into a link's queue and out of it.
func BenchmarkEnqueue(b *testing.B) {
	const waiting = 100
	q := queue{load: new(load)}
	b.ReportAllocs()
	for b.Loop() {
		for range waiting {
			q.push(entry{size: 256, deadline: noDeadline})
		}
		for range waiting {
			q.pop()
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/waiting, "ns/delivery")
}

// BenchmarkFrameBuild is a delivery addressed, measured and encoded into a frame of 100.
func BenchmarkFrameBuild(b *testing.B) {
	const deliveries = 100
	for name, d := range keptDeliveries(b) {
		b.Run("push="+name, func(b *testing.B) {
			auds, can := newAudiences(1<<20, newMeters(metrics.NewSet())), featuresOf(lasting)
			var frame []byte
			b.ReportAllocs()
			for b.Loop() {
				frame = frame[:0]
				for range deliveries {
					var more extras
					if o := d.Options(); o != nil {
						more, _ = extrasOf(d, o, can, time.Now())
					}
					to := auds.address(d)
					frame = more.append(appendDelivery(frame, d, &to, sizeDelivery(d, &to)+more.size()))
				}
				frame = auds.endFrame(frame, 16<<20)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/deliveries, "ns/delivery")
		})
	}
}
