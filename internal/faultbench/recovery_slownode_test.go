package faultbench

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"
)

// lap is what was measured of one stretch of time with the same load.
type lap struct {
	others      tally
	p50, p99    time.Duration // of the pushes to the others, while the machine let us run
	left        int           // pushes left out of these, because it did not
	heap, queue float64       // most bytes in use, and in queues
}

// lapOf drives the load for a while and measures.
func (m *manager) lapOf(d time.Duration, others func(*push) bool) lap {
	m.b.t.Helper()
	var x lap
	since := m.b.ledger.now()
	for end := time.Now().Add(d); time.Now().Before(end); wait(100 * time.Millisecond) {
		values, err := m.read()
		if err != nil {
			m.b.t.Fatal(err)
		}
		x.heap = max(x.heap, values["go_memstats_heap_inuse_bytes"])
		x.queue = max(x.queue, values["push_manager_link_queue_bytes"])
	}
	until := m.b.ledger.now()
	x.others = m.b.ledger.tally(since, until, others)
	took, left := m.b.ledger.latencies(since, until, others)
	x.left = left
	if len(took) > 0 {
		x.p50, x.p99 = took[len(took)/2], took[len(took)*99/100]
	}
	return x
}

func (x lap) String() string {
	return fmt.Sprintf("to the others %d pushes, %d a success, p50 %v, p99 %v (%d left out: the machine did not let us run); heap at most %.1f MiB, queues %.0f KiB",
		x.others.pushes, x.others.success, x.p50.Round(10*time.Microsecond), x.p99.Round(10*time.Microsecond), x.left, x.heap/(1<<20), x.queue/(1<<10))
}

// latencies are how long the answered pushes took, in order, and how many are not among
// them because the machine let nobody run meanwhile.
func (l *ledger) latencies(from, to time.Duration, pick func(*push) bool) (took []time.Duration, left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.pushes {
		if !p.done || p.start < from || p.start > to || !pick(p) {
			continue
		}
		if l.nearFreezeLocked(p, late) {
			left++
			continue
		}
		took = append(took, p.took())
	}
	slices.Sort(took)
	return took, left
}

// N5 and N18 at length: one of ten nodes reads nothing for a minute. Its streams are
// closed and opened again all the while, and what is written to them is lost.
func TestOneOfTenNodesReadsNothingForAMinute(t *testing.T) {
	lasts := 2 * time.Second
	long := os.Getenv(slowEnv) != ""
	if long {
		lasts = time.Minute
	}
	s := newStreet(t)
	const (
		queue  = 256 << 10
		window = 1 << 20
		large  = 8 << 10 // of a payload for the bad node
	)
	bad := s.wire("bad", s.bad...)
	var users []string
	for i := range 9 {
		mine := names(fmt.Sprintf("n%d-u", i), 10)
		s.wire(fmt.Sprint("n", i), mine...)
		s.world.join(fmt.Sprint("room ", i), mine...)
		users = append(users, mine...)
	}
	m := s.manage(10, prompt(fmt.Sprint("LINK_QUEUE_BYTES=", queue), fmt.Sprint("LINK_WINDOW_BYTES=", window),
		"GOGC=100")...) // else garbage may gather until there are 160 MiB, and hides what is held
	m.good(room("bad room"))
	m.good(room("room 0"))
	m.rest()
	s.watch(late)
	loads := []*load{
		m.callers(12, steady(func(r *rand.Rand) request { return some(r, users, fmt.Sprint("room ", r.IntN(9))) })),
		m.callers(12, steady(func(r *rand.Rand) request { q := s.someBad(r); q.size = large; return q })),
	}
	for _, l := range loads {
		l.more(volume)
	}
	others := func(p *push) bool { return !forBad(p) }
	before := m.lapOf(lasts, others)
	t.Logf("before: %v", before)

	s.ledger.note("node bad reads no more")
	since := s.ledger.now()
	bad.pause()
	during := m.lapOf(lasts, others)
	t.Logf("during: %v", during)
	loads[0].more(volume / 5)
	for _, l := range loads {
		l.end()
	}
	s.tallyBad(since)
	t.Logf("p99 %.2f times that of before", float64(during.p99)/float64(before.p99))
	all, least := during.others, 999
	if !long { // a node of ours that does not run for a second is much of two: do they get on at all?
		all, least = s.ledger.tally(since, s.ledger.now(), others), 500
	}
	if all.pushes == 0 || all.success*1000 < all.pushes*least {
		t.Errorf("the others suffered: %v", all)
	}
	if long && float64(during.p99) > 1.5*float64(before.p99) {
		t.Errorf("the others' p99 is %v, and was %v", during.p99, before.p99)
	}
	if during.queue > 2*queue {
		t.Errorf("%v bytes were queued, the limit is %d for each of two shards", during.queue, queue)
	}
	// What queue and window of two links may hold, twice since frames are encoded copies,
	// and as much again until it is collected.
	if most := before.heap + 2*2*2*(queue+window) + heapSlack; during.heap > most {
		t.Errorf("the heap was %v bytes, and may be %v", during.heap, most)
	}
	bad.resume()
	m.good(room("bad room"))
	m.atRest()
}

// heapSlack is what the peak of a small heap may differ by from one time to the next.
const heapSlack = 8 << 20
