package e2e

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"
)

// Priorities of a Flood, in the order of its figures.
var floodPriorities = [...]string{"low", "normal", "high", "critical"}

const floodCritical = len(floodPriorities) - 1

// floodMix is how many pushes of a hundred have which priority, floodConns how many of the
// connections are theirs. Each connection has one priority: the calls under way on one are
// bounded, so what is urgent must not stand in one line with what is not.
var (
	floodMix   = [...]int{15, 70, 10, 5} //nolint:gochecknoglobals // a constant
	floodConns = [...]int{2, 4, 2, 4}    //nolint:gochecknoglobals // a constant
)

const (
	floodTick   = time.Millisecond
	floodBucket = 100 * time.Millisecond
	// floodLag is how late the generator may be. What it is later with it does not offer, so
	// the rate that is reported is one that was offered.
	floodLag = 50 * time.Millisecond
	// floodPatience is how long a caller waits: an answer that comes later is of no use.
	floodPatience = time.Second
	// floodLine is how many pushes may wait in the client for their connection to have room.
	floodLine = 256
)

// Phase is a part of a Flood.
type Phase struct {
	Rate     float64       `json:"rate"` // pushes a second, whatever the answers do
	Duration time.Duration `json:"duration"`
}

// Flood offers pushes of all priorities in an open loop. A push that is due while its
// connection has no room for one more call waits in line; one that finds the line full is
// given up by the client.
type Flood struct {
	Target string  `json:"target"`
	Work   Work    `json:"work"`
	Phases []Phase `json:"phases"`
	// Honest clients send nothing on a connection that was refused until the trailer says
	// that they may.
	Honest bool `json:"honest"`
}

// Flooded is what came of the pushes that were due in a tenth of a second, by priority.
type Flooded struct {
	Offered [len(floodPriorities)]int `json:"offered"`
	Good    [len(floodPriorities)]int `json:"good"` // delivered in time
	// Done is those that were delivered in time, too, but in this tenth of a second.
	Done    [len(floodPriorities)]int `json:"done"`
	Late    [len(floodPriorities)]int `json:"late"`    // delivered, too late
	Refused [len(floodPriorities)]int `json:"refused"` // an error of gRPC
	Failed  [len(floodPriorities)]int `json:"failed"`  // answered, not delivered to all
	GivenUp [len(floodPriorities)]int `json:"given_up"`
	Held    [len(floodPriorities)]int `json:"held"` // by an honest client
}

// flood is a Flood under way.
type flood struct {
	// Static.
	Flood
	messages *messages
	began    time.Time

	mu      sync.Mutex // guards what the pacer and the readers count
	buckets []Flooded
}

// hose is one connection of a flood: the pacer writes, its reader reads.
type hose struct {
	duplex

	priority int
	hold     time.Time // nothing is sent before; guarded by mu
}

func (g *generator) flood(ctx context.Context, f Flood) ([]Flooded, error) {
	total := time.Duration(0)
	for _, p := range f.Phases {
		total += p.Duration
	}
	t := g.targets[f.Target]
	if t == nil || total > maxRun || total <= 0 {
		return nil, errors.New("out of bounds")
	}
	m, err := f.Work.encode()
	if err != nil {
		return nil, err
	}
	var hoses []*hose
	for priority, n := range floodConns {
		for range n {
			w, err := dialWire(ctx, t.Addr, t.As)
			if err != nil {
				return nil, err
			}
			defer func() { _ = w.conn.Close() }()
			w.priority = floodPriorities[priority]
			if f.Honest {
				w.listen()
			}
			if err := errors.Join(w.conn.SetDeadline(time.Now().Add(total+grace)), w.flush()); err != nil {
				return nil, err
			}
			hoses = append(hoses, &hose{duplex{over: make(chan struct{}), w: w}, priority, time.Time{}})
		}
	}
	run := &flood{Flood: f, messages: m, began: time.Now().Add(floodBucket), buckets: make([]Flooded, total/floodBucket+1)}
	var readers sync.WaitGroup
	errs := make([]error, len(hoses))
	for i, h := range hoses {
		readers.Go(func() { errs[i] = run.read(h) })
	}
	run.pace(ctx, hoses)
	readers.Wait()
	return run.buckets, errors.Join(errs...)
}

// bucket is where a push that was due at a time is counted. The lock is held.
func (f *flood) bucket(due time.Time) *Flooded {
	i := int(due.Sub(f.began) / floodBucket)
	return &f.buckets[min(max(i, 0), len(f.buckets)-1)]
}

// pace lets all hoses go at each tick, with what has become due.
func (f *flood) pace(ctx context.Context, hoses []*hose) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	rng := rand.New(rand.NewPCG(1, uint64(f.began.UnixNano())))
	turn := [len(floodPriorities)]int{}
	at, until := f.began, f.began
	for _, p := range f.Phases {
		until = until.Add(p.Duration)
		due := 0.0
		for at.Before(until) && ctx.Err() == nil {
			at = at.Add(floodTick)
			if behind := time.Since(at); behind > floodLag {
				at = at.Add(behind)
			}
			time.Sleep(time.Until(at))
			due += p.Rate * floodTick.Seconds()
			orders := [len(floodPriorities)]int{}
			for ; due >= 1; due-- {
				orders[pickPriority(rng)]++
			}
			first := 0
			for priority, n := range orders {
				own := hoses[first : first+floodConns[priority]]
				first += len(own)
				for i := range own { // in turn, so that none always gets the rest
					share := (n + i) / len(own)
					f.send(own[(turn[priority]+i)%len(own)], share, at, rng)
				}
				turn[priority]++
			}
		}
	}
	for _, h := range hoses {
		h.finish()
	}
}

func pickPriority(rng *rand.Rand) int {
	n, p := rng.IntN(100), 0
	for n >= floodMix[p] {
		n -= floodMix[p]
		p++
	}
	return p
}

// send offers n pushes that are due, and gives up those that there is no room for.
func (f *flood) send(h *hose, n int, due time.Time, rng *rand.Rand) {
	if n == 0 {
		return
	}
	h.mu.Lock()
	sent, held := 0, due.Before(h.hold)
	for ; sent < n && !held; sent++ {
		if len(h.w.waiting) >= floodLine {
			break
		}
		c, m := f.messages.pick(rng)
		h.w.ask(c, m, due)
	}
	_ = h.w.flush() // the reader sees that the connection is broken
	h.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	b := f.bucket(due)
	b.Offered[h.priority] += n
	if held {
		b.Held[h.priority] += n
	} else {
		b.GivenUp[h.priority] += n - sent
	}
}

// read takes answers until all that was sent has one.
func (f *flood) read(h *hose) error {
	var ended []inflight
	var expired []time.Time
	return h.duplex.read(func(now time.Time) error {
		ended, expired = ended[:0], h.w.expire(expired[:0], now.Add(-floodPatience))
		err := h.w.read(func(call *inflight) {
			ended = append(ended, *call)
			if call.pushback > 0 {
				h.hold = now.Add(call.pushback)
			}
		})
		f.count(h.priority, ended, expired, now)
		return err
	})
}

func (f *flood) count(priority int, ended []inflight, expired []time.Time, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, due := range expired {
		f.bucket(due).GivenUp[priority]++
	}
	for i := range ended {
		call := &ended[i]
		b := f.bucket(call.at)
		switch {
		case call.ok && now.Sub(call.at) <= floodPatience:
			b.Good[priority]++
			f.bucket(now).Done[priority]++
		case call.ok:
			b.Late[priority]++
		case call.said != "":
			b.Failed[priority]++
		default:
			b.Refused[priority]++
		}
	}
}

// expire takes those out of the line that were due before a time, which it returns.
func (w *wire) expire(due []time.Time, before time.Time) []time.Time {
	for len(w.waiting) > 0 && w.waiting[0].at.Before(before) {
		due = append(due, w.waiting[0].at)
		w.waiting = w.waiting[1:]
	}
	return due
}
