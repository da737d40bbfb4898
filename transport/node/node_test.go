package node

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

func TestHelloIsAnsweredWithTheNodesLimits(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway(), MaxAudienceMembers: 5, MaxUnacked: 9})
	m := b.mustOpen(t)
	want := &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "node-1", BootId: b.server.BootID(), MaxAudienceMembers: 5, MaxUnacked: 9, OnlineUsers: 7}
	if !proto.Equal(m.reply, want) {
		t.Fatalf("reply %v, want %v", m.reply, want)
	}
	other := serve(t, Config{Sessions: newGateway()})
	if other.server.BootID() == b.server.BootID() || b.server.BootID() == "" {
		t.Fatal("two processes have the same boot id")
	}
}

func TestHelloVersions(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway()})
	for version, want := range map[uint32]codes.Code{0: codes.FailedPrecondition, 1: codes.OK, 2: codes.OK, 3: codes.FailedPrecondition} {
		m, err := b.open(t, &pubsub.Hello{ProtocolVersion: version})
		if status.Code(err) != want {
			t.Errorf("version %d: %v, want %v", version, err, want)
		}
		if err == nil && m.reply.GetProtocolVersion() != 1 {
			t.Errorf("version %d is answered with %d", version, m.reply.GetProtocolVersion())
		}
	}
}

func TestFirstFrameMustBeHelloAlone(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway()})
	for name, first := range map[string]*pubsub.DeliverRequest{
		"no hello":           {Heartbeat: 1},
		"empty":              {},
		"hello and delivery": {Hello: &pubsub.Hello{ProtocolVersion: 1}, FirstSeq: 1, Deliveries: []*pubsub.Delivery{toUsers("x", "u")}},
	} {
		stream, err := b.client.Deliver(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		m := &manager{t: t, stream: stream}
		m.send(first)
		if err := m.wantEnd(codes.FailedPrecondition); err == nil {
			t.Error(name)
		}
	}
}

// What a hello holds is kept for as long as its stream lives, and logged.
func TestHelloIsBounded(t *testing.T) {
	var log bytes.Buffer
	b := serve(t, Config{Sessions: newGateway(), Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if _, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1, ManagerId: strings.Repeat("m", 256), NodeId: strings.Repeat("n", 256)}); err != nil {
		t.Errorf("a hello with long ids: %v", err)
	}
	for _, instance := range []string{"", strings.Repeat("i", maxInstanceBytes+1)} {
		_, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1, ManagerId: strings.Repeat("m", maxHelloBytes), InstanceId: instance})
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("a hello that is too large: %v", err)
		}
	}
	if n := log.Len(); n == 0 || n > maxHelloBytes {
		t.Errorf("%d bytes were logged", n)
	}
}

// mute opens a stream and says nothing on it.
func (b *bench) mute(t *testing.T) *manager {
	t.Helper()
	stream, err := b.client.Deliver(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &manager{t: t, stream: stream, next: 1}
}

func TestStreamWithoutAHelloEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serve(t, Config{Sessions: newGateway()})
		m := b.mute(t)
		began := time.Now()
		_ = m.wantEnd(codes.FailedPrecondition)
		if took := time.Since(began); took != helloTimeout {
			t.Errorf("it ended after %v", took)
		}
		late := b.mute(t)
		time.Sleep(helloTimeout - time.Second)
		late.send(&pubsub.DeliverRequest{Hello: &pubsub.Hello{ProtocolVersion: 1}})
		if late.recv().GetHello() == nil {
			t.Error("a hello that is not too late is not answered")
		}
		time.Sleep(time.Minute) // with a hello a stream may stay
		late.deliver(toUsers("x", "u"))
		late.waitAck(1)
	})
}

// Streams without a hello are bounded, and keep nobody out who says one.
func TestStreamsWithoutAHelloAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 3
		b := serve(t, Config{Sessions: newGateway(), MaxStreams: most})
		var mute []*manager
		for range most + 2 {
			mute = append(mute, b.mute(t))
			synctest.Wait()
		}
		b.server.mu.Lock()
		silent := b.server.silent.Len()
		b.server.mu.Unlock()
		if silent != most {
			t.Errorf("%d streams without a hello are kept, not %d", silent, most)
		}
		began := time.Now()
		b.mustOpen(t)
		for _, m := range mute[:2] { // the oldest
			_ = m.wantEnd(codes.FailedPrecondition)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("all this took %v", took)
		}
	})
}

// Who breaks streams decides how often, not how long the log gets.
func TestBrokenStreamsDoNotFloodTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		b := serve(t, Config{Sessions: newGateway(), Logger: slog.New(slog.NewTextHandler(&log, nil))})
		for range 60 {
			for range 5 {
				_, err := b.open(t, &pubsub.Hello{ProtocolVersion: 9})
				if status.Code(err) != codes.FailedPrecondition {
					t.Fatalf("a hello of another version: %v", err)
				}
			}
			time.Sleep(time.Second)
		}
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		if len(lines) != 6 || !strings.Contains(lines[5], "unreported=49") {
			t.Errorf("%d lines of 300 broken streams in a minute, the last is %s", len(lines), lines[len(lines)-1])
		}
		if n := b.server.count.broken.Get(); n != 300 {
			t.Errorf("%d broken streams are counted", n)
		}
	})
}

func TestDeliveriesToUsersArriveWithTheirContent(t *testing.T) {
	g := newGateway()
	g.absent["gone"], g.full["slow"] = true, true
	m := serve(t, Config{Sessions: g}).mustOpen(t)
	content := &pubsub.MessageContent{Type: 77, Data: []byte{0, 0xff}, Timestamp: 1 << 40, Metadata: map[string]string{"k": "v", "": "e"}}
	m.deliver(
		&pubsub.Delivery{Content: content, RoomId: "r", UserIds: []string{"a", "gone", "b", "slow"}, Traceparent: "tp"},
		&pubsub.Delivery{UserIds: []string{"a"}},
	)
	counts, misses, _ := m.answers(2)
	if diff := cmp.Diff(map[uint64]uint32{1: 2, 2: 1}, counts); diff != "" {
		t.Error(diff)
	}
	if want := (&pubsub.Miss{Seq: 1, NotHere: []string{"gone"}, Failed: []string{"slow"}, Reason: "no connection took it"}); !proto.Equal(misses[1], want) || misses[2] != nil {
		t.Errorf("misses %v", misses)
	}
	got := g.got["b"][0]
	if got != g.got["a"][0] || g.prepared != 2 {
		t.Error("users of one push do not share one prepared message")
	}
	encoded := new(pubsub.MessageContent)
	if err := proto.Unmarshal(got.Encoded, encoded); err != nil || !proto.Equal(encoded, content) {
		t.Errorf("encoded content: %v, %v", encoded, err)
	}
	want := &Message{Type: 77, Data: content.Data, Timestamp: 1 << 40, Metadata: content.Metadata, Encoded: got.Encoded, RoomID: "r", Traceparent: "tp", Prepared: "prepared"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestBroadcastCountsUsers(t *testing.T) {
	g := newGateway()
	g.full["x"] = true
	m := serve(t, Config{Sessions: g}).mustOpen(t)
	m.deliver(&pubsub.Delivery{Content: text("all"), Everybody: true})
	counts, misses, _ := m.answers(1)
	if counts[1] != 7 || misses[1].GetFailedUsers() != 1 {
		t.Errorf("counts %v misses %v", counts, misses)
	}
}

// A user who comes between a heartbeat and a broadcast, and one who goes right after it, are in
// the number that bounds the broadcast's claim.
func TestBroadcastIsAckedWithTheUsersWhoWereThere(t *testing.T) {
	g := newGateway()
	m := serve(t, Config{Sessions: g}).mustOpen(t)
	for i, online := range []int{7, 3, 9} {
		g.mu.Lock()
		g.online, g.leaving = online, i
		g.mu.Unlock()
		m.send(&pubsub.DeliverRequest{FirstSeq: uint64(2*i + 1), Deliveries: []*pubsub.Delivery{{Content: text("all"), Everybody: true}}})
		r := m.recv()
		if len(r.GetAcks()) != 1 || int(r.GetAcks()[0].GetDelivered()[0]) != online || int(r.GetOnlineUsers()) != online {
			t.Errorf("%d users were there: %v", online, r)
		}
		m.send(&pubsub.DeliverRequest{FirstSeq: uint64(2*i + 2), Deliveries: []*pubsub.Delivery{toUsers("x", "u")}})
		if r := m.recv(); len(r.GetAcks()) != 1 || r.GetOnlineUsers() != 0 {
			t.Errorf("an ack of no broadcast: %v", r)
		}
	}
}

func TestAudienceIsDefinedChangedAndForgotten(t *testing.T) {
	g := newGateway()
	b := serve(t, Config{Sessions: g, MaxAudienceMembers: 4})
	m := b.mustOpen(t)
	m.deliver(
		toAudience("1", &pubsub.Audience{Id: 3, Version: 1, RoomId: "room", Join: []string{"a", "b", "c"}}),
		toAudience("2", &pubsub.Audience{Id: 3, Version: 1}, "b"),
		toAudience("3", &pubsub.Audience{Id: 3, Version: 2, Join: []string{"d"}, Leave: []string{"a"}}, "d", "c"),
		toAudience("4", &pubsub.Audience{Id: 3, Version: 2}),
	)
	m.send(&pubsub.DeliverRequest{ForgetAudiences: []uint32{3, 99}})
	m.deliver(toAudience("5", &pubsub.Audience{Id: 4, Version: 1, RoomId: "other", Join: []string{"a", "b", "c", "d"}}))
	counts, misses, _ := m.answers(5)
	if diff := cmp.Diff(map[uint64]uint32{1: 3, 2: 2, 3: 1, 4: 3, 5: 4}, counts); diff != "" || len(misses) > 0 {
		t.Error(diff, misses)
	}
	for user, want := range map[string][]string{"a": {"1", "2", "5"}, "b": {"1", "3", "4", "5"}, "c": {"1", "2", "4", "5"}, "d": {"4", "5"}} {
		if diff := cmp.Diff(want, g.texts(user)); diff != "" {
			t.Errorf("user %s: %s", user, diff)
		}
	}
	if room := g.got["a"][0].RoomID + " " + g.got["a"][2].RoomID; room != "room other" {
		t.Error("rooms: " + room)
	}
	eventually(t, "members gauge is 4", func() bool { return b.server.count.members.Get() == 4 }) // a frame is answered first
	_ = m.stream.CloseSend()
	_ = m.wantEnd(codes.OK)
	eventually(t, "members gauge is 0 again", func() bool { return b.server.count.members.Get() == 0 })
}

func TestBrokenStreams(t *testing.T) {
	define := toAudience("d", &pubsub.Audience{Id: 1, Version: 1, RoomId: "r", Join: []string{"a", "b"}})
	frame := func(first uint64, ds ...*pubsub.Delivery) *pubsub.DeliverRequest {
		return &pubsub.DeliverRequest{FirstSeq: first, Deliveries: ds}
	}
	for name, frames := range map[string][]*pubsub.DeliverRequest{
		"second hello":              {{Hello: &pubsub.Hello{ProtocolVersion: 1}}},
		"first seq 0":               {frame(0, toUsers("x", "a"))},
		"first seq 2":               {frame(2, toUsers("x", "a"))},
		"gap":                       {frame(1, toUsers("x", "a")), frame(3, toUsers("x", "a"))},
		"seq again":                 {frame(1, toUsers("x", "a")), frame(1, toUsers("x", "a"))},
		"no target":                 {frame(1, &pubsub.Delivery{Content: text("x")})},
		"users and everybody":       {frame(1, &pubsub.Delivery{UserIds: []string{"a"}, Everybody: true})},
		"audience and users":        {frame(1, &pubsub.Delivery{UserIds: []string{"a"}, Audience: define.GetAudience()})},
		"audience and everybody":    {frame(1, &pubsub.Delivery{Everybody: true, Audience: define.GetAudience()})},
		"except without audience":   {frame(1, &pubsub.Delivery{UserIds: []string{"a"}, ExceptUserIds: []string{"a"}})},
		"audience not defined":      {frame(1, toAudience("x", &pubsub.Audience{Id: 9, Version: 2}))},
		"audience id 0":             {frame(1, toAudience("x", &pubsub.Audience{Version: 1, Join: []string{"a"}}))},
		"version skipped":           {frame(1, define, toAudience("x", &pubsub.Audience{Id: 1, Version: 3, Join: []string{"c"}}))},
		"version of the past":       {frame(1, define, toAudience("x", &pubsub.Audience{Id: 1, Version: 0}))},
		"version without a change":  {frame(1, define, toAudience("x", &pubsub.Audience{Id: 1, Version: 2}))},
		"change without a version":  {frame(1, define, toAudience("x", &pubsub.Audience{Id: 1, Version: 1, Join: []string{"c"}}))},
		"defined twice":             {frame(1, define, define)},
		"joins again":               {frame(1, define, toAudience("x", &pubsub.Audience{Id: 1, Version: 2, Join: []string{"a"}}))},
		"joins twice in definition": {frame(1, toAudience("x", &pubsub.Audience{Id: 2, Version: 1, Join: []string{"a", "a"}}))},
		"leaves and is no member":   {frame(1, define, toAudience("x", &pubsub.Audience{Id: 1, Version: 2, Leave: []string{"c"}}))},
		"leave in a definition":     {frame(1, toAudience("x", &pubsub.Audience{Id: 2, Version: 1, Leave: []string{"a"}}))},
		"except is no member":       {frame(1, define, toAudience("x", &pubsub.Audience{Id: 1, Version: 1}, "z"))},
		"too many members":          {frame(1, define, toAudience("x", &pubsub.Audience{Id: 2, Version: 1, Join: []string{"a", "b", "c"}}))},
		"too many by a change":      {frame(1, define, toAudience("x", &pubsub.Audience{Id: 1, Version: 2, Join: []string{"c", "d", "e"}}))},
		"forgotten audience":        {frame(1, define), {ForgetAudiences: []uint32{1}}, frame(2, toAudience("x", &pubsub.Audience{Id: 1, Version: 1}, "a"))},
	} {
		t.Run(name, func(t *testing.T) {
			b := serve(t, Config{Sessions: newGateway(), MaxAudienceMembers: 4})
			m := b.mustOpen(t)
			for _, f := range frames {
				m.send(f)
			}
			_ = m.wantEnd(codes.FailedPrecondition)
			if b.server.count.broken.Get() != 1 {
				t.Error("not counted")
			}
		})
	}
}

func TestNodeWithoutAudiencesSaysSo(t *testing.T) {
	m := serve(t, Config{Sessions: newGateway(), MaxAudienceMembers: -1}).mustOpen(t)
	if m.reply.GetMaxAudienceMembers() != 0 {
		t.Error(m.reply)
	}
	m.deliver(toAudience("x", &pubsub.Audience{Id: 1, Version: 1, Join: []string{"a"}}))
	_ = m.wantEnd(codes.FailedPrecondition)
}

func TestWhatWasHandedOverBeforeTheStreamBrokeIsAcked(t *testing.T) {
	m := serve(t, Config{Sessions: newGateway()}).mustOpen(t)
	m.deliver(toUsers("1", "a"), toUsers("2", "a"), &pubsub.Delivery{}, toUsers("4", "a"))
	counts, _, _ := m.answers(2)
	if len(counts) != 2 {
		t.Error(counts)
	}
	_ = m.wantEnd(codes.FailedPrecondition)
}

func TestGarbageBreaksTheStream(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway()})
	stream, err := b.client.Deliver(t.Context(), grpc.ForceCodecV2(rawCodec{newCodec()}))
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, stream: stream}
	if err := stream.SendMsg([]byte("\xff\xff garbage")); err != nil {
		t.Fatal(err)
	}
	_ = m.wantEnd(codes.FailedPrecondition)
}

func TestOrderPerStream(t *testing.T) {
	g := newGateway()
	m := serve(t, Config{Sessions: g}).mustOpen(t)
	const n = 2000
	var want []string
	for i := range n {
		want = append(want, fmt.Sprint(i))
		m.deliver(toUsers(fmt.Sprint(i), "u"))
	}
	_, _, _ = m.answers(n)
	if diff := cmp.Diff(want, g.texts("u")); diff != "" {
		t.Error(diff)
	}
}

func TestAcksOfOneFrameGoOutTogether(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway()})
	m := b.mustOpen(t)
	var ds []*pubsub.Delivery
	for i := range 500 {
		ds = append(ds, toUsers(fmt.Sprint(i), "u"))
	}
	m.deliver(ds...)
	_, _, frames := m.answers(500)
	if frames != 1 {
		t.Errorf("500 acks in %d frames", frames)
	}
	if got := b.server.count.ackFrames.Get(); got != 1 {
		t.Errorf("counted %d ack frames", got)
	}
}

func TestLargeMissesAreSplitByDelivery(t *testing.T) {
	g := newGateway()
	var users []string
	for i := range 1000 {
		u := fmt.Sprintf("user-%060d", i)
		g.absent[u] = true
		users = append(users, u)
	}
	m := serve(t, Config{Sessions: g}).mustOpen(t)
	for range 12 {
		m.deliver(toUsers("x", users...))
	}
	counts, misses, frames := m.answers(12)
	for seq := range counts {
		if counts[seq] != 0 || !slices.Equal(misses[seq].GetNotHere(), users) {
			t.Fatalf("seq %d: %d delivered, %d not here", seq, counts[seq], len(misses[seq].GetNotHere()))
		}
	}
	if frames != 12 {
		t.Errorf("misses of 65 KB each came in %d frames", frames)
	}
}

func TestMissThatFitsIntoNoFrame(t *testing.T) {
	g := newGateway()
	var users []string
	for i := range 20000 {
		u := fmt.Sprintf("user-%0245d", i)
		g.absent[u] = true
		users = append(users, u)
	}
	m := serve(t, Config{Sessions: g}).mustOpen(t)
	m.deliver(toUsers("none is here", users...), toUsers("one is here", append(users, "here")...))
	counts, misses, _ := m.answers(2)
	if !misses[1].GetRefused() || counts[1] != 0 {
		t.Errorf("refused %v, delivered %d", misses[1].GetRefused(), counts[1])
	}
	if n := len(misses[2].GetNotHere()); n < 3000 || n >= 20000 || !strings.Contains(misses[2].GetReason(), "do not fit") || counts[2] != 1 {
		t.Errorf("%d ids, delivered %d, reason %q", n, counts[2], misses[2].GetReason())
	}
	if size := proto.Size(misses[2]); size > 1<<20-ackFrameBytes {
		t.Errorf("%d bytes", size)
	}
}

func TestHeartbeatIsAnsweredBehindReadyAcks(t *testing.T) {
	g := newGateway()
	m := serve(t, Config{Sessions: g}).mustOpen(t)
	m.send(&pubsub.DeliverRequest{Heartbeat: 41})
	if r := m.recv(); r.GetHeartbeat() != 41 || r.GetOnlineUsers() != 7 {
		t.Error(r)
	}
	g.mu.Lock()
	g.online = 8
	g.mu.Unlock()
	m.send(&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{toUsers("x", "u")}, Heartbeat: 42})
	acked := false
	for {
		r := m.recv()
		acked = acked || len(r.GetAcks()) > 0
		if r.GetHeartbeat() == 42 {
			if !acked || r.GetOnlineUsers() != 8 {
				t.Error(r)
			}
			return
		}
	}
}

func TestManagersDrainEndsTheStreamAfterItsAcks(t *testing.T) {
	m := serve(t, Config{Sessions: newGateway()}).mustOpen(t)
	m.send(&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{toUsers("x", "u"), toUsers("y", "u")}, Drain: true})
	counts, _, _ := m.answers(2)
	if len(counts) != 2 {
		t.Error(counts)
	}
	if _, err := m.stream.Recv(); err != io.EOF { //nolint:errorlint // Recv returns it bare.
		t.Error(err)
	}
}

func TestNodesDrain(t *testing.T) {
	g := newGateway()
	b := serve(t, Config{Sessions: g})
	m := b.mustOpen(t)
	m.deliver(toAudience("1", &pubsub.Audience{Id: 1, Version: 1, RoomId: "r", Join: []string{"a"}}))
	_, _, _ = m.answers(1)
	done := make(chan error, 1)
	go func() { done <- b.server.Drain(context.Background()) }()
	if r := m.recv(); !r.GetDrain() {
		t.Fatal(r)
	}
	// This one crosses the notice; heartbeats go on.
	m.send(&pubsub.DeliverRequest{FirstSeq: 2, Deliveries: []*pubsub.Delivery{toAudience("2", &pubsub.Audience{Id: 1, Version: 2, Join: []string{"b"}})}, Heartbeat: 5})
	for beaten, acked := false, false; !beaten || !acked; {
		r := m.recv()
		beaten = beaten || r.GetHeartbeat() == 5
		for _, miss := range r.GetMisses() {
			acked = miss.GetSeq() == 2 && miss.GetRefused() && r.GetAcks()[0].GetDelivered()[0] == 0
		}
	}
	if _, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1}); status.Code(err) != codes.Unavailable {
		t.Errorf("new stream while draining: %v", err)
	}
	if _, err := b.client.PushMessage(t.Context(), &pubsub.PushMessageRequest{UserId: "a", Content: text("x")}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("unary while draining: %v", err)
	}
	select {
	case err := <-done:
		t.Fatalf("drained before the manager closed: %v", err)
	default:
	}
	_ = m.stream.CloseSend()
	_ = m.wantEnd(codes.OK)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"1"}, g.texts("a")); diff != "" {
		t.Error(diff)
	}
	if err := b.server.Drain(context.Background()); err != nil {
		t.Error("again:", err)
	}
}

func TestDrainIsBoundedWithAStuckManager(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serve(t, Config{Sessions: newGateway()})
		_ = b.mustOpen(t) // never closes
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		began := time.Now()
		if err := b.server.Drain(ctx); err == nil || time.Since(began) != 3*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

func TestPanicSettlesTheDeliveryAndNothingElse(t *testing.T) {
	g := newGateway()
	g.explosive["b"], g.explosive["*"] = true, true
	b := serve(t, Config{Sessions: g})
	m := b.mustOpen(t)
	m.deliver(
		toAudience("1", &pubsub.Audience{Id: 1, Version: 1, Join: []string{"a", "b", "c", "d"}}, "c"),
		&pubsub.Delivery{Content: text("2"), Everybody: true},
		toUsers("3", "a"),
	)
	counts, misses, _ := m.answers(3)
	if diff := cmp.Diff(map[uint64]uint32{1: 1, 2: 0, 3: 1}, counts); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"b", "d"}, misses[1].GetFailed()); diff != "" {
		t.Error(diff)
	}
	if misses[2].GetFailedUsers() != 7 {
		t.Error(misses[2])
	}
	if _, err := b.client.PushMessage(t.Context(), &pubsub.PushMessageRequest{UserId: "b", Content: text("x")}); status.Code(err) != codes.ResourceExhausted {
		t.Error(err)
	}
	if got := b.server.count.panics.Get(); got != 3 {
		t.Errorf("%d panics counted", got)
	}
}

func TestUnaryMethods(t *testing.T) {
	g := newGateway()
	g.absent["gone"], g.full["slow"] = true, true
	b := serve(t, Config{Sessions: g, UnaryOnly: true})
	ctx := t.Context()
	if _, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1}); status.Code(err) != codes.Unimplemented {
		t.Errorf("Deliver: %v", err)
	}
	one := func(user string) (*pubsub.PushMessageResponse, error) {
		return b.client.PushMessage(ctx, &pubsub.PushMessageRequest{UserId: user, RoomId: "r", Content: text("x")})
	}
	if r, err := one("a"); err != nil || !r.GetSuccess() {
		t.Error(r, err)
	}
	if r, err := one("gone"); err != nil || r.GetSuccess() || r.GetMessage() == "" {
		t.Error(r, err)
	}
	if _, err := one("slow"); status.Code(err) != codes.ResourceExhausted {
		t.Error(err)
	}
	if _, err := one(""); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
	r, err := b.client.PushMessageBatch(ctx, &pubsub.PushMessageBatchRequest{UserIds: []string{"a", "gone", "slow", "b"}, Content: text("y")})
	if err != nil || r.GetSuccess() || r.GetDeliveredCount() != 2 || !slices.Equal(r.GetFailedUserIds(), []string{"gone"}) || !slices.Equal(r.GetUnreachedUserIds(), []string{"slow"}) {
		t.Error(r, err)
	}
	if _, err := b.client.PushMessageBatch(ctx, &pubsub.PushMessageBatchRequest{Content: text("y")}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("empty user_ids: %v", err)
	}
	if _, err := b.client.PushMessage(ctx, &pubsub.PushMessageRequest{UserId: "a"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no content: %v", err)
	}
	all, err := b.client.Broadcast(ctx, &pubsub.BroadcastRequest{Content: text("z")})
	if err != nil || all.GetDeliveredCount() != 7 || all.GetSuccess() {
		t.Error(all, err)
	}
	if diff := cmp.Diff([]string{"x", "y"}, g.texts("a")); diff != "" {
		t.Error(diff)
	}
	if got := g.got["a"][0]; got.RoomID != "r" || got.Timestamp != 1 {
		t.Error(got)
	}
}

func TestServerWithoutOurCodecStillServes(t *testing.T) {
	g := newGateway()
	b := serve(t, Config{Sessions: g}, grpc.MaxConcurrentStreams(8))
	m := b.mustOpen(t)
	for i := range 3 {
		m.deliver(toAudience(fmt.Sprint(i), &pubsub.Audience{Id: uint32(i + 1), Version: 1, Join: []string{"a"}}))
	}
	counts, _, _ := m.answers(3)
	if len(counts) != 3 || !slices.Equal(g.texts("a"), []string{"0", "1", "2"}) {
		t.Error(counts, g.texts("a"))
	}
}

// TestManagerThatNeverReads sends without reading acks until its stream ends,
// while another manager's stream works on.
func TestManagerThatNeverReads(t *testing.T) {
	g := newGateway()
	var absent []string
	for i := range 100 {
		u := fmt.Sprintf("absent-%0100d", i)
		g.absent[u] = true
		absent = append(absent, u)
	}
	b := serve(t, Config{Sessions: g, FlushTimeout: 10 * time.Millisecond})
	stuck, well := b.mustOpen(t), b.mustOpen(t)
	sending, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for sending.Err() == nil {
			if stuck.stream.Send(&pubsub.DeliverRequest{FirstSeq: stuck.next, Deliveries: []*pubsub.Delivery{toUsers("x", absent...)}}) != nil {
				return
			}
			stuck.next++
		}
	}()
	owed := func() (counts, bytes int) {
		b.server.mu.Lock()
		defer b.server.mu.Unlock()
		for st := range b.server.streams {
			st.acks.mu.Lock()
			counts, bytes = max(counts, len(st.acks.counts)), max(bytes, st.acks.missBytes)
			st.acks.mu.Unlock()
		}
		return counts, bytes
	}
	eventually(t, "acks of the stuck manager pile up", func() bool { _, n := owed(); return n > pendingMissBytes })
	for i := range 100 {
		well.deliver(toUsers(fmt.Sprint(i), "u"))
		well.waitAck(uint64(i) + 1)
	}
	if _, bytes := owed(); bytes > pendingMissBytes+2*ackFrameBytes {
		t.Errorf("%d bytes owed to a manager that does not read", bytes)
	}
	stop()
	b.grpc.Stop()
	<-ended
}

func TestManagerBeyondMaxUnackedIsCutOff(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway(), MaxUnacked: 10})
	m := b.mustOpen(t)
	var ds []*pubsub.Delivery
	for range 11 {
		ds = append(ds, toUsers("x", "u"))
	}
	m.deliver(ds...)
	_ = m.wantEnd(codes.FailedPrecondition)
}

func TestMaxStreams(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway(), MaxStreams: 1})
	_ = b.mustOpen(t)
	if _, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1}); status.Code(err) != codes.ResourceExhausted {
		t.Error(err)
	}
}

func TestConfigReportsAllThatIsWrong(t *testing.T) {
	_, err := New(Config{MaxUnacked: -1, MaxStreams: -1, FlushTimeout: -1})
	for _, field := range []string{"NodeID", "Sessions", "MaxUnacked", "MaxStreams", "FlushTimeout"} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%v does not name %s", err, field)
		}
	}
}

func TestMetricsMove(t *testing.T) {
	set := metrics.NewSet()
	g := newGateway()
	g.absent["gone"] = true
	m := serve(t, Config{Sessions: g, Metrics: set}).mustOpen(t)
	m.deliver(toUsers("x", "a", "gone"))
	_, _, _ = m.answers(1)
	var out bytes.Buffer
	set.WritePrometheus(&out)
	for _, line := range []string{
		"connect_node_deliver_streams 1", "connect_node_deliveries_total 1", "connect_node_ack_frames_total 1",
		`connect_node_users_total{outcome="delivered"} 1`, `connect_node_users_total{outcome="not_here"} 1`,
	} {
		if !strings.Contains(out.String(), line+"\n") {
			t.Errorf("no %q in\n%s", line, out.String())
		}
	}
}

// TestManagersWithKeepaliveStay: a manager's pings every ten seconds, on a connection
// without a call, are no reason to cut it off.
func TestManagersWithKeepaliveStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(Config{NodeID: "node-1", Sessions: newGateway()})
		if err != nil {
			t.Fatal(err)
		}
		gs := grpc.NewServer(ServerOptions()...)
		s.Attach(gs)
		lis := bufconn.Listen(1 << 20)
		var serving sync.WaitGroup
		serving.Go(func() { _ = gs.Serve(lis) })
		var dials atomic.Int32
		conn, err := grpc.NewClient("passthrough:///node",
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second, PermitWithoutStream: true}),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				dials.Add(1)
				return lis.DialContext(ctx)
			}))
		if err != nil {
			t.Fatal(err)
		}
		conn.Connect()
		time.Sleep(5 * time.Minute)
		conn.Connect() // a connection that was cut off is idle until somebody asks
		synctest.Wait()
		if n := dials.Load(); n != 1 {
			t.Errorf("%d connections in five minutes, want 1", n)
		}
		_ = conn.Close()
		gs.Stop()
		serving.Wait()
		s.Close()
	})
}
