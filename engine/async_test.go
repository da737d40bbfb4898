package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// receiptBook keeps what it is told.
type receiptBook struct {
	mu      sync.Mutex
	results []Result
	unacked [][]string
	finals  int
}

func (b *receiptBook) Receipt(_ *Push, r Result, unacked []string, final bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.results, b.unacked = append(b.results, r), append(b.unacked, unacked)
	if final {
		b.finals++
	}
}

func (b *receiptBook) last() (Result, []string, int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.results) == 0 {
		return Result{}, nil, b.finals
	}
	return b.results[len(b.results)-1], b.unacked[len(b.unacked)-1], b.finals
}

func asyncOptions(b *receiptBook) Options {
	return Options{Async: true, ClientAck: true, MessageID: "m", Receipts: b}
}

// TestAsyncPushAnswersWithTheNodesAndTellsOfClientsLater has some acknowledge, some not, one who is
// away.
func TestAsyncPushAnswersWithTheNodesAndTellsOfClientsLater(t *testing.T) {
	for _, store := range []bool{false, true} {
		t.Run(fmt.Sprint("store=", store), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, spool := newWorld(), newSpool()
				w.shards, w.config.Spool = 1, spool
				e := w.engine(t)
				for _, user := range []string{"a", "b", "c"} {
					w.users[user] = []string{"A"}
				}
				w.nodes["A"].answer = func(d *Delivery) {
					_, _ = d.Ack(Ack{Delivered: 3, Pending: 2})
					time.AfterFunc(20*time.Second, func() {
						if err := d.Receipt(1, []string{"b"}, true); err != nil {
							t.Error(err)
						}
					})
				}
				var book receiptBook
				o := asyncOptions(&book)
				o.Store, o.AckTimeout = store, time.Minute
				began := time.Now()
				p := with(toUsers("a", "b", "c", "z"), o)
				r := do(t, e, p)
				first := Result{Found: true, Targets: 4, Delivered: 3, Offline: 1}
				last := Result{Found: true, Targets: 4, Delivered: 2, Offline: 1, Acked: 1, Unknown: 1,
					NodeFailures: []NodeFailure{{"A", "unknown: not acknowledged by the client in time", 1}}}
				if store {
					first.Stored = 1
					last = Result{Found: true, Targets: 4, Delivered: 2, Offline: 2, Stored: 2, Unsure: 1, Acked: 1}
				}
				if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", first) || time.Since(began) != 0 {
					t.Errorf("got %+v after %s", r, time.Since(began))
				}
				if s := e.Stats(); s.InFlight != 0 || s.Async != 1 || s.Receipts != 1 {
					t.Errorf("under way: %+v", s)
				}
				time.Sleep(20*time.Second - 1)
				if _, _, n := book.last(); n != 0 {
					t.Error("told before")
				}
				time.Sleep(time.Nanosecond)
				synctest.Wait()
				if r, unacked, finals := book.last(); fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", last) || !slices.Equal(unacked, []string{"b"}) || finals != 1 {
					t.Errorf("told %+v, %v, %d times", r, unacked, finals)
				}
				if s := e.Stats(); s.Async != 0 || s.Receipts != 0 {
					t.Errorf("afterwards: %+v", s)
				}
				if now, err := p.Result(); err != nil || fmt.Sprintf("%+v", now) != fmt.Sprintf("%+v", r) || p.Reusable() {
					t.Errorf("the reply has changed: %+v, %v", now, err)
				}
				if store && (len(spool.of("z")) != 1 || len(spool.of("b")) != 1 || len(spool.of("a"))+len(spool.of("c")) != 0) {
					t.Errorf("stored %v", spool.kept)
				}
			})
		})
	}
}

// TestAsyncPushIsFinalInItsTime has the clients say nothing, and the push have none to wait for.
func TestAsyncPushIsFinalInItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		w.nodes["A"].answer = ack(Ack{Delivered: 1, Pending: 1})
		var silent, none, failed receiptBook
		o := asyncOptions(&silent)
		o.AckTimeout = 30 * time.Second // beyond the push's own
		began := time.Now()
		do(t, e, with(toUser("u"), o))
		time.Sleep(30*time.Second - 1)
		if _, _, n := silent.last(); n != 0 {
			t.Error("told before")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if r, _, n := silent.last(); n != 1 || r.Unknown != 1 {
			t.Errorf("after %s: %+v, %d times", time.Since(began), r, n)
		}
		do(t, e, with(toUser("nobody"), asyncOptions(&none)))
		synctest.Wait()
		if r, _, n := none.last(); n != 1 || r.Offline != 1 {
			t.Errorf("none to wait for: %+v, %d times", r, n)
		}
		w.down = errors.New("away")
		if _, err := e.Do(t.Context(), with(toUser("else"), asyncOptions(&failed))); err == nil {
			t.Error("no error")
		}
		synctest.Wait()
		if _, _, n := failed.last(); n != 0 || e.Stats().Async != 0 {
			t.Errorf("after an error: %d times, %d open", n, e.Stats().Async)
		}
	})
}

// TestAsyncPushesAreBounded has two places.
func TestAsyncPushesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.config.MaxAsync = 2
		e := w.engine(t)
		w.users["u"] = []string{"A"}
		w.nodes["A"].answer = ack(Ack{Delivered: 1, Pending: 1})
		var book receiptBook
		for range 2 {
			do(t, e, with(toUser("u"), asyncOptions(&book)))
		}
		p := with(toUser("u"), asyncOptions(&book))
		if _, err := e.Do(t.Context(), p); !errors.Is(err, ErrAsync) || !errors.Is(err, ErrOverloaded) {
			t.Errorf("got %v", err)
		}
		if s := e.Stats(); s.InFlight != 0 || s.Async != 2 {
			t.Errorf("left behind: %+v", s)
		}
		time.Sleep(3 * time.Second)
		do(t, e, with(toUser("u"), asyncOptions(&book)))
	})
}

// TestDrainWaitsForReceiptsAndGivesThemUp has them come in time, too late, and the store be silent.
func TestDrainWaitsForReceiptsAndGivesThemUp(t *testing.T) {
	for name, tt := range map[string]struct {
		after  time.Duration // of the receipt, 0 for never
		silent bool
		took   time.Duration
		want   Result
		err    bool
	}{
		"in time":       {after: 3 * time.Second, took: 3 * time.Second, want: Result{Found: true, Targets: 1, Delivered: 1, Acked: 1}},
		"never":         {took: 9 * time.Second, want: Result{Targets: 1, Offline: 1, Stored: 1, Unsure: 1}},
		"nor the store": {silent: true, took: 10 * time.Second, err: true, want: Result{Found: true, Targets: 1, Unknown: 1, NodeFailures: []NodeFailure{{"", "failed: store: no answer in time", 1}, {"A", "unknown: not acknowledged by the client in time", 1}}}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, spool := newWorld(), newSpool()
				spool.silent = tt.silent
				w.config.Spool = spool
				e := w.engine(t)
				w.users["u"] = []string{"A"}
				w.nodes["A"].answer = func(d *Delivery) {
					_, _ = d.Ack(Ack{Delivered: 1, Pending: 1})
					if tt.after > 0 {
						time.AfterFunc(tt.after, func() { _ = d.Receipt(1, nil, true) })
					}
				}
				var book receiptBook
				o := asyncOptions(&book)
				o.Store, o.AckTimeout = true, time.Minute
				do(t, e, with(toUser("u"), o))
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				began := time.Now()
				err := e.Drain(ctx)
				if (err != nil) != tt.err || time.Since(began) != tt.took {
					t.Errorf("%v after %s", err, time.Since(began))
				}
				if r, _, n := book.last(); n != 1 || fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", tt.want) {
					t.Errorf("told %d times: %+v", n, r)
				}
				if s := e.Stats(); s.Async != 0 || s.Receipts != 0 {
					t.Errorf("left behind: %+v", s)
				}
			})
		})
	}
}

// TestDrainGivesUpReceiptsBehindAPushThatHangs ends while a push is in flight, too.
func TestDrainGivesUpReceiptsBehindAPushThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.config.Spool = newSpool()
		e := w.engine(t)
		w.users = map[string][]string{"u": {"A"}, "v": {"B"}}
		w.nodes["A"].answer = ack(Ack{Delivered: 1, Pending: 1})
		w.nodes["B"].keep = true
		var book receiptBook
		async := asyncOptions(&book)
		async.Store, async.AckTimeout = true, time.Minute
		do(t, e, with(toUser("u"), async))
		var o order
		if err := e.Start(toUser("v"), &o); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := e.Drain(ctx); err == nil {
			t.Error("no error")
		}
		want := []NodeFailure{{"", "failed: store: push-manager is draining", 1}, {"A", "unknown: not acknowledged by the client in time", 1}}
		if r, _, n := book.last(); n != 1 || !slices.Equal(r.NodeFailures, want) {
			t.Errorf("told %d times: %+v", n, r)
		}
		w.nodes["B"].mu.Lock()
		d := w.nodes["B"].kept[0]
		w.nodes["B"].mu.Unlock()
		d.Drop(DropStalled)
	})
}
