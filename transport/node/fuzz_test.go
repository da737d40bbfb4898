package node

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

// everyone has all users.
type everyone struct{}

func (everyone) Deliver(string, *Message) Outcome { return Delivered }
func (everyone) Broadcast(*Message) (int, int)    { return 1, 0 }
func (everyone) Online() int                      { return 1 }
func newStream(t testing.TB, s Sessions) *stream {
	t.Helper()
	server, err := New(Config{NodeID: "n", Sessions: s, MaxAudienceMembers: 1000})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	return &stream{
		server: server,
		acks:   newAcks(1<<20, server.online, &server.count),
		aud:    audiences{byID: map[uint32]*audience{}, maxMembers: server.cfg.MaxAudienceMembers},
		next:   1,
	}
}

// FuzzDeliverRequest: no frame crashes the node, and what protobuf decodes, the
// node decodes to the same.
func FuzzDeliverRequest(f *testing.F) {
	for _, r := range []*pubsub.DeliverRequest{
		{},
		{Hello: &pubsub.Hello{ProtocolVersion: 1, ManagerId: "m"}},
		{FirstSeq: 1, Deliveries: []*pubsub.Delivery{
			{Content: &pubsub.MessageContent{Type: 9, Data: []byte("x"), Timestamp: -1, Metadata: map[string]string{"k": "v"}}, UserIds: []string{"u", "v"}, RoomId: "r", Traceparent: "t"},
			toAudience("a", &pubsub.Audience{Id: 1, Version: 1, RoomId: "room", Join: []string{"u", "v", "w"}}, "v"),
			toAudience("b", &pubsub.Audience{Id: 1, Version: 2, Join: []string{"x"}, Leave: []string{"u"}}),
			{Content: text("c"), Everybody: true},
		}, ForgetAudiences: []uint32{1, 300}, Heartbeat: 1 << 60, Drain: true},
		{Hello: &pubsub.Hello{ProtocolVersion: 1, Codecs: []pubsub.Codec{pubsub.Codec_ZSTD, 99}}},
		{Compressed: []byte{1, 0, 7}, RawBytes: 1},
		{Compressed: []byte{}, RawBytes: 1 << 31, FirstSeq: 1},
		{FirstSeq: 1, Deliveries: []*pubsub.Delivery{
			{UserIds: []string{"u", "v"}, MessageId: "m", Sender: "s", PayloadHash: 1 << 31, TtlMs: 1000, WantAck: true, AckTimeoutMs: 9, CollapseKey: "k"},
			{UserIds: []string{"u"}, MessageId: "m", PayloadHash: 7, WantAck: true},
			{UserIds: []string{"u"}, MessageId: "n", Replay: &pubsub.ReplayPlace{Gate: 1, Seq: 2, After: 1}},
			{Scope: "shop/", MessageId: "o", TtlMs: 1},
		}, Nudges: []*pubsub.Nudge{{UserId: "u", Seq: 3, Token: 4}, {}}, ReplayEnds: []*pubsub.ReplayEnd{{Gate: 1, Seq: 5, Error: "e"}}},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("\x1a\x05\x0a\x03\x0a\x01\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		users := NewLastingUsers[*phone](everyFeature...)
		st := newStream(t, users)
		hello := &pubsub.Hello{Features: everyFeature}
		st.server.replays.join(st, hello, time.Now())
		p := call(st.server, users, "u", true)
		p.desk.inbox.Gate.Ready()
		_ = st.take(b)
		p.hangUp(users)
		st.acks.receipts.giveUpAll()
		if n := st.acks.receipts.pending(); n != 0 {
			t.Errorf("%d users are pending for ever", n)
		}
		if len(st.tally.counts) > 0 {
			t.Error("acks left behind")
		}
		members := 0
		for id, au := range st.aud.byID {
			members += len(au.members)
			if len(au.at) != len(au.members) {
				t.Errorf("audience %d: %d members, %d places", id, len(au.members), len(au.at))
			}
			for user, at := range au.at {
				if au.members[at] != user {
					t.Errorf("audience %d: %q is not at its place", id, user)
				}
			}
		}
		if members != st.aud.members || members > st.aud.maxMembers {
			t.Errorf("%d members, counted %d", members, st.aud.members)
		}
		compareWithProtobuf(t, b)
	})
}

func compareWithProtobuf(t *testing.T, b []byte) {
	t.Helper()
	want := new(pubsub.DeliverRequest)
	if proto.Unmarshal(b, want) != nil {
		return // The node may take what protobuf does not, such as ids that are not UTF-8.
	}
	var r request
	if err := r.parse(b); err != nil {
		t.Fatalf("protobuf decodes it: %v", err)
	}
	got := &pubsub.DeliverRequest{
		FirstSeq: r.firstSeq, ForgetAudiences: r.forget, Heartbeat: r.heartbeat, Drain: r.drain,
		Compressed: r.compressed, RawBytes: r.rawBytes,
	}
	for i, part := range r.nudges {
		var n nudge
		if err := n.parse(part); err != nil {
			t.Fatalf("nudge %d: protobuf decodes it: %v", i, err)
		}
		got.Nudges = append(got.Nudges, &pubsub.Nudge{UserId: n.user, Token: n.token, Seq: want.GetNudges()[i].GetSeq()})
	}
	for i, part := range r.ends {
		var e replayEnd
		if err := e.parse(part); err != nil {
			t.Fatalf("end %d: protobuf decodes it: %v", i, err)
		}
		got.ReplayEnds = append(got.ReplayEnds, &pubsub.ReplayEnd{Gate: e.gate, Error: e.failure, Seq: want.GetReplayEnds()[i].GetSeq()})
	}
	if r.hasHello {
		got.Hello = new(pubsub.Hello)
		if err := proto.Unmarshal(r.hello, got.Hello); err != nil {
			t.Fatal(err)
		}
	}
	var d delivery
	for i, part := range r.deliveries {
		if err := d.parse(part); err != nil {
			t.Fatalf("delivery %d: protobuf decodes it: %v", i, err)
		}
		decoded := d.decoded(t, want.GetDeliveries()[i].GetContent() != nil)
		got.Deliveries = append(got.Deliveries, decoded)
	}
	got.ProtoReflect().SetUnknown(want.ProtoReflect().GetUnknown())
	stripUnknown(want)
	stripUnknown(got)
	if !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func (d *delivery) decoded(t *testing.T, hasContent bool) *pubsub.Delivery {
	t.Helper()
	out := &pubsub.Delivery{
		RoomId: d.room, UserIds: d.users, Everybody: d.everybody, ExceptUserIds: d.except, Traceparent: d.traceparent, Scope: d.scope,
		MessageId: d.messageID, Sender: d.sender, PayloadHash: d.payloadHash, TtlMs: d.ttl, WantAck: d.wantAck, AckTimeoutMs: d.ackTimeout, CollapseKey: d.collapse,
	}
	if d.hasReplay {
		out.Replay = &pubsub.ReplayPlace{Gate: d.replay.gate, Seq: d.replay.seq, After: d.replay.after}
	}
	var m Message
	if err := m.parseContent(d.content); err != nil {
		t.Fatalf("protobuf decodes it: %v", err)
	}
	if hasContent {
		out.Content = &pubsub.MessageContent{Type: m.Type, Data: m.Data, Timestamp: m.Timestamp, Metadata: m.Metadata}
	}
	if d.hasAudience {
		out.Audience = &pubsub.Audience{Id: d.id, Version: d.version, RoomId: d.audRoom, Join: d.join, Leave: d.leave}
	}
	return proto.CloneOf(out)
}

// stripUnknown removes what a later version may have added.
func stripUnknown(r *pubsub.DeliverRequest) {
	r.ProtoReflect().SetUnknown(nil)
	if h := r.GetHello(); h != nil {
		h.ProtoReflect().SetUnknown(nil)
	}
	for _, d := range r.GetDeliveries() {
		d.ProtoReflect().SetUnknown(nil)
		if c := d.GetContent(); c != nil {
			c.ProtoReflect().SetUnknown(nil)
		}
		if a := d.GetAudience(); a != nil {
			a.ProtoReflect().SetUnknown(nil)
		}
		if p := d.GetReplay(); p != nil {
			p.ProtoReflect().SetUnknown(nil)
		}
	}
	for _, n := range r.GetNudges() {
		n.ProtoReflect().SetUnknown(nil)
	}
	for _, e := range r.GetReplayEnds() {
		e.ProtoReflect().SetUnknown(nil)
	}
}
