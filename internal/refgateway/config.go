package refgateway

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/hooks"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/transport/compression"
	"github.com/push-manager/push-manager/transport/node/membership"
)

// Config says what a gateway is. NodeID, GRPCAddress, HTTPAddress and
// Members.Controller are required, everything else has a default.
type Config struct {
	// Trace begins the span of a delivery of a push that is sampled. nil: nothing is traced.
	Trace func(traceparent string) func()

	// NodeID is the id under which the gateway registers: 1 to MaxNodeIDBytes.
	NodeID string

	// GRPCAddress is where it listens for managers, host:port. Port 0 takes a
	// free one.
	GRPCAddress string
	// Credentials secure that port, and refuse who is no manager. Nil: nothing does.
	Credentials credentials.TransportCredentials
	// HTTPAddress is where it listens for clients.
	HTTPAddress string
	// ClientTLS secures that port: https and wss. HTTP/1.1 is the protocol to offer. Nil: it is plain.
	ClientTLS *tls.Config
	// MetricsAddress is where /metrics is served. Empty: nowhere.
	MetricsAddress string
	// AdvertiseAddress is what managers dial. Default: where it listens for them.
	AdvertiseAddress string
	// Etcd is where the gateway registers. Nil: it does not register.
	Etcd *clientv3.Client
	// PushManagerAddress is shown on the page in the commands to copy. Default
	// localhost:50053.
	PushManagerAddress string
	// PushManagerTLS tells that these commands need an authority and a certificate.
	PushManagerTLS bool
	// Pushctl is how pushctl is called in those commands on this machine, where the page
	// says so to browsers that run there. Default pushctl.
	Pushctl string

	// Tokens verify the tokens that clients must have then. Nil: they need none, and are who
	// they say. It is closed after the gateway.
	Tokens *jwt.Verifier
	// NoTenants says that there are none: a token that names one is refused, and ids may begin like those
	// of one, such as shop/alice. Otherwise a client without a tenant may have and name no such id,
	// which would be that tenant's.
	NoTenants bool
	// TokenInQuery also takes them as token in the address.
	TokenInQuery bool
	// TokenTimeout is how long a client may take to show its token. Default 5 s.
	TokenTimeout time.Duration
	// TokenGrace is how long a connection outlives its token. Default 25 s.
	TokenGrace time.Duration
	// Unverified bounds the connections of one address, or of one /64 of IPv6, whose token is
	// not verified; a quarter of MaxConnections bounds all of them. One more costs the oldest
	// its place. Default 1024.
	Unverified int

	// AllowedOrigins are the Origin headers, such as "https://app.example.com",
	// that browsers may connect with; "*" allows all but null. Loopback origins always may,
	// and pages from the host that they connect to: under its IP address, and under
	// a name unless the connection comes over loopback, as behind a proxy on the
	// same machine.
	AllowedOrigins []string
	// MaxConnections bounds the clients connected at once. Default 100,000.
	MaxConnections int
	// MaxMessageBytes bounds one message of a client. Default 16 KiB.
	MaxMessageBytes int
	// MessageRate bounds the frames a second that are read from one client, which may
	// send Members.MaxRooms and two seconds' worth more at once. What is beyond waits in
	// its socket. Default 50.
	MessageRate int
	// QueueFrames and QueueBytes bound what waits for one client: one that is
	// behind by more is cut off. Default 4,096 and 1 MiB: a burst of some thousand
	// pushes to one client takes less time to arrive here than a writer takes to
	// wake up. A single frame may be larger.
	QueueFrames, QueueBytes int
	// QueueTotalBytes bounds what waits for all clients together, where what waits for
	// many counts once. From half of it on a client that has more than an equal share
	// of that half waiting is cut off. Default 256 MiB.
	QueueTotalBytes int
	// SocketBuffer bounds what the kernel keeps for one client on top of that.
	// Default: what the kernel chooses.
	SocketBuffer int
	// WriteTimeout bounds one write to a client. Default 10 s.
	WriteTimeout time.Duration
	// CloseTimeout bounds the end of a connection: the write of a close frame that
	// must be soon, and then the time that the client has to answer it. Default 2 s.
	CloseTimeout time.Duration
	// KickTimeout is how long a client that a service disconnects may take for what waits for it, and then for the close frame.
	// Default 500 ms each.
	KickTimeout time.Duration
	// PingInterval is how long a client may be silent before it is pinged,
	// IdleTimeout how long before it is cut off. Default 25 s and 60 s.
	PingInterval, IdleTimeout time.Duration

	// Compression names the codecs in which frames of managers may come, see
	// [node.Config].
	Compression []string

	// Deflate compresses messages of DeflateMinBytes and more to clients that offer permessage-deflate. Without it clients are served as
	// if they had not.
	Deflate bool
	// DeflateMinBytes is how long the part of a push must be that all its recipients share. Default 256.
	DeflateMinBytes int

	// Members says how memberships are reported. What the gateway knows itself (NodeID,
	// BootID, Registered, Logger, Metrics) is filled in.
	Members membership.Config
	// LeaveTimeout bounds the reporting of leaves when the gateway goes. Default
	// 3 s.
	LeaveTimeout time.Duration

	// Hooks get who connects, disconnects, joins and leaves. The caller closes them after the gateway. Nil: nobody is told.
	Hooks *hooks.Hooks

	// Logger gets state changes, never a payload. Default: nothing is logged.
	Logger *slog.Logger
	// Metrics gets the counters. Default: a set of its own.
	Metrics *metrics.Set
}

// MaxNodeIDBytes bounds Config.NodeID, which has to fit into the id of a room.
const MaxNodeIDBytes = membership.MaxNodeIDBytes

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its
// keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	defaultTo(&c.PushManagerAddress, "localhost:50053")
	defaultTo(&c.Pushctl, "pushctl")
	defaultTo(&c.MaxConnections, 100_000)
	c.Members = c.Members.WithDefaults()
	defaultTo(&c.MaxMessageBytes, 16<<10)
	defaultTo(&c.QueueFrames, 4096)
	defaultTo(&c.QueueBytes, 1<<20)
	defaultTo(&c.QueueTotalBytes, 256<<20)
	defaultTo(&c.MessageRate, 50)
	defaultTo(&c.TokenTimeout, 5*time.Second)
	defaultTo(&c.TokenGrace, 25*time.Second)
	defaultTo(&c.Unverified, 1024) // as api.handshakes: a balancer is one address
	defaultTo(&c.DeflateMinBytes, 256)
	defaultTo(&c.WriteTimeout, 10*time.Second)
	defaultTo(&c.CloseTimeout, 2*time.Second)
	defaultTo(&c.KickTimeout, 500*time.Millisecond)
	defaultTo(&c.PingInterval, 25*time.Second)
	defaultTo(&c.IdleTimeout, 60*time.Second)
	defaultTo(&c.LeaveTimeout, 3*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

func defaultTo[T comparable](v *T, value T) {
	var zero T
	if *v == zero {
		*v = value
	}
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	if err := checkID("NodeID", c.NodeID); err != nil {
		errs = append(errs, err)
	} else if len(c.NodeID) > MaxNodeIDBytes {
		errs = append(errs, fmt.Errorf("NodeID: more than %d bytes", MaxNodeIDBytes))
	}
	for _, a := range []struct {
		field, addr string
		required    bool
	}{
		{"GRPCAddress", c.GRPCAddress, true},
		{"HTTPAddress", c.HTTPAddress, true},
		{"MetricsAddress", c.MetricsAddress, false},
		{"AdvertiseAddress", c.AdvertiseAddress, false},
	} {
		if a.addr == "" && !a.required {
			continue
		}
		if _, _, err := net.SplitHostPort(a.addr); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", a.field, err))
		}
	}
	members := c.Members
	members.NodeID, members.BootID = "x", "x" // NodeID is checked above
	errs = append(errs, members.Validate())
	for field, n := range map[string]int{
		"MaxConnections": c.MaxConnections, "MaxMessageBytes": c.MaxMessageBytes,
		"QueueFrames": c.QueueFrames, "QueueBytes": c.QueueBytes, "QueueTotalBytes": c.QueueTotalBytes, "MessageRate": c.MessageRate,
		"Unverified": c.Unverified, "DeflateMinBytes": c.DeflateMinBytes,
	} {
		if n < 1 {
			errs = append(errs, fmt.Errorf("%s: %d is below 1", field, n))
		}
	}
	for field, d := range map[string]time.Duration{
		"WriteTimeout": c.WriteTimeout, "CloseTimeout": c.CloseTimeout, "PingInterval": c.PingInterval, "LeaveTimeout": c.LeaveTimeout,
		"TokenTimeout": c.TokenTimeout, "TokenGrace": c.TokenGrace, "KickTimeout": c.KickTimeout,
	} {
		if d <= 0 {
			errs = append(errs, fmt.Errorf("%s: %v is not positive", field, d))
		}
	}
	if _, err := compression.Parse(c.Compression); err != nil {
		errs = append(errs, fmt.Errorf("Compression: %w", err))
	}
	if c.SocketBuffer < 0 {
		errs = append(errs, fmt.Errorf("SocketBuffer: %d is negative", c.SocketBuffer))
	}
	if c.IdleTimeout <= c.PingInterval {
		errs = append(errs, fmt.Errorf("IdleTimeout: %v is not above PingInterval %v", c.IdleTimeout, c.PingInterval))
	}
	return errors.Join(errs...)
}

// checkID applies the contract's rule for ids.
func checkID(field, id string) error {
	if err := ids.Check(id, ids.MaxBytes); err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	return nil
}
