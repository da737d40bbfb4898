package link

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// disconnectWait is how long nodes have to answer.
	disconnectWait = time.Second
	// disconnectLook is how often a node without a stream is looked at again meanwhile.
	disconnectLook = 25 * time.Millisecond
	// disconnectsMax bounds those of one stream that its node has not answered, disconnectsFrame those in one frame.
	disconnectsMax, disconnectsFrame = 256, 16
	// behindPushes is how long one waits for pushes that were queued before it.
	behindPushes = 200 * time.Millisecond
)

// Field numbers of proto/connect_node.proto.
const (
	reqDisconnects = 13

	disconnectToken, disconnectUser, disconnectDevice, disconnectRoom   = 1, 2, 3, 4
	disconnectCode, disconnectReason, disconnectRefuse, disconnectAllow = 5, 6, 7, 8
	disconnectRevision                                                  = 9
	disconnectedToken, disconnectedCount, disconnectedFailed            = 1, 2, 3
)

// Disconnect is what nodes are asked for, see proto/connect_node.proto.
type Disconnect struct {
	User, Device, Room string
	Code               uint16
	Reason             string
	// Refuse is for how long they may not come back, AllowAgain ends that. Revision is where etcd has either.
	Refuse     time.Duration
	AllowAgain bool
	Revision   int64
}

// Disconnected is the answer of one node.
type Disconnected struct {
	Node        string
	Connections int
	// Failure says why the node has not done it, "" if it has. MayBeDone says that it may have.
	Failure   string
	MayBeDone bool
}

const (
	noDisconnect     = "node cannot disconnect"
	failedDisconnect = "node failed while it disconnected"
)

// Disconnect asks every registered node, and returns their answers in the order of their ids: after a second at the latest, or at the
// end of ctx. The message goes over the link of a shard, behind pushes that are queued there, but for those that wait longer
// than 200 ms; over another link of a node where that one is not up. A node that is connecting is waited for.
func (s *Set) Disconnect(ctx context.Context, shard int, d *Disconnect) []Disconnected {
	ctx, cancel := context.WithTimeout(ctx, disconnectWait)
	defer cancel()
	nodes := s.snapshot.Load().nodes
	answers := make([]Disconnected, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() { answers[i] = n.disconnect(ctx, shard, d) })
	}
	wg.Wait()
	for i := range answers {
		switch a := &answers[i]; {
		case a.Failure == "":
			s.meters.disconnected.Add(a.Connections)
			s.meters.disconnectsDone.Inc()
		case a.MayBeDone:
			s.meters.disconnectsUnknown.Inc()
		default:
			s.meters.disconnectsFailed.Inc()
		}
	}
	return answers
}

// disconnect asks one node.
func (n *node) disconnect(ctx context.Context, shard int, d *Disconnect) Disconnected {
	a := Disconnected{Node: n.id}
	for {
		var asked *asked
		why := engine.DropUnreachable.String()
		for _, l := range slices.Concat(n.links[shard:shard+1], n.links[:shard], n.links[shard+1:]) {
			var refused string
			if asked, refused = l.disconnect(d); asked != nil {
				break
			}
			why = cmp.Or(refused, why)
		}
		switch {
		case asked == nil && why == noDisconnect:
			a.Failure = why
			return a
		case asked != nil:
			select {
			case said := <-asked.answer:
				if said.token != 0 {
					if a.Connections, a.MayBeDone = int(said.connections), said.failed; said.failed {
						a.Failure = failedDisconnect
					}
					return a
				}
				if a.MayBeDone = asked.giveUp(); a.MayBeDone {
					a.Failure = engine.LostStream.String()
					return a
				}
			case <-ctx.Done():
				a.Failure = engine.DropExpired.String()
				if a.MayBeDone = asked.giveUp(); a.MayBeDone {
					a.Failure = engine.LostAck.String()
				}
				return a
			}
		}
		if !pause.For(ctx, disconnectLook) {
			a.Failure = why
			return a
		}
	}
}

// asked is a Disconnect on its way over a stream.
type asked struct {
	// Static.
	*Disconnect
	stream *stream
	token  uint64
	at     int64             // running time
	answer chan disconnected // holds one; without a token: the stream has ended

	taken bool // the writer has, or has had, it in a frame; guarded by link.mu
}

// disconnects are those of one stream that its node has not answered. Guarded by link.mu.
type disconnects struct {
	open    map[uint64]*asked // nil while there are none
	waiting []*asked          // of those, not written; by token
	last    uint64            // token
}

// disconnect puts d on its way, or says why not, "" while no stream is up.
func (l *Link) disconnect(d *Disconnect) (a *asked, why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == unary {
		return nil, noDisconnect
	}
	s, ok := l.way.(*stream)
	if !ok || s.dead || l.endsLocked() {
		return nil, ""
	}
	if !s.can.has(pubsub.Feature_FEATURE_DISCONNECT) {
		return nil, noDisconnect
	}
	q := &s.disconnects
	if len(q.open) >= disconnectsMax {
		return nil, engine.DropQueueFull.String()
	}
	if q.open == nil {
		q.open = make(map[uint64]*asked)
	}
	q.last++
	a = &asked{Disconnect: d, stream: s, token: q.last, at: l.set.clock.ran.Load(), answer: make(chan disconnected, 1)}
	q.open[a.token] = a
	q.waiting = append(q.waiting, a)
	l.tickNow()
	s.wakeLocked()
	return a, ""
}

// giveUp ends the waiting for an answer. It tells whether the node may have been asked.
func (a *asked) giveUp() (taken bool) {
	l := a.stream.link
	l.mu.Lock()
	defer l.mu.Unlock()
	q := &a.stream.disconnects
	delete(q.open, a.token)
	q.waiting = slices.DeleteFunc(q.waiting, func(b *asked) bool { return b == a })
	return a.taken
}

// due is the waiting ones that may be written now, a frame's worth at most: those in front of which no push is queued, and those that
// have waited for pushes long enough.
func (q *disconnects) due(pushes *queue, ran int64) []*asked {
	n := 0
	for n < len(q.waiting) && n < disconnectsFrame {
		a := q.waiting[n]
		if pushes.len > 0 && pushes.slot(0).at <= a.at && ran-a.at < int64(behindPushes) {
			break
		}
		n++
	}
	return q.waiting[:n]
}

// wrote lets go of those that are on their way, with tokens up to last.
func (q *disconnects) wrote(last uint64) {
	q.waiting = slices.DeleteFunc(q.waiting, func(a *asked) bool { return a.token <= last })
	if len(q.waiting) == 0 {
		q.waiting = nil
	}
}

// popAll tells all that the stream has ended.
func (q *disconnects) popAll() {
	for _, a := range q.open {
		a.answer <- disconnected{}
	}
	q.open, q.waiting = nil, nil
}

// disconnected acts on answers of the node, and counts those that cannot be. One that comes too late is ignored.
func (s *stream) disconnected() (strikes int) {
	r := &s.r.resp
	if len(r.disconnected) == 0 {
		return 0
	}
	if !s.can.has(pubsub.Feature_FEATURE_DISCONNECT) {
		return 1
	}
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	q := &s.disconnects
	for _, d := range r.disconnected {
		a, ok := q.open[d.token]
		switch {
		case d.token == 0 || d.token > q.last || ok && !a.taken:
			strikes++
		case ok:
			delete(q.open, d.token)
			a.answer <- d
		}
	}
	return strikes
}

func (a *asked) size() int {
	return wire.SizeUint(disconnectToken, a.token) + wire.SizeString(disconnectUser, a.User) + wire.SizeString(disconnectDevice, a.Device) +
		wire.SizeString(disconnectRoom, a.Room) + wire.SizeUint(disconnectCode, uint64(a.Code)) + wire.SizeString(disconnectReason, a.Reason) +
		wire.SizeUint(disconnectRefuse, uint64(a.Refuse.Milliseconds())) + wire.SizeUint(disconnectAllow, flag(a.AllowAgain)) +
		wire.SizeUint(disconnectRevision, uint64(a.Revision))
}

func (a *asked) append(b []byte, size int) []byte {
	b = wire.AppendLen(b, reqDisconnects, size)
	b = wire.AppendUint(b, disconnectToken, a.token)
	b = wire.AppendString(b, disconnectUser, a.User)
	b = wire.AppendString(b, disconnectDevice, a.Device)
	b = wire.AppendString(b, disconnectRoom, a.Room)
	b = wire.AppendUint(b, disconnectCode, uint64(a.Code))
	b = wire.AppendString(b, disconnectReason, a.Reason)
	b = wire.AppendUint(b, disconnectRefuse, uint64(a.Refuse.Milliseconds()))
	b = wire.AppendUint(b, disconnectAllow, flag(a.AllowAgain))
	return wire.AppendUint(b, disconnectRevision, uint64(a.Revision))
}

func flag(is bool) uint64 {
	if is {
		return 1
	}
	return 0
}

// disconnected is a Disconnected of a node.
type disconnected struct {
	token       uint64
	connections uint32
	failed      bool
}

func (d *disconnected) decode(b []byte) error {
	m := wire.Reader{Rest: b}
	for m.Next() {
		switch {
		case m.IsUint(disconnectedToken):
			d.token = m.Uint
		case m.IsUint(disconnectedCount):
			d.connections = saturated(m.Uint)
		case m.IsUint(disconnectedFailed):
			d.failed = m.Uint != 0
		}
	}
	return m.Err
}
