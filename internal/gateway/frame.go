package gateway

import (
	"encoding/base64"
	"encoding/binary"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/lxzan/gws"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// push is the text message of one push, encoded once. The recipient's id, the
// only part that differs between recipients, goes between head and tail.
type push struct {
	head, tail []byte
}

func newPush(m *node.Message) *push {
	// Both parts come from one buffer; escapes may make it grow.
	b := make([]byte, 0, 160+len(m.RoomID)+len(m.Data)+len(m.Data)/8)
	b = append(b, `{"type":`...)
	b = appendType(b, m.Type)
	b = append(b, `,"room_id":`...)
	b = appendString(b, m.RoomID)
	b = append(b, `,"user_id":`...)
	split := len(b)
	b = append(b, `,"timestamp":`...)
	b = strconv.AppendInt(b, m.Timestamp, 10)
	b = append(b, `,"data":{"content`...)
	if utf8.Valid(m.Data) {
		b = append(b, `":`...)
		b = appendString(b, m.Data)
	} else {
		b = append(b, `_base64":"`...)
		b = base64.StdEncoding.AppendEncode(b, m.Data)
		b = append(b, '"')
	}
	b = append(b, `},"metadata":{`...)
	for i, key := range slices.Sorted(maps.Keys(m.Metadata)) {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, key)
		b = append(b, ':')
		b = appendString(b, m.Metadata[key])
	}
	b = append(b, "}}"...)
	return &push{head: b[:split:split], tail: b[split:]}
}

// appendFrame appends the WebSocket frame for one recipient, whose id is given as
// a JSON string.
func (p *push) appendFrame(b, user []byte) []byte {
	b = appendHeader(b, gws.OpcodeText, len(p.head)+len(user)+len(p.tail))
	b = append(b, p.head...)
	b = append(b, user...)
	return append(b, p.tail...)
}

// appendType writes the lower-case name of the type, or the number as a string
// for one that this version does not know.
func appendType(b []byte, t pubsub.MessageType) []byte {
	b = append(b, '"')
	if name, ok := pubsub.MessageType_name[int32(t)]; ok {
		b = append(b, strings.ToLower(name)...)
	} else {
		b = strconv.AppendInt(b, int64(t), 10)
	}
	return append(b, '"')
}

// control is a whole WebSocket frame of a text message that the gateway itself
// sends: pairs are keys and values.
func control(kind string, pairs ...string) []byte {
	b := append([]byte(nil), `{"type":`...)
	b = appendString(b, kind)
	for i := 0; i+1 < len(pairs); i += 2 {
		b = append(b, ',')
		b = appendString(b, pairs[i])
		b = append(b, ':')
		b = appendString(b, pairs[i+1])
	}
	return wsFrame(gws.OpcodeText, append(b, '}'))
}

// wsFrame is a whole WebSocket frame.
func wsFrame(op gws.Opcode, payload []byte) []byte {
	b := make([]byte, 0, len(payload)+10)
	return append(appendHeader(b, op, len(payload)), payload...)
}

// appendHeader writes the header of an unfragmented frame from the server, which
// is not masked (RFC 6455, 5.2).
func appendHeader(b []byte, op gws.Opcode, n int) []byte {
	b = append(b, 0x80|byte(op))
	switch {
	case n < 126:
		return append(b, byte(n))
	case n < 1<<16:
		return binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		return binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	}
}

const hex = "0123456789abcdef"

// appendString writes s as a JSON string. What is not UTF-8 becomes U+FFFD.
func appendString[S string | []byte](b []byte, s S) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(string(s[i:min(i+utf8.UTFMax, len(s))]))
			if r == utf8.RuneError && size == 1 {
				b = append(append(b, s[start:i]...), "\ufffd"...)
				start = i + 1
			}
			i += size
			continue
		}
		if c >= ' ' && c != '"' && c != '\\' && c != 0x7f {
			i++
			continue
		}
		b = append(b, s[start:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, `\n`...)
		case '\r':
			b = append(b, `\r`...)
		case '\t':
			b = append(b, `\t`...)
		default:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
		i++
		start = i
	}
	return append(append(b, s[start:]...), '"')
}
