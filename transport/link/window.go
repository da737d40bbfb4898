package link

import (
	"github.com/push-manager/push-manager/engine"
)

// window holds what one stream has written and the node has not acknowledged, by
// seq. Seqs in [low, next) have a slot. A slot whose delivery was lost stays, with
// no delivery, until its ack comes: the node still owes it.
type window struct {
	pace
	ring    []slot // length 0 or a power of two
	low     uint64 // the oldest seq without an ack
	next    uint64 // the seq of the next delivery
	overdue uint64 // every seq below it that has no ack is overdue
	max     int    // slots at most
	live    int    // slots with a delivery
	bytes   int
	due     int64 // no slot has an earlier deadline; only a bound
}

type slot struct {
	entry
	written int64 // real time at which its frame was written; only of the last one of a frame, 0 of the others
	acked   bool
}

// pace is the congestion control of TCP, with deliveries for bytes and a stall for a loss: a
// stream starts small, doubles while the node acknowledges in time what fills the window, and
// falls back to half of what the node manages within the ack timeout when it does not. Then
// most of what a slow node cannot take fails in the queue, and does not become unknown.
type pace struct {
	cwnd     int // slots in use
	ssthresh int // from here on cwnd grows by one for each window that was acknowledged
	credit   int // acks towards that one
	acked    int // acks in this period
	before   int // acks in the one before
	period   int64
	full     bool // the writer has used all of cwnd
}

const (
	cwndStart = 64
	cwndMin   = 8
)

func newWindow(limit int) window {
	p := pace{cwnd: min(cwndStart, limit), ssthresh: limit}
	return window{low: 1, next: 1, overdue: 1, max: limit, pace: p, due: noDeadline}
}

// widen counts n acks and widens the window if it was too small.
func (w *window) widen(n int) {
	w.acked += n
	switch {
	case !w.full || w.stalled():
		return
	case w.cwnd < w.ssthresh:
		w.cwnd += n
	default:
		if w.credit += n; w.credit >= w.cwnd {
			w.credit = 0
			w.cwnd++
		}
	}
	w.cwnd = min(w.cwnd, w.max)
	w.full = false
}

// narrow narrows the window after a stall.
func (w *window) narrow() {
	w.cwnd = min(max(max(w.acked, w.before)/2, cwndMin), w.cwnd)
	w.ssthresh = w.cwnd
	w.credit = 0
}

// measure starts a new period of the pace each time one has passed.
func (w *window) measure(ran, length int64) {
	if ran-w.period >= length {
		w.period, w.before, w.acked = ran, w.acked, 0
	}
}

func (w *window) slot(seq uint64) *slot { return &w.ring[seq&uint64(len(w.ring)-1)] }

// free is the number of deliveries that may be written now.
func (w *window) free() int { return w.cwnd - int(w.next-w.low) }

// empty tells that the node owes nothing.
func (w *window) empty() bool { return w.low == w.next }

// stalled tells that the node owes an overdue ack.
func (w *window) stalled() bool { return w.low < w.overdue }

// push gives e the next seq. There is a free slot.
func (w *window) push(e entry) {
	if int(w.next-w.low) == len(w.ring) {
		w.grow()
	}
	*w.slot(w.next) = slot{entry: e}
	w.next++
	w.live++
	w.bytes += e.size
	w.due = min(w.due, e.deadline)
}

// ack takes the delivery that was written as seq, nil when it has been lost
// before. False means that seq is not owed.
func (w *window) ack(seq uint64) (*engine.Delivery, bool) {
	if seq < w.low || seq >= w.next {
		return nil, false
	}
	s := w.slot(seq)
	if s.acked {
		return nil, false
	}
	d := s.d
	if d != nil {
		w.live--
	}
	w.bytes -= s.size
	*s = slot{acked: true}
	for w.low < w.next && w.slot(w.low).acked {
		w.low++
	}
	w.overdue = max(w.overdue, w.low)
	return d, true
}

// writtenAt is when the frame was written that ends with seq; 0 if none does, or it is not owed.
func (w *window) writtenAt(seq uint64) int64 {
	if seq < w.low || seq >= w.next || w.slot(seq).acked {
		return 0
	}
	return w.slot(seq).written
}

// wasAcked tells whether a delivery was written as seq and has been acknowledged.
func (w *window) wasAcked(seq uint64) bool {
	return seq != 0 && seq < w.next && (seq < w.low || w.slot(seq).acked)
}

// popOverdue appends to dst the deliveries that were written at or before aged.
// From then on the window is stalled.
func (w *window) popOverdue(dst []*engine.Delivery, aged int64) []*engine.Delivery {
	for ; w.overdue < w.next; w.overdue++ {
		s := w.slot(w.overdue)
		if s.acked {
			continue
		}
		if s.at > aged {
			break
		}
		if s.d != nil {
			dst = append(dst, s.d)
			s.d = nil
			w.live--
		}
	}
	return dst
}

// popExpired appends to dst the deliveries whose deadline is at or before now.
func (w *window) popExpired(dst []*engine.Delivery, now int64) []*engine.Delivery {
	if w.due > now {
		return dst
	}
	w.due = noDeadline
	for seq := w.low; seq < w.next; seq++ {
		s := w.slot(seq)
		switch {
		case s.d == nil:
		case s.deadline <= now || s.d.Settled():
			dst = append(dst, s.d)
			s.d = nil
			w.live--
		default:
			w.due = min(w.due, s.deadline)
		}
	}
	return dst
}

// popAll appends all deliveries to dst. The window is of no use afterwards.
func (w *window) popAll(dst []*engine.Delivery) []*engine.Delivery {
	for seq := w.low; seq < w.next; seq++ {
		if d := w.slot(seq).d; d != nil {
			dst = append(dst, d)
		}
	}
	w.ring, w.bytes, w.live, w.low, w.overdue = nil, 0, 0, w.next, w.next
	return dst
}

func (w *window) grow() {
	next := make([]slot, max(16, 2*len(w.ring)))
	for seq := w.low; seq < w.next; seq++ {
		next[seq&uint64(len(next)-1)] = *w.slot(seq)
	}
	w.ring = next
}
