package ingress

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
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
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// bigPush is of nearly 1 MiB, and within all limits.
func bigPush() *pubsub.PushToRoomRequest {
	ids := make([]string, 9_900)
	for i := range ids {
		ids[i] = fmt.Sprintf("%0100d", i)
	}
	return &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x"), ExcludeUserIds: ids}
}

// spaceIsFree fails unless all that was taken is given back.
func (w *world) spaceIsFree() {
	w.t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		taken, waiting := w.server.space.books()
		if taken == 0 && waiting == 0 {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("%d bytes are still taken, and %d wait", taken, waiting)
		}
	}
}

// Many large requests at a time have to wait for each other, and keep no small one waiting.
func TestLargeRequestsShareTheSpaceAndSmallOnesGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bytes = 8 << 20
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.BodyBytes, c.Streams = bytes, 16 })
		n1 := w.network.nodes[0]
		n1.setKeep(true) // large requests stay
		const calls = 64
		var served, refused atomic.Int64
		var all sync.WaitGroup
		big := bigPush()
		for range calls {
			all.Go(func() {
				_, err := w.client.PushToRoom(w.context(), big)
				switch status.Code(err) {
				case codes.OK:
					served.Add(1)
				case codes.ResourceExhausted:
					refused.Add(1)
					wantError(t, err, codes.ResourceExhausted, "OVERLOADED", "")
				default:
					t.Error(err)
				}
			})
		}
		until := time.Now().Add(10 * time.Second)
		for n1.len() == 0 && time.Now().Before(until) {
			time.Sleep(time.Millisecond)
		}
		for range 20 {
			began := time.Now()
			_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
			ok(t, err)
			if took := time.Since(began); took > maxSpaceWait {
				t.Errorf("a small push took %v beside them", took)
			}
			if taken, _ := w.server.space.books(); taken > bytes {
				t.Errorf("%d bytes are taken, of %d", taken, bytes)
			}
		}
		if n := n1.len(); n == 0 || n > bytes/(1<<20) {
			t.Errorf("%d requests of 1 MiB are under way, in %d MiB", n, bytes>>20)
		}
		var acking sync.WaitGroup
		acking.Go(func() { // from now on
			for n1.setKeep(false); ; time.Sleep(time.Millisecond) {
				for _, d := range n1.take() {
					ack(d)
				}
				if served.Load()+refused.Load() == calls {
					return
				}
			}
		})
		all.Wait()
		acking.Wait()
		t.Logf("%d served, %d refused", served.Load(), refused.Load())
		if served.Load() < bytes/(1<<20) {
			t.Errorf("%d of %d were served", served.Load(), calls)
		}
		if n := w.metric(`push_manager_refused_total{priority="normal",reason="space"}`); n != strconv.FormatInt(refused.Load(), 10) {
			t.Errorf("%s are counted as refused, want %d", n, refused.Load())
		}
		w.spaceIsFree()
	})
}

// What a large request takes is given back however it ends.
func TestSpaceComesBackHoweverACallEnds(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.BodyBytes, c.Streams = 4<<20, 16 })
	n1 := w.network.nodes[0]
	big := bigPush()
	_, err := w.client.PushToRoom(w.context(), big)
	ok(t, err)
	w.spaceIsFree()
	_, err = w.client.PushToRoom(w.context(), &pubsub.PushToRoomRequest{RoomId: "", ExcludeUserIds: big.ExcludeUserIds})
	wantError(t, err, codes.InvalidArgument, "REQUIRED", "room_id")
	w.spaceIsFree()
	n1.setKeep(true)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	reply, err := w.client.PushToRoom(ctx, big) // its deadline passes
	if err != nil || reply.Success {            // the server may be the first to notice
		wantError(t, err, codes.DeadlineExceeded, "", "")
	}
	w.spaceIsFree()
	n1.setKeep(false)
	st, err := w.conn.NewStream(w.context(), &grpc.StreamDesc{ClientStreams: true}, methodRoom, grpc.ForceCodecV2(rawCodec{}))
	ok(t, err)
	w.network.panic = true
	_, err = w.client.PushToRoom(w.context(), big)
	wantError(t, err, codes.Internal, "INTERNAL", "")
	w.spaceIsFree()
	w.network.panic = false
	ok(t, st.CloseSend())
}

// halfCall begins a call whose message claims to be as large as that and does not come.
func halfCall(t *testing.T, w *world, method string, size int) (end func()) {
	t.Helper()
	conn, err := w.dial(w.context(), "")
	ok(t, err)
	f := hello(t, conn)
	go func() { _, _ = io.Copy(io.Discard, conn) }()
	ok(t, f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headersOf(t, map[string]string{":path": method}), EndHeaders: true}))
	head := []byte{0, byte(size >> 24), byte(size >> 16), byte(size >> 8), byte(size)}
	ok(t, f.WriteData(1, false, append(head, make([]byte, smallBody)...)))
	return func() { _ = conn.Close() }
}

// A body that was begun has its place, and gives it back when its caller goes.
func TestBodyThatDoesNotComeGivesItsSpaceBack(t *testing.T) {
	for _, method := range []string{methodRoom, "/pubsub.PushManagerService/PushStream"} {
		t.Run(method, func(t *testing.T) {
			w := newWorld(t, func(c *Config, _ *engine.Config) { c.BodyBytes, c.Streams = 4<<20, 16 })
			end := halfCall(t, w, method, 1<<20)
			for until := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
				if taken, _ := w.server.space.books(); taken >= 2<<20 {
					break
				}
				if time.Now().After(until) {
					t.Fatal("nothing is taken for it")
				}
			}
			end()
			w.spaceIsFree()
		})
	}
}

// PushStreams share the space with unary calls. A stream that finds none is not read, and is
// answered all the same.
func TestPushStreamsShareTheSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bytes = 4 << 20
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.BodyBytes, c.Streams = bytes, 16 })
		n1 := w.network.nodes[0]
		n1.setKeep(true)
		const streams, pushes = 8, 20
		large := strings.Repeat("x", 200<<10)
		var all sync.WaitGroup
		for range streams {
			st := w.stream(w.context())
			all.Go(func() {
				go func() { _ = sendMany(st, pushes, "d", large) }()
				for range pushes {
					if r, err := st.Recv(); err != nil || r.GetError() != nil {
						t.Errorf("%v, %v", r, err)
						return
					}
				}
				if _, err := st.Recv(); !errors.Is(err, io.EOF) {
					t.Errorf("the stream ended with %v", err)
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		if taken, waiting := w.server.space.books(); taken > bytes || waiting == 0 {
			t.Errorf("%d bytes are taken of %d, and %d streams wait", taken, bytes, waiting)
		}
		most := 0
		done := make(chan struct{})
		go func() { all.Wait(); close(done) }()
		for over := false; !over; {
			kept := n1.take()
			n1.setKeep(true)
			most = max(most, len(kept))
			for _, d := range kept {
				ack(d)
			}
			time.Sleep(time.Millisecond)
			select {
			case <-done:
				over = true
			default:
			}
		}
		if most == 0 || most*len(large) > bytes {
			t.Errorf("%d pushes of %d KiB were under way, in %d MiB", most, len(large)>>10, bytes>>20)
		}
		w.spaceIsFree()
	})
}

// A stream whose burst is over gives back what it had for it, while it stays open.
func TestIdlePushStreamGivesItsSpaceBack(t *testing.T) {
	w := newWorld(t, nil)
	w.network.discard()
	n1 := w.network.nodes[0]
	n1.setKeep(true)
	st := w.stream(w.context())
	const burst = 900
	before := heap()
	for i := range burst {
		ok(t, st.Send(userPush(uint64(i), "d", "x")))
	}
	for n1.len() < burst {
		time.Sleep(time.Millisecond)
	}
	if taken, _ := w.server.space.books(); taken < burst*pushBytes-shareFree {
		t.Errorf("%d bytes are taken for %d pushes", taken, burst)
	}
	w.network.ackAll()
	for range burst {
		recv(t, st)
	}
	w.spaceIsFree() // and the stream is open
	for end := time.Now().Add(5 * time.Second); heap()-before > burst<<9; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d pushes are over, and %d KiB of them are kept", burst, (heap()-before)>>10)
		}
	}
	ok(t, st.Send(userPush(1, "d", "x")))
	recv(t, st)
	// A client that goes while pushes are under way has them until they are done.
	n1.setKeep(true)
	ctx, cancel := context.WithCancel(t.Context())
	gone := w.stream(ctx)
	for i := range burst {
		ok(t, gone.Send(userPush(uint64(i), "d", "x")))
	}
	for n1.len() < burst {
		time.Sleep(time.Millisecond)
	}
	cancel()
	for w.metric("push_manager_api_streams") != "1" {
		time.Sleep(time.Millisecond)
	}
	if taken, _ := w.server.space.books(); taken < burst*pushBytes-shareFree {
		t.Errorf("%d bytes are taken for %d pushes of a client that has gone", taken, burst)
	}
	w.network.ackAll()
	w.spaceIsFree()
}

// One message too large ends a PushStream, once all that stood before it is answered.
func TestMessageThatIsTooLargeEndsThePushStream(t *testing.T) {
	w := newWorld(t, nil)
	st := w.stream(w.context())
	ok(t, st.Send(userPush(1, "d", "x")))
	ok(t, st.Send(userPush(2, "d", strings.Repeat("x", 1<<20))))
	if r := recv(t, st); r.GetId() != 1 || !r.GetToUser().GetSuccess() {
		t.Errorf("reply %v", r)
	}
	wantEnd(t, st, codes.ResourceExhausted, "REQUEST_TOO_LARGE", "request")
}

// A client of gRPC that has RESOURCE_EXHAUSTED tried again does not do it with what will never fit.
func TestRequestThatIsTooLargeIsNotTriedAgain(t *testing.T) {
	w := newWorld(t, nil)
	conn := w.connect(grpc.WithDefaultServiceConfig(`{"methodConfig": [{"name": [{"service": "pubsub.PushManagerService"}],
		"retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.001s", "maxBackoff": "0.001s", "backoffMultiplier": 1,
		"retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}`))
	defer conn.Close()
	_, err := pubsub.NewPushManagerServiceClient(conn).PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content(strings.Repeat("x", 1<<20))})
	wantError(t, err, codes.ResourceExhausted, "REQUEST_TOO_LARGE", "request")
	if n := w.metric(`push_manager_api_requests_total{api="PushToUser",status="error"}`); n != "1" {
		t.Errorf("it was tried %s times", n)
	}
}

// A few bytes that would become many are refused before they are anything but a few bytes.
func TestCompressedBombStaysSmall(t *testing.T) {
	w := newWorld(t, nil)
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	zeros := make([]byte, 1<<20)
	for range 12 {
		_, _ = z.Write(zeros)
	}
	ok(t, z.Close())
	message := append([]byte{1}, protowire.AppendFixed32(nil, 0)...)
	for i, b := range []int{24, 16, 8, 0} {
		message[1+i] = byte(bomb.Len() >> b)
	}
	message = append(message, bomb.Bytes()...)
	for _, path := range []string{methodUser, "/pubsub.PushManagerService/PushStream", "/grpc.health.v1.Health/Check"} {
		for _, encoding := range []string{"gzip", ""} { // as it should be, and marked without a name
			fields := map[string]string{":path": path}
			if encoding != "" {
				fields["grpc-encoding"] = encoding
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			header := h2callWith(t, w, fields, message)
			runtime.ReadMemStats(&after)
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 8<<20 { // 2 MiB of it are the connection's
				t.Errorf("%s with %q: %d MiB were allocated for 12", path, encoding, grown>>20)
			}
			if code := header["grpc-status"]; code == "0" || code == "" {
				t.Errorf("%s with %q: answered %v", path, encoding, header)
			}
			if code := header["grpc-status"]; strings.Contains(path, "Push") && encoding == "gzip" && (code != "12" || header["grpc-status-details-bin"] == "") {
				t.Errorf("%s: answered %v, want UNIMPLEMENTED with details", path, header)
			}
		}
	}
}

// Streams are bounded in all and on each connection, and leave room for unary calls.
func TestOpenStreamsAreBounded(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.MaxStreams, c.StreamsPerConnection, c.Streams = 8, 6, 16 })
	open := func(conn *grpc.ClientConn) (pushStream, error) {
		st, err := pubsub.NewPushManagerServiceClient(conn).PushStream(w.context())
		ok(t, err)
		_ = st.Send(userPush(1, "d", "x")) // of one that is refused Recv tells why
		_, err = st.Recv()
		return st, err
	}
	var opened []pushStream
	for range 6 {
		st, err := open(w.conn)
		ok(t, err)
		opened = append(opened, st)
	}
	st, err := open(w.conn)
	wantError(t, err, codes.ResourceExhausted, "TOO_MANY_STREAMS", "")
	if p := st.Trailer().Get("grpc-retry-pushback-ms"); len(p) != 1 {
		t.Errorf("the trailer says %v", p)
	}
	watch, err := healthpb.NewHealthClient(w.conn).Watch(w.context(), &healthpb.HealthCheckRequest{})
	ok(t, err)
	_, err = watch.Recv()
	wantError(t, err, codes.ResourceExhausted, "TOO_MANY_STREAMS", "") // of other services alike
	for range 10 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
		cancel()
		ok(t, err) // beside as many streams as there may be
	}
	other := w.connect()
	defer other.Close()
	for i := range 9 { // of 16 in all normal priority has 14
		_, err := open(other)
		switch {
		case i < 6:
			ok(t, err)
		default:
			wantError(t, err, codes.ResourceExhausted, "TOO_MANY_STREAMS", "")
		}
	}
	third := w.connect()
	defer third.Close()
	for i := range 3 {
		_, err := open(third)
		if i < 2 {
			ok(t, err)
		} else {
			wantError(t, err, codes.ResourceExhausted, "TOO_MANY_STREAMS", "")
		}
	}
	if n := w.metric(`push_manager_refused_total{priority="normal",reason="streams"}`); n != "5" {
		t.Errorf("%s are counted as refused", n)
	}
	// Whoever closes one has its place again.
	ok(t, opened[0].CloseSend())
	_, err = opened[0].Recv()
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err = open(w.conn); err == nil || time.Now().After(until) {
			break
		}
	}
	ok(t, err)
}

func TestOpenCallsAreBoundedByPriority(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.OpenCalls, c.Streams = 16, 64 })
	n1 := w.network.nodes[0]
	st := w.stream(w.context()) // takes no place of a call, nor does its absence give one
	ok(t, st.Send(userPush(1, "d", "x")))
	recv(t, st)
	n1.setKeep(true)
	var all sync.WaitGroup
	for range 14 { // of 16
		all.Go(func() {
			_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
			ok(t, err)
		})
	}
	for n1.len() < 14 {
		time.Sleep(time.Millisecond)
	}
	_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
	wantError(t, err, codes.ResourceExhausted, "OVERLOADED", "")
	_, err = w.client.PushToUser(claim(w.context(), "critical"), &pubsub.PushToUserRequest{UserId: "b", Content: content("x")})
	ok(t, err)
	if n := w.metric(`push_manager_refused_total{priority="normal",reason="open"}`); n != "1" {
		t.Errorf("%s are counted as refused", n)
	}
	w.network.ackAll()
	all.Wait()
}

// Connections that have said hello are bounded, and whoever goes leaves a place.
func TestConnectionsAreBounded(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.Connections, c.ConnectionsPerAddress = 3, 2 })
	call := func(conn *grpc.ClientConn) error {
		_, err := pubsub.NewPushManagerServiceClient(conn).PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
		return err
	}
	first, second, third := w.connect(), w.connect(), w.connect()
	defer first.Close()
	defer third.Close()
	ok(t, call(first))
	ok(t, call(second))
	if err := call(third); status.Code(err) != codes.Unavailable {
		t.Errorf("one too many of an address: %v", err)
	}
	if open, refused := w.metric("push_manager_api_connections"), w.metric("push_manager_api_connections_refused_total"); open != "2" || refused == "0" {
		t.Errorf("%s are open and %s were refused", open, refused)
	}
	ok(t, second.Close())
	var err error
	for until := time.Now().Add(20 * time.Second); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		if err = call(third); err == nil {
			break
		}
	}
	ok(t, err)
	// One whose hello is none, and that gRPC gives up, takes no place for good.
	for range 5 {
		conn, err := w.dial(w.context(), "")
		ok(t, err)
		_, _ = conn.Write([]byte(strings.Repeat("x", 24) + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
		_, _ = io.Copy(io.Discard, conn)
		_ = conn.Close()
	}
	ok(t, call(first))
	for until := time.Now().Add(10 * time.Second); w.metric("push_manager_api_connections") != "2"; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%s are open", w.metric("push_manager_api_connections"))
		}
	}
}

// Callers over their rate who come back when they are told are served in turn, not refused
// again and again.
func TestCallersWhoObeyAreServedInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, clients, cost = 20, 100, 2
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.Rate, c.RateBurst, c.Caller = rate, 2, callerOf })
		began := time.Now()
		var all sync.WaitGroup
		var refusals [clients]int
		for i := range clients {
			all.Go(func() {
				for {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					var trailer metadata.MD
					_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: content("x")}, grpc.Trailer(&trailer))
					cancel()
					if err == nil {
						return
					}
					delay := retryDelay(t, status.Convert(err))
					if got := trailer.Get("grpc-retry-pushback-ms"); !slices.Equal(got, []string{strconv.FormatInt(delay.Milliseconds(), 10)}) {
						t.Errorf("the trailer says %v, RetryInfo %v", got, delay)
					}
					refusals[i]++
					time.Sleep(delay)
				}
			})
		}
		all.Wait()
		took := time.Since(began)
		sum := 0
		for _, n := range refusals {
			sum += n
		}
		t.Logf("all %d were served after %v, refused %d times, one of them %d", clients, took, sum, slices.Max(refusals[:]))
		if most := clients * cost * time.Second / rate * 11 / 10; took > most {
			t.Errorf("all were served after %v, want %v", took, most)
		}
		if n := slices.Max(refusals[:]); n > 2 || sum > clients*11/10 {
			t.Errorf("refused %d times, one of them %d", sum, n)
		}
		// Those who were told to come and do not cost nobody anything.
		for range 50 {
			_, _ = w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
		}
		time.Sleep(time.Second)
		_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
		ok(t, err)
	})
}
