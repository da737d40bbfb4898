package node

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"pgregory.net/rapid"
)

func TestTheRingRemembersTheLast64AndNothingElse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var r ring
		var order []uint64 // remembered or forgotten, the oldest first
		payload := map[uint64]uint32{}
		for range rapid.IntRange(0, 400).Draw(t, "steps") {
			key := rapid.Uint64Range(1, 120).Draw(t, "key")
			switch rapid.IntRange(0, 9).Draw(t, "what") {
			case 0:
				r.forget(key)
				if _, ok := payload[key]; ok {
					delete(payload, key)
					order[slices.Index(order, key)] = 0 // Its place is used when its turn comes.
				}
			default:
				at := r.find(key)
				want, known := payload[key]
				if known != (at >= 0) || known && r.payload[at] != want {
					t.Fatalf("key %d: at %d, want known %t with %d", key, at, known, want)
				}
				if known {
					continue
				}
				p := rapid.Uint32().Draw(t, "payload")
				r.add(key, p)
				if len(order) == ringMost {
					delete(payload, order[0])
					order = order[1:]
				}
				order, payload[key] = append(order, key), p
			}
		}
		if got := cap(r.ids); got > ringMost || len(order) <= 8 && got > 8 {
			t.Fatalf("room for %d with %d remembered", got, len(order))
		}
	})
}

// desk is a gateway's side of one connection, for tests of Inbox: a queue, a wire, a client.
type desk struct {
	inbox Inbox[string]
	queue []Entry[string]
	room  int
	now   time.Time
	books map[string]int

	wire []Entry[string] // written
}

func newDesk(acks bool) *desk {
	d := &desk{room: 1 << 20, now: time.Unix(1_000_000, 0), books: map[string]int{}}
	d.inbox.Acks = acks
	d.inbox.Books = func(f string, delta int) { d.books[f] += delta }
	return d
}

// offer is what DeliverLasting of a gateway does.
func (d *desk) offer(m *Message, c *Confirmation) Outcome {
	frame := string(m.Data)
	if out, settled := d.inbox.Check(m, c, len(frame), d.now); settled {
		return out
	}
	if len(d.queue) >= d.room && !d.inbox.Behind(m) {
		return Failed
	}
	e, queue, out := d.inbox.Take(m, c, frame, len(frame), d.now)
	if queue {
		d.enqueue(e)
	}
	return out
}

func (d *desk) enqueue(e Entry[string]) {
	if e.Collapse != 0 {
		if i := slices.IndexFunc(d.queue, func(q Entry[string]) bool { return q.Collapse == e.Collapse }); i >= 0 {
			d.queue[i] = d.inbox.Replace(d.queue[i], e)
			return
		}
	}
	d.queue = append(d.queue, e)
}

func (d *desk) fill() {
	for len(d.queue) < d.room {
		e, ok := d.inbox.Pop(d.now)
		if !ok {
			return
		}
		d.enqueue(e)
	}
}

// write writes up to n entries.
func (d *desk) write(n int) {
	for range n {
		if len(d.queue) == 0 {
			return
		}
		e := d.queue[0]
		d.queue = d.queue[1:]
		if d.inbox.Write(&e, d.now) {
			d.wire = append(d.wire, e)
		}
		d.fill()
	}
}

// shown are the frames that were written.
func (d *desk) shown() (frames []string) {
	for _, e := range d.wire {
		frames = append(frames, e.Frame)
	}
	return frames
}

func (d *desk) tick(after time.Duration) (ping, cut bool) {
	d.now = d.now.Add(after)
	ping, cut = d.inbox.Tick(d.now)
	d.fill()
	return ping, cut
}

// message is one with an id.
func (d *desk) message(id string, set ...func(*Options)) *Message {
	o := &Options{ID: id, PayloadHash: 1}
	if id != "" {
		o.Key = hashOf('i', "", id)
	}
	for _, f := range set {
		f(o)
	}
	return &Message{Data: []byte(id), Options: o}
}

func (d *desk) ackBy(timeout time.Duration) func(*Options) {
	return func(o *Options) { o.WantsAck, o.AckBy = true, d.now.Add(timeout) }
}

// waits makes Confirmations, and knows what has become of them.
type waits struct {
	receipts *receipts
	of       *awaited
	all      map[string]*Confirmation
}

func newWaits() *waits {
	count := newCounters(metrics.NewSet())
	r := newReceipts(1<<20, func() {}, &count)
	return &waits{receipts: r, of: r.await(1, time.Unix(1<<40, 0), 1), all: map[string]*Confirmation{}}
}

func (w *waits) of1(name string) *Confirmation {
	c := w.of.confirmation(name)
	w.all[name] = c
	return c
}

func TestAnIdIsShownOnce(t *testing.T) {
	for name, c := range map[string]struct {
		second *Message
		want   Outcome
	}{
		"again":                  {newDesk(false).message("a"), Duplicate},
		"with another payload":   {newDesk(false).message("a", func(o *Options) { o.PayloadHash = 2 }), Reused},
		"another id":             {newDesk(false).message("b"), Delivered},
		"without an id":          {newDesk(false).message(""), Delivered},
		"when its time is over":  {newDesk(false).message("c", func(o *Options) { o.Expires = time.Unix(999_999, 0) }), Expired},
		"while its time is left": {newDesk(false).message("c", func(o *Options) { o.Expires = time.Unix(1_000_001, 0) }), Delivered},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(false)
			if out := d.offer(d.message("a"), nil); out != Delivered {
				t.Fatalf("the first: %v", out)
			}
			if out := d.offer(c.second, nil); out != c.want {
				t.Errorf("got %v, want %v", out, c.want)
			}
		})
	}
	d := newDesk(false)
	d.room = 0
	m := d.message("a")
	if out := d.offer(m, nil); out != Failed {
		t.Fatalf("a full queue: %v", out)
	}
	d.room = 1
	if out := d.offer(m, nil); out != Delivered {
		t.Errorf("what the queue did not take is remembered: %v", out)
	}
}

func TestIdsOfTwoSendersAreNotTheSame(t *testing.T) {
	if hashOf('i', "a", "bc") == hashOf('i', "ab", "c") || hashOf('i', "", "x") == hashOf('c', "", "x") {
		t.Error("the same hash")
	}
}

func TestWhatExpiresInTheQueueIsNotWritten(t *testing.T) {
	w := newWaits()
	d := newDesk(true)
	soon := func(o *Options) { o.Expires = d.now.Add(time.Second) }
	d.offer(d.message("plain", soon), nil)
	d.offer(d.message("acked", soon, d.ackBy(time.Minute)), w.of1("acked"))
	d.offer(d.message("lasting"), nil)
	d.now = d.now.Add(time.Second)
	d.write(3)
	if got := d.shown(); !slices.Equal(got, []string{"lasting"}) {
		t.Errorf("written: %q", got)
	}
	w.is(t, "acked", false)
}

// is checks what became of one that was Pending.
func (w *waits) is(t *testing.T, name string, acked bool) {
	t.Helper()
	c := w.all[name]
	w.of.settle(c, Pending)
	w.receipts.mu.Lock()
	defer w.receipts.mu.Unlock()
	if !c.done || c.acked != acked {
		t.Errorf("%s: settled %t, acked %t, want acked %t", name, c.done, c.acked, acked)
	}
}

func (w *waits) open(t *testing.T, name string) {
	t.Helper()
	w.receipts.mu.Lock()
	defer w.receipts.mu.Unlock()
	if c := w.all[name]; c.acked || c.open < 2 {
		t.Errorf("%s is settled", name)
	}
}

func TestAcksAreCumulativeAndOnlyForWhatWasWritten(t *testing.T) {
	w := newWaits()
	d := newDesk(true)
	for i := range 4 {
		id := fmt.Sprint(i)
		if out := d.offer(d.message(id, d.ackBy(time.Minute)), w.of1(id)); out != Pending {
			t.Fatalf("%v", out)
		}
	}
	d.write(3)
	if err := d.inbox.Ack(d.wire[1].Ack); err != nil {
		t.Fatal(err)
	}
	w.is(t, "0", true)
	w.is(t, "1", true)
	w.open(t, "2")
	if err := d.inbox.Ack(d.queue[0].Ack); err != nil { // It has not been sent yet.
		t.Fatal(err)
	}
	w.is(t, "2", true)
	w.open(t, "3")
	if err := d.inbox.Ack(99); err == nil {
		t.Error("an ack of what there is not is taken")
	}
	d.inbox.Close()
	w.is(t, "3", false)
	if frames, bytes := d.inbox.Kept(); frames != 0 || bytes != 0 {
		t.Errorf("kept: %d frames, %d bytes", frames, bytes)
	}
	for f, n := range d.books {
		if n != 0 {
			t.Errorf("books: %q %d", f, n)
		}
	}
}

func TestAClientThatCannotAcknowledgeIsAskedForNothing(t *testing.T) {
	w := newWaits()
	d := newDesk(false)
	if out := d.offer(d.message("a", d.ackBy(time.Minute)), w.of1("a")); out != Delivered {
		t.Fatalf("%v", out)
	}
	d.write(1)
	if d.wire[0].Ack != 0 || !d.inbox.Due().IsZero() {
		t.Errorf("number %d, due %v", d.wire[0].Ack, d.inbox.Due())
	}
}

func TestHalfOfTheTimeWithoutAnAckIsAPingAndARepeat(t *testing.T) {
	w := newWaits()
	d := newDesk(true)
	d.offer(d.message("a", d.ackBy(8*time.Second)), w.of1("a"))
	d.write(1)
	if due := d.inbox.Due().Sub(d.now); due != 4*time.Second {
		t.Fatalf("due in %v", due)
	}
	if ping, cut := d.tick(3 * time.Second); ping || cut {
		t.Fatal("early")
	}
	if ping, cut := d.tick(time.Second); !ping || cut {
		t.Fatalf("at half time: ping %t, cut %t", ping, cut)
	}
	d.write(9)
	if len(d.wire) != 2 || !d.wire[1].Replayed || d.wire[1].Ack != d.wire[0].Ack {
		t.Fatalf("written: %+v", d.wire)
	}
	d.inbox.Heard()
	if ping, cut := d.tick(3 * time.Second); ping || cut {
		t.Fatal("again")
	}
	d.write(9)
	if len(d.wire) != 2 {
		t.Fatal("repeated twice")
	}
	w.open(t, "a")
	if _, cut := d.tick(time.Second); cut {
		t.Fatal("a client that lives is cut")
	}
	w.is(t, "a", false)
	if out := d.offer(d.message("a"), nil); out != Delivered {
		t.Errorf("what was given up comes again and is %v", out)
	}
}

func TestAClientThatAnswersNoPingIsCut(t *testing.T) {
	w := newWaits()
	d := newDesk(true)
	d.offer(d.message("a", d.ackBy(20*time.Second)), w.of1("a"))
	d.offer(d.message("b", d.ackBy(20*time.Second)), w.of1("b")) // never written: the socket takes nothing
	d.write(1)
	if ping, _ := d.tick(10 * time.Second); !ping {
		t.Fatal("no ping")
	}
	if due := d.inbox.Due().Sub(d.now); due != PongTimeout {
		t.Errorf("due in %v", due)
	}
	if _, cut := d.tick(PongTimeout - 1); cut {
		t.Fatal("cut early")
	}
	if _, cut := d.tick(1); !cut {
		t.Fatal("not cut")
	}
}

func TestAClientMayLeave256FramesAnd256KiBUnacknowledged(t *testing.T) {
	for name, c := range map[string]struct{ size, most int }{
		"frames": {1, UnackedFrames},
		"bytes":  {64 << 10, 4},
		"large":  {UnackedBytes + 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWaits()
			d := newDesk(true)
			n := 0
			for ; n < 1000; n++ {
				m := d.message(fmt.Sprint(n), d.ackBy(time.Minute))
				m.Data = make([]byte, c.size)
				out := d.offer(m, w.of1(fmt.Sprint(n)))
				d.write(1)
				if out == Stalled {
					break
				}
			}
			if n != c.most {
				t.Errorf("%d were taken, want %d", n, c.most)
			}
			if out := d.offer(d.message("wants none"), nil); out != Delivered {
				t.Errorf("without an ack: %v", out)
			}
			if err := d.inbox.Ack(d.wire[0].Ack); err != nil {
				t.Fatal(err)
			}
			if out := d.offer(d.message("more", d.ackBy(time.Minute)), w.of1("more")); out != Pending {
				t.Errorf("after an ack: %v", out)
			}
		})
	}
}

func TestARetryOfWhatIsNotAcknowledgedWaitsForTheSameAck(t *testing.T) {
	w := newWaits()
	d := newDesk(true)
	d.offer(d.message("a", d.ackBy(time.Minute)), w.of1("first"))
	d.write(1)
	if out := d.offer(d.message("a", d.ackBy(time.Minute)), w.of1("second")); out != Pending {
		t.Fatalf("%v", out)
	}
	if err := d.inbox.Ack(1); err != nil {
		t.Fatal(err)
	}
	w.is(t, "first", true)
	w.is(t, "second", true)
	if out := d.offer(d.message("a", d.ackBy(time.Minute)), w.of1("third")); out != Duplicate {
		t.Errorf("after the ack: %v", out)
	}
	if len(d.queue) > 0 {
		t.Error("shown again")
	}
}

func TestTheNewestOfACollapseKeyTakesThePlaceOfOneThatWaits(t *testing.T) {
	key := func(o *Options) { o.CollapseKey, o.Collapse = "k", hashOf('c', "", "k") }
	for name, gated := range map[string]bool{"in the queue": false, "behind the gate": true} {
		for acks, steps := range map[string][]bool{ // which of the two want an ack
			"both": {true, true}, "none": {false, false}, "the older": {true, false}, "the newer": {false, true},
		} {
			t.Run(name+"/"+acks, func(t *testing.T) {
				w := newWaits()
				d := newDesk(true)
				if gated {
					d.inbox.Gate = new(Gate)
					d.inbox.Gate.closed.Store(true)
				}
				d.offer(d.message("before", d.ackBy(time.Minute)), w.of1("before"))
				for i, id := range []string{"old", "new"} {
					var c *Confirmation
					if steps[i] {
						c = w.of1(id)
					}
					d.offer(d.message(id, key, d.ackBy(time.Minute)), c)
					d.offer(d.message("after-"+id, d.ackBy(time.Minute)), w.of1("after-"+id))
				}
				if gated {
					d.inbox.Gate.closed.Store(false)
					d.fill()
				}
				d.write(2)
				if err := d.inbox.Ack(d.wire[1].Ack); err != nil {
					t.Fatal(err)
				}
				d.write(9)
				if got := d.shown(); !slices.Equal(got, []string{"before", "new", "after-old", "after-new"}) {
					t.Errorf("written: %q", got)
				}
				if steps[0] || steps[1] {
					w.is(t, "before", true)
				}
				for i, id := range []string{"old", "new"} {
					if steps[i] {
						w.is(t, id, true)
					}
				}
				for i := 1; i < len(d.wire); i++ {
					if n := d.wire[i].Ack; n != 0 && n <= d.wire[i-1].Ack {
						t.Errorf("numbers do not rise: %+v", d.wire)
					}
				}
				if d.offer(d.message("newest", key), nil); len(d.queue) != 1 {
					t.Error("it takes the place of what was written")
				}
			})
		}
	}
}

// TestAnInboxUnderRandomSchedules: whatever comes in whatever order, no id is shown twice but as a repeat,
// nothing overtakes anything but what is out of the store, whatever was Delivered or Pending and not given
// up is shown, and everything Pending ends once.
func TestAnInboxUnderRandomSchedules(t *testing.T) {
	for seed := range uint64(3000) {
		if err := randomInbox(seed); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func randomInbox(seed uint64) error {
	r := rand.New(rand.NewPCG(seed, 7))
	w := newWaits()
	d := newDesk(r.IntN(4) > 0)
	d.room = 2 + r.IntN(40)
	gate := new(Gate)
	d.inbox.Gate = gate
	gate.closed.Store(r.IntN(2) == 0)
	var ids []string
	outcome := map[string]Outcome{}
	ended := map[string]bool{} // Pending, and so it has ended
	dead := false
	var acked uint64
	for range 20 + r.IntN(200) {
		switch r.IntN(10) {
		case 0, 1, 2, 3:
			var set []func(*Options)
			var c *Confirmation
			id := fmt.Sprintf("%04d", len(ids))
			fresh := true
			if len(ids) > 0 && r.IntN(5) == 0 {
				id, fresh = ids[max(0, len(ids)-1-r.IntN(20))], false
			}
			name := fmt.Sprint(id, "/", len(w.all))
			if r.IntN(2) == 0 {
				set = append(set, d.ackBy(time.Duration(1+r.IntN(4000))*time.Millisecond))
				c = w.of1(name)
			}
			out := d.offer(d.message(id, set...), c)
			if c != nil {
				w.of.settle(c, out)
				ended[name] = out != Pending
			}
			if fresh {
				ids = append(ids, id)
				outcome[id] = out
			} else if out == Delivered || out == Pending {
				if o := outcome[id]; o == Delivered || o == Pending && !d.inbox.Acks {
					return fmt.Errorf("%s was %v, and %v again", id, o, out)
				}
			}
		case 4, 5:
			d.write(1 + r.IntN(5))
		case 6:
			if n := len(d.wire); n > 0 {
				acked = max(acked, d.wire[r.IntN(n)].Ack)
				if err := d.inbox.Ack(acked); err != nil {
					return err
				}
			}
		case 7:
			d.inbox.Heard()
			_, dead = d.tick(time.Duration(r.IntN(900)) * time.Millisecond)
		case 8:
			gate.closed.Store(r.IntN(2) == 0)
			d.fill()
		case 9:
			d.fill()
		}
		if dead {
			break
		}
		if frames, bytes := d.inbox.Kept(); frames > UnackedFrames+HeldFrames || bytes > UnackedBytes+HeldBytes || bytes < 0 {
			return fmt.Errorf("kept: %d frames, %d bytes", frames, bytes)
		}
	}
	if !dead {
		gate.closed.Store(false)
		for range 1000 {
			d.inbox.Heard()
			d.fill()
			d.write(100)
			if n := len(d.wire); n > 0 && d.inbox.Acks {
				for _, e := range d.wire {
					acked = max(acked, e.Ack)
				}
				if err := d.inbox.Ack(acked); err != nil {
					return err
				}
			}
		}
	}
	d.inbox.Close()
	first := map[string]int{}
	for i, e := range d.wire {
		if _, ok := first[e.Frame]; ok && !e.Replayed && outcome[e.Frame] == Delivered {
			return fmt.Errorf("%s is shown twice", e.Frame)
		} else if !ok {
			first[e.Frame] = i
		}
	}
	last := -1
	for _, id := range ids {
		at, shown := first[id]
		if !shown {
			if outcome[id] == Delivered && !dead {
				return fmt.Errorf("%s was delivered and is not shown", id)
			}
			continue
		}
		if outcome[id] == Delivered {
			if at < last {
				return fmt.Errorf("%s is shown too late or too early", id)
			}
			last = at
		}
	}
	for name, c := range w.all {
		if !c.done {
			return fmt.Errorf("%s has not ended", name)
		}
	}
	for f, n := range d.books {
		if n != 0 {
			return fmt.Errorf("books: %q %d", f, n)
		}
	}
	return nil
}

func TestAnOpenGateLetsNothingOvertakeWhatWasHeld(t *testing.T) {
	d := newDesk(true)
	d.inbox.Gate = new(Gate)
	d.inbox.Gate.closed.Store(true)
	d.offer(d.message("a"), nil)
	d.inbox.Gate.closed.Store(false)
	d.offer(d.message("b"), nil) // Nobody has called Pop yet.
	d.fill()
	d.write(9)
	if got := d.shown(); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("written: %q", got)
	}
}

func TestWhatIsHeldIsGivenUpInTimeAndCountsAsUnacknowledgedOnceItGoes(t *testing.T) {
	w := newWaits()
	d := newDesk(true)
	d.inbox.Gate = new(Gate)
	d.inbox.Gate.closed.Store(true)
	d.offer(d.message("late", d.ackBy(time.Second)), w.of1("late"))
	for _, id := range []string{"a", "b", "c"} {
		m := d.message(id, d.ackBy(time.Minute))
		m.Data = make([]byte, HeldBytes/3-8)
		d.offer(m, w.of1(id))
	}
	if d.tick(time.Second); len(d.queue) > 0 {
		t.Error("the gate is closed")
	}
	w.is(t, "late", false)
	d.inbox.records = []record[string]{{Entry: Entry[string]{Size: UnackedBytes / 2, number: 1}}}
	d.inbox.last, d.inbox.bytes = 1, UnackedBytes/2
	d.inbox.Gate.closed.Store(false)
	if d.fill(); len(d.queue) != 1 {
		t.Errorf("%d frames go beside what is unacknowledged, want 1", len(d.queue))
	}
}

func TestWhatWasNotWrittenIsNotRepeated(t *testing.T) {
	w := newWaits()
	d := newDesk(true)
	d.offer(d.message("a", d.ackBy(8*time.Second)), w.of1("a"))
	d.tick(4 * time.Second)
	d.write(9)
	if got := d.shown(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("written: %q", got)
	}
}

func TestRetriesThatWaitForOneFrameAreBounded(t *testing.T) {
	w := newWaits()
	d := newDesk(true)
	for i := range UnackedFrames + 10 {
		d.offer(d.message("a", d.ackBy(time.Minute)), w.of1(fmt.Sprint(i)))
	}
	if n := len(d.inbox.records[0].waits); n != UnackedFrames {
		t.Errorf("%d wait", n)
	}
	w.is(t, "9", false)
	w.open(t, "10")
}

func TestWhatExpiresBehindTheGateIsGoneAndItsRetryIsNot(t *testing.T) {
	d := newDesk(true)
	d.inbox.Gate = new(Gate)
	d.inbox.Gate.closed.Store(true)
	d.offer(d.message("a", func(o *Options) { o.Expires = d.now.Add(time.Second) }), nil)
	d.now = d.now.Add(time.Second)
	d.inbox.Gate.closed.Store(false)
	if d.fill(); len(d.queue) > 0 {
		t.Error("it takes the place of another in the queue")
	}
	if out := d.offer(d.message("a"), nil); out != Delivered {
		t.Errorf("a retry that has not expired: %v", out)
	}
}

func TestOfACollapseKeyTheNewestWaitsBehindTheGate(t *testing.T) {
	w := newWaits()
	d := newDesk(true)
	d.inbox.Gate = new(Gate)
	d.inbox.Gate.closed.Store(true)
	key := func(o *Options) { o.Collapse = 7 }
	d.offer(d.message("old", key, d.ackBy(time.Minute)), w.of1("old"))
	d.offer(d.message("other"), nil)
	d.offer(d.message("new", key, d.ackBy(time.Minute)), w.of1("new"))
	if frames, _ := d.inbox.Kept(); frames != 2 || d.books["old"] != 0 {
		t.Errorf("%d frames are kept, of the old one %d", frames, d.books["old"])
	}
	d.inbox.Gate.closed.Store(false)
	d.fill()
	d.write(9)
	if got := d.shown(); !slices.Equal(got, []string{"new", "other"}) {
		t.Errorf("written: %q", got)
	}
	if err := d.inbox.Ack(d.wire[0].Ack); err != nil {
		t.Fatal(err)
	}
	w.is(t, "old", true) // the client has what took its place
	w.is(t, "new", true)
}

func TestWhatWaitsBehindTheGateIsBounded(t *testing.T) {
	for name, size := range map[string]int{"frames": 1, "bytes": HeldBytes / 8} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(false)
			d.inbox.Gate = new(Gate)
			d.inbox.Gate.closed.Store(true)
			taken := 0
			for i := range HeldFrames + 10 {
				m := d.message(fmt.Sprint(i))
				m.Data = make([]byte, size)
				if d.offer(m, nil) == Delivered {
					taken++
				}
			}
			if want := min(HeldFrames, HeldBytes/size); taken != want {
				t.Errorf("%d are taken, want %d", taken, want)
			}
		})
	}
}

func TestOnlyAnEntryThatWriteNeverRefusesIsPlain(t *testing.T) {
	d := newDesk(true)
	for name, c := range map[string]struct {
		m    *Message
		c    *Confirmation
		want bool
	}{
		"an id":              {d.message("a"), nil, true},
		"expires":            {d.message("b", func(o *Options) { o.Expires = d.now.Add(time.Second) }), nil, false},
		"collapses":          {d.message("c", func(o *Options) { o.Collapse = 7 }), nil, false},
		"is acknowledged":    {d.message("d", d.ackBy(time.Second)), newWaits().of1("d"), false},
		"out of the store":   {d.message("e", func(o *Options) { o.ask = &ask{} }), nil, false},
		"nothing whatsoever": {d.message(""), nil, true},
	} {
		d.queue = nil
		if d.offer(c.m, c.c); len(d.queue) != 1 || d.queue[0].Plain() != c.want {
			t.Errorf("%s: %+v, want plain %t", name, d.queue, c.want)
		}
	}
}

// TestWhatStandsInALogIsShownAlthoughItsAckIsGivenUp: the client is told that it is behind it, and is not given it again.
func TestWhatStandsInALogIsShownAlthoughItsAckIsGivenUp(t *testing.T) {
	logged := func(o *Options) { o.Log = &LogPlace{Seq: 1} }
	t.Run("in the queue", func(t *testing.T) {
		w, d := newWaits(), newDesk(true)
		d.offer(d.message("logged", logged, d.ackBy(time.Second)), w.of1("logged"))
		d.offer(d.message("not", d.ackBy(time.Second)), w.of1("not"))
		d.offer(d.message("expired", logged, d.ackBy(time.Second), func(o *Options) { o.Expires = d.now.Add(time.Second) }), w.of1("expired"))
		d.tick(time.Second)
		d.write(9)
		if got := d.shown(); !slices.Equal(got, []string{"logged"}) {
			t.Errorf("written: %q", got)
		}
		w.is(t, "logged", false)
		w.is(t, "not", false)
	})
	t.Run("behind the gate", func(t *testing.T) {
		w, d := newWaits(), newDesk(true)
		d.inbox.Gate = new(Gate)
		d.inbox.Gate.closed.Store(true)
		for _, id := range []string{"one", "two"} {
			d.offer(d.message(id, logged, d.ackBy(time.Second)), w.of1(id))
		}
		if d.tick(500 * time.Millisecond); !d.inbox.Holds() {
			t.Error("nothing is held")
		}
		d.tick(500 * time.Millisecond)
		w.is(t, "one", false)
		w.is(t, "two", false)
		d.inbox.Gate.closed.Store(false)
		d.fill()
		d.write(9)
		if got := d.shown(); !slices.Equal(got, []string{"one", "two"}) || d.inbox.Holds() {
			t.Errorf("written: %q", got)
		}
		if d.wire[0].Ack != 0 {
			t.Error("an acknowledgement is asked for, and nobody waits for it")
		}
		if d.inbox.Close(); !d.inbox.Holds() {
			t.Error("a closed inbox takes nothing any more: whatever is queued overtakes that")
		}
	})
}

func TestWhatIsReadFromALogIsMarkedAsReplayed(t *testing.T) {
	d := newDesk(false)
	for id, read := range map[string]bool{"live": false, "read": true} {
		if d.offer(d.message(id, func(o *Options) { o.Log = &LogPlace{Seq: 1, Read: read} }), nil); d.queue[len(d.queue)-1].Replayed != read {
			t.Errorf("%s: marked %t", id, !read)
		}
	}
}
