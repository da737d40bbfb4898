package load

import (
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// tick is the grid on which pushes are due at high rates: a wake-up for each tick
// and not for each push. The pushes between two ticks are due at the second, by
// schedule; none of them is late for being sent together.
const tick = time.Millisecond

// moment is a time since the start of a run, in nanoseconds.
type moment = int64

// clock is the time of a run.
type clock struct{ start time.Time }

func (c clock) now() moment { return int64(time.Since(c.start)) }

// schedule says when the pushes of a lane are due. One goroutine has it.
type schedule struct {
	gap    float64 // nanoseconds
	phase  float64 // of the gap and of the grid, so that lanes alternate
	grid   int64   // 0: none
	offset int64
	count  float64
	random *rand.Rand // nil: even distances
	at     float64    // with random
}

// newSchedule is that of one of several lanes that share a rate.
func newSchedule(cfg *Config, lane, lanes int) *schedule {
	s := &schedule{gap: float64(lanes) * 1e9 / cfg.Rate, phase: float64(lane) / float64(lanes)}
	if s.gap < float64(tick) {
		s.grid = int64(tick)
		s.offset = int64(s.phase * float64(tick))
	}
	if cfg.Poisson {
		s.random = rand.New(rand.NewPCG(cfg.Seed, 1<<32|uint64(lane)))
	}
	return s
}

// next is when the next push is due.
func (s *schedule) next() moment {
	var due float64
	if s.random != nil {
		s.at += s.random.ExpFloat64() * s.gap
		due = s.at
	} else {
		due = (s.count + s.phase) * s.gap // no error adds up
		s.count++
	}
	if s.grid == 0 {
		return int64(due)
	}
	steps := math.Ceil((due - float64(s.offset)) / float64(s.grid))
	return int64(steps)*s.grid + s.offset
}

// pacer lets the pushes of a lane go when they are due.
type pacer struct {
	clock clock
	end   *atomic.Int64 // moves forward when the run is stopped
	stop  <-chan struct{}
	nap   func(time.Duration)
	now   moment // the last look at the clock
}

// finer is what a nap takes of a wait. Before it a timer does, which a stop ends.
const finer = 2 * time.Millisecond

// wait returns true when the moment has come, and false when the run has ended or
// ends before.
func (p *pacer) wait(due moment) bool {
	if due >= p.end.Load() {
		return false
	}
	for due > p.now {
		if p.now = p.clock.now(); due <= p.now {
			break
		}
		left := time.Duration(due - p.now)
		if left <= finer {
			p.nap(left)
			continue
		}
		timer := time.NewTimer(left - finer/2)
		select {
		case <-timer.C:
		case <-p.stop:
			timer.Stop()
			return false
		}
	}
	return due < p.end.Load()
}
