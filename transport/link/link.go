package link

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

var _ engine.Link = (*Link)(nil)

type state uint8

const (
	connecting state = iota // the first attempt after start or a break is under way
	up                      // a stream is open
	unary                   // the node has no Deliver: calls
	draining                // the node goes: what it has taken is awaited
	down                    // not reachable; further attempts follow
	closed                  // for good
)

var stateText = [...]string{"connecting", "up", "unary", "draining", "down", "closed"}

func (s state) String() string { return stateText[s] }

// way is how a link reaches its node in one session: a Deliver stream, or unary calls to a
// node that has none. Its methods are called with Link.mu held.
type way interface {
	// wakeLocked has what is queued sent, as far as it can be sent now.
	wakeLocked()
	// tickLocked finds what is due and why the session must end, nil while it need not. next
	// is the running time from which on it must be called again.
	tickLocked(now, ran int64, out *due) (next int64, end error)
	// popLocked appends to dst what the way has taken from the queue and not sent.
	popLocked(dst []*engine.Delivery) []*engine.Delivery
	// owesLocked tells whether the node has deliveries whose answer somebody awaits, and
	// whether it owes any answer at all.
	owesLocked() (awaited, anything bool)
	// statsLocked adds what the way holds.
	statsLocked(t *Stats)
	// describeLocked sets what the way knows of a LinkState.
	describeLocked(t *engine.LinkState)
}

// Link is one shard's way to one node, across reconnects. Its run goroutine
// belongs to the Set.
type Link struct {
	// Static after newLink.
	set   *Set
	node  *node
	shard int
	retry chan struct{} // wakes run from its backoff
	done  chan struct{} // closed when run has ended

	// Running time before which the clock need not look: it knows what is pending.
	nextTick atomic.Int64

	mu sync.Mutex
	// Guarded by mu.
	state   state
	refusal engine.Reason // what Send answers: Sent if it takes deliveries
	stalled bool          // the node owes an overdue answer
	healthy bool          // the last stream has worked for a while
	leaving bool          // Drain has been called
	closing engine.Reason // why the link is closed, Sent while it is not
	queue   queue         // in the order of Send
	load    load          // of the queue, and of what the way has taken from it

	// Of the session. Guarded by mu.
	cancel context.CancelFunc // ends it; does nothing between two
	cause  error              // why it must end
	plain  bool               // the node does not know TLS, see Config.Migrate
	way    way                // nil until the node has been reached
	conn   *grpc.ClientConn   // to a node that has said who it is, nil for none
}

func newLink(s *Set, n *node, shard int) *Link {
	l := &Link{set: s, node: n, shard: shard, retry: make(chan struct{}, 1), done: make(chan struct{}), cancel: func() {}}
	l.queue.load = &l.load
	return l
}

// Node is the node's id.
func (l *Link) Node() string { return l.node.id }

// Scopes tells whether the node takes a scope, by its last hello. Of a node that has
// not said hello yet it is true.
func (l *Link) Scopes() bool { return !l.node.unscoped.Load() }

// Send takes d or says at once why not, see [engine.Link].
func (l *Link) Send(d *engine.Delivery) engine.Reason {
	cfg := &l.set.cfg
	e := entry{d: d, size: d.Size(), deadline: l.set.clock.of(d.Deadline())}
	if e.size > cfg.MaxFrameBytes {
		return engine.DropTooLarge
	}
	e.at = l.set.clock.ran.Load()
	if o := d.Options(); o != nil {
		e.deadline = min(e.deadline, l.set.clock.of(d.Expires()))
		if key := collapseKeyOf(d, o); key != (collapseKey{}) {
			return l.sendLatest(e, key)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refusal != engine.Sent {
		return l.refusal
	}
	if !l.hasRoomLocked(&e) {
		return engine.DropQueueFull
	}
	l.queue.push(e)
	l.queuedLocked()
	return engine.Sent
}

// sendLatest is Send for a delivery of which only the latest is worth anything: it takes the place of the
// one before, if that still waits.
func (l *Link) sendLatest(e entry, key collapseKey) engine.Reason {
	l.mu.Lock()
	if l.refusal != engine.Sent {
		defer l.mu.Unlock()
		return l.refusal
	}
	older := l.queue.latestOf(key, e.d)
	if older == nil && !l.hasRoomLocked(&e) || older != nil && !l.mayGrowLocked(e.size-older.size, e.d.Priority()) {
		l.mu.Unlock()
		return engine.DropQueueFull
	}
	var replaced *engine.Delivery
	if older != nil {
		replaced = l.queue.replace(older, e, key)
	} else {
		l.queue.pushLatest(e, key)
	}
	l.queuedLocked()
	l.mu.Unlock()
	if replaced != nil {
		l.set.meters.replaced.Inc()
		replaced.Drop(engine.DropReplaced)
	}
	return engine.Sent
}

// Describe tells how the link is and what Send would answer, see [engine.Link].
func (l *Link) Describe(d *engine.Delivery) engine.LinkState {
	e := entry{d: d, size: d.Size()}
	l.mu.Lock()
	defer l.mu.Unlock()
	t := engine.LinkState{State: l.state.String(), Verdict: l.refusal, Queued: l.load.len, QueuedBytes: l.load.bytes}
	switch {
	case e.size > l.set.cfg.MaxFrameBytes:
		t.Verdict = engine.DropTooLarge
	case t.Verdict == engine.Sent && !l.hasRoomLocked(&e):
		t.Verdict = engine.DropQueueFull
	}
	if l.queue.len > 0 {
		t.QueuedFor = time.Duration(l.set.clock.ran.Load() - l.queue.slot(0).at)
	}
	if l.way != nil {
		l.way.describeLocked(&t)
		if t.Verdict == engine.Sent && d.Rooms() != nil && !slices.Contains(t.Features, featureName(pubsub.Feature_FEATURE_ROOMS)) {
			t.Verdict = engine.DropNoRooms
		}
		if o := d.Options(); o != nil && len(o.Filter) > 0 && t.Verdict == engine.Sent && !slices.Contains(t.Features, featureName(pubsub.Feature_FEATURE_FILTER)) {
			t.Verdict = engine.DropNoFilter
		}
	}
	return t
}

// hasRoomLocked tells whether the queue takes e. An empty one takes a delivery of any size.
func (l *Link) hasRoomLocked(e *entry) bool {
	cfg, p := &l.set.cfg, e.d.Priority()
	return l.load.len == 0 || l.load.len < p.Share(cfg.QueueLen) && l.load.bytes+e.size <= p.Share(cfg.QueueBytes)
}

// mayGrowLocked tells whether what takes the place of an entry, with priority p, may be so many bytes longer. What is
// alone in the queue may have any size.
func (l *Link) mayGrowLocked(by int, p engine.Priority) bool {
	return by <= 0 || l.load.len == 1 || l.load.bytes+by <= p.Share(l.set.cfg.QueueBytes)
}

// queuedLocked has what was queued sent.
func (l *Link) queuedLocked() {
	l.tickNow()
	if l.way != nil {
		l.way.wakeLocked()
	}
}

// tickNow makes the clock look at the link with its next tick.
func (l *Link) tickNow() {
	if l.nextTick.Load() != 0 {
		l.nextTick.Store(0)
	}
}

// refreshLocked works out what Send answers after a change of state.
func (l *Link) refreshLocked() {
	switch {
	case l.closing != engine.Sent:
		l.refusal = l.closing
	case l.leaving || l.state == draining:
		l.refusal = engine.DropDraining
	case l.state == down:
		l.refusal = engine.DropUnreachable
	case l.stalled:
		l.refusal = engine.DropStalled
	default:
		l.refusal = engine.Sent
	}
}

// setLocked changes the state.
func (l *Link) setLocked(to state) {
	if delta := live(to) - live(l.state); delta != 0 {
		l.node.live.Add(int64(delta))
	}
	l.state = to
	l.stalled = l.stalled && to == draining
	l.refreshLocked()
	l.tickNow()
}

// live is what a link in a state adds to the node's connections.
func live(s state) int {
	if s == up || s == unary || s == draining {
		return 1
	}
	return 0
}

// close ends the link for good, see node.close. What waits is dropped at once. A node that is
// no longer registered acknowledges what it has taken if it lives, and going is no reason to
// doubt that: then the session ends when it has its acks, or with their deadlines. One that
// is elsewhere now does so if it has said that it drains.
func (l *Link) close(why engine.Reason) {
	l.mu.Lock()
	cancel := l.cancel
	if l.closing == engine.Sent {
		l.closing = why
		if l.way != nil {
			awaited, anything := l.way.owesLocked()
			switch {
			case awaited && (why == engine.DropUnknownNode || l.state == draining && why != engine.DropDraining):
				cancel = func() {}
				l.setLocked(draining)
			case !anything && l.cause == nil:
				l.cause = errDrained
			}
		}
		l.refreshLocked()
	}
	list := l.popLocked()
	l.mu.Unlock()
	drop(list, why)
	cancel()
	l.retryNow()
}

// popLocked takes everything that waits.
func (l *Link) popLocked() []*engine.Delivery {
	list := l.queue.popAll(nil)
	if l.way != nil {
		list = l.way.popLocked(list)
	}
	return list
}

// endsLocked tells that the link's session is the last one.
func (l *Link) endsLocked() bool { return l.closing != engine.Sent || l.leaving }

// leave starts the link's drain: what is queued is still sent, then the node is
// told, and the link ends when the node has acknowledged everything.
func (l *Link) leave() {
	l.mu.Lock()
	l.leaving = true
	l.refreshLocked()
	l.tickNow()
	cancel := func() {}
	switch {
	case l.way != nil:
		l.way.wakeLocked()
	case l.state == down:
		cancel = l.cancel
	}
	l.mu.Unlock()
	cancel()
	l.retryNow()
}

// retryNow cuts the backoff short.
func (l *Link) retryNow() {
	select {
	case l.retry <- struct{}{}:
	default:
	}
}

// over tells whether run shall end.
func (l *Link) over() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.endsLocked()
}

// endLocked notes why the session must end. Who calls it calls what it returns, without mu.
func (l *Link) endLocked(cause error) context.CancelFunc {
	if l.cause == nil {
		l.cause = cause
	}
	return l.cancel
}

// tick settles what is due. It is called by the clock, which a panic in what a settled
// delivery sets off must not stop.
func (l *Link) tick(now, ran int64, out *due) {
	defer func() {
		if r := recover(); r != nil {
			l.set.panicked("clock", r)
			drop(out.expired, engine.DropInternal)
			drop(out.stalled, engine.DropInternal)
			lose(out.late, engine.LostInternal)
			lose(out.left, engine.LostInternal)
			l.refused(out.nudged)
			*out = due{}
		}
	}()
	l.mu.Lock()
	out.expired = l.queue.popExpired(out.expired, ran-int64(l.set.cfg.QueueAge), now)
	next, cancel := int64(noDeadline), func() {}
	if l.way != nil {
		var end error
		if next, end = l.way.tickLocked(now, ran, out); end != nil {
			cancel = l.endLocked(end)
		}
	}
	if l.load.len > 0 {
		next = 0
	}
	l.nextTick.Store(next)
	l.mu.Unlock()
	cancel()
	drop(out.expired, engine.DropExpired)
	drop(out.stalled, engine.DropStalled)
	lose(out.late, engine.LostAck)
	lose(out.left, engine.LostDeadline)
	l.refused(out.nudged)
	out.nudged = out.nudged[:0]
	for _, list := range []*[]*engine.Delivery{&out.expired, &out.stalled, &out.late, &out.left} {
		clear(*list)
		*list = (*list)[:0]
	}
}

// due is the clock's scratch: what one link has to settle.
type due struct {
	expired []*engine.Delivery // waiting: age or deadline
	stalled []*engine.Delivery // waiting for a stalled node
	late    []*engine.Delivery // written: no ack in time
	left    []*engine.Delivery // written: the caller's deadline
	nudged  []func(bool)       // no answer in time
}

func drop(list []*engine.Delivery, why engine.Reason) {
	for _, d := range list {
		d.Drop(why)
	}
}

func lose(list []*engine.Delivery, why engine.Reason) {
	for _, d := range list {
		d.Lose(why)
	}
}
