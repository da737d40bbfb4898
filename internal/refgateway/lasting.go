package refgateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/gobwas/ws"

	"github.com/push-manager/push-manager/transport/node"
)

var (
	errAckNumber = errors.New("ack: must be the number of a push, from 1 on")
	errAckFuture = errors.New("ack: no push with this number was sent")
)

// lasting is what a connection keeps for pushes with options: ids that it has had, what its client has
// not acknowledged, and what waits behind a replay.
type lasting struct {
	// Static once the connection is among the users.
	gate     *node.Gate
	cursor   *node.Cursor // nil for a client that keeps no position
	resumes  bool         // it does
	position string       // with which it has come

	// Guarded by conn.mu.
	inbox  node.Inbox[*frame]
	places map[uint64]int      // in the queue, of what a newer push with the same collapse key replaces
	logs   map[string]struct{} // rooms, as pushes name them, that the cursor has joined
	armed  time.Time           // for when the wheel has the connection, in whole steps; zero: it has not
}

// beginLasting comes before the connection is among the users.
func (c *conn) beginLasting() (err error) {
	// Replayed messages come when the client acknowledges: half of what may be unacknowledged, and of what may
	// wait, leaves room for others.
	window := max(1, min(node.UnackedFrames, c.g.cfg.QueueFrames)/2)
	c.gate = c.g.node.Gate(c.tenant.ID(c.user), c, window)
	if c.resumes {
		if c.cursor, err = c.g.node.Cursor(c.tenant.ID(c.user), c, c.position); err != nil {
			return fmt.Errorf("resume: %w", err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inbox.Acks, c.inbox.Gate, c.inbox.Books = c.to.acks, c.gate, c.g.keep
	return nil
}

// keep counts the inboxes that keep a frame alive, and its bytes once.
func (g *Gateway) keep(f *frame, delta int) {
	g.waiting.Add(int64(delta))
	switch after := f.keepers.Add(int32(delta)); {
	case delta > 0 && after == 1:
		g.kept.Add(f.bytes())
	case delta < 0 && after == 0:
		g.kept.Add(-f.bytes())
	}
}

// overfullLocked tells whether the inbox may not keep more because of all the others. From half of the
// bound on a client that acknowledges what it gets is not concerned; at the bound nothing is taken. Nobody is
// cut off.
func (c *conn) overfullLocked() bool {
	kept, bound := c.g.kept.Load(), int64(c.g.cfg.QueueTotalBytes)
	if kept < bound/2 {
		return false
	}
	frames, _ := c.inbox.Kept()
	return kept >= bound || frames > 0
}

// push queues a push, or lets it wait behind a replay. It never waits itself. A push to a room is taken by a
// connection in it: the lock puts it in front of the word that the client has left, or keeps it out.
func (c *conn) push(f *frame, m *node.Message, confirmation *node.Confirmation) node.Outcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.Rooms != nil {
		if f = c.roomFrame(m); f == nil {
			return node.NotHere
		}
	}
	// What was stored was meant for the user, who has connected anew and need not be in the room yet.
	if c.closed || m.RoomID != "" && !m.Options.Replayed() && !c.member.In(m.RoomID) {
		return node.NotHere
	}
	if out, settled := c.loggedLocked(m); settled {
		return out
	}
	behind := c.inbox.Behind(m)
	if m.Options == nil && !behind {
		return c.queueLocked(queued{frame: f})
	}
	now, size := time.Now(), queued{frame: f}.size(&c.to)
	outcome, settled := c.inbox.Check(m, confirmation, size, now)
	if settled {
		c.armLocked()
		c.g.count.settled(outcome)
		return outcome
	}
	keeps := behind || c.to.acks && (confirmation != nil || m.Options.Replayed())
	switch {
	case keeps && c.overfullLocked():
		c.g.count.stalled.Inc()
		return node.Failed
	case (m.Options.Replayed() || isRead(m)) && !behind && !c.spareLocked():
		return node.Failed // It stays in the store, and is asked for again: no reason to cut the client off.
	case !behind && !c.roomLocked(size):
		return node.Failed
	}
	e, queue, outcome := c.inbox.Take(m, confirmation, f, size, now)
	if queue {
		c.placeLocked(e)
	} else {
		c.g.count.held.Inc()
	}
	c.armLocked()
	return outcome
}

// placeLocked queues what the inbox has given, in the place of an older push with its collapse key if
// there is one.
func (c *conn) placeLocked(e entry) {
	if e.Plain() { // most are, and need no memory of their own
		c.appendLocked(queued{frame: e.Frame})
		return
	}
	kept := new(entry)
	*kept = e
	if e.Collapse == 0 {
		c.appendLocked(queued{frame: e.Frame, entry: kept})
		return
	}
	at, ok := c.places[e.Collapse]
	if !ok {
		if c.places == nil {
			c.places = make(map[uint64]int)
		}
		c.places[e.Collapse] = len(c.queue)
		c.appendLocked(queued{frame: e.Frame, entry: kept})
		return
	}
	old := c.queue[at]
	*kept = c.inbox.Replace(*old.entry, e)
	replacing := queued{frame: kept.Frame, entry: kept}
	c.queue[at] = replacing
	c.bytes += replacing.size(&c.to) - old.size(&c.to)
	c.g.hold(replacing.frame)
	c.g.drop(old.frame)
	c.g.count.collapsed.Inc()
}

// spareLocked tells whether enough room is left in the queue for what comes directly.
func (c *conn) spareLocked() bool {
	cfg := &c.g.cfg
	return c.frames == 0 || c.frames < cfg.QueueFrames/2 && c.bytes < cfg.QueueBytes/2
}

// popLocked queues what has waited in the inbox.
func (c *conn) popLocked(now time.Time) {
	for !c.closed && c.spareLocked() {
		e, ok := c.inbox.Pop(now)
		if !ok {
			return
		}
		if room := e.Frame.room; room != "" && !c.member.In(c.tenant.ID(room)) {
			// It has left meanwhile, and been told so. It may be in another of several rooms.
			rooms := e.Frame.several
			if rooms == nil {
				continue
			}
			other, is := c.member.FirstOf(rooms.Place)
			if !is {
				continue
			}
			e.Frame = e.Frame.inRoom(c.tenant.Plain(other))
		}
		c.placeLocked(e)
	}
}

// Opened implements node.Gated.
func (c *conn) Opened() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.popLocked(time.Now())
	c.armLocked()
}

// mayWrite tells whether a push may still be shown.
func (c *conn) mayWrite(e *entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.inbox.Write(e, time.Now()) {
		c.g.count.expired.Inc()
		return false
	}
	if e.Replayed {
		c.g.count.replayed.Inc()
	}
	return true
}

// forget gives up what the client has not acknowledged, and takes nothing more that it would have to. What needs no
// acknowledgement and waits behind a replay goes to the client.
func (c *conn) forget() {
	c.gate.Leave()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.popLocked(time.Now())
	c.forgetLocked()
}

func (c *conn) forgetLocked() {
	if frames, _ := c.inbox.Kept(); frames > 0 {
		c.g.count.givenUp.Add(frames)
	}
	c.inbox.Close()
}

// ackOf reads {"type":"ack","ack":N}, written as here: so libraries write it, and it comes as often as all other
// messages together.
func ackOf(b []byte) (number uint64, ok bool) {
	const head, mostDigits = `{"type":"ack","ack":`, 19 // no 19 digits are too many for a uint64
	n := len(b) - len(head) - len("}")
	if n < 1 || n > mostDigits || string(b[:len(head)]) != head || b[len(b)-1] != '}' || n > 1 && b[len(head)] == '0' {
		return 0, false
	}
	for _, digit := range b[len(head) : len(head)+n] {
		if digit < '0' || digit > '9' {
			return 0, false
		}
		number = 10*number + uint64(digit-'0')
	}
	return number, true
}

func (c *conn) acknowledgeJSON(text json.RawMessage) error {
	var number uint64
	if json.Unmarshal(text, &number) != nil {
		return errAckNumber
	}
	return c.acknowledge(number)
}

// acknowledge takes the client's word that it has all pushes up to a number.
func (c *conn) acknowledge(number uint64) error {
	if number == 0 {
		return errAckNumber
	}
	c.g.count.acks.Inc()
	c.mu.Lock()
	defer c.mu.Unlock()
	before, _ := c.inbox.Kept()
	if c.inbox.Ack(number) != nil {
		return errAckFuture
	}
	after, _ := c.inbox.Kept()
	c.progress = after < before
	c.g.count.acked.Add(before - after)
	c.popLocked(time.Now())
	c.armLocked()
	return nil
}

// tick does what is due for a connection.
func (c *conn) tick(t timer, now time.Time) {
	defer c.g.caught("wheel", func() { c.shut() })
	switch ping, cut := c.due(t, now); {
	case cut:
		if c.shut() {
			c.g.count.unanswered.Inc()
		}
	case ping:
		c.tell(&frame{op: ws.OpPing})
	}
}

// due has the inbox do what is due, and tells what is to be done with the client. A timer in whose place an earlier one
// has come does nothing, or there would be one more with each.
func (c *conn) due(t timer, now time.Time) (ping, cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !t.armed.Equal(c.armed) {
		return false, false
	}
	defer c.armLocked()
	c.armed = time.Time{}
	if due := c.inbox.Due(); due.IsZero() || now.Before(due) {
		return false, false
	}
	before, _ := c.inbox.Kept()
	ping, cut = c.inbox.Tick(now)
	after, _ := c.inbox.Kept()
	c.g.count.givenUp.Add(before - after)
	c.popLocked(now)
	return ping, cut
}

// armLocked has the wheel come when the inbox has something to do.
func (c *conn) armLocked() {
	if due := c.inbox.Due(); !due.IsZero() && (c.armed.IsZero() || due.Before(c.armed)) {
		c.armed = due.Truncate(wheelStep) // a little sooner is not worth another place
		c.g.wheel.add(timer{c, c.armed}, due)
	}
}

// A connection with something unacknowledged stands in the wheel's slot of the time when it is to be looked at. What is
// further away than the wheel goes round is looked at earlier, and put in again.
const (
	wheelStep  = 50 * time.Millisecond
	wheelSlots = 64
)

// timer is a connection and what it was armed for.
type timer struct {
	conn  *conn
	armed time.Time
}

// wheel is the timers of all inboxes. For one turn it holds a connection as often as its next time has moved nearer.
type wheel struct {
	mu sync.Mutex // the innermost, like that of the line
	// Guarded by mu.
	slots [wheelSlots][]timer
	at    int // the slot that comes next
}

func (w *wheel) add(t timer, due time.Time) {
	steps := min(max(int(time.Until(due)/wheelStep)+1, 1), wheelSlots-1)
	w.mu.Lock()
	defer w.mu.Unlock()
	i := (w.at + steps) % wheelSlots
	w.slots[i] = append(w.slots[i], t)
}

// next is the timers whose time has come.
func (w *wheel) next() []timer {
	w.mu.Lock()
	defer w.mu.Unlock()
	timers := w.slots[w.at]
	w.slots[w.at] = nil
	w.at = (w.at + 1) % wheelSlots
	return timers
}

func (g *Gateway) wheelLoop(ctx context.Context) {
	ticker := time.NewTicker(wheelStep)
	defer ticker.Stop()
	for turned := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := time.Now()
		for ; now.Sub(turned) >= wheelStep; turned = turned.Add(wheelStep) { // ticks may be left out
			for _, t := range g.wheel.next() {
				t.conn.tick(t, now)
			}
		}
	}
}
