package node

import (
	"errors"
	"fmt"
	"sync"

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
	wake       chan struct{} // 1: something is owed
	gone       chan struct{} // closed when the sender has ended

	mu   sync.Mutex
	room sync.Cond // signalled when misses were taken or the sender has ended

	// Guarded by mu.
	first     uint64 // seq of counts[0]
	counts    []uint32
	misses    []*pubsub.Miss
	missBytes int
	reached   uint32 // users of the largest broadcast among counts
	heartbeat uint64
	behind    uint64 // heartbeat follows the acks below this seq
	notice    bool   // the drain notice is owed
	finished  bool   // nothing will be added
	hasty     bool   // add does not wait for misses to be written
	dead      bool   // the sender has ended
}

func newAcks(maxUnacked int, online func() uint32) *acks {
	a := &acks{
		maxUnacked: maxUnacked,
		online:     online,
		wake:       make(chan struct{}, 1),
		gone:       make(chan struct{}),
		first:      1,
	}
	a.room.L = &a.mu
	return a
}

// add takes over what the deliveries since the last call have become. It waits
// only while a manager that does not read leaves more than pendingMissBytes
// here: then it is the manager's own stream that stands.
// reached is to how many users the largest broadcast among them was handed over, or failed.
func (a *acks) add(counts []uint32, misses []*pubsub.Miss, reached uint32) error {
	size := 0
	for _, m := range misses {
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
	if len(a.counts)+len(counts) > a.maxUnacked {
		return errTooManyUnacked
	}
	a.counts = append(a.counts, counts...)
	a.misses = append(a.misses, misses...)
	a.missBytes += size
	a.reached = max(a.reached, reached)
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

// drain owes the notice that the node goes.
func (a *acks) drain() {
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
		a.mu.Unlock()
		a.room.Broadcast()
		close(a.gone)
	}()
	var out outgoing
	for range a.wake {
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
		done := a.finished && len(a.counts) == 0 && a.heartbeat == 0 && !a.notice
		a.mu.Unlock()
		if done {
			return nil
		}
	}
	return nil
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
	n, k, size := a.fitLocked()
	if n > 0 {
		o.acks.First = a.first
		o.acks.Delivered = append(o.acks.Delivered[:0], a.counts[:n]...)
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
	return n > 0 || r.Heartbeat != 0 || r.Drain
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
	return n
}
