package node

import (
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// Conn is a connection of a user, as [Users] knows it.
type Conn interface {
	comparable

	// Deliver puts m into the connection's bounded queue, and never waits. It returns NotHere when
	// m.RoomID names a room that the connection is not in, or when the connection is ending, and
	// Failed when the queue is full. m is shared, see [Message].
	Deliver(m *Message) Outcome
}

// Users are Sessions, and Scoped: they know the connections of each user, and hand messages to them. A gateway
// adds a connection when it begins and removes it when it has ended.
type Users[C Conn] struct {
	// Static after NewUsers.
	seed  maphash.Seed
	parts [64]usersPart[C]

	online, connections atomic.Int64
}

type usersPart[C Conn] struct {
	mu    sync.RWMutex
	users map[string][]C // Guarded by mu. The slices are never changed, only replaced.
	_     [32]byte       // two parts on one cache line would slow each other
}

// NewUsers returns Users without a connection.
func NewUsers[C Conn]() *Users[C] {
	u := &Users[C]{seed: maphash.MakeSeed()}
	for i := range u.parts {
		u.parts[i].users = make(map[string][]C)
	}
	return u
}

func (u *Users[C]) part(user string) *usersPart[C] {
	return &u.parts[maphash.String(u.seed, user)%uint64(len(u.parts))]
}

// Add adds a connection of the user, who may have others. The id of a tenant's user is [Tenant.ID].
func (u *Users[C]) Add(user string, c C) {
	p := u.part(user)
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.users[user]
	if len(before) == 0 {
		u.online.Add(1)
	}
	p.users[user] = append(slices.Clip(before), c)
	u.connections.Add(1)
}

// Remove removes a connection. One that was not added, or was removed before, is none.
func (u *Users[C]) Remove(user string, c C) {
	p := u.part(user)
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.users[user]
	i := slices.Index(before, c)
	if i < 0 {
		return
	}
	u.connections.Add(-1)
	if len(before) == 1 {
		delete(p.users, user)
		u.online.Add(-1)
		return
	}
	p.users[user] = slices.Concat(before[:i], before[i+1:])
}

// Of returns the connections of the user. The slice must not be changed.
func (u *Users[C]) Of(user string) []C {
	p := u.part(user)
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.users[user]
}

// Each calls f with the connections of every user, without a lock.
func (u *Users[C]) Each(f func(conns []C)) { u.eachOf("", f) }

// eachOf is Each for the users whose ids begin with scope.
func (u *Users[C]) eachOf(scope string, f func(conns []C)) {
	var users [][]C
	for i := range u.parts {
		p := &u.parts[i]
		p.mu.RLock()
		users = users[:0]
		for user, conns := range p.users {
			if strings.HasPrefix(user, scope) {
				users = append(users, conns)
			}
		}
		p.mu.RUnlock()
		for _, conns := range users {
			f(conns)
		}
	}
}

// Connections is the number of connections now.
func (u *Users[C]) Connections() int { return int(u.connections.Load()) }

// Online implements Sessions.
func (u *Users[C]) Online() int { return int(u.online.Load()) }

// Deliver implements Sessions.
func (u *Users[C]) Deliver(user string, m *Message) Outcome { return deliverTo(u.Of(user), m) }

// Broadcast implements Sessions.
func (u *Users[C]) Broadcast(m *Message) (delivered, failed int) { return u.BroadcastScope("", m) }

// BroadcastScope implements Scoped. It looks at the ids of all users.
func (u *Users[C]) BroadcastScope(scope string, m *Message) (delivered, failed int) {
	u.eachOf(scope, func(conns []C) {
		switch deliverTo(conns, m) {
		case Delivered:
			delivered++
		case NotHere: // The user has just gone.
		case Failed:
			failed++
		}
	})
	return delivered, failed
}

// deliverTo returns the best of what the connections of one user answer. None of them may be in the room.
func deliverTo[C Conn](conns []C, m *Message) Outcome {
	outcome := NotHere
	for _, c := range conns {
		switch got := c.Deliver(m); {
		case got == Delivered:
			outcome = Delivered
		case got != NotHere && outcome == NotHere:
			outcome = Failed
		}
	}
	return outcome
}
