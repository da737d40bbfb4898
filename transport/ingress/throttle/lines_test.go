package throttle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"
	"golang.org/x/net/http2"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func configOf() Config {
	return Config{
		Calls: 1, Timeout: time.Hour, HalfOpen: 1000, Metrics: metrics.NewSet(), Logger: slog.New(slog.DiscardHandler),
		Panicked: func(where string, v any) { panic(fmt.Sprint(where, ": ", v)) },
	}
}

// throttleOf takes so many calls at a time, and has one core.
func throttleOf(calls int64) *Throttle {
	th := New(configOf())
	th.limit, th.cores = calls, 1
	return th
}

// begin counts in a call on c, as the tap does.
func begin(th *Throttle, c *Conn) *Call {
	ctx := peer.NewContext(context.Background(), &peer.Peer{AuthInfo: AuthInfo{Conn: c}})
	return CallOf(th.Tap(ctx, nil))
}

// fill makes a Throttle work on so many calls.
func fill(th *Throttle, calls int) (empty func()) {
	all := make([]*Call, calls)
	for i := range all {
		all[i] = begin(th, &Conn{throttle: th})
	}
	return func() {
		for _, call := range all {
			call.End()
		}
	}
}

// keepFull makes a Throttle work on so many calls at any time, or for a moment on twice as many.
func keepFull(th *Throttle, calls int) (empty func()) {
	last := fill(th, calls)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for tick := time.NewTicker(windowTime / 2); ; {
			select {
			case <-stop:
				tick.Stop()
				last()
				return
			case <-tick.C:
				next := fill(th, calls)
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

const greeting = http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"

// connOf is a connection with calls of a priority that has said hello, and the side of its client.
func connOf(th *Throttle, p engine.Priority) (c *Conn, client net.Conn) {
	client, server := net.Pipe()
	c = newConn(server, th, th.conns.accept(server))
	c.frames.pass([]byte(greeting))
	c.slot.confirm()
	c.note(p, 0)
	return c, client
}

// data is a frame of DATA, whose payload may take its time.
func data(size int) []byte {
	return append([]byte{byte(size >> 16), byte(size >> 8), byte(size), 0, 0, 0, 0, 0, 1}, make([]byte, size)...)
}

// reads tells when a connection has been read.
func reads(c *Conn, read chan<- *Conn) {
	var b [64]byte
	if n, err := c.Read(b[:]); n > 0 && err == nil {
		read <- c
	}
}

// sends begins a Read of what is sent.
func sends(t *testing.T, c *Conn, client net.Conn, read chan<- *Conn) {
	t.Helper()
	go reads(c, read)
	_, err := client.Write(data(20))
	ok(t, err)
	synctest.Wait()
}

// over closes a connection, as gRPC does it: its reader finds out.
func over(t *testing.T, c *Conn) {
	t.Helper()
	ok(t, c.Close())
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes are read of a connection that is closed", n)
	}
}

func TestWaitingConnectionsAreReadInTheOrderOfTheirPriorities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(1)
		defer th.Close()
		empty := fill(th, 1)
		read := make(chan *Conn, 10)
		for _, p := range []engine.Priority{engine.Low, engine.Normal, engine.High, engine.Critical, engine.Low, engine.High} {
			c, client := connOf(th, p)
			sends(t, c, client, read)
		}
		critical := <-read
		if critical.Priority() != engine.Critical || len(read) > 0 || th.waiting.Load() != 5 {
			t.Fatalf("%v is read, and %d more, and %d wait", critical.Priority(), len(read), th.waiting.Load())
		}
		over(t, critical)
		empty()
		// The next one is let in when one is back for more.
		var order []engine.Priority
		for range 5 {
			synctest.Wait()
			if len(read) != 1 {
				t.Fatalf("%d are read at a time", len(read))
			}
			c := <-read
			order = append(order, c.Priority())
			over(t, c)
		}
		if want := []engine.Priority{engine.High, engine.High, engine.Normal, engine.Low, engine.Low}; !slices.Equal(order, want) {
			t.Errorf("the order is %v, want %v", order, want)
		}
	})
}

// A connection that is let in and does not come back keeps the others waiting for two windows at the
// most: its reader may wait for something else.
func TestConnectionThatIsNotBackForMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(10)
		defer th.Close()
		empty := fill(th, 10)
		read := make(chan *Conn, 2)
		for range 2 {
			c, client := connOf(th, engine.Normal)
			defer func() { _ = c.Close() }()
			sends(t, c, client, read)
		}
		empty()
		synctest.Wait()
		if len(read) != 1 {
			t.Fatalf("%d are let in at a time", len(read))
		}
		<-read
		began := time.Now()
		<-read
		if took := time.Since(began); took < windowTime || took > 2*windowTime+tick {
			t.Errorf("the second one waits for %v", took)
		}
	})
}

// Of those for whom there is never room, one is read every tick once it has waited for maxHold: it may
// have to say that it is alive.
func TestConnectionThatWaitsLongIsReadAtLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(0)
		defer th.Close()
		read := make(chan *Conn, 3)
		for range 3 {
			c, client := connOf(th, engine.Low)
			defer func() { _ = c.Close() }()
			sends(t, c, client, read)
		}
		began := time.Now()
		for i := range 3 {
			<-read
			if took := time.Since(began); took < maxHold+time.Duration(i)*tick || took > maxHold+time.Duration(i+2)*tick {
				t.Errorf("number %d is read after %v", i, took)
			}
		}
	})
}

// A call without an answer for long waits for a node, and keeps nobody out.
func TestCallsThatWaitForANodeKeepNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(2)
		defer th.Close()
		empty := fill(th, 2)
		c, client := connOf(th, engine.Low)
		defer func() { _ = c.Close() }()
		read := make(chan *Conn, 1)
		sends(t, c, client, read)
		began := time.Now()
		<-read
		if took := time.Since(began); took < windowTime || took > 2*windowTime+tick {
			t.Errorf("it is read after %v", took)
		}
		calls := func() int64 { return th.windowsAt(th.now()).calls() }
		if n := calls(); n != 0 {
			t.Errorf("%d calls count", n)
		}
		empty()
		if n := calls(); n != 0 {
			t.Errorf("%d calls count after they have ended", n)
		}
		defer fill(th, 2)()
		time.Sleep(10 * windowTime) // in which the process does not run
		if n := calls(); n != 2 {
			t.Errorf("%d calls count after a pause, want 2", n)
		}
		time.Sleep(windowTime)
		if n := calls(); n != 0 {
			t.Errorf("%d calls count a window later", n)
		}
	})
}

func TestTooManyCallsAtATimeAreRefusedByPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(2)
		defer th.Close()
		c, _ := connOf(th, engine.Critical)
		defer func() { _ = c.Close() }()
		for others := range 10 {
			for _, p := range engine.Priorities() {
				call := begin(th, c)
				err := call.Admit(t.Context(), p)
				refused := p < engine.Critical && others >= 2*(2+p.Rank())
				if errors.Is(err, ErrBusy) != refused || refused != errors.Is(err, engine.ErrOverloaded) {
					t.Errorf("%v, beside %d others: %v", p, others, err)
				}
				call.End()
			}
			fill(th, 1)
		}
	})
}

// A call that was kept waiting for longer than its caller grants is not pushed, unless it is critical.
func TestCallsWhoseCallersHaveGoneAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(2)
		defer th.Close()
		c, client := connOf(th, engine.Normal)
		defer func() { _ = c.Close() }()
		defer keepFull(th, 2)()
		read := make(chan *Conn, 1)
		sends(t, c, client, read)
		<-read
		for _, test := range []struct {
			priority engine.Priority
			grants   time.Duration // 0: any time
			refused  bool
		}{
			{engine.Normal, 0, false},
			{engine.Normal, time.Second, false},
			{engine.Normal, maxHold - time.Millisecond, true},
			{engine.Critical, maxHold - time.Millisecond, false},
		} {
			ctx, cancel := t.Context(), func() {}
			if test.grants > 0 {
				ctx, cancel = context.WithTimeout(ctx, test.grants)
			}
			call := begin(th, c)
			if err := call.Admit(ctx, test.priority); errors.Is(err, ErrBusy) != test.refused {
				t.Errorf("%+v: %v", test, err)
			}
			call.End()
			cancel()
		}
	})
}

// On the way down what was sent is taken: nobody waits, and nobody is refused for being one of too
// many.
func TestClosedThrottleKeepsNobodyBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(2)
		defer fill(th, 20)()
		read := make(chan *Conn, 2)
		var last *Conn
		for _, late := range []bool{false, true} {
			c, client := connOf(th, engine.Low)
			defer func() { _ = c.Close() }()
			go func() { _, _ = client.Write(data(20)) }()
			go reads(c, read)
			synctest.Wait()
			if !late && (len(read) > 0 || !c.Waiting()) {
				t.Fatal("it does not wait")
			}
			th.Close()
			last = c
		}
		began := time.Now()
		for range 2 {
			if <-read; time.Since(began) > 0 {
				t.Errorf("one has waited for %v", time.Since(began))
			}
		}
		call := begin(th, last)
		ok(t, call.Admit(t.Context(), engine.Low))
		call.End()
	})
}

// A connection that is closed while it waits is let go, and whoever waits behind it has its turn.
func TestClosedConnectionWaitsNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(2)
		defer th.Close()
		empty := fill(th, 2)
		read := make(chan *Conn, 2)
		gone, client := connOf(th, engine.Normal)
		sends(t, gone, client, read)
		next, client := connOf(th, engine.Normal)
		sends(t, next, client, read)
		ok(t, gone.Close())
		ok(t, gone.Close()) // again
		if got := <-read; got != gone {
			t.Fatal("the one behind it is let in")
		}
		empty()
		if got := <-read; got != next {
			t.Fatal("the one that is gone is let in")
		}
		over(t, next)
		over(t, gone)
		empty = fill(th, 2)
		last, client := connOf(th, engine.Normal)
		sends(t, last, client, read)
		ok(t, last.Close())
		if <-read; th.lines != [4]line{} {
			t.Error("nobody waits, and connections that are closed are kept in a line")
		}
		over(t, last)
		empty()
		if w := th.windowsAt(th.now()); w.calls() != 0 || w.reads() != 0 || th.waiting.Load() != 0 {
			t.Errorf("%d calls and %d reads count, %d connections wait", w.calls(), w.reads(), th.waiting.Load())
		}
	})
}

// Whatever comes and goes in whichever order, the counts add up, and everybody is read in the end.
func TestCountsAddUp(t *testing.T) {
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
			bytes:    rapid.IntRange(16, 2*readSize).Draw(r, "bytes"),
			leaves:   rapid.Bool().Draw(r, "leaves"),
		}
	}), 1, 8)
	rapid.Check(t, func(r *rapid.T) {
		limit, all := rapid.Int64Range(1, 8).Draw(r, "limit"), clients.Draw(r, "clients")
		var wrong string
		synctest.Test(t, func(*testing.T) {
			th := throttleOf(limit)
			var running sync.WaitGroup
			var mu sync.Mutex
			var counted []*window
			for _, x := range all {
				c, client := connOf(th, x.priority)
				running.Go(func() {
					for range x.writes {
						if _, err := client.Write(data(x.bytes)); err != nil {
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
						call := begin(th, c)
						running.Go(func() {
							defer call.End()
							if call.Admit(context.Background(), x.priority) == nil {
								time.Sleep(x.answer)
							}
							mu.Lock()
							defer mu.Unlock()
							counted = append(counted, call.window)
						})
					}
				})
			}
			running.Wait()
			counted = append(counted, th.windowsAt(th.now()).now)
			for _, w := range counted {
				if w.calls.Load() != 0 || w.reads.Load() != 0 || th.waiting.Load() != 0 || th.conns.open != 0 || len(th.conns.networks) != 0 {
					wrong = fmt.Sprintf("%d calls and %d reads count, %d connections wait, %d are open", w.calls.Load(), w.reads.Load(), th.waiting.Load(), th.conns.open)
				}
			}
			th.Close()
		})
		if wrong != "" {
			r.Fatal(wrong)
		}
	})
}

// The hello of a new connection does not wait, and what comes with it does.
func TestHelloDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(2)
		defer th.Close()
		defer keepFull(th, 2)()
		client, server := net.Pipe()
		c := newConn(server, th, th.conns.accept(server))
		defer func() { _ = c.Close() }()
		go func() { _, _ = client.Write(append([]byte(greeting), data(10<<10)...)) }()
		began := time.Now()
		b, read := make([]byte, 32<<10), 0
		for read < helloSize {
			n, err := c.Read(b)
			ok(t, err)
			read += n
		}
		if took := time.Since(began); took > 0 || read > helloSize {
			t.Errorf("%d bytes are read after %v", read, took)
		}
		n, err := c.Read(b)
		ok(t, err)
		if took := time.Since(began); took < maxHold || n != readSize {
			t.Errorf("%d bytes of what comes with it are read after %v", n, took)
		}
	})
}

// Calls that are over are kept neither by their connection nor by other calls: the headers of one may take
// 16 KiB, and more once they are a map.
func TestCallsThatAreOverAreForgotten(t *testing.T) {
	th := throttleOf(100)
	defer th.Close()
	c, _ := connOf(th, engine.Normal)
	defer func() { _ = c.Close() }()
	headers := make([]weak.Pointer[metadata.MD], 20)
	var open *Call
	for i := range headers {
		md := &metadata.MD{"x": {"y"}}
		headers[i] = weak.Make(md)
		call := CallOf(th.Tap(context.WithValue(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: AuthInfo{Conn: c}}), md, md), *md))
		if i == 3 {
			open = call
		} else {
			call.End()
		}
	}
	runtime.GC()
	for i, md := range headers {
		if kept := md.Value() != nil; kept != (i == 3) {
			t.Errorf("the headers of call %d are kept: %v", i, kept)
		}
	}
	open.End()
	runtime.KeepAlive(c)
}

// Whoever comes does not overtake those who wait.
func TestRoomIsForThoseWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(2)
		defer th.Close()
		defer fill(th, 2)()
		read := make(chan *Conn, 2)
		waits, client := connOf(th, engine.High)
		defer func() { _ = waits.Close() }()
		sends(t, waits, client, read)
		th.mu.Lock()
		th.timer.Stop() // or it would find the room before the late one does
		th.mu.Unlock()
		time.Sleep(windowTime)
		th.windowsAt(th.now())
		time.Sleep(windowTime) // the calls count no more
		late, client := connOf(th, engine.Low)
		defer func() { _ = late.Close() }()
		sends(t, late, client, read)
		if first := <-read; first != waits {
			t.Error("the late one is read first")
		}
	})
}

// Of a hundred that have waited for too long one more is read.
func TestMoreAreReadAtLastWhereManyWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := throttleOf(300)
		defer th.Close()
		defer keepFull(th, 300)()
		time.Sleep(time.Millisecond) // ticks must not be when all its calls begin anew
		read := make(chan *Conn, 250)
		for range 250 {
			c, client := connOf(th, engine.Low)
			defer func() { _ = c.Close() }()
			go reads(c, read)
			go func() { _, _ = client.Write(data(20)) }()
		}
		time.Sleep(maxHold + tick/2)
		if got := len(read); got != 3 {
			t.Errorf("%d are read, want 3", got)
		}
	})
}

// A connection counts for what it was told lately.
func TestPriorityOfAConnectionIsForgotten(t *testing.T) {
	c, _ := connOf(throttleOf(1), engine.Critical)
	defer func() { _ = c.Close() }()
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
		if got := c.Priority(); got != test.priority {
			t.Errorf("after %v more and a call of %v priority it is %v, want %v", test.pause, test.p, got, test.priority)
		}
	}
}

// broken panics when it is read.
type broken struct{ net.Conn }

func (broken) Read([]byte) (int, error) { panic("broken") }

// A panic costs the connection that it came from.
func TestPanicEndsTheConnection(t *testing.T) {
	told := ""
	cfg := configOf()
	cfg.Panicked = func(where string, _ any) { told = where }
	_, server := net.Pipe()
	th := New(cfg)
	c := newConn(broken{server}, th, th.conns.accept(server))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, errPanic) || told != "connection" {
		t.Errorf("%v, and %q is told", err, told)
	}
	ok(t, c.Close())
}
