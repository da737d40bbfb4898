package link

import (
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/compression"
)

// compressor compresses the frames of all streams whose nodes want it. It has no state
// of its own between two frames, so streams share it.
type compressor struct {
	// Static after newCompressor.
	codecs  []pubsub.Codec // offered to nodes, the best first; none: all of this is off
	encoder *compression.Encoder
	min     int // smaller frames are left alone
	buffers *bufferPool
	meters  *meters
}

func newCompressor(cfg *Config, buffers *bufferPool, m *meters) (*compressor, error) {
	codecs, err := compression.Parse(cfg.Compression)
	if err != nil {
		return nil, err //nolint:wrapcheck // Validate has said it before.
	}
	encoder, err := compression.NewEncoder()
	if err != nil {
		return nil, err //nolint:wrapcheck // It says what it is about.
	}
	return &compressor{codecs: codecs, encoder: encoder, min: cfg.CompressionMinBytes, buffers: buffers, meters: m}, nil
}

// frame returns what is sent for an encoded frame: the same or, where the stream has
// a codec and it pays, a frame that holds it compressed. It owns buf from the call on,
// and the caller owns what it returns.
func (c *compressor) frame(buf *[]byte, codec pubsub.Codec) *[]byte {
	if codec == pubsub.Codec_NONE || len(*buf) < c.min {
		return buf
	}
	out := c.buffers.take()
	// The length stands in front of the bytes and is known behind them. Room is left
	// for the digits of the plain length, which are seldom too many and never too few.
	b := wire.AppendLen(*out, reqCompressed, len(*buf))
	start := len(b)
	b = c.encoder.Append(b, *buf, codec)
	n := len(b) - start
	if n > len(*buf)-len(*buf)/8 { // the node's work costs more than the bytes that are saved
		*out = b
		c.meters.uncompressible.Inc()
		c.buffers.Put(out)
		return buf
	}
	if spare := protowire.SizeVarint(uint64(len(*buf))) - protowire.SizeVarint(uint64(n)); spare > 0 {
		copy(b[start-spare:], b[start:])
		b, start = b[:len(b)-spare], start-spare
	}
	protowire.AppendVarint(b[:start-protowire.SizeVarint(uint64(n))], uint64(n)) // over the plain length
	*out = wire.AppendUint(b, reqRawBytes, uint64(len(*buf)))
	c.meters.compressed.Inc()
	c.meters.compressedIn.Add(len(*buf))
	c.meters.compressedOut.Add(len(*out))
	c.buffers.Put(buf)
	return out
}
