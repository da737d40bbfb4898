package ingress

import (
	"fmt"
	"hash/maphash"
	"slices"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/wire"
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
	lists  roomLists
}

// shape says which fields a request message has; 0 for none.
type shape struct {
	id, list, content protowire.Number
	idName, listName  string
	listMax           int
	rooms             protowire.Number // a second list
	roomsMax          int
}

func newDecoder(limits engine.Limits) *decoder {
	d := &decoder{limits: limits, lists: roomLists{seed: maphash.MakeSeed()}}
	d.shapes[toRoom] = shape{id: 1, idName: toRoom.idField(), content: 2, list: 3, listName: "exclude_user_ids", listMax: limits.Exclude}
	d.shapes[toUser] = shape{id: 1, idName: toUser.idField(), content: 2}
	d.shapes[toUsers] = shape{list: 1, listName: toUsers.idField(), listMax: limits.Users, content: 2}
	d.shapes[toRooms] = shape{
		rooms: 1, roomsMax: limits.Rooms, content: 2,
		list: 3, listName: "exclude_user_ids", listMax: limits.Exclude,
	}
	d.shapes[toAll] = shape{content: 1}
	return d
}

// name says to what a field belongs that cannot be read.
func (s *shape) name(m *wire.Reader) string {
	switch {
	case m.Number() == 0 || m.Type() != protowire.BytesType:
	case m.Number() == s.id:
		return s.idName
	case m.Number() == s.list:
		return s.listName
	case m.Number() == s.rooms:
		return toRooms.idField()
	case m.Number() == s.content:
		return "content"
	case m.Number() == optionsField:
		return "options"
	}
	return "request"
}

// walk is what one pass over a request has found. Its slices are parts of the
// request, but for content once it is merged.
type walk struct {
	id      []byte
	listed  int // entries of the list
	listAt  int // where the first of them stands
	rooms   int // likewise, of the second list
	roomsAt int
	// Where the list ends if its entries stand one after another, 0 if not. known is the list if it has come before.
	roomsEnd int
	known    *engine.RoomList
	content  []byte
	merged   bool // content came in several fields and has a buffer of its own
	facts    engine.Content
	options  *options // nil for none
}

// decode fills p from the bytes of a request and owns b from the call on. The
// space behind b, up to its capacity, must be nobody else's: a timestamp may be
// written there. The options are nil for a request without.
func (d *decoder) decode(a api, b []byte, p *engine.Push) (*options, error) {
	s := &d.shapes[a]
	w, err := d.walk(s, b)
	if err != nil {
		return nil, err
	}
	if w.options != nil {
		if err := w.options.finish(w.content); err != nil {
			return nil, err
		}
		p.Options = &w.options.engine
	}
	p.Kind = a.kind()
	switch a {
	case toRoom:
		p.Room, p.Exclude = wire.String(w.id), s.collect(b, &w)
	case toUser:
		p.User = wire.String(w.id)
	case toUsers:
		p.Users = s.collect(b, &w)
	case toRooms:
		p.Exclude = s.collect(b, &w)
		switch {
		case w.known != nil:
			p.Rooms = w.known
		case w.roomsEnd > 0:
			p.Rooms = d.lists.add(b[w.roomsAt:w.roomsEnd], w.rooms)
		default:
			p.Rooms = engine.NewRoomList(collect(b, w.roomsAt, s.rooms, w.rooms))
		}
	default: // names nobody
	}
	p.Content = w.facts
	p.Payload = w.payload(b)
	return w.options, nil
}

// walk checks that b is a well-formed message and that its list is within its
// limit, without keeping anything but where things are. The ids that it finds are the
// engine's to check.
func (d *decoder) walk(s *shape, b []byte) (walk, error) {
	var w walk
	m := wire.Reader{Rest: b}
	for start := 0; m.Next(); start = len(b) - len(m.Rest) {
		if m.Type() != protowire.BytesType {
			continue
		}
		switch m.Number() {
		case s.content:
			end := len(b) - len(m.Rest)
			if err := d.addContent(&w, b[end-len(m.Bytes):end]); err != nil { // with what stands behind it, see payload
				return w, err
			}
		case s.id:
			if !utf8.Valid(w.id) { // it is replaced: nobody checks it later
				return w, invalidUTF8(engine.CodeIDMalformed, s.idName)
			}
			w.id = m.Bytes
		case s.list:
			if w.listed == 0 {
				w.listAt = start
			}
			if w.listed++; w.listed > s.listMax {
				return w, d.tooMany(s.listName, w.listed)
			}
		case s.rooms:
			if w.rooms == 0 {
				w.roomsAt, w.roomsEnd = start, start
				if known, n := d.lists.find(b[start:]); known != nil {
					w.known, w.rooms = known, known.Len()
					m.Rest = b[start+n:]
					break
				}
			} else if w.known != nil || start != w.roomsEnd {
				w.known, w.roomsEnd = nil, -1 // more follows elsewhere
			}
			if w.roomsEnd >= 0 {
				w.roomsEnd = len(b) - len(m.Rest)
			}
			if w.rooms++; w.rooms > s.roomsMax {
				return w, d.tooMany(toRooms.idField(), w.rooms)
			}
		case optionsField:
			if w.options == nil {
				w.options = new(options)
			}
			if err := w.options.read(m.Bytes); err != nil {
				return w, err
			}
		}
	}
	if m.Err != nil {
		return w, malformed(s.name(&m))
	}
	// Refused is content that is larger than its parts may be together. Parts over their
	// own limits are the engine's to name.
	l := &d.limits
	if len(w.content) > l.DataBytes+l.MetadataBytes+contentSlack &&
		w.facts.DataLen <= l.DataBytes && w.facts.MetadataBytes <= l.MetadataBytes {
		return w, &engine.InvalidError{Field: "content", Code: engine.CodeTooLarge, Description: fmt.Sprintf(
			"has %d bytes, repeated and unknown fields included", len(w.content))}
	}
	return w, nil
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

func (d *decoder) walkContent(c *engine.Content, b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsBytes(contentData):
			c.DataLen = len(m.Bytes)
		case m.IsUint(contentTimestamp):
			c.Timestamp = int64(m.Uint)
		case m.IsBytes(contentMetadata):
			if c.MetadataEntries++; c.MetadataEntries > d.limits.MetadataEntries {
				return d.tooMany("content.metadata", c.MetadataEntries)
			}
			entry := wire.Reader{Rest: m.Bytes}
			for entry.Next() {
				if entry.IsBytes(1) || entry.IsBytes(2) { // key and value
					c.MetadataBytes += len(entry.Bytes)
					c.InvalidUTF8 = c.InvalidUTF8 || !utf8.Valid(entry.Bytes)
				}
			}
			if entry.Err != nil {
				return malformed("content.metadata")
			}
		}
	}
	switch {
	case m.Err == nil:
		return nil
	case m.IsBytes(contentData):
		return malformed("content.data")
	case m.IsUint(contentTimestamp):
		return malformed("content.timestamp")
	case m.IsBytes(contentMetadata):
		return malformed("content.metadata")
	}
	return malformed("content")
}

func (d *decoder) tooMany(field string, n int) error {
	if err := d.limits.CheckCount(field, n); err != nil {
		return err
	}
	return &engine.InvalidError{Field: field, Code: engine.CodeTooMany, Description: "has too many entries"}
}

// collect makes the list that the walk has counted and checked.
func (s *shape) collect(b []byte, w *walk) []string { return collect(b, w.listAt, s.list, w.listed) }

// collect makes a list of n entries of a field, of which the first stands at some place.
func collect(b []byte, at int, field protowire.Number, n int) []string {
	if n == 0 {
		return nil
	}
	list := make([]string, 0, n)
	m := wire.Reader{Rest: b[at:]}
	for len(list) < n && m.Next() {
		if m.IsBytes(field) {
			list = append(list, wire.String(m.Bytes))
		}
	}
	return list
}

// payload is the content as it goes to the nodes, stamped if it has no time. The
// stamp goes into the space behind the request when the content is the last thing
// in it, which is how every generated client writes it.
func (w *walk) payload(b []byte) []byte {
	c := w.content
	if w.facts.Present && w.facts.Timestamp == 0 {
		spare := cap(b) - len(b)
		if last := cap(c)-len(c) == spare; !w.merged && !(last && spare >= stampRoom) {
			c = append(make([]byte, 0, len(c)+stampRoom), c...)
		}
		c = wire.AppendUint(c, contentTimestamp, uint64(time.Now().Unix()))
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
func (d *decoder) stream(b []byte) (streamRequest, error) {
	var r streamRequest
	var bad error
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(1):
			r.id, r.hasID = m.Uint, true
		case m.IsBytes(batchField):
			r.batch++
		case m.Type() == protowire.BytesType:
			if a, ok := asked(m.Number()); ok && bad == nil {
				end := len(b) - len(m.Rest)
				bad = d.ask(&r, a, b[end-len(m.Bytes):end]) // with what stands behind it, see payload
			}
		}
	}
	if m.Err != nil {
		return r, malformed("request")
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
func eachInBatch(b []byte, yield func(push []byte) bool) {
	m := wire.Reader{Rest: b}
	for m.Next() {
		if m.IsBytes(batchField) && !yield(m.Bytes) {
			return
		}
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
	for i, id := range collect(b, w.roomsAt, s.rooms, w.rooms) {
		if !utf8.ValidString(id) {
			return invalidUTF8(engine.CodeIDMalformed, fmt.Sprintf("%s[%d]", toRooms.idField(), i))
		}
	}
	return nil
}

func malformed(field string) error {
	return &engine.InvalidError{Field: field, Code: engine.CodeMalformed, Description: "is not valid protobuf"}
}

func invalidUTF8(code, field string) error {
	return &engine.InvalidError{Field: field, Code: code, Description: "must be valid UTF-8"}
}
