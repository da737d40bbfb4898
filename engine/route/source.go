package route

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// ErrUnavailable means that the Controller could not be reached, or did not
// answer in time, and nothing usable is known. Every error of a Source wraps it.
var ErrUnavailable = errors.New("controller is not available")

// ErrAway is an ErrUnavailable of a Controller that cannot be asked at all: there is no
// connection, or it says of itself that it is not available. One that is asked and does
// not answer in time is not away.
var ErrAway = fmt.Errorf("%w: away", ErrUnavailable)

// ErrOverloaded means that a look-up could not be started: the pool is full.
var ErrOverloaded = errors.New("too many look-ups")

// Source is the Controller as the directory needs it. Its methods may block until
// ctx ends and are safe for concurrent use.
type Source interface {
	// Room calls add for each member and each node that holds it; a user on two
	// nodes comes twice. A member without a node has an empty one. What add is given
	// is copied; it is not called after Room has returned, nor by two goroutines at
	// once. Room returns false when there is no such room. The answer has every change that
	// Directory.Moved brings with a revision that is not higher; it may have later ones. 0: nobody knows.
	Room(ctx context.Context, room string, add func(user, node []byte)) (found bool, revision uint64, err error)
	// Users sets nodes[i] to the nodes of users[i], none for a user without a
	// connection. The slices have the same length.
	Users(ctx context.Context, users []string, nodes [][]string) error
}

// Renewed is a Source that knows when it last began anew to hear from the Controller,
// with a connection or a change stream: it may then be another one, or not know all yet.
type Renewed interface {
	// Renewed is the zero time before the first time.
	Renewed() time.Time
}

// Waiter is told what an earlier query could not be answered at once. Its
// methods must not block.
type Waiter interface {
	// Lookup is called before a look-up on behalf of this waiter, with what is
	// looked up ("room" or "user"). It returns the context to use and a function
	// that is called with the result.
	Lookup(ctx context.Context, what string) (context.Context, func(error))
	// Routed brings the snapshots of some of the keys asked for: snaps[i] for
	// keys[i]. An error is for all of keys, and snaps is nil. Every key that was
	// not answered at once is told exactly once. The slices are the callee's only
	// during the call.
	Routed(keys []string, snaps []*Snapshot, err error)
}
