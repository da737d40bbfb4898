package refcontroller

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
)

// codec encodes replies with the generated vtproto code: a room of a million
// members has to be answered within a look-up's 300 ms. Requests are decoded by
// gRPC's own codec, which refuses strings that are not UTF-8.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

type vtMessage interface {
	SizeVT() int
	MarshalToSizedBufferVT(b []byte) (int, error)
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(vtMessage)
	if !ok {
		return c.CodecV2.Marshal(v) // health, reflection
	}
	size := m.SizeVT()
	if mem.IsBelowBufferPoolingThreshold(size) {
		b := make([]byte, size)
		_, err := m.MarshalToSizedBufferVT(b)
		return mem.BufferSlice{mem.SliceBuffer(b)}, err
	}
	pool := mem.DefaultBufferPool()
	b := pool.Get(size)
	if _, err := m.MarshalToSizedBufferVT((*b)[:size]); err != nil {
		pool.Put(b)
		return nil, err
	}
	*b = (*b)[:size]
	return mem.BufferSlice{mem.NewBuffer(b, pool)}, nil
}
