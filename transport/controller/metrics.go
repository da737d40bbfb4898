package controller

import (
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/label"
)

// kind is what a look-up is for.
type kind uint8

const (
	kindRoom     kind = iota
	kindUser          // one user
	kindUsers         // several at once
	kindMembers       // a page of a room
	kindPresence      // where users are, with their rooms
	kinds
)

func (k kind) String() string {
	return [kinds]string{"room", "user", "users", "members", "presence"}[k]
}

// result is how a look-up ended.
type result uint8

const (
	resultFound result = iota
	resultNotFound
	resultError
	results
)

func (r result) String() string { return [results]string{"found", "not_found", "error"}[r] }

// loss is why the change stream's word is not good any more.
type loss uint8

const (
	lossSilent loss = iota // no mark came back
	lossPaused             // this process did not run
	lossBroken             // the stream ended
	losses
)

func (l loss) String() string { return [losses]string{"silent", "paused", "broken"}[l] }

// fault is what a Controller may not do on the change stream.
type fault uint8

const (
	faultSync  fault = iota // something before synced
	faultSeq                // a seq that does not rise
	faultMark               // a mark that was not sent
	faultPanic              // a message that we cannot take
	faults
)

func (f fault) String() string { return [faults]string{"sync", "seq", "mark", "panic"}[f] }

// handles are the metrics of a Controller.
type handles struct {
	lookups [kinds][results]*metrics.Counter
	seconds [kinds]*metrics.Summary
	retries *metrics.Counter
	badIDs  *metrics.Counter
	changes *metrics.Counter
	deltas  *metrics.Counter
	breaks  *metrics.Counter
	acks    *metrics.Counter
	losses  [losses]*metrics.Counter
	faults  [faults]*metrics.Counter
}

func newHandles(c *Controller, set *metrics.Set) *handles {
	h := &handles{
		retries: set.GetOrCreateCounter("push_manager_controller_retries_total"),
		badIDs:  set.GetOrCreateCounter("push_manager_controller_bad_ids_total"),
		changes: set.GetOrCreateCounter("push_manager_controller_changes_total"),
		deltas:  set.GetOrCreateCounter("push_manager_controller_deltas_total"),
		breaks:  set.GetOrCreateCounter("push_manager_controller_watch_breaks_total"),
		acks:    set.GetOrCreateCounter("push_manager_controller_watch_acks_total"),
	}
	for l := range losses {
		h.losses[l] = set.GetOrCreateCounter(label.Name("push_manager_controller_watch_losses_total", "reason", l.String()))
	}
	for f := range faults {
		h.faults[f] = set.GetOrCreateCounter(label.Name("push_manager_controller_watch_faults_total", "reason", f.String()))
	}
	for k := range kinds {
		h.seconds[k] = set.GetOrCreateSummaryExt(label.Name("push_manager_controller_lookup_seconds", "kind", k.String()), time.Minute, []float64{0.5, 0.9, 0.99})
		for r := range results {
			h.lookups[k][r] = set.GetOrCreateCounter(label.Name("push_manager_controller_lookups_total", "kind", k.String(), "result", r.String()))
		}
	}
	set.GetOrCreateGauge("push_manager_controller_watched", func() float64 { return oneIf(c.Watched()) })
	set.GetOrCreateGauge("push_manager_controller_watch_age_seconds", func() float64 { return c.watchAge().Seconds() })
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
