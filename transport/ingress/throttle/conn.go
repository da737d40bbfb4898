package throttle

import (
	"errors"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/engine"
)

var errPanic = errors.New("panic while the connection was read")

// Conn is a connection above its credentials. It is not read while there is no room for its calls.
type Conn struct {
	net.Conn

	// For whoever serves its calls.
	Streams atomic.Int64 // that are open
	Space   int64        // bytes that its requests take; guarded by whoever counts them
	Session any          // what Config.Opened has made; static

	// Static.
	throttle *Throttle
	opaque   bool          // its frames are not followed, see Listen
	turn     chan struct{} // a token when it may go on, one for each time that it waits
	toldToGo chan struct{} // closed when the client has heard that it should go

	// The highest priority of its calls lately, and when it was seen last. One that has made no call
	// yet may ask for health: it counts as high.
	priority atomic.Int32
	noted    atomic.Int64

	// Of an opaque connection.
	greet   sync.Once
	greeted atomic.Bool // it has made a request
	refused error       // it is one too many; written under greet
	away    sync.Once

	// Owned by Read and Tap, which run on one goroutine. Those of an opaque connection do not, and Tap leaves them alone.
	frames frames
	slot   *slot
	taken  bool          // by gRPC, which reads on after the hello
	told   bool          // toldToGo is closed
	read   *window       // counts it as let in; nil: not counted
	held   time.Duration // for so long what was read last was kept waiting

	// Guarded by the Throttle's lock.
	lined  bool
	since  time.Duration
	closed bool
	next   *Conn
}

// throttledCredentials are credentials with connections that are throttled.
type throttledCredentials struct {
	credentials.TransportCredentials
	throttle *Throttle
}

// ServerHandshake implements credentials.TransportCredentials.
func (h *throttledCredentials) ServerHandshake(raw net.Conn) (conn net.Conn, info credentials.AuthInfo, err error) {
	t := h.throttle
	s := t.conns.accept(raw)
	defer func() {
		if v := recover(); v != nil {
			t.cfg.Panicked("handshake", v)
			err = errPanic
		}
		if err != nil {
			s.close()
		}
	}()
	secured, info, err := h.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err //nolint:wrapcheck // gRPC asks whether it is one that it knows
	}
	c := newConn(secured, t, s)
	if t.cfg.Opened != nil {
		c.Session = t.cfg.Opened(info)
	}
	return c, AuthInfo{info, c}, nil
}

// Clone implements credentials.TransportCredentials.
func (h *throttledCredentials) Clone() credentials.TransportCredentials {
	return h.throttle.Credentials(h.TransportCredentials.Clone())
}

func newConn(secured net.Conn, t *Throttle, s *slot) *Conn {
	c := &Conn{
		Conn: secured, throttle: t, slot: s, frames: newFrames(t.cfg.Timeout),
		turn: make(chan struct{}, 1), toldToGo: make(chan struct{}),
	}
	c.priority.Store(int32(engine.High))
	c.noted.Store(-int64(forgetPriority) - 1)
	return c
}

// Note remembers the priority of a message of a PushStream.
func (c *Conn) Note(p engine.Priority, at time.Time) { c.note(p, at.Sub(c.throttle.began)) }

func (c *Conn) note(p engine.Priority, at time.Duration) {
	known, since := c.Priority(), at-time.Duration(c.noted.Load())
	switch {
	case p > known || since > forgetPriority:
		c.priority.Store(int32(p))
		c.noted.Store(int64(at))
	case p == known && since > forgetPriority/8:
		c.noted.Store(int64(at))
	}
}

// Priority is the highest of its calls lately.
func (c *Conn) Priority() engine.Priority { return engine.Priority(c.priority.Load()) }

// ToldToGo is closed when the client has confirmed a GOAWAY: it makes no new calls here.
func (c *Conn) ToldToGo() <-chan struct{} { return c.toldToGo }

// Waiting tells whether it is we who do not read.
func (c *Conn) Waiting() bool {
	t := c.throttle
	if t.waiting.Load() == 0 {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.lined
}

// Read reads, and keeps what it has read to itself until there is room for it.
func (c *Conn) Read(b []byte) (n int, err error) {
	t := c.throttle
	defer func() {
		if v := recover(); v != nil {
			t.cfg.Panicked("connection", v)
			n, err = 0, errPanic
		}
	}()
	if c.read != nil { // and is taken apart: its calls are counted
		c.read.reads.Add(-1)
		c.read = nil
		t.letIn()
	}
	if c.opaque {
		return c.readOpaque(b)
	}
	hello := c.frames.hello()
	switch {
	case !hello:
		b = b[:min(len(b), helloSize)]
	case t.crowded():
		// The calls that have been read go first. Otherwise the readers are always before them, and
		// critical calls are late.
		runtime.Gosched()
		b = b[:min(len(b), readSize)]
	}
	if hello && !c.taken {
		c.taken = true
		c.slot.confirm()
	}
	n, err = c.frames.read(c.Conn, b)
	if n == 0 {
		return n, err
	}
	if c.frames.toldToGo && !c.told {
		c.told = true
		close(c.toldToGo)
		t.told.Inc()
	}
	if hello {
		c.held = 0
		if t.crowded() {
			c.wait()
		}
	} else if c.frames.hello() {
		if err := c.slot.hello(); err != nil {
			return 0, err
		}
	}
	return n, err
}

// wait returns when it is this connection's turn.
func (c *Conn) wait() {
	t := c.throttle
	t.mu.Lock()
	p := c.Priority()
	if p >= engine.Critical || c.closed || t.closed.Load() || t.waiting.Load() == 0 && t.roomLocked(p) {
		c.startLocked()
		t.mu.Unlock()
		return
	}
	c.lined, c.since = true, t.now()
	t.lines[p.Rank()].push(c)
	if t.waiting.Add(1) == 1 {
		t.timer.Reset(tick)
	}
	t.letInLocked()
	t.mu.Unlock()
	<-c.turn
	c.held = t.now() - c.since
}

// startLocked counts a connection as one whose calls are on their way.
func (c *Conn) startLocked() {
	c.read = c.throttle.windowsAt(c.throttle.now()).now
	c.read.reads.Add(1)
}

// Close closes the connection and ends a Read that waits.
func (c *Conn) Close() error {
	err := c.Conn.Close()
	t := c.throttle
	t.mu.Lock()
	c.closed = true
	if c.lined {
		c.lined = false // it stays in its line, and is passed over
		if t.waiting.Add(-1) == 0 {
			t.lines = [4]line{} // nobody would pass over it
		}
		c.turn <- struct{}{}
	}
	t.mu.Unlock()
	c.slot.close()
	return err
}
