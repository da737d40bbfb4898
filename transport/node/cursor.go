package node

import (
	"container/list"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/internal/position"
)

// LogPlace is where a message to a room stands in the logs of rooms. Seq rises within the partition.
type LogPlace struct {
	Epoch     uint64
	Partition uint32
	Seq       uint64
	// Exclude are users of the room who do not get it; sorted.
	Exclude []string
	// Read says that it was read from the log, for a client that had missed it.
	Read bool
}

// LogConn is a connection whose client keeps its position in the logs of rooms, see [Cursor].
type LogConn interface {
	// DeliverLasting is that of [LastingConn]. A message of a log (Options.Log) that the connection does not
	// take now, it is given again.
	DeliverLasting(m *Message, c *Confirmation) Outcome
	// Resume gives the client its position, behind everything that the connection has taken so far. False: there is no room in its queue, it is
	// called again. It is called at most once a second, from any goroutine, without a lock.
	Resume(position string) bool
	// Gap tells the client that messages of the room are missing which are not kept any more. It is called as Resume is.
	Gap(room string) bool
}

// Cursor is one connection's part in the logs of the rooms that its client is in. A gateway makes it when the connection
// begins, calls Expect, Join and Leave as the client joins and leaves rooms, asks Holds for each message of a log before it takes it,
// and calls Close when the connection has ended. The methods may be called from any goroutine; they call nobody back and wait for
// nobody. A nil Cursor is that of a client that keeps no position.
type Cursor struct {
	// Static.
	logs *roomLogs
	user string
	conn LogConn

	holding atomic.Int32 // rooms whose live messages wait; changed under roomLogs.mu

	cursorState // Guarded by roomLogs.mu.
}

// cursorState is what roomLogs know of a cursor.
type cursorState struct {
	closed   bool
	rooms    []*logMember        // by name
	expected map[string][]uint64 // rooms that it is about to join; the values are those of logMember.from
	behind   int                 // of rooms

	// Where the client is. given is what it has brought, until the node knows its own place; base is what it has
	// brought or was told since, by partition. It is shared and not changed. has: the client holds a
	// position; without one, what was said before is not for it.
	given  *position.Position
	base   []uint64
	has    bool
	broken bool // given is of another epoch

	joined  time.Time     // when it has begun with a position, or joined a room from it
	settled time.Time     // when it was told its position, or has begun
	dirty   bool          // it is to be told one
	byAge   *list.Element // in roomLogs.byAge
}

// Cursor returns one for a connection of user, as managers know it ([Tenant.ID]). position is what the client has kept from
// its last connection or from the answer to a push, "" for a client that has none: what was said before is not for it then. The error, for a
// position that is none, is position.ErrMalformed.
//
// Where Sessions do not name FEATURE_ROOM_LOG, and beyond Config.MaxGates, the Cursor is nil.
func (s *Server) Cursor(user string, conn LogConn, position string) (*Cursor, error) {
	return s.roomLogs.cursor(user, conn, position, time.Now())
}

// Expect says that the client wants to join a room, and is not in it yet. It is told no position until Join or Leave of this room: one
// that is told before would not have what the room's log has behind the last one.
// Managers may know of the client from then on, and book as stored what the connection does not take.
func (c *Cursor) Expect(room string) {
	if c != nil {
		c.logs.expect(c, room)
	}
}

// Join says that the client has joined a room, as managers know it, and will take its messages from now on: what the log has behind the
// client's position is read for it, before newer ones of the log are shown.
func (c *Cursor) Join(room string) {
	if c != nil {
		c.logs.enter(c, room, time.Now())
	}
}

// Leave says that the client has left a room, or does not come into one that was expected.
func (c *Cursor) Leave(room string) {
	if c != nil {
		c.logs.exit(c, room)
	}
}

// Holds tells that m, which is a live one, must not be taken now: it comes out of the log, behind what the client is being
// given from there. The connection answers Failed, which the manager books as stored.
func (c *Cursor) Holds(m *Message) bool {
	if c == nil || c.holding.Load() == 0 || m.Options == nil || m.Options.Log == nil || m.Options.Log.Read {
		return false
	}
	return c.logs.holds(c, m.RoomID, m.Options.Log, time.Now())
}

// Close says that the connection has ended. It may be called again.
func (c *Cursor) Close() {
	if c != nil {
		c.logs.leave(c)
	}
}
