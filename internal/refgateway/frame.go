package refgateway

import (
	"encoding/base64"
	"encoding/binary"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"unicode/utf8"

	"github.com/gobwas/ws"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// frame is one message to clients, encoded once and shared by all queues in which it
// waits. A push has a gap: the recipient's id, the only part that differs between
// recipients, goes between head and tail.
type frame struct {
	head, tail []byte
	op         ws.OpCode
	gap        bool
	tenant     node.Tenant // whose clients it is for, if it names a room

	holders atomic.Int32 // queues and writers
}

// bytes is what is shared.
func (f *frame) bytes() int64 { return int64(len(f.head) + len(f.tail)) }

// size is the length of the payload for one recipient, whose id is given as a JSON string.
func (f *frame) size(user []byte) int {
	n := len(f.head) + len(f.tail)
	if f.gap {
		n += len(user)
	}
	return n
}

// appendTo appends the WebSocket frame for one recipient, but for a long tail, which it
// returns.
func (f *frame) appendTo(b, user []byte) (_, tail []byte) {
	b = appendHeader(b, f.op, f.size(user))
	b = append(b, f.head...)
	if f.gap {
		b = append(b, user...)
	}
	if len(f.tail) > copyBytes {
		return b, f.tail
	}
	return append(b, f.tail...), nil
}

// newPush is m for the clients of a tenant, who know the room without it.
func newPush(m *node.Message, tenant node.Tenant, broadcast bool) *frame {
	// Both parts come from one buffer; escapes may make it grow.
	b := make([]byte, 0, 160+len(m.RoomID)+len(m.Data)+len(m.Data)/8)
	b = append(b, `{"type":`...)
	b = appendType(b, m.Type)
	b = append(b, `,"room_id":`...)
	b = appendString(b, tenant.Plain(m.RoomID))
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
	b = append(b, '}')
	if broadcast {
		b = append(b, `,"broadcast":true`...)
	}
	b = append(b, '}')
	return &frame{op: ws.OpText, head: b[:split:split], tail: b[split:], gap: true, tenant: tenant}
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

// control is a text message that the gateway itself sends: pairs are keys and values.
func control(kind string, pairs ...string) *frame {
	b := append([]byte(nil), `{"type":`...)
	b = appendString(b, kind)
	for i := 0; i+1 < len(pairs); i += 2 {
		b = append(b, ',')
		b = appendString(b, pairs[i])
		b = append(b, ':')
		b = appendString(b, pairs[i+1])
	}
	return &frame{op: ws.OpText, head: append(b, '}')}
}

// The close codes that the gateway uses: those of RFC 6455, and its own, which resemble the
// status codes of HTTP.
const (
	closeNormal    = 1000
	closeGoingAway = 1001
	closeProtocol  = 1002
	closeNotUTF8   = 1007
	closeTooLarge  = 1009
	closeOurFault  = 1011
	closeToken     = 4401
	closeForbidden = 4403
	closeNoToken   = 4408
	closeSlow      = 4429
)

// closeReason is a close code in words, for the client's log.
func closeReason(code uint16) string {
	switch code {
	case closeGoingAway:
		return "node is going"
	case closeProtocol:
		return "not WebSocket as in RFC 6455"
	case closeNotUTF8:
		return "text is not UTF-8"
	case closeTooLarge:
		return "message is too large"
	case closeOurFault:
		return "internal error of the node"
	case closeToken: // one text for all: whoever tries tokens learns nothing
		return "token is missing, wrong or expired"
	case closeForbidden:
		return "the token does not allow this room"
	case closeNoToken:
		return "no token came in time"
	case closeSlow:
		return "too slow: too much waits to be read"
	}
	return ""
}

func closeFrame(code uint16) []byte {
	payload := append(binary.BigEndian.AppendUint16(nil, code), closeReason(code)...)
	return append(appendHeader(nil, ws.OpClose, len(payload)), payload...)
}

// appendHeader writes the header of an unfragmented frame from the server, which
// is not masked (RFC 6455, 5.2).
func appendHeader(b []byte, op ws.OpCode, n int) []byte {
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
