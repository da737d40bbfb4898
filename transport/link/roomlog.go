package link

import "github.com/push-manager/push-manager/engine"

// RoomLogs answers nodes that follow and read the logs of rooms. Its methods are called by the readers of streams, in the order in which
// things came, and must not block.
type RoomLogs interface {
	// Follow: the node wants marks of all partitions from now on, behind the places by partition that it knows of this epoch.
	// A second call for the same stream takes the place of the first.
	Follow(a LogAsker, epoch uint64, after []uint64)
	// Read: the node wants what the log of the room has behind a place, given by partition. It is answered by one LogAsker.Page.
	Read(a LogAsker, read LogRead)
	// Gone: the stream has ended. It is the last call for a, and comes once for each stream on which nodes may ask.
	Gone(a LogAsker)
}

// LogRead is what a node asks for.
type LogRead struct {
	Room  string
	Gate  uint64
	Epoch uint64
	After []uint64
}

// LogAsker is a stream on which a node asks. It is comparable, and stays valid after the stream's end. Its methods do not block.
type LogAsker interface {
	// Node is the node's id.
	Node() string
	// Mark sends a mark. False: the stream has ended, or is so far behind that nothing more is queued; the node
	// has to be told again later, from the same place.
	Mark(m *LogMark) bool
	// Page answers a read. It does nothing for a gate that is not open, or once the stream has ended.
	Page(p *LogPage)
}

// LogMark is pubsub.LogMark. It is read-only once it is sent, and may be shared by streams.
type LogMark struct {
	Epoch                 uint64
	Partition, Partitions uint32
	After, Seq            uint64
	Rooms                 []LogRoom
}

// LogRoom is the places of one room's messages.
type LogRoom struct {
	Room string
	Seqs []uint64
}

// LogPage is pubsub.LogPage. It is read-only once it is sent, and may be shared by streams.
type LogPage struct {
	Gate      uint64
	Epoch     uint64
	Partition uint32
	Entries   []LogEntry
	Seq       uint64
	More, Gap bool
	Error     string
}

// LogEntry is a message of a page. Its payload is that of engine.Stored.
type LogEntry struct {
	Message *engine.Stored
	Place   engine.Place
	// Expires is that of store.LogEntry: the link makes ttl_ms of what is left when it writes the page.
	Expires int64 // unix milliseconds
}
