package node

import (
	"math"
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
			{UserIds: []string{"u"}, RoomId: "r", MessageId: "p", Log: &pubsub.LogPosition{Partition: 1, Seq: 11, Epoch: testEpoch, ExcludeUserIds: []string{"v"}}},
			{UserIds: []string{"u"}, RoomId: "r", MessageId: "q", Log: &pubsub.LogPosition{Partition: 1<<32 - 1, Seq: 1<<64 - 1, Epoch: 1}},
		}, Nudges: []*pubsub.Nudge{{UserId: "u", Seq: 3, Token: 4}, {}}, ReplayEnds: []*pubsub.ReplayEnd{{Gate: 1, Seq: 5, Error: "e"}}},
		{LogMarks: []*pubsub.LogMark{
			{Partition: 1, Partitions: 2, Epoch: testEpoch, After: 10, Seq: 1 << 40, Rooms: []*pubsub.LogRoom{{RoomId: "r", Seqs: []uint64{11, 12, 1 << 39}}, {RoomId: "s", Seqs: []uint64{13}}}},
			{Partition: 1, Partitions: 2, Epoch: testEpoch, After: 1 << 50, Seq: 1<<64 - 1},
			{Partition: 1, Partitions: 2, Epoch: testEpoch, After: 3, Seq: 4},
			{Partition: 0, Partitions: 64, Epoch: 1, After: 3, Seq: 4},
		}, LogPages: []*pubsub.LogPage{
			{Gate: fuzzGate, Partition: 1, Epoch: testEpoch, Seq: 12, More: true, Gap: true, Entries: []*pubsub.Delivery{logged(11, "r"), logged(12, "r")}},
			{Gate: fuzzGate, Error: "e"},
		}},
		{FirstSeq: 1, Deliveries: []*pubsub.Delivery{
			{UserIds: []string{"u", "v"}, Filter: []*pubsub.Match{{Key: "platform", Values: []string{"ios", "web"}}, {Key: "app_version", Values: []string{"1"}, Not: true}}},
			{UserIds: []string{"u"}, RoomId: "r", MessageId: "m", WantAck: true, NameFiltered: true, Filter: []*pubsub.Match{{Key: "platform", Values: []string{"tv"}}}},
			{Everybody: true, Filter: []*pubsub.Match{{Key: "platform", Values: []string{"tv"}, Not: true}}},
			{Scope: "shop/", Filter: []*pubsub.Match{{}}},
		}},
		{Disconnects: []*pubsub.Disconnect{
			{Token: 1, UserId: "u", DeviceId: "d", Code: 4000, Reason: "r", RefuseMs: 1 << 63, Revision: 1<<64 - 1},
			{Token: 2, RoomId: "r", Code: 4999, RefuseMs: 1, Revision: 3}, {Token: 3, RoomId: "r", Code: 4000, AllowAgain: true, Revision: 4},
		}},
		{Disconnects: []*pubsub.Disconnect{{UserId: "u", Code: 1 << 31}}},
		{LogMarks: []*pubsub.LogMark{{Partition: 1<<32 - 1, Partitions: 1<<32 - 1, Epoch: testEpoch}}},
		{LogPages: []*pubsub.LogPage{{Gate: fuzzGate, Partition: 1<<32 - 1, Epoch: testEpoch, Seq: 1<<64 - 1, More: true}}},
		{LogPages: []*pubsub.LogPage{{Gate: fuzzGate, Partition: 0, Epoch: testEpoch, Seq: 1<<64 - 1}, {Gate: fuzzGate}}},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("\x1a\x05\x0a\x03\x0a\x01\x00"))
	f.Add([]byte("\x6a\x07\x08\x03\x35\xa0\x1f\x40\x01"))     // a disconnect's reason that has the type of a number
	f.Add([]byte("\x6a\x08\x08\x03\x28\xa0\x9f\x80\x80\x10")) // a close code of 2^32 + 4000
	f.Fuzz(func(t *testing.T, b []byte) {
		users := NewLastingUsers[*phone](logFeatures...)
		st := newStream(t, closing{users})
		hello := &pubsub.Hello{Features: logFeatures}
		st.server.replays.join(st, hello, time.Now())
		checkLogs := readingLogs(t, st, hello)
		p := call(st.server, users, "u", true)
		p.desk.inbox.Gate.Ready()
		_ = st.take(b)
		checkLogs()
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
		fuzzFilters(t, b)
	})
}

// closing are Users of which a disconnect closes none.
type closing struct{ *Users[*phone] }

func (closing) Disconnect(*Disconnect) int { return 0 }

// fuzzGate is that of the read that is open while the frame comes.
const fuzzGate = 2

// readingLogs has st followed, with a member of room "r" who is read for. The function that it returns does what is due, and checks what
// is kept.
func readingLogs(t *testing.T, st *stream, hello *pubsub.Hello) (check func()) {
	t.Helper()
	logs, start := st.server.roomLogs, time.Now()
	logs.looping = true // The test is the loop.
	logs.join(st, hello, start)
	c, err := st.server.Cursor("u", &reader{desk: newDesk(false)}, at(5, 3))
	if err != nil {
		t.Fatal(err)
	}
	for partition, place := range []uint64{5, 10} {
		if err := logs.mark(st, &logMark{partition: uint32(partition), partitions: 2, epoch: testEpoch, after: place, seq: place}, start); err != nil {
			t.Fatal(err)
		}
	}
	c.Join("r")
	logs.look(start.Add(time.Second))
	if logs.reads[fuzzGate] == nil {
		t.Fatal("nothing is read")
	}
	return func() {
		for read := logs.nextPage(); read != nil; read = logs.nextPage() {
			logs.handOut(read)
		}
		for i := range 20 {
			logs.look(start.Add(time.Duration(i) * 10 * time.Second))
			logs.tell(start.Add(time.Duration(i) * 10 * time.Second))
			logs.wait(start)
		}
		came := 0
		for _, room := range logs.rooms {
			came += len(room.came)
			if len(room.came) > cameMost || len(room.members) == 0 || len(room.behind) > len(room.members) {
				t.Errorf("room %q: %d places, %d members, %d behind", room.name, len(room.came), len(room.members), len(room.behind))
			}
		}
		if came != logs.came || logs.pageBytes != 0 || len(logs.reads) > logReadsMost {
			t.Errorf("%d places are kept, counted %d; %d bytes of pages, %d reads", came, logs.came, logs.pageBytes, len(logs.reads))
		}
		c.Close()
		if len(logs.rooms)+logs.members+logs.behind+logs.came+len(logs.due)+logs.byAge.Len() != 0 || c.holding.Load() != 0 {
			t.Error("something of a closed cursor is kept")
		}
	}
}

func compareWithProtobuf(t *testing.T, b []byte) {
	t.Helper()
	known := proto.UnmarshalOptions{DiscardUnknown: true} // A later version may have more.
	want := new(pubsub.DeliverRequest)
	if known.Unmarshal(b, want) != nil {
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
	for i, part := range r.disconnects {
		asked := want.GetDisconnects()[i]
		var d disconnect
		_ = d.parse(part) // it refuses more than protobuf does
		if ms := asked.GetRefuseMs(); uint32(d.Code) != min(asked.GetCode(), math.MaxUint16) || d.Seconds < 0 || (d.Seconds == 0) != (ms == 0) {
			t.Errorf("disconnect %d: code %d, %d s of %v", i, d.Code, d.Seconds, asked)
		}
		got.Disconnects = append(got.Disconnects, &pubsub.Disconnect{
			Token: d.token, UserId: d.User, DeviceId: d.Device, RoomId: d.Room, Reason: d.Reason, AllowAgain: d.allowAgain, Revision: uint64(d.revision),
			Code: asked.GetCode(), RefuseMs: asked.GetRefuseMs(),
		})
	}
	for i, part := range r.marks {
		var k logMark
		if err := k.parse(part); err != nil {
			t.Fatalf("mark %d: protobuf decodes it: %v", i, err)
		}
		mark := &pubsub.LogMark{Partition: k.partition, Partitions: k.partitions, Epoch: k.epoch, After: k.after, Seq: k.seq}
		for _, b := range k.rooms {
			var room markedRoom
			if err := room.parse(b); err != nil {
				t.Fatalf("mark %d: protobuf decodes it: %v", i, err)
			}
			mark.Rooms = append(mark.Rooms, &pubsub.LogRoom{RoomId: room.room, Seqs: room.seqs})
		}
		got.LogMarks = append(got.LogMarks, mark)
	}
	for i, part := range r.pages {
		var p logPage
		if err := p.parse(part); err != nil {
			t.Fatalf("page %d: protobuf decodes it: %v", i, err)
		}
		page := &pubsub.LogPage{Gate: p.gate, Partition: p.partition, Seq: p.seq, More: p.more, Gap: p.gap, Error: p.failure, Epoch: p.epoch}
		var d delivery
		for k, b := range p.entries {
			if err := d.parse(b); err != nil {
				t.Fatalf("page %d: protobuf decodes it: %v", i, err)
			}
			page.Entries = append(page.Entries, d.decoded(t, want.GetLogPages()[i].GetEntries()[k].GetContent() != nil))
		}
		got.LogPages = append(got.LogPages, page)
	}
	if r.hasHello {
		got.Hello = new(pubsub.Hello)
		if err := known.Unmarshal(r.hello, got.Hello); err != nil {
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
	for _, d := range want.GetDeliveries() {
		cutMatches(d)
	}
	for _, p := range want.GetLogPages() {
		for _, d := range p.GetEntries() {
			cutMatches(d)
		}
	}
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
	if d.hasLog {
		out.Log = &pubsub.LogPosition{Partition: d.log.Partition, Seq: d.log.Seq, Epoch: d.log.Epoch, ExcludeUserIds: d.log.Exclude}
	}
	out.NameFiltered = d.namesLeft
	for _, m := range d.matches {
		out.Filter = append(out.Filter, &pubsub.Match{Key: m.key, Values: m.values, Not: m.not})
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

// cutMatches leaves what a delivery keeps of a filter that is refused for its length.
func cutMatches(d *pubsub.Delivery) {
	d.Filter = d.GetFilter()[:min(len(d.GetFilter()), maxMatches+1)]
	for _, m := range d.GetFilter() {
		m.Values = m.GetValues()[:min(len(m.GetValues()), maxMatchValues+1)]
	}
}
