package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/shard"
)

// Config is what an Engine needs. Shards, Directory and Network are required.
type Config struct {
	Shards    *shard.Set
	Directory *route.Directory
	Network   Network
	// Spool keeps what pushes with Options.Store did not deliver. Nil: there are no such pushes.
	Spool  Spool
	Limits Limits
	// Timeout bounds every push, whatever its caller asks for. 0 means 5 s.
	Timeout time.Duration
	// MaxInFlight bounds the pushes that are not finished, and with them all that
	// may wait for look-ups. 0 means 131,072. Priority.Share says how much of it is for
	// pushes of a priority.
	MaxInFlight int
	// MaxAsync bounds the pushes with Options.Async whose receipts are not final. 0 means
	// 100,000.
	MaxAsync int
	// Logger gets faults of our own, never a payload. Nil discards.
	Logger *slog.Logger
}

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its
// keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	c.Limits = c.Limits.withDefaults()
	if c.Timeout == 0 {
		c.Timeout = 5 * time.Second
	}
	if c.MaxInFlight == 0 {
		c.MaxInFlight = 1 << 17
	}
	if c.MaxAsync == 0 {
		c.MaxAsync = 100_000
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.Shards == nil || c.Directory == nil || c.Network == nil {
		errs = append(errs, errors.New("engine config needs Shards, Directory and Network"))
	}
	if c.Timeout < 0 {
		errs = append(errs, fmt.Errorf("engine timeout %s is negative", c.Timeout))
	}
	if c.MaxInFlight < 0 {
		errs = append(errs, fmt.Errorf("engine in-flight limit %d is negative", c.MaxInFlight))
	}
	if c.MaxAsync < 0 {
		errs = append(errs, fmt.Errorf("engine async limit %d is negative", c.MaxAsync))
	}
	return errors.Join(append(errs, c.Limits.Validate())...)
}

// Engine takes pushes. It has no goroutines but for its backlogs, while there is something in them.
type Engine struct {
	// Static after New.
	shards    *shard.Set
	directory *route.Directory
	network   Network
	spool     Spool
	limits    Limits
	timeout   time.Duration
	logger    *slog.Logger

	// Safe for concurrent use.
	gate     gate
	async    asyncs
	shed     atomic.Int32 // priorities, from the lowest
	heals    atomic.Uint64
	fences   atomic.Uint64 // deliveries that were held back
	fenced   atomic.Int64  // that are
	stale    atomic.Uint64 // pushes by a stale answer
	changed  atomic.Uint64 // by one known to have changed
	panics   atomic.Uint64
	receipts atomic.Int64 // deliveries that wait for some
	lanes    []lane       // by shard
	waiters  sync.Pool    // of *waiter
}

// lane is what an engine has for one shard.
type lane struct {
	backlog backlog
	ended   [reasons]atomic.Uint64 // deliveries, by their reason

	_ [64]byte // shards do not share a cache line
}

// backlog is the work that settled deliveries have brought about: heals, and what a fence
// held back. One goroutine does what there is for a shard, in the order of coming. Each task
// belongs to a delivery of a push in flight, and has a recover of its own.
// Drain waits for those pushes.
type backlog struct {
	length atomic.Int64 // tasks that have not ended

	mu sync.Mutex
	// Guarded by mu.
	tasks   []func()
	running bool
}

// offload has task run behind what there is for a shard. Whoever settles a delivery, such as
// the reader of a node's acks, goes on at once: it neither looks up nor sends for other pushes.
// The tasks wait for nothing, so they take no place in the shard's pool from the look-ups.
func (e *Engine) offload(shard int, task func()) {
	b := &e.lanes[shard].backlog
	b.mu.Lock()
	defer b.mu.Unlock()
	b.length.Add(1)
	b.tasks = append(b.tasks, task)
	if !b.running {
		b.running = true
		go b.run() // until nothing is left
	}
}

func (b *backlog) run() {
	b.mu.Lock()
	for len(b.tasks) > 0 {
		tasks := b.tasks
		b.tasks = nil
		b.mu.Unlock()
		for _, task := range tasks {
			task()
			b.length.Add(-1)
		}
		b.mu.Lock()
	}
	b.running = false
	b.mu.Unlock()
}

// New makes an engine over parts that its owner starts before and stops after it.
func New(config Config) (*Engine, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	config = config.withDefaults()
	config.Limits.store = config.Spool != nil
	return &Engine{
		shards: config.Shards, directory: config.Directory, network: config.Network, spool: config.Spool,
		limits: config.Limits, timeout: config.Timeout, gate: gate{most: bounds(config.MaxInFlight), idle: make(chan struct{}, 1)},
		async:  asyncs{most: config.MaxAsync, idle: make(chan struct{}, 1), open: make(map[*lasting]struct{})},
		logger: config.Logger, lanes: make([]lane, config.Shards.Len()),
	}, nil
}

// Limits returns the limits in force, for those who can refuse earlier.
func (e *Engine) Limits() Limits { return e.limits }

// Timeout is the longest that any push takes, from when it has arrived.
func (e *Engine) Timeout() time.Duration { return e.timeout }

// Do pushes and waits for the account. It returns by the context's deadline or the
// engine's timeout, whichever is first. An error means that nothing was written.
func (e *Engine) Do(ctx context.Context, p *Push) (Result, error) {
	if err := ctx.Err(); err != nil {
		return Result{}, causeOf(err)
	}
	if p.Arrived.IsZero() {
		p.Arrived = time.Now()
	}
	if deadline, ok := ctx.Deadline(); ok {
		p.Timeout = max(deadline.Sub(p.Arrived), 1)
	}
	w, _ := e.waiters.Get().(*waiter)
	if w == nil {
		w = &waiter{done: make(chan struct{}, 1)}
	}
	if err := e.Start(p, w); err != nil {
		e.waiters.Put(w)
		return Result{}, err
	}
	select {
	case <-w.done:
	case <-ctx.Done():
		p.expire(causeOf(ctx.Err()))
		<-w.done
	}
	e.waiters.Put(w) // told, so nobody has it any more
	return p.Result()
}

func causeOf(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return ErrDeadline
	}
	return ErrCanceled
}

// waiter wakes the goroutine that waits in Do.
type waiter struct{ done chan struct{} }

func (w *waiter) Complete(*Push) { w.done <- struct{}{} }

// Start pushes without waiting. An error means that the push was not taken:
// nothing was written and c is not called. Otherwise c.Complete(p) is called
// exactly once, possibly before Start returns.
func (e *Engine) Start(p *Push, c Completer) error {
	if err := e.check(p); err != nil {
		return err
	}
	room := e.gate.enter(p.Priority) // before the look at closed: so Drain sees the push, or it sees that
	if closed := e.gate.closed.Load(); closed || !room {
		e.gate.leave()
		if closed {
			return ErrDraining
		}
		return ErrInFlight
	}
	p.engine, p.done = e, c
	if p.Arrived.IsZero() {
		p.Arrived = time.Now()
	}
	timeout := e.timeout
	if p.Timeout > 0 {
		timeout = min(timeout, p.Timeout)
	}
	p.deadline = p.Arrived.Add(timeout)
	if p.Kind == ToRooms {
		p.enterRooms()
	}
	if p.Options != nil {
		p.begin(timeout)
		if p.Options.Async && !e.async.enter(p.lasting) {
			p.lasting = nil
			e.gate.leave()
			return ErrAsync
		}
	}
	p.pending.Store(1)
	defer func() {
		if v := recover(); v != nil {
			e.panicked(p, v)
		}
		p.settled(1)
	}()
	p.route()
	if p.waits {
		p.mu.Lock()
		waits := p.slow.waiting > 0 || p.slow.holds
		p.mu.Unlock()
		if waits {
			p.bound()
		}
	}
	return nil
}

// check refuses a push that cannot be made, however little there is to do.
func (e *Engine) check(p *Push) error {
	if err := e.limits.Check(&p.Request); err != nil {
		return err
	}
	if p.Scope != "" && p.Kind == ToAll && slices.ContainsFunc(e.network.Links(0), func(l Link) bool { return !l.Scopes() }) {
		return ErrUnscoped
	}
	return nil
}

// panicked ends a push after a fault of our own while it was routed: whatever is
// not settled is counted as failed or unknown, and nobody waits for ever.
func (e *Engine) panicked(p *Push, v any) {
	e.panics.Add(1)
	e.logger.Error("panic while a push was routed", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
	p.expire(ErrInternal)
}

// Shed makes Admit refuse pushes of so many priorities, from the lowest, with ErrMemory
// from now on. Those that were admitted go on.
func (e *Engine) Shed(priorities int) { e.shed.Store(int32(priorities)) }

// InFlight is the number of pushes that are not finished.
func (e *Engine) InFlight() int64 { return e.gate.inside() }

// Admit tells whether a push of priority p is to be taken now: whoever takes requests asks
// before it takes one apart. Of its reasons Start knows only the places in flight. The
// error is an ErrOverloaded.
func (e *Engine) Admit(p Priority) error {
	if p.Rank() < int(e.shed.Load()) {
		return ErrMemory
	}
	if !e.gate.room(p) {
		return ErrInFlight
	}
	return nil
}

// Drain refuses new pushes with ErrDraining and waits until those in flight are
// finished and the receipts of Async ones are final, or ctx ends. Shortly before that receipts
// are not waited for any longer.
func (e *Engine) Drain(ctx context.Context) error {
	e.gate.closed.Store(true)
	for e.gate.inside() > 0 {
		select {
		case <-e.gate.idle:
			e.gate.tellIdle() // whoever else drains
		case <-ctx.Done():
			e.async.each((*lasting).abandon)
			return fmt.Errorf("drain with %d pushes in flight: %w", e.gate.inside(), ctx.Err())
		}
	}
	return e.async.drain(ctx)
}

// Stats is a reading of the engine's counters.
type Stats struct {
	InFlight int64
	Panics   uint64
	// Heals counts deliveries whose users were looked up again.
	Heals uint64
	// Fences counts deliveries that were held back to keep the order of an Order,
	// Fenced is how many are.
	Fences uint64
	Fenced int64
	// Backlog is how many heals and deliveries that were held back wait for their shard.
	Backlog int64
	// Stale counts pushes by an answer that the Controller could not confirm, Changed
	// those of them where it was known to be true no more.
	Stale, Changed uint64
	// Async is how many Async pushes have receipts that are not final, Receipts how many
	// deliveries of any push wait for some.
	Async    int
	Receipts int64
	// Deliveries counts ended deliveries by the text of their reason; "sent" are
	// those that were acknowledged.
	Deliveries map[string]uint64
	Directory  route.Stats
	Shards     []shard.Stats
}

// Stats reads the counters of the engine and the parts below it.
func (e *Engine) Stats() Stats {
	s := Stats{
		InFlight: e.gate.inside(), Heals: e.heals.Load(), Fences: e.fences.Load(), Fenced: e.fenced.Load(),
		Changed: e.changed.Load(), Stale: e.stale.Load(), Panics: e.panics.Load(),
		Async: e.async.len(), Receipts: e.receipts.Load(),
		Deliveries: make(map[string]uint64, reasons), Directory: e.directory.Stats(),
	}
	for i := range e.lanes {
		s.Backlog += e.lanes[i].backlog.length.Load()
		for r := range e.lanes[i].ended {
			s.Deliveries[Reason(r).String()] += e.lanes[i].ended[r].Load()
		}
		s.Shards = append(s.Shards, e.shards.At(i).Stats())
	}
	return s
}
