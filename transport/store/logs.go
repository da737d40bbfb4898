package store

import (
	"context"
	"time"

	"github.com/push-manager/push-manager/engine"
)

// Logs keep what was pushed to rooms, once for each push, in partitions whose messages stand one behind the other.
// An implementation passes storetest.RunLogs. All methods are safe for concurrent use, and return by ctx's end.
type Logs interface {
	// AppendLog writes each entry, or says why not, with an error for each, as Store.Append does. It sets Place of those.
	// Of messages of one room in one call the first stands first.
	AppendLog(ctx context.Context, entries []LogEntry) []error
	// ReadLog returns what the log of room has behind place after, in order: all whose AppendLog had
	// returned before ReadLog was called, as far as most messages and bytes of payload go, and at least one. What has
	// expired is left out. More tells that something may follow behind last, up to which everything is told;
	// gap, that something of the room that stood behind after, and had not expired, may have been dropped for want of room or time.
	ReadLog(ctx context.Context, room string, after uint64, most, bytes int) (page LogPage, err error)
	// Heads returns the epoch and the last place of each partition: no less than that of any
	// AppendLog that had returned before.
	Heads(ctx context.Context) (epoch uint64, heads []uint64, err error)
	// Follow calls f with each message of a partition behind place after, in order and without a hole but for
	// those that are not kept any more, until ctx ends or f returns false. caughtUp tells the place up to which all is told
	// where nothing follows at the moment. An error ends it, too: whoever goes on calls it again.
	Follow(ctx context.Context, partition int, after uint64, f func(e LogEntry) bool, caughtUp func(seq uint64)) error
	// Partition is that of a room, below the number of heads.
	Partition(room string) int
}

// LogEntry is one message in the log of its room.
type LogEntry struct {
	Message *engine.Stored // with Room and Exclude; read-only
	Expires time.Time      // never zero
	Place   engine.Place
}

// LogPage is what ReadLog returns.
type LogPage struct {
	Entries   []LogEntry
	Last      uint64
	More, Gap bool
}
