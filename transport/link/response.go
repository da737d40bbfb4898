package link

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Field numbers of proto/connect_node.proto.
const (
	respHello, respAcks, respMisses, respHeartbeat, respOnline, respDrain = 1, 2, 3, 4, 5, 6

	replyVersion, replyNode, replyBoot, replyMembers, replyUnacked, replyOnline, replyCodec = 1, 2, 3, 4, 5, 6, 7

	ackFirst, ackDelivered = 1, 2

	missSeq, missNotHere, missFailed, missReason, missFailedUsers, missRefused = 1, 2, 3, 4, 5, 6
)

// textMax is what is kept of the words of a node.
const textMax = 256

var (
	errWire     = errors.New("bytes that are no DeliverResponse")
	errAckFlood = errors.New("more acks in a frame than deliveries are owed")
)

// response is one decoded DeliverResponse. Its memory is reused for the next.
type response struct {
	hello     *helloReply // of the first frame
	acks      []ack
	misses    []miss // sorted by seq once decoded
	heartbeat uint64
	online    uint32
	drain     bool
}

type helloReply struct {
	version uint32
	node    string
	boot    string
	members uint32
	unacked uint32
	online  uint32
	codec   pubsub.Codec
}

type ack struct {
	seq       uint64
	delivered uint32
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
	err := fields(b, func(f field) error {
		switch f.number {
		case respHello:
			r.hello = new(helloReply)
			return f.message(r.hello.field)
		case respAcks:
			return r.decodeAcks(f, maxAcks)
		case respMisses:
			if len(r.misses) >= maxAcks {
				return errAckFlood
			}
			r.misses = append(r.misses, miss{})
			return f.message(r.misses[len(r.misses)-1].field)
		case respHeartbeat:
			return f.uint64(&r.heartbeat)
		case respOnline:
			return f.uint32(&r.online)
		case respDrain:
			return f.bool(&r.drain)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(r.misses) > 1 {
		slices.SortStableFunc(r.misses, func(x, y miss) int { return cmp.Compare(x.seq, y.seq) })
	}
	return nil
}

// miss finds what the frame says beside the ack of seq, nil for nothing.
func (r *response) miss(seq uint64) *miss {
	if len(r.misses) == 0 {
		return nil
	}
	i, ok := slices.BinarySearchFunc(r.misses, seq, func(m miss, seq uint64) int { return cmp.Compare(m.seq, seq) })
	if !ok {
		return nil
	}
	return &r.misses[i]
}

// decodeAcks flattens an AckRange. Its first may stand behind its counts.
func (r *response) decodeAcks(f field, maxAcks int) error {
	start := len(r.acks)
	var first uint64
	add := func(v uint64) error {
		if len(r.acks) >= maxAcks {
			return errAckFlood
		}
		r.acks = append(r.acks, ack{delivered: uint32(min(v, math.MaxUint32))})
		return nil
	}
	err := f.message(func(f field) error {
		switch {
		case f.number == ackFirst:
			return f.uint64(&first)
		case f.number == ackDelivered && f.wire == protowire.BytesType:
			for b := f.bytes; len(b) > 0; {
				v, n := protowire.ConsumeVarint(b)
				if n < 0 {
					return errWire
				}
				if err := add(v); err != nil {
					return err
				}
				b = b[n:]
			}
			return nil
		case f.number == ackDelivered:
			var v uint64
			if err := f.uint64(&v); err != nil {
				return err
			}
			return add(v)
		}
		return nil
	})
	if n := len(r.acks) - start; n > 0 && first > math.MaxUint64-uint64(n) {
		return fmt.Errorf("%w: acks beyond the last seq", errWire)
	}
	for i := range r.acks[start:] {
		r.acks[start+i].seq = first + uint64(i)
	}
	return err
}

func (h *helloReply) field(f field) error {
	switch f.number {
	case replyVersion:
		return f.uint32(&h.version)
	case replyNode:
		return f.string(&h.node)
	case replyBoot:
		return f.string(&h.boot)
	case replyMembers:
		return f.uint32(&h.members)
	case replyUnacked:
		return f.uint32(&h.unacked)
	case replyOnline:
		return f.uint32(&h.online)
	case replyCodec:
		var n uint32
		err := f.uint32(&n)
		h.codec = pubsub.Codec(min(n, math.MaxInt32)) // none of ours, if it is large
		return err
	}
	return nil
}

func (m *miss) field(f field) error {
	switch f.number {
	case missSeq:
		return f.uint64(&m.seq)
	case missNotHere:
		return f.strings(&m.notHere)
	case missFailed:
		return f.strings(&m.failed)
	case missReason:
		if err := f.string(&m.reason); err != nil {
			return err
		}
		m.reason = plain(m.reason)
	case missFailedUsers:
		return f.uint32(&m.failedUsers)
	case missRefused:
		return f.bool(&m.refused)
	}
	return nil
}

// plain makes the words of a node fit for a reply and a log: one line of what can be printed,
// textMax bytes at most. All words of nodes that go anywhere have been through it.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r != utf8.RuneError && unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, shorten(s))
}

// shorten keeps textMax bytes, and not the memory of the others.
func shorten(s string) string {
	if len(s) <= textMax {
		return s
	}
	n := textMax
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return strings.Clone(s[:n])
}

// field is one field of a message.
type field struct {
	number protowire.Number
	wire   protowire.Type
	value  uint64 // of a varint
	bytes  []byte // of a length-delimited field
}

// fields calls yield for each field in b. Fields of other wire types than
// varint and length-delimited are unknown to us and are skipped.
func fields(b []byte, yield func(field) error) error {
	for len(b) > 0 {
		number, wire, n := protowire.ConsumeTag(b)
		if n < 0 || number > protowire.MaxValidNumber {
			return errWire
		}
		b = b[n:]
		f := field{number: number, wire: wire}
		switch wire {
		case protowire.VarintType:
			f.value, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			f.bytes, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(number, wire, b)
		}
		if n < 0 {
			return errWire
		}
		b = b[n:]
		if err := yield(f); err != nil {
			return err
		}
	}
	return nil
}

func (f field) message(yield func(field) error) error {
	if f.wire != protowire.BytesType {
		return errWire
	}
	return fields(f.bytes, yield)
}

func (f field) uint64(v *uint64) error {
	if f.wire != protowire.VarintType {
		return errWire
	}
	*v = f.value
	return nil
}

// uint32 saturates: a larger number is a claim to be judged, not a smaller one.
func (f field) uint32(v *uint32) error {
	if f.wire != protowire.VarintType {
		return errWire
	}
	*v = uint32(min(f.value, math.MaxUint32))
	return nil
}

func (f field) bool(v *bool) error {
	if f.wire != protowire.VarintType {
		return errWire
	}
	*v = f.value != 0
	return nil
}

func (f field) string(v *string) error {
	if f.wire != protowire.BytesType || !utf8.Valid(f.bytes) {
		return errWire
	}
	*v = string(f.bytes)
	return nil
}

func (f field) strings(v *[]string) error {
	var s string
	if err := f.string(&s); err != nil {
		return err
	}
	*v = append(*v, s)
	return nil
}

// markAcked notes which misses stand beside the ack of their seq. The others
// break the rules.
func (r *response) markAcked() {
	if len(r.misses) == 0 {
		return
	}
	for _, a := range r.acks {
		if m := r.miss(a.seq); m != nil {
			m.acked = true
		}
	}
}
