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
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// errNoSpace refuses a push for which there is no memory.
var errNoSpace = fmt.Errorf("%w: no memory for the request", engine.ErrOverloaded)

// space is a budget of bytes: for requests that are being read, and for pushes until they are
// answered. Whoever finds none waits in line, the highest priority first, and among equals who
// came first: a large request is not passed by small ones for ever. Of all bytes a priority may
// take its engine.Priority.Share, as of the pushes in flight.
//
// A connection that has its holderShare is let in only when no other of its priority waits: who
// sends many large requests at a time keeps nobody else out.
//
// What is taken is given back, byte by byte; see reserve.
type space struct {
	// Static.
	most [4]int64 // by rank of the priority
	each int64    // what a holder has when others come first
	line int      // how many may wait, for each has something with it already

	mu      sync.Mutex
	taken   int64
	waiting int
	lines   [4]list.List // of *spaceWait, by rank
}

// holderShare of the space is what one connection may have while others wait.
const holderShare = 8

// spaceWait is one who waits.
type spaceWait struct {
	bytes   int64
	holder  *throttle.Conn
	granted chan struct{} // closed with the space's lock held
}

func newSpace(bytes int, line int, set *metrics.Set) *space {
	s := &space{line: line, each: int64(bytes / holderShare)}
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

// reserve takes bytes for a push of priority p that came on h, and returns how many it has taken: all of its
// share, if that is less. It waits for them until ctx ends, and for maxWait at the longest
// unless that is 0. Who has reserved owes a release of as many, before anything else is
// reserved for the same: two who each have a part of what they need would wait for each other.
func (s *space) reserve(ctx context.Context, h *throttle.Conn, p engine.Priority, bytes int64, maxWait time.Duration) (int64, error) {
	rank := p.Rank()
	bytes = min(bytes, s.most[rank])
	s.mu.Lock()
	if s.fitsLocked(rank, bytes) {
		s.takeLocked(h, bytes)
		s.mu.Unlock()
		return bytes, nil
	}
	if maxWait > 0 && s.waiting >= s.line {
		s.mu.Unlock()
		return 0, errNoSpace
	}
	w := &spaceWait{bytes: bytes, holder: h, granted: make(chan struct{})}
	place := s.lines[rank].PushBack(w)
	s.waiting++
	s.mu.Unlock()

	var late <-chan time.Time
	if maxWait > 0 {
		t := time.NewTimer(maxWait)
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
	s.grantLocked()  // those behind it may need less
	err := ctx.Err() // asked once: the deadline may pass between two looks at it
	switch {
	case err == nil:
		return 0, errNoSpace
	case errors.Is(err, context.DeadlineExceeded):
		return 0, engine.ErrDeadline
	default:
		return 0, engine.ErrCanceled
	}
}

// try takes bytes without waiting. 0 means that there are none for it.
func (s *space) try(h *throttle.Conn, p engine.Priority, bytes int64) int64 {
	rank := p.Rank()
	bytes = min(bytes, s.most[rank])
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.fitsLocked(rank, bytes) {
		return 0
	}
	s.takeLocked(h, bytes)
	return bytes
}

func (s *space) takeLocked(h *throttle.Conn, bytes int64) {
	s.taken += bytes
	h.Space += bytes
}

// wanted tells whether anybody waits.
func (s *space) wanted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting > 0
}

// release gives back what was reserved, or a part of it.
func (s *space) release(h *throttle.Conn, bytes int64) {
	if bytes == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.takeLocked(h, -bytes)
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

// grantLocked lets in whom there are bytes for. Nobody passes one of a higher priority, and of
// the same one only those whose connection has too much.
func (s *space) grantLocked() {
	for rank := len(s.lines) - 1; rank >= 0; rank-- {
		for e := s.nextLocked(rank); e != nil; e = s.nextLocked(rank) {
			w := e.Value.(*spaceWait)
			if s.taken+w.bytes > s.most[rank] {
				return
			}
			s.lines[rank].Remove(e)
			s.waiting--
			s.takeLocked(w.holder, w.bytes)
			close(w.granted)
		}
	}
}

// nextLocked is who comes next in a line. Those whom it passes over are the calls and streams of
// holderShare connections at the most: no more can have too much.
func (s *space) nextLocked(rank int) *list.Element {
	for e := s.lines[rank].Front(); e != nil; e = e.Next() {
		if h := e.Value.(*spaceWait).holder; h.Space < s.each {
			return e
		}
	}
	return s.lines[rank].Front()
}
