package link

import (
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
)

// Field numbers of proto/connect_node.proto.
const (
	reqFirstSeq, reqDeliveries, reqForget, reqHeartbeat, reqDrain = 2, 3, 4, 5, 6
	reqCompressed, reqRawBytes                                    = 7, 8

	delContent, delRoom, delUsers, delAudience, delEverybody, delExcept, delTraceparent = 1, 2, 3, 4, 5, 6, 7

	audID, audVersion, audRoom, audJoin, audLeave = 1, 2, 3, 4, 5

	callUsers, callRoom, callContent = 1, 2, 3 // of PushMessage and PushMessageBatch
	broadcastContent                 = 1
)

// All field numbers that are written are below 16: their tag is one byte.

func sizeString(n int) int { return 1 + protowire.SizeBytes(n) }

func sizeOptional(s string) int {
	if s == "" {
		return 0
	}
	return sizeString(len(s))
}

func sizeUint(v uint64) int {
	if v == 0 {
		return 0
	}
	return 1 + protowire.SizeVarint(v)
}

func sizeStrings(list []string) int {
	n := 0
	for _, s := range list {
		n += sizeString(len(s))
	}
	return n
}

func tag(field protowire.Number, t protowire.Type) byte { return byte(field<<3) | byte(t) }

// appendLen starts a field of n bytes.
func appendLen(b []byte, field protowire.Number, n int) []byte {
	return protowire.AppendVarint(append(b, tag(field, protowire.BytesType)), uint64(n))
}

func appendString(b []byte, field protowire.Number, s string) []byte {
	return append(appendLen(b, field, len(s)), s...)
}

func appendOptional(b []byte, field protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return appendString(b, field, s)
}

func appendUint(b []byte, field protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(append(b, tag(field, protowire.VarintType)), v)
}

func appendStrings(b []byte, field protowire.Number, list []string) []byte {
	for _, s := range list {
		b = appendString(b, field, s)
	}
	return b
}

// address says for whom a delivery is: exactly one of users, minus, audience and
// everybody.
type address struct {
	users     []string // these
	minus     []string // of users, not these; sorted like users
	audience  audienceRef
	everybody bool
}

// audienceRef names an audience, with its definition or change if there is one.
type audienceRef struct {
	id, version uint32
	room        string // with the definition
	join, leave []string
}

func (a *audienceRef) size() int {
	return sizeUint(uint64(a.id)) + sizeUint(uint64(a.version)) + sizeOptional(a.room) + sizeStrings(a.join) + sizeStrings(a.leave)
}

func (a *audienceRef) append(b []byte) []byte {
	b = appendUint(b, audID, uint64(a.id))
	b = appendUint(b, audVersion, uint64(a.version))
	b = appendOptional(b, audRoom, a.room)
	b = appendStrings(b, audJoin, a.join)
	return appendStrings(b, audLeave, a.leave)
}

// sizeDelivery is the length of the Delivery message for d.
func sizeDelivery(d *engine.Delivery, to *address) int {
	n := sizeString(len(d.Payload())) + sizeOptional(d.Traceparent())
	switch {
	case to.everybody:
		return n + 2
	case to.audience.id != 0:
		return n + sizeString(to.audience.size()) + sizeStrings(d.Except())
	default:
		return n + sizeOptional(d.Room()) + sizeStrings(to.users) - sizeStrings(to.minus)
	}
}

// appendDelivery encodes d as a field of the frame. size is sizeDelivery's.
func appendDelivery(b []byte, d *engine.Delivery, to *address, size int) []byte {
	b = appendLen(b, reqDeliveries, size)
	p := d.Payload()
	b = append(appendLen(b, delContent, len(p)), p...)
	switch {
	case to.everybody:
		b = append(b, tag(delEverybody, protowire.VarintType), 1)
	case to.audience.id != 0:
		b = appendLen(b, delAudience, to.audience.size())
		b = to.audience.append(b)
		b = appendStrings(b, delExcept, d.Except())
	default:
		b = appendOptional(b, delRoom, d.Room())
		b = appendWithout(b, delUsers, to.users, to.minus)
	}
	return appendOptional(b, delTraceparent, d.Traceparent())
}

// appendWithout encodes users but for those in minus, a sorted part of them.
func appendWithout(b []byte, field protowire.Number, users, minus []string) []byte {
	for _, u := range users {
		if len(minus) > 0 && minus[0] == u {
			minus = minus[1:]
			continue
		}
		b = appendString(b, field, u)
	}
	return b
}
