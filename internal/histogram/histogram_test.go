package histogram

import (
	"bytes"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/VictoriaMetrics/metrics"
)

// TestTheProgramReadsWhatPrometheusReads: the same buckets, a value on a bound in the one that it bounds.
func TestTheProgramReadsWhatPrometheusReads(t *testing.T) {
	set := metrics.NewSet()
	h := New(set, "seconds", []float64{1, 2})
	for _, v := range []float64{0, 1, 1.5, 2, 3} {
		h.Update(v)
	}
	if got, want := h.Append(nil), []uint64{2, 2, 1}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	var b bytes.Buffer
	set.WritePrometheus(&b)
	for _, line := range []string{`seconds_bucket{le="1"} 2`, `seconds_bucket{le="2"} 4`, `seconds_bucket{le="+Inf"} 5`} {
		if !strings.Contains(b.String(), line) {
			t.Errorf("%s is not in\n%s", line, b.String())
		}
	}
}

func TestQuantiles(t *testing.T) {
	bounds := []float64{1, 2, 4}
	for name, c := range map[string]struct {
		counts, before []uint64
		q, want        float64
		none           bool
	}{
		"nothing":                   {counts: []uint64{0, 0, 0, 0}, none: true},
		"nothing since":             {counts: []uint64{3, 0, 0, 0}, before: []uint64{3, 0, 0, 0}, none: true},
		"in the middle of a bucket": {counts: []uint64{0, 10, 0, 0}, q: 0.5, want: 1.5},
		"at a bound":                {counts: []uint64{10, 0, 0, 0}, q: 1, want: 1},
		"in the second half":        {counts: []uint64{5, 0, 5, 0}, q: 0.75, want: 3},
		"above all bounds":          {counts: []uint64{0, 0, 0, 7}, q: 0.5, want: 4},
		"since":                     {counts: []uint64{100, 10, 0, 0}, before: []uint64{100, 0, 0, 0}, q: 0.5, want: 1.5},
		"of a new histogram":        {counts: []uint64{0, 10, 0, 0}, before: []uint64{100, 20, 0, 0}, q: 0.5, want: 1.5},
	} {
		got, ok := Quantile(bounds, c.counts, c.before, c.q)
		if ok == c.none || math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%s: %v %v, want %v", name, got, ok, c.want)
		}
	}
}
