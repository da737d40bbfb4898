package membership

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/push-manager/push-manager/internal/ids"
)

// Config says whose memberships are reported, and to whom. NodeID, BootID and Controller
// are required, everything else has a default.
type Config struct {
	// NodeID is the node's id in etcd: 1 to MaxNodeIDBytes.
	NodeID string
	// BootID tells this process from another one of the same node: that of the
	// node.Server.
	BootID string
	// Registered tells whether the node stands in etcd: Registered of the node.Server. When
	// it does again after it did not, the Controller is told everything again. nil: the
	// node does not register.
	Registered func() bool

	// Controller is any gRPC target.
	Controller string
	// Credentials secure the connection: those of NewCredentials, or your own. Default: it
	// is plain.
	Credentials credentials.TransportCredentials
	// DialOptions are added to those of the connection.
	DialOptions []grpc.DialOption
	// Timeout bounds one call to the Controller. Default 5 s: the Controller may hold its
	// answer for 4 s while a Push-Manager does not acknowledge.
	Timeout time.Duration
	// Workers bounds the calls to the Controller at once. Default 32.
	Workers int
	// SyncInterval is how often memberships are compared with a Controller that has
	// SyncNode; by that it also knows that the node lives. Default 2 s.
	SyncInterval time.Duration
	// RejoinPerSecond paces the memberships that are reported again, one by one, to a
	// Controller without SyncNode that was away. Default 5,000.
	RejoinPerSecond int

	// MaxRooms bounds the rooms of one connection. Default 100.
	MaxRooms int

	// Logger gets state changes. Default: nothing is logged.
	Logger *slog.Logger
	// Metrics gets the counters. Default: a set of its own, not shown.
	Metrics *metrics.Set
}

// Reserved begins the names of rooms that clients must not join: each node keeps all its
// users in one of them, so that the Controller also finds those without a room.
const Reserved = ids.ReservedRooms

// MaxNodeIDBytes bounds Config.NodeID, which has to fit into the id of a room.
const MaxNodeIDBytes = 256 - len(Reserved)

// WithDefaults puts the defaults into the zero fields.
func (c Config) WithDefaults() Config {
	defaultTo(&c.Timeout, 5*time.Second)
	defaultTo(&c.Workers, 32)
	defaultTo(&c.SyncInterval, 2*time.Second)
	defaultTo(&c.RejoinPerSecond, 5000)
	defaultTo(&c.MaxRooms, 100)
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

func defaultTo[T int | time.Duration](v *T, value T) {
	if *v == 0 {
		*v = value
	}
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.NodeID == "" || len(c.NodeID) > MaxNodeIDBytes {
		errs = append(errs, fmt.Errorf("NodeID: 1 to %d bytes, got %d", MaxNodeIDBytes, len(c.NodeID)))
	}
	if c.BootID == "" {
		errs = append(errs, errors.New("BootID: required"))
	}
	if c.Controller == "" {
		errs = append(errs, errors.New("Controller: required"))
	}
	for field, n := range map[string]int64{
		"Timeout": int64(c.Timeout), "Workers": int64(c.Workers), "SyncInterval": int64(c.SyncInterval),
		"RejoinPerSecond": int64(c.RejoinPerSecond), "MaxRooms": int64(c.MaxRooms),
	} {
		if n < 0 {
			errs = append(errs, fmt.Errorf("%s: negative: %d", field, n))
		}
	}
	return errors.Join(errs...)
}
