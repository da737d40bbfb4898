package ingress

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/quota"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Bounds of ExplainRequest.sample, and of the ids in an answer: a room may be on hundreds of nodes.
const (
	sampleDefault = 10
	sampleMost    = 1000
	namesMost     = 10_000
)

// queuedVerdict is what becomes of a delivery that its link takes.
const queuedVerdict = "queued"

// explain serves Explain: the push is decoded, allowed and scoped as if it were made, and the engine asked where it would go.
func (s *Server) explain(ctx context.Context, info *callInfo, line *audit.Entry) ([]byte, error) {
	c := s.takeCall(toUsers) // may have the longest list
	info.allow(c)
	defer func() {
		s.space.release(info.conn, c.held)
		info.unsent = true // it is no push: quotas get theirs back
	}()
	if err := s.read(ctx, info.wire, info.conn, c); err != nil {
		return nil, err
	}
	c.push.Arrived = info.call.Began
	var push []byte
	var refresh bool
	sample := sampleDefault
	a, m := apis, wire.Reader{Rest: c.in.wire}
	for m.Next() {
		switch {
		case m.Number() <= 4 && m.IsBytes(m.Number()):
			a, _ = asked(m.Number() + 1) // the last one counts, as in any oneof
			push = m.Bytes
		case m.IsBytes(5):
			a, push = toRooms, m.Bytes
		case m.IsUint(10):
			refresh = m.Uint != 0
		case m.IsUint(11) && m.Uint != 0:
			if m.Uint > sampleMost {
				return nil, &engine.InvalidError{Field: "sample", Code: engine.CodeOutOfRange, Description: fmt.Sprintf("must be between 0 and %d", sampleMost)}
			}
			sample = int(m.Uint)
		}
	}
	switch {
	case m.Err != nil:
		return nil, malformed("request")
	case a == apis:
		return nil, &engine.InvalidError{Field: "push", Code: engine.CodeRequired, Description: "must say what to push to"}
	}
	c.api = a
	o, err := s.decoder.decode(a, push, &c.push)
	if err != nil {
		return nil, err
	}
	if err := s.renew(ctx, info, c); err != nil {
		return nil, err
	}
	if err := s.authorize(info.principal, a, &c.push); err != nil {
		return nil, err
	}
	if err := s.applyOptions(info, &c.push, o); err != nil {
		return nil, err
	}
	caller := s.explainCaller(info, a, &c.push)
	line.Event = audit.PushExplained
	auditTarget(line, &c.push)
	line.Target = strings.Clone(line.Target)
	c.enterTenant()
	ctx, cancel := context.WithDeadline(ctx, info.call.Began.Add(s.cfg.Engine.Timeout()))
	defer cancel()
	x, err := s.cfg.Engine.Explain(ctx, &c.push, refresh)
	if err != nil {
		return nil, err //nolint:wrapcheck // as Do
	}
	out := explained(&x, c, sample)
	out.Caller = caller
	b, err := out.MarshalVT()
	if err != nil { // an id that is no UTF-8, which is checked before
		return nil, fmt.Errorf("encode an explanation: %w", err)
	}
	return b, nil
}

// explained is x as a reply has it, with sample ids of each list.
func explained(x *engine.Explanation, c *call, sample int) *pubsub.ExplainResponse {
	out := &pubsub.ExplainResponse{ContentBytes: count(len(c.push.Payload))}
	left := namesMost
	names := func(ids []string) []string {
		var list []string
		ids = ids[:min(sample, left, len(ids))]
		left -= len(ids)
		for _, id := range ids {
			list = append(list, shown(id, &c.push))
		}
		return list
	}
	out.Found, out.Targets = x.Found, count(x.Targets)
	out.Offline, out.OfflineUserIds = count(len(x.Offline)), names(x.Offline)
	out.Unlocated, out.Excluded, out.ExcludedUserIds = count(len(x.Unlocated)), count(len(x.Excluded)), names(x.Excluded)
	if c.api != toRoom && c.api != toRooms {
		out.UnlocatedUserIds = names(x.Unlocated)
	}
	out.Route = &pubsub.ExplainedRoute{
		Cached: count(x.Cached), LookedUp: count(x.LookedUp), AgeMs: max(time.Since(x.Known).Milliseconds(), 0),
		Watched: x.Watched, Stale: x.Stale, Changed: x.Changed,
	}
	if o := c.push.Options; o != nil {
		for i := range o.Filter {
			m := &o.Filter[i]
			out.Filter = append(out.Filter, &pubsub.Match{Key: m.Key, Values: m.Values, Not: m.Not})
		}
	}
	if x.Err != nil {
		out.Route.Error = plain.Line(x.Err.Error(), maxReason)
	}
	for i := range x.Planned {
		p := &x.Planned[i]
		l := &p.Link
		to := &pubsub.ExplainedDelivery{
			NodeId: p.Node, Shard: uint32(p.Shard), Users: count(len(p.Users)), UserIds: names(p.Users), Verdict: queuedVerdict, LinkState: l.State,
			Queued: count(l.Queued), QueuedBytes: int64(l.QueuedBytes), QueuedMs: l.QueuedFor.Milliseconds(),
			Unacked: count(l.Unacked), Window: count(l.Window), UnackedMs: l.UnackedFor.Milliseconds(),
			Features: l.Features, Bytes: int64(p.Size),
		}
		if l.Verdict != engine.Sent {
			to.Verdict = l.Verdict.String()
		}
		out.Deliveries = append(out.Deliveries, to)
	}
	return out
}

// explainCaller says what the caller may, before anything is asked for.
func (s *Server) explainCaller(info *callInfo, a api, p *engine.Push) *pubsub.ExplainedCaller {
	out := &pubsub.ExplainedCaller{Priority: pubsub.Priority(p.Priority.Rank() + 1)}
	if who := info.principal; who != nil {
		out.Name, out.Tenant = who.Name, who.Tenant
		id := p.Room + p.User // one of them
		if list := slices.Concat(p.Users, p.Rooms.IDs()); len(list) > 0 {
			id = list[0]
		}
		if at, pattern, allowed := who.Explain(a.method(), id); allowed {
			out.Rule = strings.TrimSpace(fmt.Sprintf("line %d: %s %s", at, a, plain.Line(pattern, maxReason)))
		}
	}
	if acc := info.account; acc != nil {
		rate, day := math.MaxInt, int64(math.MaxInt64)
		for _, b := range []*budget{acc.budget, acc.tenantBudget} {
			if b != nil {
				rate = min(rate, b.left(time.Now()))
				out.RateLeft = new(count(rate))
			}
		}
		for _, q := range []*quota.Quota{acc.quota, acc.tenantQuota} {
			if q != nil {
				day = min(day, q.Left())
				out.QuotaLeft = new(day)
			}
		}
	}
	return out
}

// count is n as replies have it.
func count(n int) int32 { return int32(min(n, math.MaxInt32)) }
