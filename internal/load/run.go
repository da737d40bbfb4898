package load

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
)

// ErrUnreachable is what a run that could not connect to an address wraps.
var ErrUnreachable = errors.New("nobody answers")

// ErrNothingMeasured ends a run that was stopped before its measured part.
var ErrNothingMeasured = errors.New("stopped before anything was measured")

const (
	connectTimeout = 5 * time.Second
	housekeeping   = 100 * time.Millisecond
	progressEvery  = 500 * time.Millisecond
	// After the timeout of the last push nothing is to be expected. After a stop,
	// what has no answer so soon is given up.
	afterEnd  = 500 * time.Millisecond
	afterStop = 2 * time.Second
)

// run is a Run under way.
type run struct {
	// Static.
	cfg       Config
	encoder   *encoder
	conns     []*grpc.ClientConn
	clock     clock
	ids       string // begin of the message ids of this run
	clients   *clients
	window    *window
	stop      chan struct{} // closed after the window's end has been moved to now
	recorders []*recorder
	lanes     []*lane // of the way Stream

	sentCount   atomic.Int64
	endedCount  atomic.Int64
	unsentCount atomic.Int64 // in the window
	unfinished  atomic.Int64 // in the window, under way when the run was given up
	full        atomic.Bool  // a push that was due found all places taken
	stopped     atomic.Bool
	givenUp     atomic.Bool
}

// Run pushes as the configuration says and returns what it has measured. A ctx that
// is done ends the run early: the Result is that of the time until then.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.WithDefaults()
	encoder, err := newEncoder(&cfg)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	conns, err := dial(ctx, &cfg)
	defer func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	r := &run{
		cfg: cfg, encoder: encoder, conns: conns, stop: make(chan struct{}), window: &window{begin: int64(cfg.Warmup)},
		ids: strconv.FormatUint(rand.Uint64(), 36), clients: newClients(),
	}
	r.window.end.Store(int64(cfg.Warmup + cfg.Duration))
	defer r.clients.close()
	if err := r.clients.connect(ctx, &cfg, encoder); err != nil {
		return nil, err
	}
	return r.do(ctx)
}

// do is everything between the connections and the result.
func (r *run) do(ctx context.Context) (*Result, error) {
	// Calls go on after a stop until they are answered.
	calls, giveUp := context.WithCancel(context.WithoutCancel(ctx))
	defer giveUp()
	pace := r.prepare(calls)
	r.clock = clock{time.Now()}
	done := make(chan struct{})
	watch := &watch{run: r}
	var group sync.WaitGroup
	group.Go(func() { r.bound(ctx, done, giveUp) })
	group.Go(func() { watch.loop(done) })
	started := time.Now()
	pace()
	close(done)
	group.Wait()
	r.clients.close()
	if r.window.end.Load() <= r.window.begin {
		return nil, ErrNothingMeasured
	}
	return watch.result(started), nil
}

// prepare makes what sends and returns the function that does it until the end.
func (r *run) prepare(ctx context.Context) (pace func()) {
	if r.cfg.Way == Stream {
		n := len(r.conns)
		for i, conn := range r.conns {
			l := &lane{run: r, conn: conn, recorder: newRecorder(r.window), choose: newChooser(r, i)}
			// The first ones get what does not divide.
			l.table = newTable(max(1, (r.cfg.InFlight+n-1-i)/n))
			if r.cfg.Rate > 0 {
				l.schedule = newSchedule(&r.cfg, i, n)
			}
			l.open(ctx)
			r.lanes = append(r.lanes, l)
			r.recorders = append(r.recorders, l.recorder)
		}
		return func() {
			var group sync.WaitGroup
			for _, l := range r.lanes {
				l.pacer = r.pacer()
				group.Go(func() { l.loop(ctx) })
			}
			group.Wait()
		}
	}
	for range 2 * runtime.GOMAXPROCS(0) { // so that cores seldom meet at a lock
		r.recorders = append(r.recorders, newRecorder(r.window))
	}
	u := &callers{run: r, recorders: r.recorders, jobs: make(chan job)}
	if r.cfg.Rate > 0 {
		return func() { u.open(ctx) }
	}
	return func() { u.closed(ctx) }
}

func (r *run) pacer() *pacer {
	return &pacer{clock: r.clock, end: &r.window.end, stop: r.stop, nap: r.cfg.nap}
}

// bound ends the run when it is stopped, and gives up what has no answer in time.
func (r *run) bound(ctx context.Context, done <-chan struct{}, giveUp func()) {
	timer := time.NewTimer(time.Duration(r.window.end.Load() - r.clock.now()))
	defer timer.Stop()
	grace := r.cfg.Timeout + afterEnd
	select {
	case <-done:
		return
	case <-timer.C:
	case <-ctx.Done():
		r.stopped.Store(true)
		r.window.end.Store(r.clock.now())
		close(r.stop)
		grace = min(grace, afterStop)
	}
	timer.Reset(grace)
	stop := ctx.Done()
	if r.stopped.Load() {
		stop = nil
	}
	for {
		select {
		case <-done:
			return
		case <-stop: // while the last answers are awaited
			stop = nil
			timer.Reset(min(grace, afterStop))
			continue
		case <-timer.C:
		}
		break
	}
	r.givenUp.Store(true)
	giveUp()
}

// over tells whether nothing more is to be sent.
func (r *run) over() bool { return r.clock.now() >= r.window.end.Load() }

// started counts a push that is about to be sent.
func (r *run) started() { r.sentCount.Add(1) }

// ended counts a push for the last time.
func (r *run) ended(to *recorder, e *ended) {
	r.endedCount.Add(1)
	if e.code == codes.Canceled && r.givenUp.Load() {
		if r.window.has(e.due) {
			r.unfinished.Add(1)
		}
		return
	}
	to.record(e)
}

// unsent counts what a schedule still has within the window, from a push on.
func (r *run) unsent(s *schedule, due moment) {
	end, n := r.window.end.Load(), int64(0)
	for ; due < end; due = s.next() {
		if due >= r.window.begin {
			n++
		}
	}
	r.unsentCount.Add(n)
}

func (r *run) inFlight() int { return int(r.sentCount.Load() - r.endedCount.Load()) }

// dial connects to all addresses. What it returns is to be closed even with an error.
func dial(ctx context.Context, cfg *Config) ([]*grpc.ClientConn, error) {
	options := append([]grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{})),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: connectTimeout,
		}),
	}, cfg.DialOptions...)
	conns := make([]*grpc.ClientConn, 0, cfg.Connections)
	for i := range cfg.Connections {
		conn, err := grpc.NewClient(cfg.Addresses[i%len(cfg.Addresses)], options...)
		if err != nil {
			return conns, fmt.Errorf("address %q: %w", cfg.Addresses[i%len(cfg.Addresses)], err)
		}
		conns = append(conns, conn)
		conn.Connect()
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	for i, conn := range conns {
		if err := ready(ctx, conn); err != nil {
			return conns, fmt.Errorf("connect to %s: %w", cfg.Addresses[i%len(cfg.Addresses)], err)
		}
	}
	return conns, nil
}

// ready waits until a connection is up.
func ready(ctx context.Context, conn *grpc.ClientConn) error {
	for {
		state := conn.GetState()
		switch state {
		case connectivity.Ready:
			return nil
		case connectivity.Idle:
			conn.Connect()
		case connectivity.TransientFailure:
			return ErrUnreachable
		default: // on its way
		}
		if !conn.WaitForStateChange(ctx, state) {
			if errors.Is(ctx.Err(), context.Canceled) {
				return ErrNothingMeasured
			}
			return ErrUnreachable
		}
	}
}
