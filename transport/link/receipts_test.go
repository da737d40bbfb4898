package link

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// toClients is a push to a room of three whose clients are to acknowledge.
func (w *world) toClients(text string) *engine.Push {
	p := w.toRoom("r", text)
	p.Options = &engine.Options{ClientAck: true, AckTimeout: 2 * time.Second}
	return p
}

// confirmingNode is a node whose clients are to acknowledge what wants it.
func confirmingNode() *script {
	n := scripted(lasting...)
	n.pending = true
	return n
}

// begun starts a push and waits until the node has acknowledged it.
func (w *world) begun(p *engine.Push) *pending {
	f := w.begin(p)
	synctest.Wait()
	return f
}

func (p *pending) over() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func TestWindowDoesNotWaitForClients(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := confirmingNode()
		w := scriptedWorld(t, Config{Window: 1}, n)
		var list []*pending
		for range 3 {
			list = append(list, w.begun(w.toClients("x")))
		}
		d := n.sent()[0].GetDeliveries()[0]
		if !d.GetWantAck() || d.GetAckTimeoutMs() < 1500 || d.GetAckTimeoutMs() > 2000 { // 2 s, but for the way
			t.Errorf("arrived: %v", d)
		}
		if st := w.set.Stats(); st.Unacked != 0 || st.Unconfirmed != 3 || st.Stalled != 0 {
			t.Errorf("%+v", st)
		}
		for i, f := range list {
			if f.over() {
				t.Errorf("push %d is over before a client has acknowledged", i)
			}
		}
		n.say(
			&pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 2, Acked: 2}, {Seq: 1, Acked: 3, Final: true}}},
			&pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 2, Unacked: []string{"u3"}, Final: true}, {Seq: 3, Acked: 1}}},
		)
		if r := w.end(list[0]); r.Delivered != 3 || r.Acked != 3 {
			t.Errorf("all have: %+v", r)
		}
		if r := w.end(list[1]); r.Delivered != 2 || r.Acked != 2 || r.Unknown != 1 {
			t.Errorf("all but one have: %+v", r)
		}
		if st := w.set.Stats(); st.Unconfirmed != 1 {
			t.Errorf("%+v", st)
		}
		n.kill()
		if r := w.end(list[2]); r.Acked != 1 || r.Unknown != 2 {
			t.Errorf("the stream has ended: %+v", r)
		}
		if st := w.set.Stats(); st.Unconfirmed != 0 || w.set.meters.strikes.Get() != 0 {
			t.Errorf("%+v, %d strikes", st, w.set.meters.strikes.Get())
		}
	})
}

// An ack and the last receipt may come in one frame, whatever stands first in it.
func TestReceiptMayComeWithTheAck(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := confirmingNode()
		n.answer = func(seq uint64, users []string, _ string, r *pubsub.DeliverResponse) {
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{uint32(len(users))}})
			r.Receipts = append(r.Receipts, &pubsub.Receipt{Seq: seq, Acked: uint32(len(users)), Final: true})
		}
		w := scriptedWorld(t, Config{}, n)
		if r := w.do(w.toClients("x")); r.Acked != 3 {
			t.Errorf("%+v", r)
		}
	})
}

func TestDuplicatesAndReusedIdsAreCounted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := scripted(lasting...)
		n.answer = func(seq uint64, _ []string, _ string, r *pubsub.DeliverResponse) {
			r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{2}, Duplicates: []uint32{1}})
			r.Misses = append(r.Misses, &pubsub.Miss{Seq: seq, Reused: []string{"u2"}})
		}
		w := scriptedWorld(t, Config{}, n)
		p := w.toRoom("r", "x")
		p.Options = &engine.Options{MessageID: "m"}
		if r := w.do(p); r.Delivered != 2 || r.Duplicates != 1 || r.Failed != 1 || !strings.Contains(reasons(r), engine.DropReused.String()) {
			t.Errorf("%+v", r)
		}
	})
}

func TestNodeThatNeverSendsAFinalReceipt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := confirmingNode()
		w := scriptedWorld(t, Config{}, n)
		f := w.begun(w.toClients("x"))
		n.say(&pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 1}}})
		if r := w.end(f); r.Acked != 1 || r.Unknown != 2 {
			t.Errorf("%+v", r)
		}
		time.Sleep(2 * receiptsSweep)
		synctest.Wait()
		if st := w.set.Stats(); st.Unconfirmed != 0 || st.Live != 1 {
			t.Errorf("kept for ever: %+v", st)
		}
		n.say(&pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 2, Final: true}, {Seq: 1, Acked: 2, Final: true}}})
		if late, strikes := w.set.meters.lateReceipts.Get(), w.set.meters.strikes.Get(); late != 2 || strikes != 0 {
			t.Errorf("%d late, %d strikes", late, strikes)
		}
	})
}

func TestReceiptsThatCannotBeAreViolations(t *testing.T) {
	for name, test := range map[string]struct {
		say     []*pubsub.Receipt
		strikes uint64
	}{
		"never sent":          {[]*pubsub.Receipt{{Seq: 2, Acked: 1}, {Seq: 1 << 63, Acked: 1}}, 2},
		"no seq":              {[]*pubsub.Receipt{{Acked: 1}}, 1},
		"more than were":      {[]*pubsub.Receipt{{Seq: 1, Acked: 4}}, 1},
		"more, later":         {[]*pubsub.Receipt{{Seq: 1, Acked: 2}, {Seq: 1, Acked: 2}}, 1},
		"users it was not to": {[]*pubsub.Receipt{{Seq: 1, Unacked: []string{"nobody"}}}, 1},
		"not all, and final":  {[]*pubsub.Receipt{{Seq: 1, Acked: 1, Final: true}}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := confirmingNode()
				w := scriptedWorld(t, Config{}, n)
				f := w.begun(w.toClients("x"))
				n.say(&pubsub.DeliverResponse{Receipts: test.say})
				if got := w.set.meters.strikes.Get(); got != test.strikes {
					t.Errorf("%d strikes, want %d", got, test.strikes)
				}
				w.end(f)
				if w.set.Stats().Live != 1 {
					t.Error("the stream has ended")
				}
				n.say(&pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{}, {}, {}}})
				if w.set.meters.quarantines.Get() != 1 {
					t.Error("not in quarantine")
				}
			})
		})
	}
}

func TestReceiptInPlaceOfAnAckIsAViolation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := confirmingNode()
		n.answer = func(uint64, []string, string, *pubsub.DeliverResponse) {}
		w := scriptedWorld(t, Config{}, n)
		f := w.begun(w.toClients("x"))
		n.say(&pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 3, Final: true}}})
		if r := w.end(f); r.Unknown != 3 {
			t.Errorf("%+v", r)
		}
		if got := w.set.meters.strikes.Get(); got != 1 {
			t.Errorf("%d strikes", got)
		}
	})
}

func TestNodeOfBeforeIsNotAskedForReceipts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := scripted()
		w := scriptedWorld(t, Config{}, n)
		if r := w.do(w.toClients("x")); r.Delivered != 3 || r.Acked != 0 {
			t.Errorf("%+v", r)
		}
		if d := n.sent()[0].GetDeliveries()[0]; d.GetWantAck() || d.GetAckTimeoutMs() != 0 {
			t.Errorf("arrived: %v", d)
		}
	})
}

// A node that drains gives its clients up at once, and is heard.
func TestNodeThatDrainsHasItsReceiptsHeard(t *testing.T) {
	for name, answers := range map[string]bool{"it gives them up": true, "it says nothing": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := confirmingNode()
				w := scriptedWorld(t, Config{}, n)
				f := w.begun(w.toClients("x"))
				n.say(&pubsub.DeliverResponse{Drain: true})
				if f.over() || n.open() != 1 {
					t.Fatal("it was not waited for")
				}
				if answers {
					n.say(&pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 2, Unacked: []string{"u2"}, Final: true}}})
				}
				begun := time.Now()
				r := w.end(f)
				if answers && (r.Acked != 2 || time.Since(begun) > 0) || !answers && (r.Unknown != 3 || time.Since(begun) > 1100*time.Millisecond) {
					t.Errorf("after %v: %+v", time.Since(begun), r)
				}
				time.Sleep(time.Second)
				if n.open() != 1 || n.opened() != 2 { // it takes a second one
					t.Error("its stream was not closed")
				}
			})
		})
	}
}

// A node that has lost its registration and lives is heard, as with its acks.
func TestNodeThatIsGoneHasItsReceiptsHeard(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := confirmingNode()
		w := scriptedWorld(t, Config{}, n)
		f := w.begun(w.toClients("x"))
		w.register()
		time.Sleep(100 * time.Millisecond)
		n.say(&pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 3, Final: true}}})
		if r := w.end(f); r.Acked != 3 {
			t.Errorf("%+v", r)
		}
		time.Sleep(100 * time.Millisecond)
		if n.open() != 0 {
			t.Error("its stream was not closed")
		}
	})
}

// asyncBooks is told what clients say of pushes that do not wait for it.
type asyncBooks struct {
	mu     sync.Mutex
	finals []engine.Result
}

func (b *asyncBooks) Receipt(_ *engine.Push, r engine.Result, _ []string, final bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if final {
		b.finals = append(b.finals, r)
	}
}

func TestOpenReceiptsAreLostWithTheirStreamOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := confirmingNode()
		w := scriptedWorld(t, Config{}, n)
		books := &asyncBooks{}
		for range 10 {
			p := w.toClients("x")
			p.Options.MessageID, p.Options.Async, p.Options.Receipts, p.Options.AckTimeout = "m", true, books, time.Minute
			if r := w.end(w.begun(p)); r.Delivered+r.Unknown != 3 {
				t.Errorf("before its receipts: %+v", r)
			}
		}
		if st := w.set.Stats(); st.Unconfirmed != 10 {
			t.Fatalf("%+v", st)
		}
		n.say(&pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 3, Final: true}, {Seq: 2, Acked: 3}}})
		n.kill()
		time.Sleep(time.Second)
		books.mu.Lock()
		defer books.mu.Unlock()
		acked := 0
		for _, r := range books.finals {
			w.balanced(r)
			acked += r.Acked
		}
		if len(books.finals) != 10 || acked != 6 {
			t.Errorf("%d have an end, %d acked: %+v", len(books.finals), acked, books.finals)
		}
	})
}

// What is beyond the bound is given up at once, and only that.
func TestOpenReceiptsAreBounded(t *testing.T) {
	w := newWorld(t, Config{})
	w.room("r", "A", "u1", "u2", "u3")
	d := w.delivery(t, w.toClients(strings.Repeat("x", 1<<18)))
	var r receipts
	seq := uint64(0)
	for r.add(seq+1, d) {
		seq++
	}
	if seq < 250 || seq > 256 || r.bytes > receiptsBytes {
		t.Errorf("%d of 256 KiB", seq)
	}
	for i := range seq {
		r.remove(i + 1)
	}
	if r.bytes != 0 || r.open != nil {
		t.Errorf("%d bytes of nothing", r.bytes)
	}
	small := w.delivery(t, w.toClients("x"))
	for seq = 0; r.add(seq+1, small); {
		seq++
	}
	if seq != receiptsMax {
		t.Errorf("%d small ones", seq)
	}
	if got := r.popAll(); len(got) != receiptsMax || !slices.Contains(got, small) || r.bytes != 0 {
		t.Errorf("%d popped", len(got))
	}
}
