package node

import (
	"fmt"
	"slices"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"

	pubsub "github.com/push-manager/push-manager/proto"
)

// request is one DeliverRequest taken apart. Its slices point into the frame and
// are reused for the next one.
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
}

// hasMore tells that there is something besides hello.
func (r *request) hasMore() bool {
	return len(r.deliveries) > 0 || len(r.forget) > 0 || r.heartbeat != 0 || r.drain || r.firstSeq != 0
}

func (r *request) parse(frame []byte) error {
	clear(r.deliveries)
	*r = request{deliveries: r.deliveries[:0], forget: r.forget[:0]}
	var f field
	var err error
	all := fields{rest: frame}
	for err == nil && all.next(&f) {
		switch {
		case f.is(1, protowire.BytesType):
			r.hasHello = true
			r.hello = merge(r.hello, f.data)
		case f.is(2, protowire.VarintType):
			r.firstSeq = f.num64
		case f.is(3, protowire.BytesType):
			r.deliveries = append(r.deliveries, f.data)
		case f.is(4, protowire.VarintType):
			r.forget = append(r.forget, f.uint32())
		case f.is(4, protowire.BytesType):
			r.forget, err = appendPacked(r.forget, f.data)
		case f.is(5, protowire.VarintType):
			r.heartbeat = f.num64
		case f.is(6, protowire.VarintType):
			r.drain = f.num64 != 0
		case f.is(7, protowire.BytesType):
			r.compressed, r.isPacked = f.data, true
		case f.is(8, protowire.VarintType):
			r.rawBytes, r.isPacked = f.uint32(), true
		}
	}
	if err != nil {
		return fmt.Errorf("field %d: %w", f.num, err)
	}
	return all.err
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

	// Of the audience.
	id, version uint32
	audRoom     string
	join, leave []string
}

func (d *delivery) parse(b []byte) error {
	*d = delivery{users: reuse(d.users), except: reuse(d.except), join: reuse(d.join), leave: reuse(d.leave)}
	var f field
	all := fields{rest: b}
	for all.next(&f) {
		switch {
		case f.is(1, protowire.BytesType):
			d.content = merge(d.content, f.data)
		case f.is(2, protowire.BytesType):
			d.room = f.string()
		case f.is(3, protowire.BytesType):
			d.users = append(d.users, f.string())
		case f.is(4, protowire.BytesType):
			d.hasAudience = true
			d.audience = merge(d.audience, f.data)
		case f.is(5, protowire.VarintType):
			d.everybody = f.num64 != 0
		case f.is(6, protowire.BytesType):
			d.except = append(d.except, f.string())
		case f.is(7, protowire.BytesType):
			d.traceparent = f.string()
		}
	}
	if all.err != nil || !d.hasAudience {
		return all.err
	}
	return d.parseAudience()
}

func (d *delivery) parseAudience() error {
	var f field
	all := fields{rest: d.audience}
	for all.next(&f) {
		switch {
		case f.is(1, protowire.VarintType):
			d.id = f.uint32()
		case f.is(2, protowire.VarintType):
			d.version = f.uint32()
		case f.is(3, protowire.BytesType):
			d.audRoom = f.string()
		case f.is(4, protowire.BytesType):
			d.join = append(d.join, f.string())
		case f.is(5, protowire.BytesType):
			d.leave = append(d.leave, f.string())
		}
	}
	if all.err != nil {
		return fmt.Errorf("audience: %w", all.err)
	}
	return nil
}

// parseContent reads a MessageContent into m.
func (m *Message) parseContent(b []byte) error {
	m.Encoded = b
	var f field
	all := fields{rest: b}
	for all.next(&f) {
		switch {
		case f.is(1, protowire.VarintType):
			m.Type = pubsub.MessageType(f.num64) // The low 32 bits, as in proto3.
		case f.is(2, protowire.BytesType):
			m.Data = f.data
		case f.is(3, protowire.VarintType):
			m.Timestamp = int64(f.num64)
		case f.is(4, protowire.BytesType):
			if err := m.parseEntry(f.data); err != nil {
				return fmt.Errorf("content: %w", err)
			}
		}
	}
	if all.err != nil {
		return fmt.Errorf("content: %w", all.err)
	}
	return nil
}

func (m *Message) parseEntry(b []byte) error {
	var key, value string
	var f field
	all := fields{rest: b}
	for all.next(&f) {
		switch {
		case f.is(1, protowire.BytesType):
			key = f.string()
		case f.is(2, protowire.BytesType):
			value = f.string()
		}
	}
	if all.err != nil {
		return fmt.Errorf("metadata: %w", all.err)
	}
	if m.Metadata == nil {
		m.Metadata = make(map[string]string)
	}
	m.Metadata[key] = value
	return nil
}

// field is one field on the wire.
type field struct {
	num   protowire.Number
	typ   protowire.Type
	num64 uint64 // of a varint
	data  []byte // of a length-delimited field
}

// fields are those of a message that are varints or length-delimited, in the order of
// the wire; the rest is skipped. A known number with another type than it has is an
// unknown field, as everywhere in protobuf.
type fields struct {
	rest []byte
	err  error
}

// next takes the next field. False means that there is none, or an error.
func (s *fields) next(f *field) bool {
	if len(s.rest) == 0 {
		return false
	}
	n := f.consume(s.rest)
	if n < 0 {
		s.err = protowire.ParseError(n)
		return false
	}
	s.rest = s.rest[n:]
	return true
}

// consume reads the field that b, which is not empty, begins with. It returns its
// length, negative for a protowire error.
func (f *field) consume(b []byte) int {
	// Most fields have a number below 16 and a length below 128.
	if b[0] >= 1<<3 && b[0] < 0x80 && protowire.Type(b[0]&7) == protowire.BytesType && len(b) > 1 && b[1] < 0x80 {
		end := 2 + int(b[1])
		if end > len(b) {
			return errTruncated
		}
		f.num, f.typ, f.data = protowire.Number(b[0]>>3), protowire.BytesType, b[2:end:end]
		return end
	}
	var n, m int
	f.num, f.typ, n = protowire.ConsumeTag(b)
	if n < 0 {
		return n
	}
	switch f.typ {
	case protowire.VarintType:
		f.num64, m = protowire.ConsumeVarint(b[n:])
	case protowire.BytesType:
		f.data, m = protowire.ConsumeBytes(b[n:])
		f.data = slices.Clip(f.data)
	default:
		m = protowire.ConsumeFieldValue(f.num, f.typ, b[n:])
	}
	if m < 0 {
		return m
	}
	return n + m
}

// errTruncated is protowire's number for an end that comes too early.
const errTruncated = -1

func (f *field) is(num protowire.Number, typ protowire.Type) bool {
	return f.num == num && f.typ == typ
}

func (f *field) uint32() uint32 {
	return uint32(f.num64) // The low 32 bits, as in proto3.
}

// string is a view: the frame is never written to and lives as long as it.
func (f *field) string() string {
	return unsafe.String(unsafe.SliceData(f.data), len(f.data)) //nolint:gosec // See above.
}

// merge joins the parts of a message that comes in several: decoding them one
// after the other is what merging means.
func merge(before, part []byte) []byte {
	if len(before) == 0 {
		return part
	}
	return append(before, part...)
}

func appendPacked(s []uint32, b []byte) ([]uint32, error) {
	for len(b) > 0 {
		v, n := protowire.ConsumeVarint(b)
		if n < 0 {
			return s, protowire.ParseError(n)
		}
		s, b = append(s, uint32(v)), b[n:]
	}
	return s, nil
}

// reuse empties a list of ids without keeping their frame alive.
func reuse(s []string) []string {
	if cap(s) > maxScratch {
		return nil
	}
	clear(s)
	return s[:0]
}
