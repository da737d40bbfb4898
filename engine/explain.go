package engine

import (
	"context"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// Explanation says what would become of a push, of which nothing was sent.
type Explanation struct {
	// Found is Result.Found. Targets counts users, each once; 0 for everybody.
	Found   bool
	Targets int
	// Planned are the deliveries that there would be, ordered by node.
	Planned []Planned
	// Sorted, each once: users for whom the Controller names no node; members of the room who are excluded; users, or the room,
	// that it could not be asked about, and Err why.
	Offline, Excluded, Unlocated []string
	Err                          error

	// How many answers came from memory, and how many by a look-up on behalf of the explanation.
	Cached, LookedUp int
	// Known is up to when all of them were true for certain. Watched: a change stream tells of their changes.
	Known   time.Time
	Watched bool
	// The Controller could not confirm one of the answers, and one of these is known to have changed.
	Stale, Changed bool
}

// Planned is a delivery that was not made.
type Planned struct {
	Node  string
	Shard int      // whose link to the node
	Users []string // sorted; nil for everybody. Shared: callers do not change it
	Size  int      // bytes that a frame needs for it, about; of a room, without the list of its members
	Link  LinkState
}

// Explain says where p would go now. Nothing is sent or stored, and nobody is charged. The answers of the Controller that are in
// memory serve as they do for a push; with refresh it is asked for all. Explain waits for look-ups until ctx ends. It keeps no place in
// flight. p is of no use for anything afterwards.
func (e *Engine) Explain(ctx context.Context, p *Push, refresh bool) (x Explanation, err error) {
	defer func() {
		if v := recover(); v != nil {
			e.panics.Add(1)
			e.logger.Error("panic while a push was explained", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
			err = ErrInternal
		}
	}()
	if err := e.check(p); err != nil {
		return x, err
	}
	p.engine, p.Order, p.Trace = e, nil, nil
	p.oneRoom()
	if p.Arrived.IsZero() {
		p.Arrived = time.Now()
	}
	p.deadline = p.Arrived.Add(e.timeout)
	x.Known, x.Watched = time.Now(), true
	switch p.Kind {
	case ToRoom:
		p.except()
		p.shard = e.shards.For(p.Room).Index()
		snaps, err := e.ask(ctx, e.directory.Rooms, []string{p.Room}, refresh, &x)
		if err != nil {
			return x, err
		}
		if s := snaps[p.Room]; s != nil {
			p.stageRoom(s, nil)
			x.explainRoom(p, s)
		}
	case ToRooms:
		p.except()
		u := p.Rooms.unionIn(e.directory)
		p.union, p.shard = u, e.shards.Index(u.Hash)
		snaps, err := e.ask(ctx, e.directory.Rooms, u.Rooms(), refresh, &x)
		if err != nil {
			return x, err
		}
		s, err := e.directory.Unite(ctx, slices.Collect(maps.Values(snaps)))
		if err != nil {
			return x, fmt.Errorf("%w: %w", ErrOverloaded, err)
		}
		p.stageRoom(s, nil)
		x.explainRoom(p, s)
	case ToUser, ToUsers:
		users := []string{p.User}
		if p.Kind == ToUsers {
			users = slices.Compact(slices.Sorted(slices.Values(p.Users)))
		}
		p.targets = len(users)
		snaps, err := e.ask(ctx, e.directory.Users, users, refresh, &x)
		if err != nil {
			return x, err
		}
		// Users of one node and shard share a delivery.
		byShard := make([][]string, e.shards.Len())
		for _, user := range users {
			switch s := snaps[user]; {
			case s == nil:
			case len(s.Groups) == 0:
				x.Offline = append(x.Offline, user)
			default:
				i := e.shards.For(user).Index()
				byShard[i] = append(byShard[i], user)
			}
		}
		for shard, users := range byShard {
			list := make([]*route.Snapshot, len(users))
			for i, user := range users {
				list[i] = snaps[user]
			}
			if p.shard = shard; p.Kind == ToUser && len(users) > 0 {
				p.stageUser(list[0], nil)
			} else {
				p.stageUsers(users, list, make([][]*fence, len(users)))
			}
		}
		p.found = len(p.deliveries) > 0
	default:
		p.stageAll()
		x.Watched = false
	}
	if p.slow != nil && p.slow.stale.is {
		x.Stale, x.Changed, x.Watched = true, p.slow.stale.changed, false
		x.Known = p.slow.stale.known
	}
	x.Found, x.Targets = p.found, p.targets
	for _, d := range p.deliveries {
		to := Planned{Node: d.node, Shard: int(d.shard), Size: d.Size(), Link: LinkState{Verdict: DropUnknownNode}}
		if to.Users = d.users; d.group != nil {
			to.Users = without(d.group.Users, d.except)
		}
		if l := e.network.Link(int(d.shard), d.node); l != nil {
			to.Link = l.Describe(d)
		}
		x.Planned = append(x.Planned, to)
	}
	slices.SortStableFunc(x.Planned, func(a, b Planned) int { return strings.Compare(a.Node, b.Node) })
	return x, nil
}

// explainRoom says who of a room does not get p, which is staged.
func (x *Explanation) explainRoom(p *Push, s *route.Snapshot) {
	x.Offline = s.Unplaced
	if p.slow != nil {
		x.Offline = without(x.Offline, p.slow.except)
		x.Excluded = slices.DeleteFunc(slices.Clone(p.slow.except), func(user string) bool { return !s.Has(user) })
	}
}

// askWindow is how many look-ups of rooms there are at a time: a pool has places for others, too.
const askWindow = 32

// ask has the answers for keys, and says in x how it has come by them. Keys without an answer are Unlocated.
func (e *Engine) ask(ctx context.Context, t *route.Table, keys []string, refresh bool, x *Explanation) (map[string]*route.Snapshot, error) {
	now := time.Now()
	a := &asked{snaps: make(map[string]*route.Snapshot, len(keys)), done: make(chan struct{}), places: make(chan struct{}, askWindow)}
	byShard := make([][]string, e.shards.Len())
	for _, key := range keys {
		shard := e.shards.For(key).Index()
		if s := t.Cached(shard, key, now); s != nil && !refresh {
			a.snaps[key] = s
			known, watched := t.Known(key)
			if known.Before(x.Known) {
				x.Known = known
			}
			x.Watched = x.Watched && watched
			continue
		}
		byShard[shard] = append(byShard[shard], key)
		a.left++
	}
	x.Cached, x.LookedUp = len(a.snaps), a.left
	if a.left == 0 {
		return a.snaps, nil
	}
	for shard, keys := range byShard {
		together := len(keys)
		if t == e.directory.Rooms {
			together = 1 // a look-up is about one room
		}
		for some := range slices.Chunk(keys, max(together, 1)) {
			select {
			case a.places <- struct{}{}:
			case <-ctx.Done():
				return nil, causeOf(ctx.Err())
			}
			if refresh {
				t.Refresh(shard, some, route.Missing{Since: now}, a)
			} else {
				t.Ask(shard, some, now, a)
			}
		}
	}
	select {
	case <-a.done:
	case <-ctx.Done():
		return nil, causeOf(ctx.Err())
	}
	x.Watched = x.Watched && e.directory.Stats().Watched
	for _, key := range keys {
		if a.snaps[key] == nil {
			x.Unlocated, x.Err = append(x.Unlocated, key), a.err
		}
	}
	return a.snaps, nil
}

// asked gathers what is said about keys. It implements route.Waiter.
type asked struct {
	done   chan struct{}
	places chan struct{} // one for each look-up under way; users of one shard may be told in parts, of one look-up

	mu sync.Mutex
	// Guarded by mu; read freely once done is closed.
	snaps map[string]*route.Snapshot
	left  int
	err   error
}

func (*asked) Lookup(ctx context.Context, _ string) (context.Context, func(error)) {
	return ctx, func(error) {}
}

func (a *asked) Routed(keys []string, snaps []*route.Snapshot, err error) {
	select {
	case <-a.places:
	default:
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.err = err
	}
	for i, s := range snaps {
		a.snaps[keys[i]] = s
	}
	if a.left -= len(keys); a.left == 0 {
		close(a.done)
	}
}
