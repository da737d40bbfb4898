package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/push-manager/push-manager/internal/ids"
)

// lasting is what only a push has whose clients acknowledge, or which is stored for those whom it
// does not reach: it goes on once its deliveries are settled. A push to a room is stored before, see
// roomlog.go, and passes the keeping by.
//
//	deliveries ─▶ receipts ─▶ keeping ─▶ the books close, Complete
//	deliveries ─▶ keeping ─▶ Complete ─▶ receipts ─▶ keeping ─▶ Receipts.Receipt    (Async)
//
// Nothing waits in a goroutine: the last receipt, the clock, the Spool and the links take it a
// step further, each step by one of them.
type lasting struct {
	// Static after begin.
	push  *Push
	shard int       // whose backlog it uses
	ends  time.Time // when the push ends, while its deliveries end with Push.deadline
	ackBy time.Time // until when receipts are waited for, the zero time without ClientAck

	// Whoever takes the push a step further has these; what a keeping writes is guarded by mu.
	kept    map[string]error // by user: what the Spool said
	lapsed  bool             // the TTL had passed before the Spool was asked; of a room, when its deliveries were settled
	tooLate bool             // of a room: the TTL had passed when the receipts were there
	unasked error            // why the Spool was not asked for those who are not in kept, or no room's log was written
	place   Place            // in the log of the room, see logged

	mu sync.Mutex // a leaf
	// Guarded by mu.
	noted     bool // it is known whether the push stands in its room's log
	receipts  map[*Delivery]*receipts
	open      int         // of receipts
	waiting   bool        // for receipts, with timer
	timer     *time.Timer // ends that, and before it the wait for the log
	hurry     bool        // nobody waits for receipts any longer
	keeping   *keeping    // that is under way
	replied   bool        // of an Async push
	abandoned bool        // the engine stops: nothing is stored any more
}

// receipts are those of one delivery, until it is known who has acknowledged.
type receipts struct {
	pending, acked int
	unacked        []string
	unnamed        int                 // of a broadcast, given up beyond mostUnacked
	named          map[string]struct{} // unacked
	closed         bool                // all are there, or given up
}

const (
	// storeTime is what is kept of a push's time for the Spool, the look-up and the nudges that
	// follow, at most half of it.
	storeTime = 150 * time.Millisecond
	// receiptTime is what is kept of the time of clients for the way of the last receipt, at
	// most a quarter of it: nodes gather receipts for up to 50 ms.
	receiptTime = 100 * time.Millisecond
	// defaultAckTimeout is what clients get that are given no time.
	defaultAckTimeout = 2 * time.Second
	// mostUnacked is how many users an Async push names that have not acknowledged.
	mostUnacked = 100
)

// stores tells whether the push is stored for those whom it does not reach.
func (p *Push) stores() bool { return p.Options != nil && p.Options.Store }

// copies tells whether it is stored for each of those by name.
func (p *Push) copies() bool { return p.stores() && p.Kind != ToRoom }

// begin makes a push with options, which has so much time, a lasting one if it is to be.
func (p *Push) begin(timeout time.Duration) {
	o := p.Options
	if !o.ClientAck && !o.Store {
		return
	}
	l := &lasting{push: p, ends: p.deadline}
	if o.Store && p.Kind != ToRoom { // nothing comes behind the deliveries to a room
		p.deadline = p.deadline.Add(-min(storeTime, timeout/2))
	}
	if o.ClientAck {
		l.ackBy = p.Arrived.Add(cmp.Or(o.AckTimeout, defaultAckTimeout))
		if !o.Async && l.ackBy.After(p.deadline) {
			l.ackBy = p.deadline
		}
	}
	key := p.User
	switch p.Kind {
	case ToRoom:
		key = p.Room
	case ToUsers:
		key = p.Users[0]
	case ToUser, ToAll, ToRooms: // a broadcast has none
	}
	if l.shard = p.shard; p.Kind != ToRooms {
		l.shard = p.engine.shards.For(key).Index()
	}
	p.lasting = l
}

// idle tells whether there is nothing to do for a push that has reached all but those offline.
func (l *lasting) idle(r Result) bool { return !l.push.Options.ClientAck && r.Offline == 0 }

// delivered goes on with a push all of whose deliveries are settled.
func (l *lasting) delivered() {
	l.push.release()
	if l.push.logs() {
		l.logged(Place{}, errNoAnswer) // it has ended before the answer, if this is the first call
	}
	if l.push.Options.Async {
		l.keep(l.ends, l.reply)
		return
	}
	l.await()
}

// reply completes an Async push with what nodes have said.
func (l *lasting) reply() {
	p := l.push
	p.result, p.err = p.account()
	l.mu.Lock()
	l.replied = true
	l.hurry = l.hurry || l.abandoned
	l.mu.Unlock()
	p.complete()
	l.await()
}

// await waits for the receipts.
func (l *lasting) await() {
	l.mu.Lock()
	left := time.Until(l.ackBy)
	if l.open > 0 && !l.hurry && left > 0 {
		l.waiting = true
		l.timer = time.AfterFunc(left, l.giveUp)
		l.mu.Unlock()
		return
	}
	l.endLocked()
	l.mu.Unlock()
	l.received()
}

// giveUp ends the wait for receipts, now or when it comes to it.
func (l *lasting) giveUp() {
	l.mu.Lock()
	l.hurry = true
	waiting := l.waiting
	if waiting {
		l.endLocked()
	}
	l.mu.Unlock()
	if waiting {
		l.received()
	}
}

// endLocked ends the wait and notes what has come by then.
func (l *lasting) endLocked() {
	l.waiting = false
	if l.timer != nil {
		l.timer.Stop()
	}
	for d, r := range l.receipts {
		l.closeLocked(r)
		slices.Sort(r.unacked)
		n := d.short // it is there, see Ack
		n.acked, n.unacked, n.silent = r.acked, r.unacked, r.pending-r.acked-len(r.unacked)
	}
}

func (l *lasting) closeLocked(r *receipts) {
	if !r.closed {
		r.closed, r.named = true, nil
		l.open--
		l.push.engine.receipts.Add(-1)
	}
}

// received goes on once nobody waits for receipts any longer.
func (l *lasting) received() {
	by := l.ends
	if l.push.Options.Async {
		by = time.Now().Add(l.push.engine.timeout)
	}
	l.keep(by, l.finish)
}

// finish closes the books.
func (l *lasting) finish() {
	p := l.push
	r, err := p.account()
	p.engine.book(r)
	if !p.Options.Async {
		p.result, p.err = r, err
		p.complete()
		return
	}
	if p.Options.Receipts != nil && p.err == nil {
		p.Options.Receipts.Receipt(p, r, l.unacked(), true)
	}
	p.engine.async.leave(l)
}

// unacked names some of those who were reached and have not acknowledged.
func (l *lasting) unacked() (users []string) {
	for _, d := range l.push.deliveries {
		for _, user := range d.details().unacked {
			if len(users) == mostUnacked {
				return users
			}
			if !slices.ContainsFunc(l.push.deliveries, func(o *Delivery) bool {
				return o != d && o.has(user) && o.outcomeOf(o.partOf(user)) == Delivered
			}) {
				users = append(users, user)
			}
		}
	}
	return users
}

// abandon ends an Async push that has been answered: there is no more time.
func (l *lasting) abandon() {
	l.mu.Lock()
	if !l.replied {
		l.mu.Unlock()
		return
	}
	l.abandoned = true
	k := l.keeping
	l.mu.Unlock()
	l.giveUp()
	if k != nil {
		k.end()
	}
}

// expect has the push wait for so many receipts of a delivery.
func (l *lasting) expect(d *Delivery, pending int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.receipts == nil {
		l.receipts = make(map[*Delivery]*receipts)
	}
	l.receipts[d] = &receipts{pending: pending}
	l.open++
	l.push.engine.receipts.Add(1)
}

// AckBy is when the node's last receipt has to be on its way: what clients acknowledge later comes
// too late. The zero time if they are not asked to.
func (d *Delivery) AckBy() time.Time {
	l := d.push.lasting
	if l == nil || l.ackBy.IsZero() {
		return time.Time{}
	}
	return l.ackBy.Add(-min(receiptTime, l.ackBy.Sub(d.push.Arrived)/4))
}

// AwaitsReceipts tells whether anybody still waits for receipts of the delivery. After an Ack with
// Pending a link keeps the delivery for as long.
func (d *Delivery) AwaitsReceipts() bool {
	l := d.push.lasting
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.receipts[d]
	return r != nil && !r.closed
}

// Receipt takes what the node says of clients, after its Ack: how many have acknowledged, who has been
// given up, and whether that is all. It takes over unacked. What comes when nobody waits for it any longer
// is ignored. The error tells of claims that cannot be; what is still awaited is then given up.
func (d *Delivery) Receipt(acked int, unacked []string, final bool) error {
	l := d.push.lasting
	if l == nil || l.ackBy.IsZero() {
		return fmt.Errorf("receipt of node %q: clients were not to acknowledge", d.node)
	}
	if d.state.Load() <= written {
		return fmt.Errorf("receipt of node %q: before the ack", d.node)
	}
	var err error
	l.receive(d, func(r *receipts) bool {
		err = r.take(d, acked, unacked, final)
		return final || err != nil
	})
	if err != nil {
		return fmt.Errorf("receipt of node %q: %w", d.node, err)
	}
	return nil
}

// LoseReceipts gives up what is still awaited: the stream has ended.
func (d *Delivery) LoseReceipts() {
	if l := d.push.lasting; l != nil {
		l.receive(d, func(*receipts) bool { return true })
	}
}

// receive has take look at the receipts of a delivery if somebody waits for them. True means that no
// more come.
func (l *lasting) receive(d *Delivery, take func(r *receipts) (last bool)) {
	l.mu.Lock()
	ended := false
	if r := l.receipts[d]; r != nil && !r.closed && take(r) {
		l.closeLocked(r)
		if ended = l.waiting && l.open == 0; ended {
			l.endLocked()
		}
	}
	l.mu.Unlock()
	if ended {
		l.received()
	}
}

// take adds what a receipt says.
func (r *receipts) take(d *Delivery, acked int, unacked []string, final bool) error {
	gone := len(r.unacked) + r.unnamed
	all := r.acked + gone + acked + len(unacked)
	switch {
	case acked < 0:
		return errors.New("negative count")
	case all > r.pending || final && all < r.pending:
		return fmt.Errorf("%d acknowledged and %d given up of %d", r.acked+acked, gone+len(unacked), r.pending)
	}
	if r.named == nil && len(unacked) > 0 {
		r.named = make(map[string]struct{}, len(unacked))
	}
	for i, user := range unacked {
		_, again := r.named[user]
		switch {
		case again:
			return fmt.Errorf("user %q is given up twice", user)
		case !d.Everybody() && (!d.has(user) || d.partOf(user) != rest):
			return fmt.Errorf("user %q was not reached", user)
		case d.Everybody() && ids.Check(user, ids.MaxScopedBytes) != nil:
			return errors.New("who is given up is not a user")
		case d.Everybody() && len(r.unacked) == mostUnacked: // nobody knows whom it was for: any node could name any number
			r.unnamed++
			continue
		}
		r.named[user] = struct{}{}
		r.unacked = append(r.unacked, unacked[i])
	}
	r.acked += acked
	return nil
}

// asyncs are the Async pushes whose books are open.
type asyncs struct {
	// Static.
	most int
	idle chan struct{} // has room for one; told when there is none left

	mu sync.Mutex // a leaf
	// Guarded by mu.
	open map[*lasting]struct{}
}

// enter tells whether there is room for one more.
func (a *asyncs) enter(l *lasting) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.open) >= a.most {
		return false
	}
	a.open[l] = struct{}{}
	return true
}

func (a *asyncs) leave(l *lasting) {
	a.mu.Lock()
	delete(a.open, l)
	none := len(a.open) == 0
	a.mu.Unlock()
	if none {
		a.tellIdle()
	}
}

func (a *asyncs) tellIdle() {
	select {
	case a.idle <- struct{}{}:
	default:
	}
}

func (a *asyncs) len() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.open)
}

// each calls f for those that are open.
func (a *asyncs) each(f func(*lasting)) {
	a.mu.Lock()
	open := make([]*lasting, 0, len(a.open))
	for l := range a.open {
		open = append(open, l)
	}
	a.mu.Unlock()
	for _, l := range open {
		f(l)
	}
}

// wait tells whether all were over before ctx was.
func (a *asyncs) wait(ctx context.Context) bool {
	for a.len() > 0 {
		select {
		case <-a.idle:
		case <-ctx.Done():
			return false
		}
	}
	a.tellIdle() // whoever else waits
	return true
}

// drain waits for all, no more enter. A quarter of the time of ctx, or a second of it, is for the Spool:
// then receipts are given up. At its end everything is.
func (a *asyncs) drain(ctx context.Context) error {
	patient := ctx
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		patient, cancel = context.WithDeadline(ctx, end.Add(-min(time.Second, time.Until(end)/4)))
		defer cancel()
	}
	if a.wait(patient) {
		return nil
	}
	a.each((*lasting).giveUp)
	if a.wait(ctx) {
		return nil
	}
	n := a.len()
	a.each((*lasting).abandon)
	return fmt.Errorf("drain with %d pushes whose receipts are not final: %w", n, ctx.Err())
}
