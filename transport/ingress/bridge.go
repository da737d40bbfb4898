package ingress

import (
	"context"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// Service is one of those that the Server serves. Its handlers are gRPC's, and there are no others: a call that has come
// by another protocol enters here, with a context of Enter, and is let in, read, counted and answered as gRPC's are.
//
// Handlers of the push API answer what only Encode knows.
type Service struct {
	Desc *grpc.ServiceDesc
	Impl any
}

// Services are those of the Server, in the order in which gRPC got them.
func (s *Server) Services() []Service { return s.services }

// Call is a call that has come by another protocol: what a handler asks of gRPC's transport. One that wants its
// messages translated from what the client has sent implements Translator as well. Where it does not know how long a
// message is, it announces Config.MaxRecvBytes: Read may return less then, and one byte more says that it is too long.
type Call interface {
	grpc.ServerTransportStream
	rawCall
}

// Translator translates a message into protobuf, once there is memory for it: b is whole, and not used afterwards. An
// error should be an *engine.InvalidError.
type Translator interface {
	Translate(b []byte) ([]byte, error)
}

// Arrival is what is known of a call before it is read.
type Arrival struct {
	Conn     *throttle.Conn // of Listen
	Security credentials.AuthInfo
	Peer     net.Addr
	Header   metadata.MD // keys are in lower case. Not to be changed
	Method   string      // "/service/Method"
}

// Enter makes the context of a call from one that ends with it.
func (s *Server) Enter(ctx context.Context, a *Arrival, c Call) context.Context {
	ctx = grpc.NewContextWithServerTransportStream(ctx, c)
	ctx = metadata.NewIncomingContext(ctx, a.Header)
	ctx = peer.NewContext(ctx, &peer.Peer{Addr: a.Peer, AuthInfo: throttle.AuthInfo{AuthInfo: a.Security, Conn: a.Conn}})
	ctx, _ = s.tap(ctx, &tap.Info{FullMethodName: a.Method, Header: a.Header}) // it refuses nobody
	return ctx
}

// Receive reads a message of a service other than the push API. A large one waits for its turn until ctx ends, or for 2 s.
func (s *Server) Receive(ctx context.Context, c Call, into proto.Message) error {
	var in inbound
	var head [messageHead]byte
	m, err := s.next(c, head[:])
	if err == nil {
		err = in.fill(c, m)
	}
	if err == nil {
		err = s.convert(ctx, c, &in, m, maxSpaceWait)
	}
	if err != nil {
		return err
	}
	if err := proto.Unmarshal(in.wire, into); err != nil {
		return status.Error(codes.InvalidArgument, "request: is not valid protobuf")
	}
	return nil
}

// Refused is the error of a message that Receive could not read, as callers see it.
func (s *Server) Refused(err error) error { return s.statuses.of(unread(err)).status.Err() }

// Encode calls use with the bytes of what a handler has answered. They are not to be kept.
func (s *Server) Encode(v any, use func(wire []byte) error) error {
	data, err := s.codec.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode a reply: %w", err)
	}
	defer data.Free()
	if len(data) == 1 {
		return use(data[0].ReadOnlyData())
	}
	return use(data.Materialize())
}

// Listen has the connections of l bounded and throttled with those of gRPC, see throttle.Throttle.Listen.
func (s *Server) Listen(l net.Listener) net.Listener { return s.throttle.Listen(l) }

// TooManyConnections is the error of a call whose connection is one too many.
func (s *Server) TooManyConnections() error { return s.statuses.of(errTooManyConnections).status.Err() }

// errTooManyConnections refuses the first call of a connection for which there is no place.
var errTooManyConnections = fmt.Errorf("%w: too many connections", engine.ErrOverloaded)

// Drained is closed when clients are to go elsewhere: PushStreams end, and a server that Services has been lent to
// should tell its own clients.
func (s *Server) Drained() <-chan struct{} { return s.drained }

// Config is that of the Server, with the defaults.
func (s *Server) Config() Config { return s.cfg }
