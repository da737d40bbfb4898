package roomlog

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/store"
)

// Config is what a Service needs. Logs is required.
type Config struct {
	Logs store.Logs
	// TailBytes is what all tails of rooms together may take. 0 means 32 MiB.
	TailBytes int

	// Logger gets faults of our own and of the store. Nil discards.
	Logger *slog.Logger
	// Metrics gets the counters. Nil: nobody sees them.
	Metrics *metrics.Set
}

// Defaults are what the zero fields of a Config stand for.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	if c.TailBytes == 0 {
		c.TailBytes = 32 << 20
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
	if c.Logs == nil {
		errs = append(errs, errors.New("room log config needs Logs"))
	}
	if c.TailBytes < tailBytes {
		errs = append(errs, fmt.Errorf("room log: TailBytes is %d, must be at least %d", c.TailBytes, tailBytes))
	}
	return errors.Join(errs...)
}

const (
	// readTimeout is how long a node waits for a page, and storeTimeout how long the store may take for an answer.
	readTimeout  = 2 * time.Second
	storeTimeout = 2 * time.Second
	// headsEvery is how often the store is asked for its epoch where nobody reads.
	headsEvery = 10 * time.Second
	// firstPause and lastPause bound the pause before the store is asked or followed again after an error.
	firstPause, lastPause = 100 * time.Millisecond, 5 * time.Second

	// maxReads bounds the reads that are open, some hundred bytes each.
	maxReads = 1 << 14
	// readers is how many calls of ReadLog there are at a time.
	readers = 16

	// pageMost and pageBytes bound a page.
	pageMost, pageBytes = 100, 256 << 10
)

// Errors that nodes hear.
var (
	errClosed   = errors.New("this instance stops")
	errBusy     = errors.New("too many reads")
	errLate     = errors.New("the log was not read in time")
	errInternal = errors.New("internal error")
)

var _ link.RoomLogs = (*Service)(nil)

// Service follows the logs and answers nodes. Its methods are safe for concurrent use.
type Service struct {
	// Static after New.
	cfg    Config
	meters *meters
	ctx    context.Context //nolint:containedctx // of all calls of the store; ends with Close
	cancel context.CancelFunc
	asked  chan struct{} // wakes heads; holds one token
	told   chan struct{} // wakes mark; holds one token

	goroutines sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu.
	closed  bool
	gen     *generation // nil until the store has been asked
	answers uint64      // of Heads
	streams map[link.LogAsker]*stream
	open    list.List // of *read, in the order in which they came
	fresh   []*read   // those of open that wait for Heads
}

// stream is one on which a node asks.
type stream struct {
	asker link.LogAsker // static

	// Guarded by Service.mu.
	reads  map[uint64]*read
	follow *following // nil: it does not follow
}

// New makes a Service. Its owner closes it, after the links and before the store.
func New(cfg Config) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	s := &Service{
		cfg: cfg, streams: map[link.LogAsker]*stream{},
		asked: make(chan struct{}, 1), told: make(chan struct{}, 1),
	}
	s.meters = newMeters(cfg.Metrics, s)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.goroutines.Go(s.heads)
	s.goroutines.Go(s.mark)
	return s, nil
}

// Close answers all reads with an error, and waits for what is under way or for ctx.
func (s *Service) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	var out []answer
	for at := s.open.Front(); at != nil; at = s.open.Front() {
		r, _ := at.Value.(*read)
		out = append(out, s.failLocked(r, resultRefused, errClosed))
	}
	s.mu.Unlock()
	s.cancel()
	send(out)
	done := make(chan struct{})
	go func() { // ends soon: whatever the goroutines wait for ends with s.ctx
		s.goroutines.Wait()
		close(done)
	}()
	defer s.meters.unregister()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("close room logs: %w", ctx.Err())
	}
}

// streamLocked returns the stream of a, and makes it.
func (s *Service) streamLocked(a link.LogAsker) *stream {
	st := s.streams[a]
	if st == nil {
		st = &stream{asker: a, reads: map[uint64]*read{}}
		s.streams[a] = st
	}
	return st
}

// Gone implements link.RoomLogs.
func (s *Service) Gone(a link.LogAsker) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streams[a]
	if st == nil {
		return
	}
	for _, r := range st.reads {
		s.endLocked(r, resultGone)
	}
	delete(s.streams, a)
}

// guard calls f, and has a panic in it as an error.
func (s *Service) guard(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			s.meters.panics.Inc()
			s.cfg.Logger.Error("panic in a room log", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
			err = errInternal
		}
	}()
	return f()
}

// locked calls f with the lock, which a panic gives back, too.
func (s *Service) locked(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// signal puts a token into wake.
func signal(wake chan struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}
