package node

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/transport/compression"
)

// Config says what a node is. NodeID and Sessions are required, everything else
// has a default.
type Config struct {
	// NodeID is the id under which the node is registered: 1 to 256 bytes.
	NodeID string
	// Sessions is the gateway: who is connected here, and how to reach them.
	Sessions Sessions

	// UnaryOnly answers Deliver with UNIMPLEMENTED, as nodes do that have the
	// three unary methods only. Push-Manager then uses those.
	UnaryOnly bool
	// MaxAudienceMembers bounds the members of all audiences of one stream:
	// about 100 bytes each. Default 1,048,576. Negative: the node keeps no
	// audiences and gets user ids with every delivery.
	MaxAudienceMembers int
	// MaxUnacked bounds the deliveries of one stream that wait for their ack to
	// be written. A manager that goes beyond it does not read: its stream is
	// broken. Default 65,536.
	MaxUnacked int
	// Compression names the codecs in which frames may come, "s2" and "zstd";
	// the manager's preference decides. Default: both. "off" alone refuses
	// all.
	Compression []string
	// MaxStreams bounds the Deliver streams of all managers together, and those that
	// have said no hello yet. Default 4,096.
	MaxStreams int
	// TakeoverTimeout bounds how long a new stream waits for the delivery that the
	// stream before it, of the same process and shard of a manager, has in its hands.
	// Then it is refused and comes again, so keep it below the manager's dial timeout
	// (1 s). Default 500 ms.
	TakeoverTimeout time.Duration
	// MaxGates bounds the connections that take part in replay, about 200 bytes each; those beyond it
	// get direct messages only. It bounds those that keep a position in the logs of rooms, too, about 500 bytes
	// each, and a quarter of the rooms that these are in, about 50 bytes for each of their rooms. Default 1,048,576.
	MaxGates int
	// FlushTimeout bounds how long a stream that ends waits for its last acks
	// to be written. Default 1 s.
	FlushTimeout time.Duration

	// Trace begins the span of a delivery whose push is sampled, from its W3C trace context; the function ends it,
	// once the gateway has the message. It is called from the goroutine of the stream. Default: nothing is traced.
	Trace func(traceparent string) func()

	// Logger gets state changes, never a payload. Default: nothing is logged.
	Logger *slog.Logger
	// Metrics gets the node's counters. Default: a set of its own, not shown.
	Metrics *metrics.Set
}

// The bounds of what one frame or queue may hold.
const (
	maxFrameBytes    = 16 << 10 << 10 // what ServerOptions lets in
	windowBytes      = 1 << 20        // of flow control: what waits unread, per stream
	ackFrameBytes    = 48 << 10       // managers take 64 KiB without a thought
	ackFrameCounts   = 8 << 10        // at most 5 bytes each: below ackFrameBytes
	maxMissBytes     = 960 << 10      // of one Miss, which cannot be split: a manager takes frames of 1 MiB
	pendingMissBytes = 1 << 20        // beyond it the reader waits for the sender
	maxNodeIDBytes   = 256
	maxDisconnected  = 1024     // answers that wait to be written: a manager awaits 256 of a stream
	maxScratch       = 16 << 10 // ids; a larger scratch list is not kept
)

func (c Config) withDefaults() Config {
	if c.MaxAudienceMembers == 0 {
		c.MaxAudienceMembers = 1 << 20
	}
	if c.MaxUnacked == 0 {
		c.MaxUnacked = 64 << 10
	}
	if len(c.Compression) == 0 {
		c.Compression = compression.Names()
	}
	if c.MaxStreams == 0 {
		c.MaxStreams = 4 << 10
	}
	if c.TakeoverTimeout == 0 {
		c.TakeoverTimeout = 500 * time.Millisecond
	}
	if c.MaxGates == 0 {
		c.MaxGates = 1 << 20
	}
	if c.FlushTimeout == 0 {
		c.FlushTimeout = time.Second
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
	if c.NodeID == "" || len(c.NodeID) > maxNodeIDBytes {
		errs = append(errs, fmt.Errorf("NodeID: 1 to %d bytes, got %d", maxNodeIDBytes, len(c.NodeID)))
	}
	if c.Sessions == nil {
		errs = append(errs, errors.New("Sessions: required"))
	}
	if c.MaxUnacked < 0 {
		errs = append(errs, fmt.Errorf("MaxUnacked: negative: %d", c.MaxUnacked))
	}
	if _, err := compression.Parse(c.Compression); err != nil {
		errs = append(errs, fmt.Errorf("Compression: %w", err))
	}
	if c.MaxStreams < 0 {
		errs = append(errs, fmt.Errorf("MaxStreams: negative: %d", c.MaxStreams))
	}
	if c.TakeoverTimeout < 0 {
		errs = append(errs, fmt.Errorf("TakeoverTimeout: negative: %v", c.TakeoverTimeout))
	}
	if c.MaxGates < 0 {
		errs = append(errs, fmt.Errorf("MaxGates: negative: %d", c.MaxGates))
	}
	if c.FlushTimeout < 0 {
		errs = append(errs, fmt.Errorf("FlushTimeout: negative: %v", c.FlushTimeout))
	}
	return errors.Join(errs...)
}
