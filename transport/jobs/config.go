package jobs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/engine"
)

// Prefix begins the keys of jobs in etcd.
const Prefix = "/push-manager/jobs"

// Nodes are the Connect-Nodes that can be asked for their users.
type Nodes interface {
	NodeIDs() []string
	// ListUsers is link.Set.ListUsers.
	ListUsers(ctx context.Context, node string, first uint64, limit int, scope string) (users []string, last uint64, err error)
}

// Config of a Service. Client, Engine, Nodes and ManagerID are required; zero fields of the others mean the defaults.
type Config struct {
	Client    *clientv3.Client // the caller closes it, after the Service
	Engine    *engine.Engine
	Nodes     Nodes
	ManagerID string // who runs a job, for people
	// NoList tells the error of a node that cannot be asked for its users at all. Others are asked again.
	NoList func(error) bool
	// Ready tells whether it is known which nodes there are. Until then nothing is run. Nil: always.
	Ready func() bool

	// MaxRate bounds the users a second of one job. 0 means 10,000.
	MaxRate int
	// Most is how many jobs are kept in all. A tenant has a share of it (ids.TenantShare). 0 means 1,000.
	Most int
	// Running is how many jobs this instance runs at a time. A tenant has a share of it (ids.TenantShare). 0 means 64.
	Running int
	// Keep is how long a job is kept once it has ended. 0 means 7 days.
	Keep time.Duration
	// TTL is how long a job that was run by an instance that was killed waits for another one, in whole seconds. 0 means 10 s.
	TTL time.Duration
	// RequestTimeout bounds one request to etcd. 0 means 3 s.
	RequestTimeout time.Duration

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

// Defaults are what the zero fields of a Config stand for.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	defaultTo(&c.MaxRate, 10_000)
	defaultTo(&c.Most, 1000) // of 2 KiB, and a content
	defaultTo(&c.Running, 64)
	defaultTo(&c.Keep, 7*24*time.Hour)
	defaultTo(&c.TTL, 10*time.Second)
	defaultTo(&c.RequestTimeout, 3*time.Second)
	if c.Ready == nil {
		c.Ready = func() bool { return true }
	}
	if c.NoList == nil {
		c.NoList = func(error) bool { return false }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

func defaultTo[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	if c.Client == nil || c.Engine == nil || c.Nodes == nil || c.ManagerID == "" {
		errs = append(errs, errors.New("jobs: Client, Engine, Nodes or ManagerID is missing"))
	}
	for _, f := range []struct {
		name      string
		v, lo, hi int
	}{{"MaxRate", c.MaxRate, 1, 100_000}, {"Most", c.Most, 1, 10_000}, {"Running", c.Running, 1, 1000}} {
		if f.v < f.lo || f.v > f.hi {
			errs = append(errs, fmt.Errorf("jobs: %s is %d, want %d to %d", f.name, f.v, f.lo, f.hi))
		}
	}
	if c.Keep < 0 || c.TTL < time.Second || c.RequestTimeout < 0 {
		errs = append(errs, errors.New("jobs: Keep or RequestTimeout is negative, or TTL is below 1s"))
	}
	return errors.Join(errs...)
}
