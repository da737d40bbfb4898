package faultbench

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"text/tabwriter"
	"time"
)

// series is one quantity of a process, taken at the same phase of each cycle.
type series struct {
	name   string
	unit   float64 // what the table divides by
	spare  float64 // growth in an hour that is nothing, however low the level
	at     []time.Duration
	values []float64
}

func (s *series) add(at time.Duration, v float64) {
	s.at = append(s.at, at)
	s.values = append(s.values, v)
}

const (
	// growthMost is the share of its level by which a quantity may grow in an hour.
	growthMost = 0.10
	// certainty is how many standard errors a slope has to be above that. Four, since the
	// samples of neighbouring cycles are not independent of each other.
	certainty = 4
	// samplesLeast make a slope; a half of a run has one of its own.
	samplesLeast = 12
)

// trend is a line through a series, by least squares.
type trend struct {
	level float64 // mean
	slope float64 // an hour
	error float64 // of slope: its standard error
}

func fit(at []time.Duration, values []float64) trend {
	n := float64(len(values))
	var meanX, meanY float64
	for i, v := range values {
		meanX += at[i].Hours() / n
		meanY += v / n
	}
	var xx, xy float64
	for i, v := range values {
		x := at[i].Hours() - meanX
		xx += x * x
		xy += x * (v - meanY)
	}
	t := trend{level: meanY, slope: xy / xx}
	var rest float64
	for i, v := range values {
		d := v - meanY - t.slope*(at[i].Hours()-meanX)
		rest += d * d
	}
	t.error = math.Sqrt(rest / (n - 2) / xx)
	return t
}

// judge fits a line to what is behind the warm-up, the first fifth. The quantity grows if
// the whole run says so for certain, and each half of it as well: something that was
// allocated once is a step in one of them. It is flat if growth is ruled out as certainly,
// and else the run was too short to tell.
func (s *series) judge() (t trend, verdict string) {
	from := len(s.values) / 5
	at, values := s.at[from:], s.values[from:]
	t = fit(at, values)
	if len(values) < samplesLeast {
		return t, tooShort
	}
	most := max(growthMost*t.level, s.spare)
	half := len(values) / 2
	halves := min(fit(at[:half], values[:half]).slope, fit(at[half:], values[half:]).slope)
	switch {
	case t.slope-certainty*t.error > most && halves > most:
		return t, grows
	case t.slope+certainty*t.error <= most:
		return t, flat
	default:
		return t, tooShort
	}
}

const (
	grows    = "GROWS"
	flat     = "flat"
	tooShort = "too short to tell"
)

// report is a table of all series, and those that grow.
func report(all []*series) (table string, growing []string) {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\tsamples\tfirst\tlast\tmean\tan hour\t+-\tallowed\tverdict\t")
	for _, s := range all {
		t, verdict := s.judge()
		u := s.unit
		fmt.Fprintf(w, "%s\t%d\t%.4g\t%.4g\t%.4g\t%+.3g\t%.2g\t%.3g\t%s\t\n", s.name, len(s.values),
			s.values[0]/u, s.values[len(s.values)-1]/u, t.level/u, t.slope/u, certainty*t.error/u, max(growthMost*t.level, s.spare)/u, verdict)
		if verdict == grows {
			growing = append(growing, s.name)
		}
	}
	_ = w.Flush()
	return b.String(), growing
}

// TestTrendFindsWhatGrows draws runs of ten minutes with known slopes.
func TestTrendFindsWhatGrows(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	noise := func() float64 { return r.NormFloat64() * 4 }
	for _, test := range []struct {
		name    string
		cycles  int
		value   func(cycle int) float64
		verdict string
	}{
		{"the same all the time", 120, func(int) float64 { return 100 }, flat},
		{"noise around a level", 720, func(int) float64 { return 100 + noise() }, flat},
		{"one more each cycle", 120, func(i int) float64 { return 100 + float64(i) + noise() }, grows},
		{"one more each tenth cycle", 120, func(i int) float64 { return 100 + float64(i/10) + noise()/4 }, grows},
		{"one more each cycle, in little time", 30, func(i int) float64 { return 100 + float64(i) + noise() }, grows},
		{"fewer each cycle", 120, func(i int) float64 { return 300 - float64(i) + noise() }, flat},
		{"a step, once", 120, func(i int) float64 { return 100 + 10*float64(i/80) + noise()/4 }, tooShort},
		{"growth while it warms up", 720, func(i int) float64 { return 100 + min(float64(i), 100) + noise() }, flat},
		{"noise, in little time", 20, func(int) float64 { return 100 + noise() }, tooShort},
		{"a handful of samples", 10, func(int) float64 { return 100 }, tooShort},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := series{name: "it", unit: 1, spare: 10}
			for i := range test.cycles {
				s.add(time.Duration(i)*5*time.Second, test.value(i))
			}
			table, growing := report([]*series{&s})
			if _, got := s.judge(); got != test.verdict || (len(growing) == 1) != (got == grows) {
				t.Errorf("%s, want %s; growing %v\n%s", got, test.verdict, growing, table)
			}
		})
	}
}
