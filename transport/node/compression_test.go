package node

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/VictoriaMetrics/metrics"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/compression"
)

func allCodecs() []pubsub.Codec { return []pubsub.Codec{pubsub.Codec_S2, pubsub.Codec_ZSTD} }

// pack is a frame that holds r compressed.
func pack(t testing.TB, r *pubsub.DeliverRequest, codec pubsub.Codec) *pubsub.DeliverRequest {
	t.Helper()
	b, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	e, err := compression.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	return &pubsub.DeliverRequest{Compressed: e.Append(nil, b, codec), RawBytes: uint32(len(b))}
}

func TestCodecIsTheBestThatBothHave(t *testing.T) {
	const none, s2, zstd = pubsub.Codec_NONE, pubsub.Codec_S2, pubsub.Codec_ZSTD
	for _, tc := range []struct {
		accepted string
		offered  []pubsub.Codec
		want     pubsub.Codec
	}{
		{"", nil, none}, // A manager that knows nothing of it, or does not want it.
		{"", []pubsub.Codec{s2}, s2},
		{"", []pubsub.Codec{zstd, s2}, zstd},
		{"", []pubsub.Codec{s2, zstd}, s2},
		{"", []pubsub.Codec{9, zstd}, zstd}, // One of a later version.
		{"", []pubsub.Codec{9}, none},
		{"", []pubsub.Codec{none, zstd}, zstd},
		{"zstd", []pubsub.Codec{s2, zstd}, zstd},
		{"zstd", []pubsub.Codec{s2}, none},
		{"off", []pubsub.Codec{s2, zstd}, none},
		{"off", nil, none},
	} {
		b := serve(t, Config{Sessions: newGateway(), Compression: strings.Fields(tc.accepted)})
		m, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1, Codecs: tc.offered})
		if err != nil || m.reply.GetCodec() != tc.want {
			t.Errorf("%q of %v: %v, %v, want %v", tc.accepted, tc.offered, m.reply.GetCodec(), err, tc.want)
		}
	}
}

func TestCompressionIsValidated(t *testing.T) {
	for _, names := range [][]string{{"gzip"}, {"s2", "off"}, {"s2", "s2"}} {
		if err := (Config{NodeID: "n", Sessions: newGateway(), Compression: names}).Validate(); err == nil || !strings.Contains(err.Error(), "Compression: ") {
			t.Errorf("%v: %v", names, err)
		}
	}
}

// TestCompressedFramesAreFrames: plain and compressed ones in turn are one stream, with
// everything that a frame may have.
func TestCompressedFramesAreFrames(t *testing.T) {
	for _, codec := range allCodecs() {
		g, set := newGateway(), metrics.NewSet()
		b := serve(t, Config{Sessions: g, Metrics: set})
		m, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1, Codecs: []pubsub.Codec{codec}})
		if err != nil {
			t.Fatal(err)
		}
		long := strings.Repeat("again and ", 10_000)
		m.send(pack(t, &pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{
			toUsers("one", "u"),
			toAudience(long, &pubsub.Audience{Id: 1, Version: 1, RoomId: "r", Join: []string{"u", "v"}}),
		}}, codec))
		m.send(&pubsub.DeliverRequest{FirstSeq: 3, Deliveries: []*pubsub.Delivery{toAudience("three", &pubsub.Audience{Id: 1, Version: 1})}})
		m.send(pack(t, &pubsub.DeliverRequest{
			FirstSeq: 4, Deliveries: []*pubsub.Delivery{toUsers("four", "u")}, ForgetAudiences: []uint32{1},
		}, codec))
		counts, _, _ := m.answers(4)
		if diff := cmp.Diff(map[uint64]uint32{1: 1, 2: 2, 3: 2, 4: 1}, counts); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{"one", long, "three", "four"}, g.texts("u")); diff != "" {
			t.Error(diff)
		}
		m.send(pack(t, &pubsub.DeliverRequest{Heartbeat: 5}, codec))
		if r := m.recv(); r.GetHeartbeat() != 5 {
			t.Errorf("heartbeat: %v", r)
		}
		m.send(pack(t, &pubsub.DeliverRequest{Drain: true}, codec))
		_ = m.wantEnd(codes.OK)
		for name, want := range map[string]uint64{
			"connect_node_deliver_frames_total": 5, "connect_node_deliver_compressed_frames_total": 4, "connect_node_audience_members": 0,
		} {
			if line := fmt.Sprintf("%s %d\n", name, want); !strings.Contains(written(set), line) {
				t.Errorf("no %sin\n%s", line, written(set))
			}
		}
	}
}

func written(set *metrics.Set) string {
	var out bytes.Buffer
	set.WritePrometheus(&out)
	return out.String()
}

// TestCompressedFramesThatBreakTheStream: each with a reason, and after the ack of what
// came before.
func TestCompressedFramesThatBreakTheStream(t *testing.T) {
	e, err := compression.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, maxFrameBytes+1)
	for _, codec := range allCodecs() {
		inner := &pubsub.DeliverRequest{FirstSeq: 2, Deliveries: []*pubsub.Delivery{toUsers(strings.Repeat("x", 99), "u")}}
		good := pack(t, inner, codec)
		but := func(change func(r *pubsub.DeliverRequest)) *pubsub.DeliverRequest {
			r := proto.CloneOf(good)
			change(r)
			return r
		}
		packed := func(r *pubsub.DeliverRequest) *pubsub.DeliverRequest { return pack(t, r, codec) }
		n := len(good.GetCompressed())
		for name, tc := range map[string]struct {
			offered []pubsub.Codec
			frame   *pubsub.DeliverRequest
			want    string
		}{
			"nothing was agreed on":   {[]pubsub.Codec{}, good, "no codec was agreed on"},
			"another was agreed on":   {[]pubsub.Codec{pubsub.Codec_S2 + pubsub.Codec_ZSTD - codec}, good, "compressed frame: "},
			"bomb":                    {nil, but(func(r *pubsub.DeliverRequest) { r.Compressed = e.Append(nil, zeros, codec) }), "were declared"},
			"bomb that says so":       {nil, &pubsub.DeliverRequest{Compressed: e.Append(nil, zeros, codec), RawBytes: uint32(len(zeros))}, "must be from 1 to 16777216"},
			"no length":               {nil, but(func(r *pubsub.DeliverRequest) { r.RawBytes = 0 }), "must be from 1 to"},
			"length too large":        {nil, but(func(r *pubsub.DeliverRequest) { r.RawBytes++ }), "were declared"},
			"length too small":        {nil, but(func(r *pubsub.DeliverRequest) { r.RawBytes-- }), "were declared"},
			"length alone":            {nil, &pubsub.DeliverRequest{RawBytes: 5}, "compressed frame: "},
			"cut short":               {nil, but(func(r *pubsub.DeliverRequest) { r.Compressed = r.Compressed[:n-1] }), "decompress: "},
			"garbage":                 {nil, &pubsub.DeliverRequest{Compressed: []byte("garbage!"), RawBytes: 100}, "compressed frame: "},
			"heartbeat beside it":     {nil, but(func(r *pubsub.DeliverRequest) { r.Heartbeat = 1 }), "something else beside it"},
			"deliveries beside it":    {nil, but(func(r *pubsub.DeliverRequest) { proto.Merge(r, inner) }), "something else beside it"},
			"hello beside it":         {nil, but(func(r *pubsub.DeliverRequest) { r.Hello = new(pubsub.Hello) }), "something else beside it"},
			"hello in it":             {nil, packed(&pubsub.DeliverRequest{Hello: &pubsub.Hello{ProtocolVersion: 1}}), "a second hello"},
			"compressed twice":        {nil, packed(good), "compressed twice"},
			"no DeliverRequest in it": {nil, &pubsub.DeliverRequest{Compressed: e.Append(nil, []byte{0xff}, codec), RawBytes: 1}, "compressed frame: "},
			"gap in it":               {nil, packed(&pubsub.DeliverRequest{FirstSeq: 3, Deliveries: inner.GetDeliveries()}), "first_seq 3 instead of 2"},
			"no target in it":         {nil, packed(&pubsub.DeliverRequest{FirstSeq: 2, Deliveries: []*pubsub.Delivery{{}}}), "delivery 2: "},
		} {
			t.Run(fmt.Sprintf("%v/%s", codec, name), func(t *testing.T) {
				g := newGateway()
				if tc.offered == nil {
					tc.offered = []pubsub.Codec{codec}
				}
				m, err := serve(t, Config{Sessions: g}).open(t, &pubsub.Hello{ProtocolVersion: 1, Codecs: tc.offered})
				if err != nil {
					t.Fatal(err)
				}
				m.deliver(toUsers("before", "u"))
				m.waitAck(1)
				m.send(tc.frame)
				if err := m.wantEnd(codes.FailedPrecondition); !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "broken stream") {
					t.Errorf("%v, want %q", err, tc.want)
				}
				if got := g.texts("u"); len(got) != 1 {
					t.Errorf("handed over: %q", got)
				}
			})
		}
	}
}

// TestAServerWithoutOurCodecTakesCompressedFrames: it decodes each frame and encodes it
// again, the new fields included.
func TestAServerWithoutOurCodecTakesCompressedFrames(t *testing.T) {
	g := newGateway()
	b := serve(t, Config{Sessions: g}, grpc.MaxRecvMsgSize(maxFrameBytes))
	m, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1, Codecs: allCodecs()})
	if err != nil {
		t.Fatal(err)
	}
	m.send(pack(t, &pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{toUsers("x", "u")}}, m.reply.GetCodec()))
	m.waitAck(1)
	if diff := cmp.Diff([]string{"x"}, g.texts("u")); diff != "" {
		t.Error(diff)
	}
}

// FuzzCompressedFrame: what a frame does to a stream, it does compressed, too, and
// bytes that are no compressed frame do nothing but break the stream.
func FuzzCompressedFrame(f *testing.F) {
	e, err := compression.NewEncoder()
	if err != nil {
		f.Fatal(err)
	}
	for _, r := range []*pubsub.DeliverRequest{
		{Heartbeat: 7},
		{FirstSeq: 1, Deliveries: []*pubsub.Delivery{toUsers("x", "u", "v"), toAudience("a", &pubsub.Audience{Id: 1, Version: 1, RoomId: "r", Join: []string{"u"}})}},
		{FirstSeq: 2, Deliveries: []*pubsub.Delivery{toUsers("x", "u")}},
		{Compressed: []byte{1, 0, 7}, RawBytes: 1},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		for _, codec := range allCodecs() {
			f.Add(b, int32(codec))
			f.Add(e.Append(nil, b, codec), int32(codec))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, codec int32) {
		c := allCodecs()[uint32(codec)%2]
		if len(b) > 0 {
			plain, packed := newStream(t, everyone{}), newStream(t, everyone{})
			packed.codec = c
			plainErr := plain.take(b)
			packedErr := packed.take(outer(e.Append(nil, b, c), len(b)))
			if plain.next != packed.next || len(plain.aud.byID) != len(packed.aud.byID) {
				t.Errorf("plain: seq %d, %d audiences; compressed: %d, %d", plain.next, len(plain.aud.byID), packed.next, len(packed.aud.byID))
			}
			// A plain stream has no codec: it refuses compressed frames, as a compressed one those in it.
			if (plainErr == nil) != (packedErr == nil) {
				t.Errorf("plain: %v; compressed: %v", plainErr, packedErr)
			}
		}
		hostile := newStream(t, everyone{})
		hostile.codec = c
		if err := hostile.take(outer(b, 1<<16)); err != nil && !errors.Is(err, errBroken) && !errors.Is(err, errDrained) {
			t.Error(err)
		}
	})
}

// outer encodes the frame around compressed bytes.
func outer(compressed []byte, raw int) []byte {
	b := protowire.AppendTag(nil, 7, protowire.BytesType)
	b = protowire.AppendBytes(b, compressed)
	b = protowire.AppendTag(b, 8, protowire.VarintType)
	return protowire.AppendVarint(b, uint64(raw))
}
