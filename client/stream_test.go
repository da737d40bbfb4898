package client_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/client/clienttest"
	pubsub "github.com/push-manager/push-manager/proto"
)

func open(t *testing.T, c *client.Client, cfg client.StreamConfig) *client.Stream {
	t.Helper()
	s := c.Stream(cfg)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_ = s.Close(ctx) // again, where the test has done so
	})
	return s
}

func send(t *testing.T, s *client.Stream, to client.Target, text string, options ...client.PushOption) *client.Pending {
	t.Helper()
	p, err := s.Send(within(t), to, client.Text(text), options...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestAKeyKeepsItsOrder whatever is refused, cut and drained: of the pushes that are taken for a user, none comes behind a later one. Refusals and
// cuts are not mixed: a refusal that is lost in a cut is the exception that Stream names.
func TestAKeyKeepsItsOrder(t *testing.T) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 0))
		server := clienttest.NewServer(t)
		var mu sync.Mutex
		taken := map[string][]int{} // by user, in the order in which the server took them
		seen := map[string]bool{}
		cuts := 0
		server.Handle(func(p clienttest.Push) clienttest.Reply {
			mu.Lock()
			defer mu.Unlock()
			switch n := r.IntN(20); {
			case n < 6 && seed%2 == 0:
				return clienttest.Refused(codes.ResourceExhausted, "OVERLOADED", time.Duration(n)*time.Millisecond+1)
			case n == 6:
				go server.Drain()
			case n == 7 && seed%2 == 1 && cuts < 3:
				cuts++
				return clienttest.Broken()
			}
			if text := string(p.Message.Data); !seen[text] {
				seen[text] = true
				i, err := strconv.Atoi(text)
				if err != nil {
					t.Errorf("%q: %v", text, err)
				}
				taken[p.Target] = append(taken[p.Target], i)
			}
			return clienttest.Delivered()
		})
		c := server.Client()
		s := open(t, c, client.StreamConfig{Lanes: 1 + int(seed)%3, MaxOpen: 16})
		var all []*client.Pending
		for i := range 60 {
			var options []client.PushOption
			if i%2 == 0 {
				options = append(options, client.MessageID(strconv.Itoa(i)))
			}
			all = append(all, send(t, s, client.User(fmt.Sprint(i%3)), strconv.Itoa(i), options...))
		}
		if err := s.Close(within(t)); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		for user, order := range taken {
			if !slices.IsSorted(order) {
				t.Errorf("seed %d, %s: %v", seed, user, order)
			}
		}
		for i, p := range all {
			_, err := p.Wait(within(t))
			var failed *client.Error
			if errors.As(err, &failed) && failed.NotSent && seen[strconv.Itoa(i)] {
				t.Errorf("seed %d: push %d was taken: %v", seed, i, err)
			}
			if err == nil && !seen[strconv.Itoa(i)] {
				t.Errorf("seed %d: push %d was not taken", seed, i)
			}
		}
		mu.Unlock()
	}
}

// TestARefusedPushDoesNotOvertake: once a later push to the same user has gone out, it is not repeated. One to another user is.
func TestARefusedPushDoesNotOvertake(t *testing.T) {
	for _, test := range []struct {
		second client.Target
		want   codes.Code
	}{{client.User("alice"), codes.ResourceExhausted}, {client.User("bob"), codes.OK}, {client.Room("alice"), codes.OK}} {
		server := clienttest.NewServer(t)
		both := make(chan struct{})
		var mu sync.Mutex
		n := 0
		server.Handle(func(p clienttest.Push) clienttest.Reply {
			mu.Lock()
			n++
			first := n == 1
			mu.Unlock()
			if first {
				<-both // the second one is on its way
				return clienttest.Refused(codes.ResourceExhausted, "OVERLOADED", time.Millisecond)
			}
			return clienttest.Delivered()
		})
		s := open(t, server.Client(), client.StreamConfig{})
		first := send(t, s, client.User("alice"), "1")
		for len(server.Pushes()) == 0 {
			time.Sleep(time.Millisecond)
		}
		second := send(t, s, test.second, "2")
		time.Sleep(50 * time.Millisecond) // it goes out
		close(both)
		if _, err := first.Wait(within(t)); status.Code(err) != test.want {
			t.Errorf("then %v: %v, want %v", test.second, err, test.want)
		}
		if _, err := second.Wait(within(t)); err != nil {
			t.Error(err)
		}
	}
}

// TestADrainLosesNothing: what a stream that drains has not answered goes over another one, with and without an id.
func TestADrainLosesNothing(t *testing.T) {
	server := clienttest.NewServer(t)
	s := open(t, server.Client(), client.StreamConfig{})
	var draining sync.WaitGroup
	draining.Go(func() {
		for range 5 { // fewer than a push has tries
			server.Drain()
			time.Sleep(20 * time.Millisecond)
		}
	})
	var all []*client.Pending
	for i := range 2000 {
		all = append(all, send(t, s, client.User(strconv.Itoa(i%10)), strconv.Itoa(i)))
	}
	for i, p := range all {
		if r, err := p.Wait(within(t)); err != nil || r.Delivered != 1 {
			t.Fatalf("push %d: %+v %v", i, r, err)
		}
	}
	draining.Wait()
}

// TestAStreamHasBackPressure: Send waits while MaxOpen pushes have no answer.
func TestAStreamHasBackPressure(t *testing.T) {
	for _, most := range []int{3, 5000} { // MaxBytes are a multiple of neither
		t.Run(strconv.Itoa(most), func(t *testing.T) { hasBackPressure(t, most) })
	}
}

func hasBackPressure(t *testing.T, most int) {
	server := clienttest.NewServer(t)
	server.Reply(clienttest.Hanging())
	s := open(t, server.Client(), client.StreamConfig{MaxOpen: most})
	for range most {
		send(t, s, client.User("alice"), "x")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := s.Send(ctx, client.User("alice"), client.Text("x"))
	var failed *client.Error
	if !errors.As(err, &failed) || !failed.NotSent || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	soon, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := s.Close(soon); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if n := len(server.Pushes()); n > most {
		t.Errorf("%d came", n)
	}
}

// TestEveryPushOfAStreamEnds by its deadline, answered or not, sent or not.
func TestEveryPushOfAStreamEnds(t *testing.T) {
	server := clienttest.NewServer(t)
	server.Reply(clienttest.Delivered(), clienttest.Hanging())
	s := open(t, server.Client(), client.StreamConfig{})
	if _, err := send(t, s, client.User("alice"), "x").Wait(within(t)); err != nil { // the call is open now
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	p, err := s.Send(ctx, client.User("alice"), client.Text("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wait(within(t)); !errors.Is(err, client.ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("sent: %v", err)
	}
	server.SetReady(false)
	other := open(t, server.Client(), client.StreamConfig{})
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if p, err = other.Send(ctx, client.User("alice"), client.Text("x")); err != nil {
		t.Fatal(err)
	}
	var failed *client.Error
	if _, err := p.Wait(within(t)); !errors.As(err, &failed) || !failed.NotSent || failed.Code != codes.DeadlineExceeded {
		t.Errorf("not sent: %v", err)
	}
}

// TestNoPushIsLeftWithoutASweeper, not even one that comes while the sweeper ends the last one.
func TestNoPushIsLeftWithoutASweeper(t *testing.T) {
	c := clienttest.NewServer(t).Client()
	now := time.Now()
	for i := range 20_000 {
		l := client.NewLane(t, c)
		for range 10 {
			l.Take(now)
		}
		l.Woken()
		var sweeping atomic.Bool
		var taking sync.WaitGroup
		taking.Go(func() {
			for !sweeping.Load() { // no channel wakes it soon enough
				runtime.Gosched()
			}
			for range i % 1000 {
				sweeping.Load()
			}
			l.Take(now.Add(time.Hour))
		})
		runtime.Gosched()
		sweeping.Store(true)
		goesOn := l.Sweep(now)
		taking.Wait()
		if !goesOn && !l.Woken() {
			t.Fatal("a push has come, and the sweeper sleeps")
		}
	}
}

// TestASilentCallCostsNoLaterPush: it is ended when it has been silent for long enough, and not when there is something to push again.
func TestASilentCallCostsNoLaterPush(t *testing.T) {
	l := client.NewLane(t, clienttest.NewServer(t).Client())
	now := time.Now()
	l.Take(now.Add(time.Second))
	l.Write()
	for range 20 {
		if now = now.Add(time.Second); !ended(l.Cut) && !l.Sweep(now) {
			t.Fatal("nobody looks after a call that owes an answer")
		}
	}
	if !ended(l.Cut) {
		t.Error("it was silent for 20 s")
	}
}

// TestAPushWithAnIDOutlivesASilentCall: it is sent again over another one, and one without an id is unknown.
func TestAPushWithAnIDOutlivesASilentCall(t *testing.T) {
	server := clienttest.NewServer(t)
	server.Reply(clienttest.Hanging(), clienttest.Hanging(), clienttest.Delivered())
	s := open(t, server.Client(), client.StreamConfig{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	without, err := s.Send(ctx, client.User("bob"), client.Text("x"))
	if err != nil {
		t.Fatal(err)
	}
	with, err := s.Send(ctx, client.User("alice"), client.Text("x"), client.MessageID("m"))
	if err != nil {
		t.Fatal(err)
	}
	for len(server.Pushes()) < 2 {
		time.Sleep(time.Millisecond)
	}
	client.SweepAt(t, s, time.Now().Add(16*time.Second))
	if r, err := with.Wait(within(t)); err != nil || r.Delivered != 1 {
		t.Errorf("with an id: %+v, %v", r, err)
	}
	if _, err := without.Wait(within(t)); !errors.Is(err, client.ErrUnknown) {
		t.Errorf("without: %v", err)
	}
}

func TestAClosedStreamTakesNothing(t *testing.T) {
	s := clienttest.NewServer(t).Client().Stream(client.StreamConfig{})
	p := send(t, s, client.User("alice"), "x")
	if err := s.Close(within(t)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	default:
		t.Error("Close did not wait for a push")
	}
	_, err := s.Send(within(t), client.User("alice"), client.Text("x"))
	if !errors.Is(err, client.ErrClosed) || errors.Is(err, client.ErrUnknown) {
		t.Error(err)
	}
	if err := s.Close(within(t)); err != nil {
		t.Error(err)
	}
}

// TestAPushThatFailsLeavesItsRoom: refused, expired or not even taken.
func TestAPushThatFailsLeavesItsRoom(t *testing.T) {
	server := clienttest.NewServer(t)
	server.Handle(func(p clienttest.Push) clienttest.Reply {
		if string(p.Message.Data) == "hang" {
			return clienttest.Hanging()
		}
		return clienttest.Refused(codes.PermissionDenied, "PERMISSION_DENIED", 0)
	})
	s := open(t, server.Client(), client.StreamConfig{MaxOpen: 1})
	for range 3 {
		if _, err := send(t, s, client.User("alice"), "x").Wait(within(t)); status.Code(err) != codes.PermissionDenied {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		p, err := s.Send(ctx, client.User("alice"), client.Text("hang"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Wait(within(t)); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	}
	if err := s.Close(within(t)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Send(ctx, client.User("alice"), client.Text("x")); !errors.Is(err, client.ErrClosed) {
			t.Error(err)
		}
	}
}

// TestWhatWaitsBehindARefusalGoesOn when the refused push ends, whatever it ends by.
func TestWhatWaitsBehindARefusalGoesOn(t *testing.T) {
	c := clienttest.NewServer(t).Client()
	for _, retry := range []bool{false, true} {
		l := client.NewLane(t, c)
		now := time.Now()
		l.Take(now.Add(time.Minute))
		l.Write()
		l.Take(now.Add(time.Hour))
		l.Refuse(t.Context(), 1, retry)
		l.Write()
		if l.IsOpen(2) == retry {
			t.Errorf("to be repeated: %v, and the next one was written: %v", retry, !retry)
		}
		l.Sweep(now.Add(2 * time.Minute)) // the first one has expired
		l.Write()
		if !l.IsOpen(2) {
			t.Errorf("to be repeated: %v, and the next one waits for ever", retry)
		}
	}
}

// TestARefusedStreamIsBounded by the tries of its pushes, and by the budget.
func TestARefusedStreamIsBounded(t *testing.T) {
	for _, test := range []struct {
		retries client.Retries
		tries   int
	}{{client.Retries{Tries: 3}, 3}, {client.Retries{Tries: 100, Burst: 1, Ratio: 0.001}, 2}} {
		c := serveScript(t, func(stream grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error {
			if _, err := stream.Recv(); err != nil {
				return nil //nolint:nilerr // the caller has gone
			}
			return client.StatusOf(t, codes.Unavailable, "DRAINING", time.Millisecond).Err()
		}, client.WithRetries(test.retries))
		_, err := send(t, open(t, c, client.StreamConfig{}), client.User("alice"), "x").Wait(within(t))
		if failed, is := errors.AsType[*client.Error](err); !is || failed.Tries != test.tries || !failed.NotSent {
			t.Errorf("%+v: %v", test.retries, err)
		}
	}
}

// TestWhoHasAnsweredKnowsTheMethod: what it leaves without an answer is unknown, even if it denies to know the method then.
func TestWhoHasAnsweredKnowsTheMethod(t *testing.T) {
	for _, answers := range []bool{false, true} {
		c := serveScript(t, func(stream grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error {
			for n := 0; ; n++ {
				r, err := stream.Recv()
				if err != nil {
					return nil //nolint:nilerr // the caller has gone
				}
				if n > 0 || !answers {
					return status.Error(codes.Unimplemented, "of a proxy")
				}
				if err := stream.Send(deliveredTo(r.GetBatch()[0].GetId())); err != nil {
					return err
				}
			}
		})
		s := open(t, c, client.StreamConfig{})
		if answers {
			if _, err := send(t, s, client.User("alice"), "x").Wait(within(t)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := send(t, s, client.User("alice"), "x").Wait(within(t)); status.Code(err) != codes.Unimplemented || errors.Is(err, client.ErrUnknown) != answers {
			t.Errorf("it has answered: %v; %v", answers, err)
		}
	}
}

// scripted is a PushStream of a test's own.
type scripted struct {
	pubsub.UnimplementedPushManagerServiceServer

	serve func(grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error
}

func (s scripted) PushStream(stream grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error {
	return s.serve(stream)
}

func serveScript(t *testing.T, serve func(grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error, options ...client.Option) *client.Client {
	t.Helper()
	listen := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	pubsub.RegisterPushManagerServiceServer(server, scripted{serve: serve})
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listen) })
	c, err := client.New("passthrough:///script", append(options, client.WithoutHealthChecks(), client.WithTransportCredentials(insecure.NewCredentials()),
		client.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listen.DialContext(ctx) })))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); server.Stop(); serving.Wait() })
	return c
}

// TestAMessageThatIsTooLargeCostsNobodyElse: it ends the stream, and what was in the same message goes alone then.
func TestAMessageThatIsTooLargeCostsNobodyElse(t *testing.T) {
	const limit = 2000
	c := serveScript(t, func(stream grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error {
		for {
			r, err := stream.Recv()
			if err != nil {
				return nil //nolint:nilerr // the caller has gone
			}
			if r.SizeVT() > limit {
				return client.StatusOf(t, codes.ResourceExhausted, "REQUEST_TOO_LARGE", -1).Err()
			}
			for _, one := range r.GetBatch() {
				if err := stream.Send(deliveredTo(one.GetId())); err != nil {
					return err
				}
			}
		}
	})
	s := open(t, c, client.StreamConfig{})
	var small []*client.Pending
	for i := range 20 {
		small = append(small, send(t, s, client.User(strconv.Itoa(i)), "x"))
	}
	large := send(t, s, client.User("alice"), string(make([]byte, 2*limit)))
	for i := range 20 {
		small = append(small, send(t, s, client.User(strconv.Itoa(i)), "x"))
	}
	var failed *client.Error
	if _, err := large.Wait(within(t)); !errors.As(err, &failed) || failed.Reason != "REQUEST_TOO_LARGE" || !failed.NotSent {
		t.Error(err)
	}
	for i, p := range small {
		if _, err := p.Wait(within(t)); err != nil {
			t.Errorf("push %d: %v", i, err)
		}
	}
}

func deliveredTo(id uint64) *pubsub.PushStreamResponse {
	return &pubsub.PushStreamResponse{Id: id, Result: &pubsub.PushStreamResponse_ToUser{ToUser: &pubsub.PushToUserResponse{
		Success: true, Summary: &pubsub.DeliverySummary{Targets: 1, Delivered: 1},
	}}}
}

// TestAnswersThatMeanNothing make a push unknown at worst. They neither end others nor stop the Stream.
func TestAnswersThatMeanNothing(t *testing.T) {
	user := func(s *pubsub.DeliverySummary) *pubsub.PushStreamResponse {
		return &pubsub.PushStreamResponse{Result: &pubsub.PushStreamResponse_ToUser{ToUser: &pubsub.PushToUserResponse{Success: true, Summary: s}}}
	}
	for name, hostile := range map[string]*pubsub.PushStreamResponse{
		"neither a result nor an error": {},
		"another kind":                  {Result: &pubsub.PushStreamResponse_ToRoom{ToRoom: &pubsub.PushToRoomResponse{Summary: &pubsub.DeliverySummary{}}}},
		"no summary":                    user(nil),
		"a count below zero":            user(&pubsub.DeliverySummary{Targets: 1, Delivered: 2, Failed: -1}),
		"counts that do not add up":     user(&pubsub.DeliverySummary{Targets: 5, Delivered: 1}),
		"an error without a code":       {Error: status.New(codes.OK, "").Proto()},
		"an unknown code":               {Error: status.New(codes.Code(4711), "x").Proto()},
	} {
		c := serveScript(t, func(stream grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error {
			for {
				r, err := stream.Recv()
				if err != nil {
					return nil //nolint:nilerr // the caller has gone
				}
				for _, one := range r.GetBatch() {
					answer := deliveredTo(one.GetId())
					if string(one.GetToUser().GetContent().GetData()) == "bad" {
						hostile.Id = one.GetId()
						answer = hostile
					}
					// Those of pushes that never were, and one twice.
					for _, a := range []*pubsub.PushStreamResponse{deliveredTo(1 << 60), deliveredTo(0), answer, answer} {
						if err := stream.Send(a); err != nil {
							return err
						}
					}
				}
			}
		})
		s := open(t, c, client.StreamConfig{})
		bad, good := send(t, s, client.User("alice"), "bad"), send(t, s, client.User("bob"), "good")
		if _, err := bad.Wait(within(t)); !errors.Is(err, client.ErrUnknown) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := good.Wait(within(t)); err != nil {
			t.Errorf("%s: another push: %v", name, err)
		}
	}
}

// TestAStreamIsBatched: what is sent while the connection is busy goes out together.
func TestAStreamIsBatched(t *testing.T) {
	const pushes = 5000
	var mu sync.Mutex
	messages := 0
	c := serveScript(t, func(stream grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error {
		for {
			r, err := stream.Recv()
			if err != nil {
				return nil //nolint:nilerr // the caller has gone
			}
			mu.Lock()
			messages++
			mu.Unlock()
			a := new(pubsub.PushStreamResponse)
			for _, one := range r.GetBatch() {
				a.Batch = append(a.Batch, deliveredTo(one.GetId()))
			}
			if err := stream.Send(a); err != nil {
				return err
			}
		}
	})
	s := open(t, c, client.StreamConfig{})
	var sending sync.WaitGroup
	for range 8 {
		sending.Go(func() {
			var all []*client.Pending
			for range pushes / 8 {
				p, err := s.Send(within(t), client.User("alice"), client.Text("x"))
				if err != nil {
					t.Error(err)
					return
				}
				all = append(all, p)
			}
			for _, p := range all {
				if _, err := p.Wait(within(t)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	sending.Wait()
	mu.Lock()
	defer mu.Unlock()
	if messages > pushes/2 {
		t.Errorf("%d messages for %d pushes", messages, pushes)
	}
}

func ended(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
