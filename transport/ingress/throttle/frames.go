package throttle

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/net/http2"
)

// blockFrames is how many frames the headers of a call may have. They may be large enough for
// two or three (a frame has 16 KiB at least), and empty ones cost nothing but our time.
const blockFrames = 64

// A frame of DATA takes about 40 bytes besides its own until its message is whole. So those of a
// connection must have usualData bytes on average, or lack dataDebt in all at the most: a body of
// 4 KiB in frames of one byte would take seven times what is reckoned for its call.
const (
	usualData = 16
	dataDebt  = 32 << 10
)

var (
	errCrumbs = errors.New("messages in too many frames")
	errBlock  = errors.New("a block of headers in too many frames")
)

// frameHead is the size of what each frame of HTTP/2 begins with (RFC 9113, section 4.1).
const frameHead = 9

// goAwayPing is what gRPC asks with whether a GOAWAY has arrived. The answer comes behind whatever
// the client sent before it knew.
const goAwayPing = "\x01\x06\x01\x08\x00\x03\x03\x09"

// lastLook is how long is waited, once the time is over, for what should be here already. When the
// process was stopped, its timers may be heard before its sockets.
const lastLook = 5 * time.Millisecond

// frames follows those that the client of a connection sends, and bounds for how long a block of
// headers, or the head of a frame, is awaited once it has begun: a client that never ends one would
// keep the connection and what there is of its call, however alive it looks. Other payloads may take
// their time. They are messages, which may be large, and the client far away.
type frames struct {
	// Static.
	timeout time.Duration

	head     [frameHead + len(goAwayPing)]byte
	want     int           // bytes of head: with the payload of an answer to a ping
	have     int           // bytes of head that have come
	left     int           // bytes until the next head
	count    int           // heads that have come; the first one is of the hello
	settings bool          // as it must be: else gRPC gives the connection up
	block    bool          // the frame is of a block of headers
	more     bool          // the block has not said that it ends
	parts    int           // frames of the block, or of one that had too many
	debt     int           // bytes that frames of DATA lack to what is usual
	waited   time.Duration // for what has begun
	toldToGo bool          // the client has answered goAwayPing
}

func newFrames(timeout time.Duration) frames {
	return frames{timeout: timeout, left: len(http2.ClientPreface), want: frameHead}
}

// begun tells whether something has begun that must end in time. For the hello gRPC sees to that.
func (f *frames) begun() bool {
	return f.count > 0 && (f.have > 0 || f.more || f.block && f.left > 0)
}

// hello tells whether the client has said it: the first frame is whole.
func (f *frames) hello() bool {
	return f.settings && (f.count > 1 || f.left == 0)
}

// pass follows the frames through what was read.
func (f *frames) pass(b []byte) {
	for len(b) > 0 {
		if f.left > 0 {
			n := min(f.left, len(b))
			f.left -= n
			b = b[n:]
		} else {
			n := copy(f.head[f.have:f.want], b)
			b = b[n:]
			if f.have += n; f.have == f.want {
				f.frame()
			}
		}
		if !f.begun() {
			f.waited = 0
		}
	}
}

// frame takes the head of a frame apart.
func (f *frames) frame() {
	size := int(binary.BigEndian.Uint32(f.head[:]) >> 8)
	kind, flags := http2.FrameType(f.head[3]), http2.Flags(f.head[4])
	if kind == http2.FramePing && flags.Has(http2.FlagPingAck) && size == len(goAwayPing) && f.count > 0 {
		if f.want == frameHead {
			f.want += size
			return
		}
		f.toldToGo = f.toldToGo || string(f.head[frameHead:]) == goAwayPing
		size = 0
	}
	f.have, f.want, f.left = 0, frameHead, size
	if f.count++; f.count == 1 {
		f.settings = kind == http2.FrameSettings
		return
	}
	if kind == http2.FrameData && size > 0 && f.debt <= dataDebt {
		if flags.Has(http2.FlagDataPadded) {
			size = 0 // padding is no message
		}
		f.debt = max(f.debt+usualData-size, 0)
	}
	if !f.more && f.parts <= blockFrames {
		f.parts = 0
	}
	if f.block = kind == http2.FrameHeaders || kind == http2.FrameContinuation; f.block {
		f.parts++
		f.more = !flags.Has(http2.FlagHeadersEndHeaders) // it is the same of a CONTINUATION
	}
}

// read reads, for as long as there is still time for what has begun.
func (f *frames) read(from net.Conn, b []byte) (n int, err error) {
	if f.begun() {
		began := time.Now()
		n, err = readUntil(from, b, began.Add(f.timeout-f.waited))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			n, err = readUntil(from, b, time.Now().Add(lastLook))
		}
		f.waited += time.Since(began)
	} else {
		n, err = from.Read(b)
	}
	f.pass(b[:n])
	switch {
	case f.parts > blockFrames:
		return 0, errBlock
	case f.debt > dataDebt:
		return 0, errCrumbs
	default:
		return n, err //nolint:wrapcheck // gRPC asks whether it is io.EOF
	}
}

func readUntil(from net.Conn, b []byte, end time.Time) (int, error) {
	if err := from.SetReadDeadline(end); err != nil {
		return 0, err //nolint:wrapcheck // gRPC asks whether it is io.EOF
	}
	n, err := from.Read(b)
	if err != nil {
		return n, err //nolint:wrapcheck // gRPC asks whether it is io.EOF
	}
	return n, from.SetReadDeadline(time.Time{}) //nolint:wrapcheck // gRPC asks whether it is io.EOF
}
