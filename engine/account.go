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
	// Found: the room exists, at least one of the rooms does, at least one of the users is online, at least one
	// node is known.
	Found                                        bool
	Targets, Delivered, Offline, Failed, Unknown int
	NodeFailures                                 []NodeFailure

	// Of a push with Options. Stored: of Offline, kept by the Spool. Unsure: of Stored, may have
	// got it already. Acked: of Delivered, the client itself has said so. Duplicates: of
	// Delivered, had it from an earlier try with the same message id.
	Stored, Unsure, Acked, Duplicates int
	// Filtered: of Offline, connected, and no connection is one for which Options.Filter is.
	Filtered int

	// RoomsNotFound is how many of several rooms do not exist.
	RoomsNotFound int

	// Place is where a push to a room stands in its log, zero if it does not. Everybody whom such a push has
	// not reached counts as Offline and Stored; a room of which nobody could tell who is in it counts as one.
	Place Place

	// Stale is set where the Controller could not confirm the route: how long before the
	// push it was last known to be true. It may be true still.
	Stale time.Duration
	// Changed: the Controller had announced that the route is true no more. Whom it
	// would name now did not get the push, so it is no success.
	Changed bool
}

// Success tells whether the push reached what it was for, or is stored for all whom it did not
// reach: for a room that is who comes back to it, though the Controller has forgotten the room.
func (r *Result) Success() bool {
	stored := r.Stored > 0 && r.Stored == r.Offline || r.Place != Place{}
	return !r.Changed && (r.Found || stored) && r.Failed == 0 && r.Unknown == 0 && len(r.NodeFailures) == 0
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
	count                             [Delivered + 1]int
	stored, unsure, acked, duplicates int
	filtered                          int
	failures                          []NodeFailure

	// Of a push that was to be written into a room's log.
	logged  bool // it stands there, and can be read
	tooLate bool // it could be read no more when the receipts were there
	missed  int  // who would be stored if it stood there
}

func (b *tally) add(o Outcome, n int) { b.count[o] += n }

// miss counts n users whom the push did not reach: who reads the log they are in has it stored there, all
// others are what they are.
func (b *tally) miss(o Outcome, node, reason string, n int) {
	if b.logged {
		b.add(Offline, n)
		b.stored += n
		if o == Unknown {
			b.unsure += n
		}
		return
	}
	b.missed += n
	if o == Offline {
		b.add(Offline, n)
		return
	}
	b.fail(o, node, reason, n)
}

// leaveOut counts n users whom the filter leaves out.
func (b *tally) leaveOut(n int) {
	b.add(Offline, n)
	b.filtered += n
}

// missReceipt counts n users who have not acknowledged.
func (b *tally) missReceipt(node string, n int) {
	if b.tooLate {
		b.fail(Unknown, node, LostReceipt.String(), n)
		return
	}
	b.miss(Unknown, node, LostReceipt.String(), n)
}

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

// settled takes n off what the push waits for. The last one finishes it, or has it go on with
// what comes after its deliveries.
func (p *Push) settled(n int) {
	if p.pending.Add(-int32(n)) != 0 {
		return
	}
	r, plain := p.plainAccount()
	if l := p.lasting; l != nil && !(plain && l.idle(r)) {
		l.delivered()
		return
	}
	if p.plain = plain; !plain {
		p.result, p.err = p.account()
		p.engine.book(p.result)
	}
	p.release()
	p.complete()
}

// book counts the final account of a push that is not plain.
func (e *Engine) book(r Result) {
	if r.Stale > 0 {
		e.stale.Add(1) // in this order, see Stats
		if r.Changed {
			e.changed.Add(1)
		}
	}
}

// release lets go of what a push has while it has deliveries under way.
func (p *Push) release() {
	if p.slow != nil && p.slow.timer != nil {
		p.slow.timer.Stop()
	}
	if p.Order != nil {
		p.Order.leave(p)
	}
}

// complete tells the caller.
func (p *Push) complete() {
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
	var at Place
	switch {
	case p.Kind == ToAll:
		for _, d := range p.deliveries {
			d.tallyAll(&b)
		}
	case p.logs():
		at = p.tallyLogged(&b)
	default:
		p.tallyUsers(&b)
	}
	r := Result{
		Place: at, RoomsNotFound: p.absent,
		Found: p.found, Delivered: b.count[Delivered], Offline: b.count[Offline],
		Failed: b.count[Failed], Unknown: b.count[Unknown], NodeFailures: b.failures,
		Stored: b.stored, Unsure: b.unsure, Acked: b.acked, Duplicates: b.duplicates, Filtered: b.filtered,
	}
	r.Targets = b.total()
	if p.slow != nil && p.slow.stale.is {
		r.Stale, r.Changed = max(p.Arrived.Sub(p.slow.stale.known), 1), p.slow.stale.changed
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
	if p.stores() {
		return nil // it was stored, or has failed to be
	}
	for _, d := range p.deliveries {
		if d.outcome != Failed || d.reason != DropExpired && d.reason != DropInternal {
			return nil
		}
	}
	expired := p.expiry()
	if errors.Is(expired, errLapsed) {
		return nil
	}
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
	r := Result{Found: p.found, Offline: p.offline, RoomsNotFound: p.absent}
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
	if p.Kind == ToUser || p.Kind == ToUsers {
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
	r := d.details()
	delivered := d.delivered - len(r.unacked) - r.silent
	b.add(Delivered, delivered)
	b.acked += r.acked
	b.duplicates += min(r.duplicates, delivered)
	b.leaveOut(r.filtered)
	b.fail(Failed, d.node, d.failedText(), r.failedUsers)
	b.fail(Failed, d.node, DropReused.String(), len(r.reused))
	b.fail(Unknown, d.node, LostReceipt.String(), len(r.unacked)+r.silent)
}

// part is how a node's answer speaks of one of the users of a delivery. A user is in one of them.
type part uint8

const (
	rest    part = iota // not by name: most users, and all where there is no answer
	missed              // not there
	failed              // there, and not reached
	reused              // had the message id with another content
	unacked             // reached, and the client has not acknowledged
	leftOut             // there, and left out by the filter
	parts               // how many there are
)

// partOf is the part of one user of the delivery.
func (d *Delivery) partOf(user string) part {
	r := d.short
	switch {
	case d.outcome != Delivered || r == nil:
		return rest
	case has(r.notHere, user):
		return missed
	case has(r.failed, user):
		return failed
	case has(r.reused, user):
		return reused
	case has(r.unacked, user):
		return unacked
	case has(r.leftOut, user):
		return leftOut
	default:
		return rest
	}
}

// sizes is how many users are in each part.
func (d *Delivery) sizes() (n [parts]int) {
	if n[rest] = d.Targets(); d.outcome == Delivered && d.short != nil {
		r := d.short
		n[missed], n[failed], n[reused], n[unacked], n[leftOut] = len(r.notHere), len(r.failed), len(r.reused), len(r.unacked), len(r.leftOut)
		n[rest] -= n[missed] + n[failed] + n[reused] + n[unacked] + n[leftOut]
	}
	return n
}

// outcomeOf is how a user in a part of the delivery ended, before heals. Where not all of the
// rest were reached, and nobody knows who was, all are unknown.
func (d *Delivery) outcomeOf(in part) Outcome {
	if d.outcome != Delivered {
		return d.outcome
	}
	switch r := d.details(); {
	case in == missed:
		return d.missedAs()
	case in == failed || in == reused:
		return Failed
	case in == leftOut || in == rest && d.leavesOutRest():
		return Offline
	case in == unacked || r.unexplained+r.silent > 0 || r.filtered > len(r.leftOut):
		return Unknown
	default:
		return Delivered
	}
}

// leavesOutRest tells whether the filter has left out all of the rest, as is certain of a delivery to one user.
func (d *Delivery) leavesOutRest() bool {
	r := d.short
	return r != nil && r.filtered > len(r.leftOut) && r.filtered-len(r.leftOut) == d.sizes()[rest]
}

// tallyUsers counts all other pushes: delivery by delivery, except for the users
// with more than one delivery, of whose outcomes the best counts, and those that were stored.
func (p *Push) tallyUsers(b *tally) {
	in := make([][parts]int, len(p.deliveries)) // how many of each part count with a delivery
	for i, d := range p.deliveries {
		in[i] = d.sizes()
	}
	away := 0 // users without a delivery who are stored
	for user, e := range p.byName(in) {
		switch stored := p.tallyStored(b, user, e); {
		case stored && e.delivery < 0:
			away++
		case stored || e.delivery < 0: // excluded, or counted below
		case b.logged && e.barred != Sent && e.outcome != Delivered:
			b.fail(e.outcome, p.deliveries[e.delivery].node, e.barred.String(), 1)
		case e.filtered:
			b.leaveOut(1)
		case e.outcome == Offline: // or gone, which the delivery does not tell
			p.tallyOffline(b, 1)
		default:
			in[e.delivery][e.part]++
		}
	}
	for i, d := range p.deliveries {
		d.tally(b, in[i])
	}
	n := min(away, p.offline)
	p.tallyOffline(b, p.offline-n)
	away -= n
	if p.slow != nil {
		for _, gone := range p.slow.dropped {
			n := min(away, gone.users)
			b.miss(Failed, "", gone.why.String(), gone.users-n)
			away -= n
		}
	}
	if lost := p.targets - b.total(); lost > 0 {
		b.fail(Unknown, "", LostInternal.String(), lost)
	}
}

// ending is how one user ended that is counted by name.
type ending struct {
	delivery int // with which it counts, by its place in Push.deliveries, -1 for none
	part     part
	outcome  Outcome
	acked    bool   // it is certain that the client has acknowledged
	filtered bool   // connected, and left out by the filter
	barred   Reason // why it is not to be stored: the message would be wrong there, or is not worth it; else Sent
}

// tallyLogged counts a push to a room that was to be written into the room's log, and tells where it
// stands there.
func (p *Push) tallyLogged(b *tally) Place {
	l := p.lasting
	b.logged, b.tooLate = l.place != Place{} && !l.lapsed, l.tooLate
	p.tallyUsers(b)
	if l.place == (Place{}) && !l.lapsed {
		b.blame(Failed, "", "store: "+l.unasked.Error(), b.missed)
	}
	return l.place
}

// byName lists how the users ended that cannot be counted delivery by delivery, and takes them off
// in: those with more than one delivery, and all of a push that may be stored for each of them.
func (p *Push) byName(in [][parts]int) map[string]ending {
	ends := p.countedAlone()
	if p.copies() {
		if ends == nil {
			ends = make(map[string]ending, p.targets)
		}
		if p.Kind == ToUser {
			ends[p.User] = ending{delivery: -1}
		}
		for _, user := range p.Users {
			ends[user] = ending{delivery: -1}
		}
	}
	for i, d := range p.deliveries {
		if r := d.short; r != nil {
			slices.Sort(r.resent)
			slices.Sort(r.gone)
		}
		if p.copies() {
			for _, user := range d.all() {
				e, known := ends[user]
				if !known {
					e.delivery = -1
				}
				ends[user] = e.with(d, i, user, in)
			}
			continue
		}
		for user, e := range ends {
			if d.has(user) {
				ends[user] = e.with(d, i, user, in)
			}
		}
	}
	return ends
}

// with is e once the i-th delivery, d, is looked at. The better one counts.
func (e ending) with(d *Delivery, i int, user string, in [][parts]int) ending {
	r, at := d.details(), d.partOf(user)
	in[i][at]--
	switch {
	case at == reused:
		e.barred = DropReused
	case d.barred():
		e.barred = d.reason
	}
	if has(r.resent, user) {
		return e // another delivery answers
	}
	o := d.outcomeOf(at)
	if has(r.gone, user) {
		o = Offline
	}
	acked := o == Delivered && r.acked > 0 && r.acked == d.sizes()[rest]
	filtered := at == leftOut || at == rest && d.outcome == Delivered && d.leavesOutRest()
	if o > e.outcome || o == e.outcome && (acked && !e.acked || filtered && !e.filtered) {
		e.delivery, e.part, e.outcome, e.acked, e.filtered = i, at, o, acked, filtered
	}
	return e
}

// countedAlone lists the users with more than one delivery.
func (p *Push) countedAlone() map[string]ending {
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
	alone := make(map[string]ending, n)
	for _, user := range shared {
		alone[user] = ending{delivery: -1}
	}
	for _, d := range p.deliveries {
		r := d.details()
		for _, user := range slices.Concat(r.resent, r.gone) {
			alone[user] = ending{delivery: -1}
		}
	}
	return alone
}

// tally counts so many users of each part of the delivery, those who count with it.
func (d *Delivery) tally(b *tally, in [parts]int) {
	if d.outcome != Delivered {
		if d.barred() {
			b.fail(d.outcome, d.node, d.reasonText(), in[rest])
		} else {
			b.miss(d.outcome, d.node, d.reasonText(), in[rest])
		}
		return
	}
	r, missing := d.details(), in[missed]
	if d.missedAs() == Offline {
		b.miss(Offline, "", "", missing)
		missing = 0
	}
	b.miss(Failed, d.node, d.failedText(), in[failed]+missing)
	b.fail(Failed, d.node, DropReused.String(), in[reused])
	b.missReceipt(d.node, in[unacked])
	b.leaveOut(in[leftOut])
	// What the node says of the rest are counts. They may be about those who count elsewhere, so
	// only what is beyond them is certain.
	elsewhere := d.sizes()[rest] - in[rest]
	certain := func(n int) int { return max(0, n-elsewhere) }
	delivered := certain(d.delivered - len(r.unacked) - r.silent)
	b.add(Delivered, delivered)
	b.acked += certain(r.acked)
	b.duplicates += min(certain(r.duplicates), delivered)
	filtered := certain(r.filtered - len(r.leftOut))
	b.leaveOut(filtered)
	unknown := in[rest] - delivered - filtered
	silent := min(unknown, r.silent)
	b.missReceipt(d.node, silent)
	b.miss(Unknown, d.node, LostCount.String(), unknown-silent)
}

// barred tells whether the message is not to be stored for those whom the delivery did not reach.
func (d *Delivery) barred() bool {
	return d.outcome == Failed && (d.reason == DropReplaced || d.reason == DropTooLarge)
}

// has tells whether user is in a sorted list.
func has(sorted []string, user string) bool {
	_, ok := slices.BinarySearch(sorted, user)
	return ok
}

// missedAs is the outcome of users that the node does not have: offline once the
// Controller has been asked again, else failed.
func (d *Delivery) missedAs() Outcome {
	if d.details().heal != Sent {
		return Failed
	}
	return Offline
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
