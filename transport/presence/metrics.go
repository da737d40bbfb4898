package presence

import (
	"strings"
	"sync/atomic"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/label"
	pubsub "github.com/push-manager/push-manager/proto"
)

// lookResult is how a look at what is watched ended.
type lookResult uint8

const (
	lookOK      lookResult = iota
	lookDoubted            // the answer was stale, or the Controller may not know all yet
	lookFailed
	lookResults
)

func (r lookResult) String() string { return [lookResults]string{"ok", "doubted", "error"}[r] }

// instruments are the metrics of a Service.
type instruments struct {
	looks     [lookResults]*metrics.Counter
	changes   *metrics.Counter
	snapshots map[pubsub.SnapshotReason]*metrics.Counter
	panics    *metrics.Counter
	waiting   atomic.Int64
}

func newInstruments(s *Service, set *metrics.Set) *instruments {
	m := &instruments{
		changes:   set.GetOrCreateCounter("push_manager_presence_changes_total"),
		panics:    set.GetOrCreateCounter(`push_manager_panics_total{part="presence"}`),
		snapshots: map[pubsub.SnapshotReason]*metrics.Counter{},
	}
	for r := range lookResults {
		m.looks[r] = set.GetOrCreateCounter(label.Name("push_manager_presence_looks_total", "result", r.String()))
	}
	for number, name := range pubsub.SnapshotReason_name {
		if number != 0 {
			reason := strings.ToLower(strings.TrimPrefix(name, "SNAPSHOT_"))
			m.snapshots[pubsub.SnapshotReason(number)] = set.GetOrCreateCounter(label.Name("push_manager_presence_snapshots_total", "reason", reason))
		}
	}
	set.GetOrCreateGauge("push_manager_presence_watched", func() float64 { return float64(s.count.Load()) })
	set.GetOrCreateGauge("push_manager_presence_waiting", func() float64 { return float64(m.waiting.Load()) })
	return m
}
