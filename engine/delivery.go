package engine

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// The life of a delivery. Each step is a compare-and-swap, so of the link, the
// clock and the caller that leaves, exactly one settles it.
const (
	queued  uint32 = iota // with the link, not written
	written               // handed to the stream: it may arrive
	claimed               // somebody is writing its result
	denied                // not delivered here, to be looked up
	healing               // the look-up is under way
	settled               // its part of the tally is final
)

// Delivery is one push for the users it names on one node. A link reads it
// through its methods, all of which are safe for concurrent use; everything they
// return is shared and must not be changed.
type Delivery struct {
	// Static from staging on.
	push   *Push
	node   string
	group  *route.Group  // of a push to a room: the members on the node
	users  []string      // otherwise: whom it is for, sorted; nil for everybody
	except []string      // members of group that do not get it, sorted
	healed bool          // sent after a fresh look-up: not looked up again
	names  bool          // the node is to name whom the filter leaves out
	shard  uint16        // on which it keeps its order
	trace  DeliveryTrace // nil unless the push is sampled

	state atomic.Uint32

	// Written by whoever has claimed the delivery; read once the push is finished.
	outcome   Outcome // of all users not named in short
	reason    Reason
	delivered int // users, when the outcome is Delivered
	short     *details
}

// details is what there is to say of a delivery that did not simply reach everybody.
type details struct {
	text        string   // the node's own words beside the reason
	notHere     []string // sorted; offline, unless a heal says otherwise
	failed      []string // sorted
	reused      []string // sorted; had the message id with another content
	failedUsers int      // of a broadcast
	unexplained int      // users that the node's ack did not account for
	duplicates  int      // of delivered: had it before
	filtered    int      // users whom the filter leaves out
	leftOut     []string // sorted; those of filtered that the node has named
	resent      []string // users for whom another delivery answers
	gone        []string // users that the Controller has nowhere any more
	heal        Reason   // why notHere could not be looked up, Sent if it could

	// What clients said of delivered, once nobody waits for that any longer.
	acked   int
	unacked []string // sorted; given up by name
	silent  int      // given up, and nobody knows who it is
}

// details reads it, mostly nothing.
func (d *Delivery) details() details {
	if d.short == nil {
		return details{}
	}
	return *d.short
}

// ensureDetails is where to write it.
func (d *Delivery) ensureDetails() *details {
	if d.short == nil {
		d.short = new(details)
	}
	return d.short
}

// Node is the id of the node it is for.
func (d *Delivery) Node() string { return d.node }

// Payload is the encoded MessageContent.
func (d *Delivery) Payload() []byte { return d.push.Payload }

// Priority is that of the push.
func (d *Delivery) Priority() Priority { return d.push.Priority }

// Room is the room that was pushed to, "" for a push to several, to users or to everybody. Of a message out
// of the store it is the room that it was pushed to once.
func (d *Delivery) Room() string {
	if o := d.push.Options; o != nil && o.Replay != nil {
		return o.Replay.Room
	}
	return d.push.Room
}

// Rooms are those that were pushed to, nil for a push to fewer than two. In a connection that is in several
// the client sees the first.
func (d *Delivery) Rooms() []string {
	if u := d.push.union; u != nil {
		return u.Rooms()
	}
	return nil
}

// RoomKey tells pushes to different rooms apart: it is the room, an id that is like none for several, "" for all other
// pushes. A link may keep it.
func (d *Delivery) RoomKey() string {
	if u := d.push.union; u != nil {
		return u.ID
	}
	return d.Room()
}

// Once tells that nobody may ever push to these rooms again: what a link would keep of their members is not worth it.
func (d *Delivery) Once() bool { return d.push.once }

// Group is the members of the room, or of the rooms, on the node. It is nil when the delivery names
// its users itself, and for everybody. The same pointer means the same members.
func (d *Delivery) Group() *route.Group { return d.group }

// Except lists the members of Group that do not get it, sorted, each a member.
func (d *Delivery) Except() []string { return d.except }

// Users lists for whom it is when Group is nil; nil for everybody.
func (d *Delivery) Users() []string { return d.users }

// Everybody tells a broadcast.
func (d *Delivery) Everybody() bool { return d.push.Kind == ToAll }

// Scope is what the ids of the users begin with for whom a broadcast is, "" for everybody. It
// says nothing of other deliveries, which name their users.
func (d *Delivery) Scope() string { return d.push.Scope }

// Targets is the number of users it is for, 0 for everybody.
func (d *Delivery) Targets() int {
	if d.group != nil {
		return len(d.group.Users) - len(d.except)
	}
	return len(d.users)
}

// Deadline is when it must be settled, its receipts left aside.
func (d *Delivery) Deadline() time.Time { return d.push.deadline }

// Options are those of the push, nil for none.
func (d *Delivery) Options() *Options { return d.push.Options }

// Arrived is when the push came in, from which its TTL counts.
func (d *Delivery) Arrived() time.Time { return d.push.Arrived }

// Expires is when the message must not be shown any more: TTL after Arrived. The zero time is
// never. A link drops with DropExpired what it has not written by then.
func (d *Delivery) Expires() time.Time {
	if o := d.push.Options; o != nil && o.TTL > 0 {
		return d.push.Arrived.Add(o.TTL)
	}
	return time.Time{}
}

// Traceparent is the W3C trace context for the node, "" unless sampled.
func (d *Delivery) Traceparent() string {
	if d.trace == nil {
		return ""
	}
	return d.trace.Traceparent()
}

// Size estimates the bytes that a frame needs for it, its audience left aside.
func (d *Delivery) Size() int {
	n := len(d.push.Payload) + len(d.push.Room) + 64
	if d.push.lasting != nil {
		n += d.logSize()
	}
	if o := d.push.Options; o != nil {
		for i := range o.Filter {
			n += o.Filter[i].size()
		}
	}
	for _, u := range d.users {
		n += len(u) + 3
	}
	if d.push.union != nil && d.group == nil {
		for _, room := range d.push.union.Rooms() {
			n += len(room) + 3
		}
	}
	for _, u := range d.except {
		n += len(u) + 3
	}
	return n
}

// size estimates the bytes of a match in a frame.
func (m *Match) size() int {
	n := len(m.Key) + 8
	for _, value := range m.Values {
		n += len(value) + 2
	}
	return n
}

// NamesFiltered tells whether the node is to say by name whom the filter leaves out: who has other connections elsewhere
// counts by the best that becomes of them.
func (d *Delivery) NamesFiltered() bool { return d.names }

// TrySend claims the delivery for writing. False means that it was settled
// while it was queued (it expired, its caller left): the link forgets it.
func (d *Delivery) TrySend() bool {
	if !d.state.CompareAndSwap(queued, written) {
		return false
	}
	if d.trace != nil {
		d.trace.Taken()
	}
	return true
}

// Traced tells whether Written is to be told.
func (d *Delivery) Traced() bool { return d.trace != nil }

// Written notes that the frame with a delivery that is traced was handed to the connection.
func (d *Delivery) Written() { d.trace.Written() }

// Settled tells that the link owes nothing for it any more.
func (d *Delivery) Settled() bool { return d.state.Load() >= claimed }

// Ack is what a node answered to one delivery.
type Ack struct {
	Delivered   int      // users reached
	NotHere     []string // users without a connection on the node
	Failed      []string // users that are there and were not reached
	FailedUsers int      // the same as a count, for a broadcast
	Refused     bool     // the node did nothing with it
	Text        string   // the node's reason
	Reused      []string // users who had the message id with another content: not reached, not in Failed
	Duplicates  int      // of Delivered: had the message before
	Pending     int      // of Delivered: clients that are to acknowledge. Receipts follow
	Filtered    int      // users who are there, and have no connection for which the filter is. Beside Delivered
	LeftOut     []string // of Filtered, by name, for NamesFiltered
}

// Ack settles the delivery with the node's answer and takes over its slices.
// False means that it was settled before: the ack came late. The error tells that
// the ack claims what cannot be; the delivery is then unknown as a whole.
func (d *Delivery) Ack(a Ack) (bool, error) {
	if err := d.check(&a); err != nil {
		return d.Lose(LostCount), fmt.Errorf("ack of node %q: %w", d.node, err)
	}
	if !d.state.CompareAndSwap(written, claimed) {
		return false, nil
	}
	d.outcome, d.delivered = Delivered, a.Delivered
	named := len(a.NotHere) + len(a.Failed) + len(a.Reused)
	if named > 0 || a.FailedUsers > 0 || a.Refused || a.Text != "" || a.Duplicates > 0 || a.Pending > 0 || a.Filtered > 0 ||
		!d.Everybody() && a.Delivered != d.Targets() {
		slices.Sort(a.NotHere)
		slices.Sort(a.Failed)
		slices.Sort(a.Reused)
		slices.Sort(a.LeftOut)
		r := d.ensureDetails()
		r.text, r.notHere, r.failed, r.failedUsers = a.Text, a.NotHere, a.Failed, a.FailedUsers
		r.reused, r.duplicates, r.filtered, r.leftOut = a.Reused, a.Duplicates, a.Filtered, a.LeftOut
		switch {
		case a.Refused:
			d.outcome, d.reason = Failed, DropRefused
		case !d.Everybody():
			r.unexplained = d.Targets() - a.Delivered - a.Filtered - named
		}
	}
	if a.Pending > 0 {
		d.push.lasting.expect(d, a.Pending)
	}
	d.settle(a.NotHere)
	return true, nil
}

// Drop settles as failed a delivery that was certainly not written.
func (d *Delivery) Drop(r Reason) bool {
	if !d.claim() {
		return false
	}
	d.outcome, d.reason = Failed, r
	d.settle(nil)
	return true
}

// Lose settles as unknown a delivery that may have been written.
func (d *Delivery) Lose(r Reason) bool {
	if !d.claim() {
		return false
	}
	d.outcome, d.reason = Unknown, r
	d.settle(nil)
	return true
}

// claim makes the caller the one who settles.
func (d *Delivery) claim() bool {
	return d.state.CompareAndSwap(queued, claimed) || d.state.CompareAndSwap(written, claimed)
}

// settle closes a claimed delivery, or looks up again the users for whom it was
// known not to be delivered here.
func (d *Delivery) settle(missing []string) {
	if d.trace != nil {
		d.trace.End(d.describe())
	}
	p := d.push
	p.engine.lanes[d.shard].ended[d.reason].Add(1)
	if d.outcome == Failed && (d.reason.healable() || d.reason == DropRefused) {
		missing = d.all()
	}
	if len(missing) > 0 && !d.healed && p.Kind != ToAll {
		d.state.Store(denied)
		h := &healer{d: d, missing: slices.Sorted(slices.Values(missing))} // every list of users is sorted
		p.engine.offload(int(d.shard), h.start)
		return
	}
	d.close()
}

// close ends a delivery, and lets those go on that wait for it.
func (d *Delivery) close() {
	p := d.push
	d.state.Store(settled)
	if p.warded.Load() {
		var told []func()
		p.mu.Lock()
		if a := p.slow; a != nil {
			told = a.wards[d]
			delete(a.wards, d)
		}
		p.mu.Unlock()
		for _, then := range told {
			p.engine.offload(int(d.shard), then)
		}
	}
	p.settled(1)
}

// expire settles whatever the delivery still waits for: with drop what was not
// written, with lose what was, unless that is Sent.
func (d *Delivery) expire(drop, lose Reason) {
	switch {
	case d.state.CompareAndSwap(queued, claimed):
		d.outcome, d.reason = Failed, drop
		d.settle(nil)
	case lose != Sent && d.state.CompareAndSwap(written, claimed):
		d.outcome, d.reason = Unknown, lose
		d.settle(nil)
	default:
		d.endHeal(drop)
	}
}

// endHeal settles a delivery that is denied or healing; why is Sent if its users were
// looked up.
func (d *Delivery) endHeal(why Reason) {
	// In this order: one that is denied may become healing in between.
	if d.state.CompareAndSwap(denied, claimed) || d.state.CompareAndSwap(healing, claimed) {
		if why != Sent {
			d.ensureDetails().heal = why
		}
		d.close()
	}
}

// all lists the users it is for.
func (d *Delivery) all() []string {
	if d.group == nil {
		return d.users
	}
	if len(d.except) == 0 {
		return d.group.Users
	}
	users := make([]string, 0, d.Targets())
	for _, user := range d.group.Users {
		if _, out := slices.BinarySearch(d.except, user); !out {
			users = append(users, user)
		}
	}
	return users
}

// has tells whether user is one of those it is for.
func (d *Delivery) has(user string) bool {
	if d.group == nil {
		_, ok := slices.BinarySearch(d.users, user)
		return ok
	}
	_, out := slices.BinarySearch(d.except, user)
	return !out && d.group.Has(user)
}

// check refuses an ack that claims what cannot be.
func (d *Delivery) check(a *Ack) error {
	named := len(a.NotHere) + len(a.Failed)
	if !d.Everybody() { // of a broadcast nobody knows whom it is for
		named += len(a.Reused)
	}
	switch o := d.push.Options; {
	case min(a.Delivered, a.FailedUsers, a.Duplicates, a.Pending, a.Filtered) < 0:
		return errors.New("negative count")
	case a.Duplicates > a.Delivered || a.Pending > a.Delivered:
		return fmt.Errorf("%d duplicates and %d pending of %d delivered", a.Duplicates, a.Pending, a.Delivered)
	case a.Pending > 0 && (o == nil || !o.ClientAck):
		return errors.New("clients were not to acknowledge")
	case (a.Duplicates > 0 || len(a.Reused) > 0) && (o == nil || o.MessageID == ""):
		return errors.New("there was no message id")
	case a.Filtered > 0 && (o == nil || len(o.Filter) == 0):
		return errors.New("there was no filter")
	case len(a.LeftOut) > 0 && (!d.names || len(a.LeftOut) > a.Filtered):
		return fmt.Errorf("%d users are named of %d whom the filter leaves out", len(a.LeftOut), a.Filtered)
	case a.Refused && a.Filtered > 0:
		return fmt.Errorf("refused, and the filter leaves out %d", a.Filtered)
	case a.Refused && len(a.Reused) > 0:
		return fmt.Errorf("refused, and %d have had the message id", len(a.Reused))
	case a.Refused && (a.Delivered > 0 || named > 0):
		return fmt.Errorf("refused, and %d delivered, %d missed", a.Delivered, named)
	case d.Everybody() && named > 0:
		return fmt.Errorf("a broadcast names %d users", named)
	case d.Everybody():
		return nil
	case a.Delivered+a.Filtered+named > d.Targets():
		return fmt.Errorf("%d delivered, %d filtered and %d missed of %d", a.Delivered, a.Filtered, named, d.Targets())
	}
	if named+len(a.LeftOut) == 0 {
		return nil
	}
	// Each user named is one it was for, and named once.
	seen := make(map[string]struct{}, named+len(a.LeftOut))
	for _, users := range [][]string{a.NotHere, a.Failed, a.Reused, a.LeftOut} {
		for _, user := range users {
			if !d.has(user) {
				return fmt.Errorf("user %q was not asked for", user)
			}
			if _, dup := seen[user]; dup {
				return fmt.Errorf("user %q is named twice", user)
			}
			seen[user] = struct{}{}
		}
	}
	return nil
}

// describe is the outcome in a word or two, for traces.
func (d *Delivery) describe() string {
	r := d.details()
	switch {
	case d.outcome != Delivered:
		return d.outcome.String() + ": " + d.reason.String()
	case len(r.failed) > 0 || len(r.reused) > 0 || r.failedUsers > 0 || r.unexplained > 0:
		return "partial"
	case len(r.notHere) > 0:
		return "not here"
	case r.filtered > 0 && d.delivered == 0:
		return "filtered"
	default:
		return "delivered"
	}
}
