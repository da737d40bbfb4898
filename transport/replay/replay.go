package replay

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/store"
)

// Config is what a Service needs. Store and Start are required.
type Config struct {
	Store store.Store
	// Start is engine.Engine.Start. It is not called before the first Catchup or Replay.
	Start func(*engine.Push, engine.Completer) error

	// Concurrency is how many replays are worked on at a time. 0 means 64.
	Concurrency int
	// Page is how many messages of a replay are on their way at a time, at most. 0 means 100.
	Page int

	// Logger gets faults of our own and of the store. Nil discards.
	Logger *slog.Logger
	// Metrics gets the counters. Nil: nobody sees them.
	Metrics *metrics.Set
}

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its
// keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	if c.Concurrency == 0 {
		c.Concurrency = 64
	}
	if c.Page == 0 {
		c.Page = 100
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	if c.Store == nil || c.Start == nil {
		errs = append(errs, errors.New("replay config needs Store and Start"))
	}
	if c.Concurrency < 1 || c.Concurrency > 1024 {
		errs = append(errs, fmt.Errorf("replay: Concurrency is %d, must be between 1 and 1024", c.Concurrency))
	}
	if c.Page < 1 || c.Page > 1000 {
		errs = append(errs, fmt.Errorf("replay: Page is %d, must be between 1 and 1000", c.Page))
	}
	return errors.Join(errs...)
}

const (
	// storeTimeout is how long the store may take for an answer, and how long a replay may stand in line for its first
	// one: then the node opens the gate by itself.
	storeTimeout = 2 * time.Second
	// sendTimeout bounds each message on its way to the node.
	sendTimeout = 2 * time.Second
	// takenTimeout is how long a client may take nothing. It is far longer than a node lets a client that does
	// not acknowledge live, so it is for replays whose client has gone, which nobody says.
	takenTimeout = 30 * time.Second

	pageBytes = 256 << 10
	// lookMost is how many users one Any is for.
	lookMost = 1000
	// maxOpen bounds the replays that nodes have asked for: 64 MiB of them. Half of it is for one node, so that one does not take
	// the places of all.
	maxOpen = 1 << 18
	// maxCalls bounds the replays that Replay has begun.
	maxCalls = 4096
)

var _ link.Replayer = (*Service)(nil)

// Service does replays. Its methods are safe for concurrent use.
type Service struct {
	// Static after New.
	cfg    Config
	meters *meters
	ctx    context.Context //nolint:containedctx // of all calls of the store; ends with Close
	cancel context.CancelFunc

	goroutines sync.WaitGroup // workers and the sweeper

	mu sync.Mutex
	// Guarded by mu.
	closed  bool
	gates   map[link.Asker]map[uint64]*replay
	calls   map[*replay]struct{} // those of Replay
	open    int                  // replays of gates that are not forgotten, those of Gone too until they are
	fresh   list.List            // of *replay: asked for, not looked at
	ready   list.List            // with something to do
	waiting list.List            // for their clients, who has waited longest first
	looking bool                 // a worker asks for those in fresh
	workers int
}

// replay is one. It is in one of the lists of the service, or a worker has it.
type replay struct {
	// Static.
	asker  link.Asker // nil: of a call
	gate   uint64     // 0: of a call
	node   string
	user   string
	window int
	since  time.Time // it was asked for

	forgotten atomic.Bool // the user's messages are; what was read before is void
	gone      atomic.Bool // nobody waits for it any more

	// Guarded by Service.mu.
	in    *list.List // nil: a worker has it, or it has ended
	at    *list.Element
	ended bool
	call  chan<- answer // of a call that was not answered
	rests time.Time     // since when it waits for its client
	taken uint64        // the client has taken everything up to here

	// Guarded by Service.mu, written by the worker that has it only: places.
	sent      uint64 // of the last message that may be on its way
	delivered uint64 // of the last one that the node has taken, and all before it
	passed    uint64 // the same, with those that were passed over
	trimmed   uint64

	looked bool // the store has been asked; of whoever has it
}

// answer is what Replay is told.
type answer struct {
	messages int
	err      error
}

// New makes a Service. Its owner closes it, before the engine and the store.
func New(cfg Config) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	s := &Service{
		cfg: cfg, gates: map[link.Asker]map[uint64]*replay{}, calls: map[*replay]struct{}{},
	}
	s.meters = newMeters(cfg.Metrics, s)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.goroutines.Go(s.sweep)
	return s, nil
}

// Close ends all replays, with a reason, and waits for what is under way or for ctx.
func (s *Service) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	var open []*replay
	for _, gates := range s.gates {
		open = slices.AppendSeq(open, maps.Values(gates))
	}
	open = slices.AppendSeq(open, maps.Keys(s.calls))
	s.mu.Unlock()
	s.cancel()
	for _, r := range open {
		s.end(r, resultRefused, ErrClosed)
	}
	done := make(chan struct{})
	go func() { // ends soon: whatever the workers wait for has a deadline
		s.goroutines.Wait()
		close(done)
	}()
	defer s.meters.unregister()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("close replays: %w", ctx.Err())
	}
}

// Catchup implements link.Replayer.
func (s *Service) Catchup(a link.Asker, gate uint64, user string, window int) {
	if gate == 0 || ids.Check(user, ids.MaxScopedBytes) != nil {
		s.meters.violations.Inc()
		a.End(gate, 0, "no gate, or no user id")
		return
	}
	r := &replay{asker: a, gate: gate, node: a.Node(), user: user, window: max(window, 0), since: time.Now()}
	s.mu.Lock()
	gates := s.gates[a]
	var refused error
	switch {
	case s.closed:
		refused = ErrClosed
	case gates[gate] != nil:
		s.mu.Unlock()
		s.meters.violations.Inc() // its answer is on its way
		return
	case s.open >= maxOpen || len(gates) >= maxOpen/2:
		refused = ErrBusy
	default:
		if gates == nil {
			gates = map[uint64]*replay{}
			s.gates[a] = gates
		}
		gates[gate] = r
		s.open++
		s.putLocked(r, &s.fresh)
	}
	s.mu.Unlock()
	if refused != nil {
		s.meters.ended[resultRefused].Inc()
		a.End(gate, 0, refused.Error())
	}
}

// Taken implements link.Replayer.
func (s *Service) Taken(a link.Asker, gate, seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.gates[a][gate]
	switch {
	case r == nil: // it has ended
	case seq > r.sent:
		s.meters.violations.Inc()
	case seq > r.taken:
		r.taken = seq
		if r.in == &s.waiting {
			s.putLocked(r, &s.ready)
		}
	}
}

// Gone implements link.Replayer. What clients have taken is still trimmed.
func (s *Service) Gone(a link.Asker) {
	s.mu.Lock()
	defer s.mu.Unlock()
	gates := s.gates[a]
	delete(s.gates, a)
	for _, r := range gates {
		r.gone.Store(true)
		switch {
		case r.in == nil: // the worker sees it
		case r.trimmable() > 0:
			s.putLocked(r, &s.ready)
		default:
			s.forgetLocked(r)
		}
	}
	s.meters.ended[resultGone].Add(len(gates))
}

// trimmable is up to where there is something to trim, 0 for nothing: the node has said that it has handed it over, and
// the client has taken it.
func (r *replay) trimmable() uint64 {
	if to := min(r.taken, r.delivered); to > r.trimmed {
		return to
	}
	return 0
}

// putLocked moves r to a list, and sees that somebody works on it.
func (s *Service) putLocked(r *replay, to *list.List) {
	s.takeLocked(r)
	r.in, r.at = to, to.PushBack(r)
	work := s.ready.Len()
	if s.fresh.Len() > 0 && !s.looking {
		work++
	}
	if work > 0 && s.workers < s.cfg.Concurrency {
		s.workers++
		s.goroutines.Go(s.work)
	}
}

// takeLocked takes r out of its list.
func (s *Service) takeLocked(r *replay) {
	if r.in != nil {
		r.in.Remove(r.at)
		r.in, r.at = nil, nil
	}
}

// forgetLocked ends r. False means that it had ended.
func (s *Service) forgetLocked(r *replay) bool {
	if r.ended {
		return false
	}
	r.ended = true
	s.takeLocked(r)
	if r.asker == nil {
		delete(s.calls, r)
		return true
	}
	s.open--
	if gates := s.gates[r.asker]; gates[r.gate] == r {
		delete(gates, r.gate)
		if len(gates) == 0 {
			delete(s.gates, r.asker)
		}
	}
	return true
}

// end ends r and tells who has asked. Nil says that nothing more is stored.
func (s *Service) end(r *replay, how result, why error) {
	s.mu.Lock()
	ended, passed, call := s.forgetLocked(r), r.passed, r.call
	r.call = nil
	s.mu.Unlock()
	if call != nil {
		call <- answer{err: why}
	}
	if !ended || r.gone.Load() { // Gone has counted it
		return
	}
	s.meters.ended[how].Inc()
	if r.asker == nil {
		return
	}
	reason := ""
	if why != nil {
		reason = why.Error()
	}
	r.asker.End(r.gate, passed, reason)
}

// sweep ends replays whose clients take nothing.
func (s *Service) sweep() {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-s.ctx.Done():
			return
		}
		for r := s.overdue(); r != nil; r = s.overdue() {
			s.end(r, resultUntaken, errUntaken)
		}
	}
}

// overdue takes a replay whose client takes nothing, nil for none.
func (s *Service) overdue() *replay {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting.Len() == 0 {
		return nil
	}
	if r, _ := s.waiting.Front().Value.(*replay); time.Since(r.rests) < takenTimeout {
		return nil
	}
	return s.frontLocked(&s.waiting)
}
