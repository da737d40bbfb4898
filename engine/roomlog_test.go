package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine/route"
)

func (s *testSpool) written() []*Stored {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.log)
}

// wantNoLines holds that nobody waits in an Order. It is called in a bubble.
func wantNoLines(t *testing.T, o *Order) {
	t.Helper()
	synctest.Wait() // who has routed the last one takes it out of the line
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.lines) > 0 || o.lined.Load() != 0 {
		t.Errorf("left in line: %v", o.lines)
	}
}

// TestWhatBecomesOfARoom is the table of the contract for a member of a room: what it is with the store, by
// acknowledgements of nodes and of clients. Nothing is stored for him by name.
func TestWhatBecomesOfARoom(t *testing.T) {
	at := Place{Epoch: testEpoch, Partition: 1, Seq: 1}
	result := func(r Result) Result {
		r.Found, r.Targets, r.Place = true, 1, at
		return r
	}
	delivered, acked := result(Result{Delivered: 1}), result(Result{Delivered: 1, Acked: 1})
	stored, unsure := result(Result{Offline: 1, Stored: 1}), result(Result{Offline: 1, Stored: 1, Unsure: 1})
	failed := func(node, reason string) [2]Result {
		r := result(Result{Failed: 1, NodeFailures: []NodeFailure{{node, "failed: " + reason, 1}}})
		return [2]Result{r, r}
	}
	all := func(r Result) [2]Result { return [2]Result{r, r} }
	pending := func(then func(d *Delivery)) func(d *Delivery) {
		return func(d *Delivery) {
			if !d.Options().ClientAck {
				_, _ = d.Ack(Ack{Delivered: 1})
				return
			}
			_, _ = d.Ack(Ack{Delivered: 1, Pending: 1})
			then(d)
		}
	}
	nothing := func(*Delivery) {}
	for name, tt := range map[string]struct {
		answer  func(d *Delivery)
		decline Reason
		away    bool
		ttl     time.Duration
		want    [2]Result // acknowledged by nodes, by clients
	}{
		"the client acknowledges":              {answer: pending(func(d *Delivery) { _ = d.Receipt(1, nil, true) }), want: [2]Result{delivered, acked}},
		"the client cannot acknowledge":        {want: all(delivered)},
		"no acknowledgement in time":           {answer: pending(nothing), want: [2]Result{delivered, unsure}},
		"the client is given up by name":       {answer: pending(func(d *Delivery) { _ = d.Receipt(0, []string{"u"}, true) }), want: [2]Result{delivered, unsure}},
		"the stream breaks before the receipt": {answer: pending((*Delivery).LoseReceipts), want: [2]Result{delivered, unsure}},
		"no connection":                        {away: true, want: all(stored)},
		"no connection there":                  {answer: notHere("u"), want: all(stored)},
		"queue full":                           {decline: DropQueueFull, want: all(stored)},
		"node not reachable":                   {decline: DropUnreachable, want: all(stored)},
		"refused by the node":                  {answer: ack(Ack{Refused: true}), want: all(stored)},
		"queue of the client":                  {answer: ack(Ack{Failed: []string{"u"}}), want: all(stored)},
		"the stream broke":                     {answer: func(d *Delivery) { d.Lose(LostStream) }, want: all(unsure)},
		"counts that do not add up":            {answer: ack(Ack{}), want: all(unsure)},
		"expired in the queue":                 {ttl: time.Second, answer: func(d *Delivery) { time.Sleep(time.Second); d.claimFor(DropExpired) }, want: failed("A", "expired before it was sent")},
		"too long in the queue":                {answer: func(d *Delivery) { d.claimFor(DropExpired) }, want: all(stored)},
		"away until it has expired":            {away: true, ttl: time.Nanosecond, want: failed("", "expired before it was sent")},
		"too large":                            {decline: DropTooLarge, want: failed("A", "too large for a frame")},
		"replaced":                             {decline: DropReplaced, want: failed("A", "replaced by a newer message")},
		"id was reused":                        {answer: ack(Ack{Reused: []string{"u"}}), want: failed("A", "message id was used for another payload")},
		"had it before":                        {answer: ack(Ack{Delivered: 1, Duplicates: 1}), want: all(result(Result{Delivered: 1, Duplicates: 1}))},
	} {
		for i, byClient := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/client=%v", name, byClient), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, spool := newWorld(), newSpool()
					w.config.Spool = spool
					e := w.engine(t)
					w.rooms["r"] = map[string][]string{"u": {"A"}}
					if tt.away {
						w.rooms["r"]["u"] = nil
						w.delay = func() { time.Sleep(time.Microsecond) }
					}
					w.nodes["A"].answer, w.nodes["A"].decline = tt.answer, tt.decline
					r, err := e.Do(t.Context(), with(toRoom("r"), Options{Store: true, MessageID: "m", ClientAck: byClient, TTL: tt.ttl}))
					if err != nil {
						t.Fatal(err)
					}
					want := tt.want[i]
					if tt.ttl == time.Nanosecond { // nobody was asked who is there
						want.Found, want.Place = false, r.Place // it may have been over before the log was asked
						want.NodeFailures = []NodeFailure{{"", "failed: expired before it was sent", 1}}
					}
					if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", want) {
						t.Errorf("got  %+v\nwant %+v", r, want)
					}
					if r.Success() != (r.Failed == 0) {
						t.Errorf("success: %v", r.Success())
					}
					if len(spool.kept) > 0 || len(spool.written()) != 1 {
						t.Errorf("by name %v, in the log %v", spool.kept, spool.written())
					}
					if s := e.Stats(); s.Receipts != 0 || s.InFlight != 0 || s.Panics != 0 {
						t.Errorf("counted %+v", s)
					}
				})
			})
		}
	}
}

// TestWhoHasHadTheIdWithAnotherContentIsStoredByNoNode has a user on two nodes, where one node says that the user has had the
// message id with another content: out of the log it would be told so again, whatever has become of the other delivery.
func TestWhoHasHadTheIdWithAnotherContentIsStoredByNoNode(t *testing.T) {
	at := Place{Epoch: testEpoch, Partition: 1, Seq: 1}
	const reused = "message id was used for another payload"
	blame := func(node, outcome string) []NodeFailure { return []NodeFailure{{node, outcome + ": " + reused, 1}} }
	for name, tt := range map[string]struct {
		answer  func(d *Delivery)
		decline Reason
		want    Result
	}{
		"lost":         {answer: func(d *Delivery) { d.Lose(LostStream) }, want: Result{Unknown: 1, NodeFailures: blame("B", "unknown")}},
		"not taken":    {answer: ack(Ack{Failed: []string{"u"}}), want: Result{Failed: 1, NodeFailures: blame("A", "failed")}},
		"no room":      {decline: DropQueueFull, want: Result{Failed: 1, NodeFailures: blame("A", "failed")}},
		"not there":    {answer: notHere("u"), want: Result{Failed: 1, NodeFailures: blame("A", "failed")}},
		"reused there": {answer: ack(Ack{Reused: []string{"u"}}), want: Result{Failed: 1, NodeFailures: blame("A", "failed")}},
		"reached":      {want: Result{Delivered: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				w.config.Spool = newSpool()
				e := w.engine(t)
				w.rooms["r"] = map[string][]string{"u": {"A", "B"}}
				w.nodes["A"].answer = ack(Ack{Reused: []string{"u"}})
				w.nodes["B"].answer, w.nodes["B"].decline = tt.answer, tt.decline
				r := do(t, e, with(toRoom("r"), Options{Store: true, MessageID: "m"}))
				want := tt.want
				want.Found, want.Targets, want.Place = true, 1, at
				if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", want) {
					t.Errorf("got  %+v\nwant %+v", r, want)
				}
			})
		})
	}
}

// TestRoomThatNobodyKnowsIsWrittenToItsLog has the Controller not know the room, know that it is empty, and not
// answer: whoever comes back finds the message.
func TestRoomThatNobodyKnowsIsWrittenToItsLog(t *testing.T) {
	at := Place{Epoch: testEpoch, Partition: 1, Seq: 1}
	for name, tt := range map[string]struct {
		script func(w *world)
		want   Result
	}{
		"unknown":         {func(*world) {}, Result{Place: at}},
		"empty":           {func(w *world) { w.rooms["r"] = map[string][]string{} }, Result{Found: true, Place: at}},
		"all excluded":    {func(w *world) { w.rooms["r"] = map[string][]string{"x": {"A"}} }, Result{Found: true, Place: at}},
		"controller away": {func(w *world) { w.down = errors.New("away") }, Result{Targets: 1, Offline: 1, Stored: 1, Place: at}},
		"look-up hangs":   {func(w *world) { w.gate = make(chan struct{}) }, Result{Targets: 1, Offline: 1, Stored: 1, Place: at}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				w.config.Spool = newSpool()
				e := w.engine(t)
				tt.script(w)
				r, err := e.Do(t.Context(), with(toRoom("r", "x"), Options{Store: true}))
				if err != nil || fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", tt.want) || !r.Success() {
					t.Errorf("got  %+v, %v\nwant %+v", r, err, tt.want)
				}
				if w.gate != nil {
					close(w.gate)
				}
			})
		})
	}
}

// TestRoomsMessageIsInTheLogBeforeItIsSent looks at what the log and the links get.
func TestRoomsMessageIsInTheLogBeforeItIsSent(t *testing.T) {
	for name, ordered := range map[string]bool{"alone": false, "in an order": true} {
		t.Run(name, func(t *testing.T) {
			w, spool := newWorld(), newSpool()
			w.config.Spool = spool
			e := w.engine(t)
			w.rooms["r"] = map[string][]string{"a": {"A"}, "b": {"A", "B"}, "c": {"B"}}
			written := make(chan int, 10)
			for _, n := range w.nodes {
				n.answer = func(d *Delivery) {
					written <- len(spool.written())
					_, _ = d.Ack(Ack{Delivered: d.Targets()})
				}
			}
			stranger := strings.Repeat("x", 100)
			p := with(toRoom("r", stranger, "c", "c"), Options{Store: true, MessageID: "m", Sender: "s", PayloadHash: 7, CollapseKey: "k", TTL: time.Hour})
			if ordered {
				p.Order = new(Order)
			}
			r := do(t, e, p)
			at := Place{Epoch: testEpoch, Partition: 1, Seq: 1}
			if r.Place != at || r.Delivered != 2 || r.Stored != 0 || !r.Success() {
				t.Errorf("got %+v", r)
			}
			exclude := []string{"c", stranger}
			want := Stored{
				MessageID: "m", Sender: "s", PayloadHash: 7, Payload: p.Payload, Room: "r", CollapseKey: "k",
				Expires: p.Arrived.Add(time.Hour), Exclude: exclude,
			}
			if got := spool.written(); len(got) != 1 || fmt.Sprintf("%+v", *got[0]) != fmt.Sprintf("%+v", want) {
				t.Errorf("in the log: %+v", got)
			}
			for _, d := range p.deliveries {
				if n := <-written; n != 1 {
					t.Errorf("sent with %d messages in the log", n)
				}
				if place, out := d.Log(); place != at || !slices.Equal(out, exclude) {
					t.Errorf("the link is told %+v, %v", place, out)
				}
			}
			if p.Reusable() {
				t.Error("a push whose bytes are stored is used again")
			}
			plain := toRoom("r")
			do(t, e, plain)
			if place, out := plain.deliveries[0].Log(); place != (Place{}) || out != nil {
				t.Errorf("of a push without a store the link is told %+v, %v", place, out)
			}
			if grown := p.deliveries[0].Size() - plain.deliveries[0].Size(); grown < len("c")+len(stranger)+16 {
				t.Errorf("the place and who is excluded are %d bytes of the size", grown)
			}
		})
	}
}

// TestLiveDeliveryDoesNotHangOnTheLog has the store refuse, be silent and late: the push goes on without a place, and
// its account says so.
func TestLiveDeliveryDoesNotHangOnTheLog(t *testing.T) {
	for name, tt := range map[string]struct {
		script        func(s *testSpool)
		ttl           time.Duration
		timeout, took time.Duration
		text          string
	}{
		"down":              {script: func(s *testSpool) { s.fail = func(*Stored) error { return ErrSpoolDown } }, text: "not reachable"},
		"full":              {script: func(s *testSpool) { s.fail = func(*Stored) error { return ErrSpoolFull } }, text: "is full"},
		"silent":            {script: func(s *testSpool) { s.silent = true }, took: 150 * time.Millisecond, text: "no answer in time"},
		"late":              {script: func(s *testSpool) { s.hold = func(_ *Stored, done func()) { time.AfterFunc(time.Second, done) } }, took: 150 * time.Millisecond, text: "no answer in time"},
		"panics":            {script: func(s *testSpool) { s.fail = func(*Stored) error { panic("spool") } }, text: "no answer in time"},
		"panics later":      {script: func(s *testSpool) { s.hold = func(*Stored, func()) { panic("spool") } }, text: "no answer in time"},
		"names no place":    {script: func(s *testSpool) { s.nowhere = true }, text: "no answer in time"},
		"a push in a hurry": {script: func(s *testSpool) { s.silent = true }, timeout: 100 * time.Millisecond, took: 50 * time.Millisecond, text: "no answer in time"},
		"a short ttl":       {script: func(s *testSpool) { s.silent = true }, ttl: 40 * time.Millisecond, took: 20 * time.Millisecond, text: "no answer in time"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, spool := newWorld(), newSpool()
				tt.script(spool)
				w.config.Spool = spool
				e := w.engine(t)
				w.rooms["r"] = map[string][]string{"a": {"A"}, "b": {"B"}, "c": {"C"}, "d": nil}
				w.nodes["B"].decline = DropQueueFull
				w.nodes["C"].answer = func(d *Delivery) { d.Lose(LostStream) }
				began, by := time.Now(), time.Time{}
				spool.by = func(deadline time.Time) { by = deadline }
				var sent time.Duration
				w.nodes["A"].answer = func(d *Delivery) {
					sent = time.Since(began)
					if at, out := d.Log(); at != (Place{}) || out != nil {
						t.Errorf("the link is told %+v, %v", at, out)
					}
					_, _ = d.Ack(Ack{Delivered: 1})
				}
				p := with(toRoom("r", "x"), Options{Store: true, TTL: tt.ttl})
				p.Timeout = tt.timeout
				r := do(t, e, p)
				if sent != tt.took {
					t.Errorf("sent after %s", sent)
				}
				if d := by.Sub(began); !by.IsZero() && tt.took > 0 && d != tt.took {
					t.Errorf("the store has until %s", d)
				}
				want := Result{Found: true, Targets: 4, Delivered: 1, Offline: 1, Failed: 1, Unknown: 1, NodeFailures: []NodeFailure{
					{"", "failed: store: " + tt.text, 3}, {"B", "failed: queue full", 1}, {"C", "unknown: stream broke before the acknowledgement", 1},
				}}
				if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", want) {
					t.Errorf("got  %+v\nwant %+v", r, want)
				}
				time.Sleep(2 * time.Second) // the answer comes late
				if again, err := p.Result(); err != nil || fmt.Sprintf("%+v", again) != fmt.Sprintf("%+v", want) {
					t.Errorf("then %+v, %v", again, err)
				}
			})
		})
	}
}

// TestWholeRoomThatIsReachedIsNoSuccessWithoutItsLog: those who are away may not be known.
func TestWholeRoomThatIsReachedIsNoSuccessWithoutItsLog(t *testing.T) {
	w, spool := newWorld(), newSpool()
	spool.fail = func(*Stored) error { return ErrSpoolFull }
	w.config.Spool = spool
	e := w.engine(t)
	w.rooms["r"] = map[string][]string{"a": {"A"}}
	r := do(t, e, with(toRoom("r"), Options{Store: true}))
	want := Result{Found: true, Targets: 1, Delivered: 1, NodeFailures: []NodeFailure{{"", "failed: store: is full", 0}}}
	if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", want) || r.Success() {
		t.Errorf("got %+v", r)
	}
}

// TestPushThatEndsWhileItIsWritten has its caller leave, and the engine drain, before the store answers.
func TestPushThatEndsWhileItIsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, spool := newWorld(), newSpool()
		var answers []func()
		spool.hold = func(_ *Stored, done func()) { answers = append(answers, done) }
		w.config.Spool = spool
		e := w.engine(t)
		w.rooms["r"] = map[string][]string{"a": {"A"}}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(20*time.Millisecond, cancel)
		var stream Order
		p := with(toRoom("r"), Options{Store: true})
		p.Order = &stream
		began := time.Now()
		r, err := e.Do(ctx, p)
		want := Result{Targets: 1, Failed: 1, NodeFailures: []NodeFailure{
			{"", "failed: expired before it was sent", 1}, {"", "failed: store: no answer in time", 1},
		}}
		if err != nil || fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", want) || time.Since(began) != 20*time.Millisecond {
			t.Errorf("got %+v, %v, after %s", r, err, time.Since(began))
		}
		next := toRoom("r") // is not behind a push that is over
		next.Order = &stream
		if r := do(t, e, next); r.Delivered != 1 || time.Since(began) != 20*time.Millisecond {
			t.Errorf("the next one: %+v, after %s", r, time.Since(began))
		}
		answers[0]()
		var o order
		begin(t, e, &stream, with(toRoom("r"), Options{Store: true}), &o)
		time.AfterFunc(50*time.Millisecond, answers[1])
		if err := e.Drain(t.Context()); err != nil || o.ended() != 1 {
			t.Errorf("drained with %d of 1 over: %v", o.ended(), err)
		}
		if took := time.Since(began); took != 70*time.Millisecond {
			t.Errorf("drained after %s", took)
		}
		if n := len(w.nodes["A"].pushes()); n != 2 {
			t.Errorf("the node got %d", n)
		}
		wantNoLines(t, &stream)
	})
}

// TestRetryIsNotWrittenAgain gives a push the place of an earlier try.
func TestRetryIsNotWrittenAgain(t *testing.T) {
	w, spool := newWorld(), newSpool()
	w.config.Spool = spool
	e := w.engine(t)
	w.rooms["r"] = map[string][]string{"a": {"A"}, "b": nil}
	at := Place{Epoch: 3, Partition: 2, Seq: 9}
	p := with(toRoom("r"), Options{Store: true, MessageID: "m", Place: at})
	if r := do(t, e, p); r.Place != at || r.Delivered != 1 || r.Stored != 1 {
		t.Errorf("got %+v", r)
	}
	if place, _ := p.deliveries[0].Log(); place != at || len(spool.written()) != 0 {
		t.Errorf("sent with %+v, written %v", place, spool.written())
	}
}

// TestReceiptsOfARoomComeLater is an Async push to a room: those who do not acknowledge are stored, unless its
// TTL has passed by then. Whom it was stored for at first stays so.
func TestReceiptsOfARoomComeLater(t *testing.T) {
	at := Place{Epoch: testEpoch, Partition: 1, Seq: 1}
	for ttl, final := range map[time.Duration]Result{
		0:           {Found: true, Targets: 3, Delivered: 1, Acked: 1, Offline: 2, Stored: 2, Unsure: 1, Place: at},
		time.Second: {Found: true, Targets: 3, Delivered: 1, Acked: 1, Offline: 1, Stored: 1, Unknown: 1, NodeFailures: []NodeFailure{{"A", "unknown: not acknowledged by the client in time", 1}}, Place: at},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			w.config.Spool = newSpool()
			e := w.engine(t)
			w.rooms["r"] = map[string][]string{"a": {"A"}, "b": {"A"}, "c": nil}
			w.nodes["A"].answer = func(d *Delivery) {
				_, _ = d.Ack(Ack{Delivered: 2, Pending: 2})
				_ = d.Receipt(1, nil, false)
			}
			var book receiptBook
			o := asyncOptions(&book)
			o.Store, o.TTL, o.AckTimeout = true, ttl, 10*time.Second
			r := do(t, e, with(toRoom("r"), o))
			first := Result{Found: true, Targets: 3, Delivered: 2, Offline: 1, Stored: 1, Place: at}
			if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", first) {
				t.Errorf("at first %+v", r)
			}
			if err := e.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			if r, _, _ := book.last(); fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", final) {
				t.Errorf("with a ttl of %s\ngot  %+v\nwant %+v", ttl, r, final)
			}
		})
	}
}

// TestRoomKeepsItsOrderWhileItIsWritten starts pushes to two rooms in one Order, some with the store, which answers after
// any time, not at all or with an error, while members move and routes are forgotten.
func TestRoomKeepsItsOrderWhileItIsWritten(t *testing.T) {
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 5))
			var mu sync.Mutex
			pause := func(most time.Duration) time.Duration {
				mu.Lock()
				defer mu.Unlock()
				return time.Duration(rng.Int64N(int64(most)))
			}
			w, spool := newWorld(), newSpool()
			w.config.Spool = spool
			w.delay = func() { time.Sleep(pause(20 * time.Millisecond)) }
			spool.hold = func(_ *Stored, done func()) {
				switch n := pause(10); n {
				case 0:
				case 1:
					done()
				default:
					time.AfterFunc(pause(250*time.Millisecond), done)
				}
			}
			spool.fail = func(*Stored) error { return []error{nil, nil, nil, ErrSpoolDown}[pause(4)] }
			got := map[string][]int{} // by room, in the order of arrival
			places := map[string][]uint64{}
			for _, n := range w.nodes {
				n.answer = func(d *Delivery) {
					mu.Lock()
					got[d.Room()] = append(got[d.Room()], int(d.push.Content.Timestamp))
					if at, _ := d.Log(); at != (Place{}) {
						places[d.Room()] = append(places[d.Room()], at.Seq)
					}
					mu.Unlock()
					_, _ = d.Ack(Ack{Delivered: 1})
				}
			}
			w.place("r", "u", "A")
			w.place("s", "v", "B")
			e := w.engine(t)
			var stream Order
			var o order
			for i := range 40 {
				p := toRoom([]string{"r", "s"}[pause(2)])
				if pause(3) > 0 {
					with(p, Options{Store: true})
				}
				p.Content.Timestamp = int64(i)
				p.Order = &stream
				if err := e.Start(p, &o); err != nil {
					t.Fatal(err)
				}
				time.Sleep(pause(80 * time.Millisecond))
				if pause(8) == 0 {
					time.Sleep(1100 * time.Millisecond) // the route is forgotten
					w.place("r", "u", nodeIDs[pause(3)])
				}
			}
			if err := e.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // whoever drains may be told before a caller is
			for room, list := range got {
				if !slices.IsSorted(list) || !slices.IsSorted(places[room]) {
					t.Errorf("seed %d: room %s got %v, places %v", seed, room, list, places[room])
				}
			}
			if n := len(got["r"]) + len(got["s"]); n != 40 || o.ended() != 40 {
				t.Errorf("seed %d: %d of 40 arrived, %d are over", seed, n, o.ended())
			}
			wantNoLines(t, &stream)
			time.Sleep(time.Second) // what was given up is answered
		})
	}
}

// TestRoomsOfAnOrderDoNotWaitForEachOther has one room's log be slow.
func TestRoomsOfAnOrderDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, spool := newWorld(), newSpool()
		spool.silent = true
		w.config.Spool = spool
		e := w.engine(t)
		w.rooms["r"], w.rooms["s"] = map[string][]string{"a": {"A"}}, map[string][]string{"b": {"B"}}
		var stream Order
		var o order
		begin(t, e, &stream, with(toRoom("r"), Options{Store: true}), &o)
		behind := begin(t, e, &stream, toRoom("r"), &o)
		free := begin(t, e, &stream, toRoom("s"), &o)
		if got := w.nodes["B"].pushes(); !slices.Equal(got, []*Push{free}) || len(w.nodes["A"].pushes()) > 0 {
			t.Errorf("at once: %v and %v", w.nodes["A"].pushes(), got)
		}
		time.Sleep(150 * time.Millisecond)
		synctest.Wait()
		if got := w.nodes["A"].pushes(); len(got) != 2 || got[1] != behind {
			t.Errorf("then: %v", got)
		}
	})
}

// TestPushBehindOneThatIsWrittenKeepsItsTime has the push behind end first.
func TestPushBehindOneThatIsWrittenKeepsItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, spool := newWorld(), newSpool()
		spool.silent = true
		w.config.Spool = spool
		e := w.engine(t)
		w.rooms["r"] = map[string][]string{"a": {"A"}}
		var stream Order
		var o order
		begin(t, e, &stream, with(toRoom("r"), Options{Store: true}), &o)
		p := toRoom("r")
		p.Order, p.Timeout = &stream, 50*time.Millisecond
		began := time.Now()
		if _, err := e.Do(t.Context(), p); !errors.Is(err, ErrDeadline) || time.Since(began) != 50*time.Millisecond {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		if err := e.Drain(t.Context()); err != nil || len(w.nodes["A"].pushes()) != 1 {
			t.Errorf("%v, the node got %v", err, w.nodes["A"].pushes())
		}
	})
}

// TestHugeRoomIsCountedNotListed bounds what a push costs to a room of 100,000 of whom 90,000 are away.
func TestHugeRoomIsCountedNotListed(t *testing.T) {
	w := newWorld()
	w.config.Spool = newSpool()
	w.tune = func(c *route.Config) { c.TTL = time.Hour } // the route stays cached on a slow machine, too
	e := w.engine(t)
	members := make(map[string][]string, 100_000)
	for i := range 100_000 {
		members[fmt.Sprintf("user %d", i)] = nil
		if i < 10_000 {
			members[fmt.Sprintf("user %d", i)] = []string{nodeIDs[i%3]}
		}
	}
	w.rooms["r"] = members
	w.nodes["B"].answer = func(d *Delivery) { d.Lose(LostStream) }
	w.nodes["C"].decline = DropQueueFull
	do(t, e, toRoom("r")) // its route is cached from here on
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const pushes = 10
	for range pushes {
		r := do(t, e, with(toRoom("r", "user 0", "user 99999"), Options{Store: true, MessageID: "m"}))
		if r.Targets != 99_998 || r.Delivered != 3_333 || r.Offline != 96_665 || r.Stored != 96_665 || r.Unsure != 3_333 || r.Place.Seq == 0 || !r.Success() {
			t.Fatalf("got %+v", r)
		}
	}
	runtime.ReadMemStats(&after)
	// One string of each of those who are away, or of those at one node, would be more.
	if n := (after.TotalAlloc - before.TotalAlloc) / pushes; n > 50<<10 {
		t.Errorf("a push takes %d bytes", n)
	}
}

// TestBooksOfLoggedPushesBalance holds every account of a room against what nodes, clients and the store did.
func TestBooksOfLoggedPushesBalance(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w, spool := newWorld(), newSpool()
		w.config.Spool, w.shards = spool, 1
		e := w.engineFor(rt)
		before, after := drawPlaces(rt, "before"), drawPlaces(rt, "after")
		w.rooms["r"] = before
		if _, err := e.Do(context.Background(), toRoom("r")); err != nil {
			rt.Fatal(err)
		}
		w.mu.Lock()
		w.rooms["r"] = after // what a heal finds
		w.mu.Unlock()
		o := Options{
			Store: true, MessageID: "m", ClientAck: rapid.Bool().Draw(rt, "ack"),
			AckTimeout: time.Duration(rapid.IntRange(1, 20).Draw(rt, "ms")) * time.Millisecond,
		}
		c := &clients{
			rng: rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 3)), reached: map[string]bool{},
			acked: map[string]bool{}, barred: map[string]bool{},
		}
		for _, n := range w.nodes {
			n.answer = c.answer
			n.decline = rapid.SampledFrom([]Reason{Sent, Sent, Sent, DropQueueFull, DropUnreachable}).Draw(rt, "decline "+n.id)
		}
		down := rapid.IntRange(0, 3).Draw(rt, "down") == 0
		if down {
			spool.fail = func(*Stored) error { return ErrSpoolDown }
		}
		var book receiptBook
		if o.ClientAck && rapid.Bool().Draw(rt, "async") {
			o.Async, o.Receipts = true, &book
		}
		exclude := rapid.SliceOfN(rapid.SampledFrom([]string{"u0", "u3", "u5", "x"}), 0, 3).Draw(rt, "exclude")
		members := 0
		for user := range maps.Keys(before) {
			if !slices.Contains(exclude, user) {
				members++
			}
		}
		r, err := e.Do(context.Background(), with(toRoom("r", exclude...), o))
		if err != nil {
			rt.Fatal(err)
		}
		results := []Result{r}
		if err := e.Drain(context.Background()); err != nil {
			rt.Fatal(err)
		}
		if o.Async {
			final, _, n := book.last()
			if n != 1 {
				rt.Fatalf("%d final accounts", n)
			}
			results = append(results, final)
		}
		for i, r := range results {
			c.holdRoom(rt, r, members, down, i == len(results)-1 && o.ClientAck)
		}
		if want := map[bool]int{false: 1, true: 0}[down]; len(spool.written()) != want || len(spool.kept) > 0 {
			rt.Fatalf("%d in the log, %v by name", len(spool.written()), spool.kept)
		}
	})
}

// holdRoom holds an account of a push to a room against the ledger. After confirmed, clients have been waited for.
func (c *clients) holdRoom(rt *rapid.T, r Result, members int, down, confirmed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if bad := r.check(); bad != nil || r.Targets != members {
		rt.Fatalf("%v, %d members: %+v", bad, members, r)
	}
	if confirmed && c.liars == 0 && r.Delivered > len(c.reached) {
		rt.Fatalf("%d reached for certain, the account says %+v", len(c.reached), r)
	}
	blamed, unwritten := 0, -1
	for _, f := range r.NodeFailures {
		switch {
		case strings.HasPrefix(f.Reason, "failed: store: "):
			unwritten = f.Users
		case strings.Contains(f.Reason, "internal"):
			rt.Fatalf("the account was mended: %+v", r)
		default:
			blamed += f.Users
		}
	}
	switch {
	case blamed != r.Failed+r.Unknown:
		rt.Fatalf("node failures name %d users of %d: %+v", blamed, r.Failed+r.Unknown, r)
	case down && (r.Place != Place{} || r.Stored > 0 || unwritten < r.Targets-r.Delivered-len(c.barred) || unwritten > r.Targets-r.Delivered || r.Success()):
		rt.Fatalf("the log was not written, %d barred: %+v", len(c.barred), r)
	case !down && (r.Place == Place{} || unwritten >= 0 || r.Stored != r.Offline || r.Failed+r.Unknown > len(c.barred)):
		rt.Fatalf("the log was written, %d barred: %+v", len(c.barred), r)
	}
}
