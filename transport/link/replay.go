package link

// Replayer sends nodes what is stored for their users. Its methods are called by the readers of streams, in the order
// in which things came, and must not block.
type Replayer interface {
	// Catchup is asked by a node for what is stored for a user, whose gate on the node it names.
	// window is how many messages may be on their way, 0 for any number.
	Catchup(a Asker, gate uint64, user string, window int)
	// Taken: the client behind the gate has taken everything up to seq.
	Taken(a Asker, gate, seq uint64)
	// Gone: the stream has ended, and with it all its gates.
	Gone(a Asker)
}

// Asker is a stream on which a node asks. It is comparable.
type Asker interface {
	// Node is the node's id.
	Node() string
	// End tells the node that a replay has ended, with seq as the last place that was sent, and
	// the reason where the store could not be read. It does not block, and does nothing once the
	// stream has ended.
	End(gate, seq uint64, reason string)
}
