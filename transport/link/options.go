package link

import (
	"math"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Field numbers of proto/connect_node.proto.
const (
	delMessageID, delPayloadHash, delTTL, delWantAck, delAckTimeout, delCollapseKey, delReplay, delSender = 16, 17, 18, 19, 20, 21, 23, 25
	delFilter, delNameFiltered                                                                            = 26, 28

	matchKey, matchValues, matchNot = 1, 2, 3

	placeGate, placeSeq, placeAfter = 1, 2, 3
)

// extras is what the options of a delivery add to its message, for one node. The zero value adds nothing.
type extras struct {
	options *engine.Options
	can     features // of the node
	ttl     uint64   // ms that are left, 0 for ever
	acks    uint64   // ms that clients have to acknowledge, 0 where they are not asked to

	log     engine.Place // in the log of the room, zero where the node is not told
	exclude []string     // of the room

	names bool // the node is to name whom the filter leaves out
}

// extrasOf works out what a delivery with options brings to a node at the moment now, in which its
// frame is written. A reason other than Sent is why it brings nothing.
func extrasOf(d *engine.Delivery, o *engine.Options, can features, now time.Time) (extras, engine.Reason) {
	x := extras{options: o, can: can, names: d.NamesFiltered()}
	if toGate(o) && !can.has(pubsub.Feature_FEATURE_REPLAY) {
		return x, engine.DropNoReplay
	}
	if len(o.Filter) > 0 && !can.has(pubsub.Feature_FEATURE_FILTER) {
		return x, engine.DropNoFilter
	}
	if at := d.Expires(); !at.IsZero() {
		left := at.Sub(now)
		if left <= 0 {
			return x, engine.DropExpired
		}
		x.ttl = milliseconds(left)
	}
	if o.ClientAck {
		x.acks = milliseconds(d.AckBy().Sub(now))
	}
	if can.has(pubsub.Feature_FEATURE_ROOM_LOG) {
		x.log, x.exclude = d.Log()
	}
	return x, engine.Sent
}

// toGate tells a message out of the store that a gate has asked for.
func toGate(o *engine.Options) bool { return o.Replay != nil && o.Replay.Gate != 0 }

// milliseconds rounds down, so that nobody is later for it, but not to 0, which says something else.
func milliseconds(d time.Duration) uint64 {
	return uint64(min(max(d.Milliseconds(), 1), math.MaxUint32))
}

// size is the length of what append writes.
func (x *extras) size() int {
	o := x.options
	if o == nil {
		return 0
	}
	n := 0
	if o.MessageID != "" && x.can.has(pubsub.Feature_FEATURE_DEDUPE) {
		n += wire.SizeString(delMessageID, o.MessageID) + protowire.SizeTag(delPayloadHash) + protowire.SizeFixed32() + wire.SizeString(delSender, o.Sender)
	}
	if x.can.has(pubsub.Feature_FEATURE_EXPIRY) {
		n += wire.SizeUint(delTTL, x.ttl)
	}
	if x.acks > 0 && x.can.has(pubsub.Feature_FEATURE_CLIENT_ACK) {
		n += wire.SizeUint(delWantAck, 1) + wire.SizeUint(delAckTimeout, x.acks)
	}
	if x.can.has(pubsub.Feature_FEATURE_COLLAPSE) {
		n += wire.SizeString(delCollapseKey, o.CollapseKey)
	}
	if toGate(o) {
		n += wire.SizeLen(delReplay, sizePlace(o.Replay))
	}
	if x.log != (engine.Place{}) {
		n += wire.SizeLen(delLog, sizeLogPlace(x.log, x.exclude))
	}
	for i := range o.Filter {
		n += wire.SizeLen(delFilter, sizeMatch(&o.Filter[i]))
	}
	if x.names {
		n += wire.SizeUint(delNameFiltered, 1)
	}
	return n
}

// append writes the fields of the options, behind those that every delivery has.
func (x *extras) append(b []byte) []byte {
	o := x.options
	if o == nil {
		return b
	}
	dedupe := o.MessageID != "" && x.can.has(pubsub.Feature_FEATURE_DEDUPE)
	if dedupe {
		b = wire.AppendString(b, delMessageID, o.MessageID)
		b = protowire.AppendFixed32(protowire.AppendTag(b, delPayloadHash, protowire.Fixed32Type), o.PayloadHash)
	}
	if x.can.has(pubsub.Feature_FEATURE_EXPIRY) {
		b = wire.AppendUint(b, delTTL, x.ttl)
	}
	if x.acks > 0 && x.can.has(pubsub.Feature_FEATURE_CLIENT_ACK) {
		b = wire.AppendUint(b, delWantAck, 1)
		b = wire.AppendUint(b, delAckTimeout, x.acks)
	}
	if x.can.has(pubsub.Feature_FEATURE_COLLAPSE) {
		b = wire.AppendString(b, delCollapseKey, o.CollapseKey)
	}
	if toGate(o) {
		b = wire.AppendLen(b, delReplay, sizePlace(o.Replay))
		b = wire.AppendUint(b, placeGate, o.Replay.Gate)
		b = wire.AppendUint(b, placeSeq, o.Replay.Seq)
		b = wire.AppendUint(b, placeAfter, o.Replay.After)
	}
	if x.log != (engine.Place{}) {
		b = appendLogPlace(b, x.log, x.exclude)
	}
	if dedupe {
		b = wire.AppendString(b, delSender, o.Sender)
	}
	for i := range o.Filter {
		m := &o.Filter[i]
		b = wire.AppendLen(b, delFilter, sizeMatch(m))
		b = wire.AppendString(b, matchKey, m.Key)
		b = wire.AppendStrings(b, matchValues, m.Values)
		if m.Not {
			b = wire.AppendUint(b, matchNot, 1)
		}
	}
	if x.names {
		b = wire.AppendUint(b, delNameFiltered, 1)
	}
	return b
}

func sizeMatch(m *engine.Match) int {
	n := wire.SizeString(matchKey, m.Key) + wire.SizeStrings(matchValues, m.Values)
	if m.Not {
		n += wire.SizeUint(matchNot, 1)
	}
	return n
}

func sizePlace(r *engine.Replay) int {
	return wire.SizeUint(placeGate, r.Gate) + wire.SizeUint(placeSeq, r.Seq) + wire.SizeUint(placeAfter, r.After)
}
