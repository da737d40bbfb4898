package node

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// maxInstanceBytes is the longest instance id of a manager.
const maxInstanceBytes = 64

var (
	errSuperseded = status.Error(codes.Aborted, "superseded by a newer stream of the same instance and shard")
	errLate       = status.Error(codes.Aborted, "a newer stream of the same instance and shard was here before")
	errInHands    = status.Error(codes.Unavailable, "the stream before this one still hands a delivery over")
	errInstance   = errors.New("instance_id is too long")
)

// seatKey names what has one stream at a time.
type seatKey struct {
	instance string
	shard    uint32
}

// seat orders the streams that one process of a manager opens for one shard: what an
// older one has not handed over when a newer one says hello is not handed over any more,
// so that nothing of it comes behind what the newer one brings. A manager without an
// instance id has no seats: by its name alone, two managers with one name would end each
// other's streams.
type seat struct {
	// hands is full while a stream of the seat hands deliveries over.
	hands chan struct{}

	// Guarded by Server.mu.
	newest  *stream
	streams int // that know of it
}

// sitLocked makes st the newest stream of its seat. The one before is superseded.
func (s *Server) sitLocked(st *stream, hello *pubsub.Hello) error {
	if hello.GetInstanceId() == "" || hello.GetNodeId() != "" && hello.GetNodeId() != s.cfg.NodeID {
		return nil // the latter hangs up when it hears who we are
	}
	st.key, st.attempt = seatKey{hello.GetInstanceId(), hello.GetShard()}, hello.GetAttempt()
	at := s.seats[st.key]
	switch {
	case at == nil:
		at = &seat{hands: make(chan struct{}, 1)}
		s.seats[st.key] = at
	case st.attempt != 0 && at.newest.attempt > st.attempt:
		return errLate
	default:
		at.newest.supersede()
	}
	st.seat, st.superseded = at, make(chan struct{})
	at.newest = st
	at.streams++
	return nil
}

// riseLocked takes st from its seat.
func (s *Server) riseLocked(st *stream) {
	if st.seat == nil {
		return
	}
	if st.seat.streams--; st.seat.streams == 0 {
		delete(s.seats, st.key)
	}
}

// supersede makes st hand nothing over any more, but for the delivery in its hands. It is
// called once, by the newest stream.
func (st *stream) supersede() {
	st.server.count.superseded.Inc()
	close(st.superseded)
	st.acks.hurry()
}

// isSuperseded tells whether a newer stream has said hello.
func (st *stream) isSuperseded() bool {
	select {
	case <-st.superseded: // nil, and never ready, without a seat
		return true
	default:
		return false
	}
}

// awaitHands waits until no older stream of the seat has a delivery in its hands.
func (st *stream) awaitHands(ctx context.Context, timeout time.Duration) error {
	if st.seat == nil {
		return nil
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case st.seat.hands <- struct{}{}:
		<-st.seat.hands
		return nil
	case <-st.superseded:
		return errSuperseded
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	case <-timer.C:
		// Nothing may overtake that delivery: the manager tries again.
		return errInHands
	}
}
