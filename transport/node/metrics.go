package node

import "github.com/VictoriaMetrics/metrics"

// counters are the node's metrics, made once.
type counters struct {
	frames     *metrics.Counter // DeliverRequests taken in
	compressed *metrics.Counter // those that came compressed
	ackFrames  *metrics.Counter // DeliverResponses written
	deliveries *metrics.Counter // with their ack, refused ones included
	refused    *metrics.Counter
	delivered  *metrics.Counter // users
	notHere    *metrics.Counter
	failed     *metrics.Counter
	broken     *metrics.Counter // streams ended with FAILED_PRECONDITION
	superseded *metrics.Counter // streams that a newer one has replaced
	panics     *metrics.Counter
	unary      *metrics.Counter // unary calls
	members    *metrics.Gauge
}

func newCounters(set *metrics.Set, streams func() float64) counters {
	set.NewGauge("connect_node_deliver_streams", streams)
	return counters{
		frames:     set.NewCounter("connect_node_deliver_frames_total"),
		compressed: set.NewCounter("connect_node_deliver_compressed_frames_total"),
		ackFrames:  set.NewCounter("connect_node_ack_frames_total"),
		deliveries: set.NewCounter("connect_node_deliveries_total"),
		refused:    set.NewCounter("connect_node_deliveries_refused_total"),
		delivered:  set.NewCounter(`connect_node_users_total{outcome="delivered"}`),
		notHere:    set.NewCounter(`connect_node_users_total{outcome="not_here"}`),
		failed:     set.NewCounter(`connect_node_users_total{outcome="failed"}`),
		broken:     set.NewCounter("connect_node_deliver_streams_broken_total"),
		superseded: set.NewCounter("connect_node_deliver_streams_superseded_total"),
		panics:     set.NewCounter("connect_node_sessions_panics_total"),
		unary:      set.NewCounter("connect_node_unary_calls_total"),
		members:    set.NewGauge("connect_node_audience_members", nil),
	}
}
