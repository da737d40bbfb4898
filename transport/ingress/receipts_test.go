package ingress

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

type watchStream = grpc.ServerStreamingClient[pubsub.WatchReceiptsResponse]

// watch watches from behind a position, and returns when the server knows.
func (w *world) watch(ctx context.Context, after string) watchStream {
	w.t.Helper()
	before := w.metric("push_manager_receipt_watchers")
	st, err := w.client.WatchReceipts(ctx, &pubsub.WatchReceiptsRequest{After: after})
	ok(w.t, err)
	w.wait("the watch is open", func() bool { return w.metric("push_manager_receipt_watchers") != before })
	time.Sleep(10 * time.Millisecond) // so that it looks from now on
	return st
}

// pushAsync pushes to the user d and returns the delivery, which awaits a receipt.
func (w *world) pushAsync(ctx context.Context, id string) *engine.Delivery {
	w.t.Helper()
	n := w.network.nodes[0]
	n.setKeep(true)
	done := make(chan *pubsub.PushToUserResponse, 1)
	go func() {
		r, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: content("x"), Options: &pubsub.PushOptions{
			MessageId: id, Ack: pubsub.AckPolicy_ACK_CLIENT, Receipt: pubsub.ReceiptMode_RECEIPT_ASYNC, AckTimeoutMs: 30_000}})
		if err != nil {
			w.t.Error(err)
		}
		done <- r
	}()
	w.wait("it is sent", func() bool { return n.len() == 1 })
	d := n.take()[0]
	if !d.TrySend() {
		w.t.Fatal("it has ended")
	}
	if _, err := d.Ack(engine.Ack{Delivered: 1, Pending: 1}); err != nil {
		w.t.Fatal(err)
	}
	if r := <-done; r.GetSummary().GetMessageId() != id || r.GetSummary().GetAcked() != 0 {
		w.t.Errorf("answered %v", r)
	}
	return d
}

func nextReceipt(t *testing.T, st watchStream) *pubsub.WatchReceiptsResponse {
	t.Helper()
	r, err := st.Recv()
	ok(t, err)
	return r
}

func TestReceiptsComeToWhoeverWatches(t *testing.T) {
	w := newWorld(t, nil)
	st := w.watch(w.context(), "")
	ok(t, w.pushAsync(w.context(), "m-1").Receipt(1, nil, true))
	first := nextReceipt(t, st)
	r := first.Receipt
	if r.MessageId != "m-1" || r.Target != "user:d" || !r.Final || len(r.UnackedUserIds) != 0 ||
		r.Summary.GetDelivered() != 1 || r.Summary.GetAcked() != 1 || r.Summary.GetMessageId() != "m-1" || time.Since(r.At.AsTime()) > time.Minute {
		t.Errorf("the first receipt is %v", first)
	}
	ok(t, w.pushAsync(w.context(), "m-2").Receipt(0, []string{"d"}, true))
	if r := nextReceipt(t, st).Receipt; r.MessageId != "m-2" || r.Summary.GetUnknown() != 1 || !slices.Equal(r.UnackedUserIds, []string{"d"}) {
		t.Errorf("the second receipt is %v", r)
	}
	// Whoever comes back goes on where it was.
	if r := nextReceipt(t, w.watch(w.context(), first.Position)); r.Receipt.MessageId != "m-2" {
		t.Errorf("from behind the first: %v", r)
	}
	if n := w.metric("push_manager_push_acked_total"); n != "1" {
		t.Errorf("%s are counted as acknowledged", n)
	}
	// What clients have confirmed is known: a retry is answered. What they have not is sent again.
	for id, duplicates := range map[string]int32{"m-1": 1, "m-2": 0} {
		w.network.nodes[0].setKeep(false)
		reply, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x"), Options: &pubsub.PushOptions{
			MessageId: id, Ack: pubsub.AckPolicy_ACK_CLIENT, Receipt: pubsub.ReceiptMode_RECEIPT_ASYNC}})
		ok(t, err)
		wantSummary(t, reply.Summary, 1, duplicates, id)
	}
}

func TestPositionsThatAreNone(t *testing.T) {
	w := newWorld(t, nil)
	epoch, _, _ := strings.Cut(w.ring().position(0), "-")
	for after, want := range map[string]struct {
		code          codes.Code
		reason, field string
	}{
		"x":                                    {codes.InvalidArgument, "MALFORMED", "after"},
		"-":                                    {codes.InvalidArgument, "MALFORMED", "after"},
		epoch + "-":                            {codes.InvalidArgument, "MALFORMED", "after"},
		epoch + "-zzzzzz":                      {codes.InvalidArgument, "MALFORMED", "after"}, // nobody has had it
		epoch + "-" + strings.Repeat("z", 100): {codes.InvalidArgument, "MALFORMED", "after"},
		"abc-1":                                {codes.OutOfRange, "RECEIPTS_GONE", ""}, // of another instance
		"s.abc.1":                              {codes.OutOfRange, "RECEIPTS_GONE", ""}, // of a store
		strings.Repeat("x", 5000):              {codes.InvalidArgument, "PAYLOAD_TOO_LARGE", "request"},
	} {
		st, err := w.client.WatchReceipts(w.context(), &pubsub.WatchReceiptsRequest{After: after})
		ok(t, err)
		_, err = st.Recv()
		wantError(t, err, want.code, want.reason, want.field)
	}
	_, err := w.raw("/pubsub.PushManagerService/WatchReceipts", []byte{0x0a, 9})
	wantError(t, err, codes.InvalidArgument, "MALFORMED", "request")
}

// ring is the log of a server without a store.
func (w *world) ring() *receiptRing { return w.server.receipts.log.(*receiptRing) }

// TestReceiptsAreBounded: each sender's by their number, all by their bytes, and the largest log pays.
func TestReceiptsAreBounded(t *testing.T) {
	r := newReceiptRing(10, 50*(receiptCost+100), metrics.NewSet())
	r.Append("small", "m", make([]byte, 100))
	for i := range 30 {
		r.Append("a", "m", []byte{byte(i)})
	}
	if some, _, err := r.next("a", r.end("a")-10); err != nil || len(some) != 10 || some[0][0] != 20 {
		t.Errorf("%v, %v", some, err)
	}
	if _, _, err := r.next("a", 0); !errors.Is(err, ErrReceiptsGone) {
		t.Errorf("behind the log: %v", err)
	}
	for i := range 20 {
		for range 10 {
			r.Append(fmt.Sprint("sender ", i), "m", make([]byte, 100))
		}
		if r.taken > r.bytes {
			t.Fatalf("%d bytes", r.taken)
		}
	}
	if some, _, err := r.next("small", 0); err != nil || len(some) != 1 {
		t.Errorf("of the sender with one receipt: %v, %v", some, err)
	}
	kept, bytes := 0, 0
	for _, l := range r.logs {
		kept, bytes = kept+len(l.kept), bytes+l.bytes
	}
	if kept != r.kept || bytes != r.taken {
		t.Errorf("%d receipts with %d bytes, booked %d with %d", kept, bytes, r.kept, r.taken)
	}
}

// TestASlowWatcherCostsNoMemoryAndIsToldWhatItMissed.
func TestASlowWatcherCostsNoMemoryAndIsToldWhatItMissed(t *testing.T) {
	w := newWorld(t, nil)
	w.ring().most = 100
	st := w.watch(w.context(), "")
	p := &engine.Push{Request: engine.Request{Kind: engine.ToUser, User: "d", Options: &engine.Options{MessageID: strings.Repeat("m", 64)}}}
	unacked := slices.Repeat([]string{strings.Repeat("u", 200)}, 100)
	for range 1000 { // 20 MB, and it reads nothing
		w.server.receipts.Receipt(p, engine.Result{Targets: 100}, unacked, true)
	}
	n := 0
	for {
		if _, err := st.Recv(); err != nil {
			wantError(t, err, codes.OutOfRange, "RECEIPTS_GONE", "")
			break
		}
		n++
	}
	if n >= 1000 {
		t.Error("it got all")
	}
}

func TestACallerSeesItsOwnReceiptsOnly(t *testing.T) {
	const all = `{methods: ["*"], users: ["*"], rooms: ["*"]}`
	a := newAccess(t, authtest.New(t, "version: 1\ntenants: {shop: {}}\ncallers:\n"+
		caller("a", all, `, tenant: "*"`)+caller("b", all, `, tenant: "*"`)+caller("c", all, ", tenant: shop")+caller("nothing", `{methods: [PushToUser], users: ["*"]}`, ", tenant: shop")))
	w := newWorld(t, a.set)
	w.source.users["shop/d"] = []string{"n1"}
	as := func(name string) context.Context { return w.as(a.Token(name, time.Hour)) }
	watch := map[string]watchStream{"a": w.watch(as("a"), ""), "b": w.watch(as("b"), ""), "c": w.watch(as("c"), "")}
	for name := range watch {
		d := w.pushAsync(as(name), "of "+name)
		ok(t, d.Receipt(0, []string{map[bool]string{true: "shop/d", false: "d"}[name == "c"]}, true))
	}
	for name, st := range watch {
		r := nextReceipt(t, st)
		if r.Receipt.MessageId != "of "+name || r.Receipt.Target != "user:d" || !slices.Equal(r.Receipt.UnackedUserIds, []string{"d"}) {
			t.Errorf("%s got %v", name, r)
		}
	}
	st, err := w.client.WatchReceipts(as("nothing"), &pubsub.WatchReceiptsRequest{})
	ok(t, err)
	_, err = st.Recv()
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
}

func TestAWatchEndsWithItsCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := authtest.New(t, "")
		key, id := files.NewKey(time.Now().Add(time.Hour))
		mine := fmt.Sprintf("- {name: k, match: [{key: %s}], allow: [{methods: [WatchReceipts]}]}\n", id)
		other := caller("other", `{methods: ["*"]}`)
		files.WritePolicy(policyOf(mine, other))
		a := newAccess(t, files)
		w := newWorld(t, a.set)
		ended := func(st watchStream) error {
			_, err := st.Recv()
			return err
		}
		st, err := w.client.WatchReceipts(forever(t, key), &pubsub.WatchReceiptsRequest{})
		ok(t, err)
		synctest.Wait()
		a.WritePolicy(policyOf(strings.Replace(mine, "WatchReceipts", "BroadcastMessage", 1), other))
		a.reload()
		wantError(t, ended(st), codes.PermissionDenied, "PERMISSION_DENIED", "")
		a.WritePolicy(policyOf(mine, other))
		a.reload()
		st, err = w.client.WatchReceipts(forever(t, key), &pubsub.WatchReceiptsRequest{})
		ok(t, err)
		began := time.Now()
		wantError(t, ended(st), codes.Unauthenticated, "UNAUTHENTICATED", "")
		if took := time.Since(began); took < time.Hour-time.Minute || took > time.Hour+time.Minute {
			t.Errorf("ended after %v", took)
		}
	})
}

// TestAWatchEndsWhenTheServerDrains, also one whose client reads late, or has not asked.
func TestAWatchEndsWhenTheServerDrains(t *testing.T) {
	w := newWorld(t, nil)
	w.server.unread = time.Minute
	idle := w.watch(w.context(), "")
	slow := w.watch(w.context(), "")
	silent, err := w.conn.NewStream(w.context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/pubsub.PushManagerService/WatchReceipts")
	ok(t, err)
	w.wait("all are open", func() bool { return w.metric("push_manager_receipt_watchers") == "3" })
	ctx, cancel := context.WithTimeout(w.context(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		p := &engine.Push{Request: engine.Request{Kind: engine.ToAll, Options: &engine.Options{MessageID: "m"}}}
		for range 200 {
			w.server.receipts.Receipt(p, engine.Result{}, slices.Repeat([]string{strings.Repeat("u", 200)}, 100), true)
		}
		done <- w.server.Drain(ctx)
	}()
	for err == nil {
		_, err = idle.Recv()
	}
	wantError(t, err, codes.Unavailable, "DRAINING", "")
	wantError(t, silent.RecvMsg(new(pubsub.WatchReceiptsResponse)), codes.Unavailable, "DRAINING", "")
	for err = nil; err == nil; { // 4 MB were on their way
		_, err = slow.Recv()
	}
	wantError(t, err, codes.Unavailable, "DRAINING", "")
	ok(t, <-done)
	if n := w.metric("push_manager_receipt_watchers"); n != "0" {
		t.Errorf("%s watch still", n)
	}
}

// TestAWatchThatIsNeverReadHoldsNoDrain: what was sent to it waits behind its window for ever, and so does its end.
func TestAWatchThatIsNeverReadHoldsNoDrain(t *testing.T) {
	w := newWorld(t, nil)
	w.server.unread = 50 * time.Millisecond
	w.watch(w.context(), "")
	p := &engine.Push{Request: engine.Request{Kind: engine.ToAll, Options: &engine.Options{MessageID: "m"}}}
	for range 200 { // 4 MB
		w.server.receipts.Receipt(p, engine.Result{}, slices.Repeat([]string{strings.Repeat("u", 200)}, 100), true)
	}
	ctx, cancel := context.WithTimeout(w.context(), time.Minute)
	defer cancel()
	ok(t, w.server.Drain(ctx))
	if n := len(w.server.watching.conns); n != 1 {
		t.Errorf("%d connections are watched on", n)
	}
}

// TestConnectionsOfWatchesThatHaveEndedAreForgotten: a drain later has nothing to cut off.
func TestConnectionsOfWatchesThatHaveEndedAreForgotten(t *testing.T) {
	w := newWorld(t, nil)
	ctx, cancel := context.WithCancel(w.context())
	w.watch(ctx, "")
	w.watch(ctx, "")
	cancel()
	w.wait("they have ended", func() bool { return w.metric("push_manager_receipt_watchers") == "0" })
	w.wait("the connection is forgotten", func() bool {
		w.server.watching.mu.Lock()
		defer w.server.watching.mu.Unlock()
		return len(w.server.watching.conns) == 0
	})
}

func TestWatchesCountAsStreams(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.Streams, c.StreamsPerConnection = 100, 2 })
	ctx, cancel := context.WithCancel(w.context())
	w.watch(ctx, "")
	w.watch(ctx, "")
	st, err := w.client.WatchReceipts(w.context(), &pubsub.WatchReceiptsRequest{})
	ok(t, err)
	_, err = st.Recv()
	wantError(t, err, codes.ResourceExhausted, "TOO_MANY_STREAMS", "")
	cancel()
	w.wait("they have ended", func() bool { return w.metric("push_manager_receipt_watchers") == "0" })
	w.watch(w.context(), "")
	// Unary calls beside them are served.
	_, err = w.to(w.context(), "d", "", "x")
	ok(t, err)
}

// What is encoded by hand is what generated code writes.
func TestReceiptsAreWhatGeneratedCodeReads(t *testing.T) {
	at := time.Unix(1_700_000_000, 12345)
	for _, kind := range []engine.Kind{engine.ToRoom, engine.ToUser, engine.ToUsers, engine.ToAll} {
		for _, final := range []bool{true, false} {
			p := &engine.Push{Request: engine.Request{Kind: kind, Room: "shop/r", User: "shop/u", Scope: "shop/", Options: &engine.Options{MessageID: "m"}}}
			res := &engine.Result{Targets: 5, Delivered: 2, Offline: 3, Stored: 3, Unsure: 1, Acked: 2}
			got := new(pubsub.PushReceipt)
			b := encodeReceipt(p, res, []string{"shop/a", "shop/b"}, final, at)
			ok(t, proto.Unmarshal(b, got))
			if again := marshal(t, got); string(again) != string(b) {
				t.Errorf("%x, generated code writes %x", b, again)
			}
			target := map[engine.Kind]string{engine.ToRoom: "room:r", engine.ToUser: "user:u", engine.ToUsers: "users", engine.ToAll: "everybody"}[kind]
			if got.Target != target || got.Final != final || !slices.Equal(got.UnackedUserIds, []string{"a", "b"}) || !got.At.AsTime().Equal(at) || got.Summary.Stored != 3 {
				t.Errorf("read as %v", got)
			}
		}
	}
}

// store is a Lasting that notes what it is asked for.
type store struct {
	asked []string
	err   error
	panic bool
	wait  bool
}

func (s *store) Forget(ctx context.Context, user string) (int, error) {
	return s.do(ctx, "forget "+user)
}
func (s *store) Replay(ctx context.Context, user, node string) (int, error) {
	return s.do(ctx, "replay "+user+" to "+node)
}

func (s *store) do(ctx context.Context, what string) (int, error) {
	if s.panic {
		panic("store")
	}
	if s.wait {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	s.asked = append(s.asked, what)
	return 7, s.err
}

func TestForgetAndReplay(t *testing.T) {
	s := new(store)
	w := newWorld(t, func(c *Config, ec *engine.Config) { c.Lasting = s; ec.Timeout = 100 * time.Millisecond })
	forget := func(user string) (*pubsub.ForgetUserResponse, error) {
		return w.client.ForgetUser(w.context(), &pubsub.ForgetUserRequest{UserId: user})
	}
	f, err := forget("u")
	ok(t, err)
	r, err := w.client.Replay(w.context(), &pubsub.ReplayRequest{UserId: "u", NodeId: "n1"})
	ok(t, err)
	if w.server.messageIDs.erased != 1 {
		t.Error("results that count on the store are still answered")
	}
	if f.Messages != 7 || r.Messages != 7 || !slices.Equal(s.asked, []string{"forget u", "replay u to n1"}) {
		t.Errorf("%v, %v, asked %q", f, r, s.asked)
	}
	s.asked = nil
	for name, err := range map[string]error{
		"REQUIRED user_id":          must2(forget("")),
		"ID_TOO_LONG user_id":       must2(forget(strings.Repeat("u", 257))),
		"ID_MALFORMED user_id":      must2(forget("a\x00")),
		"ID_MALFORMED node_id":      must2(w.client.Replay(w.context(), &pubsub.ReplayRequest{UserId: "u"})),
		"PAYLOAD_TOO_LARGE request": must2(forget(strings.Repeat("u", 5000))),
		"MALFORMED request":         must2(w.raw("/pubsub.PushManagerService/ForgetUser", []byte{0x0a, 9})),
		"ID_MALFORMED user_id ":     must2(w.raw("/pubsub.PushManagerService/ForgetUser", []byte{0x0a, 1, 0xff})),
	} {
		reason, field, _ := strings.Cut(strings.TrimSpace(name), " ")
		wantError(t, err, codes.InvalidArgument, reason, field)
	}
	if s.asked != nil {
		t.Errorf("the store was asked %q", s.asked)
	}
	for _, test := range []struct {
		err    error
		code   codes.Code
		reason string
	}{
		{fmt.Errorf("purge: %w", engine.ErrSpoolDown), codes.Unavailable, "STORE_DOWN"},
		{fmt.Errorf("too many: %w", engine.ErrOverloaded), codes.ResourceExhausted, "OVERLOADED"},
		{engine.ErrDraining, codes.Unavailable, "DRAINING"},
		{fmt.Errorf("%w: not here", ErrNotTaken), codes.FailedPrecondition, "NOT_TAKEN"},
		{errors.New("disk on fire"), codes.Internal, "INTERNAL"},
	} {
		s.err = test.err
		_, err := forget("u")
		wantError(t, err, test.code, test.reason, "")
		if strings.Contains(err.Error(), "disk") {
			t.Errorf("told %v", err)
		}
	}
	s.panic = true
	_, err = forget("u")
	wantError(t, err, codes.Internal, "", "")
	s.panic, s.wait = false, true
	_, err = forget("u")
	wantError(t, err, codes.DeadlineExceeded, "", "") // some of it may have been done
	if n := w.metric(`push_manager_api_requests_total{api="ForgetUser",status="success"}`); n != "1" {
		t.Errorf("%s calls are counted", n)
	}
}

func must2[T any](_ T, err error) error { return err }

func TestWithoutAStoreNothingIsForgottenOrReplayed(t *testing.T) {
	w := newWorld(t, nil)
	_, err := w.client.ForgetUser(w.context(), &pubsub.ForgetUserRequest{UserId: "u"})
	wantError(t, err, codes.FailedPrecondition, "STORE_OFF", "")
	_, err = w.client.Replay(w.context(), &pubsub.ReplayRequest{UserId: "u", NodeId: "n1"})
	wantError(t, err, codes.FailedPrecondition, "STORE_OFF", "")
	_, err = w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x"), Options: &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE}})
	if err == nil {
		t.Error("a push is stored nowhere")
	}
	w.nothingSent()
}

func TestRightsToForgetAndReplay(t *testing.T) {
	a := newAccess(t, authtest.New(t, "version: 1\ntenants: {shop: {}}\ncallers:\n"+
		caller("eraser", `{methods: [ForgetUser], users: ["u-*"]}`, ", tenant: shop")+caller("pusher", `{methods: [PushToUser], users: ["*"]}`, ", tenant: shop")))
	s := new(store)
	w := newWorld(t, func(c *Config, ec *engine.Config) { c.Lasting, c.Auth = s, a.auth })
	forget := func(name, user string) error {
		_, err := w.client.ForgetUser(w.as(a.Token(name, time.Hour)), &pubsub.ForgetUserRequest{UserId: user})
		return err
	}
	ok(t, forget("eraser", "u-1"))
	wantError(t, forget("eraser", "v-1"), codes.PermissionDenied, "PERMISSION_DENIED", "")
	wantError(t, forget("pusher", "u-1"), codes.PermissionDenied, "PERMISSION_DENIED", "")
	_, err := w.client.Replay(w.as(a.Token("eraser", time.Hour)), &pubsub.ReplayRequest{UserId: "u-1", NodeId: "n1"})
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	_, err = w.client.ForgetUser(metadata.AppendToOutgoingContext(w.context(), "x-tenant", "bank"), &pubsub.ForgetUserRequest{UserId: "u-1"})
	wantError(t, err, codes.Unauthenticated, "UNAUTHENTICATED", "")
	if !slices.Equal(s.asked, []string{"forget shop/u-1"}) {
		t.Errorf("asked %q", s.asked)
	}
}
