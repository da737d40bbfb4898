package e2e

import (
	"errors"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// raw is a message as it is on the wire.
type raw struct{ b []byte }

// rawCodec hands bytes through, so that the load generator and the floor cost as
// little as grpc-go allows.
type rawCodec struct{}

var _ encoding.CodecV2 = rawCodec{}

var errNotRaw = errors.New("not a raw message")

// Name is that of protobuf, which is what is spoken.
func (rawCodec) Name() string { return proto.Name }

// Marshal implements encoding.CodecV2.
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	r, ok := v.(*raw)
	if !ok {
		return nil, errNotRaw
	}
	return mem.BufferSlice{mem.SliceBuffer(r.b)}, nil
}

// Unmarshal copies data, which gRPC uses again, over what v had.
func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*raw)
	if !ok {
		return errNotRaw
	}
	r.b = r.b[:0]
	for _, b := range data {
		r.b = append(r.b, b.ReadOnlyData()...)
	}
	return nil
}
