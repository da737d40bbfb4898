package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// Mode is how the load generator asks.
type Mode string

// The modes.
const (
	// Closed: so many callers, each asking again when it has its answer.
	Closed Mode = "closed"
	// Stream: pushes over PushStream calls, so many without answer on each.
	Stream Mode = "stream"
	// Open: a fixed rate, whatever the answers do.
	Open Mode = "open"
	// Sweep: every key of the work once, by so many callers; for warming up.
	Sweep Mode = "sweep"
	// Count: a number of pushes by so many callers.
	Count Mode = "count"
)

// Load is one run of the load generator against one server.
type Load struct {
	Target   string        `json:"target"`
	Mode     Mode          `json:"mode"`
	Work     Work          `json:"work"`
	InFlight int           `json:"in_flight"` // callers, or pushes on each stream
	Streams  int           `json:"streams"`   // of Stream; each has a connection
	Batch    int           `json:"batch"`     // of Stream: pushes in one message at most; 0 for a message each
	Rate     float64       `json:"rate"`      // of Open, per second
	Duration time.Duration `json:"duration"`  // of Closed, Stream and Open
	Count    int           `json:"count"`     // of Count
}

// Loaded is what came of it.
type Loaded struct {
	Done    int                   `json:"done"`
	Failed  int                   `json:"failed"` // of Done
	Error   string                `json:"error"`  // the first
	Elapsed time.Duration         `json:"elapsed"`
	Latency map[string]*Histogram `json:"latency"` // by class
}

// target is a server with the connections to it.
type target struct {
	Name  string `json:"name"`
	Addr  string `json:"addr"`
	Conns int    `json:"conns"`
	As    access `json:"as"`

	wires []*wire
}

// Bounds of what a load generator does, whatever it is asked for.
const (
	maxRun      = 2 * time.Minute
	maxInFlight = 1 << 16
	maxWaiting  = 4096 // requests of Open under way
)

// generator is the part that makes load.
type generator struct {
	targets map[string]*target
	works   map[Work]*messages
}

func loadRole(ctx context.Context, p *part) error {
	g := &generator{targets: map[string]*target{}, works: map[Work]*messages{}}
	handle(p, "target", func(_ context.Context, t target) (none, error) {
		t.wires = make([]*wire, t.Conns)
		g.targets[t.Name] = &t
		return none{}, nil
	})
	handle(p, "drop", func(_ context.Context, name string) (none, error) {
		if t := g.targets[name]; t != nil {
			for i := range t.wires {
				t.broken(i)
			}
			delete(g.targets, name)
		}
		return none{}, nil
	})
	handle(p, "run", g.run)
	handle(p, "flood", g.flood)
	return nil
}

func (g *generator) run(ctx context.Context, l Load) (*Loaded, error) {
	t := g.targets[l.Target]
	if t == nil {
		return nil, fmt.Errorf("no target %q", l.Target)
	}
	if l.Duration > maxRun || l.InFlight > maxInFlight || l.InFlight <= 0 {
		return nil, errors.New("out of bounds")
	}
	m := g.works[l.Work]
	if m == nil {
		var err error
		if m, err = l.Work.encode(); err != nil {
			return nil, err
		}
		g.works[l.Work] = m
	}
	ctx, cancel := context.WithTimeout(ctx, maxRun)
	defer cancel()
	run := &run{load: l, messages: m}
	var err error
	switch l.Mode {
	case Closed, Sweep, Count:
		err = run.callers(ctx, t)
	case Stream:
		err = run.streams(ctx, t)
	case Open:
		err = run.open(ctx, t)
	default:
		err = fmt.Errorf("no mode %q", l.Mode)
	}
	if err != nil {
		return nil, err
	}
	return run.result(), nil
}

// start begins the time of the run.
func (r *run) start() {
	r.began = time.Now()
	r.until = r.began.Add(r.load.Duration)
}

// run is one Load under way.
type run struct {
	// Static after start.
	load     Load
	messages *messages
	began    time.Time
	until    time.Time

	next atomic.Int64 // of Sweep and Count

	mu     sync.Mutex // guards all below
	tallys []*tally
}

// tally is what one goroutine has counted.
type tally struct {
	done, failed int
	err          error
	last         time.Time
	latency      [classes]Histogram
}

func (r *run) tally() *tally {
	t := new(tally)
	r.mu.Lock()
	r.tallys = append(r.tallys, t)
	r.mu.Unlock()
	return t
}

// result is called when all goroutines have ended.
func (r *run) result() *Loaded {
	out := &Loaded{Latency: map[string]*Histogram{}}
	last := r.began
	for _, t := range r.tallys {
		out.Done += t.done
		out.Failed += t.failed
		if out.Error == "" && t.failed > 0 {
			out.Error = fmt.Sprint(t.err)
		}
		if t.last.After(last) {
			last = t.last
		}
		for c := range classes {
			if t.latency[c].Count() == 0 {
				continue
			}
			if out.Latency[c.String()] == nil {
				out.Latency[c.String()] = new(Histogram)
			}
			out.Latency[c.String()].Merge(&t.latency[c])
		}
	}
	out.Elapsed = last.Sub(r.began)
	return out
}

// pick draws the next request.
func (m *messages) pick(rng *rand.Rand) (class, *raw) {
	n, c := rng.IntN(m.sum), toUser
	for n >= m.mix[c] {
		n -= m.mix[c]
		c++
	}
	all := m.unary[c]
	return c, &all[rng.IntN(len(all))]
}

// all numbers the requests of a sweep.
func (r *run) all(i int) (class, *raw, bool) {
	for c := range classes {
		if r.messages.mix[c] == 0 {
			continue
		}
		if i < len(r.messages.unary[c]) {
			return c, &r.messages.unary[c][i], true
		}
		i -= len(r.messages.unary[c])
	}
	return 0, nil, false
}
