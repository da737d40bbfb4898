package ingress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// claim adds claims of a priority to a call.
func claim(ctx context.Context, claims ...string) context.Context {
	if len(claims) == 0 {
		return ctx
	}
	return metadata.NewOutgoingContext(ctx, metadata.MD{"x-priority": claims})
}

// TestPriorityOfACall: an unknown priority is refused, and never escalated.
func TestPriorityOfACall(t *testing.T) {
	for _, test := range []struct {
		most   string
		claims []string
		want   engine.Priority
		bad    bool
	}{
		{"", nil, engine.Normal, false},
		{"", []string{"low"}, engine.Low, false},
		{"", []string{"normal"}, engine.Normal, false},
		{"", []string{"high"}, engine.High, false},
		{"", []string{"critical"}, engine.Critical, false},
		{"high", []string{"critical"}, engine.High, false},
		{"low", []string{"critical"}, engine.Low, false},
		{"low", nil, engine.Low, false}, // who claims nothing does not get more than who claims most
		{"high", []string{"low"}, engine.Low, false},
		{"", []string{""}, 0, true},
		{"", []string{"CRITICAL"}, 0, true},
		{"", []string{"urgent"}, 0, true},
		{"low", []string{"urgent"}, 0, true},
		{"", []string{"low", "critical"}, 0, true},
	} {
		t.Run(fmt.Sprintf("%s/%v", test.most, test.claims), func(t *testing.T) {
			w := newWorld(t, func(c *Config, _ *engine.Config) { c.PriorityMax = test.most })
			n := w.network.nodes[0]
			n.setKeep(true)
			ctx := claim(w.context(), test.claims...)
			if test.bad {
				_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
				wantError(t, err, codes.InvalidArgument, "MALFORMED", "x-priority")
				st, err := w.client.PushStream(ctx)
				ok(t, err)
				_, err = st.Recv()
				wantError(t, err, codes.InvalidArgument, "MALFORMED", "x-priority")
				if w.source.count() != 0 || n.len() != 0 {
					t.Error("something was done for it")
				}
				return
			}
			done := make(chan error, 1)
			go func() {
				_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
				done <- err
			}()
			st, err := w.client.PushStream(ctx)
			ok(t, err)
			ok(t, st.Send(&pubsub.PushStreamRequest{Id: 1, Push: &pubsub.PushStreamRequest_ToUser{
				ToUser: &pubsub.PushToUserRequest{UserId: "d", Content: content("x")},
			}}))
			for end := time.Now().Add(10 * time.Second); n.len() < 2 && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
			kept := n.take()
			for _, d := range kept {
				if d.Priority() != test.want {
					t.Errorf("it goes as %v, want %v", d.Priority(), test.want)
				}
				ack(d)
			}
			if len(kept) != 2 {
				t.Fatalf("%d deliveries", len(kept))
			}
			ok(t, <-done)
			_, err = st.Recv()
			ok(t, err)
		})
	}
}

// A call under overload is refused although it is not a request at all, and although
// nothing of it has come.
func TestRefusedBeforeItIsDecoded(t *testing.T) {
	w := newWorld(t, nil)
	w.engine.Shed(3)
	const method = "/pubsub.PushManagerService/PushToRoom"
	garbage := make([]byte, 900<<10)
	for i := range garbage {
		garbage[i] = 0xff
	}
	_, err := w.raw(method, garbage)
	wantError(t, err, codes.ResourceExhausted, "OVERLOADED", "")

	st, err := w.conn.NewStream(w.context(), &grpc.StreamDesc{ClientStreams: true}, method)
	ok(t, err)
	wantError(t, st.RecvMsg(new(pubsub.PushToRoomResponse)), codes.ResourceExhausted, "OVERLOADED", "")

	w.engine.Shed(0)
	_, err = w.raw(method, garbage)
	wantError(t, err, codes.InvalidArgument, "MALFORMED", "request")
	if n := w.metric(`push_manager_refused_total{priority="normal",reason="memory"}`); n != "2" {
		t.Errorf("%s are counted", n)
	}
}

// retryDelay is what a status says about when to come back.
func retryDelay(t *testing.T, st *status.Status) time.Duration {
	t.Helper()
	for _, d := range st.Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			return r.RetryDelay.AsDuration()
		}
	}
	t.Fatalf("no RetryInfo in %v", st)
	return 0
}

func TestRefusalsSayWhenToComeBack(t *testing.T) {
	for name, test := range map[string]struct {
		shed   int
		fill   bool
		reason string
		want   string
	}{
		"in flight": {0, true, "OVERLOADED", "in_flight"},
		"memory":    {3, false, "OVERLOADED", "memory"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(_ *Config, e *engine.Config) { e.MaxInFlight = 1 })
			if test.fill {
				w.fill()
			}
			w.engine.Shed(test.shed)
			delays := map[time.Duration]bool{}
			const calls = 60
			for range calls {
				var trailer metadata.MD
				_, err := w.client.PushToUser(claim(w.context(), "high"), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")}, grpc.Trailer(&trailer))
				wantError(t, err, codes.ResourceExhausted, test.reason, "")
				delay := retryDelay(t, status.Convert(err))
				if got := trailer.Get("grpc-retry-pushback-ms"); !slices.Equal(got, []string{strconv.FormatInt(delay.Milliseconds(), 10)}) {
					t.Fatalf("the trailer says %v, RetryInfo %v", got, delay)
				}
				if delay < retryOverloaded || delay > 3*retryOverloaded {
					t.Fatalf("come back in %v", delay)
				}
				delays[delay] = true
			}
			if len(delays) < 2 { // of 8, in 60 draws
				t.Errorf("all come back together: %v", delays)
			}
			if n := w.metric(fmt.Sprintf("push_manager_refused_total{priority=%q,reason=%q}", "high", test.want)); n != strconv.Itoa(calls) {
				t.Errorf("%s are counted by reason", n)
			}
			if n := w.metric(`push_manager_api_requests_total{api="PushToUser",status="error"}`); n != strconv.Itoa(calls) {
				t.Errorf("%s are counted as errors", n)
			}
			if n := w.metric("push_manager_push_total"); n != "0" {
				t.Errorf("%s targets are counted", n)
			}
			w.engine.Shed(0)
			_, err := w.client.PushToUser(claim(w.context(), "critical"), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
			if !test.fill {
				ok(t, err)
			}
		})
	}
}

// grpc-go's own client comes back when the trailer says so.
func TestClientsWithARetryPolicyObey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		conn := w.connect(grpc.WithDefaultServiceConfig(`{"methodConfig": [{"name": [{"service": "pubsub.PushManagerService"}],
			"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.001s", "maxBackoff": "0.001s", "backoffMultiplier": 1,
			"retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}`))
		defer func() { _ = conn.Close() }()
		w.engine.Shed(3)
		began := time.Now()
		time.AfterFunc(retryOverloaded-time.Millisecond, func() { w.engine.Shed(0) })
		_, err := pubsub.NewPushManagerServiceClient(conn).PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
		ok(t, err)
		if took := time.Since(began); took < retryOverloaded {
			t.Errorf("it came back after %v", took)
		}
		if n := w.metric(`push_manager_api_requests_total{api="PushToUser",status="error"}`); n != "1" {
			t.Errorf("it was refused %s times", n)
		}
	})
}

// The pushes of an open PushStream are refused one by one, by its priority.
func TestPushesOfAStreamAreRefusedAndAnswered(t *testing.T) {
	w := newWorld(t, nil)
	w.engine.Shed(1)
	for _, test := range []struct {
		priority string
		code     codes.Code
	}{{"low", codes.ResourceExhausted}, {"normal", codes.OK}} {
		st, err := w.client.PushStream(claim(w.context(), test.priority))
		ok(t, err)
		const pushes = 50
		for i := range pushes {
			ok(t, st.Send(&pubsub.PushStreamRequest{Id: uint64(i), Push: &pubsub.PushStreamRequest_ToRoom{
				ToRoom: &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x")},
			}}))
		}
		ok(t, st.CloseSend())
		for range pushes {
			r, err := st.Recv()
			ok(t, err)
			if got := codes.Code(r.GetError().GetCode()); got != test.code {
				t.Fatalf("%s: %v", test.priority, r)
			}
			if r.GetError() != nil {
				wantStatus(t, status.FromProto(r.GetError()), codes.ResourceExhausted, "OVERLOADED", "")
			}
		}
	}
	for series, want := range map[string]string{
		`push_manager_refused_total{priority="low",reason="memory"}`:         "50",
		`push_manager_api_requests_total{api="PushToRoom",status="error"}`:   "50",
		`push_manager_api_requests_total{api="PushToRoom",status="success"}`: "50",
		`push_manager_push_total`:         "150", // a, b, and c who is offline
		`push_manager_push_success_total`: "100",
		`push_manager_push_offline_total`: "50",
	} {
		if got := w.metric(series); got != want {
			t.Errorf("%s is %s, want %s", series, got, want)
		}
	}
}

// callerOf is a caller that says who it is.
func callerOf(ctx context.Context) string {
	names := metadata.ValueFromIncomingContext(ctx, "caller")
	if len(names) == 0 {
		return ""
	}
	return names[0]
}

func TestCallersHaveARateEach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.Rate, c.RateBurst, c.Caller = 10, 12, callerOf })
		by := func(name string) context.Context {
			return metadata.AppendToOutgoingContext(w.context(), "caller", name)
		}
		user := func(name string) error {
			_, err := w.client.PushToUser(by(name), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
			return err
		}
		broadcast := func(name string) error {
			_, err := w.client.BroadcastMessage(by(name), &pubsub.BroadcastMessageRequest{Content: content("x")})
			return err
		}
		// One node: 2. Two nodes: 3.
		for i := range 6 {
			if err := user("a"); err != nil {
				t.Fatalf("push %d: %v", i, err)
			}
		}
		err := user("a")
		wantError(t, err, codes.ResourceExhausted, "RATE_LIMITED", "")
		if delay := retryDelay(t, status.Convert(err)); delay != 100*time.Millisecond {
			t.Errorf("come back in %v", delay)
		}
		for i := range 4 {
			if err := broadcast("b"); err != nil {
				t.Fatalf("another caller's push %d: %v", i, err)
			}
		}
		wantError(t, broadcast("b"), codes.ResourceExhausted, "RATE_LIMITED", "")
		time.Sleep(100 * time.Millisecond)
		ok(t, broadcast("b")) // with 1 it may, and owes 2
		time.Sleep(200 * time.Millisecond)
		wantError(t, broadcast("b"), codes.ResourceExhausted, "RATE_LIMITED", "")
		time.Sleep(100 * time.Millisecond)
		ok(t, broadcast("b"))
		time.Sleep(time.Minute) // no more than the burst is saved up
		for range 6 {
			ok(t, user("a"))
		}
		wantError(t, user("a"), codes.ResourceExhausted, "RATE_LIMITED", "")
		if n := w.metric(`push_manager_refused_total{priority="normal",reason="rate"}`); n != "4" {
			t.Errorf("%s are counted", n)
		}
	})
}

// A Config.Caller that panics costs the call, and leaves nothing behind.
func TestCallerThatPanics(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Rate, c.Caller = 1, func(context.Context) string { panic("who?") }
	})
	_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
	wantError(t, err, codes.Internal, "INTERNAL", "")
	_, err = w.stream(w.context()).Recv()
	wantError(t, err, codes.Internal, "INTERNAL", "")
	for _, series := range []string{"push_manager_api_inflight", "push_manager_api_worked", "push_manager_api_streams"} {
		if n := w.metric(series); n != "0" {
			t.Errorf("%s is %s", series, n)
		}
	}
}

func TestCallersAreBoundedAndNamedByTheirAddress(t *testing.T) {
	var names []string
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Rate, c.RateCallers = 1000, 10
		c.Caller = func(ctx context.Context) string {
			names = append(names, peerOf(ctx))
			return strconv.Itoa(len(names))
		}
	})
	for range 200 {
		_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
		ok(t, err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if n, _ := strconv.Atoi(w.metric("push_manager_rate_callers")); n <= 10 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s callers are kept", w.metric("push_manager_rate_callers"))
		}
	}
	if names[0] == "" || names[0] != names[len(names)-1] {
		t.Errorf("the caller is %q, then %q", names[0], names[len(names)-1])
	}
	if _, err := New(Config{Engine: w.engine, Rate: -1, PriorityMax: "urgent"}); err == nil {
		t.Error("a negative rate and an unknown priority are taken")
	}
}

// A debt that is larger than the burst is paid in full.
func TestDebtsBeyondTheBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, err := newCallers(&Config{Rate: 10, RateBurst: 2, RateCallers: 1})
		ok(t, err)
		b := table.of("a")
		ok(t, b.take())
		b.Charge(21) // 20 more than there are
		for range 20 {
			if err := b.take(); !errors.Is(err, errRate) {
				t.Fatalf("%v", err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(100 * time.Millisecond)
		ok(t, b.take())
	})
}

// Refused pushes cost nothing, however many goroutines of a caller are refused at a time.
func TestRefusedPushesCostNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, seconds = 100, 3
		table, err := newCallers(&Config{Rate: rate, RateBurst: 10, RateCallers: 1})
		ok(t, err)
		b := table.of("a")
		for b.take() == nil { // the burst
		}
		var taken atomic.Int64
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for range seconds * 1000 {
					time.Sleep(time.Millisecond)
					if b.take() == nil {
						taken.Add(1)
					}
				}
			})
		}
		all.Wait()
		if n := taken.Load(); n < rate*seconds-1 || n > rate*seconds {
			t.Errorf("%d pushes in %d s at %d a second", n, seconds, rate)
		}
	})
}

// quiet is the transport of a call without a message.
type quiet struct {
	rawCall
	grpc.ServerTransportStream
}

func (quiet) RecvCompress() string { return "" }

// BenchmarkAdmission is what each call pays for priorities, rates and overload.
func BenchmarkAdmission(b *testing.B) {
	headers := metadata.MD{
		":authority": {"push-manager:50053"}, "content-type": {"application/grpc"}, "user-agent": {"grpc-go/1.85.0"},
		"grpc-accept-encoding": {"gzip"},
	}
	for name, md := range map[string]metadata.MD{
		"priority=none":     headers,
		"priority=critical": metadata.Join(headers, metadata.Pairs("x-priority", "critical")),
	} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, nil)
			_, server := net.Pipe()
			conn, info, err := w.server.throttle.Credentials(insecure.NewCredentials()).ServerHandshake(server)
			ok(b, err)
			defer func() { _ = conn.Close() }()
			ctx := grpc.NewContextWithServerTransportStream(metadata.NewIncomingContext(context.Background(), md), quiet{})
			ctx = peer.NewContext(ctx, &peer.Peer{AuthInfo: info})
			b.ReportAllocs()
			for b.Loop() {
				info, err := w.server.admit(w.server.throttle.Tap(ctx, md), toUser)
				ok(b, err)
				w.server.leave(&info)
			}
		})
	}
}
