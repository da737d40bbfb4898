package controller

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// Config says where the Controller is and what it may cost. The zero values of
// all but Address stand for the defaults.
type Config struct {
	// Address is any gRPC target, or several host:port separated by commas.
	Address string

	// MaxReplyBytes bounds one reply of the Controller. Default 256 MiB.
	MaxReplyBytes int
	// MaxMembers bounds the members of one room. Default 2,000,000.
	MaxMembers int
	// BatchUsers is how many users one GetUserNodes asks for. Default and most
	// 10,000.
	BatchUsers int
	// Parallel is how many GetUserNode one look-up of several users runs at a
	// time, with a Controller that has no GetUserNodes. Default 16.
	Parallel int
	// ProbeAgainAfter is how long UNIMPLEMENTED is remembered on one connection.
	// Default 10 m.
	ProbeAgainAfter time.Duration
	// ContactInterval is how often the Controller is asked for a sign of life when
	// nothing else has come from it. Default 5 s. After three of them in silence it
	// is not healthy.
	ContactInterval time.Duration
	// MaxBackoff bounds the pause before the next attempt to connect or to open
	// the change stream. Default 1 s.
	MaxBackoff time.Duration

	// Credentials secure the connections. nil: they are plain.
	Credentials credentials.TransportCredentials
	// DialOptions are added to our own, such as resolvers.
	DialOptions []grpc.DialOption

	// Logger, nil to discard.
	Logger *slog.Logger
	// Metrics, nil for none.
	Metrics *metrics.Set
}

const (
	// minBackoff is the first pause after a failure.
	minBackoff = 50 * time.Millisecond
	// mostBatchUsers is the limit of GetUserNodes in the proto.
	mostBatchUsers = 10_000
)

func (c Config) withDefaults() Config {
	defaultTo(&c.MaxReplyBytes, 256<<20)
	defaultTo(&c.MaxMembers, 2_000_000)
	defaultTo(&c.BatchUsers, mostBatchUsers)
	defaultTo(&c.Parallel, 16)
	defaultTo(&c.ProbeAgainAfter, 10*time.Minute)
	defaultTo(&c.ContactInterval, 5*time.Second)
	defaultTo(&c.MaxBackoff, time.Second)
	if c.Credentials == nil {
		c.Credentials = insecure.NewCredentials()
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

func defaultTo[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if strings.Trim(c.Address, ", ") == "" {
		errs = append(errs, errors.New("Address is empty"))
	}
	for _, n := range []struct {
		name string
		v    int64
	}{
		{"MaxReplyBytes", int64(c.MaxReplyBytes)},
		{"MaxMembers", int64(c.MaxMembers)},
		{"BatchUsers", int64(c.BatchUsers)},
		{"Parallel", int64(c.Parallel)},
		{"ProbeAgainAfter", int64(c.ProbeAgainAfter)},
		{"ContactInterval", int64(c.ContactInterval)},
		{"MaxBackoff", int64(c.MaxBackoff)},
	} {
		if n.v < 0 {
			errs = append(errs, fmt.Errorf("%s is negative", n.name))
		}
	}
	if c.BatchUsers > mostBatchUsers {
		errs = append(errs, fmt.Errorf("BatchUsers is over %d", mostBatchUsers))
	}
	return errors.Join(errs...)
}

// dial makes the connection, which connects when Start says so.
func (c Config) dial(own ...grpc.DialOption) (*grpc.ClientConn, error) {
	target := c.Address
	opts := append(own,
		grpc.WithTransportCredentials(c.Credentials),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(c.MaxReplyBytes)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: minBackoff, Multiplier: 1.6, Jitter: 0.2, MaxDelay: c.MaxBackoff},
			// A peer that accepts and says nothing is given up after this.
			MinConnectTimeout: 3 * time.Second,
		}),
		// Without streams no pings: a foreign Controller with gRPC's default policy
		// would take them for an attack.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		grpc.WithIdleTimeout(0), // readiness depends on the connection
	)
	if strings.Contains(target, ",") {
		var state resolver.State
		for addr := range strings.SplitSeq(target, ",") {
			if addr = strings.TrimSpace(addr); addr != "" {
				// Without a name of its own each would be asked for a certificate of the name of the list.
				state.Addresses = append(state.Addresses, resolver.Address{Addr: addr, ServerName: addr})
			}
		}
		list := manual.NewBuilderWithScheme("list")
		list.InitialState(state)
		opts = append(opts, grpc.WithResolvers(list))
		target = "list:///controller"
	}
	return grpc.NewClient(target, append(opts, c.DialOptions...)...)
}
