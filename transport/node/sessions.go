package node

import pubsub "github.com/push-manager/push-manager/proto"

// Sessions is what a gateway offers to its node: the connections it holds. [Users] are
// Sessions for most gateways. The
// methods are called from many goroutines at once, one per stream of a manager.
//
// They must not block: a message is put into the bounded queue of a connection
// or it is not, and a client that does not read is the gateway's to cut off.
// What a call for one user waits, every user behind it waits.
type Sessions interface {
	// Deliver hands m to every connection of the user that is here; with a RoomID,
	// to those that are in the room, which are the ones that have joined it and not
	// left. A user who has connections and none in the room is NotHere: then nobody
	// got it, and the Controller is asked whether the route was out of date. Where the
	// Controller fills rooms and clients never join, it is the gateway's to say who is
	// in them. Once a client was told that it has left, nothing more of the room may
	// come to it.
	//
	// It is called once for each user of a push, with the same m, from one goroutine:
	// whatever is the same for all of them (the encoded frame) is made at the
	// first call and kept in m.Prepared. Of two pushes to a user on one stream
	// the first is handed over first.
	Deliver(user string, m *Message) Outcome
	// Broadcast hands m to every connection of every user here, and returns how
	// many users were reached and how many were not.
	Broadcast(m *Message) (delivered, failed int)
	// Online is the number of users with a live connection now. It bounds what
	// managers believe a broadcast has reached.
	Online() int
}

// Scoped is what Sessions also are that can tell tenants apart, see [Tenant]. The node then says
// so, and gets the broadcasts of tenants. While one node does not, Push-Manager refuses them.
type Scoped interface {
	// BroadcastScope hands m to every connection of the users whose ids begin with scope, such
	// as "shop/", and to nobody else. It returns how many users were reached and how many were
	// not.
	BroadcastScope(scope string, m *Message) (delivered, failed int)
}

// Outcome is what became of a message for one user.
type Outcome uint8

// The outcomes. Any other value counts as Failed. Those from Duplicate on are for messages with Options.
const (
	_ Outcome = iota
	// Delivered: at least one live connection of the user has taken it.
	Delivered
	// NotHere: the user has no connection on this node, or none in the room. Push-Manager
	// looks the user up again and sends it to the right node. When it is told this
	// node again, the user is offline.
	NotHere
	// Failed: the user is here, and no connection took it.
	Failed
	// Duplicate: every connection that would take it has had the message's id. The user counts as
	// delivered.
	Duplicate
	// Pending: taken, and nobody of those who took it is without a client that can acknowledge. What
	// becomes of it is said to the [Confirmation].
	Pending
	// Reused: a connection has had the message's id with another content. The user counts as failed.
	Reused
	// Expired: nobody may be shown it any more. The user counts as failed.
	Expired
	// Stalled: the client leaves too much unacknowledged. The user counts as failed.
	Stalled
	// Filtered: the user is here, and has no connection for which the message's [Filter] is. Only of DeliverFiltered.
	Filtered
)

// Message is one push. All its users share it: nothing but Prepared may be
// changed. It may be kept beyond the call; Data, Encoded and the strings share
// the memory of the frame that brought them (up to 16 MiB), so copy what is kept
// for long.
type Message struct {
	// Type is the kind of content. Unknown values are passed on as they are.
	Type pubsub.MessageType
	// Data is the caller's payload, any bytes.
	Data []byte
	// Timestamp is in Unix seconds.
	Timestamp int64
	// Metadata is nil when there is none.
	Metadata map[string]string
	// Encoded is the same content as a pubsub.MessageContent on the wire, for
	// gateways whose clients speak protobuf.
	Encoded []byte
	// RoomID is the room that was pushed to, empty for a push to users or to
	// everybody. A tenant's has the tenant before it: what a client is shown is
	// [Tenant.Plain] of it.
	RoomID string
	// Rooms are set in place of RoomID for a push to several rooms, where Sessions name FEATURE_ROOMS. It is for each connection
	// that is in any of them, and shown as one to the first that the connection is in.
	Rooms *Rooms
	// Traceparent is the caller's W3C trace context, empty unless sampled.
	Traceparent string

	// Options are nil for a push without any, which is most of them.
	Options *Options

	// Prepared is the gateway's own: nil at first.
	Prepared any
}
