package route

import (
	"context"
	"fmt"
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"
)

const (
	// unionWindow is how many of its rooms a union looks up at a time: the pool has places for others, too.
	unionWindow = 32
	// unionTime is how long a union begins look-ups for those who wait. What is left then has no answer.
	unionTime = 2 * time.Second
	// touchEvery is how often the cache of rooms is told that the rooms of a union are used, so that it
	// keeps them.
	touchEvery = nanos(time.Second)
)

// unions are those that were asked for lately. A set that is asked for once takes nobody's place for long: the
// cache keeps what is asked for often.
type unions struct {
	cache *otter.Cache[uint64, *Union] // by hash of the list
	last  atomic.Uint64                // the number of the latest one
}

func newUnions(members int) (*unions, error) {
	cache, err := otter.New(&otter.Options[uint64, *Union]{
		MaximumWeight: uint64(max(members, 1)),
		Weigher:       func(_ uint64, u *Union) uint32 { return uint32(min(u.weight.Load(), 1<<30)) },
		OnAtomicDeletion: func(e otter.DeletionEvent[uint64, *Union]) {
			if e.Cause != otter.CauseReplacement { // which is by itself
				e.Value.gone.Store(true)
			}
		},
	})
	if err != nil {
		return nil, fmt.Errorf("make the cache of unions: %w", err)
	}
	return &unions{cache: cache}, nil
}

// Union is the members of several rooms, each once, as one snapshot. It is brought up to date at the next
// query by what has changed in its rooms: a member who joins or leaves costs a look at each room, and the copy of
// the groups that have changed. Nothing is looked up but its rooms, by their own lines.
//
// Its snapshots are as those of a room. The same pointer means the same members, though rooms may have changed.
// Found tells that at least one of the rooms exists.
type Union struct {
	// ID is unlike the id of any room, and that of any other union of this process. Hash is equal for equal lists.
	ID   string
	Hash uint64

	// Static after newUnion.
	dir    *Directory
	rooms  []string // each once, in the order of the list
	shards []int    // of rooms
	list   []string // as it was asked for

	weight atomic.Int64
	absent atomic.Int32
	again  atomic.Bool // it was asked for more than once
	gone   atomic.Bool // the cache has it no more
	keyed  sync.Once
	keys   []uint64

	mu sync.Mutex
	// Guarded by mu. Somebody who answers the line changes what follows, and nobody else.
	busy bool    // somebody answers the line
	line []queue // who waits, in order

	entries []*entry    // of the cache; nil where the answer has come otherwise
	snaps   []*Snapshot // of the rooms, as told; nil before the first answer
	base    *Snapshot   // what they come to, nil before
	snap    *Snapshot   // base, or that as a stale one
	touched nanos       // when the cache of rooms was last asked about all

	// What was found then, and holds as long as the changes of the table are that many.
	changes    uint64
	generation uint64
	watched    bool  // all are vouched for, or else
	freshUntil nanos // good until then
	renewAt    int64
}

// queue is one place in the line of a union.
type queue struct {
	w   Waiter
	now time.Time
}

// Union is the union of a list of rooms. Its order, and who is named twice, makes another union of it, with the same
// members. The strings are copied if they are kept.
func (d *Directory) Union(list []string) *Union {
	h := uint64(len(list))
	for _, room := range list {
		h = h<<7 | h>>57
		h = (h ^ maphash.String(d.seed, room)) * 0x9e3779b97f4a7c15 // 2^64 over the golden ratio, odd: mixes
	}
	if u, ok := d.unions.cache.GetIfPresent(h); ok && slices.Equal(u.list, list) {
		return u
	}
	u := d.newUnion(h, list)
	if kept, added := d.unions.cache.SetIfAbsent(h, u); !added && slices.Equal(kept.list, list) {
		return kept
	}
	return u
}

// Kept tells that Directory.Union may still give this one.
func (u *Union) Kept() bool { return !u.gone.Load() }

func (d *Directory) newUnion(h uint64, list []string) *Union {
	u := &Union{ID: "\x00" + strconv.FormatUint(d.unions.last.Add(1), 36), Hash: h, dir: d, list: make([]string, len(list))}
	seen := make(map[string]struct{}, len(list))
	for i, room := range list {
		room = strings.Clone(room)
		u.list[i] = room
		if _, twice := seen[room]; twice {
			continue
		}
		seen[room] = struct{}{}
		u.rooms, u.shards = append(u.rooms, room), append(u.shards, d.cfg.Shard(room))
	}
	u.entries, u.snaps = make([]*entry, len(u.rooms)), make([]*Snapshot, len(u.rooms))
	u.weight.Store(int64(8 * len(list))) // a room is here and in its place of a list
	return u
}

// Rooms are the rooms of the union, each once, in the order of the list.
func (u *Union) Rooms() []string { return u.rooms }

// Keys are the hashes of the rooms, sorted. There is one hash.
func (u *Union) Keys(hash func(room string) uint64) []uint64 {
	u.keyed.Do(func() {
		u.keys = make([]uint64, len(u.rooms))
		for i, room := range u.rooms {
			u.keys[i] = hash(room)
		}
		slices.Sort(u.keys)
	})
	return u.keys
}

// Once tells the first caller, and nobody else, that nobody has asked for the union lately.
func (u *Union) Once() bool { return !u.again.Load() && !u.again.Swap(true) }

// Cached answers from memory alone, nil if it cannot, as Table.Cached does for each room.
func (u *Union) Cached(now time.Time) *Snapshot {
	u.mu.Lock()
	s, renew := u.cachedLocked(u.dir.nanos(now))
	u.mu.Unlock()
	for _, i := range renew {
		if e, ok := u.dir.Rooms.cache.GetIfPresent(u.rooms[i]); ok {
			u.dir.Rooms.renew(u.shards[i], u.rooms[i], e)
		}
	}
	return s
}

// cachedLocked is Cached, and tells at which places answers are soon too old.
func (u *Union) cachedLocked(at nanos) (s *Snapshot, renew []int) {
	if u.busy || u.base == nil {
		return nil, nil // who waits must not be overtaken; and what is made from the beginning is made in the pool
	}
	var changed []*Snapshot // answers, where some are other ones
	touch := at-u.touched > touchEvery
	// In this order, see fresh. What changes after the number was read is not looked past by the next query.
	watched := at < nanos(u.dir.watchedUntil.Load())
	generation, changes := u.dir.generation.Load(), u.dir.Rooms.changes.Load()
	if changes == u.changes && generation == u.generation && !touch && (watched && u.watched || at < u.freshUntil) && int64(at) < u.renewAt {
		u.dir.Rooms.lanes[u.shards[0]].hits.Add(1)
		return u.snap, nil
	}
	vouched, freshUntil, renewAt := true, nanos(never), int64(never)
	replaced := false
	for i, e := range u.entries {
		if e != nil && !touch && e.generation == generation && (watched && !e.fallback || at < e.freshUntil) &&
			!e.gone.Load() && !e.behind() && !e.due(at) && e.snap == u.snaps[i] {
			vouched, freshUntil, renewAt = vouched && !e.fallback, min(freshUntil, e.freshUntil), min(renewAt, e.renewAt.Load())
			continue
		}
		if e = u.dir.Rooms.current(u.shards[i], u.rooms[i], at); e == nil {
			return nil, renew
		}
		if e.due(at) {
			renew = append(renew, i)
		}
		replaced = replaced || e.gone.Load() // changes may have counted that, and the cache does not show the next one yet
		vouched, freshUntil, renewAt = vouched && !e.fallback, min(freshUntil, e.freshUntil), min(renewAt, e.renewAt.Load())
		u.entries[i] = e
		if e.snap != u.snaps[i] {
			if changed == nil {
				changed = slices.Clone(u.snaps)
			}
			changed[i] = e.snap
		}
	}
	if touch {
		u.touched = at
		u.dir.unions.cache.GetIfPresent(u.Hash) // it is used, too
	}
	if changed != nil {
		next := u.dir.joined(u.base, u.snaps, changed)
		if next == nil {
			return nil, renew
		}
		u.takeLocked(changed, next)
	}
	u.dir.Rooms.lanes[u.shards[0]].hits.Add(1)
	u.snap.published.CompareAndSwap(0, int64(u.dir.now())) // now that nobody finds another
	u.changes, u.generation, u.watched, u.freshUntil, u.renewAt = changes, generation, vouched, freshUntil, renewAt
	if replaced {
		u.generation = 0 // which none has: the next query looks at all again
	}
	return u.snap, renew
}

// takeLocked notes what the answers of all rooms come to.
func (u *Union) takeLocked(snaps []*Snapshot, base *Snapshot) {
	u.snaps, u.base, u.snap = snaps, base, asStale(base, snaps)
	u.generation = 0 // which none has: what was found was of others
	absent, held := 0, 0
	for _, s := range snaps {
		held += s.Users
		if !s.Found {
			absent++
		}
	}
	u.absent.Store(int32(absent))
	// The members of the rooms count, too: the union has them still when the cache of rooms has let go of them.
	weight, was := int64(8*len(u.list)+base.Users+held), u.weight.Load()
	if weight <= was+was/8 && weight >= was/2 {
		return
	}
	u.weight.Store(weight)
	if kept, ok := u.dir.unions.cache.GetIfPresent(u.Hash); ok && kept == u {
		u.dir.unions.cache.Set(u.Hash, u) // which weighs it
	}
}

// NotFound is how many of the rooms do not exist, as of the latest answer about all.
func (u *Union) NotFound() int { return int(u.absent.Load()) }

// asStale is s as the union of some answers: stale if one of them is.
func asStale(s *Snapshot, snaps []*Snapshot) *Snapshot {
	var known time.Time
	is, changed := false, false
	for _, room := range snaps {
		if room == nil || room.Stale == nil {
			continue
		}
		if !is || room.Stale.Known.Before(known) {
			known = room.Stale.Known
		}
		is, changed = true, changed || room.Stale.Changed
	}
	if !is {
		return s
	}
	return s.stale(known, changed)
}

// joined is base, which old come to, once they are snaps. It is nil if that is to be worked out from the beginning.
func (d *Directory) joined(base *Snapshot, old, snaps []*Snapshot) *Snapshot {
	if found := slices.ContainsFunc(snaps, func(s *Snapshot) bool { return s.Found }); found != base.Found || !found {
		return nil
	}
	var moves []Move
	left, memberships := 0, 0
	for i, s := range snaps {
		memberships += s.Users
		before, now := old[i].told(), s.told()
		if before == now {
			continue
		}
		if len(before.Unplaced)+len(now.Unplaced) > 0 {
			return nil
		}
		for _, g := range before.Groups {
			h := now.Group(g.Node)
			if h == g {
				continue
			}
			var users []string
			if h != nil {
				users = h.Users
			}
			gone, came := difference(g.Users, users)
			left += len(gone)
			for _, user := range gone {
				moves = append(moves, Move{User: user, Node: g.Node, Left: true})
			}
			for _, user := range came {
				moves = append(moves, Move{User: user, Node: g.Node})
			}
		}
		for _, h := range now.Groups {
			if before.Group(h.Node) == nil {
				for _, user := range h.Users {
					moves = append(moves, Move{User: user, Node: h.Node})
				}
			}
		}
	}
	// Whoever has left one room may still be in another: each room is asked. With many that costs more than
	// all from the beginning.
	if left*len(snaps) > memberships+movesMost || len(moves) > movesMost+base.Users/2 {
		return nil
	}
	moves = slices.DeleteFunc(moves, func(m Move) bool {
		return m.Left && slices.ContainsFunc(snaps, func(s *Snapshot) bool {
			g := s.Group(m.Node)
			return g != nil && g.Has(m.User)
		})
	})
	if len(moves) == 0 {
		return base
	}
	return d.moved(base, moves)
}

// difference lists who is in only one of two sorted lists.
func difference(old, now []string) (gone, came []string) {
	for len(old) > 0 || len(now) > 0 {
		switch {
		case len(now) == 0 || len(old) > 0 && old[0] < now[0]:
			gone, old = append(gone, old[0]), old[1:]
		case len(old) == 0 || now[0] < old[0]:
			came, now = append(came, now[0]), now[1:]
		default:
			old, now = old[1:], now[1:]
		}
	}
	return gone, came
}

// Unite makes the union of some answers, of which those that are nil are left out. Groups of old that are unchanged
// stay; it may be nil.
func (d *Directory) Unite(snaps []*Snapshot, old *Snapshot) *Snapshot {
	return asStale(d.unite(snaps, old, nil), snaps)
}

// unite is Unite, for nobody but some users if there are any.
func (d *Directory) unite(snaps []*Snapshot, old *Snapshot, only []string) *Snapshot {
	b, ok := d.builders.Get().(*builder)
	if !ok {
		b = newBuilder(d.seed, d.names)
	}
	found := false
	byNode := make(map[string][][]string)
	var nodes []string
	for _, s := range snaps {
		if s == nil {
			continue
		}
		found = found || s.Found
		for _, g := range s.Groups {
			lists, known := byNode[g.Node]
			if !known {
				nodes = append(nodes, g.Node)
			}
			byNode[g.Node] = append(lists, g.Users)
		}
		if len(s.Unplaced) > 0 {
			byNode[""] = append(byNode[""], s.Unplaced)
		}
	}
	if byNode[""] != nil {
		nodes = append(nodes, "")
	}
	seen := make(map[string]struct{})
	for _, node := range nodes {
		clear(seen)
		for _, list := range byNode[node] {
			for _, user := range list {
				if only != nil {
					if _, is := slices.BinarySearch(only, user); !is {
						continue
					}
				}
				n := len(seen)
				if seen[user] = struct{}{}; len(seen) > n {
					b.add([]byte(user), []byte(node))
				}
			}
		}
	}
	s := b.snapshot(found, old)
	if b.reset() {
		d.builders.Put(b)
	}
	return s
}

// PartialError is what a Waiter is told of a union of whose rooms some have no answer, with the snapshot of the others.
type PartialError struct {
	Rooms int // without an answer
	Err   error
}

func (e *PartialError) Error() string {
	return fmt.Sprintf("%d of the rooms could not be looked up: %v", e.Rooms, e.Err)
}
func (e *PartialError) Unwrap() error { return e.Err }

// Ask has w told about the union, with its ID as the key: as soon as there is an answer about each room, or an error. Who
// asks is told in the order of asking, before anybody finds in memory what they are told. The error may be a
// *PartialError: then there is a snapshot, too. It may be before Ask returns.
func (u *Union) Ask(now time.Time, w Waiter) {
	u.dir.Rooms.lanes[u.shards[0]].misses.Add(1)
	u.mu.Lock()
	u.line = append(u.line, queue{w, now})
	busy := u.busy
	u.busy = true
	u.mu.Unlock()
	if !busy {
		u.inPool(u.drain)
	}
}

// inPool runs a part of the work of whoever answers the line. A full pool does not keep it from going on.
func (u *Union) inPool(part func()) {
	if u.dir.cfg.Go(u.shards[0], part) != nil {
		part()
	}
}

// drain answers the line until nobody is in it.
func (u *Union) drain() {
	for {
		u.mu.Lock()
		told := u.line
		u.line = nil
		if len(told) == 0 {
			u.busy = false
			u.mu.Unlock()
			return
		}
		u.mu.Unlock()
		g := &gathering{u: u, told: told, snaps: make([]*Snapshot, len(u.rooms)), began: u.dir.now()}
		now := told[len(told)-1].now
		for i, room := range u.rooms {
			if s := u.dir.Rooms.Cached(u.shards[i], room, now); s != nil {
				g.snaps[i] = s
			} else {
				g.missing = append(g.missing, i)
			}
		}
		if len(g.missing) > 0 {
			g.ask = func(i int) { u.dir.Rooms.Ask(u.shards[i], u.rooms[i:i+1], now, &answer{g, i}) }
			g.end = func() { u.inPool(func() { g.tell(); u.drain() }) }
			if !g.pump() {
				return // the last answer goes on
			}
		}
		g.tell()
	}
}

// gathering is the answers about the rooms of a union, while they come.
type gathering struct {
	// Static.
	u       *Union
	told    []queue // by what comes of it
	missing []int   // places of rooms that have to be asked about
	ask     func(i int)
	end     func() // once there is an answer about all of them
	began   nanos

	mu sync.Mutex
	// Guarded by mu, until the end.
	snaps   []*Snapshot // by room
	failed  int
	err     error
	next    int // of missing
	open    int // asked, and not answered
	pumping bool
	ended   bool
}

// answer is the waiter for one room.
type answer struct {
	g *gathering
	i int
}

// Lookup implements Waiter: it is on behalf of the first who waits.
func (a *answer) Lookup(ctx context.Context, what string) (context.Context, func(error)) {
	return a.g.told[0].w.Lookup(ctx, what)
}

// Routed implements Waiter.
func (a *answer) Routed(_ []string, snaps []*Snapshot, err error) {
	g := a.g
	g.mu.Lock()
	g.open--
	if err != nil {
		g.failed++
		g.err = err
	} else {
		g.snaps[a.i] = snaps[0]
	}
	g.mu.Unlock()
	if g.pump() {
		g.end()
	}
}

// pump asks about so many rooms at a time. True means that all have been answered: one call says so, and that is the outermost one
// where answers come before ask returns.
func (g *gathering) pump() (ended bool) {
	g.mu.Lock()
	if g.pumping {
		g.mu.Unlock()
		return false
	}
	g.pumping = true
	for g.next < len(g.missing) && g.open < unionWindow {
		if g.u.dir.now()-g.began > nanos(unionTime) {
			g.failed += len(g.missing) - g.next
			g.next, g.err = len(g.missing), ErrUnavailable
			break
		}
		i := g.missing[g.next]
		g.next++
		g.open++
		g.mu.Unlock()
		g.ask(i)
		g.mu.Lock()
	}
	g.pumping = false
	ended = !g.ended && g.next == len(g.missing) && g.open == 0
	g.ended = g.ended || ended
	g.mu.Unlock()
	return ended
}

// tell works out the union and tells those who wait for it.
func (g *gathering) tell() {
	s, err := g.result()
	keys, snaps := []string{g.u.ID}, []*Snapshot{s}
	if s == nil {
		snaps = nil
	}
	for _, q := range g.told {
		q.w.Routed(keys, snaps, err)
	}
}

// result is what the answers come to. The union has it, too, if they are all there.
func (g *gathering) result() (s *Snapshot, err error) {
	u := g.u
	defer func() {
		if recover() != nil { // nobody is left waiting
			s, err = nil, errPanicked
		}
	}()
	switch {
	case g.failed == len(g.snaps):
		return nil, g.err
	case g.failed > 0:
		return u.dir.Unite(g.snaps, u.base), &PartialError{Rooms: g.failed, Err: g.err}
	}
	var base *Snapshot
	if u.base != nil {
		base = u.dir.joined(u.base, u.snaps, g.snaps)
	}
	if base == nil {
		base = u.dir.unite(g.snaps, u.base, nil)
	}
	u.mu.Lock()
	u.takeLocked(g.snaps, base)
	s = u.snap
	u.mu.Unlock()
	return s, nil
}

// Refresh has w told what the Controller says about some users that a node does not have, of whose rooms each that
// has one of them there is looked up again as Table.Refresh does. The snapshot has nobody but them. m.Users may be nil.
func (u *Union) Refresh(users []string, m Missing, w Waiter) {
	u.Cached(m.Since) // what is known already may say more
	u.mu.Lock()
	known := slices.Clone(u.snaps)
	u.mu.Unlock()
	g := &gathering{u: u, told: []queue{{w: w}}, snaps: known, began: u.dir.now()}
	there := make([][]string, len(u.rooms))
	for i, s := range known {
		if s == nil {
			g.missing = append(g.missing, i) // no answer yet: anybody may be there
			continue
		}
		group := s.Group(m.Node)
		if group == nil {
			continue
		}
		few, all := users, group.Users // both are sorted
		if len(few) > len(all) {
			few, all = all, few
		}
		for _, user := range few {
			if _, is := slices.BinarySearch(all, user); is {
				there[i] = append(there[i], user)
			}
		}
		if len(there[i]) > 0 {
			g.missing = append(g.missing, i)
		}
	}
	g.ask = func(i int) {
		about := Missing{Node: m.Node, Since: m.Since}
		if m.Users != nil {
			about.Users = there[i]
			if about.Users == nil {
				about.Users = []string{} // nobody, and not all
			}
		}
		u.dir.Rooms.Refresh(u.shards[i], u.rooms[i:i+1], about, &answer{g, i})
	}
	g.end = func() {
		if g.failed > 0 && g.failed == len(g.missing) {
			w.Routed([]string{u.ID}, nil, g.err)
			return
		}
		s := u.dir.unite(g.snaps, nil, users)
		// Where somebody is, is true; that somebody is nowhere only an answer about each room can tell.
		s.Doubted = g.failed > 0 || slices.ContainsFunc(g.snaps, func(s *Snapshot) bool { return s != nil && s.Doubted })
		w.Routed([]string{u.ID}, []*Snapshot{s}, nil)
	}
	if g.pump() {
		g.end()
	}
}
