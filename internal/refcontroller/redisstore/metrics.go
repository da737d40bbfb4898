package redisstore

import "github.com/VictoriaMetrics/metrics"

type handles struct{ errors, gaps, losses *metrics.Counter }

func newHandles(s *Store, set *metrics.Set) handles {
	set.GetOrCreateGauge("controller_redis_others", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(len(s.others))
	})
	set.GetOrCreateGauge("controller_redis_unsettled", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.others) == 0 {
			return 0
		}
		return float64(s.change - min(s.change, s.settled))
	})
	return handles{
		errors: set.GetOrCreateCounter("controller_redis_errors_total"),
		gaps:   set.GetOrCreateCounter("controller_redis_gaps_total"),
		losses: set.GetOrCreateCounter("controller_redis_losses_total"),
	}
}
