package controller

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

type following = grpc.BidiStreamingServer[pubsub.FollowRoutesRequest, pubsub.FollowRoutesResponse]

// follower is a Controller's side of FollowRoutes: it is in sync at once, sends back
// marks unless it is told not to, and sends what the test wants.
type follower struct {
	send chan *pubsub.FollowRoutesResponse // nil ends the stream
	// Static. What it says that it is a Controller of.
	store string

	mu   sync.Mutex
	deaf bool // sends no marks back, and keeps the last one
	mark uint64
	acks []uint64
	n    int // streams
}

func newFollower() *follower { return &follower{send: make(chan *pubsub.FollowRoutesResponse)} }

func (f *follower) follow(stream following) error {
	f.mu.Lock()
	f.n++
	f.mu.Unlock()
	marks := make(chan uint64, 100)
	go func() {
		for {
			in, err := stream.Recv()
			if err != nil {
				return
			}
			f.mu.Lock()
			if in.GetThrough() != 0 && (len(f.acks) == 0 || f.acks[len(f.acks)-1] != in.GetThrough()) {
				f.acks = append(f.acks, in.GetThrough())
			}
			if in.GetMark() != 0 {
				f.mark = in.GetMark()
				if !f.deaf {
					marks <- f.mark
				}
			}
			f.mu.Unlock()
		}
	}()
	err := stream.Send(&pubsub.FollowRoutesResponse{Changes: &pubsub.WatchRoutesResponse{Synced: true, StoreId: f.store}})
	for err == nil {
		select {
		case <-stream.Context().Done():
			return nil
		case mark := <-marks:
			err = stream.Send(&pubsub.FollowRoutesResponse{Mark: mark})
		case msg := <-f.send:
			if msg == nil {
				return status.Error(codes.Unavailable, "going")
			}
			err = stream.Send(msg)
		}
	}
	return err
}

func (f *follower) set(deaf bool) (lastMark uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.deaf = deaf
	return f.mark
}

func (f *follower) streams() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}

// following runs a test against a Controller that has FollowRoutes.
func followed(t *testing.T, run func(f *follower, c *Controller, l *ledger)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := newFollower()
		v := serve(t, &script{follow: f.follow})
		var l ledger
		c := connect(t, v, Config{})
		c.Start(&l)
		synctest.Wait()
		if !l.is("all", "watched true") || !c.Watched() {
			t.Fatalf("told %q at the start, watched %v", l.lines, c.Watched())
		}
		run(f, c, &l)
		_ = c.Close()
		synctest.Wait()
		if l.trusts() || c.Watched() {
			t.Error("trusted after the end")
		}
		v.down()
	})
}

func TestWordOfAStreamIsGoodForALeaseAfterTheLastMark(t *testing.T) {
	followed(t, func(f *follower, c *Controller, l *ledger) {
		time.Sleep(time.Minute)
		synctest.Wait()
		if !l.trusts() || !c.Watched() || c.watchAge() > markEvery+watchTick {
			t.Fatalf("a stream whose marks come back: trusted %v, watched %v, age %v", l.trusts(), c.Watched(), c.watchAge())
		}
		f.set(true)
		began := time.Now()
		for l.trusts() {
			time.Sleep(time.Millisecond)
		}
		if took := time.Since(began); took < lease-markEvery-watchTick || took > lease {
			t.Errorf("a silent stream was trusted for %v", took)
		}
		time.Sleep(time.Second)
		if c.Watched() || c.m.losses[lossSilent].Get() != 1 || c.watchAge() < lease {
			t.Errorf("watched %v, %d losses, age %v", c.Watched(), c.m.losses[lossSilent].Get(), c.watchAge())
		}
		// The latest mark comes back: everything is applied, nothing has to be forgotten.
		f.send <- &pubsub.FollowRoutesResponse{Mark: f.set(false)}
		synctest.Wait()
		if !l.trusts() || !l.is("all", "watched true") || f.streams() != 1 {
			t.Errorf("told %q on %d streams", l.lines, f.streams())
		}
	})
}

func TestMarkThatComesLateProvesWhatWasWhenItWasSent(t *testing.T) {
	followed(t, func(f *follower, c *Controller, l *ledger) {
		time.Sleep(1500 * time.Millisecond)
		f.set(true)
		time.Sleep(time.Second)
		synctest.Wait()
		mark := f.set(true) // sent half a second ago or so
		time.Sleep(3 * time.Second)
		f.send <- &pubsub.FollowRoutesResponse{Mark: mark}
		synctest.Wait()
		if l.trusts() || c.watchAge() < lease {
			t.Errorf("a mark of %v ago made a word good", c.watchAge())
		}
	})
}

func TestStreamOnWhichNoMarkComesBackIsOpenedAgain(t *testing.T) {
	followed(t, func(f *follower, _ *Controller, l *ledger) {
		f.set(true)
		time.Sleep(silentAfter - time.Second)
		if f.streams() != 1 {
			t.Errorf("%d streams", f.streams())
		}
		f.set(false)
		time.Sleep(time.Second)
		synctest.Wait()
		if !l.trusts() || f.streams() != 1 {
			t.Errorf("a mark came back: trusted %v, %d streams", l.trusts(), f.streams())
		}
		f.set(true)
		time.Sleep(silentAfter + time.Second)
		f.set(false)
		time.Sleep(2 * time.Second)
		if !l.trusts() || f.streams() != 2 {
			t.Errorf("trusted %v, %d streams, want another one", l.trusts(), f.streams())
		}
	})
}

// A Controller that warms up is in sync late, and has been sent no mark before.
func TestStreamThatIsLateInSyncIsNotSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFollower()
		v := serve(t, &script{follow: func(stream following) error {
			time.Sleep(silentAfter + time.Second)
			return f.follow(stream)
		}})
		var l ledger
		c := connect(t, v, Config{})
		c.Start(&l)
		time.Sleep(silentAfter + 2*time.Second)
		synctest.Wait()
		if !l.is("all", "watched true") || f.streams() != 1 || !c.Watched() {
			t.Errorf("told %q on %d streams, watched %v", l.lines, f.streams(), c.Watched())
		}
		_ = c.Close()
		synctest.Wait()
		v.down()
	})
}

func TestWhatIsAppliedIsAcknowledged(t *testing.T) {
	followed(t, func(f *follower, c *Controller, l *ledger) {
		for seq := uint64(1); seq <= 1000; seq++ {
			msg := &pubsub.FollowRoutesResponse{Changes: &pubsub.WatchRoutesResponse{UserIds: []string{"u"}}}
			if seq%3 == 0 { // others are a part of what follows
				msg.Seq = seq
			}
			f.send <- msg
		}
		f.send <- &pubsub.FollowRoutesResponse{Seq: 1001, Changes: &pubsub.WatchRoutesResponse{All: true}}
		synctest.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.acks) == 0 || f.acks[len(f.acks)-1] != 1001 || !slices.IsSorted(f.acks) {
			t.Errorf("acknowledged %v", f.acks)
		}
		if n := int(c.m.acks.Get()); n != len(f.acks) {
			t.Errorf("%d acks came, %d are counted", len(f.acks), n)
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(l.lines) != 2+1001 {
			t.Errorf("%d changes were applied", len(l.lines)-2)
		}
	})
}

// pause stops the one who vouches, as if the process stood still, and runs while it
// does.
func (l *ledger) pause(d time.Duration, meanwhile func()) {
	l.mu.Lock()
	l.stall = d
	l.mu.Unlock()
	time.Sleep(watchTick + time.Millisecond)
	meanwhile()
	time.Sleep(d)
	synctest.Wait()
}

func TestAfterAPauseNothingIsTrustedBeforeAMarkFromAfterIt(t *testing.T) {
	followed(t, func(f *follower, c *Controller, l *ledger) {
		time.Sleep(950 * time.Millisecond)
		f.set(true)
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
		before := f.set(true) // a mark that is on its way when the pause begins
		if before == 0 {
			t.Fatal("no mark was sent")
		}
		l.pause(time.Second, func() {
			time.Sleep(maxPause)
			if l.trusts() {
				t.Error("trusted during the pause, by whoever runs first after it")
			}
		})
		f.send <- &pubsub.FollowRoutesResponse{Mark: before}
		time.Sleep(time.Second)
		if l.trusts() || c.m.losses[lossPaused].Get() != 1 {
			t.Errorf("trusted %v after a pause for a mark from before it, %d losses", l.trusts(), c.m.losses[lossPaused].Get())
		}
		after := f.set(false)
		if after == before {
			t.Fatal("no mark was sent after the pause")
		}
		f.send <- &pubsub.FollowRoutesResponse{Mark: after}
		synctest.Wait()
		if !l.trusts() || !l.is("all", "watched true") {
			t.Errorf("told %q", l.lines)
		}
	})
}

func TestAfterAPauseAMarkIsAskedForAtOnce(t *testing.T) {
	followed(t, func(_ *follower, _ *Controller, l *ledger) {
		time.Sleep(1100 * time.Millisecond)
		l.pause(maxPause, func() {})
		if !l.trusts() {
			t.Error("not trusted, and the Controller answers at once")
		}
	})
}

// A Controller of before has no other proof to give than a new stream.
func TestAfterAPauseAStreamWithoutMarksIsOpenedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		streams := 0
		v := serve(t, &script{watch: func(stream grpc.ServerStreamingServer[pubsub.WatchRoutesResponse]) error {
			streams++
			if err := stream.Send(&pubsub.WatchRoutesResponse{Synced: true}); err != nil {
				return err
			}
			<-stream.Context().Done()
			return nil
		}})
		var l ledger
		c := connect(t, v, Config{})
		c.Start(&l)
		time.Sleep(time.Hour)
		if !l.trusts() || streams != 1 || c.watchAge() != 0 {
			t.Errorf("trusted %v, %d streams, age %v", l.trusts(), streams, c.watchAge())
		}
		l.pause(time.Second, func() {
			time.Sleep(maxPause)
			if l.trusts() {
				t.Error("trusted during the pause")
			}
		})
		if !l.trusts() || !l.is("all", "watched true", "all") || streams != 2 || c.m.losses[lossPaused].Get() != 1 {
			t.Errorf("told %q, %d streams", l.lines, streams)
		}
		_ = c.Close()
		v.down()
	})
}

func TestControllerThatBreaksTheProtocolIsNotTrusted(t *testing.T) {
	for _, tt := range []struct {
		name string
		what fault
		msgs []*pubsub.FollowRoutesResponse
	}{
		{"seq that falls", faultSeq, []*pubsub.FollowRoutesResponse{{Seq: 5}, {Seq: 4}}},
		{"seq that stays", faultSeq, []*pubsub.FollowRoutesResponse{{Seq: 5}, {Seq: 5}}},
		{"mark that was not sent", faultMark, []*pubsub.FollowRoutesResponse{{Mark: 1 << 60}}},
		{"mark that comes twice", faultMark, []*pubsub.FollowRoutesResponse{{Mark: 1}, {Mark: 1}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			followed(t, func(f *follower, c *Controller, l *ledger) {
				f.set(true)
				time.Sleep(markEvery + watchTick)
				for _, msg := range tt.msgs {
					f.send <- msg
				}
				synctest.Wait()
				if l.trusts() || c.m.faults[tt.what].Get() != 1 || c.m.losses[lossBroken].Get() != 1 {
					t.Errorf("trusted %v, %d faults, %d losses", l.trusts(), c.m.faults[tt.what].Get(), c.m.losses[lossBroken].Get())
				}
				f.set(false)
				time.Sleep(2 * time.Second)
				if !l.trusts() || f.streams() != 2 {
					t.Errorf("a new stream: trusted %v, %d streams", l.trusts(), f.streams())
				}
			})
		})
	}
}

func TestPanicOverAMessageEndsTheStreamAlone(t *testing.T) {
	followed(t, func(f *follower, c *Controller, l *ledger) {
		l.mu.Lock()
		l.panics = true
		l.mu.Unlock()
		f.send <- &pubsub.FollowRoutesResponse{Changes: &pubsub.WatchRoutesResponse{All: true}}
		time.Sleep(2 * time.Second)
		if !l.trusts() || c.m.faults[faultPanic].Get() != 1 || f.streams() != 2 {
			t.Errorf("trusted %v, %d panics, %d streams", l.trusts(), c.m.faults[faultPanic].Get(), f.streams())
		}
	})
}

func TestMessageOverTheLimitEndsTheStream(t *testing.T) {
	followed(t, func(f *follower, c *Controller, l *ledger) {
		ids := make([]string, 0, 80_000)
		for range cap(ids) {
			ids = append(ids, string(make([]byte, 250)))
		}
		f.send <- &pubsub.FollowRoutesResponse{Changes: &pubsub.WatchRoutesResponse{UserIds: ids}}
		synctest.Wait()
		if l.trusts() || c.m.losses[lossBroken].Get() != 1 {
			t.Errorf("trusted %v after a change that was not read", l.trusts())
		}
		time.Sleep(2 * time.Second)
		if !l.trusts() || f.streams() != 2 {
			t.Errorf("a new stream: trusted %v, %d streams", l.trusts(), f.streams())
		}
	})
}
