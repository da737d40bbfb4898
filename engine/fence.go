package engine

import (
	"cmp"
	"math"
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
// place in it while it is under way, and who comes later with another answer compares it
// with what the earlier ones have sent. It knows nothing of evictions, of other streams,
// and of changes that move nobody. A push waits only for pushes before it, so there are
// no circles. Whoever waits does so until the deadline of its push at most.
//
// The usual push pays for its place in the Order: if its answer is older than the oldest
// place, nobody before it can have had another.
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
	under   []place             // by start: pushes under way, and finished ones
	indexed int                 // of under, how many are in marks
	sweep   int                 // how long under may be before finished ones are taken out
	since   int64               // nobody in under has arrived before, on the clock of Directory.Nanos
	seq     uint64              // of the latest push
	end     uint64              // from where on numbers are not ours
	fences  map[uint64][]*fence // by key, then by age
	marks   map[uint64]*mark    // by key, the latest one
	// By room, or set of rooms, from the first push on that waits for its turn, by start; see roomlog.go and rooms.go.
	lines   map[string][]turn
	sets    map[uint64]*roomSet // by key, of pushes to several rooms that are under way
	crossed map[uint64][]*Push  // by number of a push, those that wait until it has left

	lined atomic.Int32 // pushes in lines, and those to several rooms
}

// place is a push in an Order, as long as Push.seq is its number.
type place struct {
	push    *Push  // nil once it has left with the lock
	seq     uint64 // by start
	arrived int64
}

const (
	// inIndex is the bit of Push.seq of a push whose marks are in the Order's index. It does
	// not finish without the Order's lock: under it, others may look at the push.
	inIndex = 1
	// numbers is how many an Order takes at a time, with those that have the bit.
	numbers = 2 << 10
	// sweepMin is how many places are looked through at a time, at least: what that costs
	// is shared by as many pushes.
	sweepMin = 64
)

// taken is what Orders have taken of the numbers. No number is given twice: a push may be
// used again while an Order still has its old place.
var taken atomic.Uint64 //nolint:gochecknoglobals // Numbers are of all Orders.

// mark is a room or user that a push is for. They are put into the Order's index only once a
// push has to be compared with those before it: what that costs, each of them pays once.
type mark struct {
	key uint64 // of the room or user: its hash, and a bit that tells which

	// Guarded by the Order's lock.
	snap          *route.Snapshot // what it was staged with, nil before
	push          *Push           // once it is in the index
	before, after *mark           // of the same key in the index, by start

	delivery *Delivery // the user's, of a push to several; nil if there are more or none; guarded by the Push.mu
}

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

// enterLocked gives p its place.
func (o *Order) enterLocked(p *Push) {
	if len(o.under) >= o.sweep {
		o.sweepLocked()
	}
	if o.seq == o.end {
		o.end = taken.Add(numbers)
		o.seq = o.end - numbers
	}
	o.seq += inIndex + 1
	arrived := p.engine.directory.Nanos(p.Arrived)
	o.since = min(o.since, arrived)
	o.under = append(o.under, place{p, o.seq, arrived})
	p.seq.Store(o.seq)
	if p.Kind == ToRooms {
		o.enterSetLocked(p)
	}
}

// Trim lets go of pushes that are finished. An Order that nothing is started in for a while
// would keep them.
func (o *Order) Trim() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sweepLocked()
	o.under = slices.Clip(slices.Clone(o.under))
}

// sweepLocked takes out the places of pushes that are finished.
func (o *Order) sweepLocked() {
	live := o.under[:0]
	indexed := 0
	o.since = math.MaxInt64
	for i, e := range o.under {
		if e.push == nil || e.push.seq.Load()&^inIndex != e.seq {
			continue
		}
		if live = append(live, e); i < o.indexed {
			indexed++
		}
		o.since = min(o.since, e.arrived)
	}
	clear(o.under[len(live):])
	o.under, o.indexed, o.sweep = live, indexed, max(2*len(live), sweepMin)
}

// enter gives p, which has no answer yet, its place.
func (o *Order) enter(p *Push) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.enterLocked(p)
}

// leave takes back the place of a push that is finished. One without a place has been
// ended before it got one. A push that is used again may be found in its old place for a
// while, any other is let go of at once: who knows what it holds.
func (o *Order) leave(p *Push) {
	seq := p.seq.Load()
	if seq == 0 || p.plain && seq&inIndex == 0 && p.Kind != ToRooms && p.seq.CompareAndSwap(seq, 0) {
		return
	}
	for _, q := range o.leaveLocking(p) {
		q.engine.offload(q.shard, func() { o.turn(q, 1) })
	}
}

// leaveLocking is leave with the lock, and returns whose wait for p is over.
func (o *Order) leaveLocking(p *Push) (crossed []*Push) {
	o.mu.Lock()
	defer o.mu.Unlock()
	seq := p.seq.Load() &^ inIndex
	defer p.seq.Store(0)
	if p.Kind == ToRooms {
		o.leaveSetLocked(p)
	}
	if crossed = o.crossed[seq]; crossed != nil {
		delete(o.crossed, seq)
	}
	if i, ok := slices.BinarySearchFunc(o.under, seq, func(e place, seq uint64) int { return cmp.Compare(e.seq, seq) }); ok && !p.plain {
		o.under[i].push = nil
	}
	if p.seq.Load() == seq { // not in the index
		return crossed
	}
	marks := p.marks()
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
	if len(o.marks) == 0 {
		o.marks = nil // a map keeps its room
	}
	return crossed
}

// marks are those of p by user, or the only one.
func (p *Push) marks() []mark {
	if p.Kind == ToUsers {
		return p.slow.marks
	}
	return p.mark[:]
}

// markOf is the mark of the room or user called key.
func (p *Push) markOf(key string) *mark {
	if p.Kind != ToUsers {
		return &p.mark[0]
	}
	i, _ := slices.BinarySearch(p.slow.users, key)
	return &p.slow.marks[i]
}

// indexLocked puts the marks of all pushes under way into the index. False means that p is
// not under way any more.
func (o *Order) indexLocked(p *Push) bool {
	if o.marks == nil {
		o.marks = make(map[uint64]*mark)
	}
	for _, e := range o.under[o.indexed:] {
		if e.push == nil || !e.push.seq.CompareAndSwap(e.seq, e.seq|inIndex) {
			continue
		}
		marks := e.push.marks()
		for i := range marks {
			m := &marks[i]
			m.push, m.before = e.push, o.marks[m.key]
			if m.before != nil {
				m.before.after = m
			}
			o.marks[m.key] = m
		}
	}
	o.indexed = len(o.under)
	return p.seq.Load() != 0
}

// pass notes that p is staged with snaps for keys, and returns for each the fences in its
// way, nil if there are none. The first thing that a push with a cached route does is to
// pass.
func (o *Order) pass(p *Push, keys []string, snaps []*route.Snapshot, first bool) (inWay [][]*fence) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if first {
		o.enterLocked(p)
	}
	for i, s := range snaps {
		m := p.markOf(keys[i])
		m.snap = s
		if o.clearLocked(s) || !o.indexLocked(p) {
			continue
		}
		if fences := o.inWayLocked(m); fences != nil {
			if inWay == nil {
				inWay = make([][]*fence, len(snaps))
			}
			inWay[i] = fences
		}
	}
	return inWay
}

// clearLocked tells whether no push under way can have been staged with an older answer
// than s: all have asked when s was already given.
func (o *Order) clearLocked(s *route.Snapshot) bool {
	return len(o.fences) == 0 && s.Published() < o.since
}

// inWayLocked returns the fences in the way of m, and puts up those that are missing.
func (o *Order) inWayLocked(m *mark) []*fence {
	// Earlier pushes that had another answer. One with the same answer has seen to those
	// before it.
	var old []*mark
	e := m.before
	for ; e != nil && e.snap != m.snap; e = e.before {
		old = append(old, e)
	}
	fences := o.fences[m.key]
	// The same answer may be given again after another one, and who was staged with it
	// before may have ended.
	again := len(fences) > 0 && fences[len(fences)-1].snap != m.snap
	if len(old) > 0 || again {
		o.buildLocked(m.key, m.snap, old)
	}
	var inWay []*fence
	for _, f := range o.fences[m.key] {
		if f.snap == m.snap && !f.superseded {
			inWay = append(inWay, f)
		}
	}
	return inWay
}

// obstacle is what some users have to wait for.
type obstacle struct {
	node       string // that they have left, "" for what is behind a fence
	held       map[string][]string
	deliveries []*Delivery
	fences     []*fence
}

// buildLocked puts up the fences for s behind pushes that had other answers, the latest
// first, and behind the fences that stand.
func (o *Order) buildLocked(key uint64, s *route.Snapshot, old []*mark) {
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
				stay = route.Intersect(users, g.Users)
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
	// Of pushes with the same answer, and nothing left out, the first delivery to a node is
	// compared for all of them.
	type answer struct {
		snap  *route.Snapshot
		group *route.Group
	}
	first, others := make(map[answer]*Delivery), make(map[*Delivery][]*Delivery)
	for _, e := range slices.Backward(old) { // from the oldest one on
		p := e.push
		p.mu.Lock()
		var deliveries []*Delivery
		if e.delivery != nil {
			deliveries = []*Delivery{e.delivery}
		} else {
			// What is sent again may not be with its link yet, though it is counted.
			deliveries = slices.DeleteFunc(slices.Clone(p.deliveries), func(d *Delivery) bool { return d.healed })
		}
		alike := e.snap != nil && len(deliveries) == len(e.snap.Groups) &&
			!slices.ContainsFunc(deliveries, func(d *Delivery) bool { return d.group == nil || len(d.except) > 0 })
		for _, d := range deliveries {
			if d.state.Load() == settled {
				continue
			}
			if alike {
				a := answer{e.snap, d.group}
				if known := first[a]; known != nil {
					others[known] = append(others[known], d)
					continue
				}
				first[a] = d
			}
			if held := moved(d, deliveries, s, isRoom(key)); len(held) > 0 {
				found = add(found, &obstacle{node: d.node, held: held, deliveries: []*Delivery{d}})
			}
		}
		p.mu.Unlock()
	}
	for _, x := range found {
		f := &fence{order: o, key: key, snap: s, held: x.held}
		for _, d := range x.deliveries {
			for _, d := range append(others[d], d) {
				if d.push.ward(d, f.passed) {
					f.behind++
				}
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
		x.deliveries = append(y.deliveries, x.deliveries...)
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
		if ok && (users == nil || theirs == nil || len(route.Intersect(users, theirs)) > 0) {
			return true
		}
	}
	return false
}

// moved lists, by node, the users of delivery d whom s has on other nodes, to which none
// of deliveries, those of the same push, goes for them.
func moved(d *Delivery, deliveries []*Delivery, s *route.Snapshot, room bool) map[string][]string {
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
		users = union(users, route.Intersect(s.Shared, d.group.Users))
	}
	var held map[string][]string
	for _, g := range s.Groups {
		if g.Node == d.node || !all && len(users) == 0 || room && sentTo(deliveries, g) {
			continue
		}
		var moved []string
		if !all {
			for _, user := range route.Intersect(users, g.Users) {
				if d.has(user) && !tried(deliveries, g.Node, user) {
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

// sentTo tells whether one of deliveries is for these very members of a node.
func sentTo(deliveries []*Delivery, g *route.Group) bool {
	return slices.ContainsFunc(deliveries, func(d *Delivery) bool { return d.group == g })
}

// ward has then called when d is settled. False means that it is.
func (p *Push) ward(d *Delivery, then func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.wardLocked(d, then)
}

func (p *Push) wardLocked(d *Delivery, then func()) bool {
	// In this order: whoever settles d from here on looks for wards.
	p.warded.Store(true)
	if d.state.Load() == settled {
		return false
	}
	a := p.ensureSlowPath()
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
	p := h.d.push
	if !o.indexLocked(p) {
		return false
	}
	keys := h.missing
	if p.Kind != ToUsers {
		keys = keys[:1] // the room's mark, or the user's
	}
	for _, key := range keys {
		for e := p.markOf(key).before; e != nil; e = e.before {
			if e.push.holds(h) {
				return true
			}
		}
	}
	return false
}

// holds has h started when a delivery of p that it has to wait for is settled. False means
// that there is none.
func (p *Push) holds(h *healer) bool {
	// Heals of a push to several rooms stand in several lines, and not each in the same: one waits for the end of another. While
	// some rooms know that a user has moved, and others do not, each push goes to both nodes. So the node does not matter.
	until, several := healing, p.Kind == ToRooms
	if several {
		until = settled
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.deliveries {
		if (several || d.node == h.d.node) && d.state.Load() < until && slices.ContainsFunc(h.missing, d.has) && p.wardLocked(d, h.start) {
			return true
		}
	}
	return false
}

// bound has p ended with its deadline, or what it has not sent with its TTL, for what waits for
// others.
func (p *Push) bound() {
	if !p.retain() {
		return
	}
	p.mu.Lock()
	if a := p.ensureSlowPath(); a.timer == nil {
		at, why := p.expires(), ErrDeadline
		if at.Before(p.deadline) {
			why = errLapsed
		}
		a.timer = time.AfterFunc(time.Until(at), func() { p.expire(why) })
	}
	p.mu.Unlock()
	p.settled(1)
}

// hold puts deliveries into the queues of their fences, and returns those of deliveries that
// are to be sent now.
func hold(deliveries []*Delivery, later []ward) (now []*Delivery) {
	if len(later) == 0 {
		return deliveries
	}
	waits := make(map[*Delivery]bool, len(later))
	for _, w := range later {
		waits[w.d] = w.f.hold(w.d)
	}
	for _, d := range deliveries {
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
