package ingress

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/maypok86/otter/v2"
	"google.golang.org/grpc/peer"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/quota"
	"github.com/push-manager/push-manager/internal/remote"
)

// callers has the accounts of those who called lately. Who is known by an address alone, and has not been heard of for
// so long that others took the place, starts again with a full budget: the bound is on memory, and there must be room
// for all callers that are served at a time. Callers of a policy are no more than it names, and stay.
type callers struct {
	// Static.
	rate      int
	burst     int
	auth      *auth.Authenticator            // nil: what is asked for is of the policy of now
	quotas    *quota.Set                     // nil: there are none
	addresses *otter.Cache[string, *account] // nil: nobody is limited by address
	named     sync.Map                       // of *account by *auth.Caller, a pointer, so that a look-up allocates nothing

	// What accounts of named callers are made of. It outlives policies, so a reload fills no bucket.
	mu      sync.Mutex
	latest  map[string]*auth.Caller // whose account is in named, by name
	budgets map[string]*budget
	tenants map[string]*tenant
}

func newCallers(c *Config) (*callers, error) {
	all := &callers{rate: c.Rate, burst: c.RateBurst, auth: c.Auth, quotas: c.Quotas, latest: map[string]*auth.Caller{}, budgets: map[string]*budget{}, tenants: map[string]*tenant{}}
	if c.Rate == 0 || c.Auth != nil {
		return all, nil
	}
	var err error
	if all.addresses, err = otter.New(&otter.Options[string, *account]{MaximumSize: c.RateCallers}); err != nil {
		return nil, fmt.Errorf("make the table of callers: %w", err)
	}
	return all, nil
}

// atAddress is the account of a caller that is known by its address.
func (c *callers) atAddress(name string) *account {
	if a, ok := c.addresses.GetIfPresent(name); ok {
		return a
	}
	a, _ := c.addresses.SetIfAbsent(name, &account{budget: newBudget(c.rate, c.burst)})
	return a
}

// of is the account of a caller of the policy, nil if nothing is counted. With another policy the limits change, and
// what is spent stays.
func (c *callers) of(who *auth.Caller) *account {
	if known, ok := c.named.Load(who); ok {
		return known.(*account).orNil() //nolint:forcetypeassert // Nothing else is in it.
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.auth != nil {
		// A call may have been let in by the policy before. It must not bring back what others were limited by then.
		if now := c.auth.Caller(who.Name); now != nil {
			who = now
		} else if last := c.latest[who.Name]; last != nil {
			who = last
		}
		if known, ok := c.named.Load(who); ok {
			return known.(*account).orNil() //nolint:forcetypeassert // Nothing else is in it.
		}
	}
	a := &account{}
	switch {
	case who.Rate > 0:
		a.budget = budgetOf(c.budgets, who.Name, who.Rate, who.Rate)
	case c.rate > 0:
		a.budget = budgetOf(c.budgets, who.Name, c.rate, c.burst)
	}
	if c.quotas != nil {
		a.quota = c.quotas.Caller(who.Name)
	}
	if who.Tenant != "" && who.TenantLimits != (auth.TenantLimits{}) {
		t := c.tenants[who.Tenant]
		if t == nil {
			t = &tenant{}
			c.tenants[who.Tenant] = t
		}
		t.most.Store(int64(who.TenantLimits.MaxInFlight))
		a.tenant = t
		if rate := who.TenantLimits.Rate; rate > 0 {
			if t.budget == nil {
				t.budget = newBudget(rate, rate)
			}
			t.budget.limit(rate, rate)
			a.tenantBudget = t.budget
		}
		if c.quotas != nil {
			a.tenantQuota = c.quotas.Tenant(who.Tenant)
		}
	}
	if before := c.latest[who.Name]; before != nil {
		c.named.Delete(before)
	}
	c.latest[who.Name] = who
	c.named.Store(who, a)
	return a.orNil()
}

// budgetOf is the budget of a name, with this rate from now on.
func budgetOf(all map[string]*budget, name string, rate, burst int) *budget {
	b := all[name]
	if b == nil {
		b = newBudget(rate, burst)
		all[name] = b
	}
	b.limit(rate, burst)
	return b
}

// show makes the gauge of how many there are.
func (c *callers) show(set *metrics.Set) {
	set.GetOrCreateGauge("push_manager_rate_callers", func() float64 {
		if c.addresses != nil {
			return float64(c.addresses.EstimatedSize())
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		return float64(len(c.budgets))
	})
}

// account is what a caller's pushes are counted by: its own limits, and those of its tenant. It is immutable; what it
// refers to is shared with the accounts of other callers of the tenant, and of other policies.
type account struct {
	budget       *budget      // nil: no rate
	quota        *quota.Quota // nil: no quota
	tenant       *tenant      // nil: no tenant with limits
	tenantBudget *budget
	tenantQuota  *quota.Quota
}

var _ engine.Budget = (*account)(nil)

// tenant is what all callers of a tenant have in common.
type tenant struct {
	most     atomic.Int64 // pushes in flight; 0: no bound
	inFlight atomic.Int64
	budget   *budget // guarded by callers.mu
}

func (a *account) orNil() *account {
	if a.budget == nil && a.quota == nil && a.tenant == nil {
		return nil
	}
	return a
}

// enter has a push paid for by the caller and its tenant, by both or by neither. Without an error it owes a leave.
func (a *account) enter() error {
	if t := a.tenant; t != nil {
		if n, most := t.inFlight.Add(1), t.most.Load(); most > 0 && n > most {
			t.inFlight.Add(-1)
			return errTenantInFlight
		}
	}
	if a.quota != nil {
		if err := a.quota.Take(); err != nil {
			a.exit()
			return &quotaError{cause: err}
		}
	}
	if a.tenantQuota != nil {
		if err := a.tenantQuota.Take(); err != nil {
			if a.quota != nil {
				a.quota.Return()
			}
			a.exit()
			return &quotaError{cause: err, tenant: true}
		}
	}
	if err := pay(a.budget, a.tenantBudget, time.Now()); err != nil {
		a.leave(true)
		return err
	}
	return nil
}

// leave ends what enter began. Of a push that was refused after it, the quotas get theirs back.
func (a *account) leave(refused bool) {
	if refused {
		if a.quota != nil {
			a.quota.Return()
		}
		if a.tenantQuota != nil {
			a.tenantQuota.Return()
		}
	}
	a.exit()
}

func (a *account) exit() {
	if a.tenant != nil {
		a.tenant.inFlight.Add(-1)
	}
}

// Charge implements engine.Budget.
func (a *account) Charge(cost int) {
	if a.budget != nil {
		a.budget.charge(cost)
	}
	if a.tenantBudget != nil {
		a.tenantBudget.charge(cost)
	}
}

// quotaError refuses a push for a quota of its caller or tenant.
type quotaError struct {
	cause  error // of package quota
	tenant bool
}

func (e *quotaError) Error() string { return e.cause.Error() }
func (e *quotaError) Unwrap() error { return e.cause }

func (e *quotaError) reason() string {
	switch {
	case errors.Is(e, quota.ErrPending):
		return reasonQuotaPending
	case errors.Is(e, quota.ErrUnavailable):
		return reasonQuotaAway
	case e.tenant:
		return reasonTenantQuota
	default:
		return reasonQuota
	}
}

// errTenantInFlight refuses a push while too many of its tenant are not finished.
var errTenantInFlight = errors.New("too many pushes of the tenant are in flight")

// budget is a token bucket, of a caller or of a tenant. A push costs 1 when it comes in, 1 for each node that it is
// sent to, and 1 for each of several rooms that is looked up for it. The first must be there; the rest, which is known only
// once the push is routed, is taken in any case, as a debt if need be.
//
// Who is refused is told when to come back, each in turn: were all told the same, they would come
// together, and all but one would be refused again. A turn takes nothing from the bucket, so
// whoever does not come costs nothing.
type budget struct {
	mu          sync.Mutex
	rate, burst float64
	tokens      float64 // by then; below 0 it is a debt
	then        time.Time
	cost        float64   // of a push, on average lately
	turn        time.Time // of the last who was told to come back
}

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

// limit changes the rate from now on. What has been spent stays spent.
func (b *budget) limit(rate, burst int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fillLocked(time.Now())
	b.rate, b.burst = float64(rate), float64(burst)
	b.tokens = min(b.tokens, b.burst)
}

func (b *budget) fillLocked(now time.Time) {
	b.tokens = min(b.tokens+now.Sub(b.then).Seconds()*b.rate, b.burst)
	b.then = now
}

// pay takes what a push costs when it comes in from a caller's budget and its tenant's, which may be nil. One that is
// refused changes neither, and is told to come back when both have means again.
func pay(caller, tenant *budget, now time.Time) error {
	first, second := caller, tenant
	if first == nil {
		first, second = tenant, nil
	}
	if first == nil {
		return nil
	}
	first.mu.Lock() // a caller's before a tenant's
	defer first.mu.Unlock()
	first.fillLocked(now)
	able, secondAble := first.ableLocked(), true
	if second != nil {
		second.mu.Lock()
		defer second.mu.Unlock()
		second.fillLocked(now)
		secondAble = second.ableLocked()
	}
	if able && secondAble {
		first.spendLocked()
		if second != nil {
			second.spendLocked()
		}
		return nil
	}
	refused := &rateError{tenant: first == tenant}
	if !able {
		refused.after = first.turnLocked(now)
	}
	if !secondAble {
		if after := second.turnLocked(now); after > refused.after {
			refused.after, refused.tenant = after, true
		}
	}
	return refused
}

// left is how many pushes it lets through now.
func (b *budget) left(now time.Time) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fillLocked(now)
	return max(int(b.tokens), 0)
}

func (b *budget) ableLocked() bool { return b.tokens > 1-1e-6 } // it is a sum of fractions

func (b *budget) spendLocked() {
	b.tokens--
	if b.tokens > 1+b.rate*lateTurn.Seconds() {
		b.turn = time.Time{} // those who were told to come have not
	}
}

// turnLocked is when whoever is refused now is to come back.
func (b *budget) turnLocked(now time.Time) time.Duration {
	turn := now.Add(b.after(1 - b.tokens))
	if next := b.turn.Add(b.after(b.cost)); next.After(turn) {
		turn = next
	}
	if last := now.Add(longestTurn); turn.After(last) {
		return longestTurn
	}
	b.turn = turn
	return turn.Sub(now)
}

// after is how long so many tokens take.
func (b *budget) after(tokens float64) time.Duration {
	return time.Duration(tokens / b.rate * float64(time.Second))
}

// charge takes what the deliveries of a push cost.
func (b *budget) charge(deliveries int) {
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
