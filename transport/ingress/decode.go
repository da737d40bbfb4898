package ingress

import (
	"fmt"
	"slices"
	"time"
	"unicode/utf8"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
)

const (
	contentData      protowire.Number = 2
	contentTimestamp protowire.Number = 3
	contentMetadata  protowire.Number = 4

	// stampRoom is the space for a timestamp field: a tag and a varint.
	stampRoom = 1 + 10
	// contentSlack is what the encoded content may need beyond its data and its
	// metadata: tags, lengths, and the fields of newer callers. Without this bound
	// a repeated data field would carry any number of bytes past the limit.
	contentSlack = 64 << 10
)

// decoder takes requests apart. It is safe for concurrent use.
type decoder struct {
	limits engine.Limits
	shapes [apis]shape
}

// shape says which fields a request message has; 0 for none.
type shape struct {
	id, list, content protowire.Number
	idName, listName  string
	listMax           int
}

func newDecoder(limits engine.Limits) *decoder {
	d := &decoder{limits: limits}
	d.shapes[toRoom] = shape{id: 1, idName: "room_id", content: 2, list: 3, listName: "exclude_user_ids", listMax: limits.Exclude}
	d.shapes[toUser] = shape{id: 1, idName: "user_id", content: 2}
	d.shapes[toUsers] = shape{list: 1, listName: "user_ids", listMax: limits.Users, content: 2}
	d.shapes[toAll] = shape{content: 1}
	return d
}

func (s *shape) name(num protowire.Number) string {
	switch num {
	case s.id:
		return s.idName
	case s.list:
		return s.listName
	default:
		return "content"
	}
}

// walk is what one pass over a request has found. Its slices are parts of the
// request, but for content once it is merged.
type walk struct {
	id      []byte
	listed  int // entries of the list
	listAt  int // where the first of them stands
	content []byte
	merged  bool // content came in several fields and has a buffer of its own
	facts   engine.Content
}

// decode fills p from the bytes of a request and owns wire from the call on. The
// space behind wire, up to its capacity, must be nobody else's: a timestamp may be
// written there.
func (d *decoder) decode(a api, wire []byte, p *engine.Push) error {
	s := &d.shapes[a]
	w, err := d.walk(s, wire)
	if err != nil {
		return err
	}
	p.Kind = a.kind()
	switch a {
	case toRoom:
		p.Room, p.Exclude = str(w.id), s.collect(wire, &w)
	case toUser:
		p.User = str(w.id)
	case toUsers:
		p.Users = s.collect(wire, &w)
	case toAll, apis: // names nobody
	}
	p.Content = w.facts
	p.Payload = w.payload(wire)
	return nil
}

// walk checks that b is a well-formed message and that its list is within its
// limit, without keeping anything but where things are. The ids that it finds are the
// engine's to check.
func (d *decoder) walk(s *shape, b []byte) (walk, error) {
	var w walk
	for at := 0; at < len(b); {
		start := at
		num, typ, n := tag(b[at:])
		if n < 0 {
			return w, malformed("request")
		}
		at += n
		if typ != protowire.BytesType || num != s.id && num != s.list && num != s.content {
			if n = protowire.ConsumeFieldValue(num, typ, b[at:]); n < 0 {
				return w, malformed("request")
			}
			at += n
			continue
		}
		v, n := protowire.ConsumeBytes(b[at:])
		if n < 0 {
			return w, malformed(s.name(num))
		}
		at += n
		if err := d.field(s, &w, num, v, start); err != nil {
			return w, err
		}
	}
	return w, d.contentSize(&w)
}

// field notes one field of the message, which stands at start.
func (d *decoder) field(s *shape, w *walk, num protowire.Number, v []byte, start int) error {
	switch num {
	case s.content:
		return d.addContent(w, v)
	case s.id:
		if !utf8.Valid(w.id) { // it is replaced: nobody checks it later
			return invalidUTF8(engine.CodeIDMalformed, s.idName)
		}
		w.id = v
	case s.list:
		if w.listed == 0 {
			w.listAt = start
		}
		if w.listed++; w.listed > s.listMax {
			return d.tooMany(s.listName, w.listed)
		}
	}
	return nil
}

// addContent notes a content field. One that comes again is merged with what
// was there, as protobuf has it: by setting one behind the other.
func (d *decoder) addContent(w *walk, v []byte) error {
	if err := d.walkContent(&w.facts, v); err != nil {
		return err
	}
	switch {
	case !w.facts.Present:
		w.facts.Present, w.content = true, v
	case !w.merged:
		joined := make([]byte, 0, len(w.content)+len(v)+stampRoom)
		w.content, w.merged = append(append(joined, w.content...), v...), true
	default:
		w.content = append(w.content, v...)
	}
	return nil
}

func (d *decoder) walkContent(f *engine.Content, b []byte) error {
	for len(b) > 0 {
		num, typ, n := tag(b)
		if n < 0 {
			return malformed("content")
		}
		b = b[n:]
		switch {
		case num == contentData && typ == protowire.BytesType:
			var v []byte
			if v, n = protowire.ConsumeBytes(b); n < 0 {
				return malformed("content.data")
			}
			f.DataLen = len(v)
		case num == contentTimestamp && typ == protowire.VarintType:
			var v uint64
			if v, n = protowire.ConsumeVarint(b); n < 0 {
				return malformed("content.timestamp")
			}
			f.Timestamp = int64(v)
		case num == contentMetadata && typ == protowire.BytesType:
			var v []byte
			if v, n = protowire.ConsumeBytes(b); n < 0 {
				return malformed("content.metadata")
			}
			if f.MetadataEntries++; f.MetadataEntries > d.limits.MetadataEntries {
				return d.tooMany("content.metadata", f.MetadataEntries)
			}
			if err := walkEntry(f, v); err != nil {
				return err
			}
		default:
			if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
				return malformed("content")
			}
		}
		b = b[n:]
	}
	return nil
}

// walkEntry notes one entry of the metadata map.
func walkEntry(f *engine.Content, b []byte) error {
	for len(b) > 0 {
		num, typ, n := tag(b)
		if n < 0 {
			return malformed("content.metadata")
		}
		b = b[n:]
		if typ == protowire.BytesType && num <= 2 { // key and value
			var v []byte
			if v, n = protowire.ConsumeBytes(b); n >= 0 {
				f.MetadataBytes += len(v)
				f.InvalidUTF8 = f.InvalidUTF8 || !utf8.Valid(v)
			}
		} else {
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return malformed("content.metadata")
		}
		b = b[n:]
	}
	return nil
}

// contentSize refuses content that is larger than its parts may be together.
// Parts over their own limits are the engine's to name.
func (d *decoder) contentSize(w *walk) error {
	l := &d.limits
	if len(w.content) <= l.DataBytes+l.MetadataBytes+contentSlack ||
		w.facts.DataLen > l.DataBytes || w.facts.MetadataBytes > l.MetadataBytes {
		return nil
	}
	return &engine.InvalidError{Field: "content", Code: engine.CodeTooLarge, Description: fmt.Sprintf(
		"has %d bytes, repeated and unknown fields included", len(w.content))}
}

func (d *decoder) tooMany(field string, n int) error {
	if err := d.limits.CheckCount(field, n); err != nil {
		return err
	}
	return &engine.InvalidError{Field: field, Code: engine.CodeTooMany, Description: "has too many entries"}
}

// collect makes the list that the walk has counted and checked.
func (s *shape) collect(wire []byte, w *walk) []string {
	if w.listed == 0 {
		return nil
	}
	list := make([]string, 0, w.listed)
	for b := wire[w.listAt:]; len(list) < w.listed; {
		num, typ, n := tag(b)
		b = b[n:]
		if num != s.list || typ != protowire.BytesType {
			b = b[protowire.ConsumeFieldValue(num, typ, b):]
			continue
		}
		v, n := protowire.ConsumeBytes(b)
		list = append(list, str(v))
		b = b[n:]
	}
	return list
}

// payload is the content as it goes to the nodes, stamped if it has no time. The
// stamp goes into the space behind the request when the content is the last thing
// in it, which is how every generated client writes it.
func (w *walk) payload(wire []byte) []byte {
	c := w.content
	if w.facts.Present && w.facts.Timestamp == 0 {
		spare := cap(wire) - len(wire)
		if last := cap(c)-len(c) == spare; !w.merged && !(last && spare >= stampRoom) {
			c = append(make([]byte, 0, len(c)+stampRoom), c...)
		}
		c = protowire.AppendTag(c, contentTimestamp, protowire.VarintType)
		c = protowire.AppendVarint(c, uint64(time.Now().Unix()))
	}
	return slices.Clip(c)
}

// streamRequest is one push of a PushStream, or a batch of them.
type streamRequest struct {
	id    uint64
	hasID bool // the id stood on the wire
	whole bool // the message itself was well-formed, if not the push in it
	asked bool
	api   api
	body  []byte // the request of api
	batch int    // pushes in it, when it is one

	merged bool // body came in several fields and has a buffer of its own
}

// stream takes the envelope of a PushStreamRequest apart. With an error the
// request holds what could be read before it.
func (d *decoder) stream(wire []byte) (streamRequest, error) {
	var r streamRequest
	var bad error
	for b := wire; len(b) > 0; {
		num, typ, n := tag(b)
		if n < 0 {
			return r, malformed("request")
		}
		b = b[n:]
		a, isPush := asked(num)
		switch {
		case num == 1 && typ == protowire.VarintType:
			if r.id, n = protowire.ConsumeVarint(b); n >= 0 {
				r.hasID = true
			}
		case num == batchField && typ == protowire.BytesType:
			if _, n = protowire.ConsumeBytes(b); n >= 0 {
				r.batch++
			}
		case isPush && typ == protowire.BytesType:
			var v []byte
			if v, n = protowire.ConsumeBytes(b); n >= 0 && bad == nil {
				bad = d.ask(&r, a, v)
			}
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return r, malformed("request")
		}
		b = b[n:]
	}
	r.whole = true
	if r.batch > 0 {
		return r, r.checkBatch()
	}
	return r, bad
}

// batchField is the field of PushStreamRequest and PushStreamResponse that holds several
// of them.
const batchField protowire.Number = 10

// batchMax is how many pushes a batch may have: as many as may be in flight on a stream.
const batchMax = 1024

// checkBatch refuses a batch that cannot be told apart.
func (r *streamRequest) checkBatch() error {
	invalid := func(code, description string) error {
		return &engine.InvalidError{Field: "batch", Code: code, Description: description}
	}
	switch {
	case r.asked || r.hasID:
		return invalid(engine.CodeMalformed, "must stand alone: id and push belong to the pushes in it")
	case r.batch > batchMax:
		return invalid(engine.CodeTooMany, fmt.Sprintf("has %d pushes, more than %d", r.batch, batchMax))
	}
	return nil
}

// eachInBatch yields the pushes of a batch, which stream has found well-formed. What
// stands behind a push, up to its capacity, is nobody else's.
func eachInBatch(wire []byte, yield func(push []byte) bool) {
	for b := wire; len(b) > 0; {
		num, typ, n := tag(b)
		b = b[n:]
		if num != batchField || typ != protowire.BytesType {
			b = b[protowire.ConsumeFieldValue(num, typ, b):]
			continue
		}
		push, n := protowire.ConsumeBytes(b)
		if !yield(slices.Clip(push)) {
			return
		}
		b = b[n:]
	}
}

// ask notes a member of the oneof. The same member again is merged, another one
// takes its place; what is merged or replaced has to be well-formed, too. Each
// byte is checked once, however many fields there are.
func (d *decoder) ask(r *streamRequest, a api, v []byte) error {
	if r.asked && !r.merged {
		if err := d.check(r.api, r.body); err != nil {
			return err
		}
	}
	if !r.asked || r.api != a {
		r.asked, r.api, r.body, r.merged = true, a, v, false
		return nil
	}
	if err := d.check(a, v); err != nil {
		return err
	}
	if !r.merged {
		joined := make([]byte, 0, len(r.body)+len(v)+stampRoom)
		r.body, r.merged = append(joined, r.body...), true
	}
	r.body = append(r.body, v...)
	return nil
}

// check refuses what generated code would refuse of a part that nobody sees again.
func (d *decoder) check(a api, b []byte) error {
	s := &d.shapes[a]
	w, err := d.walk(s, b)
	switch {
	case err != nil:
		return err
	case w.facts.InvalidUTF8:
		return invalidUTF8(engine.CodeMalformed, "content.metadata")
	case !utf8.Valid(w.id):
		return invalidUTF8(engine.CodeIDMalformed, s.idName)
	}
	for i, id := range s.collect(b, &w) {
		if !utf8.ValidString(id) {
			return invalidUTF8(engine.CodeIDMalformed, fmt.Sprintf("%s[%d]", s.listName, i))
		}
	}
	return nil
}

// tag reads a field's number and type; n < 0 when there is no valid one.
func tag(b []byte) (num protowire.Number, typ protowire.Type, n int) {
	if b[0] < 0x80 && b[0] >= 1<<3 { // fields 1 to 15
		return protowire.Number(b[0] >> 3), protowire.Type(b[0] & 7), 1
	}
	num, typ, n = protowire.ConsumeTag(b)
	if num > protowire.MaxValidNumber {
		return 0, 0, -1
	}
	return num, typ, n
}

// str is a string over b, which is not written as long as the push is under way.
func str(b []byte) string {
	return unsafe.String(unsafe.SliceData(b), len(b)) //nolint:gosec // b is a part of a request, see the package's invariants
}

func malformed(field string) error {
	return &engine.InvalidError{Field: field, Code: engine.CodeMalformed, Description: "is not valid protobuf"}
}

func invalidUTF8(code, field string) error {
	return &engine.InvalidError{Field: field, Code: code, Description: "must be valid UTF-8"}
}
