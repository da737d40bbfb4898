package ingress

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/net/http2"
)

// blockFrames is how many frames the headers of a call may have. They may be large enough for
// two or three (Config.MaxHeaderBytes; a frame has 16 KiB at least), and empty ones cost
// nothing but our time.
const blockFrames = 64

// A frame of DATA takes about 40 bytes besides its own until its message is whole. So those of a
// connection must have usualData bytes on average, or lack dataDebt in all at the most: a body of
// 4 KiB in frames of one byte would take seven times what is reckoned for its call.
const (
	usualData = 16
	dataDebt  = 32 << 10
)

var errCrumbs = errors.New("messages in too many frames")

var errBlock = errors.New("a block of headers in too many frames")

// frameHead is the size of what each frame of HTTP/2 begins with (RFC 9113, section 4.1).
const frameHead = 9

// headers follows the frames of a connection, and bounds how long a block of headers, or the
// head of a frame, is awaited once it has begun: a client that never ends one would keep the
// connection and what there is of its call, however alive it looks. Other payloads may take
// their time. They are messages, which may be large, and the client far away.
type headers struct {
	// Static.
	timeout time.Duration

	// Owned by Read.
	head     [frameHead]byte
	have     int           // bytes of the head that have come
	left     int           // bytes until the next head
	frames   int           // heads that have come; the first one is of the handshake
	settings bool          // as it must be: else gRPC gives the connection up
	block    bool          // the frame is of a block of headers
	more     bool          // the block has not said that it ends
	parts    int           // frames of the block, or of one that had too many
	debt     int           // bytes that frames of DATA lack to what is usual
	waited   time.Duration // for what has begun
	forgiven bool          // that it was late, once
}

func newHeaders(timeout time.Duration) headers {
	return headers{timeout: timeout, left: len(http2.ClientPreface)}
}

// begun tells whether something has begun that must end in time. For the handshake gRPC
// sees to that.
func (h *headers) begun() bool {
	return h.frames > 0 && (h.have > 0 || h.more || h.block && h.left > 0)
}

// greeted tells whether the client has said hello: the first frame is whole.
func (h *headers) greeted() bool {
	return h.settings && (h.frames > 1 || h.left == 0)
}

// pass follows the frames through what was read.
func (h *headers) pass(b []byte) {
	for len(b) > 0 {
		if h.left > 0 {
			n := min(h.left, len(b))
			h.left -= n
			b = b[n:]
		} else {
			n := copy(h.head[h.have:], b)
			b = b[n:]
			if h.have += n; h.have == frameHead {
				h.frame()
			}
		}
		if !h.begun() {
			h.waited, h.forgiven = 0, false
		}
	}
}

// frame takes the head of a frame apart.
func (h *headers) frame() {
	h.have = 0
	h.frames++
	h.left = int(binary.BigEndian.Uint32(h.head[:]) >> 8)
	kind, flags := http2.FrameType(h.head[3]), http2.Flags(h.head[4])
	if h.frames == 1 {
		h.settings = kind == http2.FrameSettings
		return
	}
	if kind == http2.FrameData && h.left > 0 && h.debt <= dataDebt {
		size := h.left
		if flags.Has(http2.FlagDataPadded) {
			size = 0 // padding is no message
		}
		h.debt = max(h.debt+usualData-size, 0)
	}
	if !h.more && h.parts <= blockFrames {
		h.parts = 0
	}
	if h.block = kind == http2.FrameHeaders || kind == http2.FrameContinuation; h.block {
		h.parts++
		h.more = !flags.Has(http2.FlagHeadersEndHeaders) // it is the same of a CONTINUATION
	}
}

// read reads from a connection of which so many bytes have come and are not read.
func (h *headers) read(from net.Conn, b []byte, unread func() int) (n int, err error) {
	if h.begun() {
		n, err = h.await(from, b, unread)
	} else {
		n, err = from.Read(b)
	}
	h.pass(b[:n])
	switch {
	case h.parts > blockFrames:
		return 0, errBlock
	case h.debt > dataDebt:
		return 0, errCrumbs
	default:
		return n, err
	}
}

// await reads for as long as there is still time for what has begun.
func (h *headers) await(from net.Conn, b []byte, unread func() int) (n int, err error) {
	began := time.Now()
	n, err = readUntil(from, b, began.Add(h.timeout-h.waited))
	if errors.Is(err, os.ErrDeadlineExceeded) && !h.forgiven && unread() > 0 {
		h.forgiven = true // it was us who were late
		h.waited, began = 0, time.Now()
		n, err = readUntil(from, b, began.Add(h.timeout))
	}
	h.waited += time.Since(began)
	return n, err
}

func readUntil(from net.Conn, b []byte, end time.Time) (int, error) {
	if err := from.SetReadDeadline(end); err != nil {
		return 0, err
	}
	n, err := from.Read(b)
	if err != nil {
		return n, err // the very error: gRPC asks whether it is io.EOF
	}
	return n, from.SetReadDeadline(time.Time{})
}
