package health

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/label"
)

const (
	// interval is the time between two looks: short beside what a probe waits for, and
	// four of them cost little even with thousands of nodes.
	interval = 250 * time.Millisecond
	// stepMax is the most time that one look counts for. A longer pause means that we
	// were not running, and could not have seen that all was well.
	stepMax = 2 * interval
	// startup is how long the process may take to find its peers before the log says why not.
	startup = 5 * time.Second
)

const (
	starting = "starting"
	draining = "draining"
)

// Check is one thing without which pushes cannot be delivered.
type Check struct {
	// Name is the label of its gauge.
	Name string
	// Why says in one line why pushes cannot be delivered, "" when they can. It is called
	// from one goroutine at a time and must not block.
	Why func() string
}

// Config is what a Monitor needs.
type Config struct {
	Checks []Check
	// Patience is how long there must be a reason for readiness to end, in time that the
	// process ran. 0: none, the first reason ends it.
	Patience time.Duration
	// OnChange gets every change, see the package's doc. nil: nobody is told.
	OnChange func(ready bool)

	// Logger, nil to discard.
	Logger *slog.Logger
	// Metrics, nil for none.
	Metrics *metrics.Set
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.Patience < 0 {
		errs = append(errs, errors.New("health: Patience is negative"))
	}
	for _, check := range c.Checks {
		if check.Name == "" || check.Why == nil {
			errs = append(errs, errors.New("health: a check lacks its name or function"))
		}
	}
	return errors.Join(errs...)
}

// Monitor looks at the checks four times a second.
type Monitor struct {
	// Static after New.
	cfg   Config
	stop  chan struct{}
	begin sync.Once
	end   sync.Once
	wg    sync.WaitGroup

	// Written by looks, read by anybody.
	found    atomic.Pointer[finding]
	draining atomic.Bool

	// Owned by Start, then by loop.
	ready bool
	known bool          // the log has said what the start came to
	doubt bool          // the last look found a reason
	bad   time.Duration // how long there has been one
}

// finding is the outcome of a look: nothing while ready.
type finding struct {
	starting bool     // there was no look yet
	why      []string // what each check says, "" for nothing
}

// New makes a Monitor that is not ready. Start begins to look.
func New(cfg Config) (*Monitor, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.OnChange == nil {
		cfg.OnChange = func(bool) {}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	m := &Monitor{cfg: cfg, stop: make(chan struct{})}
	m.found.Store(&finding{starting: true, why: make([]string, len(cfg.Checks))})
	m.register()
	return m, nil
}

func (m *Monitor) register() {
	gauge := func(name string, is func() bool) {
		m.cfg.Metrics.GetOrCreateGauge(name, func() float64 {
			if is() {
				return 1
			}
			return 0
		})
	}
	gauge("push_manager_ready", func() bool { return len(m.NotReady()) == 0 })
	gauge(notReady(draining), m.draining.Load)
	for i, c := range m.cfg.Checks {
		gauge(notReady(c.Name), func() bool { return m.found.Load().why[i] != "" })
	}
}

// notReady is the name of the gauge of one reason.
func notReady(reason string) string {
	return label.Name("push_manager_not_ready", "reason", reason)
}

// Start looks for the first time, and from then on until Close.
func (m *Monitor) Start() {
	m.begin.Do(func() {
		m.look(0)
		m.cfg.OnChange(m.ready)
		m.wg.Go(m.loop)
	})
}

// Close stops looking and waits until OnChange cannot be called any more.
func (m *Monitor) Close() {
	m.begin.Do(func() {}) // never started
	m.end.Do(func() { close(m.stop) })
	m.wg.Wait()
}

// Drain ends readiness for good, at once.
func (m *Monitor) Drain() { m.draining.Store(true) }

// Names are those of the checks.
func (m *Monitor) Names() []string {
	names := make([]string, len(m.cfg.Checks))
	for i, c := range m.cfg.Checks {
		names[i] = c.Name
	}
	return names
}

// NotReady says why pushes cannot be delivered, nothing when they can. What the checks named in exclude say is left out.
func (m *Monitor) NotReady(exclude ...string) (reasons []string) {
	if m.draining.Load() {
		reasons = append(reasons, draining)
	}
	found := m.found.Load()
	if found.starting {
		reasons = append(reasons, starting)
	}
	for i, why := range found.why {
		if why != "" && !slices.Contains(exclude, m.cfg.Checks[i].Name) {
			reasons = append(reasons, why)
		}
	}
	return reasons
}

func (m *Monitor) loop() {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case <-m.stop:
			return
		case <-tick.C:
			now := time.Now()
			if m.look(min(now.Sub(last), stepMax)) {
				m.cfg.OnChange(m.ready)
			}
			last = now
		}
	}
}

// look asks all checks and tells whether readiness has changed; passed is the time
// since the last look.
func (m *Monitor) look(passed time.Duration) (changed bool) {
	all, was := &finding{why: make([]string, len(m.cfg.Checks))}, m.ready
	var reasons []string
	for i, c := range m.cfg.Checks {
		if why := c.Why(); why != "" {
			reasons = append(reasons, why)
			all.why[i] = why
		}
	}
	switch {
	case len(reasons) == 0:
		m.ready, m.known, m.doubt, m.bad = true, true, false, 0
	case m.ready:
		if m.doubt {
			m.bad += passed
		}
		m.doubt, m.ready = true, m.bad < m.cfg.Patience
	case !m.known:
		if m.bad += passed; m.bad >= startup {
			m.known = true
			m.cfg.Logger.Warn("not ready since the start: pushes cannot be delivered", "reasons", strings.Join(reasons, "; "))
		}
	}
	if m.ready {
		m.found.Store(&finding{why: make([]string, len(m.cfg.Checks))})
	} else {
		m.found.Store(all)
	}
	switch {
	case m.ready == was:
		return false
	case m.ready:
		m.cfg.Logger.Info("ready: pushes can be delivered")
	default:
		m.cfg.Logger.Warn("not ready: pushes cannot be delivered", "reasons", strings.Join(reasons, "; "))
	}
	return true
}
