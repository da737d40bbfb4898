package node

import (
	"cmp"
	"fmt"

	pubsub "github.com/push-manager/push-manager/proto"
)

// handover is what became of one push on this node.
type handover struct {
	delivered   int
	duplicates  int  // of delivered
	pending     int  // of delivered
	filters     bool // there is a filter
	namesLeft   bool // and the manager wants to know whom it leaves out
	filtered    int
	leftOut     []string // of filtered, by name
	notHere     []string
	failed      []string
	reused      []string
	expired     int // of failed
	failedUsers int // of a broadcast
	refused     bool
	reason      string

	next int // the user being handed over, for the case of a panic
}

const (
	reasonPanic    = "internal error of the node"
	reasonNotTaken = "no connection took it"
)

// handOver offers m to each user but those at the places in skip, which ascend.
func (s *Server) handOver(users []string, skip []int32, m *Message, o *handover) {
	defer func() {
		if r := recover(); r != nil {
			s.panicked("Deliver", r)
			o.fail(users, skip)
		}
	}()
	k := 0
	for i, user := range users {
		o.next = i
		if k < len(skip) && int(skip[k]) == i {
			k++
			continue
		}
		switch s.cfg.Sessions.Deliver(user, m) {
		case Delivered:
			o.delivered++
		case NotHere:
			o.notHere = append(o.notHere, user)
		default:
			o.failed = append(o.failed, user)
		}
	}
}

// fail settles the users from the one on which the gateway has panicked. It is
// not called again for this push: what it may have left locked is unknown.
func (o *handover) fail(users []string, skip []int32) {
	o.reason = reasonPanic
	o.failFrom(o.next, users, skip)
}

// failFrom fails the users from the one at first on, but those at the places in skip.
func (o *handover) failFrom(first int, users []string, skip []int32) {
	skipped := make(map[int32]bool, len(skip))
	for _, i := range skip {
		skipped[i] = true
	}
	for i := first; i < len(users); i++ {
		if !skipped[int32(i)] {
			o.failed = append(o.failed, users[i])
		}
	}
}

// broadcast hands m to everybody, or to those in scope if there is one, as far as f lets it.
func (s *Server) broadcast(scope string, f Filter, m *Message, o *handover) {
	defer func() {
		if r := recover(); r != nil {
			s.panicked("Broadcast", r)
			*o = handover{failedUsers: int(s.online()), reason: reasonPanic}
		}
	}()
	var delivered, failed, filtered int
	switch {
	case len(f.matches) > 0:
		delivered, failed, filtered = s.filtering.BroadcastFiltered(scope, f, m)
	case scope == "":
		delivered, failed = s.cfg.Sessions.Broadcast(m)
	default:
		delivered, failed = s.scoped.BroadcastScope(scope, m)
	}
	o.delivered, o.failedUsers, o.filtered = max(delivered, 0), max(failed, 0), max(filtered, 0)
}

// miss explains what was not reached, nil when all was.
func (o *handover) miss(seq uint64) *pubsub.Miss {
	switch {
	case o.refused:
		return &pubsub.Miss{Seq: seq, Refused: true, Reason: cmp.Or(o.reason, "node is draining")}
	case len(o.notHere) == 0 && len(o.failed) == 0 && len(o.reused) == 0 && len(o.leftOut) == 0 && o.failedUsers == 0:
		return nil
	}
	m := &pubsub.Miss{
		Seq: seq, NotHere: o.notHere, Failed: o.failed, Reused: o.reused, Filtered: o.leftOut,
		FailedUsers: clampUint32(o.failedUsers), Reason: o.reason,
	}
	if m.Reason == "" && (len(o.failed) > 0 || o.failedUsers > 0) {
		m.Reason = reasonNotTaken
	}
	if missSize(m) <= maxMissBytes {
		return m
	}
	if o.delivered == 0 && o.filtered == 0 && len(o.failed) == 0 && len(o.reused) == 0 {
		// Nothing was done for anybody: that can be said without naming them, and
		// has them looked up again just the same.
		return &pubsub.Miss{Seq: seq, Refused: true, Reason: "none of the users is here"}
	}
	trimMiss(m)
	return m
}

// sum is what has become of several deliveries.
type sum struct{ deliveries, refused, delivered, notHere, failed, duplicates, reused, expired, filtered int }

func (s *sum) of(o *handover) {
	s.deliveries++
	if o.refused {
		s.refused++
		return
	}
	s.delivered += o.delivered
	s.notHere += len(o.notHere)
	s.failed += len(o.failed) + len(o.reused) + o.failedUsers
	s.duplicates += o.duplicates
	s.reused += len(o.reused)
	s.expired += o.expired
	s.filtered += o.filtered
}

// add counts them.
func (c *counters) add(s *sum) {
	c.deliveries.Add(s.deliveries)
	c.refused.Add(s.refused)
	c.delivered.Add(s.delivered)
	c.notHere.Add(s.notHere)
	c.failed.Add(s.failed)
	c.duplicates.Add(s.duplicates)
	c.reused.Add(s.reused)
	c.expired.Add(s.expired)
	c.filtered.Add(s.filtered)
}

func (o *handover) count(c *counters) {
	var s sum
	s.of(o)
	c.add(&s)
}

// trimMiss leaves out the ids that do not fit into any frame. The manager counts
// their users as not accounted for.
func trimMiss(m *pubsub.Miss) {
	room := maxMissBytes - 128
	named := func() int { return len(m.NotHere) + len(m.Failed) + len(m.Reused) + len(m.Filtered) }
	all := named()
	m.Reused = fitting(m.Reused, &room)
	m.Failed = fitting(m.Failed, &room)
	m.NotHere = fitting(m.NotHere, &room)
	m.Filtered = fitting(m.Filtered, &room) // last: they are counted beside it
	m.Reason = fmt.Sprintf("%d users do not fit into the ack", all-named())
}

func fitting(ids []string, room *int) []string {
	for i, id := range ids {
		*room -= len(id) + 3
		if *room < 0 {
			return ids[:i]
		}
	}
	return ids
}
