package client

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	pubsub "github.com/push-manager/push-manager/proto"
)

// RoomMember is a user in a room on one node. A user on two nodes is in a room twice.
type RoomMember struct {
	User, Name, Node string
	Joined           time.Time // zero: not known
}

// RoomMembers are the members of a room, read page by page while they are asked for; the error, if there is one, comes last.
// Whoever is in the room all the time comes once; who comes or goes meanwhile may come or not. It remembers whom it has
// given: 20 bytes and the ids for each.
func (c *Client) RoomMembers(ctx context.Context, room string) iter.Seq2[RoomMember, error] {
	return func(yield func(RoomMember, error) bool) {
		type place struct{ user, node string }
		given := map[place]struct{}{}
		for token := ""; ; {
			var page pubsub.GetRoomMembersResponse
			if err := c.do(ctx, pubsub.PresenceService_GetRoomMembers_FullMethodName, &pubsub.GetRoomMembersRequest{RoomId: room, PageToken: token}, &page); err != nil {
				yield(RoomMember{}, err)
				return
			}
			for _, m := range page.GetMembers() {
				at := place{m.GetUserId(), m.GetNodeId()}
				if _, again := given[at]; again {
					continue
				}
				given[at] = struct{}{}
				if !yield(RoomMember{User: at.user, Name: m.GetUserName(), Node: at.node, Joined: timeOf(m.GetJoinTime().AsTime(), m.GetJoinTime() != nil)}, nil) {
					return
				}
			}
			if token = page.GetNextPageToken(); token == "" {
				return
			}
		}
	}
}

func timeOf(t time.Time, known bool) time.Time {
	if !known {
		return time.Time{}
	}
	return t
}

// Presence is where a user is.
type Presence struct {
	User   string
	Online bool
	Nodes  []string
	// Rooms are those that the caller may list the members of.
	Rooms       []string
	Connections []Connection
	// Incomplete: there are more Connections, or a node did not say.
	Incomplete bool
}

// Connection is one connection of a user, as far as its node knows it.
type Connection struct {
	Node, ID, Device string
	Attributes       map[string]string
	Rooms            []string
	Since            time.Time // zero: not known
}

// Presence tells where users are, 1 to 1,000: answers[i] is about users[i].
func (c *Client) Presence(ctx context.Context, users ...string) (answers []Presence, err error) {
	var reply pubsub.GetUsersResponse
	if err := c.do(ctx, pubsub.PresenceService_GetUsers_FullMethodName, &pubsub.GetUsersRequest{UserIds: users}, &reply); err != nil {
		return nil, err
	}
	for _, u := range reply.GetUsers() {
		p := Presence{User: u.GetUserId(), Online: u.GetOnline(), Nodes: u.GetNodeIds(), Rooms: u.GetRoomIds(), Incomplete: u.GetIncomplete()}
		for _, conn := range u.GetConnections() {
			p.Connections = append(p.Connections, Connection{
				Node: conn.GetNodeId(), ID: conn.GetConnectionId(), Device: conn.GetDeviceId(), Attributes: conn.GetAttributes(), Rooms: conn.GetRoomIds(),
				Since: timeOf(conn.GetConnectTime().AsTime(), conn.GetConnectTime() != nil),
			})
		}
		answers = append(answers, p)
	}
	return answers, nil
}

// PresenceEvent is one message of a watch: a part of a snapshot, or changes.
type PresenceEvent struct {
	// Position is where a watch goes on behind this event, "" within a snapshot.
	Position string
	// Snapshot is a part of all there is, nil for changes. The first part takes the place of all that was known.
	Snapshot *pubsub.PresenceSnapshot
	Changes  []*pubsub.PresenceChange
}

// WatchRoom watches who enters and leaves a room. position is that of the last event of an earlier watch of the room, or "".
// The watch goes on until ctx ends, or with an error, which comes last; begin again with the last Position, also after a
// UNAVAILABLE of an instance that stops. Where that is not known any more a new snapshot comes, which says so.
func (c *Client) WatchRoom(ctx context.Context, room, position string) iter.Seq2[PresenceEvent, error] {
	return c.watchPresence(ctx, &pubsub.WatchPresenceRequest{RoomId: room, Position: position})
}

// WatchUser watches where a user is: connections, nodes and rooms. See [Client.WatchRoom].
func (c *Client) WatchUser(ctx context.Context, user, position string) iter.Seq2[PresenceEvent, error] {
	return c.watchPresence(ctx, &pubsub.WatchPresenceRequest{UserId: user, Position: position})
}

func (c *Client) watchPresence(ctx context.Context, r *pubsub.WatchPresenceRequest) iter.Seq2[PresenceEvent, error] {
	return func(yield func(PresenceEvent, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var given peer.Peer
		stream, err := pubsub.NewPresenceServiceClient(c.conn).WatchPresence(ctx, r, grpc.Peer(&given))
		for err == nil {
			var m *pubsub.WatchPresenceResponse
			if m, err = stream.Recv(); err != nil {
				break
			}
			if !yield(PresenceEvent{Position: m.GetPosition(), Snapshot: m.GetSnapshot(), Changes: m.GetChanges().GetChanges()}, nil) {
				return
			}
		}
		switch {
		case ctx.Err() != nil:
			yield(PresenceEvent{}, ctx.Err())
		case errors.Is(err, io.EOF):
			yield(PresenceEvent{}, io.ErrUnexpectedEOF)
		default:
			yield(PresenceEvent{}, errorOf(err, given.Addr != nil))
		}
	}
}
