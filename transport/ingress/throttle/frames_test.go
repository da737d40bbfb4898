package throttle

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"pgregory.net/rapid"
)

// However the bytes are cut, what has begun is known after each of them.
func TestHeadersAreFollowedHoweverTheyAreCut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var wire bytes.Buffer
		wire.WriteString(http2.ClientPreface)
		framer := http2.NewFramer(&wire, nil)
		framer.AllowIllegalWrites = true
		var begun []bool // after each byte, as the frames were meant
		frame := func(open, ends bool, write func() error) {
			from := wire.Len()
			if err := write(); err != nil {
				t.Fatal(err)
			}
			for at := from + 1; at <= wire.Len(); at++ {
				switch {
				case at == wire.Len():
					begun = append(begun, open && !ends)
				default:
					begun = append(begun, open || at-from < frameHead)
				}
			}
		}
		begun = make([]bool, wire.Len())
		frame(false, true, func() error { return framer.WriteSettings() })
		for i := len(http2.ClientPreface); i < len(begun); i++ {
			begun[i] = false // the handshake's
		}
		payload := rapid.SliceOfN(rapid.Byte(), 0, 40)
		for range rapid.IntRange(1, 8).Draw(t, "frames") {
			switch rapid.IntRange(0, 2).Draw(t, "kind") {
			case 0:
				frame(false, true, func() error { return framer.WriteData(1, rapid.Bool().Draw(t, "last"), payload.Draw(t, "data")) })
			case 1:
				frame(false, true, func() error { return framer.WritePing(false, [8]byte{}) })
			default:
				more := rapid.IntRange(0, 3).Draw(t, "continuations")
				frame(true, more == 0, func() error {
					return framer.WriteHeaders(http2.HeadersFrameParam{
						StreamID: 1, BlockFragment: payload.Draw(t, "headers"), EndHeaders: more == 0, EndStream: rapid.Bool().Draw(t, "end"),
						PadLength: uint8(rapid.IntRange(0, 5).Draw(t, "padding")),
					})
				})
				for ; more > 0; more-- {
					frame(true, more == 1, func() error { return framer.WriteContinuation(1, more == 1, payload.Draw(t, "continuation")) })
				}
			}
		}
		h := newFrames(time.Second)
		for b, at := wire.Bytes(), 0; at < len(b); {
			n := rapid.IntRange(1, len(b)-at).Draw(t, "cut")
			h.pass(b[at : at+n])
			if at += n; h.begun() != begun[at-1] {
				t.Fatalf("after %d of %x: begun %v", at, b, h.begun())
			}
		}
	})
}

// Whatever the frames are and however they are cut, where they end is where the library finds
// it.
func FuzzFrames(f *testing.F) {
	const settings, open, ends = "\x00\x00\x00\x04\x00\x00\x00\x00\x00", "\x00\x00\x01\x01\x00\x00\x00\x00\x01\x82", "\x00\x00\x00\x09\x04\x00\x00\x00\x01"
	for _, b := range []string{"", settings, settings[:5], settings + open, settings + open + ends, settings + open + ends[:3], open + ends, settings + settings + ends + open} {
		f.Add([]byte(b), uint8(3))
	}
	f.Fuzz(func(t *testing.T, b []byte, cut uint8) {
		h := newFrames(time.Second)
		for piece := range slices.Chunk(append([]byte(http2.ClientPreface), b...), int(cut)+1) {
			h.pass(piece)
		}
		begun, hello := whereFramesEnd(t, b)
		if h.begun() != begun || h.hello() != hello {
			t.Errorf("%x: begun %v, hello %v", b, h.begun(), h.hello())
		}
	})
}

// whereFramesEnd tells what frames does, of frames that are all there.
func whereFramesEnd(t *testing.T, b []byte) (begun, hello bool) {
	t.Helper()
	more := false
	for i := 0; len(b) > 0; i++ {
		if len(b) < frameHead {
			return i > 0, hello
		}
		frame, err := http2.ReadFrameHeader(bytes.NewReader(b))
		ok(t, err)
		whole := len(b) >= frameHead+int(frame.Length)
		block := i > 0 && (frame.Type == http2.FrameHeaders || frame.Type == http2.FrameContinuation)
		if block {
			more = !frame.Flags.Has(http2.FlagHeadersEndHeaders)
		}
		if i == 0 {
			hello = whole && frame.Type == http2.FrameSettings
		}
		if !whole { // what is asked with PING is awaited with its head
			return more || block || i > 0 && frame.Type == http2.FramePing && frame.Flags.Has(http2.FlagPingAck) && frame.Length == 8, hello
		}
		b = b[frameHead+int(frame.Length):]
	}
	return more, hello
}

// The answer to gRPC's question whether a GOAWAY has arrived is found, however it is cut, and no
// other ping is taken for it.
func TestAnswerToGoAwayIsFound(t *testing.T) {
	for _, test := range []struct {
		ack  bool
		data [8]byte
		want bool
	}{{true, [8]byte([]byte(goAwayPing)), true}, {false, [8]byte([]byte(goAwayPing)), false}, {true, [8]byte{}, false}} {
		for cut := 1; cut < 20; cut++ {
			var wire bytes.Buffer
			framer := http2.NewFramer(&wire, nil)
			ok(t, framer.WriteSettings())
			ok(t, framer.WritePing(test.ack, test.data))
			ok(t, framer.WriteData(1, true, []byte(goAwayPing)))
			f := newFrames(time.Second)
			for piece := range slices.Chunk(append([]byte(http2.ClientPreface), wire.Bytes()...), cut) {
				f.pass(piece)
			}
			if f.toldToGo != test.want || f.count != 3 || f.begun() {
				t.Errorf("%+v in pieces of %d: %v", test, cut, f.toldToGo)
			}
		}
	}
}

// A process that was stopped for longer than headers are awaited finds them when it goes on.
func TestHeadersThatHaveComeAreReadHoweverLate(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	defer func() { _ = listener.Close() }()
	client, err := net.Dial("tcp", listener.Addr().String())
	ok(t, err)
	defer func() { _ = client.Close() }()
	server, err := listener.Accept()
	ok(t, err)
	defer func() { _ = server.Close() }()
	f := newFrames(time.Hour)
	_, err = io.WriteString(client, http2.ClientPreface+"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x02\x01\x04\x00\x00\x00\x01\x82\x82")
	ok(t, err)
	for left := len(http2.ClientPreface) + 2*frameHead + 1; left > 0; {
		n, err := f.read(server, make([]byte, left))
		ok(t, err)
		left -= n
	}
	f.waited = 2 * time.Hour
	n, err := f.read(server, make([]byte, 1))
	if n != 1 || err != nil || f.begun() {
		t.Errorf("%d bytes of what had come, %v", n, err)
	}
	_, err = io.WriteString(client, "\x00")
	ok(t, err)
	_, err = f.read(server, make([]byte, 1))
	ok(t, err)
	f.waited = 2 * time.Hour
	if _, err := f.read(server, make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nothing had come, and reading returned %v", err)
	}
}

// paused is a connection of a process that is stopped while it is read: the deadline is heard before the
// bytes that have come.
type paused struct {
	net.Conn
	reads int
}

func (c *paused) SetReadDeadline(time.Time) error { return nil }

func (c *paused) Read(b []byte) (int, error) {
	if c.reads++; c.reads == 1 {
		return 0, os.ErrDeadlineExceeded
	}
	return copy(b, "\x82"), nil
}

func TestHeadersThatCameWhileTheProcessWasStoppedAreRead(t *testing.T) {
	f := newFrames(time.Hour)
	f.pass([]byte(greeting + "\x00\x00\x01\x01\x04\x00\x00\x00\x01"))
	if n, err := f.read(new(paused), make([]byte, 10)); n != 1 || err != nil || f.begun() {
		t.Errorf("%d bytes of what had come, %v", n, err)
	}
}
