package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/transport/compression"
)

// Config shapes a Set. The zero value works, but for Go where nodes without
// Deliver are to be served.
type Config struct {
	// Shards is the number of links to each node. 0 means 1.
	Shards int
	// ManagerID names this process to the nodes.
	ManagerID string
	// Go runs a task in the bounded pool of a shard and must not block. It carries
	// the unary calls. Nil: each task gets a goroutine of its own, of which there
	// are at most UnaryLanes for each link.
	Go func(shard int, task func()) error

	// DialTimeout bounds one attempt: connecting and hello together. 0 means 1 s.
	DialTimeout time.Duration
	// AckTimeout is how long a node may owe an ack. 0 means 1 s.
	AckTimeout time.Duration
	// Heartbeat is the pause between two heartbeats of a stream. 0 means 1 s.
	Heartbeat time.Duration
	// Silence is how long nothing may come from a node before its stream is closed:
	// three heartbeats. 0 means 3 s.
	Silence time.Duration
	// BackoffMin and BackoffMax bound the pause between two attempts, which doubles
	// with each failure; what an attempt without an answer has taken counts as part of
	// it. 0 means 50 ms and 750 ms: a node that can be reached again is then pushed to
	// in little more than a second, even if an attempt has just begun in vain, and one
	// that cannot costs no more than an attempt a second.
	BackoffMin, BackoffMax time.Duration
	// Dials and DialRate bound the attempts of all links together: those under way, and
	// those begun in a second. Links whose last attempt has failed come after the others
	// and get half of it at most. 0 means 256 and 1000.
	Dials, DialRate int
	// Quarantine is how long a link whose node has violated the protocol stays down. 0 means 60 s.
	Quarantine time.Duration

	// QueueBytes, QueueLen and QueueAge bound what waits in one link to be written.
	// 0 means 8 MiB, 8192 deliveries and 1 s.
	QueueBytes int
	QueueLen   int
	QueueAge   time.Duration
	// Window and WindowBytes bound what one stream has written and the node has not
	// acknowledged. 0 means 8192 deliveries and 8 MiB.
	Window      int
	WindowBytes int
	// FrameBytes is where the writer stops to gather more into a frame. 0 means
	// 256 KiB: large enough that the cost of a frame does not show, small enough
	// that a slow connection is not a second behind.
	FrameBytes int
	// FrameLen is the same as a number of deliveries. 0 means 1024.
	FrameLen int
	// MaxFrameBytes is what no frame exceeds. 0 means 16 MiB.
	MaxFrameBytes int
	// Compression names the codecs that nodes are offered for frames, in order of
	// preference: "s2", "zstd". Each node picks one of them or none. Empty, or "off":
	// frames go as they are.
	Compression []string
	// CompressionMinBytes is the size of a frame from which on it is compressed. 0
	// means 1 KiB: one JSON body of less than that holds too little that repeats.
	CompressionMinBytes int
	// AudienceMembers bounds the members that all audiences of one stream have
	// together, beside the node's own limit. 0 means 1,000,000; -1 means none.
	AudienceMembers int
	// NodeUsers is how many users a node may claim to have. What it claims is the only
	// bound of what it may say a broadcast has reached; more than this is a violation. 0 means
	// 10,000,000.
	NodeUsers int
	// UnaryLanes is the number of calls that one link has in flight to a node
	// without Deliver. 0 means 16.
	UnaryLanes int

	// Replayer sends nodes what is stored for their users. Nil: there is no store, and nodes are
	// told so.
	Replayer Replayer
	// RoomLogs answers nodes that follow and read the logs of rooms; nil: nobody is asked.
	RoomLogs RoomLogs

	// Credentials secure the connection to a node and refuse any other node: an error of theirs that has a method NodeID
	// says by it who is there instead. Nothing is sent before. Nil: connections are plain.
	Credentials func(nodeID string) credentials.TransportCredentials
	// Migrate speaks in plain text to nodes that answer Credentials with something that is not TLS.
	Migrate bool
	// Dialer connects to an address. Nil means TCP.
	Dialer func(ctx context.Context, addr string) (net.Conn, error)
	// DialOptions come after the package's own.
	DialOptions []grpc.DialOption

	// Logger gets what changes about a node. Nil discards.
	Logger *slog.Logger
	// Metrics gets the counters. Nil: nobody sees them.
	Metrics *metrics.Set
}

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its
// keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	orInt := func(v *int, def int) {
		if *v == 0 {
			*v = def
		}
	}
	orTime := func(v *time.Duration, def time.Duration) {
		if *v == 0 {
			*v = def
		}
	}
	orInt(&c.Shards, 1)
	orTime(&c.DialTimeout, time.Second)
	orTime(&c.AckTimeout, time.Second)
	orTime(&c.Heartbeat, time.Second)
	orTime(&c.Silence, 3*time.Second)
	orTime(&c.BackoffMin, 50*time.Millisecond)
	orTime(&c.BackoffMax, 750*time.Millisecond)
	orInt(&c.Dials, 256)
	orInt(&c.DialRate, 1000)
	orTime(&c.Quarantine, time.Minute)
	orInt(&c.QueueBytes, 8<<20)
	orInt(&c.QueueLen, 8192)
	orTime(&c.QueueAge, time.Second)
	orInt(&c.Window, 8192)
	orInt(&c.WindowBytes, 8<<20)
	orInt(&c.FrameBytes, 256<<10)
	orInt(&c.FrameLen, 1024)
	orInt(&c.MaxFrameBytes, 16<<20)
	orInt(&c.CompressionMinBytes, 1<<10)
	orInt(&c.AudienceMembers, 1_000_000)
	orInt(&c.NodeUsers, 10_000_000)
	orInt(&c.UnaryLanes, 16)
	c.AudienceMembers = max(c.AudienceMembers, 0)
	if c.Go == nil {
		c.Go = func(_ int, task func()) error { go task(); return nil }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

// Validate names every field that cannot work. It looks at a config whose zero
// fields have been filled in.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	between := func(name string, v, low, high int) {
		if v < low || v > high {
			errs = append(errs, fmt.Errorf("link: %s is %d, must be between %d and %d", name, v, low, high))
		}
	}
	positive := func(name string, v time.Duration) {
		if v < tick {
			errs = append(errs, fmt.Errorf("link: %s is %v, must be at least %v", name, v, tick))
		}
	}
	between("Shards", c.Shards, 1, 256)
	between("QueueBytes", c.QueueBytes, 1, math.MaxInt32)
	between("QueueLen", c.QueueLen, 1, 1<<20)
	between("Dials", c.Dials, 2, 1<<16)
	between("DialRate", c.DialRate, 2, 1<<20)
	between("Window", c.Window, 1, 1<<20)
	between("WindowBytes", c.WindowBytes, 1, math.MaxInt32)
	between("FrameBytes", c.FrameBytes, 1, c.MaxFrameBytes)
	between("FrameLen", c.FrameLen, 1, 1<<20)
	between("MaxFrameBytes", c.MaxFrameBytes, 1<<10, math.MaxInt32)
	between("CompressionMinBytes", c.CompressionMinBytes, 1, c.MaxFrameBytes)
	between("AudienceMembers", c.AudienceMembers, 0, math.MaxInt32)
	between("NodeUsers", c.NodeUsers, 1, math.MaxInt32)
	between("UnaryLanes", c.UnaryLanes, 1, 1024)
	positive("DialTimeout", c.DialTimeout)
	positive("AckTimeout", c.AckTimeout)
	positive("Heartbeat", c.Heartbeat)
	positive("Silence", c.Silence)
	positive("QueueAge", c.QueueAge)
	positive("Quarantine", c.Quarantine)
	positive("BackoffMin", c.BackoffMin)
	if _, err := compression.Parse(c.Compression); err != nil {
		errs = append(errs, fmt.Errorf("link: Compression: %w", err))
	}
	if c.Silence <= c.Heartbeat {
		errs = append(errs, fmt.Errorf("link: Silence (%v) must be longer than Heartbeat (%v)", c.Silence, c.Heartbeat))
	}
	if c.BackoffMax < c.BackoffMin {
		errs = append(errs, fmt.Errorf("link: BackoffMax (%v) must not be below BackoffMin (%v)", c.BackoffMax, c.BackoffMin))
	}
	return errors.Join(errs...)
}
