package controller

import (
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/label"
)

// kind is what a look-up is for.
type kind uint8

const (
	kindRoom  kind = iota
	kindUser       // one user
	kindUsers      // several at once
	kinds
)

func (k kind) String() string { return [kinds]string{"room", "user", "users"}[k] }

// result is how a look-up ended.
type result uint8

const (
	resultFound result = iota
	resultNotFound
	resultError
	results
)

func (r result) String() string { return [results]string{"found", "not_found", "error"}[r] }

// handles are the metrics of a Controller.
type handles struct {
	lookups [kinds][results]*metrics.Counter
	seconds [kinds]*metrics.Summary
	retries *metrics.Counter
	badIDs  *metrics.Counter
	changes *metrics.Counter
	breaks  *metrics.Counter
}

func newHandles(c *Controller, set *metrics.Set) *handles {
	h := &handles{
		retries: set.GetOrCreateCounter("push_manager_controller_retries_total"),
		badIDs:  set.GetOrCreateCounter("push_manager_controller_bad_ids_total"),
		changes: set.GetOrCreateCounter("push_manager_controller_changes_total"),
		breaks:  set.GetOrCreateCounter("push_manager_controller_watch_breaks_total"),
	}
	for k := range kinds {
		h.seconds[k] = set.GetOrCreateSummaryExt(label.Name("push_manager_controller_lookup_seconds", "kind", k.String()), time.Minute, []float64{0.5, 0.9, 0.99})
		for r := range results {
			h.lookups[k][r] = set.GetOrCreateCounter(label.Name("push_manager_controller_lookups_total", "kind", k.String(), "result", r.String()))
		}
	}
	set.GetOrCreateGauge("push_manager_controller_watched", func() float64 { return oneIf(c.watched.Load()) })
	set.GetOrCreateGauge("push_manager_controller_up", func() float64 { return oneIf(c.Healthy()) })
	return h
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// lookup counts one look-up.
func (h *handles) lookup(k kind, r result, began time.Time) {
	h.lookups[k][r].Inc()
	h.seconds[k].UpdateDuration(began)
}
