package link

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/compression"
	connectnode "github.com/push-manager/push-manager/transport/node"
)

// crowd is a gateway on which everybody is connected; it notes who got what, in order.
type crowd struct {
	mu  sync.Mutex
	got map[string][]string
}

func (c *crowd) Deliver(user string, m *connectnode.Message) connectnode.Outcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.got[user] = append(c.got[user], string(m.Data))
	return connectnode.Delivered
}

func (c *crowd) Broadcast(m *connectnode.Message) (delivered, failed int) {
	c.Deliver("*", m)
	return 3, 0
}

func (c *crowd) Online() int { return 3 }

func (c *crowd) texts(user string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.got[user])
}

// startReal runs the node that gateways embed.
func (w *world) startReal(addr string, cfg connectnode.Config, opts ...grpc.ServerOption) *crowd {
	w.t.Helper()
	c := &crowd{got: map[string][]string{}}
	if cfg.Sessions == nil {
		cfg.Sessions = c
	}
	w.serveReal(addr, cfg, opts...)
	return c
}

// serveReal is startReal for a test that has Sessions of its own.
func (w *world) serveReal(addr string, cfg connectnode.Config, opts ...grpc.ServerOption) *connectnode.Server {
	w.t.Helper()
	s, err := connectnode.New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	n := &fakeNode{id: cfg.NodeID, lis: bufconn.Listen(1 << 20), srv: grpc.NewServer(append(connectnode.ServerOptions(), append(opts, grpc.WaitForHandlers(true))...)...)}
	s.Attach(n.srv)
	go n.srv.Serve(n.lis)
	w.mu.Lock()
	w.nodes[addr] = n
	w.mu.Unlock()
	w.t.Cleanup(func() { // before that of the world
		w.set.Close()
		n.kill()
		s.Close()
	})
	return s
}

// patient is for tests that give a busy machine more to do than a second may hold.
func patient(cfg Config) Config {
	cfg.AckTimeout, cfg.QueueAge, cfg.Silence = 30*time.Second, 30*time.Second, time.Minute
	return cfg
}

// chatText is n bytes that compress as text does; noise is n that do not.
func chatText(n int) string {
	return strings.Repeat(`{"type":"message","from":"alice","text":"hello there"},`, n/54+1)[:n]
}

func noise(seed uint64, n int) string {
	r, b := rand.New(rand.NewPCG(seed, 0)), make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

func newTestCompressor(t testing.TB, limit int) *compressor {
	t.Helper()
	cfg := Config{Compression: compression.Names(), CompressionMinBytes: limit}.withDefaults()
	q, err := newCompressor(&cfg, new(bufferPool), newMeters(cfg.Metrics))
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// TestCompressedFramesAreWhatTheGeneratedCodeWrites goes through lengths on both sides of
// those at which a length needs another digit.
func TestCompressedFramesAreWhatTheGeneratedCodeWrites(t *testing.T) {
	q := newTestCompressor(t, 1)
	decoder, err := compression.NewDecoder(16 << 20)
	if err != nil {
		t.Fatal(err)
	}
	digits := map[[2]int]bool{} // of the plain and the compressed length
	check := func(t fataler, frame []byte, codec pubsub.Codec) {
		plain := slices.Clone(frame)
		out := q.frame(&plain, codec)
		ok, data := out != &plain, q.encoder.Append(nil, frame, codec)
		if ok != (len(data) <= len(frame)-len(frame)/8) {
			t.Fatalf("%d bytes of %d: worth it: %v", len(data), len(frame), ok)
		}
		if !ok {
			return
		}
		want, err := proto.Marshal(&pubsub.DeliverRequest{Compressed: data, RawBytes: uint32(len(frame))})
		if err != nil || !bytes.Equal(*out, want) {
			t.Fatalf("%d bytes compressed to %d: not what the generated code writes", len(frame), len(data))
		}
		back, err := decoder.Decode(data, uint32(len(frame)), codec)
		if err != nil || !bytes.Equal(back, frame) {
			t.Fatalf("does not come back: %v", err)
		}
		digits[[2]int{protowire.SizeVarint(uint64(len(frame))), protowire.SizeVarint(uint64(len(data)))}] = true
	}
	text, random := chatText(2_200_000), noise(1, 30_000)
	for _, frame := range []string{
		strings.Repeat("a", 200), text[:200] + random[:200], text[:17_000] + random[:1000],
		text[:170_000] + random[:17_000], text, text + random[:17_000],
	} {
		for _, codec := range q.codecs {
			check(t, []byte(frame), codec)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.SampledFrom([]int{0, 60, 200, 17_000}).Draw(t, "text")
		m := rapid.SampledFrom([]int{60, 127, 128, 16_300, 17_000}).Draw(t, "noise") + rapid.IntRange(-20, 20).Draw(t, "more")
		check(t, []byte(text[:n]+random[:m]), rapid.SampledFrom(q.codecs).Draw(t, "codec"))
	})
	for _, both := range [][2]int{{2, 1}, {2, 2}, {3, 2}, {3, 3}, {4, 3}} {
		if !digits[both] {
			t.Errorf("no frame had lengths of %d and %d digits", both[0], both[1])
		}
	}
}

// fataler is a test or a step of a property.
type fataler interface {
	Fatalf(format string, args ...any)
}

func TestFramesAreCompressedWhereItPays(t *testing.T) {
	for name, tc := range map[string]struct {
		frame string
		codec pubsub.Codec
		want  bool
		tried bool
	}{
		"at the threshold":    {chatText(1000), pubsub.Codec_S2, true, true},
		"below the threshold": {chatText(999), pubsub.Codec_S2, false, false},
		"no codec":            {chatText(5000), pubsub.Codec_NONE, false, false},
		"zstd":                {chatText(5000), pubsub.Codec_ZSTD, true, true},
		"noise":               {noise(2, 5000), pubsub.Codec_S2, false, true},
		"noise, zstd":         {noise(2, 5000), pubsub.Codec_ZSTD, false, true},
		"hardly less":         {chatText(400) + noise(2, 5000), pubsub.Codec_S2, false, true},
		"noise and text":      {chatText(4000) + noise(2, 4000), pubsub.Codec_S2, true, true},
		"heartbeat":           {"\x28\x01", pubsub.Codec_ZSTD, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			q := newTestCompressor(t, 1000)
			in := q.buffers.take()
			*in = append(*in, tc.frame...)
			out := q.frame(in, tc.codec)
			if isCompressed := out != in; isCompressed != tc.want || !isCompressed && string(*out) != tc.frame {
				t.Errorf("compressed: %v, %d bytes", isCompressed, len(*out))
			}
			m := q.meters
			if tc.want {
				if m.compressed.Get() != 1 || m.compressedIn.Get() != uint64(len(tc.frame)) || m.compressedOut.Get() != uint64(len(*out)) {
					t.Errorf("counted %d frames, %d bytes, then %d", m.compressed.Get(), m.compressedIn.Get(), m.compressedOut.Get())
				}
			} else if m.compressed.Get()+m.compressedIn.Get()+m.compressedOut.Get() != 0 {
				t.Error("counted as compressed")
			}
			if got := m.uncompressible.Get() == 1; got != (tc.tried && !tc.want) {
				t.Errorf("counted as uncompressible: %v", got)
			}
		})
	}
}

func TestCompressingDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("pools drop things at random under the race detector")
	}
	q := newTestCompressor(t, 1)
	for _, codec := range q.codecs {
		for name, frame := range map[string]string{"text": chatText(200_000), "noise": noise(3, 20_000)} {
			if n := testing.AllocsPerRun(100, func() {
				in := q.buffers.take()
				*in = append(*in, frame...)
				q.buffers.Put(q.frame(in, codec))
			}); n >= 1 {
				t.Errorf("%v, %s: %v allocations", codec, name, n)
			}
		}
	}
}

func TestCompressionIsValidated(t *testing.T) {
	for name, cfg := range map[string]Config{
		"unknown codec":   {Compression: []string{"gzip"}},
		"codec twice":     {Compression: []string{"s2", "s2"}},
		"off among them":  {Compression: []string{"s2", "off"}},
		"negative size":   {CompressionMinBytes: -1},
		"above the limit": {CompressionMinBytes: 2048, MaxFrameBytes: 1024, FrameBytes: 1024},
	} {
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "Compression") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := (Config{Compression: []string{"off"}}).Validate(); err != nil {
		t.Error(err)
	}
}

// TestCodecsAreNegotiated goes through managers and nodes of both kinds and ages. Whatever
// they agree on, the pushes arrive.
func TestCodecsAreNegotiated(t *testing.T) {
	const none, s2, zstd = pubsub.Codec_NONE, pubsub.Codec_S2, pubsub.Codec_ZSTD
	for _, tc := range []struct {
		offered, accepted string
		want              pubsub.Codec
	}{
		{"", "", none},
		{"off", "", none},
		{"s2", "", s2},
		{"zstd", "", zstd},
		{"s2 zstd", "", s2},
		{"zstd s2", "", zstd},
		{"s2 zstd", "zstd", zstd},
		{"s2", "zstd", none},
		{"s2 zstd", "off", none},
		{"s2 zstd", "old", none},
		{"", "old", none},
	} {
		t.Run(fmt.Sprintf("manager %s, node %s", tc.offered, tc.accepted), func(t *testing.T) {
			w := newWorld(t, Config{Compression: strings.Fields(tc.offered)})
			var texts func() []string
			if tc.accepted == "old" {
				n := w.start("a:1", &fakeNode{id: "A"})
				texts = func() []string { return n.received(t) }
			} else {
				c := w.startReal("a:1", connectnode.Config{NodeID: "A", Compression: strings.Fields(tc.accepted)})
				texts = func() []string { return c.texts("u") }
			}
			w.room("r", "A", "u")
			w.register("A", "a:1")
			w.up(1)
			const large = 10_000
			for _, text := range []string{"small", chatText(large), noise(4, large)} {
				if r := w.do(w.toUser("u", text)); r.Delivered != 1 {
					t.Fatalf("%+v", r)
				}
				if got := texts(); !strings.HasSuffix(got[len(got)-1], text) {
					t.Fatalf("%d bytes arrived of %d", len(got[len(got)-1]), len(text))
				}
			}
			agreed := tc.want != none
			if got := w.set.Stats().Compressing; got != btoi(agreed) {
				t.Errorf("%d links have a codec", got)
			}
			m := w.set.meters
			if m.compressed.Get() != uint64(btoi(agreed)) || m.uncompressible.Get() != uint64(btoi(agreed)) {
				t.Errorf("%d frames compressed, %d were tried in vain", m.compressed.Get(), m.uncompressible.Get())
			}
			// What is counted as written is what was.
			saved := m.compressedIn.Get() - m.compressedOut.Get()
			if agreed && (saved < large*8/10 || m.bytes.Get() > 2*large-saved+500 || m.bytes.Get() < large) {
				t.Errorf("%d bytes written, %d saved", m.bytes.Get(), saved)
			}
		})
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestANodeThatPicksWhatWasNotOfferedIsNotServed: like one that speaks another version.
func TestANodeThatPicksWhatWasNotOfferedIsNotServed(t *testing.T) {
	for _, tc := range []struct {
		offered []string
		picked  pubsub.Codec
	}{
		{nil, pubsub.Codec_S2}, {[]string{"s2"}, pubsub.Codec_ZSTD}, {compression.Names(), 3}, {[]string{"zstd"}, -1}, {nil, 1 << 30},
	} {
		var log syncBuffer
		w := newWorld(t, Config{Compression: tc.offered, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		n := w.start("a:1", &fakeNode{id: "A", hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A", BootId: "b", Codec: tc.picked}})
		w.room("r", "A", "u")
		w.register("A", "a:1")
		w.until("the node is refused", func() bool { return strings.Contains(log.String(), errCodec.Error()) })
		if r := w.do(w.toUser("u", "x")); r.Delivered != 0 || len(n.sent()) != 0 || w.set.Reachable() != 0 {
			t.Errorf("%v of %v: %+v, %d frames", tc.picked, tc.offered, r, len(n.sent()))
		}
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestWhatIsSentCompressedArrives: pushes of all kinds and sizes, many at once, each
// to a node that accepts one of the codecs: all arrive once, as they were and in order.
func TestWhatIsSentCompressedArrives(t *testing.T) {
	w := newWorld(t, patient(Config{Compression: compression.Names(), CompressionMinBytes: 64, FrameBytes: 32 << 10}))
	crowds := map[string]*crowd{}
	for _, codec := range compression.Names() {
		crowds[codec] = w.startReal(codec+":1", connectnode.Config{NodeID: codec, Compression: []string{codec}})
		w.room("room-"+codec, codec, codec+"-u1", codec+"-u2", codec+"-u3")
	}
	w.register("s2", "s2:1", "zstd", "zstd:1")
	w.up(2)
	sizes := []int{0, 10, 100, 3000, 40_000}
	random := noise(5, 1<<20)
	serial := 0
	rapid.Check(t, func(t *rapid.T) {
		// Expected per user: what was begun for it, in this order.
		want := map[string][]string{}
		before := map[string]int{}
		for codec, c := range crowds {
			for _, u := range []string{"*", codec + "-u1", codec + "-u2", codec + "-u3"} {
				before[codec+u] = len(c.texts(u))
			}
		}
		var all []*pending
		for range rapid.IntRange(1, 20).Draw(t, "pushes") {
			serial++
			text := fmt.Sprint(serial, " ") + chatText(rapid.SampledFrom(sizes).Draw(t, "text")) +
				random[serial:][:rapid.SampledFrom(sizes).Draw(t, "noise")]
			codec := rapid.SampledFrom(compression.Names()).Draw(t, "node")
			var p *engine.Push
			switch rapid.IntRange(0, 2).Draw(t, "kind") {
			case 0:
				p = w.toUser(codec+"-u1", text)
				want[codec+codec+"-u1"] = append(want[codec+codec+"-u1"], text)
			case 1:
				p = w.toRoom("room-"+codec, text, codec+"-u1")
				for _, u := range []string{"-u2", "-u3"} {
					want[codec+codec+u] = append(want[codec+codec+u], text)
				}
			default:
				p = w.toAll(text)
				for _, c := range compression.Names() {
					want[c+"*"] = append(want[c+"*"], text)
				}
			}
			all = append(all, w.begin(p))
		}
		for _, p := range all {
			if r := w.end(p); r.Delivered != r.Targets || r.Targets == 0 {
				t.Fatalf("%+v", r)
			}
		}
		for codec, c := range crowds {
			for _, u := range []string{"*", codec + "-u1", codec + "-u2", codec + "-u3"} {
				if got := c.texts(u)[before[codec+u]:]; !slices.Equal(got, want[codec+u]) {
					t.Fatalf("%s got %d pushes, not the %d that were sent, or not in order", u, len(got), len(want[codec+u]))
				}
			}
		}
	})
	m := w.set.meters
	if m.compressed.Get() == 0 || m.uncompressible.Get() == 0 || m.strikes.Get() != 0 || m.reconnects.Get() != 0 {
		t.Errorf("%d frames compressed, %d in vain, %d strikes, %d reconnects", m.compressed.Get(), m.uncompressible.Get(), m.strikes.Get(), m.reconnects.Get())
	}
}

// TestALargeAudienceGoesCompressed: a frame beyond what buffers are kept for.
func TestALargeAudienceGoesCompressed(t *testing.T) {
	w := newWorld(t, patient(Config{Compression: []string{"zstd"}}))
	c := w.startReal("a:1", connectnode.Config{NodeID: "A"})
	members := names("a-member-of-the-room-with-a-long-name-", 40_000)
	w.room("r", "A", members...)
	w.register("A", "a:1")
	w.up(1)
	for _, text := range []string{"one", "two"} {
		if r := w.do(w.toRoom("r", text)); r.Delivered != len(members) {
			t.Fatalf("%+v", r)
		}
	}
	if got := c.texts(members[39_999]); !slices.Equal(got, []string{"one", "two"}) {
		t.Errorf("%q", got)
	}
	m := w.set.meters
	if m.compressed.Get() != 1 || m.compressedIn.Get() < 1<<20 || m.bytes.Get() > m.compressedIn.Get()/4 {
		t.Errorf("%d frames compressed, %d bytes to %d, %d written", m.compressed.Get(), m.compressedIn.Get(), m.compressedOut.Get(), m.bytes.Get())
	}
}

// TestBooksBalanceWhenACompressedStreamBreaks: the node refuses a frame that it cannot
// take, and what was on its way is unknown.
func TestBooksBalanceWhenACompressedStreamBreaks(t *testing.T) {
	w := newWorld(t, Config{Compression: []string{"s2"}})
	// It picks s2 and does not know compressed frames: nothing of them is acked.
	n := &fakeNode{id: "A", hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A", BootId: "b", OnlineUsers: 3, Codec: pubsub.Codec_S2}}
	n.deliver = func(st deliverStream) error {
		if _, err := n.greet(st); err != nil {
			return err
		}
		for {
			f, err := st.Recv()
			if err != nil {
				return err
			}
			if f.GetRawBytes() > 0 {
				return errors.New("what is this")
			}
			if f.GetFirstSeq() > 0 && len(f.GetDeliveries()) > 0 {
				if err := st.Send(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: f.GetFirstSeq(), Delivered: []uint32{1}}}}); err != nil {
					return err
				}
			}
		}
	}
	w.start("a:1", n)
	w.room("r", "A", "u")
	w.register("A", "a:1")
	w.up(1)
	if r := w.do(w.toUser("u", "small")); r.Delivered != 1 {
		t.Errorf("%+v", r)
	}
	var all []*pending
	for range 20 {
		all = append(all, w.begin(w.toUser("u", chatText(5000))))
	}
	unknown := 0
	for _, p := range all {
		unknown += w.end(p).Unknown // end checks the books
	}
	if unknown == 0 {
		t.Error("nothing is unknown")
	}
}
