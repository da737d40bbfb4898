package node

import (
	"sync/atomic"
	"time"
)

// Gated is a connection that takes part in replay.
type Gated interface {
	// DeliverLasting is that of [LastingConn]. A message out of the store comes to the connection
	// that has asked for it and to no other.
	DeliverLasting(m *Message, c *Confirmation) Outcome
	// Opened says that the gate has opened: what the Inbox has held may be taken out by Pop. It is
	// called without a lock, and must not block.
	Opened()
}

// Gate is one connection's part in replay. While it is closed, direct messages wait in the connection's
// [Inbox] and those out of the store pass, so that what was stored comes before what is new. The methods
// may be called from any goroutine; they call nobody back and wait for nobody.
//
// A gate never hangs on the store: without an answer for 2 s it opens, and the node asks again later.
type Gate struct {
	// Static.
	replays *replays // nil for a gate that takes no part
	user    string
	conn    Gated
	window  uint32

	closed atomic.Bool

	gateState // Guarded by replays.mu.
}

// Gate makes the gate of a connection that begins, closed if there is a manager that could replay. It is made
// before the connection is added to [Users] and put into Inbox.Gate; Ready is called once the Controller knows
// of the connection, which membership.Client.Joined("") tells, and Leave when it has ended. window is how many
// stored messages may be on their way to the connection: what its queue takes beside direct ones. user is
// the id as managers know it ([Tenant.ID]).
//
// Where Sessions do not name FEATURE_REPLAY, and beyond Config.MaxGates, the gate is open for good.
func (s *Server) Gate(user string, conn Gated, window int) *Gate {
	return s.replays.gate(user, conn, window, time.Now())
}

// Ready says that the Controller knows of the connection: what is stored for its user is asked for now. Asked
// before, a message might be stored behind the reading because the user seemed to be away, and stay there.
func (g *Gate) Ready() {
	if g != nil && g.replays != nil {
		g.replays.ready(g, time.Now())
	}
}

// Leave says that the connection has ended. It may be called again.
func (g *Gate) Leave() {
	if g != nil && g.replays != nil {
		g.replays.leave(g)
	}
}

func (g *Gate) isClosed() bool { return g != nil && g.closed.Load() }
