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
	fieldExclude // of a room; several
)

// encode writes a message for a user, or with user "" for a room.
func encode(user string, m *engine.Stored, until time.Time) []byte {
	expires := uint64(max(until.UnixMilli(), 1))
	size := wire.SizeString(fieldUser, user) + wire.SizeString(fieldMessageID, m.MessageID) + wire.SizeString(fieldSender, m.Sender) +
		wire.SizeUint(fieldPayloadHash, uint64(m.PayloadHash)) + wire.SizeString(fieldRoom, m.Room) + wire.SizeString(fieldCollapseKey, m.CollapseKey) +
		wire.SizeUint(fieldExpires, expires) + wire.SizeLen(fieldPayload, len(m.Payload)) + wire.SizeStrings(fieldExclude, m.Exclude)
	b := make([]byte, 0, size)
	b = wire.AppendString(b, fieldUser, user)
	b = wire.AppendString(b, fieldMessageID, m.MessageID)
	b = wire.AppendString(b, fieldSender, m.Sender)
	b = wire.AppendUint(b, fieldPayloadHash, uint64(m.PayloadHash))
	b = wire.AppendString(b, fieldRoom, m.Room)
	b = wire.AppendString(b, fieldCollapseKey, m.CollapseKey)
	b = wire.AppendUint(b, fieldExpires, expires)
	b = wire.AppendBytes(b, fieldPayload, m.Payload)
	return wire.AppendStrings(b, fieldExclude, m.Exclude)
}

var errCorrupt = errors.New("no user or room, expiry or payload")

// decode reads a message for a user.
func decode(data []byte) (store.Entry, error) {
	user, m, err := decodeAny(data)
	if err == nil && user == "" {
		err = errCorrupt
	}
	if err != nil {
		return store.Entry{}, err
	}
	return store.Entry{User: user, Message: m, Expires: m.Expires}, nil
}

// decodeLog reads a message for a room.
func decodeLog(data []byte) (store.LogEntry, error) {
	user, m, err := decodeAny(data)
	if err == nil && (user != "" || m.Room == "") {
		err = errCorrupt
	}
	if err != nil {
		return store.LogEntry{}, err
	}
	return store.LogEntry{Message: m, Expires: m.Expires}, nil
}

// decodeAny reads what encode has written. The payload is a part of data, the rest are copies.
func decodeAny(data []byte) (user string, m *engine.Stored, err error) {
	m, payload := &engine.Stored{}, false
	r := wire.Reader{Rest: data}
	for r.Next() {
		switch {
		case r.IsBytes(fieldUser):
			user = string(r.Bytes)
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
			m.Expires = time.UnixMilli(int64(r.Uint))
		case r.IsBytes(fieldPayload):
			m.Payload, payload = r.Bytes, true
		case r.IsBytes(fieldExclude):
			m.Exclude = append(m.Exclude, string(r.Bytes))
		}
	}
	if r.Err != nil {
		return "", nil, r.Err
	}
	if m.Expires.IsZero() || !payload {
		return "", nil, errCorrupt
	}
	return user, m, nil
}
