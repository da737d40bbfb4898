package ingress

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
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

// recoverUnary guards the unary methods of the other services. Those of the push
// API guard themselves: they know whether anything was sent.
func (s *Server) recoverUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if v := recover(); v != nil {
			s.panicked(info.FullMethod, v)
			resp, err = nil, s.statuses.internal.status.Err()
		}
	}()
	return handler(ctx, req)
}

// guardStream ends the streams of the other services when the server closes, or their connection is
// too old: their handlers wait for clients that may never come back. A PushStream ends by itself.
func (s *Server) guardStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if info.FullMethod == pushStreamMethod {
		return handler(srv, ss)
	}
	conn := throttle.ConnOf(ss.Context())
	if conn == nil {
		return s.refuse(info.FullMethod, errForeignTransport).status.Err()
	}
	if err := s.streams.open(conn, engine.Normal); err != nil {
		r := s.refuse(info.FullMethod, err)
		ss.SetTrailer(r.pushback)
		return r.status.Err()
	}
	defer s.streams.close(conn)
	done := make(chan error, 1)
	s.readers.Go(func() {
		defer func() {
			if v := recover(); v != nil {
				s.panicked(info.FullMethod, v)
				done <- s.statuses.internal.status.Err()
			}
		}()
		done <- handler(srv, ss)
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
