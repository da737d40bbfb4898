package ingress

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

var testLimits = engine.Limits{
	IDBytes: 256, DataBytes: 256 << 10, MetadataEntries: 32, MetadataBytes: 8 << 10, Exclude: 10_000, Users: 10_000,
	MaxTTL: 168 * time.Hour, Rooms: 1_000}

// roomy returns b as the codec would: with space for a timestamp behind it.
func roomy(b []byte) []byte {
	return append(make([]byte, 0, len(b)+stampRoom), b...)
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func decodeOne(a api, b []byte) (*engine.Push, error) {
	p := new(engine.Push)
	_, err := newDecoder(testLimits).decode(a, roomy(b), p)
	return p, err
}

func invalid(t testing.TB, err error) *engine.InvalidError {
	t.Helper()
	var e *engine.InvalidError
	if !errors.As(err, &e) {
		t.Fatalf("error = %v, want an InvalidError", err)
	}
	return e
}

func newRequest(a api) proto.Message {
	switch a {
	case toRoom:
		return new(pubsub.PushToRoomRequest)
	case toUser:
		return new(pubsub.PushToUserRequest)
	case toUsers:
		return new(pubsub.PushToUsersRequest)
	case toRooms:
		return new(pubsub.PushToRoomsRequest)
	default:
		return new(pubsub.BroadcastMessageRequest)
	}
}

// fields are the parts of a request as generated code sees them.
func fields(m proto.Message) (room, user string, users, exclude []string, content *pubsub.MessageContent) {
	switch m := m.(type) {
	case *pubsub.PushToRoomRequest:
		return m.RoomId, "", nil, m.ExcludeUserIds, m.Content
	case *pubsub.PushToUserRequest:
		return "", m.UserId, nil, nil, m.Content
	case *pubsub.PushToUsersRequest:
		return "", "", m.UserIds, nil, m.Content
	case *pubsub.PushToRoomsRequest:
		return "", "", nil, m.ExcludeUserIds, m.Content
	case *pubsub.BroadcastMessageRequest:
		return "", "", nil, nil, m.Content
	}
	return
}

// same fails unless p is what generated code makes of the same bytes.
func same(t *testing.T, p *engine.Push, m proto.Message) {
	t.Helper()
	room, user, users, exclude, want := fields(m)
	if p.Room != room || p.User != user || !slices.Equal(p.Users, users) || !slices.Equal(p.Exclude, exclude) {
		t.Fatalf("push = %+v, want what %v has", p, m)
	}
	if rooms, is := m.(*pubsub.PushToRoomsRequest); is && !slices.Equal(p.Rooms.IDs(), rooms.GetRoomIds()) {
		t.Fatalf("rooms %q, want %q", p.Rooms.IDs(), rooms.GetRoomIds())
	}
	sameOptions(t, p.Options, m.(interface{ GetOptions() *pubsub.PushOptions }).GetOptions())
	if p.Content.Present != (want != nil) {
		t.Fatalf("content present = %v, want %v", p.Content.Present, want != nil)
	}
	if want == nil {
		if len(p.Payload) != 0 {
			t.Fatalf("payload %x without content", p.Payload)
		}
		return
	}
	sameFacts(t, p.Content, want)
	if p.Content.InvalidUTF8 {
		t.Fatal("generated code took metadata that the walk calls invalid UTF-8")
	}
	got := new(pubsub.MessageContent)
	if err := proto.Unmarshal(p.Payload, got); err != nil {
		t.Fatalf("payload does not decode: %v", err)
	}
	if want = proto.CloneOf(want); want.Timestamp == 0 {
		if d := time.Now().Unix() - got.Timestamp; d < 0 || d > 60 {
			t.Fatalf("stamped %d, which is %d s ago", got.Timestamp, d)
		}
		want.Timestamp = got.Timestamp
	}
	if !proto.Equal(got, want) {
		t.Fatalf("payload = %v, want %v", got, want)
	}
}

// sameOptions fails unless o says what the options on the wire do.
func sameOptions(t *testing.T, o *engine.Options, want *pubsub.PushOptions) {
	t.Helper()
	if (o != nil) != (want != nil) {
		t.Fatalf("options %+v, want %v", o, want)
	}
	if o == nil {
		return
	}
	made := want.MessageId == "" && want.Offline == pubsub.OfflinePolicy_OFFLINE_STORE
	if !made && o.MessageID != want.MessageId || made && len(o.MessageID) != 36 || o.CollapseKey != want.CollapseKey ||
		o.TTL != time.Duration(want.TtlMs)*time.Millisecond || o.AckTimeout != time.Duration(want.AckTimeoutMs)*time.Millisecond ||
		o.ClientAck != (want.Ack == pubsub.AckPolicy_ACK_CLIENT) || o.Store != (want.Offline == pubsub.OfflinePolicy_OFFLINE_STORE) ||
		o.Async != (want.Receipt == pubsub.ReceiptMode_RECEIPT_ASYNC) || len(o.Filter) != min(len(want.Filter), engine.MaxFilterMatches+1) {
		t.Fatalf("options %+v, want %v", o, want)
	}
	for i, m := range o.Filter { // of what is refused for its length not all is kept
		w := want.Filter[i]
		if m.Key != w.Key || m.Not != w.Not || !slices.Equal(m.Values, w.Values[:min(len(w.Values), engine.MaxFilterValues+1)]) {
			t.Fatalf("filter %+v, want %v", o.Filter, want.Filter)
		}
	}
}

func sameFacts(t *testing.T, f engine.Content, want *pubsub.MessageContent) {
	t.Helper()
	size := 0
	for k, v := range want.Metadata {
		size += len(k) + len(v)
	}
	if f.DataLen != len(want.Data) || f.Timestamp != want.Timestamp ||
		f.MetadataEntries < len(want.Metadata) || f.MetadataBytes < size {
		t.Fatalf("facts = %+v of %d bytes of data, time %d, %d entries with %d bytes",
			f, len(want.Data), want.Timestamp, len(want.Metadata), size)
	}
}

func content(data string) *pubsub.MessageContent {
	return &pubsub.MessageContent{Data: []byte(data), Timestamp: 7}
}

func TestDecodeSeesWhatGeneratedCodeSees(t *testing.T) {
	rich := &pubsub.MessageContent{
		Type: 99, Data: []byte{0, 1, 0xff}, Timestamp: 12, Metadata: map[string]string{"a": "b", "ключ": "", "": "x"},
	}
	for name, test := range map[string]struct {
		api api
		msg proto.Message
	}{
		"room":            {toRoom, &pubsub.PushToRoomRequest{RoomId: "r", Content: rich, ExcludeUserIds: []string{"a", "b", "a"}}},
		"room unstamped":  {toRoom, &pubsub.PushToRoomRequest{RoomId: "r", Content: &pubsub.MessageContent{Data: []byte("x")}, ExcludeUserIds: []string{"a"}}},
		"room, nothing":   {toRoom, &pubsub.PushToRoomRequest{}},
		"user":            {toUser, &pubsub.PushToUserRequest{UserId: "комната", Content: rich}},
		"user unstamped":  {toUser, &pubsub.PushToUserRequest{UserId: "u", Content: &pubsub.MessageContent{Data: []byte("x")}}},
		"user, empty":     {toUser, &pubsub.PushToUserRequest{UserId: "u", Content: &pubsub.MessageContent{}}},
		"users":           {toUsers, &pubsub.PushToUsersRequest{UserIds: []string{"a", "", "c"}, Content: rich}},
		"rooms":           {toRooms, &pubsub.PushToRoomsRequest{RoomIds: []string{"a", "", "c"}, Content: rich, ExcludeUserIds: []string{"x"}}},
		"rooms, many":     {toRooms, &pubsub.PushToRoomsRequest{RoomIds: manyRooms(100), Content: rich}},
		"users unstamped": {toUsers, &pubsub.PushToUsersRequest{UserIds: []string{"a"}, Content: &pubsub.MessageContent{}}},
		"all":             {toAll, &pubsub.BroadcastMessageRequest{Content: rich}},
		"all unstamped":   {toAll, &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Type: 3}}},
		"negative time":   {toAll, &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Timestamp: -1}}},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := decodeOne(test.api, marshal(t, test.msg))
			if err != nil {
				t.Fatal(err)
			}
			if p.Kind != test.api.kind() {
				t.Errorf("kind = %v", p.Kind)
			}
			same(t, p, test.msg)
		})
	}
}

func TestDecodeMergesContentThatComesTwice(t *testing.T) {
	first := marshal(t, &pubsub.MessageContent{Type: 2, Data: []byte("one"), Timestamp: 5, Metadata: map[string]string{"a": "1"}})
	second := marshal(t, &pubsub.MessageContent{Data: []byte("three"), Metadata: map[string]string{"b": "2"}})
	third := []byte{3 << 3, 0} // an explicit timestamp of 0
	b := protowire.AppendBytes([]byte{2<<3 | 2}, first)
	b = protowire.AppendBytes(append(b, 2<<3|2), second)
	b = append(b, 1<<3|2, 1, 'u')
	b = protowire.AppendBytes(append(b, 2<<3|2), third)
	m := new(pubsub.PushToUserRequest)
	if err := proto.Unmarshal(b, m); err != nil {
		t.Fatal(err)
	}
	p, err := decodeOne(toUser, b)
	if err != nil {
		t.Fatal(err)
	}
	same(t, p, m)
	if p.Content.DataLen != 5 || p.Content.MetadataEntries != 2 || p.Content.Timestamp != 0 {
		t.Errorf("facts = %+v", p.Content)
	}
}

func TestDecodeKeepsUnknownFieldsOfContentAndIgnoresThoseOfTheRequest(t *testing.T) {
	c := marshal(t, content("x"))
	c = protowire.AppendString(protowire.AppendTag(c, 77, protowire.BytesType), "later")
	b := protowire.AppendBytes([]byte{1<<3 | 2, 1, 'u', 2<<3 | 2}, c)
	b = protowire.AppendString(protowire.AppendTag(b, 21, protowire.BytesType), "later")
	b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.VarintType), 9) // the id as a number: unknown, too
	p, err := decodeOne(toUser, b)
	if err != nil {
		t.Fatal(err)
	}
	if p.User != "u" || !bytes.Equal(p.Payload, c) {
		t.Errorf("user %q, payload %x, want %x", p.User, p.Payload, c)
	}
}

func TestDecodeDoesNotWriteIntoWhatItReturns(t *testing.T) {
	// The content stands before the ids, so that a stamp behind it would hit them.
	b := protowire.AppendBytes([]byte{2<<3 | 2}, marshal(t, &pubsub.MessageContent{Data: []byte("x")}))
	b = append(b, 1<<3|2, 4, 'r', 'o', 'o', 'm')
	b = append(b, 3<<3|2, 5, 'a', 'l', 'i', 'c', 'e')
	p, err := decodeOne(toRoom, b)
	if err != nil {
		t.Fatal(err)
	}
	if p.Room != "room" || p.Exclude[0] != "alice" {
		t.Fatalf("room %q, exclude %q", p.Room, p.Exclude)
	}
	if cap(p.Payload) != len(p.Payload) {
		t.Error("an append to the payload would write into the request")
	}
}

func TestDecodeRefuses(t *testing.T) {
	entry := func(k, v string) []byte {
		return protowire.AppendString(append(protowire.AppendString([]byte{1<<3 | 2}, k), 2<<3|2), v)
	}
	inContent := func(b ...byte) []byte { return protowire.AppendBytes([]byte{2<<3 | 2}, b) }
	for name, test := range map[string]struct {
		api         api
		wire        []byte
		field, code string
	}{
		"truncated tag":           {toRoom, []byte{0x80}, "request", engine.CodeMalformed},
		"field number 0":          {toRoom, []byte{0x02, 0}, "request", engine.CodeMalformed},
		"field number too large":  {toRoom, []byte{0x80, 0x80, 0x80, 0x80, 0x10, 0}, "request", engine.CodeMalformed},
		"truncated id":            {toRoom, []byte{1<<3 | 2, 5, 'a'}, "room_id", engine.CodeMalformed},
		"truncated user":          {toUsers, []byte{1<<3 | 2, 5, 'a'}, "user_ids", engine.CodeMalformed},
		"truncated content":       {toUser, []byte{2<<3 | 2, 5}, "content", engine.CodeMalformed},
		"truncated data":          {toUser, inContent(2<<3|2, 5), "content.data", engine.CodeMalformed},
		"truncated time":          {toUser, inContent(3<<3, 0xff), "content.timestamp", engine.CodeMalformed},
		"truncated metadata":      {toUser, inContent(4<<3|2, 9), "content.metadata", engine.CodeMalformed},
		"garbage in metadata":     {toUser, inContent(4<<3|2, 1, 0xff), "content.metadata", engine.CodeMalformed},
		"end of no group":         {toUser, []byte{9<<3 | 4}, "request", engine.CodeMalformed},
		"open group":              {toUser, []byte{9<<3 | 3}, "request", engine.CodeMalformed},
		"wire type 7":             {toUser, []byte{9<<3 | 7}, "request", engine.CodeMalformed},
		"room not UTF-8":          {toRoom, []byte{1<<3 | 2, 1, 0xff}, "room_id", engine.CodeIDMalformed},
		"replaced room not UTF-8": {toRoom, []byte{1<<3 | 2, 1, 0xff, 1<<3 | 2, 1, 'r'}, "room_id", engine.CodeIDMalformed},
		"exclude not UTF-8":       {toRoom, []byte{1<<3 | 2, 1, 'r', 3<<3 | 2, 1, 'a', 3<<3 | 2, 1, 0xff}, "exclude_user_ids[1]", engine.CodeIDMalformed},
		"33 metadata entries": {toUser, inContent(bytes.Repeat(protowire.AppendBytes([]byte{4<<3 | 2}, entry("k", "v")), 33)...),
			"content.metadata", engine.CodeTooMany},
		"data three times over": {toUser, inContent(bytes.Repeat(protowire.AppendBytes([]byte{2<<3 | 2}, make([]byte, 120<<10)), 3)...),
			"content", engine.CodeTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := decodeOne(test.api, test.wire)
			if err == nil {
				err = testLimits.Check(&p.Request) // as the engine does
			}
			if e := invalid(t, err); e.Field != test.field || e.Code != test.code {
				t.Errorf("refused as %+v, want field %q, code %q", e, test.field, test.code)
			}
		})
	}
}

func TestDecodeCountsListsAtTheirLimit(t *testing.T) {
	list := func(tag byte, n int) []byte { return bytes.Repeat([]byte{tag, 1, 'a'}, n) }
	for name, test := range map[string]struct {
		api   api
		wire  []byte
		field string
	}{
		"exclude at": {toRoom, list(3<<3|2, 10_000), ""},
		"exclude":    {toRoom, list(3<<3|2, 10_001), "exclude_user_ids"},
		"users at":   {toUsers, list(1<<3|2, 10_000), ""},
		"users":      {toUsers, list(1<<3|2, 10_001), "user_ids"},
		"rooms":      {toRooms, list(1<<3|2, 1_001), "room_ids"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := decodeOne(test.api, test.wire)
			if test.field != "" {
				if e := invalid(t, err); e.Field != test.field || e.Code != engine.CodeTooMany {
					t.Fatalf("refused as %+v", e)
				}
				return
			}
			if err != nil || len(p.Users)+len(p.Exclude) != 10_000 {
				t.Fatalf("%d ids, error %v", len(p.Users)+len(p.Exclude), err)
			}
		})
	}
}

// 2.1 million empty strings: generated code takes 310 ms and 165 MiB.
func TestDecodeRefusesMillionsOfStringsWithoutMakingThem(t *testing.T) {
	d := newDecoder(testLimits)
	for name, test := range map[string]struct {
		api  api
		wire []byte
	}{
		"exclude":  {toRoom, bytes.Repeat([]byte{3<<3 | 2, 0}, 2<<20)},
		"users":    {toUsers, bytes.Repeat([]byte{1<<3 | 2, 0}, 2<<20)},
		"metadata": {toAll, protowire.AppendBytes([]byte{1<<3 | 2}, bytes.Repeat([]byte{4<<3 | 2, 0}, 1<<19))},
	} {
		t.Run(name, func(t *testing.T) {
			best := time.Hour
			refuse := func() {
				began := time.Now()
				if _, err := d.decode(test.api, test.wire, new(engine.Push)); err == nil {
					t.Error("taken")
				}
				best = min(best, time.Since(began))
			}
			allocs := testing.AllocsPerRun(10, refuse)
			for range 500 { // on a busy machine most are interrupted
				if best <= 5*time.Millisecond {
					break
				}
				refuse()
			}
			if best > 5*time.Millisecond {
				t.Errorf("took %v, want 5 ms at most", best)
			}
			if allocs > 10 {
				t.Errorf("%v allocations", allocs)
			}
		})
	}
}

// What cannot be refused by counting has to cost time in proportion to its size.
func TestDecodeOfManyPiecesIsLinear(t *testing.T) {
	d := newDecoder(testLimits)
	pieces := bytes.Repeat([]byte{2<<3 | 2, 2, 2<<3 | 2, 0}, 1<<18) // 262,144 contents with empty data
	if w, err := d.walk(&d.shapes[toUser], pieces); err == nil || len(w.content) != 1<<19 {
		t.Errorf("merged to %d bytes, error %v", len(w.content), err)
	}
	again := bytes.Repeat([]byte{3<<3 | 2, 2, 9 << 3, 0}, 1<<18) // one api 262,144 times, with an unknown field
	if r, err := d.stream(again); err != nil || r.api != toUser || len(r.body) != 1<<19 {
		t.Errorf("merged to %d bytes, error %v", len(r.body), err)
	}
	turns := bytes.Repeat([]byte{2<<3 | 2, 0, 3<<3 | 2, 0}, 1<<18)
	r, err := d.stream(turns)
	if err != nil || r.api != toUser || len(r.body) != 0 {
		t.Errorf("api %v, body %x, error %v", r.api, r.body, err)
	}
}

func TestDecodeAllocates(t *testing.T) {
	d := newDecoder(testLimits)
	stamped := marshal(t, &pubsub.PushToUserRequest{UserId: "u", Content: content("hello")})
	bare := marshal(t, &pubsub.PushToUserRequest{UserId: "u", Content: &pubsub.MessageContent{Data: []byte("hello")}})
	users := marshal(t, &pubsub.PushToUsersRequest{UserIds: []string{"a", "b", "c"}, Content: content("hello")})
	streamed := marshal(t, &pubsub.PushStreamRequest{Id: 1, Push: &pubsub.PushStreamRequest_ToUser{
		ToUser: &pubsub.PushToUserRequest{UserId: "u", Content: &pubsub.MessageContent{Data: []byte("hello")}}}})
	p := new(engine.Push)
	decode := func(a api, b []byte) error {
		_, err := d.decode(a, b, p)
		return err
	}
	for name, test := range map[string]struct {
		run  func() error
		wire []byte
		want float64
	}{
		"stamped by the caller": {func() error { return decode(toUser, roomy(stamped)) }, stamped, 0},
		"stamped here":          {func() error { return decode(toUser, roomy(bare)) }, bare, 0},
		"a list":                {func() error { return decode(toUsers, roomy(users)) }, users, 1},
		"in a stream": {func() error {
			r, err := d.stream(roomy(streamed))
			return errors.Join(err, decode(r.api, r.body))
		}, streamed, 0},
	} {
		t.Run(name, func(t *testing.T) {
			got := testing.AllocsPerRun(100, func() {
				if err := test.run(); err != nil {
					t.Error(err)
				}
			})
			if got != test.want+1 { // one for the copy of the request
				t.Errorf("%v allocations, want %v", got, test.want+1)
			}
		})
	}
}

func TestDecodeStreamEnvelope(t *testing.T) {
	user := &pubsub.PushToUserRequest{UserId: "u", Content: content("x")}
	whole := marshal(t, &pubsub.PushStreamRequest{Id: 7, Push: &pubsub.PushStreamRequest_ToUser{ToUser: user}})
	d := newDecoder(testLimits)
	if r, err := d.stream(whole); err != nil || r.id != 7 || !r.asked || r.api != toUser || !bytes.Equal(r.body, marshal(t, user)) {
		t.Errorf("envelope = %+v, %v", r, err)
	}
	if r, err := d.stream(nil); err != nil || r.asked || !r.whole {
		t.Errorf("empty envelope = %+v, %v", r, err)
	}
	if r, err := d.stream(whole[:len(whole)-1]); err == nil || !r.hasID || r.id != 7 {
		t.Errorf("truncated envelope = %+v, %v", r, err)
	}
	// A member of the oneof that another one replaces must still be well-formed.
	bad := append([]byte{2<<3 | 2, 1, 0xff}, whole...)
	if r, err := d.stream(bad); err == nil || !r.whole || r.id != 7 {
		t.Errorf("envelope with a malformed member = %+v, %v", r, err)
	}
}

func FuzzDecode(f *testing.F) {
	c := &pubsub.MessageContent{Type: 1, Data: []byte("d"), Timestamp: 3, Metadata: map[string]string{"k": "v"}}
	o := &pubsub.PushOptions{
		MessageId: "m", TtlMs: 1 << 20, Ack: pubsub.AckPolicy_ACK_CLIENT, CollapseKey: "k", Priority: pubsub.Priority_PRIORITY_HIGH,
		Receipt: pubsub.ReceiptMode_RECEIPT_ASYNC, AckTimeoutMs: 300,
	}
	filter := &pubsub.PushOptions{Filter: []*pubsub.Match{{Key: "platform", Values: []string{"ios", "web"}}, {Key: "app_version", Values: []string{"1"}, Not: true}}}
	for _, m := range []proto.Message{
		&pubsub.PushToUserRequest{UserId: "u", Content: c, Options: o},
		&pubsub.PushToRoomRequest{RoomId: "r", Content: c, Options: &pubsub.PushOptions{}},
		&pubsub.PushToRoomRequest{RoomId: "r", Content: c, Options: filter},
		&pubsub.BroadcastMessageRequest{Content: c, Options: &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE}},
		&pubsub.PushStreamRequest{Id: 5, Push: &pubsub.PushStreamRequest_ToUsers{ToUsers: &pubsub.PushToUsersRequest{UserIds: []string{"a"}, Content: c, Options: o}}},
		&pubsub.PushToRoomRequest{RoomId: "r", Content: c, ExcludeUserIds: []string{"a", "b"}},
		&pubsub.PushToUserRequest{UserId: "u", Content: &pubsub.MessageContent{}},
		&pubsub.PushToUsersRequest{UserIds: []string{"a", "b"}, Content: c},
		&pubsub.PushToRoomsRequest{RoomIds: manyRooms(40), Content: c, ExcludeUserIds: []string{"a"}},
		&pubsub.PushStreamRequest{Id: 5, Push: &pubsub.PushStreamRequest_ToRooms{ToRooms: &pubsub.PushToRoomsRequest{RoomIds: []string{"a", "b"}, Content: c, Options: o}}},
		&pubsub.BroadcastMessageRequest{Content: c},
		&pubsub.PushStreamRequest{Id: 5, Push: &pubsub.PushStreamRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: c}}},
	} {
		b := marshal(f, m)
		for a := range apis + 1 {
			f.Add(uint8(a), b)
			f.Add(uint8(a), append(bytes.Clone(b), b...))
			f.Add(uint8(a), b[:len(b)-1])
		}
	}
	f.Add(uint8(toRoom), []byte{1<<3 | 2, 1, 0xff})
	f.Add(uint8(toUser), []byte{9<<3 | 3, 1<<3 | 2, 1, 0xff, 9<<3 | 4})
	f.Add(uint8(apis), []byte{2<<3 | 2, 1, 0xff, 3<<3 | 2, 0})
	f.Add(uint8(toAll), []byte{0xa2, 1, 3, 1<<3 | 2, 1, 0xff, 0xa2, 1, 3, 1<<3 | 2, 1, 'a'})
	f.Add(uint8(toAll), []byte{0xa2, 1, 11, 3 << 3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	d := newDecoder(testLimits)
	f.Fuzz(func(t *testing.T, which uint8, b []byte) {
		if which%uint8(apis+1) == uint8(apis) {
			fuzzStream(t, d, b)
			return
		}
		a := api(which % uint8(apis+1))
		m := newRequest(a)
		want := proto.Unmarshal(b, m)
		p := new(engine.Push)
		_, got := d.decode(a, roomy(b), p)
		compare(t, p, m, got, want)
	})
}

func fuzzStream(t *testing.T, d *decoder, b []byte) {
	t.Helper()
	m := new(pubsub.PushStreamRequest)
	want := proto.Unmarshal(b, m)
	p := new(engine.Push)
	r, got := d.stream(roomy(b))
	if r.batch > 0 {
		if got == nil {
			eachInBatch(b, func(push []byte) bool { fuzzStream(t, d, push); return true })
		}
		return
	}
	if got == nil && r.asked {
		_, got = d.decode(r.api, r.body, p)
	}
	if want == nil && got == nil && (r.id != m.Id || r.asked != (m.Push != nil)) {
		t.Fatalf("envelope %+v, want that of %v", r, m)
	}
	var inner proto.Message
	switch push := m.Push.(type) {
	case *pubsub.PushStreamRequest_ToRoom:
		inner = push.ToRoom
	case *pubsub.PushStreamRequest_ToUser:
		inner = push.ToUser
	case *pubsub.PushStreamRequest_ToUsers:
		inner = push.ToUsers
	case *pubsub.PushStreamRequest_ToRooms:
		inner = push.ToRooms
	case *pubsub.PushStreamRequest_Broadcast:
		inner = push.Broadcast
	}
	compare(t, p, inner, got, want)
}

// compare holds the walk to generated code: what generated code refuses, it or the limits
// refuse; it refuses what that takes for a limit only, and else sees the same.
func compare(t *testing.T, p *engine.Push, m proto.Message, got, want error) {
	t.Helper()
	switch {
	case want != nil:
		if got == nil && testLimits.Check(&p.Request) == nil {
			t.Fatalf("took what generated code refuses with %v", want)
		}
	case got != nil:
		if e := invalid(t, got); e.Code != engine.CodeTooMany && e.Code != engine.CodeTooLarge &&
			!(strings.HasPrefix(e.Field, "options.") && e.Code == engine.CodeOutOfRange) {
			t.Fatalf("refused what generated code takes: %v", got)
		}
	case m != nil:
		same(t, p, m)
	}
}
