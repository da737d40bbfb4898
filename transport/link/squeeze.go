package link

import (
	"google.golang.org/protobuf/encoding/protowire"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/compression"
)

// squeeze compresses the frames of all streams whose nodes want it. It has no state
// of its own between two frames, so streams share it.
type squeeze struct {
	// Static after newSqueeze.
	codecs  []pubsub.Codec // offered to nodes, the best first; none: all of this is off
	encoder *compression.Encoder
	min     int // smaller frames are left alone
	buffers *bufferPool
	meters  *meters
}

func newSqueeze(cfg *Config, buffers *bufferPool, m *meters) (*squeeze, error) {
	codecs, err := compression.Parse(cfg.Compression)
	if err != nil {
		return nil, err //nolint:wrapcheck // Validate has said it before.
	}
	encoder, err := compression.NewEncoder()
	if err != nil {
		return nil, err //nolint:wrapcheck // It says what it is about.
	}
	return &squeeze{codecs: codecs, encoder: encoder, min: cfg.CompressionMinBytes, buffers: buffers, meters: m}, nil
}

// frame returns what is sent for an encoded frame: the same or, where the stream has
// a codec and it pays, a frame that holds it compressed. It owns buf from the call on,
// and the caller owns what it returns.
func (q *squeeze) frame(buf *[]byte, codec pubsub.Codec) *[]byte {
	if codec == pubsub.Codec_NONE || len(*buf) < q.min {
		return buf
	}
	out := q.buffers.take()
	b, ok := q.tryAppend(*out, *buf, codec)
	*out = b
	if !ok {
		q.meters.uncompressible.Inc()
		q.buffers.Put(out)
		return buf
	}
	q.meters.compressed.Inc()
	q.meters.compressedIn.Add(len(*buf))
	q.meters.compressedOut.Add(len(*out))
	q.buffers.Put(buf)
	return out
}

// worth is the most that n bytes may be compressed to: where less than an eighth is
// saved, the node's work costs more than the bytes.
func worth(n int) int { return n - n/8 }

// tryAppend encodes a frame that holds another one compressed. False: it is not worth
// it, and the bytes are of no use.
func (q *squeeze) tryAppend(b, frame []byte, codec pubsub.Codec) ([]byte, bool) {
	// The length stands in front of the bytes and is known behind them. Room is left
	// for the digits of the plain length, which are seldom too many and never too few.
	b = appendLen(b, reqCompressed, len(frame))
	start := len(b)
	b = q.encoder.Append(b, frame, codec)
	n := len(b) - start
	if n > worth(len(frame)) {
		return b, false
	}
	if spare := protowire.SizeVarint(uint64(len(frame))) - protowire.SizeVarint(uint64(n)); spare > 0 {
		copy(b[start-spare:], b[start:])
		b, start = b[:len(b)-spare], start-spare
	}
	protowire.AppendVarint(b[:start-protowire.SizeVarint(uint64(n))], uint64(n)) // over the plain length
	return appendUint(b, reqRawBytes, uint64(len(frame))), true
}
