package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// bubble runs a test in virtual time.
func bubble(t *testing.T, f func(t *testing.T)) { t.Helper(); synctest.Test(t, f) }

func reasons(r engine.Result) string {
	var list []string
	for _, f := range r.NodeFailures {
		list = append(list, f.Reason)
	}
	return strings.Join(list, "; ")
}

func TestPushesArriveAndAreAcknowledged(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		n := w.start("a:1", &fakeNode{id: "A"})
		w.register("A", "a:1")
		w.up(2)
		w.room("r", "A", "u1", "u2", "u3")
		if r := w.do(w.toUser("u1", "one")); r.Delivered != 1 {
			t.Errorf("user: %+v", r)
		}
		if r := w.do(w.toRoom("r", "two")); r.Delivered != 3 {
			t.Errorf("room: %+v", r)
		}
		if r := w.do(w.toRoom("r", "three", "u2")); r.Delivered != 2 {
			t.Errorf("room with exclude: %+v", r)
		}
		if r := w.do(w.toRoom("r", "four", "u1", "u2")); r.Delivered != 1 {
			t.Errorf("room with most excluded: %+v", r)
		}
		want := []string{"u1 one", "u1 two", "u2 two", "u3 two", "u1 three", "u3 three", "u3 four"}
		if got := n.received(t); !slices.Equal(got, want) {
			t.Errorf("arrived: %q", got)
		}
		if st := w.set.Stats(); st.Queued+st.QueuedBytes+st.Unacked+st.UnackedBytes != 0 {
			t.Errorf("left over: %+v", st)
		}
	})
}

func TestPushesQueuedWhileConnectingGoInOneFrameInOrder(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A", gate: make(chan struct{})})
		w.register("A", "a:1")
		w.room("r", "A", "u1")
		var started []*pending
		var want []string
		for i := range 60 {
			started = append(started, w.begin(w.toUser("u1", fmt.Sprint(i))))
			want = append(want, fmt.Sprint("u1 ", i))
		}
		synctest.Wait()
		close(n.gate)
		for _, f := range started {
			if r := w.end(f); r.Delivered != 1 {
				t.Fatalf("%+v", r)
			}
		}
		if got := n.received(t); !slices.Equal(got, want) {
			t.Errorf("arrived: %q", got)
		}
		if frames := n.sent(); len(frames) != 1 {
			t.Errorf("%d frames", len(frames))
		}
	})
}

func TestIdleStreamsStayUpOnHeartbeats(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A"})
		w.register("A", "a:1")
		time.Sleep(time.Minute)
		if n.opened() != 1 || w.set.Stats().Live != 1 {
			t.Errorf("%d streams in a minute", n.opened())
		}
		if beats := len(n.all()); beats < 55 || beats > 61 {
			t.Errorf("%d heartbeats in a minute", beats)
		}
	})
}

func TestNodeWithoutHeartbeatsIsClosedAfterSilence(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A", deaf: true})
		w.register("A", "a:1")
		time.Sleep(3200 * time.Millisecond)
		if n.opened() != 2 {
			t.Errorf("%d streams", n.opened())
		}
	})
}

func TestAcksMayComeOutOfOrderAndInParts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		var held []*pubsub.AckRange
		n := &fakeNode{id: "A", gate: make(chan struct{})}
		n.answer = func(seq uint64, users []string, text string, r *pubsub.DeliverResponse) {
			held = append(held, &pubsub.AckRange{First: seq, Delivered: []uint32{1}})
			if seq == 20 {
				slices.Reverse(held)
				r.Acks = held
				r.Misses = []*pubsub.Miss{
					{Seq: 7, Failed: []string{"u1"}, Reason: "full"}, {Seq: 3, NotHere: []string{"u1"}},
				}
				held[20-7].Delivered[0], held[20-3].Delivered[0] = 0, 0
			}
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.room("r", "A", "u1")
		var started []*pending
		for i := range 20 {
			started = append(started, w.begin(w.toUser("u1", fmt.Sprint(i+1))))
		}
		synctest.Wait()
		close(n.gate)
		for i, f := range started {
			r := w.end(f)
			want := engine.Result{Found: true, Targets: 1, Delivered: 1}
			switch i + 1 {
			case 3:
				want = engine.Result{Found: true, Targets: 1, Offline: 1}
			case 7:
				want = engine.Result{Found: true, Targets: 1, Failed: 1}
			}
			r.NodeFailures = nil
			if i+1 == 3 {
				r.Found = true
			}
			if fmt.Sprint(r) != fmt.Sprint(want) {
				t.Errorf("push %d: %+v", i+1, r)
			}
		}
	})
}

func TestThreeViolationsQuarantineTheLink(t *testing.T) {
	lies := map[string]func(seq uint64, r *pubsub.DeliverResponse){
		"more than asked for": func(seq uint64, r *pubsub.DeliverResponse) {
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{1 << 31}})
		},
		"users not asked for": func(seq uint64, r *pubsub.DeliverResponse) {
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{0}})
			r.Misses = append(r.Misses, &pubsub.Miss{Seq: seq, NotHere: []string{"stranger"}})
		},
	}
	for name, lie := range lies {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				n := &fakeNode{id: "A"}
				var honest atomic.Bool
				n.answer = func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
					if honest.Load() {
						r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{1}})
						return
					}
					lie(seq, r)
				}
				w.start("a:1", n)
				w.register("A", "a:1")
				w.up(1)
				w.room("r", "A", "u1")
				for range 3 {
					if r := w.do(w.toUser("u1", "x")); r.Unknown != 1 {
						t.Errorf("after a lie: %+v", r)
					}
				}
				synctest.Wait()
				if r := w.do(w.toUser("u1", "x")); r.Failed != 1 {
					t.Errorf("in quarantine: %+v", r)
				}
				time.Sleep(59 * time.Second)
				if w.set.Reachable() != 0 {
					t.Error("out of quarantine too early")
				}
				honest.Store(true)
				time.Sleep(2 * time.Second)
				if r := w.do(w.toUser("u1", "x")); r.Delivered != 1 {
					t.Errorf("after quarantine: %+v", r)
				}
			})
		})
	}
}

func TestAcksOfWhatIsNotOwedAreStrikes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		n.answer = func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
			r.Acks = append(r.Acks,
				&pubsub.AckRange{First: seq, Delivered: []uint32{1, 1}}, // the second was never sent
				&pubsub.AckRange{First: seq, Delivered: []uint32{1}},    // again
				&pubsub.AckRange{First: 1 << 60, Delivered: []uint32{1}})
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		if r := w.do(w.toUser("u1", "x")); r.Delivered != 1 {
			t.Errorf("%+v", r)
		}
		synctest.Wait()
		if got := w.set.meters.strikes.Get(); got != 3 {
			t.Errorf("%d strikes", got)
		}
		if w.set.Reachable() != 0 {
			t.Error("not in quarantine")
		}
	})
}

// TestFloodsFromANodeEndItsStream: a node that sends whatever it likes, as fast as it can,
// costs its own users their pushes and nobody else.
func TestFloodsFromANodeEndItsStream(t *testing.T) {
	for name, test := range map[string]struct {
		frame *pubsub.DeliverResponse
		lies  bool // and costs the node its streams for a while
	}{
		"acks of what was never sent":    {&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1 << 40, Delivered: []uint32{1}}}}, true},
		"misses without their acks":      {&pubsub.DeliverResponse{Misses: []*pubsub.Miss{{Seq: 1, NotHere: []string{"u1"}}}}, true},
		"answers to heartbeats not sent": {&pubsub.DeliverResponse{Heartbeat: 1 << 40}, true},
		"more acks than can be owed":     {&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: make([]uint32, 100_000)}}}, false},
		"frames larger than may be":      {&pubsub.DeliverResponse{Misses: []*pubsub.Miss{{Seq: 1, Reason: strings.Repeat("x", receiveMax)}}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				n := &fakeNode{id: "A"}
				var floods atomic.Int32
				stopped := make(chan struct{})
				n.deliver = func(st deliverStream) error {
					if floods.Add(1) > 1 {
						return n.serve(st)
					}
					defer close(stopped)
					if _, err := n.greet(st); err != nil {
						return err
					}
					for {
						f, err := st.Recv()
						if err != nil {
							return err
						}
						if len(f.GetDeliveries()) > 0 {
							break
						}
					}
					for {
						if err := st.Send(test.frame); err != nil {
							return err
						}
					}
				}
				w.start("a:1", n)
				w.start("b:1", &fakeNode{id: "B"})
				w.register("A", "a:1", "B", "b:1")
				w.up(2)
				w.room("r", "A", "u1")
				w.room("s", "B", "v1")
				if r := w.do(w.toUser("u1", "x")); r.Unknown != 1 {
					t.Errorf("what the flood was about: %+v", r)
				}
				<-stopped
				synctest.Wait()
				if r := w.do(w.toUser("v1", "x")); r.Delivered != 1 {
					t.Errorf("the other node's user: %+v", r)
				}
				quarantines := w.set.meters.quarantines.Get()
				if (quarantines == 1) != test.lies {
					t.Errorf("%d quarantines", quarantines)
				}
				time.Sleep(2 * time.Minute)
				if r := w.do(w.toUser("u1", "x")); r.Delivered != 1 {
					t.Errorf("once the node behaves: %+v", r)
				}
			})
		})
	}
}

func TestBroadcastIsClampedToTheUsersOnline(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		n.answer = func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{1_000_000_000}})
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		if r := w.do(w.toAll("x")); r.Delivered != 3 {
			t.Errorf("%+v", r)
		}
	})
}

// What bounds a broadcast's claim is the node's own word, so that has a bound as well.
func TestNodeCannotClaimAnyNumberOfUsers(t *testing.T) {
	serve := func(n *fakeNode, greeting, later uint32) func(deliverStream) error {
		n.hello = &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A", BootId: "b", OnlineUsers: greeting}
		return func(st deliverStream) error {
			if _, err := n.greet(st); err != nil {
				return err
			}
			for {
				f, err := st.Recv()
				if err != nil {
					return err
				}
				r := &pubsub.DeliverResponse{Heartbeat: f.GetHeartbeat(), OnlineUsers: later}
				for i := range f.GetDeliveries() {
					r.Acks = append(r.Acks, &pubsub.AckRange{First: f.GetFirstSeq() + uint64(i), Delivered: []uint32{math.MaxUint32}})
				}
				if err := st.Send(r); err != nil {
					return err
				}
			}
		}
	}
	t.Run("in its hello", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, Config{})
			n := &fakeNode{id: "A"}
			n.deliver = serve(n, math.MaxUint32, math.MaxUint32)
			w.start("a:1", n)
			w.register("A", "a:1")
			time.Sleep(time.Second)
			if r := w.do(w.toAll("x")); r.Delivered != 0 || r.Success() {
				t.Errorf("%+v", r)
			}
			if time.Sleep(58 * time.Second); w.dialed() != 1 {
				t.Errorf("dialed %d times within a minute", w.dialed())
			}
		})
	})
	t.Run("with heartbeats", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, Config{})
			n := &fakeNode{id: "A"}
			n.deliver = serve(n, 3, math.MaxUint32)
			w.start("a:1", n)
			w.register("A", "a:1")
			w.up(1)
			if r := w.do(w.toAll("x")); r.Delivered > 3 {
				t.Errorf("%+v", r)
			}
			time.Sleep(4 * time.Second)
			if w.set.Reachable() != 0 || w.set.meters.quarantines.Get() != 1 {
				t.Errorf("%d nodes reachable, %d quarantined", w.set.Reachable(), w.set.meters.quarantines.Get())
			}
		})
	})
}

func TestBroadcastIsJudgedByAFreshCountOfUsers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A", hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A", OnlineUsers: 0}}
		n.answer = func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{3}}) // who came since
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		for range 3 {
			if r := w.do(w.toAll("x")); r.Delivered != 3 {
				t.Errorf("%+v", r)
			}
		}
		if len(n.received(t)) != 3 {
			t.Error("not all arrived")
		}
	})
}

// Who has come between the fresh count and the broadcast is in the count that comes with the ack.
func TestBroadcastIsJudgedByTheCountOfItsAck(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		n.answer = func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{4}})
			r.OnlineUsers = 4
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		if r := w.do(w.toAll("x")); r.Delivered != 4 {
			t.Errorf("%+v", r)
		}
	})
}

func TestNodeThatNeverAcksIsStalledAndRecovers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		acks := make(chan *pubsub.AckRange, 100)
		n.answer = func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
			if seq == 1 {
				acks <- &pubsub.AckRange{First: seq, Delivered: []uint32{1}} // owed
				return
			}
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{1}})
		}
		n.deliver = nil
		release := make(chan struct{})
		slow := &slowAck{fakeNode: n, release: release, acks: acks}
		n.deliver = slow.serve
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		began := time.Now()
		f := w.begin(w.toUser("u1", "first"))
		if r := w.end(f); r.Unknown != 1 || reasons(r) != "unknown: no acknowledgement in time" {
			t.Errorf("%+v", r)
		}
		if took := f.at.Sub(began); took < 950*time.Millisecond || took > 1050*time.Millisecond {
			t.Errorf("unknown after %v", took)
		}
		began = time.Now()
		if r := w.do(w.toUser("u1", "second")); r.Failed != 1 || reasons(r) != "failed: node does not acknowledge" {
			t.Errorf("stalled: %+v", r)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("a stalled link took %v to say so", took)
		}
		explained := func() engine.LinkState {
			x, err := w.engine.Explain(context.Background(), w.toUser("u1", "explained"), false)
			if err != nil || len(x.Planned) != 1 {
				t.Fatalf("%+v, %v", x, err)
			}
			return x.Planned[0].Link
		}
		if l := explained(); l.State != "up" || l.Verdict != engine.DropStalled || l.Unacked != 0 || l.UnackedFor < 950*time.Millisecond {
			t.Errorf("explained while stalled: %+v", l)
		}
		close(release) // the late ack comes
		synctest.Wait()
		if l := explained(); l.Verdict != engine.Sent || l.UnackedFor != 0 || l.Window == 0 {
			t.Errorf("explained afterwards: %+v", l)
		}
		if r := w.do(w.toUser("u1", "third")); r.Delivered != 1 {
			t.Errorf("recovered: %+v", r)
		}
		if got := w.set.meters.lateAcks.Get(); got != 1 {
			t.Errorf("%d late acks", got)
		}
	})
}

// slowAck holds back the ack of the first delivery.
type slowAck struct {
	*fakeNode
	release chan struct{}
	acks    chan *pubsub.AckRange
}

func (s *slowAck) serve(st deliverStream) error {
	if _, err := s.greet(st); err != nil {
		return err
	}
	in := make(chan *pubsub.DeliverRequest)
	go func() {
		defer close(in)
		for {
			f, err := st.Recv()
			if err != nil {
				return
			}
			in <- f
		}
	}()
	release := s.release
	for {
		out := &pubsub.DeliverResponse{}
		select {
		case f, ok := <-in:
			if !ok {
				return nil
			}
			out.Heartbeat = f.GetHeartbeat()
			for i := range f.GetDeliveries() {
				s.answer(f.GetFirstSeq()+uint64(i), nil, "", out)
			}
		case <-release:
			release = nil
			out.Acks = append(out.Acks, <-s.acks)
		}
		if err := st.Send(out); err != nil {
			return err
		}
	}
}

func TestNodeThatAnswersHeartbeatsAndNeverAcksLosesItsStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A", answer: func(uint64, []string, string, *pubsub.DeliverResponse) {}}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		w.do(w.toUser("u1", "x"))
		time.Sleep(3500 * time.Millisecond)
		if n.opened() != 2 {
			t.Errorf("%d streams", n.opened())
		}
	})
}

func TestNodeThatNeverReadsFailsTheQueueAndLosesTheWindow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{QueueBytes: 1 << 20, FrameBytes: 16 << 10})
		n := &fakeNode{id: "A"}
		n.deliver = func(st deliverStream) error {
			if _, err := n.greet(st); err != nil {
				return err
			}
			<-st.Context().Done()
			return nil
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		began := time.Now()
		text := strings.Repeat("x", 4<<10)
		var started []*pending
		full := 0
		for range 500 {
			f := w.begin(w.toUser("u1", text))
			started = append(started, f)
			synctest.Wait()
			if st := w.set.Stats(); st.QueuedBytes > 1<<20 {
				t.Fatalf("queue holds %d bytes", st.QueuedBytes)
			}
		}
		x, err := w.engine.Explain(context.Background(), w.toUser("u1", text), false)
		if err != nil || len(x.Planned) != 1 {
			t.Fatalf("%+v, %v", x, err)
		}
		if l := x.Planned[0].Link; l.Verdict != engine.DropQueueFull || l.Queued == 0 || l.QueuedBytes < engine.Normal.Share(1<<20)-len(text)-1024 || l.Unacked == 0 {
			t.Errorf("explained: %+v", l)
		}
		unknown, failed := 0, 0
		for _, f := range started {
			r := w.end(f)
			unknown += r.Unknown
			failed += r.Failed
			if reasons(r) == "failed: queue full" {
				full++
			} else if took := f.at.Sub(began); took > 1050*time.Millisecond {
				t.Errorf("settled after %v: %+v", took, r)
			}
		}
		if unknown == 0 || failed == 0 || full == 0 || unknown+failed != 500 {
			t.Errorf("%d unknown, %d failed, %d of them since the queue was full", unknown, failed, full)
		}
		if r := w.do(w.toUser("u1", text)); r.Failed != 1 {
			t.Errorf("stalled: %+v", r)
		}
	})
}

func TestBreakLosesWhatWasWrittenAndKeepsWhatWasNot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Window: 2})
		n := &fakeNode{id: "A"}
		var second atomic.Bool
		n.deliver = func(st deliverStream) error {
			if second.Swap(true) {
				return n.serve(st)
			}
			if _, err := n.greet(st); err != nil {
				return err
			}
			got := 0
			for got < 2 {
				f, err := st.Recv()
				if err != nil {
					return err
				}
				got += len(f.GetDeliveries())
			}
			time.Sleep(300 * time.Millisecond)
			return errors.New("broken")
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		time.Sleep(time.Second)
		began := time.Now()
		var started []*pending
		for i := range 5 {
			started = append(started, w.begin(w.toUser("u1", fmt.Sprint(i))))
		}
		for i, f := range started {
			r := w.end(f)
			if i < 2 && (r.Unknown != 1 || f.at.Sub(began) > 310*time.Millisecond) {
				t.Errorf("push %d, written: %+v after %v", i, r, f.at.Sub(began))
			}
			if i >= 2 && r.Delivered != 1 {
				t.Errorf("push %d, queued: %+v", i, r)
			}
		}
		if got := n.received(t); !slices.Equal(got, []string{"u1 2", "u1 3", "u1 4"}) {
			t.Errorf("arrived after the break: %q", got)
		}
	})
}

func TestDeadNodeFailsAtOnceAndBacksOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.register("A", "a:1")
		w.room("r", "A", "u1")
		synctest.Wait()
		began := time.Now()
		if r := w.do(w.toUser("u1", "x")); r.Failed != 1 {
			t.Errorf("%+v", r)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v", took)
		}
		time.Sleep(time.Minute)
		if w.dialed() > 100 { // the longest pause is 750 ms, give or take
			t.Errorf("%d dials in a minute", w.dialed())
		}
		n := w.start("a:1", &fakeNode{id: "A"})
		w.register("A", "a:1") // announced: no waiting for the backoff
		synctest.Wait()
		if r := w.do(w.toUser("u1", "x")); r.Delivered != 1 {
			t.Errorf("back: %+v", r)
		}
		n.received(t)
	})
}

func TestUnreachableAddressHoldsPushesForTheDialTimeoutOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.start("a:1", &fakeNode{id: "A", gate: make(chan struct{})})
		w.register("A", "a:1")
		w.room("r", "A", "u1")
		began := time.Now()
		if r := w.do(w.toUser("u1", "x")); r.Failed != 1 {
			t.Errorf("%+v", r)
		}
		if took := time.Since(began); took > 1050*time.Millisecond {
			t.Errorf("first took %v", took)
		}
		time.Sleep(100 * time.Millisecond)
		began = time.Now()
		w.do(w.toUser("u1", "x"))
		if took := time.Since(began); took != 0 {
			t.Errorf("second took %v", took)
		}
	})
}

func TestWrongNodeIDIsNotSentTo(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "B"})
		w.register("A", "a:1")
		w.room("r", "A", "u1")
		synctest.Wait()
		if r := w.do(w.toUser("u1", "x")); r.Failed != 1 {
			t.Errorf("%+v", r)
		}
		if w.set.Reachable() != 0 || len(n.received(t)) != 0 {
			t.Error("sent to somebody else's node")
		}
	})
}

func TestOtherProtocolVersionIsNotSentTo(t *testing.T) {
	for _, version := range []uint32{0, 2} {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, Config{})
			n := &fakeNode{id: "A"}
			n.hello = &pubsub.HelloReply{ProtocolVersion: version, NodeId: "A"}
			w.start("a:1", n)
			w.register("A", "a:1")
			synctest.Wait()
			if w.set.Reachable() != 0 {
				t.Errorf("version %d was accepted", version)
			}
		})
	}
}

func TestSameIDAtANewAddressIsReplacedAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		old := w.start("a:1", &fakeNode{id: "A"})
		fresh := w.start("a:2", &fakeNode{id: "A"})
		w.register("A", "a:1")
		w.up(2)
		w.room("r", "A", "u1")
		w.do(w.toUser("u1", "old"))
		w.register("A", "a:2")
		if r := w.do(w.toUser("u1", "new")); r.Delivered != 1 {
			t.Errorf("%+v", r)
		}
		if got := old.received(t); !slices.Equal(got, []string{"u1 old"}) {
			t.Errorf("old address: %q", got)
		}
		if got := fresh.received(t); !slices.Equal(got, []string{"u1 new"}) {
			t.Errorf("new address: %q", got)
		}
		synctest.Wait()
		if st := w.set.Stats(); st.Live != 2 || st.Links != 2 {
			t.Errorf("%+v", st)
		}
		if old.open() != 0 || fresh.open() != 2 {
			t.Errorf("%d streams to the old address, %d to the new one", old.open(), fresh.open())
		}
	})
}

// TestFramesKeepTheirBytesUntilTheyAreOnTheWire has a node that reads nothing for a while:
// gRPC holds frames that it could not write, while the next ones are made.
func TestFramesKeepTheirBytesUntilTheyAreOnTheWire(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{FrameBytes: 16 << 10})
		n, read := &fakeNode{id: "A"}, make(chan struct{})
		n.deliver = func(st deliverStream) error { return n.serve(gated{st, read}) }
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		var started []*pending
		var want []string
		for i := range 40 {
			text := strings.Repeat(string(rune('A'+i)), 40<<10)
			started = append(started, w.begin(w.toUser("u1", text)))
			want = append(want, "u1 "+text)
			synctest.Wait() // each has its own frame
		}
		close(read)
		for i, f := range started {
			if r := w.end(f); r.Delivered != 1 {
				t.Errorf("push %d: %+v", i, r)
			}
		}
		for i, got := range n.received(t) {
			if got != want[i] {
				t.Errorf("push %d arrived as %.10q...%.10q", i, got, got[len(got)-10:])
			}
		}
	})
}

// gated is a stream of which nothing is read behind the hello before the gate opens.
type gated struct {
	deliverStream
	gate chan struct{}
}

func (g gated) Send(r *pubsub.DeliverResponse) error {
	err := g.deliverStream.Send(r)
	<-g.gate
	return err
}

func TestRemovedNodeThatNeverAcksEndsUnknown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A", answer: func(uint64, []string, string, *pubsub.DeliverResponse) {}})
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		begun := time.Now()
		f := w.begin(w.toUser("u1", "x"))
		synctest.Wait()
		w.register()
		if w.set.Link(0, "A") != nil || len(w.set.Links(0)) != 0 {
			t.Error("the node is still there")
		}
		if r := w.end(f); r.Unknown != 1 || time.Since(begun) > 1100*time.Millisecond {
			t.Errorf("after %v: %+v", time.Since(begun), r)
		}
		synctest.Wait()
		if n.open() != 0 {
			t.Error("the stream was not closed")
		}
		n.received(t)
	})
}

// A node may live on when its registration ends. What it has been sent is delivered, and
// what it has not been sent yet is not sent any more, nor kept.
func TestRemovedNodeIsAwaitedForWhatItHasAndGetsNothingMore(t *testing.T) {
	const needs = 500 * time.Millisecond
	for name, node := range map[string]func(got *atomic.Int64) *fakeNode{
		"with Deliver": func(got *atomic.Int64) *fakeNode {
			n := &fakeNode{id: "A"}
			n.deliver = func(st deliverStream) error {
				return n.eachDelivery(st, func(f *pubsub.DeliverRequest) error {
					got.Add(int64(len(f.GetDeliveries())))
					time.Sleep(needs)
					return ackOf(st, f)
				})
			}
			return n
		},
		"without it": func(got *atomic.Int64) *fakeNode {
			n := unaryNode("A")
			n.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
				got.Add(1)
				time.Sleep(needs)
				return &pubsub.PushMessageResponse{Success: true}, nil
			}
			return n
		},
	} {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, Config{Window: 1, UnaryLanes: 1})
			var got atomic.Int64
			n := w.start("a:1", node(&got))
			w.register("A", "a:1")
			w.up(1)
			w.room("r", "A", "u1", "u2")
			begun := time.Now()
			sent := w.begin(w.toUser("u1", "x"))
			synctest.Wait()
			queued := w.begin(w.toUser("u2", "y"))
			synctest.Wait()
			w.register()
			if r := w.end(queued); r.Failed != 1 || time.Since(begun) != 0 {
				t.Errorf("%s: queued, after %v: %+v", name, time.Since(begun), r)
			}
			if r := w.end(sent); r.Delivered != 1 || time.Since(begun) != needs {
				t.Errorf("%s: sent, after %v: %+v", name, time.Since(begun), r)
			}
			synctest.Wait()
			if got.Load() != 1 || n.open() != 0 {
				t.Errorf("%s: the node has got %d deliveries, and %d streams are open", name, got.Load(), n.open())
			}
			time.Sleep(2 * tick)
			if gone := w.set.snapshot.Load().gone; len(gone) != 0 {
				t.Errorf("%s: %d nodes are remembered", name, len(gone))
			}
		})
	}
}

// It is the same process that is back at the address: what is sent to it now must not arrive
// before what was sent to it when it was removed.
func TestNodeThatIsBackIsNotAwaitedOnItsOldStreams(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A", answer: func(uint64, []string, string, *pubsub.DeliverResponse) {}})
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		begun := time.Now()
		f := w.begin(w.toUser("u1", "x"))
		synctest.Wait()
		w.register()
		synctest.Wait()
		if n.open() != 1 {
			t.Fatalf("%d streams are open", n.open())
		}
		w.register("A", "a:1")
		if r := w.end(f); r.Unknown != 1 || time.Since(begun) != 0 {
			t.Errorf("after %v: %+v", time.Since(begun), r)
		}
		w.up(1)
		synctest.Wait() // the node notices the end of the old stream by itself
		if n.open() != 1 {
			t.Errorf("%d streams are open", n.open())
		}
		n.received(t)
	})
}

// A node that has drained once and was restarted where it was is no node that leaves.
func TestNodeThatHasDrainedBeforeMovesAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		var drained atomic.Bool
		n.deliver = func(st deliverStream) error {
			return n.eachDelivery(st, func(f *pubsub.DeliverRequest) error {
				if drained.CompareAndSwap(false, true) {
					_ = st.Send(&pubsub.DeliverResponse{Drain: true})
					return ackOf(st, f)
				}
				return nil
			})
		}
		w.start("a:1", n)
		w.start("a:2", &fakeNode{id: "A"})
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		if r := w.do(w.toUser("u1", "before")); r.Delivered != 1 {
			t.Errorf("%+v", r)
		}
		synctest.Wait() // until the stream that has drained is gone
		w.up(1)
		begun := time.Now()
		f := w.begin(w.toUser("u1", "x"))
		synctest.Wait()
		w.register("A", "a:2")
		if r := w.end(f); r.Unknown != 1 || time.Since(begun) != 0 {
			t.Errorf("after %v: %+v", time.Since(begun), r)
		}
		synctest.Wait()
		if n.open() != 0 {
			t.Errorf("%d streams to the old address", n.open())
		}
	})
}

// jammed is a connection to a node that reads nothing, with all buffers full.
type jammed struct {
	net.Conn
	jam    *atomic.Bool
	resets *atomic.Int64
	gone   chan struct{}
	once   *sync.Once
}

func (c jammed) Write(b []byte) (int, error) {
	if c.jam.Load() {
		<-c.gone
		return 0, net.ErrClosed
	}
	return c.Conn.Write(b)
}

func (c jammed) Close() error {
	c.once.Do(func() { close(c.gone) })
	return c.Conn.Close()
}

func (c jammed) SetLinger(int) error {
	c.resets.Add(1)
	return nil
}

// jammedWorld has node A, whose connections jam when that is set. Those that are thrown away
// count as resets.
func jammedWorld(t *testing.T) (w *world, jam *atomic.Bool, resets *atomic.Int64) {
	t.Helper()
	jam, resets = new(atomic.Bool), new(atomic.Int64)
	w = newWorld(t, Config{Dialer: func(ctx context.Context, addr string) (net.Conn, error) {
		conn, err := w.dialNode(ctx, addr)
		return jammed{conn, jam, resets, make(chan struct{}), new(sync.Once)}, err
	}})
	w.start("a:1", &fakeNode{id: "A"})
	w.register("A", "a:1")
	w.up(1)
	w.room("r", "A", "u1")
	return w, jam, resets
}

// A node that leaves in good order sees its streams end in good order.
func TestRemovedNodeThatOwesNothingIsNotReset(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, _, resets := jammedWorld(t)
		if r := w.do(w.toUser("u1", "x")); r.Delivered != 1 {
			t.Errorf("%+v", r)
		}
		n := w.nodes["a:1"]
		w.register()
		synctest.Wait()
		if resets.Load() != 0 || n.open() != 0 {
			t.Errorf("%d resets, %d streams", resets.Load(), n.open())
		}
	})
}

// gRPC would wait for its last words to be written.
func TestSessionOnAJammedConnectionEndsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, jam, resets := jammedWorld(t)
		jam.Store(true)
		f := w.begin(w.toUser("u1", "x"))
		synctest.Wait()
		begun := time.Now()
		w.register()
		if r := w.end(f); r.Unknown != 1 {
			t.Errorf("%+v", r)
		}
		w.set.Close()
		if took := time.Since(begun); took > 1100*time.Millisecond || resets.Load() != 1 {
			t.Errorf("its end took %v; %d resets", took, resets.Load())
		}
	})
}

// Streams are one for each shard, and one may stand while another works.
func TestStreamThatStandsHarmsOnlyItsOwnShard(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		n, gate := &fakeNode{id: "A"}, make(chan struct{})
		defer close(gate)
		var streams atomic.Int64
		n.deliver = func(st deliverStream) error {
			if streams.Add(1) == 1 {
				st = gated{st, gate}
			}
			return n.serve(st)
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(2)
		users := append(w.ofShard(0, 1), w.ofShard(1, 1)...)
		w.room("r", "A", users...)
		standing := ""
		begun := time.Now()
		first := []*pending{w.begin(w.toUser(users[0], "x")), w.begin(w.toUser(users[1], "x"))}
		for i, f := range first {
			if r := w.end(f); r.Unknown == 1 {
				standing += users[i]
			} else if r.Delivered != 1 {
				t.Errorf("%+v", r)
			}
		}
		if took := time.Since(begun); took > 1100*time.Millisecond {
			t.Errorf("what the stream owes ended after %v", took)
		}
		begun = time.Now()
		for range 100 {
			for _, user := range users {
				if r := w.do(w.toUser(user, "y")); (r.Failed == 1) != (user == standing) || r.Unknown != 0 {
					t.Fatalf("%q stands, %s: %+v", standing, user, r)
				}
			}
		}
		if took := time.Since(begun); took != 0 {
			t.Errorf("the others waited for %v", took)
		}
	})
}

func TestDrainNoticeRefusesAndAwaitsTheAcks(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.start("a:1", leavingNode(500*time.Millisecond))
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1", "u2")
		f := w.begin(w.toUser("u1", "x"))
		synctest.Wait()
		if r := w.do(w.toUser("u2", "y")); r.Failed != 1 || !strings.Contains(reasons(r), "draining") {
			t.Errorf("while draining: %+v", r)
		}
		if r := w.end(f); r.Delivered != 1 {
			t.Errorf("taken before: %+v", r)
		}
		synctest.Wait()
		if w.set.Reachable() != 0 {
			t.Error("the stream was not closed")
		}
	})
}

// What is not written when a node says that it goes is not written any more: the stream ends
// with the acks of what was.
func TestFrameThatIsBuiltWhenTheNoticeComesIsNotWritten(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		leaves := make(chan struct{})
		n.deliver = func(st deliverStream) error {
			if _, err := n.greet(st); err != nil {
				return err
			}
			f, err := st.Recv()
			if err != nil {
				return err
			}
			<-leaves
			if err := st.Send(&pubsub.DeliverResponse{Drain: true}); err != nil {
				return err
			}
			time.Sleep(500 * time.Millisecond)
			out := &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: f.GetFirstSeq(), Delivered: []uint32{1}}}}
			if err := st.Send(out); err != nil {
				return err
			}
			f, err = st.Recv()
			if err == nil {
				t.Errorf("it gets %v", f)
			}
			return err
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1", "u2")
		taken := w.begin(w.toUser("u1", "x"))
		synctest.Wait()
		l := w.set.snapshot.Load().byLink[0][0].(*Link) //nolint:forcetypeassert // or the test is wrong
		l.mu.Lock()
		s := l.way.(*stream) //nolint:forcetypeassert // or the test is wrong
		s.idle = false       // the writer hears nothing: this is the writer now
		s.beatDue = true
		l.mu.Unlock()
		late := w.begin(w.toUser("u2", "y"))
		synctest.Wait()
		s.pick()
		_, rest := s.encode(nil)
		if len(s.w.kept) != 1 {
			t.Fatalf("%d deliveries are in the frame", len(s.w.kept))
		}
		close(leaves)
		synctest.Wait()
		if s.commit(rest) {
			t.Error("the frame is written")
		}
		l.mu.Lock()
		if !s.beatDue {
			t.Error("the heartbeat of the frame is forgotten")
		}
		s.beatDue, s.idle = false, true
		l.mu.Unlock()
		if r := w.end(late); r.Failed != 1 || !strings.Contains(reasons(r), "draining") {
			t.Errorf("what was late: %+v", r)
		}
		if r := w.end(taken); r.Delivered != 1 {
			t.Errorf("what was taken: %+v", r)
		}
	})
}

// leavingNode says that it drains when it gets a delivery, and acknowledges it after a
// while, if at all.
func leavingNode(after time.Duration) *fakeNode {
	n := &fakeNode{id: "A"}
	n.deliver = func(st deliverStream) error {
		return n.eachDelivery(st, func(f *pubsub.DeliverRequest) error {
			if err := st.Send(&pubsub.DeliverResponse{Drain: true}); err != nil || after == 0 {
				return err
			}
			time.Sleep(after)
			return ackOf(st, f)
		})
	}
	return n
}

// eachDelivery says hello and takes frames; on gets those with deliveries.
func (n *fakeNode) eachDelivery(st deliverStream, on func(*pubsub.DeliverRequest) error) error {
	if _, err := n.greet(st); err != nil {
		return err
	}
	for {
		f, err := st.Recv()
		if err != nil {
			return err
		}
		if len(f.GetDeliveries()) == 0 {
			continue
		}
		if err := on(f); err != nil {
			return err
		}
	}
}

// ackOf acknowledges each delivery of a frame for one user.
func ackOf(st deliverStream, f *pubsub.DeliverRequest) error {
	delivered := slices.Repeat([]uint32{1}, len(f.GetDeliveries()))
	return st.Send(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: f.GetFirstSeq(), Delivered: delivered}}})
}

// A node leaves etcd, drains and acknowledges. Its removal may come between the last
// two: what it has taken is still awaited, and nothing becomes unknown.
func TestRemovedNodeThatDrainsIsAwaited(t *testing.T) {
	for _, now := range []string{"removed", "moved"} {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, Config{})
			w.start("a:1", leavingNode(500*time.Millisecond))
			w.start("a:2", &fakeNode{id: "A"})
			w.register("A", "a:1")
			w.up(1)
			w.room("r", "A", "u1")
			f := w.begin(w.toUser("u1", "x"))
			synctest.Wait()
			if now == "moved" {
				w.register("A", "a:2")
			} else {
				w.register()
			}
			if r := w.end(f); r.Delivered != 1 {
				t.Errorf("%s: %+v", now, r)
			}
			synctest.Wait()
			if r := w.do(w.toUser("u1", "y")); (r.Delivered == 1) != (now == "moved") {
				t.Errorf("%s, afterwards: %+v", now, r)
			}
		})
	}
}

// The notice of a node that leaves comes on one stream before it comes on another, which
// may be when the first one has ended.
func TestRemovedNodeIsAwaitedOnStreamsWithoutANoticeYet(t *testing.T) {
	for _, after := range []time.Duration{0, 150 * time.Millisecond} {
		bubble(t, func(t *testing.T) { removedBetweenNotices(t, after) })
	}
}

func removedBetweenNotices(t *testing.T, after time.Duration) {
	t.Helper()
	w := newWorld(t, Config{Shards: 2})
	n := &fakeNode{id: "A"}
	var told atomic.Bool
	n.deliver = func(st deliverStream) error {
		if told.Load() {
			return errors.New("node is draining")
		}
		return n.eachDelivery(st, func(f *pubsub.DeliverRequest) error {
			if told.CompareAndSwap(false, true) {
				if err := st.Send(&pubsub.DeliverResponse{Drain: true}); err != nil {
					return err
				}
			}
			time.Sleep(100 * time.Millisecond)
			return ackOf(st, f)
		})
	}
	w.start("a:1", n)
	w.register("A", "a:1")
	w.up(2)
	users := append(w.ofShard(0, 1), w.ofShard(1, 3)...)
	w.room("r", "A", users...)
	var pushes []*pending
	for _, user := range users {
		pushes = append(pushes, w.begin(w.toUser(user, "x")))
		synctest.Wait() // the first one brings the notice
	}
	time.Sleep(after)
	w.register()
	for i, f := range pushes {
		if r := w.end(f); r.Delivered != 1 {
			t.Errorf("removed after %v: %s: %+v", after, users[i], r)
		}
	}
}

func TestRemovedNodeThatDrainsIsNotAwaitedForEver(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.start("a:1", leavingNode(0))
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		begun := time.Now()
		f := w.begin(w.toUser("u1", "x"))
		synctest.Wait()
		w.register()
		if r := w.end(f); r.Unknown != 1 || time.Since(begun) > 1100*time.Millisecond {
			t.Errorf("after %v: %+v", time.Since(begun), r)
		}
	})
	bubble(t, func(t *testing.T) { // and closing the set awaits nobody
		w := newWorld(t, Config{AckTimeout: time.Minute})
		w.start("a:1", leavingNode(0))
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		f := w.begin(w.toUser("u1", "x"))
		synctest.Wait()
		w.register()
		begun := time.Now()
		w.set.Close()
		if r := w.end(f); r.Unknown != 1 || time.Since(begun) > time.Second {
			t.Errorf("closed after %v: %+v", time.Since(begun), r)
		}
	})
}

// While a node that is gone is awaited, its deliveries are held to their own deadlines. A
// push whose route is known has no other clock than the link's.
func TestRemovedNodeIsAwaitedNoLongerThanTheDeadline(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A", answer: func(seq uint64, _ []string, text string, r *pubsub.DeliverResponse) {
			if text == "first" {
				r.Acks = []*pubsub.AckRange{{First: seq, Delivered: []uint32{1}}}
			} else {
				r.Drain = true
			}
		}})
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		w.do(w.toUser("u1", "first"))
		begun := time.Now()
		p := w.toUser("u1", "last")
		p.Timeout = 100 * time.Millisecond
		f := w.begin(p)
		synctest.Wait()
		w.register()
		if r := w.end(f); r.Unknown != 1 || time.Since(begun) > 150*time.Millisecond {
			t.Errorf("after %v: %+v", time.Since(begun), r)
		}
		n.received(t)
	})
}

// A caller may have no time left, and the node still does what it was asked for.
func TestLateAckOnADrainingStreamIsTaken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.start("a:1", leavingNode(300*time.Millisecond))
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		p := w.toUser("u1", "x")
		p.Timeout = 100 * time.Millisecond
		if r := w.do(p); r.Unknown != 1 {
			t.Errorf("%+v", r)
		}
		time.Sleep(300 * time.Millisecond)
		synctest.Wait()
		if late := w.set.meters.lateAcks.Get(); late != 1 {
			t.Errorf("%d late acks", late)
		}
	})
}

// A node that is behind and then says that it drains has stalled once.
func TestStallOfANodeThatDrainsCountsOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		n.deliver = func(st deliverStream) error {
			return n.eachDelivery(st, func(*pubsub.DeliverRequest) error {
				time.Sleep(1200 * time.Millisecond)
				return st.Send(&pubsub.DeliverResponse{Drain: true})
			})
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		first := w.begin(w.toUser("u1", "x"))
		time.Sleep(900 * time.Millisecond)
		second := w.begin(w.toUser("u1", "y"))
		for _, f := range []*pending{first, second} {
			if r := w.end(f); r.Unknown != 1 {
				t.Errorf("%+v", r)
			}
		}
		if n := w.set.meters.stalls.Get(); n != 1 {
			t.Errorf("%d stalls", n)
		}
	})
}

func TestDrainOfTheSetAwaitsNodesThatAreGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.start("a:1", leavingNode(500*time.Millisecond))
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		begun := time.Now()
		f := w.begin(w.toUser("u1", "x"))
		synctest.Wait()
		w.register()
		if err := w.set.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.set.Close()
		if r := w.end(f); r.Delivered != 1 || time.Since(begun) != 500*time.Millisecond {
			t.Errorf("after %v: %+v", time.Since(begun), r)
		}
	})
}

func TestDrainOfTheSetFlushesAndWaits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		n := w.start("a:1", &fakeNode{id: "A", gate: make(chan struct{})})
		w.start("b:1", unaryNode("B"))
		w.register("A", "a:1", "B", "b:1")
		w.room("r", "A", "u1")
		var started []*pending
		for i := range 10 {
			started = append(started, w.begin(w.toUser("u1", fmt.Sprint(i))))
		}
		synctest.Wait()
		close(n.gate)
		began := time.Now()
		if err := w.set.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 100*time.Millisecond {
			t.Errorf("drain took %v", took)
		}
		for _, f := range started {
			if r := w.end(f); r.Delivered != 1 {
				t.Errorf("%+v", r)
			}
		}
		if r := w.do(w.toUser("u1", "late")); r.Failed != 1 {
			t.Errorf("after drain: %+v", r)
		}
		drains := 0
		for _, f := range n.all() {
			if f.GetDrain() {
				drains++
			}
		}
		if drains == 0 || drains != n.opened() {
			t.Errorf("%d drain frames on %d streams", drains, n.opened())
		}
	})
}

func TestBadBytesBreakTheStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		n.answer = func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{1}})
			r.Hello = &pubsub.HelloReply{} // a second hello
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		if r := w.do(w.toUser("u1", "x")); r.Unknown != 1 {
			t.Errorf("%+v", r)
		}
	})
}

func TestCallerWhoLeavesIsNotWrittenFor(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A", gate: make(chan struct{})})
		w.register("A", "a:1")
		w.room("r", "A", "u1")
		p := w.toUser("u1", "x")
		p.Timeout = 100 * time.Millisecond
		f := w.begin(p)
		began := time.Now()
		<-f.done
		if took := f.at.Sub(began); took < 100*time.Millisecond || took > 150*time.Millisecond {
			t.Errorf("expired after %v", took)
		}
		close(n.gate)
		w.up(1)
		if got := n.received(t); len(got) != 0 {
			t.Errorf("written after the deadline: %q", got)
		}
	})
}

func TestTimeInWhichWeDidNotRunIsNotHeldAgainstTheNode(t *testing.T) {
	c := &clock{start: time.Now().Add(-10 * time.Second)}
	c.advance()
	if got := time.Duration(c.ran.Load()); got != tickMax {
		t.Errorf("10 s in one tick count as %v", got)
	}
	if got := time.Duration(c.real.Load()); got < 10*time.Second {
		t.Errorf("real time is %v", got)
	}
}

func TestSlowNodeGetsWhatItManagesAndLittleBecomesUnknown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		n.answer = func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
			time.Sleep(20 * time.Millisecond) // 50 a second
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{1}})
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		var delivered, unknown, failed int
		var started []*pending
		for range 6000 { // 100 a second for a minute
			started = append(started, w.begin(w.toUser("u1", "x")))
			time.Sleep(10 * time.Millisecond)
		}
		for _, f := range started {
			r := w.end(f)
			delivered, unknown, failed = delivered+r.Delivered, unknown+r.Unknown, failed+r.Failed
		}
		if delivered < 2000 || unknown > 300 || n.opened() != 1 {
			t.Errorf("%d delivered, %d unknown, %d failed, %d streams", delivered, unknown, failed, n.opened())
		}
	})
}

func TestNodeInACrashLoopStaysOnTheBackoffCurve(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		n.deliver = func(st deliverStream) error {
			if _, err := n.greet(st); err != nil {
				return err
			}
			time.Sleep(50 * time.Millisecond)
			return errors.New("crash")
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		time.Sleep(time.Minute)
		if n.opened() > 100 { // the longest pause is 750 ms, give or take
			t.Errorf("%d streams in a minute", n.opened())
		}
	})
}

// Whatever a node does, again and again, the log does not grow with it: and when it has done
// the last, the log says how things are.
func TestNodeCannotFloodTheLog(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var log syncBuffer
		lines := func() []string { return strings.Split(strings.TrimSpace(log.String()), "\n") }
		w := newWorld(t, Config{Shards: 2, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		n := &fakeNode{id: "A"}
		var boots atomic.Int64
		n.deliver = func(st deliverStream) error {
			f, err := st.Recv()
			if err != nil {
				return err
			}
			boot := fmt.Sprint(boots.Add(1))
			if err := st.Send(&pubsub.DeliverResponse{Hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "A", BootId: boot}}); err != nil {
				return err
			}
			if f.GetHello().GetShard() == 0 {
				_ = st.Send(&pubsub.DeliverResponse{Drain: true})
			}
			return errors.New("flap")
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		time.Sleep(time.Minute)
		// It has six, and each that says "not reachable" may have one that says the opposite.
		if got := len(lines()); got > 2*(6+2+lineBurst) {
			t.Errorf("%d lines in a minute of %d streams", got, boots.Load())
		}
		if last := lines(); !strings.Contains(strings.Join(last[len(last)-3:], " "), "unreported=") {
			t.Errorf("the log does not say that something is left out: %q", last)
		}
		n.kill()
		time.Sleep(lineEvery + time.Second)
		if last := lines(); !strings.Contains(last[len(last)-1], `msg="node not reachable"`) {
			t.Errorf("it is gone, and the log ends with %s", last[len(last)-1])
		}
	})
}

// However long a node was away: two seconds after it can be reached again it is.
func TestNodeIsBackWithinTwoSecondsOfAnyOutage(t *testing.T) {
	for name, away := range map[string]func(context.Context) error{
		"refused":     func(context.Context) error { return errors.New("connection refused") },
		"unreachable": func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	} {
		for _, outage := range []time.Duration{time.Second, 10 * time.Second, time.Minute, 10*time.Minute + 333*time.Millisecond} {
			bubble(t, func(t *testing.T) {
				var w *world
				begun := time.Now()
				w = newWorld(t, Config{Dialer: func(ctx context.Context, addr string) (net.Conn, error) {
					if time.Since(begun) < outage {
						return nil, away(ctx)
					}
					return w.dialNode(ctx, addr)
				}})
				w.start("a:1", &fakeNode{id: "A"})
				w.register("A", "a:1")
				time.Sleep(outage)
				w.until("back", func() bool { return w.set.Reachable() == 1 })
				if took := time.Since(begun) - outage; took > 2*time.Second {
					t.Errorf("%s for %v: back after %v", name, outage, took)
				}
			})
		}
	}
}

// An address that answers nothing takes the dial timeout for each attempt. That is pause
// enough: the next one follows within a tenth of a second, and no sooner.
func TestUnansweredAttemptIsItsOwnPause(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var begins []time.Duration
		var mu sync.Mutex
		begun := time.Now()
		w := newWorld(t, Config{Dialer: func(ctx context.Context, _ string) (net.Conn, error) {
			mu.Lock()
			begins = append(begins, time.Since(begun))
			mu.Unlock()
			<-ctx.Done()
			return nil, ctx.Err()
		}})
		w.register("A", "a:1")
		time.Sleep(time.Minute)
		mu.Lock()
		defer mu.Unlock()
		if len(begins) < 50 || len(begins) > 59 {
			t.Errorf("%d attempts in a minute", len(begins))
		}
		for i := 1; i < len(begins); i++ {
			if pause := begins[i] - begins[i-1]; pause < time.Second+30*time.Millisecond || pause > 1100*time.Millisecond {
				t.Errorf("attempt %d begins %v after the one before", i, pause)
			}
		}
	})
}

// A node that works and then stands still, again and again, is tried again at once
// each time: the backoff is for those who never worked.
func TestSoundNodeIsTriedAtOnceAfterEachSilence(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		var mu sync.Mutex // of ended
		ended := time.Now()
		n.deliver = func(st deliverStream) error {
			mu.Lock()
			pause := time.Since(ended)
			mu.Unlock()
			if pause > 100*time.Millisecond {
				t.Errorf("tried again after %v", pause)
			}
			if _, err := n.greet(st); err != nil {
				return err
			}
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				ended = time.Now()
			}()
			for still := time.Now().Add(2 * time.Second); ; {
				f, err := st.Recv()
				if err != nil {
					return err
				}
				if f.GetHeartbeat() != 0 && time.Now().Before(still) {
					if err := st.Send(&pubsub.DeliverResponse{Heartbeat: f.GetHeartbeat(), OnlineUsers: 3}); err != nil {
						return err
					}
				}
			}
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		time.Sleep(time.Minute)
		if n.opened() < 12 {
			t.Errorf("%d streams in a minute", n.opened())
		}
	})
}

// And one that takes what it never acknowledges is not.
func TestNodeThatNeverAcksIsTriedLessOften(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		var mu sync.Mutex // of last and longest
		var last time.Time
		var longest time.Duration
		n := &fakeNode{id: "A", answer: func(uint64, []string, string, *pubsub.DeliverResponse) {}}
		n.deliver = func(st deliverStream) error {
			mu.Lock()
			if !last.IsZero() {
				longest = max(longest, time.Since(last))
			}
			mu.Unlock()
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				last = time.Now()
			}()
			return n.serve(st)
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.up(1)
		w.room("r", "A", "u1")
		for begun := time.Now(); time.Since(begun) < time.Minute; time.Sleep(100 * time.Millisecond) {
			w.do(w.toUser("u1", "x"))
		}
		mu.Lock()
		defer mu.Unlock()
		if longest < 500*time.Millisecond {
			t.Errorf("it was tried again after %v at most", longest)
		}
	})
}

func TestFlappingLinkIsBackAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A"}
		n.deliver = func(st deliverStream) error {
			if _, err := n.greet(st); err != nil {
				return err
			}
			time.Sleep(time.Second)
			return errors.New("flap")
		}
		w.start("a:1", n)
		w.register("A", "a:1")
		time.Sleep(59500 * time.Millisecond)
		if n.opened() != 60 || w.set.Reachable() != 1 {
			t.Errorf("%d streams in a minute of flaps", n.opened())
		}
	})
}

// bomb panics when its push completes.
type bomb struct{}

func (bomb) Complete(*engine.Push) { panic("boom") }

func TestPanicOfACallbackCostsItsStreamOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := w.start("a:1", &fakeNode{id: "A", gate: make(chan struct{})})
		w.register("A", "a:1")
		w.room("r", "A", "u1")
		first := w.begin(w.toUser("u1", "1"))
		if err := w.engine.Start(w.toUser("u1", "2"), bomb{}); err != nil {
			t.Fatal(err)
		}
		third := w.begin(w.toUser("u1", "3"))
		synctest.Wait()
		close(n.gate)
		if r := w.end(first); r.Delivered != 1 {
			t.Errorf("before the panic: %+v", r)
		}
		if r := w.end(third); r.Unknown != 1 {
			t.Errorf("behind the panic: %+v", r)
		}
		time.Sleep(time.Second)
		if r := w.do(w.toUser("u1", "4")); r.Delivered != 1 {
			t.Errorf("afterwards: %+v", r)
		}
		if w.set.meters.panics.Get() != 1 {
			t.Error("not counted")
		}
	})
}

// A node that is gone from etcd is kept while Alive vouches for it.
func TestAliveNodesHaveALiveLinkAndDoNotDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		a := w.start("a:1", &fakeNode{id: "A"})
		n := w.start("b:1", &fakeNode{id: "B", deliver: func(st deliverStream) error {
			if _, err := (&fakeNode{id: "B"}).greet(st); err != nil {
				return err
			}
			_ = st.Send(&pubsub.DeliverResponse{Drain: true})
			<-st.Context().Done()
			return nil
		}})
		_ = n
		w.register("A", "a:1", "B", "b:1", "C", "c:1")
		w.until("A is up, and B has had its say", func() bool { return w.set.Nodes()[0].Connections == 2 && w.set.Stats().Live >= 2 })
		time.Sleep(time.Second)
		for _, st := range w.set.Nodes() {
			if want := st.Connections > 0 && !st.Draining; w.set.Alive(st.ID) != want || want != (st.ID == "A") {
				t.Errorf("%+v is alive: %v", st, w.set.Alive(st.ID))
			}
		}
		if w.set.Alive("D") {
			t.Error("a node that nobody knows is alive")
		}
		a.kill()
		w.until("A is not alive", func() bool { return !w.set.Alive("A") })
	})
}

// Whoever holds nodes that are gone asks for each of them, each second: what that costs must
// not grow with the number of nodes.
func TestAliveDoesNotWalkTheNodes(t *testing.T) {
	cost := func(nodes int) float64 {
		s := &Set{cfg: Config{Shards: 2}, dials: newDials(&Config{Dials: 2, DialRate: 2})}
		var list []*node
		for i := range nodes {
			n := newNode(s, Node{ID: fmt.Sprint(i)})
			n.live.Store(1)
			list = append(list, n)
		}
		s.snapshot.Store(newSnapshot(list, 2))
		return testing.AllocsPerRun(10, func() { s.Alive("0") })
	}
	if few, many := cost(1), cost(2000); many > few || many > 0 {
		t.Errorf("%v allocations for one node, %v for 2000", few, many)
	}
}

func TestMetricsFollowTheNodes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ms := metrics.NewSet()
		w := newWorld(t, Config{Shards: 2, Metrics: ms})
		w.start("a:1", &fakeNode{id: "A"})
		w.start("b:1", unaryNode("B"))
		has := func(lines ...string) {
			t.Helper()
			var b strings.Builder
			ms.WritePrometheus(&b)
			for _, line := range lines {
				if !strings.Contains(b.String(), line+"\n") {
					t.Errorf("no %q in\n%s", line, b.String())
				}
			}
		}
		w.register("A", "a:1", "B", "b:1", "C", "c:1")
		w.up(4)
		has(`push_manager_node_connections{node_id="A"} 2`, `push_manager_node_connections{node_id="B"} 2`,
			`push_manager_node_connections{node_id="C"} 0`, `push_manager_nodes 3`)
		w.register("B", "b:1")
		has(`push_manager_node_connections{node_id="B"} 2`, `push_manager_nodes 1`)
		var b strings.Builder
		ms.WritePrometheus(&b)
		if strings.Contains(b.String(), `"A"`) || strings.Contains(b.String(), `"C"`) {
			t.Errorf("gauges of nodes that are gone:\n%s", b.String())
		}
		w.set.Close()
	})
}

func TestConfigNamesWhatIsWrong(t *testing.T) {
	if _, err := New(Config{Shards: -1, QueueLen: -1, Silence: time.Second, BackoffMax: tick, MaxFrameBytes: 100}); err == nil {
		t.Error("accepted")
	} else {
		for _, field := range []string{"Shards", "QueueLen", "Silence", "BackoffMax", "MaxFrameBytes"} {
			if !strings.Contains(err.Error(), field) {
				t.Errorf("%s is not named in %v", field, err)
			}
		}
	}
	if err := (Config{}).Validate(); err != nil {
		t.Errorf("zero config: %v", err)
	}
}
