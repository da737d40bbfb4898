package link

import (
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// nudgesMax bounds the nudges of one stream that are not answered. A node answers one in a round trip, so
// these are some 100,000 a second, of messages that were stored in the very moment in which
// their user connected.
const nudgesMax = 4096

// Field numbers of proto/connect_node.proto.
const (
	reqNudges = 9

	nudgeUser, nudgeSeq, nudgeToken = 1, 2, 3
)

// nudges are those of one stream that its node has not answered, in the order of their tokens. Guarded by
// link.mu, but for done, which is called without.
type nudges struct {
	list  []nudge // a part of it may have been answered
	first uint64  // the token of list[0]
	next  uint64  // the token of the first that was not written
}

type nudge struct {
	user  string
	seq   uint64
	token uint64
	at    int64      // running time
	done  func(bool) // nil once it has an answer
}

func newNudges() nudges { return nudges{first: 1, next: 1} }

// add takes a nudge. False means that there is no room for it.
func (n *nudges) add(user string, seq uint64, at int64, done func(bool)) bool {
	if len(n.list) >= nudgesMax {
		return false
	}
	n.list = append(n.list, nudge{user: user, seq: seq, token: n.end(), at: at, done: done})
	return true
}

// end is the token of the nudge that comes.
func (n *nudges) end() uint64 { return n.first + uint64(len(n.list)) }

// waiting tells whether there is something to write.
func (n *nudges) waiting() bool { return n.next < n.end() }

// unwritten appends to dst the nudges that are to be written, so many at most.
func (n *nudges) unwritten(dst []nudge, most int) []nudge {
	list := n.list[n.next-n.first:]
	return append(dst, list[:min(len(list), most)]...)
}

// wrote notes that the nudges with tokens below next are on their way.
func (n *nudges) wrote(next uint64) { n.next = max(n.next, next) }

// take takes the one with the token. It is nil when that has had its answer; false means
// that it was not written.
func (n *nudges) take(token uint64) (done func(bool), ok bool) {
	if token == 0 || token >= n.next {
		return nil, false
	}
	if token < n.first {
		return nil, true
	}
	p := &n.list[token-n.first]
	done, p.done, p.user = p.done, nil, ""
	n.trim()
	return done, true
}

// popLate appends to dst those that came in at or before aged.
func (n *nudges) popLate(dst []func(bool), aged int64) []func(bool) {
	for i := range n.list {
		p := &n.list[i]
		if p.at > aged {
			break
		}
		if p.done != nil {
			dst = append(dst, p.done)
			p.done = nil
		}
	}
	n.trim()
	return dst
}

// popAll takes all of them.
func (n *nudges) popAll() (list []func(bool)) {
	for i := range n.list {
		if done := n.list[i].done; done != nil {
			list = append(list, done)
		}
	}
	n.first, n.list = n.end(), nil
	n.next = n.first
	return list
}

// trim lets go of those at the front that have their answer.
func (n *nudges) trim() {
	for len(n.list) > 0 && n.list[0].done == nil {
		n.list = n.list[1:]
		n.first++
	}
	if len(n.list) == 0 {
		n.list = nil
	}
	n.next = max(n.next, n.first)
}

// open is how many have no answer.
func (n *nudges) open() (count int) {
	for i := range n.list {
		if n.list[i].done != nil {
			count++
		}
	}
	return count
}

func (n *nudge) size() int {
	return wire.SizeString(nudgeUser, n.user) + wire.SizeUint(nudgeSeq, n.seq) + wire.SizeUint(nudgeToken, n.token)
}

func (n *nudge) append(b []byte, size int) []byte {
	b = wire.AppendLen(b, reqNudges, size)
	b = wire.AppendString(b, nudgeUser, n.user)
	b = wire.AppendUint(b, nudgeSeq, n.seq)
	return wire.AppendUint(b, nudgeToken, n.token)
}

// Nudge implements engine.Link. A node that does not answer within the ack timeout has not
// taken it.
func (l *Link) Nudge(user string, seq uint64, done func(taken bool)) {
	l.mu.Lock()
	s, ok := l.way.(*stream)
	ok = ok && l.state == up && !l.endsLocked() && s.can.has(pubsub.Feature_FEATURE_REPLAY) &&
		len(user) <= ids.MaxScopedBytes && s.nudges.add(user, seq, l.set.clock.ran.Load(), done)
	if ok {
		l.tickNow()
		s.wakeLocked()
	}
	l.mu.Unlock()
	if ok {
		l.set.meters.nudges.Inc()
	} else {
		l.refused([]func(bool){done})
	}
}

// refused tells nudges that the node has not taken them, and empties the list.
func (l *Link) refused(list []func(bool)) {
	for i, done := range list {
		if list[i] = nil; done != nil { // a list of which a part was told before it
			l.set.meters.nudgesRefused.Inc()
			done(false)
		}
	}
}
