package ingress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

type pushStream = grpc.BidiStreamingClient[pubsub.PushStreamRequest, pubsub.PushStreamResponse]

func (w *world) stream(ctx context.Context) pushStream {
	w.t.Helper()
	st, err := w.client.PushStream(ctx)
	ok(w.t, err)
	return st
}

func userPush(id uint64, user, data string) *pubsub.PushStreamRequest {
	return &pubsub.PushStreamRequest{Id: id, Push: &pubsub.PushStreamRequest_ToUser{
		ToUser: &pubsub.PushToUserRequest{UserId: user, Content: content(data)}}}
}

func recv(t *testing.T, st pushStream) *pubsub.PushStreamResponse {
	t.Helper()
	r, err := st.Recv()
	ok(t, err)
	return r
}

// wantEnd fails unless the stream ends with err's code and reason, nothing before.
func wantEnd(t *testing.T, st pushStream, code codes.Code, reason, field string) {
	t.Helper()
	r, err := st.Recv()
	if err == nil {
		t.Fatalf("got the reply %v, want the end", r)
	}
	if code == codes.OK {
		if !errors.Is(err, io.EOF) {
			t.Fatalf("stream ended with %v", err)
		}
		return
	}
	wantError(t, err, code, reason, field)
}

func TestPushStreamAnswersEveryKindAndEndsAfterHalfClose(t *testing.T) {
	w := newWorld(t, nil)
	st := w.stream(w.context())
	for i, push := range []*pubsub.PushStreamRequest{
		{Push: &pubsub.PushStreamRequest_ToRoom{ToRoom: &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x")}}},
		{Push: &pubsub.PushStreamRequest_ToUser{ToUser: &pubsub.PushToUserRequest{UserId: "nobody", Content: content("x")}}},
		{Push: &pubsub.PushStreamRequest_ToUsers{ToUsers: &pubsub.PushToUsersRequest{UserIds: []string{"a", "b"}, Content: content("x")}}},
		{Push: &pubsub.PushStreamRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: content("x")}}},
	} {
		push.Id = uint64(i)
		ok(t, st.Send(push))
	}
	ok(t, st.CloseSend())
	got := map[uint64]*pubsub.PushStreamResponse{}
	for range 4 {
		r := recv(t, st)
		got[r.Id] = r
	}
	wantEnd(t, st, codes.OK, "", "")
	if r := got[0].GetToRoom(); !r.GetSuccess() || r.DeliveredCount != 2 || r.Summary.Offline != 1 {
		t.Errorf("room: %v", got[0])
	}
	if r := got[1].GetToUser(); r == nil || r.Success || r.Message != `user "nobody" is offline` || r.Summary.Offline != 1 {
		t.Errorf("user: %v", got[1])
	}
	if r := got[2].GetToUsers(); !r.GetSuccess() || r.DeliveredCount != 2 {
		t.Errorf("users: %v", got[2])
	}
	if r := got[3].GetBroadcast(); !r.GetSuccess() || r.TotalDelivered != 6 {
		t.Errorf("broadcast: %v", got[3])
	}
}

func TestPushStreamStartsInOrderAndAnswersOutOfOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		n1 := w.network.nodes[0]
		n1.setKeep(true)
		st := w.stream(w.context())
		for i := range 500 {
			ok(t, st.Send(userPush(uint64(i), "d", fmt.Sprint(i))))
		}
		ok(t, st.Send(userPush(1000, "b", "x")))
		if r := recv(t, st); r.Id != 1000 {
			t.Fatalf("first reply is %d, want that of the other node", r.Id)
		}
		synctest.Wait()
		for i, p := range n1.payloads() {
			c := new(pubsub.MessageContent)
			ok(t, proto.Unmarshal(p, c))
			if string(c.Data) != fmt.Sprint(i) {
				t.Fatalf("push %d has %q", i, c.Data)
			}
		}
		kept := n1.take()
		if len(kept) != 500 {
			t.Fatalf("%d pushes with the node", len(kept))
		}
		slices.Reverse(kept)
		for _, d := range kept {
			ack(d)
			synctest.Wait() // one completion at a time, so that their order is known
		}
		for i := range 500 {
			if r := recv(t, st); r.Id != uint64(499-i) || !r.GetToUser().GetSuccess() {
				t.Fatalf("reply %v, want id %d", r, 499-i)
			}
		}
		ok(t, st.CloseSend())
		wantEnd(t, st, codes.OK, "", "")
	})
}

func TestPushStreamIsNotReadPastItsBound(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"pushes": func(c *Config) { c.StreamInflight = 4 },
		"bytes":  func(c *Config) { c.StreamInflightBytes = 4096 }, // four of 1 KiB and the rest
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(c *Config, _ *engine.Config) { change(c) })
				n1 := w.network.nodes[0]
				n1.setKeep(true)
				st := w.stream(w.context())
				sent := make(chan error, 1)
				go func() { sent <- sendMany(st, 100, "d", strings.Repeat("x", 1024)) }()
				answered := 0
				for answered < 100 {
					synctest.Wait()
					kept := n1.take()
					if len(kept) != 4 {
						t.Fatalf("%d in flight after %d, want 4", len(kept), answered)
					}
					for _, d := range kept {
						ack(d)
						recv(t, st)
						answered++
					}
				}
				ok(t, <-sent)
				wantEnd(t, st, codes.OK, "", "")
			})
		})
	}
}

func sendMany(st pushStream, n int, user, data string) error {
	for i := range n {
		if err := st.Send(userPush(uint64(i), user, data)); err != nil {
			return err
		}
	}
	return st.CloseSend()
}

func TestPushStreamOfClientThatDoesNotReadIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.StreamInflight = 64 })
		st := w.stream(w.context())
		sent := make(chan error, 1)
		offline := strings.Repeat("x", 256) // makes large replies
		go func() { sent <- sendMany(st, 5000, offline, "x") }()
		synctest.Wait()
		if n := w.metric(`push_manager_api_requests_total{api="PushToUser",status="failed"}`); len(n) > 3 {
			t.Errorf("%s pushes done for a client that reads no reply", n)
		}
		for range 5000 {
			if r := recv(t, st); r.GetToUser() == nil {
				t.Fatalf("reply %v", r)
			}
		}
		ok(t, <-sent)
		wantEnd(t, st, codes.OK, "", "")
	})
}

func TestPushStreamAnswersWhatItRefuses(t *testing.T) {
	w := newWorld(t, nil)
	st, err := w.conn.NewStream(w.context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
		"/pubsub.PushManagerService/PushStream", grpc.ForceCodecV2(rawCodec{}))
	ok(t, err)
	for _, test := range []struct {
		name          string
		wire          []byte
		reason, field string
	}{
		{"no push", marshal(t, &pubsub.PushStreamRequest{Id: 7}), "REQUIRED", "push"},
		{"empty id", marshal(t, userPush(7, "", "x")), "REQUIRED", "user_id"},
		{"no content", marshal(t, &pubsub.PushStreamRequest{Id: 7, Push: &pubsub.PushStreamRequest_Broadcast{
			Broadcast: &pubsub.BroadcastMessageRequest{}}}), "REQUIRED", "content"},
		{"truncated behind the id", marshal(t, userPush(7, "u", "x"))[:6], "MALFORMED", "request"},
		{"malformed push before the id", []byte{3<<3 | 2, 1, 0xff, 1 << 3, 7}, "MALFORMED", "request"},
		{"invalid UTF-8", []byte{1 << 3, 7, 3<<3 | 2, 3, 1<<3 | 2, 1, 0xff}, "ID_MALFORMED", "user_id"},
	} {
		ok(t, st.SendMsg(&test.wire))
		var reply []byte
		ok(t, st.RecvMsg(&reply))
		r := new(pubsub.PushStreamResponse)
		ok(t, proto.Unmarshal(reply, r))
		if r.Id != 7 || r.Result != nil || r.Error == nil {
			t.Fatalf("%s: reply %v", test.name, r)
		}
		wantStatus(t, status.FromProto(r.Error), codes.InvalidArgument, test.reason, test.field)
	}
	good := marshal(t, userPush(8, "a", "x"))
	ok(t, st.SendMsg(&good))
	var reply []byte
	ok(t, st.RecvMsg(&reply))

	garbage := []byte{0xff}
	ok(t, st.SendMsg(&garbage))
	wantError(t, st.RecvMsg(&reply), codes.InvalidArgument, "MALFORMED", "request")
	if n := w.metric("push_manager_stream_malformed_total"); n != "3" {
		t.Errorf("%s malformed messages counted, want 3", n)
	}
}

func TestPushStreamDrains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.network.nodes[0].setKeep(true)
		busy, idle := w.stream(w.context()), w.stream(w.context())
		ok(t, busy.Send(userPush(1, "d", "x")))
		ok(t, idle.Send(userPush(1, "b", "x")))
		recv(t, idle)
		synctest.Wait()

		drained := make(chan error, 1)
		go func() { drained <- w.server.Drain(w.context()) }()
		wantEnd(t, idle, codes.Unavailable, "DRAINING", "")
		_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
		wantError(t, err, codes.Unavailable, "DRAINING", "")
		_, err = w.stream(w.context()).Recv()
		wantError(t, err, codes.Unavailable, "DRAINING", "")

		synctest.Wait()                         // the busy stream knows, too
		ok(t, busy.Send(userPush(2, "b", "x"))) // too late: dropped before anything is done
		synctest.Wait()
		select {
		case err := <-drained:
			t.Fatalf("drained with a push in flight: %v", err)
		default:
		}
		w.network.ackAll()
		if r := recv(t, busy); r.Id != 1 || !r.GetToUser().GetSuccess() {
			t.Errorf("reply %v", r)
		}
		wantEnd(t, busy, codes.Unavailable, "DRAINING", "")
		ok(t, <-drained)
		if n := len(w.network.nodes[1].payloads()); n != 1 {
			t.Errorf("%d deliveries to the other node, want 1", n)
		}
	})
}

func TestDrainIsBoundedByItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.network.nodes[0].setKeep(true)
		st := w.stream(w.context())
		ok(t, st.Send(userPush(1, "d", "x")))
		unary := make(chan error, 1)
		go func() {
			_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
			unary <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		began := time.Now()
		if err := w.server.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Drain returned %v", err)
		}
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("Drain took %v", took)
		}
		for _, err := range []error{<-unary, func() error { _, err := st.Recv(); return err }()} {
			wantError(t, err, codes.Unavailable, "", "") // bare: it may have been sent
		}
	})
}

func TestPushStreamThatIsCancelledIsStillCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.network.nodes[0].setKeep(true)
		ctx, cancel := context.WithCancel(w.context())
		st := w.stream(ctx)
		for i := range 3 {
			ok(t, st.Send(userPush(uint64(i), "d", "x")))
		}
		synctest.Wait()
		if n := w.metric("push_manager_api_streams"); n != "1" {
			t.Errorf("%s streams", n)
		}
		cancel()
		synctest.Wait()
		if n := w.metric("push_manager_api_streams"); n != "0" {
			t.Errorf("%s streams after the cancel", n)
		}
		w.network.ackAll()
		synctest.Wait()
		for series, want := range map[string]string{
			`push_manager_api_requests_total{api="PushToUser",status="success"}`: "3",
			"push_manager_push_total":   "3",
			"push_manager_api_inflight": "0",
		} {
			if got := w.metric(series); got != want {
				t.Errorf("%s = %s, want %s", series, got, want)
			}
		}
	})
}

func TestPushStreamPanicIsAnsweredAndTheStreamLives(t *testing.T) {
	inTrace := func(c *Config, _ *engine.Config) {
		c.Trace = func(context.Context, string) (engine.Trace, func(engine.Result, error)) { panic("trace") }
	}
	for name, test := range map[string]struct {
		change func(*Config, *engine.Config)
		panics string // of ours: the engine counts its own
	}{
		"before the engine": {inTrace, "2"},
		"in the engine":     {nil, "0"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, test.change)
			st := w.stream(w.context())
			if test.change == nil {
				ok(t, st.Send(userPush(1, "d", "x"))) // brings the route into the cache
				recv(t, st)
				w.network.panic = true
			}
			for i := range uint64(2) {
				ok(t, st.Send(userPush(i, "d", "x")))
				r := recv(t, st)
				if r.Id != i {
					t.Fatalf("reply %v", r)
				}
				wantStatus(t, status.FromProto(r.Error), codes.Internal, "INTERNAL", "")
			}
			ok(t, st.CloseSend())
			wantEnd(t, st, codes.OK, "", "")
			if n := w.metric(`push_manager_panics_total{part="ingress"}`); n != test.panics {
				t.Errorf("%s panics counted", n)
			}
		})
	}
}

func batchOf(pushes ...*pubsub.PushStreamRequest) *pubsub.PushStreamRequest {
	return &pubsub.PushStreamRequest{Batch: pushes}
}

// recvBatched gathers n replies, which all have to come in batches.
func recvBatched(t *testing.T, st pushStream, n int) []*pubsub.PushStreamResponse {
	t.Helper()
	var all []*pubsub.PushStreamResponse
	for len(all) < n {
		r := recv(t, st)
		if len(r.Batch) == 0 || r.Id != 0 || r.Result != nil || r.Error != nil {
			t.Fatalf("not a batch alone: %v", r)
		}
		all = append(all, r.Batch...)
	}
	if len(all) > n {
		t.Fatalf("%d replies, want %d", len(all), n)
	}
	return all
}

func TestPushStreamBatchIsManyPushesInOrder(t *testing.T) {
	w := newWorld(t, nil)
	n1 := w.network.nodes[0]
	st := w.stream(w.context())
	var sent []string
	next := func() *pubsub.PushStreamRequest {
		sent = append(sent, fmt.Sprint(len(sent)))
		return userPush(uint64(len(sent)), "d", sent[len(sent)-1])
	}
	for range 5 { // what is answered is used again, so it has to be right more than once
		var batch []*pubsub.PushStreamRequest
		for range 300 {
			batch = append(batch, next())
		}
		ok(t, st.Send(batchOf(batch...)))
		ok(t, st.Send(next()))
		ids := map[uint64]bool{}
		for _, r := range recvBatched(t, st, 301) {
			if !r.GetToUser().GetSuccess() || ids[r.Id] {
				t.Fatalf("reply %v", r)
			}
			ids[r.Id] = true
		}
	}
	ok(t, st.CloseSend())
	wantEnd(t, st, codes.OK, "", "")
	got := n1.payloads()
	if len(got) != len(sent) {
		t.Fatalf("%d pushes arrived, want %d", len(got), len(sent))
	}
	for i, p := range got {
		c := new(pubsub.MessageContent)
		ok(t, proto.Unmarshal(p, c))
		if string(c.Data) != sent[i] || c.Timestamp == 0 {
			t.Fatalf("push %d has %q, stamped %d", i, c.Data, c.Timestamp)
		}
	}
	if n := w.metric(`push_manager_api_requests_total{api="PushToUser",status="success"}`); n != fmt.Sprint(len(sent)) {
		t.Errorf("%s pushes counted", n)
	}
}

func TestPushStreamBatchAnswersEachOfItsPushes(t *testing.T) {
	w := newWorld(t, nil)
	st := w.stream(w.context())
	ok(t, st.Send(batchOf(
		userPush(1, "d", "x"), userPush(2, "", "x"), &pubsub.PushStreamRequest{Id: 3},
		&pubsub.PushStreamRequest{Id: 4, Batch: []*pubsub.PushStreamRequest{userPush(5, "d", "x")}},
		userPush(6, "nobody", "x"),
	)))
	ok(t, st.CloseSend())
	got := map[uint64]*pubsub.PushStreamResponse{}
	for _, r := range recvBatched(t, st, 5) {
		got[r.Id] = r
	}
	wantEnd(t, st, codes.OK, "", "")
	if !got[1].GetToUser().GetSuccess() || got[6].GetToUser().GetSummary().GetOffline() != 1 {
		t.Errorf("replies %v", got)
	}
	wantStatus(t, status.FromProto(got[2].GetError()), codes.InvalidArgument, "REQUIRED", "user_id")
	wantStatus(t, status.FromProto(got[3].GetError()), codes.InvalidArgument, "REQUIRED", "push")
	wantStatus(t, status.FromProto(got[4].GetError()), codes.InvalidArgument, "MALFORMED", "batch")
}

func TestPushStreamBatchThatCannotBeToldApartEndsTheStream(t *testing.T) {
	push := userPush(0, "d", "x")
	many := batchOf()
	for range batchMax + 1 {
		many.Batch = append(many.Batch, push)
	}
	for name, test := range map[string]struct {
		m      *pubsub.PushStreamRequest
		reason string
	}{
		"with an id":  {&pubsub.PushStreamRequest{Id: 1, Batch: []*pubsub.PushStreamRequest{push}}, "MALFORMED"},
		"with a push": {&pubsub.PushStreamRequest{Push: push.Push, Batch: []*pubsub.PushStreamRequest{push}}, "MALFORMED"},
		"too many":    {many, "TOO_MANY"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			st := w.stream(w.context())
			ok(t, st.Send(test.m))
			wantEnd(t, st, codes.InvalidArgument, test.reason, "batch")
			if n := len(w.network.nodes[0].payloads()); n != 0 {
				t.Errorf("%d pushes were sent", n)
			}
		})
	}
}

func TestPushStreamAnswersWhatStoodBeforeGarbageInABatch(t *testing.T) {
	w := newWorld(t, nil)
	st, err := w.conn.NewStream(w.context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
		"/pubsub.PushManagerService/PushStream", grpc.ForceCodecV2(rawCodec{}))
	ok(t, err)
	good := marshal(t, batchOf(userPush(1, "d", "x"), userPush(2, "d", "x")))
	wire := append(slices.Clone(good), byte(batchField)<<3|2, 1, 0xff) // a push that is no message
	wire = append(wire, good...)
	ok(t, st.SendMsg(&wire))
	for answered := 0; answered < 2; {
		var reply []byte
		ok(t, st.RecvMsg(&reply))
		r := new(pubsub.PushStreamResponse)
		ok(t, proto.Unmarshal(reply, r))
		answered += len(r.Batch)
	}
	var reply []byte
	wantError(t, st.RecvMsg(&reply), codes.InvalidArgument, "MALFORMED", "request")
}

// Replies go into a batch until it is full; the last of them may be a large one.
func TestPushStreamBatchOfLargeReplies(t *testing.T) {
	w := newWorld(t, nil)
	st := w.stream(w.context())
	b := batchOf()
	for i := range 500 {
		b.Batch = append(b.Batch, userPush(uint64(i), strings.Repeat("ы", 128), "x")) // its name stands in the reply
	}
	ok(t, st.Send(b))
	ok(t, st.CloseSend())
	for _, r := range recvBatched(t, st, 500) {
		if !strings.Contains(r.GetToUser().GetMessage(), "is offline") {
			t.Fatalf("reply %v", r)
		}
	}
	wantEnd(t, st, codes.OK, "", "")
}

// What a burst has needed is not kept for the life of the stream, however large the
// pushes are that come after it.
func TestPushStreamKeepsLittleOfABurst(t *testing.T) {
	w := newWorld(t, nil)
	w.network.discard()
	n1 := w.network.nodes[0]
	n1.setKeep(true)
	st := w.stream(w.context())
	const burst = 1000
	for i := range burst {
		ok(t, st.Send(userPush(uint64(i), "d", "x")))
	}
	for n1.len() < burst { // all are in flight at once
		time.Sleep(time.Millisecond)
	}
	w.network.ackAll()
	for range burst {
		recv(t, st)
	}
	before := heap()
	large := userPush(1, "d", strings.Repeat("x", 60<<10))
	for range burst / 2 { // 30 MiB, if all were kept
		ok(t, st.Send(large))
		recv(t, st)
	}
	if grown := heap() - before; grown > 8<<20 {
		t.Errorf("the idle stream holds %d KiB more than before", grown>>10)
	}
	ok(t, st.CloseSend())
	wantEnd(t, st, codes.OK, "", "")
}

// heap is what is in use, garbage left aside.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools have kept through the first
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
