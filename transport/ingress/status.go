package ingress

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/push-manager/push-manager/engine"
)

const domain = "push-manager"

// When a retry makes sense.
const (
	retryDraining    = 100 * time.Millisecond // another instance takes it at once
	retryOverloaded  = 250 * time.Millisecond // a queue's age limit, by order of magnitude
	retryNotReady    = 500 * time.Millisecond // an etcd that comes up
	retryUnavailable = 500 * time.Millisecond // a Controller that restarts
)

// pushbackKey is the trailer that gRPC clients with a retry policy obey.
const pushbackKey = "grpc-retry-pushback-ms"

// refusal is an error as callers see it: with ErrorInfo, so nothing was sent.
type refusal struct {
	status *status.Status
	wire   []byte // the encoded google.rpc.Status

	pushback metadata.MD // the trailer that says when to come back, nil for none
}

// statuses maps errors to refusals. Those that overload brings about are made
// once, so that refusing stays cheap.
type statuses struct {
	draining, notReady, deadline, canceled, unavailable, internal *refusal

	// With different delays.
	overloaded, rateLimited []*refusal
	rateDelays              []time.Duration // of rateLimited

	// mayBeSent is the only one without ErrorInfo: a fault of our own after the
	// engine had the push.
	mayBeSent *refusal
}

func newStatuses() *statuses {
	delays := rateDelays()
	return &statuses{
		draining:    newRefusal(codes.Unavailable, "DRAINING", "this instance is shutting down", retryIn(retryDraining)),
		notReady:    newRefusal(codes.Unavailable, "NOT_READY", "this instance does not know the nodes yet", retryIn(retryNotReady)),
		overloaded:  exhausted("OVERLOADED", "too much to do", spread(retryOverloaded)),
		rateLimited: exhausted("RATE_LIMITED", "you push faster than you may", delays),
		rateDelays:  delays,
		deadline:    newRefusal(codes.DeadlineExceeded, "DEADLINE_EXCEEDED", "the deadline passed before anything was sent"),
		canceled:    newRefusal(codes.Canceled, "CANCELLED", "cancelled before anything was sent"),
		unavailable: newRefusal(codes.Unavailable, "CONTROLLER_UNAVAILABLE", "the controller does not answer and the route is not known", retryIn(retryUnavailable)),
		internal:    newRefusal(codes.Internal, "INTERNAL", "internal error before anything was sent"),
		mayBeSent:   encoded(status.New(codes.Internal, "internal error")),
	}
}

// errNotReady refuses a push while the Server does not serve.
var errNotReady = errors.New("not ready")

// Errors that stand for a panic, before and after the engine had the push.
var (
	errPanic     = errors.New("panic before the push was taken")
	errMayBeSent = errors.New("panic after the push was taken")
)

// of is the refusal for an error of the walk or of the engine.
func (t *statuses) of(err error) *refusal {
	var invalid *engine.InvalidError
	var over *rateError
	switch {
	case errors.Is(err, engine.ErrOverloaded): // the first, because it comes in masses
		return t.overloaded[rand.IntN(len(t.overloaded))]
	case errors.As(err, &over):
		return t.late(over.after)
	case errors.As(err, &invalid):
		return newInvalid(invalid)
	case errors.Is(err, engine.ErrDraining):
		return t.draining
	case errors.Is(err, errNotReady):
		return t.notReady
	case errors.Is(err, engine.ErrDeadline):
		return t.deadline
	case errors.Is(err, engine.ErrCanceled):
		return t.canceled
	case errors.Is(err, engine.ErrUnavailable):
		return t.unavailable
	case errors.Is(err, errMayBeSent):
		return t.mayBeSent
	default:
		return t.internal
	}
}

// newInvalid names the field that is wrong.
func newInvalid(e *engine.InvalidError) *refusal {
	return newRefusal(codes.InvalidArgument, e.Code, clean(e.Field+": "+e.Description),
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{
			Field:       clean(e.Field),
			Description: clean(e.Description),
			Reason:      e.Code,
		}}})
}

// unsupportedEncoding refuses compressed requests.
func unsupportedEncoding(name string) *refusal {
	return newRefusal(codes.Unimplemented, "UNSUPPORTED_ENCODING", clean("grpc-encoding "+name+" is not supported"))
}

func newRefusal(code codes.Code, reason, text string, details ...protoadapt.MessageV1) *refusal {
	details = append(details, &errdetails.ErrorInfo{Reason: reason, Domain: domain})
	st, err := status.New(code, text).WithDetails(details...)
	if err != nil {
		// Only a detail that cannot be encoded gets here: better none than no status.
		st = status.New(code, text)
	}
	return encoded(st)
}

// exhausted makes refusals for RESOURCE_EXHAUSTED, one for each delay.
func exhausted(reason, text string, delays []time.Duration) []*refusal {
	all := make([]*refusal, len(delays))
	for i, d := range delays {
		all[i] = newRefusal(codes.ResourceExhausted, reason, text, retryIn(d))
		all[i].pushback = metadata.Pairs(pushbackKey, strconv.FormatInt(d.Milliseconds(), 10))
	}
	return all
}

// spread is a choice of delays from d to nearly three times of it: clients that are refused
// together must not come back together.
func spread(d time.Duration) []time.Duration {
	all := make([]time.Duration, 8)
	for i := range all {
		all[i] = d + d*time.Duration(i)/4
	}
	return all
}

// rateDelays are the delays that a caller may be told who is over its rate. Few, so that
// their refusals are made once.
func rateDelays() []time.Duration {
	const ms = time.Millisecond
	return []time.Duration{10 * ms, 20 * ms, 50 * ms, 100 * ms, 200 * ms, 500 * ms, time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second}
}

// late is the refusal of a caller over its rate that asks for a delay of at least after, if
// there is one so long.
func (t *statuses) late(after time.Duration) *refusal {
	i, _ := slices.BinarySearch(t.rateDelays, after)
	return t.rateLimited[min(i, len(t.rateLimited)-1)]
}

func encoded(st *status.Status) *refusal {
	wire, err := proto.Marshal(st.Proto())
	if err != nil {
		wire = nil
	}
	return &refusal{status: st, wire: wire}
}

func retryIn(d time.Duration) *errdetails.RetryInfo {
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(d)}
}
