package ingress

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/quota"
	"github.com/push-manager/push-manager/transport/jobs"
	"github.com/push-manager/push-manager/transport/presence"
)

// TraceFunc decides whether the call is sampled. It returns nil, nil when it is
// not; otherwise the trace that the engine reports to and the function that ends
// the span of the call. ctx is the call's, of a PushStream the stream's.
type TraceFunc func(ctx context.Context, api string) (engine.Trace, func(engine.Result, error))

// Config of a Server. Zero fields mean the defaults; Engine is required. The defaults of
// BodyBytes, OpenCalls, Streams and Connections are what fits into the memory that the process may have
// (GOMEMLIMIT), see fit.
type Config struct {
	Engine  *engine.Engine
	Metrics *metrics.Set // nil: a set of its own
	Logger  *slog.Logger // nil: nothing is logged
	Trace   TraceFunc    // nil: nothing is traced

	// MaxRecvBytes bounds one request, and one message of a PushStream.
	MaxRecvBytes int
	// Gzip takes requests that are compressed with gzip. MaxRecvBytes bounds what they are on the wire, and what they become. Replies
	// are not compressed.
	Gzip bool
	// MaxHeaderBytes bounds the headers of one call.
	MaxHeaderBytes int
	// MaxStreams bounds the calls under way on one connection.
	MaxStreams int
	// Calls bounds the unary calls that are worked on at a time, for each core: what has
	// come in during the last 25 to 50 ms and is not answered. While there is no room,
	// connections are not read, the lowest priority first. 384 keep a core busy with all
	// nodes nearby; so many for each 25 ms are what nodes far away can get.
	Calls int
	// ConnectionTimeout bounds the handshake of a connection, and for how long headers are
	// awaited that have begun.
	ConnectionTimeout time.Duration
	// Handshakes bounds the connections of one address, or of one /64 of IPv6, that have not
	// made theirs. One more costs the oldest its place.
	Handshakes int
	// KeepaliveTime of silence makes the server ask whether the client is there,
	// KeepaliveTimeout is how long it waits for the answer.
	KeepaliveTime    time.Duration
	KeepaliveTimeout time.Duration
	// KeepaliveMinTime is how often clients may ask the same.
	KeepaliveMinTime time.Duration
	// StreamWorkers is the number of goroutines kept for calls, so that not every
	// call has to grow a stack. More calls than that get goroutines of their own.
	StreamWorkers int
	// StreamWindow and ConnWindow are the fixed HTTP/2 windows. StreamWindow is what a stream
	// that is not read may hold; a larger message has its window when it is read.
	StreamWindow int
	ConnWindow   int
	// StreamInflight and StreamInflightBytes bound the pushes of one PushStream
	// that are taken and not yet answered. At the bound the stream is not read; the
	// message that reaches it may exceed it, by a batch at most.
	StreamInflight      int
	StreamInflightBytes int
	// BodyBytes is the memory for requests that are being read, and pushes until they are
	// answered. Whoever finds none waits, or is refused.
	BodyBytes int
	// BodyTimeout bounds how long a request of more than 4 KiB, or a large message of a
	// PushStream, may take to come in once it has its part of BodyBytes. While others wait
	// for that, it is a second at the most.
	BodyTimeout time.Duration
	// OpenCalls bounds the unary calls that are open on all connections, Streams the
	// PushStreams (and other streams), and StreamsPerConnection those of one connection.
	// It must be below MaxStreams, or unary calls beside them would never begin.
	OpenCalls            int
	Streams              int
	StreamsPerConnection int
	// Connections bounds those that have said hello, ConnectionsPerAddress those of one
	// address, or of one /64 of IPv6. Below 0: no bound.
	Connections           int
	ConnectionsPerAddress int
	// ConnectionAge is when a connection is told to go, give or take a tenth, which is gRPC's
	// own and cannot be set. 0: never.
	ConnectionAge time.Duration
	// Credentials secure the connections. nil: nothing does.
	Credentials credentials.TransportCredentials
	// DrainNotice is how long Drain still takes pushes after health went NOT_SERVING: the
	// time in which balancers notice. Then connections are told to go, in good order. 0:
	// new pushes are refused at once.
	DrainNotice time.Duration
	// PriorityMax is the highest priority that a caller may claim: "low", "normal", "high"
	// or "critical", which is the default. A claim above it counts as a claim to it.
	PriorityMax string
	// Rate is what one caller may spend in a second, with RateBurst saved up at most: 1 for a push,
	// 1 for each node that it is sent to, and 1 for each of several rooms that is looked up for it. 0, the default, limits nobody; RateBurst
	// of 0 is as much as Rate. So many RateCallers are told apart at a time.
	Rate        int
	RateBurst   int
	RateCallers int
	// Audit gets who was refused for who it is, broadcasts, and a sample of other pushes. nil: nobody does.
	Audit *audit.Log
	// Quotas are the pushes a day of callers and tenants that Auth knows. nil: there are none.
	Quotas *quota.Set
	// Auth tells who calls, and every call of every service must be from somebody. nil: nobody is asked.
	Auth *auth.Authenticator
	// Caller names who calls, for Rate, where nobody is asked. nil: by the address of the connection's other end,
	// without the port.
	Caller func(ctx context.Context) string
	// Lasting serves what is stored for users. nil: there is no store.
	Lasting Lasting
	// Disconnector closes connections on nodes. nil: nobody does.
	Disconnector Disconnector
	// RefuseMax is the longest time for which somebody may be kept away. Default 24 h.
	RefuseMax time.Duration
	// Receipts keeps the receipts of pushes. nil: this instance's own are kept in its memory.
	Receipts ReceiptLog
	// OnReceipt is told of each receipt, from any goroutine, and must not block. nil: nobody is.
	OnReceipt func(sender string, receipt []byte)
	// Jobs are the broadcast jobs. nil: there are none.
	Jobs *jobs.Service
	// Presence tells who is connected where. nil: nobody is told.
	Presence *presence.Service
	// DisableReflection switches the reflection service off.
	DisableReflection bool
	// Options are added to those of the server. They must not set credentials.
	Options []grpc.ServerOption

	priorityMax engine.Priority
}

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its
// keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&c.MaxRecvBytes, 1<<20)              // four times the largest payload
	setDefault(&c.MaxHeaderBytes, 16<<10)           // gRPC's own default is 16 MiB
	setDefault(&c.MaxStreams, 256)                  // per connection
	setDefault(&c.Calls, 384)                       // with 512 a call costs a twelfth more in an overload, with 2,048 half as much again
	setDefault(&c.ConnectionTimeout, 5*time.Second) // gRPC's own default is two minutes
	setDefault(&c.BodyTimeout, 5*time.Second)       // 1 MiB at 1.7 Mbit/s
	setDefault(&c.Handshakes, 1024)                 // of 41 KB; a balancer is one address, and its clients may all come at once
	setDefault(&c.KeepaliveTime, 30*time.Second)    // a dead client costs only its buffers
	setDefault(&c.KeepaliveTimeout, 10*time.Second)
	setDefault(&c.KeepaliveMinTime, 5*time.Second) // clients with a 10 s keepalive stay
	setDefault(&c.StreamWorkers, 512)              // as many calls as usually wait for an ack: a new goroutine has its stack to grow
	setDefault(&c.ConnWindow, 1<<20)               // fixed windows halve the writes of small traffic
	setDefault(&c.RefuseMax, 24*time.Hour)
	setDefault(&c.StreamInflight, 1024)
	setDefault(&c.StreamInflightBytes, 16*(1<<20)) // 16 of the largest requests
	setDefault(&c.StreamsPerConnection, max(c.MaxStreams/2, 1))
	c.fit()
	if c.PriorityMax == "" {
		c.PriorityMax = engine.Critical.String()
	}
	c.priorityMax, _ = engine.ParsePriority(c.PriorityMax)
	setDefault(&c.RateBurst, c.Rate)
	setDefault(&c.RateCallers, 10_000) // of 150 bytes
	if c.Caller == nil {
		c.Caller = peerOf
	}
	if c.Credentials == nil {
		c.Credentials = insecure.NewCredentials()
	}
	return c
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Validate reports everything that is wrong with the configuration.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	if c.Engine == nil {
		errs = append(errs, errors.New("ingress: Engine is missing"))
	}
	within := func(name string, v, low, high int) {
		if v < low || v > high {
			errs = append(errs, fmt.Errorf("ingress: %s is %d, want %d to %d", name, v, low, high))
		}
	}
	within("MaxRecvBytes", c.MaxRecvBytes, 1<<10, 64<<20)
	within("MaxHeaderBytes", c.MaxHeaderBytes, 1<<10, 16<<20)
	within("MaxStreams", c.MaxStreams, 1, 1<<20)
	within("Calls", c.Calls, 1, 1<<20)
	within("Handshakes", c.Handshakes, 1, 1<<20)
	within("StreamWorkers", c.StreamWorkers, 1, 1<<16)
	within("StreamWindow", c.StreamWindow, 64<<10, 1<<30)
	within("ConnWindow", c.ConnWindow, 64<<10, 1<<30)
	within("StreamInflight", c.StreamInflight, 1, 1<<20)
	within("StreamInflightBytes", c.StreamInflightBytes, 1<<10, 1<<30)
	within("BodyBytes", c.BodyBytes, 1<<10, math.MaxInt)
	within("OpenCalls", c.OpenCalls, 1, 1<<24)
	within("Streams", c.Streams, 1, 1<<24)
	within("StreamsPerConnection", c.StreamsPerConnection, 1, max(c.MaxStreams-1, 1))
	within("Connections", c.Connections, -1, 1<<24)
	within("ConnectionsPerAddress", c.ConnectionsPerAddress, -1, 1<<24)
	within("Rate", c.Rate, 0, 1<<30)
	within("RateBurst", c.RateBurst, min(c.Rate, 1), 1<<30)
	within("RateCallers", c.RateCallers, 1, 1<<24)
	if _, ok := engine.ParsePriority(c.PriorityMax); !ok {
		errs = append(errs, fmt.Errorf("ingress: PriorityMax %q is no priority", c.PriorityMax))
	}
	positive := func(name string, d time.Duration) {
		if d < 0 {
			errs = append(errs, fmt.Errorf("ingress: %s is %v, want more than 0", name, d))
		}
	}
	positive("ConnectionTimeout", c.ConnectionTimeout)
	positive("BodyTimeout", c.BodyTimeout)
	positive("KeepaliveTime", c.KeepaliveTime)
	positive("KeepaliveTimeout", c.KeepaliveTimeout)
	positive("KeepaliveMinTime", c.KeepaliveMinTime)
	positive("DrainNotice", c.DrainNotice)
	if c.ConnectionAge != 0 && c.ConnectionAge < time.Second {
		errs = append(errs, fmt.Errorf("ingress: ConnectionAge is %v, want 0 or at least 1s", c.ConnectionAge))
	}
	return errors.Join(errs...)
}
