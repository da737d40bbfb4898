package ingress

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
)

// errNoSpace refuses a push for which there is no memory.
var errNoSpace = fmt.Errorf("%w: no memory for the request", engine.ErrOverloaded)

// space is a budget of bytes: for requests that are being read, and for pushes until they are
// answered. Whoever finds none waits in line, the highest priority first, and among equals who
// came first: a large request is not passed by small ones for ever. Of all bytes a priority may
// take its engine.Priority.Share, as of the pushes in flight.
//
// What is taken is given back, byte by byte; see reserve.
type space struct {
	// Static.
	most [4]int64 // by rank of the priority
	line int      // how many may wait, for each has something with it already

	mu      sync.Mutex
	taken   int64
	waiting int
	lines   [4]list.List // of *spaceWait, by rank
}

// spaceWait is one who waits.
type spaceWait struct {
	bytes   int64
	granted chan struct{} // closed with the space's lock held
}

func newSpace(bytes int, line int, set *metrics.Set) *space {
	s := &space{line: line}
	for _, p := range engine.Priorities() {
		s.most[p.Rank()] = int64(p.Share(bytes))
	}
	gauge := func(name string, value func() int64) {
		set.GetOrCreateGauge(name, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return float64(value())
		})
	}
	set.GetOrCreateGauge("push_manager_api_space_limit_bytes", func() float64 { return float64(bytes) })
	gauge("push_manager_api_space_bytes", func() int64 { return s.taken })
	gauge("push_manager_api_space_waiting", func() int64 { return int64(s.waiting) })
	return s
}

// reserve takes bytes for a push of priority p, and returns how many it has taken: all of its
// share, if that is less. It waits for them until ctx ends, and for patience at the longest
// unless that is 0. Who has reserved owes a release of as many, before anything else is
// reserved for the same: two who each have a part of what they need would wait for each other.
func (s *space) reserve(ctx context.Context, p engine.Priority, bytes int64, patience time.Duration) (int64, error) {
	rank := p.Rank()
	bytes = min(bytes, s.most[rank])
	s.mu.Lock()
	if s.fitsLocked(rank, bytes) {
		s.taken += bytes
		s.mu.Unlock()
		return bytes, nil
	}
	if patience > 0 && s.waiting >= s.line {
		s.mu.Unlock()
		return 0, errNoSpace
	}
	w := &spaceWait{bytes: bytes, granted: make(chan struct{})}
	place := s.lines[rank].PushBack(w)
	s.waiting++
	s.mu.Unlock()

	var late <-chan time.Time
	if patience > 0 {
		t := time.NewTimer(patience)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-w.granted:
		return bytes, nil
	case <-late:
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-w.granted: // meanwhile
		return bytes, nil
	default:
	}
	s.lines[rank].Remove(place)
	s.waiting--
	s.grantLocked() // those behind it may need less
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return 0, engine.ErrDeadline
	case ctx.Err() != nil:
		return 0, engine.ErrCanceled
	default:
		return 0, errNoSpace
	}
}

// try takes bytes without waiting. 0 means that there are none for it.
func (s *space) try(p engine.Priority, bytes int64) int64 {
	rank := p.Rank()
	bytes = min(bytes, s.most[rank])
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.fitsLocked(rank, bytes) {
		return 0
	}
	s.taken += bytes
	return bytes
}

// release gives back what was reserved, or a part of it.
func (s *space) release(bytes int64) {
	if bytes == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken -= bytes
	s.grantLocked()
}

// fitsLocked tells whether somebody who comes now need not wait.
func (s *space) fitsLocked(rank int, bytes int64) bool {
	for i := rank; s.waiting > 0 && i < len(s.lines); i++ {
		if s.lines[i].Len() > 0 {
			return false
		}
	}
	return s.taken+bytes <= s.most[rank]
}

// grantLocked lets in whom there are bytes for. Nobody passes one of a higher priority.
func (s *space) grantLocked() {
	for rank := len(s.lines) - 1; rank >= 0; rank-- {
		for e := s.lines[rank].Front(); e != nil; e = s.lines[rank].Front() {
			w := e.Value.(*spaceWait)
			if s.taken+w.bytes > s.most[rank] {
				return
			}
			s.lines[rank].Remove(e)
			s.waiting--
			s.taken += w.bytes
			close(w.granted)
		}
	}
}
