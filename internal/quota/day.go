package quota

import "time"

// backwards is how far a clock must go back to be believed: a step at midnight must not begin yesterday again.
const backwards = time.Hour

// dayOf is the beginning of the day that a moment belongs to.
func dayOf(now time.Time) time.Time { return now.UTC().Truncate(24 * time.Hour) }

// Resets is when the quotas of now's day end: midnight UTC.
func Resets(now time.Time) time.Time { return dayOf(now).Add(24 * time.Hour) }

// UntilReset is how long it is until [Resets] of now.
func UntilReset() time.Duration {
	now := time.Now()
	return Resets(now).Sub(now)
}

// begin starts a new day when it is there.
func (s *Set) begin(now time.Time) {
	day := dayOf(now)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !day.After(s.day) && s.day.Sub(now) < backwards {
		return
	}
	s.day, s.lease = day, 0
	for q := range s.all() {
		q.resetLocked()
		q.boundLocked(s.away, s.deny())
	}
}

// resetLocked begins a day.
func (q *Quota) resetLocked() {
	q.counter, q.revision, q.taken, q.doubted = 0, 0, 0, false
	q.left.Store(0)
	q.unmoved = 0
}
