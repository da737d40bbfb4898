package load

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"google.golang.org/grpc/codes"
)

// Bounds of the histograms, in nanoseconds: half a microsecond to two hours, three digits.
const (
	lowest  = 1000
	highest = int64(2 * time.Hour)
	digits  = 3
)

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(lowest, highest, digits) }

func note(h *hdrhistogram.Histogram, ns int64) {
	// In bounds, there is no error.
	_ = h.RecordValue(min(max(ns, 0), highest))
}

// window is the measured part of a run.
type window struct {
	begin moment
	end   atomic.Int64
}

func (w *window) has(m moment) bool { return m >= w.begin && m < w.end.Load() }

// ended is a push of which nothing more is to be expected.
type ended struct {
	kind    Kind
	outcome Outcome
	code    codes.Code
	held    bool // it was sent late because all places were taken
	due     moment
	sent    moment // 0: never
	done    moment
	targets Targets
}

// tally is what is counted for a kind.
type tally struct {
	pushes   int64
	outcomes [outcomes]int64
	codes    map[codes.Code]int64
	targets  Targets
	latency  *hdrhistogram.Histogram
}

func (t *tally) add(e *ended) {
	t.pushes++
	t.outcomes[e.outcome]++
	t.targets.add(&e.targets)
	if e.code != codes.OK {
		if t.codes == nil {
			t.codes = map[codes.Code]int64{}
		}
		t.codes[e.code]++
	}
	if e.outcome == Refused {
		return // how fast a server says no is not how fast it pushes
	}
	if t.latency == nil {
		t.latency = newHistogram()
	}
	note(t.latency, e.done-e.due)
}

func (t *tally) merge(o *tally) {
	t.pushes += o.pushes
	for i, n := range o.outcomes {
		t.outcomes[i] += n
	}
	t.targets.add(&o.targets)
	for code, n := range o.codes {
		if t.codes == nil {
			t.codes = map[codes.Code]int64{}
		}
		t.codes[code] += n
	}
	if o.latency != nil {
		if t.latency == nil {
			t.latency = newHistogram()
		}
		t.latency.Merge(o.latency)
	}
}

// span is what is counted between two looks at a recorder, measured or not.
type span struct {
	answered int64
	errors   int64
	latency  *hdrhistogram.Histogram
}

func (s *span) reset() {
	s.answered, s.errors = 0, 0
	s.latency.Reset()
}

func (s *span) merge(o *span) {
	s.answered += o.answered
	s.errors += o.errors
	s.latency.Merge(o.latency)
}

// recorder counts the pushes of a lane, or of some of the callers of one.
type recorder struct {
	window *window // static

	mu       sync.Mutex // guards the following
	kinds    [kinds]tally
	answered int64 // within the window, whenever they were due
	lag      *hdrhistogram.Histogram
	held     *hdrhistogram.Histogram // lag of what was held
	now      *span
	spare    *span
}

func newRecorder(w *window) *recorder {
	return &recorder{
		window: w, lag: newHistogram(), held: newHistogram(),
		now: &span{latency: newHistogram()}, spare: &span{latency: newHistogram()},
	}
}

func (r *recorder) record(e *ended) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.outcome.Bad() {
		r.now.errors++
	}
	if e.outcome != Refused {
		note(r.now.latency, e.done-e.due)
	}
	if e.code == codes.OK {
		r.now.answered++
		if r.window.has(e.done) {
			r.answered++
		}
	}
	if !r.window.has(e.due) {
		return
	}
	r.kinds[e.kind].add(e)
	switch {
	case e.sent == 0:
	case e.held:
		note(r.held, e.sent-e.due)
	default:
		note(r.lag, e.sent-e.due)
	}
}

// roll adds what was counted since the last roll to a span.
func (r *recorder) roll(into *span) {
	r.mu.Lock()
	s := r.now
	r.now = r.spare
	r.mu.Unlock()
	into.merge(s)
	s.reset()
	r.mu.Lock()
	r.spare = s
	r.mu.Unlock()
}
