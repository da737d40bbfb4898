package engine

import "time"

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
	// Nudge tells the node that a message was stored for a user of its, in place seq, and must not block.
	// done is called exactly once, from any goroutine: with true when the node has closed the user's
	// gates, or has no such user; with false at once where it does not know replays or
	// cannot be reached, and later where it does not answer in time.
	Nudge(user string, seq uint64, done func(taken bool))
	// Describe tells how the link is, and what Send would answer to d, which it neither takes nor keeps.
	Describe(d *Delivery) LinkState
}

// LinkState is what a link is like at one moment.
type LinkState struct {
	State   string // such as "up" or "down"; "" of a node that is not registered
	Verdict Reason // what Send would answer
	// Deliveries that wait to be written, their bytes, and for how long the first of them has.
	Queued, QueuedBytes int
	QueuedFor           time.Duration
	// Deliveries that were written and are not acknowledged, how many there may be at the moment, and how old the first is.
	Unacked, Window int
	UnackedFor      time.Duration
	// Features are the names of what the node can do beyond the first version of Deliver, by its hello.
	Features []string
}
