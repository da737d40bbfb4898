package ingress

import (
	"context"
	"net"
	"runtime"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"

	"github.com/push-manager/push-manager/engine"
)

// forgetPriority is for how long one call speaks for the others on its connection.
const forgetPriority = time.Second

// conn is a connection that is not always read, see limiter.
type conn struct {
	net.Conn
	limiter *limiter
	let     chan struct{} // a token, when it may go on

	// The highest priority of its calls while there was a crowd, and when it was seen last.
	// One that has made no call yet is as good as critical: it may ask for health.
	priority atomic.Int32
	noted    atomic.Int64

	owes bool // owned by Read: what it brought in last may still be expected

	// Guarded by the limiter's lock.
	expected int64 // calls in what was read last
	counted  bool  // they are among those that the limiter expects
	lined    bool
	since    time.Duration
	closed   bool
	next     *conn
}

func newConn(raw net.Conn, l *limiter) *conn {
	c := &conn{Conn: raw, limiter: l, let: make(chan struct{}, 1)}
	c.priority.Store(int32(engine.Critical))
	return c
}

// note remembers the priority of a call.
func (c *conn) note(p engine.Priority, at time.Duration) {
	if int32(p) >= c.priority.Load() || at-time.Duration(c.noted.Load()) > forgetPriority {
		c.priority.Store(int32(p))
		c.noted.Store(int64(at))
	}
}

// Read reads, and keeps what it has read to itself until there is room for it. It is for
// one goroutine.
func (c *conn) Read(b []byte) (int, error) {
	l := c.limiter
	if c.owes {
		runtime.Gosched() // to the calls that it brought in: from then on they count themselves
		c.owes = false
		l.mu.Lock()
		c.settle()
		l.mu.Unlock()
	}
	if !l.crowded(l.shift(time.Since(l.began))) {
		return c.Conn.Read(b)
	}
	n, err := c.Conn.Read(b[:min(len(b), chunk)])
	if n > 0 {
		c.wait(n)
	}
	return n, err
}

// wait returns when there is room for the calls in n bytes.
func (c *conn) wait(n int) {
	l := c.limiter
	at := time.Since(l.began)
	p := engine.Priority(c.priority.Load())
	l.mu.Lock()
	if c.closed || l.closed {
		l.mu.Unlock()
		return
	}
	c.owes, c.expected = true, 1+int64(n)/callBytes
	if p == engine.Critical {
		c.count()
		l.mu.Unlock()
		return
	}
	c.lined, c.since = true, at
	l.lines[p.Rank()].push(c)
	if l.waiting.Add(1) == 1 {
		if l.timer == nil {
			l.timer = time.AfterFunc(sweep, l.sweep)
		} else {
			l.timer.Reset(sweep)
		}
	}
	l.letIn(at)
	l.mu.Unlock()
	<-c.let
}

// count lets the limiter expect what c has read. The lock is held.
func (c *conn) count() {
	c.counted = true
	c.limiter.expected += c.expected
}

// settle takes back what the limiter expects of c. The lock is held.
func (c *conn) settle() {
	if c.counted {
		c.counted = false
		c.limiter.expected -= c.expected
		c.limiter.letIn(time.Since(c.limiter.began))
	}
}

// Close closes the connection and ends a Read that waits.
func (c *conn) Close() error {
	err := c.Conn.Close()
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.lined && !c.closed {
		c.let <- struct{}{}
	}
	c.closed = true
	c.settle()
	return err
}

// heldCredentials are credentials whose connections are a limiter's. A call finds its own
// by connOf.
type heldCredentials struct {
	credentials.TransportCredentials
	limiter *limiter
}

type heldInfo struct {
	credentials.AuthInfo
	conn *conn
}

func insecureHeld(l *limiter) credentials.TransportCredentials {
	return heldCredentials{insecure.NewCredentials(), l}
}

// ServerHandshake implements credentials.TransportCredentials. gRPC keeps the raw connection
// for the options of the socket.
func (h heldCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c := newConn(raw, h.limiter)
	secured, info, err := h.TransportCredentials.ServerHandshake(c)
	return secured, heldInfo{info, c}, err
}

// Clone implements credentials.TransportCredentials.
func (h heldCredentials) Clone() credentials.TransportCredentials {
	return heldCredentials{h.TransportCredentials.Clone(), h.limiter}
}

// connOf is the connection that a call came on, nil if it is none of ours.
func connOf(ctx context.Context) *conn {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(heldInfo); ok {
			return info.conn
		}
	}
	return nil
}
