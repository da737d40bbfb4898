package ingress

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
)

// errBusy refuses a call that would be one of too many at a time.
var errBusy = fmt.Errorf("%w: too many calls at a time", engine.ErrOverloaded)

const (
	// spell is half of the longest time for which a call counts as worked on. What has no
	// answer after that waits for a node that is slow or far away, and must keep nobody
	// out. Our own part takes as long only of a call that comes to a crowd of many.
	spell = 25 * time.Millisecond
	// sweep is how often one connection that has waited for longer than patience is read
	// although there is no room: it may have more to say than calls.
	sweep    = 10 * time.Millisecond
	patience = 250 * time.Millisecond
	// chunk is how much of a connection is read at a time while there is a crowd, so that
	// its next calls can be kept waiting: some dozens of the usual size.
	chunk = 4 << 10
	// callBytes is what a small call takes on the wire, headers included.
	callBytes = 128
)

// limiter keeps the unary calls that are worked on at a time to some hundreds. More of them
// are not answered sooner: each has a stack, a stream of gRPC and a push, and too many push
// each other out of the caches, until a push costs half as much again. So a connection is
// not read while there is no room for its calls. They stay in the buffers of the kernel, in
// a few bytes, and its client, whose calls under way are bounded, keeps back what follows.
// Nobody has to be refused for that. Of the connections that wait, those with the highest
// priority are read first, and those with critical calls do not wait at all.
//
// What comes in over a connection with calls of several priorities is not held back by
// that. Of it, calls are refused when there are several times too many, the lowest priority
// first.
type limiter struct {
	// Static.
	limit int64 // calls
	began time.Time

	current atomic.Pointer[shift]
	waiting atomic.Int64 // connections

	mu       sync.Mutex // guards what follows, and that of the connections
	expected int64      // calls in bytes that were read and not yet looked at
	lines    [4]line    // by rank of the priority
	timer    *time.Timer
	closed   bool
}

// shift is the calls that began in one spell.
type shift struct {
	ends time.Duration // since the limiter began
	// Calls without an answer, of this spell and of the one before.
	calls, before *atomic.Int64
}

// worked is how many calls are worked on.
func (s *shift) worked() int64 { return s.calls.Load() + s.before.Load() }

// newLimiter makes a limiter of so many calls for each core.
func newLimiter(calls int, set *metrics.Set) *limiter {
	l := &limiter{limit: int64(calls) * int64(runtime.GOMAXPROCS(0)), began: time.Now()}
	l.current.Store(&shift{ends: spell, calls: new(atomic.Int64), before: new(atomic.Int64)})
	set.GetOrCreateGauge("push_manager_api_worked", func() float64 { return float64(l.shift(time.Since(l.began)).worked()) })
	set.GetOrCreateGauge("push_manager_api_connections_waiting", func() float64 { return float64(l.waiting.Load()) })
	return l
}

// enter counts a call in. It returns the shift to leave, or errBusy.
func (l *limiter) enter(ctx context.Context, now time.Time, p engine.Priority) (*shift, error) {
	at := now.Sub(l.began)
	s := l.shift(at)
	if l.crowded(s) {
		if c := connOf(ctx); c != nil {
			c.note(p, at)
		}
		// From twice the limit on low priority is refused, from four times on high.
		if p < engine.Critical && s.worked() >= l.limit*int64(p.Rank()+2) {
			return nil, errBusy
		}
	}
	s.calls.Add(1)
	return s, nil
}

// leave counts a call out, which may make room for another connection.
func (l *limiter) leave(s *shift) {
	s.calls.Add(-1)
	if l.waiting.Load() > 0 {
		l.mu.Lock()
		l.letIn(time.Since(l.began))
		l.mu.Unlock()
	}
}

// close lets everybody in, for good.
func (l *limiter) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.letIn(time.Since(l.began))
	if l.timer != nil {
		l.timer.Stop()
	}
}

// shift is that of a time.
func (l *limiter) shift(at time.Duration) *shift {
	for {
		s := l.current.Load()
		if at < s.ends {
			return s
		}
		next := &shift{ends: at + spell, calls: new(atomic.Int64), before: s.calls}
		if at >= s.ends+spell {
			next.before = new(atomic.Int64) // those of s are too old as well
		}
		if l.current.CompareAndSwap(s, next) {
			return next
		}
	}
}

// crowded tells whether it is worth while to look closer.
func (l *limiter) crowded(s *shift) bool { return s.worked() >= l.limit/2 }

// full tells whether there is no room. The lock is held.
func (l *limiter) full(at time.Duration) bool {
	return !l.closed && l.shift(at).worked()+l.expected >= l.limit
}

// letIn lets in whom there is room for. The lock is held.
func (l *limiter) letIn(at time.Duration) {
	for rank := len(l.lines) - 1; rank >= 0; rank-- {
		for q := &l.lines[rank]; q.first != nil; {
			if l.full(at) {
				return
			}
			l.admit(q.pop())
		}
	}
}

// admit lets one in. The lock is held.
func (l *limiter) admit(c *conn) {
	l.waiting.Add(-1)
	if c.closed {
		return // and let go by that
	}
	c.lined = false
	c.count()
	c.let <- struct{}{}
}

// sweep lets in the one that waits longest, if that is too long.
func (l *limiter) sweep() {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := time.Since(l.began)
	var longest *line
	for i := range l.lines {
		if q := &l.lines[i]; q.first != nil && (longest == nil || q.first.since < longest.first.since) {
			longest = q
		}
	}
	if longest != nil && at-longest.first.since >= patience {
		l.admit(longest.pop())
	}
	l.letIn(at)
	if l.waiting.Load() > 0 {
		l.timer.Reset(sweep)
	}
}

// line is the connections of one priority that wait, the first of them first.
type line struct{ first, last *conn }

func (q *line) push(c *conn) {
	c.next = nil
	if q.first == nil {
		q.first, q.last = c, c
	} else {
		q.last.next, q.last = c, c
	}
}

func (q *line) pop() *conn {
	c := q.first
	q.first = c.next
	return c
}
