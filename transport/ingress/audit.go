package ingress

import (
	"context"
	"errors"
	"strings"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth"
)

// traceKey is the metadata with the caller's trace (W3C Trace Context).
const traceKey = "traceparent"

// auditEntry begins a line about who calls.
func auditEntry(who *auth.Principal, peer, trace, method string) audit.Entry {
	e := audit.Entry{Peer: peer, TraceID: trace, Method: method}
	if who != nil {
		e.Caller, e.Tenant, e.Credential = who.Name, who.Tenant, strings.TrimSpace(string(who.Kind)+" "+who.Credential) // a token may name no key
	}
	return e
}

func (e *callInfo) auditEntry(ctx context.Context, method string) audit.Entry {
	return auditEntry(e.principal, peerOf(ctx), traceID(e.header(ctx, traceKey)), method)
}

// traceID is the id in a traceparent header, "" if there is none that is well formed.
func traceID(values []string) string {
	const version, id = len("00-"), 32
	if len(values) != 1 || len(values[0]) < version+id+len("-") || values[0][version+id] != '-' {
		return ""
	}
	trace := values[0][version : version+id]
	if strings.Trim(trace, "0123456789abcdef") != "" {
		return ""
	}
	return strings.Clone(trace) // a header may be long, and lines wait to be written
}

// auditRefusal writes that a call or a push was refused for who calls. Other refusals are about load, or about what is
// asked for: they are counted in metrics. push is nil where it is not decoded.
func (s *Server) auditRefusal(e audit.Entry, push *engine.Push, err error) {
	var unknown auth.Reason
	var denied deniedError
	var rate *rateError
	var spent *quotaError
	switch {
	case errors.As(err, &unknown):
		e.Event, e.Reason = audit.AuthDenied, string(unknown)
	case errors.As(err, &denied):
		e.Event, e.Reason = audit.PushDenied, reasonDenied
	case errors.As(err, &rate):
		e.Event, e.Reason = audit.PushDenied, rate.reason()
	case errors.As(err, &spent):
		e.Event, e.Reason = audit.PushDenied, spent.reason()
	case errors.Is(err, errTenantInFlight):
		e.Event, e.Reason = audit.PushDenied, reasonTenantInFlight
	default:
		return
	}
	if push != nil {
		auditTarget(&e, push)
	}
	s.cfg.Audit.Refused(e)
}

// auditPush writes what became of a push that was let in: of a broadcast always, of others if it is one of the sample.
func (s *Server) auditPush(a api, push *engine.Push, res *engine.Result, entry func() audit.Entry) {
	if a != toAll && !s.cfg.Audit.Sampled() {
		return
	}
	e := entry()
	e.Event = audit.Push
	if a == toAll {
		e.Event = audit.Broadcast
	}
	if t, ok := push.Trace.(interface{ TraceID() string }); ok && t.TraceID() != "" {
		e.TraceID = t.TraceID()
	}
	e.Outcome = resultNames[resultOf(res, nil)]
	e.Results = &audit.Results{Delivered: res.Delivered, Offline: res.Offline, Failed: res.Failed, Unknown: res.Unknown}
	auditTarget(&e, push)
	if e.Tenant != "" { // as the caller names it, as in a line about a refusal
		e.Target = strings.TrimPrefix(e.Target, e.Tenant+"/")
	}
	s.cfg.Audit.Write(e)
}

func auditTarget(e *audit.Entry, push *engine.Push) {
	if push.Options != nil {
		e.MessageID = push.Options.MessageID
	}
	switch {
	case push.Rooms != nil: // the engine may have made one of one of them
		e.TargetKind, e.Targets = "rooms", push.Rooms.Len()
	case push.Kind == engine.ToRoom && push.Room != "": // without it is not decoded
		e.TargetKind, e.Target = "room", push.Room
	case push.Kind == engine.ToUser:
		e.TargetKind, e.Target = "user", push.User
	case push.Kind == engine.ToUsers:
		e.TargetKind, e.Targets = "users", len(push.Users)
	case push.Kind == engine.ToAll:
		e.TargetKind = "everybody"
	}
}
