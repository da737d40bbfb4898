package node

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// version is the protocol that this node speaks.
const version = 1

// maxHelloBytes bounds what is kept of a manager for as long as its stream lives, and
// what a log line says of it.
const maxHelloBytes = 4 << 10

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

// accept reads the first frame.
func (s *Server) accept(call grpc.ServerStream) (*pubsub.Hello, error) {
	hello := new(pubsub.Hello)
	var f frame
	if err := call.RecvMsg(&f); err != nil {
		return hello, fmt.Errorf("receive hello: %w", err)
	}
	if !f.raw {
		s.plain.Do(func() {
			s.cfg.Logger.Warn("grpc server was made without node.ServerOptions: managers may be cut off for their keepalive pings")
		})
	}
	b, err := f.bytes()
	if err != nil {
		return hello, err
	}
	var r request
	if err := r.parse(b); err != nil {
		return hello, fmt.Errorf("%w: hello: %w", errBroken, err)
	}
	if !r.hasHello || r.hasMore() {
		return hello, fmt.Errorf("%w: the first frame must be hello and nothing else", errBroken)
	}
	if n := len(r.hello); n > maxHelloBytes {
		return hello, fmt.Errorf("%w: hello has %d bytes, the limit is %d", errBroken, n, maxHelloBytes)
	}
	if err := hello.UnmarshalVT(r.hello); err != nil {
		return hello, fmt.Errorf("%w: hello: %w", errBroken, err)
	}
	if n := len(hello.GetInstanceId()); n > maxInstanceBytes {
		return hello, fmt.Errorf("%w: %w: %d bytes", errBroken, errInstance, n)
	}
	// A manager speaks the version it offers and the one before it.
	if v := hello.GetProtocolVersion(); v != version && v != version+1 {
		return hello, fmt.Errorf("%w: protocol version %d, this node speaks %d", errBroken, v, version)
	}
	return hello, nil
}

// pick takes the best of the offered codecs that this node accepts.
func (s *Server) pick(hello *pubsub.Hello) pubsub.Codec {
	for _, c := range hello.GetCodecs() {
		if slices.Contains(s.codecs, c) {
			return c
		}
	}
	return pubsub.Codec_NONE
}

func (s *Server) reply(call grpc.ServerStream, hello *pubsub.Hello, codec pubsub.Codec) error {
	err := call.SendMsg(&pubsub.DeliverResponse{Hello: &pubsub.HelloReply{
		ProtocolVersion:    version,
		NodeId:             s.cfg.NodeID,
		BootId:             s.bootID,
		MaxAudienceMembers: clampUint32(s.cfg.MaxAudienceMembers),
		MaxUnacked:         clampUint32(s.cfg.MaxUnacked),
		OnlineUsers:        s.online(),
		Codec:              codec,
		Features:           s.features,
	}})
	if err != nil {
		return fmt.Errorf("reply to hello of %q: %w", hello.GetManagerId(), err)
	}
	return nil
}

var errDraining = status.Error(codes.Unavailable, "node is draining")
