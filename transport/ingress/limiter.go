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
	// stale is for how long a call may have waited unread: after that it is refused, and its
	// connection is read on without a pause until it has caught up. How long one has waited
	// is known as a bound. It is up to twice as long as it is: of what came while a
	// connection waited for 250 ms is known that it was not there before, no more.
	stale = 2 * patience
	// patience is for how long a connection waits at a time. Every sweep, one of those that
	// wait for longer, and one of a hundred more, is read although there is no room.
	patience = 250 * time.Millisecond
	// forsaken is how long one waits at most before it is read whatever is refused then: the
	// keepalive of either side must not take it for dead.
	forsaken   = 4 * patience
	sweep      = 10 * time.Millisecond
	sweepShare = 100
	// chunk is how much of a connection is read at a time while there is a crowd, so that
	// its next calls can be kept waiting: dozens of the usual size. With a half or twice of it
	// the rate is the same.
	chunk = 8 << 10
	// callBytes is what the smallest call takes on the wire, headers included. Those of a
	// connection count as what its calls have taken on average lately, if that is more.
	callBytes = 64
	// greeting is what a client sends at most before its first call: preface, settings and
	// window. A new connection does not wait for that.
	greeting = 128
)

// limiter keeps the unary calls that are worked on at a time to some hundreds. More of them
// are not answered sooner: each has a stack, a stream of gRPC and a push, and too many push
// each other out of the caches, until a push costs half as much again. So a connection is
// not read while there is no room for its calls. They stay in the buffers of the kernel, in
// a few bytes, and its client, whose calls under way are bounded, keeps back what follows.
// Of the connections that wait, those with the highest priority are read first, and those
// with critical calls do not wait at all.
//
// Refused is what has waited for too long, or for longer than its caller waits, and, when
// there are too many all the same, the lowest priority first: connections with calls of
// several priorities are not held back.
type limiter struct {
	// Static.
	limit int64 // calls
	each  int64 // calls under way on one connection, at the most
	began time.Time

	current atomic.Pointer[shift]
	waiting atomic.Int64 // connections
	closed  atomic.Bool  // written with the lock held

	mu    sync.Mutex // guards what follows, and that of the connections
	lines [4]line    // by rank of the priority
	timer *time.Timer
}

// shift is one spell, and what began in it and in the one before.
type shift struct {
	ends        time.Duration // since the limiter began
	now, before *tally
}

// tally counts the calls of one spell.
type tally struct {
	worked   atomic.Int64 // have begun, and have no answer
	expected atomic.Int64 // are in bytes that were read, and have not shown up
}

func (s *shift) worked() int64 { return s.now.worked.Load() + s.before.worked.Load() }

// all is how many calls are worked on or are about to be.
func (s *shift) all() int64 {
	return s.worked() + s.now.expected.Load() + s.before.expected.Load()
}

// newLimiter makes a limiter of so many calls for each core, from connections with so many
// calls under way at the most.
func newLimiter(calls, each int, set *metrics.Set) *limiter {
	l := &limiter{limit: int64(calls) * int64(runtime.GOMAXPROCS(0)), each: int64(each), began: time.Now()}
	l.current.Store(&shift{ends: spell, now: new(tally), before: new(tally)})
	set.GetOrCreateGauge("push_manager_api_worked", func() float64 { return float64(l.shiftAt(l.now()).worked()) })
	set.GetOrCreateGauge("push_manager_api_connections_waiting", func() float64 { return float64(l.waiting.Load()) })
	return l
}

// enter counts in a call that came on c. It returns the tally to leave, or errBusy.
func (l *limiter) enter(ctx context.Context, c *conn, now time.Time, p engine.Priority) (*tally, error) {
	defer c.begin()
	s := l.shiftAt(l.at(now))
	if p < engine.Critical && l.crowded(s) {
		lag := time.Duration(0)
		if c != nil {
			lag = time.Duration(c.lag.Load())
		}
		// gRPC counts the time that a caller grants from when it has read the call: by now
		// the caller may be gone.
		d, bounded := ctx.Deadline()
		if lag > stale || bounded && d.Sub(now) < lag || s.worked() >= most(l.limit, p) {
			return nil, errBusy
		}
	}
	s.now.worked.Add(1)
	return s.now, nil
}

// most is from how many calls on one of priority p is refused: twice the limit for low, three
// times for normal, four times for high. So many there are only when connections that are
// read for critical calls bring others: who can wait does.
func most(limit int64, p engine.Priority) int64 { return limit * int64(2+p.Rank()) }

// leave counts a call out, which may make room for a connection.
func (l *limiter) leave(t *tally) {
	t.worked.Add(-1)
	l.letIn()
}

// letIn lets in whoever waits, if there is room now.
func (l *limiter) letIn() {
	if l.waiting.Load() > 0 {
		l.mu.Lock()
		l.letInLocked(l.now())
		l.mu.Unlock()
	}
}

// now is the time since the limiter began.
func (l *limiter) now() time.Duration { return time.Since(l.began) }

// at is that of another moment.
func (l *limiter) at(t time.Time) time.Duration { return t.Sub(l.began) }

// close lets everybody in and refuses nobody, for good.
func (l *limiter) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed.Store(true)
	l.letInLocked(l.now())
	if l.timer != nil {
		l.timer.Stop()
	}
}

// shiftAt is that of a time.
func (l *limiter) shiftAt(at time.Duration) *shift {
	for {
		s := l.current.Load()
		if at < s.ends {
			return s
		}
		next := &shift{ends: s.ends + spell, now: new(tally), before: s.now}
		if at >= next.ends { // those of s are too old as well
			next.ends, next.before = at+spell, new(tally)
		}
		if l.current.CompareAndSwap(s, next) {
			return next
		}
	}
}

// crowded tells whether it is worth while to look closer.
func (l *limiter) crowded(s *shift) bool {
	return s.all() >= l.limit/2 && !l.closed.Load()
}

// full tells whether there is no room.
func (l *limiter) full(at time.Duration) bool { return l.shiftAt(at).all() >= l.limit }

// letInLocked lets in whom there is room for.
func (l *limiter) letInLocked(at time.Duration) {
	for rank := len(l.lines) - 1; rank >= 0; rank-- {
		for q := &l.lines[rank]; q.head() != nil; {
			if l.full(at) && !l.closed.Load() {
				return
			}
			l.letInFirstLocked(q, at)
		}
	}
}

// letInFirstLocked lets in the first of a line.
func (l *limiter) letInFirstLocked(q *line, at time.Duration) {
	c := q.pop()
	c.lined = false
	l.waiting.Add(-1)
	c.expect(at) // its reader waits, and lets us write what is the reader's
	c.turn <- struct{}{}
}

func (l *limiter) armLocked() {
	if l.timer == nil {
		l.timer = time.AfterFunc(sweep, l.sweep)
		return
	}
	l.timer.Reset(sweep)
}

// sweep lets in those that wait longest, if that is too long.
func (l *limiter) sweep() {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.now()
	for n := range 1 + l.waiting.Load()/sweepShare {
		var longest *line
		for i := range l.lines {
			if q := &l.lines[i]; q.head() != nil && (longest == nil || q.first.since < longest.first.since) {
				longest = q
			}
		}
		if longest == nil || at-longest.first.since < patience {
			break
		}
		if n > 0 && at-longest.first.since < forsaken && l.shiftAt(at).all() >= most(l.limit, engine.Low) {
			break // to read more of them would be to refuse more
		}
		l.letInFirstLocked(longest, at)
	}
	l.letInLocked(at)
	if l.waiting.Load() > 0 {
		l.armLocked()
	}
}

// line is the connections of one priority that wait, the first of them first. It is guarded by
// the limiter's lock.
type line struct{ first, last *conn }

func (q *line) push(c *conn) {
	c.next = nil
	if q.first == nil {
		q.first, q.last = c, c
	} else {
		q.last.next, q.last = c, c
	}
}

// head is the first that still waits, nil for none.
func (q *line) head() *conn {
	for q.first != nil && !q.first.lined {
		q.pop() // closed meanwhile
	}
	return q.first
}

func (q *line) pop() *conn {
	c := q.first
	q.first, c.next = c.next, nil // one that is closed holds no other
	if q.first == nil {
		q.last = nil
	}
	return c
}
