package e2e

import (
	"encoding/json"
	"math"
	"testing"
	"time"
)

func TestHistogramIsPrecise(t *testing.T) {
	var h Histogram
	for i := range 10_000 {
		h.Add(time.Duration(i+1) * time.Microsecond)
	}
	text, err := json.Marshal(&h)
	if err != nil {
		t.Fatal(err)
	}
	var read, twice Histogram
	if err := json.Unmarshal(text, &read); err != nil {
		t.Fatal(err)
	}
	twice.Merge(&h)
	twice.Merge(&read)
	if twice.Count() != 20_000 {
		t.Fatalf("%d counted", twice.Count())
	}
	for _, q := range []float64{0.001, 0.5, 0.99, 0.999, 1} {
		want := max(q*10_000, 1) * 1e3
		if got := float64(twice.Quantile(q)); math.Abs(got/want-1) > 0.02 {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	h.Add(time.Hour)
	h.Add(-time.Second)
	if got := h.Quantile(1); got < time.Minute {
		t.Errorf("an hour counts as %v", got)
	}
}

func TestRatioIsOfTheSameRound(t *testing.T) {
	var a, b Series
	for i := range 40 {
		drift := time.Duration(i+1) * time.Millisecond // both get slower and slower
		a = append(a, &Turn{Done: 1, CPU: 2 * drift})
		b = append(b, &Turn{Done: 1, CPU: drift})
	}
	if f := Ratio(a, b, CPUPerRequest); f != (Figure{2, 2, 2}) {
		t.Errorf("%v", f)
	}
	if f := Median(b, CPUPerRequest); f.Value != 20_500 || f.Low >= f.Value || f.High <= f.Value {
		t.Errorf("%v", f)
	}
}

func TestBarNeedsItsFigure(t *testing.T) {
	figure := Figure{Value: 1, Low: 0.9, High: 1.1}
	for _, test := range []struct {
		bar       Bar
		ok, short bool
	}{
		{Bar{Figure: figure, Limit: 1, Kind: AtMost}, true, false},
		{Bar{Figure: figure, Limit: 0.99, Kind: AtMost}, false, true},
		{Bar{Figure: figure, Limit: 1.01, Kind: AtLeast}, false, true},
		{Bar{Figure: figure, Limit: 1.05, Kind: Includes}, true, false},
		{Bar{Figure: figure, Limit: 1.2, Kind: Includes}, false, true},
		{Bar{Figure: figure, Limit: 0.5, Kind: Stretch}, false, false},
		{Bar{Figure: figure, Limit: 2, Kind: AtMost, Failure: "pushes failed"}, false, true},
		{Bar{Figure: Figure{Value: math.NaN()}, Limit: 2, Kind: AtMost}, false, true},
	} {
		if test.bar.OK() != test.ok || test.bar.Short() != test.short {
			t.Errorf("%v: ok %v, short %v", test.bar, test.bar.OK(), test.bar.Short())
		}
	}
	if err := (Series{&Turn{Done: 10, Failed: 1}}).check(); err == nil {
		t.Error("failed pushes make a figure")
	}
}
