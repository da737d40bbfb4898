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

// together is how many lines are drained at once: enough that a query for many
// users is not told one by one, few enough that the lock is held for a moment only.
const together = 512

var errPanicked = fmt.Errorf("%w: the look-up panicked", ErrUnavailable)

// entry is one answer in the cache.
type entry struct {
	// Immutable.
	snap       *Snapshot
	fetched    moment // when the look-up began, that of doubted if there is one
	known      moment // up to when it was true for certain, the change stream left aside
	freshUntil moment // zero: it has changed, or could not be looked up again
	generation uint64 // of the directory when the look-up began, 0 for none that is good
	fallback   bool   // serves while the source fails: no change stream vouches for it
	announced  bool   // it is known to have changed
	// What the Controller said in place of snap, and was not believed; nil for nothing.
	doubted *Snapshot

	// When the next hit has it looked up again, though it is still good; never for one
	// that a change stream vouches for, and once somebody has.
	renewAt atomic.Int64

	absent absent // guarded by the mu of the key's home
}

const never = math.MaxInt64

// table is the cache of rooms or of users, and the lines in front of it.
type table struct {
	// Static after newTable.
	dir   *Directory
	name  string
	cache *otter.Cache[string, *entry]
	homes []home
}

// home is what one shard has of a table.
type home struct {
	mu sync.Mutex
	// Guarded by mu.
	lines map[string]*line
	turns uint64 // queries that have waited

	running                                                     atomic.Int64 // look-ups
	hits, misses, lookups, lookupErrors, staleServed, refreshes atomic.Uint64
	confirmed, doubted                                          atomic.Uint64
	waiting                                                     atomic.Int64

	_ [64]byte // shards do not share a cache line
}

// line is whoever waits for one key, in order. Guarded by its home's mu.
type line struct {
	waiters   []waiting
	next      []waiting // behind the waiters, for an answer newer than theirs
	old       *entry    // what was known before, for reuse and as a fallback
	looking   bool      // a look-up is under way; else somebody tells the waiters
	dirty     bool      // the key may have changed while it was looked up
	announced bool      // it has
	// The latest result, once there is one: both if a stale answer serves because
	// of an error.
	entry *entry
	err   error
}

// waiting is one place in a line.
type waiting struct {
	w     Waiter
	turn  uint64 // of the query, which has the same in all lines it waits in
	since moment // of a refresh: an answer from before does not serve
}

func newTable(d *Directory, name string, weight int) (*table, error) {
	cache, err := otter.New(&otter.Options[string, *entry]{
		MaximumWeight: uint64(weight),
		Weigher:       func(_ string, e *entry) uint32 { return uint32(min(max(e.snap.Users, 1), 1<<30)) },
	})
	if err != nil {
		return nil, fmt.Errorf("make %s cache: %w", name, err)
	}
	t := &table{dir: d, name: name, cache: cache, homes: make([]home, d.cfg.Homes)}
	for i := range t.homes {
		t.homes[i].lines = make(map[string]*line)
	}
	return t, nil
}

// hit answers from memory alone, nil if it cannot. The first hit on an answer that is
// soon too old has it looked up, and is answered all the same.
func (t *table) hit(home int, key string, q Query) *Snapshot {
	e, ok := t.cache.GetIfPresent(key)
	now := t.dir.moment(q.Now)
	if !ok || !t.fresh(e, now) {
		return nil
	}
	if at := e.renewAt.Load(); int64(now) >= at && e.renewAt.CompareAndSwap(at, never) {
		t.renew(home, strings.Clone(key))
	}
	t.homes[home].hits.Add(1)
	return e.snap
}

func (t *table) fresh(e *entry, now moment) bool {
	// Read before the generation, which is written before: a new stream's word is not
	// taken for an old answer.
	vouched := now < moment(t.dir.vouched.Load())
	if e.generation != t.dir.generation.Load() {
		return false
	}
	return vouched && !e.fallback || now < e.freshUntil
}

// after tells whether e is what the Controller said after since, as far as is known.
func (e *entry) after(since moment) bool {
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

// ask has w told about keys: at once what is fresh after all, the rest by the line of
// its key, which is opened if need be. Keys without a line share one look-up, and of
// them w is told together.
func (t *table) ask(home int, keys []string, q Query, w Waiter) {
	h := &t.homes[home]
	h.misses.Add(uint64(len(keys)))
	t.queue(home, keys, waiting{w: w}, func(key string, l *line) *entry {
		e, ok := t.cache.GetIfPresent(key)
		if l == nil && ok && t.fresh(e, t.dir.moment(q.Now)) {
			return e
		}
		if ok && e.generation != 0 && !e.fallback {
			// With the next mark of the change stream it would be good again while w waits, and
			// who asks then would overtake.
			t.cache.Set(key, t.changed(e, e.announced))
		}
		return nil
	})
}

// refresh has w told what the Controller says about keys since a node contradicted it.
func (t *table) refresh(home int, keys []string, m Missing, w Waiter) {
	h, since, generation := &t.homes[home], t.dir.moment(m.Since), t.dir.generation.Load()
	looked := t.queue(home, keys, waiting{w: w, since: since}, func(key string, l *line) *entry {
		e, _ := t.cache.GetIfPresent(key)
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
		if t == t.dir.users {
			users = []string{key}
		}
		confirmed := e.note(m.Node, users, since, moment(t.dir.cfg.TTL))
		switch {
		case l != nil && !told:
			return nil
		case e.generation == generation && e.after(since):
			return e
		case confirmed && t.fresh(e, since):
			h.confirmed.Add(1)
			return e
		default:
			return nil
		}
	})
	h.refreshes.Add(uint64(looked))
}

// queue puts me into the line of each key, opening those that do not exist. It returns how
// many keys it had looked up. known, which is called under the lock with the key's line or
// nil, may have an answer: me is told it at once, or by the line if there is one, whose
// answer it is then.
func (t *table) queue(home int, keys []string, me waiting, known func(key string, l *line) *entry) int {
	h := &t.homes[home]
	var lookup, now []string
	var snaps []*Snapshot
	h.mu.Lock()
	h.turns++
	me.turn = h.turns
	for _, key := range keys {
		l := h.lines[key]
		switch e := known(key, l); {
		case e != nil && l == nil:
			now, snaps = append(now, key), append(snaps, e.answer(me))
		case e != nil: // those before me are being told just that
			l.waiters = append(l.waiters, me)
			h.waiting.Add(1)
		case l != nil:
			t.appendLocked(h, l, me)
		default:
			key = strings.Clone(key) // it outlives the request that it was cut from
			t.openLocked(h, key)
			lookup = append(lookup, key) // me is told first, see settle
		}
	}
	h.mu.Unlock()
	if len(now) > 0 {
		me.w.Routed(now, snaps, nil)
	}
	if len(lookup) > 0 {
		t.submit(home, me.w, lookup, &me)
	}
	return len(lookup)
}

// openLocked puts up a line for a look-up.
func (t *table) openLocked(h *home, key string) {
	l := &line{looking: true}
	l.old, _ = t.cache.GetIfPresent(key)
	h.lines[key] = l
}

// appendLocked puts w at the end of the line. Behind a change it waits for an answer
// from after it; so does who asks again, if what is being told is too old for it. Where so
// many ask that the line is not told to its end, what is told gets too old for everybody.
func (t *table) appendLocked(h *home, l *line, w waiting) {
	if !l.looking && l.entry != nil {
		now := t.dir.now()
		l.dirty = l.dirty || now-l.entry.fetched > moment(t.dir.cfg.TTL) && !t.fresh(l.entry, now)
	}
	if l.dirty || !l.looking && w.since != 0 && !(l.entry != nil && l.entry.after(w.since)) {
		l.next = append(l.next, w)
	} else {
		l.waiters = append(l.waiters, w)
	}
	h.waiting.Add(1)
}

// nobody waits for what is looked up ahead of time.
type nobody struct{}

func (nobody) Lookup(ctx context.Context, _ string) (context.Context, func(error)) {
	return ctx, func(error) {}
}
func (nobody) Routed([]string, []*Snapshot, error) {}

// renew looks key up though there is an answer that is good for a while.
func (t *table) renew(home int, key string) {
	h := &t.homes[home]
	h.mu.Lock()
	_, open := h.lines[key]
	if !open {
		t.openLocked(h, key)
	}
	h.mu.Unlock()
	if !open {
		t.submit(home, nobody{}, []string{key}, nil)
	}
}

// serves tells whether the line's result is one for w.
func (l *line) serves(w waiting) bool {
	return l.entry != nil && (l.err == nil || w.since == 0 || l.entry.fetched > w.since)
}

// submit runs the look-up of keys, whose lines are open, in the pool of home. Of
// first, if any, it is known that it waits for each of keys, in front of the line.
func (t *table) submit(home int, w Waiter, keys []string, first *waiting) {
	err := t.dir.cfg.Go(home, func() { t.lookup(home, w, keys, first) })
	if err != nil {
		err = errors.Join(ErrOverloaded, err)
		t.settle(home, keys, first, func(l *line, _ int) (*entry, error) {
			return t.fallback(&t.homes[home], l, err), err
		})
	}
}

// lookup asks the source for keys and tells everybody in their lines.
func (t *table) lookup(home int, w Waiter, keys []string, first *waiting) {
	h := &t.homes[home]
	timeout := t.dir.patience(h.running.Add(1))
	began, generation := t.dir.now(), t.dir.generation.Load()
	olds, snaps := make([]*Snapshot, len(keys)), make([]*Snapshot, len(keys))
	h.mu.Lock()
	for i, key := range keys {
		if old := h.lines[key].old; old != nil {
			olds[i] = old.snap.told()
		}
	}
	h.mu.Unlock()
	err := errPanicked
	defer func() {
		// Runs on a panic of the source, too: nobody is left waiting.
		h.running.Add(-1)
		if err != nil {
			h.lookupErrors.Add(1)
		}
		t.settle(home, keys, first, func(l *line, i int) (*entry, error) {
			if err != nil {
				return t.fallback(h, l, err), err
			}
			return t.newEntry(h, l, snaps[i], began, generation), nil
		})
	}()
	h.lookups.Add(1)
	err = t.dir.lookup(t, w, timeout, keys, olds, snaps)
}

// newEntry decides how long an answer of the Controller is good. Called under the lock.
func (t *table) newEntry(h *home, l *line, s *Snapshot, began moment, generation uint64) *entry {
	if until := t.dir.doubtUntil(l.old, s); until != 0 {
		h.doubted.Add(1)
		e := t.stale(l.old, l.old.announced || l.announced, until)
		s.Doubted = true // nobody else has it yet
		e.fetched, e.doubted = began, s
		return e
	}
	ttl := moment(t.dir.cfg.TTL)
	e := &entry{snap: s, fetched: began, known: began, freshUntil: began + ttl, generation: generation}
	e.renewAt.Store(never)
	switch {
	case l.dirty || generation != t.dir.generation.Load():
		e.freshUntil, e.generation, e.announced = began, 0, l.announced
	case !s.Found || began < moment(t.dir.vouched.Load()):
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
func (t *table) fallback(h *home, l *line, err error) *entry {
	old, now := l.old, t.dir.now()
	if old == nil || !old.snap.Found {
		return nil
	}
	announced := old.announced || l.announced
	switch {
	case !l.dirty && t.fresh(old, now):
		return old
	case announced && !errors.Is(err, ErrAway):
		return nil
	case now-t.dir.knownUntil(old, now) > moment(t.dir.cfg.StaleTTL):
		return nil
	}
	h.staleServed.Add(1)
	return t.stale(old, announced, now+moment(t.dir.cfg.TTL))
}

// stale makes an entry of an old answer that serves until then, and says that it is
// stale.
func (t *table) stale(old *entry, announced bool, until moment) *entry {
	known := t.dir.knownUntil(old, t.dir.now())
	e := &entry{
		snap:    old.snap.told().stale(t.dir.epoch.Add(time.Duration(known)), announced),
		fetched: old.fetched, known: known, freshUntil: until, fallback: true, generation: t.dir.generation.Load(),
		announced: announced, doubted: old.doubted, absent: old.absent,
	}
	e.renewAt.Store(never)
	return e
}

// settle gives each key's line its result, tells first for all keys at once and
// then the lines. result is called under the lock.
func (t *table) settle(home int, keys []string, first *waiting, result func(l *line, i int) (*entry, error)) {
	h := &t.homes[home]
	var told, failed []string
	var snaps []*Snapshot
	var err error
	h.mu.Lock()
	for i, key := range keys {
		l := h.lines[key]
		l.entry, l.err = result(l, i)
		l.looking = false
		if first != nil {
			t.hideLocked(key, l)
		}
		switch {
		case first == nil:
		case !l.serves(*first):
			failed, err = append(failed, key), l.err
		default:
			told, snaps = append(told, key), append(snaps, l.entry.answer(*first))
		}
	}
	h.mu.Unlock()
	if len(told) > 0 {
		first.w.Routed(told, snaps, nil)
	}
	if len(failed) > 0 {
		first.w.Routed(failed, nil, err)
	}
	for some := range slices.Chunk(keys, together) {
		t.drain(home, some)
	}
}

// hideLocked takes the result from before out of sight, for the line is told now. Whoever has
// been told may ask again at once, and must not get that: newcomers wait in line.
func (t *table) hideLocked(key string, l *line) {
	if e, ok := t.cache.GetIfPresent(key); ok && e != l.entry && e.generation != 0 {
		t.cache.Set(key, t.changed(e, e.announced))
	}
}

// drain tells the waiters of lines that have a result, in the order of asking,
// until the lines are empty; then the results become visible and the lines go.
func (t *table) drain(home int, keys []string) {
	h := &t.homes[home]
	for {
		h.mu.Lock()
		if batch := h.takeLocked(keys); len(batch) > 0 {
			for i, p := range batch {
				if i == 0 || p.line != batch[i-1].line {
					t.hideLocked(p.key, p.line)
				}
			}
			h.mu.Unlock()
			tell(batch)
			continue
		}
		var again []string
		var first Waiter
		for _, key := range keys {
			l := h.lines[key]
			if len(l.next) > 0 {
				first = l.next[0].w
				if !l.dirty {
					t.publishLocked(key, l) // who waits behind it refreshes, and is not overtaken
				}
				t.nextLocked(l)
				again = append(again, key)
				continue
			}
			t.publishLocked(key, l)
			delete(h.lines, key)
		}
		h.mu.Unlock()
		if len(again) > 0 {
			t.submit(home, first, again, nil)
		}
		return
	}
}

// nextLocked turns the line to a new look-up, for those who want a newer answer. What has
// changed meanwhile is no good answer, should that look-up fail.
func (t *table) nextLocked(l *line) {
	if l.entry != nil {
		l.old = l.entry
	}
	if l.dirty && l.old != nil {
		l.old = t.changed(l.old, l.old.announced || l.announced)
	}
	l.waiters, l.next = l.next, nil
	l.looking, l.dirty, l.announced = true, false, false
}

// publishLocked makes the line's result visible.
func (t *table) publishLocked(key string, l *line) {
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
	t.cache.Set(key, e)
	e.snap.published.CompareAndSwap(0, int64(t.dir.now())) // now that nobody finds another
}

// changed is e once it is not to be trusted any more. It serves as a fallback and for
// the comparison with the next answer.
func (t *table) changed(e *entry, announced bool) *entry {
	gone := &entry{
		snap: e.snap, fetched: e.fetched, known: t.dir.knownUntil(e, t.dir.now()),
		announced: announced, doubted: e.doubted, absent: e.absent,
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

// takeLocked takes the waiters of lines, in the order of asking.
func (h *home) takeLocked(keys []string) []place {
	var batch []place
	for _, key := range keys {
		l := h.lines[key]
		for _, w := range l.waiters {
			batch = append(batch, place{w, key, l})
		}
		l.waiters = nil
	}
	if len(keys) > 1 {
		slices.SortStableFunc(batch, func(a, b place) int { return cmp.Compare(a.turn, b.turn) })
	}
	h.waiting.Add(-int64(len(batch)))
	return batch
}

// tell brings waiters the results of their lines, all of one query together. Only
// the drainer calls it, and the results do not change while somebody drains.
func tell(batch []place) {
	for len(batch) > 0 {
		n := 1
		for n < len(batch) && batch[n].turn == batch[0].turn {
			n++
		}
		var told, failed []string
		var snaps []*Snapshot
		var err error
		for _, p := range batch[:n] {
			if !p.line.serves(p.waiting) {
				failed, err = append(failed, p.key), p.line.err
				continue
			}
			told, snaps = append(told, p.key), append(snaps, p.line.entry.answer(p.waiting))
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
func (t *table) invalidate(key string) {
	h := &t.homes[t.dir.cfg.Home(key)]
	h.mu.Lock()
	defer h.mu.Unlock()
	if l := h.lines[key]; l != nil {
		l.dirty, l.announced = true, true
	}
	if e, ok := t.cache.GetIfPresent(key); ok {
		t.cache.Set(key, t.changed(e, true))
	}
}

// invalidateAll makes whoever comes behind a look-up under way wait for a newer answer.
// What is in the cache is of an old generation.
func (t *table) invalidateAll() {
	for i := range t.homes {
		h := &t.homes[i]
		h.mu.Lock()
		for _, l := range h.lines {
			l.dirty = true
		}
		h.mu.Unlock()
	}
}
