package compression

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Off is the name of no compression, in place of a list of codecs.
const Off = "off"

// Names lists all codecs, the cheaper one first.
func Names() []string { return []string{"s2", "zstd"} }

// Parse reads names of codecs, in order of preference. None, and Off alone, are no
// codecs.
func Parse(names []string) ([]pubsub.Codec, error) {
	if len(names) == 1 && names[0] == Off {
		return nil, nil
	}
	codecs := make([]pubsub.Codec, 0, len(names))
	for _, name := range names {
		var c pubsub.Codec
		switch name {
		case "s2":
			c = pubsub.Codec_S2
		case "zstd":
			c = pubsub.Codec_ZSTD
		default:
			return nil, fmt.Errorf("%q is none of %s, %s", name, Off, strings.Join(Names(), ", "))
		}
		if slices.Contains(codecs, c) {
			return nil, fmt.Errorf("%q stands there twice", name)
		}
		codecs = append(codecs, c)
	}
	return codecs, nil
}

// window is how far back zstd looks for what it has seen: as far as a frame of the
// usual largest size reaches. It decides what an encoder weighs, 1.1 MiB with this
// one and 5 MiB with zstd's own.
const window = 256 << 10

// Encoder compresses frames.
type Encoder struct{ zstd *zstd.Encoder }

// NewEncoder makes an Encoder. It has no end: it holds no goroutine, and no memory
// before its first call.
func NewEncoder() (*Encoder, error) {
	z, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.SpeedFastest), // the next level saves 5 % more bytes for 40 % more CPU
		zstd.WithWindowSize(window),
		zstd.WithLowerEncoderMem(true),
		zstd.WithEncoderCRC(false), // plain frames have none either: the connection has
	)
	if err != nil {
		return nil, fmt.Errorf("zstd encoder: %w", err)
	}
	return &Encoder{z}, nil
}

// Append appends the compressed frame to dst. What comes out may be longer than what
// goes in. It does not keep frame, which must not overlap dst.
func (e *Encoder) Append(dst, frame []byte, codec pubsub.Codec) []byte {
	switch codec {
	case pubsub.Codec_S2:
		start := len(dst)
		dst = slices.Grow(dst, s2.MaxEncodedLen(len(frame)))
		out := s2.Encode(dst[start:cap(dst)], frame) // in place: there is room
		return dst[:start+len(out)]
	case pubsub.Codec_ZSTD:
		return e.zstd.EncodeAll(frame, dst)
	default:
		panic("compression: codec " + codec.String()) // nobody has agreed on it
	}
}

var (
	// ErrSize is wrapped by errors about a length that is not allowed or not true.
	ErrSize = errors.New("compression: length")
	// ErrCodec is returned for a codec that is not known.
	ErrCodec = errors.New("compression: unknown codec")
)

// Decoder brings frames back.
type Decoder struct {
	max  int
	zstd *zstd.Decoder
}

// NewDecoder makes a Decoder of frames of up to maxBytes. It has no end, like an
// Encoder.
func NewDecoder(maxBytes int) (*Decoder, error) {
	z, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(0), // as many as there are cores
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(uint64(max(maxBytes, 0))),
		zstd.WithDecodeAllCapLimit(true), // no byte more than Decode has made room for
	)
	if err != nil {
		return nil, fmt.Errorf("zstd decoder: %w", err)
	}
	return &Decoder{maxBytes, z}, nil
}

// Decode returns the frame of size bytes that data holds, in memory of its own.
func (d *Decoder) Decode(data []byte, size uint32, codec pubsub.Codec) ([]byte, error) {
	if size == 0 || uint64(size) > uint64(d.max) {
		return nil, fmt.Errorf("%w: %d bytes, must be from 1 to %d", ErrSize, size, d.max)
	}
	return d.decode(make([]byte, 0, size), data, codec)
}

// decode fills dst, which is empty, to its capacity.
func (d *Decoder) decode(dst, data []byte, codec pubsub.Codec) (frame []byte, err error) {
	size := cap(dst)
	switch codec {
	case pubsub.Codec_S2:
		frame, err = decodeS2(dst, data)
	case pubsub.Codec_ZSTD:
		frame, err = d.zstd.DecodeAll(data, dst)
	default:
		return nil, fmt.Errorf("%w: %d", ErrCodec, codec)
	}
	switch {
	case errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return nil, fmt.Errorf("%w: more than the %d bytes that were declared", ErrSize, size)
	case err != nil:
		return nil, fmt.Errorf("decompress: %w", err)
	case len(frame) != size:
		return nil, fmt.Errorf("%w: %d bytes, %d were declared", ErrSize, len(frame), size)
	}
	return frame, nil
}

// decodeS2 looks at the length in the block first: s2 would make room for it.
func decodeS2(dst, data []byte) ([]byte, error) {
	n, err := s2.DecodedLen(data)
	if err != nil {
		return nil, err //nolint:wrapcheck // decode does.
	}
	if n != cap(dst) {
		return nil, fmt.Errorf("%w: the block has %d bytes, %d were declared", ErrSize, n, cap(dst))
	}
	return s2.Decode(dst, data) //nolint:wrapcheck // decode does.
}
