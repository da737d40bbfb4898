package ingress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// limiterOf takes so many calls at a time.
func limiterOf(calls int64) *limiter {
	l := newLimiter(1, metrics.NewSet())
	l.limit = calls
	return l
}

// fillLimiter makes a limiter work on so many calls.
func fillLimiter(t *testing.T, l *limiter, calls int) (empty func()) {
	t.Helper()
	var all []*shift
	for range calls {
		s, err := l.enter(t.Context(), time.Now(), engine.Critical)
		ok(t, err)
		all = append(all, s)
	}
	return func() {
		for _, s := range all {
			l.leave(s)
		}
	}
}

// heldConn is a connection with calls of a priority, and the side of its client.
func heldConn(l *limiter, p engine.Priority) (c *conn, client net.Conn) {
	client, server := net.Pipe()
	c = newConn(server, l)
	c.note(p, 0)
	return c, client
}

// reads tells when a connection has been read.
func reads(c *conn, read chan<- *conn) {
	var b [64]byte
	if n, err := c.Read(b[:]); n > 0 && err == nil {
		read <- c
	}
}

func TestWaitingConnectionsAreReadInTheOrderOfTheirPriorities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(1)
		defer l.close()
		empty := fillLimiter(t, l, 1)
		read := make(chan *conn, 10)
		for _, p := range []engine.Priority{engine.Low, engine.Normal, engine.High, engine.Critical, engine.Low, engine.High} {
			c, client := heldConn(l, p)
			go reads(c, read)
			_, err := client.Write([]byte("call"))
			ok(t, err)
			synctest.Wait()
		}
		priorityOf := func(c *conn) engine.Priority { return engine.Priority(c.priority.Load()) }
		critical := <-read
		if priorityOf(critical) != engine.Critical || len(read) > 0 || l.waiting.Load() != 5 {
			t.Fatalf("%v is read, and %d more, and %d wait", priorityOf(critical), len(read), l.waiting.Load())
		}
		ok(t, critical.Close())
		empty()
		// Each that is let in is expected to bring a call, until it is closed.
		var order []engine.Priority
		for range 5 {
			synctest.Wait()
			if len(read) != 1 {
				t.Fatalf("%d are read at a time", len(read))
			}
			c := <-read
			order = append(order, priorityOf(c))
			ok(t, c.Close())
		}
		if want := []engine.Priority{engine.High, engine.High, engine.Normal, engine.Low, engine.Low}; !slices.Equal(order, want) {
			t.Errorf("the order is %v, want %v", order, want)
		}
	})
}

// Of those for whom there is never room, one is read every 10 ms once it has waited for
// 250 ms: it may have to say that it is alive.
func TestConnectionThatWaitsLongIsReadAtLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer l.close()
		l.expected.Store(10) // and nobody ever settles that
		read := make(chan *conn, 3)
		for range 3 {
			c, client := heldConn(l, engine.Low)
			defer func() { _ = c.Close() }()
			go reads(c, read)
			go func() { _, _ = client.Write([]byte("ping")) }()
		}
		l.current.Load().calls.Add(2) // a crowd, for as long as its spell lasts
		began := time.Now()
		for i := range 3 {
			<-read
			if took := time.Since(began); took < patience+time.Duration(i)*sweep || took > patience+time.Duration(i+2)*sweep {
				t.Errorf("number %d is read after %v", i, took)
			}
		}
	})
}

// A call without an answer for long waits for a node, and keeps nobody out.
func TestCallsThatWaitForANodeKeepNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer l.close()
		empty := fillLimiter(t, l, 2)
		c, client := heldConn(l, engine.Low)
		defer func() { _ = c.Close() }()
		read := make(chan *conn, 1)
		go reads(c, read)
		_, err := client.Write([]byte("call"))
		ok(t, err)
		began := time.Now()
		<-read
		if took := time.Since(began); took < spell || took > 2*spell+sweep {
			t.Errorf("it is read after %v", took)
		}
		if n := l.shift(time.Since(l.began)).worked(); n != 0 {
			t.Errorf("%d calls are worked on", n)
		}
		empty()
		if n := l.shift(time.Since(l.began)).worked(); n != 0 {
			t.Errorf("%d calls are worked on after they have ended", n)
		}
		defer fillLimiter(t, l, 2)()
		time.Sleep(10 * spell) // in which nobody comes
		if n := l.shift(time.Since(l.began)).worked(); n != 0 {
			t.Errorf("%d calls are worked on after a pause", n)
		}
	})
}

func TestTooManyCallsAtATimeAreRefusedByPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer l.close()
		for worked := range 10 {
			for _, p := range engine.Priorities() {
				s, err := l.enter(t.Context(), time.Now(), p)
				refused := p < engine.Critical && worked >= 2*(2+p.Rank())
				if errors.Is(err, errBusy) != refused || refused != errors.Is(err, engine.ErrOverloaded) {
					t.Errorf("%v, when %d are worked on: %v", p, worked, err)
				}
				if err == nil {
					l.leave(s)
				}
			}
			fillLimiter(t, l, 1)
		}
	})
}

// On the way down what was sent is taken: nobody waits, and nobody is refused for being one of
// too many.
func TestClosedLimiterKeepsNobodyBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer fillLimiter(t, l, 20)()
		read := make(chan *conn, 2)
		for _, late := range []bool{false, true} {
			c, client := heldConn(l, engine.Low)
			defer func() { _ = c.Close() }()
			go reads(c, read)
			_, err := client.Write([]byte("call"))
			ok(t, err)
			synctest.Wait()
			if !late && len(read) > 0 {
				t.Fatal("it does not wait")
			}
			l.close()
		}
		began := time.Now()
		for range 2 {
			if <-read; time.Since(began) > 0 {
				t.Errorf("one has waited for %v", time.Since(began))
			}
		}
		s, err := l.enter(t.Context(), time.Now(), engine.Low)
		ok(t, err)
		l.leave(s)
	})
}

// A connection that is closed while it waits is let go, whoever waits behind it has its
// turn, and nothing is expected of it.
func TestClosedConnectionWaitsNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer l.close()
		empty := fillLimiter(t, l, 2)
		read := make(chan *conn, 2)
		gone, client := heldConn(l, engine.Normal)
		go reads(gone, read)
		_, err := client.Write([]byte("call"))
		ok(t, err)
		synctest.Wait()
		next, client := heldConn(l, engine.Normal)
		go reads(next, read)
		_, err = client.Write([]byte("call"))
		ok(t, err)
		synctest.Wait()
		ok(t, gone.Close())
		ok(t, gone.Close()) // again
		if got := <-read; got != gone {
			t.Fatal("the one behind it is let in")
		}
		empty()
		if got := <-read; got != next {
			t.Fatal("the one that is gone is let in")
		}
		ok(t, next.Close())
		if l.expected.Load() != 0 || l.waiting.Load() != 0 {
			t.Errorf("%d calls are expected, %d connections wait", l.expected.Load(), l.waiting.Load())
		}
	})
}

// Whatever comes and goes in whichever order, nothing is left in the books, and everybody is
// read in the end.
func TestBooksOfTheLimiterBalance(t *testing.T) {
	type client struct {
		priority      engine.Priority
		pause, answer time.Duration
		writes, bytes int
		leaves        bool // its connection is closed here, whether it is read or not
	}
	priorities := engine.Priorities()
	clients := rapid.SliceOfN(rapid.Custom(func(r *rapid.T) client {
		return client{
			priority: rapid.SampledFrom(priorities[:]).Draw(r, "priority"),
			pause:    time.Duration(rapid.IntRange(0, 60).Draw(r, "pause")) * time.Millisecond,
			answer:   time.Duration(rapid.IntRange(0, 100).Draw(r, "answer")) * time.Millisecond,
			writes:   rapid.IntRange(0, 10).Draw(r, "writes"),
			bytes:    rapid.IntRange(1, 2*chunk).Draw(r, "bytes"),
			leaves:   rapid.Bool().Draw(r, "leaves"),
		}
	}), 1, 8)
	rapid.Check(t, func(r *rapid.T) {
		limit, all := rapid.Int64Range(1, 8).Draw(r, "limit"), clients.Draw(r, "clients")
		var wrong string
		synctest.Test(t, func(*testing.T) {
			l := limiterOf(limit)
			var running sync.WaitGroup
			for _, x := range all {
				c, client := heldConn(l, x.priority)
				running.Go(func() {
					for range x.writes {
						if _, err := client.Write(make([]byte, x.bytes)); err != nil {
							break
						}
						time.Sleep(x.pause)
					}
					if x.leaves {
						_ = c.Close()
					}
					_ = client.Close()
				})
				running.Go(func() {
					for b := make([]byte, 32<<10); ; {
						if _, err := c.Read(b); err != nil {
							_ = c.Close()
							return
						}
						running.Go(func() {
							if s, err := l.enter(context.Background(), time.Now(), x.priority); err == nil {
								time.Sleep(x.answer)
								l.leave(s)
							}
						})
					}
				})
			}
			running.Wait()
			if n := l.shift(time.Since(l.began)).worked(); n != 0 || l.expected.Load() != 0 || l.waiting.Load() != 0 {
				wrong = fmt.Sprintf("%d calls are worked on, %d expected, %d connections wait", n, l.expected.Load(), l.waiting.Load())
			}
			l.close()
		})
		if wrong != "" {
			r.Fatal(wrong)
		}
	})
}

// More calls than are worked on at a time, over many connections, are all taken in the end.
func TestAllCallsAreTakenWhileConnectionsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.server.limiter.limit = 64
		n := w.network.nodes[1]
		n.setKeep(true)
		var calls sync.WaitGroup
		for range 20 {
			conn := w.connect()
			defer func() { _ = conn.Close() }()
			client := pubsub.NewPushManagerServiceClient(conn)
			for range 20 {
				calls.Go(func() {
					res, err := client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
					if err != nil || !res.GetSuccess() {
						t.Errorf("%v, %v", res, err)
					}
				})
			}
		}
		waited := int64(0)
		done := make(chan struct{})
		go func() { calls.Wait(); close(done) }()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for over := false; !over; {
			select {
			case <-done:
				over = true
			case <-tick.C:
			}
			waited = max(waited, w.server.limiter.waiting.Load())
			for _, d := range n.take() {
				ack(d)
			}
		}
		if waited < 10 {
			t.Errorf("%d connections have waited", waited)
		}
		for _, p := range engine.Priorities() {
			if n := w.metric(fmt.Sprintf("push_manager_refused_total{priority=%q,reason=%q}", p, "busy")); n != "0" {
				t.Errorf("%s calls of %v priority are refused", n, p)
			}
		}
	})
}

// A call that has waited unread for longer than its caller grants is not pushed, and neither is
// any that has waited for half a second.
func TestCallsThatHaveWaitedTooLongAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer l.close()
		c, client := heldConn(l, engine.Normal)
		defer func() { _ = c.Close() }()
		ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: heldInfo{conn: c}})
		l.expected.Store(2) // and nobody ever settles that
		read := make(chan *conn)
		go reads(c, read)
		_, err := client.Write([]byte("call"))
		ok(t, err)
		<-read
		for _, test := range []struct {
			grants  time.Duration // 0: any time
			lag     time.Duration // 0: what it is
			refused bool
		}{{0, 0, false}, {time.Second, 0, false}, {patience - time.Millisecond, 0, true}, {0, stale, false}, {0, stale + 1, true}} {
			ctx := ctx
			if test.grants > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, test.grants)
				defer cancel()
			}
			if test.lag > 0 {
				c.lag.Store(int64(test.lag))
			}
			s, err := l.enter(ctx, time.Now(), engine.Normal)
			if errors.Is(err, errBusy) != test.refused {
				t.Errorf("%+v: %v", test, err)
			}
			if err == nil {
				l.leave(s)
			}
		}
		began := time.Now()
		go reads(c, read) // it has to catch up: no pause any more
		_, err = client.Write([]byte("call"))
		ok(t, err)
		if <-read; time.Since(began) > 0 {
			t.Errorf("it is read after %v", time.Since(began))
		}
	})
}

// What is said to have come after a moment has.
func TestAgeIsABound(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		var (
			a     age
			now   time.Duration
			came  []time.Duration // of each byte
			taken int
		)
		for range rapid.IntRange(1, 50).Draw(r, "steps") {
			now += time.Duration(rapid.IntRange(0, 100).Draw(r, "pause"))
			for range rapid.IntRange(0, 20).Draw(r, "came") {
				came = append(came, now)
			}
			n := min(len(came)-taken, rapid.IntRange(0, 20).Draw(r, "read"))
			if n == 0 {
				continue
			}
			oldest := came[taken]
			if after := a.after; oldest < after {
				r.Fatalf("what came at %d is said to have come after %d", oldest, after)
			}
			taken += n
			a.read(int64(taken), int64(len(came)-taken), now)
		}
	})
}

// How many calls are in what was read is guessed: many at first, so that a burst is no
// surprise, and as many as there are once the connection's calls are known to be large.
func TestCallsInWhatWasReadAreGuessed(t *testing.T) {
	c, _ := heldConn(limiterOf(1<<20), engine.Normal)
	c.made.Store(0)
	const small = 20
	for range 2 { // and none of the first ones has shown up yet
		if c.take(small*callBytes, true); c.calls < small {
			t.Errorf("%d calls are expected of %d", c.calls, small)
		}
		c.settle()
	}
	for range 100 {
		c.made.Add(1)
		c.take(32<<10, true)
		c.settle()
	}
	if c.calls > 3 {
		t.Errorf("%d calls are expected of one", c.calls)
	}
}

// A PushStream tells how important its connection is.
func TestPushStreamSpeaksForItsConnection(t *testing.T) {
	w := newWorld(t, nil)
	var seen atomic.Pointer[conn]
	w.server.cfg.Trace = func(ctx context.Context, _ string) (engine.Trace, func(engine.Result, error)) {
		seen.Store(connOf(ctx))
		return nil, nil
	}
	st := w.stream(claim(w.context(), "low"))
	ok(t, st.Send(userPush(1, "b", "x")))
	recv(t, st)
	if c := seen.Load(); c == nil || engine.Priority(c.priority.Load()) != engine.Low {
		t.Errorf("the connection is %+v", c)
	}
}

// Calls of low priority beyond the bound are refused, with the reason, when their connection
// has critical ones and is read for those.
func TestBusyIsAReasonToRefuse(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.Calls = 1 })
	n := w.network.nodes[0]
	n.setKeep(true)
	bound := runtime.GOMAXPROCS(0)
	var calls sync.WaitGroup
	refused := 0
	// Calls count for 25 ms at least, so on a slow machine it may take several attempts.
	for end := time.Now().Add(time.Minute); refused == 0 && time.Now().Before(end); {
		var mu sync.Mutex
		for range 2*bound + 2 {
			calls.Go(func() {
				ctx, cancel := context.WithTimeout(w.context(), 20*time.Millisecond)
				defer cancel()
				_, _ = w.client.PushToUser(claim(ctx, "critical"), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
			})
			calls.Go(func() {
				_, err := w.client.PushToUser(claim(w.context(), "low"), &pubsub.PushToUserRequest{UserId: "nobody", Content: content("x")})
				if status.Code(err) == codes.ResourceExhausted {
					wantError(t, err, codes.ResourceExhausted, "OVERLOADED", "")
					mu.Lock()
					defer mu.Unlock()
					refused++
				}
			})
		}
		calls.Wait()
	}
	if got := w.metric(fmt.Sprintf("push_manager_refused_total{priority=%q,reason=%q}", "low", "busy")); refused == 0 || got != fmt.Sprint(refused) {
		t.Errorf("%d are refused, %s counted", refused, got)
	}
}
