package load

import (
	"math"
	"runtime/metrics"
	"time"

	"google.golang.org/grpc/codes"
)

// watch looks after a run about ten times a second. One goroutine has it until the
// run is over, then whoever makes the result.
type watch struct {
	run *run

	measuring bool // the window has begun
	measured  bool // and ended
	interval  span
	progress  span
	from      moment // of the interval
	told      moment // when progress was
	errors    int64
	timeline  []Interval
	most      int // in flight

	cpuBegin, cpuEnd     time.Duration
	wallBegin, wallEnd   moment
	schedBegin, schedEnd []uint64
	schedBuckets         []float64
}

func (w *watch) loop(done <-chan struct{}) {
	w.interval.latency, w.progress.latency = newHistogram(), newHistogram()
	ticker := time.NewTicker(housekeeping)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			w.look()
		case <-done:
			w.roll()
			w.endWindow()
			w.endInterval(w.run.clock.now())
			return
		}
	}
}

func (w *watch) look() {
	r := w.run
	now := r.clock.now()
	for _, l := range r.lanes {
		l.end(l.table.expire(now-int64(r.cfg.Timeout)), codes.DeadlineExceeded)
	}
	w.most = max(w.most, r.inFlight())
	w.roll()
	if !w.measuring && now >= r.window.begin {
		w.measuring = true
		w.interval.reset()
		w.from = now
		w.cpuBegin, w.wallBegin = cpuTime(), now
		w.schedBegin, w.schedBuckets = schedLatencies()
	}
	over := now >= r.window.end.Load() && w.measuring && !w.measured
	if over {
		w.endWindow()
	}
	// The ticks are not quite even: half of one is not worth another interval.
	if over || now-w.from >= int64(intervalOf(r.cfg.Duration)-housekeeping/2) {
		w.endInterval(now)
	}
	if now-w.told >= int64(progressEvery) {
		w.tell(now)
	}
}

func (w *watch) roll() {
	var s = span{latency: newHistogram()}
	for _, rec := range w.run.recorders {
		rec.roll(&s)
	}
	w.interval.merge(&s)
	w.progress.merge(&s)
	w.errors += s.errors
}

func (w *watch) endWindow() {
	if w.measuring && !w.measured {
		w.measured = true
		w.cpuEnd, w.wallEnd = cpuTime(), w.run.clock.now()
		w.schedEnd, _ = schedLatencies()
	}
}

// intervalOf is the length of an interval: about a hundred in a run.
func intervalOf(d time.Duration) time.Duration {
	return max((d / 100).Round(housekeeping), housekeeping)
}

func (w *watch) endInterval(now moment) {
	if !w.measuring {
		w.interval.reset()
		return
	}
	if now == w.from {
		return
	}
	h := w.interval.latency
	w.timeline = append(w.timeline, Interval{
		At: time.Duration(w.from - w.run.window.begin), Length: time.Duration(now - w.from),
		Answered: w.interval.answered, Errors: w.interval.errors, Pushes: h.TotalCount(), InFlight: w.run.inFlight(),
		P50: time.Duration(h.ValueAtQuantile(50)), P99: time.Duration(h.ValueAtQuantile(99)), Max: time.Duration(h.Max()),
	})
	w.interval.reset()
	w.from = now
}

func (w *watch) tell(now moment) {
	r, h := w.run, w.progress.latency
	if r.cfg.OnProgress != nil {
		r.cfg.OnProgress(Progress{
			Elapsed: time.Duration(now), Warmup: !w.measuring, Draining: now >= r.window.end.Load(),
			Rate:     float64(w.progress.answered) / time.Duration(now-w.told).Seconds(),
			InFlight: r.inFlight(), Errors: w.errors, Pushes: h.TotalCount(),
			P50: time.Duration(h.ValueAtQuantile(50)), P99: time.Duration(h.ValueAtQuantile(99)),
		})
	}
	w.progress.reset()
	w.told = now
}

// schedLatencies is how long goroutines have waited for a core since the start of the
// program, as counts of a histogram and the bounds of its buckets.
func schedLatencies() ([]uint64, []float64) {
	sample := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	metrics.Read(sample)
	if sample[0].Value.Kind() != metrics.KindFloat64Histogram {
		return nil, nil
	}
	h := sample[0].Value.Float64Histogram()
	return h.Counts, h.Buckets
}

// schedP99 is the 99th percentile of the waits for a core within the window.
func (w *watch) schedP99() time.Duration {
	var total, seen uint64
	for i, n := range w.schedEnd {
		total += n - w.schedBegin[i]
	}
	for i, n := range w.schedEnd {
		seen += n - w.schedBegin[i]
		if total > 0 && seen*100 >= total*99 {
			if high := w.schedBuckets[i+1]; !math.IsInf(high, 0) {
				return time.Duration(high * 1e9)
			}
			return time.Duration(w.schedBuckets[i] * 1e9)
		}
	}
	return 0
}
