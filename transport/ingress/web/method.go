package web

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/push-manager/push-manager/transport/ingress"
)

// method is one of those that gRPC serves, with a handler of connect: that finds out what is spoken, grants the time that
// the client has asked for and writes the reply. It reads nothing: the handler of gRPC does, from a call.
type method struct {
	srv       *Server
	procedure string // "/service/Method"
	impl      any
	in, out   protoreflect.MessageType

	unary                        grpc.MethodHandler // nil: it streams
	streaming                    grpc.StreamHandler
	clientStreams, serverStreams bool

	connect *connect.Handler
	last    atomic.Pointer[written]
}

// nothing is what connect has read.
type nothing struct{}

// answer is what it writes.
type answer struct {
	wire []byte
	of   protoreflect.MessageType
	last *atomic.Pointer[written] // nil: nothing is remembered
}

// written is a reply and its JSON. Most replies of a method are the same: a user that was simply reached.
type written struct{ wire, json []byte }

func (m *method) streams() bool { return m.unary == nil }

// methods are those of a service.
func (s *Server) methods(of ingress.Service) ([]*method, error) {
	var all []*method
	for _, d := range of.Desc.Methods {
		all = append(all, &method{procedure: "/" + of.Desc.ServiceName + "/" + d.MethodName, unary: d.Handler})
	}
	for _, d := range of.Desc.Streams {
		all = append(all, &method{procedure: "/" + of.Desc.ServiceName + "/" + d.StreamName, streaming: d.Handler, clientStreams: d.ClientStreams, serverStreams: d.ServerStreams})
	}
	for _, m := range all {
		m.srv, m.impl = s, of.Impl
		if err := m.findTypes(); err != nil {
			return nil, err
		}
		m.connect = m.handler()
	}
	return all, nil
}

// findTypes looks up what the method takes and answers in what the program has of .proto files.
func (m *method) findTypes() error {
	service, name, _ := strings.Cut(strings.TrimPrefix(m.procedure, "/"), "/")
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		return fmt.Errorf("%s: %w", m.procedure, err)
	}
	sd, ok := d.(protoreflect.ServiceDescriptor)
	if !ok {
		return fmt.Errorf("%s: %s is no service", m.procedure, service)
	}
	md := sd.Methods().ByName(protoreflect.Name(name))
	if md == nil {
		return fmt.Errorf("%s: is in no .proto file", m.procedure)
	}
	if m.in, err = protoregistry.GlobalTypes.FindMessageByName(md.Input().FullName()); err != nil {
		return fmt.Errorf("%s: %w", m.procedure, err)
	}
	if m.out, err = protoregistry.GlobalTypes.FindMessageByName(md.Output().FullName()); err != nil {
		return fmt.Errorf("%s: %w", m.procedure, err)
	}
	return nil
}

func (m *method) handler() *connect.Handler {
	options := []connect.HandlerOption{
		connect.WithCodec(codec{"proto"}), connect.WithCodec(codec{"json"}), connect.WithCodec(codec{"json; charset=utf-8"}),
		connect.WithCompression("gzip", nil, nil), // requests are decompressed as those of gRPC are, and replies are not compressed
	}
	switch {
	case m.unary != nil:
		return connect.NewUnaryHandler(m.procedure, m.serveUnary, options...)
	case m.clientStreams:
		return connect.NewBidiStreamHandler(m.procedure, func(ctx context.Context, s *connect.BidiStream[nothing, answer]) error {
			return m.serveStream(ctx, s.Conn())
		}, options...)
	default:
		return connect.NewServerStreamHandler(m.procedure, func(ctx context.Context, _ *connect.Request[nothing], s *connect.ServerStream[answer]) error {
			return m.serveStream(ctx, s.Conn())
		}, options...)
	}
}

// ServeHTTP implements http.Handler.
func (m *method) ServeHTTP(w http.ResponseWriter, r *http.Request) { m.serve(w, r, nil) }

// serve serves a request with a form of its own, see newCall.
func (m *method) serve(out http.ResponseWriter, r *http.Request, form func(b []byte) ([]byte, error)) {
	w, ok := out.(*response)
	if !ok {
		w = &response{ResponseWriter: out}
	}
	s := m.srv
	if m.clientStreams && r.ProtoMajor < 2 {
		w.Header().Set("Connection", "close")
		s.failWith(w, http.StatusHTTPVersionNotSupported, errNeedsHTTP2)
		return
	}
	c, in := connOf(r.Context()), s.newCall(w, r, m, form)
	if err := s.refused(asCall(in), r); err != nil {
		s.fail(w, r, err)
		return
	}
	r = r.WithContext(s.cfg.Ingress.Enter(r.Context(), s.arrival(r, m.procedure), in))
	r.Body = callOf(r.Context()).emptyMessage()
	if m.streams() {
		control := http.NewResponseController(w) // the deadlines of the server are for requests that end
		_ = errors.Join(control.SetReadDeadline(time.Time{}), control.SetWriteDeadline(time.Time{}))
		if !c.goesAt.IsZero() {
			defer time.AfterFunc(time.Until(c.goesAt), c.SendAway).Stop()
		}
	}
	m.connect.ServeHTTP(w, r)
}

// arrival is what is known of a request.
func (s *Server) arrival(r *http.Request, procedure string) *ingress.Arrival {
	c := connOf(r.Context())
	return &ingress.Arrival{Conn: c.Conn, Security: security(r), Peer: c.RemoteAddr(), Header: header(r.Header), Method: procedure}
}

// serveUnary is called by connect.
func (m *method) serveUnary(ctx context.Context, r *connect.Request[nothing]) (*connect.Response[answer], error) {
	c := callOf(ctx)
	reply, err := m.unary(m.impl, ctx, func(into any) error { return m.receive(ctx, into) }, nil)
	if err != nil {
		return nil, m.srv.failure(c, r.Peer().Protocol, err)
	}
	a := &answer{of: m.out, last: &m.last}
	if err := m.srv.cfg.Ingress.Encode(reply, a.copy); err != nil {
		return nil, m.srv.failure(c, r.Peer().Protocol, err)
	}
	m.srv.metrics.count(r.Peer().Protocol, "ok")
	return connect.NewResponse(a), nil
}

// copy keeps wire: connect uses the buffers that it is given for other messages.
func (a *answer) copy(wire []byte) error {
	a.wire = append(make([]byte, 0, len(wire)), wire...)
	return nil
}

// receive reads a message for a handler that does not do so itself.
func (m *method) receive(ctx context.Context, into any) error {
	message, isMessage := into.(proto.Message)
	in, isCall := grpc.ServerTransportStreamFromContext(ctx).(ingress.Call)
	if !isMessage || !isCall {
		return errInternal
	}
	err := m.srv.cfg.Ingress.Receive(ctx, in, message)
	if err == nil || errors.Is(err, io.EOF) && m.clientStreams {
		return err
	}
	return m.srv.cfg.Ingress.Refused(err)
}

// serveStream is called by connect.
func (m *method) serveStream(ctx context.Context, conn connect.StreamingHandlerConn) error {
	st := &stream{method: m, ctx: ctx, conn: conn}
	err := m.streaming(m.impl, st)
	st.end()
	if err != nil {
		return m.srv.failure(callOf(ctx), conn.Peer().Protocol, err)
	}
	m.srv.metrics.count(conn.Peer().Protocol, "ok")
	return nil
}

// stream is a grpc.ServerStream over one of connect.
type stream struct {
	method *method
	ctx    context.Context //nolint:containedctx // handlers of gRPC ask for it
	conn   connect.StreamingHandlerConn

	sending sync.Mutex
	ended   bool // guarded by sending
}

// streamBody is the body of a stream that came by HTTP/1.1.
type streamBody struct {
	io.ReadCloser

	reading sync.Mutex
	ended   bool // guarded by reading
}

func (b *streamBody) Read(p []byte) (int, error) {
	b.reading.Lock()
	defer b.reading.Unlock()
	if b.ended {
		return 0, errEnded
	}
	return b.ReadCloser.Read(p) //nolint:wrapcheck // an io.EOF is compared
}

// end keeps what is still under way of a handler that has returned, as it may be when its client is sent away, from the
// connection: net/http has it for another request then.
func (s *stream) end() {
	c := callOf(s.ctx)
	if b, ok := c.body.(*streamBody); ok { // HTTP/2 ends a read by itself
		_ = c.control.SetReadDeadline(time.Now())
		b.reading.Lock() // a read that is under way would have net/http take the deadline away
		b.ended = true
		b.reading.Unlock()
	}
	cut := time.AfterFunc(closeTime, func() { _ = c.control.SetWriteDeadline(time.Now()) }) // it waits for its client
	defer cut.Stop()
	s.sending.Lock()
	s.ended = true
	s.sending.Unlock()
}

var _ grpc.ServerStream = (*stream)(nil)

// Context implements grpc.ServerStream.
func (s *stream) Context() context.Context { return s.ctx }

// SetHeader implements grpc.ServerStream.
func (s *stream) SetHeader(metadata.MD) error { return nil }

// SendHeader implements grpc.ServerStream.
func (s *stream) SendHeader(metadata.MD) error { return nil }

// SetTrailer implements grpc.ServerStream.
func (s *stream) SetTrailer(md metadata.MD) {
	if len(md) > 0 {
		_ = callOf(s.ctx).SetTrailer(md) // it never fails
	}
}

// SendMsg implements grpc.ServerStream.
func (s *stream) SendMsg(v any) error {
	a := &answer{of: s.method.out}
	if err := s.method.srv.cfg.Ingress.Encode(v, a.copy); err != nil {
		return err //nolint:wrapcheck // it has context
	}
	s.sending.Lock()
	defer s.sending.Unlock()
	if s.ended {
		return errEnded
	}
	if err := s.conn.Send(a); err != nil {
		return fmt.Errorf("send a reply: %w", err)
	}
	return nil
}

// RecvMsg implements grpc.ServerStream.
func (s *stream) RecvMsg(v any) error { return s.method.receive(s.ctx, v) }
