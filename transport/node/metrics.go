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
	filtered   *metrics.Counter
	broken     *metrics.Counter // streams ended with FAILED_PRECONDITION
	superseded *metrics.Counter // streams that a newer one has replaced
	panics     *metrics.Counter
	unary      *metrics.Counter // unary calls
	members    *metrics.Gauge

	// Of lasting delivery: users.
	duplicates *metrics.Counter // part of delivered
	reused     *metrics.Counter // part of failed
	expired    *metrics.Counter // part of failed
	acked      *metrics.Counter
	unacked    *metrics.Counter // given up

	catchups      *metrics.Counter // asked
	replaysFailed *metrics.Counter // to be asked again
	replayed      *metrics.Counter // messages out of the store
	nudges        *metrics.Counter
	opensLate     *metrics.Counter // gates that opened without an answer
	gatesRefused  *metrics.Counter

	disconnected *metrics.Counter // connections

	// Of the logs of rooms.
	logMarks       *metrics.Counter
	logIgnored     *metrics.Counter // marks, pages and places that mean nothing here
	logReads       *metrics.Counter // asked
	logReadsFailed *metrics.Counter // to be asked again
	logMessages    *metrics.Counter // out of the log, for each connection
	logMissed      *metrics.Counter // named by a mark, and had not come
	logGaps        *metrics.Counter
	cursorsRefused *metrics.Counter
}

func newCounters(set *metrics.Set) counters {
	return counters{
		frames:     set.NewCounter("connect_node_deliver_frames_total"),
		compressed: set.NewCounter("connect_node_deliver_compressed_frames_total"),
		ackFrames:  set.NewCounter("connect_node_ack_frames_total"),
		deliveries: set.NewCounter("connect_node_deliveries_total"),
		refused:    set.NewCounter("connect_node_deliveries_refused_total"),
		delivered:  set.NewCounter(`connect_node_users_total{outcome="delivered"}`),
		notHere:    set.NewCounter(`connect_node_users_total{outcome="not_here"}`),
		failed:     set.NewCounter(`connect_node_users_total{outcome="failed"}`),
		filtered:   set.NewCounter(`connect_node_users_total{outcome="filtered"}`),
		broken:     set.NewCounter("connect_node_deliver_streams_broken_total"),
		superseded: set.NewCounter("connect_node_deliver_streams_superseded_total"),
		panics:     set.NewCounter("connect_node_sessions_panics_total"),
		unary:      set.NewCounter("connect_node_unary_calls_total"),
		members:    set.NewGauge("connect_node_audience_members", nil),

		duplicates: set.NewCounter("connect_node_duplicate_users_total"),
		reused:     set.NewCounter("connect_node_reused_users_total"),
		expired:    set.NewCounter("connect_node_expired_users_total"),
		acked:      set.NewCounter(`connect_node_receipts_total{result="acked"}`),
		unacked:    set.NewCounter(`connect_node_receipts_total{result="unacked"}`),

		catchups:      set.NewCounter("connect_node_replay_catchups_total"),
		replaysFailed: set.NewCounter("connect_node_replay_failed_total"),
		replayed:      set.NewCounter("connect_node_replay_messages_total"),
		nudges:        set.NewCounter("connect_node_nudges_total"),
		opensLate:     set.NewCounter("connect_node_gate_open_without_store_total"),
		gatesRefused:  set.NewCounter("connect_node_gates_refused_total"),

		disconnected: set.NewCounter("connect_node_disconnected_total"),

		logMarks:       set.NewCounter("connect_node_room_log_marks_total"),
		logIgnored:     set.NewCounter("connect_node_room_log_ignored_total"),
		logReads:       set.NewCounter("connect_node_room_log_reads_total"),
		logReadsFailed: set.NewCounter("connect_node_room_log_reads_failed_total"),
		logMessages:    set.NewCounter("connect_node_room_log_messages_total"),
		logMissed:      set.NewCounter("connect_node_room_log_missed_total"),
		logGaps:        set.NewCounter("connect_node_room_log_gaps_total"),
		cursorsRefused: set.NewCounter("connect_node_cursors_refused_total"),
	}
}

func newGauges(set *metrics.Set, s *Server) {
	set.NewGauge("connect_node_deliver_streams", func() float64 { return float64(s.Streams()) })
	set.NewGauge("connect_node_pending_users", func() float64 { return float64(s.pending()) })
	set.NewGauge("connect_node_replay_gates", func() float64 { gates, _, _ := s.replays.sizes(); return float64(gates) })
	set.NewGauge("connect_node_replay_gates_closed", func() float64 { _, closed, _ := s.replays.sizes(); return float64(closed) })
	set.NewGauge("connect_node_replays", func() float64 { _, _, asked := s.replays.sizes(); return float64(asked) })
	set.NewGauge("connect_node_refusals", func() float64 { return float64(s.refusals.size.Load()) })
	set.NewGauge("connect_node_cursors", func() float64 { return float64(s.roomLogs.total.Load()) })
	set.NewGauge("connect_node_cursors_behind", func() float64 { behind, _ := s.roomLogs.sizes(); return float64(behind) })
	set.NewGauge("connect_node_room_log_reads", func() float64 { _, reads := s.roomLogs.sizes(); return float64(reads) })
}
