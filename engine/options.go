package engine

import (
	"errors"
	"time"
)

// Options say what a push is worth. A push without them is given up where it is not delivered.
// They are read-only once the push has started, and may be shared.
type Options struct {
	// MessageID names the message among those of Sender, which is who has chosen it; nobody
	// is told its ids apart when it is empty. PayloadHash is equal for equal contents, whatever
	// the stamp. Without MessageID nothing is de-duplicated.
	MessageID   string
	Sender      string
	PayloadHash uint32
	// TTL is how long after Arrived the message may be shown. 0: until the push ends, and in the
	// store as long as it keeps. When it has passed, what is not written has failed, and nobody
	// is stored.
	TTL time.Duration
	// ClientAck: users whose clients can acknowledge are delivered when they have, within
	// AckTimeout from Arrived, 2 s if it is 0, at most a minute. What has not come by then, or by
	// the end of a push that is not Async, does not come: Delivery.AckBy tells nodes.
	ClientAck  bool
	AckTimeout time.Duration
	// Store: whoever was not confirmed is handed to the Spool, with what is left of the push's
	// time when 150 ms are. A push to a room is written into the room's log first, within 150 ms and half of
	// the push's time, and for nobody by name. Push.Result is then never an error.
	Store bool
	// Place is that of an earlier try of the same push in the log of its room, where it stands: it is not written again.
	Place Place
	// CollapseKey is empty for a message that is worth something beside newer ones.
	CollapseKey string
	// Async: the push completes with the nodes' acks, and whoever has not acknowledged yet counts
	// as delivered. What clients say comes to Receipts, nil if nobody asks.
	Async    bool
	Receipts Receipts
	// Replay is set for a message out of the store: it goes to one node and nowhere else.
	Replay *Replay
	// Filter is for which connections the push is: those for which all of these hold. Empty: for all. Nodes evaluate it.
	Filter []Match
}

// Match asks that an attribute of a connection has one of Values or, with Not, that it is absent or has none of them.
type Match struct {
	Key    string
	Values []string
	Not    bool
}

// Replay says where a message out of the store goes. A push with one is ToUser.
type Replay struct {
	Node string
	// Gate is the one that has asked, Seq the message's place, After that of the message before it
	// behind this gate, 0 for the first: the node takes it behind that one and nowhere else.
	// Gate 0: nobody has asked, and the node gets it like any other message.
	Gate, Seq, After uint64
	Room             string // to which it was pushed, "" for none
}

// Receipts is told what clients say of pushes that are Async.
type Receipts interface {
	// Receipt is called from any goroutine, after Complete, and must not block: once for a push whose
	// Result was no error, with final set, when all have acknowledged or AckTimeout has passed and,
	// with Store, the Spool has answered. r counts anew from the beginning. unacked are at most 100 of those
	// who were reached and have not acknowledged.
	Receipt(p *Push, r Result, unacked []string, final bool)
}

// Spool keeps messages for users who were not reached, and the logs of rooms.
type Spool interface {
	// Append stores m for each of users and must not block. done is called exactly once, by the
	// deadline, from any goroutine, with one result for each user. m and what it refers to stay as they
	// are for ever.
	Append(m *Stored, users []string, deadline time.Time, done func([]Spooled))
	// AppendLog writes m once into the log of its Room and must not block. done is called exactly once, by
	// the deadline, from any goroutine. With an error the message may stand in the log after all. Messages to
	// one room are written in the order of the calls.
	AppendLog(m *Stored, deadline time.Time, done func(Place, error))
}

// Place is where a message stands in the logs of rooms. The zero Place is none.
type Place struct {
	Epoch     uint64 // of the logs: places of another one mean nothing
	Partition uint32
	Seq       uint64 // rises within the partition, not by one, from 1
}

// Stored is a message as a Spool keeps it.
type Stored struct {
	MessageID, Sender string
	PayloadHash       uint32
	Payload           []byte
	Room              string
	CollapseKey       string
	Expires           time.Time // zero: when the Spool says
	Exclude           []string  // of Room, who does not get it; sorted
}

// Spooled is what became of a message for one user: nil Err is stored, in place Seq.
type Spooled struct {
	Seq uint64
	Err error
}

// Errors of a Spool. An error with one of them in it says in words what is wrong, without "store".
var (
	ErrSpoolQuota = errors.New("too many messages wait for the user")
	ErrSpoolFull  = errors.New("is full")
	ErrSpoolDown  = errors.New("not reachable")
)
