package route

import "slices"

// What several rooms come to: each user once on each node that one of the rooms has him on. Nothing here knows of caches or time.

// joined is base, which old come to, once they are now: the same pointer if that changes nothing. It is nil where that takes no
// less than to unite now, or cannot be told.
func (d *Directory) joined(base *Snapshot, old, now []*Snapshot) *Snapshot {
	if !base.Found || !slices.ContainsFunc(now, func(s *Snapshot) bool { return s.Found }) {
		return nil
	}
	work := movesMost // that may be spent, in users looked at
	for _, s := range now {
		work += s.Users
	}
	var moves []Move
	for i := range now {
		before, after := old[i].told(), now[i].told()
		if before == after {
			continue
		}
		if len(before.Unplaced)+len(after.Unplaced) > 0 {
			return nil
		}
		for _, g := range slices.Concat(before.Groups, after.Groups) {
			was, is := before.Group(g.Node), after.Group(g.Node)
			if was == is || was != nil && g == is {
				continue // nothing has changed there, or it has been seen to
			}
			for _, user := range different(was.members(), is.members()) {
				m := Move{User: user, Node: g.Node}
				if work -= 2; !is.Has(user) { // and may be in another room
					work -= len(now)
					m.Left = !slices.ContainsFunc(now, func(s *Snapshot) bool { return s.Group(g.Node).Has(user) })
				}
				if work < 0 {
					return nil
				}
				moves = append(moves, m)
			}
		}
	}
	if len(moves) == 0 {
		return base
	}
	return d.moved(base, moves)
}

// unite is what snaps come to, of which those that are nil are left out; with only, which is sorted, for nobody but these users.
// Groups of old that are unchanged stay; it may be nil.
func (d *Directory) unite(snaps []*Snapshot, old *Snapshot, only []string) *Snapshot {
	b, ok := d.builders.Get().(*builder)
	if !ok {
		b = newBuilder(d.seed, d.names)
	}
	found := false
	byNode := make(map[string][][]string) // "": of those whom the Controller names no node for
	for _, s := range snaps {
		if s == nil {
			continue
		}
		found = found || s.Found
		for _, g := range s.Groups {
			byNode[g.Node] = append(byNode[g.Node], g.Users)
		}
		byNode[""] = append(byNode[""], s.Unplaced)
	}
	seen := make(map[string]struct{})
	for node, lists := range byNode {
		clear(seen)
		for _, users := range lists {
			if only != nil {
				users = Intersect(only, users)
			}
			for _, user := range users {
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

// asStale is s, which snaps come to: stale if one of these is.
func asStale(s *Snapshot, snaps []*Snapshot) *Snapshot {
	var oldest *Stale
	changed := false
	for _, room := range snaps {
		if room == nil || room.Stale == nil {
			continue
		}
		if oldest == nil || room.Stale.Known.Before(oldest.Known) {
			oldest = room.Stale
		}
		changed = changed || room.Stale.Changed
	}
	if oldest == nil {
		return s
	}
	return s.stale(oldest.Known, changed)
}

// different lists who is in only one of two sorted lists.
func different(a, b []string) (users []string) {
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0] < b[0]:
			users, a = append(users, a[0]), a[1:]
		case b[0] < a[0]:
			users, b = append(users, b[0]), b[1:]
		default:
			a, b = a[1:], b[1:]
		}
	}
	return append(append(users, a...), b...)
}

// Intersect returns the members of some that are in all; both are sorted.
func Intersect(some, all []string) []string {
	if len(some) > len(all) {
		some, all = all, some
	}
	var both []string
	for _, user := range some {
		n := 1 // how far to search: lists of the same length are merged, a short one is looked up
		for n < len(all) && all[n-1] < user {
			n *= 2
		}
		i, ok := slices.BinarySearch(all[:min(n, len(all))], user)
		if ok {
			both = append(both, user)
		}
		all = all[i:]
	}
	return both
}
