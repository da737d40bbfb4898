package discovery

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The prefixes of the contract.
const (
	ConnectNodePrefix = "/services/connect-node/"
	PushManagerPrefix = "/services/push-manager/"
)

// defaultMetricsPrefix is for Push-Manager itself; other programs have their own.
const defaultMetricsPrefix = "push_manager"

// Config is what a Watcher needs. The zero values of all but Client and OnChange
// stand for the defaults.
type Config struct {
	// Client reaches etcd. The caller closes it after the Watcher.
	Client *clientv3.Client
	// Prefix of the keys. Default ConnectNodePrefix.
	Prefix string
	// OnChange gets the complete set, ordered by id, after the first list and
	// after each change. Called from one goroutine; it should return soon. The
	// slice is the callee's.
	OnChange func([]Node)
	// Alive tells whether the link to a node lives: connected and not draining.
	// Called from the goroutine of OnChange. nil: nobody vouches, nodes go with
	// their keys.
	Alive func(id string) bool

	// Grace is how long a node without a key stays while it is Alive. Default 15 s.
	Grace time.Duration
	// ResyncInterval is the time between lists when nothing seems wrong. Default 1 m.
	ResyncInterval time.Duration
	// ProbeInterval is how often etcd is asked for a sign of life. A watch is
	// silent when nothing changes, and for ever when history went back under it.
	// Default 5 s.
	ProbeInterval time.Duration
	// ConfirmAfter is the time between a list whose history went back and the
	// one that has to agree before anything is removed: long enough for nodes to
	// notice and register again. Default 10 s.
	ConfirmAfter time.Duration
	// RequestTimeout bounds one request to etcd. Default 3 s.
	RequestTimeout time.Duration
	// MinBackoff and MaxBackoff bound the pause after a failure, counted from the beginning
	// of what failed. Default 50 ms, 1 s: an etcd that answers again is listed within two.
	MinBackoff, MaxBackoff time.Duration
	// MaxNodes is the number of keys taken notice of. Default 4096.
	MaxNodes int
	// AllowNets, when not empty, names the only networks that may be dialled;
	// addresses must then be IP addresses.
	AllowNets []netip.Prefix

	// Logger, nil to discard.
	Logger *slog.Logger
	// Metrics, nil for none. One Watcher for each set and MetricsPrefix.
	Metrics *metrics.Set
	// MetricsPrefix begins the metrics' names. Default "push_manager".
	MetricsPrefix string
}

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its
// keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	c.Prefix = prefixOr(c.Prefix, ConnectNodePrefix)
	defaultTo(&c.Grace, 15*time.Second)
	defaultTo(&c.ResyncInterval, time.Minute)
	defaultTo(&c.ProbeInterval, 5*time.Second)
	defaultTo(&c.ConfirmAfter, 10*time.Second)
	defaultTo(&c.RequestTimeout, 3*time.Second)
	defaultTo(&c.MinBackoff, 50*time.Millisecond)
	defaultTo(&c.MaxBackoff, time.Second)
	defaultTo(&c.MaxNodes, 4096)
	defaultTo(&c.MetricsPrefix, defaultMetricsPrefix)
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
	if c.Client == nil {
		errs = append(errs, errors.New("Client is nil"))
	}
	if c.OnChange == nil {
		errs = append(errs, errors.New("OnChange is nil"))
	}
	for _, d := range []struct {
		name string
		d    time.Duration
	}{
		{"Grace", c.Grace},
		{"ResyncInterval", c.ResyncInterval},
		{"ProbeInterval", c.ProbeInterval},
		{"ConfirmAfter", c.ConfirmAfter},
		{"RequestTimeout", c.RequestTimeout},
		{"MinBackoff", c.MinBackoff},
		{"MaxBackoff", c.MaxBackoff},
	} {
		if d.d < 0 {
			errs = append(errs, fmt.Errorf("%s is negative", d.name))
		}
	}
	if c.MaxNodes < 0 {
		errs = append(errs, errors.New("MaxNodes is negative"))
	}
	if c.MinBackoff > c.MaxBackoff && c.MaxBackoff > 0 {
		errs = append(errs, errors.New("MinBackoff is longer than MaxBackoff"))
	}
	return errors.Join(errs...)
}

func defaultTo[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// prefixOr ends a prefix in a slash, so that /services/connect-node does not
// match /services/connect-node-2/x.
func prefixOr(prefix, fallback string) string {
	if prefix == "" {
		return fallback
	}
	if !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	return prefix
}
