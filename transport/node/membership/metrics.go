package membership

import "github.com/VictoriaMetrics/metrics"

// counters are the Reporter's metrics, made once.
type counters struct {
	joins   reportCounters
	leaves  reportCounters
	rejoins *metrics.Counter
	slots   *metrics.Counter
	panics  *metrics.Counter
}

// reportCounters count calls to the Controller of one kind.
type reportCounters struct{ ok, refused, failed *metrics.Counter }

func (c *counters) report(joins, ok bool, err error) {
	kind := &c.leaves
	if joins {
		kind = &c.joins
	}
	switch {
	case err != nil:
		kind.failed.Inc()
	case !ok:
		kind.refused.Inc()
	default:
		kind.ok.Inc()
	}
}

func newCounters(r *Reporter) counters {
	set := r.cfg.Metrics
	set.NewGauge("connect_node_rooms", func() float64 { return float64(r.Stats().Rooms) })
	set.NewGauge("connect_node_memberships", func() float64 { return float64(r.Stats().Memberships) })
	set.NewGauge("connect_node_reports_pending", func() float64 { return float64(r.Stats().Pending) })
	set.NewGauge("connect_node_controller_up", func() float64 {
		if r.Ready() {
			return 1
		}
		return 0
	})
	return counters{
		joins: reportCounters{
			ok:      set.NewCounter(`connect_node_reports_total{kind="join",outcome="ok"}`),
			refused: set.NewCounter(`connect_node_reports_total{kind="join",outcome="refused"}`),
			failed:  set.NewCounter(`connect_node_reports_total{kind="join",outcome="failed"}`),
		},
		leaves: reportCounters{
			ok:      set.NewCounter(`connect_node_reports_total{kind="leave",outcome="ok"}`),
			refused: set.NewCounter(`connect_node_reports_total{kind="leave",outcome="refused"}`),
			failed:  set.NewCounter(`connect_node_reports_total{kind="leave",outcome="failed"}`),
		},
		rejoins: set.NewCounter("connect_node_rejoins_total"),
		slots:   set.NewCounter("connect_node_slots_reported_total"),
		panics:  set.NewCounter("connect_node_reports_panics_total"),
	}
}
