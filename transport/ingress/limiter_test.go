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
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// limiterOf takes so many calls at a time.
func limiterOf(calls int64) *limiter {
	l := newLimiter(1, 256, metrics.NewSet())
	l.limit = calls
	return l
}

// fillLimiter makes a limiter work on so many calls.
func fillLimiter(t *testing.T, l *limiter, calls int) (empty func()) {
	t.Helper()
	var all []*tally
	for range calls {
		began, err := l.enter(t.Context(), nil, time.Now(), engine.Critical)
		ok(t, err)
		all = append(all, began)
	}
	return func() {
		for _, began := range all {
			l.leave(began)
		}
	}
}

// keepFull makes a limiter work on so many calls at any time, or for a moment on twice as many.
func keepFull(t *testing.T, l *limiter, calls int) (empty func()) {
	t.Helper()
	last := fillLimiter(t, l, calls)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(spell / 2)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				last()
				return
			case <-tick.C:
				next := fillLimiter(t, l, calls)
				last()
				last = next
			}
		}
	}()
	return func() {
		close(stop)
		<-stopped
	}
}

// heldConn is a connection with calls of a priority, and the side of its client.
func heldConn(l *limiter, p engine.Priority) (c *conn, client net.Conn) {
	client, server := net.Pipe()
	c = newConn(server, l, time.Hour)
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
		l := limiterOf(0)
		defer l.close()
		read := make(chan *conn, 3)
		for range 3 {
			c, client := heldConn(l, engine.Low)
			defer func() { _ = c.Close() }()
			go reads(c, read)
			go func() { _, _ = client.Write([]byte("ping")) }()
		}
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
		if n := l.shiftAt(l.now()).worked(); n != 0 {
			t.Errorf("%d calls are worked on", n)
		}
		empty()
		if n := l.shiftAt(l.now()).worked(); n != 0 {
			t.Errorf("%d calls are worked on after they have ended", n)
		}
		defer fillLimiter(t, l, 2)()
		time.Sleep(10 * spell) // in which nobody comes
		if n := l.shiftAt(l.now()).worked(); n != 0 {
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
				s, err := l.enter(t.Context(), nil, time.Now(), p)
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
		s, err := l.enter(t.Context(), nil, time.Now(), engine.Low)
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
		if n := l.shiftAt(l.now()).all(); n != 0 || l.waiting.Load() != 0 {
			t.Errorf("%d calls are expected, %d connections wait", n, l.waiting.Load())
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
			var mu sync.Mutex
			var tallies []*tally
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
						c.hear()
						running.Go(func() {
							c.note(x.priority, l.now())
							began, err := l.enter(context.Background(), c, time.Now(), x.priority)
							if err != nil {
								return
							}
							mu.Lock()
							tallies = append(tallies, began)
							mu.Unlock()
							time.Sleep(x.answer)
							l.leave(began)
						})
					}
				})
			}
			running.Wait()
			tallies = append(tallies, l.shiftAt(l.now()).now)
			for _, of := range tallies {
				if worked, expected := of.worked.Load(), of.expected.Load(); worked != 0 || expected != 0 || l.waiting.Load() != 0 {
					wrong = fmt.Sprintf("%d calls are worked on, %d expected, %d connections wait", worked, expected, l.waiting.Load())
				}
			}
			l.close()
		})
		if wrong != "" {
			r.Fatal(wrong)
		}
	})
}

// Calls that have been read and that no core has had time for count as those that are worked on:
// else their connections are read on, and there are too many of them at once.
func TestCallsCountFromWhenTheyAreRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(10)
		defer l.close()
		c, client := heldConn(l, engine.Normal)
		defer func() { _ = c.Close() }()
		read := make(chan *conn)
		next := func(bytes int) {
			go reads(c, read)
			_, err := client.Write(make([]byte, bytes))
			ok(t, err)
			<-read
		}
		all := func() int64 { return l.shiftAt(l.now()).all() }
		next(10) // it looks like one or two calls, and is four
		for range 4 {
			c.hear()
		}
		go reads(c, read)
		synctest.Wait() // for the next ones
		if n := all(); n != 4 {
			t.Errorf("%d calls are expected, want 4", n)
		}
		var begun []*tally
		for range 3 {
			began, err := l.enter(t.Context(), c, time.Now(), engine.Normal)
			ok(t, err)
			begun = append(begun, began)
			if n := all(); n != 4 {
				t.Errorf("%d calls are worked on or expected, want 4", n)
			}
		}
		c.begin() // and is refused
		for _, began := range begun {
			l.leave(began)
		}
		if n := all(); n != 0 {
			t.Errorf("%d calls are expected, want none", n)
		}
		_, err := client.Write([]byte("one more"))
		ok(t, err)
		<-read
		c.hear() // its caller is gone before it begins
		time.Sleep(2 * spell)
		if n := all(); n != 0 {
			t.Errorf("%d calls are expected for good, want none", n)
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
// any that has waited for half a second. What is critical is taken all the same.
func TestCallsThatHaveWaitedTooLongAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer l.close()
		c, client := heldConn(l, engine.Normal)
		defer func() { _ = c.Close() }()
		defer keepFull(t, l, 2)()
		read := make(chan *conn)
		go reads(c, read)
		_, err := client.Write([]byte("call"))
		ok(t, err)
		<-read
		for _, test := range []struct {
			priority engine.Priority
			grants   time.Duration // 0: any time
			lag      time.Duration // 0: what it is
			refused  bool
		}{
			{engine.Normal, 0, 0, false},
			{engine.Normal, time.Second, 0, false},
			{engine.Normal, patience - time.Millisecond, 0, true},
			{engine.Critical, patience - time.Millisecond, 0, false},
			{engine.Normal, 0, stale, false},
			{engine.Normal, 0, stale + 1, true},
			{engine.Critical, 0, stale + 1, false},
		} {
			ctx, cancel := t.Context(), func() {}
			if test.grants > 0 {
				ctx, cancel = context.WithTimeout(ctx, test.grants)
			}
			if test.lag > 0 {
				c.lag.Store(int64(test.lag))
			}
			began, err := l.enter(ctx, c, time.Now(), test.priority)
			if errors.Is(err, errBusy) != test.refused {
				t.Errorf("%+v: %v", test, err)
			}
			if err == nil {
				l.leave(began)
			}
			cancel()
		}
	})
}

// counted counts the bytes that are read.
type counted struct {
	net.Conn
	read int
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.read += n
	return n, err //nolint:wrapcheck // it is the connection
}

// A connection whose bytes have waited for too long catches up without a pause. What comes
// later waits again.
func TestConnectionCatchesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer l.close()
		c, client := heldConn(l, engine.Normal)
		defer func() { _ = c.Close() }()
		socket := &counted{Conn: c.Conn}
		c.Conn = socket
		c.unread = func() int { return max(5*64-socket.read, 0) } // what is read last comes later
		defer keepFull(t, l, 2)()
		go func() {
			for range 6 {
				_, _ = client.Write(make([]byte, 64))
			}
		}()
		read := make(chan *conn)
		for i, want := range []bool{true, true, false, false, false, true} {
			began := time.Now()
			go reads(c, read)
			<-read
			if waited := time.Since(began); (waited > 0) != want || waited > patience+sweep {
				t.Errorf("read %d waits for %v", i, waited)
			}
		}
	})
}

// What had come long ago is not taken for new, however often a connection is read meanwhile.
func TestOldBytesStayOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(4)
		defer l.close()
		c, client := heldConn(l, engine.Normal)
		defer func() { _ = c.Close() }()
		const all, pause = 40, 20 * time.Millisecond
		socket := &counted{Conn: c.Conn}
		c.Conn = socket
		c.unread = func() int { return all*64 - socket.read }
		defer keepFull(t, l, 2)() // a crowd, but there is room
		go func() {
			for range all {
				_, _ = client.Write(make([]byte, 64))
			}
		}()
		began := time.Now()
		read := make(chan *conn)
		for i := range all {
			go reads(c, read)
			<-read
			age := time.Since(began)
			if lag := time.Duration(c.lag.Load()); lag < age-spell {
				t.Errorf("read %d: what has waited for %v is said to have waited for %v", i, age, lag)
			}
			time.Sleep(pause)
		}
	})
}

// What a new connection brings is new, however long the server has run; and it need not wait
// to say hello.
func TestNewConnectionIsGreetedAtOnceAndThenWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer l.close()
		time.Sleep(time.Hour)
		defer keepFull(t, l, 2)()
		client, server := net.Pipe()
		c := newConn(server, l, time.Hour)
		defer func() { _ = c.Close() }()
		c.unread = func() int { return 1000 } // its reader is late
		go func() {
			for range greeting/64 + 2 {
				_, _ = client.Write(make([]byte, 64))
			}
		}()
		read := make(chan *conn)
		began := time.Now()
		for range greeting / 64 {
			go reads(c, read)
			<-read
			if waited, lag := time.Since(began), time.Duration(c.lag.Load()); waited > 0 || lag > 0 {
				t.Errorf("the greeting waits for %v, and is said to have waited for %v", waited, lag)
			}
		}
		go reads(c, read)
		if <-read; time.Since(began) < patience {
			t.Errorf("the burst behind it waits for %v", time.Since(began))
		}
	})
}

// Whoever comes does not overtake those who wait.
func TestRoomIsForThoseWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(2)
		defer l.close()
		defer fillLimiter(t, l, 2)()
		read := make(chan *conn, 2)
		waits, client := heldConn(l, engine.High)
		defer func() { _ = waits.Close() }()
		go reads(waits, read)
		_, err := client.Write(make([]byte, callBytes)) // two calls, it may be: all that there is room for
		ok(t, err)
		time.Sleep(2*spell - time.Millisecond)
		late, client := heldConn(l, engine.Low)
		defer func() { _ = late.Close() }()
		if len(read) > 0 {
			t.Fatal("there is room too early")
		}
		l.mu.Lock()
		l.timer.Stop() // or it would find the room before the late one does
		l.mu.Unlock()
		time.Sleep(2 * time.Millisecond) // the call counts no more
		go reads(late, read)
		_, err = client.Write([]byte("call"))
		ok(t, err)
		if first := <-read; first != waits {
			t.Error("the late one is read first")
		}
	})
}

// Of a hundred that have waited for too long one more is read, unless too much is read already.
// Who has waited for a second is read whatever that means.
func TestMoreAreReadAtLastWhereManyWait(t *testing.T) {
	for _, test := range []struct {
		limit, filled int
		after         time.Duration
		want          int
	}{{300, 300, patience, 3}, {100, 200, patience, 1}, {100, 200, forsaken, int((forsaken-patience)/sweep) + 2}} {
		synctest.Test(t, func(t *testing.T) {
			l := limiterOf(int64(test.limit))
			defer l.close()
			defer keepFull(t, l, test.filled)()
			time.Sleep(time.Millisecond) // sweeps must not be when all its calls begin anew
			read := make(chan *conn, 250)
			for range 250 {
				c, client := heldConn(l, engine.Low)
				defer func() { _ = c.Close() }()
				go reads(c, read)
				go func() { _, _ = client.Write([]byte("call")) }()
			}
			time.Sleep(test.after + sweep/2)
			if got := len(read); got != test.want {
				t.Errorf("after %v %d are read, with %d calls of %d under way: want %d", test.after, got, test.filled, test.limit, test.want)
			}
		})
	}
}

// What a connection has brought counts for a short time, even if it is not looked at: else
// one that says much and listens to nothing would keep the others out.
func TestWhatIsExpectedDoesNotCountForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiterOf(100)
		defer l.close()
		c, client := heldConn(l, engine.Critical)
		defer func() { _ = c.Close() }()
		read := make(chan *conn)
		go func() {
			b := make([]byte, 1<<20)
			_, err := c.Read(b)
			ok(t, err)
			read <- c
		}()
		_, err := client.Write(make([]byte, 1<<20))
		ok(t, err)
		<-read
		if n := l.shiftAt(l.now()).all(); n != l.each {
			t.Errorf("%d calls are expected of a connection with %d under way at the most", n, l.each)
		}
		time.Sleep(2 * spell)
		if n := l.shiftAt(l.now()).all(); n != 0 {
			t.Errorf("%d calls are expected", n)
		}
	})
}

// A connection counts for what it was told lately.
func TestPriorityOfAConnectionIsForgotten(t *testing.T) {
	c, _ := heldConn(limiterOf(1), engine.Critical)
	at := time.Duration(0)
	for _, test := range []struct {
		pause    time.Duration
		p        engine.Priority
		priority engine.Priority // then
	}{
		{forgetPriority, engine.Low, engine.Critical},
		{1, engine.Low, engine.Low},
		{0, engine.Normal, engine.Normal},
		{forgetPriority / 2, engine.Normal, engine.Normal},
		{forgetPriority, engine.Low, engine.Normal}, // which was noted again
		{1, engine.Low, engine.Low},
	} {
		at += test.pause
		c.note(test.p, at)
		if got := engine.Priority(c.priority.Load()); got != test.priority {
			t.Errorf("after %v more and a call of %v priority it is %v, want %v", test.pause, test.p, got, test.priority)
		}
	}
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
			a.read(n, len(came)-taken, now)
			if taken == len(came) && a.after != now {
				r.Fatalf("all that has come is read at %d, and what comes is said to come after %d", now, a.after)
			}
		}
	})
}

// How many calls are in what was read is guessed: many at first, so that a burst is no
// surprise, and as many as there are once the connection's calls are known to be large.
func TestCallsInWhatWasReadAreGuessed(t *testing.T) {
	c, _ := heldConn(limiterOf(1<<20), engine.Normal)
	c.made.Store(0)
	take := func(n int) int64 {
		c.take(n, false, true)
		c.settle()
		return c.guess
	}
	const small = 20
	for range 2 { // and none of the first ones has shown up yet
		if calls := take(small * callBytes); calls < small {
			t.Errorf("%d calls are expected of %d", calls, small)
		}
	}
	for range 100 {
		c.made.Add(1)
		take(32 << 10)
	}
	if calls := take(32 << 10); calls > 3 {
		t.Errorf("%d calls are expected of one", calls)
	}
	for range 20_000 {
		c.made.Add(small)
		take(small * 100)
	}
	if calls := take(small * 100); calls < small*3/4 || calls > small*3/2 {
		t.Errorf("%d calls are expected of %d, now that they are small", calls, small)
	}
	for range 200 {
		c.made.Add(1)
		take(32 << 10)
	}
	if calls := take(32 << 10); calls > 3 {
		t.Errorf("%d calls are expected of one, now that they are large again", calls)
	}
}

// A PushStream tells how important its connection is, with each message.
func TestPushStreamSpeaksForItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var opened, seen atomic.Pointer[conn]
		w := newWorld(t, func(c *Config, _ *engine.Config) {
			c.Options = append(c.Options, grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
				opened.Store(connOf(ss.Context()))
				return handler(srv, ss)
			}))
		})
		w.server.cfg.Trace = func(ctx context.Context, _ string) (engine.Trace, func(engine.Result, error)) {
			seen.Store(connOf(ctx))
			return nil, nil
		}
		st := w.stream(claim(w.context(), "critical"))
		synctest.Wait()
		if c := opened.Load(); c == nil || engine.Priority(c.priority.Load()) != engine.Critical {
			t.Fatalf("before the first message the connection is %+v", c)
		}
		for i := range uint64(3) {
			ok(t, st.Send(userPush(i+1, "b", "x")))
			recv(t, st)
			_, err := w.client.PushToUser(claim(w.context(), "low"), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
			ok(t, err)
			if c := seen.Load(); c == nil || engine.Priority(c.priority.Load()) != engine.Critical {
				t.Fatalf("the connection is %+v", c)
			}
			time.Sleep(forgetPriority * 3 / 4)
		}
	})
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
