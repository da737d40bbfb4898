package jobs

import (
	"sync/atomic"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/label"
)

// instruments are the metrics of a Service.
type instruments struct {
	delivered, offline, failed, unknown *metrics.Counter

	etcdErrors, takeovers, panics *metrics.Counter

	states  map[string]*atomic.Int64
	waiting atomic.Int64 // jobs that do not get on
	running atomic.Int64
	open    atomic.Int64 // users of jobs that run here
}

func newInstruments(set *metrics.Set) *instruments {
	users := func(outcome string) *metrics.Counter {
		return set.GetOrCreateCounter(label.Name("push_manager_job_users_total", "outcome", outcome))
	}
	m := &instruments{
		delivered: users("delivered"), offline: users("offline"), failed: users("failed"), unknown: users("unknown"),
		etcdErrors: set.GetOrCreateCounter("push_manager_job_etcd_errors_total"),
		takeovers:  set.GetOrCreateCounter("push_manager_job_takeovers_total"),
		panics:     set.GetOrCreateCounter(`push_manager_panics_total{part="jobs"}`),
		states:     map[string]*atomic.Int64{},
	}
	for _, state := range states {
		n := new(atomic.Int64)
		m.states[state] = n
		set.GetOrCreateGauge(label.Name("push_manager_jobs", "state", state), func() float64 { return float64(n.Load()) })
	}
	set.GetOrCreateGauge("push_manager_jobs_waiting", func() float64 { return float64(m.waiting.Load()) })
	set.GetOrCreateGauge("push_manager_jobs_running", func() float64 { return float64(m.running.Load()) })
	set.GetOrCreateGauge("push_manager_job_open_users", func() float64 { return float64(m.open.Load()) })
	return m
}

// count counts what became of users.
func (m *instruments) count(c counts) {
	m.delivered.Add(int(c.Delivered))
	m.offline.Add(int(c.Offline))
	m.failed.Add(int(c.Failed))
	m.unknown.Add(int(c.Unknown))
}
