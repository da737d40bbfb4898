package load

import (
	"fmt"
	"runtime"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"google.golang.org/grpc/codes"
)

// Result is what a run has measured.
type Result struct {
	Config  Config // defaults filled
	Started time.Time
	Window  time.Duration // the measured part
	Stopped bool          // before its time

	Total Figures
	Kinds [kinds]Figures // by Kind

	// Answered counts the answers that came within the window, whenever their pushes
	// were due.
	Answered int64
	// Unsent pushes were due in the window; all places were taken, or the generator
	// was too slow, until the window ended. No latency has them.
	Unsent int64
	// Unfinished pushes were under way when the run was given up.
	Unfinished int64

	// Lag is how late pushes were sent, of those that found a place at once: the
	// generator's own doing. Held is the same of those that had to wait for a place, or for the
	// flow control of their stream.
	Lag, Held *hdrhistogram.Histogram
	Full      bool // pushes that were due found all places taken

	Timeline  []Interval
	Generator Generator
	Clients   Clients // of the whole run, the warm-up included
}

// Figures count the pushes that were due in the window and have ended.
type Figures struct {
	Pushes   int64
	Outcomes [outcomes]int64 // by Outcome
	Codes    map[codes.Code]int64
	Targets  Targets
	// Latency is in nanoseconds, of all pushes but the refused. One without an answer
	// counts with the time it was waited for.
	Latency *hdrhistogram.Histogram
}

// Errors counts the pushes whose outcome is an error.
func (f *Figures) Errors() int64 {
	var n int64
	for o, count := range f.Outcomes {
		if Outcome(o).Bad() {
			n += count
		}
	}
	return n
}

// Interval is a piece of the window, or of the time after it in which the last answers
// came. Its figures are of the pushes that ended in it.
type Interval struct {
	At, Length    time.Duration // At is since the begin of the window
	Answered      int64
	Errors        int64
	InFlight      int   // at its end
	Pushes        int64 // the percentiles are of so many
	P50, P99, Max time.Duration
}

// Generator is what the generator itself took, within the window.
type Generator struct {
	CPU          time.Duration
	Cores        float64       // CPU by time
	Procs        int           // cores that it may use
	WaitP99      time.Duration // of its goroutines, for a core
	MostInFlight int
}

func (w *watch) result(started time.Time) *Result {
	r := w.run
	res := &Result{
		Config: r.cfg, Started: started, Stopped: r.stopped.Load(),
		Window: time.Duration(r.window.end.Load() - r.window.begin),
		Unsent: r.unsentCount.Load(), Unfinished: r.unfinished.Load(),
		Lag: newHistogram(), Held: newHistogram(), Full: r.full.Load(), Timeline: w.timeline,
		Clients: r.clients.ledger(),
	}
	var all tally
	var each [kinds]tally
	for _, rec := range r.recorders {
		rec.mu.Lock()
		for k := range rec.kinds {
			each[k].merge(&rec.kinds[k])
			all.merge(&rec.kinds[k])
		}
		res.Answered += rec.answered
		res.Lag.Merge(rec.lag)
		res.Held.Merge(rec.held)
		rec.mu.Unlock()
	}
	res.Total = all.figures()
	for k := range each {
		res.Kinds[k] = each[k].figures()
	}
	g := &res.Generator
	g.Procs, g.MostInFlight, g.WaitP99 = runtime.GOMAXPROCS(0), w.most, w.schedP99()
	g.CPU = w.cpuEnd - w.cpuBegin
	if wall := time.Duration(w.wallEnd - w.wallBegin); wall > 0 {
		g.Cores = g.CPU.Seconds() / wall.Seconds()
	}
	return res
}

func (t *tally) figures() Figures {
	if t.latency == nil {
		t.latency = newHistogram()
	}
	return Figures{Pushes: t.pushes, Outcomes: t.outcomes, Codes: t.codes, Targets: t.targets, Latency: t.latency}
}

// Rate is the answers a second within the window.
func (r *Result) Rate() float64 { return float64(r.Answered) / r.Window.Seconds() }

// ErrorShare is the share of the pushes whose outcome is an error.
func (r *Result) ErrorShare() float64 {
	if r.Total.Pushes == 0 {
		return 0
	}
	return float64(r.Total.Errors()) / float64(r.Total.Pushes)
}

// What the generator may do to a measurement without a warning.
const (
	muchLag   = 5 * time.Millisecond
	muchCPU   = 0.85
	mostCalls = 0.5
)

// Doubts says for people what speaks against the figures: that they show the
// generator rather than the server, or pushes to nobody.
func (r *Result) Doubts() []string {
	var all []string
	doubt := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	g := &r.Generator
	if lag := time.Duration(r.Lag.ValueAtQuantile(99)); lag > muchLag && r.Config.Rate > 0 {
		doubt("the generator itself sent late (p99 %v): latencies include that, give it more CPU or a lower rate", round(lag))
	}
	if g.Cores > muchCPU*float64(g.Procs) {
		doubt("the generator used %.2f of its %d cores: it was the bottleneck, not the server", g.Cores, g.Procs)
	}
	if g.WaitP99 > muchLag {
		doubt("the generator's goroutines waited for a core (p99 %v): the machine is too busy to measure on", round(g.WaitP99))
	}
	if n := r.Held.TotalCount(); r.Full {
		doubt("%d pushes waited to be sent, %d never were: all %d places were in use; if the server has room, allow more --in-flight and --connections",
			n+r.Unsent, r.Unsent, r.Config.InFlight)
	} else if n > 0 {
		doubt("%d pushes waited to be sent: their streams took no more, or the machine was too busy", n)
	}
	if r.Unsent > 0 {
		doubt("no percentile includes the %d pushes that were never sent: the true ones are higher", r.Unsent)
	}
	if n := r.Total.Outcomes[Offline]; float64(n) > mostCalls*float64(r.Total.Pushes) {
		doubt("%d of %d pushes reached nobody: are there users and rooms like %q and %q?",
			n, r.Total.Pushes, r.Config.UserPattern, r.Config.RoomPattern)
	}
	return all
}

func round(d time.Duration) time.Duration {
	if d > time.Second {
		return d.Round(10 * time.Millisecond)
	}
	return d.Round(10 * time.Microsecond)
}
