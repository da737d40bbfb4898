package jetstream

import (
	"errors"
	"math"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/wire"
	"github.com/push-manager/push-manager/transport/store"
)

// Fields of a message as it is stored. Numbers are never used again: what is read may be older or newer than this
// program. Fields that are not known are skipped.
const (
	fieldUser = iota + 1
	fieldMessageID
	fieldSender
	fieldPayloadHash
	fieldRoom
	fieldCollapseKey
	fieldExpires // milliseconds since 1970
	fieldPayload
)

// encode writes an entry.
func encode(e *store.Entry) []byte {
	m, expires := e.Message, uint64(max(e.Expires.UnixMilli(), 1))
	size := wire.SizeString(fieldUser, e.User) + wire.SizeString(fieldMessageID, m.MessageID) + wire.SizeString(fieldSender, m.Sender) +
		wire.SizeUint(fieldPayloadHash, uint64(m.PayloadHash)) + wire.SizeString(fieldRoom, m.Room) + wire.SizeString(fieldCollapseKey, m.CollapseKey) +
		wire.SizeUint(fieldExpires, expires) + wire.SizeLen(fieldPayload, len(m.Payload))
	b := make([]byte, 0, size)
	b = wire.AppendString(b, fieldUser, e.User)
	b = wire.AppendString(b, fieldMessageID, m.MessageID)
	b = wire.AppendString(b, fieldSender, m.Sender)
	b = wire.AppendUint(b, fieldPayloadHash, uint64(m.PayloadHash))
	b = wire.AppendString(b, fieldRoom, m.Room)
	b = wire.AppendString(b, fieldCollapseKey, m.CollapseKey)
	b = wire.AppendUint(b, fieldExpires, expires)
	return wire.AppendBytes(b, fieldPayload, m.Payload)
}

var errCorrupt = errors.New("no user, expiry or payload")

// decode reads what encode has written. The payload is a part of data, the rest are copies.
func decode(data []byte) (store.Entry, error) {
	e, m, payload := store.Entry{}, &engine.Stored{}, false
	r := wire.Reader{Rest: data}
	for r.Next() {
		switch {
		case r.IsBytes(fieldUser):
			e.User = string(r.Bytes)
		case r.IsBytes(fieldMessageID):
			m.MessageID = string(r.Bytes)
		case r.IsBytes(fieldSender):
			m.Sender = string(r.Bytes)
		case r.IsUint(fieldPayloadHash):
			m.PayloadHash = uint32(r.Uint)
		case r.IsBytes(fieldRoom):
			m.Room = string(r.Bytes)
		case r.IsBytes(fieldCollapseKey):
			m.CollapseKey = string(r.Bytes)
		case r.IsUint(fieldExpires) && r.Uint <= math.MaxInt64:
			e.Expires = time.UnixMilli(int64(r.Uint))
		case r.IsBytes(fieldPayload):
			m.Payload, payload = r.Bytes, true
		}
	}
	if r.Err != nil {
		return store.Entry{}, r.Err
	}
	if e.User == "" || e.Expires.IsZero() || !payload {
		return store.Entry{}, errCorrupt
	}
	m.Expires = e.Expires
	e.Message = m
	return e, nil
}
