package client_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/client/clienttest"
)

const patience = 20 * time.Second

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// pushers are the two ways to push: call by call, and over a Stream.
func pushers(t *testing.T, test func(t *testing.T, connect func(*client.Client) pusher)) {
	t.Run("client", func(t *testing.T) { test(t, func(c *client.Client) pusher { return c }) })
	t.Run("stream", func(t *testing.T) {
		test(t, func(c *client.Client) pusher {
			s := c.Stream(client.StreamConfig{})
			t.Cleanup(func() {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				if err := s.Close(ctx); err != nil {
					t.Error(err)
				}
			})
			return s
		})
	})
}

type pusher interface {
	Push(context.Context, client.Target, client.Message, ...client.PushOption) (client.Result, error)
}

func TestAllOfAPushArrives(t *testing.T) {
	pushers(t, func(t *testing.T, connect func(*client.Client) pusher) {
		server := clienttest.NewServer(t)
		p := connect(server.Client(client.WithToken("secret")))
		message := client.Message{Type: client.TypeSystem, Data: []byte("hello"), Time: time.Unix(17, 0), Metadata: map[string]string{"k": "v"}}
		options := []client.PushOption{
			client.MessageID("m-1"), client.TTL(time.Minute), client.AckByClient(time.Second), client.StoreIfOffline(), client.CollapseKey("c"),
			client.AtPriority(client.High), client.AsyncReceipt(),
		}
		want := clienttest.Push{
			Message: message, MessageID: "m-1", TTL: time.Minute, AckByClient: true, StoreIfOffline: true, CollapseKey: "c", Priority: client.High,
			AsyncReceipt: true, Token: "secret",
		}
		var wants []clienttest.Push
		for _, test := range []struct {
			to                   client.Target
			users, rooms, except []string
		}{
			{to: client.User("alice")},
			{to: client.Users("alice", "bob"), users: []string{"alice", "bob"}},
			{to: client.Room("lobby").Except("carol"), except: []string{"carol"}},
			{to: client.Rooms("lobby", "news").Except("carol"), rooms: []string{"lobby", "news"}, except: []string{"carol"}},
			{to: client.Everybody()},
		} {
			r, err := p.Push(within(t), test.to, message, options...)
			if err != nil || r.Outcome() != client.Delivered || r.Targets != max(len(test.users), 1) || r.Delivered != r.Targets || r.MessageID != "m-1" {
				t.Errorf("%v: %+v %v", test.to, r, err)
			}
			want.Target, want.Users, want.Rooms, want.Except = test.to.String(), test.users, test.rooms, test.except
			wants = append(wants, want)
		}
		if diff := cmp.Diff(wants, server.Pushes(), cmpopts.IgnoreFields(clienttest.Push{}, "Streamed"), cmpopts.EquateEmpty()); diff != "" {
			t.Error(diff)
		}
	})
}

func TestAResultIsPassedOnAsItIs(t *testing.T) {
	pushers(t, func(t *testing.T, connect func(*client.Client) pusher) {
		server := clienttest.NewServer(t)
		want := client.Result{
			Success: true, Message: "words", Targets: 21, Delivered: 6, Offline: 5, Failed: 4, Unknown: 6, Stored: 3, Unsure: 2, Acked: 1, Duplicates: 4,
			MessageID: "m", Position: "p", Failures: []client.Failure{
				{Node: "n1", Outcome: client.Failed, Reason: "failed: full", Users: 4}, {Node: "n2", Outcome: client.Unknown, Reason: "unknown: broken", Users: 6},
			},
		}
		server.Reply(clienttest.With(want))
		got, err := connect(server.Client()).Push(within(t), client.Room("lobby"), client.Text("x"))
		if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(client.Result{})); diff != "" || err != nil {
			t.Error(err, diff)
		}
	})
}

func TestOutcomes(t *testing.T) {
	server := clienttest.NewServer(t)
	c := server.Client()
	for _, test := range []struct {
		name  string
		reply clienttest.Reply
		to    client.Target
		want  client.Outcome
	}{
		{"delivered", clienttest.Delivered(), client.User("u"), client.Delivered},
		{"offline", clienttest.Offline(), client.User("u"), client.Offline},
		{"failed", clienttest.Failed("n", "queue full"), client.User("u"), client.Failed},
		{"unknown", clienttest.Unknown("n"), client.User("u"), client.Unknown},
		{"an empty room", clienttest.With(client.Result{Success: true}), client.Room("r"), client.Delivered},
		{"no such room", clienttest.With(client.Result{}), client.Room("r"), client.Offline},
		{"no node", clienttest.With(client.Result{}), client.Everybody(), client.Failed},
		{"all offline, a success", clienttest.With(client.Result{Success: true, Targets: 2, Offline: 2}), client.Room("r"), client.Offline},
		{"stored", clienttest.With(client.Result{Success: true, Targets: 2, Offline: 2, Stored: 2}), client.Users("u", "v"), client.Stored},
		{"half of them stored", clienttest.With(client.Result{Targets: 2, Offline: 2, Stored: 1}), client.Users("u", "v"), client.Offline},
		{"in the log of an unknown room", clienttest.With(client.Result{Success: true, Position: "p"}), client.Room("r"), client.Stored},
		{"a silent node", clienttest.With(client.Result{Targets: 1, Delivered: 1, Failures: []client.Failure{{Node: "n", Reason: "unknown: no answer"}}}), client.Everybody(), client.Unknown},
	} {
		server.Reply(test.reply)
		r, err := c.Push(within(t), test.to, client.Text("x"))
		if err != nil || r.Outcome() != test.want {
			t.Errorf("%s: %v %v, want %v", test.name, r.Outcome(), err, test.want)
		}
	}
}

// TestOnlyWhatIsSafeIsRepeated is the promise of the package.
func TestOnlyWhatIsSafeIsRepeated(t *testing.T) {
	const soon = 5 * time.Millisecond
	overloaded := clienttest.Refused(codes.ResourceExhausted, "OVERLOADED", soon)
	bare := clienttest.Error(codes.Unavailable, "502 of a proxy")
	pushers(t, func(t *testing.T, connect func(*client.Client) pusher) {
		for _, test := range []struct {
			name    string
			replies []clienttest.Reply
			id      string
			tries   int
			code    codes.Code // OK: it is delivered in the end
			notSent bool
		}{
			{"refused, then taken", []clienttest.Reply{overloaded, overloaded, clienttest.Delivered()}, "", 3, codes.OK, false},
			{"refused for good", []clienttest.Reply{clienttest.Refused(codes.PermissionDenied, "PERMISSION_DENIED", 0)}, "", 1, codes.PermissionDenied, true},
			{"refused for good, with an id", []clienttest.Reply{clienttest.Refused(codes.AlreadyExists, "MESSAGE_ID_REUSED", 0)}, "m", 1, codes.AlreadyExists, true},
			{"later than the deadline", []clienttest.Reply{clienttest.Refused(codes.ResourceExhausted, "QUOTA_EXCEEDED", time.Hour)}, "", 1, codes.ResourceExhausted, true},
			{"unknown", []clienttest.Reply{bare}, "", 1, codes.Unavailable, false},
			{"unknown, with an id", []clienttest.Reply{bare, clienttest.Delivered()}, "m", 2, codes.OK, false},
			{"cut", []clienttest.Reply{clienttest.Broken()}, "", 1, codes.Unavailable, false},
			{"cut, with an id", []clienttest.Reply{clienttest.Broken(), clienttest.Delivered()}, "m", 2, codes.OK, false},
			// Nothing was sent by the last try. What the first one did nobody knows.
			{"unknown, then refused", []clienttest.Reply{bare, clienttest.Refused(codes.PermissionDenied, "PERMISSION_DENIED", 0)}, "m", 2, codes.PermissionDenied, false},
			{"refused, then unknown", []clienttest.Reply{overloaded, bare}, "", 2, codes.Unavailable, false},
			{"what is wrong stays wrong", []clienttest.Reply{clienttest.Error(codes.InvalidArgument, "of a proxy")}, "m", 1, codes.InvalidArgument, false},
			{"results are no errors", []clienttest.Reply{clienttest.Failed("n", "queue full"), clienttest.Delivered()}, "m", 1, codes.OK, false},
		} {
			t.Run(test.name, func(t *testing.T) {
				server := clienttest.NewServer(t)
				server.Reply(test.replies...)
				var mu sync.Mutex
				var retries []client.Retry
				p := connect(server.Client(client.WithRetryHook(func(_ context.Context, r client.Retry) {
					mu.Lock()
					defer mu.Unlock()
					retries = append(retries, r)
				})))
				var options []client.PushOption
				if test.id != "" {
					options = append(options, client.MessageID(test.id))
				}
				_, err := p.Push(within(t), client.User("alice"), client.Text("x"), options...)
				if n := len(server.Pushes()); n != test.tries {
					t.Errorf("%d tries, want %d", n, test.tries)
				}
				var failed *client.Error
				switch errors.As(err, &failed); {
				case status.Code(err) != test.code:
					t.Errorf("%v, want %v", err, test.code)
				case failed != nil && (failed.NotSent != test.notSent || errors.Is(err, client.ErrUnknown) == test.notSent || failed.Tries != test.tries):
					t.Errorf("%+v, NotSent should be %v", failed, test.notSent)
				}
				mu.Lock()
				defer mu.Unlock()
				if len(retries) != test.tries-1 {
					t.Errorf("the hook saw %d repeats", len(retries))
				}
				for _, r := range retries {
					if r.Err.Reason == "" && r.MessageID == "" {
						t.Errorf("repeated without ErrorInfo or id: %+v", r)
					}
				}
			})
		}
	})
}

// TestAForeignErrorInfoIsNone: others use ErrorInfo, too.
func TestAForeignErrorInfoIsNone(t *testing.T) {
	e := client.ErrorOfStatus(t, codes.Unavailable, "example.com", time.Millisecond)
	if e.NotSent || e.Reason != "" {
		t.Errorf("%+v", e)
	}
}

func TestTheBudgetEndsRepeats(t *testing.T) {
	server := clienttest.NewServer(t)
	server.Reply(clienttest.Refused(codes.ResourceExhausted, "OVERLOADED", time.Microsecond))
	c := server.Client(client.WithRetries(client.Retries{Burst: 10, Ratio: 0.1}))
	const pushes = 50
	for range pushes {
		if _, err := c.PushToUser(within(t), "alice", client.Text("x")); status.Code(err) != codes.ResourceExhausted {
			t.Fatal(err)
		}
	}
	if repeats := len(server.Pushes()) - pushes; repeats < 10 || repeats > 10+pushes/10+1 {
		t.Errorf("%d repeats of %d pushes", repeats, pushes)
	}
}

func TestWhatNeverLeftIsNotSent(t *testing.T) {
	listen, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := listen.Addr().String()
	_ = listen.Close()
	for _, test := range []struct {
		name    string
		options []client.Option
		ctx     func(context.Context) (context.Context, context.CancelFunc)
		want    error
		code    codes.Code
	}{
		{"nobody is there", []client.Option{client.WithFailFast()}, context.WithCancel, nil, codes.Unavailable},
		{"nobody comes", nil, func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 50*time.Millisecond)
		}, context.DeadlineExceeded, codes.DeadlineExceeded},
		{"cancelled before", nil, func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return ctx, cancel
		}, context.Canceled, codes.Canceled},
		{"no token", []client.Option{client.WithTokenSource(func(context.Context) (string, error) { return "", errors.New("vault is sealed") })}, context.WithCancel, nil, codes.Unauthenticated},
	} {
		pushers(t, func(t *testing.T, connect func(*client.Client) pusher) {
			at := nobody
			if test.code == codes.Unauthenticated { // the token is asked for when there is a connection
				live, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				server := grpc.NewServer()
				var serving sync.WaitGroup
				serving.Go(func() { _ = server.Serve(live) })
				t.Cleanup(func() { server.Stop(); serving.Wait() })
				at = live.Addr().String()
			}
			c, err := client.New(at, append(test.options, client.WithoutHealthChecks())...)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			p := connect(c)
			ctx, cancel := test.ctx(within(t))
			defer cancel()
			_, err = p.Push(ctx, client.User("alice"), client.Text("x"))
			var failed *client.Error
			if !errors.As(err, &failed) || failed.Code != test.code || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("%s: %v", test.name, err)
				return
			}
			// Of a Stream, Wait gives up before the push does.
			if _, unary := p.(*client.Client); !failed.NotSent && (unary || test.code == codes.Unauthenticated) {
				t.Errorf("%s: %v", test.name, err)
			}
		})
	}
}

// TestAPushThatIsCutOffIsUnknown: what has left may have arrived.
func TestAPushThatIsCutOffIsUnknown(t *testing.T) {
	server := clienttest.NewServer(t)
	server.Reply(clienttest.Delivered(), clienttest.Hanging())
	c := server.Client()
	if _, err := c.PushToUser(within(t), "alice", client.Text("x")); err != nil { // it is connected now
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := c.PushToUser(ctx, "alice", client.Text("x"))
	if !errors.Is(err, client.ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) || len(server.Pushes()) != 2 {
		t.Error(err)
	}
}

func TestWhatCannotBeEncodedIsRefusedHere(t *testing.T) {
	const bad = "\xff"
	pushers(t, func(t *testing.T, connect func(*client.Client) pusher) {
		server := clienttest.NewServer(t)
		p := connect(server.Client())
		for _, test := range []struct {
			field   string
			to      client.Target
			message client.Message
			option  client.PushOption
		}{
			{field: "user_id", to: client.User(bad)},
			{field: "room_id", to: client.Room(bad)},
			{field: "user_ids[1]", to: client.Users("a", bad)},
			{field: "room_ids[1]", to: client.Rooms("a", bad)},
			{field: "exclude_user_ids[0]", to: client.Room("r").Except(bad)},
			{field: "exclude_user_ids", to: client.User("u").Except("v")},
			{field: "content.metadata", to: client.User("u"), message: client.Message{Metadata: map[string]string{"k": bad}}},
			{field: "options.message_id", to: client.User("u"), option: client.MessageID(bad)},
			{field: "options.collapse_key", to: client.User("u"), option: client.CollapseKey(bad)},
			{field: "options.ttl_ms", to: client.User("u"), option: client.TTL(time.Microsecond)},
			{field: "options.ack_timeout_ms", to: client.User("u"), option: client.AckByClient(-1)},
			{field: "target"},
		} {
			var options []client.PushOption
			if test.option != nil {
				options = append(options, test.option)
			}
			_, err := p.Push(within(t), test.to, test.message, options...)
			var failed *client.Error
			if !errors.As(err, &failed) || failed.Field != test.field || !failed.NotSent || failed.Code != codes.InvalidArgument {
				t.Errorf("%s: %v", test.field, err)
			}
		}
		if n := len(server.Pushes()); n > 0 {
			t.Errorf("%d were sent", n)
		}
	})
}

func TestOptionsThatCannotBeMeant(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		target string
		option client.Option
		want   string // "": it is fine
	}{
		{"localhost:1", client.WithTimeout(0), "timeout"},
		{"localhost:1", client.WithRetries(client.Retries{Tries: -1}), "retries"},
		{"localhost:1", client.WithRetries(client.Retries{Ratio: 2}), "retries"},
		{"localhost:1", client.WithToken("two words"), "token"},
		{"localhost:1", client.WithToken(""), "token"},
		{"localhost:1", client.WithTokenFile(empty), empty},
		{"localhost:1", client.WithTokenFile(empty + "-not"), "no such file"},
		{"localhost:1", client.WithTokenFile(os.DevNull), "no regular file"},
		{"localhost:1", client.WithTLS(client.TLS{CAFile: empty}), "TLS"},
		{"pm.example:1", client.WithToken("t"), "plain text"},
		{"localhost:1,pm.example:1", client.WithToken("t"), "plain text"},
		{"dns:///pm.example:1", client.WithToken("t"), "plain text"},
		{"localhost:1,127.0.0.1:2,[::1]:3", client.WithToken("t"), ""},
		{"dns:///localhost:1", client.WithToken("t"), ""},
	} {
		c, err := client.New(test.target, test.option)
		if err == nil {
			_ = c.Close()
		}
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.target, err, test.want)
		}
	}
}

func TestATokenFileIsReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	server := clienttest.NewServer(t)
	c := server.Client(client.WithTokenFile(path))
	shown := func() string {
		if _, err := c.PushToUser(within(t), "alice", client.Text("x")); err != nil {
			t.Fatal(err)
		}
		pushes := server.Pushes()
		return pushes[len(pushes)-1].Token
	}
	if got := shown(); got != "first" {
		t.Errorf("%q", got)
	}
	write("") // a file that is being written
	client.ForgetTokens(t, c)
	if got := shown(); got != "first" {
		t.Errorf("%q", got)
	}
	write("second")
	client.ForgetTokens(t, c)
	if got := shown(); got != "second" {
		t.Errorf("%q", got)
	}
}

// TestEachPushIsASpan: one for all tries of a push, and Push-Manager's spans stand below it.
func TestEachPushIsASpan(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	pushers(t, func(t *testing.T, connect func(*client.Client) pusher) {
		server := clienttest.NewServer(t)
		server.Reply(clienttest.Refused(codes.ResourceExhausted, "OVERLOADED", time.Millisecond), clienttest.Delivered(), clienttest.Error(codes.Internal, "x"))
		p := connect(server.Client(client.WithTracerProvider(provider)))
		spans.Reset()
		ctx, parent := provider.Tracer("test").Start(within(t), "parent")
		for range 2 {
			_, _ = p.Push(ctx, client.Room("lobby"), client.Text("x"))
		}
		parent.End()
		var names []string
		for _, s := range spans.Ended() {
			names = append(names, s.Name()+" "+s.Status().Code.String())
			if s.Name() != "parent" && s.Parent().SpanID() != parent.SpanContext().SpanID() {
				t.Errorf("%s is below %v", s.Name(), s.Parent().SpanID())
			}
		}
		if want := []string{"PushToRoom Unset", "PushToRoom Error", "parent Unset"}; !slices.Equal(names, want) {
			t.Errorf("%q, want %q", names, want)
		}
	})
}

func TestTheTraceGoesAlong(t *testing.T) {
	provider := sdktrace.NewTracerProvider()
	ctx, parent := provider.Tracer("test").Start(within(t), "parent")
	defer parent.End()
	if got := client.Traceparent(t, ctx); !strings.Contains(got, parent.SpanContext().TraceID().String()) {
		t.Errorf("%q", got)
	}
	if got := client.Traceparent(t, t.Context()); got != "" {
		t.Errorf("%q of nothing", got)
	}
	var sent []string
	c := clienttest.NewServer(t).Client(client.WithTracerProvider(provider), client.WithDialOptions(grpc.WithUnaryInterceptor(
		func(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
			md, _ := metadata.FromOutgoingContext(ctx)
			sent = md.Get("traceparent")
			return invoke(ctx, method, request, reply, conn, options...)
		})))
	if _, err := c.PushToUser(ctx, "alice", client.Text("x")); err != nil || len(sent) != 1 || !strings.Contains(sent[0], parent.SpanContext().TraceID().String()) {
		t.Errorf("a push has %q: %v", sent, err)
	}
}

// TestCallsAreSpread: every instance gets its share, and one that is away gets none.
func TestCallsAreSpread(t *testing.T) {
	var counts [3]atomic.Int64
	addresses := make([]string, len(counts))
	stop := make([]func(), len(counts))
	for i := range counts {
		listen, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addresses[i] = listen.Addr().String()
		server := clienttest.NewServer(t)
		server.Handle(func(clienttest.Push) clienttest.Reply { counts[i].Add(1); return clienttest.Delivered() })
		stop[i] = server.Serve(listen)
	}
	c, err := client.New(strings.Join(addresses, ","))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	push := func() {
		if _, err := c.PushToUser(within(t), "alice", client.Text("x")); err != nil {
			t.Error(err)
		}
	}
	for deadline := time.Now().Add(patience); counts[0].Load() == 0 || counts[1].Load() == 0 || counts[2].Load() == 0; {
		if push(); time.Now().After(deadline) {
			t.Fatal("not all instances get pushes")
		}
	}
	before := [3]int64{counts[0].Load(), counts[1].Load(), counts[2].Load()}
	for range 300 {
		push()
	}
	for i := range counts {
		if n := counts[i].Load() - before[i]; n < 90 || n > 110 {
			t.Errorf("instance %d had %d of 300", i, n)
		}
	}
	stop[0]()
	for row := 0; row < 100; row++ { // one that was on its way there is unknown
		if _, err := c.PushToUser(within(t), "alice", client.Text("x")); errors.Is(err, client.ErrUnknown) {
			row = 0
		} else if err != nil {
			t.Error(err)
		}
	}
}

// TestAnInstanceThatIsNotReadyGetsNothing: its health says so.
func TestAnInstanceThatIsNotReadyGetsNothing(t *testing.T) {
	server := clienttest.NewServer(t)
	server.SetReady(false)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := server.Client().PushToUser(ctx, "alice", client.Text("x"))
	var failed *client.Error
	if !errors.As(err, &failed) || !failed.NotSent || len(server.Pushes()) != 0 {
		t.Errorf("%v, %d pushes", err, len(server.Pushes()))
	}
	if _, err := server.Client(client.WithoutHealthChecks()).PushToUser(within(t), "alice", client.Text("x")); err != nil {
		t.Error(err)
	}
	waiting := server.Client()
	var pushed sync.WaitGroup
	pushed.Go(func() {
		if _, err := waiting.PushToUser(within(t), "alice", client.Text("x")); err != nil {
			t.Error(err)
		}
	})
	server.SetReady(true)
	pushed.Wait()
}
