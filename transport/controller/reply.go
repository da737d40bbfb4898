package controller

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"

	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/wire"
)

// The fields of the reply that matter here, from controller.proto.
const (
	fieldRoomInfo = 1 // GetRoomInfoResponse.room_info
	fieldRevision = 2 // GetRoomInfoResponse.revision
	fieldStoreID  = 3 // GetRoomInfoResponse.store_id
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

	found    bool
	revision uint64
	store    []byte
	members  int
	skipped  int // members or nodes with an id that no push could name
}

func (w *walk) response(b []byte) error {
	reply := wire.Reader{Rest: b}
	for reply.Next() {
		switch {
		case reply.IsUint(fieldRevision):
			w.revision = reply.Uint
		case reply.IsBytes(fieldStoreID):
			w.store = reply.Bytes
		}
		if !reply.IsBytes(fieldRoomInfo) {
			continue
		}
		w.found = true
		room := wire.Reader{Rest: reply.Bytes}
		for room.Next() {
			if !room.IsBytes(fieldUsers) {
				continue
			}
			if err := w.member(room.Bytes); err != nil {
				return err
			}
		}
		if room.Err != nil {
			return room.Err
		}
	}
	return reply.Err
}

// member reads one UserInfo.
func (w *walk) member(b []byte) error {
	if w.members++; w.members > w.maxMembers {
		return fmt.Errorf("%w: the limit is %d", errMembers, w.maxMembers)
	}
	var user, node []byte
	info := wire.Reader{Rest: b}
	for info.Next() {
		switch {
		case info.IsBytes(fieldUserID):
			user = info.Bytes
		case info.IsBytes(fieldNodeID):
			node = info.Bytes
		}
	}
	if info.Err != nil {
		return info.Err
	}
	if ids.Check(user, ids.MaxScopedBytes) != nil {
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
