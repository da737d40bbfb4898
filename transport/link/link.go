package link

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/push-manager/push-manager/engine"
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

// Link is one shard's way to one node, across reconnects. Its run goroutine
// belongs to the Set.
type Link struct {
	// Static after newLink.
	set   *Set
	node  *node
	shard int
	kick  chan struct{} // wakes run from its backoff
	done  chan struct{} // closed when run has ended

	// Running time before which the clock need not look: it knows what is pending.
	look atomic.Int64

	mu sync.Mutex
	// Guarded by mu.
	state   state
	refusal engine.Reason      // what Send answers: Sent if it takes deliveries
	stalled bool               // the node owes an overdue ack
	sound   bool               // the last stream has worked for a while
	leaving bool               // Drain has been called
	closing engine.Reason      // why the link is closed, Sent while it is not
	cancel  context.CancelFunc // ends the session that runs, nil between two
	queue   queue
	stream  *stream // while up or draining
	lanes   *lanes  // while unary
}

func newLink(s *Set, n *node, shard int) *Link {
	return &Link{set: s, node: n, shard: shard, kick: make(chan struct{}, 1), done: make(chan struct{})}
}

// Node is the node's id.
func (l *Link) Node() string { return l.node.id }

// Send takes d or says at once why not, see [engine.Link].
func (l *Link) Send(d *engine.Delivery) engine.Reason {
	e := entry{d: d, size: d.Size(), deadline: l.set.clock.of(d.Deadline())}
	if e.size > l.set.cfg.MaxFrameBytes {
		return engine.DropTooLarge
	}
	e.at = l.set.clock.ran.Load()
	l.mu.Lock()
	if l.refusal != engine.Sent {
		r := l.refusal
		l.mu.Unlock()
		return r
	}
	if ls := l.lanes; ls != nil {
		la, r := l.sendUnaryLocked(e)
		l.mu.Unlock()
		if la != nil {
			l.launch(ls, la)
		}
		return r
	}
	if !l.fitsLocked(d.Priority(), l.queue.len, l.queue.bytes+e.size) {
		l.mu.Unlock()
		return engine.DropQueueFull
	}
	l.queue.push(e)
	l.lookLocked()
	l.ringLocked()
	l.mu.Unlock()
	return engine.Sent
}

// fitsLocked tells whether one more delivery of priority p fits beside count others, with
// bytes for all. An empty queue takes a delivery of any size.
func (l *Link) fitsLocked(p engine.Priority, count, bytes int) bool {
	cfg := &l.set.cfg
	return count == 0 || count < p.Share(cfg.QueueLen) && bytes <= p.Share(cfg.QueueBytes)
}

// lookLocked makes the clock look at the link with its next tick.
func (l *Link) lookLocked() {
	if l.look.Load() != 0 {
		l.look.Store(0)
	}
}

// ringLocked wakes the stream's writer if it waits and has something to do.
func (l *Link) ringLocked() {
	if s := l.stream; s != nil && s.idle && (s.dead || s.workLocked()) {
		s.idle = false
		s.bell <- struct{}{} // never blocks: one token for each time it was idle
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
	was := l.state
	l.state = to
	l.stalled = l.stalled && to == draining
	l.refreshLocked()
	l.lookLocked()
	l.node.count(live(to) - live(was))
}

// live is what a link in a state adds to the node's connections.
func live(s state) int {
	if s == up || s == unary || s == draining {
		return 1
	}
	return 0
}

// close ends the link for good, see node.close. What is queued is dropped at once.
func (l *Link) close(why engine.Reason) {
	l.mu.Lock()
	cancel := l.cancel
	if l.closing == engine.Sent {
		l.closing = why
		s := l.stream
		switch {
		case l.owedLocked(why):
			cancel = nil // the session ends when it has its acks, or with their deadlines
			if s != nil {
				l.setLocked(draining)
			}
		case s != nil && s.win.empty() && s.cause == nil:
			s.cause = errDrained
		}
		l.refreshLocked()
	}
	list := l.queue.popAll(nil)
	if l.lanes != nil {
		list = l.lanes.popAll(list)
	}
	l.mu.Unlock()
	drop(list, why)
	if cancel != nil {
		cancel()
	}
	l.rouse()
}

// owedLocked tells whether a link that is closed awaits what it has written. A node that is
// no longer registered acknowledges what it has taken if it lives, and going is no reason to
// doubt that. One that is elsewhere now does if it has said that it drains.
func (l *Link) owedLocked(why engine.Reason) bool {
	switch l.state { //nolint:exhaustive // the others have written nothing
	case up:
		return why == engine.DropUnknownNode && l.stream.win.live > 0
	case draining:
		return why != engine.DropDraining && l.stream.win.live > 0
	case unary:
		return why == engine.DropUnknownNode && l.lanes.calls > 0
	}
	return false
}

// endsLocked tells that the link's session is the last one.
func (l *Link) endsLocked() bool { return l.closing != engine.Sent || l.leaving }

// leave starts the link's drain: what is queued is still sent, then the node is
// told, and the link ends when the node has acknowledged everything.
func (l *Link) leave() {
	l.mu.Lock()
	l.leaving = true
	l.refreshLocked()
	l.ringLocked()
	l.lookLocked()
	idle := l.state == down || l.lanesIdleLocked()
	cancel := l.cancel
	l.mu.Unlock()
	if idle && cancel != nil {
		cancel()
	}
	l.rouse()
}

// lanesIdleLocked tells that a node without Deliver owes nothing.
func (l *Link) lanesIdleLocked() bool {
	return l.lanes != nil && l.lanes.count == 0 && l.lanes.calls == 0
}

// rouse cuts the backoff short.
func (l *Link) rouse() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// over tells whether run shall end, and why.
func (l *Link) over() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.endsLocked()
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
