package ingress

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/quota"
	"github.com/push-manager/push-manager/transport/jobs"
	"github.com/push-manager/push-manager/transport/presence"
)

const domain = "push-manager"

// When a retry makes sense.
const (
	retryDraining    = 100 * time.Millisecond // another instance takes it at once
	retryOverloaded  = 250 * time.Millisecond // a queue's age limit, by order of magnitude
	retryNotReady    = 500 * time.Millisecond // an etcd that comes up
	retryUnavailable = 500 * time.Millisecond // a Controller that restarts
	retryQuota       = 50 * time.Millisecond  // a request to etcd
	retryQuotaAway   = time.Second            // an etcd that elects a leader
	retryEarlier     = 50 * time.Millisecond  // the other push is over
	retryStore       = time.Second            // a store that elects a leader
	retryJobs        = time.Second            // an etcd that elects a leader
	retryWatched     = 30 * time.Second       // until one is not watched any more
	retryJobsFull    = time.Minute            // until one is old enough to be forgotten, or for ever
)

// pushbackKey is the trailer that gRPC clients with a retry policy obey.
const pushbackKey = "grpc-retry-pushback-ms"

// The reasons in ErrorInfo of refusals for who calls.
const (
	reasonDenied         = "PERMISSION_DENIED"
	reasonRate           = "RATE_LIMITED"
	reasonTenantRate     = "TENANT_RATE_LIMITED"
	reasonTenantInFlight = "TENANT_IN_FLIGHT"
	reasonQuota          = "QUOTA_EXCEEDED"
	reasonTenantQuota    = "TENANT_QUOTA_EXCEEDED"
	reasonQuotaPending   = "QUOTA_PENDING"
	reasonQuotaAway      = "QUOTA_UNAVAILABLE"
)

// refusal is an error as callers see it: with ErrorInfo, so nothing was sent.
type refusal struct {
	status *status.Status
	wire   []byte // the encoded google.rpc.Status

	pushback metadata.MD // the trailer that says when to come back, nil for none
}

// statuses maps errors to refusals. Those that overload brings about are made
// once, so that refusing stays cheap.
type statuses struct {
	draining, notReady, deadline, canceled, slow, unavailable, internal, unauthenticated, unscoped, console *refusal

	// With different delays.
	overloaded, streams, streamsOfOneConn, tenantInFlight, quotaPending []*refusal

	rateLimited, tenantRateLimited rateRefusals

	// Of message ids, of receipts and of the store.
	idReused, earlierUnsent, receiptsGone, receiptsElsewhere, storeOff, storeDown *refusal

	// Of quotas: while they cannot be checked, and used up, of a caller and of a tenant.
	quotaUnavailable          *refusal
	quotaUsedUp, tenantUsedUp dayRefusal

	// Of broadcast jobs, presence and Disconnect.
	others []knownError

	// denied are for a method and for its ids.
	denied [methods]struct{ method, ids *refusal }

	// mayBeSent has no ErrorInfo: a fault of our own after the engine had the push.
	mayBeSent *refusal
	// earlierOpen and lastingOpen have none: what the call was to do may have been done.
	earlierOpen, lastingOpen *refusal
	// unread ends a PushStream, and has none either: what is not answered may be sent.
	unread *status.Status
}

// knownError is answered with one refusal.
type knownError struct {
	err error
	is  *refusal
}

func newStatuses() *statuses {
	delays := rateDelays()
	t := &statuses{
		// One text, whatever is wrong: it would help none but those who try.
		unauthenticated: newRefusal(codes.Unauthenticated, "UNAUTHENTICATED", "no credentials, or none that are valid here"),
		console: refusalWith(codes.PermissionDenied, "Console: method: the console is not allowed to you", &errdetails.ErrorInfo{
			Reason: reasonDenied, Domain: domain, Metadata: map[string]string{"method": auth.Console.String(), "field": "method"},
		}),
		draining:         later(codes.Unavailable, "DRAINING", "this instance shuts down, or this connection is too old", retryDraining),
		notReady:         later(codes.Unavailable, "NOT_READY", "this instance does not know the nodes yet", retryNotReady),
		overloaded:       exhausted("OVERLOADED", "too much to do", spread(retryOverloaded)),
		streams:          exhausted("TOO_MANY_STREAMS", "too many streams are open", spread(retryOverloaded)),
		streamsOfOneConn: exhausted("TOO_MANY_STREAMS", "too many streams are open on this connection", spread(retryOverloaded)),
		tenantInFlight:   exhausted(reasonTenantInFlight, "too many pushes of your tenant are in flight", spread(retryOverloaded)),
		quotaPending:     exhausted(reasonQuotaPending, quota.ErrPending.Error(), spread(retryQuota)),
		quotaUnavailable: later(codes.Unavailable, reasonQuotaAway, quota.ErrUnavailable.Error(), retryQuotaAway),
		quotaUsedUp:      dayRefusal{reason: reasonQuota, text: "your quota of the day is used up"},
		tenantUsedUp:     dayRefusal{reason: reasonTenantQuota, text: "the quota of your tenant for the day is used up"},

		rateLimited:       rateRefusals{reasonRate, "you push faster than you may", delays, make([]atomic.Pointer[refusal], len(delays))},
		tenantRateLimited: rateRefusals{reasonTenantRate, "your tenant pushes faster than it may", delays, make([]atomic.Pointer[refusal], len(delays))},

		deadline:          newRefusal(codes.DeadlineExceeded, "DEADLINE_EXCEEDED", "the deadline passed before anything was sent"),
		canceled:          newRefusal(codes.Canceled, "CANCELLED", "cancelled before anything was sent"),
		slow:              newRefusal(codes.DeadlineExceeded, "REQUEST_TOO_SLOW", "the request did not come in while there was memory for it"),
		unavailable:       later(codes.Unavailable, "CONTROLLER_UNAVAILABLE", "the controller does not answer and the route is not known", retryUnavailable),
		internal:          newRefusal(codes.Internal, "INTERNAL", "internal error before anything was sent"),
		unscoped:          newRefusal(codes.FailedPrecondition, "TENANT_BROADCAST_UNSUPPORTED", "a connect-node cannot tell tenants apart, so nothing was sent"),
		idReused:          newRefusal(codes.AlreadyExists, "MESSAGE_ID_REUSED", "options.message_id: was used for another content"),
		earlierUnsent:     later(codes.Unavailable, "EARLIER_PUSH_UNSENT", errEarlierUnsent.Error(), retryEarlier),
		receiptsGone:      newRefusal(codes.OutOfRange, "RECEIPTS_GONE", ErrReceiptsGone.Error()+": watch from now on"),
		receiptsElsewhere: newRefusal(codes.OutOfRange, "RECEIPTS_GONE", ErrReceiptsElsewhere.Error()+": watch from now on"),
		storeOff:          newRefusal(codes.FailedPrecondition, "STORE_OFF", errStoreOff.Error()),
		storeDown:         later(codes.Unavailable, "STORE_DOWN", "the store is "+engine.ErrSpoolDown.Error(), retryStore),
		earlierOpen:       encoded(status.New(codes.DeadlineExceeded, errEarlierOpen.Error())),
		lastingOpen:       encoded(status.New(codes.DeadlineExceeded, errLastingOpen.Error())),
		mayBeSent:         encoded(status.New(codes.Internal, "internal error")),
		unread:            status.New(codes.DeadlineExceeded, "the replies were not read while others waited for memory"),
	}
	t.others = []knownError{
		{jobs.ErrUnknown, newRefusal(codes.NotFound, "JOB_NOT_FOUND", jobs.ErrUnknown.Error())},
		{jobs.ErrExists, newRefusal(codes.AlreadyExists, "JOB_EXISTS", "job_id: there is a job of that name with another spec")},
		{jobs.ErrEnded, newRefusal(codes.FailedPrecondition, "JOB_ENDED", jobs.ErrEnded.Error())},
		{jobs.ErrNotEnded, newRefusal(codes.FailedPrecondition, "JOB_NOT_ENDED", jobs.ErrNotEnded.Error())},
		{errJobsOff, newRefusal(codes.FailedPrecondition, "JOBS_OFF", errJobsOff.Error())},
		{jobs.ErrFull, later(codes.ResourceExhausted, "TOO_MANY_JOBS", jobs.ErrFull.Error(), retryJobsFull)},
		{jobs.ErrFullTenant, later(codes.ResourceExhausted, "TOO_MANY_JOBS", jobs.ErrFullTenant.Error(), retryJobsFull)},
		{jobs.ErrUnavailable, later(codes.Unavailable, "JOBS_UNAVAILABLE", "the jobs cannot be reached: "+jobs.ErrUnavailable.Error(), retryJobs)},
		{errPresenceOff, newRefusal(codes.FailedPrecondition, "PRESENCE_OFF", errPresenceOff.Error())},
		{presence.ErrNoPages, newRefusal(codes.FailedPrecondition, "MEMBERS_UNSUPPORTED", presence.ErrNoPages.Error())},
		{presence.ErrPageGone, newRefusal(codes.OutOfRange, "PAGE_TOKEN_GONE", "page_token: "+presence.ErrPageGone.Error())},
		{presence.ErrFull, later(codes.ResourceExhausted, "TOO_MANY_WATCHED", presence.ErrFull.Error(), retryWatched)},
		{errDisconnectOff, newRefusal(codes.Unimplemented, "DISCONNECT_OFF", errDisconnectOff.Error())},
		{ErrRefusalsAway, later(codes.Unavailable, "REFUSALS_UNAVAILABLE", "nobody was disconnected: "+ErrRefusalsAway.Error(), retryJobs)},
		{ErrManyRefusals, later(codes.ResourceExhausted, "TOO_MANY_REFUSALS", "nobody was disconnected: "+ErrManyRefusals.Error(), retryJobsFull)},
		{ErrRefusalOpen, encoded(status.New(codes.Unavailable, "nobody was disconnected, and "+ErrRefusalOpen.Error()))},
	}
	for a := range methods {
		if a == apis {
			continue
		}
		t.denied[a].method = newDenied(a, "method", "this method is not allowed to you")
		t.denied[a].ids = newDenied(a, a.idField(), "not allowed to you")
	}
	return t
}

// newDenied names the method and what of the request is not allowed, but never the value.
func newDenied(a api, field, text string) *refusal {
	return refusalWith(codes.PermissionDenied, a.String()+": "+field+": "+text, &errdetails.ErrorInfo{
		Reason: reasonDenied, Domain: domain, Metadata: map[string]string{"method": a.String(), "field": field},
	})
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
	var spent *quotaError
	var large *tooLargeError
	var encoding encodingError
	var unknown auth.Reason
	var denied deniedError
	switch {
	case errors.Is(err, engine.ErrOverloaded): // the first, because it comes in masses
		return t.overloaded[rand.IntN(len(t.overloaded))]
	case errors.As(err, &unknown):
		if unknown.Temporary() {
			return t.overloaded[rand.IntN(len(t.overloaded))]
		}
		return t.unauthenticated
	case errors.Is(err, consoleError{}):
		return t.console
	case errors.As(err, &denied):
		switch {
		case denied.method:
			return t.denied[denied.api].method
		case denied.field != "":
			return newDenied(denied.api, denied.field, "not allowed to you")
		}
		return t.denied[denied.api].ids
	case errors.As(err, &over):
		if over.tenant {
			return t.tenantRateLimited.late(over.after)
		}
		return t.rateLimited.late(over.after)
	case errors.As(err, &spent):
		return t.spent(spent)
	case errors.Is(err, errTenantInFlight):
		return t.tenantInFlight[rand.IntN(len(t.tenantInFlight))]
	case errors.Is(err, errTooManyStreams):
		return t.streams[rand.IntN(len(t.streams))]
	case errors.Is(err, errStreamsOfOneConn):
		return t.streamsOfOneConn[rand.IntN(len(t.streamsOfOneConn))]
	case errors.As(err, &large):
		return newTooLarge(large)
	case errors.As(err, &invalid):
		return newInvalid(invalid)
	case errors.As(err, &encoding):
		return newRefusal(codes.Unimplemented, "UNSUPPORTED_ENCODING", plain.Line(encoding.Error(), maxReason))
	case errors.Is(err, engine.ErrDraining):
		return t.draining
	case errors.Is(err, errNotReady):
		return t.notReady
	case errors.Is(err, engine.ErrDeadline):
		return t.deadline
	case errors.Is(err, engine.ErrCanceled):
		return t.canceled
	case errors.Is(err, errSlow):
		return t.slow
	case errors.Is(err, engine.ErrUnscoped):
		return t.unscoped
	case errors.Is(err, engine.ErrUnavailable):
		return t.unavailable
	case errors.Is(err, errMayBeSent):
		return t.mayBeSent
	case errors.Is(err, errIDReused):
		return t.idReused
	case errors.Is(err, errEarlierUnsent):
		return t.earlierUnsent
	case errors.Is(err, errEarlierOpen):
		return t.earlierOpen
	case errors.Is(err, ErrReceiptsGone):
		return t.receiptsGone
	case errors.Is(err, ErrReceiptsElsewhere):
		return t.receiptsElsewhere
	case errors.Is(err, errStoreOff):
		return t.storeOff
	case errors.Is(err, engine.ErrSpoolDown):
		return t.storeDown
	case errors.Is(err, errLastingOpen):
		return t.lastingOpen
	case errors.Is(err, ErrNotTaken):
		return newRefusal(codes.FailedPrecondition, "NOT_TAKEN", plain.Line(err.Error(), maxReason))
	}
	for i := range t.others {
		if errors.Is(err, t.others[i].err) {
			return t.others[i].is
		}
	}
	return t.internal
}

// newInvalid names the field that is wrong.
func newInvalid(e *engine.InvalidError) *refusal {
	return newRefusal(codes.InvalidArgument, e.Code, plain.Line(e.Field+": "+e.Description, maxReason),
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{
			Field:       plain.Line(e.Field, maxReason),
			Description: plain.Line(e.Description, maxReason),
			Reason:      e.Code,
		}}})
}

// newTooLarge refuses a request for its size. Whoever has it tried again by its gRPC for
// RESOURCE_EXHAUSTED would only be told the same: a push-back below zero forbids that.
func newTooLarge(e *tooLargeError) *refusal {
	text := e.Error()
	r := newRefusal(codes.ResourceExhausted, "REQUEST_TOO_LARGE", text, &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{
		Field: "request", Description: strings.TrimPrefix(text, "request: "), Reason: "REQUEST_TOO_LARGE",
	}}})
	r.pushback = metadata.Pairs(pushbackKey, "-1")
	return r
}

// later makes a refusal that says when to come back, as gRPC's clients hear it, too.
func later(code codes.Code, reason, text string, d time.Duration) *refusal {
	r := newRefusal(code, reason, text, retryIn(d))
	r.pushback = metadata.Pairs(pushbackKey, strconv.FormatInt(d.Milliseconds(), 10))
	return r
}

func newRefusal(code codes.Code, reason, text string, details ...protoadapt.MessageV1) *refusal {
	return refusalWith(code, text, append(details, &errdetails.ErrorInfo{Reason: reason, Domain: domain})...)
}

func refusalWith(code codes.Code, text string, details ...protoadapt.MessageV1) *refusal {
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
		all[i] = later(codes.ResourceExhausted, reason, text, d)
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

// rateDelays are the delays that a caller may be told who is over its rate, up to longestTurn: so
// fine that those who are told the same are few, and so few that their refusals can be kept.
func rateDelays() []time.Duration {
	var all []time.Duration
	last := time.Duration(0)
	for _, part := range []struct{ until, step time.Duration }{
		{time.Second, 10 * time.Millisecond},
		{10 * time.Second, 50 * time.Millisecond},
		{longestTurn, 250 * time.Millisecond},
	} {
		for last < part.until {
			last += part.step
			all = append(all, last)
		}
	}
	return all
}

// rateRefusals are those of one rate, by their delay. Each is made when it is first asked for.
type rateRefusals struct {
	reason, text string
	delays       []time.Duration
	made         []atomic.Pointer[refusal]
}

// late is the refusal that asks for a delay of at least after, if there is one so long.
func (t *rateRefusals) late(after time.Duration) *refusal {
	i, _ := slices.BinarySearch(t.delays, after)
	i = min(i, len(t.delays)-1)
	r := t.made[i].Load()
	if r == nil {
		r = exhausted(t.reason, t.text, t.delays[i:i+1])[0]
		t.made[i].Store(r)
	}
	return r
}

// spent is the refusal for a quota.
func (t *statuses) spent(e *quotaError) *refusal {
	switch {
	case errors.Is(e, quota.ErrPending):
		return t.quotaPending[rand.IntN(len(t.quotaPending))]
	case errors.Is(e, quota.ErrUnavailable):
		return t.quotaUnavailable
	case e.tenant:
		return t.tenantUsedUp.now()
	default:
		return t.quotaUsedUp.now()
	}
}

// dayRefusal is the refusal that asks to come back at midnight. It is made again each second.
type dayRefusal struct {
	reason, text string
	last         atomic.Pointer[timedRefusal]
}

type timedRefusal struct {
	seconds int // to midnight
	refusal *refusal
}

func (d *dayRefusal) now() *refusal {
	wait := quota.UntilReset()
	seconds := int(wait/time.Second) + 1
	if last := d.last.Load(); last != nil && last.seconds == seconds {
		return last.refusal
	}
	wait = time.Duration(seconds) * time.Second
	r := later(codes.ResourceExhausted, d.reason, d.text, wait)
	if wait > longestTurn {
		// gRPC clients with a retry policy would hold their call until its deadline ends, and then say that.
		// Below 0 they do not try again (gRFC A6).
		r.pushback = metadata.Pairs(pushbackKey, "-1")
	}
	d.last.Store(&timedRefusal{seconds, r})
	return r
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
