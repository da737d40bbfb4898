package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// testSpool keeps messages in memory. It answers on the caller's goroutine unless told otherwise.
type testSpool struct {
	mu     sync.Mutex
	kept   map[string][]*Stored // by user
	calls  int
	refuse func(user string) error  // nil: nobody
	answer func(done func())        // when to call done; nil: at once
	by     func(deadline time.Time) // told, if not nil
	silent bool                     // never answers, against the contract

	log     []*Stored             // of all rooms
	fail    func(m *Stored) error // whether it is not written into the log; nil: never
	nowhere bool                  // its log answers without a place and without an error
	hold    func(*Stored, func()) // when to call done of the log; nil: at once
}

func newSpool() *testSpool { return &testSpool{kept: map[string][]*Stored{}} }

// testEpoch is that of a testSpool's log, which has one partition.
const testEpoch = 7

func (s *testSpool) AppendLog(m *Stored, deadline time.Time, done func(Place, error)) {
	s.mu.Lock()
	s.calls++
	var at Place
	var err error
	if s.fail != nil {
		err = s.fail(m)
	}
	if err == nil {
		s.log = append(s.log, m)
		at = Place{Epoch: testEpoch, Partition: 1, Seq: uint64(len(s.log))}
	}
	if s.nowhere {
		at = Place{}
	}
	s.mu.Unlock()
	if s.by != nil {
		s.by(deadline)
	}
	switch {
	case s.silent:
	case s.hold != nil:
		s.hold(m, func() { done(at, err) })
	default:
		done(at, err)
	}
}

func (s *testSpool) Append(m *Stored, users []string, deadline time.Time, done func([]Spooled)) {
	s.mu.Lock()
	s.calls++
	said := make([]Spooled, len(users))
	for i, user := range users {
		if s.refuse != nil {
			if said[i].Err = s.refuse(user); said[i].Err != nil {
				continue
			}
		}
		s.kept[user] = append(s.kept[user], m)
		said[i].Seq = uint64(len(s.kept[user]))
	}
	s.mu.Unlock()
	if s.by != nil {
		s.by(deadline)
	}
	switch {
	case s.silent:
	case s.answer != nil:
		s.answer(func() { done(said) })
	default:
		done(said)
	}
}

func (s *testSpool) of(user string) []*Stored {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.kept[user])
}

func with(p *Push, o Options) *Push {
	p.Options = &o
	return p
}

// check holds a result against the invariants of the books.
func (r Result) check() error {
	switch {
	case r.Targets != r.Delivered+r.Offline+r.Failed+r.Unknown:
		return errors.New("the sum does not hold")
	case r.Stored > r.Offline || r.Unsure > r.Stored || r.Acked > r.Delivered || r.Duplicates > r.Delivered:
		return errors.New("a part is more than the whole")
	case min(r.Delivered, r.Offline, r.Failed, r.Unknown, r.Stored, r.Unsure, r.Acked, r.Duplicates) < 0:
		return errors.New("a count is negative")
	}
	return nil
}

// TestWhatBecomesOfAUser is the table of the contract.
func TestWhatBecomesOfAUser(t *testing.T) {
	const late = "unknown: not acknowledged by the client in time"
	delivered, acked := Result{Found: true, Targets: 1, Delivered: 1}, Result{Found: true, Targets: 1, Delivered: 1, Acked: 1}
	offline, stored := Result{Targets: 1, Offline: 1}, Result{Targets: 1, Offline: 1, Stored: 1}
	unsure := Result{Targets: 1, Offline: 1, Stored: 1, Unsure: 1}
	end := func(o Outcome, node, reason string) Result {
		r := Result{Found: true, Targets: 1, NodeFailures: []NodeFailure{{node, reason, 1}}}
		if o == Failed {
			r.Failed = 1
		} else {
			r.Unknown = 1
		}
		return r
	}
	all := func(r Result) [4]Result { return [4]Result{r, r, r, r} }
	pending := func(then func(d *Delivery)) func(d *Delivery) {
		return func(d *Delivery) {
			a := Ack{Delivered: 1}
			if d.Options().ClientAck {
				a.Pending = 1
			}
			_, _ = d.Ack(a)
			if a.Pending > 0 && then != nil {
				then(d)
			}
		}
	}
	must := func(err error) {
		if err != nil {
			t.Error(err)
		}
	}
	full := end(Failed, "A", "failed: queue full")
	broke := end(Unknown, "A", "unknown: stream broke before the acknowledgement")
	expired := end(Failed, "A", "failed: expired before it was sent")
	reused := end(Failed, "A", "failed: message id was used for another payload")
	tests := map[string]struct {
		script func(n *testNode)
		away   bool
		ttl    time.Duration
		want   [4]Result // node drop, node store, client drop, client store
	}{
		"the client acknowledges": {
			script: func(n *testNode) { n.answer = pending(func(d *Delivery) { must(d.Receipt(1, nil, true)) }) },
			want:   [4]Result{delivered, delivered, acked, acked},
		},
		"the client cannot acknowledge": {script: func(*testNode) {}, want: all(delivered)},
		"no acknowledgement in time": {
			script: func(n *testNode) { n.answer = pending(nil) },
			want:   [4]Result{delivered, delivered, end(Unknown, "A", late), unsure},
		},
		"the client is given up by name": {
			script: func(n *testNode) { n.answer = pending(func(d *Delivery) { must(d.Receipt(0, []string{"u"}, true)) }) },
			want:   [4]Result{delivered, delivered, end(Unknown, "A", late), unsure},
		},
		"the stream breaks before the receipt": {
			script: func(n *testNode) { n.answer = pending((*Delivery).LoseReceipts) },
			want:   [4]Result{delivered, delivered, end(Unknown, "A", late), unsure},
		},
		"no connection":        {away: true, want: [4]Result{offline, stored, offline, stored}},
		"no connection there":  {script: func(n *testNode) { n.answer = ack(Ack{NotHere: []string{"u"}}) }, want: [4]Result{offline, stored, offline, stored}},
		"queue full":           {script: func(n *testNode) { n.decline = DropQueueFull }, want: [4]Result{full, stored, full, stored}},
		"refused by the node":  {script: func(n *testNode) { n.answer = ack(Ack{Refused: true}) }, want: [4]Result{end(Failed, "A", "failed: refused by the node"), stored, end(Failed, "A", "failed: refused by the node"), stored}},
		"node not reachable":   {script: func(n *testNode) { n.decline = DropUnreachable }, want: [4]Result{end(Failed, "A", "failed: node not reachable"), stored, end(Failed, "A", "failed: node not reachable"), stored}},
		"queue of the client":  {script: func(n *testNode) { n.answer = ack(Ack{Failed: []string{"u"}}) }, want: [4]Result{end(Failed, "A", "failed: not taken by the client's connection"), stored, end(Failed, "A", "failed: not taken by the client's connection"), stored}},
		"the stream broke":     {script: func(n *testNode) { n.answer = func(d *Delivery) { d.Lose(LostStream) } }, want: [4]Result{broke, unsure, broke, unsure}},
		"expired in the queue": {ttl: time.Second, script: func(n *testNode) { n.answer = func(d *Delivery) { time.Sleep(time.Second); d.claimFor(DropExpired) } }, want: all(expired)},
		"too large":            {script: func(n *testNode) { n.decline = DropTooLarge }, want: all(end(Failed, "A", "failed: too large for a frame"))},
		"replaced":             {script: func(n *testNode) { n.decline = DropReplaced }, want: all(end(Failed, "A", "failed: replaced by a newer message"))},
		"id was reused":        {script: func(n *testNode) { n.answer = ack(Ack{Reused: []string{"u"}}) }, want: all(reused)},
		"had it before": {
			script: func(n *testNode) { n.answer = ack(Ack{Delivered: 1, Duplicates: 1}) },
			want:   all(Result{Found: true, Targets: 1, Delivered: 1, Duplicates: 1}),
		},
	}
	columns := [4]Options{{}, {Store: true}, {ClientAck: true}, {ClientAck: true, Store: true}}
	for name, tt := range tests {
		for i, o := range columns {
			t.Run(fmt.Sprintf("%s/client=%v,store=%v", name, o.ClientAck, o.Store), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, spool := newWorld(), newSpool()
					w.config.Spool = spool
					e := w.engine(t)
					if !tt.away {
						w.users["u"] = []string{"A"}
					}
					if tt.script != nil {
						tt.script(w.nodes["A"])
					}
					if name == "no connection there" {
						w.nodes["A"].answer = func(d *Delivery) {
							w.mu.Lock()
							delete(w.users, "u")
							w.mu.Unlock()
							_, _ = d.Ack(Ack{NotHere: []string{"u"}})
						}
					}
					o.MessageID, o.TTL = "m-1", tt.ttl
					r := do(t, e, with(toUser("u"), o))
					if got, want := fmt.Sprintf("%+v", r), fmt.Sprintf("%+v", tt.want[i]); got != want {
						t.Errorf("got  %s\nwant %s", got, want)
					}
					if n := len(spool.of("u")); n != tt.want[i].Stored {
						t.Errorf("%d messages in the store", n)
					}
					if s := r.Success(); s != (r.Delivered == 1 || r.Stored == 1) {
						t.Errorf("success: %v", s)
					}
					s := e.Stats()
					if s.Receipts != 0 || s.InFlight != 0 {
						t.Errorf("counted %+v", s)
					}
				})
			})
		}
	}
}

// claimFor drops a written delivery as a link does that has not written it yet.
func (d *Delivery) claimFor(r Reason) {
	d.state.Store(queued)
	d.Drop(r)
}

// TestStoreThatFailsLeavesTheOutcome has the store be down, full, over quota and silent.
func TestStoreThatFailsLeavesTheOutcome(t *testing.T) {
	for name, tt := range map[string]struct {
		spool *testSpool
		text  string
	}{
		"down":   {&testSpool{refuse: func(string) error { return ErrSpoolDown }}, "not reachable"},
		"full":   {&testSpool{refuse: func(string) error { return ErrSpoolFull }}, "is full"},
		"quota":  {&testSpool{refuse: func(string) error { return ErrSpoolQuota }}, "too many messages wait for the user"},
		"silent": {&testSpool{silent: true}, "no answer in time"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				tt.spool.kept = map[string][]*Stored{}
				w.config.Spool = tt.spool
				e := w.engine(t)
				w.users = map[string][]string{"a": {"A"}, "b": {"B"}, "c": {"C"}}
				w.nodes["B"].decline = DropQueueFull
				w.nodes["C"].answer = func(d *Delivery) { d.Lose(LostStream) }
				began := time.Now()
				r := do(t, e, with(toUsers("a", "b", "c", "d"), Options{Store: true}))
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("took %s", took)
				}
				want := Result{Found: true, Targets: 4, Delivered: 1, Offline: 1, Failed: 1, Unknown: 1, NodeFailures: []NodeFailure{
					{"", "failed: store: " + tt.text, 3}, {"B", "failed: queue full", 1}, {"C", "unknown: stream broke before the acknowledgement", 1},
				}}
				if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", want) {
					t.Errorf("got  %+v\nwant %+v", r, want)
				}
				if r.Success() {
					t.Error("a success")
				}
			})
		})
	}
}

// TestStoreTakesWhomNobodyCouldSend has the Controller be away, the look-up hang and the deliveries stay
// queued: each time the store gets them before the push's deadline.
func TestStoreTakesWhomNobodyCouldSend(t *testing.T) {
	for name, script := range map[string]func(w *world){
		"controller away": func(w *world) { w.down = errors.New("away") },
		"look-up hangs":   func(w *world) { w.gate = make(chan struct{}) },
		"queued for ever": func(w *world) { w.nodes["A"].keep = true },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, spool := newWorld(), newSpool()
				var by time.Time
				spool.by = func(deadline time.Time) { by = deadline }
				w.config.Spool = spool
				e := w.engine(t)
				w.users["u"] = []string{"A"}
				script(w)
				began := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				p := with(toUsers("u", "v"), Options{Store: true})
				r, err := e.Do(ctx, p)
				if err != nil || r.Stored != 2 || r.Unsure != 0 || !r.Success() || len(r.NodeFailures) > 0 {
					t.Errorf("%+v, %v", r, err)
				}
				if d := by.Sub(began); d != time.Second {
					t.Errorf("the spool has until %s", d)
				}
				if p.Reusable() {
					t.Error("a push whose bytes are stored is used again")
				}
				w.nodes["A"].mu.Lock()
				defer w.nodes["A"].mu.Unlock()
				for _, d := range w.nodes["A"].kept {
					if d.TrySend() {
						t.Error("written after it was stored")
					}
				}
				if w.gate != nil {
					close(w.gate)
				}
			})
		})
	}
}

// TestStoredMessageIsWhole compares what the store gets with what was pushed.
func TestStoredMessageIsWhole(t *testing.T) {
	w, spool := newWorld(), newSpool()
	w.config.Spool = spool
	e := w.engine(t)
	p := with(toUser("u"), Options{Store: true, MessageID: "m", Sender: "s", PayloadHash: 7, CollapseKey: "k", TTL: time.Hour})
	do(t, e, p)
	want := Stored{MessageID: "m", Sender: "s", PayloadHash: 7, Payload: p.Payload, CollapseKey: "k", Expires: p.Arrived.Add(time.Hour)}
	if got := spool.of("u"); len(got) != 1 || fmt.Sprintf("%+v", *got[0]) != fmt.Sprintf("%+v", want) {
		t.Errorf("got %+v", got)
	}
	p = with(toUser("u"), Options{Store: true})
	do(t, e, p)
	if got := spool.of("u"); len(got) != 2 || !got[1].Expires.IsZero() {
		t.Errorf("got %+v", got)
	}
}

// TestReceiptsOfSeveralUsers has an audience whose clients answer in all ways.
func TestReceiptsOfSeveralUsers(t *testing.T) {
	late := func(n int) []NodeFailure {
		return []NodeFailure{{"A", "unknown: not acknowledged by the client in time", n}}
	}
	for name, tt := range map[string]struct {
		receipts func(t *testing.T, d *Delivery)
		want     Result
		stored   Result // with the store
	}{
		"in pieces": {
			receipts: func(t *testing.T, d *Delivery) {
				for _, err := range []error{d.Receipt(1, nil, false), d.Receipt(0, []string{"c"}, false), d.Receipt(1, nil, true)} {
					if err != nil {
						t.Error(err)
					}
				}
			},
			want:   Result{Found: true, Targets: 4, Delivered: 3, Acked: 2, Unknown: 1, NodeFailures: late(1)},
			stored: Result{Found: true, Targets: 4, Delivered: 3, Acked: 2, Offline: 1, Stored: 1, Unsure: 1},
		},
		"some, and the time is over": {
			receipts: func(t *testing.T, d *Delivery) {
				if err := d.Receipt(2, nil, false); err != nil {
					t.Error(err)
				}
			},
			want:   Result{Found: true, Targets: 4, Delivered: 3, Acked: 2, Unknown: 1, NodeFailures: late(1)},
			stored: Result{Targets: 4, Offline: 4, Stored: 4, Unsure: 4}, // nobody knows who it was
		},
		"more than are pending": {
			receipts: func(t *testing.T, d *Delivery) {
				if d.Receipt(1, nil, false) != nil || d.Receipt(3, nil, false) == nil || d.AwaitsReceipts() {
					t.Error("believed")
				}
			},
			want:   Result{Found: true, Targets: 4, Delivered: 2, Acked: 1, Unknown: 2, NodeFailures: late(2)},
			stored: Result{Targets: 4, Offline: 4, Stored: 4, Unsure: 4},
		},
		"final with less": {
			receipts: func(t *testing.T, d *Delivery) {
				if d.Receipt(1, []string{"a"}, true) == nil {
					t.Error("believed")
				}
			},
			want:   Result{Found: true, Targets: 4, Delivered: 1, Unknown: 3, NodeFailures: late(3)},
			stored: Result{Targets: 4, Offline: 4, Stored: 4, Unsure: 4},
		},
		"a stranger is given up": {
			receipts: func(t *testing.T, d *Delivery) {
				if d.Receipt(0, []string{"nobody"}, false) == nil {
					t.Error("believed")
				}
			},
			want:   Result{Found: true, Targets: 4, Delivered: 1, Unknown: 3, NodeFailures: late(3)},
			stored: Result{Targets: 4, Offline: 4, Stored: 4, Unsure: 4},
		},
		"one is given up twice": {
			receipts: func(t *testing.T, d *Delivery) {
				if d.Receipt(0, []string{"a"}, false) != nil || d.Receipt(0, []string{"a"}, false) == nil || d.Receipt(2, nil, true) != nil {
					t.Error("believed, or asked for more afterwards")
				}
			},
			want:   Result{Found: true, Targets: 4, Delivered: 1, Unknown: 3, NodeFailures: late(3)},
			stored: Result{Targets: 4, Offline: 4, Stored: 4, Unsure: 4},
		},
		"negative": {
			receipts: func(t *testing.T, d *Delivery) {
				if d.Receipt(-1, nil, false) == nil {
					t.Error("believed")
				}
			},
			want:   Result{Found: true, Targets: 4, Delivered: 1, Unknown: 3, NodeFailures: late(3)},
			stored: Result{Targets: 4, Offline: 4, Stored: 4, Unsure: 4},
		},
	} {
		for _, store := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/store=%v", name, store), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld()
					w.shards = 1 // one delivery
					w.config.Spool = newSpool()
					e := w.engine(t)
					for _, user := range []string{"a", "b", "c", "d"} {
						w.users[user] = []string{"A"}
					}
					w.nodes["A"].answer = func(d *Delivery) {
						_, _ = d.Ack(Ack{Delivered: 4, Pending: 3})
						if s := e.Stats(); !d.AwaitsReceipts() || s.Receipts != 1 {
							t.Errorf("does not wait: %+v", s)
						}
						tt.receipts(t, d)
					}
					want := tt.want
					if store {
						want = tt.stored
					}
					r := do(t, e, with(toUsers("a", "b", "c", "d"), Options{ClientAck: true, Store: store}))
					if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", want) {
						t.Errorf("got  %+v\nwant %+v", r, want)
					}
					d := w.nodes["A"].got[0]
					if err := d.Receipt(100, nil, true); err != nil || d.AwaitsReceipts() {
						t.Errorf("a late receipt: %v", err)
					}
				})
			})
		}
	}
}

// TestReceiptThatNobodyAskedForIsAFalseClaim has nodes say more than they were asked.
func TestReceiptThatNobodyAskedForIsAFalseClaim(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	w.users["u"] = []string{"A"}
	for name, tt := range map[string]struct {
		options *Options
		ack     Ack
	}{
		"pending":                    {nil, Ack{Delivered: 1, Pending: 1}},
		"pending with an id":         {&Options{MessageID: "m"}, Ack{Delivered: 1, Pending: 1}},
		"duplicates":                 {&Options{ClientAck: true}, Ack{Delivered: 1, Duplicates: 1}},
		"reused":                     {nil, Ack{Reused: []string{"u"}}},
		"more duplicates":            {&Options{MessageID: "m"}, Ack{Delivered: 1, Duplicates: 2}},
		"more pending":               {&Options{ClientAck: true}, Ack{Pending: 1, NotHere: []string{"u"}}},
		"negative":                   {&Options{ClientAck: true}, Ack{Delivered: 1, Pending: -1}},
		"delivered and reused":       {&Options{MessageID: "m"}, Ack{Delivered: 1, Reused: []string{"u"}}},
		"refused and reused":         {&Options{MessageID: "m"}, Ack{Refused: true, Reused: []string{"u"}}},
		"failed and reused":          {&Options{MessageID: "m"}, Ack{Failed: []string{"u"}, Reused: []string{"u"}}},
		"reused by somebody unknown": {&Options{MessageID: "m"}, Ack{Reused: []string{"x"}}},
	} {
		t.Run(name, func(t *testing.T) {
			var err error
			w.nodes["A"].answer = func(d *Delivery) {
				if d.Options() == nil && d.Receipt(0, nil, true) == nil {
					t.Error("a receipt for nothing is believed")
				}
				if d.Options() != nil && d.Options().ClientAck && d.Receipt(1, nil, true) == nil {
					t.Error("a receipt before the ack is believed")
				}
				_, err = d.Ack(tt.ack)
				d.LoseReceipts()
			}
			p := toUser("u")
			p.Options = tt.options
			if r := do(t, e, p); err == nil || r.Unknown != 1 {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// TestUserOnTwoNodesIsAckedOnce has one acknowledge on both nodes, and on one of them.
func TestUserOnTwoNodesIsAckedOnce(t *testing.T) {
	for _, store := range []bool{false, true} {
		for name, tt := range map[string]struct {
			b    func(d *Delivery)
			want Result
		}{
			"both":                  {func(d *Delivery) { _ = d.Receipt(2, nil, true) }, Result{Found: true, Targets: 2, Delivered: 2, Acked: 2}},
			"the other is silent":   {(*Delivery).LoseReceipts, Result{Found: true, Targets: 2, Delivered: 1, Acked: 1, Unknown: 1}},
			"the other is given up": {func(d *Delivery) { _ = d.Receipt(0, []string{"u", "v"}, true) }, Result{Found: true, Targets: 2, Delivered: 1, Acked: 1, Unknown: 1}},
		} {
			t.Run(fmt.Sprintf("%s/store=%v", name, store), func(t *testing.T) {
				w, spool := newWorld(), newSpool()
				w.shards = 1 // one delivery for each node
				w.config.Spool = spool
				e := w.engine(t)
				w.users = map[string][]string{"u": {"A", "B"}, "v": {"B"}}
				w.nodes["A"].answer = func(d *Delivery) {
					_, _ = d.Ack(Ack{Delivered: 1, Pending: 1})
					_ = d.Receipt(1, nil, true)
				}
				w.nodes["B"].answer = func(d *Delivery) {
					_, _ = d.Ack(Ack{Delivered: 2, Pending: 2})
					tt.b(d)
				}
				r := do(t, e, with(toUsers("u", "v"), Options{ClientAck: true, Store: store}))
				if r.NodeFailures = nil; store && tt.want.Unknown > 0 {
					tt.want.Unknown, tt.want.Offline, tt.want.Stored, tt.want.Unsure = 0, 1, 1, 1
				}
				if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", tt.want) {
					t.Errorf("got  %+v\nwant %+v", r, tt.want)
				}
				if len(spool.of("u")) != 0 {
					t.Error("one who has acknowledged is stored")
				}
			})
		}
	}
}

// TestReceiptsOfABroadcastAreCounted has a node name whom it has given up.
func TestReceiptsOfABroadcastAreCounted(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	for _, n := range w.nodes {
		n.answer = func(d *Delivery) {
			_, _ = d.Ack(Ack{Delivered: 5, Pending: 4, Duplicates: 1, Reused: []string{"r"}})
			_ = d.Receipt(2, []string{"x", "y"}, true)
		}
	}
	r := do(t, e, with(push(&Push{Request: Request{Kind: ToAll}}), Options{ClientAck: true, MessageID: "m"}))
	r.NodeFailures = nil
	if want := (Result{Found: true, Targets: 18, Delivered: 9, Failed: 3, Unknown: 6, Acked: 6, Duplicates: 3}); fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", want) {
		t.Errorf("got  %+v\nwant %+v", r, want)
	}
}

// TestNamesOfABroadcastAreBounded has nodes give up more users than anybody asks for, of whom nobody knows whether
// they are, and then one that is none. All count.
func TestNamesOfABroadcastAreBounded(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	for _, n := range w.nodes {
		n.answer = func(d *Delivery) {
			_, _ = d.Ack(Ack{Delivered: 1000, Pending: 1000})
			for i := range 9 {
				users := make([]string, 100)
				for j := range users {
					users[j] = fmt.Sprint(i, "-", j)
				}
				if err := d.Receipt(0, users, false); err != nil {
					t.Error(err)
				}
			}
			l := d.push.lasting
			l.mu.Lock()
			if r := l.receipts[d]; len(r.unacked) != mostUnacked || len(r.named) != mostUnacked {
				t.Errorf("%d names are kept", len(r.unacked))
			}
			l.mu.Unlock()
			if err := d.Receipt(0, make([]string, 101), false); err == nil {
				t.Error("1,001 of 1,000 are taken")
			}
		}
	}
	r := do(t, e, with(push(&Push{Request: Request{Kind: ToAll}}), Options{ClientAck: true, MessageID: "m"}))
	if r.Targets != 3000 || r.Unknown != 3000 || r.Acked != 0 {
		t.Errorf("%+v", r)
	}
	for _, n := range w.nodes {
		n.answer = func(d *Delivery) {
			_, _ = d.Ack(Ack{Delivered: 1, Pending: 1})
			if err := d.Receipt(0, []string{strings.Repeat("x", 1<<20)}, true); err == nil {
				t.Error("1 MiB is taken for a user")
			}
		}
	}
	if r := do(t, e, with(push(&Push{Request: Request{Kind: ToAll}}), Options{ClientAck: true, MessageID: "n"})); r.Unknown != 3 {
		t.Errorf("%+v", r)
	}
}

// TestCallerWhoLeavesEndsTheWaitForReceipts cancels while nothing but receipts is missing.
func TestCallerWhoLeavesEndsTheWaitForReceipts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, spool := newWorld(), newSpool()
		w.config.Spool = spool
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		w.nodes["A"].answer = ack(Ack{Delivered: 1, Pending: 1})
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, cancel)
		began := time.Now()
		r, err := e.Do(ctx, with(toUser("u"), Options{ClientAck: true, Store: true}))
		if took := time.Since(began); err != nil || r.Unsure != 1 || took != 100*time.Millisecond {
			t.Errorf("%+v, %v after %s", r, err, took)
		}
	})
}

// TestClientsHaveTheirTimeAndNoMore looks at until when receipts count.
func TestClientsHaveTheirTimeAndNoMore(t *testing.T) {
	for name, tt := range map[string]struct {
		o          Options
		timeout    time.Duration
		ackBy, end time.Duration
	}{
		"by default":           {Options{ClientAck: true}, 0, 1900 * time.Millisecond, 2 * time.Second},
		"as asked":             {Options{ClientAck: true, AckTimeout: 200 * time.Millisecond}, 0, 150 * time.Millisecond, 200 * time.Millisecond},
		"until the deadline":   {Options{ClientAck: true}, time.Second, 900 * time.Millisecond, time.Second},
		"and the store's time": {Options{ClientAck: true, Store: true}, time.Second, 750 * time.Millisecond, 850 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				w.config.Spool = newSpool()
				e := w.engine(t)
				w.users["u"] = []string{"A"}
				w.nodes["A"].answer = ack(Ack{Delivered: 1, Pending: 1})
				p := with(toUser("u"), tt.o)
				p.Timeout = tt.timeout
				began := time.Now()
				do(t, e, p)
				d := w.nodes["A"].got[0]
				if by := d.AckBy().Sub(began); by != tt.ackBy || time.Since(began) != tt.end {
					t.Errorf("until %s, ended after %s", by, time.Since(began))
				}
			})
		})
	}
	w := newWorld()
	e := w.engine(t)
	w.users["u"] = []string{"A"}
	do(t, e, toUser("u"))
	if d := w.nodes["A"].got[0]; !d.AckBy().IsZero() || !d.Expires().IsZero() {
		t.Error("a push without options has times")
	}
}

// TestHealsAndReceiptsGoOnTogether has one user acknowledge before the other is found elsewhere.
func TestHealsAndReceiptsGoOnTogether(t *testing.T) {
	w := newWorld()
	w.shards = 1
	e := w.engine(t)
	w.users = map[string][]string{"u": {"A"}, "v": {"A"}}
	w.nodes["A"].answer = func(d *Delivery) {
		w.mu.Lock()
		w.users["v"] = []string{"B"}
		w.mu.Unlock()
		_, _ = d.Ack(Ack{Delivered: 1, Pending: 1, NotHere: []string{"v"}})
		_ = d.Receipt(1, nil, true)
	}
	w.nodes["B"].answer = func(d *Delivery) {
		_, _ = d.Ack(Ack{Delivered: 1, Pending: 1})
		_ = d.Receipt(0, []string{"v"}, true)
	}
	r := do(t, e, with(toUsers("u", "v"), Options{ClientAck: true}))
	if r.Acked != 1 || r.Delivered != 1 || r.Unknown != 1 {
		t.Errorf("got %+v", r)
	}
}

// TestExpiryFailsWhatIsNotWritten has TTLs pass in a look-up, behind a fence and before a heal.
func TestExpiryFailsWhatIsNotWritten(t *testing.T) {
	const text = "failed: expired before it was sent"
	for _, store := range []bool{false, true} {
		t.Run(fmt.Sprintf("look-up/store=%v", store), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, spool := newWorld(), newSpool()
				w.config.Spool = spool
				w.gate = make(chan struct{})
				e := w.engine(t)
				w.users["u"] = []string{"A"}
				began := time.Now()
				r := do(t, e, with(toUser("u"), Options{TTL: 100 * time.Millisecond, Store: store}))
				if r.Failed != 1 || len(r.NodeFailures) != 1 || r.NodeFailures[0].Reason != text || time.Since(began) != 100*time.Millisecond {
					t.Errorf("got %+v after %s", r, time.Since(began))
				}
				if spool.calls != 0 {
					t.Error("stored")
				}
				close(w.gate)
			})
		})
	}
	t.Run("offline, and to be stored", func(t *testing.T) {
		w := newWorld()
		w.config.Spool = newSpool()
		e := w.engine(t)
		p := with(toUser("u"), Options{TTL: time.Minute, Store: true})
		p.Arrived = time.Now().Add(-time.Hour)
		p.Timeout = 2 * time.Hour
		w.config.Timeout = 3 * time.Hour
		e.timeout = 3 * time.Hour
		if r := do(t, e, p); r.Failed != 1 || r.Stored != 0 || r.Success() || r.NodeFailures[0].Reason != text {
			t.Errorf("got %+v", r)
		}
	})
	t.Run("what is written is waited for", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			e := w.engine(t)
			w.users = map[string][]string{"u": {"A"}, "v": {"B"}}
			w.nodes["B"].keep = true
			w.nodes["A"].answer = func(d *Delivery) {
				if got := d.Expires().Sub(d.Arrived()); got != 100*time.Millisecond {
					t.Errorf("expires after %s", got)
				}
				time.AfterFunc(time.Second, func() { _, _ = d.Ack(Ack{NotHere: []string{"u"}}) })
			}
			p := with(toUsers("u", "v"), Options{TTL: 100 * time.Millisecond})
			began := time.Now()
			time.AfterFunc(100*time.Millisecond, func() {
				w.nodes["B"].mu.Lock()
				d := w.nodes["B"].kept[0]
				w.nodes["B"].mu.Unlock()
				d.Drop(DropExpired)
			})
			r := do(t, e, p)
			if r.Failed != 2 || time.Since(began) != time.Second || e.Stats().Heals != 0 {
				t.Errorf("got %+v after %s", r, time.Since(began))
			}
		})
	})
	t.Run("fence", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			e := w.engine(t)
			w.users["u"] = []string{"A"}
			var stream Order
			var written *Delivery
			w.nodes["A"].answer = func(d *Delivery) { written = d }
			var o order
			front := toUser("u")
			front.Order = &stream
			if err := e.Start(front, &o); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Second)
			w.mu.Lock()
			w.users["u"] = []string{"B"}
			w.mu.Unlock()
			p := with(toUser("u"), Options{TTL: 100 * time.Millisecond})
			p.Order = &stream
			if r := do(t, e, p); r.Failed != 1 || r.NodeFailures[0].Reason != text {
				t.Errorf("got %+v", r)
			}
			_, _ = written.Ack(Ack{Delivered: 1})
		})
	})
}

// TestReplayGoesToItsNodeAndNowhereElse has the node not have the user, and be unknown.
func TestReplayGoesToItsNodeAndNowhereElse(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	w.users["u"] = []string{"B"}
	replay := func(node string) *Push {
		return with(toUser("u"), Options{MessageID: "m", Replay: &Replay{Node: node, Gate: 1, Seq: 2, Room: "r"}})
	}
	if r := do(t, e, replay("A")); r.Delivered != 1 {
		t.Errorf("got %+v", r)
	}
	d := w.nodes["A"].got[0]
	if d.Room() != "r" || !slices.Equal(d.Users(), []string{"u"}) || d.shard != uint16(e.shards.For("u").Index()) {
		t.Errorf("got %+v", d)
	}
	w.nodes["A"].answer = notHere("u")
	if r := do(t, e, replay("A")); r.Offline != 1 {
		t.Errorf("got %+v", r)
	}
	w.nodes["A"].answer, w.nodes["A"].decline = nil, DropUnreachable
	if r := do(t, e, replay("A")); r.Failed != 1 {
		t.Errorf("got %+v", r)
	}
	if r := do(t, e, replay("nowhere")); r.Failed != 1 {
		t.Errorf("got %+v", r)
	}
	if w.lookedUp() != 0 || len(w.nodes["B"].got) != 0 || e.Stats().Heals != 0 {
		t.Error("looked up, or sent elsewhere")
	}
}

// TestReplaysReachTheLinkInTheirOrder starts them one after the other, among other pushes.
func TestReplaysReachTheLinkInTheirOrder(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	w.nodes["A"].keep = true
	var o order
	for i := range 100 {
		p := with(toUser("u"), Options{Replay: &Replay{Node: "A", Gate: 1, Seq: uint64(i)}})
		if err := e.Start(p, &o); err != nil {
			t.Fatal(err)
		}
		if got := w.nodes["A"].kept; len(got) != i+1 || got[i].Options().Replay.Seq != uint64(i) {
			t.Fatalf("the %d-th is not with its link", i)
		}
	}
	for _, d := range w.nodes["A"].kept {
		d.Drop(DropStalled)
	}
}

// TestOptionsThatAreRefused names the field of each.
func TestOptionsThatAreRefused(t *testing.T) {
	w := newWorld()
	w.config.Spool = newSpool()
	e := w.engine(t)
	bare := newWorld().engine(t)
	all := push(&Push{Request: Request{Kind: ToAll}})
	for name, tt := range map[string]struct {
		e     *Engine
		p     *Push
		o     Options
		field string
	}{
		"id with 64 bytes":          {e, toUser("u"), Options{MessageID: strings.Repeat("x", 64)}, ""},
		"id with 65 bytes":          {e, toUser("u"), Options{MessageID: strings.Repeat("x", 65)}, "options.message_id"},
		"id with a line break":      {e, toUser("u"), Options{MessageID: "a\nb"}, "options.message_id"},
		"id that is not UTF-8":      {e, toUser("u"), Options{MessageID: "a\xff"}, "options.message_id"},
		"key with 64 bytes":         {e, toUser("u"), Options{CollapseKey: strings.Repeat("x", 64)}, ""},
		"key with 65 bytes":         {e, toUser("u"), Options{CollapseKey: strings.Repeat("x", 65)}, "options.collapse_key"},
		"key with a NUL":            {e, toUser("u"), Options{CollapseKey: "\x00"}, "options.collapse_key"},
		"store":                     {e, toUser("u"), Options{Store: true}, ""},
		"store for all":             {e, all, Options{Store: true}, "options.offline"},
		"store for a room":          {e, toRoom("r"), Options{Store: true}, ""},
		"room where no store is":    {bare, toRoom("r"), Options{Store: true}, "options.offline"},
		"store where none is":       {bare, toUser("u"), Options{Store: true}, "options.offline"},
		"ttl of a week":             {e, toUser("u"), Options{TTL: 168 * time.Hour}, ""},
		"ttl of more":               {e, toUser("u"), Options{TTL: 168*time.Hour + time.Millisecond}, "options.ttl_ms"},
		"negative ttl":              {e, toUser("u"), Options{TTL: -1}, "options.ttl_ms"},
		"ack timeout":               {e, toUser("u"), Options{ClientAck: true, AckTimeout: time.Minute}, ""},
		"ack timeout of more":       {e, toUser("u"), Options{ClientAck: true, AckTimeout: time.Minute + 1}, "options.ack_timeout_ms"},
		"negative ack timeout":      {e, toUser("u"), Options{ClientAck: true, AckTimeout: -1}, "options.ack_timeout_ms"},
		"async":                     {e, toUser("u"), Options{Async: true, ClientAck: true, MessageID: "m"}, ""},
		"async without acks":        {e, toUser("u"), Options{Async: true, MessageID: "m"}, "options.receipt"},
		"async without an id":       {e, toUser("u"), Options{Async: true, ClientAck: true}, "options.receipt"},
		"replay to a room":          {e, toRoom("r"), Options{Replay: &Replay{}}, "options.replay"},
		"replay that is stored":     {e, toUser("u"), Options{Store: true, Replay: &Replay{}}, "options.replay"},
		"replay without a receipts": {e, toUser("u"), Options{Async: true, ClientAck: true, MessageID: "m", Replay: &Replay{}}, "options.replay"},
	} {
		t.Run(name, func(t *testing.T) {
			p := tt.p
			_, err := tt.e.Do(t.Context(), with(p, tt.o))
			var invalid *InvalidError
			switch {
			case tt.field == "" && err != nil:
				t.Error(err)
			case tt.field != "" && (!errors.As(err, &invalid) || invalid.Field != tt.field):
				t.Errorf("got %v", err)
			}
			l := tt.e.Limits()
			if early := l.Check(&p.Request); (early == nil) != (err == nil) {
				t.Errorf("who refuses earlier says %v", early)
			}
		})
	}
}

// TestNudgesGoWhereThePushWentWhileNobodyCanBeAsked has the Controller go away while the message is
// stored, and the store answer after the push's time: nudged is all the same.
func TestNudgesGoWhereThePushWentWhileNobodyCanBeAsked(t *testing.T) {
	for _, late := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w, spool := newWorld(), newSpool()
			w.config.Spool = spool
			e := w.engine(t)
			w.users["u"] = []string{"A"}
			w.nodes["A"].decline = DropQueueFull
			spool.answer = func(done func()) {
				w.mu.Lock()
				w.down = errors.New("away")
				w.mu.Unlock()
				if late {
					time.AfterFunc(time.Minute, done)
					return
				}
				done()
			}
			nudged := make(chan string, 10)
			w.nodes["A"].nudge = func(user string, seq uint64, done func(bool)) {
				nudged <- fmt.Sprint(user, seq)
				done(false)
			}
			r := do(t, e, with(toUser("u"), Options{Store: true}))
			if late && (r.Failed != 1 || r.Stored != 0) || !late && r.Stored != 1 {
				t.Errorf("late %v: %+v", late, r)
			}
			if got := <-nudged; got != "u1" || len(nudged) > 0 {
				t.Errorf("nudged %s", got)
			}
		})
	}
}
