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
	unread  func() int    // bytes that have come and are not read, 0 where nobody knows
	turn    chan struct{} // a token when it may go on, one for each time that it was lined
	// Set before the first Read.
	handshake *handshake
	place     *place

	// The highest priority of its calls lately, and when it was seen last. One that has made
	// no call yet may ask for health: it counts as high.
	priority atomic.Int32
	noted    atomic.Int64
	made     atomic.Int64 // calls, and messages of PushStreams
	streams  atomic.Int64 // that are open, see streams
	space    holder
	// lag is for how long, at the most, what was read last had waited. It is known while
	// there is a crowd, else 0.
	lag atomic.Int64
	// expected is how many calls may be in what was read last, which have not shown up yet;
	// tally is where they count.
	expected atomic.Int64
	tally    atomic.Pointer[tally]
	// heard are the calls that have shown up, and have not begun.
	heard atomic.Pointer[heard]

	// Owned by Read, and by whoever lets it in while it waits.
	greeted bool
	counted bool // by place
	headers headers
	age     age
	size    size
	guess   int64 // calls in what was read last

	// Guarded by the limiter's lock.
	lined  bool
	since  time.Duration
	closed bool
	next   *conn
}

// heard counts calls whose headers have been read and that have not begun: they wait for a core.
type heard struct {
	tally *tally // where they are expected
	calls atomic.Int64
}

// age bounds for how long bytes have been here. It remembers how many had come by one
// moment: whatever is behind those came later.
type age struct {
	taken int64         // so many have been read
	mark  int64         // so many had come
	at    time.Duration // by then
	after time.Duration // what is read next came after this
}

// read notes that, at a time, n bytes have been read and so many more are here.
func (a *age) read(n, here int, at time.Duration) {
	a.taken += int64(n)
	if a.taken >= a.mark {
		a.after = max(a.after, a.at)
		a.mark, a.at = a.taken+int64(here), at
	}
	if here == 0 {
		a.after = at
	}
}

// size is what a call of a connection takes. It counts about as many bytes as sizeBytes, so
// that a connection whose calls change is soon known anew.
type size struct {
	bytes int64
	made  int64 // when it began to count
}

const sizeBytes = 1 << 20

// calls guesses how many calls are in n bytes, when so many have been made in all and so many
// more may be in what was read before.
func (s *size) calls(n int, made, before int64) int64 {
	usual := s.bytes / max(made-s.made+before, 1)
	if s.bytes += int64(n); s.bytes > sizeBytes {
		s.bytes /= 2
		s.made += (made - s.made) / 2
	}
	return 1 + int64(n)/max(usual, callBytes)
}

// newConn makes a connection that awaits headers that have begun for no longer than that.
func newConn(raw net.Conn, l *limiter, patience time.Duration) *conn {
	c := &conn{Conn: raw, limiter: l, unread: func() int { return 0 }, turn: make(chan struct{}, 1), headers: newHeaders(patience)}
	if s, ok := raw.(syscall.Conn); ok {
		if socket, err := s.SyscallConn(); err == nil {
			c.unread = func() int { return pending(socket) }
		}
	}
	c.age.at = l.now()
	c.age.after = c.age.at
	c.priority.Store(int32(engine.High))
	c.noted.Store(-int64(forgetPriority) - 1)
	return c
}

// note remembers the priority of a call, or of a message of a PushStream. A call that came on
// no connection of ours has a nil one.
func (c *conn) note(p engine.Priority, at time.Duration) {
	if c == nil {
		return
	}
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
	at := l.now()
	fresh := true
	if l.crowded(l.shiftAt(at)) {
		runtime.Gosched() // to the calls that came in last
		b = b[:min(len(b), chunk)]
		// If all that had come by the mark is read, what is here came after age.after. To
		// ask whether anything is costs more than it tells if that was a moment ago.
		fresh = c.age.taken >= c.age.mark && (at-c.age.after < spell || c.unread() == 0)
	}
	c.settle()
	if c.greeted && !c.counted { // and gRPC goes on
		c.counted = true
		c.place.take()
	}
	greeted := c.greeted
	n, err := c.headers.read(c.Conn, b, c.unread)
	if n > 0 {
		c.take(n, n == len(b), fresh)
	}
	if c.greeted && !greeted {
		if err := c.place.check(); err != nil {
			return 0, err
		}
	}
	return n, err
}

// take returns when there is room for the calls in n bytes. There may be more of them, and
// they are fresh if they have come while they were waited for.
func (c *conn) take(n int, more, fresh bool) {
	l := c.limiter
	at := l.now()
	if fresh {
		c.age.after = at
	}
	since := c.age.after
	here := 0
	if more {
		here = c.unread()
	}
	c.age.read(n, here, at)
	if !c.greeted && c.headers.greeted() {
		c.greeted = true
		c.handshake.end()
	}
	made := c.made.Load()
	// Those that were read last may not have shown up: without them, few calls would look
	// like large ones.
	c.guess = min(c.size.calls(n, made, c.guess), l.each)
	crowd := l.crowded(l.shiftAt(at))
	if c.mayWait(at-since) && (l.waiting.Load() > 0 || crowd && l.full(at)) {
		c.wait(at)
	} else {
		c.expect(at)
	}
	lag := time.Duration(0)
	if crowd {
		lag = l.now() - since
	}
	c.lag.Store(int64(lag))
}

// mayWait tells whether what was read, and has waited for as long as that, may wait.
func (c *conn) mayWait(waited time.Duration) bool {
	greets := c.made.Load() == 0 && c.age.taken <= greeting
	return engine.Priority(c.priority.Load()) < engine.Critical && waited < stale && !greets
}

// expect counts the calls in what was read last, until the next Read or for a spell.
func (c *conn) expect(at time.Duration) {
	t := c.limiter.shiftAt(at).now
	c.tally.Store(t)
	t.expected.Add(c.guess)
	c.expected.Store(c.guess)
}

// hear counts in a call whose headers are in what was read last. It is for whoever calls Read. A
// call that does not begin is forgotten after two spells.
func (c *conn) hear() {
	t := c.tally.Load()
	if t == nil { // it was closed before it was its turn
		return
	}
	h := c.heard.Load()
	if h == nil || h.tally != t {
		h = &heard{tally: t}
		c.heard.Store(h)
	}
	if !takeOne(&c.expected) { // else it is one of those
		t.expected.Add(1)
	}
	h.calls.Add(1)
}

// begin counts out a call that was heard: from now on it counts itself. One that came on no
// connection of ours has a nil one.
func (c *conn) begin() {
	if c == nil {
		return
	}
	if h := c.heard.Load(); h != nil && takeOne(&h.calls) {
		h.tally.expected.Add(-1)
	}
}

// takeOne takes one off what is there. False: there is nothing.
func takeOne(n *atomic.Int64) bool {
	for {
		v := n.Load()
		if v <= 0 {
			return false
		}
		if n.CompareAndSwap(v, v-1) {
			return true
		}
	}
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
		l.armLocked()
	}
	l.letInLocked(at)
	l.mu.Unlock()
	<-c.turn
}

// settle takes back what the limiter expects of c, but for calls that have been heard.
func (c *conn) settle() {
	if n := c.expected.Swap(0); n > 0 {
		c.tally.Load().expected.Add(-n)
		c.limiter.letIn()
	}
}

// heldBack tells whether it is we who do not read. A nil one is always read.
func (c *conn) heldBack() bool {
	if c == nil || c.limiter.waiting.Load() == 0 {
		return false
	}
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	return c.lined
}

// holder is what of the space c has. A nil conn has none that is counted.
func (c *conn) holder() *holder {
	if c == nil {
		return nil
	}
	return &c.space
}

// Close closes the connection and ends a Read that waits.
func (c *conn) Close() error {
	err := c.Conn.Close()
	l := c.limiter
	l.mu.Lock()
	if c.lined {
		c.lined = false // it stays in its line, and is passed over
		l.waiting.Add(-1)
		c.turn <- struct{}{}
	}
	c.closed = true
	l.mu.Unlock()
	c.settle()
	c.handshake.end()
	c.place.leave()
	return err
}

// heldCredentials are credentials whose connections are a limiter's. A call finds its own
// by connOf.
type heldCredentials struct {
	credentials.TransportCredentials
	limiter     *limiter
	handshakes  *handshakes
	connections *connections
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

func insecureHeld(l *limiter, h *handshakes, c *connections) credentials.TransportCredentials {
	return heldCredentials{insecure.NewCredentials(), l, h, c}
}

// ServerHandshake implements credentials.TransportCredentials. gRPC keeps the raw connection
// for the options of the socket.
func (h heldCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c := newConn(raw, h.limiter, h.handshakes.timeout)
	c.handshake = h.handshakes.begin(raw.RemoteAddr(), raw)
	c.place = &place{all: h.connections, network: c.handshake.network}
	secured, info, err := h.TransportCredentials.ServerHandshake(c)
	return secured, heldInfo{info, c}, err
}

// Clone implements credentials.TransportCredentials.
func (h heldCredentials) Clone() credentials.TransportCredentials {
	return heldCredentials{h.TransportCredentials.Clone(), h.limiter, h.handshakes, h.connections}
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
