package route

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"
)

// drainBatch is how many lines are drained at once: enough that a query for many
// users is not told one by one, few enough that the lock is held for a moment only.
const drainBatch = 512

var errPanicked = fmt.Errorf("%w: the look-up panicked", ErrUnavailable)

// entry is one answer in the cache.
type entry struct {
	// Immutable.
	snap       *Snapshot
	fetched    nanos  // when the look-up began, that of doubted if there is one
	known      nanos  // up to when it was true for certain, the change stream left aside
	freshUntil nanos  // zero: it has changed, or could not be looked up again
	generation uint64 // of the directory when the look-up began, 0 for none that is good
	fallback   bool   // serves while the source fails: no change stream vouches for it
	announced  bool   // it is known to have changed
	// Set once the cache has another entry in its place, or before it has none: a union holds it without asking the cache.
	gone atomic.Bool
	// What the Controller said in place of snap, and was not believed; nil for nothing.
	doubted *Snapshot

	// When the next hit has it looked up again, though it is still good; never for one
	// that a change stream vouches for, and once somebody has.
	renewAt atomic.Int64

	absent absent // guarded by the mu of the key's lane
	// Of a room's answer that has a revision, while it is good; nil for all others.
	backlog *backlog
}

const never = math.MaxInt64

// doubtFor is how long after a new connection to the Controller it may be that it has
// just started. An answer of that time that takes away a user, or more than half of a room,
// is not believed: the older one serves as a stale one, and the Controller is asked again
// when the time is over.
const doubtFor = 5 * time.Second

// Table is the cache of rooms or of users, and the lines in front of it. Its methods never
// block, and call a Waiter without a lock.
type Table struct {
	// Static after newTable.
	dir   *Directory
	name  string
	cache *otter.Cache[string, *entry]
	lanes []lane
	// Counts whatever may make an answer in the cache another one than it was, time and the generation left aside.
	changes atomic.Uint64
}

// lane is what one shard has of a Table.
type lane struct {
	mu sync.Mutex
	// Guarded by mu.
	lines   map[string]*line
	tickets uint64 // queries that have waited

	running                                                     atomic.Int64 // look-ups
	hits, misses, lookups, lookupErrors, staleServed, refreshes atomic.Uint64
	confirmed, doubted, moves                                   atomic.Uint64
	waiting                                                     atomic.Int64

	_ [64]byte // shards do not share a cache line
}

// line is whoever waits for one key, in order. Guarded by its lane's mu.
type line struct {
	waiters   []waiting
	next      []waiting // behind the waiters, for an answer newer than theirs
	old       *entry    // what was known before, for reuse and as a fallback
	looking   bool      // a look-up is under way; else somebody tells the waiters
	dirty     bool      // the key may have changed while it was looked up
	announced bool      // it has
	moves     []Move    // how it has changed while it is looked up; not known yet whether that helps
	before    int       // how many of waiters came before the first of moves
	// The latest result, once there is one: both if a stale answer serves because
	// of an error.
	entry *entry
	err   error
	at    nanos // when it came
}

// waiting is one place in a line.
type waiting struct {
	w      Waiter
	ticket uint64 // of the query, which has the same in all lines it waits in
	since  nanos  // of a refresh: an answer from before does not serve
}

func newTable(d *Directory, name string, weight int) (*Table, error) {
	t := &Table{dir: d, name: name, lanes: make([]lane, d.cfg.Shards)}
	cache, err := otter.New(&otter.Options[string, *entry]{
		MaximumWeight: uint64(weight),
		Weigher:       func(_ string, e *entry) uint32 { return uint32(min(max(e.snap.Users, 1), 1<<30)) },
		OnAtomicDeletion: func(e otter.DeletionEvent[string, *entry]) {
			if e.Cause != otter.CauseReplacement { // see put
				e.Value.gone.Store(true) // changes are noted in what the cache has
				t.changes.Add(1)
			}
		},
	})
	if err != nil {
		return nil, fmt.Errorf("make %s cache: %w", name, err)
	}
	t.cache = cache
	for i := range t.lanes {
		t.lanes[i].lines = make(map[string]*line)
	}
	return t, nil
}

// Cached answers from memory alone, nil if it cannot. The first hit on an answer that is
// soon too old has it looked up, and is answered all the same. Now decides what is fresh.
func (t *Table) Cached(shard int, key string, now time.Time) *Snapshot {
	at := nanos(now.Sub(t.dir.epoch))
	e := t.current(shard, key, at)
	if e == nil {
		return nil
	}
	if e.due(at) {
		t.renew(shard, key, e)
	}
	t.lanes[shard].hits.Add(1)
	return e.snap
}

// put has the cache give e for key. A union that has looked before looks again: the number of changes comes last.
func (t *Table) put(key string, e *entry) {
	e.gone.Store(false) // it serves again, perhaps
	if old, added := t.cache.Set(key, e); !added && old != e {
		old.gone.Store(true)
	}
	t.changes.Add(1)
}

// serves tells whether e, which the cache has given, is still what it gives, good, and up to date.
func (t *Table) serves(e *entry, at nanos) bool {
	return !e.gone.Load() && t.fresh(e, at) && !e.behind()
}

// current is the entry that serves at a moment, nil for none.
func (t *Table) current(shard int, key string, at nanos) *entry {
	e, ok := t.cache.GetIfPresent(key)
	if !ok || !t.fresh(e, at) || e.gone.Load() {
		return nil
	}
	if e.behind() {
		ln := &t.lanes[shard]
		ln.mu.Lock()
		e, ok = t.currentLocked(ln, key)
		ok = ok && t.fresh(e, at)
		ln.mu.Unlock()
		if !ok {
			return nil
		}
	}
	return e
}

// due tells whether e is to be looked up again, though it is still good.
func (e *entry) due(at nanos) bool { return int64(at) >= e.renewAt.Load() }

// renew has e looked up again, once.
func (t *Table) renew(shard int, key string, e *entry) {
	if due := e.renewAt.Load(); due != never && e.renewAt.CompareAndSwap(due, never) {
		t.ask(shard, []string{key}, waiting{w: nobody{}}, func(string, *line) *entry { return nil })
	}
}

func (t *Table) fresh(e *entry, now nanos) bool {
	// Read before the generation, which is written before: a new stream's word is not
	// taken for an old answer.
	watchedUntil := now < nanos(t.dir.watchedUntil.Load())
	if e.generation != t.dir.generation.Load() {
		return false
	}
	return watchedUntil && !e.fallback || now < e.freshUntil
}

// after tells whether e is what the Controller said after since, as far as is known.
func (e *entry) after(since nanos) bool {
	return e.fetched > since && e.freshUntil != 0
}

// answer is what e has for w. Who refreshes is told what the Controller has said since,
// though it is doubted.
func (e *entry) answer(w waiting) *Snapshot {
	if w.since != 0 && e.doubted != nil {
		return e.doubted
	}
	return e.snap
}

// Ask has w told about keys, all of one shard and none twice: at once what is fresh after
// all, the rest by the line of its key. Keys without a line share one look-up, and of them w
// is told together. All of it may be before Ask returns.
func (t *Table) Ask(shard int, keys []string, now time.Time, w Waiter) {
	t.lanes[shard].misses.Add(uint64(len(keys)))
	t.ask(shard, keys, waiting{w: w}, func(key string, l *line) *entry {
		e, ok := t.currentLocked(&t.lanes[shard], key)
		if l == nil && ok && t.fresh(e, t.dir.nanos(now)) {
			return e
		}
		if ok && e.generation != 0 {
			// It may be good again with the next mark of the change stream, or have become visible
			// just now. Who finds it there while w waits would overtake.
			t.put(key, t.changed(e, e.announced))
		}
		return nil
	})
}

// Refresh has w told what the Controller says about keys, with a new look-up unless there
// has been one since the node said what m says, or one is under way, or the Controller has
// stayed with its answer within the last TTL although the node had said the same before. A
// stale answer does not serve: then w is told the error, or what the Controller has said
// though it is doubted (Snapshot.Doubted).
func (t *Table) Refresh(shard int, keys []string, m Missing, w Waiter) {
	ln, since, generation := &t.lanes[shard], t.dir.nanos(m.Since), t.dir.generation.Load()
	looked := t.ask(shard, keys, waiting{w: w, since: since}, func(key string, l *line) *entry {
		e, _ := t.currentLocked(ln, key)
		told := l != nil && !l.looking && !l.dirty && l.entry != nil
		switch {
		case told:
			e = l.entry // good for who refreshes already, though newcomers do not find it yet
		case l != nil:
			e = l.old
		}
		if e == nil {
			return nil
		}
		users := m.Users
		if t == t.dir.Users {
			users = []string{key}
		}
		confirmed := e.note(m.Node, users, since, nanos(t.dir.cfg.TTL))
		switch {
		case l != nil && !told:
			return nil
		case e.generation == generation && e.after(since):
			return e
		case confirmed && t.fresh(e, since):
			ln.confirmed.Add(1)
			return e
		default:
			return nil
		}
	})
	ln.refreshes.Add(uint64(looked))
}

// ask puts me into the line of each key, opening those that do not exist. It returns how
// many keys it had looked up. known, which is called under the lock with the key's line or
// nil, may have an answer: me is told it at once, or by the line if there is one, whose
// answer it is then.
func (t *Table) ask(shard int, keys []string, me waiting, known func(key string, l *line) *entry) int {
	ln := &t.lanes[shard]
	var lookup, now []string
	var snaps []*Snapshot
	ln.mu.Lock()
	ln.tickets++
	me.ticket = ln.tickets
	for _, key := range keys {
		l := ln.lines[key]
		e := known(key, l)
		if e != nil && l == nil {
			now, snaps = append(now, key), append(snaps, e.answer(me))
			continue
		}
		ln.waiting.Add(1)
		if l == nil {
			key = strings.Clone(key) // it outlives the request that it was cut from
			l = &line{looking: true}
			l.old, _ = t.currentLocked(ln, key)
			ln.lines[key] = l
			lookup = append(lookup, key)
		} else if e == nil && !l.looking {
			// Where so many ask that the line is not told to its end, what is told gets too old
			// for everybody.
			now, from := t.dir.now(), l.at
			if l.entry != nil {
				from = l.entry.fetched
			}
			l.dirty = l.dirty || now-from > nanos(t.dir.cfg.TTL) && (l.entry == nil || !t.fresh(l.entry, now))
		}
		// Behind a change me waits for an answer from after it; so does who asks again, if
		// what is being told is too old for it.
		if e == nil && (l.dirty || !l.looking && me.since != 0 && !(l.entry != nil && l.entry.after(me.since))) {
			l.next = append(l.next, me)
		} else {
			l.waiters = append(l.waiters, me)
		}
	}
	ln.mu.Unlock()
	if len(now) > 0 {
		me.w.Routed(now, snaps, nil)
	}
	if len(lookup) > 0 {
		t.submit(shard, me.w, lookup)
	}
	return len(lookup)
}

// nobody waits for what is looked up ahead of time.
type nobody struct{}

func (nobody) Lookup(ctx context.Context, _ string) (context.Context, func(error)) {
	return ctx, func(error) {}
}
func (nobody) Routed([]string, []*Snapshot, error) {}

// submit runs the look-up of keys, whose lines are open, in the pool of the shard.
func (t *Table) submit(shard int, w Waiter, keys []string) {
	for len(keys) > 0 {
		err := t.dir.cfg.Go(shard, func() { t.lookup(shard, w, keys) })
		if err == nil {
			return
		}
		err = errors.Join(ErrOverloaded, err)
		w, keys = t.settle(shard, keys, func(l *line, _ int) (*entry, error) {
			t.applyLocked(l, nil, 0)
			return t.fallback(&t.lanes[shard], l, err), err
		})
	}
}

// lookup asks the source for keys and tells everybody in their lines. Whoever waits for a newer answer gets it in the same place of the
// pool: in a full one there is no other.
func (t *Table) lookup(shard int, w Waiter, keys []string) {
	for len(keys) > 0 {
		w, keys = t.lookupOnce(shard, w, keys)
	}
}

// lookupOnce returns which keys have to be looked up again, and for whom first.
func (t *Table) lookupOnce(shard int, w Waiter, keys []string) (first Waiter, again []string) {
	ln := &t.lanes[shard]
	timeout := t.dir.timeout(ln.running.Add(1))
	began, generation := t.dir.now(), t.dir.generation.Load()
	olds, snaps := make([]*Snapshot, len(keys)), make([]*Snapshot, len(keys))
	ln.mu.Lock()
	for i, key := range keys {
		if old := ln.lines[key].old; old != nil {
			olds[i] = old.snap.told()
		}
	}
	ln.mu.Unlock()
	var revision uint64
	err := errPanicked
	defer func() {
		// Runs on a panic of the source, too: nobody is left waiting.
		ln.running.Add(-1)
		panicked := errors.Is(err, errPanicked)
		if err != nil {
			ln.lookupErrors.Add(1)
		}
		first, again = t.settle(shard, keys, func(l *line, i int) (*entry, error) {
			if err != nil {
				t.applyLocked(l, nil, 0)
				return t.fallback(ln, l, err), err
			}
			s, ok := t.applyLocked(l, snaps[i], revision)
			e := t.newEntry(ln, l, s, began, generation)
			if ok && revision != 0 && e.generation != 0 && !e.fallback {
				e.backlog = &backlog{revision: revision}
			}
			return e, nil
		})
		if panicked && len(again) > 0 { // which ends this task
			t.submit(shard, first, again)
		}
	}()
	ln.lookups.Add(1)
	revision, err = t.dir.lookup(t, w, timeout, keys, olds, snaps)
	return first, again
}

// newEntry decides how long an answer of the Controller is good. Called under the lock.
func (t *Table) newEntry(ln *lane, l *line, s *Snapshot, began nanos, generation uint64) *entry {
	// A Controller that has just started may not know all yet.
	if d, old := t.dir, l.old; d.renewed != nil && old != nil && old.snap.Found && (!s.Found || 2*s.placed() < old.snap.placed()) {
		now, until := d.now(), d.nanos(d.renewed().Add(doubtFor))
		if now < until && now-d.validUntil(old, now) <= nanos(d.cfg.StaleTTL) {
			ln.doubted.Add(1)
			e := t.stale(old, old.announced || l.announced || old.behind(), until)
			s.Doubted = true // nobody else has it yet
			e.fetched, e.doubted = began, s
			return e
		}
	}
	ttl := nanos(t.dir.cfg.TTL)
	e := &entry{snap: s, fetched: began, known: began, freshUntil: began + ttl, generation: generation}
	e.renewAt.Store(never)
	switch {
	case l.dirty || generation != t.dir.generation.Load():
		e.freshUntil, e.generation, e.announced = began, 0, l.announced
	case !s.Found || began < nanos(t.dir.watchedUntil.Load()):
		// Absence is not cached, see package doc. And what is vouched for is good as long as
		// that holds: whoever tells of a change does not wait for us once it does not.
		e.freshUntil = began
	default:
		// Keys that came together do not stay together.
		e.renewAt.Store(int64(began + ttl*3/4 + rand.N(ttl/8+1)))
	}
	if l.old != nil && !l.old.announced {
		e.absent = l.old.absent
		if old := l.old.snap.told(); s != old {
			e.absent.keep(s, old)
		}
	}
	return e
}

// fallback is what serves after a look-up that failed, nil for nothing: the old answer
// while it is good, and as a stale one for another TTL. What is known to have changed
// serves only while the Controller is away. Called under the lock.
func (t *Table) fallback(ln *lane, l *line, err error) *entry {
	old, now := l.old, t.dir.now()
	if old == nil || !old.snap.Found {
		return nil
	}
	announced := old.announced || l.announced || old.behind()
	switch {
	case !l.dirty && !old.behind() && t.fresh(old, now):
		return old
	case announced && !errors.Is(err, ErrAway):
		return nil
	case now-t.dir.validUntil(old, now) > nanos(t.dir.cfg.StaleTTL):
		return nil
	}
	ln.staleServed.Add(1)
	return t.stale(old, announced, now+nanos(t.dir.cfg.TTL))
}

// stale makes an entry of an old answer that serves until then, and says that it is
// stale.
func (t *Table) stale(old *entry, announced bool, until nanos) *entry {
	known := t.dir.validUntil(old, t.dir.now())
	e := &entry{
		snap:    old.snap.told().stale(t.dir.epoch.Add(time.Duration(known)), announced),
		fetched: old.fetched, known: known, freshUntil: until, fallback: true, generation: t.dir.generation.Load(),
		announced: announced, doubted: old.doubted, absent: old.absent,
	}
	e.renewAt.Store(never)
	return e
}

// settle gives the line of each key its result, and tells the waiters in the order of asking:
// first those of now, whoever asked for all of keys about all at once, and then those who
// have come since. It returns which keys have to be looked up again, and for whom first.
func (t *Table) settle(shard int, keys []string, result func(l *line, i int) (*entry, error)) (first Waiter, again []string) {
	ln := &t.lanes[shard]
	ln.mu.Lock()
	for i, key := range keys {
		l := ln.lines[key]
		l.entry, l.err = result(l, i)
		l.looking, l.at = false, t.dir.now()
	}
	batch := t.takeLocked(ln, keys)
	ln.mu.Unlock()
	tell(batch)
	for some := range slices.Chunk(keys, drainBatch) {
		w, more := t.drain(shard, some)
		if first == nil {
			first = w
		}
		again = append(again, more...)
	}
	return first, again
}

// drain tells the waiters of lines that have a result until the lines are empty; then the
// results become visible and the lines go, but for those of keys that have to be looked up again.
func (t *Table) drain(shard int, keys []string) (first Waiter, again []string) {
	ln := &t.lanes[shard]
	ln.mu.Lock()
	for batch := t.takeLocked(ln, keys); len(batch) > 0; batch = t.takeLocked(ln, keys) {
		ln.mu.Unlock()
		tell(batch)
		ln.mu.Lock()
	}
	for _, key := range keys {
		l := ln.lines[key]
		if len(l.next) == 0 {
			t.publishLocked(key, l)
			delete(ln.lines, key)
			continue
		}
		if !l.dirty {
			t.publishLocked(key, l) // who waits behind it refreshes, and is not overtaken
		}
		if l.entry != nil {
			l.old = l.entry
		}
		if l.dirty && l.old != nil {
			l.old = t.changed(l.old, l.old.announced || l.announced) // no good, should the next look-up fail
		}
		first, again = l.next[0].w, append(again, key)
		l.waiters, l.next = l.next, nil
		l.looking, l.dirty, l.announced, l.moves = true, false, false, nil
	}
	ln.mu.Unlock()
	return first, again
}

// publishLocked makes the line's result visible.
func (t *Table) publishLocked(key string, l *line) {
	e := l.entry
	if e == nil {
		e = l.old // of a look-up that failed: kept for the next one
	}
	if e == nil {
		return
	}
	if l.dirty || l.entry == nil {
		e = t.changed(e, e.announced || l.announced)
	}
	t.put(key, e)
	e.snap.published.CompareAndSwap(0, int64(t.dir.now())) // now that nobody finds another
}

// changed is e once it is not to be trusted any more. It serves as a fallback and for
// the comparison with the next answer.
func (t *Table) changed(e *entry, announced bool) *entry {
	gone := &entry{
		snap: e.snap, fetched: e.fetched, known: t.dir.validUntil(e, t.dir.now()),
		announced: announced || e.behind(), doubted: e.doubted, absent: e.absent,
	}
	gone.renewAt.Store(never)
	return gone
}

// place is a waiter that is told about one key.
type place struct {
	waiting
	key  string
	line *line
}

// takeLocked takes the waiters of lines, in the order of asking, to be told. What was the
// answer before goes out of sight: whoever has been told may ask again at once, and must not
// get that. Newcomers wait in line.
func (t *Table) takeLocked(ln *lane, keys []string) []place {
	var batch []place
	for _, key := range keys {
		l := ln.lines[key]
		if len(l.waiters) == 0 {
			continue
		}
		if e, ok := t.cache.GetIfPresent(key); ok && e != l.entry && e.generation != 0 {
			t.put(key, t.changed(e, e.announced))
		}
		for _, w := range l.waiters {
			batch = append(batch, place{w, key, l})
		}
		l.waiters = nil
	}
	if len(keys) > 1 {
		slices.SortStableFunc(batch, func(a, b place) int { return cmp.Compare(a.ticket, b.ticket) })
	}
	ln.waiting.Add(-int64(len(batch)))
	return batch
}

// tell brings waiters the results of their lines, all of one query together. Only who has
// taken them calls it, and the results do not change meanwhile.
func tell(batch []place) {
	for len(batch) > 0 {
		var told, failed []string
		var snaps []*Snapshot
		var err error
		n := 0
		for ; n < len(batch) && batch[n].ticket == batch[0].ticket; n++ {
			p, e := batch[n], batch[n].line.entry
			if e == nil || p.line.err != nil && p.since != 0 && e.fetched <= p.since {
				failed, err = append(failed, p.key), p.line.err
				continue
			}
			told, snaps = append(told, p.key), append(snaps, e.answer(p.waiting))
		}
		w := batch[0].w
		batch = batch[n:]
		if len(told) > 0 {
			w.Routed(told, snaps, nil)
		}
		if len(failed) > 0 {
			w.Routed(failed, nil, err)
		}
	}
}

// invalidate forgets the answer for key, which has changed.
func (t *Table) invalidate(key string) {
	ln := &t.lanes[t.dir.cfg.Shard(key)]
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if l := ln.lines[key]; l != nil {
		l.dirty, l.announced = true, true
	}
	if e, ok := t.cache.GetIfPresent(key); ok {
		t.put(key, t.changed(e, true))
	}
}

// invalidateAll makes whoever comes behind a look-up under way wait for a newer answer.
// What is in the cache is of an old generation.
func (t *Table) invalidateAll() {
	for i := range t.lanes {
		ln := &t.lanes[i]
		ln.mu.Lock()
		for _, l := range ln.lines {
			if len(l.moves) > 0 { // of another store, perhaps: they are not for this answer
				l.behind()
				l.moves, l.announced = nil, true
			}
			l.dirty = true
		}
		ln.mu.Unlock()
	}
}

// Known tells up to when the cached answer for key was true for certain, and whether a change stream vouches for it. The zero time: there
// is none.
func (t *Table) Known(key string) (at time.Time, watched bool) {
	e, ok := t.cache.GetIfPresent(key)
	if !ok {
		return time.Time{}, false
	}
	now := t.dir.now()
	watched = !e.fallback && e.generation == t.dir.generation.Load() && now < nanos(t.dir.watchedUntil.Load())
	return t.dir.epoch.Add(time.Duration(t.dir.validUntil(e, now))), watched
}
