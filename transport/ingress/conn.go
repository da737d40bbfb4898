package ingress

import (
	"context"
	"net"
	"runtime"
	"sync/atomic"
	"syscall"
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
	socket  syscall.RawConn // nil: nobody knows what waits in there
	let     chan struct{}   // a token, when it may go on

	// The highest priority of its calls lately, and when it was seen last. One that has made
	// no call yet may ask for health: it counts as high.
	priority atomic.Int32
	noted    atomic.Int64
	made     atomic.Int64 // calls
	// lag is for how long, at the most, what was read last had waited. It is known while
	// there is a crowd, else 0.
	lag atomic.Int64
	// expected is how many calls may be in what was read last, which have not shown up yet.
	expected atomic.Int64

	// Owned by Read.
	taken int64 // bytes
	calls int64 // in what was read last, about
	age   age

	// Guarded by the limiter's lock.
	lined  bool
	since  time.Duration
	closed bool
	next   *conn
}

// age bounds for how long bytes have been here. It remembers how many had come by one
// moment: whatever is behind those came later.
type age struct {
	mark  int64         // so many had come
	at    time.Duration // by then
	after time.Duration // what is read now came after this
}

// read notes that, at a time, so many have been read and so many more are here.
func (a *age) read(taken, here int64, at time.Duration) {
	if taken >= a.mark {
		a.after = max(a.after, a.at)
		a.mark, a.at = taken+here, at
	}
}

func newConn(raw net.Conn, l *limiter) *conn {
	c := &conn{Conn: raw, limiter: l, let: make(chan struct{}, 1)}
	if s, ok := raw.(syscall.Conn); ok {
		c.socket, _ = s.SyscallConn() // nobody knows, then
	}
	c.priority.Store(int32(engine.High))
	c.noted.Store(-int64(forgetPriority) - 1)
	return c
}

// note remembers the priority of a call.
func (c *conn) note(p engine.Priority, at time.Duration) {
	c.made.Add(1)
	known, since := engine.Priority(c.priority.Load()), at-time.Duration(c.noted.Load())
	switch {
	case p > known || since > forgetPriority:
		c.priority.Store(int32(p))
		c.noted.Store(int64(at))
	case p == known && since > forgetPriority/8:
		c.noted.Store(int64(at))
	}
}

// Read reads, and keeps what it has read to itself until there is room for it. It is for
// one goroutine.
func (c *conn) Read(b []byte) (int, error) {
	l := c.limiter
	fresh := true
	if l.crowded(l.shift(l.now())) {
		runtime.Gosched() // to the calls that came in last: from then on they count themselves
		b = b[:min(len(b), chunk)]
		fresh = pending(c.socket) == 0
	}
	c.settle()
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.take(n, fresh)
	}
	return n, err
}

// take returns when there is room for the calls in n bytes. They are fresh if they have come
// while they were waited for.
func (c *conn) take(n int, fresh bool) {
	l := c.limiter
	at := l.now()
	crowd := l.crowded(l.shift(at))
	if fresh {
		c.age.after = at
	}
	before := c.age.after
	// Those that were read last may not have shown up: without them, few calls would look
	// like large ones.
	usual := c.taken / max(c.made.Load()+c.calls, 1)
	c.calls = 1 + int64(n)/max(usual, callBytes)
	c.taken += int64(n)
	here := int64(0)
	if crowd {
		here = int64(pending(c.socket))
	}
	c.age.read(c.taken, here, at)
	if crowd && l.full(at) && engine.Priority(c.priority.Load()) < engine.Critical && c.lag.Load() <= int64(stale) {
		c.wait(at)
	} else {
		c.count()
	}
	if !crowd {
		c.lag.Store(0)
	} else {
		c.lag.Store(int64(l.now() - before))
	}
}

// count makes the limiter expect the calls in what was read last.
func (c *conn) count() {
	c.expected.Store(c.calls)
	c.limiter.expected.Add(c.calls)
}

// wait returns when it is this connection's turn.
func (c *conn) wait(at time.Duration) {
	l := c.limiter
	l.mu.Lock()
	if c.closed || l.closed.Load() {
		l.mu.Unlock()
		return
	}
	c.lined, c.since = true, at
	l.lines[engine.Priority(c.priority.Load()).Rank()].push(c)
	if l.waiting.Add(1) == 1 {
		l.arm()
	}
	l.letIn(at)
	l.mu.Unlock()
	<-c.let
}

// settle takes back what the limiter expects of c.
func (c *conn) settle() {
	if n := c.expected.Swap(0); n > 0 {
		c.limiter.expected.Add(-n)
		c.limiter.roomed()
	}
}

// Close closes the connection and ends a Read that waits.
func (c *conn) Close() error {
	err := c.Conn.Close()
	l := c.limiter
	l.mu.Lock()
	if c.lined {
		c.lined = false // it stays in its line, and is passed over
		l.waiting.Add(-1)
		c.let <- struct{}{}
	}
	c.closed = true
	l.mu.Unlock()
	c.settle()
	return err
}

// heldCredentials are credentials whose connections are a limiter's. A call finds its own
// by connOf.
type heldCredentials struct {
	credentials.TransportCredentials
	limiter *limiter
}

// heldInfo is the information of the credentials, with the connection.
type heldInfo struct {
	credentials.AuthInfo
	conn *conn
}

// GetCommonAuthInfo tells the level of security, which gRPC asks for by this method.
func (i heldInfo) GetCommonAuthInfo() credentials.CommonAuthInfo {
	if info, ok := i.AuthInfo.(interface {
		GetCommonAuthInfo() credentials.CommonAuthInfo
	}); ok {
		return info.GetCommonAuthInfo()
	}
	return credentials.CommonAuthInfo{}
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
