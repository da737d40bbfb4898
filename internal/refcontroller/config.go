package refcontroller

import (
	"errors"
	"log/slog"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/transport/discovery"
)

// Config is what a Server needs. Its zero value works: a Controller in memory that
// does not know etcd.
type Config struct {
	// Store keeps the memberships. Default: NewMemory(MaxUsers).
	Store Store
	// MaxUsers limits the users of each room of the default store. 0: no limit.
	MaxUsers int

	// Client reaches etcd, for the memberships of nodes that die. nil: those stay.
	// The caller closes it after the Server.
	Client *clientv3.Client
	// NodePrefix is where nodes register. Default discovery.ConnectNodePrefix.
	NodePrefix string
	// NodeGrace is how long a node with memberships may be unregistered while it
	// still reports, or if it does not call SyncNode at all. Default 15 s.
	NodeGrace time.Duration
	// Warmup is how long look-ups fail after the start while registered nodes have
	// not reported all their users. Nodes that are reporting are waited for four
	// times as long. 0: look-ups are answered at once.
	Warmup time.Duration

	// WatchPending is how many names may wait for a slow change stream before they
	// become one all=true. Default 10,000.
	WatchPending int
	// Credentials secure the port. A node whose certificate says who it is can then only report
	// as that node. nil: nothing does.
	Credentials credentials.TransportCredentials
	// NoReflection switches gRPC reflection off.
	NoReflection bool

	// Trace begins the span of a call that is part of a trace; the function ends it. nil: nothing is traced.
	Trace func(traceparent, method string) func(error)

	// Logger, nil to discard.
	Logger *slog.Logger
	// Metrics, nil for none.
	Metrics *metrics.Set
}

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its
// keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	if c.Store == nil {
		c.Store = NewMemory(c.MaxUsers)
	}
	if c.NodePrefix == "" {
		c.NodePrefix = discovery.ConnectNodePrefix
	}
	if c.NodeGrace == 0 {
		c.NodeGrace = 15 * time.Second
	}
	if c.WatchPending == 0 {
		c.WatchPending = 10_000
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.MaxUsers < 0 {
		errs = append(errs, errors.New("MaxUsers is negative"))
	}
	if c.Store != nil && c.MaxUsers != 0 {
		errs = append(errs, errors.New("MaxUsers is for the default Store"))
	}
	if c.NodeGrace < 0 {
		errs = append(errs, errors.New("NodeGrace is negative"))
	}
	if c.Warmup < 0 {
		errs = append(errs, errors.New("Warmup is negative"))
	}
	if c.WatchPending < 0 {
		errs = append(errs, errors.New("WatchPending is negative"))
	}
	return errors.Join(errs...)
}
