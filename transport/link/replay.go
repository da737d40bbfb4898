package link

import (
	"math"

	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// gatesMax bounds the gates of one stream whose replays have not ended, and the ends that are not written:
// as many as a large node has users, all of whom connect at once. A catchup beyond it is told so, and
// its node asks again later.
const gatesMax = 100_000

// tooManyReplays is what such a node hears.
const tooManyReplays = "too many replays"

// Field numbers of proto/connect_node.proto.
const (
	reqReplayEnds = 10

	endGate, endSeq, endError = 1, 2, 3
)

// Replayer sends nodes what is stored for their users. Its methods are called by the readers of streams, in the order
// in which things came, and must not block.
type Replayer interface {
	// Catchup is asked by a node for what is stored for a user, whose gate on the node it names.
	// window is how many messages may be on their way, 0 for any number.
	Catchup(a Asker, gate uint64, user string, window int)
	// Taken: the client behind the gate has taken everything up to seq. It may come after End. Nobody has
	// checked that the node has asked for the gate.
	Taken(a Asker, gate, seq uint64)
	// Gone: the stream has ended, and with it all its gates. It is the last call for a, and comes once for
	// each stream on which nodes may ask, whether they have or not.
	Gone(a Asker)
}

// Asker is a stream on which a node asks. It is comparable, and stays valid after the stream's end.
type Asker interface {
	// Node is the node's id.
	Node() string
	// End tells the node that a replay has ended, with seq as the last place that was sent, and
	// the reason where the store could not be read. It overtakes messages that were sent before and are
	// not acknowledged. It does not block, and does nothing for a gate that is not open, or once the
	// stream has ended.
	End(gate, seq uint64, reason string)
}

var _ Asker = (*asker)(nil)

// asker is a stream's node as the Replayer knows it.
type asker struct {
	// Static after newStream.
	link *Link

	// Guarded by link.mu.
	stream *stream             // nil once it has ended
	open   map[uint64]struct{} // gates whose replays have not ended; nil while there are none
	ends   []replayEnd         // to be written, in order
}

type replayEnd struct {
	gate, seq uint64
	reason    string
}

// Node implements Asker.
func (a *asker) Node() string { return a.link.node.id }

// End implements Asker.
func (a *asker) End(gate, seq uint64, reason string) {
	reason = plain.Line(reason, textMax)
	a.link.mu.Lock()
	defer a.link.mu.Unlock()
	if _, ok := a.open[gate]; !ok || a.stream == nil {
		return
	}
	if delete(a.open, gate); len(a.open) == 0 {
		a.open = nil
	}
	a.ends = append(a.ends, replayEnd{gate, seq, reason})
	a.stream.wakeLocked()
}

// askLocked opens a gate. False means that it must not be asked for. One for which there is no room
// has an end at once, and asked is false.
func (a *asker) askLocked(gate uint64) (asked, ok bool) {
	if _, twice := a.open[gate]; twice || gate == 0 {
		return false, false
	}
	if len(a.open)+len(a.ends) >= gatesMax {
		if len(a.ends) >= gatesMax {
			return false, false // it asks, and does not read
		}
		a.ends = append(a.ends, replayEnd{gate: gate, reason: tooManyReplays})
		return false, true
	}
	if a.open == nil {
		a.open = make(map[uint64]struct{})
	}
	a.open[gate] = struct{}{}
	return true, true
}

// wroteLocked lets go of the first n ends.
func (a *asker) wroteLocked(n int) {
	if a.ends = a.ends[n:]; len(a.ends) == 0 {
		a.ends = nil
	}
}

// closeLocked ends it with its stream.
func (a *asker) closeLocked() { a.stream, a.open, a.ends = nil, nil, nil }

func (e *replayEnd) size() int {
	return wire.SizeUint(endGate, e.gate) + wire.SizeUint(endSeq, e.seq) + wire.SizeString(endError, e.reason)
}

func (e *replayEnd) append(b []byte, size int) []byte {
	b = wire.AppendLen(b, reqReplayEnds, size)
	b = wire.AppendUint(b, endGate, e.gate)
	b = wire.AppendUint(b, endSeq, e.seq)
	return wire.AppendString(b, endError, e.reason)
}

// replays acts on what a frame says of replays, and counts what cannot be.
func (s *stream) replays() (strikes int) {
	l, r, m := s.link, &s.r.resp, s.link.set.meters
	if len(r.catchups)+len(r.taken)+len(r.tokens) == 0 {
		return 0
	}
	if !s.can.has(pubsub.Feature_FEATURE_REPLAY) {
		return 1
	}
	to := l.set.cfg.Replayer
	for i := range r.catchups {
		c := &r.catchups[i]
		asked, ok := false, ids.Check(c.user, ids.MaxScopedBytes) == nil
		if ok {
			l.mu.Lock()
			if asked, ok = s.asker.askLocked(c.gate); ok && !asked {
				s.wakeLocked()
			}
			l.mu.Unlock()
		}
		switch {
		case !ok:
			strikes++
		case asked:
			m.catchups.Inc()
			to.Catchup(s.asker, c.gate, c.user, int(min(c.window, math.MaxInt32)))
		default:
			m.catchupsRefused.Inc()
		}
	}
	for _, t := range r.taken {
		if t.gate == 0 {
			strikes++
			continue
		}
		to.Taken(s.asker, t.gate, t.seq)
	}
	for _, token := range r.tokens {
		l.mu.Lock()
		done, ok := s.nudges.take(token)
		l.mu.Unlock()
		switch {
		case !ok:
			strikes++
		case done != nil:
			done(true)
		}
	}
	return strikes
}
