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
)

// staleAfter is after how many readings without a collection one is asked for while pushes
// are refused for memory.
const staleAfter = 10

// Config of a Monitor. Shed is required; zero fields of the others mean the defaults.
type Config struct {
	// Shed is told how many priorities to refuse, from the lowest, when that changes and
	// when the Monitor ends.
	Shed func(priorities int)
	// Interval between two readings: 100 ms.
	Interval time.Duration
	Metrics  *metrics.Set // nil: a set of its own
	Logger   *slog.Logger // nil: nothing is logged
}

func (c Config) withDefaults() Config {
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
	if c.Shed == nil {
		errs = append(errs, errors.New("pressure: Shed is required"))
	}
	if c.Interval < 0 {
		errs = append(errs, fmt.Errorf("pressure: Interval %v is negative", c.Interval))
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
	reader *reader

	// Shown as gauges.
	used atomic.Uint64 // the bits of a float: memory in use, of the limit
	said atomic.Int64  // priorities that are refused
}

// Start begins to watch. Close ends it.
func Start(cfg Config) (*Monitor, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	m := &Monitor{cfg: cfg, stop: make(chan struct{}), reader: newReader()}
	set := cfg.Metrics
	set.GetOrCreateGauge("push_manager_memory_used_ratio", func() float64 { return math.Float64frombits(m.used.Load()) })
	set.GetOrCreateGauge("push_manager_shed_priorities", func() float64 { return float64(m.said.Load()) })
	m.done.Go(m.loop)
	return m, nil
}

// Close ends the watch and what was refused for it.
func (m *Monitor) Close() {
	m.once.Do(func() { close(m.stop) })
	m.done.Wait()
}

func (m *Monitor) loop() {
	ticker := time.NewTicker(m.cfg.Interval)
	defer ticker.Stop()
	defer m.cfg.Shed(0)
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
	used := m.reader.read()
	m.used.Store(math.Float64bits(used))
	last := int(m.said.Load())
	next := shed(used, last)
	if next > 0 && m.reader.since >= staleAfter {
		// Who is refused allocates little, so the collector may not run for long by itself,
		// and what it found last counts until it does.
		runtime.GC()
	}
	if next == last {
		return
	}
	m.said.Store(int64(next))
	m.cfg.Shed(next)
	switch {
	case last == 0:
		m.cfg.Logger.Warn("memory runs out: pushes are refused, the lowest priority first", "used", used)
	case next == 0:
		m.cfg.Logger.Info("there is memory again")
	default:
	}
}
