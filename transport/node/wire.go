package node

import (
	"cmp"
	"errors"
	"fmt"
	"math"

	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/discovery"
)

// request is one DeliverRequest taken apart. Its slices point into the frame, which nobody
// writes to, and are reused for the next one. Numbers have the low 32 bits, as in proto3.
type request struct {
	hello      []byte
	hasHello   bool
	firstSeq   uint64
	deliveries [][]byte
	forget     []uint32
	heartbeat  uint64
	drain      bool
	compressed []byte // a frame
	rawBytes   uint32 // its length
	isPacked   bool   // compressed or rawBytes is there
	nudges     [][]byte
	ends       [][]byte // of replays
	marks      [][]byte // of the logs of rooms
	pages      [][]byte // likewise

	disconnects [][]byte
}

// hasMore tells that there is something besides hello.
func (r *request) hasMore() bool {
	return len(r.deliveries) > 0 || len(r.forget) > 0 || r.heartbeat != 0 || r.drain || r.firstSeq != 0 ||
		len(r.nudges) > 0 || len(r.ends) > 0 || len(r.marks) > 0 || len(r.pages) > 0 || len(r.disconnects) > 0
}

func (r *request) parse(frame []byte) error {
	clear(r.deliveries)
	clear(r.nudges)
	clear(r.ends)
	clear(r.marks)
	clear(r.pages)
	clear(r.disconnects)
	*r = request{
		deliveries: r.deliveries[:0], forget: r.forget[:0], nudges: r.nudges[:0], ends: r.ends[:0],
		marks: r.marks[:0], pages: r.pages[:0], disconnects: r.disconnects[:0],
	}
	var err error
	m := wire.Reader{Rest: frame}
	for err == nil && m.Next() {
		switch {
		case m.IsBytes(1):
			r.hasHello = true
			r.hello = merge(r.hello, m.Bytes)
		case m.IsUint(2):
			r.firstSeq = m.Uint
		case m.IsBytes(3):
			r.deliveries = append(r.deliveries, m.Bytes)
		case m.IsUint(4):
			r.forget = append(r.forget, uint32(m.Uint))
		case m.IsBytes(4):
			err = wire.Uints(m.Bytes, func(id uint64) error {
				r.forget = append(r.forget, uint32(id))
				return nil
			})
		case m.IsUint(5):
			r.heartbeat = m.Uint
		case m.IsUint(6):
			r.drain = m.Uint != 0
		case m.IsBytes(7):
			r.compressed, r.isPacked = m.Bytes, true
		case m.IsUint(8):
			r.rawBytes, r.isPacked = uint32(m.Uint), true
		case m.IsBytes(9):
			r.nudges = append(r.nudges, m.Bytes)
		case m.IsBytes(10):
			r.ends = append(r.ends, m.Bytes)
		case m.IsBytes(11):
			r.marks = append(r.marks, m.Bytes)
		case m.IsBytes(12):
			r.pages = append(r.pages, m.Bytes)
		case m.IsBytes(13):
			r.disconnects = append(r.disconnects, m.Bytes)
		}
	}
	return cmp.Or(err, m.Err)
}

// delivery is one Delivery taken apart. Its strings are views into the frame;
// its slices are reused for the next one.
type delivery struct {
	content     []byte
	room        string
	users       []string
	audience    []byte
	hasAudience bool
	everybody   bool
	except      []string
	traceparent string
	scope       string

	// Of lasting delivery.
	isLasting   bool // one of these fields is there
	messageID   string
	sender      string
	rooms       []string
	payloadHash uint32
	ttl         uint32 // ms, 0: for ever
	wantAck     bool
	ackTimeout  uint32 // ms
	collapse    string
	hasReplay   bool
	replay      replayPlace
	hasLog      bool
	log         LogPlace // its Exclude is not reused

	matches   []wireMatch // of the filter
	filter    Filter      // made of them by targets
	namesLeft bool        // name_filtered

	// Of the audience.
	id, version uint32
	audRoom     string
	audRooms    []string
	join, leave []string
}

func (d *delivery) parse(b []byte) error {
	*d = delivery{
		users: reuse(d.users), except: reuse(d.except), join: reuse(d.join), leave: reuse(d.leave),
		rooms: reuse(d.rooms), audRooms: reuse(d.audRooms),
	}
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsBytes(1):
			d.content = merge(d.content, m.Bytes)
		case m.IsBytes(2):
			d.room = wire.String(m.Bytes)
		case m.IsBytes(3):
			d.users = append(d.users, wire.String(m.Bytes))
		case m.IsBytes(4):
			d.hasAudience = true
			d.audience = merge(d.audience, m.Bytes)
		case m.IsUint(5):
			d.everybody = m.Uint != 0
		case m.IsBytes(6):
			d.except = append(d.except, wire.String(m.Bytes))
		case m.IsBytes(7):
			d.traceparent = wire.String(m.Bytes)
		case m.IsBytes(8):
			d.scope = wire.String(m.Bytes)
		case m.IsBytes(16):
			d.messageID = wire.String(m.Bytes)
		case m.IsFixed32(17):
			d.payloadHash = uint32(m.Uint)
		case m.IsUint(18):
			d.ttl = uint32(m.Uint)
		case m.IsUint(19):
			d.wantAck = m.Uint != 0
		case m.IsUint(20):
			d.ackTimeout = uint32(m.Uint)
		case m.IsBytes(21):
			d.collapse = wire.String(m.Bytes)
		case m.IsBytes(23):
			d.hasReplay = true
			if err := d.replay.parse(m.Bytes); err != nil {
				return err
			}
		case m.IsBytes(24):
			d.hasLog = true
			if err := d.log.parse(m.Bytes); err != nil {
				return err
			}
		case m.IsBytes(25):
			d.sender = wire.String(m.Bytes)
		case m.IsBytes(26):
			if len(d.matches) > maxMatches { // one more is kept, so that it is seen that they are too many
				continue
			}
			d.matches = append(d.matches, wireMatch{})
			if err := d.matches[len(d.matches)-1].parse(m.Bytes); err != nil {
				return err
			}
		case m.IsBytes(27):
			d.rooms = append(d.rooms, wire.String(m.Bytes))
		case m.IsUint(28):
			d.namesLeft = m.Uint != 0
		}
		d.isLasting = d.isLasting || m.Number() >= 16 && m.Number() < 26
	}
	if m.Err != nil || !d.hasAudience {
		return m.Err
	}
	return d.parseAudience()
}

func (d *delivery) parseAudience() error {
	m := wire.Reader{Rest: d.audience}
	for m.Next() {
		switch {
		case m.IsUint(1):
			d.id = uint32(m.Uint)
		case m.IsUint(2):
			d.version = uint32(m.Uint)
		case m.IsBytes(3):
			d.audRoom = wire.String(m.Bytes)
		case m.IsBytes(4):
			d.join = append(d.join, wire.String(m.Bytes))
		case m.IsBytes(5):
			d.leave = append(d.leave, wire.String(m.Bytes))
		case m.IsBytes(6):
			d.audRooms = append(d.audRooms, wire.String(m.Bytes))
		}
	}
	if m.Err != nil {
		return fmt.Errorf("audience: %w", m.Err)
	}
	return nil
}

// replayPlace is a ReplayPlace.
type replayPlace struct{ gate, seq, after uint64 }

func (p *replayPlace) parse(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(1):
			p.gate = m.Uint
		case m.IsUint(2):
			p.seq = m.Uint
		case m.IsUint(3):
			p.after = m.Uint
		}
	}
	if m.Err != nil {
		return fmt.Errorf("replay: %w", m.Err)
	}
	return nil
}

// wireMatch is a Match.
type wireMatch struct {
	key    string
	values []string
	not    bool
}

func (k *wireMatch) parse(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsBytes(1):
			k.key = wire.String(m.Bytes)
		case m.IsBytes(2):
			if len(k.values) <= maxMatchValues { // likewise
				k.values = append(k.values, wire.String(m.Bytes))
			}
		case m.IsUint(3):
			k.not = m.Uint != 0
		}
	}
	if m.Err != nil {
		return fmt.Errorf("filter: %w", m.Err)
	}
	return nil
}

// nudge is a Nudge.
type nudge struct {
	user  string
	token uint64
}

func (n *nudge) parse(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsBytes(1):
			n.user = wire.String(m.Bytes)
		case m.IsUint(3):
			n.token = m.Uint
		}
	}
	if m.Err != nil {
		return fmt.Errorf("nudge: %w", m.Err)
	}
	return nil
}

// replayEnd is a ReplayEnd.
type replayEnd struct {
	gate    uint64
	failure string
}

func (e *replayEnd) parse(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(1):
			e.gate = m.Uint
		case m.IsBytes(3):
			e.failure = wire.String(m.Bytes)
		}
	}
	if m.Err != nil {
		return fmt.Errorf("replay end: %w", m.Err)
	}
	return nil
}

// parseContent reads a MessageContent into m.
func (m *Message) parseContent(b []byte) error {
	m.Encoded = b
	c := wire.Reader{Rest: b}
	for c.Next() {
		switch {
		case c.IsUint(1):
			m.Type = pubsub.MessageType(c.Uint)
		case c.IsBytes(2):
			m.Data = c.Bytes
		case c.IsUint(3):
			m.Timestamp = int64(c.Uint)
		case c.IsBytes(4):
			if err := m.parseEntry(c.Bytes); err != nil {
				return fmt.Errorf("content: %w", err)
			}
		}
	}
	if c.Err != nil {
		return fmt.Errorf("content: %w", c.Err)
	}
	return nil
}

func (m *Message) parseEntry(b []byte) error {
	var key, value string
	c := wire.Reader{Rest: b}
	for c.Next() {
		switch {
		case c.IsBytes(1):
			key = wire.String(c.Bytes)
		case c.IsBytes(2):
			value = wire.String(c.Bytes)
		}
	}
	if c.Err != nil {
		return fmt.Errorf("metadata: %w", c.Err)
	}
	if m.Metadata == nil {
		m.Metadata = make(map[string]string)
	}
	m.Metadata[key] = value
	return nil
}

// merge joins the parts of a message that comes in several: decoding them one
// after the other is what merging means.
func merge(before, part []byte) []byte {
	if len(before) == 0 {
		return part
	}
	return append(before, part...)
}

// reuse empties a list of ids without keeping their frame alive.
func reuse(s []string) []string {
	if cap(s) > maxScratch {
		return nil
	}
	clear(s)
	return s[:0]
}

// parse reads a LogPosition.
func (p *LogPlace) parse(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(1):
			p.Partition = uint32(m.Uint)
		case m.IsUint(2):
			p.Seq = m.Uint
		case m.IsBytes(3):
			p.Exclude = append(p.Exclude, wire.String(m.Bytes))
		case m.IsFixed64(4):
			p.Epoch = m.Uint
		}
	}
	if m.Err != nil {
		return fmt.Errorf("log: %w", m.Err)
	}
	return nil
}

// logMark is a LogMark.
type logMark struct {
	partition, partitions uint32
	epoch, after, seq     uint64
	rooms                 [][]byte
}

func (k *logMark) parse(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(1):
			k.partition = uint32(m.Uint)
		case m.IsUint(2):
			k.seq = m.Uint
		case m.IsUint(3):
			k.after = m.Uint
		case m.IsBytes(4):
			k.rooms = append(k.rooms, m.Bytes)
		case m.IsFixed64(5):
			k.epoch = m.Uint
		case m.IsUint(6):
			k.partitions = uint32(m.Uint)
		}
	}
	if m.Err != nil {
		return fmt.Errorf("log mark: %w", m.Err)
	}
	return nil
}

// markedMost bounds the places of a room that one mark names: far more than a manager keeps.
const markedMost = 1 << 20

var errMarkedMost = errors.New("too many places")

// markedRoom is a LogRoom.
type markedRoom struct {
	room string
	seqs []uint64
}

func (r *markedRoom) parse(b []byte) error {
	*r = markedRoom{seqs: r.seqs[:0]}
	m := wire.Reader{Rest: b}
	var err error
	for err == nil && m.Next() {
		switch {
		case m.IsBytes(1):
			r.room = wire.String(m.Bytes)
		case m.IsUint(2):
			r.seqs = append(r.seqs, m.Uint)
		case m.IsBytes(2):
			err = wire.Uints(m.Bytes, func(seq uint64) error {
				if len(r.seqs) >= markedMost {
					return errMarkedMost
				}
				r.seqs = append(r.seqs, seq)
				return nil
			})
		}
	}
	if err = cmp.Or(err, m.Err); err != nil {
		return fmt.Errorf("log mark: room: %w", err)
	}
	return nil
}

// logPage is a LogPage, with its entries as they stand in it.
type logPage struct {
	gate, epoch, seq uint64
	partition        uint32
	entries          [][]byte
	more, gap        bool
	failure          string
	bytes            int
	messages         []*Message // those of entries; their Options have Log
}

func (p *logPage) parse(b []byte) error {
	p.bytes = len(b)
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(1):
			p.gate = m.Uint
		case m.IsUint(2):
			p.partition = uint32(m.Uint)
		case m.IsBytes(3):
			p.entries = append(p.entries, m.Bytes)
		case m.IsUint(4):
			p.seq = m.Uint
		case m.IsUint(5):
			p.more = m.Uint != 0
		case m.IsUint(6):
			p.gap = m.Uint != 0
		case m.IsBytes(7):
			p.failure = wire.String(m.Bytes)
		case m.IsFixed64(8):
			p.epoch = m.Uint
		}
	}
	if m.Err != nil {
		return fmt.Errorf("log page: %w", m.Err)
	}
	return nil
}

// disconnect is a Disconnect. Its strings do not share the memory of the frame: a refusal is kept for long.
type disconnect struct {
	discovery.Refusal

	token      uint64
	allowAgain bool
	revision   int64
}

func (d *disconnect) parse(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(1):
			d.token = m.Uint
		case m.IsBytes(2):
			d.User = string(m.Bytes)
		case m.IsBytes(3):
			d.Device = string(m.Bytes)
		case m.IsBytes(4):
			d.Room = string(m.Bytes)
		case m.IsUint(5):
			d.Code = uint16(min(uint32(m.Uint), math.MaxUint16))
		case m.IsBytes(6):
			d.Reason = string(m.Bytes)
		case m.IsUint(7):
			d.Seconds = int64(min(m.Uint, math.MaxInt32*1000)+999) / 1000
		case m.IsUint(8):
			d.allowAgain = m.Uint != 0
		case m.IsUint(9):
			d.revision = int64(m.Uint)
		}
	}
	if m.Err != nil {
		return fmt.Errorf("disconnect: %w", m.Err)
	}
	if d.token == 0 {
		return errors.New("disconnect: token: must not be 0")
	}
	if err := d.Check(); err != nil {
		return fmt.Errorf("disconnect: %w", err)
	}
	return nil
}
