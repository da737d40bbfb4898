package refgateway

import "github.com/VictoriaMetrics/metrics"

// counters are the gateway's metrics, made once.
type counters struct {
	opened      *metrics.Counter
	refused     map[string]*metrics.Counter // handshakes, by reason; static
	pushFrames  *metrics.Counter
	bytesSent   *metrics.Counter
	slow        *metrics.Counter
	crowded     *metrics.Counter
	dead        *metrics.Counter
	messages    *metrics.Counter
	badMessages *metrics.Counter
	paced       *metrics.Counter
	panics      *metrics.Counter
	joins       reportCounters
	leaves      reportCounters
	rejoins     *metrics.Counter
	slots       *metrics.Counter
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

// The reasons for refusing a handshake.
const (
	refusedBad      = "bad_request"
	refusedOrigin   = "origin"
	refusedFull     = "full"
	refusedDraining = "draining"
)

func newCounters(g *Gateway) {
	set := g.cfg.Metrics
	set.NewGauge("connect_node_connections", func() float64 { return float64(g.registry.conns.Load()) })
	set.NewGauge("connect_node_users", func() float64 { return float64(g.registry.online.Load()) })
	set.NewGauge("connect_node_rooms", func() float64 { return float64(g.reports.roomCount()) })
	set.NewGauge("connect_node_memberships", func() float64 { return float64(g.reports.memberships()) })
	set.NewGauge("connect_node_reports_pending", func() float64 { return float64(g.reports.pending()) })
	set.NewGauge("connect_node_queue_bytes", func() float64 { return float64(g.held.Load()) })
	set.NewGauge("connect_node_controller_up", func() float64 {
		if g.reports.isReady() {
			return 1
		}
		return 0
	})
	g.count = counters{
		opened: set.NewCounter("connect_node_connections_total"),
		refused: map[string]*metrics.Counter{
			refusedBad:      set.NewCounter(`connect_node_connections_refused_total{reason="bad_request"}`),
			refusedOrigin:   set.NewCounter(`connect_node_connections_refused_total{reason="origin"}`),
			refusedFull:     set.NewCounter(`connect_node_connections_refused_total{reason="full"}`),
			refusedDraining: set.NewCounter(`connect_node_connections_refused_total{reason="draining"}`),
		},
		pushFrames:  set.NewCounter("connect_node_push_frames_total"),
		bytesSent:   set.NewCounter("connect_node_sent_bytes_total"),
		slow:        set.NewCounter("connect_node_slow_clients_total"),
		crowded:     set.NewCounter("connect_node_crowded_clients_total"),
		dead:        set.NewCounter("connect_node_dead_clients_total"),
		messages:    set.NewCounter("connect_node_client_messages_total"),
		badMessages: set.NewCounter("connect_node_client_errors_total"),
		paced:       set.NewCounter("connect_node_client_messages_paced_total"),
		panics:      set.NewCounter("connect_node_client_panics_total"),
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
	}
}
