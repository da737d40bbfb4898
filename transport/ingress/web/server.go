package web

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

const (
	// idleTimeout is when a connection without requests is closed: longer than what balancers keep theirs (60 s).
	idleTimeout = 75 * time.Second
	// writeTime is how long a client may take to read a reply, besides the time of the push.
	writeTime = 30 * time.Second
	// frameSize is the largest frame of HTTP/2 that a client may send. It is the least that there can be.
	frameSize = 16 << 10
	// closeTime is how long handlers get to notice that their connections are closed.
	closeTime = 2 * time.Second
)

// Config of a Server. Ingress is required.
type Config struct {
	// Ingress lets calls in and serves them. Its bounds hold for ours: of connections, headers, messages and time.
	Ingress *ingress.Server
	// TLS is that of the connections, with both protocols in NextProtos. nil: they are plain.
	TLS *tls.Config
	// Origins are those whose pages may call, such as "https://chat.example". Others than those, and our own, may not.
	Origins []string
	// Console is what is below /console/. The zero value: nothing.
	Console Console
	Metrics *metrics.Set // nil: a set of its own
	Logger  *slog.Logger // nil: nothing is logged
}

// Server serves an ingress.Server over HTTP. It serves one listener.
type Server struct {
	// Static after New.
	cfg     Config
	limits  ingress.Config
	origins origins
	errors  *errorWriter
	mux     *http.ServeMux
	http    *http.Server
	metrics *instruments

	mu      sync.Mutex
	closed  bool           // no handler begins any more
	serving sync.WaitGroup // of handlers; begins with mu held
}

// New makes a Server. Nothing runs before Serve.
func New(cfg Config) (*Server, error) {
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, limits: cfg.Ingress.Config(), metrics: newInstruments(cfg.Metrics)}
	var err error
	if s.origins, err = newOrigins(cfg.Origins); err != nil {
		return nil, err
	}
	s.errors = newErrorWriter()
	if s.mux, err = s.routes(); err != nil {
		return nil, err
	}
	c := &s.limits
	s.http = &http.Server{
		Handler:           s,
		ReadHeaderTimeout: c.ConnectionTimeout,
		IdleTimeout:       idleTimeout,
		ReadTimeout:       c.Engine.Timeout() + c.BodyTimeout + writeTime, // as below: while a push is under way, its connection is read
		WriteTimeout:      c.Engine.Timeout() + c.BodyTimeout + writeTime, // of all but streams
		MaxHeaderBytes:    c.MaxHeaderBytes,
		Protocols:         new(http.Protocols),
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: c.MaxStreams, MaxReadFrameSize: frameSize,
			MaxReceiveBufferPerConnection: c.ConnWindow, MaxReceiveBufferPerStream: c.StreamWindow,
			SendPingTimeout: c.KeepaliveTime, PingTimeout: c.KeepaliveTimeout, WriteByteTimeout: writeTime,
		},
		ConnContext: s.opened,
		ErrorLog:    slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
	}
	s.http.Protocols.SetHTTP1(true)
	s.http.Protocols.SetHTTP2(true)
	s.http.Protocols.SetUnencryptedHTTP2(true)
	return s, nil
}

// Serve accepts connections until Drain, and returns nil then.
func (s *Server) Serve(l net.Listener) error {
	l = s.cfg.Ingress.Listen(l)
	if s.cfg.TLS != nil {
		l = tls.NewListener(l, s.cfg.TLS)
	}
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve HTTP at %s: %w", l.Addr(), err)
	}
	return nil
}

// Drain waits until the Ingress tells clients to go elsewhere, tells ours, and returns when they are answered. When ctx
// ends before, the rest is cut off and the error says so.
func (s *Server) Drain(ctx context.Context) error {
	select {
	case <-s.cfg.Ingress.Drained():
	case <-ctx.Done():
	}
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(fmt.Errorf("drain HTTP: %w", err), s.http.Close())
	}
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.serving.Wait()
	}()
	bound := time.NewTimer(closeTime)
	defer bound.Stop()
	select {
	case <-ended:
		return err
	case <-bound.C:
		return errors.Join(err, ingress.ErrStuck)
	}
}

// begin tells whether a handler may begin. One that does owes a Done to serving.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.serving.Add(1)
	}
	return !s.closed
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(out http.ResponseWriter, r *http.Request) {
	if !s.begin() {
		panic(http.ErrAbortHandler)
	}
	defer s.serving.Done()
	w := &response{ResponseWriter: out}
	defer func() {
		v := recover()
		switch {
		case v == nil:
			return
		case v == http.ErrAbortHandler: //nolint:errorlint,err113 // net/http compares it, too
			panic(v)
		}
		s.metrics.panics.Inc()
		s.cfg.Logger.Error("panic in a handler of HTTP", "panic", v, "stack", string(debug.Stack()))
		if w.began {
			panic(http.ErrAbortHandler)
		}
		s.fail(w, r, errInternal)
	}()
	conn := connOf(r.Context())
	if err := conn.Greet(security(r)); err != nil {
		w.Header().Set("Connection", "close")
		s.fail(w, r, s.cfg.Ingress.TooManyConnections())
		return
	}
	if conn.old() {
		w.Header().Set("Connection", "close") // with HTTP/2 it is a GOAWAY
	}
	if !s.admitOrigin(w, r) {
		return
	}
	s.mux.ServeHTTP(w, r)
}

// conn is a connection, as requests find it.
type conn struct {
	*throttle.Conn

	goesAt time.Time // zero: never
}

type connKey struct{}

func connOf(ctx context.Context) *conn {
	c, _ := ctx.Value(connKey{}).(*conn)
	return c
}

func (c *conn) old() bool { return !c.goesAt.IsZero() && time.Now().After(c.goesAt) }

// opened is called for each connection.
func (s *Server) opened(ctx context.Context, nc net.Conn) context.Context {
	if secured, ok := nc.(*tls.Conn); ok {
		nc = secured.NetConn()
	}
	c := &conn{}
	c.Conn, _ = nc.(*throttle.Conn)
	if age := s.limits.ConnectionAge; age > 0 {
		c.goesAt = time.Now().Add(tenthOff(age))
	}
	return context.WithValue(ctx, connKey{}, c)
}

// security is what is known of the other side of a connection.
func security(r *http.Request) credentials.AuthInfo {
	if r.TLS == nil {
		return plain{}
	}
	return credentials.TLSInfo{State: *r.TLS, CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
}

// plain is of a connection without TLS.
type plain struct{}

// AuthType implements credentials.AuthInfo.
func (plain) AuthType() string { return "insecure" }

// response notes what is written, and has the last word about the status.
type response struct {
	http.ResponseWriter

	status int // instead of another one; 0: none
	began  bool
}

// WriteHeader implements http.ResponseWriter.
func (w *response) WriteHeader(status int) {
	if w.status != 0 && status != http.StatusOK {
		status = w.status
	}
	w.began = true
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *response) Write(b []byte) (int, error) {
	w.began = true
	return w.ResponseWriter.Write(b) //nolint:wrapcheck // it is one
}

// Flush implements http.Flusher.
func (w *response) Flush() {
	if f, ok := w.ResponseWriter.(http.Flusher); ok {
		w.began = true
		f.Flush()
	}
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }
