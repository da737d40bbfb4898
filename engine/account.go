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

	// Stale is set where the Controller could not confirm the route: how long before the
	// push it was last known to be true. It may be true still.
	Stale time.Duration
	// Changed: the Controller had announced that the route is true no more. Whom it
	// would name now did not get the push, so it is no success.
	Changed bool
}

// Success tells whether the push reached what it was for.
func (r *Result) Success() bool {
	return !r.Changed && r.Found && r.Failed == 0 && r.Unknown == 0 && len(r.NodeFailures) == 0
}

// NodeFailure is a node where users failed or are unknown, and why. Node is ""
// where the Controller could not be asked.
type NodeFailure struct {
	Node   string
	Reason string
	Users  int
}

// books gathers the outcomes of one push.
type books struct {
	count    [Delivered + 1]int
	failures []NodeFailure
}

func (b *books) add(o Outcome, n int) { b.count[o] += n }

func (b *books) total() int {
	n := 0
	for _, c := range b.count {
		n += c
	}
	return n
}

// fail books n users of a node. Users of one node and reason stand together.
func (b *books) fail(o Outcome, node, reason string, n int) {
	if n == 0 {
		return
	}
	b.add(o, n)
	b.blame(o, node, reason, n)
}

func (b *books) blame(o Outcome, node, reason string, n int) {
	reason = o.String() + ": " + reason
	for i := range b.failures {
		if f := &b.failures[i]; f.Node == node && f.Reason == reason {
			f.Users += n
			return
		}
	}
	b.failures = append(b.failures, NodeFailure{node, reason, n})
}

// settled takes n off what the push waits for. The last one closes the books and tells the
// caller.
func (p *Push) settled(n int) {
	if p.pending.Add(-int32(n)) != 0 {
		return
	}
	if _, p.plain = p.plainAccount(); !p.plain {
		p.result, p.err = p.account()
	}
	if p.aside != nil && p.aside.timer != nil {
		p.aside.timer.Stop()
	}
	if p.Order != nil {
		p.Order.leave(p)
	}
	p.engine.leave()
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

// account closes the books of a push all of whose parts are settled.
func (p *Push) account() (Result, error) {
	if err := p.unsent(); err != nil {
		return Result{}, err
	}
	var b books
	if p.Kind == ToAll {
		for _, d := range p.legs {
			d.bookAll(&b)
		}
	} else {
		p.bookUsers(&b)
	}
	r := Result{
		Found: p.found, Delivered: b.count[Delivered], Offline: b.count[Offline],
		Failed: b.count[Failed], Unknown: b.count[Unknown], NodeFailures: b.failures,
	}
	r.Targets = b.total()
	if p.aside != nil && p.aside.stale.is {
		r.Stale, r.Changed = max(p.Arrived.Sub(p.aside.stale.known), 1), p.aside.stale.changed
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
	for _, d := range p.legs {
		if d.outcome != Failed || d.reason != DropExpired && d.reason != DropInternal {
			return nil
		}
	}
	expired := p.expiry()
	if len(p.legs) > 0 && expired == nil && !time.Now().Before(p.deadline) {
		return ErrDeadline
	}
	if len(p.legs) > 0 || expired != nil || p.aside == nil {
		return expired
	}
	switch err := p.aside.lookup; {
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
	if p.aside != nil {
		return Result{}, false
	}
	r := Result{Found: p.found, Offline: p.offline}
	for _, d := range p.legs {
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

// bookAll books a node's part of a broadcast. A node that did not answer adds no
// users, only its failure.
func (d *Delivery) bookAll(b *books) {
	if d.outcome != Delivered {
		b.blame(d.outcome, d.node, d.why(), 0)
		return
	}
	b.add(Delivered, d.delivered)
	b.fail(Failed, d.node, d.whyFailed(), d.shortfall().failedUsers)
}

// bookUsers books all other pushes: delivery by delivery, except for the users
// with more than one delivery, of whose outcomes the best counts.
func (p *Push) bookUsers(b *books) {
	b.add(Offline, p.offline)
	if p.aside != nil {
		for _, gone := range p.aside.dropped {
			b.fail(Failed, "", gone.why.String(), gone.users)
		}
	}
	apart := p.apart()
	for _, d := range p.legs {
		d.book(b, apart)
	}
	for _, best := range apart {
		switch {
		case best.d == nil: // excluded, or dropped before there was a delivery
		case best.outcome == Failed || best.outcome == Unknown:
			b.fail(best.outcome, best.d.node, best.d.whyUser(best.outcome), 1)
		default:
			b.add(best.outcome, 1)
		}
	}
	if lost := p.targets - b.total(); lost > 0 {
		b.fail(Unknown, "", LostInternal.String(), lost)
	}
}

// verdict is the best outcome so far of a user that is booked apart.
type verdict struct {
	outcome Outcome
	d       *Delivery
}

// apart lists the users that cannot be booked delivery by delivery.
func (p *Push) apart() map[string]verdict {
	var shared []string
	if p.aside != nil {
		shared = p.aside.shared
	}
	n := len(shared)
	for _, d := range p.legs {
		r := d.shortfall()
		n += len(r.resent) + len(r.gone)
	}
	if n == 0 {
		return nil
	}
	apart := make(map[string]verdict, n)
	for _, user := range shared {
		apart[user] = verdict{}
	}
	for _, d := range p.legs {
		r := d.shortfall()
		for _, user := range slices.Concat(r.resent, r.gone) {
			apart[user] = verdict{}
		}
	}
	return apart
}

// book adds the delivery's users to the books but for those in apart, whose
// verdicts it updates.
func (d *Delivery) book(b *books, apart map[string]verdict) {
	n := d.counts()
	if len(apart) > 0 {
		r := d.shortfall()
		slices.Sort(r.resent)
		slices.Sort(r.gone)
		unnamed := 0
		for user, best := range apart {
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
			if !has(r.resent, user) && o > best.outcome {
				apart[user] = verdict{o, d}
			}
		}
		// Whom the ack of a short count reached nobody can tell: it may have been
		// those booked apart, so only the count beyond them is sure of the rest.
		if unnamed > 0 {
			rest := n[Delivered] + n[Unknown] - unnamed
			n[Delivered] = max(0, n[Delivered]-unnamed)
			n[Unknown] = rest - n[Delivered]
		}
	}
	b.add(Delivered, n[Delivered])
	b.add(Offline, n[Offline])
	b.fail(Failed, d.node, d.whyFailed(), n[Failed])
	b.fail(Unknown, d.node, d.whyUnknown(), n[Unknown])
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
	r := d.shortfall()
	n[Delivered], n[Failed], n[Unknown] = d.delivered, len(r.failed), r.unexplained
	n[d.missedAs()] += len(r.notHere)
	return n
}

// missedAs is the outcome of users that the node does not have: offline once the
// Controller has been asked again, else failed.
func (d *Delivery) missedAs() Outcome {
	if d.shortfall().heal != Sent {
		return Failed
	}
	return Offline
}

// outcomeOf is how one user of the delivery ended, before heals. A user whom an
// ack neither names nor accounts for is unknown.
func (d *Delivery) outcomeOf(user string) Outcome {
	r := d.shortfall()
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

// why says in words why the delivery as a whole was not delivered.
func (d *Delivery) why() string {
	if text := d.shortfall().text; text != "" {
		return d.reason.String() + ": " + text
	}
	return d.reason.String()
}

func (d *Delivery) whyFailed() string {
	r := d.shortfall()
	switch {
	case d.outcome == Failed:
		return d.why()
	case r.heal != Sent && len(r.failed) == 0 && r.failedUsers == 0:
		return r.heal.String()
	case r.text != "":
		return r.text
	default:
		return "not taken by the client's connection"
	}
}

func (d *Delivery) whyUnknown() string {
	if d.outcome == Unknown {
		return d.why()
	}
	return LostCount.String()
}

func (d *Delivery) whyUser(o Outcome) string {
	if o == Unknown {
		return d.whyUnknown()
	}
	return d.whyFailed()
}
