package link

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Field numbers of proto/connect_node.proto.
const (
	respHello, respAcks, respMisses, respHeartbeat, respOnline, respDrain = 1, 2, 3, 4, 5, 6
	respReceipts, respCatchups, respReplayTaken, respNudgesTaken          = 7, 8, 9, 10
	respLogReads, respLogFollow                                           = 11, 12
	respDisconnected                                                      = 13

	ackFirst, ackDelivered, ackDuplicates, ackPending, ackFiltered = 1, 2, 3, 4, 5

	missSeq, missNotHere, missFailed, missReason, missFailedUsers, missRefused, missReused, missFiltered = 1, 2, 3, 4, 5, 6, 7, 8

	receiptSeq, receiptAcked, receiptUnacked, receiptFinal = 1, 2, 3, 4

	catchupUser, catchupGate, catchupWindow = 1, 2, 3

	takenGate, takenSeq = 1, 2

	readRoom, readGate, readEpoch, readAfter = 1, 2, 3, 4

	followEpoch, followAfter = 1, 2
)

// textMax is what is kept of the words of a node. All words of nodes that go anywhere go
// through plain.Line.
const textMax = 256

var (
	errWire     = errors.New("bytes that are no DeliverResponse")
	errAckFlood = errors.New("more acks in a frame than deliveries are owed")
	errFlood    = errors.New("more receipts, catchups or answers in a frame than can be open")
	errText     = errors.New("text that is not UTF-8")
	errCounts   = errors.New("counts beside an ack are not as many as it has")
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

	// Of lasting delivery.
	receipts []receipt
	catchups []catchup
	taken    []taken
	tokens   []uint64 // of nudges

	// Of the logs of rooms.
	logReads []LogRead
	follow   logFollow
	follows  bool // follow is there

	disconnected []disconnected

	more                          []counts // beside acks
	duplicates, pending, filtered []uint32 // scratch of decodeAcks
}

type ack struct {
	seq       uint64
	delivered uint32
	more      uint32 // counts beside it: more-1 is their place in response.more, 0 for none
	miss      *miss  // what the frame says beside it, nil for nothing
}

// counts are of delivered, but for filtered, which is beside it.
type counts struct{ duplicates, pending, filtered uint32 }

type receipt struct {
	seq     uint64
	acked   uint32
	unacked []string
	final   bool
}

type catchup struct {
	user   string
	gate   uint64
	window uint64
}

type taken struct{ gate, seq uint64 }

type logFollow struct {
	epoch uint64
	after []uint64
}

type miss struct {
	seq         uint64
	notHere     []string
	failed      []string
	reason      string
	failedUsers uint32
	refused     bool
	reused      []string
	filtered    []string
	acked       bool // its ack is in the same frame
}

// decode replaces r by the message in b, all or nothing: an error leaves r
// without meaning. It does not keep b. maxAcks bounds the acks.
func (r *response) decode(b []byte, maxAcks int) error {
	clear(r.misses) // lets go of the strings
	*r = response{
		acks: r.acks[:0], misses: r.misses[:0], receipts: emptied(r.receipts), catchups: emptied(r.catchups),
		taken: emptied(r.taken), tokens: r.tokens[:0], logReads: emptied(r.logReads), disconnected: emptied(r.disconnected), more: r.more[:0],
		duplicates: r.duplicates, pending: r.pending, filtered: r.filtered,
	}
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
		case m.Number() >= respReceipts && m.Number() <= respNudgesTaken:
			err = r.decodeLasting(&m)
		case m.Number() == respLogReads || m.Number() == respLogFollow:
			err = r.decodeLogs(&m)
		case m.IsBytes(respDisconnected):
			if len(r.disconnected) >= disconnectsMax {
				return fmt.Errorf("%w: %w", errWire, errFlood)
			}
			r.disconnected = append(r.disconnected, disconnected{})
			err = r.disconnected[len(r.disconnected)-1].decode(m.Bytes)
		case m.Number() <= respDrain || m.Number() == respDisconnected:
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

// emptied is list with its memory for the next frame, unless that is a lot: such a frame is rare.
func emptied[T any](list []T) []T {
	if cap(list) > 1024 {
		return nil
	}
	clear(list)
	return list[:0]
}

// decodeAcks flattens an AckRange. Its first may stand behind its counts.
func (r *response) decodeAcks(b []byte, maxAcks int) error {
	start := len(r.acks)
	var first uint64
	r.duplicates, r.pending, r.filtered = r.duplicates[:0], r.pending[:0], r.filtered[:0]
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
		case m.Number() == ackDuplicates:
			r.duplicates, err = appendCounts(r.duplicates, &m, maxAcks)
		case m.Number() == ackPending:
			r.pending, err = appendCounts(r.pending, &m, maxAcks)
		case m.Number() == ackFiltered:
			r.filtered, err = appendCounts(r.filtered, &m, maxAcks)
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
	if len(r.duplicates)+len(r.pending)+len(r.filtered) > 0 {
		return cmp.Or(m.Err, r.besideAcks(start))
	}
	return m.Err
}

// besideAcks gives the acks from start on their further counts. There are as many as acks, or none.
func (r *response) besideAcks(start int) error {
	acks := r.acks[start:]
	for _, list := range [...][]uint32{r.duplicates, r.pending, r.filtered} {
		if n := len(list); n != 0 && n != len(acks) {
			return errCounts
		}
	}
	for i := range acks {
		var c counts
		if len(r.duplicates) > 0 {
			c.duplicates = r.duplicates[i]
		}
		if len(r.pending) > 0 {
			c.pending = r.pending[i]
		}
		if len(r.filtered) > 0 {
			c.filtered = r.filtered[i]
		}
		r.more = append(r.more, c)
		acks[i].more = uint32(len(r.more))
	}
	return nil
}

// appendCounts reads a packed list of counts, or one of a list that is not packed. A field of another type is an unknown one.
func appendCounts(list []uint32, m *wire.Reader, most int) ([]uint32, error) {
	add := func(v uint64) error {
		if len(list) >= most {
			return errAckFlood
		}
		list = append(list, saturated(v))
		return nil
	}
	var err error
	switch m.Type() {
	case protowire.BytesType:
		err = wire.Uints(m.Bytes, add)
	case protowire.VarintType:
		err = add(m.Uint)
	}
	return list, err
}

// decodeLasting reads a field of lasting delivery. Each list is as long as it may become, at most.
func (r *response) decodeLasting(m *wire.Reader) error {
	token := func(v uint64) error {
		if len(r.tokens) >= nudgesMax {
			return errFlood
		}
		r.tokens = append(r.tokens, v)
		return nil
	}
	switch {
	case m.IsBytes(respReceipts):
		if len(r.receipts) >= receiptsMax {
			return errFlood
		}
		r.receipts = append(r.receipts, receipt{})
		return r.receipts[len(r.receipts)-1].decode(m.Bytes)
	case m.IsBytes(respCatchups):
		if len(r.catchups) >= gatesMax {
			return errFlood
		}
		r.catchups = append(r.catchups, catchup{})
		return r.catchups[len(r.catchups)-1].decode(m.Bytes)
	case m.IsBytes(respReplayTaken):
		if len(r.taken) >= gatesMax {
			return errFlood
		}
		r.taken = append(r.taken, taken{})
		return r.taken[len(r.taken)-1].decode(m.Bytes)
	case m.IsBytes(respNudgesTaken):
		return wire.Uints(m.Bytes, token)
	case m.IsUint(respNudgesTaken):
		return token(m.Uint)
	}
	return fmt.Errorf("field %d has another type", m.Number())
}

// decodeLogs reads a field of the logs of rooms. Reads that are too many have an error for an answer, as many again as can be open.
func (r *response) decodeLogs(m *wire.Reader) error {
	switch {
	case m.IsBytes(respLogReads):
		if len(r.logReads) >= 2*logReadsMax {
			return errFlood
		}
		r.logReads = append(r.logReads, LogRead{})
		return decodeLogRead(&r.logReads[len(r.logReads)-1], m.Bytes)
	case m.IsBytes(respLogFollow):
		r.follows = true
		return r.follow.decode(m.Bytes)
	}
	return fmt.Errorf("field %d has another type", m.Number())
}

// counts of an ack are mostly zero.
func (r *response) counts(a *ack) counts {
	if a.more == 0 {
		return counts{}
	}
	return r.more[a.more-1]
}

func (s *receipt) decode(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(receiptSeq):
			s.seq = m.Uint
		case m.IsUint(receiptAcked):
			s.acked = saturated(m.Uint)
		case m.IsBytes(receiptUnacked):
			if !utf8.Valid(m.Bytes) {
				return errText
			}
			s.unacked = append(s.unacked, string(m.Bytes))
		case m.IsUint(receiptFinal):
			s.final = m.Uint != 0
		}
	}
	return m.Err
}

func (s *catchup) decode(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsBytes(catchupUser):
			if !utf8.Valid(m.Bytes) {
				return errText
			}
			s.user = string(m.Bytes)
		case m.IsUint(catchupGate):
			s.gate = m.Uint
		case m.IsUint(catchupWindow):
			s.window = m.Uint
		}
	}
	return m.Err
}

func (s *taken) decode(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(takenGate):
			s.gate = m.Uint
		case m.IsUint(takenSeq):
			s.seq = m.Uint
		}
	}
	return m.Err
}

func decodeLogRead(s *LogRead, b []byte) (err error) {
	m := wire.Reader{Rest: b}
	for err == nil && m.Next() {
		switch {
		case m.IsBytes(readRoom):
			if !utf8.Valid(m.Bytes) {
				return errText
			}
			s.Room = string(m.Bytes)
		case m.IsUint(readGate):
			s.Gate = m.Uint
		case m.IsFixed64(readEpoch):
			s.Epoch = m.Uint
		case m.Number() == readAfter:
			s.After, err = appendPlaces(s.After, &m)
		}
	}
	return cmp.Or(err, m.Err)
}

func (s *logFollow) decode(b []byte) (err error) {
	m := wire.Reader{Rest: b}
	for err == nil && m.Next() {
		switch {
		case m.IsFixed64(followEpoch):
			s.epoch = m.Uint
		case m.Number() == followAfter:
			s.after, err = appendPlaces(s.after, &m)
		}
	}
	return cmp.Or(err, m.Err)
}

// appendPlaces reads a packed list of places by partition, or one of a list that is not packed.
func appendPlaces(list []uint64, m *wire.Reader) ([]uint64, error) {
	add := func(v uint64) error {
		if len(list) >= logPartitionsMax {
			return errFlood
		}
		list = append(list, v)
		return nil
	}
	var err error
	switch m.Type() {
	case protowire.BytesType:
		err = wire.Uints(m.Bytes, add)
	case protowire.VarintType:
		err = add(m.Uint)
	}
	return list, err
}

func (s *miss) decode(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		isText := m.IsBytes(missNotHere) || m.IsBytes(missFailed) || m.IsBytes(missReason) || m.IsBytes(missReused) || m.IsBytes(missFiltered)
		switch {
		case isText && !utf8.Valid(m.Bytes):
			return errText
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
		case m.IsBytes(missReused):
			s.reused = append(s.reused, string(m.Bytes))
		case m.IsBytes(missFiltered):
			s.filtered = append(s.filtered, string(m.Bytes))
		}
	}
	return m.Err
}

// saturated: a number that is too large is a claim to be judged, not a smaller one.
func saturated(v uint64) uint32 { return uint32(min(v, math.MaxUint32)) }
