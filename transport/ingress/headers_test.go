package ingress

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestConnectionThatDawdlesWithItsHeadersIsClosed(t *testing.T) {
	const get = 0x82 // :method GET, a block of headers of one byte
	for _, c := range []struct {
		name string
		once string // what is said at once
		then func(i int) []byte
	}{
		{"a frame of 1 KiB, a byte at a time", "\x00\x04\x00\x01\x04\x00\x00\x00\x01", func(int) []byte { return []byte{get} }},
		{"the head of a frame, a byte at a time", "", func(i int) []byte { return []byte("\x00\x00\x08\x06\x00\x00\x00\x00\x00")[i : i+1] }},
		{"a block without an end, a frame at a time", "\x00\x00\x01\x01\x00\x00\x00\x00\x01\x82", func(int) []byte { return []byte("\x00\x00\x01\x09\x00\x00\x00\x00\x01\x82") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, nil)
				conn, err := w.dial(w.context(), "")
				ok(t, err)
				hello(t, conn)
				synctest.Wait()
				began := time.Now()
				var dawdler sync.WaitGroup
				dawdler.Go(func() {
					_, err := io.WriteString(conn, c.once)
					for i := 0; err == nil; i++ {
						_, err = conn.Write(c.then(i))
						time.Sleep(900 * time.Millisecond)
					}
				})
				_, _ = io.Copy(io.Discard, conn) // until the server closes
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("open for %v", took)
				}
				ok(t, conn.Close())
				dawdler.Wait()
			})
		})
	}
}

// Frames that are empty add nothing to the headers, whose size is bounded. It is the same
// whether they come one by one or all at once, and with an end.
func TestBlockOfTooManyFramesEndsTheConnection(t *testing.T) {
	for name, flood := range map[string]func(conn net.Conn, framer *http2.Framer) error{
		"one by one, without an end": func(_ net.Conn, framer *http2.Framer) error {
			synctest.Wait() // each is read by itself
			return framer.WriteContinuation(1, false, nil)
		},
		"at once, with an end": func(conn net.Conn, _ *http2.Framer) error {
			var b bytes.Buffer
			framer := http2.NewFramer(&b, nil)
			for range 64 {
				_ = framer.WriteContinuation(1, false, nil)
			}
			_ = framer.WriteContinuation(1, true, nil)
			_ = framer.WritePing(false, [8]byte{})
			_, err := conn.Write(b.Bytes())
			return errors.Join(err, io.EOF) // once
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, nil)
				conn, err := w.dial(w.context(), "")
				ok(t, err)
				framer := hello(t, conn)
				// Of too few fields: gRPC would refuse the call, and keep the connection.
				ok(t, framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}}))
				var client sync.WaitGroup
				client.Go(func() {
					for flood(conn, framer) == nil {
					}
				})
				began := time.Now()
				_, _ = io.Copy(io.Discard, conn) // until the server closes
				if took := time.Since(began); took > time.Second {
					t.Errorf("open for %v", took)
				}
				client.Wait()
			})
		})
	}
}

// slowly writes in two halves, and pauses in between.
type slowly struct {
	net.Conn
	pause time.Duration
}

func (c slowly) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b[:len(b)/2])
	if err != nil {
		return n, err
	}
	time.Sleep(c.pause)
	m, err := c.Conn.Write(b[len(b)/2:])
	return n + m, err
}

// Each part of what a client says comes in time, and all of it takes much longer than one
// part may.
func TestSlowClientIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.ConnectionTimeout = 10 * time.Second })
		dial, dials := w.dial, 0
		w.dial = func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := dial(ctx, address)
			dials++
			return slowly{conn, 2 * time.Second}, err
		}
		conn := w.connect()
		defer conn.Close()
		client := pubsub.NewPushManagerServiceClient(conn)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		for range 10 {
			_, err := client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
			ok(t, err)
			time.Sleep(time.Minute) // no deadline is left behind
		}
		if dials != 1 {
			t.Errorf("%d connections, want 1", dials)
		}
	})
}

// A message may be large, and its client far away.
func TestMessageThatComesSlowlyIsNoHeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(_ *Config, e *engine.Config) { e.Timeout = time.Minute })
		conn, err := w.dial(w.context(), "")
		ok(t, err)
		defer conn.Close()
		framer := hello(t, conn)
		ok(t, framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headersOf(t, map[string]string{":path": methodUser}), EndHeaders: true}))
		body := marshal(t, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
		message := append([]byte{0, 0, 0, 0, byte(len(body))}, body...)
		_, err = conn.Write([]byte{0, 0, byte(len(message)), byte(http2.FrameData), byte(http2.FlagDataEndStream), 0, 0, 0, 1})
		ok(t, err)
		for _, b := range message {
			_, err = conn.Write([]byte{b})
			ok(t, err)
			time.Sleep(time.Second)
		}
		if header := h2read(t, framer); header["grpc-status"] != "0" {
			t.Errorf("answered %v", header)
		}
	})
}
