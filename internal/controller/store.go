package controller

import (
	"context"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Store keeps memberships. Its methods are safe for concurrent use, and what they
// return is not changed any more.
type Store interface {
	// Join adds a membership or renews it.
	Join(ctx context.Context, j Join) (Joined, error)
	// Leave ends a user's membership of a room on a node, on all nodes when node
	// is empty. False: there was none.
	Leave(ctx context.Context, user, room, node string) (bool, error)
	// DropNode ends all memberships of a node that exist at the time of the call
	// and returns how many they were.
	DropNode(ctx context.Context, node string) (int, error)

	// Room is a room with its members, nil when there is none.
	Room(ctx context.Context, room string) (*pubsub.RoomInfo, error)
	// Users is where users are: presences[i] for users[i].
	Users(ctx context.Context, users []string) ([]Presence, error)
	// Rooms counts the users of each room.
	Rooms(ctx context.Context) ([]*pubsub.RoomStats, error)
	// Nodes are the nodes that have memberships.
	Nodes(ctx context.Context) ([]string, error)
	// Counts is cheap and may be a little old.
	Counts() Counts

	// Notify has each change told to tell after it is visible, the Server's call
	// before any other. tell does not block.
	Notify(tell func(Change))
}

// Join is a user who enters a room on a node.
type Join struct {
	User, Room, Node string
	Name             string
	Metadata         map[string]string
}

// Joined is the room after a Join.
type Joined struct {
	// Full: the user was not taken in, the room is at its limit.
	Full bool
	// Room has the members only while they are few.
	Room *pubsub.RoomInfo
}

// Presence is where a user is.
type Presence struct {
	// Nodes, each once, the latest join first. None: the user is not connected.
	Nodes []string
	// Room is the one joined last.
	Room string
}

// Change names what a look-up answers differently from now on.
type Change struct{ Rooms, Users []string }

// Counts are the sizes of a Store. A user counts once.
type Counts struct{ Rooms, Users, Memberships int }
