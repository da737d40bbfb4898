package ingress

import (
	"context"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// consoleError refuses whoever may not see the console. It counts as any right that is missing.
type consoleError struct{}

func (consoleError) Error() string { return "the console is not allowed" }
func (consoleError) Unwrap() error { return deniedError{method: true} }

// AllowConsole asks for the right to see the console, for a request that is no call: nothing is read and nobody pays. Its
// error is as callers see it. Where nobody is asked who calls, everybody may.
func (s *Server) AllowConsole(ctx context.Context, a *Arrival) error {
	if s.cfg.Auth == nil {
		return nil
	}
	ctx = metadata.NewIncomingContext(ctx, a.Header)
	ctx = peer.NewContext(ctx, &peer.Peer{Addr: a.Peer, AuthInfo: throttle.AuthInfo{AuthInfo: a.Security, Conn: a.Conn}})
	info := callInfo{priority: min(engine.Normal, s.cfg.priorityMax), conn: a.Conn}
	err := s.mayConsole(ctx, &info)
	if err == nil {
		return nil
	}
	if s.cfg.Audit != nil {
		s.auditRefusal(info.auditEntry(ctx, auth.Console.String()), nil, err)
	}
	return s.reject(ctx, auth.Console.String(), info.priority, err)
}

func (s *Server) mayConsole(ctx context.Context, info *callInfo) (err error) {
	defer func() {
		if v := recover(); v != nil { // libraries read tokens
			s.panicked("admission", v)
			err = errPanic
		}
	}()
	if info.conn == nil {
		return errForeignTransport
	}
	if err := s.authenticate(ctx, info); err != nil {
		return err
	}
	if !info.principal.May(auth.Console) {
		return consoleError{}
	}
	return nil
}

// Latencies are the counts of push_manager_api_latency_seconds for each method that pushes, by bucket, and the upper bounds
// of the buckets but the last one, in seconds.
func (s *Server) Latencies() (bounds []float64, counts map[string][]uint64) {
	counts = make(map[string][]uint64, apis)
	for a := range apis {
		h := s.metrics.apis[a].latency
		bounds, counts[a.String()] = h.Bounds(), h.Append(nil)
	}
	return bounds, counts
}

// CallerStatus is what is left to a caller of the policy that has called since the start. What it has no limit for is 0.
type CallerStatus struct {
	Name, Tenant        string
	Rate, RateLeft      int // pushes a second; that would be let through now
	Daily, DailyUsed    int64
	TenantRate          int
	TenantRateLeft      int
	TenantDaily         int64
	TenantDailyUsed     int64
	TenantInFlight      int64
	TenantInFlightLimit int64
}

// Callers are those of the policy that have called, in no order.
func (s *Server) Callers() []CallerStatus {
	c := s.callers
	c.mu.Lock()
	called := slices.Collect(maps.Values(c.latest))
	c.mu.Unlock()
	now, all := time.Now(), make([]CallerStatus, 0, len(called))
	for _, who := range called {
		st := CallerStatus{Name: who.Name, Tenant: who.Tenant}
		known, ok := c.named.Load(who)
		if !ok { // another policy has it since
			continue
		}
		a := known.(*account) //nolint:forcetypeassert // Nothing else is in it.
		st.Rate, st.RateLeft = a.budget.describe(now)
		st.TenantRate, st.TenantRateLeft = a.tenantBudget.describe(now)
		if a.quota != nil {
			st.DailyUsed, st.Daily = c.quotas.Usage(a.quota)
		}
		if a.tenantQuota != nil {
			st.TenantDailyUsed, st.TenantDaily = c.quotas.Usage(a.tenantQuota)
		}
		if a.tenant != nil {
			st.TenantInFlight, st.TenantInFlightLimit = a.tenant.inFlight.Load(), a.tenant.most.Load()
		}
		all = append(all, st)
	}
	return all
}

// describe is the rate of a budget and what it lets through now, 0 for none.
func (b *budget) describe(now time.Time) (rate, left int) {
	if b == nil {
		return 0, 0
	}
	left = b.left(now)
	b.mu.Lock()
	defer b.mu.Unlock()
	return int(b.rate), left
}
