package e2e

import (
	"encoding/json"
	"math/bits"
	"time"
)

// subBits is the precision of a Histogram: 64 steps for each power of two, 1.6 %.
const subBits = 6

// histogramSize covers latencies up to 2^37 ns, more than two minutes.
const histogramSize = (37 - subBits + 1) << subBits

// Histogram counts latencies. Its zero value is empty.
type Histogram struct {
	counts []uint32
	total  uint64
}

// Add counts one latency.
func (h *Histogram) Add(d time.Duration) {
	if h.counts == nil {
		h.counts = make([]uint32, histogramSize)
	}
	h.counts[step(max(d, 0))]++
	h.total++
}

// Merge adds what other has counted.
func (h *Histogram) Merge(other *Histogram) {
	if other == nil || other.total == 0 {
		return
	}
	if h.counts == nil {
		h.counts = make([]uint32, histogramSize)
	}
	for i, n := range other.counts {
		h.counts[i] += n
	}
	h.total += other.total
}

// Count is how many latencies it has.
func (h *Histogram) Count() uint64 { return h.total }

// Quantile is the latency that a share q of all does not exceed, 0 without any.
func (h *Histogram) Quantile(q float64) time.Duration {
	if h == nil || h.total == 0 {
		return 0
	}
	rank := uint64(q * float64(h.total))
	var seen uint64
	for i, n := range h.counts {
		seen += uint64(n)
		if seen > rank || seen == h.total {
			return value(i)
		}
	}
	return 0
}

// step is where a latency is counted: exactly below 64 ns, then 64 steps per power
// of two.
func step(d time.Duration) int {
	v := uint64(d)
	shift := bits.Len64(v) - subBits - 1
	if shift <= 0 {
		return int(v)
	}
	return min(shift<<subBits+int(v>>shift), histogramSize-1)
}

// value is the middle of a step.
func value(i int) time.Duration {
	shift := i>>subBits - 1
	if shift <= 0 {
		return time.Duration(i)
	}
	low := uint64(i-shift<<subBits) << shift
	return time.Duration(low + 1<<shift/2)
}

// MarshalJSON writes pairs of step and count.
func (h *Histogram) MarshalJSON() ([]byte, error) {
	pairs := [][2]uint32{}
	for i, n := range h.counts {
		if n > 0 {
			pairs = append(pairs, [2]uint32{uint32(i), n})
		}
	}
	return json.Marshal(pairs)
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (h *Histogram) UnmarshalJSON(b []byte) error {
	var pairs [][2]uint32
	if err := json.Unmarshal(b, &pairs); err != nil {
		return err
	}
	*h = Histogram{}
	if len(pairs) == 0 {
		return nil
	}
	h.counts = make([]uint32, histogramSize)
	for _, p := range pairs {
		if p[0] < histogramSize {
			h.counts[p[0]] += p[1]
			h.total += uint64(p[1])
		}
	}
	return nil
}
