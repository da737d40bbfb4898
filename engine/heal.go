package engine

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// healer looks up again the users that a delivery is known not to have reached, and
// sends to the nodes that the fresh answer names beyond those already tried. It
// implements route.Waiter; the delivery is "healing" until what the answers for the last
// key call for is with its links.
type healer struct {
	d       *Delivery
	missing []string     // sorted
	waiting atomic.Int32 // keys whose part has not been sent yet
}

// start looks up, unless it has to wait for an earlier push: it is then called again.
func (h *healer) start() {
	p, d := h.d.push, h.d
	defer func() {
		if v := recover(); v != nil {
			p.engine.panicked(p, v)
		}
	}()
	if d.state.Load() != denied {
		return // expired while it waited
	}
	// Expired while the ack was being counted: nobody else ends the heal then.
	if p.ended() || !time.Now().Before(p.expires()) {
		d.endHeal(DropExpired)
		return
	}
	if p.Order != nil && p.Order.behind(h) {
		p.bound()
		return
	}
	p.engine.heals.Add(1)
	// What was said before the node's answer is what it contradicts.
	m := route.Missing{Node: d.node, Users: h.missing, Since: time.Now()}
	if d.outcome == Failed {
		m.Users = nil // it has taken nothing, for nobody
	}
	table, keys := p.engine.directory.Users, h.missing
	switch p.Kind {
	case ToRoom:
		table, keys = p.engine.directory.Rooms, []string{p.Room}
	case ToRooms:
		h.waiting.Store(1)
		p.union.Refresh(h.missing, m, h)
		h.asked()
		return
	case ToUser, ToUsers, ToAll:
	}
	h.waiting.Store(int32(len(keys)))
	table.Refresh(int(d.shard), keys, m, h)
	h.asked()
}

// asked notes that the look-up is under way, or over: from here on later heals are told after
// this one, as they stand behind it in line.
func (h *healer) asked() { h.d.state.CompareAndSwap(denied, healing) }

// Lookup implements route.Waiter.
func (h *healer) Lookup(ctx context.Context, what string) (context.Context, func(error)) {
	return h.d.push.Lookup(ctx, what)
}

// Routed implements route.Waiter.
func (h *healer) Routed(keys []string, snaps []*route.Snapshot, err error) {
	p := h.d.push
	defer func() {
		if v := recover(); v != nil {
			p.engine.panicked(p, v)
		}
	}()
	p.send(h.stage(keys, snaps, err))
	last := h.waiting.Add(-int32(len(keys))) == 0 // after the send: what a fence holds back comes behind it
	switch {
	case p.ended():
		h.d.endHeal(DropExpired) // the answer was not used, or not all of it
	case last:
		h.d.endHeal(Sent)
	}
}

// ended tells whether the push was ended before its time.
func (p *Push) ended() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.expiry() != nil
}

// stage makes and adds the deliveries that the answers for keys call for.
func (h *healer) stage(keys []string, snaps []*route.Snapshot, err error) (deliveries []*Delivery) {
	p, d := h.d.push, h.d
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.expiry() != nil: // expire settles the delivery
	case err != nil:
		d.ensureDetails().heal = DropNoRoute
	default:
		deliveries = h.stageLocked(keys, snaps)
		for _, d := range deliveries {
			p.add(d)
		}
	}
	return deliveries
}

// stageLocked sorts the missing users of keys into those to be sent elsewhere,
// those who are gone, and those of whom the answer says nothing new. That of a Controller
// that may not know all yet is good for where users are: whom it does not send elsewhere
// has no route.
func (h *healer) stageLocked(keys []string, snaps []*route.Snapshot) []*Delivery {
	p, r := h.d.push, h.d.ensureDetails()
	users, snap := h.missing, func(int) *route.Snapshot { return snaps[0] }
	if p.Kind == ToUser || p.Kind == ToUsers {
		users, snap = keys, func(i int) *route.Snapshot { return snaps[i] }
	}
	var deliveries []*Delivery
	byNode := make(map[string]*Delivery)
	for i, user := range users {
		s, placed, sent := snap(i), false, false
		for _, g := range s.Groups {
			if !g.Has(user) {
				continue
			}
			placed = true
			if tried(p.deliveries, g.Node, user) {
				continue
			}
			to := byNode[g.Node]
			if to == nil {
				to = &Delivery{node: g.Node, healed: true}
				byNode[g.Node] = to
				deliveries = append(deliveries, to)
			}
			to.users = append(to.users, user)
			sent = true
		}
		switch {
		case sent:
			r.resent = append(r.resent, user)
		case s.Doubted:
			r.heal = DropNoRoute
		case !placed:
			r.gone = append(r.gone, user)
		}
	}
	slices.SortFunc(deliveries, func(a, b *Delivery) int { return strings.Compare(a.node, b.node) })
	return deliveries
}

// tried tells whether one of deliveries goes to node for user.
func tried(deliveries []*Delivery, node, user string) bool {
	for _, d := range deliveries {
		if d.node == node && d.has(user) {
			return true
		}
	}
	return false
}
