package telemetry

import (
	"runtime/debug"
	"strconv"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/buildinfo"
	"github.com/push-manager/push-manager/internal/label"
)

// EngineMetrics shows the counters of the engine and the parts below it, which
// know no metrics library.
type EngineMetrics struct {
	// Static after NewEngineMetrics.
	engine *engine.Engine
	set    *metrics.Set
	shards []shardMetrics

	inFlight, waiting, watched, fenced, backlog           *metrics.Gauge
	async, receipts                                       *metrics.Gauge
	cachedRooms, cachedUsers, cachedMembers, cachedUnions *metrics.Gauge
	heals, hits, misses, lookups, lookupErrors            *metrics.Counter
	staleServed, refreshes, confirmed, doubted, moves     *metrics.Counter
	fences, stale, changed, rejected                      *metrics.Counter
	panics, poolPanics                                    *metrics.Counter
}

type shardMetrics struct {
	running, limit *metrics.Gauge
}

// NewEngineMetrics makes the metrics in set. Collect refreshes them.
func NewEngineMetrics(e *engine.Engine, set *metrics.Set) *EngineMetrics {
	gauge := func(name string) *metrics.Gauge { return set.NewGauge(name, nil) }
	m := &EngineMetrics{
		engine: e, set: set,
		inFlight:      gauge("push_manager_pushes_in_flight"),
		waiting:       gauge("push_manager_route_waiting"),
		watched:       gauge("push_manager_route_watched"),
		fenced:        gauge("push_manager_route_fenced"),
		backlog:       gauge("push_manager_backlog"),
		async:         gauge("push_manager_push_async_open"),
		receipts:      gauge("push_manager_receipts_awaited"),
		cachedRooms:   gauge(`push_manager_route_cached{what="rooms"}`),
		cachedUsers:   gauge(`push_manager_route_cached{what="users"}`),
		cachedMembers: gauge(`push_manager_route_cached{what="members"}`),
		cachedUnions:  gauge(`push_manager_route_cached{what="unions"}`),
		heals:         set.NewCounter("push_manager_heals_total"),
		hits:          set.NewCounter("push_manager_route_hits_total"),
		misses:        set.NewCounter("push_manager_route_misses_total"),
		lookups:       set.NewCounter("push_manager_route_lookups_total"),
		lookupErrors:  set.NewCounter("push_manager_route_lookup_errors_total"),
		staleServed:   set.NewCounter("push_manager_route_stale_served_total"),
		refreshes:     set.NewCounter("push_manager_route_refreshes_total"),
		confirmed:     set.NewCounter("push_manager_route_confirmed_total"),
		doubted:       set.NewCounter("push_manager_route_doubted_total"),
		moves:         set.NewCounter("push_manager_route_deltas_total"),
		stale:         set.NewCounter(`push_manager_route_stale_pushes_total{route="unconfirmed"}`),
		changed:       set.NewCounter(`push_manager_route_stale_pushes_total{route="changed"}`),
		fences:        set.NewCounter("push_manager_route_fences_total"),
		rejected:      set.NewCounter("push_manager_pool_rejected_total"),
		panics:        set.NewCounter(`push_manager_panics_total{part="engine"}`),
		poolPanics:    set.NewCounter("push_manager_pool_panics_total"),
	}
	for i := range e.Stats().Shards {
		label := `{shard="` + strconv.Itoa(i) + `"}`
		m.shards = append(m.shards, shardMetrics{
			running: gauge("push_manager_pool_goroutines" + label),
			limit:   gauge("push_manager_pool_limit" + label),
		})
	}
	m.Collect()
	return m
}

// Collect reads the counters.
func (m *EngineMetrics) Collect() {
	s := m.engine.Stats()
	d := &s.Directory
	m.inFlight.Set(float64(s.InFlight))
	m.heals.Set(s.Heals)
	m.panics.Set(s.Panics)
	m.waiting.Set(float64(d.Waiting))
	m.cachedRooms.Set(float64(d.Rooms))
	m.cachedUsers.Set(float64(d.Users))
	m.cachedMembers.Set(float64(d.Members))
	m.cachedUnions.Set(float64(d.Unions))
	watched := 0.0
	if d.Watched {
		watched = 1
	}
	m.watched.Set(watched)
	m.hits.Set(d.Hits)
	m.misses.Set(d.Misses)
	m.lookups.Set(d.Lookups)
	m.lookupErrors.Set(d.LookupErrors)
	m.staleServed.Set(d.StaleServed)
	m.refreshes.Set(d.Refreshes)
	m.confirmed.Set(d.Confirmed)
	m.doubted.Set(d.Doubted)
	m.moves.Set(d.Moves)
	m.fences.Set(s.Fences)
	m.fenced.Set(float64(s.Fenced))
	m.backlog.Set(float64(s.Backlog))
	m.async.Set(float64(s.Async))
	m.receipts.Set(float64(s.Receipts))
	m.stale.Set(s.Stale - s.Changed)
	m.changed.Set(s.Changed)
	// The reasons are a fixed set of texts of the engine's own.
	for reason, n := range s.Deliveries {
		m.set.GetOrCreateCounter(`push_manager_deliveries_total{reason="` + reason + `"}`).Set(n)
	}
	m.collectShards(s)
}

func (m *EngineMetrics) collectShards(s engine.Stats) {
	var rejected, panics uint64
	for i, sh := range s.Shards {
		rejected += sh.Rejected
		panics += sh.Panics
		if i < len(m.shards) {
			m.shards[i].running.Set(float64(sh.Running))
			m.shards[i].limit.Set(float64(sh.Limit))
		}
	}
	m.rejected.Set(rejected)
	m.poolPanics.Set(panics)
}

// BuildInfo shows what runs, as a metric that is always 1.
func BuildInfo(set *metrics.Set) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return
	}
	set.GetOrCreateGauge(label.Name("push_manager_build_info", "version", buildinfo.Version(), "go", info.GoVersion),
		func() float64 { return 1 })
}
