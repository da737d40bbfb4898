package engine

// Network is the set of links to the Connect-Nodes, one link for each shard and
// node. transport/link implements it.
type Network interface {
	// Link returns the link of a shard to a node, nil when no such node is
	// registered.
	Link(shard int, node string) Link
	// Links returns a shard's links to all registered nodes, ordered by node id.
	// The slice is shared: callers do not change it.
	Links(shard int) []Link
}

// Link is one shard's ordered way to one node.
type Link interface {
	// Node is the node's id.
	Node() string
	// Scopes tells whether the node takes a Request.Scope, as far as is known: of a node
	// that was never reached it is true.
	Scopes() bool
	// Send takes d or says at once why not; it never blocks. Sent is the answer
	// of a link that has taken d: from then on the link owns d until it has
	// called exactly one of Ack, Drop and Lose (or seen TrySend decline). Of any other
	// answer the caller keeps d. Deliveries taken by one link reach the
	// node in the order of the calls.
	Send(d *Delivery) Reason
}

// Reason says why a delivery, or a part of it, did not end as delivered.
type Reason uint8

// The reasons. Those that begin with Drop mean that nothing was written.
const (
	Sent            Reason = iota // no reason: the link took it
	DropUnknownNode               // no such node is registered
	DropUnreachable               // no stream to the node, and none about to be
	DropDraining                  // the node has announced that it goes
	DropStalled                   // the node does not acknowledge what it has
	DropQueueFull                 // the link's queue is at its bound of bytes or deliveries
	DropExpired                   // the deadline or the queue's age limit passed before it was written
	DropRefused                   // the node did nothing with it
	DropTooLarge                  // it does not fit into a frame
	DropUnscoped                  // it has a scope, which the node does not know
	DropNoRoute                   // the Controller could not be asked where the user is
	DropInternal                  // a fault of our own before anything was written
	LostStream                    // written, and the stream broke before the ack
	LostAck                       // written, and the ack deadline passed
	LostDeadline                  // written, and the caller's deadline passed or the caller left
	LostCount                     // acknowledged with numbers that do not add up
	LostInternal                  // a fault of our own after it may have been written
	reasons                       // how many there are
)

var reasonText = [reasons]string{
	Sent:            "sent",
	DropUnknownNode: "node not registered",
	DropUnreachable: "node not reachable",
	DropDraining:    "node is draining",
	DropStalled:     "node does not acknowledge",
	DropQueueFull:   "queue full",
	DropExpired:     "expired before it was sent",
	DropRefused:     "refused by the node",
	DropTooLarge:    "too large for a frame",
	DropUnscoped:    "node cannot tell tenants apart",
	DropNoRoute:     "controller not reachable",
	DropInternal:    "internal error before sending",
	LostStream:      "stream broke before the acknowledgement",
	LostAck:         "no acknowledgement in time",
	LostDeadline:    "deadline passed before the acknowledgement",
	LostCount:       "acknowledgement does not add up",
	LostInternal:    "internal error after sending",
}

// String is the text that callers see in NodeFailure.
func (r Reason) String() string {
	if r >= reasons {
		return "unknown reason"
	}
	return reasonText[r]
}

// healable tells whether a fresh look-up may find the users elsewhere.
func (r Reason) healable() bool {
	return r == DropUnknownNode || r == DropUnreachable || r == DropDraining
}
