package route

import (
	"cmp"
	"errors"
	"fmt"
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

// entry is one answer in the cache. Immutable.
type entry struct {
	snap       *Snapshot
	fetched    moment // when the look-up began
	known      moment // up to when it was true for certain, the change stream left aside
	freshUntil moment // zero: it has changed, or could not be looked up again
	generation uint64 // of the directory when the look-up began, 0 for none that is good
	fallback   bool   // serves while the source fails: no change stream vouches for it
}

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

	hits, misses, lookups, lookupErrors, staleServed, refreshes, fences atomic.Uint64
	waiting                                                             atomic.Int64

	_ [64]byte // shards do not share a cache line
}

// line is whoever waits for one key, in order. Guarded by its home's mu.
type line struct {
	waiters  []waiting
	next     []waiting // behind the waiters, for an answer newer than theirs
	old      *entry    // what was known before, for reuse and as a fallback
	looking  bool      // a look-up is under way
	draining bool      // somebody tells the waiters
	dirty    bool      // the key changed while it was looked up
	// The latest result, once there is one: both if a stale answer serves because
	// of an error. Changes only while nobody drains.
	entry *entry
	err   error
}

// waiting is one place in a line.
type waiting struct {
	w       Waiter
	ordered bool
	turn    uint64 // of the query, which has the same in all lines it waits in
	since   moment // of a refresh: an answer from before does not serve
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

// hit answers from memory alone, nil if it cannot.
func (t *table) hit(home int, key string, q Query) *Snapshot {
	e, ok := t.cache.GetIfPresent(key)
	if !ok || !t.fresh(e, q.Now) {
		return nil
	}
	if q.Ordered && (e.snap.prev.Load() != nil || !e.snap.tryHold()) {
		return nil
	}
	t.homes[home].hits.Add(1)
	return e.snap
}

// after tells whether e is what the Controller said after since, as far as is known.
func (e *entry) after(since moment) bool {
	return e.fetched > since && e.freshUntil != 0
}

func (t *table) fresh(e *entry, now time.Time) bool {
	at := t.dir.moment(now)
	// Read before the generation, which is written before: a new stream's word is not
	// taken for an old answer.
	vouched := at < moment(t.dir.vouched.Load())
	if e.generation != t.dir.generation.Load() {
		return false
	}
	return vouched && !e.fallback || at < e.freshUntil
}

// hitLocked is hit for somebody who holds the lock, with no line for the key: it
// may end a fence that is not needed any more. It returns the entry if only the
// fence is in the way.
func (t *table) hitLocked(key string, q Query) (s *Snapshot, fenced *entry) {
	e, ok := t.cache.GetIfPresent(key)
	if !ok || !t.fresh(e, q.Now) {
		return nil, nil
	}
	if q.Ordered {
		if e.snap.fenced() {
			return nil, e
		}
		e.snap.prev.Store(nil)
		e.snap.held.Add(1) // not retired: a successor would still have its line
	}
	return e.snap, nil
}

// join waits in the line of key, opening it if need be.
func (t *table) join(home int, key string, q Query, w Waiter) *Snapshot {
	h := &t.homes[home]
	h.misses.Add(1)
	var (
		s      *Snapshot
		fenced *entry
		look   bool
	)
	h.mu.Lock()
	l, open := h.lines[key]
	if open {
		s, look = t.askLocked(l, q)
	} else {
		s, fenced = t.hitLocked(key, q)
		look = s == nil && fenced == nil
	}
	if s != nil {
		h.mu.Unlock()
		return s
	}
	key = strings.Clone(key) // it outlives the request that it was cut from
	if !open {
		l = t.openLocked(h, key, fenced)
	}
	h.turns++
	h.appendLocked(l, waiting{w: w, ordered: q.Ordered, turn: h.turns})
	h.mu.Unlock()
	if fenced != nil {
		h.fences.Add(1)
		t.unfence(key) // the last hold may have gone before the line stood
	}
	if look {
		t.submit(home, w, []string{key}, nil)
	}
	return nil
}

// openLocked puts up a line for a look-up, or for a fence alone in front of an
// answer.
func (t *table) openLocked(h *home, key string, fenced *entry) *line {
	l := &line{looking: fenced == nil, old: fenced, entry: fenced}
	if fenced == nil {
		l.old, _ = t.cache.GetIfPresent(key)
	}
	h.lines[key] = l
	return l
}

// askLocked deals with a query for a key that has a line. A line that waits for
// nothing but the fence is no reason to wait for a query that is not ordered: it
// gets the line's answer while that is good. If it is not, look tells that the line
// has turned to a new look-up.
func (t *table) askLocked(l *line, q Query) (s *Snapshot, look bool) {
	switch {
	case l.looking || l.draining:
		return nil, false
	case l.dirty || !t.fresh(l.entry, q.Now):
		l.nextLocked()
		return nil, true
	case q.Ordered:
		return nil, false
	default:
		return l.entry.snap, false
	}
}

// appendLocked puts w at the end of the line. Behind a change it waits for an
// answer from after it.
func (h *home) appendLocked(l *line, w waiting) {
	if l.dirty {
		l.next = append(l.next, w)
	} else {
		l.waiters = append(l.waiters, w)
	}
	h.waiting.Add(1)
}

// joinMany is join for several users at once: those without a line share one
// look-up and are told together.
func (t *table) joinMany(home int, keys []string, q Query, w Waiter) {
	h := &t.homes[home]
	h.misses.Add(uint64(len(keys)))
	var lookup, again, now, fences []string
	var snaps []*Snapshot
	h.mu.Lock()
	h.turns++
	me := waiting{w: w, ordered: q.Ordered, turn: h.turns}
	for _, key := range keys {
		var s *Snapshot
		var fenced *entry
		look := false
		l, open := h.lines[key]
		if open {
			s, look = t.askLocked(l, q)
		} else {
			s, fenced = t.hitLocked(key, q)
		}
		if s != nil {
			now, snaps = append(now, key), append(snaps, s)
			continue
		}
		key = strings.Clone(key)
		if !open {
			l = t.openLocked(h, key, fenced)
		}
		switch {
		case fenced != nil:
			fences = append(fences, key)
		case look:
			again = append(again, key)
		case !open:
			lookup = append(lookup, key)
			continue // me is told first, see settle
		}
		h.appendLocked(l, me)
	}
	h.mu.Unlock()
	if len(now) > 0 {
		w.Routed(now, snaps, nil)
	}
	for _, key := range fences {
		h.fences.Add(1)
		t.unfence(key)
	}
	if len(again) > 0 {
		t.submit(home, w, again, nil)
	}
	if len(lookup) > 0 {
		t.submit(home, w, lookup, &me)
	}
}

// refresh gets w an answer that is newer than after.
func (t *table) refresh(home int, keys []string, after time.Time, w Waiter) {
	h, since, generation := &t.homes[home], t.dir.moment(after), t.dir.generation.Load()
	var lookup, now []string
	var snaps []*Snapshot
	h.mu.Lock()
	h.turns++
	me := waiting{w: w, turn: h.turns, since: since}
	for _, key := range keys {
		l, open := h.lines[key]
		switch {
		case open && (l.looking || l.draining && l.after(since)):
			h.appendLocked(l, me)
			continue
		case open && l.draining:
			l.next = append(l.next, me)
			h.waiting.Add(1)
			continue
		case open && l.after(since):
			now, snaps = append(now, key), append(snaps, l.entry.snap)
			continue
		}
		if e, ok := t.cache.GetIfPresent(key); !open && ok && e.generation == generation && e.after(since) {
			now, snaps = append(now, key), append(snaps, e.snap)
			continue
		}
		key = strings.Clone(key)
		if open {
			l.nextLocked()
		} else {
			t.openLocked(h, key, nil)
		}
		t.cache.Invalidate(key)
		lookup = append(lookup, key)
	}
	h.mu.Unlock()
	h.refreshes.Add(uint64(len(lookup)))
	if len(now) > 0 {
		w.Routed(now, snaps, nil)
	}
	if len(lookup) > 0 {
		t.submit(home, w, lookup, &me)
	}
}

// after tells whether the line's result is what the Controller said after since.
func (l *line) after(since moment) bool {
	return l.entry != nil && !l.dirty && l.entry.after(since)
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
		t.settle(home, keys, first, func(*line, int) (*entry, error) { return nil, err })
	}
}

// lookup asks the source for keys and tells everybody in their lines.
func (t *table) lookup(home int, w Waiter, keys []string, first *waiting) {
	h := &t.homes[home]
	began, generation := t.dir.now(), t.dir.generation.Load()
	olds, snaps := make([]*Snapshot, len(keys)), make([]*Snapshot, len(keys))
	h.mu.Lock()
	for i, key := range keys {
		if old := h.lines[key].old; old != nil {
			olds[i] = old.snap
		}
	}
	h.mu.Unlock()
	err := errPanicked
	defer func() {
		// Runs on a panic of the source, too: nobody is left waiting.
		if err != nil {
			h.lookupErrors.Add(1)
		}
		t.settle(home, keys, first, func(l *line, i int) (*entry, error) {
			if err != nil {
				return t.fallback(h, l.old, began), err
			}
			return t.newEntry(snaps[i], began, generation, l.dirty), nil
		})
	}()
	h.lookups.Add(1)
	err = t.dir.lookup(t, w, keys, olds, snaps)
}

// newEntry decides how long a fresh answer is good.
func (t *table) newEntry(s *Snapshot, began moment, generation uint64, dirty bool) *entry {
	e := &entry{snap: s, fetched: began, known: began, freshUntil: began + moment(t.dir.cfg.TTL), generation: generation}
	// Absence is not cached, see package doc. And what is vouched for is good as long as
	// that holds: whoever tells of a change does not wait for us once it does not.
	if !s.Found || began < moment(t.dir.vouched.Load()) {
		e.freshUntil = began
	}
	if dirty || generation != t.dir.generation.Load() {
		e.freshUntil, e.generation = began, 0
	}
	return e
}

// fallback is what serves while the source fails: the old answer for another TTL,
// or nothing.
func (t *table) fallback(h *home, old *entry, now moment) *entry {
	if old == nil || !old.snap.Found {
		return nil
	}
	known := t.dir.knownUntil(old, now)
	if now-known > moment(t.dir.cfg.StaleTTL) {
		return nil
	}
	h.staleServed.Add(1)
	return &entry{
		snap: old.snap, fetched: old.fetched, known: known, fallback: true,
		freshUntil: t.dir.now() + moment(t.dir.cfg.TTL), generation: t.dir.generation.Load(),
	}
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
		e, lerr := result(l, i)
		l.looking, l.draining = false, true
		l.entry, l.err = e, lerr
		if e != nil {
			t.retireLocked(l.old, e, key)
		}
		switch {
		case first == nil:
		case !l.serves(*first):
			failed, err = append(failed, key), lerr
		case first.ordered && e.snap.fenced():
			l.waiters = append([]waiting{*first}, l.waiters...)
			h.waiting.Add(1)
		default:
			if first.ordered {
				e.snap.held.Add(1)
			}
			told, snaps = append(told, key), append(snaps, e.snap)
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

// retireLocked makes e's snapshot the successor of old's: from here on nobody new
// holds the old one.
func (t *table) retireLocked(old, e *entry, key string) {
	if e.snap.table == nil {
		e.snap.table, e.snap.key = t, key
	}
	if old != nil && old.snap != e.snap {
		// In this order: whoever holds the old one from here on lets go again.
		old.snap.retired.Store(true)
		e.snap.prev.Store(old.snap.inUse())
	}
}

// drain tells the waiters of lines that have a result, in the order of asking,
// until the lines are empty; then the results become visible and the lines go.
// Ordered waiters stay behind a fence, and so does the line: unfence comes back for
// them.
func (t *table) drain(home int, keys []string) {
	h := &t.homes[home]
	for len(keys) > 0 {
		h.mu.Lock()
		if batch := h.takeLocked(keys); len(batch) > 0 {
			h.mu.Unlock()
			tell(batch)
			continue
		}
		var again, left []string
		var first Waiter
		for _, key := range keys {
			l := h.lines[key]
			l.draining = false
			switch {
			case len(l.next) > 0:
				first = l.next[0].w
				l.nextLocked()
				again = append(again, key)
			case t.publishLocked(h, key, l):
				left = append(left, key)
			}
		}
		h.mu.Unlock()
		if len(again) > 0 {
			t.submit(home, first, again, nil)
		}
		keys = h.resume(left)
	}
}

// nextLocked turns the line to a new look-up, for those who want a newer answer
// and all who still wait.
func (l *line) nextLocked() {
	l.waiters, l.next = append(l.waiters, l.next...), nil
	l.looking, l.dirty = true, false
	if l.entry != nil {
		l.old = l.entry
	}
}

// publishLocked makes the line's result visible, and ends the line unless somebody
// in it waits for the fence: then it returns true.
func (t *table) publishLocked(h *home, key string, l *line) (left bool) {
	e := l.entry
	if e == nil {
		e = l.old // of a look-up that failed: kept for the next one
	}
	if e != nil {
		if l.dirty || l.entry == nil {
			e = t.changed(e)
		}
		t.cache.Set(key, e)
	}
	if len(l.waiters) == 0 {
		delete(h.lines, key)
		return false
	}
	h.fences.Add(1)
	return true
}

// changed is e once it is not to be trusted any more. It serves as a fallback and for
// the comparison with the next answer.
func (t *table) changed(e *entry) *entry {
	return &entry{snap: e.snap, fetched: e.fetched, known: t.dir.knownUntil(e, t.dir.now())}
}

// resume claims those lines again whose fence has fallen since their waiters were
// counted: the one who let it fall found the line busy.
func (h *home) resume(keys []string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.DeleteFunc(keys, func(key string) bool { return !h.claimLocked(key) })
}

// claimLocked makes the caller the one who drains the line of key, if it waits for
// nothing but the fence and that has fallen.
func (h *home) claimLocked(key string) bool {
	l := h.lines[key]
	if l == nil || !l.readyLocked() {
		return false
	}
	l.draining = true
	return true
}

// readyLocked tells whether the line has a result, nobody who tells it, and no
// fence in front.
func (l *line) readyLocked() bool {
	return !l.looking && !l.draining && (l.entry == nil || !l.entry.snap.fenced())
}

// unfence drains the line of key if it waits for nothing but the fence.
func (t *table) unfence(key string) {
	home := t.dir.cfg.Home(key)
	h := &t.homes[home]
	h.mu.Lock()
	ready := h.claimLocked(key)
	h.mu.Unlock()
	if ready {
		t.drain(home, []string{key})
	}
}

// place is a waiter that is told about one key.
type place struct {
	waiting
	key  string
	line *line
}

// takeLocked takes the waiters of lines that may be told now, in the order of
// asking.
func (h *home) takeLocked(keys []string) []place {
	var batch []place
	for _, key := range keys {
		l := h.lines[key]
		fenced := l.entry != nil && l.entry.snap.fenced()
		var stay []waiting
		for _, w := range l.waiters {
			if fenced && w.ordered {
				stay = append(stay, w)
			} else {
				batch = append(batch, place{w, key, l})
			}
		}
		l.waiters = stay
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
			s := p.line.entry.snap
			if p.ordered {
				s.held.Add(1) // not retired: its successor would need this line
			}
			told, snaps = append(told, p.key), append(snaps, s)
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

// invalidate forgets the answer for key.
func (t *table) invalidate(key string) {
	h := &t.homes[t.dir.cfg.Home(key)]
	h.mu.Lock()
	defer h.mu.Unlock()
	if l := h.lines[key]; l != nil {
		l.dirty = true
	}
	if e, ok := t.cache.GetIfPresent(key); ok {
		t.cache.Set(key, t.changed(e))
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
