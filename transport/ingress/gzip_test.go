package ingress

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

func withGzip(c *Config, _ *engine.Config) { c.Gzip = true }

func zipped(t testing.TB, message []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write(message)
	ok(t, err)
	ok(t, z.Close())
	return b.Bytes()
}

// enveloped is a compressed message as gRPC has it.
func enveloped(body []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{1}, uint32(len(body))), body...)
}

func TestCompressedRequestsAreWhatTheyBecome(t *testing.T) {
	w := newWorld(t, withGzip)
	n1 := w.network.nodes[0]
	noise := make([]byte, 200<<10)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	texts := []string{"", "x", strings.Repeat("much of the same ", 10<<10), string(noise), string(noise[:5<<10])}
	use := grpc.UseCompressor("gzip")
	for _, text := range texts {
		r, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content(text)}, use)
		if err != nil || !r.GetSuccess() {
			t.Fatalf("%d bytes: %v, %v", len(text), r, err)
		}
	}
	st, err := w.client.PushStream(w.context(), use)
	ok(t, err)
	for i, text := range texts {
		ok(t, st.Send(userPush(uint64(i+1), "a", text)))
	}
	ok(t, st.Send(batchOf(userPush(11, "a", "eleven"), userPush(12, "a", "twelve"))))
	ok(t, st.CloseSend())
	for answered := 0; answered < len(texts)+2; {
		r := recv(t, st)
		for _, one := range append(r.GetBatch(), r) {
			if one.GetError() != nil || one.GetId() != 0 && !one.GetToUser().GetSuccess() {
				t.Errorf("answered %v", one)
			}
			answered += min(int(one.GetId()), 1)
		}
	}
	wantEnd(t, st, codes.OK, "", "")
	want := slices.Concat(texts, texts, []string{"eleven", "twelve"})
	got := n1.payloads()
	if len(got) != len(want) {
		t.Fatalf("%d pushes arrived, want %d", len(got), len(want))
	}
	for i, text := range want {
		var c pubsub.MessageContent
		ok(t, c.UnmarshalVT(got[i]))
		if string(c.GetData()) != text {
			t.Errorf("push %d: %d bytes arrived of %d", i, len(c.GetData()), len(text))
		}
	}
	if _, err := healthpb.NewHealthClient(w.conn).Check(w.context(), &healthpb.HealthCheckRequest{}, use); err != nil {
		t.Errorf("health: %v", err)
	}
	if r, err := w.client.Explain(w.context(), &pubsub.ExplainRequest{Push: &pubsub.ExplainRequest_ToUser{ToUser: &pubsub.PushToUserRequest{UserId: "a", Content: content("x")}}}, use); err != nil {
		t.Errorf("explain: %v, %v", r, err)
	}
	w.spaceIsFree()
	// A compressor is registered in this program. Replies are plain all the same.
	request := zipped(t, marshal(t, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")}))
	for path, message := range map[string][]byte{methodUser: request, "/grpc.health.v1.Health/Check": zipped(t, nil)} {
		header := h2callWith(t, w, map[string]string{":path": path, "grpc-encoding": "gzip"}, enveloped(message))
		if e := header["grpc-encoding"]; header["grpc-status"] != "0" || e != "" && e != "identity" {
			t.Errorf("%s: answered %v", path, header)
		}
	}
}

// What a compressed request becomes is bounded as one that comes as it is, before any of it is there.
func TestCompressedRequestsAreBoundedByWhatTheyBecome(t *testing.T) {
	w := newWorld(t, withGzip)
	bomb := zipped(t, make([]byte, 16<<20))
	lying := slices.Clone(bomb)
	binary.LittleEndian.PutUint32(lying[len(lying)-4:], 100)
	large := slices.Clone(bomb)
	binary.LittleEndian.PutUint32(large[len(large)-4:], 1<<20)
	request := zipped(t, marshal(t, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")}))
	wrong := slices.Clone(request)
	wrong[len(wrong)-5] ^= 1 // of the checksum
	largest := marshal(t, bigPush())
	for name, tc := range map[string]struct {
		message []byte
		code    string
		reason  string
	}{
		"bomb":                       {enveloped(bomb), "8", "REQUEST_TOO_LARGE"},
		"bomb that says it is small": {enveloped(lying), "3", "MALFORMED"},
		"bomb that says it fits":     {enveloped(large), "3", "MALFORMED"},
		"a byte too many":            {enveloped(zipped(t, make([]byte, 1<<20+1))), "8", "REQUEST_TOO_LARGE"},
		"no gzip":                    {enveloped(append(bytes.Repeat([]byte{7}, 96), 100, 0, 0, 0)), "3", "MALFORMED"},
		"nothing":                    {enveloped(nil), "3", "MALFORMED"},
		"cut short":                  {enveloped(request[:len(request)-1]), "3", "MALFORMED"},
		"wrong checksum":             {enveloped(wrong), "3", "MALFORMED"},
		"two members":                {enveloped(slices.Concat(request, request)), "3", "MALFORMED"},
		"something behind it":        {enveloped(append(slices.Clone(request), request[len(request)-4:]...)), "3", "MALFORMED"},
		"another flag":               {append([]byte{3}, enveloped(request)[1:]...), "3", "MALFORMED"},
		"not compressed":             {append([]byte{0}, enveloped(marshal(t, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")}))[1:]...), "0", ""},
	} {
		for _, path := range []string{methodUser, "/pubsub.PushManagerService/PushStream", "/pubsub.PushManagerService/ForgetUser"} {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			header := h2callWith(t, w, map[string]string{":path": path, "grpc-encoding": "gzip"}, tc.message)
			runtime.ReadMemStats(&after)
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 12<<20 { // 2 MiB of it are the connection's, 4 what is announced
				t.Errorf("%s, %s: %d MiB were allocated", name, path, grown>>20)
			}
			if path != methodUser { // they want other requests
				if code := header["grpc-status"]; code == "" || tc.code == "8" && code != "8" && code != "3" { // of ForgetUser 4 KiB are too large
					t.Errorf("%s, %s: answered %v", name, path, header)
				}
				continue
			}
			if header["grpc-status"] != tc.code || tc.reason != "" && !strings.Contains(header["grpc-message"], "request") {
				t.Errorf("%s: answered %v, want %s", name, header, tc.code)
			}
		}
	}
	if header := h2callWith(t, w, map[string]string{":path": methodUser, "grpc-encoding": "deflate"}, enveloped(request)); header["grpc-status"] != "12" {
		t.Errorf("deflate: answered %v, want UNIMPLEMENTED", header)
	}
	if header := h2callWith(t, w, map[string]string{":path": methodRoom, "grpc-encoding": "gzip"}, enveloped(zipped(t, largest))); header["grpc-status"] != "0" {
		t.Errorf("the largest: answered %v", header)
	}
	w.spaceIsFree()
}

// A request takes memory for what it becomes, as it does if it comes as it is.
func TestCompressedRequestsTakeTheSpaceOfWhatTheyBecome(t *testing.T) {
	w := newWorld(t, withGzip)
	n1 := w.network.nodes[0]
	n1.setKeep(true)
	taken := func(options ...grpc.CallOption) int64 {
		done := make(chan error, 1)
		go func() {
			_, err := w.client.PushToRoom(w.context(), bigPush(), options...)
			done <- err
		}()
		for n1.len() == 0 {
			runtime.Gosched()
		}
		taken, _ := w.server.space.books()
		for _, d := range n1.take() {
			ack(d)
		}
		n1.setKeep(true)
		ok(t, <-done)
		return taken
	}
	if plain, compressed := taken(), taken(grpc.UseCompressor("gzip")); plain == 0 || plain != compressed {
		t.Errorf("%d bytes as it is, %d compressed", plain, compressed)
	}
	w.spaceIsFree()
}

// FuzzGzip sends anything as a compressed request: it is answered as what it becomes is, or refused as a wrong one.
func FuzzGzip(f *testing.F) {
	w := newWorld(f, withGzip)
	push := marshal(f, &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
	f.Add(zipped(f, push))
	f.Add(zipped(f, bytes.Repeat(push, 1000)))
	f.Add(zipped(f, make([]byte, 2<<20)))
	f.Add(slices.Concat(zipped(f, push), zipped(f, nil)))
	f.Add(push)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 32<<10 {
			return
		}
		w := &world{t: t, dial: w.dial}
		header := h2callWith(t, w, map[string]string{":path": methodUser, "grpc-encoding": "gzip"}, enveloped(b))
		from := bytes.NewReader(b)
		var becomes []byte
		z, err := gzip.NewReader(from)
		if err == nil {
			z.Multistream(false)
			becomes, err = io.ReadAll(io.LimitReader(z, 2<<20))
		}
		switch {
		case err != nil || from.Len() > 0 || len(becomes) > 1<<20:
			if code := header["grpc-status"]; code != "3" && code != "8" {
				t.Errorf("answered %v to %d bytes that are no gzip", header, len(b))
			}
		default:
			plain := h2callWith(t, w, map[string]string{":path": methodUser}, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(becomes))), becomes...))
			if header["grpc-status"] != plain["grpc-status"] || header["grpc-message"] != plain["grpc-message"] {
				t.Errorf("answered %v, and uncompressed %v", header, plain)
			}
		}
	})
}

// TestLargeRequestsAreConvertedInTurns: whatever comes compressed, half of the cores decompress it.
func TestLargeRequestsAreConvertedInTurns(t *testing.T) {
	w := newWorld(t, withGzip)
	n1 := w.network.nodes[0]
	if n := cap(w.server.turns); n > max(runtime.GOMAXPROCS(0)/2, 1) {
		t.Errorf("%d are converted at a time", n)
	}
	for range cap(w.server.turns) {
		w.server.turns <- struct{}{}
	}
	use := grpc.UseCompressor("gzip")
	large := func(text string) *pubsub.PushToUserRequest {
		return &pubsub.PushToUserRequest{UserId: "a", Content: content(text + strings.Repeat(" ", 8<<10))}
	}
	st, err := w.client.PushStream(w.context(), use)
	ok(t, err)
	ok(t, st.Send(&pubsub.PushStreamRequest{Id: 1, Push: &pubsub.PushStreamRequest_ToUser{ToUser: large("stream")}}))
	gone, leave := context.WithCancel(w.context())
	var calls sync.WaitGroup
	calls.Go(func() {
		_, err := w.client.PushToUser(w.context(), large("unary"), use)
		wantError(t, err, codes.ResourceExhausted, "OVERLOADED", "")
	})
	calls.Go(func() {
		_, err := w.client.PushToUser(gone, large("gone"), use)
		wantError(t, err, codes.Canceled, "", "")
	})
	for _, text := range []string{"small", strings.Repeat("x", 8<<10)} {
		options := []grpc.CallOption{use}
		if len(text) > smallBody {
			options = nil // as it is
		}
		if r, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content(text)}, options...); err != nil || !r.GetSuccess() {
			t.Errorf("beside them: %v, %v", r, err)
		}
	}
	leave()
	calls.Wait()
	for range cap(w.server.turns) {
		<-w.server.turns
	}
	if r := recv(t, st); r.GetId() != 1 || !r.GetToUser().GetSuccess() {
		t.Errorf("answered %v", r)
	}
	ok(t, st.CloseSend())
	wantEnd(t, st, codes.OK, "", "")
	if n := len(n1.payloads()); n != 3 {
		t.Errorf("%d pushes arrived, want two from beside and the stream's", n)
	}
	w.spaceIsFree()
}
