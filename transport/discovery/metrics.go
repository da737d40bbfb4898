package discovery

import (
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// watcherMetrics holds the handles of a Watcher.
type watcherMetrics struct {
	badValues *metrics.Counter
	conflicts *metrics.Counter
	overLimit *metrics.Counter
	panics    *metrics.Counter
	changes   *metrics.Counter

	listOK       *metrics.Counter
	listError    *metrics.Counter
	listOutdated *metrics.Counter
	listBack     *metrics.Counter

	breakCompacted *metrics.Counter
	breakNoLeader  *metrics.Counter
	breakOther     *metrics.Counter

	// Read by gauges.
	nodes, held, panicking atomic.Int64
	// The last word from etcd while it is out of reach; nil while all is well.
	staleSince atomic.Pointer[time.Time]
}

func newWatcherMetrics(set *metrics.Set, prefix string) *watcherMetrics {
	name := func(rest string) string { return prefix + "_discovery_" + rest }
	m := &watcherMetrics{
		badValues: set.GetOrCreateCounter(name("bad_value_total")),
		conflicts: set.GetOrCreateCounter(name("conflicts_total")),
		overLimit: set.GetOrCreateCounter(name("over_limit_total")),
		panics:    set.GetOrCreateCounter(name("panics_total")),
		changes:   set.GetOrCreateCounter(name("changes_total")),

		listOK:       set.GetOrCreateCounter(name(`lists_total{result="ok"}`)),
		listError:    set.GetOrCreateCounter(name(`lists_total{result="error"}`)),
		listOutdated: set.GetOrCreateCounter(name(`lists_total{result="outdated"}`)),
		listBack:     set.GetOrCreateCounter(name(`lists_total{result="went_back"}`)),

		breakCompacted: set.GetOrCreateCounter(name(`watch_breaks_total{reason="compacted"}`)),
		breakNoLeader:  set.GetOrCreateCounter(name(`watch_breaks_total{reason="no_leader"}`)),
		breakOther:     set.GetOrCreateCounter(name(`watch_breaks_total{reason="other"}`)),
	}
	gauge := func(v *atomic.Int64) func() float64 { return func() float64 { return float64(v.Load()) } }
	set.GetOrCreateGauge(name("nodes"), gauge(&m.nodes))
	set.GetOrCreateGauge(name("held_nodes"), gauge(&m.held))
	set.GetOrCreateGauge(name("panic"), gauge(&m.panicking))
	set.GetOrCreateGauge(name("stale_seconds"), func() float64 { return m.stale().Seconds() })
	return m
}

// stale is how long etcd has been out of reach, 0 while it is not.
func (m *watcherMetrics) stale() time.Duration {
	since := m.staleSince.Load()
	if since == nil {
		return 0
	}
	return time.Since(*since)
}
