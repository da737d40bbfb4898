package pressure

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
)

// staleAfter is after how many readings without a collection one is asked for while pushes
// are refused for memory.
const staleAfter = 10

// Config of a Monitor. Shed and InFlight are required; zero fields of the others mean the
// defaults.
type Config struct {
	// Shed is told what to refuse, when that changes and when the Monitor ends.
	Shed func(engine.Shedding)
	// InFlight is the number of pushes that are not finished.
	InFlight func() int64
	// Wait is the median time that goroutines may wait for a core. 0: they may wait.
	Wait time.Duration
	// Few pushes in flight are not worth refusing some, however long they wait: 1,024.
	Few int64
	// Interval between two readings: 100 ms.
	Interval time.Duration
	Metrics  *metrics.Set // nil: a set of its own
	Logger   *slog.Logger // nil: nothing is logged
}

func (c Config) withDefaults() Config {
	if c.Few == 0 {
		c.Few = 1024 // those are answered in some 20 ms
	}
	if c.Interval == 0 {
		c.Interval = 100 * time.Millisecond
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate reports everything that is wrong with the configuration.
func (c Config) Validate() error {
	var errs []error
	if c.Shed == nil || c.InFlight == nil {
		errs = append(errs, errors.New("pressure: Shed and InFlight are required"))
	}
	if c.Wait < 0 || c.Interval < 0 || c.Few < 0 {
		errs = append(errs, fmt.Errorf("pressure: Wait %v, Interval %v or Few %d is negative", c.Wait, c.Interval, c.Few))
	}
	return errors.Join(errs...)
}

// Monitor reads and tells, until it is closed.
type Monitor struct {
	// Static after Start.
	cfg  Config
	stop chan struct{}
	once sync.Once
	done sync.WaitGroup

	// Owned by loop.
	reader  *reader
	control control

	// Shown as gauges.
	wait atomic.Int64  // nanoseconds
	used atomic.Uint64 // the bits of a float: memory in use, of the limit
	said atomic.Pointer[engine.Shedding]
}

// Start begins to watch. Close ends it.
func Start(cfg Config) (*Monitor, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	m := &Monitor{cfg: cfg, stop: make(chan struct{}), reader: newReader(), control: control{wait: cfg.Wait, few: cfg.Few}}
	m.said.Store(new(engine.Shedding))
	set := cfg.Metrics
	set.GetOrCreateGauge("push_manager_scheduling_wait_seconds", func() float64 { return time.Duration(m.wait.Load()).Seconds() })
	set.GetOrCreateGauge("push_manager_memory_used_ratio", func() float64 { return math.Float64frombits(m.used.Load()) })
	for _, p := range engine.Priorities() {
		set.GetOrCreateGauge(fmt.Sprintf("push_manager_shed_ratio{priority=%q}", p), func() float64 { return share(*m.said.Load(), p) })
	}
	m.done.Go(m.loop)
	return m, nil
}

// share is the part of the pushes of a priority that is refused.
func share(s engine.Shedding, p engine.Priority) float64 {
	if p.Rank() < s.Memory {
		return 1
	}
	busy := min(max(s.Busy-p.Rank()*engine.BusyParts, 0), engine.BusyParts)
	return float64(busy) / engine.BusyParts
}

// Close ends the watch and what was refused for it.
func (m *Monitor) Close() {
	m.once.Do(func() { close(m.stop) })
	m.done.Wait()
}

func (m *Monitor) loop() {
	ticker := time.NewTicker(m.cfg.Interval)
	defer ticker.Stop()
	defer m.cfg.Shed(engine.Shedding{})
	for {
		select {
		case <-m.stop:
			return
		case <-ticker.C:
			m.look()
		}
	}
}

// look takes one reading.
func (m *Monitor) look() {
	now := m.reader.read()
	now.inFlight = m.cfg.InFlight()
	m.wait.Store(int64(now.wait))
	m.used.Store(math.Float64bits(now.memory))
	last, next := *m.said.Load(), m.control.next(now)
	if next.Memory > 0 && m.reader.since >= staleAfter {
		// Who is refused allocates little, so the collector may not run for long by itself,
		// and what it found last counts until it does.
		runtime.GC()
	}
	if next == last {
		return
	}
	m.said.Store(&next)
	m.cfg.Shed(next)
	switch none := (engine.Shedding{}); none {
	case last:
		m.cfg.Logger.Warn("overload: pushes are refused, the lowest priority first",
			"in_flight", now.inFlight, "wait", now.wait, "memory", now.memory)
	case next:
		m.cfg.Logger.Info("the overload is over")
	default:
	}
}
