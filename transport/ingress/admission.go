package ingress

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// priorityKey is the metadata with the priority of a call, or of all pushes of a PushStream.
const priorityKey = "x-priority"

// authorizationKey is the metadata with the token or the key of a caller (RFC 6750, section 2.1).
const authorizationKey = "authorization"

// errTooManyCalls refuses a call for which there is no memory.
var errTooManyCalls = fmt.Errorf("%w: too many calls are open", engine.ErrOverloaded)

// errRate refuses a caller who has used up its rate.
var errRate = errors.New("the caller pushes faster than it may")

// rateError is an errRate that knows when there will be means again.
type rateError struct {
	after  time.Duration
	tenant bool // it is the tenant's rate
}

func (e *rateError) Error() string { return errRate.Error() }
func (e *rateError) Unwrap() error { return errRate }

func (e *rateError) reason() string {
	if e.tenant {
		return reasonTenantRate
	}
	return reasonRate
}

// callInfo is what is known of a call before anything is done for it.
type callInfo struct {
	priority  engine.Priority
	principal *auth.Principal // who calls; nil where nobody is asked (Config.Auth)
	account   *account        // nil: nobody counts
	conn      *throttle.Conn
	wire      rawCall
	call      *throttle.Call // nil: it is a stream

	claimed     engine.Priority // by the caller
	priorityMax engine.Priority // that it may claim
	entered     bool            // account is owed a leave, for the push of a unary call
	unsent      bool            // that was refused later
}

// admit lets a call in, or says why not; it is all that stands between a caller and the engine but for the places in
// flight, which the engine counts, and the rights for the ids in the request (authorize). a is the api of a unary call.
// Without an error the call owes a leave.
//
// gRPC decodes a request when its handler asks for it, so a call that is refused here costs no
// decoding, and its body is not even awaited. A tap would refuse some steps earlier, but it cannot
// send the trailer that tells clients when to come back.
func (s *Server) admit(ctx context.Context, a api) (info callInfo, err error) {
	info = callInfo{priority: min(engine.Normal, s.cfg.priorityMax), claimed: engine.Normal, conn: throttle.ConnOf(ctx), call: throttle.CallOf(ctx)}
	open := s.metrics.inflight.Add(1) // before the look at draining: Drain sees the call, or it sees that
	defer func() {
		if v := recover(); v != nil { // Config.Caller is not ours, and libraries read tokens
			s.panicked("admission", v)
			err = errPanic
		}
		if err != nil {
			if info.call != nil {
				info.call.End() // what is refused is no work
			}
			s.leaveIdle()
		}
	}()
	if s.draining.Load() {
		return info, engine.ErrDraining
	}
	w, known := grpc.ServerTransportStreamFromContext(ctx).(rawCall)
	if !known || info.conn == nil {
		return info, errForeignTransport
	}
	info.wire = w
	if s.cfg.Auth != nil {
		if err := s.authenticate(ctx, &info); err != nil {
			return info, err
		}
		if a != apis && !a.allowedTo(info.principal) { // of a PushStream each push is asked for
			return info, deniedError{api: a, method: true}
		}
	}
	switch name := w.RecvCompress(); {
	case name == "", name == encoding.Identity:
	case name == gzipName && s.unzipper != nil:
		plainReply(ctx)
	default:
		return info, encodingError(name)
	}
	if values := info.header(ctx, priorityKey); values != nil {
		valid := len(values) == 1
		if valid {
			info.claimed, valid = engine.ParsePriority(values[0])
		}
		if !valid {
			return info, &engine.InvalidError{Field: priorityKey, Code: engine.CodeMalformed, Description: "must be one of low, normal, high, critical"}
		}
	}
	s.grant(ctx, &info)
	if info.call == nil {
		return info, s.streams.open(info.conn, info.priority)
	}
	if err := info.call.Admit(ctx, info.priority); err != nil {
		return info, err
	}
	if open-s.metrics.streams.Load()-s.metrics.watchers.Load()-s.metrics.watched.Load()-s.metrics.presences.Load() > s.mostOpen[info.priority.Rank()] {
		return info, errTooManyCalls
	}
	if err := s.admitPush(&info); err != nil {
		return info, err
	}
	info.entered = info.account != nil
	return info, nil
}

// header is what a call has of a header.
func (e *callInfo) header(ctx context.Context, key string) []string {
	if e.call != nil {
		return e.call.Header[key]
	}
	return metadata.ValueFromIncomingContext(ctx, key)
}

// opened makes what is remembered of a connection for authenticate.
func (s *Server) opened() func(credentials.AuthInfo) any {
	if s.cfg.Auth == nil {
		return nil
	}
	return func(info credentials.AuthInfo) any {
		if info, ok := info.(credentials.TLSInfo); ok {
			return auth.NewSession(&info.State)
		}
		return auth.NewSession(nil)
	}
}

// authenticate finds out who calls, at first and whenever that may have changed.
func (s *Server) authenticate(ctx context.Context, info *callInfo) error {
	session, ours := info.conn.Session.(*auth.Session)
	if !ours {
		return errForeignTransport
	}
	p, err := s.cfg.Auth.Authenticate(session, info.header(ctx, authorizationKey), time.Now())
	if err != nil {
		return err
	}
	info.principal = p
	if s.cfg.Audit != nil && p.Kind == auth.Key && p.FirstUse() && s.cfg.Audit.FirstUse(p.Credential) {
		e := auditEntry(p, peerOf(ctx), "", "")
		e.Event = audit.KeyUsedFirst
		s.cfg.Audit.Write(e)
	}
	return nil
}

// renew asks again who makes a unary call, if the policy or keys have changed since it was let in: its caller decides when
// the body comes. The call has been paid for, so its account stays.
func (s *Server) renew(ctx context.Context, info *callInfo, c *call) error {
	if s.cfg.Auth == nil || s.cfg.Auth.Valid(info.principal, c.push.Arrived) {
		return nil
	}
	if err := s.authenticate(ctx, info); err != nil {
		return err
	}
	info.priorityMax = min(info.priorityMax, info.principal.PriorityMax)
	info.priority = min(info.priority, info.priorityMax)
	info.allow(c)
	return nil
}

// grant gives a call the priority that its caller may claim, and the account that it pays from.
func (s *Server) grant(ctx context.Context, info *callInfo) {
	info.priorityMax = s.cfg.priorityMax
	if info.principal != nil {
		info.priorityMax = min(info.priorityMax, info.principal.PriorityMax)
	}
	info.priority = min(info.claimed, info.priorityMax)
	switch {
	case info.principal != nil:
		info.account = s.callers.of(info.principal.Caller)
	case s.callers.addresses != nil:
		info.account = s.callers.atAddress(s.cfg.Caller(ctx))
	}
}

// deniedError refuses a push that its caller has no right to: for its method, or for an id in it.
type deniedError struct {
	api    api
	method bool
	field  string // with the id, where that is not always the one of the api
}

func (e deniedError) Error() string {
	if e.method {
		return e.api.String() + " is not allowed"
	}
	return e.api.String() + " is not allowed for all that it names"
}

// authorize asks for the right to every id of a push. One that is missing refuses the push as a whole, before anything is
// looked up.
func (s *Server) authorize(who *auth.Principal, a api, p *engine.Push) error {
	if s.cfg.Auth == nil {
		return nil
	}
	if who == nil { // by a mistake of ours
		return auth.NoCredential
	}
	m := a.method()
	allowed := who.MayAny(m)
	if allowed {
		return nil
	}
	switch a {
	case toRoom:
		allowed = who.Allows(m, p.Room)
	case toUser:
		allowed = who.Allows(m, p.User)
	case toUsers:
		allowed = !slices.ContainsFunc(p.Users, func(id string) bool { return !who.Allows(m, id) })
	case toRooms:
		allowed = !slices.ContainsFunc(p.Rooms.IDs(), func(id string) bool { return !who.Allows(m, id) })
	default: // names nobody
	}
	if !allowed || !who.May(m) {
		return deniedError{api: a, method: !who.May(m)}
	}
	return nil
}

// admitPush lets one push in: that of a unary call, or each of a PushStream. The caller pays at last:
// what is refused costs nothing. Without an error its account, if it has one, is owed a leave.
func (s *Server) admitPush(info *callInfo) error {
	if !s.serving.Load() {
		return errNotReady
	}
	if err := s.cfg.Engine.Admit(info.priority); err != nil {
		return err
	}
	if info.account != nil {
		return info.account.enter()
	}
	return nil
}

// leave ends what admit let in.
func (s *Server) leave(info *callInfo) {
	if info.entered {
		info.account.leave(info.unsent)
	}
	if info.call == nil {
		s.streams.close(info.conn)
	} else {
		info.call.End()
	}
	s.leaveIdle()
}

func (s *Server) leaveIdle() {
	if s.metrics.inflight.Add(-1) == 0 && s.draining.Load() {
		notify(s.idle)
	}
}

// tenant is the caller's, "" for none.
func (e *callInfo) tenant() string {
	if e.principal == nil {
		return ""
	}
	return e.principal.Tenant
}

// allow sets what the engine has to know about who pushes.
func (e *callInfo) allow(c *call) {
	p := &c.push
	p.Priority = e.priority
	if e.account != nil { // an interface of a nil account is not nil
		p.Budget = e.account
	}
	c.tenant = e.tenant()
}
