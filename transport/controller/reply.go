package controller

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/internal/ids"
)

// The fields of the reply that matter here, from controller.proto.
const (
	fieldRoomInfo = 1 // GetRoomInfoResponse.room_info
	fieldUsers    = 2 // RoomInfo.users
	fieldUserID   = 1 // UserInfo.user_id
	fieldNodeID   = 3 // UserInfo.node_id
)

var errMembers = errors.New("the room has too many members")

// rawReply receives a reply as it came over the wire. Whoever called for it
// releases it.
type rawReply struct{ buf mem.Buffer }

func (r *rawReply) release() {
	if r.buf != nil {
		r.buf.Free()
		r.buf = nil
	}
}

// codec gives a *rawReply its bytes and leaves all else to gRPC's own codec.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	reply, ok := v.(*rawReply)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	reply.release()
	reply.buf = data.MaterializeToBuffer(mem.DefaultBufferPool())
	return nil
}

// walk reads the members out of a GetRoomInfoResponse. What add is given are parts of
// the reply.
type walk struct {
	add        func(user, node []byte)
	maxMembers int

	found   bool
	members int
	skipped int // members or nodes with an id that no push could name
}

// response walks the outermost message.
func (w *walk) response(b []byte) error {
	return fields(b, func(number protowire.Number, value []byte) error {
		if number != fieldRoomInfo {
			return nil
		}
		w.found = true
		return fields(value, func(number protowire.Number, value []byte) error {
			if number != fieldUsers {
				return nil
			}
			return w.member(value)
		})
	})
}

// member walks one UserInfo.
func (w *walk) member(b []byte) error {
	if w.members++; w.members > w.maxMembers {
		return fmt.Errorf("%w: the limit is %d", errMembers, w.maxMembers)
	}
	var user, node []byte
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return protowire.ParseError(n)
			}
			b = b[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		switch number {
		case fieldUserID:
			user = value
		case fieldNodeID:
			node = value
		}
	}
	if ids.Check(user, ids.MaxBytes) != nil {
		w.skipped++
		return nil //nolint:nilerr // An id that nobody could name is left out.
	}
	if len(node) > 0 && ids.Check(node, ids.MaxBytes) != nil {
		w.skipped++
		node = nil
	}
	w.add(user, node)
	return nil
}

// fields calls visit for each length-delimited field of a message.
func fields(b []byte, visit func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return protowire.ParseError(n)
			}
			b = b[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := visit(number, value); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
