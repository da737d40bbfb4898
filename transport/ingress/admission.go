package ingress

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// priorityKey is the metadata with the priority of a call, or of all pushes of a PushStream.
const priorityKey = "x-priority"

// errTooManyCalls refuses a call for which there is no memory.
var errTooManyCalls = fmt.Errorf("%w: too many calls are open", engine.ErrOverloaded)

// errRate refuses a caller who has used up its rate.
var errRate = errors.New("the caller pushes faster than it may")

// rateError is an errRate that knows when there will be means again.
type rateError struct{ after time.Duration }

func (e *rateError) Error() string { return errRate.Error() }
func (e *rateError) Unwrap() error { return errRate }

// callInfo is what is known of a call before anything is done for it.
type callInfo struct {
	priority engine.Priority
	budget   *budget // nil: nobody counts
	conn     *throttle.Conn
	wire     rawCall
	call     *throttle.Call // nil: it is a PushStream
}

// admit lets a call in, or says why not; it is all that stands between a caller and the engine but
// for the places in flight, which the engine counts. Without an error the call owes a leave.
//
// gRPC decodes a request when its handler asks for it, so a call that is refused here costs no
// decoding, and its body is not even awaited. A tap would refuse some steps earlier, but it cannot
// send the trailer that tells clients when to come back.
func (s *Server) admit(ctx context.Context) (info callInfo, err error) {
	info = callInfo{priority: min(engine.Normal, s.cfg.priorityMax), conn: throttle.ConnOf(ctx), call: throttle.CallOf(ctx)}
	open := s.metrics.inflight.Add(1) // before the look at draining: Drain sees the call, or it sees that
	defer func() {
		if v := recover(); v != nil { // Config.Caller is not ours
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
	if name := w.RecvCompress(); name != "" && name != "identity" {
		return info, encodingError(name)
	}
	if values := metadata.ValueFromIncomingContext(ctx, priorityKey); values != nil {
		p, valid := engine.ParsePriority(values[0])
		if !valid || len(values) > 1 {
			return info, &engine.InvalidError{Field: priorityKey, Code: engine.CodeMalformed, Description: "must be one of low, normal, high, critical"}
		}
		info.priority = min(p, s.cfg.priorityMax)
	}
	if s.callers != nil {
		info.budget = s.callers.of(s.cfg.Caller(ctx))
	}
	if info.call == nil {
		return info, s.streams.open(info.conn, info.priority)
	}
	if err := info.call.Admit(ctx, info.priority); err != nil {
		return info, err
	}
	if open-s.metrics.streams.Load() > s.mostOpen[info.priority.Rank()] {
		return info, errTooManyCalls
	}
	return info, s.admitPush(&info)
}

// admitPush lets one push in: that of a unary call, or each of a PushStream. The caller pays at last:
// what is refused costs nothing.
func (s *Server) admitPush(info *callInfo) error {
	if !s.serving.Load() {
		return errNotReady
	}
	if err := s.cfg.Engine.Admit(info.priority); err != nil {
		return err
	}
	if info.budget != nil {
		return info.budget.take()
	}
	return nil
}

// leave ends what admit let in.
func (s *Server) leave(info *callInfo) {
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

// allow sets what the engine has to know about who pushes.
func (e *callInfo) allow(p *engine.Push) {
	p.Priority = e.priority
	if e.budget != nil { // an interface of a nil budget is not nil
		p.Budget = e.budget
	}
}

// reject makes the error of a unary call that is refused, with the trailer that says when to come
// back if it is refused for now only.
func (s *Server) reject(ctx context.Context, a api, p engine.Priority, err error) error {
	s.metrics.countRefusal(p, err)
	r := s.refuse(a.String(), err)
	if r.pushback != nil {
		_ = grpc.SetTrailer(ctx, r.pushback) // without it there is still RetryInfo
	}
	return r.status.Err()
}
