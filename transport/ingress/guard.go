package ingress

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"slices"
	"time"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// panicked books a panic: counted, and logged once with its stack. The message of
// a panic may quote what it worked on, so it goes to the log only.
func (s *Server) panicked(where string, v any) {
	s.metrics.panics.Inc()
	s.cfg.Logger.Error("panic in the push API", "where", where, "panic", v, "stack", string(debug.Stack()))
}

// services takes services beside the push API: health, reflection. Their calls are let in as pushes are, before anything
// of a request is read, and a panic in them ends the call alone.
type services struct {
	*grpc.Server

	ingress *Server
}

// RegisterService implements grpc.ServiceRegistrar.
func (r services) RegisterService(desc *grpc.ServiceDesc, impl any) {
	d := *desc
	d.Methods, d.Streams = slices.Clone(d.Methods), slices.Clone(d.Streams)
	for i := range d.Methods {
		name, handler := d.ServiceName+"/"+d.Methods[i].MethodName, d.Methods[i].Handler
		d.Methods[i].Handler = func(srv any, ctx context.Context, decode func(any) error, chain grpc.UnaryServerInterceptor) (any, error) {
			return r.ingress.guardUnary(ctx, name, func() (any, error) { return handler(srv, ctx, decode, chain) })
		}
	}
	for i := range d.Streams {
		name, handler := d.ServiceName+"/"+d.Streams[i].StreamName, d.Streams[i].Handler
		d.Streams[i].Handler = func(srv any, ss grpc.ServerStream) error {
			return r.ingress.guardStream(ss, name, func() error { return handler(srv, ss) })
		}
	}
	r.Server.RegisterService(&d, impl)
	r.ingress.services = append(r.ingress.services, Service{&d, impl})
}

func (s *Server) guardUnary(ctx context.Context, name string, handle func() (any, error)) (resp any, err error) {
	defer func() {
		if v := recover(); v != nil {
			s.panicked(name, v)
			resp, err = nil, s.statuses.internal.status.Err()
		}
	}()
	if _, err := s.admitOther(ctx, name); err != nil {
		return nil, s.reject(ctx, name, engine.Normal, err)
	}
	return handle()
}

// admitOther lets a call of another service in, if it is from somebody.
func (s *Server) admitOther(ctx context.Context, name string) (*throttle.Conn, error) {
	info := callInfo{conn: throttle.ConnOf(ctx)}
	if info.conn == nil {
		return nil, errForeignTransport
	}
	plainReply(ctx)
	if s.cfg.Auth == nil {
		return info.conn, nil
	}
	err := s.authenticate(ctx, &info)
	if err != nil && s.cfg.Audit != nil {
		s.auditRefusal(info.auditEntry(ctx, name), nil, err)
	}
	return info.conn, err
}

// guardStream ends the streams of the other services when the server closes, or their connection is
// too old: their handlers wait for clients that may never come back. A PushStream ends by itself.
func (s *Server) guardStream(ss grpc.ServerStream, name string, handle func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			s.panicked(name, v)
			err = s.statuses.internal.status.Err()
		}
	}()
	conn, err := s.admitOther(ss.Context(), name)
	if err != nil {
		return s.rejectStream(ss, name, engine.Normal, err)
	}
	if err := s.streams.open(conn, engine.Normal); err != nil {
		r := s.refuse(name, err) // it is no push: it does not count as one that is refused
		ss.SetTrailer(r.pushback)
		return r.status.Err()
	}
	defer s.streams.close(conn)
	done := make(chan error, 1)
	s.readers.Go(func() {
		defer func() {
			if v := recover(); v != nil {
				s.panicked(name, v)
				done <- s.statuses.internal.status.Err()
			}
		}()
		done <- handle()
	})
	select {
	case err := <-done:
		return err
	case <-s.closing:
	case <-conn.ToldToGo():
	}
	linger := time.NewTimer(lingerWatchers)
	defer linger.Stop()
	select {
	case err := <-done:
		return err
	case <-linger.C:
		return s.statuses.draining.status.Err()
	}
}

// reject makes the error of a unary call that is refused, with the trailer that says when to come
// back if it is refused for now only.
func (s *Server) reject(ctx context.Context, name string, p engine.Priority, err error) error {
	s.metrics.countRefusal(p, err)
	r := s.refuse(name, err)
	if r.pushback != nil {
		_ = grpc.SetTrailer(ctx, r.pushback) // without it there is still RetryInfo
	}
	return r.status.Err()
}

// rejectStream is reject for a stream.
func (s *Server) rejectStream(ss grpc.ServerStream, name string, p engine.Priority, err error) error {
	s.metrics.countRefusal(p, err)
	r := s.refuse(name, err)
	ss.SetTrailer(r.pushback)
	return r.status.Err()
}

// refuse makes the error of a push, and logs what belongs into a log. Panics are
// there already.
func (s *Server) refuse(api string, err error) *refusal {
	r := s.statuses.of(err)
	log := s.cfg.Logger
	switch {
	case errors.Is(err, errPanic) || errors.Is(err, errMayBeSent) || errors.Is(err, engine.ErrInternal):
	case r == s.statuses.internal:
		log.Error("push failed", "api", api, "err", err)
	case log.Enabled(context.Background(), slog.LevelDebug) && s.mayLogRefusal():
		log.Debug("push refused", "api", api, "err", err)
	}
	return r
}

// mayLogRefusal allows one a second: callers decide how many refusals there are.
func (s *Server) mayLogRefusal() bool {
	last := s.lastRefusal.Load()
	if last != nil && time.Since(*last) < time.Second {
		return false
	}
	now := time.Now()
	return s.lastRefusal.CompareAndSwap(last, &now)
}
