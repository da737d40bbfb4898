package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// Kind is what a push is for.
type Kind uint8

// The kinds of push.
const (
	_       Kind = iota
	ToRoom       // the members of Push.Room but Push.Exclude
	ToUser       // Push.User on all nodes
	ToUsers      // Push.Users, each once
	ToAll        // every connection of every node
	ToRooms      // the members of any of Push.Rooms but Push.Exclude, each once
)

// Errors of a push for which nothing was written.
var (
	ErrDraining    = errors.New("push-manager is draining")
	ErrOverloaded  = errors.New("too much to do")
	ErrDeadline    = errors.New("deadline passed before anything was sent")
	ErrCanceled    = errors.New("canceled before anything was sent")
	ErrInternal    = errors.New("internal error before anything was sent")
	ErrUnscoped    = errors.New("a node cannot tell scopes apart")
	ErrUnavailable = route.ErrUnavailable
)

// What an ErrOverloaded is about.
var (
	ErrInFlight = fmt.Errorf("%w: too many pushes in flight", ErrOverloaded)
	ErrMemory   = fmt.Errorf("%w: memory runs out", ErrOverloaded)
	ErrAsync    = fmt.Errorf("%w: too many pushes wait for receipts", ErrOverloaded)
)

// Budget is what its caller may spend on pushes.
type Budget interface {
	// Charge is told that the push goes to so many nodes, before anything is sent, and of a push to several rooms that one of them is
	// looked up for it. It is called from any goroutine, and must not block. It cannot refuse the push: what it has no means for is
	// a debt.
	Charge(cost int)
}

// Trace is the engine's view of a sampled push's trace. Its methods are called
// from several goroutines.
type Trace interface {
	// Lookup opens the span of one look-up.
	Lookup(ctx context.Context, what string) (context.Context, func(error))
	// Delivery opens the span of one delivery.
	Delivery(node string, users int) DeliveryTrace
}

// DeliveryTrace is the span of one delivery.
type DeliveryTrace interface {
	// Traceparent is the W3C trace context for the node.
	Traceparent() string
	// Taken and Written tell that the delivery has left the queue of its link, and that the frame with it was handed to the connection. Both
	// are called at most once, in this order, but for an End in between.
	Taken()
	Written()
	// End closes the span. It is called exactly once.
	End(outcome string)
}

// Completer is told the end of a push that Start took.
type Completer interface {
	// Complete is called exactly once, from any goroutine, and must not block.
	Complete(p *Push)
}

// Request is what the caller says.
type Request struct {
	Kind Kind
	// Priority decides who is refused first when there is too much to do.
	Priority Priority
	// Order keeps the push behind those of the same Order that were started before it,
	// for the same room or user. Nil: it is like any other.
	Order   *Order
	Room    string
	User    string
	Users   []string
	Rooms   *RoomList // a client sees the first that it is in
	Exclude []string
	// Only is set for a push to a few of the members of a room, or of several of which each has an answer, without Exclude and Order:
	// nobody else gets it, and who is no member is no target.
	Only []string
	// Scope is what all these ids begin with; limits are for what stands behind it. A push
	// to all is for the users whose ids begin so, and ErrUnscoped while one of the nodes is
	// known not to tell them apart. Empty: ids are as they are, and all are all.
	Scope string
	// Payload is the encoded MessageContent as the clients' nodes shall get it,
	// Content what validation needs to know about it. The package says how long the bytes
	// have to stay.
	Payload []byte
	Content Content
	// Trace is nil unless the push is sampled.
	Trace Trace
	// Budget is nil if nobody counts what the push costs.
	Budget Budget
	// Options is nil for a push without.
	Options *Options
	// Timeout bounds the push. 0, or more than the default, means the default.
	Timeout time.Duration
	// Arrived is when the push came in. The zero time means when it is started, and
	// Start says here when that was.
	Arrived time.Time
}

// Push is one request to deliver a payload. The caller sets the Request and leaves it alone
// until the push is finished. A Push is used once, and again after Reset if it is Reusable.
type Push struct {
	Request

	state

	// The number of its place in the Order, 0 while it has none, see fence.go. Others may
	// look whether it is theirs at any time, so Reset leaves it alone.
	seq atomic.Uint64
}

// state is what the engine needs to know of a push.
type state struct {
	// Static after start, or once routed.
	engine   *Engine
	done     Completer
	deadline time.Time // when its deliveries are settled, see lasting
	lasting  *lasting  // nil for a push that ends with its deliveries
	shard    int       // that of Room or User
	waits    bool      // keys may have been put in line, deliveries held back; the starter's own
	once     bool      // of several rooms: nobody has pushed to them lately
	union    *route.Union
	absent   int // rooms of it that do not exist; known once routed

	// Memory for the usual push, so that it needs no other. Reset keeps that of deliveries
	// and block.
	oneList [1]*Delivery
	user    [1]string
	block   []Delivery

	// Of a push that is not plain, once it is finished.
	result Result
	err    error

	// From here on stands what changes while the push is under way. The cores that start
	// a push, write it, read its ack and answer it are different ones: what they hand on
	// to each other is kept close together.
	one     [1]Delivery
	targets int // users, except for everybody; known once routed

	// pending counts what the push still waits for: its own start, the keys in
	// line, the deliveries. Who brings it to 0 finishes the push.
	pending atomic.Int32
	warded  atomic.Bool // there may be wards: somebody else's deliveries wait for ours

	mark [1]mark // of a push to a room or user of an Order

	mu sync.Mutex
	// Guarded by mu once somebody else has the push, until it is finished.
	found      bool // the room exists, or one of the rooms; there are nodes
	plain      bool // everybody was reached, or known to be offline, at the first try
	offline    int  // users without a node
	deliveries []*Delivery
	slow       *slowPath // nil while the push goes the usual way
}

// slowPath is what only a push has that does not go the usual way: its route was not
// cached, it leaves somebody out, somebody gets it twice, it was ended before its time.
type slowPath struct {
	except  []string               // Exclude, sorted, each once
	timer   *time.Timer            // ends what the push has not sent if it has to wait in line, else nil
	waiting int                    // keys in line, or a room whose log is written
	holds   bool                   // some of its deliveries are behind a fence, or were
	lookup  error                  // of the keys that were not found out
	expired error                  // why the push was ended before its time
	shared  []string               // users with more than one delivery
	dropped []dropped              // users that no delivery was made for
	later   []ward                 // deliveries that are held back, until they are in the queues
	wards   map[*Delivery][]func() // who waits for a delivery of this push
	stale   staleness              // of the answers that were used

	// Of a push to several users of an Order.
	users []string // sorted
	marks []mark   // theirs
}

// ensureSlowPath returns p.slow, of which there is one from then on.
func (p *Push) ensureSlowPath() *slowPath {
	if p.slow == nil {
		p.slow = new(slowPath)
	}
	return p.slow
}

// expiry is why the push was ended before its time, nil if it was not.
func (p *Push) expiry() error {
	if p.slow == nil {
		return nil
	}
	return p.slow.expired
}

// dropped is a number of users that no delivery was made for.
type dropped struct {
	why   Reason
	users int
}

// keepDeliveries is how many deliveries a push keeps the memory of, 8 KiB of it. A broadcast
// over more nodes must not make every push as large.
const keepDeliveries = 64

// Reusable tells whether a finished push, and its bytes, may be used again after Reset. One whose
// clients acknowledge never is: its link may still ask for it. Nor is one that was stored.
func (p *Push) Reusable() bool { return p.plain && p.Trace == nil }

// Reset prepares a reusable push for another use, whose fields the caller then sets.
func (p *Push) Reset() {
	deliveries, block := p.deliveries[:0], p.block
	clear(p.deliveries)
	clear(block)
	p.Request, p.state = Request{}, state{}
	if n := cap(deliveries); n > len(p.oneList) && n <= keepDeliveries { // not the push's own
		p.deliveries, p.block = deliveries, block
	}
}

// Forget lets go of what belongs to the caller of a reusable push to one user, its id and
// the payload. It is for those who keep pushes for later: Reset would do the same, and
// touch all of the push.
func (p *Push) Forget() {
	p.User, p.Payload, p.Options, p.user[0], p.mark = "", nil, nil, "", [1]mark{}
}

// Lookup opens a span for a look-up on behalf of the push. Each of several rooms has its own: that is paid for.
func (p *Push) Lookup(ctx context.Context, what string) (context.Context, func(error)) {
	if p.Kind == ToRooms && p.Budget != nil {
		p.Budget.Charge(1)
	}
	if p.Trace == nil {
		return ctx, func(error) {}
	}
	return p.Trace.Lookup(ctx, what)
}

// isRoom tells the two kinds of key apart.
func isRoom(key uint64) bool { return key&1 == 1 }

func (e *Engine) userKey(user string) uint64 { return e.shards.Hash(user) << 1 }

// route asks where the push goes and stages what is known at once. Keys that
// are not known come back through Routed.
func (p *Push) route() {
	e := p.engine
	table, key, room := e.directory.Users, p.User, uint64(0)
	switch p.Kind {
	case ToRoom:
		p.except()
		table, key, room = e.directory.Rooms, p.Room, 1
	case ToRooms:
		p.except()
		p.routeRooms()
		return
	case ToUser:
		p.targets = 1
		if p.Options != nil && p.Options.Replay != nil {
			p.sendReplay()
			return
		}
	case ToUsers:
		p.routeUsers()
		return
	case ToAll:
		p.stageAll()
		p.send(p.deliveries)
		return
	}
	hash := e.shards.Hash(key)
	p.shard, p.mark[0].key = e.shards.Index(hash), hash<<1|room
	if p.Kind == ToRoom && p.comesLater() {
		return
	}
	s := table.Cached(p.shard, key, p.Arrived)
	if s == nil {
		if p.await(1) {
			table.Ask(p.shard, []string{key}, p.Arrived, p)
		}
		return
	}
	p.sendBy(key, s)
}

// routeRooms is route for several rooms. Their union is like one room: it has an id, a place in its
// Order, and an audience with each node.
func (p *Push) routeRooms() {
	if p.Order != nil && p.comesLater() {
		return
	}
	s := p.union.Cached(p.Arrived)
	if s == nil {
		if p.await(1) {
			p.union.Ask(p.Arrived, p)
		}
		return
	}
	p.sendBy(p.union.ID, s)
}

// oneRoom makes a push to several rooms that are one, perhaps several times, a push to that room.
func (p *Push) oneRoom() {
	if p.Kind == ToRooms && p.Rooms.one {
		p.Kind, p.Room = ToRoom, p.Rooms.ids[0]
	}
}

// enterRooms finds the union of a push to several rooms.
func (p *Push) enterRooms() {
	if p.oneRoom(); p.Kind == ToRoom {
		return
	}
	e := p.engine
	p.union = p.Rooms.unionIn(e.directory)
	p.once = p.union.Once()
	p.shard, p.mark[0].key = e.shards.Index(p.union.Hash), roomKey(e.shards.Hash(p.union.ID))
}

// roomKey is the key of a room, or of several, by its hash.
func roomKey(hash uint64) uint64 { return hash<<1 | 1 }

// sendBy stages and sends a push by an answer that was in memory.
func (p *Push) sendBy(key string, s *route.Snapshot) {
	// Nobody else has the push before it is sent, so there is nothing to lock.
	var inWay []*fence
	if p.Order != nil {
		if all := p.Order.pass(p, []string{key}, []*route.Snapshot{s}, true); all != nil {
			inWay = all[0]
		}
	}
	if p.Kind == ToUser {
		p.stageUser(s, inWay)
	} else {
		p.stageRoom(s, inWay)
	}
	deliveries := p.deliveries
	if inWay != nil && p.slow != nil {
		p.waits = true
		deliveries = hold(deliveries, p.takeLater())
	}
	p.send(deliveries)
}

// except prepares Exclude for the staging of a room.
func (p *Push) except() {
	if len(p.Exclude) > 0 {
		p.ensureSlowPath().except = slices.Compact(slices.Sorted(slices.Values(p.Exclude)))
	}
}

// sendReplay sends a message out of the store to the node that it is for. Nobody is looked up,
// and what is not delivered there stays in the store. So it is with its link when Start returns,
// behind what was started before for the user.
func (p *Push) sendReplay() {
	p.shard = p.engine.shards.For(p.User).Index()
	p.user[0] = p.User
	d := &p.one[0]
	d.node, d.users, d.healed = p.Options.Replay.Node, p.user[:], true
	p.add(d)
	p.send(p.deliveries)
}

// takeLater takes what has been staged to be held back.
func (p *Push) takeLater() []ward {
	later := p.slow.later
	p.slow.later = nil
	return later
}

// routeUsers asks for the users of each shard together.
func (p *Push) routeUsers() {
	e := p.engine
	users := slices.Compact(slices.Sorted(slices.Values(p.Users)))
	p.targets = len(users)
	if p.Order != nil {
		a := p.ensureSlowPath()
		a.users, a.marks = users, make([]mark, len(users))
		for i, user := range users {
			a.marks[i].key = p.engine.userKey(user)
		}
		p.Order.enter(p)
	}
	byShard := make([][]string, e.shards.Len())
	for _, user := range users {
		shard := e.shards.For(user).Index()
		byShard[shard] = append(byShard[shard], user)
	}
	for shard, users := range byShard {
		if len(users) == 0 {
			continue
		}
		if !p.await(len(users)) {
			return
		}
		var cached, missing []string
		var snaps []*route.Snapshot
		for _, user := range users {
			if s := e.directory.Users.Cached(shard, user, p.Arrived); s != nil {
				cached, snaps = append(cached, user), append(snaps, s)
			} else {
				missing = append(missing, user)
			}
		}
		if len(missing) > 0 {
			e.directory.Users.Ask(shard, missing, p.Arrived, p)
		}
		if len(cached) > 0 {
			p.Routed(cached, snaps, nil)
		}
	}
}

// await accounts for n keys that Routed will bring. False means that the push was
// ended before, by a fault of our own: it asks for nothing more.
func (p *Push) await(n int) bool {
	if p.Order != nil && p.Kind != ToUsers {
		p.Order.enter(p)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.expiry() != nil {
		return false
	}
	p.waits = true
	p.pending.Add(int32(n))
	p.ensureSlowPath().waiting += n
	return true
}

// Routed implements route.Waiter: it stages and sends the deliveries for keys.
func (p *Push) Routed(keys []string, snaps []*route.Snapshot, err error) {
	owed := 0 // of what the push waits for
	defer func() {
		if v := recover(); v != nil {
			p.engine.panicked(p, v)
		}
		if owed > 0 {
			p.settled(owed)
		}
	}()
	deliveries, later, ok := p.stage(keys, snaps, err)
	if !ok {
		return
	}
	owed = len(keys)
	p.send(hold(deliveries, later))
}

// stage makes the deliveries for keys and adds them; later are those of deliveries that a
// fence holds back. False means that the push was ended before and waits for nothing.
func (p *Push) stage(keys []string, snaps []*route.Snapshot, err error) (deliveries []*Delivery, later []ward, ok bool) {
	inWay := make([][]*fence, len(keys))
	if p.Order != nil && snaps != nil {
		if all := p.Order.pass(p, keys, snaps, false); all != nil {
			inWay = all
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.expiry() != nil {
		return nil, nil, false
	}
	had := len(p.deliveries)
	var partial *route.PartialError
	switch {
	case errors.As(err, &partial) && p.Only == nil:
		p.ensureSlowPath().lookup = err
		p.stageRoom(snaps[0], inWay[0])
		p.slow.dropped = append(p.slow.dropped, dropped{DropNoRoute, partial.Rooms})
		p.targets += partial.Rooms // one target each: nobody knows how many there are
	case err != nil:
		p.ensureSlowPath().lookup = err
		p.slow.dropped = append(p.slow.dropped, dropped{DropNoRoute, len(keys)})
	case p.Kind == ToRoom || p.Kind == ToRooms:
		p.stageRoom(snaps[0], inWay[0])
	case p.Kind == ToUser:
		p.stageUser(snaps[0], inWay[0])
	default:
		p.stageUsers(keys, snaps, inWay)
	}
	p.slow.waiting -= len(keys)
	return p.deliveries[had:], p.takeLater(), true
}

// stageRoom makes one delivery for each node with members of the room, and one more
// for those of them who have to wait.
func (p *Push) stageRoom(s *route.Snapshot, inWay []*fence) {
	p.found = s.Found
	p.targets = s.Users
	if p.union != nil {
		p.absent = p.union.NotFound()
	}
	if s.Stale != nil {
		p.note(s.Stale)
	}
	if p.Only != nil {
		p.stageOnly(s)
		return
	}
	var except []string
	if p.slow != nil {
		except = p.slow.except
	}
	for _, user := range except {
		if s.Has(user) {
			p.targets--
		}
	}
	p.offline = len(s.Unplaced)
	if len(except) > 0 {
		p.offline -= len(route.Intersect(except, s.Unplaced))
	}
	if len(s.Shared) > 0 {
		p.ensureSlowPath().shared = s.Shared
	}
	block := p.reserve(len(s.Groups))
	for i, g := range s.Groups {
		d := &block[i]
		d.node, d.group = g.Node, g
		if len(except) > 0 {
			d.except = route.Intersect(except, g.Users)
		}
		var whole *fence
		for _, f := range inWay {
			users, waits := f.held[g.Node]
			if waits && users == nil {
				whole = f
			} else if users = without(users, d.except); len(users) > 0 {
				d.except = union(d.except, users)
				p.addLater(&Delivery{node: g.Node, users: users}, f)
			}
		}
		switch {
		case d.Targets() == 0:
		case whole != nil:
			p.addLater(d, whole)
		default:
			p.add(d)
		}
	}
}

// stageOnly makes one delivery for each node with some of the members that Only names.
func (p *Push) stageOnly(s *route.Snapshot) {
	only := slices.Compact(slices.Sorted(slices.Values(p.Only)))
	only = slices.DeleteFunc(only, func(user string) bool { return !s.Has(user) })
	p.targets, p.offline = len(only), len(route.Intersect(only, s.Unplaced))
	if shared := route.Intersect(only, s.Shared); len(shared) > 0 {
		p.ensureSlowPath().shared = shared
	}
	for _, g := range s.Groups {
		if users := route.Intersect(only, g.Users); len(users) > 0 {
			p.add(&Delivery{node: g.Node, users: users})
		}
	}
}

// reserve makes n deliveries that are to be addressed and added.
func (p *Push) reserve(n int) []Delivery {
	if n == 1 {
		return p.one[:]
	}
	if n > cap(p.block) {
		p.block = make([]Delivery, n)
	}
	p.block, p.deliveries = p.block[:n], slices.Grow(p.deliveries, n)
	return p.block
}

// stageUser makes one delivery for each node that holds the user.
func (p *Push) stageUser(s *route.Snapshot, inWay []*fence) {
	p.countUser(s)
	for i, g := range s.Groups {
		d := &p.one[0] // most users are on one node
		if i > 0 {
			d = new(Delivery)
		}
		p.user[0] = p.User
		d.node, d.users = g.Node, p.user[:]
		if f := inFront(inWay, g.Node); f != nil {
			p.addLater(d, f)
		} else {
			p.add(d)
		}
	}
}

// inFront returns the fence of a user that holds back what is for a node, nil for none.
func inFront(inWay []*fence, node string) *fence {
	for _, f := range inWay {
		if _, waits := f.held[node]; waits {
			return f
		}
	}
	return nil
}

// stageUsers makes one delivery for each node that holds any of users, and one for each
// user who has to wait.
func (p *Push) stageUsers(users []string, snaps []*route.Snapshot, inWay [][]*fence) {
	var deliveries []*Delivery
	byNode := make(map[string]*Delivery)
	for i, s := range snaps {
		p.countUser(s)
		for _, g := range s.Groups {
			var d *Delivery
			if f := inFront(inWay[i], g.Node); f != nil {
				d = &Delivery{node: g.Node, users: []string{users[i]}}
				p.addLater(d, f)
			} else {
				if d = byNode[g.Node]; d == nil {
					d = &Delivery{node: g.Node}
					byNode[g.Node] = d
					deliveries = append(deliveries, d)
				}
				d.users = append(d.users, users[i])
			}
			if p.Order != nil && len(s.Groups) == 1 {
				p.markOf(users[i]).delivery = d
			}
		}
	}
	for _, d := range deliveries {
		p.add(d)
	}
}

func (p *Push) countUser(s *route.Snapshot) {
	if s.Stale != nil {
		p.note(s.Stale)
	}
	if len(s.Shared) > 0 {
		a := p.ensureSlowPath()
		a.shared = append(a.shared, s.Shared...)
	}
	if !s.Found {
		p.offline++
	}
}

// note keeps that an answer is a stale one.
func (p *Push) note(s *route.Stale) {
	st := &p.ensureSlowPath().stale
	if !st.is || s.Known.Before(st.known) {
		st.known = s.Known
	}
	st.is, st.changed = true, st.changed || s.Changed
}

// staleness is whether a push went by an answer that the Controller could not confirm.
type staleness struct {
	is      bool
	known   time.Time // the oldest moment up to which one was true for certain
	changed bool      // one is known to have changed
}

// stageAll makes one delivery for each node. Broadcasts have one shard, so that
// they keep their order.
func (p *Push) stageAll() {
	links := p.engine.network.Links(0)
	p.found = len(links) > 0
	block := p.reserve(len(links))
	for i, l := range links {
		block[i].node = l.Node()
		p.add(&block[i])
	}
}

// add adds a delivery that is addressed as a part of the push. The lock is held where
// there is one to hold.
func (p *Push) add(d *Delivery) {
	d.push, d.shard = p, uint16(p.shard)
	if p.Kind == ToUsers { // all of one shard, see routeUsers
		d.shard = uint16(p.engine.shards.For(d.users[0]).Index())
	}
	if p.Options != nil && len(p.Options.Filter) > 0 && p.Kind != ToAll {
		d.names = d.Targets() > 1 && (d.healed || p.slow != nil && len(p.slow.shared) > 0)
	}
	if p.Trace != nil {
		d.trace = p.Trace.Delivery(d.node, d.Targets())
	}
	p.pending.Add(1)
	if p.deliveries == nil {
		p.deliveries = p.oneList[:0]
	}
	p.deliveries = append(p.deliveries, d)
}

// addLater adds a delivery that f holds back.
func (p *Push) addLater(d *Delivery, f *fence) {
	p.add(d)
	a := p.ensureSlowPath()
	a.later, a.holds = append(a.later, ward{d, f}), true
}

// send hands deliveries to their links. What a link declines is dropped here.
func (p *Push) send(deliveries []*Delivery) {
	if p.Budget != nil && len(deliveries) > 0 {
		p.Budget.Charge(len(deliveries))
	}
	for _, d := range deliveries {
		reason := DropUnknownNode
		if l := p.engine.network.Link(int(d.shard), d.node); l != nil {
			reason = l.Send(d)
		}
		if reason != Sent {
			d.Drop(reason)
		}
	}
}

// retain keeps the push from being finished until settled is called for it. False means
// that it is.
func (p *Push) retain() bool {
	for n := p.pending.Load(); n > 0; n = p.pending.Load() {
		if p.pending.CompareAndSwap(n, n+1) {
			return true
		}
	}
	return false
}

// expires is when nothing more of the push is sent.
func (p *Push) expires() time.Time {
	if o := p.Options; o != nil && o.TTL > 0 && p.Arrived.Add(o.TTL).Before(p.deadline) {
		return p.Arrived.Add(o.TTL)
	}
	return p.deadline
}

// errLapsed ends what a push has not sent when its TTL has passed. It is no error of the push.
var errLapsed = errors.New("ttl passed")

// expire ends the push now, for one of ErrDeadline, ErrCanceled, ErrInternal and errLapsed.
// What is written becomes unknown, all else failed; what is written and has lapsed is still
// waited for. The deliveries are settled before expire returns or, if some other goroutine is
// just settling one of them, right after. Receipts are not waited for any longer.
func (p *Push) expire(cause error) {
	drop, lose := DropExpired, LostDeadline
	switch {
	case errors.Is(cause, ErrInternal):
		drop, lose = DropInternal, LostInternal
	case errors.Is(cause, errLapsed):
		lose = Sent
	}
	if !p.retain() {
		if l := p.lasting; l != nil && !p.Options.Async && !errors.Is(cause, errLapsed) {
			l.giveUp()
		}
		return
	}
	p.mu.Lock()
	if e := p.expiry(); e != nil && !errors.Is(e, errLapsed) {
		p.mu.Unlock()
		p.settled(1)
		return
	}
	a := p.ensureSlowPath()
	if a.expired == nil {
		a.expired = cause
	}
	waiting := a.waiting
	a.waiting = 0
	if waiting > 0 {
		a.dropped = append(a.dropped, dropped{drop, waiting})
	}
	deliveries := p.deliveries
	p.mu.Unlock()
	for _, d := range deliveries {
		d.expire(drop, lose)
	}
	p.settled(waiting + 1)
}

// without returns the members of some that are not in others; both are sorted.
func without(some, others []string) []string {
	if len(route.Intersect(some, others)) == 0 {
		return some
	}
	return slices.DeleteFunc(slices.Clone(some), func(user string) bool { return has(others, user) })
}
