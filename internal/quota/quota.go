package quota

import (
	"errors"
	"strconv"
	"sync/atomic"
	"time"
)

// Why a push is refused.
var (
	// ErrUsedUp: nothing is left of the day. It comes back at [Resets].
	ErrUsedUp = errors.New("the quota of the day is used up")
	// ErrPending: the next slice is on its way from etcd, in milliseconds.
	ErrPending = errors.New("the next part of the day's quota is not here yet")
	// ErrUnavailable: etcd does not answer, and Config.OnError is Deny.
	ErrUnavailable = errors.New("the quota cannot be checked now")
)

const (
	// slices is how many a day's limit is handed out in. The error of a quota is a slice for each instance that
	// holds one and has no use for it.
	slices = 1000
	// maxPace is how many slices at once are taken by who spends one within hurry: requests to etcd take a while.
	maxPace, hurry = 4, 250 * time.Millisecond
	// share is the part of what is left that a slice may be: slices shrink as the day's end nears.
	share = 8
	// credit is the part of what is left, less the last fifth of the limit, that an instance may spend before it has
	// it. What it knows of the counter is as old as a request, and others spend meanwhile: without credit for the last
	// fifth, an instance exceeds the limit by a hundredth only if others spend a third of the day within a request.
	credit, last = 16, 5
)

// Quota is the pushes that a tenant or a caller may ask for in a day.
type Quota struct {
	// Static.
	prefix string // of the key
	wake   chan struct{}

	// Of all pushes.
	left atomic.Int64 // may be spent here; below 0 it is on credit
	due  atomic.Bool  // the loop has to look at it

	// Written by whoever holds Set.mu.
	low   atomic.Int64 // below it the loop is told
	floor atomic.Int64 // below it a push is refused
	why   atomic.Int32 // with which of refusals

	// Guarded by Set.mu.
	limit    int64
	counter  int64 // what is handed out of the day, over all instances, when it was read last
	revision int64 // of the key then, 0 for none
	known    bool  // counter has been read since this Quota was made
	taken    int64 // of counter by this instance
	read     time.Time
	pace     int64     // slices that are taken at once, 1 to maxPace
	granted  time.Time // when the last of them came
	unmoved  int64     // left at that time
	doubted  bool      // a bad value was logged today
}

// The values of Quota.why.
const (
	usedUp int32 = iota
	pending
	unavailable
)

// Take spends a push. It does not wait. Its error is ErrUsedUp, ErrPending or ErrUnavailable, and nothing is spent then.
func (q *Quota) Take() error {
	n := q.left.Add(-1)
	if n >= q.low.Load() {
		return nil
	}
	if !q.due.Swap(true) {
		notify(q.wake)
	}
	if n >= q.floor.Load() {
		return nil
	}
	q.left.Add(1)
	switch q.why.Load() {
	case pending:
		return ErrPending
	case unavailable:
		return ErrUnavailable
	default:
		return ErrUsedUp
	}
}

// Left is what may be spent here before more is asked for. Other instances may hold more of the day.
func (q *Quota) Left() int64 { return max(q.left.Load(), 0) }

// Return gives back what Take took, for a push that was refused after it.
func (q *Quota) Return() { q.left.Add(1) }

// key is that of a day.
func (q *Quota) key(day string) string { return q.prefix + day }

// restLocked is what nobody has taken.
func (q *Quota) restLocked() int64 { return max(q.limit-q.counter, 0) }

// sliceLocked is how much is held.
func (q *Quota) sliceLocked() int64 {
	rest := q.restLocked()
	return min(max(min(q.limit/(slices/max(q.pace, 1)), rest/share), 1), rest)
}

// wantLocked is how much to take now, debts included.
func (q *Quota) wantLocked() int64 {
	left := q.left.Load()
	if rest := q.restLocked(); left < q.low.Load() {
		return min(q.sliceLocked()-left, rest)
	}
	return 0
}

// boundLocked sets what Take goes by.
func (q *Quota) boundLocked(away, deny bool) {
	rest, slice := q.restLocked(), q.sliceLocked()
	low, floor, why := max(slice/2, 1), int64(0), usedUp
	switch {
	case rest == 0:
		low = 0
	case deny && (away || !q.known):
		why = unavailable
	case away:
		floor = -rest // more would be over the limit even if all others were silent
	default:
		floor, why = -max(rest-q.limit/last, 0)/credit, pending
	}
	q.floor.Store(floor)
	q.why.Store(why)
	q.low.Store(low)
}

// grantedLocked books what was taken from the counter.
func (q *Quota) grantedLocked(n, revision int64, now time.Time) {
	if now.Sub(q.granted) < hurry {
		q.pace = min(max(q.pace, 1)*2, maxPace)
	} else {
		q.pace = max(q.pace/2, 1)
	}
	q.granted = now
	q.counter += n
	q.taken += n
	q.revision, q.known = revision, true
	q.left.Add(n)
	q.unmoved = q.left.Load()
}

// learnLocked takes notice of the counter. It tells whether the value is good: a count, and no less than what this
// instance has taken.
func (q *Quota) learnLocked(value []byte, revision int64) (good bool) {
	q.revision, q.known = revision, true
	q.unmoved = q.left.Load()
	count, ok := int64(0), true
	if revision != 0 {
		count, ok = parse(value)
	}
	if !ok {
		count = q.counter // the best that is known; the next slice replaces the value
	}
	q.counter = max(count, q.taken)
	return ok && count >= q.taken
}

// parse reads a counter as this package writes it.
func parse(value []byte) (int64, bool) {
	if len(value) == 0 || len(value) > 19 || value[0] < '0' || value[0] > '9' {
		return 0, false
	}
	n, err := strconv.ParseInt(string(value), 10, 64)
	return n, err == nil
}

// notify leaves a token in c, which holds one.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
