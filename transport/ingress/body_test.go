package ingress

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// announce begins a call whose message claims to be as large as that, and of which few bytes come.
func announce(t *testing.T, f *http2.Framer, id uint32, method string, size, come int) error {
	t.Helper()
	headers := f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: headersOf(t, map[string]string{":path": method}), EndHeaders: true})
	head := []byte{0, byte(size >> 24), byte(size >> 16), byte(size >> 8), byte(size)}
	return errors.Join(headers, f.WriteData(id, false, append(head, make([]byte, come)...)))
}

// Whoever announces and dawdles loses the space to those who wait for it, before they have to be
// refused, and again when it announces again at once.
func TestLargePushesGoThroughBesideThoseWhoDawdle(t *testing.T) {
	const stream = "/pubsub.PushManagerService/PushStream"
	for _, c := range []struct {
		method    string
		come      int
		dawdlers  int
		takeSpace bool
	}{
		{methodUser, 100, 20, false},
		{stream, 100, 20, false},
		{methodUser, smallBody, 20, true},
		{stream, smallBody, 8, true}, // of 1.4 MiB: it may hold a thousand pushes
	} {
		t.Run(fmt.Sprintf("%s %d", c.method[len("/pubsub.PushManagerService/"):], c.come), func(t *testing.T) {
			w := newWorld(t, func(c *Config, _ *engine.Config) { c.BodyBytes = 8 << 20 })
			l, err := net.Listen("tcp", "127.0.0.1:0")
			ok(t, err)
			served := make(chan error, 1)
			go func() { served <- w.server.Serve(l) }()
			var dawdlers sync.WaitGroup
			t.Cleanup(func() { _ = w.server.Close(); <-served; dawdlers.Wait() })
			const size = 200 << 10
			for range c.dawdlers {
				conn, err := net.Dial("tcp", l.Addr().String())
				ok(t, err)
				t.Cleanup(func() { _ = conn.Close() })
				f := hello(t, conn)
				ok(t, announce(t, f, 1, c.method, size, c.come))
				dawdlers.Go(func() {
					for id := uint32(3); ; {
						frame, err := f.ReadFrame()
						if err != nil {
							return
						}
						if h, is := frame.(*http2.HeadersFrame); is && h.StreamEnded() {
							if announce(t, f, id, c.method, size, c.come) != nil {
								return
							}
							id += 2
						}
					}
				})
			}
			for end := time.Now().Add(10 * time.Second); c.takeSpace && !w.server.space.wanted(); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the dawdlers do not fill the space")
				}
			}
			large := &pubsub.PushToUserRequest{UserId: "a", Content: content(strings.Repeat("x", size))}
			for i := range 3 {
				if _, err := w.client.PushToUser(w.context(), large); err != nil {
					t.Errorf("honest push %d: %v", i, err)
				}
			}
			if n := w.metric(`push_manager_refused_total{priority="normal",reason="slow"}`); (n != "0") != c.takeSpace {
				t.Errorf("%s dawdlers are counted", n)
			}
		})
	}
}

// While nobody waits a request has its whole time, and is answered if it comes within that.
func TestRequestHasItsTimeToComeIn(t *testing.T) {
	const timeout, size = 5 * time.Second, 100 << 10
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprint("late ", late), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(c *Config, _ *engine.Config) { c.BodyTimeout = timeout })
				conn, err := w.dial(w.context(), "")
				ok(t, err)
				defer conn.Close()
				f := hello(t, conn)
				body := marshal(t, &pubsub.PushToUserRequest{UserId: "a", Content: content(strings.Repeat("x", size))})
				n := len(body)
				message := append([]byte{0, 0, byte(n >> 16), byte(n >> 8), byte(n)}, body...)
				ok(t, f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headersOf(t, map[string]string{":path": methodUser}), EndHeaders: true}))
				began := time.Now()
				const pieces = 8
				for i := range pieces {
					part := message[i*len(message)/pieces : (i+1)*len(message)/pieces]
					if late && i == pieces-1 {
						break
					}
					ok(t, f.WriteData(1, i == pieces-1, part))
					time.Sleep(timeout / 10)
				}
				header := h2read(t, f)
				if !late {
					if header["grpc-status"] != "0" {
						t.Errorf("answered %v", header)
					}
				} else {
					if header["grpc-status"] != fmt.Sprint(int(codes.DeadlineExceeded)) || header["grpc-status-details-bin"] == "" {
						t.Errorf("answered %v, want DEADLINE_EXCEEDED with details", header)
					}
					if took := time.Since(began); took != timeout {
						t.Errorf("answered after %v, want %v", took, timeout)
					}
				}
				synctest.Wait()
				if taken, waiting := w.server.space.books(); taken != 0 || waiting != 0 {
					t.Errorf("%d bytes are taken, and %d wait", taken, waiting)
				}
			})
		})
	}
}

// A message that does not come in ends its PushStream, once all that stood before it is answered.
func TestMessageThatDoesNotComeInEndsThePushStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const timeout, ack = 5 * time.Second, 7 * time.Second
		w := newWorld(t, func(c *Config, e *engine.Config) { c.BodyTimeout, e.Timeout = timeout, time.Minute })
		n1 := w.network.nodes[0]
		n1.setKeep(true)
		conn, err := w.dial(w.context(), "")
		ok(t, err)
		defer conn.Close()
		f := hello(t, conn)
		ok(t, f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headersOf(t, map[string]string{":path": "/pubsub.PushManagerService/PushStream"}), EndHeaders: true}))
		first := marshal(t, userPush(1, "d", "x"))
		ok(t, f.WriteData(1, false, append([]byte{0, 0, 0, 0, byte(len(first))}, first...)))
		ok(t, f.WriteData(1, false, append([]byte{0, 0, 4, 0, 0}, make([]byte, smallBody)...)))
		began := time.Now()
		f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		code := ""
		go func() { time.Sleep(ack); w.network.ackAll() }()
		answered := false
		for over := false; !over; {
			frame, err := f.ReadFrame()
			ok(t, err)
			switch frame := frame.(type) {
			case *http2.DataFrame:
				answered = true
			case *http2.MetaHeadersFrame:
				over = frame.StreamEnded()
				for _, h := range frame.RegularFields() {
					if h.Name == "grpc-status" {
						code = h.Value
					}
				}
			}
		}
		if want := fmt.Sprint(int(codes.DeadlineExceeded)); code != want {
			t.Errorf("ended with the code %s, want %s", code, want)
		}
		if took := time.Since(began); !answered || took != ack {
			t.Errorf("ended after %v, want %v; what came before is answered: %v", took, ack, answered)
		}
		if n := w.metric(`push_manager_refused_total{priority="normal",reason="slow"}`); n != "1" {
			t.Errorf("%s are counted as slow", n)
		}
		synctest.Wait()
		if taken, waiting := w.server.space.books(); taken != 0 || waiting != 0 {
			t.Errorf("%d bytes are taken, and %d wait", taken, waiting)
		}
		// A stream that says nothing, or has a small message half said, keeps nothing from anybody.
		idle := w.stream(t.Context())
		time.Sleep(time.Hour)
		ok(t, idle.Send(userPush(1, "d", "x")))
		recv(t, idle)
		ok(t, idle.CloseSend())
		_, err = idle.Recv()
		if !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	})
}

// One connection that sends many large requests keeps others out no longer than until the next is
// done: it comes after them when it has its share.
func TestConnectionWithItsShareComesLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		s := newSpace(800, 100, w.set)
		var hog, other, third throttle.Conn
		var mu sync.Mutex
		var order []string
		take := func(name string, h *throttle.Conn, p engine.Priority) {
			go func() {
				if _, err := s.reserve(t.Context(), h, p, 100, 0); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				mu.Lock()
				defer mu.Unlock()
				order = append(order, name)
			}()
			synctest.Wait()
		}
		for range 8 {
			take("first", &hog, engine.Critical)
		}
		order = nil
		take("hog", &hog, engine.Critical)
		take("hog", &hog, engine.Critical)
		take("other", &other, engine.Critical)
		take("third", &third, engine.Critical)
		for range 4 {
			s.release(&hog, 100)
			synctest.Wait()
		}
		if want := "[other third hog hog]"; fmt.Sprint(order) != want {
			t.Errorf("let in: %v, want %v", order, want)
		}
		if hog.Space != 600 || other.Space != 100 {
			t.Errorf("they have %d and %d", hog.Space, other.Space)
		}
	})
}

// Calls whose small bodies do not come in keep what is reckoned for an open call, and half as much
// again in the smallest frames that a connection may send for long.
func TestWhatCallsTakeThatDawdle(t *testing.T) {
	w := newWorld(t, nil)
	for i, size := range []int{smallBody - 1, 64, 16} {
		const calls = 80
		conn, err := w.dial(w.context(), "")
		ok(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		f := hello(t, conn)
		go func() { _, _ = io.Copy(io.Discard, conn) }()
		before := inUse()
		for i := range calls {
			id := uint32(2*i + 1)
			ok(t, announce(t, f, id, methodUser, smallBody, 0))
			for left := smallBody - 1; left > 0; left -= size {
				ok(t, f.WriteData(id, false, make([]byte, min(size, left))))
			}
		}
		for end := time.Now().Add(10 * time.Second); w.metric("push_manager_api_inflight") != fmt.Sprint((i+1)*calls); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s calls are open", w.metric("push_manager_api_inflight"))
			}
		}
		time.Sleep(200 * time.Millisecond) // what was sent last is read
		each := (inUse() - before) / calls
		t.Logf("in frames of %d bytes each takes %.1f KiB, and %d KiB are reckoned", size, float64(each)/1024, openBytes>>10)
		if size >= 64 && each > openBytes || each > openBytes*3/2 {
			t.Errorf("in frames of %d bytes each takes %d, and %d are reckoned", size, each, openBytes)
		}
	}
}

// A message in crumbs takes many times its size: a connection that sends such for long is closed.
func TestMessagesInCrumbsEndTheConnection(t *testing.T) {
	for name, write := range map[string]func(f *http2.Framer) error{
		"a byte each":     func(f *http2.Framer) error { return f.WriteData(1, false, []byte{0}) },
		"much of padding": func(f *http2.Framer) error { return f.WriteDataPadded(1, false, []byte{0}, make([]byte, 200)) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			conn, err := w.dial(w.context(), "")
			ok(t, err)
			defer conn.Close()
			f := hello(t, conn)
			ok(t, announce(t, f, 1, methodUser, 1<<20, 0))
			var client sync.WaitGroup
			client.Go(func() {
				for end := time.Now().Add(10 * time.Second); write(f) == nil; {
					if time.Now().After(end) {
						t.Error("all of it is taken")
						_ = conn.Close()
					}
				}
			})
			_, _ = io.Copy(io.Discard, conn) // until the server closes
			client.Wait()
			_, err = w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
			ok(t, err)
		})
	}
}
