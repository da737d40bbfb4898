package ingress

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// call is one push from its bytes to its outcome. It is used again for another one when
// nothing can refer to it any more.
type call struct {
	// Of a unary call.
	in   inbound
	head [messageHead]byte
	held int64 // bytes of Server.space

	push   engine.Push
	api    api
	tenant string // of the caller, "" for none
	scoped []byte // the ids of a tenant's push, see enterTenant

	// Of a push that came on a PushStream; see there.
	streamed
}

func (s *Server) takeCall(a api) *call {
	c, _ := s.calls.Get().(*call)
	if c == nil {
		c = new(call)
	} else {
		c.push.Reset()
	}
	c.api = a
	return c
}

// releaseCall keeps the call of a push that is answered, if it can be used again.
func (s *Server) releaseCall(c *call) {
	if c.push.Reusable() && c.in.reuse() {
		s.calls.Put(c)
	}
}

func (s *Server) unaryHandler(a api) grpc.MethodHandler {
	return func(_ any, ctx context.Context, _ func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		return s.unary(ctx, a)
	}
}

// unary serves one call of a method other than PushStream. A call that is refused before it is read
// is not in the latencies: how fast a server says no is not how fast it pushes.
func (s *Server) unary(ctx context.Context, a api) (answer any, err error) {
	info, err := s.admit(ctx, a)
	if err != nil {
		s.metrics.apis[a].requests[refused].Inc()
		if s.cfg.Audit != nil {
			s.auditRefusal(info.auditEntry(ctx, a.String()), nil, err)
		}
		return nil, s.reject(ctx, a.String(), info.priority, err)
	}
	defer s.leave(&info)
	c := s.takeCall(a)
	info.allow(c)
	defer func() {
		s.space.release(info.conn, c.held)
		c.held = 0
		if err == nil {
			s.releaseCall(c)
		}
	}()
	began := info.call.Began
	if err := s.read(ctx, info.wire, info.conn, c); err != nil {
		s.metrics.record(a, &c.push, nil, err, time.Since(began))
		info.unsent = true
		return nil, s.reject(ctx, a.String(), info.priority, err)
	}
	c.push.Arrived = began
	res, err := s.run(ctx, &info, c)
	s.metrics.record(a, &c.push, &res, err, time.Since(began))
	if err != nil {
		info.unsent = !errors.Is(err, errMayBeSent)
		if s.cfg.Audit != nil {
			s.auditRefusal(info.auditEntry(ctx, a.String()), &c.push, err)
		}
		return nil, s.reject(ctx, a.String(), info.priority, err)
	}
	if s.cfg.Audit != nil {
		s.auditPush(a, &c.push, &res, func() audit.Entry { return info.auditEntry(ctx, a.String()) })
	}
	return s.reply(a, &c.push, &res), nil
}

// read reads the request, once there is space for it. A small one is a part of what every open
// call is reckoned to take, see openBytes.
func (s *Server) read(ctx context.Context, w rawCall, conn *throttle.Conn, c *call) error {
	m, err := s.next(w, c.head[:])
	if err == nil {
		err = m.begin(w)
	}
	if err == nil && m.becomes > smallBody {
		return s.readLarge(ctx, w, conn, c, m)
	}
	if err == nil {
		err = c.in.only(w, m, c.head[:])
	}
	if err == nil {
		err = s.convert(ctx, w, &c.in, m, maxSpaceWait)
	}
	if err != nil {
		return unread(err)
	}
	return nil
}

// readLarge reads a request that needs space, for what it becomes. If it is too slow, its call is ended by the watch:
// nothing else ends a read.
func (s *Server) readLarge(ctx context.Context, w rawCall, conn *throttle.Conn, c *call, m announced) (err error) {
	bytes := s.bodyBytes(c.api, m.becomes, scopeBytes(c.tenant))
	if m.zip != nil {
		bytes += int64(m.size)
	}
	if _, translated := w.(Translator); translated {
		bytes += int64(translatedShare * m.becomes)
	}
	c.held, err = s.space.reserve(ctx, conn, c.push.Priority, bytes, maxSpaceWait)
	if err != nil {
		m.begun.Free()
		return err
	}
	watch := bodyWatch{space: s.space, conn: conn, most: s.cfg.BodyTimeout, giveUp: func() {
		_ = w.WriteStatus(s.statuses.slow.status) // it fails for a client that has gone
	}}
	watch.begin()
	err = c.in.only(w, m, c.head[:])
	if !watch.end() {
		return errSlow
	}
	if err == nil {
		err = s.convert(ctx, w, &c.in, m, maxSpaceWait)
	}
	if err != nil {
		return unread(err)
	}
	return nil
}

// run decodes the push and lets the engine do it. A panic becomes an error that
// says whether anything may have been sent.
func (s *Server) run(ctx context.Context, info *callInfo, c *call) (res engine.Result, err error) {
	taken := false
	var end func(engine.Result, error)
	defer func() {
		if v := recover(); v != nil {
			s.panicked(c.api.String(), v)
			res, err = engine.Result{}, panicError(taken)
		}
		if end != nil {
			end(res, err)
		}
	}()
	if s.cfg.Trace != nil {
		c.push.Trace, end = s.cfg.Trace(ctx, c.api.String())
	}
	o, err := s.decoder.decode(c.api, c.in.wire, &c.push)
	if err != nil {
		return engine.Result{}, err
	}
	if err := s.renew(ctx, info, c); err != nil {
		return engine.Result{}, err
	}
	if err := s.authorize(info.principal, c.api, &c.push); err != nil {
		return engine.Result{}, err
	}
	if err := s.applyOptions(info, &c.push, o); err != nil {
		return engine.Result{}, err
	}
	c.enterTenant()
	if c.held > 0 { // gRPC has its buffers back, and lists are known
		kept := min(c.held, keptBytes(len(c.in.wire), len(c.push.Users)+c.push.Rooms.Len()+len(c.push.Exclude), scopeBytes(c.tenant)))
		s.space.release(info.conn, c.held-kept)
		c.held = kept
	}
	taken = true
	if o != nil && o.engine.MessageID != "" {
		return s.messageIDs.once(ctx, s.cfg.Engine, &c.push)
	}
	return s.cfg.Engine.Do(ctx, &c.push)
}

func panicError(taken bool) error {
	if taken {
		return errMayBeSent
	}
	return errPanic
}
