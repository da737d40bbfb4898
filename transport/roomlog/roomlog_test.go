package roomlog

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/store"
	"github.com/push-manager/push-manager/transport/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// asking is a stream that notes what it is told.
type asking struct {
	name string

	mu    sync.Mutex
	full  bool // Mark answers false
	marks []*link.LogMark
	pages map[uint64]*link.LogPage
	twice int // pages for a gate that had one
}

func (a *asking) Node() string { return a.name }

func (a *asking) Mark(m *link.LogMark) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.full {
		a.marks = append(a.marks, m)
	}
	return !a.full
}

func (a *asking) Page(p *link.LogPage) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.pages == nil {
		a.pages = map[uint64]*link.LogPage{}
	}
	if a.pages[p.Gate] != nil {
		a.twice++
	}
	a.pages[p.Gate] = p
}

// told are the marks since the last call.
func (a *asking) told() (list []*link.LogMark) {
	a.mu.Lock()
	defer a.mu.Unlock()
	list, a.marks = a.marks, nil
	return list
}

// page is the answer to a read, nil for none.
func (a *asking) page(gate uint64) *link.LogPage {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.pages[gate]
}

// is checks a page: its places, and where it ends.
func is(t *testing.T, what string, p *link.LogPage, seq uint64, more, gap bool, places ...uint64) {
	t.Helper()
	if p == nil {
		t.Fatalf("%s: no page", what)
	}
	var got []uint64
	for i := range p.Entries {
		got = append(got, p.Entries[i].Place.Seq)
	}
	if p.Error != "" || !slices.Equal(got, places) || p.Seq != seq || p.More != more || p.Gap != gap {
		t.Errorf("%s: places %v up to %d, more %v, gap %v, error %q; want %v up to %d, %v, %v", what, got, p.Seq, p.More, p.Gap, p.Error, places, seq, more, gap)
	}
}

// text is a mark in words.
func text(m *link.LogMark) string {
	s := fmt.Sprintf("%d: %d-%d", m.Partition, m.After, m.Seq)
	for _, r := range m.Rooms {
		s += fmt.Sprintf(" %s %v", r.Room, r.Seqs)
	}
	return s
}

func texts(list []*link.LogMark) (all []string) {
	for _, m := range list {
		all = append(all, text(m))
	}
	return all
}

// world is a service over logs in memory.
type world struct {
	t       testing.TB
	logs    *storetest.Logs
	service *Service
	metrics *metrics.Set
	gate    uint64
}

func newWorld(t testing.TB, partitions int, cfg Config) *world {
	t.Helper()
	w := &world{t: t, logs: storetest.NewLogs(partitions), metrics: metrics.NewSet()}
	w.open(cfg)
	return w
}

func (w *world) open(cfg Config) {
	w.t.Helper()
	cfg.Logs, cfg.Metrics = w.logs, w.metrics
	var err error
	if w.service, err = New(cfg); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := w.service.Close(ctx); err != nil {
		w.t.Error(err)
	}
}

// bubble runs a test in virtual time over a world with these partitions.
func bubble(t *testing.T, partitions int, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, partitions, Config{})
		defer w.close()
		synctest.Wait()
		f(t, w)
	})
}

// push appends n messages to the log of a room and returns the last place.
func (w *world) push(room string, n int, bytes ...int) (seq uint64) {
	w.t.Helper()
	size := 1
	if len(bytes) > 0 {
		size = bytes[0]
	}
	for range n {
		e := []store.LogEntry{{Message: &engine.Stored{MessageID: "m", Room: room, Payload: make([]byte, size)}, Expires: time.Now().Add(time.Hour)}}
		if err := w.logs.AppendLog(context.Background(), e)[0]; err != nil {
			w.t.Fatal(err)
		}
		seq = e[0].Place.Seq
	}
	return seq
}

func (w *world) epoch() uint64 {
	epoch, _, err := w.logs.Heads(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	return epoch
}

// ask reads a room, in the partition of which the node is at after.
func (w *world) ask(a *asking, room string, after uint64) (gate uint64) {
	w.gate++
	places := make([]uint64, w.logs.Partition(room)+1)
	places[len(places)-1] = after
	w.service.Read(a, link.LogRead{Room: room, Gate: w.gate, Epoch: w.epoch(), After: places})
	return w.gate
}

// read is ask with its answer.
func (w *world) read(a *asking, room string, after uint64) *link.LogPage {
	gate := w.ask(a, room, after)
	synctest.Wait()
	return a.page(gate)
}

// count is a metric.
func (w *world) count(name string) string {
	var b strings.Builder
	w.metrics.WritePrometheus(&b)
	for line := range strings.Lines(b.String()) {
		if rest, ok := strings.CutPrefix(line, "push_manager_"+name+" "); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

func TestMarksNameWhatWasWrittenOnceItIsHalfASecondOld(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		a := &asking{name: "A"}
		w.push("r", 2)
		time.Sleep(time.Second)
		w.service.Follow(a, 0, nil)
		time.Sleep(2 * markPause)
		if got := texts(a.told()); !slices.Equal(got, []string{"0: 2-2"}) {
			t.Fatalf("at first: %q", got)
		}
		begun := time.Now()
		w.push("r", 1)
		w.push("s", 1)
		w.push("r", 1)
		for len(a.told()) == 0 {
			time.Sleep(10 * time.Millisecond)
			if since := time.Since(begun); since > settle+markEvery+50*time.Millisecond {
				t.Fatalf("nothing after %v", since)
			}
		}
		if since := time.Since(begun); since < settle {
			t.Errorf("after %v", since)
		}
	})
	bubble(t, 1, func(t *testing.T, w *world) {
		a := &asking{name: "A"}
		w.push("r", 2)
		w.service.Follow(a, w.epoch(), []uint64{1})
		time.Sleep(2 * time.Second)
		w.push("r", 1)
		w.push("s", 1)
		w.push("r", 1)
		time.Sleep(2 * time.Second)
		var all []string
		for _, m := range a.told() {
			if m.Epoch != w.epoch() || m.Partitions != 1 {
				t.Errorf("%+v", m)
			}
			all = append(all, text(m))
		}
		if want := []string{"0: 1-1", "0: 1-2 r [2]", "0: 2-5 r [3 5] s [4]"}; !slices.Equal(all, want) {
			t.Errorf("%q, want %q", all, want)
		}
	})
}

func TestEachPartitionHasAFirstMarkAtOnceAndThenNowAndThen(t *testing.T) {
	bubble(t, 3, func(t *testing.T, w *world) {
		time.Sleep(time.Second)
		a := &asking{name: "A"}
		w.service.Follow(a, 0, nil)
		time.Sleep(2 * markPause)
		if got := texts(a.told()); !slices.Equal(got, []string{"0: 0-0", "1: 0-0", "2: 0-0"}) {
			t.Errorf("%q", got)
		}
		for range 3 {
			time.Sleep(10 * time.Second)
			if got := a.told(); len(got) == 0 || len(got) > 3 {
				t.Errorf("in ten seconds: %q", texts(got))
			}
		}
		// Of a log that is not followed nothing is said, so that the node goes elsewhere.
		w.logs.Before(func(_ context.Context, call, _ string) error {
			if call == storetest.CallFollow || call == storetest.CallTell {
				return errors.New("down")
			}
			return nil
		})
		w.push("r", 1)
		time.Sleep(stuck + quiet)
		a.told()
		time.Sleep(time.Minute)
		if got := a.told(); len(got) > 0 {
			t.Errorf("while nobody follows: %q", texts(got))
		}
		if got := w.count("room_log_partitions_broken"); got != "1" {
			t.Errorf("%s partitions are broken", got)
		}
		w.logs.Before(nil)
		time.Sleep(2 * lastPause)
		if got := texts(a.told()); !slices.Contains(got, fmt.Sprintf("%d: 0-1 r [1]", w.logs.Partition("r"))) {
			t.Errorf("afterwards: %q", got)
		}
	})
}

// A follower that ends with an error goes on where it was: the marks join, and each place is named once.
func TestAFollowerThatEndsWithAnErrorGoesOn(t *testing.T) {
	for name, fail := range map[string]func() error{
		"an error": func() error { return errors.New("the consumer is gone") },
		"a panic":  func() error { panic("in the store") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 1, func(t *testing.T, w *world) {
				a := &asking{name: "A"}
				w.service.Follow(a, 0, nil)
				time.Sleep(time.Second)
				tells, follows := 0, 0
				w.logs.Before(func(_ context.Context, call, _ string) error {
					switch call {
					case storetest.CallTell:
						if tells++; tells%7 == 0 {
							return fail()
						}
					case storetest.CallFollow:
						if follows++; follows%2 == 0 {
							return fail()
						}
					}
					return nil
				})
				w.push("r", 40)
				time.Sleep(2 * time.Minute)
				w.logs.Before(nil)
				at, places := uint64(0), []uint64(nil)
				for _, m := range a.told() {
					if m.After != at {
						t.Errorf("a mark behind %d, and the one before it was up to %d", m.After, at)
					}
					at = m.Seq
					for _, r := range m.Rooms {
						places = append(places, r.Seqs...)
					}
				}
				var want []uint64
				for i := range 40 {
					want = append(want, uint64(i+1))
				}
				if !slices.Equal(places, want) {
					t.Errorf("named: %v", places)
				}
			})
		})
	}
}

func TestMarksBeginLaterWhereTheIndexDoesNotReachBack(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		head := w.push("r", 2*warm)
		w.close()
		w.open(Config{})
		a, b := &asking{name: "A"}, &asking{name: "B"}
		time.Sleep(time.Second)
		w.service.Follow(a, w.epoch(), []uint64{5})
		w.service.Follow(b, w.epoch(), []uint64{head - 3})
		time.Sleep(2 * time.Second)
		got := a.told()
		if len(got) == 0 || got[0].After != head-warm {
			t.Errorf("from an old place: %q", texts(got[:1]))
		}
		if got := texts(b.told()); !slices.Equal(got, []string{fmt.Sprintf("0: %d-%d r %v", head-3, head, []uint64{head - 2, head - 1, head})}) {
			t.Errorf("across a restart: %q", got)
		}
	})
}

// The index holds so much and no more, and knows how far it reaches back.
func TestTheIndexIsBounded(t *testing.T) {
	p := newPartition(0, 100, 0)
	now := time.Now()
	for i := range 10 * p.most {
		p.add(fmt.Sprint("room", i/3), uint64(2*i+2), now)
	}
	if len(p.records) > p.most*5/4 || len(p.last) > p.most || p.from != p.records[0].seq-2 {
		t.Errorf("%d records, %d rooms, from %d, first %d", len(p.records), len(p.last), p.from, p.records[0].seq)
	}
	// Marks name each of them once, and join.
	named, at := 0, p.from
	for _, m := range p.marks(&generation{epoch: 1, parts: make([]*partition, 1)}, p.from, p.to) {
		if m.After != at {
			t.Errorf("behind %d, want %d", m.After, at)
		}
		at = m.Seq
		for _, r := range m.Rooms {
			named += len(r.Seqs)
		}
	}
	if named != len(p.records) || at != p.to {
		t.Errorf("%d of %d are named, up to %d of %d", named, len(p.records), at, p.to)
	}
}

func TestStreamsAtTheSamePlaceShareMarks(t *testing.T) {
	bubble(t, 2, func(t *testing.T, w *world) {
		var all []*asking
		for i := range 50 {
			a := &asking{name: fmt.Sprint(i)}
			all = append(all, a)
			w.service.Follow(a, 0, nil)
		}
		time.Sleep(time.Second)
		for _, a := range all {
			a.told()
		}
		for i := range 20 {
			w.push(fmt.Sprint("r", i), 1)
		}
		time.Sleep(2 * time.Second)
		first := all[0].told()
		if len(first) != 2 {
			t.Fatalf("%q", texts(first))
		}
		for _, a := range all[1:] {
			if got := a.told(); !slices.Equal(got, first) {
				t.Errorf("%s was told %q", a.name, texts(got))
			}
		}
	})
}

func TestAStreamThatIsFullIsToldLaterFromTheSamePlace(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		a := &asking{name: "A"}
		w.service.Follow(a, 0, nil)
		time.Sleep(time.Second)
		a.told()
		a.full = true
		w.push("r", 3*markMost)
		time.Sleep(3 * time.Second)
		a.mu.Lock()
		a.full = false
		a.mu.Unlock()
		time.Sleep(time.Second)
		got := a.told()
		if len(got) != 3 || got[0].After != 0 || got[2].Seq != 3*markMost || got[1].After != got[0].Seq || got[2].After != got[1].Seq {
			t.Errorf("%d marks", len(got))
		}
	})
}

// A node that begins to follow again and again costs a look at a time.
func TestFollowsInALoopAreBounded(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		w.push("r", 50*markMost)
		time.Sleep(time.Second)
		a, epoch := &asking{name: "A"}, w.epoch()
		begun := time.Now()
		for range 10_000 {
			w.service.Follow(a, epoch, make([]uint64, 1))
			time.Sleep(time.Millisecond)
		}
		looks := int(time.Since(begun)/markEvery) + 2
		synctest.Wait()
		if got := len(a.told()); got > looks*marksMost {
			t.Errorf("%d marks in %d looks", got, looks)
		}
		w.service.Gone(a)
		w.service.Gone(a)
		if len(w.service.streams) != 0 {
			t.Errorf("%d streams are left", len(w.service.streams))
		}
		time.Sleep(time.Minute)
		if got := a.told(); len(got) > 0 {
			t.Errorf("after it has gone: %q", texts(got))
		}
	})
}

func TestAnotherEpochBeginsAnew(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		a := &asking{name: "A"}
		w.push("r", 10)
		old := w.epoch()
		w.service.Follow(a, old, []uint64{0})
		time.Sleep(2 * time.Second)
		is(t, "before", w.read(a, "r", 9), 10, false, false, 10)
		a.told()

		// Somebody waits for the follower when it happens.
		w.logs.Before(func(_ context.Context, call, _ string) error {
			if call == storetest.CallTell {
				return errors.New("slow")
			}
			return nil
		})
		w.push("r", 1)
		waiting := w.ask(a, "r", 10)
		synctest.Wait()
		w.logs.Before(nil)
		w.logs.Renew()
		time.Sleep(time.Second)
		if p := a.page(waiting); p == nil || !p.Gap || p.Epoch == old || len(p.Entries) > 0 {
			t.Errorf("who waited: %+v", p)
		}
		time.Sleep(time.Second)
		got := a.told()
		if len(got) == 0 || got[len(got)-1].Epoch == old || got[len(got)-1].After != 0 {
			t.Errorf("told: %q", texts(got))
		}
		w.push("r", 2)
		time.Sleep(2 * time.Second)
		if got := texts(a.told()); !slices.Equal(got, []string{"0: 0-2 r [1 2]"}) {
			t.Errorf("then: %q", got)
		}
		// A position of the old epoch.
		w.service.Read(a, link.LogRead{Room: "r", Gate: 99_999, Epoch: old, After: []uint64{1}})
		synctest.Wait()
		is(t, "of another epoch", a.page(99_999), 2, false, true)
		is(t, "of this one", w.read(a, "r", 0), 2, false, false, 1, 2)
		if got := w.count("room_log_renewals_total"); got != "1" {
			t.Errorf("%s renewals", got)
		}
	})
}

// An index that has begun at the end of the log makes one call of ReadLog for a room, however many come back to it.
func TestTenThousandMembersWhoComeBackMakeOneCall(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		head := w.push("r", 100, 1000)
		w.push("elsewhere", 2*warm) // r is not in the index any more
		w.close()
		w.open(Config{})
		time.Sleep(time.Second)
		heads := w.logs.Calls(storetest.CallHeads)
		var slow sync.WaitGroup
		slow.Add(1)
		w.logs.Before(func(_ context.Context, call, _ string) error {
			if call == storetest.CallHeads || call == storetest.CallRead {
				time.Sleep(10 * time.Millisecond)
			}
			return nil
		})
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		var all [100]asking
		epoch := uint64(1<<32 + 1)
		for i := range 10_000 {
			w.service.Read(&all[i%100], link.LogRead{Room: "r", Gate: uint64(i + 1), Epoch: epoch, After: []uint64{uint64(i % 50)}})
			if i%100 == 0 {
				time.Sleep(time.Millisecond / 2)
			}
		}
		time.Sleep(time.Second)
		synctest.Wait()
		w.logs.Before(nil)
		for i := range 10_000 {
			p := all[i%100].page(uint64(i + 1))
			if p == nil || p.Error != "" || p.More || p.Gap || len(p.Entries) != 100-i%50 || p.Entries[len(p.Entries)-1].Place.Seq != head {
				t.Fatalf("read %d: %+v", i, p)
			}
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if grown := int(after.HeapAlloc) - int(before.HeapAlloc); grown > 64<<20 {
			t.Errorf("%d MiB for 10,000 pages", grown>>20)
		}
		if got := w.logs.Calls(storetest.CallRead); got != 1 {
			t.Errorf("%d calls of ReadLog", got)
		}
		if got := w.logs.Calls(storetest.CallHeads) - heads; got > 20 {
			t.Errorf("%d calls of Heads", got)
		}
		for i := range all {
			if all[i].twice > 0 {
				t.Errorf("%d were answered twice", all[i].twice)
			}
		}
	})
}

func TestNothingNewCostsNoCallOfReadLog(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		a := &asking{}
		for i := range 500 {
			w.push(fmt.Sprint("r", i), 1)
		}
		for i := range 500 {
			is(t, fmt.Sprint(i), w.read(a, fmt.Sprint("r", i), uint64(i+1)), 500, false, false)
		}
		is(t, "a room without messages", w.read(a, "empty", 0), 500, false, false)
		if got := w.logs.Calls(storetest.CallRead); got != 0 {
			t.Errorf("%d calls of ReadLog", got)
		}
		is(t, "one behind", w.read(a, "r3", 3), 500, false, false, 4)
		is(t, "the same again", w.read(a, "r3", 3), 500, false, false, 4)
		w.push("r3", 1)
		is(t, "and one more", w.read(a, "r3", 3), 501, false, false, 4, 501)
		is(t, "that one", w.read(a, "r3", 4), 501, false, false, 501)
		if got := w.logs.Calls(storetest.CallRead); got != 1 {
			t.Errorf("%d calls of ReadLog", got)
		}
	})
}

// Somebody who was away for long gets all of it, page by page.
func TestPagesJoin(t *testing.T) {
	for name, bytes := range map[string]int{"many": 10, "large": 100 << 10, "huge": 300 << 10} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 2, func(t *testing.T, w *world) {
				a, n := &asking{}, 700
				if bytes > 1000 {
					n = 30
				}
				for range n {
					w.push("r", 1, bytes)
					w.push("s", 1)
				}
				at, entries := uint64(0), 0
				for {
					p := w.read(a, "r", at)
					if p == nil || p.Error != "" || p.Gap {
						t.Fatalf("%+v", p)
					}
					size := 0
					for i := range p.Entries {
						if p.Entries[i].Place.Seq <= at || p.Entries[i].Message.Room != "r" {
							t.Fatalf("behind %d: %+v", at, p.Entries[i].Place)
						}
						at = p.Entries[i].Place.Seq
						size += len(p.Entries[i].Message.Payload)
					}
					if len(p.Entries) > pageMost || len(p.Entries) > 1 && size > pageBytes {
						t.Errorf("a page of %d, %d bytes", len(p.Entries), size)
					}
					entries += len(p.Entries)
					at = p.Seq
					if !p.More {
						break
					}
				}
				if entries != n {
					t.Errorf("%d of %d came", entries, n)
				}
			})
		})
	}
}

func TestWhatIsNotKeptAnyMoreIsAGap(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		w.logs.Limit(5, 0)
		w.push("r", 20)
		w.close()
		w.open(Config{})
		time.Sleep(time.Second)
		a := &asking{}
		is(t, "from the beginning", w.read(a, "r", 0), 20, false, true, 16, 17, 18, 19, 20)
		is(t, "from the beginning, again", w.read(a, "r", 0), 20, false, true, 16, 17, 18, 19, 20)
		is(t, "from where it begins", w.read(a, "r", 15), 20, false, false, 16, 17, 18, 19, 20)
		is(t, "from within", w.read(a, "r", 18), 20, false, false, 19, 20)
		is(t, "from beyond the end", w.read(a, "r", 21), 20, false, true)
		if got := w.logs.Calls(storetest.CallRead); got != 2 {
			t.Errorf("%d calls of ReadLog", got)
		}
	})
}

func TestPartitionThatANodeDoesNotNameHasNothingForIt(t *testing.T) {
	bubble(t, 4, func(t *testing.T, w *world) {
		w.push("r", 3)
		a := &asking{}
		w.service.Read(a, link.LogRead{Room: "r", Gate: 1, Epoch: w.epoch()})
		synctest.Wait()
		if w.logs.Partition("r") > 0 { // else an empty list is no shorter
			w.service.Read(a, link.LogRead{Room: "r", Gate: 2, Epoch: w.epoch(), After: []uint64{0}})
			synctest.Wait()
			is(t, "a list that is too short", a.page(2), 3, false, false)
		}
		is(t, "an empty list", a.page(1), 3, false, false)
	})
}

// What comes while the log is read for a tail is in the tail, once.
func TestMessagesThatComeWhileTheLogIsRead(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		a := &asking{}
		w.push("r", 3)
		time.Sleep(time.Second)
		var during func()
		w.logs.Before(func(_ context.Context, call, _ string) error {
			if call == storetest.CallRead && during != nil {
				f := during
				during = nil
				f()
				time.Sleep(time.Millisecond)
			}
			return nil
		})
		during = func() { w.push("r", 2) }
		gate := w.ask(a, "r", 1)
		time.Sleep(time.Second)
		p := a.page(gate)
		if p == nil || p.Error != "" || len(p.Entries) < 2 || p.Entries[0].Place.Seq != 2 {
			t.Fatalf("%+v", p)
		}
		is(t, "afterwards", w.read(a, "r", 1), 5, false, false, 2, 3, 4, 5)
		w.push("r", 1)
		is(t, "and on", w.read(a, "r", 2), 6, false, false, 3, 4, 5, 6)
		if got := w.logs.Calls(storetest.CallRead); got != 1 {
			t.Errorf("%d calls of ReadLog", got)
		}
		// ReadLog is ahead of the follower.
		var reading bool
		w.logs.Before(func(_ context.Context, call, _ string) error {
			if call == storetest.CallTell && reading {
				time.Sleep(100 * time.Millisecond)
			}
			if call == storetest.CallRead {
				reading = true
				w.push("s", 2)
				time.Sleep(10 * time.Millisecond)
			}
			return nil
		})
		w.push("s", 1)
		gate = w.ask(a, "s", 6)
		time.Sleep(time.Second)
		is(t, "ahead", a.page(gate), 9, false, false, 7, 8, 9)
		time.Sleep(time.Second)
		is(t, "ahead, afterwards", w.read(a, "s", 6), 9, false, false, 7, 8, 9)
	})
}

// slowHeads are logs of which something happens between an answer of Heads and its arrival.
type slowHeads struct {
	*storetest.Logs
	then atomic.Pointer[func()]
}

func (l *slowHeads) Heads(ctx context.Context) (epoch uint64, heads []uint64, err error) {
	epoch, heads, err = l.Logs.Heads(ctx)
	if then := l.then.Swap(nil); then != nil {
		(*then)()
	}
	return epoch, heads, err
}

// TestAPageThatEndsWhereAReadBeginsIsNotItsAnswer has a node at the end of the log share a call of ReadLog with one that is as far
// behind as a page is long, while one more message comes. A page with more, and with nothing in it, breaks a node's stream.
func TestAPageThatEndsWhereAReadBeginsIsNotItsAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		logs := &slowHeads{Logs: storetest.NewLogs(1)}
		w := &world{t: t, logs: logs.Logs}
		service, err := New(Config{Logs: logs})
		if err != nil {
			t.Fatal(err)
		}
		w.service = service
		defer w.close()
		end := w.push("r", tailMost)
		time.Sleep(time.Second)
		one := func() {
			w.push("r", 1)
			time.Sleep(time.Second) // the follower has it
		}
		logs.then.Store(&one)
		far, near := &asking{}, &asking{}
		first, second := w.ask(far, "r", 0), w.ask(near, "r", end)
		time.Sleep(2 * time.Second)
		is(t, "near", near.page(second), end+1, false, false, end+1)
		if p := far.page(first); p == nil || len(p.Entries) != pageMost || !p.More || p.Seq != pageMost {
			t.Errorf("far: %+v", p)
		}
	})
}

func TestTailsThatWereNotReadForLongestGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, Config{TailBytes: 1 << 20})
		defer w.close()
		synctest.Wait()
		a := &asking{}
		for i := range 20 {
			w.push(fmt.Sprint("r", i), 100, 1000)
		}
		for i := range 20 {
			w.read(a, fmt.Sprint("r", i), 0)
			w.read(a, "r0", 0)
			if bytes := w.service.gen.tails.bytes; bytes > 1<<20 {
				t.Fatalf("%d bytes after %d", bytes, i)
			}
		}
		calls := w.logs.Calls(storetest.CallRead)
		w.read(a, "r0", 0)
		w.read(a, "r19", 0)
		if got := w.logs.Calls(storetest.CallRead) - calls; got != 0 {
			t.Errorf("%d calls for rooms that were read lately", got)
		}
		if p := w.read(a, "r3", 0); len(p.Entries) != 100 || w.logs.Calls(storetest.CallRead)-calls != 1 {
			t.Errorf("%d calls for one that was not", w.logs.Calls(storetest.CallRead)-calls)
		}
		// Those that are kept grow with what comes, and stay within the bound.
		for range 500 {
			w.push("r0", 1, 5000)
			w.push("r19", 1, 5000)
		}
		synctest.Wait()
		sum := 0
		for _, l := range w.service.gen.tails.byRoom {
			if len(l.entries) > tailMost || l.bytes > tailBytes {
				t.Errorf("%s: %d messages, %d bytes", l.room, len(l.entries), l.bytes)
			}
			sum += l.bytes + l.dropped + roomBytes
		}
		if bytes := w.service.gen.tails.bytes; bytes != sum || bytes > 1<<20 {
			t.Errorf("%d bytes are counted, there are %d", bytes, sum)
		}
	})
}

func TestAStoreThatDoesNotAnswerIsAnErrorWithinTwoSeconds(t *testing.T) {
	for name, test := range map[string]struct {
		call string
		what func(ctx context.Context) error
	}{
		"Heads fails":        {storetest.CallHeads, func(context.Context) error { return errors.New("down") }},
		"Heads panics":       {storetest.CallHeads, func(context.Context) error { panic("in the store") }},
		"Heads hangs":        {storetest.CallHeads, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
		"the follower hangs": {storetest.CallTell, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
		"ReadLog fails":      {storetest.CallRead, func(context.Context) error { return errors.New("down") }},
		"ReadLog panics":     {storetest.CallRead, func(context.Context) error { panic("in the store") }},
		"ReadLog hangs":      {storetest.CallRead, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 1, func(t *testing.T, w *world) {
				a, epoch := &asking{}, w.epoch()
				w.gate = 1000
				w.push("r", 3)
				synctest.Wait()
				w.logs.Before(func(ctx context.Context, call, _ string) error {
					if call == test.call {
						return test.what(ctx)
					}
					return nil
				})
				if test.call == storetest.CallTell {
					w.push("r", 1)
				}
				begun := time.Now()
				for i := range 100 {
					w.service.Read(a, link.LogRead{Room: "r", Gate: uint64(i + 1), Epoch: epoch, After: []uint64{1}})
				}
				time.Sleep(readTimeout + markEvery + 2*markPause)
				for i := range 100 {
					if p := a.page(uint64(i + 1)); p == nil || p.Error == "" {
						t.Fatalf("after %v: %+v", time.Since(begun), p)
					}
				}
				if n := w.service.open.Len(); n != 0 {
					t.Errorf("%d are open", n)
				}
				w.logs.Before(nil)
				time.Sleep(3 * headsEvery) // a follower that hangs is found, and called anew
				if p := w.read(a, "r", 1); p == nil || p.Error != "" || len(p.Entries) < 2 {
					t.Errorf("afterwards: %+v", p)
				}
			})
		})
	}
}

// A store that is away at the start is found later.
func TestTheStoreMayBeAwayAtTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, logs: storetest.NewLogs(2), metrics: metrics.NewSet()}
		w.push("r", 3)
		w.logs.Before(func(context.Context, string, string) error { return errors.New("down") })
		w.open(Config{})
		defer w.close()
		a := &asking{}
		w.service.Follow(a, 0, nil)
		time.Sleep(time.Minute)
		if got := w.logs.Calls(storetest.CallHeads); got > 100 || got < 5 || len(a.told()) > 0 {
			t.Errorf("%d calls in a minute", got)
		}
		w.logs.Before(nil)
		time.Sleep(2 * lastPause)
		if got := texts(a.told()); len(got) < 2 || !strings.HasPrefix(got[0], "0: ") || !strings.HasPrefix(got[1], "1: ") {
			t.Errorf("told %q", got)
		}
	})
}

func TestReadsAreBoundedAndEndWithTheirStream(t *testing.T) {
	bubble(t, 1, func(t *testing.T, w *world) {
		w.push("r", 1)
		epoch := w.epoch()
		held := make(chan struct{})
		w.logs.Before(func(_ context.Context, call, _ string) error {
			if call == storetest.CallHeads {
				<-held
			}
			return nil
		})
		a, b := &asking{}, &asking{}
		for i := range maxReads {
			w.service.Read(a, link.LogRead{Room: "r", Gate: uint64(i + 1), Epoch: epoch, After: []uint64{0}})
		}
		w.service.Read(b, link.LogRead{Room: "r", Gate: 1, Epoch: epoch, After: []uint64{0}})
		if p := b.page(1); p == nil || p.Error != errBusy.Error() {
			t.Errorf("one too many: %+v", p)
		}
		w.service.Read(a, link.LogRead{Room: "r", Gate: 1, Epoch: epoch, After: []uint64{0}}) // twice
		w.service.Gone(a)
		w.service.Read(b, link.LogRead{Room: "r", Gate: 2, Epoch: epoch, After: []uint64{0}})
		close(held)
		synctest.Wait()
		is(t, "after the other has gone", b.page(2), 1, false, false, 1)
		if len(a.pages) > 0 || w.service.open.Len() > 0 || w.count("room_log_violations_total") != "1" {
			t.Errorf("%d pages, %d open, %s violations", len(a.pages), w.service.open.Len(), w.count("room_log_violations_total"))
		}
	})
}

func TestCloseAnswersWhoWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, Config{})
		w.push("r", 1)
		epoch := w.epoch()
		synctest.Wait()
		w.logs.Before(func(ctx context.Context, call, _ string) error {
			if call == storetest.CallRead {
				<-ctx.Done()
			}
			return nil
		})
		a := &asking{}
		w.service.Read(a, link.LogRead{Room: "r", Gate: 1, Epoch: epoch, After: []uint64{0}})
		synctest.Wait()
		w.close()
		if p := a.page(1); p == nil || p.Error != errClosed.Error() {
			t.Errorf("%+v", p)
		}
		w.service.Read(a, link.LogRead{Room: "r", Gate: 2, Epoch: epoch, After: []uint64{0}})
		w.service.Follow(a, epoch, nil)
		w.service.Gone(a)
		if p := a.page(2); p == nil || p.Error != errClosed.Error() {
			t.Errorf("after it: %+v", p)
		}
	})
}

// lagging are logs whose ReadLog lacks what came last.
type lagging struct{ *storetest.Logs }

func (l lagging) ReadLog(ctx context.Context, room string, after uint64, most, bytes int) (store.LogPage, error) {
	p, err := l.Logs.ReadLog(ctx, room, after, most, bytes)
	if n := len(p.Entries); n > 0 {
		p.Entries = p.Entries[:n-1]
		p.Last = after
	}
	return p, err
}

// broken are logs whose pages cannot be.
type broken struct {
	*storetest.Logs
	page store.LogPage
}

func (l broken) ReadLog(context.Context, string, uint64, int, int) (store.LogPage, error) {
	return l.page, nil
}

func TestPagesOfTheStoreAreNotBelieved(t *testing.T) {
	for name, logs := range map[string]store.Logs{
		"a replica that lags":              lagging{storetest.NewLogs(1)},
		"no message":                       broken{storetest.NewLogs(1), store.LogPage{Entries: make([]store.LogEntry, 1)}},
		"nothing, and more":                broken{storetest.NewLogs(1), store.LogPage{More: true}},
		"a message of another epoch":       broken{storetest.NewLogs(1), store.LogPage{Entries: []store.LogEntry{{Message: &engine.Stored{}, Place: engine.Place{Seq: 5}}}}},
		"what was not asked for (another)": broken{storetest.NewLogs(1), store.LogPage{Entries: []store.LogEntry{{Message: &engine.Stored{}, Place: engine.Place{Epoch: 1<<32 + 1}}}}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, err := New(Config{Logs: logs})
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close(context.Background())
				logs.AppendLog(context.Background(), []store.LogEntry{{Message: &engine.Stored{Room: "r"}, Expires: time.Now().Add(time.Hour)}})
				synctest.Wait()
				a := &asking{}
				s.Read(a, link.LogRead{Room: "r", Gate: 1, Epoch: 1<<32 + 1, After: []uint64{0}})
				synctest.Wait()
				if p := a.page(1); p == nil || p.Error == "" {
					t.Errorf("%+v", p)
				}
			})
		})
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{{}, {Logs: storetest.NewLogs(1), TailBytes: 1}} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v works", c)
		}
	}
	if err := (Config{Logs: storetest.NewLogs(1)}).Validate(); err != nil || Defaults().TailBytes != 32<<20 {
		t.Error(err)
	}
}
