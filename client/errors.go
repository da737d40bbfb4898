package client

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var (
	// ErrUnknown is what every error is, in the sense of errors.Is, after which the push may have been delivered.
	ErrUnknown = errors.New("the push may have been delivered")
	// ErrClosed is what a push on a Stream ends with that was closed before.
	ErrClosed = errors.New("the stream is closed")
)

// Error is why a push has no Result.
//
// errors.Is knows context.DeadlineExceeded and context.Canceled by its Code, and [ErrUnknown] by NotSent.
type Error struct {
	// Code is the gRPC status.
	Code codes.Code
	// Reason is Push-Manager's word for it, such as OVERLOADED or PERMISSION_DENIED; "" if the error is not Push-Manager's.
	Reason string
	// Field is the field of the request that is at fault, such as content.data; "" for none.
	Field string
	// Message is for people and logs.
	Message string
	// RetryAfter is when Push-Manager wants to be asked again; 0: it does not say.
	RetryAfter time.Duration
	// NotSent is true if nothing was sent: to push again is safe, also without a MessageID. It is about all tries of the push.
	NotSent bool
	// Tries is how often the push was tried.
	Tries int

	retry bool  // it had a RetryInfo, be it of 0
	cause error // what else it is, nil for nothing
}

// Error says what happened and whether anything was sent.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("push: ")
	b.WriteString(e.Message)
	b.WriteString(" (")
	b.WriteString(e.Code.String())
	if e.Reason != "" {
		b.WriteString(", " + e.Reason)
	}
	if e.Tries > 1 {
		fmt.Fprintf(&b, ", %d tries", e.Tries)
	}
	if e.NotSent {
		b.WriteString("; nothing was sent)")
	} else {
		b.WriteString("; it may have been delivered)")
	}
	return b.String()
}

// Is makes errors.Is find ErrUnknown, context.DeadlineExceeded and context.Canceled.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrUnknown:
		return !e.NotSent
	case context.DeadlineExceeded:
		return e.Code == codes.DeadlineExceeded
	case context.Canceled:
		return e.Code == codes.Canceled
	}
	return false
}

// Unwrap leads to ErrClosed.
func (e *Error) Unwrap() error { return e.cause }

// GRPCStatus makes status.Code and status.FromError work.
func (e *Error) GRPCStatus() *status.Status { return status.New(e.Code, e.Message) }

// domain is that of Push-Manager's ErrorInfo. With it, nothing was sent.
const domain = "push-manager"

// errorOf is the error of a call. sent tells whether the call was given to a connection.
func errorOf(err error, sent bool) *Error {
	s := status.Convert(err)
	if _, ok := status.FromError(err); !ok {
		s = status.FromContextError(err)
	}
	e := errorOfStatus(s.Proto())
	// Without a connection nothing has left. A server that does not know the method has done nothing.
	e.NotSent = e.NotSent || !sent || e.Code == codes.Unimplemented
	return e
}

// errorOfStatus is the error of a status that a server has sent.
func errorOfStatus(s *spb.Status) *Error {
	e := &Error{Code: codes.Code(s.GetCode()), Message: s.GetMessage(), Tries: 1}
	for _, detail := range s.GetDetails() {
		var info errdetails.ErrorInfo
		var after errdetails.RetryInfo
		var bad errdetails.BadRequest
		switch {
		case detail.MessageIs(&info):
			if detail.UnmarshalTo(&info) != nil || info.GetDomain() != domain {
				continue
			}
			e.NotSent, e.Reason = true, info.GetReason()
			if e.Field == "" {
				e.Field = info.GetMetadata()["field"]
			}
		case detail.MessageIs(&after):
			if detail.UnmarshalTo(&after) == nil && after.GetRetryDelay().IsValid() {
				e.retry, e.RetryAfter = true, max(after.GetRetryDelay().AsDuration(), 0)
			}
		case detail.MessageIs(&bad):
			if detail.UnmarshalTo(&bad) == nil && len(bad.GetFieldViolations()) > 0 {
				e.Field = bad.GetFieldViolations()[0].GetField()
			}
		}
	}
	return e
}

// ofMessage tells whether it is the message of a PushStream that is at fault, and not the call.
func (e *Error) ofMessage() bool {
	return e.Code == codes.InvalidArgument || e.Reason == "REQUEST_TOO_LARGE" || e.Reason == "REQUEST_TOO_SLOW"
}

// unusable is the error for an answer that says nothing.
func unusable(text string) *Error {
	return &Error{Code: codes.Internal, Message: text, Tries: 1}
}
