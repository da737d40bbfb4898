package refgateway

import (
	"cmp"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

// conn is one client. Its messages wait in a bounded queue for a writer. One goroutine at
// a time writes, in whole frames, several in one write where they are there.
type conn struct {
	// Static.
	g    *Gateway
	net  net.Conn
	raw  syscall.RawConn // of net, or nil where only net can write
	room string          // with which it was opened, or empty
	id   uint64          // no other one of this gateway has it
	at   int64           // when it began, in Unix seconds
	// Static once it is among the users. Before, owned by the reader: without tokens they are
	// what the client says, with tokens what its token says.
	user   string
	name   string
	tenant node.Tenant // whose ids its ids are; empty: nobody's
	to     recipient   // acks is static from the handshake on
	member *membership.Member
	given  node.Attributes // that the client has given; its token may know better

	attributes atomic.Pointer[node.Attributes] // those that count; nil for none
	identity   atomic.Pointer[identity]        // of the latest token; nil without tokens
	place      place                           // among the unverified, which guard it
	progress   bool                            // the client's last message was an acknowledgement of something; owned by the reader

	heard   atomic.Int64 // when the client was last heard of, ns since the gateway's start
	pinged  atomic.Bool  // since then
	hurried atomic.Bool  // nothing but a close frame is written any more, and soon

	mu sync.Mutex
	// Guarded by mu.
	queue   []queued
	frames  int    // queued or being written
	bytes   int    // of them
	writing bool   // it is in line for a writer, or has one
	closed  bool   // nothing is taken any more
	code    uint16 // of the close frame that is to follow the queue, or 0
	last    uint16 // the first code that it was closed with, or 0
	told    told   // to hooks
	words   string // of that frame, where a service has chosen them: not changed once code is set
	lasting        // see lasting.go

	behind *conn // in the line; guarded by line.mu
}

// tell queues a frame of the gateway's own for this connection.
func (c *conn) tell(f *frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.queueLocked(queued{frame: f})
	}
}

// queueLocked queues what is for a client that is here, or cuts it off. It never waits.
func (c *conn) queueLocked(q queued) node.Outcome {
	if !c.roomLocked(q.size(&c.to)) {
		return node.Failed
	}
	c.appendLocked(q)
	return node.Delivered
}

// roomLocked tells whether so many bytes more may wait for the client. One that has no room is
// cut off.
func (c *conn) roomLocked(size int) bool {
	cfg := &c.g.cfg
	switch {
	case c.frames > 0 && (c.frames >= cfg.QueueFrames || c.bytes+size > cfg.QueueBytes):
		c.byeLocked(closeSlow, true)
		c.g.count.slow.Inc()
		return false
	case c.g.crowded(c.frames, c.bytes+size):
		c.byeLocked(closeSlow, true)
		c.g.count.crowded.Inc()
		return false
	}
	return true
}

func (c *conn) appendLocked(q queued) {
	c.g.hold(q.frame)
	c.queue = append(c.queue, q)
	c.frames++
	c.bytes += q.size(&c.to)
	c.startLocked()
}

// startLocked makes sure that a writer comes.
func (c *conn) startLocked() {
	if c.writing {
		return
	}
	c.writing = true
	c.g.writers.Add(1)
	c.g.enqueue(c)
}

// bye closes the connection with a code, which the client gets after what waits for
// it, or at once, instead of that. The first code counts: bye tells whether this is it.
func (c *conn) bye(code uint16, atOnce bool) (first bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byeLocked(code, atOnce)
}

func (c *conn) byeLocked(code uint16, atOnce bool) (first bool) {
	if c.closed {
		return false
	}
	c.closed, c.code, c.last = true, code, code
	c.forgetLocked()
	if atOnce {
		c.dropLocked()
		c.hurried.Store(true)
		// What is being written must be whole in front of a close frame, and a client that
		// reads nothing must not hold the memory for long.
		_ = c.net.SetWriteDeadline(time.Now().Add(c.g.cfg.CloseTimeout))
	}
	c.startLocked()
	return true
}

// kick closes the connection as a service has asked, behind what waits for the client if that is soon with it. It tells whether the
// connection was open.
func (c *conn) kick(code uint16, words string) (open bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.words = words
	if c.frames == 0 {
		return c.byeLocked(code, true)
	}
	time.AfterFunc(c.g.cfg.KickTimeout, c.hurry)
	return c.byeLocked(code, false)
}

// hurry drops what waits, so that the close frame is next.
func (c *conn) hurry() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.code == 0 { // it is on its way, or the client has gone
		return
	}
	c.dropLocked()
	c.hurried.Store(true)
	_ = c.net.SetWriteDeadline(time.Now().Add(c.g.cfg.KickTimeout))
}

// dropLocked forgets what is queued.
func (c *conn) dropLocked() {
	c.settleLocked(c.queue)
	c.queue = nil
	clear(c.places)
}

// settleLocked takes frames off the books.
func (c *conn) settleLocked(frames []queued) {
	for _, q := range frames {
		c.bytes -= q.size(&c.to)
		c.g.drop(q.frame)
	}
	c.frames -= len(frames)
}

// writeBytes is how much is gathered for one write: what a client that does not read
// holds beside its queue. Frames with more than copyBytes are not gathered but written
// from where all their readers have them.
const writeBytes, copyBytes = 16 << 10, 4 << 10

// line is the connections that wait for a writer, in the order in which they came. A push
// to a room makes a thousand of them ready at once: a goroutine for each would cost more than
// all else but the write itself.
type line struct {
	mu sync.Mutex
	// Guarded by mu.
	first, last *conn
	writers     int
}

// maxWriters bounds the goroutines that write to clients who take what they get. They do not
// wait for anything, so more than cores are of no use.
const maxWriters = 16

// enqueue puts a connection at the end of the line, and makes sure that somebody works it off.
func (g *Gateway) enqueue(c *conn) {
	l := &g.line
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == nil {
		l.first = c
	} else {
		l.last.behind = c
	}
	l.last = c
	if l.writers < g.cores {
		l.writers++
		// The connection's reader holds the group open: see Gateway.begin.
		g.clients.Go(g.writeLoop)
	}
}

// writeLoop writes to the connections in the line until there is none. One whose socket takes
// no more gets a goroutine of its own, which may wait.
func (g *Gateway) writeLoop() {
	w := g.takeWriter()
	for {
		l := &g.line
		l.mu.Lock()
		c := l.first
		if c == nil {
			l.writers--
			l.mu.Unlock()
			g.idle.Put(w)
			return
		}
		if l.first, c.behind = c.behind, nil; l.first == nil {
			l.last = nil
		}
		l.mu.Unlock()
		if !c.write(w, false) {
			blocked := w
			g.clients.Go(func() {
				c.write(blocked, true)
				g.idle.Put(blocked)
			})
			w = g.takeWriter()
		}
	}
}

// writer is what a goroutine needs to write to clients.
type writer struct {
	queue []queued // the memory of rest, exchanged for the next queue
	rest  []queued // taken from a queue and not settled yet
	b     []byte   // the first of rest, gathered
	n     int      // so many of them
	tail  []byte   // of the last of them, when it is too long to be copied
	end   []byte   // what comes behind that

	try     func(fd uintptr) bool // writes of b what the socket takes
	written int                   // by try
	err     error
}

func (g *Gateway) takeWriter() *writer {
	if w, ok := g.idle.Get().(*writer); ok {
		return w
	}
	w := new(writer)
	w.try = func(fd uintptr) bool {
		w.written, w.err = writeNow(fd, w.b)
		return true
	}
	return w
}

// write writes what is queued, and returns true when the connection needs nobody any more, or
// is in the line again. Without wait it returns false when it would have to wait for the
// client: then w has what is left, and write goes on with that.
func (c *conn) write(w *writer, wait bool) (ended bool) {
	defer c.g.caught("writer", func() {
		c.settle(w.rest)
		w.rest, w.b, w.n, w.tail, w.end = nil, w.b[:0], 0, nil, nil
		c.shut()
		c.g.writers.Add(-1)
		ended = true
	})
	for first := true; ; first = false {
		if len(w.rest) == 0 {
			code, more := c.next(w, wait, first)
			switch {
			case len(w.rest) > 0:
			case more: // others have waited, too
				c.g.enqueue(c)
				return true
			case code != 0 && !wait:
				return false
			default:
				if code != 0 {
					c.writeClose(code)
				}
				c.g.writers.Add(-1)
				return true
			}
		}
		for len(w.rest) > 0 {
			if w.n == 0 && c.hurried.Load() {
				c.settle(w.rest)
				w.rest = nil
				break
			}
			for w.n == 0 || w.n < len(w.rest) && len(w.tail) == 0 && len(w.b) < writeBytes {
				if q := w.rest[w.n]; q.entry == nil || c.mayWrite(q.entry) {
					w.b, w.tail, w.end = q.appendTo(w.b, &c.to)
				}
				w.n++
			}
			if !wait && (c.raw == nil || len(w.tail) > 0) {
				return false
			}
			if left, err := c.writeGathered(w, wait); err != nil {
				c.shut()
				w.n = len(w.rest) // the others are not written either
			} else if left {
				return false
			}
			c.settle(w.rest[:w.n])
			w.rest, w.b, w.n, w.tail, w.end = w.rest[w.n:], w.b[:0], 0, nil, nil
		}
	}
}

func (c *conn) settle(frames []queued) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settleLocked(frames)
	if c.inbox.Waiting() {
		c.popLocked(time.Now())
	}
}

// next takes what is queued. When there is nothing the connection has no writer any more, or
// one that writes the close frame if there is a code. Who does not wait takes one queue and
// leaves the next one to whoever is first in line.
func (c *conn) next(w *writer, wait, first bool) (code uint16, more bool) {
	clear(w.queue)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case len(c.queue) > 0 && !wait && !first:
		return 0, true
	case len(c.queue) > 0:
		w.rest, c.queue = c.queue, w.queue[:0]
		clear(c.places)
		w.queue = w.rest
		return 0, false
	case c.code != 0 && !wait:
		return c.code, false
	}
	if cap(c.queue) > 16 {
		c.queue = nil // An idle connection keeps little.
	}
	code, c.code = c.code, 0
	c.writing = code != 0 // Nobody writes after a close frame.
	return code, false
}

// writeGathered writes what is gathered. Without wait some may be left.
func (c *conn) writeGathered(w *writer, wait bool) (left bool, err error) {
	if wait {
		c.setWriteDeadline(c.g.cfg.WriteTimeout)
		all := net.Buffers{w.b, w.tail, w.end}
		n, err := all.WriteTo(c.net)
		c.setWriteDeadline(0) // A write that does not wait fails behind a deadline, too.
		c.g.count.bytesSent.AddInt64(n)
		return false, err //nolint:wrapcheck // It ends the connection and is shown to nobody.
	}
	w.written, w.err = 0, nil
	if err := c.raw.Write(w.try); err != nil {
		return false, err //nolint:wrapcheck // As above.
	}
	c.g.count.bytesSent.Add(w.written)
	w.b = w.b[:copy(w.b, w.b[w.written:])]
	return len(w.b) > 0, w.err
}

// setWriteDeadline bounds the next write; 0 is for no bound.
func (c *conn) setWriteDeadline(d time.Duration) {
	var at time.Time
	if d > 0 {
		at = time.Now().Add(d)
	}
	_ = c.net.SetWriteDeadline(at) // An error shows in the write.
	if c.hurried.Load() {          // Whoever hurries sets the deadline after the flag.
		_ = c.net.SetWriteDeadline(time.Now().Add(c.g.cfg.CloseTimeout))
	}
}

// writeClose writes the last frame and leaves it to the client to close: closing here
// while it still sends would take from it what it has not read.
func (c *conn) writeClose(code uint16) {
	c.setWriteDeadline(c.g.cfg.WriteTimeout)
	if _, err := c.net.Write(closeFrame(code, cmp.Or(c.words, closeReason(code)))); err != nil {
		c.shut()
		return
	}
	if half, ok := c.net.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // The reader sees what becomes of the connection.
	}
	_ = c.net.SetReadDeadline(time.Now().Add(c.g.cfg.CloseTimeout))
}

// shut closes the connection without a word, which ends its reader and writer. It tells
// whether nobody had done so before.
func (c *conn) shut() (first bool) {
	c.mu.Lock()
	c.closed, c.code = true, 0
	c.forgetLocked()
	c.dropLocked()
	c.mu.Unlock()
	return !errors.Is(c.net.Close(), net.ErrClosed) // Nothing is left to be done about other errors.
}

// hold and drop count the queues that a frame waits in, and its bytes once. What is compressed of it comes later, while a writer holds it.
func (g *Gateway) hold(f *frame) {
	if f.holders.Add(1) == 1 {
		g.held.Add(f.bytes() + f.more.Load())
	}
}

func (g *Gateway) drop(f *frame) {
	if f.holders.Add(-1) == 0 {
		g.held.Add(-f.bytes() - f.more.Load())
	}
}

// crowded tells whether a client may not have so much waiting because of all the
// others. From half of the bound on nobody may have more than an equal share of that
// half waiting, so that it is the slow ones who are cut off; at the bound nothing is taken.
func (g *Gateway) crowded(frames, bytes int) bool {
	held, bound := g.held.Load(), int64(g.cfg.QueueTotalBytes)
	if held < bound/2 {
		return false
	}
	return held >= bound || frames > 0 && int64(bytes) > bound/2/max(g.writers.Load(), 1)
}
