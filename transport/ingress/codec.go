package ingress

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// codec hands the bytes of push requests to the handlers as they are and takes
// replies that are encoded already. Decoding in the handler is what lets malformed
// protobuf be answered with INVALID_ARGUMENT: an error in here would be INTERNAL.
// All other messages (health, reflection) are ordinary protobuf.
type codec struct {
	proto encoding.CodecV2
}

var _ encoding.CodecV2 = codec{}

func newCodec() codec { return codec{proto: encoding.GetCodecV2(proto.Name)} }

// Name is that of protobuf, which is what is spoken.
func (codec) Name() string { return proto.Name }

// Marshal encodes v, or takes the bytes of a reply.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if r, ok := v.(*reply); ok {
		return r.slice[:], nil
	}
	return c.proto.Marshal(v)
}

// Unmarshal decodes data into v, or copies it into a call: gRPC uses its buffers
// again as soon as this returns.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	cl, ok := v.(*call)
	if !ok {
		return c.proto.Unmarshal(data, v)
	}
	n := data.Len()
	cl.wire = make([]byte, n, n+stampRoom)
	data.CopyTo(cl.wire)
	return nil
}
