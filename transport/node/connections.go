package node

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Describer is what Sessions also are that can tell which connections a user has, as [Users] do. Without it presence tells
// nothing of the devices of the node's users.
type Describer interface {
	// Describe returns what is known of each live connection of the user, in any order; none for a user who is not here.
	Describe(user string) []Connection
}

// Connection is what presence tells of a live connection. A field that the gateway does not know is empty.
type Connection struct {
	// ID is unique on the node as long as its process lives.
	ID string
	// Device is what the client calls itself, the same with each of its connections.
	Device string
	// Attributes are those that filters of pushes see.
	Attributes map[string]string
	// Rooms are those that the connection is in. A tenant's have the tenant before them.
	Rooms []string
	// Since is when it began.
	Since time.Time
}

// Described is what a [Conn] of [Users] also is that can describe itself. Of another nothing but that it is there is told.
type Described interface {
	// Describe may be called at any time, from any goroutine.
	Describe() Connection
}

// Describe implements Describer.
func (u *Users[C]) Describe(user string) []Connection {
	conns := u.Of(user)
	all := make([]Connection, 0, len(conns))
	for _, c := range conns {
		d, ok := any(c).(Described)
		if !ok {
			all = append(all, Connection{})
			continue
		}
		all = append(all, d.Describe())
	}
	return all
}

// Bounds of ListConnections.
const (
	connectionUsers = 1000
	connectionsMost = 100 // of one user
)

// ListConnections implements pubsub.ConnectNodeServiceServer.
func (s *Server) ListConnections(_ context.Context, r *pubsub.ListConnectionsRequest) (*pubsub.ListConnectionsResponse, error) {
	if s.describer == nil {
		return nil, status.Error(codes.Unimplemented, "the gateway does not tell which connections its users have")
	}
	if n := len(r.GetUserIds()); n == 0 || n > connectionUsers {
		return nil, status.Error(codes.InvalidArgument, fmt.Sprintf("user_ids: %d, and has to be 1 to %d", n, connectionUsers))
	}
	reply, size := &pubsub.ListConnectionsResponse{}, 0
	for i, user := range r.GetUserIds() {
		u := &pubsub.UserConnections{}
		bytes, full := 8, false
		for _, c := range s.describer.Describe(user) {
			out := c.message()
			n := out.SizeVT() + 8
			if full = size+bytes+n > listBytes; full || len(u.Connections) == connectionsMost {
				u.More = true
				break
			}
			u.Connections = append(u.Connections, out)
			bytes += n
		}
		if full && i > 0 { // there is place for it in the next answer
			break
		}
		reply.Users = append(reply.Users, u)
		size += bytes
	}
	return reply, nil
}

// message is the connection on the wire, which takes valid UTF-8 alone.
func (c *Connection) message() *pubsub.Connection {
	valid := func(text string) string { return strings.ToValidUTF8(text, "�") }
	m := &pubsub.Connection{ConnectionId: valid(c.ID), DeviceId: valid(c.Device)}
	for key, value := range c.Attributes {
		if m.Attributes == nil {
			m.Attributes = make(map[string]string, len(c.Attributes))
		}
		m.Attributes[valid(key)] = valid(value)
	}
	for _, room := range c.Rooms {
		m.RoomIds = append(m.RoomIds, valid(room))
	}
	if !c.Since.IsZero() {
		m.ConnectedAt = timestamppb.New(c.Since).GetSeconds()
	}
	return m
}
