package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"strconv"
	"time"

	"golang.org/x/net/http2/hpack"
)

// A gRPC client that does little but write and read: grpc-go's own takes as much CPU
// for a call as a server does, and on a machine that all share, the rates would be
// the client's. It speaks just enough HTTP/2: it sends requests that fit into one
// frame, packs what it has to send into one write, keeps flow control, and tells
// success by the reply's message. It does not decode headers: an error of gRPC shows
// as a call that ends without a message.

// Frames of HTTP/2, RFC 9113.
const (
	frameData         = 0x0
	frameHeaders      = 0x1
	frameReset        = 0x3
	frameSettings     = 0x4
	framePing         = 0x6
	frameGoAway       = 0x7
	frameWindowUpdate = 0x8

	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4

	settingMaxStreams    = 0x3
	settingInitialWindow = 0x4

	frameHeader  = 9
	maxFrame     = 16 << 10 // what every peer takes
	startWindow  = 65535
	ourWindow    = 1 << 30
	windowRefill = 1 << 20
	prefix       = 5 // of a gRPC message
)

// maxRaw is the largest message that this client sends.
const maxRaw = maxFrame - prefix

// idleLimit is after which silence a connection is made anew: the server may have
// given it up.
const idleLimit = 5 * time.Second

// wire is one connection.
type wire struct {
	conn net.Conn
	in   *bufio.Reader
	last time.Time

	out      []byte
	nextID   uint32
	headers  headerTable
	received int // bytes of data that the other side has no window for yet

	window       int64 // bytes of data that we may send
	streamWindow int64 // the same for each new stream
	maxCalls     int   // under way, as the server says
	calls        map[uint32]*inflight
	free         []*inflight
	waiting      []queued // for the window, or for a call to end

	// Of a client that listens, see there.
	decoder  *hpack.Decoder
	pushback *time.Duration
}

// inflight is a call without its reply.
type inflight struct {
	c  class
	at time.Time
	ok bool
	// What a reply without success says.
	said string
	// What a trailer asks for.
	pushback time.Duration
	// Of a PushStream.
	push    *rawStream
	partial []byte // the beginning of a message that has not come in full
	window  int64
}

type queued struct {
	c  class
	m  *raw
	at time.Time
}

func dialWire(ctx context.Context, addr string) (*wire, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	w := &wire{
		conn: conn, in: bufio.NewReaderSize(conn, 64<<10), nextID: 1, window: startWindow, streamWindow: startWindow,
		maxCalls: math.MaxInt32, calls: map[uint32]*inflight{}, headers: headerTable{authority: addr}, last: time.Now(),
	}
	w.out = append(w.out, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"...)
	w.frame(frameSettings, 0, 0, 6)
	w.out = binary.BigEndian.AppendUint16(w.out, settingInitialWindow)
	w.out = binary.BigEndian.AppendUint32(w.out, ourWindow)
	w.frame(frameWindowUpdate, 0, 0, 4)
	w.out = binary.BigEndian.AppendUint32(w.out, ourWindow)
	return w, nil
}

func (w *wire) frame(kind, flags byte, stream uint32, length int) {
	w.out = append(w.out, byte(length>>16), byte(length>>8), byte(length), kind, flags)
	w.out = binary.BigEndian.AppendUint32(w.out, stream)
}

func (w *wire) flush() error {
	if len(w.out) == 0 {
		return nil
	}
	_, err := w.conn.Write(w.out)
	w.out = w.out[:0]
	return err
}

// open begins a call with its headers.
func (w *wire) open(method string) (id uint32, call *inflight) {
	id = w.nextID
	w.nextID += 2
	at := len(w.out)
	w.frame(frameHeaders, flagEndHeaders, id, 0)
	w.out = w.headers.append(w.out, method)
	length := len(w.out) - at - frameHeader
	w.out[at], w.out[at+1], w.out[at+2] = byte(length>>16), byte(length>>8), byte(length)
	if n := len(w.free); n > 0 {
		call, w.free = w.free[n-1], w.free[:n-1]
		*call = inflight{}
	} else {
		call = new(inflight)
	}
	w.calls[id] = call
	return id, call
}

func (w *wire) message(m *raw) {
	w.out = append(w.out, 0)
	w.out = binary.BigEndian.AppendUint32(w.out, uint32(len(m.b)))
	w.out = append(w.out, m.b...)
}

// ask puts a unary call into the next write, or in line when the window is used up or
// as many calls are under way as the server takes.
func (w *wire) ask(c class, m *raw, at time.Time) {
	if len(w.waiting) > 0 || !w.takes(m) {
		w.waiting = append(w.waiting, queued{c, m, at})
		return
	}
	w.send(c, m, at)
}

func (w *wire) takes(m *raw) bool {
	return w.window >= int64(len(m.b)+prefix) && len(w.calls) < w.maxCalls
}

func (w *wire) sendWaiting() {
	for len(w.waiting) > 0 && w.takes(w.waiting[0].m) {
		q := w.waiting[0]
		w.waiting = w.waiting[1:]
		w.send(q.c, q.m, q.at)
	}
}

func (w *wire) send(c class, m *raw, at time.Time) {
	id, call := w.open(c.method())
	call.c, call.at = c, at
	w.frame(frameData, flagEndStream, id, len(m.b)+prefix)
	w.message(m)
	w.window -= int64(len(m.b) + prefix)
}

// pending is how many calls have no reply.
func (w *wire) pending() int { return len(w.calls) + len(w.waiting) }

var errGoAway = errors.New("the server closes the connection")

// read takes frames, at least one and then all that are there already. ended is told
// each unary call that is over.
func (w *wire) read(ended func(*inflight)) error {
	for first := true; first || w.in.Buffered() >= frameHeader; first = false {
		head, err := w.in.Peek(frameHeader)
		if err != nil {
			return err
		}
		length := int(head[0])<<16 | int(head[1])<<8 | int(head[2])
		kind, flags, id := head[3], head[4], binary.BigEndian.Uint32(head[5:])
		if !first && w.in.Buffered() < frameHeader+length {
			return nil // the rest comes with the next read
		}
		if length > maxFrame {
			return fmt.Errorf("a frame of %d bytes", length)
		}
		_, _ = w.in.Discard(frameHeader) // it is there
		body, err := w.in.Peek(length)
		if err != nil {
			return err
		}
		if err := w.take(kind, flags, id, body, ended); err != nil {
			return err
		}
		_, _ = w.in.Discard(length) // it is there
	}
	return nil
}

func (w *wire) take(kind, flags byte, id uint32, body []byte, ended func(*inflight)) error {
	switch kind {
	case frameData:
		return w.data(id, flags, body, ended)
	case frameHeaders, frameReset:
		if kind == frameHeaders {
			if err := w.trailer(id, body); err != nil {
				return err
			}
		}
		if kind == frameReset || flags&flagEndStream != 0 {
			w.end(id, kind == frameReset, ended)
		}
	case frameSettings:
		if flags&flagAck == 0 {
			w.settings(body)
			w.frame(frameSettings, flagAck, 0, 0)
		}
	case framePing:
		if flags&flagAck == 0 {
			w.frame(framePing, flagAck, 0, len(body))
			w.out = append(w.out, body...)
		}
	case frameWindowUpdate:
		w.grow(id, int64(binary.BigEndian.Uint32(body)))
	case frameGoAway:
		return errGoAway
	}
	return nil
}

func (w *wire) settings(body []byte) {
	for ; len(body) >= 6; body = body[6:] {
		value := binary.BigEndian.Uint32(body[2:])
		switch binary.BigEndian.Uint16(body) {
		case settingMaxStreams:
			w.maxCalls = int(min(value, math.MaxInt32))
		case settingInitialWindow:
			window := int64(value)
			for _, call := range w.calls {
				call.window += window - w.streamWindow
			}
			w.streamWindow = window
		}
	}
}

func (w *wire) grow(id uint32, by int64) {
	if id != 0 {
		if call := w.calls[id]; call != nil {
			call.window += by
		}
		return
	}
	w.window += by
	w.sendWaiting()
}

func (w *wire) data(id uint32, flags byte, body []byte, ended func(*inflight)) error {
	if w.received += len(body); w.received >= windowRefill {
		w.frame(frameWindowUpdate, 0, 0, 4)
		w.out = binary.BigEndian.AppendUint32(w.out, uint32(w.received))
		w.received = 0
	}
	call := w.calls[id]
	switch {
	case call == nil:
	case call.push != nil:
		if err := call.push.replies(call, body); err != nil {
			return err
		}
	case len(body) > prefix:
		if call.ok = succeeded(body[prefix:]); !call.ok {
			call.said = strconv.QuoteToASCII(string(body[prefix:]))
		}
	}
	if flags&flagEndStream != 0 {
		w.end(id, true, ended)
	}
	return nil
}

func (w *wire) end(id uint32, broken bool, ended func(*inflight)) {
	call := w.calls[id]
	if call == nil {
		return
	}
	delete(w.calls, id)
	if call.push != nil {
		call.push.over = true
		return
	}
	call.ok = call.ok && !broken
	ended(call)
	w.free = append(w.free, call)
	w.sendWaiting()
}

// headerTable encodes the headers of calls as HPACK (RFC 7541). What it has said once
// on a connection it only refers to, as all clients do.
type headerTable struct {
	authority string
	priority  string // of all calls, "" for none
	said      []string
}

// Places in HPACK's static table.
const (
	methodPost     = 3
	schemeHTTP     = 6
	namePath       = 4
	nameAuthority  = 1
	nameType       = 31
	nameUserAgent  = 58
	firstDynamic   = 62
	indexed        = 0x80
	literalIndexed = 0x40
)

func (t *headerTable) append(b []byte, method string) []byte {
	b = append(b, indexed|methodPost, indexed|schemeHTTP)
	b = t.field(b, namePath, "", method)
	b = t.field(b, nameAuthority, "", t.authority)
	b = t.field(b, nameType, "", "application/grpc")
	b = t.field(b, nameUserAgent, "", "pushbench")
	if t.priority != "" {
		b = t.field(b, 0, "x-priority", t.priority)
	}
	return t.field(b, 0, "te", "trailers")
}

// field refers to a field that was said before, or says it. No value is longer than
// 126 bytes.
func (t *headerTable) field(b []byte, place byte, name, value string) []byte {
	for i, said := range t.said {
		if said == value {
			return append(b, indexed|byte(firstDynamic+len(t.said)-1-i))
		}
	}
	t.said = append(t.said, value)
	b = append(b, literalIndexed|place)
	if place == 0 {
		b = append(append(b, byte(len(name))), name...)
	}
	return append(append(b, byte(len(value))), value...)
}

// rawStream is a PushStream call under way.
type rawStream struct {
	all   []raw
	batch int // pushes in a message, which all are parts of a batch then
	limit int
	tally *tally
	class class

	sent, answered int
	at             []time.Time // of the pushes that are sampled
	over           bool
	ending         bool
}

// replies takes the messages in a frame of data.
func (s *rawStream) replies(call *inflight, body []byte) error {
	if len(call.partial) > 0 {
		call.partial = append(call.partial, body...)
		body = call.partial
	}
	for len(body) >= prefix {
		length := int(binary.BigEndian.Uint32(body[1:]))
		if len(body) < prefix+length {
			break
		}
		if err := eachReply(body[prefix:prefix+length], s.reply); err != nil {
			return err
		}
		body = body[prefix+length:]
	}
	call.partial = append(call.partial[:0], body...)
	return nil
}

func (s *rawStream) reply(b []byte) error {
	id, ok := streamReply(b)
	if id >= len(s.all) {
		return errors.New("a reply to no push")
	}
	s.answered++
	s.tally.done++
	if !ok {
		s.tally.failed++
	}
	if at := s.at[id]; !at.IsZero() {
		s.at[id] = time.Time{}
		s.tally.latency[s.class].Add(time.Since(at))
	}
	return nil
}

// fill sends as many pushes as may be without reply, in frames as large as possible.
func (s *rawStream) fill(w *wire, id uint32, until time.Time) {
	call := w.calls[id]
	if call == nil || s.ending {
		return
	}
	now := time.Now()
	if !now.Before(until) {
		s.ending = true
		w.frame(frameData, flagEndStream, id, 0)
		return
	}
	for s.sent-s.answered < s.limit {
		at := len(w.out)
		w.frame(frameData, 0, id, 0)
		length := 0
		for room := int(min(maxFrame, w.window, call.window)); s.sent-s.answered < s.limit; {
			n := s.pack(w, room-length, now)
			if n == 0 {
				break
			}
			length += n
		}
		if length == 0 { // no window: it comes
			w.out = w.out[:at]
			return
		}
		w.out[at], w.out[at+1], w.out[at+2] = byte(length>>16), byte(length>>8), byte(length)
		w.window -= int64(length)
		call.window -= int64(length)
	}
}

// pack appends a message with as many pushes as it takes, as the room of so many bytes
// allows. It returns its length, 0 when there is no room.
func (s *rawStream) pack(w *wire, room int, now time.Time) int {
	at := len(w.out)
	w.out = append(w.out, make([]byte, prefix)...)
	pushes := 0
	for ; pushes < max(s.batch, 1) && s.sent-s.answered < s.limit; pushes++ {
		i := s.sent % len(s.all)
		if len(w.out)-at+len(s.all[i].b) > room {
			break
		}
		if s.sent%sampled == 0 {
			s.at[i] = now
		}
		w.out = append(w.out, s.all[i].b...)
		s.sent++
	}
	if pushes == 0 {
		w.out = w.out[:at]
		return 0
	}
	binary.BigEndian.PutUint32(w.out[at+1:], uint32(len(w.out)-at-prefix))
	return len(w.out) - at
}
