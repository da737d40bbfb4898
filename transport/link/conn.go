package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
)

// rawConn is the connection below a stream: made before gRPC is, since most of what an
// attempt at a dead node costs is gRPC's, and kept for its end.
type rawConn struct {
	dial func(ctx context.Context, addr string) (net.Conn, error) // nil: TCP

	mu sync.Mutex
	// Guarded by mu.
	fresh net.Conn // that gRPC has not taken
	conn  lingerer // nil: none yet, or it is not TCP
}

var errOneConn = errors.New("a session has one connection")

// handshake is credentials that remember why they refused a node. gRPC tells it as a text.
type handshake struct {
	credentials.TransportCredentials

	mu sync.Mutex
	// Guarded by mu.
	err error
}

// ClientHandshake implements credentials.TransportCredentials.
func (h *handshake) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := h.TransportCredentials.ClientHandshake(ctx, authority, raw)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.err = err
	return conn, info, err //nolint:wrapcheck // gRPC asks whether it is one that it knows
}

// Clone implements credentials.TransportCredentials. There is one connection.
func (h *handshake) Clone() credentials.TransportCredentials { return h }

// failure is why there is no connection, nil if that has another cause.
func (h *handshake) failure() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var other interface{ NodeID() string }
	switch {
	case h.err == nil:
		return nil
	case errors.As(h.err, &other):
		return &wrongNodeError{said: other.NodeID()}
	}
	return fmt.Errorf("%w: %w", errHandshake, h.err)
}

// lingerer is a *net.TCPConn.
type lingerer interface {
	net.Conn
	SetLinger(seconds int) error
}

// connect makes the connection.
func (r *rawConn) connect(ctx context.Context, addr string) error {
	dial := r.dial
	if dial == nil {
		dial = func(ctx context.Context, addr string) (net.Conn, error) {
			d := net.Dialer{KeepAlive: -1} // the stream has heartbeats
			return d.DialContext(ctx, "tcp", addr)
		}
	}
	conn, err := dial(ctx, addr)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fresh = conn
	r.conn, _ = conn.(lingerer)
	return nil
}

// take hands the connection over to gRPC. There is no second one: who dials again waits
// for its turn.
func (r *rawConn) take(context.Context, string) (net.Conn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	conn := r.fresh
	r.fresh = nil
	if conn == nil {
		return nil, errOneConn
	}
	return conn, nil
}

// close ends a connection that gRPC has not taken.
func (r *rawConn) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fresh != nil {
		_ = r.fresh.Close()
	}
}

// abort closes the connection and throws away what was written and has not reached
// the node. The kernel would go on to send it for minutes: what the callers know as
// unknown since long ago would overtake, on a path that heals, what they have pushed
// since over the next stream. And gRPC would wait, for seconds, until a node that reads
// nothing has read its goodbye.
func (r *rawConn) abort() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn != nil {
		_ = r.conn.SetLinger(0) // both fail on a connection that is closed already
		_ = r.conn.Close()
	}
}
