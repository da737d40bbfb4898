package link

import (
	"sync/atomic"
	"time"
)

const (
	// tick is how often the clock looks at the links. What is due is settled within
	// one tick, half of the 50 ms within which callers learn of a stall.
	tick = 25 * time.Millisecond
	// tickMax is the most running time that one tick counts for. A longer one means
	// that we were not running, and could not have read what the nodes sent.
	tickMax = 4 * tick
)

// clock is the coarse time of a set, in nanoseconds since it was made. The set's
// clock goroutine moves it; reading it costs one load.
type clock struct {
	start time.Time
	real  atomic.Int64 // what has passed
	ran   atomic.Int64 // the same without the time in which we were not running
}

func newClock() *clock { return &clock{start: time.Now()} }

// advance reads the time.
func (c *clock) advance() {
	now := int64(time.Since(c.start))
	passed := now - c.real.Load()
	c.real.Store(now)
	c.ran.Add(min(passed, int64(tickMax)))
}

// of converts a moment to real time. The zero moment is never.
func (c *clock) of(t time.Time) int64 {
	if t.IsZero() {
		return noDeadline
	}
	return int64(t.Sub(c.start))
}
