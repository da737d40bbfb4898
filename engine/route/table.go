package route

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"
)

var errPanicked = fmt.Errorf("%w: the look-up panicked", ErrUnavailable)

// entry is one answer in the cache. Immutable.
type entry struct {
	snap       *Snapshot
	fetched    time.Time // when the look-up began
	freshUntil time.Time
	watch      uint64 // the change stream that vouches for it, 0 for none
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
	mu    sync.Mutex
	lines map[string]*line // guarded by mu

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
	// The latest result, once there is one. Changes only while nobody drains.
	entry *entry
	err   error
}

// waiting is one place in a line.
type waiting struct {
	w       Waiter
	ordered bool
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

func (t *table) fresh(e *entry, now time.Time) bool {
	if w := t.dir.watch.Load(); w != 0 && e.watch == w {
		return true
	}
	return now.Before(e.freshUntil)
}

// hitLocked is hit for somebody who holds the lock, with no line for the key: it
// may end a fence that is not needed any more.
func (t *table) hitLocked(key string, q Query) (s *Snapshot, fenced bool) {
	e, ok := t.cache.GetIfPresent(key)
	if !ok || !t.fresh(e, q.Now) {
		return nil, false
	}
	if q.Ordered {
		if e.snap.fenced() {
			return nil, true
		}
		e.snap.prev.Store(nil)
		e.snap.held.Add(1) // not retired: a successor would still have its line
	}
	return e.snap, false
}

// join waits in the line of key, opening it if need be.
func (t *table) join(home int, key string, q Query, w Waiter) *Snapshot {
	h := &t.homes[home]
	h.misses.Add(1)
	fenced := false
	h.mu.Lock()
	l, open := h.lines[key]
	if !open {
		var s *Snapshot
		if s, fenced = t.hitLocked(key, q); s != nil {
			h.mu.Unlock()
			return s
		}
		key = strings.Clone(key) // it outlives the request that it was cut from
		l = t.openLocked(h, key, fenced)
	}
	h.appendLocked(l, waiting{w, q.Ordered})
	h.mu.Unlock()
	switch {
	case open:
	case fenced:
		h.fences.Add(1)
		t.unfence(key) // the last hold may have gone before the line stood
	default:
		t.submit(home, w, []string{key}, nil)
	}
	return nil
}

// openLocked puts up a line for a look-up, or for a fence alone.
func (t *table) openLocked(h *home, key string, fenced bool) *line {
	l := &line{looking: !fenced}
	l.old, _ = t.cache.GetIfPresent(key)
	if fenced {
		l.entry = l.old
	}
	h.lines[key] = l
	return l
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
	var lookup, now, fences []string
	var snaps []*Snapshot
	h.mu.Lock()
	for _, key := range keys {
		if l, open := h.lines[key]; open {
			h.appendLocked(l, waiting{w, q.Ordered})
			continue
		}
		s, fenced := t.hitLocked(key, q)
		if s != nil {
			now, snaps = append(now, key), append(snaps, s)
			continue
		}
		key = strings.Clone(key)
		l := t.openLocked(h, key, fenced)
		if fenced {
			h.appendLocked(l, waiting{w, q.Ordered})
			fences = append(fences, key)
			continue
		}
		lookup = append(lookup, key)
	}
	h.mu.Unlock()
	if len(now) > 0 {
		w.Routed(now, snaps, nil)
	}
	for _, key := range fences {
		h.fences.Add(1)
		t.unfence(key)
	}
	if len(lookup) > 0 {
		t.submit(home, w, lookup, &waiting{w, q.Ordered})
	}
}

// refresh gets w an answer that is newer than since.
func (t *table) refresh(home int, keys []string, since time.Time, w Waiter) {
	h := &t.homes[home]
	var lookup, now []string
	var snaps []*Snapshot
	h.mu.Lock()
	for _, key := range keys {
		l, open := h.lines[key]
		switch {
		case open && (l.looking || l.draining && l.newerThan(since)):
			h.appendLocked(l, waiting{w: w})
			continue
		case open && l.draining:
			l.next = append(l.next, waiting{w: w})
			h.waiting.Add(1)
			continue
		case open && l.newerThan(since):
			now, snaps = append(now, key), append(snaps, l.entry.snap)
			continue
		case open:
			l.looking, l.old = true, l.entry
		default:
			if e, ok := t.cache.GetIfPresent(key); ok && e.fetched.After(since) {
				now, snaps = append(now, key), append(snaps, e.snap)
				continue
			}
			key = strings.Clone(key)
			t.openLocked(h, key, false)
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
		t.submit(home, w, lookup, &waiting{w: w})
	}
}

func (l *line) newerThan(t time.Time) bool { return l.entry != nil && l.entry.fetched.After(t) }

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
	began, watch := time.Now(), t.dir.watch.Load()
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
			return t.newEntry(snaps[i], began, watch, l.dirty), nil
		})
	}()
	h.lookups.Add(1)
	err = t.dir.lookup(t, w, keys, olds, snaps)
}

// newEntry decides how long a fresh answer is good.
func (t *table) newEntry(s *Snapshot, began time.Time, watch uint64, dirty bool) *entry {
	e := &entry{snap: s, fetched: began, freshUntil: began.Add(t.dir.cfg.TTL), watch: watch}
	if !s.Found {
		e.freshUntil = began // absence is not cached, see package doc
	}
	if dirty || watch != t.dir.watch.Load() {
		e.freshUntil, e.watch = began, 0
	}
	return e
}

// fallback is what serves while the source fails: the old answer for another TTL,
// or nothing.
func (t *table) fallback(h *home, old *entry, now time.Time) *entry {
	if old == nil || !old.snap.Found || now.Sub(old.fetched) > t.dir.cfg.StaleTTL {
		return nil
	}
	h.staleServed.Add(1)
	return &entry{snap: old.snap, fetched: old.fetched, freshUntil: time.Now().Add(t.dir.cfg.TTL)}
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
			l.err = nil
			t.retireLocked(l.old, e, key)
		}
		switch {
		case first == nil:
		case e == nil:
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
	for _, key := range keys {
		t.drain(home, key)
	}
}

// retireLocked makes e's snapshot the successor of old's: from here on nobody new
// holds the old one.
func (t *table) retireLocked(old, e *entry, key string) {
	if e.snap.table == nil {
		e.snap.table, e.snap.key = t, key
	}
	if old != nil && old.snap != e.snap {
		e.snap.prev.Store(old.snap)
		old.snap.retired.Store(true)
	}
}

// drain tells the waiters of a line that has a result, in order, until the line is
// empty; then the result becomes visible and the line goes. Ordered waiters stay
// behind a fence, and so does the line: unfence comes back for them.
func (t *table) drain(home int, key string) {
	h := &t.homes[home]
	for {
		h.mu.Lock()
		l := h.lines[key]
		if batch := h.takeLocked(l); len(batch) > 0 {
			h.mu.Unlock()
			l.tell(key, batch)
			continue
		}
		l.draining = false
		again := len(l.next) > 0
		var first Waiter
		if again {
			first = l.next[0].w
			l.nextLocked()
		} else {
			t.publishLocked(h, key, l)
		}
		h.mu.Unlock()
		if again {
			t.submit(home, first, []string{key}, nil)
			return
		}
		if !t.resume(h, key, l) {
			return
		}
	}
}

// nextLocked turns the line to those who want a newer answer.
func (l *line) nextLocked() {
	l.waiters, l.next = append(l.waiters, l.next...), nil
	l.looking, l.old, l.dirty = true, l.entry, false
}

// publishLocked makes the line's result visible, and ends the line unless somebody
// in it waits for the fence.
func (t *table) publishLocked(h *home, key string, l *line) {
	e := l.entry
	if e == nil {
		e = l.old // of a look-up that failed: kept for the next one
	}
	if e != nil {
		if l.dirty || l.entry == nil {
			e = &entry{snap: e.snap, fetched: e.fetched}
		}
		t.cache.Set(key, e)
	}
	if len(l.waiters) == 0 {
		delete(h.lines, key)
		return
	}
	h.fences.Add(1)
}

// resume claims the line again if the fence has fallen since the waiters were
// counted: the one who let it fall found the line busy.
func (t *table) resume(h *home, key string, l *line) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lines[key] != l || !l.readyLocked() {
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
	l := h.lines[key]
	ready := l != nil && l.readyLocked()
	if ready {
		l.draining = true
	}
	h.mu.Unlock()
	if ready {
		t.drain(home, key)
	}
}

// takeLocked takes the waiters that may be told now.
func (h *home) takeLocked(l *line) []waiting {
	batch := l.waiters
	l.waiters = nil
	if l.entry != nil && l.entry.snap.fenced() {
		var free []waiting
		for _, w := range batch {
			if w.ordered {
				l.waiters = append(l.waiters, w)
			} else {
				free = append(free, w)
			}
		}
		batch = free
	}
	h.waiting.Add(-int64(len(batch)))
	return batch
}

// tell brings the line's result to waiters. Only the drainer calls it, and the
// result does not change while somebody drains.
func (l *line) tell(key string, batch []waiting) {
	keys := []string{key}
	for _, w := range batch {
		if l.entry == nil {
			w.w.Routed(keys, nil, l.err)
			continue
		}
		if w.ordered {
			l.entry.snap.held.Add(1) // not retired: its successor would need this line
		}
		w.w.Routed(keys, []*Snapshot{l.entry.snap}, nil)
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
	t.expireLocked(key)
}

// expireLocked makes the cached answer for key stale. It stays as a fallback and
// for the comparison with the next one.
func (t *table) expireLocked(key string) {
	if e, ok := t.cache.GetIfPresent(key); ok {
		t.cache.Set(key, &entry{snap: e.snap, fetched: e.fetched})
	}
}

func (t *table) invalidateAll() {
	for i := range t.homes {
		h := &t.homes[i]
		h.mu.Lock()
		for _, l := range h.lines {
			l.dirty = true
		}
		h.mu.Unlock()
	}
	for key := range t.cache.Keys() {
		h := &t.homes[t.dir.cfg.Home(key)]
		h.mu.Lock()
		t.expireLocked(key)
		h.mu.Unlock()
	}
}
