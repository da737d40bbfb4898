package engine

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
	DropExpired                   // the deadline, the message's TTL or the queue's age limit passed before it was written
	DropRefused                   // the node did nothing with it
	DropTooLarge                  // it does not fit into a frame
	DropReplaced                  // a newer message with its collapse key has taken its place
	DropReused                    // the user has had the message id with another content
	DropUnscoped                  // it has a scope, which the node does not know
	DropNoRooms                   // it is for several rooms, which the node does not know
	DropNoReplay                  // it is out of the store, and the node does not know replays
	DropNoFilter                  // it has a filter, which the node does not know
	DropNoRoute                   // the Controller could not be asked where the user is
	DropInternal                  // a fault of our own before anything was written
	LostStream                    // written, and the stream broke before the ack
	LostAck                       // written, and the ack deadline passed
	LostDeadline                  // written, and the caller's deadline passed or the caller left
	LostCount                     // acknowledged with numbers that do not add up
	LostReceipt                   // handed over, and the client has not acknowledged
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
	DropReplaced:    "replaced by a newer message",
	DropReused:      "message id was used for another payload",
	DropUnscoped:    "node cannot tell tenants apart",
	DropNoRooms:     "node cannot take several rooms",
	DropNoReplay:    "node does not know replays",
	DropNoFilter:    "node cannot filter",
	DropNoRoute:     "controller not reachable",
	DropInternal:    "internal error before sending",
	LostStream:      "stream broke before the acknowledgement",
	LostAck:         "no acknowledgement in time",
	LostDeadline:    "deadline passed before the acknowledgement",
	LostCount:       "acknowledgement does not add up",
	LostReceipt:     "not acknowledged by the client in time",
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
