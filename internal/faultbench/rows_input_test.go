package faultbench

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/push-manager/push-manager/internal/programs"
)

// Hostile connections to the push API, by their ids in docs/faults.md. What they send is bounded in count, and in time
// by floodTime.
const (
	floodFrames = 30 * volume
	floodTime   = 4 * time.Second
)

// flood is one hostile HTTP/2 connection.
type flood struct {
	conn   net.Conn
	framer *http2.Framer
	block  bytes.Buffer // of encoder
	header *hpack.Encoder
	stream uint32
	closed chan struct{} // closed when the server has ended the connection
}

// newFlood connects and says hello. It reads all that comes, if it reads.
func newFlood(t *testing.T, api string, reads bool) *flood {
	t.Helper()
	conn, err := net.Dial("tcp", api)
	if err != nil {
		t.Fatal(err)
	}
	f := &flood{conn: conn, framer: http2.NewFramer(conn, nil), stream: 1, closed: make(chan struct{})}
	f.header = hpack.NewEncoder(&f.block)
	var reader sync.WaitGroup
	t.Cleanup(func() {
		_ = conn.Close()
		reader.Wait()
	})
	if err := conn.SetDeadline(time.Now().Add(floodTime + patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := f.framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	if reads {
		reader.Go(func() {
			defer close(f.closed)
			_, _ = io.Copy(io.Discard, conn)
		})
	}
	return f
}

// headers is the header block of a push.
func (f *flood) headers() []byte {
	f.block.Reset()
	for _, h := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", "/pubsub.PushManagerService/PushToUser"}, {":authority", "x"},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		_ = f.header.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}) // into memory
	}
	return f.block.Bytes()
}

// send writes frames until the connection is gone, or it has been enough, and returns how
// many. A server that reads no more ends it, too.
func (f *flood) send(one func(f *flood) error) (sent int, err error) {
	if err := f.conn.SetWriteDeadline(time.Now().Add(floodTime)); err != nil {
		return 0, err
	}
	for ; sent < floodFrames; sent++ {
		if err := one(f); err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// B8: floods of HTTP/2 frames that cost their sender little. The connection is
// closed or held back, and the calls of others go on.
func TestFloodsOfFramesHarmNoOtherConnection(t *testing.T) {
	slow(t)
	t.Parallel() // with other tests; one flood at a time is enough for a machine
	for name, tc := range map[string]struct {
		one    func(f *flood) error
		mute   bool // reads nothing
		closed bool // the server must end it
	}{
		"rapid reset": {one: func(f *flood) error {
			err := f.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: f.stream, BlockFragment: f.headers(), EndHeaders: true})
			err = errors.Join(err, f.framer.WriteRSTStream(f.stream, http2.ErrCodeCancel))
			f.stream += 2
			return err
		}},
		"CONTINUATION": {closed: true, one: func(f *flood) error {
			if f.stream == 1 {
				f.stream = 3
				return f.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: slices.Clone(f.headers())})
			}
			f.block.Reset()
			_ = f.header.WriteField(hpack.HeaderField{Name: "x", Value: "y"}) // into memory
			return f.framer.WriteContinuation(1, false, f.block.Bytes())
		}},
		"PING": {closed: true, one: func(f *flood) error { return f.framer.WritePing(false, [8]byte{1}) }},
		"SETTINGS": {one: func(f *flood) error {
			return f.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 16})
		}},
		"SETTINGS, answers not read": {mute: true, one: func(f *flood) error {
			return f.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 16})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := aloneInStreet(t).everywhere("GOGC=50") // what is in use is looked at, not what is left to collect
			w.all.more(volume / 10)
			calm := w.ledger.tally(w.since, w.ledger.now(), nil)
			w.ledger.note("a flood of %s", name)
			since := w.ledger.now()
			var floods sync.WaitGroup
			var sent atomic.Int64
			for range 2 {
				f := newFlood(t, w.m.api, !tc.mute)
				floods.Go(func() {
					n, _ := f.send(tc.one) // whether it has ended is what counts
					sent.Add(int64(n))
					if !tc.closed {
						_ = f.conn.Close()
						return
					}
					select {
					case <-f.closed:
					case <-time.After(patience): //nolint:forbidigo // only a failure takes it
						t.Errorf("the connection is open after %d frames", n)
					}
				})
			}
			w.all.more(volume / 10)
			floods.Wait()
			flooded := w.ledger.tally(since, w.ledger.now(), nil)
			now := w.m.resident()
			t.Logf("%d frames; slowest call of the others %v, and %v before; memory %.0f MiB, and %.0f before",
				sent.Load(), flooded.slowest, calm.slowest, now/(1<<20), w.m.baseline["process_resident_memory_bytes"]/(1<<20))
			most := 64.0 * (1 << 20)
			if programs.Race() {
				most *= 8 // the detector keeps much for each byte
			}
			if grown := now - w.m.baseline["process_resident_memory_bytes"]; grown > most {
				t.Errorf("memory has grown by %.0f MiB", grown/(1<<20))
			}
			w.undisturbed()
		})
	}
}

// B9: connections that say too little, too slowly, before their handshake or behind it. Each
// ends in time, however alive it looks, and those who speak are served meanwhile.
func TestConnectionsThatDawdleAreClosed(t *testing.T) {
	w := newStreet(t).everywhere("API_HANDSHAKE_TIMEOUT=2s")
	const each = 50
	var wg sync.WaitGroup
	var ended atomic.Int64
	for name, say := range map[string]struct{ once, slowly string }{
		"mute":               {},
		"one byte at a time": {"", http2.ClientPreface},
		"headers one byte at a time": {
			http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" + "\x00\x04\x00\x01\x04\x00\x00\x00\x01", // settings, and headers of 1 KiB
			strings.Repeat("\x82", 1<<10),
		},
	} {
		for range each {
			conn, err := net.Dial("tcp", w.m.api)
			if err != nil {
				t.Fatal(err)
			}
			if err := conn.SetDeadline(time.Now().Add(2*time.Second + patience)); err != nil {
				t.Fatal(err)
			}
			gone := make(chan struct{})
			wg.Go(func() {
				_, err := io.WriteString(conn, say.once)
				for i := 0; err == nil && i < len(say.slowly); i++ {
					_, err = conn.Write([]byte{say.slowly[i]})
					select {
					case <-gone:
						return
					case <-time.After(200 * time.Millisecond): //nolint:forbidigo // until gone
					}
				}
			})
			wg.Go(func() {
				defer close(gone)
				defer func() { _ = conn.Close() }()
				var late net.Error
				if _, err := io.Copy(io.Discard, conn); errors.As(err, &late) && late.Timeout() {
					t.Errorf("%s: open for more than %v", name, patience)
					return
				}
				ended.Add(1)
			})
		}
	}
	w.all.more(volume / 5)
	took := eventually(t, "all are closed", func() error {
		if n := ended.Load(); n < 3*each {
			return fmt.Errorf("%d of %d", n, 3*each)
		}
		return nil
	})
	wg.Wait()
	t.Logf("the last was closed %v after %d pushes of others", took.Round(time.Millisecond), volume/5)
	w.undisturbed()
}
