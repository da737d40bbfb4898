package client

import (
	"context"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// ErrorOfStatus is what is made of a status with an ErrorInfo of a domain.
func ErrorOfStatus(t *testing.T, code codes.Code, domain string, after time.Duration) *Error {
	t.Helper()
	s, err := status.New(code, "x").WithDetails(&errdetails.ErrorInfo{Domain: domain, Reason: "X"}, &errdetails.RetryInfo{RetryDelay: durationpb.New(after)})
	if err != nil {
		t.Fatal(err)
	}
	return errorOf(s.Err(), true)
}

// ForgetTokens has the token file read with the next call.
func ForgetTokens(t *testing.T, c *Client) {
	t.Helper()
	f := c.cfg.tokenFile
	f.mu.Lock()
	defer f.mu.Unlock()
	f.read = time.Time{}
}

// Traceparent is what a call would carry.
func Traceparent(t *testing.T, ctx context.Context) string { //nolint:revive // thelper wants t first
	t.Helper()
	md, _ := metadata.FromOutgoingContext(propagate(ctx))
	if v := md.Get("traceparent"); len(v) == 1 {
		return v[0]
	}
	return ""
}

// StatusOf is a refusal of Push-Manager's; after below 0: it does not say when to come back.
func StatusOf(t *testing.T, code codes.Code, reason string, after time.Duration) *status.Status {
	t.Helper()
	s, err := status.New(code, "x").WithDetails(&errdetails.ErrorInfo{Domain: domain, Reason: reason})
	if err == nil && after >= 0 {
		s, err = s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(after)})
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Lane is a lane without goroutines and without a call.
type Lane struct {
	l *lane
	// Cut is closed when the sweeper ends the call.
	Cut <-chan struct{}
}

// NewLane makes one. c may be closed.
func NewLane(t *testing.T, c *Client) *Lane {
	t.Helper()
	l := newLane(c, StreamConfig{}.withDefaults())
	ctx, cancel := context.WithCancelCause(t.Context())
	l.setCancel(cancel)
	return &Lane{l, ctx.Done()}
}

// SweepAt has the lanes of a Stream swept as if it were another time.
func SweepAt(t *testing.T, s *Stream, now time.Time) {
	t.Helper()
	for _, l := range s.lanes {
		l.sweep(now)
	}
}

// Take takes a push with a deadline.
func (l *Lane) Take(deadline time.Time) {
	to := User("alice")
	l.l.enqueue(&Pending{target: to, deadline: deadline, span: noop.Span{}, done: make(chan struct{}), tries: l.l.c.newTries(to, "")})
}

// Refuse has a push, the first one is 1, refused by Push-Manager, for good if retry is not set.
func (l *Lane) Refuse(ctx context.Context, id uint64, retry bool) {
	refused := &Error{Code: codes.ResourceExhausted, Reason: "OVERLOADED", NotSent: true, retry: retry}
	l.l.settle(ctx, []answer{{id: id, failed: refused}})
}

// IsOpen tells whether a push was written, and has not ended.
func (l *Lane) IsOpen(id uint64) bool { return l.l.open[id] != nil }

// Write writes what is queued, to nobody.
func (l *Lane) Write() { l.l.take() }

// Sweep tells whether the sweeper goes on.
func (l *Lane) Sweep(now time.Time) bool { return l.l.sweep(now) }

// Woken tells whether the sweeper was woken since the last call of Woken.
func (l *Lane) Woken() bool {
	select {
	case <-l.l.busy:
		return true
	default:
		return false
	}
}
