package engine

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// healer looks up again the users that a delivery is known not to have reached, and
// sends to the nodes that the fresh answer names beyond those already tried. It
// implements route.Waiter; the delivery is "healing" until the last key is told.
type healer struct {
	d       *Delivery
	missing []string
	waiting int // keys not told yet, guarded by the push's mu
}

func (h *healer) start() {
	p, d := h.d.push, h.d
	p.engine.heals.Add(1)
	h.missing = slices.Sorted(slices.Values(h.missing)) // every list of users is sorted
	// Expired while the ack was being booked: nobody else ends the heal then.
	if p.ended() || !time.Now().Before(p.deadline) {
		d.endHeal(DropExpired)
		return
	}
	home := p.homeOf(d)
	// What was said before the node's answer is what it contradicts.
	m := route.Missing{Node: d.node, Users: h.missing, Since: time.Now()}
	if d.outcome == Failed {
		m.Users = nil // it has taken nothing, for nobody
	}
	if p.Kind == ToRoom {
		h.waiting = 1
		p.engine.directory.RefreshRoom(home, p.Room, m, h)
		return
	}
	h.waiting = len(h.missing)
	p.engine.directory.RefreshUsers(home, h.missing, m, h)
}

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
	legs, last := h.stage(keys, snaps, err)
	p.send(legs)
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

// stage makes and books the deliveries that the answers for keys call for, and
// tells whether they were the last ones.
func (h *healer) stage(keys []string, snaps []*route.Snapshot, err error) (legs []*Delivery, last bool) {
	p, d := h.d.push, h.d
	p.mu.Lock()
	defer p.mu.Unlock()
	h.waiting -= len(keys)
	switch {
	case p.expiry() != nil: // expire settles the delivery
	case err != nil:
		d.fallShort().heal = DropNoRoute
	default:
		legs = h.stageLocked(keys, snaps)
		for _, leg := range legs {
			p.add(leg)
		}
	}
	return legs, h.waiting == 0
}

// stageLocked sorts the missing users of keys into those to be sent elsewhere,
// those who are gone, and those of whom the answer says nothing new. That of a Controller
// that may not know all yet is good for where users are: whom it does not send elsewhere
// has no route.
func (h *healer) stageLocked(keys []string, snaps []*route.Snapshot) []*Delivery {
	p, r := h.d.push, h.d.fallShort()
	users, snap := h.missing, func(int) *route.Snapshot { return snaps[0] }
	if p.Kind != ToRoom {
		users, snap = keys, func(i int) *route.Snapshot { return snaps[i] }
	}
	var legs []*Delivery
	byNode := make(map[string]*Delivery)
	for i, user := range users {
		s, placed, sent := snap(i), false, false
		for _, g := range s.Groups {
			if !g.Has(user) {
				continue
			}
			placed = true
			if tried(p.legs, g.Node, user) {
				continue
			}
			to := byNode[g.Node]
			if to == nil {
				to = &Delivery{node: g.Node, healed: true}
				byNode[g.Node] = to
				legs = append(legs, to)
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
	slices.SortFunc(legs, func(a, b *Delivery) int { return strings.Compare(a.node, b.node) })
	return legs
}

// tried tells whether one of legs goes to node for user.
func tried(legs []*Delivery, node, user string) bool {
	for _, d := range legs {
		if d.node == node && d.has(user) {
			return true
		}
	}
	return false
}
