package link

import (
	"math"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// drawText is a string of which some are long enough for lengths of two bytes.
func drawText(t *rapid.T, label string) string {
	return rapid.OneOf(rapid.StringN(1, 8, 32), rapid.StringN(60, 80, 300)).Draw(t, label)
}

func TestReferencesAndListsAreWhatTheGeneratedCodeReads(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		list := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) string { return drawText(t, "user") }), 0, 6)
		ref := audienceRef{
			id: rapid.Uint32().Draw(t, "id"), version: rapid.Uint32().Draw(t, "version"),
			room: drawText(t, "room"), join: list.Draw(t, "join"), leave: list.Draw(t, "leave"),
		}
		b := ref.append(nil)
		if len(b) != ref.size() {
			t.Fatalf("%d bytes, size says %d", len(b), ref.size())
		}
		var got pubsub.Audience
		if err := proto.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if got.GetId() != ref.id || got.GetVersion() != ref.version || got.GetRoomId() != ref.room ||
			!slices.Equal(got.GetJoin(), ref.join) || !slices.Equal(got.GetLeave(), ref.leave) {
			t.Fatalf("%v of %+v", &got, ref)
		}

		users := slices.Compact(slices.Sorted(slices.Values(list.Draw(t, "users"))))
		var minus, rest []string
		for _, u := range users {
			if rapid.Bool().Draw(t, "out") {
				minus = append(minus, u)
			} else {
				rest = append(rest, u)
			}
		}
		b = appendWithout(nil, delUsers, users, minus)
		if len(b) != wire.SizeStrings(delUsers, users)-wire.SizeStrings(delUsers, minus) {
			t.Fatalf("%d bytes", len(b))
		}
		var d pubsub.Delivery
		if err := proto.Unmarshal(b, &d); err != nil || !slices.Equal(d.GetUserIds(), rest) {
			t.Fatalf("%v, %v, not %q", err, &d, rest)
		}
	})
}

func drawResponse(t *rapid.T) *pubsub.DeliverResponse {
	r := &pubsub.DeliverResponse{
		Heartbeat: rapid.Uint64().Draw(t, "heartbeat"), OnlineUsers: rapid.Uint32().Draw(t, "online"), Drain: rapid.Bool().Draw(t, "drain"),
	}
	if rapid.Bool().Draw(t, "hello") {
		r.Hello = &pubsub.HelloReply{
			ProtocolVersion: rapid.Uint32().Draw(t, "version"), NodeId: drawText(t, "node"), BootId: drawText(t, "boot"),
			MaxAudienceMembers: rapid.Uint32().Draw(t, "members"), MaxUnacked: rapid.Uint32().Draw(t, "unacked"),
			OnlineUsers: rapid.Uint32().Draw(t, "online"), Codec: pubsub.Codec(rapid.Int32Range(0, math.MaxInt32).Draw(t, "codec")),
		}
	}
	for range rapid.IntRange(0, 4).Draw(t, "acks") {
		a := &pubsub.AckRange{
			First:     rapid.Uint64Range(0, math.MaxUint64-100).Draw(t, "first"),
			Delivered: rapid.SliceOfN(rapid.Uint32(), 0, 5).Draw(t, "delivered"),
		}
		if rapid.Bool().Draw(t, "with duplicates") {
			a.Duplicates = rapid.SliceOfN(rapid.Uint32(), len(a.Delivered), len(a.Delivered)).Draw(t, "duplicates")
		}
		if rapid.Bool().Draw(t, "with pending") {
			a.Pending = rapid.SliceOfN(rapid.Uint32(), len(a.Delivered), len(a.Delivered)).Draw(t, "pending")
		}
		if rapid.Bool().Draw(t, "with filtered") {
			a.Filtered = rapid.SliceOfN(rapid.Uint32(), len(a.Delivered), len(a.Delivered)).Draw(t, "filtered")
		}
		r.Acks = append(r.Acks, a)
	}
	users := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) string { return drawText(t, "user") }), 0, 3)
	for range rapid.IntRange(0, 3).Draw(t, "receipts") {
		r.Receipts = append(r.Receipts, &pubsub.Receipt{
			Seq: rapid.Uint64().Draw(t, "seq"), Acked: rapid.Uint32().Draw(t, "acked"),
			Unacked: users.Draw(t, "unacked"), Final: rapid.Bool().Draw(t, "final"),
		})
	}
	for range rapid.IntRange(0, 3).Draw(t, "catchups") {
		r.Catchups = append(r.Catchups, &pubsub.Catchup{
			UserId: drawText(t, "user"), Gate: rapid.Uint64().Draw(t, "gate"), Window: rapid.Uint32().Draw(t, "window"),
		})
	}
	for range rapid.IntRange(0, 3).Draw(t, "taken") {
		r.ReplayTaken = append(r.ReplayTaken, &pubsub.ReplayTaken{Gate: rapid.Uint64().Draw(t, "gate"), Seq: rapid.Uint64().Draw(t, "seq")})
	}
	r.NudgesTaken = rapid.SliceOfN(rapid.Uint64(), 0, 4).Draw(t, "nudges")
	for i := range rapid.IntRange(0, 4).Draw(t, "misses") {
		r.Misses = append(r.Misses, &pubsub.Miss{
			Seq:         uint64(10 - i),
			NotHere:     rapid.SliceOfN(rapid.Custom(func(t *rapid.T) string { return drawText(t, "user") }), 0, 3).Draw(t, "not here"),
			Failed:      rapid.SliceOfN(rapid.Custom(func(t *rapid.T) string { return drawText(t, "user") }), 0, 3).Draw(t, "failed"),
			Reason:      rapid.StringN(0, 20, 60).Draw(t, "reason"),
			FailedUsers: rapid.Uint32().Draw(t, "failed users"), Refused: rapid.Bool().Draw(t, "refused"),
			Reused: users.Draw(t, "reused"), Filtered: users.Draw(t, "filtered"),
		})
	}
	return r
}

func TestResponsesAreReadAsTheGeneratedCodeWroteThem(t *testing.T) {
	var r response // reused, as a stream does
	rapid.Check(t, func(t *rapid.T) {
		want := drawResponse(t)
		b, err := proto.Marshal(want)
		if err != nil {
			t.Skip("not UTF-8")
		}
		if err := r.decode(b, 100); err != nil {
			t.Fatal(err)
		}
		compare(t, &r, want)
	})
}

// compare checks a decoded response against the generated type.
func compare(t interface{ Fatalf(string, ...any) }, r *response, want *pubsub.DeliverResponse) {
	if r.heartbeat != want.GetHeartbeat() || r.online != want.GetOnlineUsers() || r.drain != want.GetDrain() {
		t.Fatalf("%+v of %v", r, want)
	}
	if h := want.GetHello(); h != nil {
		if !proto.Equal(r.hello, h) {
			t.Fatalf("%+v of %v", r.hello, h)
		}
	}
	type whole struct {
		ack
		counts
	}
	var acks, got []whole
	for _, a := range want.GetAcks() {
		for i, n := range a.GetDelivered() {
			one := whole{ack: ack{seq: a.GetFirst() + uint64(i), delivered: n}}
			if len(a.GetDuplicates()) > 0 {
				one.duplicates = a.GetDuplicates()[i]
			}
			if len(a.GetPending()) > 0 {
				one.pending = a.GetPending()[i]
			}
			if len(a.GetFiltered()) > 0 {
				one.filtered = a.GetFiltered()[i]
			}
			acks = append(acks, one)
		}
	}
	for _, a := range r.acks {
		if (a.miss != nil) != slices.ContainsFunc(want.GetMisses(), func(m *pubsub.Miss) bool { return m.GetSeq() == a.seq }) {
			t.Fatalf("ack of %d has miss %v of %v", a.seq, a.miss, want)
		}
		got = append(got, whole{ack{seq: a.seq, delivered: a.delivered}, r.counts(&a)})
	}
	if !slices.Equal(acks, got) {
		t.Fatalf("%+v of %v", r.acks, want)
	}
	if len(r.misses) != len(want.GetMisses()) {
		t.Fatalf("%d misses of %d", len(r.misses), len(want.GetMisses()))
	}
	for _, m := range want.GetMisses() {
		found := false
		for _, got := range r.misses {
			found = found || got.seq == m.GetSeq() && slices.Equal(got.notHere, m.GetNotHere()) && slices.Equal(got.failed, m.GetFailed()) &&
				got.reason == plain.Line(m.GetReason(), textMax) && got.failedUsers == m.GetFailedUsers() && got.refused == m.GetRefused() &&
				slices.Equal(got.reused, m.GetReused()) && slices.Equal(got.filtered, m.GetFiltered())
		}
		if !found {
			t.Fatalf("%v not in %+v", m, r.misses)
		}
	}
	compareLasting(t, r, want)
}

// compareLasting is compare for what is of lasting delivery.
func compareLasting(t interface{ Fatalf(string, ...any) }, r *response, want *pubsub.DeliverResponse) {
	if !slices.Equal(r.tokens, want.GetNudgesTaken()) || len(r.receipts) != len(want.GetReceipts()) ||
		len(r.catchups) != len(want.GetCatchups()) || len(r.taken) != len(want.GetReplayTaken()) {
		t.Fatalf("%+v of %v", r, want)
	}
	for i, m := range want.GetReceipts() {
		got := &r.receipts[i]
		if got.seq != m.GetSeq() || got.acked != m.GetAcked() || got.final != m.GetFinal() || !slices.Equal(got.unacked, m.GetUnacked()) {
			t.Fatalf("%+v of %v", got, m)
		}
	}
	for i, m := range want.GetCatchups() {
		if got := r.catchups[i]; got != (catchup{m.GetUserId(), m.GetGate(), uint64(m.GetWindow())}) {
			t.Fatalf("%+v of %v", got, m)
		}
	}
	for i, m := range want.GetReplayTaken() {
		if got := r.taken[i]; got != (taken{m.GetGate(), m.GetSeq()}) {
			t.Fatalf("%+v of %v", got, m)
		}
	}
}

func TestHostileFramesAreRefused(t *testing.T) {
	many := make([]uint32, 1000)
	flood, err := proto.Marshal(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: many}}})
	if err != nil {
		t.Fatal(err)
	}
	wrap, err := proto.Marshal(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: math.MaxUint64, Delivered: []uint32{1, 1}}}})
	if err != nil {
		t.Fatal(err)
	}
	encoded := func(r *pubsub.DeliverResponse) []byte {
		b, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	floods := &pubsub.DeliverResponse{NudgesTaken: make([]uint64, nudgesMax+1)}
	var receipts, catchups, taken pubsub.DeliverResponse
	for range gatesMax + 1 {
		receipts.Receipts = append(receipts.Receipts, &pubsub.Receipt{})
		catchups.Catchups = append(catchups.Catchups, &pubsub.Catchup{})
		taken.ReplayTaken = append(taken.ReplayTaken, &pubsub.ReplayTaken{})
	}
	tests := map[string][]byte{
		"more answers to nudges than can be open": encoded(floods),
		"more receipts than can be open":          encoded(&receipts),
		"more catchups than can be open":          encoded(&catchups),
		"more of replays than can be open":        encoded(&taken),
		"fewer duplicates than acks":              encoded(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 1}, Duplicates: []uint32{1}}}}),
		"more duplicates than acks":               encoded(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1}, Duplicates: []uint32{0, 1}}}}),
		"fewer pending than acks":                 encoded(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 1}, Pending: []uint32{1}}}}),
		"pending without acks":                    encoded(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Pending: []uint32{1}}}}),
		"fewer filtered than acks":                encoded(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 1}, Filtered: []uint32{1}}}}),
		"filtered without acks":                   encoded(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Filtered: []uint32{1}}}}),
		"a flood of filtered":                     encoded(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Filtered: many}}}),
		"a filtered user that is not UTF-8":       {0x1a, 0x03, 0x42, 0x01, 0xff},
		"a flood of pending":                      encoded(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Pending: many}}}),
		"a receipt's user that is not UTF-8":      {0x3a, 0x03, 0x1a, 0x01, 0xff},
		"a catchup's user that is not UTF-8":      {0x42, 0x03, 0x0a, 0x01, 0xff},
		"a reused user that is not UTF-8":         {0x1a, 0x03, 0x3a, 0x01, 0xff},
		"receipts of wrong type":                  {0x38, 0x01},
		"a truncated receipt":                     {0x3a, 0x02, 0x08, 0x80},

		"truncated":                {0x12, 0x05, 0x08},
		"not a message":            {0xff, 0xff, 0xff},
		"heartbeat of wrong type":  {0x22, 0x01, 0x00},
		"acks of wrong type":       {0x10, 0x01},
		"text that is not UTF-8":   {0x1a, 0x03, 0x12, 0x01, 0xff},
		"field number 0":           {0x00, 0x01},
		"more acks than are owed":  flood,
		"acks beyond the last seq": wrap,
	}
	for name, b := range tests {
		t.Run(name, func(t *testing.T) {
			var r response
			if err := r.decode(b, 100); err == nil {
				t.Errorf("accepted: %+v", r)
			}
		})
	}
}

func TestFieldsOfALaterVersionAreSkipped(t *testing.T) {
	b := []byte{0x20, 0x07, 0x7a, 0x02, 'x', 'y', 0x81, 0x01, 1, 2, 3, 4, 5, 6, 7, 8, 0x8d, 0x01, 1, 2, 3, 4, 0x90, 0x01, 0x05}
	var r response
	if err := r.decode(b, 10); err != nil || r.heartbeat != 7 {
		t.Errorf("%v, %+v", err, r)
	}
}

// FuzzResponse feeds the decoder arbitrary bytes. What it accepts, the generated
// code accepts, too, and reads the same.
func FuzzResponse(f *testing.F) {
	for _, r := range []*pubsub.DeliverResponse{
		{},
		{Hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A", BootId: "b", MaxAudienceMembers: 9, MaxUnacked: 8, OnlineUsers: 7}},
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 2, 300}}, {First: 9, Delivered: []uint32{math.MaxUint32}}}},
		{Misses: []*pubsub.Miss{{Seq: 2, NotHere: []string{"u1", "u2"}, Failed: []string{"u3"}, Reason: "full"}, {Seq: 1, Refused: true, FailedUsers: 3}}},
		{Heartbeat: 5, OnlineUsers: 6, Drain: true},
		{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 2}, Duplicates: []uint32{1, 0}, Pending: []uint32{0, 2}}}},
		{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 2, Unacked: []string{"u1"}, Final: true}, {Seq: math.MaxUint64, Acked: math.MaxUint32}}},
		{Catchups: []*pubsub.Catchup{{UserId: "u1", Gate: 1, Window: 64}, {UserId: "", Gate: math.MaxUint64}}, ReplayTaken: []*pubsub.ReplayTaken{{Gate: 1, Seq: 2}}},
		{LogFollow: &pubsub.LogFollow{Epoch: 5, After: []uint64{1, math.MaxUint64}}, LogReads: []*pubsub.LogRead{{RoomId: "r", Gate: 1, Epoch: math.MaxUint64, After: make([]uint64, 64)}, {}}},
		{NudgesTaken: []uint64{1, 2, math.MaxUint64}, Misses: []*pubsub.Miss{{Seq: 1, Reused: []string{"u1"}}}},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{0x12, 0x04, 0x10, 0x01, 0x08, 0x05}) // counts before first, not packed
	f.Fuzz(func(t *testing.T, b []byte) {
		var r response
		if r.decode(b, 1000) != nil {
			return
		}
		if len(r.acks) > 1000 || len(r.misses) > 1000 {
			t.Fatalf("%d acks, %d misses", len(r.acks), len(r.misses))
		}
		if len(r.receipts) > receiptsMax || len(r.catchups) > gatesMax || len(r.taken) > gatesMax || len(r.tokens) > nudgesMax {
			t.Fatalf("%d receipts, %d catchups, %d taken, %d nudges", len(r.receipts), len(r.catchups), len(r.taken), len(r.tokens))
		}
		if len(r.logReads) > 2*logReadsMax || len(r.follow.after) > logPartitionsMax {
			t.Fatalf("%d reads, %d places", len(r.logReads), len(r.follow.after))
		}
		for i := range r.logReads {
			if n := len(r.logReads[i].After); n > logPartitionsMax {
				t.Fatalf("%d places", n)
			}
		}
		var want pubsub.DeliverResponse
		if err := proto.Unmarshal(b, &want); err != nil {
			t.Fatalf("accepted what is no DeliverResponse: %v", err)
		}
		if got := want.GetLogFollow(); r.follows != (got != nil) || r.follow.epoch != got.GetEpoch() || !slices.Equal(r.follow.after, got.GetAfter()) {
			t.Fatalf("follow %+v, want %v", r.follow, got)
		}
		if len(r.logReads) != len(want.GetLogReads()) {
			t.Fatalf("%d reads, want %d", len(r.logReads), len(want.GetLogReads()))
		}
		for i, got := range r.logReads {
			if read := want.GetLogReads()[i]; got.Room != read.GetRoomId() || got.Gate != read.GetGate() || got.Epoch != read.GetEpoch() || !slices.Equal(got.After, read.GetAfter()) {
				t.Fatalf("read %+v, want %v", got, read)
			}
		}
	})
}
