package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// grace is how long calls may go on after a run's time.
const grace = 10 * time.Second

// each connects, begins the run, and runs f for each connection at once.
func (r *run) each(ctx context.Context, t *target, f func(i int, w *wire, t *tally) error) error {
	for i := range t.Conns {
		if _, err := t.wire(ctx, i); err != nil {
			return err
		}
	}
	r.start() // to connect is no part of a turn, which may be shorter than that
	until := r.until.Add(grace)
	if r.load.Duration == 0 {
		until = r.began.Add(maxRun)
	}
	for _, w := range t.wires {
		if err := w.conn.SetDeadline(until); err != nil {
			return err
		}
	}
	var wg sync.WaitGroup
	for i, w := range t.wires {
		wg.Go(func() {
			tally := r.tally()
			err := f(i, w, tally)
			w.last = time.Now()
			if err != nil {
				t.broken(i)
				tally.done++
				tally.failed++
				tally.err = err
			}
		})
	}
	wg.Wait()
	return nil
}

// wire is the i-th connection, made anew when it has been idle for long.
func (t *target) wire(ctx context.Context, i int) (*wire, error) {
	if w := t.wires[i]; w != nil && time.Since(w.last) < idleLimit {
		return w, nil
	}
	t.broken(i)
	w, err := dialWire(ctx, t.Addr, t.As)
	t.wires[i] = w
	return w, err
}

func (t *target) broken(i int) {
	if w := t.wires[i]; w != nil {
		_ = w.conn.Close() // it is of no use any more
		t.wires[i] = nil
	}
}

// callers runs the modes in which a caller waits for its answer.
func (r *run) callers(ctx context.Context, t *target) error {
	return r.each(ctx, t, func(i int, w *wire, tally *tally) error {
		rng := rand.New(rand.NewPCG(uint64(i), uint64(r.began.UnixNano())))
		// One clock reading for all replies of one read: they arrived together.
		now := time.Now()
		next := func() {
			if c, m, more := r.request(rng, now); more {
				w.ask(c, m, now)
			}
		}
		ended := func(call *inflight) {
			tally.add(call, now)
			next()
		}
		callers := r.load.InFlight / t.Conns
		if i < r.load.InFlight%t.Conns {
			callers++
		}
		for range callers {
			next()
		}
		for w.pending() > 0 {
			if err := w.flush(); err != nil {
				return err
			}
			if _, err := w.in.Peek(1); err != nil {
				return err
			}
			now = time.Now()
			if err := w.read(ended); err != nil {
				return err
			}
		}
		return w.flush()
	})
}

func (t *tally) add(call *inflight, now time.Time) {
	t.done++
	if !call.ok {
		t.failed++
		if t.err == nil {
			t.err = fmt.Errorf("%w: %v %s", errNoSuccess, call.c, call.said)
		}
	}
	t.last = now
	t.latency[call.c].Add(now.Sub(call.at))
}

// errNoSuccess comes without what the reply says when there was none: an error of gRPC.
var errNoSuccess = errors.New("no success")

// request is the next one, if there is any.
func (r *run) request(rng *rand.Rand, now time.Time) (class, *raw, bool) {
	switch r.load.Mode {
	case Sweep:
		return r.all(int(r.next.Add(1)) - 1)
	case Count:
		if int(r.next.Add(1)) > r.load.Count {
			return 0, nil, false
		}
	default:
		if !now.Before(r.until) {
			return 0, nil, false
		}
	}
	c, m := r.messages.pick(rng)
	return c, m, true
}

// streams keeps a PushStream call on each connection.
func (r *run) streams(ctx context.Context, t *target) error {
	all := r.messages.forStream(2 * r.load.InFlight)
	if r.load.Batch > 0 {
		all = r.messages.batch
	}
	if len(all[0].b) > maxFrame/2 {
		return errors.New("pushes that do not fit into a frame go in unary calls only")
	}
	return r.each(ctx, t, func(_ int, w *wire, tally *tally) error {
		s := &rawStream{
			all: all, batch: r.load.Batch, limit: r.load.InFlight, tally: tally, class: r.messages.streamClass(), at: make([]time.Time, len(all)),
		}
		id, call := w.open("/pubsub.PushManagerService/PushStream")
		call.push = s
		for !s.over {
			if err := errors.Join(s.fill(w, id, r.until), w.flush()); err != nil {
				return err
			}
			if err := w.read(nil); err != nil {
				return err
			}
		}
		tally.last = time.Now()
		if s.answered != s.sent {
			return errors.New("a stream ended with pushes that have no reply")
		}
		return w.flush()
	})
}

// duplex is a connection whose reader is not its writer.
type duplex struct {
	over chan struct{} // closed when nothing more is sent

	mu sync.Mutex
	w  *wire // its reading side is the reader's
}

// finish is called when nothing more is to be sent. It asks for something that is answered at
// once, so that the reader looks whether it is done.
func (d *duplex) finish() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.over)
	_ = d.w.ping() // the reader sees that the connection is broken
}

// read calls take, under the lock, whenever there is something to read, and returns when all that
// was sent has its answer.
func (d *duplex) read(take func(now time.Time) error) error {
	for {
		if _, err := d.w.in.Peek(1); err != nil {
			return err
		}
		d.mu.Lock()
		err := take(time.Now())
		if err == nil {
			err = d.w.flush()
		}
		left := d.w.pending()
		d.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-d.over:
			if left == 0 {
				return nil
			}
		default:
		}
	}
}

// paced is one connection of an open loop.
type paced struct {
	duplex

	lost int // requests that were not sent
}

// open sends at a fixed rate. The gaps are random (exponential), the latency counts
// from the moment that a request was due.
func (r *run) open(ctx context.Context, t *target) error {
	conns := make([]*paced, t.Conns)
	for i := range conns {
		conns[i] = &paced{duplex: duplex{over: make(chan struct{})}}
	}
	var pacing sync.WaitGroup
	defer pacing.Wait()
	var started sync.Once
	var ready sync.WaitGroup
	ready.Add(t.Conns)
	return r.each(ctx, t, func(i int, w *wire, tally *tally) error {
		p := conns[i]
		p.w = w
		ready.Done()
		started.Do(func() {
			pacing.Go(func() {
				ready.Wait()
				r.pace(ctx, conns)
			})
		})
		err := p.read(func(now time.Time) error { return w.read(func(call *inflight) { tally.add(call, now) }) })
		p.mu.Lock()
		defer p.mu.Unlock()
		tally.done += p.lost
		tally.failed += p.lost
		if p.lost > 0 {
			tally.err = errBehind
		}
		return err
	})
}

// pace sends until the time is over.
func (r *run) pace(ctx context.Context, conns []*paced) {
	rng := rand.New(rand.NewPCG(1, uint64(r.began.UnixNano())))
	runtime.LockOSThread() // to sleep for less than a millisecond
	defer runtime.UnlockOSThread()
	at := r.began
	for n := 0; ctx.Err() == nil; n++ {
		at = at.Add(time.Duration(rng.ExpFloat64() / r.load.Rate * float64(time.Second)))
		if at.After(r.until) {
			break
		}
		for wait := time.Until(at); wait > 0; wait = time.Until(at) {
			ts := syscall.NsecToTimespec(int64(wait))
			_ = syscall.Nanosleep(&ts, nil) // a signal wakes us early, and we look again
		}
		c, m := r.messages.pick(rng)
		conns[n%len(conns)].send(c, m, at)
	}
	for _, p := range conns {
		p.finish()
	}
}

// send asks for one push. What cannot be sent any more is counted by the reader.
func (p *paced) send(c class, m *raw, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w.pending() >= maxWaiting {
		p.lost++
		return
	}
	p.w.ask(c, m, at)
	_ = p.w.flush() // the reader sees that the connection is broken
}

var errBehind = errors.New("too many requests are under way")
