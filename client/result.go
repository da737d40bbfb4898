package client

import (
	"fmt"
	"slices"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Result is the account of a push that was answered.
//
// Targets = Delivered + Offline + Failed + Unknown. For a user, Targets is 1. A broadcast counts what each node reports, so a user
// on two nodes counts twice there, and a node that did not answer adds nothing but a Failure.
type Result struct {
	// Success is true if nothing failed, nothing is unknown and the target existed: a room that is known, a user who is online or
	// whose message is stored.
	Success bool
	// Message says the same for people and logs.
	Message string

	// Targets are the users whom the push was for.
	Targets int
	// Delivered have it: a gateway has handed it to one of their connections at least.
	Delivered int
	// Offline have no connection.
	Offline int
	// Failed do not have it, for sure.
	Failed int
	// Unknown may have it.
	Unknown int

	// Stored, of Offline, get it when they come.
	Stored int
	// Unsure, of Stored, may have it already.
	Unsure int
	// Acked, of Delivered, have acknowledged it themselves.
	Acked int
	// Duplicates, of Delivered, had it from an earlier push with the same MessageID.
	Duplicates int
	// Filtered, of Offline, are connected, and none of their connections is one for which [Where] and [WhereNot] hold.
	Filtered int

	// MessageID is the one of the push, or the one that Push-Manager has made for it; "" for none.
	MessageID string
	// Position is where a message to a room stands in the room's log; "" if it was not written there.
	Position string

	// Failures tell where and why users failed or are unknown.
	Failures []Failure

	kind kind
}

// Failure is a node and a reason.
type Failure struct {
	// Node is the id of a Connect-Node, or "" where it is not about a node.
	Node string
	// Outcome is Failed or Unknown.
	Outcome Outcome
	// Reason is for people and logs.
	Reason string
	// Users are how many it concerns; 0 for a node that did not answer a broadcast.
	Users int
}

// Outcome is what became of a push, in one word.
type Outcome int

// The outcomes, the worst one first. A push has the worst one of its users.
const (
	// Unknown: some may or may not have it.
	Unknown Outcome = iota
	// Failed: some do not have it, although they may be online.
	Failed
	// Offline: nobody has it, because nobody was there, and not all are stored; or the room is not known.
	Offline
	// Stored: nobody has it yet, and it is stored for all.
	Stored
	// Delivered: whoever was there has it. That may be nobody, in a room that is empty.
	Delivered
)

// String is the word.
func (o Outcome) String() string {
	switch o {
	case Unknown:
		return "unknown"
	case Failed:
		return "failed"
	case Offline:
		return "offline"
	case Stored:
		return "stored"
	case Delivered:
		return "delivered"
	}
	return fmt.Sprintf("outcome %d", int(o))
}

// Outcome is the worst that happened. Success alone does not tell: it is true for a room all of whose members are offline.
func (r *Result) Outcome() Outcome {
	failed := func(o Outcome) bool {
		return slices.ContainsFunc(r.Failures, func(f Failure) bool { return f.Outcome == o })
	}
	switch {
	case r.Unknown > 0 || failed(Unknown):
		return Unknown
	case r.Failed > 0 || failed(Failed):
		return Failed
	case r.Delivered == 0 && r.Offline > r.Stored:
		return Offline
	case r.Delivered == 0 && r.Success && (r.Stored > 0 || r.Position != ""):
		return Stored
	case r.Success:
		return Delivered
	case r.Targets == 0 && (r.kind == toRoom || r.kind == toRooms):
		return Offline // the room is not known
	}
	return Failed // no Connect-Node is known
}

// Reply is what the replies to all pushes have in common.
type Reply interface {
	GetSuccess() bool
	GetMessage() string
	GetSummary() *pubsub.DeliverySummary
}

// ResultOf reads the reply to a push, for programs that make calls of their own on connections with [DialOptions]. What cannot be an
// account is an [*Error]: the push may have been delivered.
func ResultOf(r Reply) (Result, error) {
	var k kind // what Outcome needs of it
	switch r.(type) {
	case *pubsub.PushToRoomResponse:
		k = toRoom
	case *pubsub.PushToRoomsResponse:
		k = toRooms
	}
	result, failed := resultOf(k, r)
	if failed != nil {
		return Result{}, failed
	}
	return result, nil
}

// resultOf reads a reply. What cannot be an account is an error: the push may have been delivered.
func resultOf(k kind, r Reply) (Result, *Error) {
	result, failed := resultOfSummary(r.GetSummary())
	result.Success, result.Message, result.kind = r.GetSuccess(), r.GetMessage(), k
	return result, failed
}

func resultOfSummary(s *pubsub.DeliverySummary) (Result, *Error) {
	result := Result{
		Targets: int(s.GetTargets()), Delivered: int(s.GetDelivered()), Offline: int(s.GetOffline()), Failed: int(s.GetFailed()), Unknown: int(s.GetUnknown()),
		Stored: int(s.GetStored()), Unsure: int(s.GetUnsure()), Acked: int(s.GetAcked()), Duplicates: int(s.GetDuplicates()), Filtered: int(s.GetFiltered()),
		MessageID: s.GetMessageId(), Position: s.GetPosition(),
	}
	if s == nil {
		return Result{}, unusable("the reply has no summary")
	}
	if min(s.GetTargets(), s.GetDelivered(), s.GetOffline(), s.GetFailed(), s.GetUnknown(), s.GetStored(), s.GetUnsure(), s.GetAcked(), s.GetDuplicates(), s.GetFiltered()) < 0 {
		return Result{}, unusable("the reply has a count below zero")
	}
	if sum := result.Delivered + result.Offline + result.Failed + result.Unknown; sum != result.Targets {
		return Result{}, unusable(fmt.Sprintf("the counts of the reply do not add up: %d targets, %d outcomes", result.Targets, sum))
	}
	result.Failures = failuresOf(s.GetNodeFailures())
	return result, nil
}
