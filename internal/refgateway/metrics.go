package refgateway

import (
	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/label"
	"github.com/push-manager/push-manager/transport/node"
)

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

	// Of permessage-deflate.
	deflated       *metrics.Counter // frames that were written so
	deflateSaved   *metrics.Counter // bytes
	incompressible *metrics.Counter // pushes that are not smaller

	// Of pushes with options.
	acks       *metrics.Counter // messages of clients
	acked      *metrics.Counter
	givenUp    *metrics.Counter
	unanswered *metrics.Counter // clients that were cut off
	duplicates *metrics.Counter
	stalled    *metrics.Counter
	expired    *metrics.Counter
	collapsed  *metrics.Counter
	held       *metrics.Counter
	replayed   *metrics.Counter
}

// settled counts a push that the inbox of a connection has not taken.
func (c *counters) settled(outcome node.Outcome) {
	switch outcome {
	case node.Duplicate:
		c.duplicates.Inc()
	case node.Stalled:
		c.stalled.Inc()
	case node.Expired:
		c.expired.Inc()
	default: // the node counts the others
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
	set.NewGauge("connect_node_connections", func() float64 { return float64(g.users.Connections()) })
	set.NewGauge("connect_node_users", func() float64 { return float64(g.users.Online()) })
	set.NewGauge("connect_node_queue_bytes", func() float64 { return float64(g.held.Load()) })
	set.NewGauge("connect_node_inbox_frames", func() float64 { return float64(g.waiting.Load()) })
	set.NewGauge("connect_node_inbox_bytes", func() float64 { return float64(g.kept.Load()) })
	set.NewGauge("connect_node_unverified", func() float64 { return float64(g.unverified.len()) })
	for _, reason := range append(jwt.Reasons(), deniedMissing, deniedTimeout, deniedEvicted, deniedClaim, deniedOther, deniedRoom, deniedWithdrawn, deniedRefused) {
		g.denied(string(reason)) // there is a zero before the first one
	}
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

		deflated:       set.NewCounter("connect_node_deflated_frames_total"),
		deflateSaved:   set.NewCounter("connect_node_deflate_saved_bytes_total"),
		incompressible: set.NewCounter("connect_node_deflate_incompressible_total"),

		acks:       set.NewCounter("connect_node_client_acks_total"),
		acked:      set.NewCounter("connect_node_push_frames_acked_total"),
		givenUp:    set.NewCounter("connect_node_push_frames_given_up_total"),
		unanswered: set.NewCounter("connect_node_unanswered_clients_total"),
		duplicates: set.NewCounter("connect_node_push_frames_duplicate_total"),
		stalled:    set.NewCounter("connect_node_push_frames_stalled_total"),
		expired:    set.NewCounter("connect_node_push_frames_expired_total"),
		collapsed:  set.NewCounter("connect_node_push_frames_collapsed_total"),
		held:       set.NewCounter("connect_node_push_frames_held_total"),
		replayed:   set.NewCounter("connect_node_push_frames_replayed_total"),
	}
}

// denied counts clients that are not let in, or not any more. The reasons are those of jwt and ours.
func (g *Gateway) denied(reason string) *metrics.Counter {
	return g.cfg.Metrics.GetOrCreateCounter(label.Name("connect_node_clients_denied_total", "reason", reason))
}
