package ingress

import (
	"context"
	"fmt"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/maypok86/otter/v2"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/peer"

	"github.com/push-manager/push-manager/engine"
)

// callers has the budgets of those who called lately. Who has not been heard of for so long
// that others took the place starts again with a full one: the bound is on memory, and
// there must be room for all callers that are served at a time.
type callers struct {
	limit rate.Limit
	burst int
	table *otter.Cache[string, *budget]
}

// newCallers returns nil if nobody is limited.
func newCallers(c *Config) (*callers, error) {
	if c.Rate == 0 {
		return nil, nil //nolint:nilnil // No callers: nobody counts what they do.
	}
	table, err := otter.New(&otter.Options[string, *budget]{MaximumSize: c.RateCallers})
	if err != nil {
		return nil, fmt.Errorf("make the table of callers: %w", err)
	}
	return &callers{limit: rate.Limit(c.Rate), burst: c.RateBurst, table: table}, nil
}

// of is the budget of a caller.
func (c *callers) of(name string) *budget {
	if b, ok := c.table.GetIfPresent(name); ok {
		return b
	}
	b, _ := c.table.SetIfAbsent(name, &budget{limiter: rate.NewLimiter(c.limit, c.burst)})
	return b
}

// show makes the gauge of how many there are.
func (c *callers) show(set *metrics.Set) {
	set.GetOrCreateGauge("push_manager_rate_callers", func() float64 {
		if c == nil {
			return 0
		}
		return float64(c.table.EstimatedSize())
	})
}

// budget is a token bucket. A push costs 1 when it comes in and 1 for each node that it is
// sent to. The first must be there; the rest, which is known only once the push is
// routed, is taken in any case, as a debt if need be.
type budget struct{ limiter *rate.Limiter }

var _ engine.Budget = (*budget)(nil)

// take takes what a push costs when it comes in. One that is refused changes nothing: a
// reservation given back would, if others were made meanwhile.
func (b *budget) take() error {
	now := time.Now()
	if b.limiter.AllowN(now, 1) {
		return nil
	}
	missing := 1 - b.limiter.TokensAt(now)
	return &rateError{after: max(time.Duration(missing/float64(b.limiter.Limit())*float64(time.Second)), 0)}
}

// Charge implements engine.Budget.
func (b *budget) Charge(deliveries int) {
	// In pieces: a reservation larger than the burst is none at all.
	burst := b.limiter.Burst()
	for now := time.Now(); deliveries > 0; deliveries -= burst {
		b.limiter.ReserveN(now, min(deliveries, burst))
	}
}

// peerOf names a caller by its address, the port left aside: all connections of one machine
// are one caller, and so are all callers behind a balancer that does not pass addresses on.
func peerOf(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	return hostOf(p.Addr)
}
