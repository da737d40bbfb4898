package refgateway

import (
	"errors"
	"strings"

	"github.com/push-manager/push-manager/transport/node"
)

// join asks the Controller to let the client into a room, a name as the client says it.
func (c *conn) join(name string) error {
	room := c.tenant.ID(name)
	if r, refused := c.g.node.RefusedRoom(room); refused {
		return errors.New(strings.TrimSuffix("room_id: refused: "+r.Reason, ": "))
	}
	c.expect(room, true)
	err := c.member.Join(name)
	if err != nil {
		c.expect(room, false)
		return err //nolint:wrapcheck // The client is told.
	}
	if _, refused := c.g.node.RefusedRoom(room); refused { // it has come in between those who were in the room and the refusal
		_ = c.member.Leave(name) // it is in
		c.unfollow(room)
	}
	return nil
}

// expect says whether the client is about to come into a room.
func (c *conn) expect(room string, comes bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.logs[room]; ok {
		return
	}
	if comes {
		c.cursor.Expect(room)
	} else {
		c.cursor.Leave(room)
	}
}

// follow has the client read the log of a room, once the Controller has let the client in: what others wrote there is not
// for one whom it refuses. The lock keeps what comes live behind that.
func (c *conn) follow(room string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.logs[room]; ok || c.cursor == nil || !c.member.In(room) { // it may have left meanwhile
		return
	}
	if c.logs == nil {
		c.logs = make(map[string]struct{})
	}
	c.logs[room] = struct{}{}
	c.cursor.Join(room)
}

// unfollow comes when the connection is out of the room.
func (c *conn) unfollow(room string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.member.In(room) { // the word that it was refused comes after it has joined anew
		return
	}
	delete(c.logs, room)
	c.cursor.Leave(room)
}

// loggedLocked settles a message of a log that must not be taken now by a client that keeps its position. Failed is no
// loss: it comes out of the log.
func (c *conn) loggedLocked(m *node.Message) (outcome node.Outcome, settled bool) {
	if c.cursor == nil || m.Options == nil || m.Options.Log == nil {
		return 0, false
	}
	_, follows := c.logs[m.RoomID]
	switch {
	case m.Options.Log.Read:
		return node.NotHere, !follows // read for an earlier stay
	case !follows, c.cursor.Holds(m):
		return node.Failed, true
	}
	return 0, false
}

// isRead tells that m was read from a log.
func isRead(m *node.Message) bool {
	return m.Options != nil && m.Options.Log != nil && m.Options.Log.Read
}

// Resume implements node.LogConn. A position must not overtake what was taken and is not in the queue.
func (c *conn) Resume(position string) bool { return c.say(control("resume", "token", position)) }

// Gap implements node.LogConn. It stands behind what was taken, as a position does, which may follow it.
func (c *conn) Gap(room string) bool {
	return c.say(control("gap", "room_id", c.tenant.Plain(room)))
}

// say queues a frame behind all that was taken, if there is room for it now. Nobody is cut off for it.
func (c *conn) say(f *frame) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return true // It reaches nobody any more.
	case c.inbox.Holds() || !c.spareLocked() || c.g.crowded(c.frames, c.bytes+len(f.head)):
		return false
	}
	c.appendLocked(queued{frame: f})
	return true
}
