package membership

import (
	"slices"
	"sync"

	"github.com/push-manager/push-manager/internal/ids"
)

// Client is told what the Controller has said. An empty room stands for the node itself:
// Joined("") means that pushes to the user arrive here from now on. The methods are called
// without a lock, by the Reporter's goroutines or from within Join and Leave, and must not
// block.
type Client interface {
	// Joined: the Controller knows, so pushes to the room arrive.
	Joined(room string)
	// Left: the Controller knows, or was never told.
	Left(room string)
	// Refused: the Controller does not let the user in, for good. The connection is out of
	// the room.
	Refused(room, why string)
}

// Member is one connection of a user. Its methods may be called from any goroutine.
type Member struct {
	// Static.
	r          *Reporter
	client     Client
	scope      string // what its tenant has before its ids, "" without a tenant
	user, name string

	mu    sync.RWMutex
	rooms []string // Guarded by mu. Sorted: most connections have two. Changed under the Reporter's lock, too.

	// Rooms that the connection has left and has not been told so. Guarded by the
	// Reporter's lock.
	leaving map[string]struct{}
}

// Member is a connection of a user that is in no room yet. Join("") says that its user is here.
func (r *Reporter) Member(user, name string, client Client) *Member {
	return &Member{r: r, client: client, user: user, name: name}
}

// TenantMember is Member for a connection of a tenant's user. user, and the rooms of Join and
// Leave and of what the client is told, are the tenant's own; the Controller gets them with the
// tenant before them, as it has its pushes. In takes the room as a push names it. tenant must be
// valid, see node.Tenant.
func (r *Reporter) TenantMember(tenant, user, name string, client Client) *Member {
	scope := ids.Scope(tenant)
	return &Member{r: r, client: client, scope: scope, user: scope + user, name: name}
}

// named is the room as the Controller knows it: the node's own has no name for clients.
func (m *Member) named(room string) string {
	if room == "" {
		return m.r.presence
	}
	return m.scope + room
}

// shown is the room as the client knows it.
func (m *Member) shown(room string) string {
	if room == m.r.presence {
		return ""
	}
	return room[len(m.scope):]
}

// Join puts the connection into the room at once. The client is told when the Controller
// knows. An empty room says that the user is here; it comes first.
func (m *Member) Join(room string) error { return m.r.join(m, m.named(room)) }

// Leave takes the connection out of the room at once. The client is told when the
// Controller knows.
func (m *Member) Leave(room string) error { return m.r.leave(m, m.named(room)) }

// Close takes the connection, which has ended, out of all its rooms.
func (m *Member) Close() { m.r.drop(m) }

// In tells whether the connection is in the room: has joined it and not left. It is
// cheap enough to be asked for each push. The node's own room is none: a push to it would
// be a broadcast, which is a right of its own.
func (m *Member) In(room string) bool { return room != m.r.presence && m.holds(room) }

// FirstOf is the room, as pushes name it, that has the first place of those that the connection is in. False: none of them has
// a place.
func (m *Member) FirstOf(place func(room string) (int, bool)) (first string, is bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	least := 0
	for _, room := range m.rooms {
		if at, has := place(room); has && (!is || at < least) && room != m.r.presence {
			first, least, is = room, at, true
		}
	}
	return first, is
}

// holds is In for any room.
func (m *Member) holds(room string) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	_, ok := slices.BinarySearch(m.rooms, room)
	return ok
}

// Rooms are those that the connection is in, as its client knows them. The node itself is none.
func (m *Member) Rooms() []string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	rooms := make([]string, 0, len(m.rooms))
	for _, room := range m.rooms {
		if name := m.shown(room); name != "" {
			rooms = append(rooms, name)
		}
	}
	return rooms
}

func (m *Member) count() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return len(m.rooms)
}

func (m *Member) enter(room string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i, ok := slices.BinarySearch(m.rooms, room); !ok {
		m.rooms = slices.Insert(m.rooms, i, room)
	}
}

func (m *Member) exit(room string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i, ok := slices.BinarySearch(m.rooms, room); ok {
		m.rooms = slices.Delete(m.rooms, i, i+1)
	}
}
