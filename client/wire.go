package client

import (
	"errors"
	"fmt"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Fields of PushStreamRequest and PushStreamResponse.
const (
	fieldID    protowire.Number = 1
	fieldError protowire.Number = 2
	fieldBatch protowire.Number = 10
)

// field is that of a kind in PushStreamRequest; in PushStreamResponse it is one higher.
func (k kind) field() protowire.Number {
	switch k {
	case toRoom:
		return 2
	case toUser:
		return 3
	case toAll:
		return 4
	case toRooms:
		return 7
	default:
		return 5
	}
}

// frame is one encoded message of a PushStream.
type frame []byte

// frames passes them on as they are: pushes are encoded one by one when they are sent, and again as they are when they are repeated.
type frames struct{}

// Name implements encoding.CodecV2.
func (frames) Name() string { return "proto" }

// Marshal implements encoding.CodecV2.
func (frames) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(frame)
	if !ok {
		return nil, fmt.Errorf("cannot send %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(f)}, nil
}

// Unmarshal implements encoding.CodecV2. The frame is a copy.
func (frames) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return fmt.Errorf("cannot receive %T", v)
	}
	*f = data.Materialize()
	return nil
}

// encode is a push as the field of a PushStreamRequest.
func encode(k kind, r request) ([]byte, error) {
	size := r.SizeVT()
	body := make([]byte, 0, size+1+protowire.SizeVarint(uint64(size)))
	body = protowire.AppendTag(body, k.field(), protowire.BytesType)
	body = protowire.AppendVarint(body, uint64(size))
	n, err := r.MarshalToSizedBufferVT(body[len(body) : len(body)+size])
	if err != nil || n != size {
		return nil, fmt.Errorf("cannot be encoded: %w", errors.Join(err, errors.ErrUnsupported))
	}
	return body[:len(body)+size], nil
}

// maxHead is what appendPush adds to a body at most.
const maxHead = 1 + 10 + 1 + 10

// appendPush adds a push to a batch.
func appendPush(b []byte, id uint64, body []byte) []byte {
	b = protowire.AppendTag(b, fieldBatch, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(1+protowire.SizeVarint(id)+len(body)))
	b = protowire.AppendTag(b, fieldID, protowire.VarintType)
	b = protowire.AppendVarint(b, id)
	return append(b, body...)
}

// answer is the end of one push of a stream.
type answer struct {
	id     uint64
	kind   kind
	result Result
	failed *Error

	// Of one that failed, for settle.
	push    *Pending
	inOrder bool
}

// maxAnswers is how many a message may have. Push-Manager has no more of one call in hand.
const maxAnswers = 1 << 16

// decode reads a message of a PushStream. An error ends the call: nobody knows what the server means then.
func decode(message frame, into []answer) (_ []answer, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic while the answer was read: %v", v)
		}
	}()
	alone := true
	m := wire.Reader{Rest: message}
	for m.Next() {
		if m.Number() == fieldBatch && m.Type() == protowire.BytesType {
			if alone = false; len(into) == maxAnswers {
				return into, errors.New("too many answers in a message")
			}
			a, err := decodeOne(m.Bytes)
			if err != nil {
				return into, err
			}
			into = append(into, a)
		}
	}
	if m.Err != nil {
		return into, fmt.Errorf("the answer is malformed: %w", m.Err)
	}
	if !alone {
		return into, nil
	}
	a, err := decodeOne(message)
	return append(into, a), err
}

func decodeOne(b []byte) (a answer, err error) {
	var refused []byte
	var r Reply
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.Number() == fieldID && m.Type() == protowire.VarintType:
			a.id = m.Uint
		case m.Type() != protowire.BytesType:
		case m.Number() == fieldError:
			refused = m.Bytes
		case m.Number() >= 3 && m.Number() <= 7:
			request := m.Number() - 1 // the field of what it answers
			if m.Number() == toRooms.field() {
				request = toRooms.field()
			}
			a.kind, r, err = decodeReply(request, m.Bytes)
			if err != nil {
				return a, fmt.Errorf("the reply is malformed: %w", err)
			}
		}
	}
	switch {
	case m.Err != nil:
		return a, fmt.Errorf("the answer is malformed: %w", m.Err)
	case refused != nil:
		var s spb.Status
		if err := proto.Unmarshal(refused, &s); err != nil {
			return a, fmt.Errorf("the status is malformed: %w", err)
		}
		if a.failed = errorOfStatus(&s); s.GetCode() == 0 {
			a.failed = unusable("an error without a code")
		}
	case r == nil:
		a.failed = unusable("an answer with neither a result nor an error")
	default:
		a.result, a.failed = resultOf(a.kind, r)
	}
	return a, nil
}

func decodeReply(field protowire.Number, b []byte) (k kind, r Reply, err error) {
	switch field {
	case toRoom.field():
		var m pubsub.PushToRoomResponse
		return toRoom, &m, m.UnmarshalVT(b)
	case toUser.field():
		var m pubsub.PushToUserResponse
		return toUser, &m, m.UnmarshalVT(b)
	case toRooms.field():
		var m pubsub.PushToRoomsResponse
		return toRooms, &m, m.UnmarshalVT(b)
	case toAll.field():
		var m pubsub.BroadcastMessageResponse
		return toAll, &m, m.UnmarshalVT(b)
	default:
		var m pubsub.PushToUsersResponse
		return toUsers, &m, m.UnmarshalVT(b)
	}
}
