package ids

import (
	"cmp"
	"crypto/sha256"
	"slices"
	"strings"
)

// LastTurn is the highest turn that there is.
const LastTurn = ^uint64(0)

// Turn is when a broadcast job comes to a user, among all users: the same on every node, as proto/README.md says. Turns are
// spread evenly.
func Turn(user string) uint64 {
	var array [MaxScopedBytes]byte // longer ids are allocated
	sum := sha256.Sum256(append(array[:0], user...))
	turn := uint64(0)
	for _, x := range sum[:8] {
		turn = turn<<8 | uint64(x)
	}
	return turn
}

// InTurn is a user with a turn.
type InTurn struct {
	Turn uint64
	User string
}

// Line has the users whose turn is First to Last. Of more than Limit it keeps the first ones, and lowers Last.
type Line struct {
	First, Last uint64 // Last may be lowered at any time
	Limit       int    // at least 1

	users []InTurn
}

// Add adds a user, if the user's turn is in the line. One who is added again stands there once.
func (l *Line) Add(user string) {
	turn := Turn(user)
	if turn < l.First || turn > l.Last {
		return
	}
	if l.users = append(l.users, InTurn{turn, user}); len(l.users) >= 4*l.Limit+64 { // so seldom that it costs little
		l.Cut(l.Limit)
	}
}

// Users are those of the line in the order of their turns: all with turns up to Last that were added.
func (l *Line) Users() []InTurn {
	l.Cut(l.Limit)
	return l.users
}

// Cut keeps the first n users, or none of the others with the turn of the n-th would have a turn again: those, too.
func (l *Line) Cut(n int) {
	slices.SortFunc(l.users, func(a, b InTurn) int {
		if a.Turn != b.Turn {
			return cmp.Compare(a.Turn, b.Turn)
		}
		return strings.Compare(a.User, b.User)
	})
	l.users = slices.Compact(l.users)
	for len(l.users) > 0 && l.users[len(l.users)-1].Turn > l.Last { // it may have been lowered since they came
		l.users = l.users[:len(l.users)-1]
	}
	if n = max(n, 1); len(l.users) <= n {
		return
	}
	for n < len(l.users) && l.users[n].Turn == l.users[n-1].Turn {
		n++
	}
	if n < len(l.users) {
		l.users, l.Last = l.users[:n], l.users[n-1].Turn
	}
}
