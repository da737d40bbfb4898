package engine

import (
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
	healing               // not delivered here, a fresh look-up is under way
	settled               // its part of the books is final
)

// Delivery is one push for the users it names on one node. A link reads it
// through its methods, all of which are safe for concurrent use; everything they
// return is shared and must not be changed.
type Delivery struct {
	// Static from staging on.
	push   *Push
	node   string
	group  *route.Group // of a push to a room: the members on the node
	users  []string     // otherwise: whom it is for; nil for everybody
	except []string     // members of group that do not get it, sorted
	healed bool         // sent after a fresh look-up: not looked up again
	leg    LegTrace     // nil unless the push is sampled

	state atomic.Uint32

	// Written by whoever moves state away from written or queued, read once the
	// push has finished.
	outcome     Outcome // of every user not in notHere or failed
	reason      Reason
	text        string // the node's own words beside reason
	delivered   int
	notHere     []string
	failed      []string
	failedUsers int // of a broadcast
	unexplained int // users that the node's ack did not account for
}

// Node is the id of the node it is for.
func (d *Delivery) Node() string { return d.node }

// Payload is the encoded MessageContent.
func (d *Delivery) Payload() []byte { return d.push.Payload }

// Room is the room that was pushed to, "" for a push to users or to everybody.
func (d *Delivery) Room() string { return d.push.Room }

// Group is the room's members on the node. It is nil when the delivery names
// its users itself, and for everybody. The same pointer means the same members.
func (d *Delivery) Group() *route.Group { return d.group }

// Except lists the members of Group that do not get it, sorted, each a member.
func (d *Delivery) Except() []string { return d.except }

// Users lists for whom it is when Group is nil; nil for everybody.
func (d *Delivery) Users() []string { return d.users }

// Everybody tells a broadcast.
func (d *Delivery) Everybody() bool { return d.push.Kind == ToAll }

// Targets is the number of users it is for, 0 for everybody.
func (d *Delivery) Targets() int {
	if d.group != nil {
		return len(d.group.Users) - len(d.except)
	}
	return len(d.users)
}

// Deadline is when it must be settled.
func (d *Delivery) Deadline() time.Time { return d.push.deadline }

// Traceparent is the W3C trace context for the node, "" unless sampled.
func (d *Delivery) Traceparent() string {
	if d.leg == nil {
		return ""
	}
	return d.leg.Traceparent()
}

// Size estimates the bytes that a frame needs for it when all users are named.
func (d *Delivery) Size() int {
	n := len(d.push.Payload) + len(d.push.Room) + 64
	for _, u := range d.users {
		n += len(u) + 3
	}
	for _, u := range d.except {
		n += len(u) + 3
	}
	return n
}

// TrySend claims the delivery for writing. False means that it was settled
// while it was queued (it expired, its caller left): the link forgets it.
func (d *Delivery) TrySend() bool { return d.state.CompareAndSwap(queued, written) }

// Settled tells that nothing is owed any more: its slot may be freed.
func (d *Delivery) Settled() bool { return d.state.Load() >= healing }

// Ack is what a node answered to one delivery.
type Ack struct {
	Delivered   int      // users reached
	NotHere     []string // users without a connection on the node
	Failed      []string // users that are there and were not reached
	FailedUsers int      // the same as a count, for a broadcast
	Refused     bool     // the node did nothing with it
	Text        string   // the node's reason
}

// Ack settles the delivery with the node's answer and takes over its slices.
// False means that it was settled before: the ack came late. The error tells that
// the ack claims what cannot be: the delivery is then unknown as a whole.
func (d *Delivery) Ack(a Ack) (bool, error) {
	if err := d.check(&a); err != nil {
		return d.Lose(LostCount), fmt.Errorf("ack of node %q: %w", d.node, err)
	}
	next := settled
	if (len(a.NotHere) > 0 || a.Refused && !d.Everybody()) && d.mayHeal() {
		next = healing
	}
	// The result is written before the state moves on from "written" for those
	// that read it: the swap below publishes it, and only its winner counts.
	if !d.claim(written) {
		return false, nil
	}
	d.outcome, d.text = Delivered, a.Text
	d.delivered, d.notHere, d.failed, d.failedUsers = a.Delivered, a.NotHere, a.Failed, a.FailedUsers
	if a.Refused {
		d.outcome, d.reason = Failed, DropRefused
	} else if !d.Everybody() {
		d.unexplained = d.Targets() - a.Delivered - len(a.NotHere) - len(a.Failed)
	}
	d.publish(next)
	return true, nil
}
