package node

import (
	"strings"
	"sync"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// receiptDelay is how long what clients say is gathered.
const receiptDelay = 50 * time.Millisecond

// expirePause is the least time between two looks at what cannot be written yet, or at all that is open.
const expirePause = 10 * time.Millisecond

// receipts are what one stream owes of the deliveries whose users are pending. It ends each of them: with
// the client's word, when all its connections have given up, or at AckBy, whatever the gateway does. The lock
// is taken within those of connections, and nothing is locked within it.
type receipts struct {
	// Static.
	most   int    // deliveries at a time
	signal func() // wakes the sender
	count  *counters

	mu sync.Mutex
	// Guarded by mu.
	open   map[uint64]*awaited // by seq
	due    []*awaited          // with something to say
	dueAt  time.Time           // when it is said; zero: nothing is due
	next   time.Time           // no later than the first AckBy; zero: none
	hasty  bool                // nothing is gathered any more
	leaves bool                // the node does: nobody is waited for
	dead   bool                // the stream has ended: nobody is told

	waiting int // users that are not settled
}

// awaited is one delivery that some users are to acknowledge.
type awaited struct {
	// Static.
	receipts *receipts
	seq      uint64
	by       time.Time

	// Of whoever hands it over.
	free []Confirmation // made together: of most deliveries all are used

	// Guarded by receipts.mu.
	users   []*Confirmation // that are not settled
	settled int             // of those
	ready   bool            // all users are handed over
	acked   uint32          // not said yet
	unacked []string        // not said yet
	listed  bool            // it stands in due
}

func newReceipts(most int, signal func(), count *counters) *receipts {
	return &receipts{most: most, signal: signal, count: count}
}

// mostTogether is how many confirmations are made together. One that is open keeps all of them alive.
const mostTogether = 64

// await begins a delivery to so many users. It returns nil where too many are open.
func (r *receipts) await(seq uint64, by time.Time, users int) *awaited {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.open) >= r.most {
		return nil
	}
	return &awaited{receipts: r, seq: seq, by: by, users: make([]*Confirmation, 0, users)}
}

// confirmation is what a user's connections are given.
func (a *awaited) confirmation(user string) *Confirmation {
	if len(a.free) == 0 {
		a.free = make([]Confirmation, max(1, min(cap(a.users), mostTogether)))
	}
	c := &a.free[0]
	a.free = a.free[1:]
	c.of, c.user, c.open = a, user, 1
	return c
}

// settle ends the handing over to one user. It tells whether a receipt will follow.
func (a *awaited) settle(c *Confirmation, out Outcome) {
	r := a.receipts
	r.mu.Lock()
	defer r.mu.Unlock()
	if out != Pending {
		c.done = true
		return
	}
	c.sealed = true
	c.user = strings.Clone(c.user) // It outlives the frame.
	a.users = append(a.users, c)
	r.waiting++
	if c.acked {
		r.settleLocked(c, true)
		return
	}
	r.closeLocked(c)
}

// handedOver says that all users are handed over: pending says how many are.
func (a *awaited) handedOver() (pending int) {
	r := a.receipts
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(a.users) == 0 {
		return 0
	}
	a.ready = true
	if r.dead {
		return len(a.users)
	}
	if r.open == nil {
		r.open = make(map[uint64]*awaited)
	}
	r.open[a.seq] = a
	if r.next.IsZero() || a.by.Before(r.next) {
		r.next = a.by
	}
	if r.leaves {
		a.giveUpLocked()
	}
	if a.settled > 0 {
		r.listLocked(a, time.Now())
	}
	r.signal() // The sender learns of the time.
	return len(a.users)
}

func (r *receipts) expect(c *Confirmation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.open++
}

func (r *receipts) acked(c *Confirmation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.acked = true
	if c.sealed {
		r.settleLocked(c, true)
	}
}

func (r *receipts) gaveUp(c *Confirmation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closeLocked(c)
}

func (r *receipts) closeLocked(c *Confirmation) {
	c.open--
	if c.open <= 0 && c.sealed {
		r.settleLocked(c, false)
	}
}

// settleLocked counts a user, once.
func (r *receipts) settleLocked(c *Confirmation, acked bool) {
	if c.done {
		return
	}
	c.done = true
	if r.dead {
		return
	}
	a := c.of
	a.settled++
	r.waiting--
	if acked {
		a.acked++
		r.count.acked.Inc()
	} else {
		a.unacked = append(a.unacked, c.user)
		r.count.unacked.Inc()
	}
	if a.ready {
		r.listLocked(a, time.Now())
	}
}

func (r *receipts) listLocked(a *awaited, now time.Time) {
	if a.listed {
		return
	}
	a.listed = true
	r.due = append(r.due, a)
	if r.dueAt.IsZero() {
		r.dueAt = now
		if !r.hasty {
			r.dueAt = now.Add(receiptDelay)
		}
		r.signal()
	}
}

// giveUpAll gives up all who have not acknowledged, also those who come yet, and has it said at once.
func (r *receipts) giveUpAll() {
	r.mu.Lock()
	r.leaves = true
	for _, a := range r.open {
		a.giveUpLocked()
	}
	r.mu.Unlock()
	r.hurry()
}

// hurry has everything said at once.
func (r *receipts) hurry() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hasty = true
	if len(r.due) > 0 {
		r.dueAt = time.Now()
		r.signal()
	}
}

// giveUpLocked gives up those who have not acknowledged.
func (a *awaited) giveUpLocked() {
	for _, c := range a.users {
		a.receipts.settleLocked(c, false)
	}
}

// forget ends it: nobody is to be told anything.
func (r *receipts) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dead, r.waiting = true, 0
	r.open, r.due, r.dueAt, r.next = nil, nil, time.Time{}, time.Time{}
}

// said tells that there is nothing to say.
func (r *receipts) said() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.due) == 0
}

// wait is how long until there is something to take, or less. False: nothing is open.
func (r *receipts) wait(now time.Time) (time.Duration, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := r.dueAt
	if at.IsZero() || !r.next.IsZero() && r.next.Before(at) {
		at = r.next
	}
	if at.IsZero() {
		return 0, false
	}
	return max(at.Sub(now), 0), true
}

// take appends what is due of deliveries below seq, whose acks are written, for up to a frame full.
func (r *receipts) take(out []*pubsub.Receipt, below uint64, now time.Time) []*pubsub.Receipt {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.next.IsZero() && !now.Before(r.next) {
		r.expireLocked(now)
	}
	if r.dueAt.IsZero() || now.Before(r.dueAt) {
		return out
	}
	size := 0
	rest := r.due[:0]
	for _, a := range r.due {
		if a.seq >= below || size >= ackFrameBytes {
			rest = append(rest, a)
			continue
		}
		receipt := &pubsub.Receipt{Seq: a.seq, Acked: a.acked}
		room := ackFrameBytes - size
		receipt.Unacked = fitting(a.unacked, &room)
		if len(receipt.Unacked) == 0 && len(a.unacked) > 0 && size == 0 {
			receipt.Unacked = a.unacked[:1] // an id that is longer than a frame should be
		}
		size = ackFrameBytes - room + 24
		a.acked, a.unacked = 0, a.unacked[len(receipt.Unacked):]
		if len(a.unacked) > 0 {
			rest = append(rest, a)
		} else {
			a.listed = false
			receipt.Final = a.settled == len(a.users)
			if receipt.Final {
				delete(r.open, a.seq)
			}
		}
		out = append(out, receipt)
	}
	clear(r.due[len(rest):])
	r.due = rest
	switch {
	case len(rest) == 0:
		r.due, r.dueAt = nil, time.Time{}
	case len(out) == 0: // Their acks are not written yet.
		r.dueAt = now.Add(expirePause)
	}
	if len(r.open) == 0 {
		r.open, r.next = nil, time.Time{}
	}
	return out
}

// expireLocked gives up deliveries whose time is over, and says when to look again.
func (r *receipts) expireLocked(now time.Time) {
	for _, a := range r.open {
		if !now.Before(a.by) {
			a.giveUpLocked()
		}
	}
	if len(r.due) > 0 {
		r.dueAt = now // A manager waits for it.
	}
	r.next = time.Time{}
	for _, a := range r.open {
		if a.settled < len(a.users) && (r.next.IsZero() || a.by.Before(r.next)) {
			r.next = a.by
		}
	}
	if soon := now.Add(expirePause); !r.next.IsZero() && r.next.Before(soon) {
		r.next = soon
	}
}

// pending is the number of users that are waited for.
func (r *receipts) pending() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.waiting
}
