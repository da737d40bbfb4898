package refgateway

import (
	"strconv"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// sessions is the gateway as its node sees it.
type sessions struct{ *node.Users[*conn] }

func newUsers() *node.Users[*conn] {
	return node.NewLastingUsers[*conn](pubsub.Feature_FEATURE_DEDUPE, pubsub.Feature_FEATURE_CLIENT_ACK, pubsub.Feature_FEATURE_EXPIRY,
		pubsub.Feature_FEATURE_COLLAPSE, pubsub.Feature_FEATURE_REPLAY, pubsub.Feature_FEATURE_ROOM_LOG)
}

// Broadcast implements node.Sessions.
func (s sessions) Broadcast(m *node.Message) (delivered, failed int) { return s.BroadcastScope("", m) }

// BroadcastScope implements node.Scoped. The clients are told that it is one, and not whose.
func (s sessions) BroadcastScope(scope string, m *node.Message) (delivered, failed int) {
	m.Prepared = newPush(m, "", true)
	return s.Users.BroadcastScope(scope, m)
}

// Describe implements node.Described.
func (c *conn) Describe() node.Connection {
	rooms := c.member.Rooms()
	for i, room := range rooms {
		rooms[i] = c.tenant.ID(room)
	}
	return node.Connection{ID: strconv.FormatUint(c.id, 10), Rooms: rooms, Since: time.Unix(c.at, 0)}
}

// Deliver implements node.Conn. A push to a room is for the connections that are in
// it, which are those that have joined it and not left. A route that is out of date may
// name a user who has left: all connections are as good as not here.
func (c *conn) Deliver(m *node.Message) node.Outcome { return c.DeliverLasting(m, nil) }

// DeliverLasting implements node.LastingConn.
func (c *conn) DeliverLasting(m *node.Message, confirmation *node.Confirmation) node.Outcome {
	room := c.tenant.Plain(m.RoomID)
	f, ok := m.Prepared.(*frame)
	if !ok || f.room != room { // members of one room are of one tenant, so mostly it is the same frame
		f = newPush(m, room, false)
		m.Prepared = f
	}
	outcome := c.push(f, m, confirmation)
	if outcome == node.Delivered || outcome == node.Pending {
		c.g.count.pushFrames.Inc()
	}
	return outcome
}
