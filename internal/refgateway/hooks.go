package refgateway

import (
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/push-manager/push-manager/internal/hooks"
)

// told is what hooks know of a connection. Guarded by conn.mu, which also puts events in order.
type told struct {
	here  bool
	rooms map[string]struct{} // as the client names them; nil while there are none
}

// closeNone stands for the close code of a connection that ended without one (RFC 6455, 7.1.5).
const closeNone = 1006

// connectionID names the connection among those of this process.
func (c *conn) connectionID() string { return strconv.FormatUint(c.id, 36) }

// emitLocked tells hooks of something.
func (c *conn) emitLocked(kind hooks.Kind, room string, code uint16) {
	c.g.cfg.Hooks.Emit(hooks.Event{
		Kind: kind, At: time.Now(), Boot: c.g.node.BootID(), Tenant: string(c.tenant), User: c.user, Room: room, Connection: c.connectionID(), Device: c.device(), Code: code,
	})
}

// begun tells hooks that the user is here.
func (c *conn) begun() {
	if c.g.cfg.Hooks == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told.here = true
	c.emitLocked(hooks.Connect, "", 0)
}

// entered tells hooks that the connection is in a room. One that has ended is not.
func (c *conn) entered(room string) {
	if c.g.cfg.Hooks == nil || room == "" {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, twice := c.told.rooms[room]; twice || !c.told.here {
		return
	}
	if c.told.rooms == nil {
		c.told.rooms = make(map[string]struct{})
	}
	c.told.rooms[room] = struct{}{}
	c.emitLocked(hooks.Join, room, 0)
}

// exited tells hooks that the connection is out of a room.
func (c *conn) exited(room string) {
	if c.g.cfg.Hooks == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known := c.told.rooms[room]; known {
		delete(c.told.rooms, room)
		c.emitLocked(hooks.Leave, room, 0)
	}
}

// over tells hooks that the connection has ended, and left its rooms before that.
func (c *conn) over() {
	if c.g.cfg.Hooks == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.told.here {
		return
	}
	for _, room := range slices.Sorted(maps.Keys(c.told.rooms)) {
		c.emitLocked(hooks.Leave, room, 0)
	}
	c.told = told{}
	code := c.last
	if code == 0 {
		code = closeNone
	}
	c.emitLocked(hooks.Disconnect, "", code)
}
