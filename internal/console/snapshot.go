package console

import (
	"cmp"
	"container/heap"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/histogram"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/link"
)

const (
	// maxBytes bounds a snapshot. Nodes get what the rest leaves.
	maxBytes = 64 << 10
	// callersBytes, othersBytes and othersMost bound what comes before them: whoever may register may choose long names.
	callersBytes = 4 << 10
	callersMost  = callersBytes / len(`["a","",0,0,0,0,0,0,0,0,0,0],`)
	othersBytes  = 8 << 10
	othersMost   = 32
	pagesMost    = 16
	reasonsMost  = 8
	// ackWindow is about how far back the times of acknowledgements go.
	ackWindow = 10 * time.Second
	// bootBytes is what is shown of a boot id.
	bootBytes = 8
	textMax   = 200
)

// metricPrefix begins the names of all metrics, and is left out.
const metricPrefix = "push_manager_"

// shownMetrics are those of a snapshot, by the names of docs/metrics.md without the prefix and labels. Those with labels are
// left out while they are 0.
var shownMetrics = []string{
	"push_total", "push_success_total", "push_failed_total", "push_unknown_total", "push_offline_total", "push_stored_total",
	"push_unsure_total", "push_acked_total", "push_duplicate_total", "push_async_open",
	"api_requests_total", "api_inflight", "api_streams", "api_connections", "api_connections_waiting", "api_space_bytes",
	"api_space_limit_bytes", "refused_total", "auth_failures_total", "panics_total", "pushes_in_flight", "shed_priorities",
	"memory_used_ratio", "backlog", "receipts_awaited", "policy_callers", "rate_callers", "audit_lost_total", "insecure",
	"quota_etcd_up", "registration_up", "discovery_held_nodes", "discovery_bad_value_total",
	"route_hits_total", "route_misses_total", "route_lookups_total", "route_lookup_errors_total", "route_stale_served_total",
	"route_waiting", "route_cached", "heals_total",
	"store_append_total", "store_bytes", "store_max_bytes", "store_log_bytes", "store_up", "store_queue_bytes", "store_queue_entries", "store_corrupt_total",
	"replay_total", "replay_messages_total", "replay_passed_over_total", "replay_open", "replay_line",
	"room_log_following", "room_log_reads_open", "room_log_tails", "room_log_tail_bytes", "room_log_partitions_broken",
	"receipts", "receipts_total", "receipts_lost_total", "receipt_webhook_active", "receipt_webhook_lost_total",
	"jobs", "jobs_running", "job_users_total",
}

// maker makes snapshots. It remembers what times are compared with.
type maker struct {
	cfg    *Config
	meters []meter // nil before the first snapshot: some are made when parts start

	base, next map[string][]uint64 // acknowledgements by node, as of before and as of turned
	turned     time.Time
}

// meter is a metric and how it is read.
type meter struct {
	name    string
	labels  bool
	counter *metrics.Counter // nil: it is a gauge
	gauge   *metrics.Gauge
}

func (m *meter) read() float64 {
	if m.counter != nil {
		return float64(m.counter.Get())
	}
	return m.gauge.Get()
}

func metersOf(set *metrics.Set) []meter {
	all := []meter{}
	for _, full := range set.ListMetricNames() {
		name, ours := strings.CutPrefix(full, metricPrefix)
		base, _, labels := strings.Cut(name, "{")
		if !ours || !slices.Contains(shownMetrics, base) {
			continue
		}
		m := meter{name: name, labels: labels}
		if strings.HasSuffix(base, "_total") {
			m.counter = set.GetOrCreateCounter(full)
		} else {
			m.gauge = set.GetOrCreateGauge(full, nil)
		}
		all = append(all, m)
	}
	return all
}

// table is rows of an array each, under names of columns. Left out are those for which there was no room. Well is of nodes.
type table struct {
	Well    int             `json:"well,omitempty"`
	Columns []string        `json:"columns"`
	Rows    json.RawMessage `json:"rows"`
	LeftOut int             `json:"left_out,omitempty"`
}

// rows gathers rows up to a size.
type rows struct {
	b       []byte
	most    int
	leftOut int
}

// add takes a row, if it fits. It is JSON without the brackets, and each value has a comma behind it.
func (r *rows) add(row []byte) {
	if len(r.b)+len(row)+len("],[") > r.most {
		r.leftOut++
		return
	}
	if len(r.b) > 0 {
		r.b = append(r.b, ',')
	}
	r.b = append(r.b, '[')
	r.b = append(r.b, row[:len(row)-1]...)
	r.b = append(r.b, ']')
}

func (r *rows) table(columns []string) table {
	return table{Columns: columns, Rows: slices.Concat([]byte("["), r.b, []byte("]")), LeftOut: r.leftOut}
}

func appendText(b []byte, text string) []byte {
	plain := func(r rune) bool {
		return ' ' <= r && r <= '~' && r != '"' && r != '\\' && r != '<' && r != '>' && r != '&'
	}
	if !strings.ContainsFunc(text, func(r rune) bool { return !plain(r) }) { // nearly all are
		b = append(append(b, '"'), text...)
		return append(b, '"', ',')
	}
	quoted, _ := json.Marshal(text) // of a string it does not fail
	return append(append(b, quoted...), ',')
}

func appendInt[T ~int | ~int64 | ~uint32 | ~uint64](b []byte, n T) []byte {
	return append(strconv.AppendInt(b, int64(n), 10), ',')
}

// appendFloat writes three digits.
func appendFloat(b []byte, v float64) []byte {
	return append(strconv.AppendFloat(b, v, 'g', 3, 64), ',')
}

// make makes a snapshot.
func (m *maker) make(now time.Time, others []Instance) ([]byte, error) {
	c := m.cfg
	if m.meters == nil {
		m.meters = metersOf(c.Metrics)
	}
	c.Collect()
	values := make(map[string]float64, len(m.meters))
	for i := range m.meters {
		if v := m.meters[i].read(); (v != 0 || !m.meters[i].labels) && !math.IsNaN(v) && !math.IsInf(v, 0) {
			values[m.meters[i].name] = v
		}
	}
	state := c.State()
	state.NotReady = slices.Clone(state.NotReady[:min(len(state.NotReady), reasonsMost)])
	for i, why := range state.NotReady {
		state.NotReady[i] = cut(why)
	}
	state.ControllerTrouble, state.EtcdTrouble = cut(state.ControllerTrouble), cut(state.EtcdTrouble)
	bounds, counts := c.Latencies()
	pages := c.Pages()
	rest, err := json.Marshal(struct {
		Time     int64               `json:"time"` // ms
		About    *About              `json:"about"`
		State    *State              `json:"state"`
		Metrics  map[string]float64  `json:"metrics"`
		Bounds   []float64           `json:"latency_bounds"`
		Counts   map[string][]uint64 `json:"latency_counts"`
		Callers  table               `json:"callers"`
		Others   []Instance          `json:"instances"`
		Features map[int32]string    `json:"features"`
		Warnings uint64              `json:"warnings"`
		Pages    []Page              `json:"pages,omitempty"`
	}{
		now.UnixMilli(), &c.About, &state, values, bounds, counts, callers(c.Callers()), fitting(others),
		link.FeatureNames(), c.Warnings.Total(), pages[:min(len(pages), pagesMost)],
	})
	if err != nil {
		return nil, fmt.Errorf("encode a snapshot: %w", err)
	}
	nodes, err := json.Marshal(m.nodes(now, maxBytes-len(rest)-512))
	if err != nil {
		return nil, fmt.Errorf("encode the nodes of a snapshot: %w", err)
	}
	out := make([]byte, 0, len(rest)+len(nodes)+16)
	out = append(out, `{"nodes":`...)
	out = append(out, nodes...)
	out = append(out, ',')
	return append(out, rest[1:]...), nil
}

// fitting are the first instances, as many as there is room for.
func fitting(all []Instance) []Instance {
	size := 0
	for i := range all {
		one, _ := json.Marshal(all[i]) // of texts it does not fail
		if size += len(one); size > othersBytes || i == othersMost {
			return all[:i]
		}
	}
	return all
}

func cut(text string) string {
	if len(text) > textMax {
		return strings.ToValidUTF8(text[:textMax], "") + "…"
	}
	return text
}

// nodeColumns are in the order of appendNode.
var nodeColumns = []string{
	"id", "address", "state", "connections", "links", "queued", "queued_bytes", "queued_ms", "unacked", "window", "unacked_ms",
	"ack_p50_ms", "ack_p99_ms", "frames", "breaks", "stalls", "boot", "features", "trouble",
}

// nodes are rows of all nodes, those first that are not well: if there is no room for all, they are not left out.
func (m *maker) nodes(now time.Time, most int) table {
	turn := now.Sub(m.turned) >= ackWindow
	if turn {
		m.base, m.next, m.turned = m.next, map[string][]uint64{}, now
	}
	bounds := link.AckBounds()
	r := rows{most: most}
	var row []byte
	var healthy [][]byte
	m.cfg.Nodes(func(d *link.NodeDetails) {
		if turn {
			m.next[d.ID] = slices.Clone(d.Acks)
		}
		row = appendNode(row[:0], d, bounds, m.base[d.ID])
		if d.State == link.NodeUp || d.State == link.NodeUnary {
			healthy = append(healthy, slices.Clone(row))
			return
		}
		r.add(row)
	})
	for _, row := range healthy {
		r.add(row)
	}
	t := r.table(nodeColumns)
	t.Well = len(healthy)
	return t
}

func appendNode(b []byte, d *link.NodeDetails, bounds []float64, before []uint64) []byte {
	var frames uint64
	for _, n := range d.Acks {
		frames += n
	}
	ms := func(q float64) float64 {
		v, _ := histogram.Quantile(bounds, d.Acks, before, q)
		return v * 1000
	}
	b = appendText(b, d.ID)
	b = appendText(b, d.Addr)
	b = appendText(b, d.State)
	b = appendInt(b, d.Connections)
	b = appendInt(b, d.Links)
	b = appendInt(b, d.Queued)
	b = appendInt(b, d.QueuedBytes)
	b = appendInt(b, d.QueuedFor.Milliseconds())
	b = appendInt(b, d.Unacked)
	b = appendInt(b, d.Window)
	b = appendInt(b, d.UnackedFor.Milliseconds())
	b = appendFloat(b, ms(0.5))
	b = appendFloat(b, ms(0.99))
	b = appendInt(b, frames)
	b = appendInt(b, d.Breaks)
	b = appendInt(b, d.Stalls)
	b = appendText(b, strings.ToValidUTF8(d.BootID[:min(len(d.BootID), bootBytes)], ""))
	b = appendInt(b, d.Features)
	return appendText(b, cut(d.Trouble))
}

// callerColumns are in the order of callers.
var callerColumns = []string{
	"name", "tenant", "rate", "rate_left", "daily", "daily_used", "tenant_rate", "tenant_rate_left", "tenant_daily", "tenant_daily_used",
	"tenant_in_flight", "tenant_in_flight_limit",
}

// callers are rows of those who have the least left first. There may be far more than there is room for: no more are sorted than
// could be shown.
func callers(all []ingress.CallerStatus) table {
	nearest := make(byLeft, 0, min(len(all), callersMost+1))
	for i := range all {
		one := caller{&all[i], leastLeft(&all[i])}
		switch {
		case len(nearest) < callersMost:
			heap.Push(&nearest, one)
		case one.before(nearest[0]):
			nearest[0] = one
			heap.Fix(&nearest, 0)
		}
	}
	slices.SortFunc(nearest, caller.compare)
	r := rows{most: callersBytes, leftOut: len(all) - len(nearest)}
	var row []byte
	for _, c := range nearest {
		row = appendText(row[:0], c.Name)
		row = appendText(row, c.Tenant)
		for _, n := range []int64{
			int64(c.Rate), int64(c.RateLeft), c.Daily, c.DailyUsed, int64(c.TenantRate), int64(c.TenantRateLeft), c.TenantDaily, c.TenantDailyUsed,
			c.TenantInFlight, c.TenantInFlightLimit,
		} {
			row = appendInt(row, n)
		}
		r.add(row)
	}
	return r.table(callerColumns)
}

// caller is a caller with the part of its limits that is left, of the limit that it is nearest to.
type caller struct {
	*ingress.CallerStatus

	left float64
}

func (c caller) compare(o caller) int {
	return cmp.Or(cmp.Compare(c.left, o.left), strings.Compare(c.Name, o.Name))
}

func (c caller) before(o caller) bool { return c.compare(o) < 0 }

func leastLeft(c *ingress.CallerStatus) float64 {
	least := 1.0
	for _, part := range [][2]float64{
		{float64(c.RateLeft), float64(c.Rate)}, {float64(c.Daily - c.DailyUsed), float64(c.Daily)},
		{float64(c.TenantRateLeft), float64(c.TenantRate)}, {float64(c.TenantDaily - c.TenantDailyUsed), float64(c.TenantDaily)},
	} {
		if part[1] > 0 {
			least = min(least, part[0]/part[1])
		}
	}
	return least
}

// byLeft is a heap of callers, the one with the most left on top.
type byLeft []caller

func (h byLeft) Len() int           { return len(h) }
func (h byLeft) Less(i, j int) bool { return h[j].before(h[i]) }
func (h byLeft) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *byLeft) Push(x any)        { *h = append(*h, x.(caller)) } //nolint:forcetypeassert // callers pushes nothing else
func (h *byLeft) Pop() any          { panic("nothing is taken off") }
