package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
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
	Client   string        `json:"client"`    // GRPC, or "" for our own where the messages are small enough
}

// GRPC is grpc-go's own client.
const GRPC = "grpc"

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

	conns []*grpc.ClientConn
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
		for range t.Conns {
			conn, err := grpc.NewClient("passthrough:///"+t.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{})))
			if err != nil {
				return none{}, err
			}
			t.conns = append(t.conns, conn)
			p.onStop(func() { _ = conn.Close() })
		}
		t.wires = make([]*wire, t.Conns)
		g.targets[t.Name] = &t
		return none{}, nil
	})
	handle(p, "drop", func(_ context.Context, name string) (none, error) {
		if t := g.targets[name]; t != nil {
			for _, conn := range t.conns {
				_ = conn.Close()
			}
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
	if l.Client == GRPC && l.Batch > 0 {
		return nil, errors.New("only our own client sends batches")
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
	run := &run{load: l, conns: t.conns, messages: m}
	var err error
	if l.Client == GRPC || !m.fits() {
		run.start()
		err = run.grpc(ctx)
	} else {
		err = run.raw(ctx, t)
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

func (r *run) raw(ctx context.Context, t *target) error {
	switch r.load.Mode {
	case Closed, Sweep, Count:
		return r.rawCallers(ctx, t)
	case Stream:
		return r.rawStreams(ctx, t)
	case Open:
		return r.rawOpen(ctx, t)
	default:
		return fmt.Errorf("no mode %q", r.load.Mode)
	}
}

func (r *run) grpc(ctx context.Context) error {
	switch r.load.Mode {
	case Closed, Sweep, Count:
		r.callers(ctx)
	case Stream:
		r.streams(ctx)
	case Open:
		r.open(ctx)
	default:
		return fmt.Errorf("no mode %q", r.load.Mode)
	}
	return nil
}

// run is one Load under way.
type run struct {
	// Static after start.
	load     Load
	conns    []*grpc.ClientConn
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

func (t *tally) count(c class, ok bool, err error, since time.Time) {
	now := time.Now()
	t.done++
	if !ok || err != nil {
		t.failed++
		if t.err == nil {
			t.err = err
		}
	}
	t.last = now
	t.latency[c].Add(now.Sub(since))
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

// call makes one unary call.
func (r *run) call(ctx context.Context, conn *grpc.ClientConn, c class, m, reply *raw) (bool, error) {
	err := conn.Invoke(ctx, c.method(), m, reply)
	return err == nil && succeeded(reply.b), err
}

// pick draws the next request.
func (r *run) pick(rng *rand.Rand) (class, *raw) { return r.messages.pick(rng) }

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

// callers runs the modes in which a caller waits for its answer.
func (r *run) callers(ctx context.Context) {
	var wg sync.WaitGroup
	for i := range r.load.InFlight {
		wg.Go(func() { r.caller(ctx, i) })
	}
	wg.Wait()
}

func (r *run) caller(ctx context.Context, i int) {
	t, conn := r.tally(), r.conns[i%len(r.conns)]
	rng := rand.New(rand.NewPCG(uint64(i), uint64(r.began.UnixNano())))
	var reply raw
	for ctx.Err() == nil {
		c, m := r.pick(rng)
		switch r.load.Mode {
		case Sweep:
			var more bool
			if c, m, more = r.all(int(r.next.Add(1)) - 1); !more {
				return
			}
		case Count:
			if int(r.next.Add(1)) > r.load.Count {
				return
			}
		default:
			if !time.Now().Before(r.until) {
				return
			}
		}
		since := time.Now()
		ok, err := r.call(ctx, conn, c, m, &reply)
		t.count(c, ok, err, since)
	}
}

// open sends at a fixed rate. The gaps are random (exponential), the latency counts
// from the moment that a request was due.
func (r *run) open(ctx context.Context) {
	type due struct {
		c  class
		m  *raw
		at time.Time
	}
	queue := make(chan due, maxWaiting)
	var wg sync.WaitGroup
	for i := range r.load.InFlight {
		wg.Go(func() {
			t, conn := r.tally(), r.conns[i%len(r.conns)]
			var reply raw
			for d := range queue {
				ok, err := r.call(ctx, conn, d.c, d.m, &reply)
				t.count(d.c, ok, err, d.at)
			}
		})
	}
	rng := rand.New(rand.NewPCG(1, uint64(r.began.UnixNano())))
	runtime.LockOSThread() // to sleep for less than a millisecond
	defer runtime.UnlockOSThread()
	at := r.began
	for ctx.Err() == nil {
		at = at.Add(time.Duration(rng.ExpFloat64() / r.load.Rate * float64(time.Second)))
		if at.After(r.until) {
			break
		}
		for wait := time.Until(at); wait > 0; wait = time.Until(at) {
			ts := syscall.NsecToTimespec(int64(wait))
			_ = syscall.Nanosleep(&ts, nil) // a signal wakes us early, and we look again
		}
		c, m := r.pick(rng)
		queue <- due{c, m, at}
	}
	close(queue)
	wg.Wait()
}
