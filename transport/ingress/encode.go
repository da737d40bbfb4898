package ingress

import (
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/position"
	"github.com/push-manager/push-manager/internal/wire"
)

// maxReason bounds what a node can put into the reply of a push that failed on
// many nodes.
const maxReason = 256

// reply is an encoded reply together with what gRPC wants around it, so that the
// usual one is a single allocation. gRPC keeps it until it is on the wire, which is
// why it refers to nothing of the push.
type reply struct {
	slice  [1]mem.Buffer
	buffer mem.SliceBuffer
	small  [112]byte
}

func (r *reply) set(b []byte) {
	r.buffer = b
	r.slice[0] = &r.buffer
}

// newReply encodes the reply of a unary call.
func newReply(a api, p *engine.Push, res *engine.Result) *reply {
	r := new(reply)
	var text [128]byte
	msg := appendMessage(text[:0], a, p, res)
	r.set(appendResponse(r.small[:0], a, msg, p, res))
	return r
}

// usual tells whether a push was one to a user that simply reached them, as most are:
// the reply is then always the same.
func usual(a api, p *engine.Push, res *engine.Result) bool {
	return a == toUser && p.Options == nil && res.Found && res.Targets == 1 && res.Delivered == 1 && len(res.NodeFailures) == 0 && res.Stale == 0
}

// reply is the encoded reply of a unary call.
func (s *Server) reply(a api, p *engine.Push, res *engine.Result) *reply {
	if usual(a, p, res) {
		return s.usual
	}
	return newReply(a, p, res)
}

// newStreamReply encodes a PushStreamResponse with a result.
func (s *Server) newStreamReply(id uint64, a api, p *engine.Push, res *engine.Result) *reply {
	r := new(reply)
	r.set(s.appendStreamReply(r.small[:0], id, a, p, res))
	return r
}

func (s *Server) appendStreamReply(b []byte, id uint64, a api, p *engine.Push, res *engine.Result) []byte {
	b = wire.AppendUint(b, 1, id)
	b = protowire.AppendTag(b, a.resultField(), protowire.BytesType)
	if usual(a, p, res) {
		return protowire.AppendBytes(b, s.usual.buffer)
	}
	var text [128]byte
	msg := appendMessage(text[:0], a, p, res)
	b = protowire.AppendVarint(b, uint64(sizeResponse(a, msg, p, res)))
	return appendResponse(b, a, msg, p, res)
}

// replies is a PushStreamResponse with a batch of others. Its memory serves for the next
// one.
type replies struct {
	all []byte
	one []byte // scratch
}

const (
	// repliesBytes is where a batch ends: what fits into one frame of HTTP/2 with gRPC's
	// prefix.
	repliesBytes = 16<<10 - 5
	// replyRoom is left for one more of the usual size.
	replyRoom = 128
	// repliesKeep is the largest buffer that is kept: replies that name many failures
	// are rare.
	repliesKeep = 2 * repliesBytes
)

func (r *replies) begin() {
	if cap(r.all) > repliesKeep || cap(r.one) > repliesKeep {
		*r = replies{}
	}
	r.all = r.all[:0]
}

// fits tells whether there is room for one more reply of the usual size.
func (r *replies) fits() bool { return len(r.all) < repliesBytes-replyRoom }

// add appends an encoded PushStreamResponse, and keeps its memory as scratch.
func (r *replies) add(one []byte) {
	r.all = wire.AppendBytes(r.all, batchField, one)
	r.one = one
}

// copied is the message for gRPC, which keeps it until it is on the wire: no larger than
// it has to be, since a client may be slow to read.
func (r *replies) copied() mem.Buffer { return mem.Copy(r.all, mem.DefaultBufferPool()) }

// newStreamError encodes a PushStreamResponse with an encoded google.rpc.Status.
func newStreamError(id uint64, status []byte) *reply {
	r := new(reply)
	r.set(appendStreamError(r.small[:0], id, status))
	return r
}

func appendStreamError(b []byte, id uint64, status []byte) []byte {
	b = wire.AppendUint(b, 1, id)
	return wire.AppendBytes(b, 2, status)
}

// The responses of the five methods differ in two things: that of PushToUser has
// its message in field 2 and no count.
func messageField(a api) protowire.Number {
	if a == toUser {
		return 2
	}
	return 3
}

func appendResponse(b []byte, a api, msg []byte, p *engine.Push, res *engine.Result) []byte {
	if res.Success() {
		b = wire.AppendUint(b, 1, 1)
	}
	if a != toUser {
		b = wire.AppendUint(b, 2, int32Of(res.Delivered))
	}
	if len(msg) > 0 {
		b = wire.AppendBytes(b, messageField(a), msg)
	}
	b = wire.AppendLen(b, 10, sizeSummary(p, res))
	return appendSummary(b, p, res)
}

func sizeResponse(a api, msg []byte, p *engine.Push, res *engine.Result) int {
	n := 0
	if res.Success() {
		n += 2
	}
	if a != toUser {
		n += wire.SizeUint(2, int32Of(res.Delivered))
	}
	if len(msg) > 0 {
		n += wire.SizeLen(messageField(a), len(msg))
	}
	return n + wire.SizeLen(10, sizeSummary(p, res))
}

func appendSummary(b []byte, p *engine.Push, res *engine.Result) []byte {
	b = wire.AppendUint(b, 1, int32Of(res.Targets))
	b = wire.AppendUint(b, 2, int32Of(res.Delivered))
	b = wire.AppendUint(b, 3, int32Of(res.Offline))
	b = wire.AppendUint(b, 4, int32Of(res.Failed))
	b = wire.AppendUint(b, 5, int32Of(res.Unknown))
	for i := range res.NodeFailures {
		f := &res.NodeFailures[i]
		b = wire.AppendLen(b, 6, sizeFailure(f, p.Scope))
		b = wire.AppendString(b, 1, plain.Line(f.Node, maxReason))
		b = wire.AppendString(b, 2, reasonOf(f, p.Scope))
		b = wire.AppendUint(b, 3, int32Of(f.Users))
	}
	if p.Options != nil {
		b = wire.AppendUint(b, 7, int32Of(res.Stored))
		b = wire.AppendUint(b, 8, int32Of(res.Unsure))
		b = wire.AppendUint(b, 9, int32Of(res.Acked))
		b = wire.AppendUint(b, 10, int32Of(res.Duplicates))
		b = wire.AppendString(b, 11, p.Options.MessageID)
		b = wire.AppendString(b, 12, positionOf(res))
		b = wire.AppendUint(b, 13, int32Of(res.Filtered))
		if t, traced := p.Trace.(*stages); traced {
			b = wire.AppendBytes(b, 14, t.encoded())
		}
	}
	return b
}

func sizeSummary(p *engine.Push, res *engine.Result) int {
	n := wire.SizeUint(1, int32Of(res.Targets)) +
		wire.SizeUint(2, int32Of(res.Delivered)) +
		wire.SizeUint(3, int32Of(res.Offline)) +
		wire.SizeUint(4, int32Of(res.Failed)) +
		wire.SizeUint(5, int32Of(res.Unknown))
	for i := range res.NodeFailures {
		n += wire.SizeLen(6, sizeFailure(&res.NodeFailures[i], p.Scope))
	}
	if p.Options != nil {
		n += wire.SizeUint(7, int32Of(res.Stored)) + wire.SizeUint(8, int32Of(res.Unsure)) +
			wire.SizeUint(9, int32Of(res.Acked)) + wire.SizeUint(10, int32Of(res.Duplicates)) +
			wire.SizeString(11, p.Options.MessageID) + wire.SizeString(12, positionOf(res)) + wire.SizeUint(13, int32Of(res.Filtered))
		if t, traced := p.Trace.(*stages); traced {
			n += wire.SizeLen(14, len(t.encoded()))
		}
	}
	return n
}

// positionOf is where a push to a room stands in the room's log, for those who read on behind it. It is "" for one that
// stands in none.
func positionOf(res *engine.Result) string {
	if res.Place == (engine.Place{}) {
		return ""
	}
	at := position.Position{Epoch: res.Place.Epoch, Places: []position.Place{{Partition: res.Place.Partition, Seq: res.Place.Seq}}}
	return at.String()
}

func sizeFailure(f *engine.NodeFailure, scope string) int {
	return wire.SizeString(1, plain.Line(f.Node, maxReason)) + wire.SizeString(2, reasonOf(f, scope)) + wire.SizeUint(3, int32Of(f.Users))
}

// int32Of is n within the range of an int32 that counts.
func int32Of(n int) uint64 {
	return uint64(min(max(n, 0), math.MaxInt32))
}

// appendMessage says for people what became of a push, and whether the Controller could
// not be asked where to.
func appendMessage(b []byte, a api, p *engine.Push, res *engine.Result) []byte {
	b = appendOutcome(b, a, p, res)
	if res.Stale > 0 {
		b = append(b, "; by a route of "...)
		b = strconv.AppendInt(b, int64((res.Stale+time.Second-1)/time.Second), 10)
		b = append(b, " s ago"...)
	}
	if res.Changed {
		b = append(b, ", which has changed since"...)
	}
	return b
}

func appendOutcome(b []byte, a api, p *engine.Push, res *engine.Result) []byte {
	switch {
	case a == toUser:
		return appendUserMessage(b, p, res)
	case a == toRoom:
		return appendRoomMessage(b, p, res)
	case res.Found:
		b = appendCounts(b, a, res)
		if n := p.Rooms.Len(); res.RoomsNotFound > 0 {
			b, _ = appendCount(b, "; ", res.RoomsNotFound, " of ")
			b = strconv.AppendInt(b, int64(n), 10)
			b = append(b, " rooms not found"...)
		}
		return b
	case a == toAll:
		return append(b, "no connect-node is available"...)
	case a == toRooms && res.Failed > 0: // the Controller could not be asked about some
		b = append(b, "not delivered"...)
		b, _ = appendCount(b, ": ", res.Failed, " failed")
		return b
	case a == toRooms && res.Place != engine.Place{}:
		return append(b, "none of the rooms found; stored"...)
	case a == toRooms:
		return append(b, "none of the rooms found"...)
	case res.Filtered > 0:
		return append(b, "none of the users has a connection that matches the filter"...)
	default:
		b = append(b, "none of the users is online"...)
		b, _ = appendCount(b, "; ", res.Stored, " stored")
		return b
	}
}

// appendRoomMessage says what became of a push to a room, in a word or two whether it stands in the room's log.
func appendRoomMessage(b []byte, p *engine.Push, res *engine.Result) []byte {
	stored := res.Place != engine.Place{}
	switch {
	case res.Found && res.Targets > 0 && stored:
		return appendCounts(b, toRoom, res) // which says for how many
	case res.Found:
		b = appendCounts(b, toRoom, res)
	case res.Failed > 0: // the Controller could not be asked, or not in time
		b = append(b, "not delivered"...)
		stored = false // for nobody
	default:
		b = append(b, "room "...)
		b = strconv.AppendQuote(b, shown(p.Room, p))
		if res.Targets > 0 {
			b = append(b, " could not be looked up"...)
		} else {
			b = append(b, " not found"...)
		}
	}
	switch {
	case stored:
		return append(b, "; stored"...)
	case res.Found && p.Options != nil && p.Options.Store:
		return append(b, "; not stored"...)
	case !res.Found && len(res.NodeFailures) > 0:
		b = append(b, ": "...)
		return append(b, reasonOf(&res.NodeFailures[0], p.Scope)...)
	default:
		return b
	}
}

func appendUserMessage(b []byte, p *engine.Push, res *engine.Result) []byte {
	switch {
	case res.Delivered > 0 && res.Failed+res.Unknown == 0 && len(res.NodeFailures) == 0:
		return append(b, "delivered"...)
	case res.Delivered > 0:
		b = append(b, "delivered, but not on every node"...)
	case res.Unknown > 0:
		b = append(b, "unknown whether delivered"...)
	case res.Failed > 0:
		b = append(b, "not delivered"...)
	case res.Filtered > 0:
		b = append(b, "no connection of user "...)
		b = strconv.AppendQuote(b, shown(p.User, p))
		return append(b, " matches the filter"...)
	default:
		b = append(b, "user "...)
		b = strconv.AppendQuote(b, shown(p.User, p))
		b = append(b, " is offline"...)
		if res.Stored > 0 {
			return append(b, "; stored"...)
		}
	}
	if len(res.NodeFailures) > 0 {
		b = append(b, ": "...)
		b = append(b, reasonOf(&res.NodeFailures[0], p.Scope)...)
	}
	return b
}

// appendCounts is "delivered to 3 of 5 users: 1 failed, 1 unknown". Where nobody got it,
// no number of those who did stands first: that reads like a success.
func appendCounts(b []byte, a api, res *engine.Result) []byte {
	switch {
	case res.Delivered > 0:
		b = append(b, "delivered to "...)
		b = strconv.AppendUint(b, int32Of(res.Delivered), 10)
		if res.Delivered != res.Targets {
			b = append(b, " of "...)
			b = strconv.AppendUint(b, int32Of(res.Targets), 10)
		}
		if res.Targets == 1 {
			b = append(b, " user"...)
		} else {
			b = append(b, " users"...)
		}
	case res.Unknown > 0 || slices.ContainsFunc(res.NodeFailures, mayHaveArrived):
		b = append(b, "unknown whether delivered"...)
	case res.Failed > 0 || len(res.NodeFailures) > 0:
		b = append(b, "not delivered"...)
	case res.Offline > 0:
		b = append(b, "delivered to nobody"...)
	case a == toAll:
		b = append(b, "nobody is connected"...)
	default:
		b = append(b, "nobody to deliver to"...)
	}
	sep := ": "
	b, sep = appendCount(b, sep, res.Offline, " offline")
	if res.Stored > 0 {
		b, _ = appendCount(b, " (", res.Stored, " stored)")
	}
	if res.Filtered > 0 {
		b, _ = appendCount(b, " (", res.Filtered, " filtered)")
	}
	b, sep = appendCount(b, sep, res.Failed, " failed")
	b, sep = appendCount(b, sep, res.Unknown, " unknown")
	switch {
	case a != toAll:
	case len(res.NodeFailures) == 1:
		b, _ = appendCount(b, sep, 1, " node with failures")
	default:
		b, _ = appendCount(b, sep, len(res.NodeFailures), " nodes with failures")
	}
	return b
}

// mayHaveArrived: in a broadcast a node that has not answered counts no users.
func mayHaveArrived(f engine.NodeFailure) bool {
	return strings.HasPrefix(f.Reason, engine.Unknown.String()+": ")
}

func appendCount(b []byte, sep string, n int, what string) ([]byte, string) {
	if n == 0 {
		return b, sep
	}
	b = append(b, sep...)
	b = strconv.AppendUint(b, int32Of(n), 10)
	return append(b, what...), ", "
}
