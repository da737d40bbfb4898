package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
)

// SpoolConfig is what a Spool needs. Store and Usage must be set; zero values of the rest stand for the defaults.
type SpoolConfig struct {
	Store Store
	// Usage asks the part of the store behind a lane how many bytes it keeps. It is also how one that has failed is found
	// to be back.
	Usage func(ctx context.Context, lane int) (int64, error)
	// Lanes is the number of queues, and Lane that of a user, which must not change: what is stored for a user is stored
	// in order. A lane whose part of the store does not answer keeps no other waiting. Default 1.
	Lanes int
	Lane  func(user string) int

	// Logs are those of rooms, with lanes of their own, as many, chosen by Logs.Partition: where the logs do not answer, users do
	// not wait, and the other way round. nil: AppendLog refuses.
	Logs Logs
	// LogUsage is Usage for the lanes of rooms. nil: Logs.Heads tells whether they are there.
	LogUsage func(ctx context.Context, lane int) (int64, error)

	// TTL is that of messages without one, MaxTTL the longest of any. Default 24 h and 168 h.
	TTL, MaxTTL time.Duration
	// QueueBytes and QueueLen bound what waits in all lanes, or is being stored. Each user of a message counts, and its
	// payload once for all of them; a message to a room counts as one user, and with its Exclude. Default 16 MiB, 65,536.
	QueueBytes, QueueLen int
	// MaxBytes is how much the store may keep for users. It is shown beside what it keeps. 0: not known.
	MaxBytes int

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

func (c SpoolConfig) withDefaults() SpoolConfig {
	defaultTo(&c.Lanes, 1)
	defaultTo(&c.TTL, 24*time.Hour)
	defaultTo(&c.MaxTTL, 168*time.Hour)
	defaultTo(&c.QueueBytes, 16<<20)
	defaultTo(&c.QueueLen, 64<<10)
	if c.Lane == nil {
		c.Lane = func(string) int { return 0 }
	}
	if c.LogUsage == nil {
		c.LogUsage = func(ctx context.Context, _ int) (int64, error) {
			_, _, err := c.Logs.Heads(ctx)
			return 0, err
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

func defaultTo[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

const (
	// entryBytes is what an entry costs beside the payload that all users of a message share.
	entryBytes = 128
	// stringBytes is what a string costs beside its bytes.
	stringBytes = 16
	// maxBatch and maxBatchBytes bound one call of Append, so that a second is enough for it.
	maxBatch      = 500
	maxBatchBytes = 4 << 20
	// answerTimeout is how long a store may take for one batch: then it counts as not reachable.
	answerTimeout = time.Second
	// slowBatch and fastBatch have batches halved or doubled: a store that writes each message to a slow disk needs small ones.
	slowBatch = 300 * time.Millisecond
	fastBatch = 60 * time.Millisecond
	// maxFailures is how often a lane fails before it refuses what comes, until a probe succeeds.
	maxFailures = 3
	// probeInterval is the pause between two probes of a lane that refuses what comes, usageInterval that of others.
	probeInterval = time.Second
	usageInterval = 5 * time.Second
)

// errBusy and errClosed are engine.ErrSpoolDown with the reason.
var (
	errBusy   = spoolError("cannot keep up")
	errClosed = spoolError("is closing")
	errLate   = spoolError("did not answer in time")
)

type spoolError string

func (e spoolError) Error() string { return string(e) }
func (spoolError) Unwrap() error   { return engine.ErrSpoolDown }

// Spool is an engine.Spool in front of a Store and of Logs: bounded queues, each of whose loops stores batches.
//
// Invariants:
//
//   - Append and AppendLog never wait. What does not fit into the queue is refused at once.
//   - done is called once for each call, by its deadline. Whoever is not stored by then gets an error, although the
//     store may have the message after all.
//   - For each user and for each room messages are stored in the order of the calls.
//   - A lane of the store that has failed three times, or not answered for a second, refuses at once. It is probed each second.
type Spool struct {
	// Static after NewSpool.
	cfg   SpoolConfig
	users []*lane
	rooms []*lane // none without Logs
	all   []*lane // both
	m     spoolMetrics
	stop  context.CancelFunc // ends what is under way
	wg    sync.WaitGroup

	mu     sync.Mutex
	closed bool // guarded by mu
	bytes  int  // in all lanes, guarded by mu
	length int
	idle   chan struct{} // closed when nothing is left, of a Spool that is closed
}

var _ engine.Spool = (*Spool)(nil)

// lane is a queue and the state of the part of the store behind it.
type lane struct {
	// Static after NewSpool.
	index  int
	of     string // "users" or "rooms"
	append func(ctx context.Context, batch []item) ([]engine.Place, []error)
	probe  func(ctx context.Context, lane int) (int64, error)
	wake   chan struct{} // has room for one

	usage atomic.Int64 // bytes kept, as of the last probe

	queue    []item // guarded by Spool.mu
	failures int    // in a row, guarded by Spool.mu; maxFailures: it is down
}

// item is one user of a message, or its room.
type item struct {
	call *call
	at   int // in call.users
}

// call is one Append or AppendLog. The latter has one item.
type call struct {
	message *engine.Stored
	users   []string // nil for AppendLog
	size    int      // of message
	expires time.Time
	timer   *time.Timer

	queued int // of items, which wait or are being stored; guarded by Spool.mu

	mu      sync.Mutex
	results []engine.Spooled // guarded by mu
	place   engine.Place     // of AppendLog, guarded by mu
	left    int              // guarded by mu; 0: done was called
	done    func([]engine.Spooled)
}

type spoolMetrics struct {
	stored, quota, full, down, refused, late *metrics.Counter
	seconds                                  *metrics.PrometheusHistogram
}

// NewSpool starts a Spool. Lanes whose part of the store does not answer within ctx, or a second, begin by refusing what comes.
func NewSpool(ctx context.Context, cfg SpoolConfig) (*Spool, error) {
	if cfg.Store == nil || cfg.Usage == nil {
		return nil, errors.New("spool: Store or Usage is nil")
	}
	cfg = cfg.withDefaults()
	result := func(name string) *metrics.Counter {
		return cfg.Metrics.GetOrCreateCounter(`push_manager_store_append_total{result="` + name + `"}`)
	}
	s := &Spool{cfg: cfg, idle: make(chan struct{}), m: spoolMetrics{
		stored: result("stored"), quota: result("quota"), full: result("full"), down: result("down"), refused: result("refused"), late: result("late"),
		seconds: cfg.Metrics.GetOrCreatePrometheusHistogramExt("push_manager_store_append_seconds", []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}),
	}}
	for i := range cfg.Lanes {
		s.users = append(s.users, &lane{index: i, of: "users", append: s.appendUsers, probe: cfg.Usage, wake: make(chan struct{}, 1)})
		if cfg.Logs != nil {
			s.rooms = append(s.rooms, &lane{index: i, of: "rooms", append: s.appendRooms, probe: cfg.LogUsage, wake: make(chan struct{}, 1)})
		}
	}
	s.all = slices.Concat(s.users, s.rooms)
	var silent sync.Once // of several lanes
	for _, l := range s.all {
		s.wg.Go(func() {
			try, cancel := context.WithTimeout(ctx, answerTimeout)
			defer cancel()
			usage, err := l.probe(try, l.index)
			if l.usage.Store(usage); err != nil {
				l.failures = maxFailures
				silent.Do(func() {
					cfg.Logger.Warn("store: does not answer; nothing is stored until it does", "for", l.of, "err", err)
				})
			}
		})
	}
	s.wg.Wait()
	var running context.Context
	running, s.stop = context.WithCancel(context.Background())
	for _, l := range s.all {
		s.wg.Go(func() { s.loop(running, l) })
		s.wg.Go(func() { s.probeLoop(running, l) })
	}
	gauge := func(name string, value func() float64) { cfg.Metrics.GetOrCreateGauge(name, value) }
	gauge("push_manager_store_queue_bytes", func() float64 { bytes, _ := s.queued(); return float64(bytes) })
	gauge("push_manager_store_queue_entries", func() float64 { _, n := s.queued(); return float64(n) })
	gauge("push_manager_store_bytes", func() float64 { return usage(s.users) })
	if cfg.Logs != nil {
		gauge("push_manager_store_log_bytes", func() float64 { return usage(s.rooms) })
	}
	gauge("push_manager_store_max_bytes", func() float64 { return float64(cfg.MaxBytes) })
	gauge("push_manager_store_up", func() float64 {
		if s.Up() {
			return 1
		}
		return 0
	})
	return s, nil
}

func usage(lanes []*lane) float64 {
	sum := int64(0)
	for _, l := range lanes {
		sum += l.usage.Load()
	}
	return float64(sum)
}

// Up tells whether no lane refuses what comes.
func (s *Spool) Up() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !slices.ContainsFunc(s.all, func(l *lane) bool { return l.failures >= maxFailures })
}

func (s *Spool) queued() (bytes, length int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes, s.length
}

// Append implements engine.Spool.
func (s *Spool) Append(m *engine.Stored, users []string, deadline time.Time, done func([]engine.Spooled)) {
	if len(users) == 0 {
		done(nil)
		return
	}
	c := &call{message: m, users: users, results: make([]engine.Spooled, len(users)), left: len(users), done: done}
	s.enqueue(c, deadline, func(i int) *lane { return s.users[s.cfg.Lane(users[i])%len(s.users)] })
}

// AppendLog implements engine.Spool.
func (s *Spool) AppendLog(m *engine.Stored, deadline time.Time, done func(engine.Place, error)) {
	if s.cfg.Logs == nil {
		s.count(engine.ErrSpoolDown)
		done(engine.Place{}, engine.ErrSpoolDown)
		return
	}
	c := &call{message: m, results: make([]engine.Spooled, 1), left: 1}
	c.done = func(r []engine.Spooled) {
		if err := r[0].Err; err != nil {
			done(engine.Place{}, err)
			return
		}
		done(c.place, nil)
	}
	s.enqueue(c, deadline, func(int) *lane { return s.rooms[s.cfg.Logs.Partition(m.Room)%len(s.rooms)] })
}

// enqueue puts each item of a call into its lane, or refuses it.
func (s *Spool) enqueue(c *call, deadline time.Time, laneOf func(i int) *lane) {
	now := time.Now()
	c.size = len(c.message.Payload)
	for _, user := range c.message.Exclude {
		c.size += len(user) + stringBytes
	}
	if c.expires = c.message.Expires; c.expires.IsZero() {
		c.expires = now.Add(s.cfg.TTL)
	}
	if most := now.Add(s.cfg.MaxTTL); c.expires.After(most) {
		c.expires = most
	}
	refused := make([]error, len(c.results)) // answered without the lock
	c.timer = time.AfterFunc(deadline.Sub(now), func() { s.expire(c) })
	s.mu.Lock()
	for i := range refused {
		l := laneOf(i)
		switch {
		case s.closed:
			refused[i] = errClosed
		case l.failures >= maxFailures:
			refused[i] = engine.ErrSpoolDown
		case s.bytes+c.costLocked() > s.cfg.QueueBytes || s.length >= s.cfg.QueueLen:
			refused[i] = errBusy
		default:
			s.bytes, s.length = s.bytes+c.costLocked(), s.length+1
			c.queued++
			l.queue = append(l.queue, item{c, i})
			l.signal()
		}
	}
	s.mu.Unlock()
	for i, err := range refused {
		if err != nil {
			s.settle(item{c, i}, engine.Place{}, err)
		}
	}
}

func (l *lane) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// settle notes what became of an item, and calls done after the last one.
func (s *Spool) settle(it item, place engine.Place, err error) {
	c := it.call
	c.mu.Lock()
	if c.left == 0 { // its deadline has passed
		c.mu.Unlock()
		return
	}
	c.results[it.at], c.place = engine.Spooled{Seq: place.Seq, Err: err}, place
	c.left--
	last := c.left == 0
	c.mu.Unlock()
	s.count(err)
	if last {
		c.timer.Stop()
		c.done(c.results)
	}
}

// expire ends a call at its deadline. Items that are left in a queue are skipped there.
func (s *Spool) expire(c *call) {
	c.mu.Lock()
	left := c.left
	c.left = 0
	if left > 0 {
		for i := range c.results {
			if r := &c.results[i]; r.Err == nil && r.Seq == 0 { // every place is above 0
				r.Err = errLate
				s.count(errLate)
			}
		}
	}
	c.mu.Unlock()
	if left > 0 {
		c.done(c.results)
	}
}

func (c *call) expired() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.left == 0
}

func (s *Spool) count(err error) {
	switch {
	case err == nil:
		s.m.stored.Inc()
	case errors.Is(err, engine.ErrSpoolQuota):
		s.m.quota.Inc()
	case errors.Is(err, engine.ErrSpoolFull):
		s.m.full.Inc()
	case errors.Is(err, errLate):
		s.m.late.Inc()
	case errors.Is(err, errBusy):
		s.m.refused.Inc()
	default:
		s.m.down.Inc()
	}
}

// loop stores what comes into a lane, batch by batch.
func (s *Spool) loop(ctx context.Context, l *lane) {
	for most := maxBatch; ; {
		batch := s.take(l, most)
		if len(batch) == 0 {
			select {
			case <-l.wake:
				continue
			case <-ctx.Done():
				return
			}
		}
		switch took := s.store(ctx, l, batch); {
		case took > slowBatch:
			most = max(most/2, 1)
		case took < fastBatch:
			most = min(most*2, maxBatch)
		}
	}
}

// take takes the next items out of a lane. Those whose time is over are left out.
func (s *Spool) take(l *lane, most int) []item {
	s.mu.Lock()
	defer s.mu.Unlock()
	var batch []item
	taken, size := 0, 0
	for _, it := range l.queue {
		if len(batch) == most || size > 0 && size+it.call.size > maxBatchBytes {
			break
		}
		taken++
		if it.call.expired() {
			s.freeLocked(it)
			continue
		}
		batch, size = append(batch, it), size+it.call.size
	}
	clear(l.queue[:taken])
	if l.queue = l.queue[taken:]; len(l.queue) == 0 {
		l.queue = nil
	}
	return batch
}

// costLocked is what one more user costs: the first one brings the payload.
func (c *call) costLocked() int {
	if c.queued > 0 {
		return entryBytes
	}
	return entryBytes + c.size
}

func (s *Spool) freeLocked(it item) {
	it.call.queued--
	s.bytes, s.length = s.bytes-it.call.costLocked(), s.length-1
	if s.closed && s.length == 0 {
		close(s.idle)
	}
}

// appendUsers stores a batch of a lane of users.
func (s *Spool) appendUsers(ctx context.Context, batch []item) ([]engine.Place, []error) {
	entries, places := make([]Entry, len(batch)), make([]engine.Place, len(batch))
	for i, it := range batch {
		entries[i] = Entry{User: it.call.users[it.at], Message: it.call.message, Expires: it.call.expires}
	}
	errs := s.cfg.Store.Append(ctx, entries)
	for i := range entries {
		places[i].Seq = entries[i].Seq
	}
	return places, errs
}

// appendRooms stores a batch of a lane of rooms.
func (s *Spool) appendRooms(ctx context.Context, batch []item) ([]engine.Place, []error) {
	entries, places := make([]LogEntry, len(batch)), make([]engine.Place, len(batch))
	for i, it := range batch {
		entries[i] = LogEntry{Message: it.call.message, Expires: it.call.expires}
	}
	errs := s.cfg.Logs.AppendLog(ctx, entries)
	for i := range entries {
		places[i] = entries[i].Place
	}
	return places, errs
}

// store stores a batch and answers for it.
func (s *Spool) store(ctx context.Context, l *lane, batch []item) (took time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	began := time.Now()
	places, errs := l.append(ctx, batch)
	took = time.Since(began)
	s.m.seconds.Update(took.Seconds())
	failed := 0
	for _, err := range errs {
		if errors.Is(err, engine.ErrSpoolDown) {
			failed++
		}
	}
	s.mu.Lock()
	for _, it := range batch {
		s.freeLocked(it)
	}
	was := l.failures
	switch {
	case failed > 0 && took >= answerTimeout:
		l.failures = maxFailures
	case failed == len(batch):
		l.failures = min(l.failures+1, maxFailures)
	default: // it answers, even if it does not like something
		l.failures = 0
	}
	var abandoned []item // what waits behind it would wait for as long
	broken := l.failures >= maxFailures
	if broken {
		abandoned, l.queue = l.queue, nil
		for _, it := range abandoned {
			s.freeLocked(it)
		}
	}
	s.mu.Unlock()
	if broken && was < maxFailures {
		s.cfg.Logger.Warn("store: does not answer; nothing is stored until it does", "for", l.of, "err", errors.Join(firstDown(errs), context.Cause(ctx)))
	}
	for i, it := range batch {
		s.settle(it, places[i], plain(errs[i]))
	}
	for _, it := range abandoned {
		s.settle(it, engine.Place{}, engine.ErrSpoolDown)
	}
	return took
}

// plain is an error as callers of pushes may see it. Why a store cannot be reached is for the log.
func plain(err error) error {
	if errors.Is(err, engine.ErrSpoolDown) {
		return engine.ErrSpoolDown
	}
	return err
}

func firstDown(errs []error) error {
	for _, err := range errs {
		if errors.Is(err, engine.ErrSpoolDown) {
			return err
		}
	}
	return nil
}

// probeLoop keeps asking the part of the store behind a lane for what it keeps.
func (s *Spool) probeLoop(ctx context.Context, l *lane) {
	tick := time.NewTicker(probeInterval)
	defer tick.Stop()
	for last := time.Now(); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if s.refuses(l) || time.Since(last) >= usageInterval {
			last = time.Now()
			s.ask(ctx, l)
		}
	}
}

func (s *Spool) refuses(l *lane) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return l.failures >= maxFailures
}

// ask probes once. A lane that has refused what comes goes on when there is an answer; one more failure is enough then.
func (s *Spool) ask(ctx context.Context, l *lane) {
	try, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	usage, err := l.probe(try, l.index)
	if err != nil && ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	was := l.failures
	switch {
	case err == nil:
		l.usage.Store(usage)
		l.failures = min(l.failures, maxFailures-1)
	case len(l.queue) == 0: // or Append finds out
		l.failures = min(l.failures+1, maxFailures)
	}
	now := l.failures
	s.mu.Unlock()
	switch {
	case was < maxFailures && now >= maxFailures:
		s.cfg.Logger.Warn("store: does not answer; nothing is stored until it does", "for", l.of, "err", err)
	case was >= maxFailures && now < maxFailures:
		s.cfg.Logger.Info("store: answers", "for", l.of)
	}
}

// Close refuses what comes, waits until what is in the queues is stored, and ends the Spool. At the end of ctx the rest
// is refused.
func (s *Spool) Close(ctx context.Context) error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		if s.length == 0 {
			close(s.idle)
		}
	}
	s.mu.Unlock()
	var err error
	select {
	case <-s.idle:
	case <-ctx.Done():
		err = fmt.Errorf("store: messages were not stored in time: %w", context.Cause(ctx))
	}
	s.stop()
	s.wg.Wait()
	s.mu.Lock()
	var rest []item
	for _, l := range s.all {
		rest = append(rest, l.queue...)
		l.queue = nil
	}
	s.mu.Unlock()
	for _, it := range rest {
		s.settle(it, engine.Place{}, errClosed)
	}
	return err
}
