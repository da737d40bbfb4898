package e2e

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
)

// sampled is how many pushes of a stream share one measured latency: reading the
// clock costs as much as a push.
const sampled = 16

// streams pushes over PushStream calls.
func (r *run) streams(ctx context.Context) {
	all := r.messages.forStream(2 * r.load.InFlight)
	var wg sync.WaitGroup
	for i := range r.load.Streams {
		wg.Go(func() {
			t := r.tally()
			if err := r.stream(ctx, r.conns[i%len(r.conns)], all, t); err != nil {
				t.failed++
				t.err = err
			}
		})
	}
	wg.Wait()
}

// pushStream is one PushStream call under way. The sender goes ahead of the replies
// by at most the load's InFlight.
type pushStream struct {
	stream grpc.ClientStream
	all    []raw
	limit  int64

	answered atomic.Int64
	room     chan struct{} // a token when there may be room again
	sent     []atomic.Int64
}

func (r *run) stream(ctx context.Context, conn *grpc.ClientConn, all []raw, t *tally) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	desc := &grpc.StreamDesc{StreamName: "PushStream", ServerStreams: true, ClientStreams: true}
	st, err := conn.NewStream(ctx, desc, "/pubsub.PushManagerService/PushStream")
	if err != nil {
		return err
	}
	s := &pushStream{
		stream: st, all: all, limit: int64(r.load.InFlight),
		room: make(chan struct{}, 1), sent: make([]atomic.Int64, len(all)),
	}
	sending := make(chan int64, 1)
	go func() { // ends with the replies: cancel ends what is left
		n := s.send(ctx, r.until)
		_ = st.CloseSend()
		sending <- n
	}()
	err = s.receive(t, r.messages.streamClass())
	cancel()
	n := <-sending
	if err == nil && n != s.answered.Load() {
		err = errors.New("a stream ended with pushes that have no reply")
	}
	return err
}

// send pushes until the time is over and returns how many.
func (s *pushStream) send(ctx context.Context, until time.Time) (n int64) {
	for {
		for n-s.answered.Load() >= s.limit {
			select {
			case <-s.room:
			case <-ctx.Done():
				return n
			}
		}
		i := int(n) % len(s.all)
		if n%sampled == 0 {
			now := time.Now()
			if !now.Before(until) {
				return n
			}
			s.sent[i].Store(now.UnixNano())
		}
		if s.stream.SendMsg(&s.all[i]) != nil {
			return n // the receiver gets the reason
		}
		n++
	}
}

// receive reads replies until the stream ends.
func (s *pushStream) receive(t *tally, c class) error {
	var reply raw
	defer func() { t.last = time.Now() }()
	for {
		if err := s.stream.RecvMsg(&reply); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		id, ok := streamReply(reply.b)
		t.done++
		if !ok || id >= len(s.sent) {
			t.failed++
			id = 0
		}
		if at := s.sent[id].Swap(0); at != 0 {
			t.latency[c].Add(time.Duration(time.Now().UnixNano() - at))
		}
		if s.answered.Add(1)%(s.limit/4+1) == 0 {
			select {
			case s.room <- struct{}{}:
			default:
			}
		}
	}
}
