package refcontroller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// settled runs h.settle and gives the time that it took.
func settled(ctx context.Context, h *hub) <-chan time.Duration {
	done, began := make(chan time.Duration, 1), time.Now()
	go func() {
		if h.settle(ctx) == nil {
			done <- time.Since(began)
		}
		close(done)
	}()
	return done
}

func say(t *testing.T, w *watcher, through, mark uint64) {
	t.Helper()
	if err := w.hear(&pubsub.FollowRoutesRequest{Through: through, Mark: mark}, time.Now()); err != nil {
		t.Fatal(err)
	}
}

func TestReportIsAnsweredOnceEveryFollowerHasAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(100)
		if _, ok := <-settled(t.Context(), h); !ok {
			t.Fatal("waited with nobody there")
		}
		one, two, old := h.join(3*time.Second, false), h.join(3*time.Second, false), h.join(0, false)
		h.tell(Change{Users: []string{"u"}})
		done := settled(t.Context(), h)
		synctest.Wait()
		if h.waiting() != 2 {
			t.Fatalf("%d wait", h.waiting())
		}
		time.Sleep(10 * time.Millisecond)
		say(t, one, one.follow(time.Now(), time.Now())[0].GetSeq(), 0)
		time.Sleep(10 * time.Millisecond)
		two.follow(time.Now(), time.Now())
		synctest.Wait()
		select {
		case <-done:
			t.Fatal("answered while a follower does not know")
		default:
		}
		say(t, two, two.sent, 0)
		if took := <-done; took != 20*time.Millisecond {
			t.Errorf("answered after %v", took)
		}
		if len(old.take()) != 1 {
			t.Error("a watcher that does not follow was not told")
		}
		if took := <-settled(t.Context(), h); took != 0 || h.waiting() != 0 {
			t.Errorf("nothing is open, and it took %v, %d wait", took, h.waiting())
		}
	})
}

func TestFollowerThatIsGoneIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(100)
		w := h.join(3*time.Second, false)
		h.tell(Change{Users: []string{"u"}})
		done := settled(t.Context(), h)
		time.Sleep(time.Second)
		h.leave(w)
		if took := <-done; took != time.Second {
			t.Errorf("answered after %v", took)
		}
	})
}

func TestCallerThatLeavesDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(100)
		h.join(3*time.Second, false)
		h.tell(Change{Users: []string{"u"}})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := h.settle(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// A follower that stands still costs one lease, and nothing after that until it has
// caught up.
func TestFollowerThatStandsStillIsWaitedForUntilItsLeaseEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(100)
		w := h.join(3*time.Second, false)
		time.Sleep(time.Second)
		say(t, w, 0, 1)
		if out := w.follow(time.Now(), time.Now()); len(out) != 1 || out[0].GetMark() != 1 {
			t.Fatalf("got %v", out)
		}
		time.Sleep(500 * time.Millisecond)
		h.tell(Change{Users: []string{"u"}})
		first := settled(t.Context(), h)
		time.Sleep(500 * time.Millisecond)
		h.tell(Change{Users: []string{"v"}})
		second := settled(t.Context(), h)
		if took := <-first; took != 2500*time.Millisecond {
			t.Errorf("the first was answered after %v", took)
		}
		if took := <-second; took != 2*time.Second || h.lapses.Get() != 1 {
			t.Errorf("the second was answered after %v, %d lapses", took, h.lapses.Get())
		}
		h.tell(Change{Users: []string{"w"}})
		if took := <-settled(t.Context(), h); took != 0 {
			t.Errorf("waited again for %v", took)
		}

		// It wakes up. Its word is good again once it has acknowledged what it owed.
		say(t, w, 0, 2)
		out := w.follow(time.Now(), time.Now())
		if len(out) != 1 || len(out[0].GetChanges().GetUserIds()) != 3 || out[0].GetMark() != 0 {
			t.Fatalf("got %v", out)
		}
		say(t, w, out[0].GetSeq(), 0)
		if out = w.follow(time.Now(), time.Now()); len(out) != 1 || out[0].GetMark() != 2 {
			t.Fatalf("got %v", out)
		}
		h.tell(Change{Users: []string{"u"}})
		done := settled(t.Context(), h)
		synctest.Wait()
		if h.waiting() != 1 {
			t.Error("not waited for after it caught up")
		}
		say(t, w, w.follow(time.Now(), time.Now())[0].GetSeq(), 0)
		<-done
	})
}

// One that keeps its lease and does not acknowledge holds a report up for a lease and
// a second.
func TestLeaseOfOneThatDoesNotAcknowledgeIsNotRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(100)
		w := h.join(3*time.Second, false)
		stop := make(chan struct{})
		go func() {
			tick := time.NewTicker(99 * time.Millisecond)
			defer tick.Stop()
			for mark := uint64(1); ; mark++ {
				select {
				case <-stop:
					return
				case <-tick.C:
				}
				_ = w.hear(&pubsub.FollowRoutesRequest{Mark: mark}, time.Now())
				w.follow(time.Now(), time.Now())
			}
		}()
		defer close(stop)
		for i := range 3 {
			h.tell(Change{Users: []string{"u"}})
			took := <-settled(t.Context(), h)
			if i == 0 && (took < 3*time.Second || took > 4*time.Second) || i > 0 && took != 0 {
				t.Errorf("report %d was answered after %v", i, took)
			}
		}
	})
}

// One that is late with each acknowledgement loses its say for most of the time, and gets it
// back when it is in time.
func TestFollowerThatIsLateAgainAndAgainIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lease = 3 * time.Second
		h := newHub(10_000)
		w := h.join(lease, false)
		say := func(through, mark uint64) {
			if err := w.hear(&pubsub.FollowRoutesRequest{Through: through, Mark: mark}, time.Now()); err != nil {
				t.Error(err)
			}
		}
		var delay atomic.Int64
		delay.Store(int64(1500 * time.Millisecond))
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() { // the follower
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			for mark := uint64(1); ; {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					say(0, mark)
					mark++
				case <-w.wake:
					for _, out := range w.follow(time.Now(), time.Now()) {
						if seq := out.GetSeq(); seq != 0 {
							time.AfterFunc(time.Duration(delay.Load()), func() { say(seq, 0) })
						}
					}
				}
			}
		})
		slow := func(during time.Duration) (share float64) {
			reports, n := 0, atomic.Int64{}
			for end := time.Now().Add(during); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				reports++
				h.tell(Change{Users: []string{"u"}})
				all.Go(func() {
					began := time.Now()
					if h.settle(ctx) == nil && time.Since(began) > time.Second {
						n.Add(1)
					}
				})
			}
			time.Sleep(2 * lease)
			return float64(n.Load()) / float64(reports)
		}
		if share := slow(2 * time.Minute); share > 0.4 {
			t.Errorf("%.0f %% of all reports took longer than a second", 100*share)
		}
		delay.Store(0)
		time.Sleep(muteLeases*lease + time.Second)
		if share := slow(time.Minute); share != 0 || h.waiting() != 0 {
			t.Errorf("in time again, and %.0f %% of all reports took longer than a second", 100*share)
		}
		w.mu.Lock()
		if !time.Now().Before(w.trusted) {
			t.Error("in time again, and without a say")
		}
		w.mu.Unlock()
		cancel()
		all.Wait()
	})
}

func TestMarkIsBehindEverythingFromBeforeIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(100_000)
		w := h.join(3*time.Second, false)
		var c Change
		for i := range 3 * frameNames {
			c.Users = append(c.Users, fmt.Sprint(i))
		}
		h.tell(c)
		say(t, w, 0, 7)
		say(t, w, 0, 8)
		out := w.follow(time.Now(), time.Now())
		for i, frame := range out {
			last := i == len(out)-1
			if last != (frame.GetMark() == 8) || last != (frame.GetSeq() != 0) {
				t.Errorf("message %d of %d has seq %d and mark %d", i, len(out), frame.GetSeq(), frame.GetMark())
			}
		}
		if out := w.follow(time.Now(), time.Now()); len(out) != 0 {
			t.Errorf("sent twice: %v", out)
		}
	})
}

// manager is a follower at the end of a way that may be slow or stand still in either
// direction, and the rule by which Push-Manager trusts its cache.
type manager struct {
	mu      sync.Mutex
	applied map[string]int // the last version heard of
	trusted time.Time
}

// Whatever the ways do: when a report is answered, nobody trusts what was before it.
func TestWhoeverTrustsHasHeardWhenAReportIsAnswered(t *testing.T) {
	for seed := range uint64(30) {
		synctest.Test(t, func(t *testing.T) { tellMany(t, rand.New(rand.NewPCG(seed, 0))) })
	}
}

func tellMany(t *testing.T, rng *rand.Rand) {
	const lease = 3 * time.Second
	ctx, cancel := context.WithCancel(t.Context())
	var loops, reports sync.WaitGroup
	h := newHub(50)
	var all []*manager
	for range 1 + rng.IntN(3) {
		m := &manager{applied: map[string]int{}}
		all = append(all, m)
		down := make(chan *pubsub.FollowRoutesResponse, 10_000)
		up := make(chan *pubsub.FollowRoutesRequest, 10_000)
		m.trusted = time.Now().Add(lease)
		w := h.join(lease, false)
		seed := rng.Uint64()
		way := func() func() { // each end of a way has its own weather
			seed++
			rng := rand.New(rand.NewPCG(seed, 1))
			return func() {
				switch n := rng.IntN(100); {
				case n == 0:
					time.Sleep(time.Duration(rng.IntN(8000)) * time.Millisecond)
				case n < 20:
					time.Sleep(time.Duration(rng.IntN(50)) * time.Millisecond)
				}
			}
		}
		slowDown, slowUp, slowSend := way(), way(), way()
		loops.Go(func() { // the Controller's sender
			for {
				select {
				case <-ctx.Done():
					return
				case <-w.wake:
					out := w.follow(time.Now(), time.Now())
					slowSend()
					for _, frame := range out {
						down <- frame
					}
				}
			}
		})
		loops.Go(func() { // and its reader
			for {
				select {
				case <-ctx.Done():
					return
				case in := <-up:
					slowUp()
					if err := w.hear(in, time.Now()); err != nil {
						t.Error(err)
					}
				}
			}
		})
		loops.Go(func() { // Push-Manager
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			marks := map[uint64]time.Time{}
			for mark := uint64(1); ; {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					marks[mark] = time.Now()
					up <- &pubsub.FollowRoutesRequest{Mark: mark}
					mark++
				case in := <-down:
					slowDown()
					m.mu.Lock()
					for _, version := range in.GetChanges().GetUserIds() {
						var user string
						var n int
						_, _ = fmt.Sscanf(version, "%1s%d", &user, &n)
						m.applied[user] = max(m.applied[user], n)
					}
					if in.GetChanges().GetAll() {
						for _, user := range []string{"a", "b", "c"} {
							m.applied[user] = 1 << 30
						}
					}
					if at, ok := marks[in.GetMark()]; ok {
						m.trusted = at.Add(lease)
					}
					m.mu.Unlock()
					if in.GetSeq() != 0 {
						up <- &pubsub.FollowRoutesRequest{Through: in.GetSeq()}
					}
				}
			}
		})
	}
	for _, user := range []string{"a", "b", "c"} {
		seed := rng.Uint64()
		reports.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 2))
			for n := 1; n < 40; n++ {
				time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
				began := time.Now()
				h.tell(Change{Users: []string{fmt.Sprint(user, n)}})
				if err := h.settle(ctx); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > lease+ackWithin {
					t.Errorf("a report took %v", took)
				}
				for _, m := range all {
					m.mu.Lock()
					if m.applied[user] < n && time.Now().Before(m.trusted) {
						t.Errorf("%s%d is told, a follower knows %d and trusts it for %v", user, n, m.applied[user], time.Until(m.trusted))
					}
					m.mu.Unlock()
				}
			}
		})
	}
	reports.Wait()
	cancel()
	loops.Wait()
}

// follow opens a stream of a follower that is in sync.
func (b *bench) follow(lease uint32) grpc.BidiStreamingClient[pubsub.FollowRoutesRequest, pubsub.FollowRoutesResponse] {
	b.t.Helper()
	stream, err := b.FollowRoutes(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	if err := stream.Send(&pubsub.FollowRoutesRequest{LeaseMs: lease}); err != nil {
		b.t.Fatal(err)
	}
	if first, err := stream.Recv(); err != nil || !first.GetChanges().GetSynced() {
		b.t.Fatalf("got %v, %v", first, err)
	}
	return stream
}

// Each kind of report waits until followers know.
func TestReportsWaitForFollowers(t *testing.T) {
	for _, kind := range []struct {
		name   string
		report func(b *bench) error
	}{
		{"join", func(b *bench) error {
			_, err := b.JoinRoom(b.t.Context(), &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n2"})
			return err
		}},
		{"leave", func(b *bench) error {
			_, err := b.LeaveRoom(b.t.Context(), &pubsub.LeaveRoomRequest{UserId: "u", RoomId: "r", NodeId: "n"})
			return err
		}},
		{"node", func(b *bench) error {
			_, err := b.LeaveRoom(b.t.Context(), &pubsub.LeaveRoomRequest{NodeId: "n"})
			return err
		}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			b := start(t, Config{})
			b.join("u", "r", "n")
			stream := b.follow(10_000)
			done := make(chan error, 1)
			go func() { done <- kind.report(b) }()
			msg, err := stream.Recv()
			if err != nil || len(msg.GetChanges().GetUserIds()) != 1 || msg.GetSeq() == 0 {
				t.Fatalf("got %v, %v", msg, err)
			}
			eventually(t, "the report waits", func() bool { return b.server.svc.hub.waiting() == 1 })
			select {
			case err := <-done:
				t.Fatalf("answered before it was acknowledged: %v", err)
			default:
			}
			// The same report again, as of a caller that gave up, is no way round.
			again := make(chan error, 1)
			go func() { again <- kind.report(b) }()
			eventually(t, "the second report waits", func() bool { return b.server.svc.hub.waiting() == 2 })
			if err := stream.Send(&pubsub.FollowRoutesRequest{Through: msg.GetSeq(), Mark: 1}); err != nil {
				t.Fatal(err)
			}
			for _, c := range []chan error{done, again} {
				if err := <-c; err != nil {
					t.Fatal(err)
				}
			}
			if msg, err := stream.Recv(); err != nil || msg.GetMark() != 1 || msg.GetSeq() != 0 {
				t.Errorf("got %v, %v", msg, err)
			}
			// Who closes the stream in order is gone.
			_ = stream.CloseSend()
			if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
				t.Errorf("got %v", err)
			}
			eventually(t, "nobody follows", func() bool { return b.server.svc.hub.len() == 0 })
		})
	}
}

func TestFollowerThatLiesIsCutOff(t *testing.T) {
	b := start(t, Config{})
	for name, frames := range map[string][]*pubsub.FollowRoutesRequest{
		"no lease":        {{}},
		"too long":        {{LeaseMs: 10_001}},
		"never sent":      {{LeaseMs: 1000}, {Through: 1}},
		"falling mark":    {{LeaseMs: 1000}, {Mark: 2}, {Mark: 1}},
		"mark comes back": {{LeaseMs: 1000}, {Mark: 2}, {Mark: 2}},
	} {
		stream, err := b.FollowRoutes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, frame := range frames {
			_ = stream.Send(frame)
		}
		for err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: got %v", name, err)
		}
	}
	eventually(t, "nobody follows", func() bool { return b.server.svc.hub.len() == 0 })
	b.join("u", "r", "n")
}

func TestDrainEndsFollowing(t *testing.T) {
	b := start(t, Config{})
	stream := b.follow(10_000)
	done := make(chan error, 1)
	go func() {
		_, err := b.JoinRoom(t.Context(), &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n"})
		done <- err
	}()
	eventually(t, "the report waits", func() bool { return b.server.svc.hub.waiting() == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := b.server.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("the report under way: %v", err)
	}
	var err error
	for err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
}
