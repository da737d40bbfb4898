package store

import (
	"context"
	"time"

	"github.com/push-manager/push-manager/engine"
)

// Store keeps messages by user, in the order in which they were stored. An implementation passes
// storetest.Run. All methods are safe for concurrent use, and return by ctx's end.
type Store interface {
	// Append stores each entry, or says why not, with an error for each: engine.ErrSpoolQuota, ErrSpoolFull or
	// ErrSpoolDown, or one that wraps it. A nil error is durable as Durability says. It sets Entry.Seq of those.
	Append(ctx context.Context, entries []Entry) []error
	// Read returns what is stored for user behind place after, in order: all whose Append had
	// returned before Read was called, as far as most messages and bytes of payload go, and at least one. Messages that
	// have expired are left out, and so is what a later one with the same collapse key has replaced. More tells that
	// something may follow: whoever wants all reads on behind the last one until it is false.
	Read(ctx context.Context, user string, after uint64, most, bytes int) (page []Entry, more bool, err error)
	// Any tells for each of up to 1,000 users whether anything may be stored: one round trip. Who is said to have
	// nothing has nothing whose Append had returned before.
	Any(ctx context.Context, users []string) ([]bool, error)
	// Trim forgets what is stored for user up to place seq.
	Trim(ctx context.Context, user string, seq uint64) error
	// Forget erases everything of user and says how many messages it was.
	Forget(ctx context.Context, user string) (int, error)
	// Durability says what a stored message survives.
	Durability() Durability
	// Close lets go of it.
	Close(ctx context.Context) error
}

// Entry is one message for one user.
type Entry struct {
	User    string
	Message *engine.Stored // shared by all entries of a push; read-only
	Expires time.Time      // never zero
	Seq     uint64         // its place; rises for each user, not by one
}

// Durability is what a stored message survives.
type Durability uint8

// The durabilities.
const (
	_              Durability = iota
	OfProcess                 // the end of the process in any way, not a power cut
	OfMachine                 // a power cut
	OfOneOfSeveral            // the loss of any one machine
)
