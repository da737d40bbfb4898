package route

import "strings"

// absent is what nodes have said against an answer: the users that they do not have,
// and the nodes that took nothing. A Controller that has been asked since, and stays
// with its answer, is not asked again for each push: for a TTL the node is believed.
type absent map[placed]denial

// placed is a user on a node, "" for all users of it.
type placed struct{ node, user string }

// denial is when a node first denied to have a user, and when it did so last.
type denial struct{ first, last nanos }

// note books that at some moment node denied to have users, nil for all, whom the answer
// e has there. It tells whether each of them had been denied before e was looked up, and
// that not longer than ttl ago. A denial that was not repeated for two of them is
// forgotten: the user may have been there meanwhile.
func (e *entry) note(node string, users []string, at, ttl nanos) (confirmed bool) {
	g := e.snap.Group(node)
	if g == nil {
		return false
	}
	if e.absent == nil {
		e.absent = make(absent)
	}
	if users == nil {
		users = []string{""}
	}
	confirmed = e.fetched+ttl > at
	for _, user := range users {
		if user != "" && !g.Has(user) {
			confirmed = false
			continue
		}
		key := placed{node, user}
		d, known := e.absent[key]
		if !known {
			e.absent.prune(at - 2*ttl)
			key.user = strings.Clone(user)
		}
		if !known || d.last+2*ttl < at {
			d.first = at
		}
		d.last = at
		e.absent[key] = d
		confirmed = confirmed && d.first < e.fetched
	}
	return confirmed
}

// keep forgets what s, which takes the place of old, does not stay with.
func (a absent) keep(s, old *Snapshot) {
	for key := range a {
		g := s.Group(key.node)
		if g == nil || key.user == "" && g != old.Group(key.node) || key.user != "" && !g.Has(key.user) {
			delete(a, key)
		}
	}
}

// prune forgets what was last said before then, each time that a has doubled.
func (a absent) prune(then nanos) {
	if n := len(a); n < 64 || n&(n-1) != 0 {
		return
	}
	for key, d := range a {
		if d.last < then {
			delete(a, key)
		}
	}
}
