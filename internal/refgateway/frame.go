package refgateway

import (
	"encoding/base64"
	"encoding/binary"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"github.com/gobwas/ws"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// frame is one message to clients, encoded once and shared by all queues in which it
// waits. A push has a gap: the recipient's id, the only part that differs between
// recipients, goes between head and tail. What clients get besides who have asked for ids takes the place of the
// brace that ends the tail, see queued.
type frame struct {
	head, tail []byte
	id         []byte      // a member of the JSON object, with its comma; nil without a message id
	room       string      // as its clients know it
	several    *node.Rooms // of a push to several rooms, of which room is one
	op         ws.OpCode
	gap        bool

	holders atomic.Int32 // queues and writers
	keepers atomic.Int32 // inboxes

	deflating sync.Once    // guards deflated
	deflated  []byte       // see deflater.shared
	more      atomic.Int64 // bytes of it, once a writer has made it
}

// bytes is what is shared.
func (f *frame) bytes() int64 { return int64(len(f.head) + len(f.tail) + len(f.id)) }

// entry is a push with options as the inbox of a connection gives it to the queue.
type entry = node.Entry[*frame]

// queued is a frame on its way to one recipient.
type queued struct {
	*frame

	entry *entry // nil for a push of which the inbox wants to know no more, and for what is no push
}

// recipient is to whom a frame goes.
type recipient struct {
	user []byte // the id as a JSON string
	acks bool   // it acknowledges
	ids  bool   // it has asked for ids: with ack=1, or to resume

	deflate *deflater // nil: it takes messages as they are
	window  int       // bytes of a message that may be compressed for it
}

// The members of a push that only clients get who have asked for ids, in this order.
const (
	idMember       = `,"id":`
	ackMember      = `,"ack":`
	replayedMember = `,"replayed":true`
)

// marked tells whether the recipient gets more than the frame.
func (q queued) marked(to *recipient) bool {
	return to.ids && (q.id != nil || q.entry != nil && (q.entry.Ack != 0 || q.entry.Replayed))
}

// appendMarks appends what differs between recipients of a message.
func (q queued) appendMarks(b []byte) []byte {
	if q.entry == nil {
		return b
	}
	if q.entry.Ack != 0 {
		b = strconv.AppendUint(append(b, ackMember...), q.entry.Ack, 10)
	}
	if q.entry.Replayed {
		b = append(b, replayedMember...)
	}
	return b
}

// size is the length of the payload, before it is compressed.
func (q queued) size(to *recipient) int {
	n := len(q.head) + len(q.tail)
	if q.gap {
		n += len(to.user)
	}
	if q.marked(to) {
		var b [len(ackMember) + 20 + len(replayedMember)]byte
		n += len(q.id) + len(q.appendMarks(b[:0]))
	}
	return n
}

// appendTo appends the WebSocket frame, but for a long tail, which it returns with what
// comes behind it.
func (q queued) appendTo(b []byte, to *recipient) (_, tail, end []byte) {
	if to.deflate != nil {
		if shared := to.deflate.shared(q.frame, to.window); shared != nil {
			return q.appendDeflated(b, to, shared)
		}
	}
	b = appendHeader(b, q.op, q.size(to))
	b = append(b, q.head...)
	if q.gap {
		b = append(b, to.user...)
	}
	tail, marked := q.tail, q.marked(to)
	if marked {
		tail = tail[:len(tail)-1]
	}
	if len(tail) <= copyBytes {
		b, tail = append(b, tail...), nil
	}
	switch {
	case !marked:
	case tail == nil:
		b = append(q.appendMarks(append(b, q.id...)), '}')
	default:
		end = append(q.appendMarks(append(end, q.id...)), '}')
	}
	return b, tail, end
}

// newPush encodes m for clients who know its room by that name.
func newPush(m *node.Message, room string, broadcast bool) *frame {
	// Both parts come from one buffer; escapes may make it grow.
	b := make([]byte, 0, 160+len(room)+len(m.Data)+len(m.Data)/8)
	b = append(b, `{"type":`...)
	b = appendType(b, m.Type)
	b = append(b, `,"room_id":`...)
	b = append(appendString(b, room), userMember...)
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
	f := &frame{op: ws.OpText, head: b[:split:split], tail: b[split:], room: room, gap: true}
	if m.Options != nil && m.Options.ID != "" {
		f.id = appendString([]byte(idMember), m.Options.ID)
	}
	return f
}

// userMember is what follows the room in the head of a push.
const userMember = `,"user_id":`

// inRoom is a push for clients who are shown another one of its rooms.
func (f *frame) inRoom(room string) *frame {
	before := len(f.head) - len(userMember) - len(appendString(nil, f.room))
	head := append(appendString(slices.Clone(f.head[:before]), room), userMember...)
	return &frame{head: head, tail: f.tail, id: f.id, room: room, several: f.several, op: f.op, gap: f.gap}
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

func closeFrame(code uint16, reason string) []byte {
	payload := append(binary.BigEndian.AppendUint16(nil, code), reason...)
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
