package refgateway

import "github.com/push-manager/push-manager/transport/node"

// sessions is the gateway as its node sees it.
type sessions struct{ *node.Users[*conn] }

// Broadcast implements node.Sessions. The clients are told that it is one.
func (s sessions) Broadcast(m *node.Message) (delivered, failed int) { return s.BroadcastScope("", m) }

// BroadcastScope implements node.Scoped, in the same way.
func (s sessions) BroadcastScope(scope string, m *node.Message) (delivered, failed int) {
	m.Prepared = newPush(m, "", true)
	return s.Users.BroadcastScope(scope, m)
}

// Deliver implements node.Conn. A push to a room is for the connections that are in
// it, which are those that have joined it and not left. A route that is out of date may
// name a user who has left: all connections are as good as not here.
func (c *conn) Deliver(m *node.Message) node.Outcome {
	f, ok := m.Prepared.(*frame)
	if !ok || m.RoomID != "" && f.tenant != c.tenant { // all who are in the room are of its tenant, and a stale route may name others
		f = newPush(m, c.tenant, false)
		m.Prepared = f
	}
	outcome := c.send(f, m.RoomID)
	if outcome == node.Delivered {
		c.g.count.pushFrames.Inc()
	}
	return outcome
}
