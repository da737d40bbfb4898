package ingress

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/engine"
)

// call is one push from its bytes to its outcome. It is used again for another one when
// nothing can refer to it any more.
type call struct {
	in   inbound // of a unary call
	push engine.Push
	api  api

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
	return func(_ any, ctx context.Context, read func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		return s.unary(ctx, a, read)
	}
}

// unary serves one call of a method other than PushStream.
func (s *Server) unary(ctx context.Context, a api, read func(any) error) (answer any, err error) {
	began := time.Now()
	if !s.enter() {
		s.metrics.record(a, nil, engine.ErrDraining, time.Since(began))
		return nil, s.statuses.draining.status.Err()
	}
	defer s.leave()
	if name := compression(ctx); name != "" {
		err := unsupportedEncoding(name).status.Err()
		s.metrics.record(a, nil, err, time.Since(began))
		return nil, err
	}
	e, err := s.entranceOf(ctx)
	conn := connOf(ctx)
	if err == nil {
		conn.note(e.priority, s.limiter.at(began))
		err = s.admit(&e)
	}
	if err != nil {
		return nil, s.turnAway(ctx, a, &e, err)
	}
	tally, err := s.limiter.enter(ctx, conn, began, e.priority)
	if err != nil {
		return nil, s.turnAway(ctx, a, &e, err)
	}
	defer s.limiter.leave(tally)
	if err := e.pay(); err != nil { // at last: what is refused costs its caller nothing
		return nil, s.turnAway(ctx, a, &e, err)
	}
	c := s.takeCall(a)
	e.allow(&c.push)
	if err := read(&c.in); err != nil {
		// gRPC's own refusal, which it has answered already: too large, cancelled.
		s.metrics.record(a, nil, err, time.Since(began))
		return nil, err
	}
	c.push.Arrived = began
	res, err := s.run(ctx, c)
	s.metrics.record(a, &res, err, time.Since(began))
	if err != nil {
		return nil, s.answerRefusal(ctx, e.priority, s.refuse(a.String(), err), err)
	}
	r := s.reply(a, &c.push, &res)
	s.releaseCall(c)
	return r, nil
}

// run decodes the push and lets the engine do it. A panic becomes an error that
// says whether anything may have been sent.
func (s *Server) run(ctx context.Context, c *call) (res engine.Result, err error) {
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
	if err := s.decoder.decode(c.api, c.in.wire, &c.push); err != nil {
		return engine.Result{}, err
	}
	taken = true
	return s.cfg.Engine.Do(ctx, &c.push)
}

func panicError(taken bool) error {
	if taken {
		return errMayBeSent
	}
	return errPanic
}

// compression is the encoding of the request's messages, "" for none. Refusing it
// here keeps out compressors that some other package of the program registers:
// without one gRPC answers UNIMPLEMENTED by itself.
func compression(ctx context.Context) string {
	st, ok := grpc.ServerTransportStreamFromContext(ctx).(interface{ RecvCompress() string })
	if !ok {
		return ""
	}
	if name := st.RecvCompress(); name != "identity" {
		return name
	}
	return ""
}
