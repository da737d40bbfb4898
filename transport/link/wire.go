package link

import (
	"context"
	"net"
	"sync"
)

// wire is the TCP connection below a stream, for its end.
type wire struct {
	dial func(ctx context.Context, addr string) (net.Conn, error) // nil: TCP

	mu sync.Mutex
	// Guarded by mu.
	conn lingerer // nil: none yet, or it is not TCP
}

// lingerer is a *net.TCPConn.
type lingerer interface {
	net.Conn
	SetLinger(seconds int) error
}

// connect dials for gRPC, which gets the connection as it is.
func (w *wire) connect(ctx context.Context, addr string) (net.Conn, error) {
	dial := w.dial
	if dial == nil {
		dial = func(ctx context.Context, addr string) (net.Conn, error) {
			d := net.Dialer{KeepAlive: -1} // the stream has heartbeats
			return d.DialContext(ctx, "tcp", addr)
		}
	}
	conn, err := dial(ctx, addr)
	if tcp, ok := conn.(lingerer); ok && err == nil {
		w.mu.Lock()
		w.conn = tcp
		w.mu.Unlock()
	}
	return conn, err
}

// abort closes the connection and throws away what was written and has not reached
// the node. The kernel would go on to send it for minutes: what the callers know as
// unknown since long ago would overtake, on a path that heals, what they have pushed
// since over the next stream. And gRPC would wait, for seconds, until a node that reads
// nothing has read its goodbye.
func (w *wire) abort() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conn != nil {
		_ = w.conn.SetLinger(0) // both fail on a connection that is closed already
		_ = w.conn.Close()
	}
}
