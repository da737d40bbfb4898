package ingress

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/histogram"
	"github.com/push-manager/push-manager/internal/label"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// The words of the status label.
const (
	success uint8 = iota // Result.Success
	partial              // no success, and something was delivered
	failed               // nothing was delivered
	refused              // a gRPC error
	results              // how many there are
)

var resultNames = [results]string{"success", "partial", "failed", "error"}

// Why a push was refused for load.
const (
	refusedInFlight       uint8 = iota // its priority's share of the places in flight is used up
	refusedBusy                        // too many calls are worked on
	refusedMemory                      // memory runs out
	refusedRate                        // the caller is over its rate
	refusedSpace                       // there is no memory for the request
	refusedOpen                        // too many calls are open
	refusedStreams                     // too many streams are open
	refusedSlow                        // the request did not come in
	refusedUnread                      // the replies of a stream are not read
	refusedLookups                     // too many look-ups are under way
	refusedTenantRate                  // the tenant is over its rate
	refusedTenantInFlight              // too many pushes of the tenant are in flight
	refusedQuota                       // nothing is left of the caller's quota
	refusedTenantQuota                 // nothing is left of the tenant's quota
	refusedReceipts                    // too many pushes wait for receipts
	refusals                           // how many there are
)

var refusalNames = [refusals]string{"in_flight", "busy", "memory", "rate", "space", "open", "streams", "slow", "unread", "lookups", "tenant_rate", "tenant_in_flight", "quota", "tenant_quota", "receipts"}

// apiMetrics are the handles of one api.
type apiMetrics struct {
	requests [results]*metrics.Counter
	duration *metrics.Summary
	latency  *histogram.Histogram
}

// instruments are all handles of a Server, made once: looking one up by its name
// costs twenty times its use.
type instruments struct {
	apis [methods]apiMetrics // of unary calls, and pushes of PushStreams

	// Per target user; total is the sum of the others.
	total, success, failed, unknown, offline *metrics.Counter

	// Parts of offline, of stored, twice of success, and of offline.
	stored, unsure, acked, duplicates, filtered *metrics.Counter

	refused [4][refusals]*metrics.Counter // by rank of the priority, and why

	// Of callers that are not let in, by reason; and of pushes that they have no right to.
	unauthenticated map[auth.Reason]*metrics.Counter
	denied          *metrics.Counter

	panics    *metrics.Counter
	malformed *metrics.Counter // messages of a PushStream that ask for no api

	// Shown as gauges. In flight are unary calls and open streams alike.
	inflight atomic.Int64
	streams  atomic.Int64
	watchers atomic.Int64
	watched  atomic.Int64 // jobs, each by one watcher
	// Rooms and users, each by one watcher.
	presences atomic.Int64
}

func newInstruments(set *metrics.Set) *instruments {
	m := &instruments{
		total:      set.GetOrCreateCounter("push_manager_push_total"),
		success:    set.GetOrCreateCounter("push_manager_push_success_total"),
		failed:     set.GetOrCreateCounter("push_manager_push_failed_total"),
		unknown:    set.GetOrCreateCounter("push_manager_push_unknown_total"),
		offline:    set.GetOrCreateCounter("push_manager_push_offline_total"),
		stored:     set.GetOrCreateCounter("push_manager_push_stored_total"),
		unsure:     set.GetOrCreateCounter("push_manager_push_unsure_total"),
		acked:      set.GetOrCreateCounter("push_manager_push_acked_total"),
		duplicates: set.GetOrCreateCounter("push_manager_push_duplicate_total"),
		filtered:   set.GetOrCreateCounter("push_manager_push_filtered_total"),
		panics:     set.GetOrCreateCounter(`push_manager_panics_total{part="ingress"}`),
		malformed:  set.GetOrCreateCounter("push_manager_stream_malformed_total"),
	}
	for _, p := range engine.Priorities() {
		for why, name := range refusalNames {
			m.refused[p.Rank()][why] = set.GetOrCreateCounter(label.Name("push_manager_refused_total", "priority", p.String(), "reason", name))
		}
	}
	failures := func(reason string) *metrics.Counter {
		return set.GetOrCreateCounter(label.Name("push_manager_auth_failures_total", "reason", reason))
	}
	m.unauthenticated, m.denied = map[auth.Reason]*metrics.Counter{}, failures("permission")
	for _, reason := range auth.Reasons() { // others would count for nothing
		m.unauthenticated[reason] = failures(string(reason))
	}
	for a := range methods {
		if a == apis || a == watchReceipts || a == watchPresence {
			continue
		}
		h, name := &m.apis[a], a.String()
		if a > createJob && a.ofJobs() { // all of that service count together
			*h = m.apis[createJob]
			continue
		}
		if a == createJob {
			name = jobServiceMetric
		}
		for r, result := range resultNames {
			h.requests[r] = set.GetOrCreateCounter(label.Name("push_manager_api_requests_total", "api", name, "status", result))
		}
		h.duration = set.GetOrCreateSummaryExt(label.Name("push_manager_api_duration_seconds", "api", name),
			5*time.Minute, []float64{0.5, 0.9, 0.99, 0.999})
		h.latency = histogram.New(set, label.Name("push_manager_api_latency_seconds", "api", name),
			[]float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5})
	}
	set.GetOrCreateGauge("push_manager_api_inflight", func() float64 { return float64(m.inflight.Load()) })
	set.GetOrCreateGauge("push_manager_api_streams", func() float64 { return float64(m.streams.Load()) })
	set.GetOrCreateGauge("push_manager_job_watchers", func() float64 { return float64(m.watched.Load()) })
	set.GetOrCreateGauge("push_manager_presence_watchers", func() float64 { return float64(m.presences.Load()) })
	set.GetOrCreateGauge("push_manager_receipt_watchers", func() float64 { return float64(m.watchers.Load()) })
	return m
}

// record books one push. It is the only place that does, whichever way it came.
func (m *instruments) record(a api, p *engine.Push, res *engine.Result, err error, took time.Duration) {
	m.recordCall(a, resultOf(res, err), took)
	if err != nil {
		return
	}
	m.total.Add(res.Delivered + res.Failed + res.Unknown + res.Offline)
	add(m.success, res.Delivered)
	add(m.failed, res.Failed)
	add(m.unknown, res.Unknown)
	add(m.offline, res.Offline)
	if p.Options != nil {
		add(m.duplicates, res.Duplicates)
		add(m.filtered, res.Filtered)
		if !p.Options.Async {
			m.recordConfirmed(res)
		}
	}
}

// recordConfirmed books what is known of a push when its clients have acknowledged or have had their time.
func (m *instruments) recordConfirmed(res *engine.Result) {
	add(m.stored, res.Stored)
	add(m.unsure, res.Unsure)
	add(m.acked, res.Acked)
}

// recordCall books a call of any unary method, and each push of a PushStream.
func (m *instruments) recordCall(a api, result uint8, took time.Duration) {
	h := &m.apis[a]
	h.requests[result].Inc()
	seconds := took.Seconds()
	h.duration.Update(seconds)
	h.latency.Update(seconds)
}

// countRefusal books an error that is about load, or about who calls. Of others it takes no notice.
func (m *instruments) countRefusal(p engine.Priority, err error) {
	why := refusedLookups
	var unknown auth.Reason
	var denied deniedError
	var rate *rateError
	var quota *quotaError
	switch {
	case errors.As(err, &unknown):
		if c := m.unauthenticated[unknown]; c != nil {
			c.Inc()
		}
		return
	case errors.As(err, &denied):
		m.denied.Inc()
		return
	case errors.Is(err, throttle.ErrBusy):
		why = refusedBusy
	case errors.Is(err, engine.ErrInFlight):
		why = refusedInFlight
	case errors.Is(err, engine.ErrMemory):
		why = refusedMemory
	case errors.As(err, &rate):
		why = refusedRate
		if rate.tenant {
			why = refusedTenantRate
		}
	case errors.As(err, &quota):
		why = refusedQuota
		if quota.tenant {
			why = refusedTenantQuota
		}
	case errors.Is(err, errTenantInFlight):
		why = refusedTenantInFlight
	case errors.Is(err, errNoSpace):
		why = refusedSpace
	case errors.Is(err, errTooManyCalls):
		why = refusedOpen
	case errors.Is(err, errTooManyStreams), errors.Is(err, errStreamsOfOneConn):
		why = refusedStreams
	case errors.Is(err, engine.ErrAsync):
		why = refusedReceipts
	case errors.Is(err, errSlow):
		why = refusedSlow
	case errors.Is(err, errUnread):
		why = refusedUnread
	case !errors.Is(err, engine.ErrOverloaded):
		return
	default:
	}
	m.refused[p.Rank()][why].Inc()
}

func add(c *metrics.Counter, n int) {
	if n != 0 {
		c.Add(n)
	}
}

func resultOf(res *engine.Result, err error) uint8 {
	switch {
	case err != nil:
		return refused
	case res.Success():
		return success
	case res.Delivered > 0:
		return partial
	default:
		return failed
	}
}
