package ingress

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// More calls than are worked on at a time, over many connections, are all taken in the end.
func TestAllCallsAreTakenWhileConnectionsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.Calls = max(64/runtime.GOMAXPROCS(0), 1) })
		node := w.network.nodes[1]
		node.setKeep(true)
		var calls sync.WaitGroup
		for range 20 {
			conn := w.connect()
			defer func() { _ = conn.Close() }()
			client := pubsub.NewPushManagerServiceClient(conn)
			for range 20 {
				calls.Go(func() {
					res, err := client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
					if err != nil || !res.GetSuccess() {
						t.Errorf("%v, %v", res, err)
					}
				})
			}
		}
		waited := 0
		done := make(chan struct{})
		go func() { calls.Wait(); close(done) }()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for over := false; !over; {
			select {
			case <-done:
				over = true
			case <-tick.C:
			}
			n, _ := strconv.Atoi(w.metric("push_manager_api_connections_waiting"))
			waited = max(waited, n)
			for _, d := range node.take() {
				ack(d)
			}
		}
		if waited < 10 {
			t.Errorf("%d connections have waited", waited)
		}
		for _, p := range engine.Priorities() {
			if n := w.metric(fmt.Sprintf("push_manager_refused_total{priority=%q,reason=%q}", p, "busy")); n != "0" {
				t.Errorf("%s calls of %v priority are refused", n, p)
			}
		}
	})
}

// A PushStream tells how important its connection is, with each message.
func TestPushStreamSpeaksForItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var opened, seen atomic.Pointer[throttle.Conn]
		w := newWorld(t, func(c *Config, _ *engine.Config) {
			c.Options = append(c.Options, grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
				opened.Store(throttle.ConnOf(ss.Context()))
				return handler(srv, ss)
			}))
		})
		w.server.cfg.Trace = func(ctx context.Context, _ string) (engine.Trace, func(engine.Result, error)) {
			seen.Store(throttle.ConnOf(ctx))
			return nil, nil
		}
		st := w.stream(claim(w.context(), "critical"))
		synctest.Wait()
		if c := opened.Load(); c == nil || c.Priority() != engine.Critical {
			t.Fatalf("before the first message the connection is %v", c)
		}
		for i := range uint64(3) {
			ok(t, st.Send(userPush(i+1, "b", "x")))
			recv(t, st)
			_, err := w.client.PushToUser(claim(w.context(), "low"), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
			ok(t, err)
			if c := seen.Load(); c == nil || c.Priority() != engine.Critical {
				t.Fatalf("the connection is %v", c)
			}
			time.Sleep(750 * time.Millisecond)
		}
	})
}

// Calls of low priority beyond the bound are refused, with the reason, when their connection
// has critical ones and is read for those.
func TestBusyIsAReasonToRefuse(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.Calls = 1 })
	n := w.network.nodes[0]
	n.setKeep(true)
	bound := runtime.GOMAXPROCS(0)
	var calls sync.WaitGroup
	refused := 0
	// Calls count for 25 ms at least, so on a slow machine it may take several attempts.
	for end := time.Now().Add(time.Minute); refused == 0 && time.Now().Before(end); {
		var mu sync.Mutex
		for range 2*bound + 2 {
			calls.Go(func() {
				ctx, cancel := context.WithTimeout(w.context(), 20*time.Millisecond)
				defer cancel()
				_, _ = w.client.PushToUser(claim(ctx, "critical"), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
			})
			calls.Go(func() {
				_, err := w.client.PushToUser(claim(w.context(), "low"), &pubsub.PushToUserRequest{UserId: "nobody", Content: content("x")})
				if status.Code(err) == codes.ResourceExhausted {
					wantError(t, err, codes.ResourceExhausted, "OVERLOADED", "")
					mu.Lock()
					defer mu.Unlock()
					refused++
				}
			})
		}
		calls.Wait()
	}
	if got := w.metric(fmt.Sprintf("push_manager_refused_total{priority=%q,reason=%q}", "low", "busy")); refused == 0 || got != fmt.Sprint(refused) {
		t.Errorf("%d are refused, %s counted", refused, got)
	}
}

// A call that is refused, for whatever reason, is no work: it keeps nobody waiting.
func TestRefusedCallsDoNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.Rate, c.RateBurst = 1, 1 })
		push := func(ctx context.Context) error {
			_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
			return err
		}
		refused := func(ctx context.Context, reason string) {
			t.Helper()
			if s := status.Convert(push(ctx)); !strings.Contains(fmt.Sprint(s.Details()), reason) {
				t.Errorf("%v with %v, want %s", s, s.Details(), reason)
			}
			if n := w.metric("push_manager_api_worked"); n != "0" {
				t.Errorf("%s: %s calls count", reason, n)
			}
		}
		ok(t, push(w.context()))
		refused(claim(w.context(), "urgent"), "MALFORMED")
		refused(w.context(), "RATE_LIMITED")
		w.server.SetServing(false)
		refused(w.context(), "NOT_READY")
		w.server.draining.Store(true)
		refused(w.context(), "DRAINING")
	})
}

// secure is credentials for both sides.
func secure(t *testing.T) (server, client credentials.TransportCredentials) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"push-manager"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	ok(t, err)
	cert, err := x509.ParseCertificate(der)
	ok(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}),
		credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: "push-manager", MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}})
}

// With TLS all is as without it: pushes go through, and connections are bounded and closed by what is
// said above TLS.
func TestConnectionsWithTLS(t *testing.T) {
	server, client := secure(t)
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Credentials, c.Connections, c.Handshakes, c.ConnectionTimeout = server, 2, 2, 2*time.Second
	})
	connect := func() *grpc.ClientConn {
		conn, err := grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(client), grpc.WithContextDialer(w.dial))
		ok(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	expect := func(what, series, want string) {
		t.Helper()
		for until := time.Now().Add(10 * time.Second); w.metric(series) != want; time.Sleep(time.Millisecond) {
			if time.Now().After(until) {
				t.Fatalf("%s: %s is %s, want %s", what, series, w.metric(series), want)
			}
		}
	}
	push := func(conn *grpc.ClientConn) error {
		_, err := pubsub.NewPushManagerServiceClient(conn).PushToUser(claim(w.context(), "critical"), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
		return err
	}
	first := connect()
	ok(t, push(first))
	st, err := pubsub.NewPushManagerServiceClient(first).PushStream(w.context())
	ok(t, err)
	for i := range uint64(100) {
		ok(t, st.Send(userPush(i+1, "b", "x")))
		recv(t, st)
	}
	expect("one client", "push_manager_api_connections", "1")
	expect("one client", "push_manager_api_handshakes", "0")

	// Half-open: nothing is said to TLS, or nothing above it. One more costs the oldest its place.
	mute, err := w.dial(w.context(), "")
	ok(t, err)
	defer mute.Close()
	expect("one mute", "push_manager_api_handshakes", "1")
	raw, err := w.dial(w.context(), "")
	ok(t, err)
	half, _, err := client.ClientHandshake(w.context(), "push-manager", raw)
	ok(t, err)
	defer half.Close()
	expect("two half-open", "push_manager_api_handshakes", "2")
	raw, err = w.dial(w.context(), "")
	ok(t, err)
	slow, _, err := client.ClientHandshake(w.context(), "push-manager", raw)
	ok(t, err)
	defer slow.Close()
	expect("three half-open", "push_manager_api_handshakes_evicted_total", "1")

	// One says hello, and dawdles with its headers.
	hello(t, slow)
	expect("two have said hello", "push_manager_api_connections", "2")
	if err := push(connect()); status.Code(err) != codes.Unavailable {
		t.Errorf("a third connection: %v", err)
	}
	began := time.Now()
	_, err = slow.Write([]byte("\x00\x00\x08\x01\x04\x00\x00\x00\x01\x82"))
	ok(t, err)
	_, _ = io.Copy(io.Discard, slow)
	if took := time.Since(began); took < time.Second || took > 10*time.Second {
		t.Errorf("slow headers were awaited for %v", took)
	}
	expect("it is gone", "push_manager_api_connections", "1")
	ok(t, push(connect()))
}

// crumbs writes a byte at a time.
type crumbs struct{ net.Conn }

func (c crumbs) Write(b []byte) (n int, err error) {
	for ; n < len(b) && err == nil; n++ {
		_, err = c.Conn.Write(b[n : n+1])
	}
	return n, err
}

// Records of TLS may come in crumbs. One that never ends is awaited for as long as a hello, and after
// that for as long as a client may be silent.
func TestRecordsOfTLSInCrumbs(t *testing.T) {
	server, client := secure(t)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.Credentials, c.ConnectionTimeout = server, 5*time.Second })
		conn, err := grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(client), grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			raw, err := w.dial(ctx, address)
			return crumbs{raw}, err
		}))
		ok(t, err)
		for range 3 {
			_, err = pubsub.NewPushManagerServiceClient(conn).PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
			ok(t, err)
		}
		ok(t, conn.Close())
		for _, test := range []struct {
			part  string
			hello bool
			most  time.Duration
		}{
			{"\x16\x03\x01\x01\x00\x01\x00", false, 5 * time.Second}, // of a ClientHello
			{"\x17\x03\x03\x00\x40\x00", true, 40 * time.Second},     // of a record: it is silence until it ends
		} {
			raw, err := w.dial(t.Context(), "")
			ok(t, err)
			if test.hello {
				secured, _, err := client.ClientHandshake(t.Context(), "push-manager", raw)
				ok(t, err)
				hello(t, secured)
			}
			began := time.Now()
			var dawdler sync.WaitGroup
			dawdler.Go(func() {
				_, err := raw.Write([]byte(test.part))
				for ; err == nil; time.Sleep(time.Second) {
					_, err = raw.Write([]byte{0})
				}
			})
			_, _ = io.Copy(io.Discard, raw)
			if took := time.Since(began); took > test.most+time.Second {
				t.Errorf("%q: open for %v", test.part, took)
			}
			_ = raw.Close()
			dawdler.Wait()
			synctest.Wait()
			if n, m := w.metric("push_manager_api_handshakes"), w.metric("push_manager_api_connections"); n != "0" || m != "0" {
				t.Errorf("%q: %s handshakes and %s connections are left", test.part, n, m)
			}
		}
	})
}

// A connection that is too old is told to go. Its PushStreams end once all they took is answered,
// nothing is lost, and the client goes on with another connection.
func TestOldConnectionsAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const age = 10 * time.Minute
		w := newWorld(t, func(c *Config, e *engine.Config) { c.ConnectionAge, e.Timeout = age, time.Hour })
		dial, dials := w.dial, 0
		w.dial = func(ctx context.Context, address string) (net.Conn, error) {
			dials++
			return dial(ctx, address)
		}
		conn := w.connect()
		defer conn.Close()
		client := pubsub.NewPushManagerServiceClient(conn)
		watch, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
		ok(t, err)
		_, err = watch.Recv()
		ok(t, err)
		st, err := client.PushStream(t.Context())
		ok(t, err)
		began := time.Now()
		n2 := w.network.nodes[1]
		n2.setKeep(true)
		ok(t, st.Send(userPush(1, "b", "x")))
		synctest.Wait()
		unary := make(chan error, 1)
		go func() {
			_, err := client.PushToUser(t.Context(), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
			unary <- err
		}()
		_, err = watch.Recv()
		wantError(t, err, codes.Unavailable, "DRAINING", "")
		if took := time.Since(began); took < age*9/10 || took > age*11/10+time.Second {
			t.Errorf("told after %v", took)
		}
		time.Sleep(time.Minute)
		ok(t, st.Send(userPush(2, "a", "late"))) // is not taken, and has no answer
		time.Sleep(time.Minute)
		ok(t, func() error {
			_, err := client.PushToUser(t.Context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
			return err
		}())
		if dials != 2 {
			t.Errorf("%d connections, want 2", dials)
		}
		if n := w.network.nodes[0].len(); n != 0 {
			t.Errorf("%d late pushes are kept", n)
		}
		n2.setKeep(false)
		w.network.ackAll()
		if got := recv(t, st); got.GetId() != 1 || !got.GetToUser().GetSuccess() {
			t.Errorf("on the stream: %v", got)
		}
		wantEnd(t, st, codes.Unavailable, "DRAINING", "")
		ok(t, <-unary)
		synctest.Wait()
		if open := w.metric("push_manager_api_connections"); open != "1" {
			t.Errorf("%s connections are open", open)
		}
	})
}

// Whatever a client says instead of HTTP/2, or within it, its connection ends or goes on, and others
// are served.
func FuzzConnection(f *testing.F) {
	var frames bytes.Buffer
	framer := http2.NewFramer(&frames, nil)
	_ = framer.WriteSettings()
	_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}, EndHeaders: true, EndStream: true})
	_ = framer.WritePing(true, [8]byte{1, 6, 1, 8, 0, 3, 3, 9})
	_ = framer.WriteContinuation(1, false, nil)
	_ = framer.WriteData(1, true, []byte("\x00\x00\x00\x00\x00"))
	for _, b := range []string{"", "GET / HTTP/1.1\r\n\r\n", http2.ClientPreface, http2.ClientPreface + frames.String(), http2.ClientPreface + frames.String()[:20]} {
		f.Add([]byte(b), uint16(7))
	}
	w := newWorld(f, nil)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	ok(f, err)
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(listener) }()
	f.Cleanup(func() {
		ok(f, w.server.Close())
		<-served
	})
	f.Fuzz(func(t *testing.T, b []byte, cut uint16) {
		conn, err := net.Dial("tcp", listener.Addr().String())
		ok(t, err)
		for piece := range slices.Chunk(b, int(cut)+1) {
			if _, err := conn.Write(piece); err != nil {
				break // it has been closed
			}
		}
		_ = conn.Close()
		ctx, cancel := context.WithTimeout(claim(t.Context(), "critical"), 10*time.Second)
		defer cancel()
		_, err = w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
		ok(t, err)
		if n := w.server.metrics.panics.Get(); n != 0 {
			t.Errorf("%d panics", n)
		}
	})
}
