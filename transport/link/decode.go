package link

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Field numbers of proto/connect_node.proto.
const (
	respHello, respAcks, respMisses, respHeartbeat, respOnline, respDrain = 1, 2, 3, 4, 5, 6

	ackFirst, ackDelivered = 1, 2

	missSeq, missNotHere, missFailed, missReason, missFailedUsers, missRefused = 1, 2, 3, 4, 5, 6
)

// textMax is what is kept of the words of a node. All words of nodes that go anywhere go
// through plain.Line.
const textMax = 256

var (
	errWire     = errors.New("bytes that are no DeliverResponse")
	errAckFlood = errors.New("more acks in a frame than deliveries are owed")
)

// response is one decoded DeliverResponse. Its memory is reused for the next.
type response struct {
	hello     *pubsub.HelloReply // of the first frame
	acks      []ack
	misses    []miss // by seq
	stray     int    // misses without their ack
	heartbeat uint64
	online    uint32
	drain     bool
}

type ack struct {
	seq       uint64
	delivered uint32
	miss      *miss // what the frame says beside it, nil for nothing
}

type miss struct {
	seq         uint64
	notHere     []string
	failed      []string
	reason      string
	failedUsers uint32
	refused     bool
	acked       bool // its ack is in the same frame
}

// decode replaces r by the message in b, all or nothing: an error leaves r
// without meaning. It does not keep b. maxAcks bounds the acks.
func (r *response) decode(b []byte, maxAcks int) error {
	clear(r.misses) // lets go of the strings
	*r = response{acks: r.acks[:0], misses: r.misses[:0]}
	m := wire.Reader{Rest: b}
	for m.Next() {
		var err error
		switch {
		case m.IsBytes(respHello):
			r.hello = new(pubsub.HelloReply)
			err = proto.Unmarshal(m.Bytes, r.hello)
		case m.IsBytes(respAcks):
			err = r.decodeAcks(m.Bytes, maxAcks)
		case m.IsBytes(respMisses):
			if len(r.misses) >= maxAcks {
				return errAckFlood
			}
			r.misses = append(r.misses, miss{})
			err = r.misses[len(r.misses)-1].decode(m.Bytes)
		case m.IsUint(respHeartbeat):
			r.heartbeat = m.Uint
		case m.IsUint(respOnline):
			r.online = saturated(m.Uint)
		case m.IsUint(respDrain):
			r.drain = m.Uint != 0
		case m.Number() <= respDrain:
			return fmt.Errorf("%w: field %d has another type", errWire, m.Number())
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errWire, err)
		}
	}
	if m.Err != nil {
		return fmt.Errorf("%w: %w", errWire, m.Err)
	}
	if r.stray = len(r.misses); r.stray == 0 {
		return nil
	}
	slices.SortStableFunc(r.misses, func(x, y miss) int { return cmp.Compare(x.seq, y.seq) })
	for i := range r.acks {
		at, ok := slices.BinarySearchFunc(r.misses, r.acks[i].seq, func(m miss, seq uint64) int { return cmp.Compare(m.seq, seq) })
		if !ok {
			continue
		}
		r.acks[i].miss = &r.misses[at]
		if !r.misses[at].acked {
			r.misses[at].acked = true
			r.stray--
		}
	}
	return nil
}

// decodeAcks flattens an AckRange. Its first may stand behind its counts.
func (r *response) decodeAcks(b []byte, maxAcks int) error {
	start := len(r.acks)
	var first uint64
	add := func(v uint64) error {
		if len(r.acks) >= maxAcks {
			return errAckFlood
		}
		r.acks = append(r.acks, ack{delivered: saturated(v)})
		return nil
	}
	m := wire.Reader{Rest: b}
	for m.Next() {
		var err error
		switch {
		case m.IsUint(ackFirst):
			first = m.Uint
		case m.IsBytes(ackDelivered):
			err = wire.Uints(m.Bytes, add)
		case m.IsUint(ackDelivered):
			err = add(m.Uint)
		}
		if err != nil {
			return err
		}
	}
	if n := len(r.acks) - start; n > 0 && first > math.MaxUint64-uint64(n) {
		return errors.New("acks beyond the last seq")
	}
	for i := range r.acks[start:] {
		r.acks[start+i].seq = first + uint64(i)
	}
	return m.Err
}

func (s *miss) decode(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		isText := m.IsBytes(missNotHere) || m.IsBytes(missFailed) || m.IsBytes(missReason)
		switch {
		case isText && !utf8.Valid(m.Bytes):
			return errors.New("text that is not UTF-8")
		case m.IsUint(missSeq):
			s.seq = m.Uint
		case m.IsBytes(missNotHere):
			s.notHere = append(s.notHere, string(m.Bytes))
		case m.IsBytes(missFailed):
			s.failed = append(s.failed, string(m.Bytes))
		case m.IsBytes(missReason):
			s.reason = plain.Line(string(m.Bytes), textMax)
		case m.IsUint(missFailedUsers):
			s.failedUsers = saturated(m.Uint)
		case m.IsUint(missRefused):
			s.refused = m.Uint != 0
		}
	}
	return m.Err
}

// saturated: a number that is too large is a claim to be judged, not a smaller one.
func saturated(v uint64) uint32 { return uint32(min(v, math.MaxUint32)) }
