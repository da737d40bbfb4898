package link

import (
	"slices"
	"sync"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/histogram"
	"github.com/push-manager/push-manager/internal/label"
)

// meters are the counters of a set. They move once per frame, call or event,
// never once per delivery.
type meters struct {
	set *metrics.Set

	frames     *metrics.Counter
	deliveries *metrics.Counter
	bytes      *metrics.Counter
	perFrame   *metrics.PrometheusHistogram

	compressed     *metrics.Counter // frames
	compressedIn   *metrics.Counter // their bytes before
	compressedOut  *metrics.Counter // and after
	uncompressible *metrics.Counter // frames that were tried and sent as they are

	acks     *metrics.Counter
	lateAcks *metrics.Counter
	strikes  *metrics.Counter
	clamped  *metrics.Counter

	dials         *metrics.Counter
	dialFailures  *metrics.Counter
	reconnects    *metrics.Counter
	restarts      *metrics.Counter
	heartbeats    *metrics.Counter
	silences      *metrics.Counter
	stalls        *metrics.Counter
	quarantines   *metrics.Counter
	drainNotices  *metrics.Counter
	unaryCalls    *metrics.Counter
	unaryFailures *metrics.Counter
	panics        *metrics.Counter

	audDefined   *metrics.Counter
	audChanged   *metrics.Counter
	audForgotten *metrics.Counter
	audListed    *metrics.Counter

	replaced        *metrics.Counter
	receipts        *metrics.Counter
	lateReceipts    *metrics.Counter
	receiptsLost    *metrics.Counter
	nudges          *metrics.Counter
	nudgesRefused   *metrics.Counter
	catchups        *metrics.Counter
	catchupsRefused *metrics.Counter

	disconnectsDone, disconnectsFailed, disconnectsUnknown *metrics.Counter // by node
	disconnected                                           *metrics.Counter // connections

	logFollows      *metrics.Counter
	logReads        *metrics.Counter
	logReadsRefused *metrics.Counter
	logMarks        *metrics.Counter
	logPages        *metrics.Counter
	logEntries      *metrics.Counter

	mu    sync.Mutex
	wrong map[string][]string // guarded by mu: names of the counters of wrongNode, by node
}

func newMeters(s *metrics.Set) *meters {
	c := func(name string) *metrics.Counter { return s.GetOrCreateCounter("push_manager_link_" + name) }
	return &meters{
		set:        s,
		wrong:      map[string][]string{},
		frames:     c("frames_total"),
		deliveries: c("deliveries_total"),
		bytes:      c("bytes_total"),
		perFrame: s.GetOrCreatePrometheusHistogramExt("push_manager_link_frame_deliveries",
			[]float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024}),

		compressed:     c("compressed_frames_total"),
		compressedIn:   c("compressed_in_bytes_total"),
		compressedOut:  c("compressed_out_bytes_total"),
		uncompressible: c("uncompressible_frames_total"),

		acks:     c("acks_total"),
		lateAcks: c("late_acks_total"),
		strikes:  c("strikes_total"),
		clamped:  c("broadcast_acks_clamped_total"),

		dials:         c("dials_total"),
		dialFailures:  c("dial_failures_total"),
		reconnects:    c("reconnects_total"),
		restarts:      c("node_restarts_total"),
		heartbeats:    c("heartbeats_total"),
		silences:      c("heartbeat_timeouts_total"),
		stalls:        c("stalls_total"),
		quarantines:   c("quarantines_total"),
		drainNotices:  c("drain_notices_total"),
		unaryCalls:    c("unary_calls_total"),
		unaryFailures: c("unary_call_failures_total"),
		panics:        c("panics_total"),

		replaced:      c("replaced_total"),
		receipts:      c("receipts_total"),
		lateReceipts:  c("late_receipts_total"),
		receiptsLost:  c("receipts_over_limit_total"),
		nudges:        c("nudges_total"),
		nudgesRefused: c("nudges_not_taken_total"),

		disconnectsDone:    c(`disconnects_total{result="done"}`),
		disconnectsFailed:  c(`disconnects_total{result="failed"}`),
		disconnectsUnknown: c(`disconnects_total{result="unknown"}`),
		disconnected:       c("disconnected_total"),

		catchups:        c("catchups_total"),
		catchupsRefused: c("catchups_refused_total"),

		logFollows:      c("log_follows_total"),
		logReads:        c("log_reads_total"),
		logReadsRefused: c("log_reads_refused_total"),
		logMarks:        c("log_marks_total"),
		logPages:        c("log_pages_total"),
		logEntries:      c("log_messages_total"),

		audDefined:   c("audiences_defined_total"),
		audChanged:   c("audiences_changed_total"),
		audForgotten: c("audiences_forgotten_total"),
		audListed:    c("audiences_listed_total"),
	}
}

// register adds the gauges that walk the links when they are read.
func (m *meters) register(s *Set) {
	sum := func(pick func(Stats) int) func() float64 {
		return func() float64 { return float64(pick(s.Stats())) }
	}
	m.set.GetOrCreateGauge("push_manager_nodes", sum(func(t Stats) int { return t.Nodes }))
	m.set.GetOrCreateGauge("push_manager_link_unscoped_nodes", sum(func(t Stats) int { return t.Unscoped }))
	m.set.GetOrCreateGauge("push_manager_link_queue_deliveries", sum(func(t Stats) int { return t.Queued }))
	m.set.GetOrCreateGauge("push_manager_link_queue_bytes", sum(func(t Stats) int { return t.QueuedBytes }))
	m.set.GetOrCreateGauge("push_manager_link_window_deliveries", sum(func(t Stats) int { return t.Unacked }))
	m.set.GetOrCreateGauge("push_manager_link_window_bytes", sum(func(t Stats) int { return t.UnackedBytes }))
	m.set.GetOrCreateGauge("push_manager_link_unconfirmed_deliveries", sum(func(t Stats) int { return t.Unconfirmed }))
	m.set.GetOrCreateGauge("push_manager_link_nudges", sum(func(t Stats) int { return t.Nudges }))
	m.set.GetOrCreateGauge("push_manager_link_gates", sum(func(t Stats) int { return t.Gates }))
	m.set.GetOrCreateGauge("push_manager_link_log_reads", sum(func(t Stats) int { return t.LogReads }))
	m.set.GetOrCreateGauge("push_manager_link_log_bytes", sum(func(t Stats) int { return t.LogBytes }))
	m.set.GetOrCreateGauge("push_manager_link_compressing", sum(func(t Stats) int { return t.Compressing }))
	m.set.GetOrCreateGauge("push_manager_link_dials_waiting", func() float64 { return float64(s.dials.waiting()) })
	m.set.GetOrCreateGauge("push_manager_link_stalled", sum(func(t Stats) int { return t.Stalled }))
	m.set.GetOrCreateGauge("push_manager_link_plain_nodes", sum(func(t Stats) int { return t.Plain }))
}

func (m *meters) unregister() {
	for _, name := range []string{
		"push_manager_nodes", "push_manager_link_unscoped_nodes",
		"push_manager_link_queue_deliveries", "push_manager_link_queue_bytes",
		"push_manager_link_window_deliveries", "push_manager_link_window_bytes",
		"push_manager_link_unconfirmed_deliveries", "push_manager_link_nudges", "push_manager_link_gates",
		"push_manager_link_log_reads", "push_manager_link_log_bytes",
		"push_manager_link_compressing", "push_manager_link_dials_waiting", "push_manager_link_stalled", "push_manager_link_plain_nodes",
	} {
		m.set.UnregisterMetric(name)
	}
}

// The names of what each node has, besides wrongNode. Their number is bounded by that of the nodes.
const (
	nodeConnections = "push_manager_node_connections"
	nodeQueueBytes  = "push_manager_node_queue_bytes"
	nodeQueueAge    = "push_manager_node_queue_age_seconds"
	nodeStalled     = "push_manager_node_stalled_links"
	nodeStalls      = "push_manager_node_stalls_total"
	nodeBreaks      = "push_manager_node_breaks_total"
	nodeAcks        = "push_manager_link_ack_seconds"
	nodeBeats       = "push_manager_link_heartbeat_seconds"
)

func ofNode(name, node string) string { return label.Name(name, "node_id", node) }

// show adds the gauges of a node. A node that moves keeps them.
func (m *meters) show(s *Set, id string) {
	gauge := func(name string, read func(*node) float64) {
		m.set.GetOrCreateGauge(ofNode(name, id), func() float64 {
			if n := s.snapshot.Load().byID[id]; n != nil {
				return read(n)
			}
			return 0
		})
	}
	gauge(nodeConnections, func(n *node) float64 { return float64(n.live.Load()) })
	gauge(nodeQueueBytes, func(n *node) float64 { bytes, _, _ := n.waiting(); return float64(bytes) })
	gauge(nodeQueueAge, func(n *node) float64 { _, age, _ := n.waiting(); return age.Seconds() })
	gauge(nodeStalled, func(n *node) float64 { _, _, stalled := n.waiting(); return float64(stalled) })
}

// beats is how long a node takes to answer heartbeats: our writer, the stream, the node's
// reader behind all that was written before, its sender of acks behind those that are ready,
// and our reader. The clients of the node are not on that way.
func (m *meters) beats(node string) *metrics.PrometheusHistogram {
	return m.set.GetOrCreatePrometheusHistogramExt(ofNode(nodeBeats, node), []float64{.0005, .001, .0025, .01, .05, .25, 1})
}

// ackSeconds is how long a node takes to acknowledge what we write: one value for each frame, until its last
// delivery is acknowledged, and for each unary call. A frame that waits behind others counts its own wait, so
// a node that stands still is charged with all that stood behind it. An ack that comes too late counts, too.
func (m *meters) ackSeconds(node string) *histogram.Histogram {
	return histogram.New(m.set, ofNode(nodeAcks, node), AckBounds())
}

// nodeStalls counts the stalls of the links to a node. They end within seconds, so a scrape rarely meets one.
func (m *meters) nodeStalls(node string) *metrics.Counter {
	return m.set.GetOrCreateCounter(ofNode(nodeStalls, node))
}

// breaks counts the links to a node that were up and ended, unless it drained.
func (m *meters) breaks(node string) *metrics.Counter {
	return m.set.GetOrCreateCounter(ofNode(nodeBreaks, node))
}

// wrongNode counts that where a node should be is another, which is found.
func (m *meters) wrongNode(node, found string) {
	name := label.Name("push_manager_link_wrong_node_total", "node_id", node, "found", found)
	m.mu.Lock()
	defer m.mu.Unlock()
	if !slices.Contains(m.wrong[node], name) {
		m.wrong[node] = append(m.wrong[node], name)
	}
	m.set.GetOrCreateCounter(name).Inc()
}

// forget removes the metrics of a node that is gone.
func (m *meters) forget(node string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range m.wrong[node] {
		m.set.UnregisterMetric(name)
	}
	delete(m.wrong, node)
	for _, name := range []string{nodeConnections, nodeQueueBytes, nodeQueueAge, nodeStalled, nodeStalls, nodeBreaks, nodeAcks, nodeBeats} {
		m.set.UnregisterMetric(ofNode(name, node))
	}
}
