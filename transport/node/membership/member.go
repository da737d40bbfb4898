package membership

import (
	"strings"
	"sync"
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
	user, name string

	mu    sync.RWMutex
	rooms map[string]struct{} // Guarded by mu. Changed under the Reporter's lock, too.

	// Rooms that the connection has left and has not been told so. Guarded by the
	// Reporter's lock.
	leaving map[string]struct{}
}

// Member is a connection that is in no room yet. Join("") says that its user is here.
func (r *Reporter) Member(user, name string, client Client) *Member {
	return &Member{r: r, client: client, user: user, name: name}
}

// Join puts the connection into the room at once. The client is told when the Controller
// knows. An empty room says that the user is here; it comes first.
func (m *Member) Join(room string) error { return m.r.join(m, m.r.named(room)) }

// Leave takes the connection out of the room at once. The client is told when the
// Controller knows.
func (m *Member) Leave(room string) error { return m.r.leave(m, m.r.named(room)) }

// Close takes the connection, which has ended, out of all its rooms.
func (m *Member) Close() { m.r.drop(m) }

// In tells whether the connection is in the room: has joined it and not left. It is
// cheap enough to be asked for each push.
func (m *Member) In(room string) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	_, ok := m.rooms[room]
	return ok
}

// Rooms are those that the connection is in. The node itself is none.
func (m *Member) Rooms() []string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	rooms := make([]string, 0, len(m.rooms))
	for room := range m.rooms {
		if !strings.HasPrefix(room, Reserved) {
			rooms = append(rooms, room)
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
	if m.rooms == nil {
		m.rooms = make(map[string]struct{})
	}
	m.rooms[room] = struct{}{}
}

func (m *Member) exit(room string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.rooms, room)
}
