package replay

import (
	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/label"
)

// result is how a replay ended.
type result uint8

const (
	resultEmpty    result = iota // nothing was stored
	resultComplete               // the client has taken all
	resultStore                  // the store could not be read
	resultNode                   // the node did not take a message
	resultAway                   // the client had left, says the node
	resultUntaken                // the client took nothing for too long
	resultGone                   // the stream of the node ended, or the caller left
	resultRefused                // too many, or this Push-Manager goes
	results
)

func (r result) String() string {
	return [results]string{"empty", "complete", "store", "node", "away", "untaken", "gone", "refused"}[r]
}

const (
	gaugeOpen = "push_manager_replay_open"
	gaugeLine = "push_manager_replay_line"
)

// meters are the metrics of a service.
type meters struct {
	set *metrics.Set

	ended      [results]*metrics.Counter
	messages   *metrics.Counter
	over       *metrics.Counter
	violations *metrics.Counter
	panics     *metrics.Counter
	wait       *metrics.PrometheusHistogram
}

func newMeters(set *metrics.Set, s *Service) *meters {
	m := &meters{
		set:        set,
		messages:   set.GetOrCreateCounter("push_manager_replay_messages_total"),
		over:       set.GetOrCreateCounter("push_manager_replay_passed_over_total"),
		violations: set.GetOrCreateCounter("push_manager_replay_violations_total"),
		panics:     set.GetOrCreateCounter(`push_manager_panics_total{part="replay"}`),
		wait:       set.GetOrCreatePrometheusHistogramExt("push_manager_replay_wait_seconds", []float64{.001, .005, .025, .1, .5, 2}),
	}
	for r := range results {
		m.ended[r] = set.GetOrCreateCounter(label.Name("push_manager_replay_total", "result", r.String()))
	}
	set.GetOrCreateGauge(gaugeOpen, func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(s.open + len(s.calls))
	})
	set.GetOrCreateGauge(gaugeLine, func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(s.fresh.Len() + s.ready.Len())
	})
	return m
}

func (m *meters) unregister() {
	m.set.UnregisterMetric(gaugeOpen)
	m.set.UnregisterMetric(gaugeLine)
}
