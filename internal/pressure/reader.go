package pressure

import (
	"math"
	"runtime/metrics"
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
	readings
)

// reader reads the runtime.
type reader struct {
	samples []metrics.Sample
	cycle   uint64 // of the collector, at the last reading
	since   int    // readings without another
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
	} {
		r.samples[i].Name = name
	}
	r.read() // what was before does not count
	return r
}

// read returns what is in use, of the limit, 0 without one.
func (r *reader) read() float64 {
	metrics.Read(r.samples)
	if c := r.samples[cycles].Value.Uint64(); c != r.cycle {
		r.cycle, r.since = c, 0
	} else {
		r.since++
	}
	n := func(i int) uint64 { return r.samples[i].Value.Uint64() }
	if n(limit) == 0 || n(limit) >= math.MaxInt64 {
		return 0
	}
	// The figures are not of one moment, so the difference may be negative.
	other := int64(n(total)) - int64(n(released)+n(objects)+n(free)+n(unused))
	return float64(int64(n(live))+max(other, 0)) / float64(n(limit))
}
