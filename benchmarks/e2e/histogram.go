package e2e

import (
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// longest is the largest latency that counts as what it is.
const longest = 2 * time.Minute

// Histogram counts latencies, to a hundredth. Its zero value is empty.
type Histogram struct{ hdr *hdrhistogram.Histogram }

func (h *Histogram) filled() *hdrhistogram.Histogram {
	if h.hdr == nil {
		h.hdr = hdrhistogram.New(1, int64(longest), 2)
	}
	return h.hdr
}

// Add counts one latency.
func (h *Histogram) Add(d time.Duration) {
	_ = h.filled().RecordValue(int64(min(max(d, 0), longest))) // in bounds
}

// Merge adds what other has counted.
func (h *Histogram) Merge(other *Histogram) {
	if other.Count() > 0 {
		h.filled().Merge(other.hdr)
	}
}

// Count is how many latencies it has.
func (h *Histogram) Count() int64 {
	if h == nil || h.hdr == nil {
		return 0
	}
	return h.hdr.TotalCount()
}

// Quantile is the latency that a share q of all does not exceed, 0 without any.
func (h *Histogram) Quantile(q float64) time.Duration {
	if h.Count() == 0 {
		return 0
	}
	return time.Duration(h.hdr.ValueAtQuantile(100 * q))
}

// MarshalText implements encoding.TextMarshaler.
func (h *Histogram) MarshalText() ([]byte, error) {
	return h.filled().Encode(hdrhistogram.V2CompressedEncodingCookieBase)
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Histogram) UnmarshalText(text []byte) (err error) {
	h.hdr, err = hdrhistogram.Decode(text)
	return err
}
