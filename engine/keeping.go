package engine

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// keeping hands a push to the Spool for those whom it has not reached. The books stay open while
//
//	Spool.Append ─▶ is acknowledged ─▶ Directory.Locate ─▶ Link.Nudge ─▶ is taken
//
// in this order: a user may connect while the message is being stored. Whoever connects before the
// look-up is found by it, and has the store read again before anything newer is shown; whoever
// connects after it reads what is stored by then. It does so when the books have closed for
// want of time, too. It is a route.Waiter.
type keeping struct {
	// Static after keep.
	l    *lasting
	by   time.Time
	then func() // once, at the end

	// Of the task that has reached it, one after the other.
	users  []string // for whom it is stored
	stored []string // those that are, and their places
	places []uint64
	open   atomic.Int32 // nudges that have no answer, and one

	// Guarded by l.mu.
	timer    *time.Timer // ends it
	listed   bool        // users are
	answered bool        // by the Spool
	ended    bool
}

var errNoAnswer = errors.New("no answer in time")

// keep stores the push for those whom it has not reached, by then, and goes on.
func (l *lasting) keep(by time.Time, then func()) {
	p := l.push
	if p.logs() {
		l.lapse()
		then()
		return
	}
	k := &keeping{l: l, by: by, then: then}
	l.mu.Lock()
	skip := !p.Options.Store || l.abandoned
	if !skip {
		l.keeping = k
	} else if l.abandoned {
		l.unasked = ErrDraining
	}
	l.mu.Unlock()
	if skip {
		then()
		return
	}
	p.engine.offload(l.shard, k.append)
}

// lapse notes whether the TTL of a push that stands in a log has passed: nobody is shown it any more. Whom it
// was stored for when its deliveries were settled stays so.
func (l *lasting) lapse() {
	o := l.push.Options
	passed := o.TTL > 0 && !time.Now().Before(l.push.Arrived.Add(o.TTL))
	if !o.Async || !l.replied {
		l.lapsed = passed
	}
	l.tooLate = passed
}

// guard ends the keeping after a fault of our own. It is deferred.
func (k *keeping) guard() {
	if v := recover(); v != nil {
		e := k.l.push.engine
		e.panics.Add(1)
		e.logger.Error("panic while a push was stored", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
		k.end()
	}
}

// end goes on, once: with the last nudge, or for want of time.
func (k *keeping) end() {
	l := k.l
	l.mu.Lock()
	if k.ended {
		l.mu.Unlock()
		return
	}
	k.ended, l.keeping = true, nil
	if k.timer != nil {
		k.timer.Stop()
	}
	if !k.listed {
		l.unasked = errNoAnswer
	}
	if !k.answered {
		l.keptLocked(k.users, func(int) error { return errNoAnswer })
	}
	l.mu.Unlock()
	k.then()
}

// keptLocked notes what the Spool said of users.
func (l *lasting) keptLocked(users []string, said func(i int) error) {
	if l.kept == nil {
		l.kept = make(map[string]error, len(users))
	}
	for i, user := range users {
		l.kept[user] = said(i)
	}
}

// append hands the push to the Spool.
func (k *keeping) append() {
	defer k.guard()
	l, p := k.l, k.l.push
	o, m := p.Options, p.stored()
	users := l.missed()
	lapsed := o.TTL > 0 && !time.Now().Before(m.Expires)
	l.mu.Lock()
	ended := k.ended
	if !ended {
		if lapsed {
			users, l.lapsed = nil, l.kept == nil // whom the Spool was asked to keep before it has answered for
		}
		k.users, k.listed = users, true
		if len(users) > 0 {
			k.timer = time.AfterFunc(time.Until(k.by), k.end)
		}
	}
	l.mu.Unlock()
	switch {
	case ended:
	case len(users) == 0:
		k.end()
	default:
		p.engine.spool.Append(m, users, k.by, func(said []Spooled) {
			p.engine.offload(l.shard, func() { k.appended(said) })
		})
	}
}

// stored is the message as the Spool gets it.
func (p *Push) stored() *Stored {
	o := p.Options
	m := &Stored{
		MessageID: o.MessageID, Sender: o.Sender, PayloadHash: o.PayloadHash,
		Payload: p.Payload, Room: p.Room, CollapseKey: o.CollapseKey,
	}
	if o.TTL > 0 {
		m.Expires = p.Arrived.Add(o.TTL)
	}
	return m
}

// missed lists for whom the push is to be stored.
func (l *lasting) missed() []string {
	p := l.push
	var users []string
	for user, e := range p.byName(make([][parts]int, len(p.deliveries))) {
		if _, tried := l.kept[user]; !tried && e.outcome != Delivered && e.barred == Sent {
			users = append(users, user)
		}
	}
	slices.Sort(users)
	return users
}

// appended looks up those who are stored.
func (k *keeping) appended(said []Spooled) {
	defer k.guard()
	l := k.l
	if len(said) != len(k.users) {
		l.push.engine.logger.Error("the spool did not answer for each user", "users", len(k.users), "answers", len(said))
		k.end()
		return
	}
	for i, s := range said {
		if s.Err == nil {
			k.stored, k.places = append(k.stored, k.users[i]), append(k.places, s.Seq)
		}
	}
	l.mu.Lock()
	if !k.ended {
		k.answered = true
		l.keptLocked(k.users, func(i int) error { return said[i].Err })
	}
	l.mu.Unlock()
	if len(k.stored) == 0 {
		k.end()
		return
	}
	l.push.engine.directory.Locate(l.shard, k.stored, k)
}

// Lookup implements route.Waiter.
func (k *keeping) Lookup(ctx context.Context, what string) (context.Context, func(error)) {
	return k.l.push.Lookup(ctx, what)
}

// Routed implements route.Waiter: it nudges the nodes where users are now.
func (k *keeping) Routed(users []string, snaps []*route.Snapshot, err error) {
	defer k.guard()
	p := k.l.push
	k.open.Store(1)
	for i, user := range users {
		nodes := p.tried(user) // the best that is known while the Controller cannot be asked
		if err == nil {
			nodes = nil
			for _, g := range snaps[i].Groups {
				nodes = append(nodes, g.Node)
			}
		}
		for _, node := range nodes {
			if l := p.engine.network.Link(p.engine.shards.For(user).Index(), node); l != nil {
				k.open.Add(1)
				l.Nudge(user, k.places[i], func(bool) { k.nudged() }) // not taken: it comes with the next connection
			}
		}
	}
	k.nudged()
}

// nudged notes that a nudge has its answer.
func (k *keeping) nudged() {
	if k.open.Add(-1) == 0 {
		k.l.push.engine.offload(k.l.shard, func() {
			defer k.guard()
			k.end()
		})
	}
}

// tried lists the nodes that the push went to for user.
func (p *Push) tried(user string) (nodes []string) {
	for _, d := range p.deliveries {
		if d.has(user) {
			nodes = append(nodes, d.node)
		}
	}
	return nodes
}

// tallyStored counts a user for whom the push is stored. False means that it is not, and that it
// stands in the failures where it should have been.
func (p *Push) tallyStored(b *tally, user string, e ending) bool {
	if !p.copies() || e.outcome == Delivered {
		return false
	}
	l := p.lasting
	err, tried := l.kept[user]
	switch {
	case tried && err == nil:
		b.add(Offline, 1)
		b.stored++
		if e.outcome == Unknown {
			b.unsure++
		}
		return true
	case tried:
		b.blame(Failed, "", "store: "+err.Error(), 1)
	case l.unasked != nil && e.barred == Sent:
		b.blame(Failed, "", "store: "+l.unasked.Error(), 1)
	}
	return false
}

// tallyOffline counts users without a connection. Those who were to be stored and were not, because the
// message had expired, have failed.
func (p *Push) tallyOffline(b *tally, n int) {
	if p.stores() && p.lasting.lapsed {
		b.fail(Failed, "", DropExpired.String(), n)
		return
	}
	b.miss(Offline, "", "", n)
}
