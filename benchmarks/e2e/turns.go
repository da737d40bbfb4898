package e2e

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// settle is how long a server may finish what it does after its answers, before its
// account is read.
const settle = 10 * time.Millisecond

// Slot is a server with its load: one of those that take turns.
type Slot struct {
	Name   string
	Server *Server
	Load   Load
}

// Turn is what one turn cost the server.
type Turn struct {
	Done    float64
	Failed  float64
	Error   string
	Elapsed time.Duration
	CPU     time.Duration
	// Counts of the process: allocations, calls of write and bytes written.
	Mallocs, Writes, Bytes float64
	// Of Push-Manager: frames and bytes to nodes, and deliveries in them.
	Frames, FrameBytes, Deliveries float64
	// CPU time of the load generator and of the nodes, meanwhile.
	LoadCPU, NodesCPU time.Duration
	Parts             map[string]time.Duration // of CPU, by process, where there are several
	Latency           map[string]*Histogram
}

// cores is the CPU time that was used up to one moment.
type cores struct{ server, load, nodes time.Duration }

// cores is that of the server, and of those who made it work.
func (s *Server) cores() (c cores, err error) {
	for pid, cpu := range map[int]*time.Duration{
		s.child.pid(): &c.server, s.bench.load.pid(): &c.load, s.world.nodesPart.pid(): &c.nodes,
	} {
		if *cpu, err = cpuTime(pid); err != nil {
			return c, err
		}
	}
	return c, nil
}

// account is what a process shows at one moment.
type account struct {
	cores

	writes, bytes float64
	metrics       map[string]float64
}

func (s *Server) account(ctx context.Context, metricsFirst bool) (a account, err error) {
	if metricsFirst {
		if a.metrics, err = s.metrics(ctx); err != nil {
			return a, err
		}
	}
	if a.writes, a.bytes, err = written(s.child.pid()); err != nil {
		return a, err
	}
	if a.cores, err = s.cores(); err != nil {
		return a, err
	}
	if !metricsFirst {
		a.metrics, err = s.metrics(ctx)
	}
	return a, err
}

// Turn loads the server once and takes its account.
func (s Slot) Turn(ctx context.Context) (*Turn, error) {
	before, err := s.Server.account(ctx, true)
	if err != nil {
		return nil, err
	}
	load := s.Load
	load.Target = s.Server.Name
	out, err := s.Server.bench.run(ctx, load)
	if err != nil {
		return nil, err
	}
	if err := pause(ctx, settle); err != nil {
		return nil, err
	}
	after, err := s.Server.account(ctx, false)
	if err != nil {
		return nil, err
	}
	diff := func(name string) float64 { return after.metrics[name] - before.metrics[name] }
	return &Turn{
		Done: float64(out.Done), Failed: float64(out.Failed), Error: out.Error, Elapsed: out.Elapsed, Latency: out.Latency,
		CPU: after.server - before.server, LoadCPU: after.load - before.load, NodesCPU: after.nodes - before.nodes,
		Writes: after.writes - before.writes, Bytes: after.bytes - before.bytes,
		Mallocs: diff("go_memstats_mallocs_total"), Frames: diff("push_manager_link_frames_total"),
		FrameBytes: diff("push_manager_link_bytes_total"), Deliveries: diff("push_manager_link_deliveries_total"),
	}, nil
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Series are the turns of one slot, one for each round.
type Series []*Turn

// Table has the series of all slots by name.
type Table map[string]Series

// Rounds lets the slots take turns.
func (b *Bench) Rounds(ctx context.Context, title string, slots []Slot) (Table, error) {
	byName, names := map[string]Slot{}, make([]string, len(slots))
	for i, s := range slots {
		names[i] = s.Name
		byName[s.Name] = s
	}
	return b.turns(title, names, func(name string) (*Turn, error) { return byName[name].Turn(ctx) })
}

// turns lets all of some names take a turn in each round, in an order that is drawn anew.
func (b *Bench) turns(title string, names []string, turn func(name string) (*Turn, error)) (Table, error) {
	table := Table{}
	order := slices.Clone(names)
	begin := time.Now()
	for range b.opts.Rounds {
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, name := range order {
			t, err := turn(name)
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %w", title, name, err)
			}
			table[name] = append(table[name], t)
		}
	}
	b.progress("# %s: %d rounds of %d turns in %.0f s", title, b.opts.Rounds, len(names), time.Since(begin).Seconds())
	return table, nil
}

// Figure is a number with the bounds of its 95 % interval.
type Figure struct{ Value, Low, High float64 }

// String has three significant digits.
func (f Figure) String() string {
	return fmt.Sprintf("%s [%s, %s]", short(f.Value), short(f.Low), short(f.High))
}

func short(v float64) string {
	switch a := math.Abs(v); {
	case a >= 1000:
		return fmt.Sprintf("%.0f", v)
	case a >= 100:
		return fmt.Sprintf("%.1f", v)
	case a >= 10:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.3f", v)
	}
}

// resamples of a bootstrap.
const resamples = 2000

// bootstrap puts an interval around a figure of n rounds: of draws its value for
// the rounds that are given.
func bootstrap(n int, of func(rounds []int) float64) Figure {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	f := Figure{Value: of(all)}
	rng := rand.New(rand.NewPCG(1, 2)) // the same data give the same interval
	values := make([]float64, resamples)
	sample := make([]int, n)
	for i := range values {
		for j := range sample {
			sample[j] = rng.IntN(n)
		}
		values[i] = of(sample)
	}
	slices.Sort(values)
	f.Low, f.High = values[resamples*25/1000], values[resamples*975/1000]
	return f
}

// median of values, which it sorts.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	slices.Sort(values)
	m := len(values) / 2
	if len(values)%2 == 1 {
		return values[m]
	}
	return (values[m-1] + values[m]) / 2
}

// Ratio is the median over the rounds of what metric says of a by what it says of b.
func Ratio(a, b Series, metric func(*Turn) float64) Figure {
	ratios := make([]float64, min(len(a), len(b)))
	for i := range ratios {
		ratios[i] = metric(a[i]) / metric(b[i])
	}
	return medianOf(ratios)
}

// Median is that of a metric over the rounds.
func Median(s Series, metric func(*Turn) float64) Figure {
	values := make([]float64, len(s))
	for i, t := range s {
		values[i] = metric(t)
	}
	return medianOf(values)
}

func medianOf(values []float64) Figure {
	sample := make([]float64, len(values))
	return bootstrap(len(values), func(rounds []int) float64 {
		for i, r := range rounds {
			sample[i] = values[r]
		}
		return median(sample)
	})
}

// Quantile is that of the latencies of a class, or of all if it is empty, in seconds: over some
// rounds, or over all if none is given.
func (s Series) Quantile(class string, q float64, rounds ...int) float64 {
	some := s
	if len(rounds) > 0 {
		some = nil
		for _, r := range rounds {
			some = append(some, s[r])
		}
	}
	var sum Histogram
	for _, t := range some {
		for name, h := range t.Latency {
			if class == "" || class == name {
				sum.Merge(h)
			}
		}
	}
	return sum.Quantile(q).Seconds()
}

var errNothing = errors.New("nothing was done")

// check says what is wrong with a series, if anything.
func (s Series) check() error {
	var done, failed float64
	first := ""
	for _, t := range s {
		done += t.Done
		failed += t.Failed
		if first == "" {
			first = t.Error
		}
	}
	if done == 0 {
		return errNothing
	}
	if failed > 0 {
		return fmt.Errorf("%w: %.0f of %.0f: %s", errFailed, failed, done, first)
	}
	return nil
}

// The metrics of a turn.

// Rate is requests per second.
func Rate(t *Turn) float64 { return t.Done / t.Elapsed.Seconds() }

// CPUPerRequest is in microseconds.
func CPUPerRequest(t *Turn) float64 { return float64(t.CPU.Nanoseconds()) / 1e3 / t.Done }

// LoadPerRequest is the CPU time of the load generator, in microseconds.
func LoadPerRequest(t *Turn) float64 { return float64(t.LoadCPU.Nanoseconds()) / 1e3 / t.Done }

// NodesPerRequest is the CPU time of the nodes, in microseconds.
func NodesPerRequest(t *Turn) float64 { return float64(t.NodesCPU.Nanoseconds()) / 1e3 / t.Done }

// Cores is the share of one core that the server was busy.
func Cores(t *Turn) float64 { return t.CPU.Seconds() / t.Elapsed.Seconds() }

// Allocations is per request.
func Allocations(t *Turn) float64 { return t.Mallocs / t.Done }

// Writes is calls of write per request, all sockets together.
func Writes(t *Turn) float64 { return t.Writes / t.Done }

// WrittenBytes is per request, all sockets together.
func WrittenBytes(t *Turn) float64 { return t.Bytes / t.Done }

// PushesPerFrame is deliveries per frame to a node, 0 without frames.
func PushesPerFrame(t *Turn) float64 {
	if t.Frames == 0 {
		return 0
	}
	return t.Deliveries / t.Frames
}

// NodeBytes is bytes of frames to nodes per request.
func NodeBytes(t *Turn) float64 { return t.FrameBytes / t.Done }
