package engine

import (
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// The fence keeps the pushes of one Order to one room or user in the order of their
// start, where a user has moved from one node to another meanwhile.
//
// Links keep the order of what they take, so only one thing can go wrong: a push P1 is
// on its way to the user's old node, which does not have him any more; P1 will look him
// up and send to his new node. A push P2 that was started later, and already knows the
// new node, must not be there first. So, of what P2 is for
//
//   - a user waits whom P2 sends to a node to which P1 has not sent for him,
//   - while P1's delivery to another node for him is not settled. When it is, what P1
//     sends in its place is with its link.
//   - Nobody else waits, not even the user's part on other nodes; for that the delivery
//     to the new node is split in two. Only where more users than mostMoved have left
//     a node at once, the deliveries to the other nodes that have changed wait whole.
//
// A fence is the list of such users and of their deliveries, which go out in order when
// it falls. It stands between pushes, not in the cache: each push of an Order has a
// ticket while it is under way, and who comes later with another answer compares it
// with what the earlier ones have sent. It knows nothing of evictions, of other streams,
// and of changes that move nobody. A push waits only for pushes before it, so there are
// no circles. Whoever waits does so until the deadline of its push at most.
//
// The usual push pays for its ticket: if its answer is older than the oldest ticket,
// nobody before it can have had another.
//
// Of pushes to the same node, which has not the user any more, each is looked up again when
// those before it have been answered: see behind. The look-ups keep that order themselves.
//
// Locks: Order.mu comes before the Push.mu of earlier pushes of the same Order. Nothing
// is sent or settled under it.

// mostMoved is how many users that have left one node are looked at one by one.
const mostMoved = 1024

// Order keeps pushes to the same user or room in the order in which they were started,
// as far as a connection gets both. The pushes of one Order are started one after
// another. The zero value is ready for use. An Order must not be copied.
type Order struct {
	mu sync.Mutex
	// Guarded by mu.
	under  []*ticket // by start, from head on: pushes under way, and some finished ones
	head   int
	free   []*ticket
	seq    uint64              // of the latest ticket
	fences map[uint64][]*fence // by key, then by age
	marks  map[uint64]*mark    // by user, the latest one; of tickets that are indexed
}

// ticket is a push under way. It outlives the push, which may be used again.
type ticket struct {
	// idle, active or pinned. Who has the Order's lock pins what it reads; a push that
	// finishes takes its ticket back unless it is pinned.
	state atomic.Uint32

	// Written under the Order's lock when the ticket is given out.
	key     uint64 // of the room or user, see Push.key; 0 for several users
	arrived int64
	seq     uint64 // by start

	// Written by whoever stages the push, under the Order's lock, and when it is finished.
	push *Push
	snap *route.Snapshot // what the push was staged with, nil for several users

	// Guarded by the Order's lock, of a push to several users.
	marks   [][]mark // as they were staged
	indexed int      // of marks, how many are in Order.marks
}

// mark is one user of a push to several. They are put into the Order's index only once a
// later push has to be compared with them: what that costs, each of them pays once.
type mark struct {
	// Static once it is made.
	t    *ticket
	key  uint64
	snap *route.Snapshot

	leg *Delivery // the user's, nil if there are several or none; guarded by the Push.mu

	before, after *mark // of the same user, by start; guarded by the Order's lock
}

const (
	idle uint32 = iota
	active
	pinned
)

// fence holds users back who have moved.
type fence struct {
	// Static once it stands.
	order *Order
	key   uint64
	snap  *route.Snapshot     // whose users it holds back
	held  map[string][]string // by node, sorted; nil for everybody there

	// Guarded by order.mu.
	behind     int         // deliveries and fences before it
	queue      []*Delivery // to be sent when it falls
	then       []*fence    // those behind it
	superseded bool        // by a later one, which has its users, too
	fallen     bool
}

// ward is a fence that waits for a delivery.
type ward struct {
	d *Delivery
	f *fence
}

// enterLocked gives p a ticket.
func (o *Order) enterLocked(p *Push) *ticket {
	for o.head < len(o.under) && o.under[o.head].state.Load() == idle {
		o.free = append(o.free, o.under[o.head])
		o.under[o.head] = nil
		o.head++
	}
	if o.head == len(o.under) || len(o.under) == cap(o.under) {
		live := o.under[:0]
		for _, t := range o.under[o.head:] {
			if t.state.Load() == idle {
				o.free = append(o.free, t)
			} else {
				live = append(live, t)
			}
		}
		clear(o.under[len(live):])
		if len(live) > cap(live)/2 {
			live = slices.Grow(live, cap(live))
		}
		o.under, o.head = live, 0
	}
	var t *ticket
	if n := len(o.free); n > 0 {
		t, o.free = o.free[n-1], o.free[:n-1]
	} else {
		t = new(ticket)
	}
	o.seq++
	t.push, t.key, t.seq, t.arrived = p, p.key, o.seq, p.engine.directory.Moment(p.Arrived)
	t.state.Store(active)
	o.under = append(o.under, t)
	return t
}

// enter gives p, which has no answer yet, its place.
func (o *Order) enter(p *Push) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p.ticket = o.enterLocked(p)
}

// leave takes back the ticket of a push that is finished.
func (o *Order) leave(t *ticket) {
	if t.key == 0 || !t.state.CompareAndSwap(active, pinned) {
		o.mu.Lock() // somebody looks at the push, or may find it in the index
		t.state.Store(pinned)
		o.unmarkLocked(t)
		o.mu.Unlock()
	}
	t.push, t.snap = nil, nil
	t.state.Store(idle)
}

// pass notes that p is staged with s, and returns the fences in its way, nearly always
// none. A push without a ticket gets one.
func (o *Order) pass(p *Push, s *route.Snapshot) []*fence {
	o.mu.Lock()
	defer o.mu.Unlock()
	if p.ticket == nil {
		p.ticket = o.enterLocked(p)
	}
	if !p.ticket.pin(p) {
		return nil
	}
	p.ticket.snap = s
	var inWay []*fence
	if !o.clearLocked(s) {
		if !isRoom(p.key) {
			o.indexLocked(p.ticket)
		}
		inWay = o.inWayLocked(p.ticket, p.key, s, func(yield func(*ticket) bool) {
			for e := range o.earlierLocked(p.ticket) {
				if e.key == p.key && !yield(e) {
					return
				}
			}
		})
	}
	p.ticket.state.Store(active)
	return inWay
}

// pin keeps p from giving its ticket back. False means that p has been ended before its
// time, and did.
func (t *ticket) pin(p *Push) bool {
	if !t.state.CompareAndSwap(active, pinned) {
		return false
	}
	if t.push != p {
		t.state.Store(active)
		return false
	}
	return true
}

// passUsers is pass for some users of a push to several: the fences by user, and the
// marks that are to be told the deliveries.
func (o *Order) passUsers(p *Push, users []string, snaps []*route.Snapshot) (inWay map[string][]*fence, marks []mark) {
	o.mu.Lock()
	defer o.mu.Unlock()
	t := p.ticket
	if !t.pin(p) {
		return nil, nil
	}
	defer t.state.Store(active)
	marks = make([]mark, len(users))
	var single map[uint64][]*ticket // earlier pushes to one user each, the latest first
	for i, s := range snaps {
		key := p.engine.userKey(users[i])
		marks[i] = mark{t: t, key: key, snap: s}
		if o.clearLocked(s) {
			continue
		}
		if single == nil {
			single = make(map[uint64][]*ticket)
			for e := range o.earlierLocked(t) {
				if e.key != 0 && !isRoom(e.key) {
					single[e.key] = append(single[e.key], e)
				}
			}
			o.indexLocked(t)
		}
		if fences := o.inWayLocked(t, key, s, slices.Values(single[key])); fences != nil {
			if inWay == nil {
				inWay = make(map[string][]*fence)
			}
			inWay[users[i]] = fences
		}
	}
	t.marks = append(t.marks, marks)
	return inWay, marks
}

// earlierLocked lists the tickets before t, the latest first.
func (o *Order) earlierLocked(t *ticket) iter.Seq[*ticket] {
	return func(yield func(*ticket) bool) {
		for i := len(o.under) - 1; i >= o.head; i-- {
			if o.under[i].seq < t.seq && !yield(o.under[i]) {
				return
			}
		}
	}
}

// indexLocked puts the marks of the pushes before t into the index.
func (o *Order) indexLocked(t *ticket) {
	if o.marks == nil {
		o.marks = make(map[uint64]*mark)
	}
	for _, e := range o.under[o.head:] {
		for ; e.seq < t.seq && e.indexed < len(e.marks); e.indexed++ {
			marks := e.marks[e.indexed]
			for i := range marks {
				m := &marks[i]
				m.before = o.marks[m.key]
				for m.before != nil && m.before.t.seq > e.seq { // staged late
					m.after, m.before = m.before, m.before.before
				}
				if m.before != nil {
					m.before.after = m
				}
				if m.after != nil {
					m.after.before = m
				} else {
					o.marks[m.key] = m
				}
			}
		}
	}
}

// unmarkLocked takes t's marks out of the index.
func (o *Order) unmarkLocked(t *ticket) {
	for _, marks := range t.marks[:t.indexed] {
		for i := range marks {
			m := &marks[i]
			if m.before != nil {
				m.before.after = m.after
			}
			switch {
			case m.after != nil:
				m.after.before = m.before
			case m.before != nil:
				o.marks[m.key] = m.before
			default:
				delete(o.marks, m.key)
			}
		}
	}
	if len(o.marks) == 0 {
		o.marks = nil // a map keeps its room
	}
	t.marks, t.indexed = nil, 0
}

// clearLocked tells whether no push under way can have been staged with an older answer
// than s: all have asked when s was already given.
func (o *Order) clearLocked(s *route.Snapshot) bool {
	return len(o.fences) == 0 && s.Published() < o.under[o.head].arrived
}

// earlier is a push before another for the same room or user, which is pinned; m is its
// mark of that user if it is one to several.
type earlier struct {
	t *ticket
	m *mark
}

// inWayLocked returns the fences in the way of t's push for key, and puts up those that
// are missing. alone lists the earlier pushes for key alone, the latest first.
func (o *Order) inWayLocked(t *ticket, key uint64, s *route.Snapshot, alone iter.Seq[*ticket]) []*fence {
	// Earlier pushes for the key that had another answer. One with the same answer has
	// seen to those before it.
	var old []earlier
	seen := false
	look := func(e *ticket, m *mark) {
		if !e.state.CompareAndSwap(active, pinned) {
			return
		}
		had := e.snap
		if m != nil {
			had = m.snap
		}
		if seen = had == s; seen {
			e.state.Store(active)
		} else {
			old = append(old, earlier{e, m})
		}
	}
	m := o.marks[key]
	for m != nil && m.t.seq >= t.seq {
		m = m.before
	}
	among := func(after uint64) {
		for ; m != nil && m.t.seq > after && !seen; m = m.before {
			look(m.t, m)
		}
	}
	for e := range alone {
		if among(e.seq); seen {
			break
		}
		if look(e, nil); seen {
			break
		}
	}
	among(0) // tickets are numbered from 1 on
	if len(old) > 0 || !seen || o.againLocked(key, s) {
		o.buildLocked(key, s, old)
	}
	for _, e := range old {
		e.t.state.Store(active)
	}
	var inWay []*fence
	for _, f := range o.fences[key] {
		if f.snap == s && !f.superseded {
			inWay = append(inWay, f)
		}
	}
	return inWay
}

// againLocked tells whether the latest fence for key is that of another answer: s is given
// again after it, and who was staged with that one meanwhile may have ended.
func (o *Order) againLocked(key uint64, s *route.Snapshot) bool {
	fences := o.fences[key]
	return len(fences) > 0 && fences[len(fences)-1].snap != s
}

// obstacle is what some users have to wait for.
type obstacle struct {
	node   string // that they have left, "" for what is behind a fence
	held   map[string][]string
	legs   []*Delivery
	fences []*fence
}

// buildLocked puts up the fences for s behind pushes that had other answers, which are
// pinned, and behind the fences that stand.
func (o *Order) buildLocked(key uint64, s *route.Snapshot, old []earlier) {
	var found []*obstacle
	for _, f := range o.fences[key] {
		if f.superseded {
			continue
		}
		held, whole := make(map[string][]string), true
		for node, users := range f.held {
			g := s.Group(node)
			var stay []string
			if g != nil {
				stay = intersect(users, g.Users)
			}
			if g != nil && users == nil || len(stay) > 0 {
				held[node] = stay
			}
			whole = whole && g != nil && len(stay) == len(users)
		}
		if len(held) > 0 {
			found = add(found, &obstacle{held: held, fences: []*fence{f}})
			f.superseded = whole
		}
	}
	for _, e := range slices.Backward(old) { // from the oldest one on
		p := e.t.push
		p.mu.Lock()
		var legs []*Delivery
		if e.m != nil && e.m.leg != nil {
			legs = []*Delivery{e.m.leg}
		} else {
			// What is sent again may not be with its link yet, though it is booked.
			legs = slices.DeleteFunc(slices.Clone(p.legs), func(d *Delivery) bool { return d.healed })
		}
		for _, d := range legs {
			if p.over || d.state.Load() == settled {
				continue
			}
			if held := moved(d, legs, s, isRoom(key)); len(held) > 0 {
				found = add(found, &obstacle{node: d.node, held: held, legs: []*Delivery{d}})
			}
		}
		p.mu.Unlock()
	}
	for _, x := range found {
		f := &fence{order: o, key: key, snap: s, held: x.held}
		for _, d := range x.legs {
			if d.push.ward(d, f.passed) {
				f.behind++
			}
		}
		for _, before := range x.fences {
			before.then = append(before.then, f)
			f.behind++
		}
		if f.behind > 0 {
			if o.fences == nil {
				o.fences = make(map[uint64][]*fence)
			}
			o.fences[key] = append(o.fences[key], f)
		}
	}
}

// add adds x to what was found. What holds back the same users becomes one, and so does
// what has to do with the same node.
func add(found []*obstacle, x *obstacle) []*obstacle {
	kept := found[:0]
	for _, y := range found {
		if !x.meets(y) {
			kept = append(kept, y)
			continue
		}
		for node, users := range y.held {
			if mine, ok := x.held[node]; !ok {
				x.held[node] = users
			} else if mine != nil && users != nil {
				x.held[node] = union(mine, users)
			} else {
				x.held[node] = nil
			}
		}
		x.legs = append(y.legs, x.legs...)
		x.fences = append(y.fences, x.fences...)
	}
	return append(kept, x)
}

func (x *obstacle) meets(y *obstacle) bool {
	if x.node != "" && x.node == y.node {
		return true
	}
	for node, users := range x.held {
		theirs, ok := y.held[node]
		if ok && (users == nil || theirs == nil || len(intersect(users, theirs)) > 0) {
			return true
		}
	}
	return false
}

// moved lists, by node, the users of delivery d whom s has on other nodes, to which none
// of legs, those of the same push, goes for them.
func moved(d *Delivery, legs []*Delivery, s *route.Snapshot, room bool) map[string][]string {
	var users []string
	all := false
	switch {
	case !room && len(s.Groups) > 0:
		users = s.Groups[0].Users // one
	case d.group == nil:
		users = d.users
	default:
		now := s.Group(d.node)
		if now != d.group {
			users, all = leavers(d.group, now)
		}
		users = union(users, intersect(s.Shared, d.group.Users))
	}
	var held map[string][]string
	for _, g := range s.Groups {
		if g.Node == d.node || !all && len(users) == 0 || room && sentTo(legs, g) {
			continue
		}
		var moved []string
		if !all {
			for _, user := range users {
				if g.Has(user) && d.has(user) && !tried(legs, g.Node, user) {
					moved = append(moved, user)
				}
			}
		}
		if all || len(moved) > 0 {
			if held == nil {
				held = make(map[string][]string)
			}
			held[g.Node] = moved
		}
	}
	return held
}

// leavers lists who is in old and not in now, which may be nil. It gives up if they are
// too many.
func leavers(old, now *route.Group) (left []string, tooMany bool) {
	var stay []string
	if now != nil {
		stay = now.Users
	}
	if len(old.Users)-len(stay) > mostMoved {
		return nil, true
	}
	for _, user := range old.Users {
		for len(stay) > 0 && stay[0] < user {
			stay = stay[1:]
		}
		if len(stay) > 0 && stay[0] == user {
			continue
		}
		if left = append(left, user); len(left) > mostMoved {
			return nil, true
		}
	}
	return left, false
}

// sentTo tells whether one of legs is for these very members of a node.
func sentTo(legs []*Delivery, g *route.Group) bool {
	return slices.ContainsFunc(legs, func(d *Delivery) bool { return d.group == g })
}

// ward has then called when d is settled. False means that it is.
func (p *Push) ward(d *Delivery, then func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.over && p.wardLocked(d, then)
}

func (p *Push) wardLocked(d *Delivery, then func()) bool {
	// In this order: whoever settles d from here on looks for wards.
	p.warded.Store(true)
	if d.state.Load() == settled {
		return false
	}
	a := p.stepAside()
	if a.wards == nil {
		a.wards = make(map[*Delivery][]func())
	}
	a.wards[d] = append(a.wards[d], then)
	return true
}

// behind tells whether a heal has to wait: an earlier push to the same room or user went to
// the same node for one of its users, and has no answer yet. The heal is started again when
// it has. Once they are in line for a look-up, heals keep their order themselves.
func (o *Order) behind(h *healer) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for e := range o.earlierLocked(h.d.push.ticket) {
		if alike(e.key, h.d.push.key) && e.state.CompareAndSwap(active, pinned) {
			waits := e.push.holds(h)
			e.state.Store(active)
			if waits {
				h.d.push.bound()
				return true
			}
		}
	}
	return false
}

// alike tells whether pushes with two keys may be for the same user and go the same way.
func alike(a, b uint64) bool { return a == b || a == 0 && !isRoom(b) || b == 0 && !isRoom(a) }

// holds has h started when a delivery of p that it has to wait for is settled. False means
// that there is none.
func (p *Push) holds(h *healer) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.legs {
		if d.node == h.d.node && d.state.Load() < healing && slices.ContainsFunc(h.missing, d.has) && p.wardLocked(d, h.start) {
			return true
		}
	}
	return false
}

// bound has p ended with its deadline, for what waits for others.
func (p *Push) bound() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if a := p.stepAside(); a.timer == nil && !p.over {
		a.timer = time.AfterFunc(time.Until(p.deadline), func() { p.expire(ErrDeadline) })
	}
}

// close ends a delivery, and lets those go on that wait for it.
func (d *Delivery) close() {
	p := d.push
	d.state.Store(settled)
	if p.warded.Load() {
		var told []func()
		p.mu.Lock()
		if a := p.aside; a != nil {
			told = a.wards[d]
			delete(a.wards, d)
		}
		p.mu.Unlock()
		for _, then := range told {
			then()
		}
	}
	p.finished(1)
}

// hold puts deliveries into the queues of their fences, and returns those of legs that
// are to be sent now.
func hold(legs []*Delivery, later []ward) (now []*Delivery) {
	if len(later) == 0 {
		return legs
	}
	waits := make(map[*Delivery]bool, len(later))
	for _, w := range later {
		waits[w.d] = w.f.hold(w.d)
	}
	for _, d := range legs {
		if !waits[d] {
			now = append(now, d)
		}
	}
	return now
}

// hold puts a delivery into the queue of a fence. False means that it has fallen.
func (f *fence) hold(d *Delivery) bool {
	f.order.mu.Lock()
	defer f.order.mu.Unlock()
	if f.fallen {
		return false
	}
	d.push.engine.fenced.Add(1)
	d.push.engine.fences.Add(1)
	f.queue = append(f.queue, d)
	return true
}

// passed tells f that one of those before it is through. After the last one f falls:
// what waits is sent, and then who comes need not wait.
func (f *fence) passed() {
	o := f.order
	o.mu.Lock()
	if f.behind--; f.behind > 0 {
		o.mu.Unlock()
		return
	}
	for len(f.queue) > 0 {
		queue := f.queue
		f.queue = nil
		o.mu.Unlock()
		for _, d := range queue {
			d.release()
		}
		o.mu.Lock()
	}
	f.fallen = true
	o.fences[f.key] = slices.DeleteFunc(o.fences[f.key], func(g *fence) bool { return g == f })
	if len(o.fences[f.key]) == 0 {
		delete(o.fences, f.key)
	}
	o.mu.Unlock()
	for _, g := range f.then {
		g.passed()
	}
}

// release sends a delivery that was held back, unless it has ended meanwhile.
func (d *Delivery) release() {
	p := d.push
	defer func() {
		if v := recover(); v != nil {
			p.engine.panicked(p, v)
		}
	}()
	p.engine.fenced.Add(-1)
	if !d.Settled() {
		p.send([]*Delivery{d})
	}
}

// union merges two sorted lists.
func union(a, b []string) []string {
	switch {
	case len(a) == 0:
		return b
	case len(b) == 0:
		return a
	}
	both := slices.Concat(a, b)
	slices.SortFunc(both, strings.Compare)
	return slices.Compact(both)
}
