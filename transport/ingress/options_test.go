package ingress

import (
	"context"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// withID is a push to the user "a" with a message id, which may be any bytes.
func withID(id string) []byte {
	b := protowire.AppendString([]byte{1<<3 | 2, 1, 'a', 2<<3 | 2, 3, 2<<3 | 2, 1, 'x', 1<<3 | 2}, "a")
	return protowire.AppendBytes(append(b, 0xa2, 1), protowire.AppendString([]byte{1<<3 | 2}, id))
}

func TestOptionsOfEveryRequest(t *testing.T) {
	o := &pubsub.PushOptions{MessageId: "m-1", TtlMs: 60_000, Ack: pubsub.AckPolicy_ACK_CLIENT, CollapseKey: "k", AckTimeoutMs: 300}
	for a, m := range map[api]proto.Message{
		toRoom:  &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x"), ExcludeUserIds: []string{"a"}, Options: o},
		toUser:  &pubsub.PushToUserRequest{UserId: "u", Content: content("x"), Options: o},
		toUsers: &pubsub.PushToUsersRequest{UserIds: []string{"u"}, Content: content("x"), Options: o},
		toAll:   &pubsub.BroadcastMessageRequest{Content: content("x"), Options: o},
	} {
		p, err := decodeOne(a, marshal(t, m))
		ok(t, err)
		same(t, p, m)
		if p.Options.PayloadHash == 0 {
			t.Error("the content has no hash")
		}
	}
	p, err := decodeOne(toUser, marshal(t, &pubsub.PushToUserRequest{UserId: "u", Content: content("x"), Options: &pubsub.PushOptions{}}))
	ok(t, err)
	if p.Options == nil || !reflect.DeepEqual(*p.Options, engine.Options{}) {
		t.Errorf("options that are empty: %+v", p.Options)
	}
}

func TestOptionsThatComeSeveralTimesAreMerged(t *testing.T) {
	option := func(b []byte, o *pubsub.PushOptions) []byte {
		return protowire.AppendBytes(append(b, 0xa2, 1), marshal(t, o))
	}
	b := option(nil, &pubsub.PushOptions{MessageId: "first", TtlMs: 5, Ack: pubsub.AckPolicy_ACK_CLIENT})
	b = append(b, marshal(t, &pubsub.PushToUserRequest{UserId: "u", Content: content("x")})...)
	b = option(b, &pubsub.PushOptions{MessageId: "second", CollapseKey: "k"})
	m := new(pubsub.PushToUserRequest)
	ok(t, proto.Unmarshal(b, m))
	p, err := decodeOne(toUser, b)
	ok(t, err)
	same(t, p, m)
	if o := p.Options; o.MessageID != "second" || o.TTL != 5*time.Millisecond || !o.ClientAck || o.CollapseKey != "k" {
		t.Errorf("merged to %+v", o)
	}
}

func TestOptionsThatAreRefused(t *testing.T) {
	number := func(n protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
	}
	text := func(n protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), s)
	}
	minusOne := uint64(math.MaxUint64)
	for name, test := range map[string]struct {
		options     []byte
		field, code string
	}{
		"ack, unknown":             {number(3, 2), "options.ack", engine.CodeOutOfRange},
		"ack, negative":            {number(3, minusOne), "options.ack", engine.CodeOutOfRange},
		"ack, past an int32":       {number(3, 1<<32), "options.ack", engine.CodeOutOfRange},
		"offline, unknown":         {number(4, 2), "options.offline", engine.CodeOutOfRange},
		"priority, unknown":        {number(6, 5), "options.priority", engine.CodeOutOfRange},
		"priority, negative":       {number(6, minusOne), "options.priority", engine.CodeOutOfRange},
		"receipt, unknown":         {number(7, 2), "options.receipt", engine.CodeOutOfRange},
		"ttl, negative":            {number(2, minusOne), "options.ttl_ms", engine.CodeOutOfRange},
		"ack timeout, negative":    {number(8, minusOne), "options.ack_timeout_ms", engine.CodeOutOfRange},
		"ack timeout, over 60 s":   {number(8, 60_001), "options.ack_timeout_ms", engine.CodeOutOfRange},
		"id, 65 bytes":             {text(1, strings.Repeat("x", 65)), "options.message_id", engine.CodeIDTooLong},
		"id, a control character":  {text(1, "a\tb"), "options.message_id", engine.CodeIDMalformed},
		"id, not UTF-8":            {text(1, "\xff"), "options.message_id", engine.CodeMalformed},
		"id, replaced, not UTF-8":  {append(text(1, "\xff"), text(1, "a")...), "options.message_id", engine.CodeMalformed},
		"key, 65 bytes":            {text(5, strings.Repeat("x", 65)), "options.collapse_key", engine.CodeIDTooLong},
		"key, a control character": {text(5, "\x00"), "options.collapse_key", engine.CodeIDMalformed},
		"key, not UTF-8":           {text(5, "\xc3"), "options.collapse_key", engine.CodeMalformed},
		"receipts of nodes":        {append(text(1, "m"), number(7, 1)...), "options.receipt", engine.CodeRequired},
		"receipts without an id":   {append(number(3, 1), number(7, 1)...), "options.receipt", engine.CodeRequired},
		"truncated":                {[]byte{1<<3 | 2, 9}, "options", engine.CodeMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			b := protowire.AppendBytes([]byte{1<<3 | 2, 1, 'u', 2<<3 | 2, 0, 0xa2, 1}, test.options)
			p, err := decodeOne(toUser, b)
			if err == nil {
				err = testLimits.Check(&p.Request) // as the engine does
			}
			if e := invalid(t, err); e.Field != test.field || e.Code != test.code {
				t.Errorf("refused as %+v, want field %q, code %q", e, test.field, test.code)
			}
			envelope := protowire.AppendBytes([]byte{1 << 3, 7, 3<<3 | 2}, b)
			r, err := newDecoder(testLimits).stream(envelope)
			ok(t, err)
			p = new(engine.Push)
			if _, err = newDecoder(testLimits).decode(r.api, r.body, p); err == nil && testLimits.Check(&p.Request) == nil {
				t.Error("taken on a stream")
			}
		})
	}
}

// A retry is encoded again: its metadata may come in another order, and no time of ours is in it.
func TestTheHashOfAContentIsThatOfItsRetry(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &pubsub.MessageContent{
			Type: pubsub.MessageType(rapid.IntRange(0, 5).Draw(t, "type")), Data: rapid.SliceOf(rapid.Byte()).Draw(t, "data"),
			Metadata: rapid.MapOfN(rapid.StringN(0, 5, -1), rapid.StringN(0, 5, -1), 0, 6).Draw(t, "metadata"),
		}
		var first uint32
		for try := range 10 {
			b, err := proto.Marshal(&pubsub.PushToUserRequest{UserId: "u", Content: c, Options: &pubsub.PushOptions{MessageId: "m"}})
			if err != nil {
				t.Fatal(err)
			}
			p, err := decodeOne(toUser, b)
			if err != nil {
				t.Fatal(err)
			}
			if try == 0 {
				first = p.Options.PayloadHash
			} else if p.Options.PayloadHash != first {
				t.Fatal("the same content has two hashes")
			}
		}
		other := proto.CloneOf(c)
		if rapid.Bool().Draw(t, "in metadata") {
			if other.Metadata == nil {
				other.Metadata = map[string]string{}
			}
			other.Metadata["another"] = "x"
		} else {
			other.Data = append(other.Data, 'x')
		}
		b, err := proto.Marshal(other)
		if err != nil {
			t.Fatal(err)
		}
		if contentHash(b) == first {
			t.Fatal("another content has the same hash")
		}
	})
}

func TestAMessageIDIsMadeForWhatIsToBeStored(t *testing.T) {
	store := &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE}
	b := marshal(t, &pubsub.PushToUserRequest{UserId: "u", Content: content("x"), Options: store})
	ids := map[string]bool{}
	for range 100 {
		p, err := decodeOne(toUser, b)
		ok(t, err)
		id := p.Options.MessageID
		if len(id) != 36 || id[14] != '7' || ids[id] {
			t.Fatalf("made %q", id)
		}
		ids[id] = true
	}
}

// TestAPushWithoutOptionsCostsNothingMore: no allocation, and a reply of the same bytes.
func TestAPushWithoutOptionsCostsNothingMore(t *testing.T) {
	b, d, p := roomy(marshal(t, &pubsub.PushToUserRequest{UserId: "u", Content: content("x")})), newDecoder(testLimits), new(engine.Push)
	if n := testing.AllocsPerRun(100, func() {
		if o, err := d.decode(toUser, b, p); err != nil || o != nil {
			t.Error(o, err)
		}
	}); n != 0 || p.Options != nil {
		t.Errorf("%v allocations, options %+v", n, p.Options)
	}
	// Written down from a program that did not know options.
	res := &engine.Result{Found: true, Targets: 5, Delivered: 2, Offline: 2, Failed: 1, NodeFailures: []engine.NodeFailure{{Node: "n1", Reason: "failed: queue full", Users: 1}}}
	const summary = "R$\b\x05\x10\x02\x18\x02 \x012\x1a\n\x02n1\x12\x12failed: queue full\x18\x01"
	for a, want := range map[api]string{
		toRoom:  "\x10\x02\x1a.delivered to 2 of 5 users: 2 offline, 1 failed" + summary,
		toUser:  "\x124delivered, but not on every node: failed: queue full" + summary,
		toUsers: "\x10\x02\x1a.delivered to 2 of 5 users: 2 offline, 1 failed" + summary,
		toAll:   "\x10\x02\x1aDdelivered to 2 of 5 users: 2 offline, 1 failed, 1 node with failures" + summary,
	} {
		if got := string(newReply(a, p, res).buffer); got != want {
			t.Errorf("%v: %q, want %q", a, got, want)
		}
	}
}

// lookAt has the next push to the user d wait on its node, and returns it.
func (w *world) lookAt(ctx context.Context, o *pubsub.PushOptions) *engine.Delivery {
	w.t.Helper()
	n := w.network.nodes[0]
	n.setKeep(true)
	defer n.setKeep(false)
	done := make(chan error, 1)
	go func() {
		_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: content("x"), Options: o})
		done <- err
	}()
	for n.len() == 0 {
		select {
		case err := <-done:
			w.t.Fatalf("it has ended: %v", err)
		default:
			time.Sleep(time.Millisecond)
		}
	}
	d := n.take()[0]
	defer func() {
		ack(d)
		ok(w.t, <-done)
	}()
	return d
}

func TestPriorityOfOptionsTakesThePlaceOfTheHeader(t *testing.T) {
	for name, test := range map[string]struct {
		header string
		option pubsub.Priority
		most   string
		want   engine.Priority
	}{
		"none":                 {"", 0, "critical", engine.Normal},
		"the header":           {"low", 0, "critical", engine.Low},
		"higher":               {"low", pubsub.Priority_PRIORITY_HIGH, "critical", engine.High},
		"lower":                {"high", pubsub.Priority_PRIORITY_LOW, "critical", engine.Low},
		"normal":               {"high", pubsub.Priority_PRIORITY_NORMAL, "critical", engine.Normal},
		"never above the most": {"", pubsub.Priority_PRIORITY_CRITICAL, "high", engine.High},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(c *Config, _ *engine.Config) { c.PriorityMax = test.most })
			ctx := w.context()
			if test.header != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, "x-priority", test.header)
			}
			if got := w.lookAt(ctx, &pubsub.PushOptions{Priority: test.option}).Priority(); got != test.want {
				t.Errorf("priority %v, want %v", got, test.want)
			}
		})
	}
	t.Run("nor above the caller's", func(t *testing.T) {
		a := newAccess(t, authtest.New(t, policyOf(caller("a", `{methods: ["*"], users: ["*"], rooms: ["*"]}`, ", priority_max: normal"))))
		w := newWorld(t, a.set)
		d := w.lookAt(w.as(a.Token("a", time.Hour)), &pubsub.PushOptions{MessageId: "m", Priority: pubsub.Priority_PRIORITY_CRITICAL})
		if d.Priority() != engine.Normal || d.Options().Sender != "a" {
			t.Errorf("priority %v of %q", d.Priority(), d.Options().Sender)
		}
	})
	t.Run("lower than it was let in as, while that is shed", func(t *testing.T) {
		w := newWorld(t, nil)
		w.engine.Shed(1) // low
		_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x"), Options: &pubsub.PushOptions{Priority: pubsub.Priority_PRIORITY_LOW}})
		wantError(t, err, codes.ResourceExhausted, "OVERLOADED", "")
		w.nothingSent()
	})
}
