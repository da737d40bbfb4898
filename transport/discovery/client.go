package discovery

import (
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// maxReplyBytes bounds one page of a list: 128 values of etcd's largest size.
const maxReplyBytes = 256 << 20

// firstAnswer is how long etcd's client waits at least for a token, which takes a check of a
// password, and for the first answer about a lease. It calls that DialTimeout, and does not dial
// with it.
const firstAnswer = 5 * time.Second

// ClientConfig says how etcd is reached.
type ClientConfig struct {
	// Endpoints are host:port or URLs. At least one.
	Endpoints []string
	// DialTimeout bounds one attempt to connect. Default 1 s: an attempt that nobody
	// answers has to end, and a pause of up to 0.6 s to pass, before an etcd that is back is
	// found; that shall be within two seconds.
	DialTimeout time.Duration
	// Username and Password, where etcd asks for them.
	Username, Password string
	// TLS is nil for plain connections.
	TLS *tls.Config
}

func (c ClientConfig) withDefaults() ClientConfig {
	if c.DialTimeout == 0 {
		c.DialTimeout = time.Second
	}
	return c
}

// Validate reports everything that is wrong with c.
func (c ClientConfig) Validate() error {
	var errs []error
	if len(c.Endpoints) == 0 {
		errs = append(errs, errors.New("Endpoints is empty"))
	}
	for _, e := range c.Endpoints {
		if e == "" {
			errs = append(errs, errors.New("Endpoints holds an empty one"))
		}
	}
	if c.DialTimeout < 0 {
		errs = append(errs, errors.New("DialTimeout is negative"))
	}
	return errors.Join(errs...)
}

// NewClient makes an etcd client for a Watcher and Registrations. It does not
// wait for etcd: one that is down at the start is found when it comes up. The
// caller closes it after everything that uses it.
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
	return clientv3.Config{
		Endpoints:            c.Endpoints,
		DialTimeout:          max(c.DialTimeout, firstAnswer),
		DialKeepAliveTime:    10 * time.Second, // etcd's own floor is 5 s
		DialKeepAliveTimeout: 3 * time.Second,
		MaxCallRecvMsgSize:   maxReplyBytes,
		Username:             c.Username,
		Password:             c.Password,
		TLS:                  c.TLS,
		// Retries are ours, with a backoff of ours; the client's default is 100
		// in a row.
		MaxUnaryRetries: 2,
		Logger:          zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			// gRPC's own backoff grows to two minutes, after each attempt of up to
			// MinConnectTimeout; an etcd that is back must be found within two seconds.
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: c.DialTimeout,
		})},
	}
}
