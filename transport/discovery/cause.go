package discovery

import (
	"context"
	"errors"
	"log/slog"
	"regexp"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// etcd's client turns whatever keeps a request waiting into "context deadline exceeded". gRPC
// knows better: a certificate that does not fit, a port that refuses. requestError carries the
// error as gRPC had it from the connection to whoever made the request.
type requestError struct{ atomic.Pointer[error] }

type requestErrorKey struct{}

// withRequestError returns a context for one request to etcd, and where its error will be.
func withRequestError(ctx context.Context) (context.Context, *requestError) {
	e := &requestError{}
	return context.WithValue(ctx, requestErrorKey{}, e), e
}

// keepRequestError stands below the retries of etcd's client, and sees each attempt.
func keepRequestError() grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoke(ctx, method, req, reply, cc, opts...)
		if e, ok := ctx.Value(requestErrorKey{}).(*requestError); ok && err != nil {
			e.Store(&err)
		}
		return err
	}
}

// explain returns err with its cause where err does not name it. errors.Is works as before.
func (e *requestError) explain(err error) error {
	below := e.Load()
	if err == nil || below == nil {
		return err
	}
	return &causedError{err: err, cause: cause(*below)}
}

// causedError is an error of etcd's client in the words of gRPC.
type causedError struct {
	err   error
	cause string
}

func (e *causedError) Error() string { return e.cause }
func (e *causedError) Unwrap() error { return e.err }

var (
	// gRPC's words around the error of a connection, which may be quoted twice.
	connectionError = regexp.MustCompile(`^(?:latest balancer error: |last connection error: |connection error: desc = |transport: |"|\\)+`)
	// Our own port is another one with each attempt, and says nothing.
	ownPort = regexp.MustCompile(`\S+->`)
)

// cause is the error of a request in as few words as say why: the same words as long as the
// reason is the same.
func cause(err error) string {
	text := status.Convert(err).Message()
	if at := strings.LastIndex(text, "latest balancer error: "); at >= 0 {
		text = text[at:]
	}
	text = connectionError.ReplaceAllString(text, "")
	text = strings.TrimRight(text, `"\`)
	text = ownPort.ReplaceAllString(text, "")
	if text == context.DeadlineExceeded.Error() || strings.Contains(text, "while waiting for connections to become ready") {
		return "no answer in time"
	}
	const most = 512 // an error of x509 has about 200
	return strings.ToValidUTF8(text[:min(len(text), most)], "")
}

// maxCauses bounds the causes of one outage that are logged: they may alternate, one for each
// endpoint.
const maxCauses = 16

// absence is a time in which etcd is out of reach. It logs each of its causes once, and not each
// attempt. One goroutine owns it; Why may be asked by anybody.
type absence struct {
	log     *slog.Logger
	message string // what the outage means here

	logged map[string]bool // causes; until forget
	why    atomic.Pointer[string]
}

// goesOn notes a failed attempt. attrs are logged beside the cause.
func (o *absence) goesOn(err error, attrs ...any) {
	why := err.Error()
	if caused, ok := errors.AsType[*causedError](err); ok {
		why = caused.cause
	}
	o.because(why)
	if o.logged[why] || len(o.logged) >= maxCauses {
		return
	}
	if o.logged == nil {
		o.logged = map[string]bool{}
	}
	o.logged[why] = true
	o.log.Warn(o.message, append(attrs, "err", err)...) //nolint:sloglint // the message is a constant of the Watcher or the Registration
}

// because notes a cause that is logged elsewhere.
func (o *absence) because(why string) { o.why.Store(&why) }

// ends notes that etcd has answered.
func (o *absence) ends() { o.why.Store(nil) }

// forget is for when all has been well for a while: the next outage is a new one.
func (o *absence) forget() {
	if o.why.Load() == nil {
		clear(o.logged)
	}
}

// Why is the cause of the last failure, "" while etcd answers.
func (o *absence) Why() string {
	if why := o.why.Load(); why != nil {
		return *why
	}
	return ""
}
