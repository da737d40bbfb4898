package store

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

	"github.com/VictoriaMetrics/metrics"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
)

// line is the receipts of a store in memory, which may be away.
type line struct {
	mu      sync.Mutex
	epoch   uint64
	kept    []Receipt // in order
	dropped uint64    // places up to it are gone
	next    uint64
	away    bool
	silent  bool // it takes receipts and does not answer
	batches [][]string
	reads   int // under way
	most    int // of reads, at a time
}

func newMemoryLine() *line { return &line{epoch: 7, next: 1} }

func (s *line) AppendReceipts(ctx context.Context, list []Receipt) []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	errs := make([]error, len(list))
	var batch []string
	for i := range list {
		batch = append(batch, string(list[i].Content))
		switch {
		case s.away:
			errs[i] = engine.ErrSpoolDown
		case len(list[i].Content) > 1000:
			errs[i] = ErrReceiptSize
		default:
			list[i].Seq = s.next
			s.next++
			s.kept = append(s.kept, list[i])
			if s.silent {
				errs[i] = fmt.Errorf("%w: no answer", engine.ErrSpoolDown)
			}
		}
	}
	s.batches = append(s.batches, batch)
	return errs
}

func (s *line) page(sender string, all bool, after uint64, most int) (p ReceiptPage, err error) {
	if s.away {
		return p, engine.ErrSpoolDown
	}
	p.Last = after
	for _, r := range s.kept {
		switch {
		case r.Seq <= after || !all && r.Sender != sender:
		case len(p.Receipts) == most:
			p.More = true
		default:
			if all {
				p.Missing += r.Seq - p.Last - 1
			}
			p.Receipts, p.Last = append(p.Receipts, r), r.Seq
		}
	}
	p.Gap = s.dropped > after
	return p, nil
}

func (s *line) ReadReceipts(ctx context.Context, sender string, after uint64, most, _ int) (ReceiptPage, error) {
	s.mu.Lock()
	s.reads++
	s.most = max(s.most, s.reads)
	s.mu.Unlock()
	time.Sleep(time.Millisecond)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads--
	return s.page(sender, false, after, most)
}

func (s *line) FollowReceipts(_ context.Context, after uint64, most, _ int) (ReceiptPage, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.page("", true, after, most)
}

func (s *line) ReceiptsHead(context.Context) (epoch, last uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		return 0, 0, engine.ErrSpoolDown
	}
	return s.epoch, s.next - 1, nil
}

func (s *line) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// drop drops what is up to a place.
func (s *line) drop(upTo uint64) {
	s.set(func() {
		s.dropped = upTo
		s.kept = slices.DeleteFunc(s.kept, func(r Receipt) bool { return r.Seq <= upTo })
	})
}

// logBench is an instance with a log over a line.
type logBench struct {
	*ReceiptLog
	t   *testing.T
	set *metrics.Set
}

func newLog(t *testing.T, s *line, change func(*ReceiptLogConfig)) *logBench {
	t.Helper()
	set := metrics.NewSet()
	cfg := ReceiptLogConfig{Receipts: s, Metrics: set}
	if change != nil {
		change(&cfg)
	}
	l, err := NewReceiptLog(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = l.Close(ctx)
	})
	return &logBench{l, t, set}
}

func (b *logBench) append(sender string, ids ...string) {
	for _, id := range ids {
		b.Append(sender, id, []byte(id))
	}
}

func (b *logBench) lostReceipts() int {
	return int(b.set.GetOrCreateCounter("push_manager_receipts_lost_total").Get())
}

func (b *logBench) watch(sender, after string) *ReceiptReader {
	b.t.Helper()
	r, err := b.Watch(b.t.Context(), sender, after)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(r.Close)
	return r
}

// read reads n receipts, as a watcher does, and returns their contents and the last position.
func read(t *testing.T, r *ReceiptReader, n int) (got []string, last string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); len(got) < n; {
		if time.Now().After(deadline) {
			t.Fatalf("%d receipts in a minute: %q", len(got), got)
		}
		changed, err := r.Next(t.Context(), func(position string, receipt []byte) error {
			got, last = append(got, string(receipt)), position
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if changed == nil || len(got) == n {
			continue
		}
		timer := time.NewTimer(time.Second)
		select {
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
	return got, last
}

func ids(prefix string, n int) (list []string) {
	for i := range n {
		list = append(list, fmt.Sprint(prefix, i))
	}
	return list
}

// TestAWatcherGoesOnAtAnotherInstance: two logs over one line.
func TestAWatcherGoesOnAtAnotherInstance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemoryLine()
		one, two := newLog(t, s, nil), newLog(t, s, nil)
		at := one.watch("a", "")
		one.append("a", ids("of one ", 300)...)
		two.append("b", ids("of b ", 300)...)
		got, position := read(t, at, 300)
		if !slices.Equal(got, ids("of one ", 300)) {
			t.Errorf("got %q", got)
		}
		one.append("a", "later")
		two.append("a", "of two")
		synctest.Wait()
		got, _ = read(t, two.watch("a", position), 2)
		slices.Sort(got)
		if !slices.Equal(got, []string{"later", "of two"}) {
			t.Errorf("at the other: %q", got)
		}
		got, _ = read(t, two.watch("b", ReceiptPosition(7, 0)), 300)
		if !slices.Equal(got, ids("of b ", 300)) {
			t.Errorf("b got %q", got)
		}
	})
}

// TestReceiptsWaitForAStoreThatIsAway, and the queue's bound tells which are lost.
func TestReceiptsWaitForAStoreThatIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemoryLine()
		l := newLog(t, s, func(c *ReceiptLogConfig) { c.QueueLen = 10 })
		r := l.watch("a", "")
		s.set(func() { s.away = true })
		l.append("a", ids("", 15)...)
		if n := l.lostReceipts(); n != 5 {
			t.Errorf("%d are lost", n)
		}
		time.Sleep(time.Hour)
		s.set(func() { s.away = false })
		if got, _ := read(t, r, 10); !slices.Equal(got, ids("", 10)) {
			t.Errorf("got %q", got)
		}
		if n, bytes := l.queue.size(); n != 0 || bytes != 0 {
			t.Errorf("%d receipts with %d bytes wait", n, bytes)
		}
	})
}

// TestReceiptsOfOneMessageStayInOrder although the store's answers are lost, and they are stored again.
func TestReceiptsOfOneMessageStayInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemoryLine()
		s.silent = true
		l := newLog(t, s, nil)
		for i := range 3 {
			l.Append("a", "m", []byte(fmt.Sprint("m ", i)))
			l.Append("a", "n", []byte(fmt.Sprint("n ", i)))
		}
		time.Sleep(10 * time.Second)
		s.set(func() { s.silent = false })
		time.Sleep(10 * time.Second)
		s.set(func() {
			if len(s.kept) <= 6 {
				t.Errorf("nothing was stored again: %v", s.kept)
			}
			for _, id := range []string{"m", "n"} {
				last := ""
				for _, r := range s.kept {
					if text := string(r.Content); strings.HasPrefix(text, id) {
						if text < last {
							t.Errorf("%q behind %q", text, last)
						}
						last = text
					}
				}
				if last != id+" 2" {
					t.Errorf("the last one is %q", last)
				}
			}
		})
	})
}

func TestWhatIsLeftAtTheEndIsLostAndCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemoryLine()
		l := newLog(t, s, nil)
		l.append("a", "stored")
		l.Append("a", "large", make([]byte, 2000)) // no attempt mends that
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		synctest.Wait()
		s.set(func() { s.away = true })
		l.append("a", ids("", 4)...)
		if err := l.Close(ctx); err == nil || !strings.Contains(err.Error(), "4 receipts") {
			t.Errorf("close: %v", err)
		}
		l.append("a", "after the end")
		if n := l.lostReceipts(); n != 6 {
			t.Errorf("%d are lost", n)
		}
	})
}

func TestWatchersWhoAreBehindReadPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemoryLine()
		l := newLog(t, s, func(c *ReceiptLogConfig) { c.TailBytes, c.Reads = 10*receiptCost, 2 })
		behind := l.watch("a", "")
		want := ids("", 1000)
		for part := range slices.Chunk(want, 100) {
			l.append("a", part...)
			l.append("noise", ids("x", 50)...)
			time.Sleep(time.Second)
		}
		if n, bytes := l.tail.size(); n > 10 || bytes > 10*receiptCost {
			t.Errorf("the tail has %d receipts, %d bytes", n, bytes)
		}
		if got, _ := read(t, behind, 1000); !slices.Equal(got, want) {
			t.Errorf("got %d", len(got))
		}
		// Many who come back read two at a time.
		var wg sync.WaitGroup
		for range 10 {
			r := l.watch("a", ReceiptPosition(7, 0))
			wg.Go(func() {
				if got, _ := read(t, r, 1000); !slices.Equal(got, want) {
					t.Errorf("got %d", len(got))
				}
			})
		}
		wg.Wait()
		if s.most > 2 {
			t.Errorf("%d reads at a time", s.most)
		}
	})
}

// next reads until something fails.
func next(t *testing.T, r *ReceiptReader) error {
	t.Helper()
	for range 100 {
		_, err := r.Next(t.Context(), func(string, []byte) error { return nil })
		if err != nil {
			return err
		}
		time.Sleep(time.Second)
	}
	return nil
}

func TestAWatcherIsToldWhatItCannotHave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemoryLine()
		l := newLog(t, s, nil)
		l.append("a", ids("", 100)...)
		synctest.Wait()
		for after, want := range map[string]error{
			"x": ErrReceiptPosition, "s.": ErrReceiptPosition, "s.7": ErrReceiptPosition, "s.7.zz zz": ErrReceiptPosition, "s.7." + strings.Repeat("z", 99): ErrReceiptPosition,
			ReceiptPosition(7, 101): ErrReceiptPosition, ReceiptPosition(8, 1): ErrReceiptsGone, "abc-1": ErrReceiptsElsewhere,
		} {
			if _, err := l.Watch(t.Context(), "a", after); !errors.Is(err, want) {
				t.Errorf("%q: %v, want %v", after, err, want)
			}
		}
		// What it is behind goes.
		r := l.watch("a", ReceiptPosition(7, 10))
		s.drop(50)
		if err := next(t, r); !errors.Is(err, ErrReceiptsGone) {
			t.Errorf("behind what is gone: %v", err)
		}
		// The store goes: who has caught up waits, others end.
		caughtUp := l.watch("a", "")
		if err := next(t, caughtUp); err != nil {
			t.Fatal(err)
		}
		old := l.watch("a", ReceiptPosition(7, 60))
		s.set(func() { s.away = true })
		if err := next(t, caughtUp); err != nil {
			t.Errorf("who has caught up: %v", err)
		}
		if err := next(t, old); !errors.Is(err, engine.ErrSpoolDown) {
			t.Errorf("who is behind: %v", err)
		}
		if _, err := l.Watch(t.Context(), "a", ""); !errors.Is(err, engine.ErrSpoolDown) {
			t.Errorf("a new one: %v", err)
		}
		// It comes back with nothing in it.
		s.set(func() { s.away, s.epoch, s.kept, s.next = false, 9, nil, 1 })
		if err := next(t, caughtUp); !errors.Is(err, ErrReceiptsGone) {
			t.Errorf("of a line that is lost: %v", err)
		}
	})
}

// TestEachWatcherGetsEachReceiptOnceInOrder whatever the tail and the pages are.
func TestEachWatcherGetsEachReceiptOnceInOrder(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		tail := rapid.IntRange(1, 40).Draw(rt, "tail") * receiptCost
		steps := rapid.SliceOfN(rapid.IntRange(0, 5), 1, 60).Draw(rt, "steps")
		synctest.Test(t, func(t *testing.T) {
			s := newMemoryLine()
			l := newLog(t, s, func(c *ReceiptLogConfig) { c.TailBytes = tail })
			readers := map[string][]*ReceiptReader{}
			got, want, from := map[*ReceiptReader][]string{}, map[string][]string{}, map[*ReceiptReader]int{}
			step := func(r *ReceiptReader) {
				_, err := r.Next(t.Context(), func(_ string, receipt []byte) error {
					got[r] = append(got[r], string(receipt))
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			for i, what := range steps {
				sender := fmt.Sprint("s", what%2)
				switch what {
				case 0, 1:
					id := fmt.Sprint(i)
					l.append(sender, id)
					want[sender] = append(want[sender], id)
				case 2, 3:
					synctest.Wait() // what was appended is stored, and is not from now on
					r := l.watch(sender, "")
					readers[sender] = append(readers[sender], r)
					from[r] = len(want[sender])
				case 4:
					time.Sleep(100 * time.Millisecond)
				default:
					for _, list := range readers {
						for _, r := range list {
							step(r)
						}
					}
				}
			}
			for range 200 {
				time.Sleep(100 * time.Millisecond)
				for _, list := range readers {
					for _, r := range list {
						step(r)
					}
				}
			}
			for sender, list := range readers {
				for _, r := range list {
					if !slices.Equal(got[r], want[sender][from[r]:]) {
						t.Fatalf("%s got %q, want %q", sender, got[r], want[sender][from[r]:])
					}
				}
			}
		})
	})
}

func FuzzReceiptPosition(f *testing.F) {
	f.Add("s.7.1")
	f.Add("abc-1")
	f.Fuzz(func(t *testing.T, text string) {
		epoch, seq, err := ParseReceiptPosition(text)
		if err != nil {
			return
		}
		if e, s, err := ParseReceiptPosition(ReceiptPosition(epoch, seq)); err != nil || e != epoch || s != seq {
			t.Errorf("%q is %d, %d; again %d, %d, %v", text, epoch, seq, e, s, err)
		}
	})
}
