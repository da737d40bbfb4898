package shard

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync/atomic"

	"github.com/panjf2000/ants/v2"
)

// ErrFull means that a shard's pool has no free goroutine.
var ErrFull = errors.New("shard pool is full")

// ErrClosed means that the set has been closed.
var ErrClosed = errors.New("shard pool is closed")

// MaxCount bounds Config.Count: every shard keeps a stream to every node.
const MaxCount = 256

// Config sizes a Set. The zero value works.
type Config struct {
	// Count of shards. 0 means one for every two cores: each shard keeps a stream to
	// every node, and fewer streams have fuller frames. On two cores one shard costs a
	// tenth less CPU per push than two, and half the writes.
	Count int
	// PoolSize bounds the goroutines of each shard that may block at one time.
	// 0 means 256: with look-ups of a millisecond that is 256,000 a second.
	PoolSize int
	// Logger gets a line for each task that panicked. Nil discards.
	Logger *slog.Logger
}

// DefaultCount is the number of shards that suits this machine.
func DefaultCount() int { return min(max(runtime.GOMAXPROCS(0)/2, 1), MaxCount) }

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its
// keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	if c.Count == 0 {
		c.Count = DefaultCount()
	}
	if c.PoolSize == 0 {
		c.PoolSize = 256
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.Count < 0 || c.Count > MaxCount {
		errs = append(errs, fmt.Errorf("shard count %d is not in 0..%d", c.Count, MaxCount))
	}
	if c.PoolSize < 0 {
		errs = append(errs, fmt.Errorf("shard pool size %d is negative", c.PoolSize))
	}
	return errors.Join(errs...)
}

// Set is a fixed number of shards.
type Set struct {
	seed   maphash.Seed
	shards []*Shard
}

// Shard is one lane.
type Shard struct {
	// Static after New.
	index  int
	pool   *ants.Pool
	logger *slog.Logger

	// Safe for concurrent use.
	rejected atomic.Uint64
	panics   atomic.Uint64
}

// New makes a set of shards. Close ends it.
func New(config Config) (*Set, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	config = config.withDefaults()
	s := &Set{seed: maphash.MakeSeed(), shards: make([]*Shard, config.Count)}
	for i := range s.shards {
		sh := &Shard{index: i, logger: config.Logger}
		pool, err := ants.NewPool(config.PoolSize, ants.WithNonblocking(true), ants.WithPanicHandler(sh.onPanic))
		if err != nil {
			return nil, fmt.Errorf("make pool of shard %d: %w", i, err)
		}
		sh.pool = pool
		s.shards[i] = sh
	}
	return s, nil
}

// Len is the number of shards.
func (s *Set) Len() int { return len(s.shards) }

// At returns shard i, 0 <= i < Len.
func (s *Set) At(i int) *Shard { return s.shards[i] }

// Hash is what the shard of key follows from, see Index.
func (s *Set) Hash(key string) uint64 { return maphash.String(s.seed, key) }

// Index is the number of the shard of the keys with a hash.
func (s *Set) Index(hash uint64) int { return int(hash % uint64(len(s.shards))) }

// For returns the shard of key.
func (s *Set) For(key string) *Shard { return s.shards[s.Index(s.Hash(key))] }

// Close refuses new tasks and waits for those that run, at most until ctx ends.
func (s *Set) Close(ctx context.Context) error {
	var errs []error
	for _, sh := range s.shards {
		if err := sh.pool.ReleaseContext(ctx); err != nil && !errors.Is(err, ants.ErrPoolClosed) {
			errs = append(errs, fmt.Errorf("close pool of shard %d: %w", sh.index, err))
		}
	}
	return errors.Join(errs...)
}

// Index is the shard's number in its set.
func (s *Shard) Index() int { return s.index }

// Go runs task on a goroutine of the shard's pool. It never blocks: ErrFull
// means that the pool is at its bound, ErrClosed that the set is closed; task is
// then not run. A task that owes something settles it in a deferred call, since
// a panic ends it.
func (s *Shard) Go(task func()) error {
	switch err := s.pool.Submit(task); {
	case err == nil:
		return nil
	case errors.Is(err, ants.ErrPoolOverload):
		s.rejected.Add(1)
		return ErrFull
	case errors.Is(err, ants.ErrPoolClosed):
		return ErrClosed
	default:
		return fmt.Errorf("submit to shard %d: %w", s.index, err)
	}
}

func (s *Shard) onPanic(v any) {
	s.panics.Add(1)
	s.logger.Error("task panicked", "shard", s.index, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
}

// Stats is a reading of one shard's pool.
type Stats struct {
	Running  int    // goroutines of the pool, idle ones included
	Limit    int    // their bound
	Rejected uint64 // tasks refused because the pool was full
	Panics   uint64 // tasks that panicked
}

// Stats reads the pool.
func (s *Shard) Stats() Stats {
	return Stats{Running: s.pool.Running(), Limit: s.pool.Cap(), Rejected: s.rejected.Load(), Panics: s.panics.Load()}
}
