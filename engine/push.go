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
)

// Errors of a push for which nothing was written.
var (
	ErrDraining    = errors.New("push-manager is draining")
	ErrOverloaded  = errors.New("too many pushes in flight")
	ErrDeadline    = errors.New("deadline passed before anything was sent")
	ErrCanceled    = errors.New("canceled before anything was sent")
	ErrInternal    = errors.New("internal error before anything was sent")
	ErrUnavailable = route.ErrUnavailable
)

// Trace is the engine's view of a sampled push's trace. Its methods are called
// from several goroutines.
type Trace interface {
	// Lookup opens the span of one look-up.
	Lookup(ctx context.Context, what string) (context.Context, func(error))
	// Leg opens the span of one delivery.
	Leg(node string, users int) LegTrace
}

// LegTrace is the span of one delivery.
type LegTrace interface {
	// Traceparent is the W3C trace context for the node.
	Traceparent() string
	// End closes the span. It is called exactly once.
	End(outcome string)
}

// Completer is told the end of a push that Start took.
type Completer interface {
	// Complete is called exactly once, from any goroutine, and must not block.
	Complete(p *Push)
}

// Push is one request to deliver a payload. The caller sets the exported fields
// and leaves them alone until the push is finished. A Push is used once.
type Push struct {
	Kind    Kind
	Room    string
	User    string
	Users   []string
	Exclude []string
	// Payload is the encoded MessageContent as the clients' nodes shall get it,
	// Content what validation needs to know about it. The bytes are never changed
	// and may outlive the push.
	Payload []byte
	Content Content
	// Trace is nil unless the push is sampled.
	Trace Trace
	// Ordered keeps the push behind those that were started before it, one after
	// another, for the same room or user.
	Ordered bool
	// Timeout bounds the push. 0, or more than the default, means the default.
	Timeout time.Duration

	// Static after start.
	engine   *Engine
	done     Completer
	began    time.Time
	deadline time.Time
	except   []string    // Exclude, sorted, each once
	timer    *time.Timer // ends the push if it has to wait in line, else nil
	targets  int         // users, except for everybody; known once routed

	// pending counts what the push still waits for: its own start, the keys in
	// line, the deliveries. Who brings it to 0 finishes the push.
	pending atomic.Int32

	mu      sync.Mutex
	legs    []*Delivery       // guarded by mu until finished, as is all below
	waiting int               // keys in line
	expired error             // why the push was ended before its time
	over    bool              // it is finished: nothing here changes any more
	lookup  error             // of the keys that were not found out
	held    []*route.Snapshot // to be released at the end
	shared  []string          // users with more than one delivery
	offline int               // users without a node
	dropped [reasons]int      // users that no delivery was made for, by reason
	found   bool              // the room exists; there are nodes

	one    Delivery // for a push with one delivery
	oneLeg [1]*Delivery

	result Result
	err    error
}

// Result is the account of a push once it is finished. An error means that nothing
// was written; the result is then zero.
func (p *Push) Result() (Result, error) { return p.result, p.err }

// Lookup opens a span for a look-up on behalf of the push.
func (p *Push) Lookup(ctx context.Context, what string) (context.Context, func(error)) {
	if p.Trace == nil {
		return ctx, func(error) {}
	}
	return p.Trace.Lookup(ctx, what)
}

// route asks where the push goes and stages what is known at once. Keys that
// are not known come back through Routed.
func (p *Push) route() {
	q := route.Query{Now: p.began, Ordered: p.Ordered}
	switch p.Kind {
	case ToRoom:
		if len(p.Exclude) > 0 {
			p.except = slices.Compact(slices.Sorted(slices.Values(p.Exclude)))
		}
		p.routeOne(p.Room, q, p.engine.directory.Room)
	case ToUser:
		p.targets = 1
		p.routeOne(p.User, q, p.user)
	case ToUsers:
		p.routeUsers(q)
	case ToAll:
		p.stageAll()
	}
}

func (p *Push) user(home int, user string, q route.Query, w route.Waiter) *route.Snapshot {
	var snaps [1]*route.Snapshot
	p.engine.directory.Users(home, []string{user}, snaps[:], q, w)
	return snaps[0]
}

func (p *Push) routeOne(key string, q route.Query, ask func(int, string, route.Query, route.Waiter) *route.Snapshot) {
	home := p.engine.shards.For(key).Index()
	if !p.await(1) {
		return
	}
	if s := ask(home, key, q, p); s != nil {
		p.Routed([]string{key}, []*route.Snapshot{s}, nil)
	}
}

// routeUsers asks for the users of each shard together.
func (p *Push) routeUsers(q route.Query) {
	users := slices.Compact(slices.Sorted(slices.Values(p.Users)))
	p.targets = len(users)
	homes := make([][]string, p.engine.shards.Len())
	for _, user := range users {
		home := p.engine.shards.For(user).Index()
		homes[home] = append(homes[home], user)
	}
	for home, users := range homes {
		if len(users) == 0 {
			continue
		}
		if !p.await(len(users)) {
			return
		}
		snaps := make([]*route.Snapshot, len(users))
		p.engine.directory.Users(home, users, snaps, q, p)
		hit, known := users[:0:0], snaps[:0:0]
		for i, s := range snaps {
			if s != nil {
				hit, known = append(hit, users[i]), append(known, s)
			}
		}
		if len(hit) > 0 {
			p.Routed(hit, known, nil)
		}
	}
}

// await accounts for n keys that Routed will bring. False means that the push was
// ended before, by a fault of our own: it asks for nothing more.
func (p *Push) await(n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.expired != nil {
		return false
	}
	p.pending.Add(int32(n))
	p.waiting += n
	return true
}

// guard bounds what may wait in line, behind a fence above all: two pushes to several
// users may each wait for the other to finish.
func (p *Push) guard() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting > 0 {
		p.timer = time.AfterFunc(time.Until(p.deadline), func() { p.expire(ErrDeadline) })
	}
}

// Routed implements route.Waiter: it stages and sends the deliveries for keys.
func (p *Push) Routed(keys []string, snaps []*route.Snapshot, err error) {
	owed := 0 // of what the push waits for
	defer func() {
		if v := recover(); v != nil {
			p.engine.panicked(p, v)
		}
		if owed > 0 {
			p.finished(owed)
		}
	}()
	legs, ok := p.stage(keys, snaps, err)
	if !ok {
		if p.Ordered {
			release(snaps) // finish may have been there already
		}
		return
	}
	owed = len(keys)
	p.send(legs)
}

// stage makes the deliveries for keys and books them. False means that the push
// was ended before and waits for nothing.
func (p *Push) stage(keys []string, snaps []*route.Snapshot, err error) (legs []*Delivery, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.expired != nil {
		return nil, false
	}
	if p.Ordered {
		p.held = append(p.held, snaps...)
	}
	switch {
	case err != nil:
		p.lookup = err
		p.dropped[DropNoRoute] += len(keys)
	case p.Kind == ToRoom:
		legs = p.stageRoom(snaps[0])
	default:
		legs = p.stageUsers(keys, snaps)
	}
	p.waiting -= len(keys)
	p.addLocked(legs)
	return legs, true
}

// stageRoom makes one delivery for each node with members of the room.
func (p *Push) stageRoom(s *route.Snapshot) []*Delivery {
	p.found = s.Found
	p.targets = s.Users
	for _, user := range p.except {
		if s.Has(user) {
			p.targets--
		}
	}
	p.offline = len(s.Unplaced) - len(intersect(p.except, s.Unplaced))
	p.shared = s.Shared
	block := make([]Delivery, len(s.Groups))
	legs := make([]*Delivery, 0, len(s.Groups))
	for i, g := range s.Groups {
		d := &block[i]
		d.node, d.group, d.except = g.Node, g, intersect(p.except, g.Users)
		if d.Targets() > 0 {
			legs = append(legs, d)
		}
	}
	return legs
}

// stageUsers makes one delivery for each node that holds any of users.
func (p *Push) stageUsers(users []string, snaps []*route.Snapshot) []*Delivery {
	if len(users) == 1 {
		return p.stageUser(snaps[0])
	}
	var legs []*Delivery
	byNode := make(map[string]*Delivery)
	for i, s := range snaps {
		p.countUser(s)
		for _, g := range s.Groups {
			d := byNode[g.Node]
			if d == nil {
				d = &Delivery{node: g.Node}
				byNode[g.Node] = d
				legs = append(legs, d)
			}
			d.users = append(d.users, users[i])
		}
	}
	return legs
}

func (p *Push) stageUser(s *route.Snapshot) []*Delivery {
	p.countUser(s)
	if len(s.Groups) == 1 && len(p.legs) == 0 { // most pushes: the push itself has room for it
		p.one.node, p.one.users = s.Groups[0].Node, s.Groups[0].Users
		p.oneLeg[0] = &p.one
		return p.oneLeg[:]
	}
	legs := make([]*Delivery, len(s.Groups))
	for i, g := range s.Groups {
		legs[i] = &Delivery{node: g.Node, users: g.Users}
	}
	return legs
}

func (p *Push) countUser(s *route.Snapshot) {
	p.shared = append(p.shared, s.Shared...)
	if !s.Found {
		p.offline++
	}
}

// stageAll makes one delivery for each node. Broadcasts have one home, so that
// they keep their order.
func (p *Push) stageAll() {
	links := p.engine.network.Links(0)
	legs := make([]*Delivery, len(links))
	for i, l := range links {
		legs[i] = &Delivery{node: l.Node()}
	}
	p.mu.Lock()
	p.found = len(links) > 0
	p.addLocked(legs)
	p.mu.Unlock()
	p.send(legs)
}

// addLocked books legs as parts of the push.
func (p *Push) addLocked(legs []*Delivery) {
	p.pending.Add(int32(len(legs)))
	for _, d := range legs {
		d.push = p
		if p.Trace != nil {
			d.leg = p.Trace.Leg(d.node, d.Targets())
		}
	}
	if len(p.legs) == 0 {
		p.legs = legs
		return
	}
	p.legs = append(p.legs, legs...)
}

// send hands deliveries of one home to their links. What a link declines is dropped
// here.
func (p *Push) send(legs []*Delivery) {
	if len(legs) == 0 {
		return
	}
	home := p.home(legs[0])
	for _, d := range legs {
		reason := DropUnknownNode
		if l := p.engine.network.Link(home, d.node); l != nil {
			reason = l.Send(d)
		}
		if reason != Sent {
			d.Drop(reason)
		}
	}
}

// home is the shard on which a delivery keeps its order.
func (p *Push) home(d *Delivery) int {
	switch p.Kind {
	case ToRoom:
		return p.engine.shards.For(p.Room).Index()
	case ToAll:
		return 0
	default:
		return p.engine.shards.For(d.users[0]).Index() // all of one home, see routeUsers
	}
}

// finished takes n off what the push waits for.
func (p *Push) finished(n int) {
	if p.pending.Add(-int32(n)) == 0 {
		p.finish()
	}
}

// finish closes the books and tells the caller.
func (p *Push) finish() {
	p.mu.Lock()
	p.over = true // what expires from here on comes too late to be read or written
	p.mu.Unlock()
	p.result, p.err = p.account()
	if p.timer != nil {
		p.timer.Stop()
	}
	release(p.held)
	p.engine.leave()
	p.done.Complete(p)
}

func release(snaps []*route.Snapshot) {
	for _, s := range snaps {
		s.Release()
	}
}

// expire ends the push now, for one of ErrDeadline, ErrCanceled and ErrInternal.
// What is written becomes unknown, all else failed. The push finishes before expire
// returns or, if some other goroutine is just settling a part of it, right after.
func (p *Push) expire(cause error) {
	drop, lose := DropExpired, LostDeadline
	if errors.Is(cause, ErrInternal) {
		drop, lose = DropInternal, LostInternal
	}
	p.mu.Lock()
	if p.over || p.expired != nil {
		p.mu.Unlock()
		return
	}
	p.expired = cause
	waiting := p.waiting
	p.waiting = 0
	p.dropped[drop] += waiting
	legs := p.legs
	p.mu.Unlock()
	for _, d := range legs {
		d.expire(drop, lose)
	}
	if waiting > 0 {
		p.finished(waiting)
	}
}

// unsent tells whether nothing was written although there was something to
// write, and why.
func (p *Push) unsent() error {
	for _, d := range p.legs {
		if d.outcome != Failed || d.reason != DropExpired && d.reason != DropInternal {
			return nil
		}
	}
	if len(p.legs) > 0 {
		if p.expired == nil && !time.Now().Before(p.deadline) {
			return ErrDeadline
		}
		return p.expired
	}
	switch {
	case p.expired != nil:
		return p.expired
	case errors.Is(p.lookup, route.ErrOverloaded):
		return fmt.Errorf("%w: %w", ErrOverloaded, p.lookup)
	case p.lookup != nil:
		return fmt.Errorf("look up the route: %w", p.lookup)
	}
	return nil
}

// intersect returns the members of some that are in all; both are sorted.
func intersect(some, all []string) []string {
	if len(some) == 0 {
		return nil
	}
	var both []string
	for _, user := range some {
		if has(all, user) {
			both = append(both, user)
		}
	}
	return both
}
