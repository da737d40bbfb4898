package web

import (
	"errors"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// pushbackKey is the trailer that says to clients of gRPC when to come back.
const pushbackKey = "grpc-retry-pushback-ms"

var (
	errInternal    = errors.New("internal error")
	errEnded       = status.Error(codes.Canceled, "the stream has ended")
	errNotFound    = refusal(codes.NotFound, "NOT_FOUND", "there is nothing at this path")
	errNeedsHTTP2  = refusal(codes.Unimplemented, "NEEDS_HTTP2", "this method streams in both directions, which needs HTTP/2")
	errNotJSON     = refusal(codes.InvalidArgument, "NOT_JSON", "the Content-Type must be application/json")
	errCompressed  = refusal(codes.Unimplemented, "UNSUPPORTED_ENCODING", "requests must not be compressed")
	errEncoding    = refusal(codes.Unimplemented, "UNSUPPORTED_ENCODING", "requests may be compressed with gzip alone, and only the header of their protocol says so")
	errOrigin      = refusal(codes.PermissionDenied, "FOREIGN_ORIGIN", "pages of this origin may not call: see HTTP_ALLOWED_ORIGINS")
	errWrongMethod = refusal(codes.Unimplemented, "METHOD_NOT_ALLOWED", "this path wants another HTTP method")
)

// refusal is an error of ours: with ErrorInfo, so nothing was sent.
func refusal(code codes.Code, reason, text string) error {
	st, err := status.New(code, text).WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: "push-manager"})
	if err != nil {
		return status.Error(code, text) //nolint:wrapcheck // it is one
	}
	return st.Err() //nolint:wrapcheck // it is one
}

// failure is an error of a handler as connect writes it, and counts it.
func (s *Server) failure(c *call, protocol string, err error) error {
	st, ok := status.FromError(err)
	if !ok {
		st = status.FromContextError(err)
	}
	e := connectError(st)
	if d := retryDelay(st); d > 0 {
		e.Meta().Set("Retry-After", strconv.FormatInt(int64((d+time.Second-1)/time.Second), 10))
	}
	if st.Code() == codes.Unauthenticated {
		e.Meta().Set("WWW-Authenticate", "Bearer")
	}
	if c != nil {
		if v := c.trailer.Get(pushbackKey); len(v) > 0 && protocol != connect.ProtocolConnect {
			e.Meta().Set(pushbackKey, v[0])
		}
		if c.w != nil && tooLarge(st) {
			c.w.status = http.StatusRequestEntityTooLarge // where connect has a status for each code alone
		}
	}
	s.metrics.count(protocol, e.Code().String())
	return e
}

func connectError(st *status.Status) *connect.Error {
	e := connect.NewError(connect.Code(st.Code()), errors.New(st.Message())) //nolint:err113 // it is the text of another one
	for _, detail := range st.Proto().GetDetails() {
		if d, err := connect.NewErrorDetail(detail); err == nil {
			e.AddDetail(d)
		}
	}
	return e
}

func retryDelay(st *status.Status) time.Duration {
	for _, d := range st.Details() {
		if retry, ok := d.(*errdetails.RetryInfo); ok {
			return retry.GetRetryDelay().AsDuration()
		}
	}
	return 0
}

func tooLarge(st *status.Status) bool {
	if st.Code() != codes.ResourceExhausted {
		return false
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason() == "REQUEST_TOO_LARGE"
		}
	}
	return false
}

// errorWriter writes errors of requests that get to no method.
type errorWriter = connect.ErrorWriter

func newErrorWriter() *errorWriter { return connect.NewErrorWriter() }

// fail answers a request that gets to no method.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	_ = s.errors.Write(w, r, s.failure(nil, "none", err)) // it fails for a client that has gone
}

// failWith answers with a status that the code of the error does not stand for, and the JSON of the error, whatever the
// request speaks: gRPC and streams have no status but 200.
func (s *Server) failWith(w http.ResponseWriter, httpStatus int, err error) {
	if w, ok := w.(*response); ok {
		w.status = httpStatus
	}
	s.fail(w, &http.Request{}, err)
}
