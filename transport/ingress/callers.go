package ingress

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/maypok86/otter/v2"
	"google.golang.org/grpc/peer"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/remote"
)

// callers has the budgets of those who called lately. Who has not been heard of for so long
// that others took the place starts again with a full one: the bound is on memory, and
// there must be room for all callers that are served at a time.
type callers struct {
	rate  int
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
	return &callers{rate: c.Rate, burst: c.RateBurst, table: table}, nil
}

// of is the budget of a caller.
func (c *callers) of(name string) *budget {
	if b, ok := c.table.GetIfPresent(name); ok {
		return b
	}
	b, _ := c.table.SetIfAbsent(name, newBudget(c.rate, c.burst))
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
//
// Who is refused is told when to come back, each in turn: were all told the same, they would come
// together, and all but one would be refused again. A turn takes nothing from the bucket, so
// whoever does not come costs nothing.
type budget struct {
	// Static.
	rate, burst float64

	mu     sync.Mutex
	tokens float64 // by then; below 0 it is a debt
	then   time.Time
	cost   float64   // of a push, on average lately
	turn   time.Time // of the last who was told to come back
}

var _ engine.Budget = (*budget)(nil)

const (
	// usualCost is that of a push to a user who is there.
	usualCost = 2
	// longestTurn is the latest that anybody is told to come back.
	longestTurn = 30 * time.Second
	// lateTurn is how much later than its turn anybody is expected.
	lateTurn = 100 * time.Millisecond
)

func newBudget(rate, burst int) *budget {
	return &budget{rate: float64(rate), burst: float64(burst), tokens: float64(burst), then: time.Now(), cost: usualCost}
}

// take takes what a push costs when it comes in. One that is refused changes nothing.
func (b *budget) take() error {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tokens = min(b.tokens+now.Sub(b.then).Seconds()*b.rate, b.burst)
	b.then = now
	if b.tokens > 1-1e-6 { // it is a sum of fractions
		b.tokens--
		if b.tokens > 1+b.rate*lateTurn.Seconds() {
			b.turn = time.Time{} // those who were told to come have not
		}
		return nil
	}
	turn := now.Add(b.after(1 - b.tokens))
	if next := b.turn.Add(b.after(b.cost)); next.After(turn) {
		turn = next
	}
	if last := now.Add(longestTurn); turn.After(last) {
		return &rateError{after: longestTurn}
	}
	b.turn = turn
	return &rateError{after: turn.Sub(now)}
}

// after is how long so many tokens take.
func (b *budget) after(tokens float64) time.Duration {
	return time.Duration(tokens / b.rate * float64(time.Second))
}

// Charge implements engine.Budget.
func (b *budget) Charge(deliveries int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tokens -= float64(deliveries)
	b.cost += (1 + float64(deliveries) - b.cost) / 8
}

// peerOf names a caller by its address, the port left aside: all connections of one machine
// are one caller, and so are all callers behind a balancer that does not pass addresses on.
func peerOf(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	return remote.Host(p.Addr)
}
