package app

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/transport/discovery"
)

// grace is for what comes after the work, such as the last spans and scrapes.
const grace = time.Second

// Lifecycle is the parts that a program has started, in order. The zero value has none.
type Lifecycle struct {
	names []string
	stops []func(context.Context) error

	files []files
}

// Add notes a part that has started. Its stop must end by its context.
func (l *Lifecycle) Add(name string, stop func(context.Context) error) {
	l.names = append(l.names, name)
	l.stops = append(l.stops, stop)
}

// Listen opens a port and adds it. Its errors name the key that the port is from.
func (l *Lifecycle) Listen(ctx context.Context, host string, port int, key string) (net.Listener, error) {
	var lc net.ListenConfig
	lis, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return nil, ListenError(key, err)
	}
	l.Add("listener", func(context.Context) error {
		if err := lis.Close(); !errors.Is(err, net.ErrClosed) { // its server may have closed it
			return err
		}
		return nil
	})
	return lis, nil
}

// ListenError names the key that keeps a program from listening: that of the port, unless it is the address that this
// machine does not have.
func ListenError(portKey string, err error) error {
	key := portKey
	switch noAddress := errors.Is(err, syscall.EADDRNOTAVAIL); {
	case noAddress && portKey == "METRICS_PORT":
		key = "METRICS_ADDRESS"
	case noAddress:
		key = "LISTEN_ADDRESS"
	}
	return fmt.Errorf("%s: %w", key, err)
}

// Etcd makes a client of etcd, which may be away, and adds it.
func (l *Lifecycle) Etcd(cfg EtcdConfig) (*clientv3.Client, error) {
	if cfg.Secured() {
		source, err := l.Certificates(cfg.TLS)
		if err != nil {
			return nil, err
		}
		cfg.Credentials = source.Client(certs.Side{MinVersion: tls.VersionTLS12, ServerName: cfg.ServerName})
	}
	client, err := discovery.NewClient(cfg.ClientConfig)
	if err != nil {
		return nil, err
	}
	l.Add("etcd client", func(context.Context) error {
		if err := client.Close(); !errors.Is(err, context.Canceled) { // its way to say that it was closed
			return err
		}
		return nil
	})
	return client, nil
}

// Stop stops all parts, the last one first. A part that fails keeps none of the
// others running.
func (l *Lifecycle) Stop(ctx context.Context) error {
	var errs []error
	for i, stop := range slices.Backward(l.stops) {
		if err := stop(ctx); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", l.names[i], err))
		}
	}
	l.names, l.stops = nil, nil
	return errors.Join(errs...)
}

// StopAfter stops all parts when the start has failed with *err, and adds to *err
// what goes wrong in that. It is to be deferred.
func (l *Lifecycle) StopAfter(ctx context.Context, err *error) {
	if *err == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	*err = errors.Join(*err, l.Stop(ctx))
}

// Closing is a stop that takes no time.
func Closing(stop func()) func(context.Context) error {
	return func(context.Context) error {
		stop()
		return nil
	}
}

// WithTimeout is a stop with a bound of its own inside of the whole's.
func WithTimeout(bound time.Duration, stop func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, bound)
		defer cancel()
		return stop(ctx)
	}
}

// WithGrace is a stop that gets a second, even when the time of the whole has run out.
func WithGrace(stop func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		return stop(ctx)
	}
}
