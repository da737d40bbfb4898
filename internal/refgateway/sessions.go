package refgateway

import (
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// sessions is the gateway as its node sees it.
type sessions struct{ *node.Users[*conn] }

func newUsers() *node.Users[*conn] {
	return node.NewLastingUsers[*conn](pubsub.Feature_FEATURE_DEDUPE, pubsub.Feature_FEATURE_CLIENT_ACK, pubsub.Feature_FEATURE_EXPIRY,
		pubsub.Feature_FEATURE_COLLAPSE, pubsub.Feature_FEATURE_REPLAY, pubsub.Feature_FEATURE_ROOM_LOG, pubsub.Feature_FEATURE_ROOMS)
}

// Broadcast implements node.Sessions.
func (s sessions) Broadcast(m *node.Message) (delivered, failed int) { return s.BroadcastScope("", m) }

// BroadcastScope implements node.Scoped. The clients are told that it is one, and not whose.
func (s sessions) BroadcastScope(scope string, m *node.Message) (delivered, failed int) {
	m.Prepared = newPush(m, "", true)
	return s.Users.BroadcastScope(scope, m)
}

// BroadcastFiltered implements node.Filtering.
func (s sessions) BroadcastFiltered(scope string, f node.Filter, m *node.Message) (delivered, failed, filtered int) {
	m.Prepared = newPush(m, "", true)
	return s.Users.BroadcastFiltered(scope, f, m)
}

// Attributes implements node.Attributed.
func (c *conn) Attributes() node.Attributes {
	if a := c.attributes.Load(); a != nil {
		return *a
	}
	return node.Attributes{}
}

// device is what the client, or its token, calls the device, or empty.
func (c *conn) device() string {
	device, _ := c.Attributes().Get("device_id")
	return device
}

// IsFor implements node.Attributed.
func (c *conn) IsFor(m *node.Message) bool {
	if m.Rooms != nil {
		_, is := c.member.FirstOf(m.Rooms.Place)
		return is
	}
	return c.member.In(m.RoomID)
}

// Describe implements node.Described.
func (c *conn) Describe() node.Connection {
	rooms := c.member.Rooms()
	for i, room := range rooms {
		rooms[i] = c.tenant.ID(room)
	}
	return node.Connection{
		ID: c.connectionID(), Device: c.device(), Attributes: c.Attributes().Map(), Rooms: rooms, Since: time.Unix(c.at, 0),
	}
}

// Disconnect implements node.Disconnector. For a room it looks at all clients.
func (s sessions) Disconnect(d *node.Disconnect) (connections int) {
	kick := func(c *conn) {
		if (d.Device == "" || c.device() == d.Device) && c.kick(d.Code, d.Reason) {
			connections++
		}
	}
	if d.Room == "" {
		for _, c := range s.Of(d.User) {
			kick(c)
		}
		return connections
	}
	s.Each(func(conns []*conn) {
		for _, c := range conns {
			if c.member.In(d.Room) {
				kick(c)
			}
		}
	})
	return connections
}

// refused closes a connection whose user or device is kept away, or whose room nobody may join. It returns the close code, 0 for
// one that is not refused.
func (g *Gateway) refused(c *conn) (code uint16) {
	r, refused := g.node.Refused(c.tenant.ID(c.user), c.device())
	if !refused && c.room != "" {
		r, refused = g.node.RefusedRoom(c.tenant.ID(c.room))
	}
	if refused && c.kick(r.Code, r.Reason) {
		g.denied(deniedRefused).Inc()
	}
	return r.Code
}

// Deliver implements node.Conn. A push to a room is for the connections that are in
// it, which are those that have joined it and not left. A route that is out of date may
// name a user who has left: all connections are as good as not here.
func (c *conn) Deliver(m *node.Message) node.Outcome { return c.DeliverLasting(m, nil) }

// DeliverLasting implements node.LastingConn.
func (c *conn) DeliverLasting(m *node.Message, confirmation *node.Confirmation) node.Outcome {
	var f *frame
	if m.Rooms == nil {
		room := c.tenant.Plain(m.RoomID)
		var ok bool
		if f, ok = m.Prepared.(*frame); !ok || f.room != room { // members of one room are of one tenant, so mostly it is the same frame
			f = newPush(m, room, false)
			m.Prepared = f
		}
	}
	outcome := c.push(f, m, confirmation)
	if outcome == node.Delivered || outcome == node.Pending {
		c.g.count.pushFrames.Inc()
	}
	return outcome
}

// roomFrames are the frames of a push to several rooms, by the room that clients are shown.
type roomFrames map[string]*frame

// roomFrame is the frame for the connection, by the first of the rooms that it is in, nil if it is in none.
func (c *conn) roomFrame(m *node.Message) *frame {
	first, is := c.member.FirstOf(m.Rooms.Place)
	if !is {
		return nil
	}
	frames, ok := m.Prepared.(roomFrames)
	if !ok {
		frames = make(roomFrames)
		m.Prepared = frames
	}
	room := c.tenant.Plain(first)
	f := frames[room]
	if f == nil {
		f = newPush(m, room, false)
		f.several = m.Rooms // not m, which keeps all of the frame that it came with
		frames[room] = f
	}
	return f
}
