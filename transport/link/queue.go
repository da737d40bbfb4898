package link

import (
	"math"

	"github.com/push-manager/push-manager/engine"
)

// entry is a delivery with what the clock needs to know about it.
type entry struct {
	d        *engine.Delivery
	size     int   // estimated bytes, as counted against the bounds
	at       int64 // running time: when it was queued, or when it was written
	deadline int64 // real time
}

// noDeadline is later than every moment.
const noDeadline = math.MaxInt64

// load is what waits in the queues of a link.
type load struct{ len, bytes int }

// queue is a first-in-first-out ring of entries that grows as needed. Its owner bounds it.
type queue struct {
	load *load   // in which it is counted
	ring []entry // length 0 or a power of two
	head int     // index of the first entry
	len  int
	due  int64 // no entry has an earlier deadline; only a bound

	// Of entries with a collapse key, see collapse.go. An entry's place is base and its index.
	latest map[collapseKey]uint64 // the place of the latest with the key; nil while there are none
	base   uint64
}

func (q *queue) slot(i int) *entry { return &q.ring[(q.head+i)&(len(q.ring)-1)] }

func (q *queue) push(e entry) {
	if q.len == len(q.ring) {
		q.grow()
	}
	if q.len == 0 {
		q.due = noDeadline
	}
	*q.slot(q.len) = e
	q.len++
	q.load.len++
	q.load.bytes += e.size
	q.due = min(q.due, e.deadline)
}

// pushFront puts back what pop has just taken.
func (q *queue) pushFront(e entry) {
	q.push(e)
	q.slot(q.len - 1).d = nil // there it is the last one
	q.head = (q.head - 1) & (len(q.ring) - 1)
	*q.slot(0) = e
	q.base--
	if o := e.d.Options(); o != nil {
		q.returns(collapseKeyOf(e.d, o))
	}
}

// pop takes the first entry. The queue is not empty.
func (q *queue) pop() entry {
	p := q.slot(0)
	e := *p
	p.d = nil
	q.head = (q.head + 1) & (len(q.ring) - 1)
	q.len--
	q.load.len--
	q.load.bytes -= e.size
	if q.latest != nil {
		q.leaves(e.d)
	}
	q.base++
	return e
}

// popAll appends all entries to dst and empties the queue.
func (q *queue) popAll(dst []*engine.Delivery) []*engine.Delivery {
	for q.len > 0 {
		dst = append(dst, q.pop().d)
	}
	return dst
}

// popExpired appends to dst the entries that were queued at or before aged, those
// whose deadline is at or before now, and those that are settled already.
func (q *queue) popExpired(dst []*engine.Delivery, aged, now int64) []*engine.Delivery {
	for q.len > 0 && q.slot(0).at <= aged {
		dst = append(dst, q.pop().d)
	}
	if q.len == 0 || q.due > now {
		return dst
	}
	kept, due := 0, int64(noDeadline)
	for i := range q.len {
		e := *q.slot(i)
		if e.deadline <= now || e.d.Settled() {
			dst = append(dst, e.d)
			q.load.len--
			q.load.bytes -= e.size
			continue
		}
		due = min(due, e.deadline)
		*q.slot(kept) = e
		kept++
	}
	for i := kept; i < q.len; i++ {
		q.slot(i).d = nil
	}
	q.len, q.due = kept, due
	if q.latest != nil {
		q.index()
	}
	return dst
}

func (q *queue) grow() {
	next := make([]entry, max(16, 2*len(q.ring)))
	for i := range q.len {
		next[i] = *q.slot(i)
	}
	q.ring, q.head = next, 0
}
