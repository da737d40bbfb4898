package engine

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// Outcome is what became of one user, in the order in which one outcome beats
// another when a user has several deliveries.
type Outcome uint8

// The outcomes.
const (
	_         Outcome = iota
	Offline           // no connection, says the Controller or the node
	Failed            // known not delivered
	Unknown           // may have been delivered
	Delivered         // acknowledged by a node
)

// String is the word that callers see.
func (o Outcome) String() string {
	switch o {
	case Offline:
		return "offline"
	case Failed:
		return "failed"
	case Unknown:
		return "unknown"
	case Delivered:
		return "delivered"
	default:
		return "none"
	}
}

// Result is the account of one push:
// Targets = Delivered + Offline + Failed + Unknown.
type Result struct {
	// Found: the room exists, at least one of the users is online, at least one
	// node is known.
	Found                                        bool
	Targets, Delivered, Offline, Failed, Unknown int
	NodeFailures                                 []NodeFailure

	// Of a push with Options. Stored: of Offline, kept by the Spool. Unsure: of Stored, may have
	// got it already. Acked: of Delivered, the client itself has said so. Duplicates: of
	// Delivered, had it from an earlier try with the same message id.
	Stored, Unsure, Acked, Duplicates int

	// Stale is set where the Controller could not confirm the route: how long before the
	// push it was last known to be true. It may be true still.
	Stale time.Duration
	// Changed: the Controller had announced that the route is true no more. Whom it
	// would name now did not get the push, so it is no success.
	Changed bool
}

// Success tells whether the push reached what it was for, or is stored for all whom it did not
// reach.
func (r *Result) Success() bool {
	return !r.Changed && (r.Found || r.Stored > 0 && r.Stored == r.Offline) && r.Failed == 0 && r.Unknown == 0 && len(r.NodeFailures) == 0
}

// NodeFailure is a node where users failed or are unknown, and why. Node is ""
// where the Controller could not be asked.
type NodeFailure struct {
	Node   string
	Reason string
	Users  int
}

// tally gathers the outcomes of one push.
type tally struct {
	count    [Delivered + 1]int
	failures []NodeFailure
}

func (b *tally) add(o Outcome, n int) { b.count[o] += n }

func (b *tally) total() int {
	n := 0
	for _, c := range b.count {
		n += c
	}
	return n
}

// fail counts n users of a node. Users of one node and reason stand together.
func (b *tally) fail(o Outcome, node, reason string, n int) {
	if n == 0 {
		return
	}
	b.add(o, n)
	b.blame(o, node, reason, n)
}

func (b *tally) blame(o Outcome, node, reason string, n int) {
	reason = o.String() + ": " + reason
	for i := range b.failures {
		if f := &b.failures[i]; f.Node == node && f.Reason == reason {
			f.Users += n
			return
		}
	}
	b.failures = append(b.failures, NodeFailure{node, reason, n})
}

// settled takes n off what the push waits for. The last one takes the account
// and tells the caller.
func (p *Push) settled(n int) {
	if p.pending.Add(-int32(n)) != 0 {
		return
	}
	if _, p.plain = p.plainAccount(); !p.plain {
		p.result, p.err = p.account()
	}
	if p.slow != nil && p.slow.timer != nil {
		p.slow.timer.Stop()
	}
	if p.Order != nil {
		p.Order.leave(p)
	}
	p.engine.gate.leave()
	p.done.Complete(p)
}

// Result is the account of a push once it is finished. An error means that nothing
// was written; the result is then zero.
func (p *Push) Result() (Result, error) {
	if p.plain {
		r, _ := p.plainAccount()
		return r, nil
	}
	return p.result, p.err
}

// account adds up a push all of whose parts are settled.
func (p *Push) account() (Result, error) {
	if err := p.unsent(); err != nil {
		return Result{}, err
	}
	var b tally
	if p.Kind == ToAll {
		for _, d := range p.deliveries {
			d.tallyAll(&b)
		}
	} else {
		p.tallyUsers(&b)
	}
	r := Result{
		Found: p.found, Delivered: b.count[Delivered], Offline: b.count[Offline],
		Failed: b.count[Failed], Unknown: b.count[Unknown], NodeFailures: b.failures,
	}
	r.Targets = b.total()
	if p.slow != nil && p.slow.stale.is {
		r.Stale, r.Changed = max(p.Arrived.Sub(p.slow.stale.known), 1), p.slow.stale.changed
		p.engine.stale.Add(1) // in this order, see Stats
		if r.Changed {
			p.engine.changed.Add(1)
		}
	}
	if p.Kind == ToUser || p.Kind == ToUsers {
		r.Found = r.Offline < r.Targets // whatever the Controller said at first
	}
	slices.SortFunc(r.NodeFailures, func(x, y NodeFailure) int {
		return cmp.Or(strings.Compare(x.Node, y.Node), strings.Compare(x.Reason, y.Reason))
	})
	return r, nil
}

// unsent tells whether nothing was written although there was something to
// write, and why.
func (p *Push) unsent() error {
	for _, d := range p.deliveries {
		if d.outcome != Failed || d.reason != DropExpired && d.reason != DropInternal {
			return nil
		}
	}
	expired := p.expiry()
	if len(p.deliveries) > 0 && expired == nil && !time.Now().Before(p.deadline) {
		return ErrDeadline
	}
	if len(p.deliveries) > 0 || expired != nil || p.slow == nil {
		return expired
	}
	switch err := p.slow.lookup; {
	case errors.Is(err, route.ErrOverloaded):
		return fmt.Errorf("%w: %w", ErrOverloaded, err)
	case err != nil:
		return fmt.Errorf("look up the route: %w", err)
	}
	return nil
}

// plainAccount is the account of a push whose every delivery reached all whom it was for, in
// one go: most pushes.
func (p *Push) plainAccount() (Result, bool) {
	if p.slow != nil {
		return Result{}, false
	}
	r := Result{Found: p.found, Offline: p.offline}
	for _, d := range p.deliveries {
		if d.outcome != Delivered || d.short != nil {
			return Result{}, false
		}
		r.Delivered += d.delivered
	}
	r.Targets = r.Delivered + r.Offline
	if p.Kind == ToAll {
		return r, true
	}
	if p.Kind != ToRoom {
		r.Found = r.Delivered > 0
	}
	return r, r.Targets == p.targets
}

// tallyAll counts a node's part of a broadcast. A node that did not answer adds no
// users, only its failure.
func (d *Delivery) tallyAll(b *tally) {
	if d.outcome != Delivered {
		b.blame(d.outcome, d.node, d.reasonText(), 0)
		return
	}
	b.add(Delivered, d.delivered)
	b.fail(Failed, d.node, d.failedText(), d.details().failedUsers)
}

// tallyUsers counts all other pushes: delivery by delivery, except for the users
// with more than one delivery, of whose outcomes the best counts.
func (p *Push) tallyUsers(b *tally) {
	b.add(Offline, p.offline)
	if p.slow != nil {
		for _, gone := range p.slow.dropped {
			b.fail(Failed, "", gone.why.String(), gone.users)
		}
	}
	alone := p.countedAlone()
	for _, d := range p.deliveries {
		d.tally(b, alone)
	}
	for _, a := range alone {
		switch {
		case a.d == nil: // excluded, or dropped before there was a delivery
		case a.outcome == Failed || a.outcome == Unknown:
			b.fail(a.outcome, a.d.node, a.d.userText(a.outcome), 1)
		default:
			b.add(a.outcome, 1)
		}
	}
	if lost := p.targets - b.total(); lost > 0 {
		b.fail(Unknown, "", LostInternal.String(), lost)
	}
}

// best is the best outcome so far of a user that is counted by itself.
type best struct {
	outcome Outcome
	d       *Delivery
}

// countedAlone lists the users that cannot be counted delivery by delivery.
func (p *Push) countedAlone() map[string]best {
	var shared []string
	if p.slow != nil {
		shared = p.slow.shared
	}
	n := len(shared)
	for _, d := range p.deliveries {
		r := d.details()
		n += len(r.resent) + len(r.gone)
	}
	if n == 0 {
		return nil
	}
	alone := make(map[string]best, n)
	for _, user := range shared {
		alone[user] = best{}
	}
	for _, d := range p.deliveries {
		r := d.details()
		for _, user := range slices.Concat(r.resent, r.gone) {
			alone[user] = best{}
		}
	}
	return alone
}

// tally adds the delivery's users to the tally but for those in alone, whose
// best outcomes it updates.
func (d *Delivery) tally(b *tally, alone map[string]best) {
	n := d.counts()
	if len(alone) > 0 {
		r := d.details()
		slices.Sort(r.resent)
		slices.Sort(r.gone)
		unnamed := 0
		for user, sofar := range alone {
			if !d.has(user) {
				continue
			}
			o := d.outcomeOf(user)
			if r.unexplained > 0 && o == Unknown {
				unnamed++
			} else {
				n[o]--
			}
			if has(r.gone, user) {
				o = Offline
			}
			if !has(r.resent, user) && o > sofar.outcome {
				alone[user] = best{o, d}
			}
		}
		// Whom the ack of a short count reached nobody can tell: it may have been
		// those counted alone, so only the count beyond them is sure of the rest.
		if unnamed > 0 {
			rest := n[Delivered] + n[Unknown] - unnamed
			n[Delivered] = max(0, n[Delivered]-unnamed)
			n[Unknown] = rest - n[Delivered]
		}
	}
	b.add(Delivered, n[Delivered])
	b.add(Offline, n[Offline])
	b.fail(Failed, d.node, d.failedText(), n[Failed])
	b.fail(Unknown, d.node, d.unknownText(), n[Unknown])
}

// has tells whether user is in a sorted list.
func has(sorted []string, user string) bool {
	_, ok := slices.BinarySearch(sorted, user)
	return ok
}

// counts is how the delivery's users ended, before heals.
func (d *Delivery) counts() [Delivered + 1]int {
	var n [Delivered + 1]int
	if d.outcome != Delivered {
		n[d.outcome] = d.Targets()
		return n
	}
	r := d.details()
	n[Delivered], n[Failed], n[Unknown] = d.delivered, len(r.failed), r.unexplained
	n[d.missedAs()] += len(r.notHere)
	return n
}

// missedAs is the outcome of users that the node does not have: offline once the
// Controller has been asked again, else failed.
func (d *Delivery) missedAs() Outcome {
	if d.details().heal != Sent {
		return Failed
	}
	return Offline
}

// outcomeOf is how one user of the delivery ended, before heals. A user whom an
// ack neither names nor accounts for is unknown.
func (d *Delivery) outcomeOf(user string) Outcome {
	r := d.details()
	switch {
	case d.outcome != Delivered:
		return d.outcome
	case has(r.notHere, user):
		return d.missedAs()
	case has(r.failed, user):
		return Failed
	case r.unexplained > 0:
		return Unknown
	default:
		return Delivered
	}
}

// reasonText says in words why the delivery as a whole was not delivered.
func (d *Delivery) reasonText() string {
	if text := d.details().text; text != "" {
		return d.reason.String() + ": " + text
	}
	return d.reason.String()
}

func (d *Delivery) failedText() string {
	r := d.details()
	switch {
	case d.outcome == Failed:
		return d.reasonText()
	case r.heal != Sent && len(r.failed) == 0 && r.failedUsers == 0:
		return r.heal.String()
	case r.text != "":
		return r.text
	default:
		return "not taken by the client's connection"
	}
}

func (d *Delivery) unknownText() string {
	if d.outcome == Unknown {
		return d.reasonText()
	}
	return LostCount.String()
}

func (d *Delivery) userText(o Outcome) string {
	if o == Unknown {
		return d.unknownText()
	}
	return d.failedText()
}
