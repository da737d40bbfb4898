package node

import (
	"cmp"
	"errors"
	"slices"
	"time"
)

// The bounds of what an Inbox keeps, and its times.
const (
	// UnackedFrames is how many frames one client may leave unacknowledged. What would go beyond it is
	// not taken.
	UnackedFrames = 256
	// UnackedBytes is the same in bytes. A single frame may be larger.
	UnackedBytes = 256 << 10
	// HeldFrames is how many frames wait behind a closed gate, likewise.
	HeldFrames = 256
	// HeldBytes is the same in bytes.
	HeldBytes = 256 << 10
	// PongTimeout is how long a client may take to answer the ping that it is sent when half of
	// its time to acknowledge is over.
	PongTimeout = 2 * time.Second
	// idleRecords is for how many unacknowledged frames an idle connection keeps the memory: most clients
	// acknowledge one after the other.
	idleRecords = 2
	// replayAckTimeout is how long a client may take for a message out of the store.
	replayAckTimeout = 10 * time.Second
)

// ErrAck ends a connection whose client acknowledges what it was not sent.
var ErrAck = errors.New("acknowledges more than it was sent")

// Inbox is what one connection keeps for lasting delivery: the ids that it has had, the frames that its
// client has not acknowledged, and the direct messages that wait behind a replay. F is a frame as the
// gateway has it; it must be valid beyond the message.
//
// An Inbox is used under the lock under which the gateway puts frames into the connection's queue, and
// does nothing by itself. A connection that gets no message with Options needs to ask it nothing but
// Behind. The zero value is an Inbox of a client that cannot acknowledge, without a gate; it needs memory
// only for what is there.
//
// Where a message with Options goes:
//
//	if out, settled := inbox.Check(m, c, size, now); settled {
//		return out
//	}
//	// ... Failed if the queue is full, unless inbox.Behind(m) ...
//	e, queue, out := inbox.Take(m, c, frame, size, now)
//	if queue {
//		// ... put e into the queue, in the place of an entry with the same Collapse if there is one: Replace
//	}
//	return out
//
// A message without Options goes into the queue, unless Behind says that it must wait: then Take keeps it,
// too. Whenever the queue has room, and whenever [Gated].Opened, Ack or Tick was called, the gateway takes
// out what may go:
//
//	for room() {
//		e, ok := inbox.Pop(now)
//		...
//	}
//
// Right before an entry is written, Write tells whether it still shall be. Ack and Heard are called for what
// the client sends, Tick at the time that Due says, Close when the connection has ended.
type Inbox[F any] struct {
	// Acks says that the client acknowledges. Gate is the connection's part in replay, nil for none.
	// Both are set before the first message.
	Acks bool
	Gate *Gate
	// Books is told when the Inbox begins (+1) and ends (-1) to keep f beside the queue, for gateways
	// that count the memory of frames. Nil: nobody is told. It must not call the Inbox.
	Books func(f F, delta int)

	seen    ring
	last    uint64      // the number of the newest record
	records []record[F] // by number
	bytes   int         // of records
	again   []uint64    // numbers of records that are to be sent again

	held      []held[F]
	heldBytes int

	pinged time.Time // when the client was asked whether it lives; zero: it has answered
	due    time.Time // no later than the next thing to be done
	closed bool
}

// Entry is a frame as the Inbox gives it to the connection's queue.
type Entry[F any] struct {
	Frame F
	// Size is what the gateway has said.
	Size int
	// Ack is the number with which the client acknowledges this frame and all before it. 0: it does not.
	Ack uint64
	// Replayed says that the frame is out of the store or a log, or was sent before.
	Replayed bool
	// Collapse is that of the message's Options, 0 for a message whose place no other takes.
	Collapse uint64

	number  uint64 // its place in the queue among those with Options
	key     uint64
	expires time.Time
	logged  bool // it is shown even if its acknowledgement is given up: the client's position will be behind it
}

// Plain tells that there is nothing in the entry but its frame: it is not acknowledged, not marked, not
// replaced, and Write would say that it may be written. The gateway may forget the rest of it.
func (e *Entry[F]) Plain() bool {
	return e.Ack == 0 && !e.Replayed && e.Collapse == 0 && e.expires.IsZero()
}

// record is a frame between being taken and being acknowledged or given up.
type record[F any] struct {
	Entry[F]

	waits    []*Confirmation // what its acknowledgement answers: also for those whose place it took
	ask      *ask            // set for one out of the store, with seq
	seq      uint64
	half     time.Time // when the client is asked whether it lives
	deadline time.Time // when it is given up
	written  bool
	asked    bool // half is over
}

// held is a direct message behind the gate.
type held[F any] struct {
	Entry[F]

	waits    []*Confirmation
	wantsAck bool
	deadline time.Time // zero for one that wants no ack
}

// unasked gives up the acknowledgement, and not the message.
func (h *held[F]) unasked() {
	for _, c := range h.waits {
		c.GaveUp()
	}
	h.wantsAck, h.waits, h.deadline = false, nil, time.Time{}
}

// Behind tells that m must wait behind the gate, and goes to Take whether or not the queue has room. m may
// have no Options.
func (b *Inbox[F]) Behind(m *Message) bool {
	return (len(b.held) > 0 || b.Gate.isClosed()) && !m.Options.Replayed()
}

// Check says what becomes of a message where that does not depend on the connection's queue. size is that
// of its frame.
func (b *Inbox[F]) Check(m *Message, c *Confirmation, size int, now time.Time) (out Outcome, settled bool) {
	o := m.Options
	switch {
	case b.closed:
		return NotHere, true
	case o.Expired(now):
		o.Taken()
		return Expired, true
	}
	if o != nil && o.Key != 0 {
		if at := b.seen.find(o.Key); at >= 0 {
			if out, settled = b.repeated(o, c, b.seen.payload[at], now); settled {
				return out, true
			}
		}
	}
	switch {
	case b.Behind(m):
		if len(b.held) >= HeldFrames || len(b.held) > 0 && b.heldBytes+size > HeldBytes {
			return Failed, true
		}
	case b.wantsAck(o, c) && b.fullFor(size):
		return Stalled, true
	}
	return 0, false
}

// wantsAck tells whether the client shall acknowledge.
func (b *Inbox[F]) wantsAck(o *Options, c *Confirmation) bool {
	return b.Acks && (c != nil || o.Replayed())
}

func (b *Inbox[F]) fullFor(size int) bool {
	return len(b.records) > 0 && (len(b.records) >= UnackedFrames || b.bytes+size > UnackedBytes)
}

// repeated says what becomes of a message whose id stands in the ring. One that the client has not
// acknowledged yet is an answer to this one, too, once it has.
func (b *Inbox[F]) repeated(o *Options, c *Confirmation, payload uint32, now time.Time) (out Outcome, settled bool) {
	if payload != o.PayloadHash {
		o.Taken() // It can never be handed over.
		return Reused, true
	}
	if i := b.heldAt(o.Key); i >= 0 {
		if o.Replayed() {
			return 0, false // It goes ahead, see Take.
		}
		if h := &b.held[i]; h.wantsAck && c != nil {
			h.waits = expect(h.waits, c)
			return Pending, true
		}
		return Duplicate, true
	}
	if i := b.recordOf(o.Key); i >= 0 && b.wantsAck(o, c) {
		r := &b.records[i]
		switch {
		case !o.Replayed():
		case r.ask == o.ask: // It was stored twice. The first place stands for both.
			o.Taken()
		default:
			r.ask, r.seq = o.ask, o.Seq
			r.deadline = latest(r.deadline, now.Add(replayAckTimeout))
		}
		if c == nil {
			return Duplicate, true
		}
		r.waits = expect(r.waits, c)
		return Pending, true
	}
	o.Taken()
	return Duplicate, true
}

// Take takes a message that Check has not settled. queue says that e is to be put into the connection's
// queue now; else the Inbox keeps it.
func (b *Inbox[F]) Take(m *Message, c *Confirmation, f F, size int, now time.Time) (e Entry[F], queue bool, out Outcome) {
	o := m.Options
	e = Entry[F]{Frame: f, Size: size}
	h := held[F]{}
	out = Delivered
	if o != nil {
		e.key, e.expires, e.logged = o.Key, o.Expires, o.Log != nil
		e.Replayed = o.Replayed() || e.logged && o.Log.Read
		if !e.Replayed {
			e.Collapse = o.Collapse
		}
		if b.wantsAck(o, c) {
			h.wantsAck, h.deadline = true, o.AckBy
			if c != nil {
				h.waits, out = expect(nil, c), Pending
			}
		}
		if i := b.heldAt(o.Key); i >= 0 { // Only one out of the store comes so far.
			h.waits = joined(b.held[i].waits, h.waits)
			b.unhold(i)
		} else if o.Key != 0 {
			b.seen.add(o.Key, o.PayloadHash)
		}
	}
	h.Entry = e
	if b.Behind(m) {
		b.hold(h)
		return e, false, out
	}
	e = b.number(&h, o, now)
	if o.Replayed() && !h.wantsAck {
		o.Taken()
	}
	return e, true, out
}

// number gives a message its place in the queue, and a record if the client shall acknowledge it.
func (b *Inbox[F]) number(h *held[F], o *Options, now time.Time) Entry[F] {
	e := h.Entry
	if !h.wantsAck && e.Collapse == 0 {
		return e
	}
	b.last++
	e.number = b.last
	if !h.wantsAck {
		return e
	}
	e.Ack = e.number
	r := record[F]{Entry: e, waits: h.waits, deadline: h.deadline}
	if o.Replayed() {
		r.ask, r.seq = o.ask, o.Seq
		r.deadline = latest(r.deadline, now.Add(replayAckTimeout))
	}
	r.half = now.Add(r.deadline.Sub(now) / 2)
	b.insert(r)
	b.wakeAt(r.half)
	return e
}

func (b *Inbox[F]) hold(h held[F]) {
	if h.Collapse != 0 {
		for i := range b.held {
			if old := &b.held[i]; old.Collapse == h.Collapse {
				b.keep(&h.Entry, &b.heldBytes, 1)
				b.keep(&old.Entry, &b.heldBytes, -1)
				h.waits = joined(old.waits, h.waits)
				h.wantsAck, h.deadline = h.wantsAck || old.wantsAck, latest(h.deadline, old.deadline)
				*old = h
				return
			}
		}
	}
	b.held = append(b.held, h)
	b.keep(&h.Entry, &b.heldBytes, 1)
	if h.wantsAck {
		b.wakeAt(h.deadline)
	}
}

// Replace says what stands in the queue in the place of old, where the newer e has the same Collapse.
// Whoever waits for old's acknowledgement gets that of e.
func (b *Inbox[F]) Replace(old, e Entry[F]) Entry[F] {
	var waits []*Confirmation
	mine := b.recordAt(e.number)
	if mine >= 0 {
		r := b.records[mine]
		b.remove(mine)
		e.number, e.Ack = old.number, old.number
		if at := b.recordAt(old.number); at >= 0 {
			waits = b.records[at].waits
			b.remove(at)
		}
		r.Entry, r.waits = e, joined(waits, r.waits)
		b.insert(r)
		return e
	}
	e.number = old.number
	if at := b.recordAt(old.number); at >= 0 {
		e.Ack = old.Ack
		r := &b.records[at]
		b.keep(&e, &b.bytes, 1)
		b.keep(&r.Entry, &b.bytes, -1)
		r.Entry = e
	}
	return e
}

// Pop returns what may go into the queue now: what is to be sent again, and what was held and is not any
// more. An entry with Collapse may take another one's place, as one from Take.
func (b *Inbox[F]) Pop(now time.Time) (e Entry[F], ok bool) {
	for len(b.again) > 0 {
		i := b.recordAt(b.again[0])
		b.again = b.again[1:]
		if i >= 0 {
			e = b.records[i].Entry
			e.Replayed, e.Collapse, e.logged = true, 0, false
			return e, true
		}
	}
	for len(b.held) > 0 && !b.Gate.isClosed() {
		h := b.held[0]
		expired := !h.expires.IsZero() && !now.Before(h.expires)
		late := h.wantsAck && !now.Before(h.deadline)
		switch {
		case late && h.logged && !expired:
			b.held[0].unasked()
		case expired || late:
			b.unhold(0)
			b.giveUp(h.waits, h.key)
		case h.wantsAck && b.fullFor(h.Size):
			return e, false
		default:
			b.unhold(0)
			return b.number(&h, nil, now), true
		}
	}
	return e, false
}

// Holds tells that messages were taken which Pop has not given yet or, after Close, will not give any more: what is
// queued now would overtake them.
func (b *Inbox[F]) Holds() bool { return b.closed || len(b.held) > 0 }

// Waiting tells that Pop may have something once the queue has room.
func (b *Inbox[F]) Waiting() bool {
	return len(b.again) > 0 || len(b.held) > 0 && !b.Gate.isClosed()
}

// Write is called when e is about to be written, and tells whether it shall be: not if it has expired, nor
// if it was given up.
func (b *Inbox[F]) Write(e *Entry[F], now time.Time) bool {
	expired := !e.expires.IsZero() && !now.Before(e.expires)
	if e.Ack == 0 {
		return !expired
	}
	i := b.recordAt(e.Ack)
	if i < 0 {
		return e.logged && !expired
	}
	r := &b.records[i]
	if expired { // What nobody wants any more is not asked for again.
		if r.ask != nil {
			r.ask.taken(r.seq)
			r.ask = nil
		}
		b.settle(i, false)
		return false
	}
	r.written = true
	return true
}

// Ack takes the client's word that it has everything up to number n. An error ends the connection.
func (b *Inbox[F]) Ack(n uint64) error {
	if n > b.last {
		return ErrAck
	}
	b.Heard()
	for i := 0; i < len(b.records) && b.records[i].number <= n; {
		if !b.records[i].written {
			i++ // The client cannot have it.
			continue
		}
		b.settle(i, true)
	}
	return nil
}

// settle ends the record at i: acknowledged, or given up.
func (b *Inbox[F]) settle(i int, acked bool) {
	r := b.records[i]
	b.remove(i)
	if !acked {
		b.giveUp(r.waits, r.key)
		if r.ask != nil {
			r.ask.lost()
		}
		return
	}
	for _, c := range r.waits {
		c.Acked()
	}
	if r.ask != nil {
		r.ask.taken(r.seq)
	}
}

// giveUp forgets the id, too: what was not confirmed and comes again is to be sent again.
func (b *Inbox[F]) giveUp(waits []*Confirmation, key uint64) {
	for _, c := range waits {
		c.GaveUp()
	}
	if key != 0 {
		b.seen.forget(key)
	}
}

// Heard is called whenever something has come from the client.
func (b *Inbox[F]) Heard() { b.pinged = time.Time{} }

// Due is when Tick is to be called next, zero for never.
func (b *Inbox[F]) Due() time.Time { return b.due }

// Tick does what is due. ping: the client is to be sent a ping, and given [PongTimeout]. cut: it has not
// answered one, and the connection is to be cut without more ado.
func (b *Inbox[F]) Tick(now time.Time) (ping, cut bool) {
	b.due = time.Time{}
	for i := 0; i < len(b.records); {
		r := &b.records[i]
		if !now.Before(r.deadline) {
			b.settle(i, false)
			continue
		}
		if !r.asked && !now.Before(r.half) {
			r.asked, ping = true, true
			if r.written {
				b.again = append(b.again, r.number)
			}
		}
		if r.asked {
			b.wakeAt(r.deadline)
		} else {
			b.wakeAt(r.half)
		}
		i++
	}
	for i := 0; i < len(b.held); {
		h := &b.held[i]
		switch {
		case !h.wantsAck:
		case now.Before(h.deadline):
			b.wakeAt(h.deadline)
		case h.logged:
			h.unasked()
		default:
			waits, key := h.waits, h.key
			b.unhold(i)
			b.giveUp(waits, key)
			continue
		}
		i++
	}
	switch {
	case !b.pinged.IsZero() && now.Sub(b.pinged) >= PongTimeout:
		return false, true
	case !b.pinged.IsZero():
		ping = false // One is under way.
	case ping:
		b.pinged = now
	}
	if !b.pinged.IsZero() {
		b.wakeAt(b.pinged.Add(PongTimeout))
	}
	return ping, false
}

// Close gives up what the client has not acknowledged, and takes nothing any more. It may be called again.
func (b *Inbox[F]) Close() {
	b.closed = true
	for i := range b.records {
		b.keep(&b.records[i].Entry, &b.bytes, -1)
		b.giveUp(b.records[i].waits, 0)
	}
	for i := range b.held {
		b.keep(&b.held[i].Entry, &b.heldBytes, -1)
		b.giveUp(b.held[i].waits, 0)
	}
	b.records, b.held, b.again, b.due = nil, nil, nil, time.Time{}
}

// Kept is how many frames the Inbox keeps alive beside the queue, and their bytes.
func (b *Inbox[F]) Kept() (frames, bytes int) {
	return len(b.records) + len(b.held), b.bytes + b.heldBytes
}

// keep counts a frame that begins or ends to be kept.
func (b *Inbox[F]) keep(e *Entry[F], bytes *int, delta int) {
	*bytes += delta * e.Size
	if b.Books != nil {
		b.Books(e.Frame, delta)
	}
}

func (b *Inbox[F]) wakeAt(t time.Time) {
	if b.due.IsZero() || t.Before(b.due) {
		b.due = t
	}
}

func (b *Inbox[F]) heldAt(key uint64) int {
	if key == 0 {
		return -1
	}
	return slices.IndexFunc(b.held, func(h held[F]) bool { return h.key == key })
}

func (b *Inbox[F]) recordOf(key uint64) int {
	return slices.IndexFunc(b.records, func(r record[F]) bool { return r.key == key })
}

func (b *Inbox[F]) recordAt(number uint64) int {
	i, ok := b.search(number)
	if !ok {
		return -1
	}
	return i
}

func (b *Inbox[F]) search(number uint64) (int, bool) {
	return slices.BinarySearchFunc(b.records, number, func(r record[F], n uint64) int { return cmp.Compare(r.number, n) })
}

func (b *Inbox[F]) insert(r record[F]) {
	i := len(b.records)
	if i > 0 && b.records[i-1].number > r.number { // one that takes another's place
		i, _ = b.search(r.number)
	}
	b.records = slices.Insert(b.records, i, r)
	b.keep(&r.Entry, &b.bytes, 1)
}

func (b *Inbox[F]) remove(i int) {
	b.keep(&b.records[i].Entry, &b.bytes, -1)
	b.records = slices.Delete(b.records, i, i+1)
	if len(b.records) == 0 && cap(b.records) > idleRecords {
		b.records = nil
	}
}

func (b *Inbox[F]) unhold(i int) {
	b.keep(&b.held[i].Entry, &b.heldBytes, -1)
	b.held = slices.Delete(b.held, i, i+1)
	if len(b.held) == 0 {
		b.held = nil
	}
}

// expect adds c to those who wait.
func expect(waits []*Confirmation, c *Confirmation) []*Confirmation {
	c.Expect()
	if len(waits) == 0 {
		return []*Confirmation{c}
	}
	return joined(waits, []*Confirmation{c})
}

// joined is older and newer together, without the oldest if they are too many for one record.
func joined(older, newer []*Confirmation) []*Confirmation {
	if len(older) == 0 {
		return newer
	}
	all := append(older, newer...)
	for len(all) > UnackedFrames {
		all[0].GaveUp()
		all = all[1:]
	}
	return all
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
