package ingress

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// narrow opens a stream whose client allows no more than 64 KiB of replies that it has not read.
func narrow(t *testing.T, w *world) pushStream {
	t.Helper()
	conn := w.connect(grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))
	t.Cleanup(func() { _ = conn.Close() })
	st, err := pubsub.NewPushManagerServiceClient(conn).PushStream(t.Context())
	ok(t, err)
	return st
}

// hogSize is of the large pushes of hog.
const hogSize = 200 << 10

// hog makes a stream take all of the space: first come pushes whose replies fill the windows, if
// nobody reads them, then large ones, until there is no room for one more.
func hog(st pushStream) {
	for i := range 600 {
		if st.Send(userPush(uint64(i), strings.Repeat("x", 256), "x")) != nil {
			return
		}
	}
	for i := range 40 {
		if st.Send(userPush(uint64(600+i), "d", strings.Repeat("x", hogSize))) != nil {
			return
		}
	}
	_ = st.CloseSend()
}

// Whoever does not read its replies keeps their space while nobody else wants it, and loses it to
// those who wait before they have to be refused.
func TestPushStreamWhoseRepliesAreNotReadLosesItsSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.BodyBytes, c.Streams = 4<<20, 16 })
		st := narrow(t, w)
		go hog(st)
		time.Sleep(time.Hour)
		// How many of the small pushes have a reply, and with it how many large ones have space, is not
		// the same each time.
		taken, _ := w.server.space.books()
		if free := w.server.space.most[engine.Normal.Rank()] - taken; free > messageBytes(hogSize+100, 0) {
			t.Fatalf("%d bytes are free", free)
		}
		if n := w.metric("push_manager_api_streams"); n != "1" {
			t.Fatalf("%s streams are open while nobody wants its space", n)
		}
		for i := range 3 {
			if _, err := w.client.PushToRoom(w.context(), bigPush()); err != nil {
				t.Errorf("honest push %d: %v", i, err)
			}
		}
		var err error
		for err == nil {
			_, err = st.Recv()
		}
		if s := status.Convert(err); s.Code() != codes.DeadlineExceeded || len(s.Details()) > 0 || !strings.Contains(s.Message(), "not read") {
			t.Errorf("it ended with %v and details %v", err, s.Details())
		}
		if n := w.metric(`push_manager_refused_total{priority="normal",reason="unread"}`); n != "1" {
			t.Errorf("%s are counted", n)
		}
		w.spaceIsFree()
	})
}

// Whoever reads slowly is served.
func TestPushStreamWhoseRepliesAreReadSlowlyGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.BodyBytes, c.Streams = 4<<20, 16 })
		slow := narrow(t, w)
		go hog(slow)
		time.Sleep(time.Minute)
		done := make(chan struct{})
		var others sync.WaitGroup
		defer func() { close(done); others.Wait() }()
		others.Go(func() { // they want it all the time
			for big := bigPush(); ; time.Sleep(100 * time.Millisecond) {
				select {
				case <-done:
					return
				default:
					_, _ = w.client.PushToRoom(t.Context(), big)
				}
			}
		})
		wanted := 0
		for range 640 {
			recv(t, slow)
			if w.server.space.wanted() {
				wanted++
			}
			time.Sleep(10 * time.Millisecond)
		}
		if wanted < 100 {
			t.Errorf("others wait for space at %d of 640 replies", wanted)
		}
		wantEnd(t, slow, codes.OK, "", "")
		w.spaceIsFree()
	})
}
