package node

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"

	pubsub "github.com/push-manager/push-manager/proto"
)

var (
	errTooManyUnacked = errors.New("more deliveries without an ack than max_unacked")
	errSenderGone     = errors.New("stream is not writable")
)

// acks is what a stream owes to its manager: between the reader, which adds,
// and the sender, which takes all there is and writes it as one frame.
type acks struct {
	// Static after newAcks.
	maxUnacked int
	online     func() uint32
	receipts   *receipts
	wake       chan struct{} // 1: something is owed
	gone       chan struct{} // closed when the sender has ended

	mu   sync.Mutex
	room sync.Cond // signalled when misses were taken or the sender has ended

	// Guarded by mu.
	first     uint64 // seq of counts[0]
	counts    []uint32
	dups      []uint32 // of counts, empty as long as all are 0
	pending   []uint32 // likewise
	filtered  []uint32 // likewise
	misses    []*pubsub.Miss
	missBytes int
	replay    owedReplay
	closing   int                    // disconnects that are under way
	closed    []*pubsub.Disconnected // answers to disconnects
	reached   uint32                 // users of the largest broadcast among counts
	heartbeat uint64
	behind    uint64 // heartbeat follows the acks below this seq
	notice    bool   // the drain notice is owed
	finished  bool   // nothing will be added
	hasty     bool   // add does not wait for misses to be written
	dead      bool   // the sender has ended
}

// tally is what the deliveries of a frame have become.
type tally struct {
	counts        []uint32
	dups, pending []uint32 // of counts, empty where all are 0
	filtered      []uint32 // likewise
	misses        []*pubsub.Miss
	reached       uint32 // how many users the largest broadcast was handed over to, failed for, or left out
}

// padded is list, which is empty or has had n entries, with those of more behind it, likewise.
func padded(list []uint32, n int, more []uint32, k int) []uint32 {
	if len(list) == 0 && len(more) == 0 {
		return list
	}
	for len(list) < n {
		list = append(list, 0)
	}
	list = append(list, more...)
	for len(list) < n+k {
		list = append(list, 0)
	}
	return list
}

func newAcks(maxUnacked int, online func() uint32, count *counters) *acks {
	a := &acks{
		maxUnacked: maxUnacked,
		online:     online,
		wake:       make(chan struct{}, 1),
		gone:       make(chan struct{}),
		first:      1,
	}
	a.room.L = &a.mu
	a.receipts = newReceipts(maxUnacked, a.signal, count)
	return a
}

// add takes over what the deliveries since the last call have become. It waits
// only while a manager that does not read leaves more than pendingMissBytes
// here: then it is the manager's own stream that stands.
func (a *acks) add(t *tally) error {
	size := 0
	for _, m := range t.misses {
		size += missSize(m)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for size > 0 && a.missBytes > pendingMissBytes && !a.hasty && !a.dead {
		a.room.Wait()
	}
	if a.dead {
		return errSenderGone
	}
	n, k := len(a.counts), len(t.counts)
	if n+k > a.maxUnacked {
		return errTooManyUnacked
	}
	a.counts = append(a.counts, t.counts...)
	a.dups = padded(a.dups, n, t.dups, k)
	a.pending = padded(a.pending, n, t.pending, k)
	a.filtered = padded(a.filtered, n, t.filtered, k)
	a.misses = append(a.misses, t.misses...)
	a.missBytes += size
	a.reached = max(a.reached, t.reached)
	a.signal()
	return nil
}

// beat owes the answer to a heartbeat, behind the acks that are there. Of several
// unanswered ones the last is answered.
func (a *acks) beat(n uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.heartbeat, a.behind = n, a.first+uint64(len(a.counts))
	a.signal()
}

// drain owes the notice that the node goes, and gives up what clients have not acknowledged: managers
// store it before the clients are elsewhere.
func (a *acks) drain() {
	a.receipts.giveUpAll()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.notice = true
	a.signal()
}

// hurry ends the waiting of add, for a stream that has little more to add.
func (a *acks) hurry() {
	a.mu.Lock()
	a.hasty = true
	a.mu.Unlock()
	a.room.Broadcast()
}

// finish ends the sender once all that is owed has been written.
func (a *acks) finish() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finished = true
	a.signal()
}

func (a *acks) signal() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// sendLoop is the stream's sender. It ends when all is written after finish, or
// with the stream.
func (a *acks) sendLoop(stream grpc.ServerStream) error {
	defer func() {
		a.mu.Lock()
		a.dead = true
		a.replay, a.closed = owedReplay{}, nil
		a.mu.Unlock()
		a.receipts.forget()
		a.room.Broadcast()
		close(a.gone)
	}()
	var out outgoing
	var timer *time.Timer // of receipts; nil as long as there were none
	for {
		var due <-chan time.Time
		if wait, open := a.receipts.wait(time.Now()); open {
			if timer == nil {
				timer = time.NewTimer(wait)
				defer timer.Stop()
			} else {
				timer.Reset(wait)
			}
			due = timer.C
		}
		select {
		case <-a.wake:
		case <-due:
		}
		for a.take(&out) {
			// Of a broadcast's users some have come since the last heartbeat, and some are gone
			// by now: they must not be taken for a claim that is too large.
			if out.response.Heartbeat != 0 || out.reached > 0 {
				out.response.OnlineUsers = max(a.online(), out.reached)
			}
			if err := stream.SendMsg(&out.response); err != nil {
				return fmt.Errorf("send acks: %w", err)
			}
		}
		a.mu.Lock()
		done := a.finished && len(a.counts) == 0 && a.heartbeat == 0 && !a.notice && len(a.replay.nudges) == 0 && len(a.closed) == 0 && a.receipts.said()
		a.mu.Unlock()
		if done {
			return nil
		}
	}
}

// outgoing is the frame being written and what it is made of. Owned by the
// sender.
type outgoing struct {
	response pubsub.DeliverResponse
	acks     pubsub.AckRange
	ranges   [1]*pubsub.AckRange
	misses   []*pubsub.Miss
	reached  uint32 // users of the largest broadcast among the acks
}

// take moves what is owed into o, up to a frame full. False means that nothing
// is owed.
func (a *acks) take(o *outgoing) bool {
	r := &o.response
	r.Acks, r.Misses, r.Heartbeat, r.OnlineUsers, r.Drain = nil, nil, 0, 0, false
	o.reached = 0
	a.mu.Lock()
	defer a.mu.Unlock()
	written := a.first // The acks below are in frames before this one.
	n, k, size := a.fitLocked()
	if n > 0 {
		o.acks.First = a.first
		o.acks.Delivered = append(o.acks.Delivered[:0], a.counts[:n]...)
		o.acks.Duplicates, a.dups = taken(o.acks.Duplicates, a.dups, n)
		o.acks.Pending, a.pending = taken(o.acks.Pending, a.pending, n)
		o.acks.Filtered, a.filtered = taken(o.acks.Filtered, a.filtered, n)
		o.ranges[0] = &o.acks
		r.Acks = o.ranges[:]
		clear(o.misses)
		o.misses = append(o.misses[:0], a.misses[:k]...)
		r.Misses = o.misses

		a.first += uint64(n)
		a.counts = a.counts[:copy(a.counts, a.counts[n:])]
		left := copy(a.misses, a.misses[k:])
		clear(a.misses[left:])
		a.misses = a.misses[:left]
		a.missBytes -= size
		o.reached = a.reached
		if len(a.counts) == 0 {
			a.reached = 0
		}
		a.room.Broadcast()
	}
	if a.heartbeat != 0 && a.first >= a.behind {
		r.Heartbeat, a.heartbeat = a.heartbeat, 0
	}
	r.Drain, a.notice = a.notice, false
	a.replay.take(r)
	r.Disconnected, a.closed = cut(a.closed, ackFrameBytes/16)
	r.Receipts = a.receipts.take(nil, written, time.Now())
	return n > 0 || r.Heartbeat != 0 || r.Drain || len(r.Receipts) > 0 ||
		len(r.Catchups) > 0 || len(r.ReplayTaken) > 0 || len(r.NudgesTaken) > 0 ||
		len(r.LogReads) > 0 || r.LogFollow != nil || len(r.Disconnected) > 0
}

// taken moves n entries of list, which may be empty, into out: none if all are 0.
func taken(out, list []uint32, n int) (moved, rest []uint32) {
	out = out[:0]
	if len(list) == 0 {
		return out, list
	}
	for _, v := range list[:n] {
		if v != 0 {
			out = append(out, list[:n]...)
			break
		}
	}
	return out, list[:copy(list, list[n:])]
}

// owedReplay is what a stream owes of replay and of the logs of rooms. Guarded by acks.mu.
type owedReplay struct {
	catchups []*pubsub.Catchup
	taken    []*pubsub.ReplayTaken
	byGate   map[uint64]*pubsub.ReplayTaken // those in taken
	nudges   []uint64
	reads    []*pubsub.LogRead
	follow   *pubsub.LogFollow // the last one
}

func (a *acks) askCatchup(c *pubsub.Catchup) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dead {
		return
	}
	a.replay.catchups = append(a.replay.catchups, c)
	a.signal()
}

func (a *acks) askRead(read *pubsub.LogRead) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dead {
		return
	}
	a.replay.reads = append(a.replay.reads, read)
	a.signal()
}

func (a *acks) follow(f *pubsub.LogFollow) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dead {
		return
	}
	a.replay.follow = f
	a.signal()
}

func (a *acks) replayTaken(gate, seq uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dead {
		return
	}
	r := &a.replay
	if t := r.byGate[gate]; t != nil {
		t.Seq = seq
		return
	}
	t := &pubsub.ReplayTaken{Gate: gate, Seq: seq}
	if r.byGate == nil {
		r.byGate = make(map[uint64]*pubsub.ReplayTaken)
	}
	r.byGate[gate], r.taken = t, append(r.taken, t)
	a.signal()
}

// nudgesTaken answers nudges.
func (a *acks) nudgesTaken(tokens []uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.replay.nudges = append(a.replay.nudges, tokens...)
	a.signal()
}

// toDisconnect notes that a Disconnect is to be answered. It returns how many such answers are not written.
func (a *acks) toDisconnect() (unwritten int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closing++
	return a.closing + len(a.closed)
}

// disconnected answers a Disconnect.
func (a *acks) disconnected(token uint64, connections uint32, failed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closing--
	if a.dead {
		return
	}
	a.closed = append(a.closed, &pubsub.Disconnected{Token: token, Connections: connections, Failed: failed})
	a.signal()
}

// overdue tells that a manager that does not read has brought about more than it may.
func (a *acks) overdue() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := &a.replay
	return max(len(r.catchups), len(r.taken), len(r.nudges)) > a.maxUnacked
}

// take moves up to a frame full into r.
func (o *owedReplay) take(r *pubsub.DeliverResponse) {
	size, n := 0, 0
	for n < len(o.catchups) && size < ackFrameBytes {
		size += len(o.catchups[n].GetUserId()) + 24
		n++
	}
	r.Catchups, o.catchups = cut(o.catchups, n)
	r.ReplayTaken, o.taken = cut(o.taken, ackFrameBytes/24)
	for _, t := range r.ReplayTaken {
		delete(o.byGate, t.GetGate())
	}
	r.NudgesTaken, o.nudges = cut(o.nudges, ackFrameBytes/16)
	r.LogFollow, o.follow = o.follow, nil
	size, n = 0, 0
	for n < len(o.reads) && n < logReadsMost && size < ackFrameBytes {
		size += len(o.reads[n].GetRoomId()) + 10*len(o.reads[n].GetAfter()) + 32
		n++
	}
	r.LogReads, o.reads = cut(o.reads, n)
}

// cut takes up to n entries from the front.
func cut[T any](list []T, n int) (front, rest []T) {
	if n = min(n, len(list)); n == len(list) {
		return list, nil
	}
	return list[:n:n], list[n:]
}

// fitLocked says how many counts and misses go into the next frame, and the
// bytes of those misses. A miss stands with its ack; one that is larger than a
// frame goes alone with it.
func (a *acks) fitLocked() (n, k, size int) {
	n = min(len(a.counts), ackFrameCounts)
	for k < len(a.misses) {
		m := a.misses[k]
		at := int(m.Seq - a.first)
		if at >= n {
			break
		}
		s := missSize(m)
		if k > 0 && size+s > ackFrameBytes {
			n = at
			break
		}
		size += s
		k++
	}
	return n, k, size
}

// missSize estimates the bytes of m in a frame and in memory.
func missSize(m *pubsub.Miss) int {
	n := 32 + len(m.Reason)
	for _, u := range m.NotHere {
		n += len(u) + 3
	}
	for _, u := range m.Failed {
		n += len(u) + 3
	}
	for _, u := range m.Reused {
		n += len(u) + 3
	}
	for _, u := range m.Filtered {
		n += len(u) + 3
	}
	return n
}
