package link

import (
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/label"
)

// canary measures one heartbeat at a time, from the moment when it is due to its
// answer: the writer, the stream, the node's reader behind all that was written
// before, its sender of acks behind those that are ready, and our reader. The clients
// of the node are not on that way.
type canary struct {
	at      int64     // running time of the last start
	started time.Time // zero while none is under way
	beat    uint64    // its number, 0 until it leaves
	ok      bool      // the last one has come back
}

// next is the running time of the next start.
func (c *canary) next(pause time.Duration) int64 {
	if pause == 0 || !c.started.IsZero() {
		return noDeadline
	}
	return c.at + int64(pause)
}

func (c *canary) due(ran int64, pause time.Duration) bool { return ran >= c.next(pause) }

func (c *canary) start(ran int64) { c.at, c.started, c.beat = ran, time.Now(), 0 }

// leave gives the canary that is under way the heartbeat that is about to be written.
func (c *canary) leave(beat uint64) {
	if !c.started.IsZero() && c.beat == 0 {
		c.beat = beat
	}
}

// back ends the canary if its heartbeat is among the answered ones, and returns how
// long it took, at least a nanosecond then, else 0.
func (c *canary) back(answered uint64) time.Duration {
	if c.beat == 0 || answered < c.beat {
		return 0
	}
	took := time.Since(c.started)
	c.started, c.beat, c.ok = time.Time{}, 0, true
	return max(took, 1)
}

// up tells whether the last canary has come back, and none is overdue.
func (c *canary) up(patience time.Duration) bool {
	return c.ok && (c.started.IsZero() || time.Since(c.started) < patience)
}

// The names of a node's metrics.
func canaryUp(node string) string {
	return label.Name("push_manager_link_canary_up", "node_id", node)
}

func canarySeconds(node string) string {
	return label.Name("push_manager_link_canary_seconds", "node_id", node)
}

// keepCanary adds the metrics of a node whose first stream is there, and leaveCanary must
// follow when the stream has ended. A node without Deliver never gets here: it has no
// heartbeat to measure.
func (s *Set) keepCanary(n *node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n.streams++
	if n.canary.Load() != nil {
		return
	}
	bounds := []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1}
	if s.closed || s.snapshot.Load().byID[n.id] != n { // gone in the meantime: nobody shall see it
		n.canary.Store(metrics.NewSet().NewPrometheusHistogramExt("push_manager_link_canary_seconds", bounds))
		return
	}
	n.canary.Store(s.meters.set.GetOrCreatePrometheusHistogramExt(canarySeconds(n.id), bounds))
	s.meters.set.GetOrCreateGauge(canaryUp(n.id), func() float64 {
		if n.canariesUp() {
			return 1
		}
		return 0
	})
}

func (s *Set) leaveCanary(n *node) {
	s.mu.Lock()
	n.streams--
	s.mu.Unlock()
}

// loseCanary removes the metrics of a node that turns out to have no Deliver any more.
// While another shard has a stream to what the node was before they stay: that shard, too,
// finds out when its stream ends.
func (s *Set) loseCanary(n *node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n.streams > 0 || s.closed || s.snapshot.Load().byID[n.id] != n { // gone: the metrics may be its successor's
		return
	}
	s.endCanary(n)
	n.canary.Store(nil)
}

// endCanary removes the metrics of a node that is gone. s.mu is held, or all links
// have ended.
func (s *Set) endCanary(n *node) {
	if n.canary.Load() != nil {
		s.meters.set.UnregisterMetric(canarySeconds(n.id))
		s.meters.set.UnregisterMetric(canaryUp(n.id))
	}
}

// canariesUp tells whether every shard's last canary has come back, and in time.
func (n *node) canariesUp() bool {
	for _, l := range n.links {
		l.mu.Lock()
		ok := l.stream != nil && l.stream.canary.up(l.set.cfg.AckTimeout)
		l.mu.Unlock()
		if !ok {
			return false
		}
	}
	return true
}
