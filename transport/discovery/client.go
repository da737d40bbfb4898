package discovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
)

// maxReplyBytes bounds one page of a list: 128 values of etcd's largest size.
const maxReplyBytes = 256 << 20

// firstAnswer is how long etcd's client waits at least for a token, which takes a check of a
// password, and for the first answer about a lease. It calls that DialTimeout, and does not dial
// with it.
const firstAnswer = 5 * time.Second

// DefaultDialTimeout is that of a ClientConfig.
const DefaultDialTimeout = time.Second

// ClientConfig says how etcd is reached.
type ClientConfig struct {
	// Endpoints are host:port or URLs. At least one. https:// asks for TLS even without
	// Credentials, http:// for none: all of them must agree with each other and with Credentials.
	Endpoints []string
	// DialTimeout bounds one attempt to connect. Default 1 s: an attempt that nobody
	// answers has to end, and a pause of up to 0.6 s to pass, before an etcd that is back is
	// found; that shall be within two seconds.
	DialTimeout time.Duration
	// Username and Password, where etcd asks for them: both or neither.
	Username, Password string
	// Credentials secure the connections. nil: they are plain, or etcd's client does so, for https://.
	Credentials credentials.TransportCredentials
}

func (c ClientConfig) withDefaults() ClientConfig {
	if c.DialTimeout == 0 {
		c.DialTimeout = DefaultDialTimeout
	}
	return c
}

// Validate reports everything that is wrong with c.
func (c ClientConfig) Validate() error {
	var errs []error
	if len(c.Endpoints) == 0 {
		errs = append(errs, errors.New("Endpoints is empty"))
	}
	if err := CheckEndpoints(c.Endpoints, c.Credentials != nil); err != nil {
		errs = append(errs, fmt.Errorf("Endpoints: %w", err))
	}
	if (c.Username == "") != (c.Password == "") {
		errs = append(errs, errors.New("Username and Password: one of them is missing"))
	}
	if c.DialTimeout < 0 {
		errs = append(errs, errors.New("DialTimeout is negative"))
	}
	return errors.Join(errs...)
}

// CheckEndpoints tells what is wrong with endpoints, which are spoken to over TLS if secured. It finds what etcd's client
// would take for something else without a word: it looks at the scheme of the first endpoint only, and dials what it cannot
// parse as it is.
func CheckEndpoints(endpoints []string, secured bool) error {
	secure := map[bool]string{}
	for _, e := range endpoints {
		address := e
		if scheme, rest, found := strings.Cut(e, "://"); found {
			u, err := url.Parse(e)
			switch {
			case scheme != "http" && scheme != "https":
				return fmt.Errorf("%q: the scheme is neither http nor https", e)
			case err != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.User != nil:
				return fmt.Errorf("%q is no URL of an etcd", e)
			case scheme == "http" && secured:
				return fmt.Errorf("%q is plain text, while TLS is configured", e)
			}
			secure[scheme == "https"] = e
			address = strings.TrimSuffix(rest, "/")
		} else {
			secure[secured] = e
		}
		host, port, err := net.SplitHostPort(address)
		if err != nil || host == "" || strings.ContainsFunc(address, unicode.IsSpace) {
			return fmt.Errorf("%q is not host:port", e)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("%q: port is not in 1..65535", e)
		}
	}
	if len(secure) == 2 {
		return fmt.Errorf("%q is plain text and %q is not", secure[false], secure[true])
	}
	return nil
}

// NewClient makes an etcd client for a Watcher and Registrations. It does not
// wait for etcd, nor does it log in: one that is down at the start is found when it comes up.
// The caller closes it after everything that uses it.
func NewClient(cfg ClientConfig) (*clientv3.Client, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("etcd client: %w", err)
	}
	client, err := clientv3.New(cfg.etcd())
	if err != nil {
		return nil, fmt.Errorf("etcd client: %w", err)
	}
	return client, nil
}

// etcd is c as etcd's client wants it.
func (c ClientConfig) etcd() clientv3.Config {
	cfg := clientv3.Config{
		Endpoints:            c.Endpoints,
		DialTimeout:          max(c.DialTimeout, firstAnswer),
		DialKeepAliveTime:    10 * time.Second, // etcd's own floor is 5 s
		DialKeepAliveTimeout: 3 * time.Second,
		MaxCallRecvMsgSize:   maxReplyBytes,
		Username:             c.Username,
		Password:             c.Password,
		// Retries are ours, with a backoff of ours; the client's default is 100
		// in a row.
		MaxUnaryRetries: 2,
		Logger:          zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithChainUnaryInterceptor(laterLogin(c.Username != ""), keepRequestError()), grpc.WithConnectParams(grpc.ConnectParams{
			// gRPC's own backoff grows to two minutes, after each attempt of up to
			// MinConnectTimeout; an etcd that is back must be found within two seconds.
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: c.DialTimeout,
		})},
	}
	if c.Credentials != nil { // These options come last, and win over what the client makes of the endpoints.
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithTransportCredentials(c.Credentials))
	}
	return cfg
}

// laterLogin lets etcd's client be made while etcd is away. clientv3.New logs in before it
// returns, and fails where that fails. So the first login is answered here, with no token. The
// client asks for a token before each stream, and when etcd refuses a request for the lack of a
// valid one: that is how it comes to the first, too.
//
// Without a token etcd takes the common name of a client's certificate for the user, if there is
// one, and denies it what the user of the password may do. The client would leave it at that. So
// such a denial becomes the lack of a user.
func laterLogin(hasUser bool) grpc.UnaryClientInterceptor {
	var made, loggedIn atomic.Bool
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		login := method == etcdserverpb.Auth_Authenticate_FullMethodName
		if login && made.CompareAndSwap(false, true) {
			return nil
		}
		err := invoke(ctx, method, req, reply, cc, opts...)
		switch {
		case login && err == nil:
			loggedIn.Store(true)
		case hasUser && !loggedIn.Load() && errors.Is(rpctypes.Error(err), rpctypes.ErrPermissionDenied):
			return rpctypes.ErrGRPCUserEmpty
		}
		return err
	}
}
