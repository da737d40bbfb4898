package node

import (
	"hash/maphash"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Conn is a connection of a user, as [Users] knows it.
type Conn interface {
	comparable

	// Deliver puts m into the connection's bounded queue, and never waits. It returns NotHere when
	// m.RoomID names a room that the connection is not in, when it is in none of m.Rooms, or when it is ending, and
	// Failed when the queue is full. m is shared, see [Message].
	Deliver(m *Message) Outcome
}

// Users are Sessions, Scoped, Lister and Describer: they know the connections of each user, and hand messages to them. Those of
// connections that are [Attributed] are Filtering, too. A gateway adds a connection when it begins and removes it when it has ended.
type Users[C Conn] struct {
	// Static after NewUsers.
	seed     maphash.Seed
	features []pubsub.Feature
	lasting  func(c C, m *Message, wait *Confirmation) Outcome // nil: they take no part in lasting delivery
	filters  bool                                              // C is Attributed
	parts    [64]usersPart[C]

	online, connections atomic.Int64
}

type usersPart[C Conn] struct {
	mu    sync.RWMutex
	users map[string][]C // Guarded by mu. The slices are never changed, only replaced.
	_     [32]byte       // two parts on one cache line would slow each other
}

// NewUsers returns Users without a connection.
func NewUsers[C Conn]() *Users[C] {
	u := &Users[C]{seed: maphash.MakeSeed(), filters: reflect.TypeFor[C]().Implements(reflect.TypeFor[Attributed]())}
	for i := range u.parts {
		u.parts[i].users = make(map[string][]C)
	}
	return u
}

// NewLastingUsers is NewUsers for connections that take part in lasting delivery, in the features that are named:
// see [Lasting].
func NewLastingUsers[C LastingConn](features ...pubsub.Feature) *Users[C] {
	u := NewUsers[C]()
	u.features, u.lasting = features, C.DeliverLasting
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

// EachUser implements Lister.
func (u *Users[C]) EachUser(yield func(user string) bool) {
	var users []string
	for i := range u.parts {
		p := &u.parts[i]
		p.mu.RLock()
		users = users[:0]
		for user := range p.users {
			users = append(users, user)
		}
		p.mu.RUnlock()
		for _, user := range users {
			if !yield(user) {
				return
			}
		}
	}
}

// Connections is the number of connections now.
func (u *Users[C]) Connections() int { return int(u.connections.Load()) }

// Online implements Sessions.
func (u *Users[C]) Online() int { return int(u.online.Load()) }

// Deliver implements Sessions.
func (u *Users[C]) Deliver(user string, m *Message) Outcome { return deliverTo(u.Of(user), m) }

// Features implements Lasting.
func (u *Users[C]) Features() []pubsub.Feature { return u.features }

// DeliverLasting implements Lasting.
func (u *Users[C]) DeliverLasting(user string, m *Message, wait *Confirmation) Outcome {
	return u.deliverLasting(u.Of(user), m, wait)
}

// Filters implements Filtering.
func (u *Users[C]) Filters() bool { return u.filters }

// DeliverFiltered implements Filtering.
func (u *Users[C]) DeliverFiltered(user string, f Filter, m *Message, wait *Confirmation) Outcome {
	return u.deliverFiltered(u.Of(user), f, m, wait)
}

// Broadcast implements Sessions.
func (u *Users[C]) Broadcast(m *Message) (delivered, failed int) { return u.BroadcastScope("", m) }

// BroadcastScope implements Scoped. It looks at the ids of all users.
func (u *Users[C]) BroadcastScope(scope string, m *Message) (delivered, failed int) {
	u.eachOf(scope, func(conns []C) {
		var outcome Outcome
		if m.Options == nil || u.lasting == nil {
			outcome = deliverTo(conns, m)
		} else {
			outcome = u.deliverLasting(conns, m, nil)
		}
		switch outcome {
		case Delivered, Pending, Duplicate:
			delivered++
		case NotHere: // The user has just gone.
		default:
			failed++
		}
	})
	return delivered, failed
}

// BroadcastFiltered implements Filtering. It looks at the ids of all users.
func (u *Users[C]) BroadcastFiltered(scope string, f Filter, m *Message) (delivered, failed, filtered int) {
	u.eachOf(scope, func(conns []C) {
		switch u.deliverFiltered(conns, f, m, nil) {
		case Delivered, Pending, Duplicate:
			delivered++
		case NotHere: // The user has just gone.
		case Filtered:
			filtered++
		default:
			failed++
		}
	})
	return delivered, failed, filtered
}

// deliverFiltered hands m to those of one user's connections for which f is. Only while no other has anything to say, it asks one
// that f leaves out whether it is in the room: if none is, the route may be out of date.
func (u *Users[C]) deliverFiltered(conns []C, f Filter, m *Message, wait *Confirmation) Outcome {
	outcome := NotHere
	for _, c := range conns {
		at := any(c).(Attributed)
		if !f.Matches(at.Attributes()) {
			if outcome == NotHere && (m.RoomID == "" && m.Rooms == nil || at.IsFor(m)) {
				outcome = Filtered
			}
			continue
		}
		var got Outcome
		if m.Options == nil || u.lasting == nil {
			got = c.Deliver(m)
		} else {
			got = u.lasting(c, m, wait)
		}
		if worth(got) > worth(outcome) {
			outcome = got
		}
	}
	return outcome
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

// deliverLasting is deliverTo for a message with Options. Where one connection has taken it, the user is delivered
// as soon as that is worth it: at once if one of them cannot acknowledge, else when one has. A user is a duplicate
// if no connection has taken it and one had it before.
func (u *Users[C]) deliverLasting(conns []C, m *Message, wait *Confirmation) Outcome {
	outcome := NotHere
	for _, c := range conns {
		got := u.lasting(c, m, wait)
		if worth(got) > worth(outcome) {
			outcome = got
		}
	}
	return outcome
}

// worth orders outcomes: of those of one user's connections the best is the user's.
func worth(o Outcome) int {
	switch o {
	case NotHere:
		return 0
	case Filtered:
		return 1
	case Reused:
		return 3
	case Expired, Stalled:
		return 4
	case Duplicate:
		return 5
	case Pending:
		return 6
	case Delivered:
		return 7
	default:
		return 2
	}
}
