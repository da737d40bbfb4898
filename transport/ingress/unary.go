package ingress

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/engine"
)

// call is one push from its bytes to its outcome.
type call struct {
	wire []byte // the request, written by the codec and never again
	push engine.Push
	api  api

	// Of a push that came on a PushStream; see there.
	streamed
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
	c := &call{api: a}
	if err := read(c); err != nil {
		// gRPC's own refusal, which it has answered already: too large, cancelled.
		s.metrics.record(a, nil, err, time.Since(began))
		return nil, err
	}
	res, err := s.run(ctx, c)
	s.metrics.record(a, &res, err, time.Since(began))
	if err != nil {
		return nil, s.refuse(a.String(), err).status.Err()
	}
	return newReply(a, &c.push, &res), nil
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
	if !s.serving.Load() {
		return engine.Result{}, errNotReady
	}
	if s.cfg.Trace != nil {
		c.push.Trace, end = s.cfg.Trace(ctx, c.api.String())
	}
	if err := s.decoder.decode(c.api, c.wire, &c.push); err != nil {
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
