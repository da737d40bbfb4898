package node

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"time"

	"github.com/push-manager/push-manager/internal/position"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Options are what a push with options asks of the node. A message without any has none (nil): it is
// handed over by Deliver or Broadcast and nothing is to be remembered of it. They are read-only and
// may be kept; the strings share the memory of the frame, as those of [Message] do.
type Options struct {
	// ID names the message among those of Sender, "" for a message without an id. Sender is ""
	// where callers are not told apart.
	ID, Sender string
	// Key is a keyed hash of Sender and ID, 0 without an ID. The key is chosen by the process.
	Key uint64
	// PayloadHash tells contents apart that came under one ID.
	PayloadHash uint32
	// Expires is when the message must not be shown any more. Zero: never.
	Expires time.Time
	// WantsAck: clients that can acknowledge shall do so by AckBy.
	WantsAck bool
	AckBy    time.Time
	// Collapse is a hash of CollapseKey, 0 without one. While a message waits for a user, a newer
	// one with the same key takes its place.
	CollapseKey string
	Collapse    uint64
	// Seq is the message's place in the store, 0 for one that is not out of it.
	Seq uint64
	// Log is the place of a message to a room in the room's log, nil for one that does not stand there.
	Log *LogPlace

	ask *ask // whose answer it is; nil: not out of the store
}

// Taken says that the client of the connection has the message, which is out of the store, or that it need
// not have it any more: the store may forget it. [Inbox] says it. For any other message it does nothing.
func (o *Options) Taken() {
	if o.Replayed() {
		o.ask.taken(o.Seq)
	}
}

// Replayed tells that the message is out of the store.
func (o *Options) Replayed() bool { return o != nil && o.ask != nil }

// Expired tells that the message must not be shown any more.
func (o *Options) Expired(now time.Time) bool {
	return o != nil && !o.Expires.IsZero() && !now.Before(o.Expires)
}

// Lasting is what Sessions also are that take part in lasting delivery: in message ids, acknowledgements
// by clients, expiry, collapse keys and replay, or in pushes to several rooms. [Users] made with [NewLastingUsers] are.
// Other Sessions get no message with Options, nor one with Rooms.
type Lasting interface {
	// Features says in which: of FEATURE_DEDUPE, _CLIENT_ACK, _EXPIRY, _COLLAPSE, _REPLAY, _ROOM_LOG and _ROOMS. It is
	// asked once, by New.
	Features() []pubsub.Feature
	// DeliverLasting is Deliver for a message with Options. Where the outcome is Pending, c has
	// been told by [Confirmation.Expect] of each connection that will call Acked or GaveUp, and
	// it counts no connection for any other outcome. c is nil for a message that wants no ack.
	DeliverLasting(user string, m *Message, c *Confirmation) Outcome
}

// LastingConn is a connection as [NewLastingUsers] knows it. It keeps an [Inbox].
type LastingConn interface {
	Conn

	// DeliverLasting is Deliver for a message with Options: under the connection's lock it asks
	// [Inbox.Check], then looks for room in its queue, then calls [Inbox.Take]. c is nil for a
	// message that wants no ack.
	DeliverLasting(m *Message, c *Confirmation) Outcome
}

// Confirmation is where connections say whether the client of a user has acknowledged one message: [Inbox]
// does it for them. The user is confirmed with the first Acked, and given up with the last GaveUp, or at
// Options.AckBy. What is said later says nothing. The methods may be called from any goroutine, with the
// connection's lock held; they wait for nobody and call nobody back.
type Confirmation struct {
	// Static.
	of   *awaited
	user string

	// Guarded by of.receipts.mu.
	open   int  // connections that may acknowledge yet, and the handing over
	acked  bool // one has
	sealed bool // the handing over is done, and its outcome was Pending
	done   bool // counted, or of no use
}

// Expect says that one more connection has taken the message and will call Acked or GaveUp.
func (c *Confirmation) Expect() {
	if c == nil {
		return
	}
	c.of.receipts.expect(c)
}

// Acked says that a client has acknowledged.
func (c *Confirmation) Acked() {
	if c == nil {
		return
	}
	c.of.receipts.acked(c)
}

// GaveUp says that a connection will not acknowledge any more.
func (c *Confirmation) GaveUp() {
	if c == nil {
		return
	}
	c.of.receipts.gaveUp(c)
}

var (
	errFeature      = errors.New("Sessions.Features: not a feature of lasting delivery")
	errRoomLogAlone = errors.New("Sessions.Features: FEATURE_ROOM_LOG needs FEATURE_DEDUPE: a message may come twice")
)

// lastingParts are the features that Lasting names.
type lastingParts struct{ dedupe, clientAck, expiry, collapse, replay, roomLog, rooms bool }

func partsOf(features []pubsub.Feature) (p lastingParts, err error) {
	for _, f := range features {
		switch f {
		case pubsub.Feature_FEATURE_DEDUPE:
			p.dedupe = true
		case pubsub.Feature_FEATURE_CLIENT_ACK:
			p.clientAck = true
		case pubsub.Feature_FEATURE_EXPIRY:
			p.expiry = true
		case pubsub.Feature_FEATURE_COLLAPSE:
			p.collapse = true
		case pubsub.Feature_FEATURE_REPLAY:
			p.replay = true
		case pubsub.Feature_FEATURE_ROOM_LOG:
			p.roomLog = true
		case pubsub.Feature_FEATURE_ROOMS:
			p.rooms = true
		default:
			return p, fmt.Errorf("%w: %v", errFeature, f)
		}
	}
	return p, nil
}

// hashKey keys the hashes of ids, so that nobody outside can choose two that collide.
var hashKey = maphash.MakeSeed() //nolint:gochecknoglobals // a constant of the process: all streams and servers compare keys

// hashOf is the hash of name among those of sender, never 0.
func hashOf(kind byte, sender, name string) uint64 {
	var h maphash.Hash
	h.SetSeed(hashKey)
	var head [9]byte
	head[0] = kind
	binary.LittleEndian.PutUint64(head[1:], uint64(len(sender)))
	_, _ = h.Write(head[:])
	_, _ = h.WriteString(sender)
	_, _ = h.WriteString(name)
	return max(h.Sum64(), 1)
}

// options are those of d as far as the node takes part, nil if that is nothing.
func (st *stream) options(d *delivery) *Options {
	does := &st.server.does
	o := new(Options)
	takes := false
	if does.dedupe && d.messageID != "" {
		o.ID, o.Sender, o.PayloadHash, takes = d.messageID, d.sender, d.payloadHash, true
		o.Key = hashOf('i', d.sender, d.messageID)
	}
	if does.expiry && d.ttl > 0 {
		o.Expires, takes = st.now().Add(time.Duration(d.ttl)*time.Millisecond), true
	}
	if does.clientAck && d.wantAck {
		o.WantsAck, takes = true, true
		o.AckBy = st.now().Add(time.Duration(cmp.Or(d.ackTimeout, defaultAckTimeout)) * time.Millisecond)
	}
	if does.collapse && d.collapse != "" {
		o.CollapseKey, takes = d.collapse, true
		o.Collapse = hashOf('c', d.sender, d.collapse)
	}
	if does.replay && d.hasReplay {
		o.Seq, takes = d.replay.seq, true
	}
	if does.roomLog && d.hasLog {
		if d.log.Partition >= position.MaxPartitions {
			st.server.count.logIgnored.Inc()
		} else {
			log := d.log
			o.Log, takes = &log, true
		}
	}
	if !takes {
		return nil
	}
	return o
}

// now is when the frame in hand has come, as near as it is worth.
func (st *stream) now() time.Time {
	if st.came.IsZero() {
		st.came = time.Now()
	}
	return st.came
}

const (
	defaultAckTimeout = 2000 // ms
	reasonExpired     = "expired"
	reasonStalled     = "client does not acknowledge"
	reasonTooMany     = "too many deliveries wait for acknowledgements"
	reasonBehind      = "behind a message that did not come"
)

// deliverLasting hands over a message with Options or a filter.
func (st *stream) deliverLasting(users []string, skip []int32, m *Message, o *handover) {
	s, d := st.server, &st.delivery
	switch {
	case s.does.replay && d.hasReplay:
		st.deliverReplay(users, m, o)
		return
	case m.Options.Expired(time.Now()):
		st.failAll(users, skip, reasonExpired, o)
		o.expired = len(o.failed) + o.failedUsers
		return
	case d.everybody, d.scope != "":
		if m.Options != nil {
			m.Options.WantsAck = false // Nobody could be named who does not.
		}
		s.broadcast(d.scope, d.filter, m, o)
		st.tally.reached = max(st.tally.reached, clampUint32(o.delivered+o.failedUsers+o.filtered))
		return
	}
	var waits *awaited
	if m.Options != nil && m.Options.WantsAck {
		if waits = st.acks.receipts.await(st.next, m.Options.AckBy, len(users)-len(skip)); waits == nil {
			st.failAll(users, skip, reasonTooMany, o)
			return
		}
	}
	o.filters, o.namesLeft = len(d.matches) > 0, d.namesLeft
	s.handOverLasting(users, skip, d.filter, m, waits, o)
	if waits != nil {
		o.pending = waits.handedOver()
	}
}

// failAll fails all users of the delivery in hand.
func (st *stream) failAll(users []string, skip []int32, reason string, o *handover) {
	o.reason = reason
	if st.delivery.everybody || st.delivery.scope != "" {
		o.failedUsers = int(st.server.online())
		st.tally.reached = max(st.tally.reached, clampUint32(o.failedUsers))
		return
	}
	o.failFrom(0, users, skip)
}

// handOverLasting is handOver for a message with Options or a filter.
func (s *Server) handOverLasting(users []string, skip []int32, f Filter, m *Message, waits *awaited, o *handover) {
	defer func() {
		if r := recover(); r != nil {
			s.panicked("DeliverLasting", r)
			o.fail(users, skip)
		}
	}()
	k := 0
	for i, user := range users {
		o.next = i
		if k < len(skip) && int(skip[k]) == i {
			k++
			continue
		}
		var c *Confirmation
		if waits != nil {
			c = waits.confirmation(user)
		}
		var out Outcome
		if o.filters {
			out = s.filtering.DeliverFiltered(user, f, m, c)
		} else {
			out = s.lasting.DeliverLasting(user, m, c)
		}
		o.note(user, out)
		if c != nil {
			waits.settle(c, out)
		}
	}
}

// note counts what became of a message with Options or a filter for one user.
func (o *handover) note(user string, out Outcome) {
	switch out {
	case Filtered:
		switch {
		case !o.filters: // Nobody has asked for that.
			o.failed = append(o.failed, user)
			return
		case o.namesLeft:
			o.leftOut = append(o.leftOut, user)
		}
		o.filtered++
	case Delivered, Pending:
		o.delivered++
	case Duplicate:
		o.delivered++
		o.duplicates++
	case NotHere:
		o.notHere = append(o.notHere, user)
	case Reused:
		o.reused = append(o.reused, user)
	case Expired:
		o.expired++
		o.failed, o.reason = append(o.failed, user), reasonExpired
	case Stalled:
		o.failed, o.reason = append(o.failed, user), reasonStalled
	default:
		o.failed = append(o.failed, user)
	}
}

// deliverReplay hands a message out of the store to the connection that has asked for it.
func (st *stream) deliverReplay(users []string, m *Message, o *handover) {
	place := &st.delivery.replay
	if len(users) != 1 {
		o.refused, o.reason = true, "a message out of the store is for one user"
		return
	}
	r := st.server.replays
	a, behind := r.route(place.gate, place.seq, place.after, users[0], time.Now())
	switch {
	case behind:
		o.refused, o.reason = true, reasonBehind
		return
	case a == nil:
		o.notHere = append(o.notHere, users[0])
		return
	}
	m.Options.ask = a
	var waits *awaited
	if m.Options.WantsAck {
		waits = st.acks.receipts.await(st.next, m.Options.AckBy, 1)
	}
	out := Failed
	func() {
		defer func() {
			if v := recover(); v != nil {
				st.server.panicked("DeliverLasting", v)
				o.reason = reasonPanic
			}
		}()
		var c *Confirmation
		if waits != nil {
			c = waits.confirmation(users[0])
		}
		out = a.gate.conn.DeliverLasting(m, c)
		if c != nil {
			waits.settle(c, out)
		}
	}()
	o.note(users[0], out)
	r.handed(a, place.seq, out)
	if waits != nil {
		o.pending = waits.handedOver()
	}
}
