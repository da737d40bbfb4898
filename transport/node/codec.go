package node

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // Registers what codec falls back to.
	"google.golang.org/grpc/mem"

	pubsub "github.com/push-manager/push-manager/proto"
)

// frame receives one DeliverRequest without decoding it. It is a proto.Message
// through the embedded one, so that a grpc.Server without our codec still serves
// the stream, at the price of decoding twice.
type frame struct {
	pubsub.DeliverRequest

	data []byte // owned: nobody writes to it, and strings may point into it
	raw  bool   // data was filled by our codec
}

// bytes is the frame as it was on the wire.
func (f *frame) bytes() ([]byte, error) {
	if f.raw {
		return f.data, nil
	}
	data, err := f.MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("encode frame again: %w", err)
	}
	return data, nil
}

// codec hands Deliver frames over as they are and encodes what the node sends
// without reflection. Everything else goes the usual way.
type codec struct {
	fallback encoding.CodecV2
}

func newCodec() codec { return codec{fallback: encoding.GetCodecV2("proto")} }

type vtMarshaler interface {
	SizeVT() int
	MarshalToSizedBufferVT([]byte) (int, error)
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(vtMarshaler)
	if !ok {
		return c.fallback.Marshal(v)
	}
	size := m.SizeVT()
	if mem.IsBelowBufferPoolingThreshold(size) {
		b := make([]byte, size)
		if _, err := m.MarshalToSizedBufferVT(b); err != nil {
			return nil, fmt.Errorf("marshal %T: %w", v, err)
		}
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	}
	pool := mem.DefaultBufferPool()
	b := pool.Get(size)
	if _, err := m.MarshalToSizedBufferVT((*b)[:size]); err != nil {
		pool.Put(b)
		return nil, fmt.Errorf("marshal %T: %w", v, err)
	}
	return mem.BufferSlice{mem.NewBuffer(b, pool)}, nil
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return c.fallback.Unmarshal(data, v)
	}
	f.data, f.raw = data.Materialize(), true
	return nil
}

// Name implements encoding.CodecV2.
func (codec) Name() string { return "proto" }
