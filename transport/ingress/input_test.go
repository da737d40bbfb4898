package ingress

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	methodRoom  = "/pubsub.PushManagerService/PushToRoom"
	methodUser  = "/pubsub.PushManagerService/PushToUser"
	methodUsers = "/pubsub.PushManagerService/PushToUsers"
	methodAll   = "/pubsub.PushManagerService/BroadcastMessage"
)

// TestInput sends what no well-meaning client would, and what is just within the limits.
// What is refused was never looked up.
func TestInput(t *testing.T) {
	w := newWorld(t, nil)
	long, c := strings.Repeat("x", 257), content("hello")
	meta := func(n, size int) *pubsub.MessageContent {
		m := map[string]string{}
		for i := range n {
			m[fmt.Sprintf("k%02d", i)] = strings.Repeat("v", size/n-3)
		}
		return &pubsub.MessageContent{Metadata: m}
	}
	data := func(n int) *pubsub.MessageContent { return &pubsub.MessageContent{Data: make([]byte, n)} }
	ids := func(n int) []string {
		l := make([]string, n)
		for i := range l {
			l[i] = fmt.Sprintf("u%d", i)
		}
		return l
	}
	room := func(id string) proto.Message { return &pubsub.PushToRoomRequest{RoomId: id, Content: c} }
	user := func(id string) proto.Message { return &pubsub.PushToUserRequest{UserId: id, Content: c} }
	entries := func(n int) []byte {
		return protowire.AppendBytes([]byte{1<<3 | 2}, bytes.Repeat([]byte{4<<3 | 2, 0}, n))
	}
	for _, test := range []struct {
		name   string
		method string
		wire   any // bytes or a message
		code   codes.Code
		reason string
		field  string
	}{
		{"empty room", methodRoom, room(""), codes.InvalidArgument, "REQUIRED", "room_id"},
		{"empty user", methodUser, user(""), codes.InvalidArgument, "REQUIRED", "user_id"},
		{"no users", methodUsers, &pubsub.PushToUsersRequest{Content: c}, codes.InvalidArgument, "REQUIRED", "user_ids"},
		{"empty in users", methodUsers, &pubsub.PushToUsersRequest{Content: c, UserIds: []string{"a", "b", "c", ""}}, codes.InvalidArgument, "REQUIRED", "user_ids[3]"},
		{"id at its limit", methodRoom, room(long[1:]), codes.OK, "", ""},
		{"id past its limit", methodRoom, room(long), codes.InvalidArgument, "ID_TOO_LONG", "room_id"},
		{"id of nearly 1 MiB", methodUser, user(strings.Repeat("x", 1<<20-64)), codes.InvalidArgument, "ID_TOO_LONG", "user_id"},
		{"long in exclude", methodRoom, &pubsub.PushToRoomRequest{RoomId: "r", Content: c, ExcludeUserIds: []string{long}}, codes.InvalidArgument, "ID_TOO_LONG", "exclude_user_ids[0]"},
		{"invalid UTF-8", methodRoom, []byte{1<<3 | 2, 2, 'r', 0xff}, codes.InvalidArgument, "ID_MALFORMED", "room_id"},
		{"invalid UTF-8 in users", methodUsers, []byte{1<<3 | 2, 1, 'r', 1<<3 | 2, 1, 0xff}, codes.InvalidArgument, "ID_MALFORMED", "user_ids[1]"},
		{"invalid UTF-8 in metadata", methodAll, []byte{1<<3 | 2, 5, 4<<3 | 2, 3, 1<<3 | 2, 1, 0xff}, codes.InvalidArgument, "MALFORMED", "content.metadata"},
		{"truncated", methodRoom, marshal(t, room("r"))[:5], codes.InvalidArgument, "MALFORMED", "content"},
		{"garbage", methodUser, []byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), codes.InvalidArgument, "MALFORMED", "request"},
		{"NUL", methodRoom, room("a\x00b"), codes.InvalidArgument, "ID_MALFORMED", "room_id"},
		{"newline", methodUser, user("a\nb"), codes.InvalidArgument, "ID_MALFORMED", "user_id"},
		{"ANSI escape", methodUser, user("\x1b[31m"), codes.InvalidArgument, "ID_MALFORMED", "user_id"},
		{"path", methodRoom, room("../../r"), codes.OK, "", ""},
		{"homoglyph", methodRoom, room("аdmin"), codes.OK, "", ""},
		{"no content", methodRoom, &pubsub.PushToRoomRequest{RoomId: "r"}, codes.InvalidArgument, "REQUIRED", "content"},
		{"no content for a user", methodUser, &pubsub.PushToUserRequest{UserId: "a"}, codes.InvalidArgument, "REQUIRED", "content"},
		{"no content for users", methodUsers, &pubsub.PushToUsersRequest{UserIds: []string{"a"}}, codes.InvalidArgument, "REQUIRED", "content"},
		{"nothing at all", methodAll, []byte{}, codes.InvalidArgument, "REQUIRED", "content"},
		{"empty data", methodUser, &pubsub.PushToUserRequest{UserId: "a", Content: data(0)}, codes.OK, "", ""},
		{"data at its limit", methodUser, &pubsub.PushToUserRequest{UserId: "a", Content: data(256 << 10)}, codes.OK, "", ""},
		{"data past its limit", methodUser, &pubsub.PushToUserRequest{UserId: "a", Content: data(256<<10 + 1)}, codes.InvalidArgument, "PAYLOAD_TOO_LARGE", "content.data"},
		{"data of nearly 1 MiB", methodAll, &pubsub.BroadcastMessageRequest{Content: data(1<<20 - 64)}, codes.InvalidArgument, "PAYLOAD_TOO_LARGE", "content.data"},
		{"message of 1 MiB", methodRoom, make([]byte, 1<<20), codes.InvalidArgument, "MALFORMED", "request"},
		{"message past 1 MiB", methodRoom, make([]byte, 1<<20+1), codes.ResourceExhausted, "REQUEST_TOO_LARGE", "request"},
		{"message of 5 MiB", methodRoom, make([]byte, 5<<20), codes.ResourceExhausted, "REQUEST_TOO_LARGE", "request"},
		{"and the connection lives", methodRoom, room("r"), codes.OK, "", ""},
		{"exclude at its limit", methodRoom, &pubsub.PushToRoomRequest{RoomId: "r", Content: c, ExcludeUserIds: ids(10_000)}, codes.OK, "", ""},
		{"exclude past its limit", methodRoom, &pubsub.PushToRoomRequest{RoomId: "r", Content: c, ExcludeUserIds: ids(10_001)}, codes.InvalidArgument, "TOO_MANY", "exclude_user_ids"},
		{"users at their limit", methodUsers, &pubsub.PushToUsersRequest{Content: c, UserIds: ids(10_000)}, codes.OK, "", ""},
		{"users past their limit", methodUsers, &pubsub.PushToUsersRequest{Content: c, UserIds: ids(10_001)}, codes.InvalidArgument, "TOO_MANY", "user_ids"},
		{"1 MiB of empty strings", methodRoom, bytes.Repeat([]byte{3<<3 | 2, 0}, 1<<19), codes.InvalidArgument, "TOO_MANY", "exclude_user_ids"},
		{"unknown enum", methodAll, &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Type: 4711}}, codes.OK, "", ""},
		{"negative timestamp", methodUser, &pubsub.PushToUserRequest{UserId: "a", Content: &pubsub.MessageContent{Timestamp: -1}}, codes.InvalidArgument, "OUT_OF_RANGE", "content.timestamp"},
		{"metadata at its count", methodUser, &pubsub.PushToUserRequest{UserId: "a", Content: meta(32, 320)}, codes.OK, "", ""},
		{"metadata past its count", methodUser, &pubsub.PushToUserRequest{UserId: "a", Content: meta(33, 330)}, codes.InvalidArgument, "TOO_MANY", "content.metadata"},
		{"metadata at its size", methodUser, &pubsub.PushToUserRequest{UserId: "a", Content: meta(32, 8<<10)}, codes.OK, "", ""},
		{"metadata past its size", methodUser, &pubsub.PushToUserRequest{UserId: "a", Content: meta(32, 8<<10+32)}, codes.InvalidArgument, "METADATA_TOO_LARGE", "content.metadata"},
		{"metadata of half a million", methodAll, entries(1<<19 - 16), codes.InvalidArgument, "TOO_MANY", "content.metadata"},
		{"unknown method", "/pubsub.PushManagerService/Nothing", room("r"), codes.Unimplemented, "", ""},
		{"unknown service", "/pubsub.Nothing/PushToRoom", room("r"), codes.Unimplemented, "", ""},
		{"an empty segment", "//PushToRoom", room("r"), codes.Unimplemented, "", ""},
		{"two slashes in front", "/" + methodRoom, room("r"), codes.Unimplemented, "", ""},
		{"message id of 64 bytes", methodUser, withID(strings.Repeat("x", 64)), codes.OK, "", ""},
		{"message id of 65 bytes", methodUser, withID(strings.Repeat("x", 65)), codes.InvalidArgument, "ID_TOO_LONG", "options.message_id"},
		{"message id of 1 MiB", methodUser, withID(strings.Repeat("x", 1<<20-64)), codes.InvalidArgument, "ID_TOO_LONG", "options.message_id"},
		{"message id that is empty", methodUser, withID(""), codes.OK, "", ""},
		{"message id with NUL", methodUser, withID("a\x00b"), codes.InvalidArgument, "ID_MALFORMED", "options.message_id"},
		{"message id with a new line", methodUser, withID("a\n"), codes.InvalidArgument, "ID_MALFORMED", "options.message_id"},
		{"message id with an escape", methodUser, withID("\x1b[31m"), codes.InvalidArgument, "ID_MALFORMED", "options.message_id"},
		{"message id with DEL", methodUser, withID("\x7f"), codes.InvalidArgument, "ID_MALFORMED", "options.message_id"},
		{"message id with C1", methodUser, withID("\u0085"), codes.InvalidArgument, "ID_MALFORMED", "options.message_id"},
		{"message id not UTF-8", methodUser, withID("\xff"), codes.InvalidArgument, "MALFORMED", "options.message_id"},
		{"message id in Greek", methodUser, withID("κόσμος"), codes.OK, "", ""},
		{"garbage as options", methodUser, protowire.AppendBytes(append(marshal(t, user("a")), 0xa2, 1), []byte{0x0a, 9}), codes.InvalidArgument, "MALFORMED", "options"},
		{"unknown fields", methodRoom, protowire.AppendString(append(marshal(t, room("r")), 21<<3&0x7f|2|0x80, 1), "later"), codes.OK, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			wire, is := test.wire.([]byte)
			if !is {
				wire = marshal(t, test.wire.(proto.Message))
			}
			before := w.source.count()
			_, err := w.raw(test.method, wire)
			wantError(t, err, test.code, test.reason, test.field)
			if test.code != codes.OK && w.source.count() != before {
				t.Error("the Controller was asked")
			}
		})
	}
}

// An id that is not valid is refused in each field of each request, alone, on a PushStream and in a batch,
// with the field's name, before anybody is asked about it.
func TestMalformedIDsAreRefusedEverywhere(t *testing.T) {
	w := newWorld(t, nil)
	var streams [2]grpc.ClientStream // one has replies in batches
	for i := range streams {
		var err error
		streams[i], err = w.conn.NewStream(w.context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, pushStreamMethod, grpc.ForceCodecV2(rawCodec{}))
		ok(t, err)
	}
	exchange := func(st grpc.ClientStream, request []byte) *pubsub.PushStreamResponse {
		t.Helper()
		ok(t, st.SendMsg(&request))
		var reply []byte
		ok(t, st.RecvMsg(&reply))
		r := new(pubsub.PushStreamResponse)
		ok(t, proto.Unmarshal(reply, r))
		return r
	}
	for _, test := range []struct {
		name, method, field string
		inStream, id        protowire.Number // the fields of the push and of the id
		before              []byte
	}{
		{"room", methodRoom, "room_id", 2, 1, nil},
		{"exclude", methodRoom, "exclude_user_ids[1]", 2, 3, []byte("\x0a\x01r\x1a\x01a")},
		{"user", methodUser, "user_id", 3, 1, nil},
		{"users", methodUsers, "user_ids[1]", 5, 1, []byte("\x0a\x01a")},
	} {
		for _, id := range []string{"a\xff", "\xc3", "a\x00b", "\n", "\x7f", "\u0085", "\xed\xa0\x80"} {
			t.Run(fmt.Sprintf("%s/%q", test.name, id), func(t *testing.T) {
				push := protowire.AppendTag(bytes.Clone(test.before), test.id, protowire.BytesType)
				push = append(protowire.AppendString(push, id), marshal(t, &pubsub.PushToUserRequest{Content: content("x")})...)
				_, err := w.raw(test.method, push)
				wantError(t, err, codes.InvalidArgument, "ID_MALFORMED", test.field)
				one := protowire.AppendBytes(protowire.AppendTag([]byte{1 << 3, 7}, test.inStream, protowire.BytesType), push)
				r := exchange(streams[0], one)
				wantStatus(t, status.FromProto(r.GetError()), codes.InvalidArgument, "ID_MALFORMED", test.field)
				r = exchange(streams[1], protowire.AppendBytes(protowire.AppendTag(nil, batchField, protowire.BytesType), one))
				if r = r.GetBatch()[0]; r.GetId() != 7 {
					t.Errorf("the answer is to %d", r.GetId())
				}
				wantStatus(t, status.FromProto(r.GetError()), codes.InvalidArgument, "ID_MALFORMED", test.field)
			})
		}
	}
	if n := w.source.count(); n != 0 {
		t.Errorf("the Controller was asked %d times", n)
	}
}

func TestEverybodyExcludedIsASuccessForNobody(t *testing.T) {
	w := newWorld(t, nil)
	r, err := w.client.PushToRoom(w.context(), &pubsub.PushToRoomRequest{
		RoomId: "r", Content: content("x"), ExcludeUserIds: []string{"a", "a", "nobody", "b", "c", "b"}})
	ok(t, err)
	if !r.Success || r.DeliveredCount != 0 || r.Summary == nil || r.Summary.Targets != 0 {
		t.Errorf("reply = %v", r)
	}
	if n := len(w.network.nodes[0].payloads()); n != 0 {
		t.Errorf("%d deliveries", n)
	}
}

func TestPayloadPassesThroughAndIsStamped(t *testing.T) {
	w := newWorld(t, nil)
	in := &pubsub.MessageContent{Type: 4711, Data: []byte{0, 0xff}, Metadata: map[string]string{"k": "v"}}
	_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: in})
	ok(t, err)
	got := new(pubsub.MessageContent)
	ok(t, proto.Unmarshal(w.network.nodes[0].payloads()[0], got))
	if age := time.Now().Unix() - got.Timestamp; age < 0 || age > 60 {
		t.Errorf("stamped %d s ago", age)
	}
	in.Timestamp = got.Timestamp
	if !proto.Equal(in, got) {
		t.Errorf("delivered %v, want %v", got, in)
	}
}

// TestLastOfEqualMetadataKeysCounts: the payload goes on as it came, and who reads it
// finds what the caller said last.
func TestLastOfEqualMetadataKeysCounts(t *testing.T) {
	w := newWorld(t, nil)
	var wire []byte
	for _, value := range []string{"first", "second", "last"} {
		wire = append(wire, marshal(t, &pubsub.MessageContent{Metadata: map[string]string{"k": value}})...)
	}
	_, err := w.raw(methodUser, protowire.AppendBytes(append(protowire.AppendString([]byte{1<<3 | 2}, "d"), 2<<3|2), wire))
	ok(t, err)
	got := new(pubsub.MessageContent)
	ok(t, proto.Unmarshal(w.network.nodes[0].payloads()[0], got))
	if len(got.Metadata) != 1 || got.Metadata["k"] != "last" {
		t.Errorf("delivered %v", got)
	}
}

func TestHeadersOf1MiBAreRefusedAndTheConnectionLives(t *testing.T) {
	w := newWorld(t, nil)
	var dials atomic.Int64
	dial := w.dial
	w.dial = func(ctx context.Context, address string) (net.Conn, error) {
		dials.Add(1)
		return dial(ctx, address)
	}
	conn := w.connect()
	defer conn.Close()
	client := pubsub.NewPushManagerServiceClient(conn)
	_, err := client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
	ok(t, err) // the client has the server's settings now
	ctx := metadata.AppendToOutgoingContext(w.context(), "big", strings.Repeat("x", 1<<20))
	_, err = client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
	wantError(t, err, codes.Internal, "", "")
	ctx = metadata.AppendToOutgoingContext(w.context(), "small", strings.Repeat("x", 15<<10))
	_, err = client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
	ok(t, err)
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	if n := w.metric(`push_manager_api_requests_total{api="PushToUser",status="success"}`); n != "2" {
		t.Errorf("%s pushes arrived, want 2", n)
	}
}

// Who does not keep to the limit loses the call; for one header that is longer by itself, and
// for more than twice of it, gRPC gives up the connection.
func TestHeadersBeyondTheLimitCostTheCallOrTheConnection(t *testing.T) {
	w := newWorld(t, nil)
	for _, test := range []struct {
		headers, size int
		connection    bool
	}{{20, 1 << 10, false}, {1, 20 << 10, true}, {40, 1 << 10, true}} {
		conn, err := w.dial(w.context(), "")
		ok(t, err)
		ok(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		framer := hello(t, conn)
		block := bytes.NewBuffer(headersOf(t, map[string]string{":path": methodUser}))
		enc := hpack.NewEncoder(block)
		for i := range test.headers {
			ok(t, enc.WriteField(hpack.HeaderField{Name: fmt.Sprint("x", i), Value: strings.Repeat("~", test.size), Sensitive: true}))
		}
		part := block.Next(16 << 10)
		ok(t, framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: part, EndHeaders: block.Len() == 0}))
		for block.Len() > 0 {
			part := block.Next(16 << 10)
			_ = framer.WriteContinuation(1, block.Len() == 0, part) // it may be closed already
		}
		reset := false
		for err == nil && !reset {
			var f http2.Frame
			if f, err = framer.ReadFrame(); err == nil {
				reset = f.Header().Type == http2.FrameRSTStream
			}
		}
		if reset == test.connection {
			t.Errorf("%d headers of %d bytes: the call is reset %v, %v", test.headers, test.size, reset, err)
		}
		_ = conn.Close()
	}
}

func TestCompressedRequestsAreUnimplemented(t *testing.T) {
	// gzip is registered in the program, as an OTLP exporter would; it is refused alike.
	if encoding.GetCompressor(gzip.Name) == nil {
		t.Fatal("no gzip")
	}
	w := newWorld(t, nil)
	for _, encoding := range []string{gzip.Name, "unheard-of"} {
		header := h2call(t, w, map[string]string{":path": methodUser, "grpc-encoding": encoding})
		if header["grpc-status"] != "12" {
			t.Errorf("%s: answered %v, want UNIMPLEMENTED", encoding, header)
		}
	}
	header := h2call(t, w, map[string]string{":path": "/pubsub.PushManagerService/PushStream", "grpc-encoding": "gzip"})
	if header["grpc-status"] != "12" {
		t.Errorf("stream: answered %v, want UNIMPLEMENTED", header)
	}
}

func TestMalformedPathIsUnimplemented(t *testing.T) {
	w := newWorld(t, nil)
	for _, path := range []string{"pubsub.PushManagerService/PushToUser", "//", "/", "PushToUser", "/pubsub.PushManagerService//PushToUser"} {
		header := h2call(t, w, map[string]string{":path": path})
		if header["grpc-status"] != "12" {
			t.Errorf("%q: answered %v, want UNIMPLEMENTED", path, header)
		}
	}
	if header := h2call(t, w, map[string]string{":path": methodUser}); header["grpc-status"] != "0" {
		t.Errorf("a good path: answered %v", header)
	}
}

// h2call makes a PushToUser by hand and returns the headers and trailers.
func h2call(t *testing.T, w *world, headers map[string]string) map[string]string {
	t.Helper()
	body := marshal(t, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
	compressed := byte(0)
	if headers["grpc-encoding"] != "" {
		compressed = 1
	}
	return h2callWith(t, w, headers, append([]byte{compressed, 0, 0, 0, byte(len(body))}, body...))
}

// h2callWith makes a call by hand, with these headers and bytes, and returns the headers and
// trailers.
func h2callWith(t *testing.T, w *world, headers map[string]string, message []byte) map[string]string {
	t.Helper()
	conn, err := w.dial(w.context(), "")
	ok(t, err)
	defer conn.Close()
	ok(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	framer := hello(t, conn)
	ok(t, framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headersOf(t, headers), EndHeaders: true}))
	const most = 16 << 10 // of a frame
	for ; len(message) > most; message = message[most:] {
		ok(t, framer.WriteData(1, false, message[:most]))
	}
	ok(t, framer.WriteData(1, true, message))
	return h2read(t, framer)
}

// headersOf encodes the headers of a call, these and those that every call has.
func headersOf(t *testing.T, headers map[string]string) []byte {
	t.Helper()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, name := range []string{":method", ":scheme", ":path", ":authority", "content-type", "te", "grpc-encoding"} {
		value, given := headers[name]
		if !given {
			value = map[string]string{":method": "POST", ":scheme": "http", ":authority": "x", "content-type": "application/grpc", "te": "trailers"}[name]
		}
		if value != "" {
			ok(t, enc.WriteField(hpack.HeaderField{Name: name, Value: value}))
		}
	}
	return block.Bytes()
}

// h2read returns the headers and trailers of the one answer.
func h2read(t *testing.T, framer *http2.Framer) map[string]string {
	t.Helper()
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	got := map[string]string{}
	for got["grpc-status"] == "" {
		f, err := framer.ReadFrame()
		ok(t, err)
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				ok(t, framer.WriteSettingsAck())
			}
		case *http2.MetaHeadersFrame:
			for _, h := range f.Fields {
				got[h.Name] = h.Value
			}
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			t.Fatalf("the call was cut off: %v", f)
		}
	}
	return got
}

func TestErrorsThatTheEngineReports(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*world)
		code   codes.Code
		reason string
	}{
		"controller down": {func(w *world) { w.source.down = true }, codes.Unavailable, "CONTROLLER_UNAVAILABLE"},
		"overloaded":      {func(w *world) { w.fill() }, codes.ResourceExhausted, "OVERLOADED"},
		"engine draining": {func(w *world) { ok(w.t, w.engine.Drain(context.Background())) }, codes.Unavailable, "DRAINING"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(_ *Config, e *engine.Config) { e.MaxInFlight = 1 })
			test.change(w)
			_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
			wantError(t, err, test.code, test.reason, "")
		})
	}
}

// fill keeps a push in flight.
func (w *world) fill() {
	w.network.nodes[0].setKeep(true)
	p := &engine.Push{Request: engine.Request{Kind: engine.ToUser, User: "d", Content: engine.Content{Present: true}}}
	ok(w.t, w.engine.Start(p, nothing{}))
}

type nothing struct{}

func (nothing) Complete(*engine.Push) {}

func TestStatusesThatNoCallerWaitsFor(t *testing.T) {
	table := newStatuses()
	for _, test := range []struct {
		err    error
		code   codes.Code
		reason string
	}{
		{engine.ErrDeadline, codes.DeadlineExceeded, "DEADLINE_EXCEEDED"},
		{engine.ErrCanceled, codes.Canceled, "CANCELLED"},
		{fmt.Errorf("wrapped: %w", engine.ErrUnavailable), codes.Unavailable, "CONTROLLER_UNAVAILABLE"},
		{errPanic, codes.Internal, "INTERNAL"},
		{errMayBeSent, codes.Internal, ""},
		{fmt.Errorf("anything else"), codes.Internal, "INTERNAL"},
	} {
		r := table.of(test.err)
		wantStatus(t, r.status, test.code, test.reason, "")
		wire := new(spb.Status)
		ok(t, proto.Unmarshal(r.wire, wire))
		if !proto.Equal(r.status.Proto(), wire) {
			t.Errorf("%v: encoded as something else", test.err)
		}
	}
}
