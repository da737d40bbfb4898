package route

import (
	"cmp"
	"hash/maphash"
	"slices"
	"strings"
	"sync/atomic"
)

// Move says that a user is a member of a room on a node, or is not any more: a fact, and no
// step. Revision numbers the changes of the Controller.
type Move struct {
	Room, User, Node string
	Left             bool
	Revision         uint64
}

const (
	// movesMost is how many moves may wait for the next query about a room, and movesPart
	// for one more of how many members: with more it is cheaper to look the room up again.
	movesMost = 1024
	movesPart = 32
)

// backlog is what an answer about a room still lacks.
type backlog struct {
	revision uint64 // of the answer, as it was looked up
	// Whether there are moves: Table.Cached looks at nothing else.
	behind atomic.Bool
	moves  []Move // in the order of their coming; guarded by the mu of the key's lane
}

// behind tells whether e is not up to date before catchUp.
func (e *entry) behind() bool { return e.backlog != nil && e.backlog.behind.Load() }

// Moved says where members of rooms are now, and that the answers about these users have changed.
// The caller is the change stream, which brings each change once it can be looked up; moves
// of one room, user and node come in the order of their revisions. A room whose answer has
// no revision is forgotten.
func (d *Directory) Moved(moves []Move) {
	for _, m := range moves {
		if now := d.revision.Load(); m.Revision > now {
			d.revision.Store(m.Revision) // nobody else writes meanwhile
		}
		d.Rooms.move(m)
		d.Users.invalidate(m.User)
	}
}

// move notes what has changed about a room. The next query brings the answer up to date.
func (t *Table) move(m Move) {
	ln := &t.lanes[t.dir.cfg.Shard(m.Room)]
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if l := ln.lines[m.Room]; l != nil {
		switch {
		case !l.looking || len(l.moves) >= movesMost:
			l.dirty, l.announced = true, true
		default:
			if len(l.moves) == 0 {
				l.before = len(l.waiters)
			}
			l.moves = append(l.moves, m)
		}
	}
	e, ok := t.cache.GetIfPresent(m.Room)
	if !ok {
		return
	}
	b := e.backlog
	if b == nil || e.generation != t.dir.generation.Load() || len(b.moves) >= movesMost+e.snap.Users/movesPart {
		t.put(m.Room, t.changed(e, true))
		return
	}
	if m.Revision > b.revision {
		b.moves = append(b.moves, m)
		b.behind.Store(true)
		t.changes.Add(1)
	}
}

// currentLocked is the answer for key that is known, up to date as far as the change stream goes.
func (t *Table) currentLocked(ln *lane, key string) (*entry, bool) {
	e, ok := t.cache.GetIfPresent(key)
	if !ok || !e.behind() || e.generation != t.dir.generation.Load() {
		return e, ok
	}
	ln.moves.Add(uint64(len(e.backlog.moves)))
	s := t.dir.moved(e.snap, e.backlog.moves)
	var next *entry
	if s == nil {
		next = t.changed(e, true)
	} else {
		next = &entry{
			snap: s, fetched: e.fetched, known: e.known, freshUntil: e.freshUntil, generation: e.generation,
			absent: e.absent, backlog: &backlog{revision: e.backlog.revision},
		}
		next.renewAt.Store(e.renewAt.Load())
		if s != e.snap {
			next.absent.keep(s, e.snap)
		}
	}
	if l := ln.lines[key]; l != nil && l.old == e {
		l.old = next
	}
	t.put(key, next)
	next.snap.published.CompareAndSwap(0, int64(t.dir.now()))
	return next, true
}

// applyLocked brings the answer s of a look-up up to date with what has changed while it was under
// way, of which the answer has all up to revision; 0: nobody knows. False: it has to be looked up
// again for who has come since. Called under the lock.
func (t *Table) applyLocked(l *line, s *Snapshot, revision uint64) (*Snapshot, bool) {
	if len(l.moves) == 0 {
		return s, true
	}
	missing := slices.DeleteFunc(l.moves, func(m Move) bool { return m.Revision <= revision })
	l.moves = nil
	if revision != 0 && s != nil {
		if len(missing) == 0 {
			return s, true
		}
		if now := t.dir.moved(s, missing); now != nil {
			return now, true
		}
	}
	l.behind()
	l.dirty, l.announced = true, true
	return s, false
}

// behind has who has come since the first of moves wait for the next look-up.
func (l *line) behind() {
	l.next = append(slices.Clone(l.waiters[l.before:]), l.next...)
	l.waiters = l.waiters[:l.before:l.before]
}

// moved is s after moves, s itself if nothing is different, and nil if that cannot be told. It
// copies the groups that have changed: for a query, and not for each move.
func (d *Directory) moved(s *Snapshot, moves []Move) *Snapshot {
	if !s.Found || len(s.Unplaced) > 0 {
		return nil
	}
	moves = slices.Clone(moves)
	slices.SortStableFunc(moves, func(a, b Move) int {
		return cmp.Or(strings.Compare(a.Node, b.Node), strings.Compare(a.User, b.User))
	})
	last := moves[:0]
	for i, m := range moves { // the last one of each user and node stands for all
		if i+1 == len(moves) || moves[i+1].Node != m.Node || moves[i+1].User != m.User {
			last = append(last, m)
		}
	}
	moves = last

	next := &Snapshot{Found: true, Users: s.Users, Groups: slices.Clone(s.Groups), Shared: s.Shared}
	var users []string // who has moved
	for len(moves) > 0 {
		n := 1
		for n < len(moves) && moves[n].Node == moves[0].Node {
			n++
		}
		i, ok := slices.BinarySearchFunc(next.Groups, moves[0].Node, func(g *Group, node string) int { return strings.Compare(g.Node, node) })
		if !ok {
			next.Groups = slices.Insert(next.Groups, i, &Group{Node: d.names.of([]byte(moves[0].Node))})
		}
		g, ok := d.regroup(next.Groups[i], moves[:n], &users)
		switch {
		case !ok:
			return nil
		case len(g.Users) == 0:
			next.Groups = slices.Delete(next.Groups, i, i+1)
		default:
			next.Groups[i] = g
		}
		moves = moves[n:]
	}
	switch {
	case len(users) == 0:
		return s
	case len(next.Groups) == 0:
		return nil // whether there still is such a room only the Controller knows
	}
	slices.Sort(users)
	users = slices.Compact(users)
	var shared []string
	for _, user := range users {
		before, after := holders(s.Groups, user), holders(next.Groups, user)
		next.Users += min(after, 1) - min(before, 1)
		if after > 1 {
			shared = append(shared, user)
		}
	}
	if len(s.Shared)+len(shared) > 0 {
		for _, user := range s.Shared {
			if _, moved := slices.BinarySearch(users, user); !moved {
				shared = append(shared, user)
			}
		}
		slices.Sort(shared)
		next.Shared = shared
	}
	return next
}

// regroup is g after moves of its node, which are sorted by user, each once. It adds to users
// whose place has changed. False: the Controller has listed somebody twice, and how often
// somebody stands there is not known.
func (d *Directory) regroup(g *Group, moves []Move, users *[]string) (*Group, bool) {
	if g.twice {
		return nil, false
	}
	next := &Group{Node: g.Node, Users: make([]string, 0, len(g.Users)+len(moves)), hash: g.hash, loose: g.loose}
	had, at := len(*users), 0
	for _, m := range moves {
		i, has := slices.BinarySearch(g.Users[at:], m.User)
		if has != m.Left {
			continue // it is known
		}
		i += at
		next.Users = append(next.Users, g.Users[at:i]...)
		if at = i; m.Left {
			at++ // it is left out
			next.hash -= maphash.String(d.seed, m.User)
		} else {
			next.Users = append(next.Users, m.User)
			next.hash += maphash.String(d.seed, m.User)
		}
		*users = append(*users, m.User)
	}
	if len(*users) == had {
		return g, true
	}
	next.Users = append(next.Users, g.Users[at:]...)
	// Those who have left keep the block of ids in which they stood, as long as anybody of it
	// is there: it is copied before that is more than what is needed.
	if next.loose += len(*users) - had; next.loose > len(next.Users) {
		next.pack()
	}
	return next, true
}

// pack copies the ids of a group into one block.
func (g *Group) pack() {
	g.loose = 0
	size := 0
	for _, user := range g.Users {
		size += len(user)
	}
	var block strings.Builder
	block.Grow(size)
	for i, user := range g.Users {
		from := block.Len()
		block.WriteString(user)
		g.Users[i] = block.String()[from:]
	}
}

func holders(groups []*Group, user string) int {
	n := 0
	for _, g := range groups {
		if g.Has(user) {
			n++
		}
	}
	return n
}
