package discovery

import (
	"strings"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// watcherMetrics holds the handles of a Watcher.
type watcherMetrics struct {
	badValues *metrics.Counter
	foreign   *metrics.Counter
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
	nodes, held, contested, panicking atomic.Int64
	// The last word from etcd while it is out of reach; nil while all is well.
	staleSince atomic.Pointer[time.Time]
}

func newWatcherMetrics(set *metrics.Set, prefix string) *watcherMetrics {
	name := func(full string) string { return renamed(full, prefix) }
	m := &watcherMetrics{
		badValues: set.GetOrCreateCounter(name("push_manager_discovery_bad_value_total")),
		foreign:   set.GetOrCreateCounter(name("push_manager_discovery_foreign_keys_total")),
		conflicts: set.GetOrCreateCounter(name("push_manager_discovery_conflicts_total")),
		overLimit: set.GetOrCreateCounter(name("push_manager_discovery_over_limit_total")),
		panics:    set.GetOrCreateCounter(name("push_manager_discovery_panics_total")),
		changes:   set.GetOrCreateCounter(name("push_manager_discovery_changes_total")),

		listOK:       set.GetOrCreateCounter(name(`push_manager_discovery_lists_total{result="ok"}`)),
		listError:    set.GetOrCreateCounter(name(`push_manager_discovery_lists_total{result="error"}`)),
		listOutdated: set.GetOrCreateCounter(name(`push_manager_discovery_lists_total{result="outdated"}`)),
		listBack:     set.GetOrCreateCounter(name(`push_manager_discovery_lists_total{result="went_back"}`)),

		breakCompacted: set.GetOrCreateCounter(name(`push_manager_discovery_watch_breaks_total{reason="compacted"}`)),
		breakNoLeader:  set.GetOrCreateCounter(name(`push_manager_discovery_watch_breaks_total{reason="no_leader"}`)),
		breakOther:     set.GetOrCreateCounter(name(`push_manager_discovery_watch_breaks_total{reason="other"}`)),
	}
	gauge := func(v *atomic.Int64) func() float64 { return func() float64 { return float64(v.Load()) } }
	set.GetOrCreateGauge(name("push_manager_discovery_nodes"), gauge(&m.nodes))
	set.GetOrCreateGauge(name("push_manager_discovery_held_nodes"), gauge(&m.held))
	set.GetOrCreateGauge(name("push_manager_discovery_contested_ids"), gauge(&m.contested))
	set.GetOrCreateGauge(name("push_manager_discovery_panic"), gauge(&m.panicking))
	set.GetOrCreateGauge(name("push_manager_discovery_stale_seconds"), func() float64 { return m.stale().Seconds() })
	return m
}

// renamed gives a metric's name the prefix of the program that it is for.
func renamed(name, prefix string) string {
	return prefix + strings.TrimPrefix(name, defaultMetricsPrefix)
}

// stale is how long etcd has been out of reach, 0 while it is not.
func (m *watcherMetrics) stale() time.Duration {
	since := m.staleSince.Load()
	if since == nil {
		return 0
	}
	return time.Since(*since)
}
