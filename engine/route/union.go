package route

import (
	"context"
	"fmt"
	"hash/maphash"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"
	"golang.org/x/sync/semaphore"
)

const (
	// unionTime is how long a union begins look-ups for those who wait for it, and then waits for its turn to be made.
	unionTime = 2 * time.Second
	// touchEvery is how often a union that is used asks the cache of rooms about all of them, so that it keeps them.
	touchEvery = nanos(time.Second)
)

// unions are those that were asked for lately, and what all of them share. A list that is asked for once takes nobody's place for
// long: the cache keeps what is asked for often.
type unions struct {
	cache   *otter.Cache[uint64, *Union] // by hash of the list
	last    atomic.Uint64                // the number of the latest one
	working sync.WaitGroup               // goroutines

	// Whatever unions are asked for, others have three of four places of each pool, and half of the cores.
	lookups *semaphore.Weighted // of rooms, for all unions together
	makers  *semaphore.Weighted // who make a union from all members of its rooms
}

func newUnions(c *Config) (*unions, error) {
	cache, err := otter.New(&otter.Options[uint64, *Union]{
		MaximumWeight: uint64(max(c.MaxMembers, 1)),
		Weigher:       func(_ uint64, u *Union) uint32 { return uint32(min(u.weight.Load(), 1<<30)) },
	})
	if err != nil {
		return nil, fmt.Errorf("make the cache of unions: %w", err)
	}
	return &unions{
		cache:   cache,
		lookups: semaphore.NewWeighted(int64(max(c.Places/4, 1))), makers: semaphore.NewWeighted(int64(max(runtime.GOMAXPROCS(0)/2, 1))),
	}, nil
}

// Union is the members of several rooms, each once, as one snapshot.
//
// It has the answers about its rooms as they were at the last query, and what they come to. A query looks which of the rooms
// have another answer in memory by now, and joins in what that changes (Cached). If one has none, the query waits in the union's line:
// a goroutine, which is there as long as somebody waits, has the rooms looked up by their own lines, and tells all who
// wait in the order of asking (Ask). Nobody finds an answer in memory meanwhile, so nobody overtakes.
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

	// Safe for concurrent use.
	weight atomic.Int64
	absent atomic.Int32 // rooms that do not exist
	again  atomic.Bool  // it was asked for more than once
	keyed  sync.Once
	keys   []uint64

	mu sync.Mutex
	// Guarded by mu.
	busy bool    // there is a goroutine
	line []queue // who waits, in order
	// Likewise, and while there is a goroutine that alone changes it.
	entries []*entry    // by room, of the cache; nil where that has not been asked
	snaps   []*Snapshot // by room, the answers that have come in; nil before the first
	base    *Snapshot   // what they come to
	snap    *Snapshot   // base, or that as a stale one
	touched nanos       // when the cache was last asked about all rooms
	good    goodWhile
}

// queue is one place in the line of a union.
type queue struct {
	w   Waiter
	now time.Time
}

// goodWhile is how long a query need look at nothing else.
type goodWhile struct {
	changes, generation uint64 // these are the table's and the directory's
	until               nanos
	vouched             bool  // and a change stream vouches for all rooms,
	freshUntil          nanos // or else until then
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
	if kept, added := d.unions.cache.SetIfAbsent(h, u); !added && slices.Equal(kept.list, list) {
		return kept
	}
	return u
}

// Kept tells that Directory.Union still gives this one. Like that it counts as a use.
func (u *Union) Kept() bool {
	kept, ok := u.dir.unions.cache.GetIfPresent(u.Hash)
	return ok && kept == u
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

// NotFound is how many of the rooms do not exist, as of the latest answer about all.
func (u *Union) NotFound() int { return int(u.absent.Load()) }

// Cached answers from memory alone, nil if it cannot, as Table.Cached does for each room.
func (u *Union) Cached(now time.Time) *Snapshot {
	u.mu.Lock()
	s, due := u.cachedLocked(u.dir.nanos(now))
	u.mu.Unlock()
	for _, renew := range due {
		renew()
	}
	return s
}

// cachedLocked is Cached; due has answers looked up again that are soon too old.
func (u *Union) cachedLocked(at nanos) (s *Snapshot, due []func()) {
	if u.busy || u.base == nil {
		return nil, nil
	}
	t := u.dir.Rooms
	// In this order, see fresh. A change that comes after its number was read is not looked past by the next query.
	watched := at < nanos(u.dir.watchedUntil.Load())
	good := goodWhile{generation: u.dir.generation.Load(), changes: t.changes.Load(), vouched: true, freshUntil: never}
	if g := &u.good; good.changes == g.changes && good.generation == g.generation && at < g.until && (watched && g.vouched || at < g.freshUntil) {
		u.lane().hits.Add(1)
		return u.snap, nil
	}
	touch := at-u.touched > touchEvery
	if touch {
		u.touched = at
	}
	good.until = u.touched + touchEvery
	snaps := u.snaps
	renew := func(i int, e *entry) func() { return func() { t.renew(u.shards[i], u.rooms[i], e) } }
	for i, e := range u.entries {
		if touch || e == nil || !t.serves(e, at) {
			if e = t.current(u.shards[i], u.rooms[i], at); e == nil {
				return nil, nil
			}
			u.entries[i] = e
		}
		if e.due(at) {
			due = append(due, renew(i, e))
		}
		good.vouched = good.vouched && !e.fallback
		good.freshUntil, good.until = min(good.freshUntil, e.freshUntil), min(good.until, nanos(e.renewAt.Load()))
		if e.snap == snaps[i] {
			continue
		}
		if &snaps[0] == &u.snaps[0] {
			snaps = slices.Clone(snaps)
		}
		snaps[i] = e.snap
	}
	if &snaps[0] != &u.snaps[0] {
		base := u.dir.joined(u.base, u.snaps, snaps)
		if base == nil {
			return nil, due // what is made from the beginning is made by the goroutine
		}
		u.takeLocked(snaps, base)
	}
	u.lane().hits.Add(1)
	u.snap.published.CompareAndSwap(0, int64(u.dir.now())) // now that nobody finds another
	u.good = good
	return u.snap, due
}

// takeLocked takes in the answers of all rooms and what they come to.
func (u *Union) takeLocked(snaps []*Snapshot, base *Snapshot) {
	u.snaps, u.base, u.snap, u.good = snaps, base, asStale(base, snaps), goodWhile{}
	absent, members := 0, base.Users
	for _, s := range snaps {
		members += s.Users // which it keeps, though the cache of rooms may have let go of them
		if !s.Found {
			absent++
		}
	}
	u.absent.Store(int32(absent))
	if weight := int64(8*len(u.list) + members); u.weight.Swap(weight) != weight {
		u.dir.unions.cache.ComputeIfPresent(u.Hash, func(kept *Union) (*Union, otter.ComputeOp) {
			if kept != u {
				return kept, otter.CancelOp
			}
			return u, otter.WriteOp // which weighs it
		})
	}
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
// *PartialError: then there is a snapshot, too.
func (u *Union) Ask(now time.Time, w Waiter) {
	u.lane().misses.Add(1)
	u.lane().waiting.Add(1)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.line = append(u.line, queue{w, now})
	if !u.busy {
		u.busy = true
		u.dir.unions.working.Go(u.answer)
	}
}

// answer answers the line until nobody is in it.
func (u *Union) answer() {
	for {
		u.mu.Lock()
		told := u.line
		if u.line = nil; len(told) == 0 {
			u.busy = false
			u.mu.Unlock()
			return
		}
		u.mu.Unlock()
		s, err := u.ask(told[len(told)-1].now, told[0].w)
		u.lane().waiting.Add(-int64(len(told)))
		for _, q := range told {
			u.tell(q.w, s, err)
		}
	}
}

func (u *Union) tell(w Waiter, s *Snapshot, err error) {
	snaps := []*Snapshot{s}
	if s == nil {
		snaps = nil
	}
	w.Routed([]string{u.ID}, snaps, err)
}

// ask is what the answers about all rooms come to, which the union takes in.
func (u *Union) ask(now time.Time, w Waiter) (s *Snapshot, err error) {
	defer mend(&s, &err)
	t, snaps := u.dir.Rooms, make([]*Snapshot, len(u.rooms))
	var missing []int
	for i, room := range u.rooms {
		if snaps[i] = t.Cached(u.shards[i], room, now); snaps[i] == nil {
			missing = append(missing, i)
		}
	}
	failed, lookup := u.gather(w, snaps, missing, func(i int, w Waiter) { t.Ask(u.shards[i], u.rooms[i:i+1], now, w) })
	if failed == len(snaps) {
		return nil, lookup
	}
	var base *Snapshot
	if u.base != nil && failed == 0 {
		base = u.dir.joined(u.base, u.snaps, snaps)
	}
	if base == nil {
		if base, err = u.dir.uniteInTurn(context.Background(), snaps, u.base, nil); err != nil {
			return nil, err
		}
	}
	if failed > 0 {
		return asStale(base, snaps), &PartialError{Rooms: failed, Err: lookup}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.takeLocked(snaps, base)
	return u.snap, nil
}

// Refresh has w told what the Controller says about some users that a node does not have, of whose rooms each that
// has one of them there is looked up again as Table.Refresh does. The snapshot has nobody but them. m.Users may be nil.
func (u *Union) Refresh(users []string, m Missing, w Waiter) {
	u.dir.unions.working.Go(func() {
		s, err := u.refresh(users, m, w)
		u.tell(w, s, err)
	})
}

func (u *Union) refresh(users []string, m Missing, w Waiter) (s *Snapshot, err error) {
	defer mend(&s, &err)
	u.Cached(m.Since) // what is known already may say more
	u.mu.Lock()
	snaps := slices.Clone(u.snaps)
	u.mu.Unlock()
	there := make([][]string, len(u.rooms))
	var missing []int
	for i, s := range snaps {
		if there[i] = []string{}; s != nil { // else nobody, and not all: of a room without an answer nobody is known
			there[i] = Intersect(users, s.Group(m.Node).members())
		}
		if s == nil || len(there[i]) > 0 {
			missing = append(missing, i)
		}
	}
	failed, lookup := u.gather(w, snaps, missing, func(i int, w Waiter) {
		about := m
		if m.Users != nil {
			about.Users = there[i]
		}
		u.dir.Rooms.Refresh(u.shards[i], u.rooms[i:i+1], about, w)
	})
	if failed > 0 && failed == len(missing) {
		return nil, lookup
	}
	if s, err = u.dir.uniteInTurn(context.Background(), snaps, nil, users); err != nil {
		return nil, err
	}
	// Where somebody is, is true; that somebody is nowhere only an answer about each room can tell.
	s.Doubted = failed > 0 || slices.ContainsFunc(snaps, func(s *Snapshot) bool { return s != nil && s.Doubted })
	return s, nil
}

// gather has ask called for some of the rooms, and waits for what they are told, which it puts into snaps. It returns how many have
// failed, and how one of them.
func (u *Union) gather(w Waiter, snaps []*Snapshot, rooms []int, ask func(i int, w Waiter)) (failed int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), unionTime)
	defer cancel()
	lookups := u.dir.unions.lookups
	var mu sync.Mutex
	var open sync.WaitGroup
	for n, i := range rooms {
		if lookups.Acquire(ctx, 1) != nil {
			mu.Lock()
			failed, err = failed+len(rooms)-n, ErrUnavailable
			mu.Unlock()
			break
		}
		open.Add(1)
		ask(i, roomWaiter{w, func(told []*Snapshot, why error) {
			mu.Lock()
			if why != nil {
				failed, err = failed+1, why
			} else {
				snaps[i] = told[0]
			}
			mu.Unlock()
			lookups.Release(1)
			open.Done()
		}})
	}
	open.Wait()
	return failed, err
}

// roomWaiter waits for one room on behalf of who waits for a union.
type roomWaiter struct {
	Waiter

	told func(snaps []*Snapshot, err error)
}

func (w roomWaiter) Routed(_ []string, snaps []*Snapshot, err error) { w.told(snaps, err) }

// Unite is what some answers come to, of which those that are nil are left out. It waits for its turn, until ctx ends at most.
func (d *Directory) Unite(ctx context.Context, snaps []*Snapshot) (*Snapshot, error) {
	s, err := d.uniteInTurn(ctx, snaps, nil, nil)
	if err != nil {
		return nil, err
	}
	return asStale(s, snaps), nil
}

// uniteInTurn is unite when it is its turn.
func (d *Directory) uniteInTurn(ctx context.Context, snaps []*Snapshot, old *Snapshot, only []string) (*Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, unionTime)
	defer cancel()
	if err := d.unions.makers.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("%w: too many lists of rooms at a time: %w", ErrOverloaded, err)
	}
	defer d.unions.makers.Release(1)
	return d.unite(snaps, old, only), nil
}

// mend is deferred where somebody waits: a panic is an error for them.
func mend(s **Snapshot, err *error) {
	if recover() != nil {
		*s, *err = nil, errPanicked
	}
}

// lane is where the queries are counted.
func (u *Union) lane() *lane { return &u.dir.Rooms.lanes[u.shards[0]] }
