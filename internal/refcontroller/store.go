package refcontroller

import (
	"context"
	"errors"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

var (
	// ErrOld says that a report was not executed because one with a higher number
	// was: it may have been about another user and room. Report again.
	ErrOld = errors.New("a later report came first: report again")
	// ErrOtherStore says that a Cursor is of a store that has forgotten since.
	ErrOtherStore = errors.New("the place is one in a store that was lost: begin again")
	// ErrCursor says that a Cursor is none.
	ErrCursor = errors.New("is no place in a room")
	// ErrOtherBoot says that the report comes from another process than the node's.
	ErrOtherBoot = errors.New("another process of the node reports")
)

// Store keeps memberships. Its methods are safe for concurrent use, and what they
// return is not changed any more.
//
// Reports of a Reporter with a Boot are executed as if in the order of their
// numbers, whatever the order in which they come. One that comes too late changes
// nothing: it is passed over, or ends with ErrOld where the Store cannot tell it
// from one that does not come too late.
type Store interface {
	// ID is the name of this store: it changes when the store has forgotten.
	ID() string

	// Join adds a membership or renews it.
	Join(ctx context.Context, j Join) (Joined, error)
	// Leave ends a user's membership of a room on a node, on all nodes when node
	// is empty. False: there was none.
	Leave(ctx context.Context, l Leave) (bool, error)
	// Begin makes by.Boot the node's process. It ends all memberships that another
	// one has reported, and those that this one has reported with a number below
	// by.Seq. It returns how many they were.
	Begin(ctx context.Context, by Reporter) (int, error)
	// DropNode ends all memberships of a node that exist at the time of the call
	// and returns how many they were.
	DropNode(ctx context.Context, node string) (int, error)
	// SetSlot makes the node's memberships in one slot those of members, whose
	// Reporter does not count. Limits of rooms do not matter: all were let in before.
	SetSlot(ctx context.Context, by Reporter, slot int, members []Join) error
	// Differing names the slots that have another digest.
	Differing(ctx context.Context, by Reporter, digests []uint64) ([]uint32, error)

	// Room is a room with its members, nil when there is none. Every change up to the
	// revision is in the answer, and later ones may be in it.
	Room(ctx context.Context, room string) (*pubsub.RoomInfo, Revision, error)
	// Members is a page of about so many members of a room, 1 to 1,000, from a place on. The
	// pages up to one without Next have each membership that is there all the time, and may
	// have one of them twice where others end meanwhile. A page keeps no report waiting.
	Members(ctx context.Context, room string, from Cursor, most int) (Page, error)
	// Users is where users are: presences[i] for users[i]. Their rooms only if they are wanted.
	Users(ctx context.Context, users []string, rooms bool) ([]Presence, error)
	// Rooms counts the users of each room.
	Rooms(ctx context.Context) ([]*pubsub.RoomStats, error)
	// Nodes are the nodes that have memberships, with the Boot that reports them.
	Nodes(ctx context.Context) (map[string]string, error)
	// Counts is cheap and may be a little old.
	Counts() Counts

	// Notify has each change told to tell, the Server's call before any other. A change
	// becomes visible and is told in one step: no report that finds it made returns before
	// tell has. Else that report would be answered while those who watch have been told
	// nothing. A store that cannot do both under one lock has such reports wait for tell; a
	// look-up may then show what is yet to be told. tell does not block, and calls no store.
	Notify(tell func(Change))
}

// Shared is a Store that several Controllers work on. Each of them tells its watchers
// what any of them has changed.
type Shared interface {
	Store
	// Run follows what all Controllers change, and keeps the others aware of this one,
	// until ctx ends. settle returns once no watcher of this Controller trusts an answer
	// from before what has been told.
	Run(ctx context.Context, settle func(context.Context) error)
	// Settle returns once the watchers of all other Controllers, too, trust nothing from
	// before the changes that reports have made or found here.
	Settle(ctx context.Context) error
	// Told is the time before which every change that was visible has been told.
	Told() time.Time
	// Vouch returns once every change has been told that was visible at the call, and the
	// other Controllers know that a watcher here may trust its answers for lease.
	Vouch(ctx context.Context, lease time.Duration) error

	// Hear notes the latest SyncNode of a node, and the ID of the store that it has told
	// everything: all Controllers see it in Words.
	Hear(ctx context.Context, by Reporter, told string) error
	Words(ctx context.Context) (map[string]Word, error)
	// Believe says that the store of this id knows all there is to know. Believed is for
	// how the others see it: it ends soon after the last of them has.
	Believe(id string)
	Believed() bool
}

// Word is the latest SyncNode of a node.
type Word struct {
	Boot     string
	Ago      time.Duration
	Complete bool // it has told this store everything
}

// Reporter is who makes a report.
type Reporter struct {
	Node string
	// Boot is the node's process, Seq the number of the report, higher than those of
	// all reports that it has made before. Without a Boot reports are executed as
	// they come.
	Boot string
	Seq  uint64
}

// Join is a user who enters a room on a node.
type Join struct {
	Reporter

	User, Room string
	Name       string
	Metadata   map[string]string

	WithoutUsers bool // Joined.Room need not have its members
}

// Leave is a user who leaves a room, on all nodes when Node is empty.
type Leave struct {
	Reporter

	User, Room string
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
	// Rooms are all of them, each once, in any order; nil if they were not wanted.
	Rooms []string
}

// Cursor is a place in a room of a store. The zero value is the beginning.
type Cursor struct {
	Store string // its ID
	At    string // the store's own
}

// Page is some members of a room.
type Page struct {
	Members []*pubsub.UserInfo
	// Users are in the room, each once.
	Users int
	// Next is where to go on, the zero value after the last page.
	Next Cursor
}

// Change is what a look-up answers differently from now on. One that is empty says that a
// Shared store has got on: by Told, or to another ID.
type Change struct {
	// Moves are the memberships that have changed, each once. Revision numbers the change:
	// it rises from each one to the next.
	Moves    []Move
	Revision uint64
	// Rooms and Users have changed, and how is not known.
	Rooms, Users []string
	// All: names were missed, everything may have changed.
	All bool
}

// Move is a user who is in a room on a node from now on, perhaps with another name than
// before, or is not any more.
type Move struct {
	Room, User, Node string
	Left             bool
}

// Revision is how far a store has got with its changes. Numbers of different stores mean
// nothing to each other.
type Revision struct {
	Store  string // its ID
	Number uint64 // as Change.Revision; 0 before the first change
}

// Counts are the sizes of a Store. A user counts once.
type Counts struct{ Rooms, Users, Memberships int }
