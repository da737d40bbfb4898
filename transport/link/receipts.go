package link

import (
	"time"

	"github.com/push-manager/push-manager/engine"
)

const (
	// receiptsMax and receiptsBytes bound the deliveries of one stream whose receipts are open. A node
	// that takes 30,000 a second, each of which waits for its client for two seconds, has as many; a
	// delivery keeps its payload alive. What is more than that is given up at once: the clients
	// have been asked, and nobody can tell what they say.
	receiptsMax   = 1 << 16
	receiptsBytes = 64 << 20

	// receiptsSweep is how often the clock looks for deliveries that nobody awaits any more.
	receiptsSweep = time.Second
)

// receipts are the deliveries of one stream that the node has acknowledged, and whose clients are to do so,
// too. They are beside the window: nothing waits for people. Guarded by link.mu.
type receipts struct {
	open  map[uint64]confirming // by seq, nil while there are none
	bytes int
	swept int64 // running time
}

type confirming struct {
	d    *engine.Delivery
	size int
}

// add keeps d. False means that there is no room for it.
func (r *receipts) add(seq uint64, d *engine.Delivery) bool {
	size := d.Size()
	if len(r.open) >= receiptsMax || len(r.open) > 0 && r.bytes+size > receiptsBytes {
		return false
	}
	if r.open == nil {
		r.open = make(map[uint64]confirming)
	}
	r.open[seq] = confirming{d, size}
	r.bytes += size
	return true
}

// remove lets go of a delivery.
func (r *receipts) remove(seq uint64) {
	r.bytes -= r.open[seq].size
	if delete(r.open, seq); len(r.open) == 0 {
		r.open = nil // a map never shrinks
	}
}

// sweep lets go of the deliveries whose receipts nobody awaits any more.
func (r *receipts) sweep(ran int64) {
	if len(r.open) == 0 || ran-r.swept < int64(receiptsSweep) {
		return
	}
	r.swept = ran
	for seq, c := range r.open {
		if !c.d.AwaitsReceipts() {
			r.remove(seq)
		}
	}
}

// popAll takes all deliveries.
func (r *receipts) popAll() (list []*engine.Delivery) {
	for _, c := range r.open {
		list = append(list, c.d)
	}
	r.open, r.bytes = nil, 0
	return list
}

// await keeps a delivery that was acknowledged as seq and whose clients are to acknowledge.
func (s *stream) await(seq uint64, d *engine.Delivery) {
	l := s.link
	l.mu.Lock()
	ok := s.receipts.add(seq, d)
	l.mu.Unlock()
	if !ok {
		l.set.meters.receiptsLost.Inc()
		d.LoseReceipts()
	}
}

// confirm hands what the frame says of clients to their deliveries, and counts what cannot be. What was
// given up before is late.
func (s *stream) confirm() (strikes int) {
	l, list := s.link, s.r.resp.receipts
	if len(list) == 0 {
		return 0
	}
	late := 0
	for i := range list {
		r := &list[i]
		l.mu.Lock()
		c, acked := s.receipts.open[r.seq], s.win.wasAcked(r.seq)
		l.mu.Unlock()
		switch {
		case !acked:
			strikes++ // in place of an ack, or of nothing
			continue
		case c.d == nil:
			late++
			continue
		}
		err := c.d.Receipt(int(r.acked), r.unacked, r.final)
		if err != nil {
			strikes++
		}
		if err != nil || r.final {
			l.mu.Lock()
			s.receipts.remove(r.seq)
			l.mu.Unlock()
		}
	}
	l.set.meters.receipts.Add(len(list))
	if late > 0 {
		l.set.meters.lateReceipts.Add(late)
	}
	return strikes
}
