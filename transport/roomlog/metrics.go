package roomlog

import (
	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/label"
)

// result is how a read ended.
type result uint8

const (
	resultNothing result = iota // nothing is behind the place
	resultTail                  // out of the tail of the room
	resultStored                // out of the store
	resultGap                   // what was before is not known
	resultGone                  // the stream of the node ended
	resultStore                 // the store could not be read
	resultLate                  // not in time
	resultRefused               // too many, or this Push-Manager goes
	results
)

func (r result) String() string {
	return [results]string{"nothing", "tail", "stored", "gap", "gone", "store", "late", "refused"}[r]
}

// call is one of the store.
type call uint8

const (
	callHeads call = iota
	callRead
	callFollow
	calls
)

func (c call) String() string { return [calls]string{"heads", "read", "follow"}[c] }

const (
	gaugeReads   = "push_manager_room_log_reads_open"
	gaugeFollows = "push_manager_room_log_following"
	gaugeTails   = "push_manager_room_log_tails"
	gaugeBytes   = "push_manager_room_log_tail_bytes"
	gaugeBroken  = "push_manager_room_log_partitions_broken"
)

// meters are the metrics of a service.
type meters struct {
	set *metrics.Set

	ended        [results]*metrics.Counter
	errors       [calls]*metrics.Counter
	fills        *metrics.Counter
	marks        *metrics.Counter
	marksRefused *metrics.Counter
	renewals     *metrics.Counter
	violations   *metrics.Counter
	panics       *metrics.Counter
	wait         *metrics.PrometheusHistogram
}

func newMeters(set *metrics.Set, s *Service) *meters {
	c := func(name string) *metrics.Counter { return set.GetOrCreateCounter("push_manager_room_log_" + name) }
	m := &meters{
		set:          set,
		fills:        c("store_reads_total"),
		marks:        c("marks_total"),
		marksRefused: c("marks_refused_total"),
		renewals:     c("renewals_total"),
		violations:   c("violations_total"),
		panics:       set.GetOrCreateCounter(`push_manager_panics_total{part="room_log"}`),
		wait:         set.GetOrCreatePrometheusHistogramExt("push_manager_room_log_wait_seconds", []float64{.001, .005, .025, .1, .5, 2}),
	}
	for r := range results {
		m.ended[r] = c(label.Name("reads_total", "result", r.String()))
	}
	for e := range calls {
		m.errors[e] = c(label.Name("store_errors_total", "call", e.String()))
	}
	gauge := func(name string, f func() int) {
		set.GetOrCreateGauge(name, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return float64(f())
		})
	}
	gauge(gaugeReads, func() int { return s.open.Len() })
	gauge(gaugeFollows, func() (n int) {
		for _, st := range s.streams {
			if st.follow != nil {
				n++
			}
		}
		return n
	})
	ofGen := func(f func(g *generation) int) func() int {
		return func() int {
			if s.gen == nil {
				return 0
			}
			return f(s.gen)
		}
	}
	gauge(gaugeTails, ofGen(func(g *generation) int { return len(g.tails.byRoom) }))
	gauge(gaugeBytes, ofGen(func(g *generation) int { return g.tails.bytes }))
	gauge(gaugeBroken, ofGen(func(g *generation) (n int) {
		for _, p := range g.parts {
			if !p.broken.IsZero() {
				n++
			}
		}
		return n
	}))
	return m
}

func (m *meters) unregister() {
	for _, name := range []string{gaugeReads, gaugeFollows, gaugeTails, gaugeBytes, gaugeBroken} {
		m.set.UnregisterMetric(name)
	}
}
