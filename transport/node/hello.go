package node

import (
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// helloTimeout bounds how long a stream may stay without a hello. A manager sends it with the
// opening of the stream, and waits for the answer for a second.
const helloTimeout = 5 * time.Second

// greeted awaits the hello of a new stream. Streams without one are bounded in time and in
// number: one more costs the oldest its place, because who means to speak does so at once.
func (s *Server) greeted(call grpc.ServerStream) (*pubsub.Hello, error) {
	ended := make(chan struct{}) // closed when a newer one needs the place
	s.mu.Lock()
	if s.draining.Load() {
		s.mu.Unlock()
		return nil, errDraining
	}
	if s.silent.Len() >= s.cfg.MaxStreams {
		close(s.silent.Remove(s.silent.Front()).(chan struct{}))
	}
	place := s.silent.PushBack(ended)
	s.calls.Add(1)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.silent.Remove(place)
		s.mu.Unlock()
	}()

	var hello *pubsub.Hello
	done := make(chan error, 1)
	go func() { // The end of the call ends it.
		defer s.calls.Done()
		var err error
		defer func() { done <- err }()
		defer guarded{s}.caught("Deliver", &err)
		hello, err = s.accept(call)
	}()
	timer := time.NewTimer(helloTimeout)
	defer timer.Stop()
	select {
	case err := <-done:
		return hello, err
	case <-timer.C:
		return nil, fmt.Errorf("%w: no hello within %v", errBroken, helloTimeout)
	case <-ended:
		return nil, fmt.Errorf("%w: no hello, and %d newer streams have none", errBroken, s.cfg.MaxStreams)
	}
}

var errDraining = status.Error(codes.Unavailable, "node is draining")
