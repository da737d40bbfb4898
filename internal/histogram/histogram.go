// Package histogram has histograms of Prometheus that the program itself can read, too.
package histogram

import (
	"sort"
	"sync/atomic"

	"github.com/VictoriaMetrics/metrics"
)

// Histogram counts values by buckets, twice: what the library counts for Prometheus cannot be read back. It is safe for
// concurrent use.
type Histogram struct {
	// Static after New.
	shown  *metrics.PrometheusHistogram
	bounds []float64

	counts []atomic.Uint64 // by bucket; the last one is of what is above all bounds
}

// New makes a Histogram that set shows by name. bounds are the upper ones of the buckets, in rising order, and are kept.
func New(set *metrics.Set, name string, bounds []float64) *Histogram {
	return &Histogram{shown: set.GetOrCreatePrometheusHistogramExt(name, bounds), bounds: bounds, counts: make([]atomic.Uint64, len(bounds)+1)}
}

// Update counts a value.
func (h *Histogram) Update(v float64) {
	h.shown.Update(v)
	h.counts[sort.SearchFloat64s(h.bounds, v)].Add(1)
}

// Bounds are those of New.
func (h *Histogram) Bounds() []float64 { return h.bounds }

// Append appends the counts of the buckets to dst, one more than there are bounds. They only rise.
func (h *Histogram) Append(dst []uint64) []uint64 {
	for i := range h.counts {
		dst = append(dst, h.counts[i].Load())
	}
	return dst
}

// Quantile is about the value that the share q (0 to 1) of all values does not exceed, by counts as Append gives them,
// less those of before, which may be shorter. Within a bucket values are taken to be spread evenly; what is above all
// bounds counts as the last one. ok is false where nothing was counted.
func Quantile(bounds []float64, counts, before []uint64, q float64) (value float64, ok bool) {
	since := func(i int) float64 {
		if i < len(before) && before[i] <= counts[i] {
			return float64(counts[i] - before[i])
		}
		return float64(counts[i])
	}
	total := 0.0
	for i := range counts {
		total += since(i)
	}
	if total == 0 {
		return 0, false
	}
	rest, lower := q*total, 0.0
	for i, upper := range bounds {
		n := since(i)
		if rest > n || n == 0 {
			rest -= n
			lower = upper
			continue
		}
		return lower + (upper-lower)*rest/n, true
	}
	return bounds[len(bounds)-1], true
}
