package pressure

import (
	"math"
	"runtime/metrics"
	"time"
)

// What is read of the runtime, in this order.
const (
	limit = iota
	live
	total
	released
	objects
	free
	unused
	cycles
	latencies
	readings
)

// reader reads the runtime.
type reader struct {
	samples []metrics.Sample
	counts  []uint64 // of latencies, when it was read last
	cycle   uint64   // of the collector, at the last reading
	since   int      // readings without another
}

func newReader() *reader {
	r := &reader{samples: make([]metrics.Sample, readings)}
	for i, name := range [readings]string{
		limit:    "/gc/gomemlimit:bytes",
		live:     "/gc/heap/live:bytes",
		total:    "/memory/classes/total:bytes",
		released: "/memory/classes/heap/released:bytes",
		objects:  "/memory/classes/heap/objects:bytes",
		free:     "/memory/classes/heap/free:bytes",
		unused:   "/memory/classes/heap/unused:bytes",
		cycles:   "/gc/cycles/total:gc-cycles",
		// Of all goroutines: how long they were ready to run and did not.
		latencies: "/sched/latencies:seconds",
	} {
		r.samples[i].Name = name
	}
	r.read() // what was before does not count
	return r
}

func (r *reader) read() reading {
	metrics.Read(r.samples)
	if c := r.samples[cycles].Value.Uint64(); c != r.cycle {
		r.cycle, r.since = c, 0
	} else {
		r.since++
	}
	return reading{memory: r.memory(), wait: r.wait()}
}

// memory is what is in use, of the limit.
func (r *reader) memory() float64 {
	n := func(i int) uint64 { return r.samples[i].Value.Uint64() }
	if n(limit) == 0 || n(limit) >= math.MaxInt64 {
		return 0
	}
	// The figures are not of one moment, so the difference may be negative.
	other := int64(n(total)) - int64(n(released)+n(objects)+n(free)+n(unused))
	return float64(int64(n(live))+max(other, 0)) / float64(n(limit))
}

// wait is the median of the latencies since the last reading.
func (r *reader) wait() time.Duration {
	h := r.samples[latencies].Value.Float64Histogram()
	since := make([]uint64, len(h.Counts))
	var all uint64
	for i, n := range h.Counts {
		since[i] = n
		if r.counts != nil {
			since[i] -= r.counts[i]
		}
		all += since[i]
	}
	r.counts = append(r.counts[:0], h.Counts...) // the runtime uses h again
	return median(since, all, h.Buckets)
}

// median is the lower bound of the bucket with the median, 0 of nothing.
func median(counts []uint64, all uint64, buckets []float64) time.Duration {
	var below uint64
	for i, n := range counts {
		if below += n; 2*below > all {
			return time.Duration(max(buckets[i], 0) * float64(time.Second)) // the first begins at -Inf
		}
	}
	return 0
}
