package ingress

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// codec takes replies that are encoded already. All other messages (health, reflection) are
// ordinary protobuf.
type codec struct {
	proto encoding.CodecV2
}

var _ encoding.CodecV2 = codec{}

func newCodec() codec { return codec{proto: encoding.GetCodecV2(proto.Name)} }

// Name is that of protobuf, which is what is spoken.
func (codec) Name() string { return proto.Name }

// inbound is the bytes of one request, followed by nobody else's.
type inbound struct {
	wire []byte
	raw  []byte // as it has come, until Server.convert makes wire of it
}

// inboundKeep is the largest buffer that is kept for another request. Most requests are
// small, and a rare large one must not pin its memory.
const inboundKeep = 64 << 10

// reuse tells whether the buffer is worth keeping.
func (in *inbound) reuse() bool { return cap(in.wire) <= inboundKeep }

// copyFrom copies a message of n bytes: gRPC uses its buffers again.
func (in *inbound) copyFrom(data mem.BufferSlice, n int) {
	if cap(in.wire) < n+stampRoom {
		in.wire = make([]byte, n, n+stampRoom)
	}
	in.wire = in.wire[:n]
	data.CopyTo(in.wire)
}

// Marshal encodes v, or takes the bytes of a reply.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	switch v := v.(type) {
	case *reply:
		return v.slice[:], nil
	case *replies:
		return mem.BufferSlice{v.copied()}, nil
	default:
		return c.proto.Marshal(v)
	}
}

// Unmarshal decodes data into v. Requests for pushes do not come this way, see rawCall.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	return c.proto.Unmarshal(data, v)
}
