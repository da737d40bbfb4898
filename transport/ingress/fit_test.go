package ingress

import (
	"fmt"
	"net"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/push-manager/push-manager/engine"
)

// inUse is the heap and all stacks, garbage left aside.
func inUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// TestWhatCallsTake holds what is reckoned for calls, streams, connections and bodies against
// what they take. Clients are a few bytes here, and are not counted out.
func TestWhatCallsTake(t *testing.T) {
	w := newWorld(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(l) }()
	t.Cleanup(func() { _ = w.server.Close(); <-served })
	n1 := w.network.nodes[0]
	n1.setKeep(true)
	w.network.discard()
	push := func() []byte {
		body := marshal(t, userPush(1, "d", "x").GetToUser())
		return append([]byte{0, 0, 0, 0, byte(len(body))}, body...)
	}()
	dial := func() *http2.Framer {
		conn, err := net.Dial("tcp", l.Addr().String())
		ok(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		return hello(t, conn)
	}
	until := func(what string, is func() bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: it does not come to that", what)
			}
		}
	}
	measure := func(what string, reckoned int64, n int, do func()) {
		t.Helper()
		before := inUse()
		do()
		each := (inUse() - before) / int64(n)
		if raceEnabled {
			reckoned += 8 << 10 // frames on the stack are larger, which makes it twice as large
		}
		t.Logf("%s takes %.1f KiB, and %.1f KiB are reckoned", what, float64(each)/1024, float64(reckoned)/1024)
		if each > reckoned {
			t.Errorf("%s takes %d bytes, and %d are reckoned", what, each, reckoned)
		}
	}
	calls := func(what, path string, data []byte, reckoned int64, open func() bool) {
		t.Helper()
		const conns, each = 4, 100
		framers := make([]*http2.Framer, conns)
		for i := range framers {
			framers[i] = dial()
		}
		until("connections", func() bool { return w.metric("push_manager_api_handshakes") == "0" })
		measure(what, reckoned, conns*each, func() {
			for _, f := range framers {
				for i := range each {
					ok(t, f.WriteHeaders(http2.HeadersFrameParam{
						StreamID: uint32(2*i + 1), BlockFragment: headersOf(t, map[string]string{":path": path}), EndHeaders: true,
					}))
					if data != nil {
						ok(t, f.WriteData(uint32(2*i+1), true, data))
					}
				}
			}
			until(what, open)
		})
	}
	calls("an idle PushStream", "/pubsub.PushManagerService/PushStream", nil, streamBytes-shareFree,
		func() bool { return w.metric("push_manager_api_streams") == "400" })
	calls("an open call", methodUser, push, openBytes-2*smallBody, func() bool { return n1.len() == 400 })
	const conns = 200
	measure("a connection", connBytes, conns, func() {
		for range conns {
			dial()
		}
		until("connections", func() bool { return w.metric("push_manager_api_connections") == fmt.Sprint(conns+8) })
	})
	w.network.ackAll()
	n1.setKeep(true)
	until("calls", func() bool { return w.metric("push_manager_api_inflight") == "400" }) // the streams
	const large = 8
	var all sync.WaitGroup
	var taken int64
	wire := marshal(t, bigPush())
	measure("a request of 1 MiB", keptBytes(len(wire), 9_900, 0)*5/4, large, func() {
		for range large {
			all.Go(func() { _, _ = w.raw(methodRoom, wire) })
		}
		until("requests", func() bool { taken, _ = w.server.space.books(); return n1.len() == large })
	})
	if want := large * keptBytes(len(wire), 9_900, 0); taken != want {
		t.Errorf("%d bytes are taken for %d requests, want %d", taken, large, want)
	}
	w.network.ackAll()
	all.Wait()
}

// Without a word from the operator the bounds are what fits.
func TestBoundsFitTheMemory(t *testing.T) {
	old := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(old)
	for _, limit := range []int64{64 << 20, 230 << 20, 460 << 20, 4 << 30, 64 << 30} {
		debug.SetMemoryLimit(limit)
		c := Config{}.withDefaults()
		debug.SetMemoryLimit(old)
		all := int64(c.BodyBytes) + int64(c.OpenCalls)*openBytes + int64(c.Streams)*int64(streamBytes+c.StreamWindow) + int64(c.Connections)*connBytes
		if all > limit*7/8 || limit <= 4<<30 && all < limit*3/4 && limit > 64<<20 {
			t.Errorf("of %d MiB %d may be taken: %d for bodies, %d calls, %d streams, %d connections",
				limit>>20, all>>20, c.BodyBytes, c.OpenCalls, c.Streams, c.Connections)
		}
		if err := (Config{Engine: new(engine.Engine), BodyBytes: 1 << 20, OpenCalls: 7, Streams: 8, Connections: 9, ConnectionsPerAddress: 10}).Validate(); err != nil {
			t.Error(err)
		}
	}
	c := Config{BodyBytes: 1 << 20, OpenCalls: 7, Streams: 8, Connections: 9}.withDefaults()
	if c.BodyBytes != 1<<20 || c.OpenCalls != 7 || c.Streams != 8 || c.Connections != 9 || c.ConnectionsPerAddress != 7 {
		t.Errorf("what was said does not hold: %+v", c)
	}
}
