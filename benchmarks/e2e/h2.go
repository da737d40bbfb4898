package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A gRPC client that does little but write and read: grpc-go's own takes as much CPU
// for a call as a server does, and on a machine that all share, the rates would be
// the client's. It packs what it has to send into one write, keeps flow control, and tells
// success by the reply's message. It decodes headers for a Flood only: otherwise an error of
// gRPC shows as a call that ends without a message.

const (
	frameHeader  = 9
	maxFrame     = 16 << 10 // what every peer takes
	startWindow  = 65535
	ourWindow    = 1 << 30
	windowRefill = 1 << 20
	prefix       = 5 // of a gRPC message
)

// idleLimit is after which silence a connection is made anew: the server may have
// given it up.
const idleLimit = 5 * time.Second

// wire is one connection.
type wire struct {
	conn   net.Conn
	in     *bufio.Reader
	out    bytes.Buffer
	framer *http2.Framer
	last   time.Time

	headers   *hpack.Encoder // into block
	block     bytes.Buffer
	blocks    map[string][]byte // by method, once they only refer to what was said before
	scheme    string
	authority string
	bearer    string // of all calls, "" for none
	json      bool   // they are no gRPC
	priority  string // the same

	nextID       uint32
	received     int                  // bytes of data that the other side has no window for yet
	window       int64                // bytes of data that we may send
	streamWindow int64                // the same for each new stream
	maxCalls     int                  // under way, as the server says
	calls        map[uint32]*inflight // without a reply
	free         []*inflight
	waiting      []queued // for the window, or for a call to end
	stalled      []uint32 // calls that have begun and need more window

	// Of a client that listens, see there.
	decoder  *hpack.Decoder
	pushback *time.Duration
}

// inflight is a call without its reply.
type inflight struct {
	c    class
	at   time.Time
	ok   bool
	rest []byte // of the request, to be sent yet
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

func dialWire(ctx context.Context, addr string, as access) (*wire, error) {
	conn, err := as.dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	w := &wire{
		conn: conn, in: bufio.NewReaderSize(conn, 64<<10), nextID: 1, window: startWindow, streamWindow: startWindow,
		maxCalls: math.MaxInt32, calls: map[uint32]*inflight{}, blocks: map[string][]byte{}, last: time.Now(),
		scheme: as.scheme(), authority: addr, bearer: as.bearer(), json: as.JSON,
	}
	w.headers = hpack.NewEncoder(&w.block)
	w.framer = http2.NewFramer(&w.out, w.in)
	w.framer.SetReuseFrames()
	w.framer.SetMaxReadFrameSize(maxFrame)
	w.out.WriteString(http2.ClientPreface)
	return w, errors.Join(
		w.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: ourWindow}),
		w.framer.WriteWindowUpdate(0, ourWindow))
}

func (w *wire) flush() error {
	if w.out.Len() == 0 {
		return nil
	}
	_, err := w.out.WriteTo(w.conn)
	return err
}

// ping asks for something that is answered at once.
func (w *wire) ping() error { return errors.Join(w.framer.WritePing(false, [8]byte{}), w.flush()) }

// open begins a call with its headers. What is written is in memory, so there is no error.
func (w *wire) open(method string) (id uint32, call *inflight) {
	id = w.nextID
	w.nextID += 2
	_ = w.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: w.headersOf(method), EndHeaders: true})
	if n := len(w.free); n > 0 {
		call, w.free = w.free[n-1], w.free[:n-1]
		*call = inflight{}
	} else {
		call = new(inflight)
	}
	call.window = w.streamWindow
	w.calls[id] = call
	return id, call
}

// headersOf encodes the headers of a call. The second time a method is called they refer to what
// was said the first time, and stay the same until another method is called.
func (w *wire) headersOf(method string) []byte {
	block, said := w.blocks[method]
	if len(block) > 0 {
		return block
	}
	w.block.Reset()
	content, te := "application/grpc", "trailers"
	if w.json {
		content, te = "application/json", ""
	}
	for _, f := range [...]hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: w.scheme}, {Name: ":path", Value: method}, {Name: ":authority", Value: w.authority},
		{Name: "content-type", Value: content}, {Name: "user-agent", Value: "pushbench"}, {Name: "x-priority", Value: w.priority},
		{Name: "te", Value: te}, {Name: "authorization", Value: w.bearer},
	} {
		if f.Value != "" {
			_ = w.headers.WriteField(f) // into memory
		}
	}
	if said {
		w.blocks[method] = bytes.Clone(w.block.Bytes())
		return w.block.Bytes()
	}
	for other := range w.blocks { // their places have moved
		w.blocks[other] = nil
	}
	w.blocks[method] = nil
	return w.block.Bytes()
}

// ask puts a unary call into the next write, or in line when the window is used up or
// as many calls are under way as the server takes.
func (w *wire) ask(c class, m *raw, at time.Time) {
	q := queued{c, m, at}
	if len(w.waiting) > 0 || !w.takes(m) {
		w.waiting = append(w.waiting, q)
		return
	}
	w.begin(q)
}

func (w *wire) takes(m *raw) bool {
	return len(w.calls) < w.maxCalls && w.window >= int64(min(len(m.b), maxFrame))
}

func (w *wire) sendWaiting() {
	for len(w.waiting) > 0 && w.takes(w.waiting[0].m) {
		q := w.waiting[0]
		w.waiting = w.waiting[1:]
		w.begin(q)
	}
}

func (w *wire) begin(q queued) {
	id, call := w.open(q.c.method())
	call.c, call.at, call.rest = q.c, q.at, q.m.b
	if !w.send(id, call) {
		w.stalled = append(w.stalled, id)
	}
}

// send sends what is left of a request as far as there is window, and tells whether that was all.
func (w *wire) send(id uint32, call *inflight) bool {
	for len(call.rest) > 0 {
		n := int(min(int64(len(call.rest)), maxFrame, w.window, call.window))
		if n <= 0 {
			return false
		}
		_ = w.framer.WriteData(id, n == len(call.rest), call.rest[:n]) // into memory
		call.rest = call.rest[n:]
		w.window -= int64(n)
		call.window -= int64(n)
	}
	return true
}

// grow is told that there is more window, of one call or of all.
func (w *wire) grow(id uint32, by int64) {
	if id == 0 {
		w.window += by
	} else if call := w.calls[id]; call != nil {
		call.window += by
	}
	w.stalled = slices.DeleteFunc(w.stalled, func(id uint32) bool {
		call := w.calls[id]
		return call == nil || w.send(id, call)
	})
	w.sendWaiting()
}

// pending is how many calls have no reply.
func (w *wire) pending() int { return len(w.calls) + len(w.waiting) }

var errGoAway = errors.New("the server closes the connection")

// read takes frames, at least one and then all that are there already. ended is told
// each unary call that is over.
func (w *wire) read(ended func(*inflight)) error {
	for first := true; first || w.whole(); first = false {
		f, err := w.framer.ReadFrame()
		if err != nil {
			return err
		}
		if err := w.take(f, ended); err != nil {
			return err
		}
	}
	return nil
}

// whole tells whether a frame is there already.
func (w *wire) whole() bool {
	if w.in.Buffered() < frameHeader {
		return false
	}
	head, _ := w.in.Peek(3) // it is there
	return w.in.Buffered() >= frameHeader+int(head[0])<<16+int(head[1])<<8+int(head[2])
}

func (w *wire) take(f http2.Frame, ended func(*inflight)) error {
	id := f.Header().StreamID
	switch f := f.(type) {
	case *http2.DataFrame:
		return w.data(id, f, ended)
	case *http2.HeadersFrame:
		if err := w.trailer(id, f.HeaderBlockFragment()); err != nil {
			return err
		}
		if f.StreamEnded() {
			w.end(id, false, ended)
		}
	case *http2.RSTStreamFrame:
		w.end(id, true, ended)
	case *http2.SettingsFrame:
		if f.IsAck() {
			return nil
		}
		_ = f.ForeachSetting(func(s http2.Setting) error { // ours returns none
			switch s.ID { //nolint:exhaustive // what else there is does not matter here
			case http2.SettingMaxConcurrentStreams:
				w.maxCalls = int(min(s.Val, math.MaxInt32))
			case http2.SettingInitialWindowSize:
				for _, call := range w.calls {
					call.window += int64(s.Val) - w.streamWindow
				}
				w.streamWindow = int64(s.Val)
			}
			return nil
		})
		w.grow(0, 0)
		return w.framer.WriteSettingsAck()
	case *http2.PingFrame:
		if !f.IsAck() {
			return w.framer.WritePing(true, f.Data)
		}
	case *http2.WindowUpdateFrame:
		w.grow(id, int64(f.Increment))
	case *http2.GoAwayFrame:
		return errGoAway
	}
	return nil
}

func (w *wire) data(id uint32, f *http2.DataFrame, ended func(*inflight)) error {
	body := f.Data()
	if w.received += len(body); w.received >= windowRefill {
		_ = w.framer.WriteWindowUpdate(0, uint32(w.received)) // into memory
		w.received = 0
	}
	call := w.calls[id]
	switch {
	case call == nil:
	case call.push != nil:
		if err := call.push.replies(call, body); err != nil {
			return err
		}
	case w.json && len(body) > 0:
		if call.ok = succeededJSON(body); !call.ok {
			call.said = strconv.QuoteToASCII(string(body))
		}
	case len(body) > prefix:
		if call.ok = succeeded(body[prefix:]); !call.ok {
			call.said = strconv.QuoteToASCII(string(body[prefix:]))
		}
	}
	if f.StreamEnded() {
		w.end(id, !w.json, ended) // gRPC ends with a trailer
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

// sampled is how many pushes of a stream share one measured latency: reading the
// clock costs as much as a push.
const sampled = 16

// rawStream is a PushStream call under way.
type rawStream struct {
	all   []raw
	batch int // pushes in a message, which all are parts of a batch then
	limit int
	tally *tally
	class class

	sent, answered int
	at             []time.Time // of the pushes that are sampled
	frame          []byte
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
func (s *rawStream) fill(w *wire, id uint32, until time.Time) error {
	call := w.calls[id]
	if call == nil || s.ending {
		return nil
	}
	now := time.Now()
	if !now.Before(until) {
		s.ending = true
		return w.framer.WriteData(id, true, nil)
	}
	for s.sent-s.answered < s.limit {
		s.frame = s.frame[:0]
		for room := int(min(maxFrame, w.window, call.window)); s.sent-s.answered < s.limit && s.pack(room, now); {
		}
		if len(s.frame) == 0 { // no window: it comes
			return nil
		}
		w.window -= int64(len(s.frame))
		call.window -= int64(len(s.frame))
		if err := w.framer.WriteData(id, false, s.frame); err != nil {
			return err
		}
	}
	return nil
}

// pack appends a message with as many pushes as it takes, as the room of so many bytes
// allows. It returns false when there is no room.
func (s *rawStream) pack(room int, now time.Time) bool {
	at := len(s.frame)
	s.frame = append(s.frame, make([]byte, prefix)...)
	pushes := 0
	for ; pushes < max(s.batch, 1) && s.sent-s.answered < s.limit; pushes++ {
		i := s.sent % len(s.all)
		if len(s.frame)+len(s.all[i].b) > room {
			break
		}
		if s.sent%sampled == 0 {
			s.at[i] = now
		}
		s.frame = append(s.frame, s.all[i].b...)
		s.sent++
	}
	if pushes == 0 {
		s.frame = s.frame[:at]
		return false
	}
	binary.BigEndian.PutUint32(s.frame[at+1:], uint32(len(s.frame)-at-prefix))
	return true
}

// listen makes a connection read the trailers of its calls.
func (w *wire) listen() {
	w.pushback = new(time.Duration)
	w.decoder = hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		if f.Name == "grpc-retry-pushback-ms" {
			ms, _ := strconv.Atoi(f.Value) // what is no number asks for nothing
			*w.pushback = time.Duration(ms) * time.Millisecond
		}
	})
}

// trailer reads a block of headers. All of them must be: each may refer to those before.
func (w *wire) trailer(id uint32, body []byte) error {
	if w.decoder == nil {
		return nil
	}
	*w.pushback = 0
	if _, err := w.decoder.Write(body); err != nil {
		return fmt.Errorf("headers: %w", err)
	}
	if call := w.calls[id]; call != nil {
		call.pushback = *w.pushback
	}
	return w.decoder.Close()
}
