package ingress

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/push-manager/push-manager/engine"
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

// entrance is what a call has to show before anything is done for it: its priority, and the
// budget of its caller.
type entrance struct {
	priority engine.Priority
	budget   *budget // nil: nobody counts
}

// entranceOf reads the metadata of a call. gRPC decodes a request when its handler asks for
// it, so a call that is refused by what is in here costs no decoding, and its body is not
// even awaited. A tap would refuse some steps earlier, but it cannot send the trailer that
// tells clients when to come back.
func (s *Server) entranceOf(ctx context.Context) (entrance, error) {
	e := entrance{priority: min(engine.Normal, s.cfg.priorityMax)}
	if values := metadata.ValueFromIncomingContext(ctx, priorityKey); values != nil {
		p, ok := engine.ParsePriority(values[0])
		if !ok || len(values) > 1 {
			return e, &engine.InvalidError{Field: priorityKey, Code: engine.CodeMalformed, Description: "must be one of low, normal, high, critical"}
		}
		e.priority = min(p, s.cfg.priorityMax)
	}
	if s.callers != nil {
		e.budget = s.callers.of(s.cfg.Caller(ctx))
	}
	return e, nil
}

// admit tells whether one more push may come in by an entrance, if its caller can pay.
func (s *Server) admit(e *entrance) error {
	if !s.serving.Load() {
		return errNotReady
	}
	return s.cfg.Engine.Admit(e.priority)
}

// pay takes from the caller's budget what a push costs when it comes in.
func (e *entrance) pay() error {
	if e.budget == nil {
		return nil
	}
	return e.budget.take()
}

// allow sets what the engine has to know about who pushes.
func (e *entrance) allow(p *engine.Push) {
	p.Priority = e.priority
	if e.budget != nil { // an interface of a nil budget is not nil
		p.Budget = e.budget
	}
}

// turnAway refuses a unary call at the entrance. It is not logged, and not in the
// latencies: how fast a server says no is not how fast it pushes.
func (s *Server) turnAway(ctx context.Context, a api, e *entrance, err error) error {
	s.metrics.apis[a].requests[refused].Inc()
	return s.answerRefusal(ctx, e.priority, s.statuses.of(err), err)
}

// answerRefusal makes the error of a refused unary call, with the trailer that says when to
// come back if it is refused for now only.
func (s *Server) answerRefusal(ctx context.Context, p engine.Priority, r *refusal, err error) error {
	s.metrics.countRefusal(p, err)
	if r.pushback != nil {
		_ = grpc.SetTrailer(ctx, r.pushback) // without it there is still RetryInfo
	}
	return r.status.Err()
}
