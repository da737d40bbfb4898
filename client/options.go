package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/resolver"
)

// Option is one of a Client.
type Option func(*config)

type config struct {
	tls         *TLS
	credentials credentials.TransportCredentials
	token       func(context.Context) (string, error)
	tokenFile   *tokenFile // that of token, nil for none
	timeout     time.Duration
	retries     Retries
	onRetry     func(context.Context, Retry)
	tracer      trace.Tracer
	provider    trace.TracerProvider
	unhealthy   bool // no health checks
	failFast    bool
	resolvers   []resolver.Builder
	dialOptions []grpc.DialOption
	errs        []error
}

func newConfig(options []Option) (config, error) {
	c := config{timeout: 5 * time.Second} // what Push-Manager grants a call without a deadline
	for _, option := range options {
		option(&c)
	}
	if c.timeout <= 0 {
		c.errs = append(c.errs, fmt.Errorf("timeout: %v must be above zero", c.timeout))
	}
	if r := c.retries; r.Tries < 0 || r.Burst < 0 || !(r.Ratio >= 0 && r.Ratio <= 1) {
		c.errs = append(c.errs, fmt.Errorf("retries: %+v: none may be below zero, and Ratio not above 1", r))
	}
	if c.tls != nil && c.credentials != nil {
		c.errs = append(c.errs, errors.New("TLS and transport credentials: choose one"))
	}
	c.retries = c.retries.withDefaults()
	if c.provider == nil {
		c.provider = otel.GetTracerProvider()
	}
	c.tracer = c.provider.Tracer("github.com/push-manager/push-manager/client")
	return c, errors.Join(c.errs...)
}

// TLS says how Push-Manager is reached over TLS. All of it may be left out.
type TLS struct {
	// CAFile is a PEM file of the authorities that Push-Manager's certificate is checked with. "": those of the system.
	CAFile string
	// CertFile and KeyFile are PEM files of the certificate that the Client shows.
	CertFile, KeyFile string
	// ServerName is the name that Push-Manager's certificate must have. "": the host of the target.
	ServerName string
}

// WithTLS connects over TLS. The files are read again every ten seconds; what they hold then counts for new connections.
func WithTLS(t TLS) Option { return func(c *config) { c.tls = &t } }

// WithTransportCredentials connects with credentials of your own. A token then goes over whatever they are.
func WithTransportCredentials(t credentials.TransportCredentials) Option {
	return func(c *config) { c.credentials = t }
}

// WithToken shows an API key or a JSON Web Token with each call. Without TLS it is refused but for loopback addresses.
func WithToken(token string) Option {
	return func(c *config) {
		if err := checkToken(token); err != nil {
			c.errs = append(c.errs, fmt.Errorf("token: %w", err))
		}
		c.token = func(context.Context) (string, error) { return token, nil }
	}
}

// WithTokenFile is WithToken with a file, which is read again once a second at most.
func WithTokenFile(path string) Option {
	return func(c *config) {
		f := &tokenFile{path: path}
		if _, err := f.token(context.Background()); err != nil {
			c.errs = append(c.errs, err)
		}
		c.token, c.tokenFile = f.token, f
	}
}

// WithTokenSource is WithToken with a function that is called for each call, and each Stream that is opened. It should keep what it has
// as long as that is valid.
func WithTokenSource(source func(context.Context) (string, error)) Option {
	return func(c *config) { c.token = source }
}

// WithTimeout is for pushes whose context has no deadline. Default 5 s.
func WithTimeout(d time.Duration) Option { return func(c *config) { c.timeout = d } }

// WithRetries bounds how often pushes are repeated.
func WithRetries(r Retries) Option { return func(c *config) { c.retries = r } }

// WithRetryHook has f called before each push that is repeated, for metrics and logs. It must return soon, and must not use a
// Stream.
func WithRetryHook(f func(context.Context, Retry)) Option { return func(c *config) { c.onRetry = f } }

// WithTracerProvider takes the place of OpenTelemetry's global one. Each push is a span, and its context goes to Push-Manager, but not
// from a Stream: its calls belong to no push.
func WithTracerProvider(p trace.TracerProvider) Option { return func(c *config) { c.provider = p } }

// WithoutHealthChecks calls instances that say they are not ready, too. With health checks a call waits for an instance that is ready,
// up to its deadline. Without them Push-Manager tells why it cannot deliver, and serves what it still can: choose that where there is
// one instance, or a balancer in front.
func WithoutHealthChecks() Option { return func(c *config) { c.unhealthy = true } }

// WithFailFast ends a push at once when no instance can be reached. Without it a push waits for one, up to its deadline.
func WithFailFast() Option { return func(c *config) { c.failFast = true } }

// WithResolver has a scheme of targets resolved by r, for example by package etcdresolver.
func WithResolver(r resolver.Builder) Option {
	return func(c *config) { c.resolvers = append(c.resolvers, r) }
}

// WithDialOptions passes options to gRPC, behind those of the Client.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(c *config) { c.dialOptions = append(c.dialOptions, options...) }
}
