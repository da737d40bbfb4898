package refgateway

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/transport/node/membership"
)

// conn is one client. Its messages wait in a bounded queue for its writer, a
// goroutine that lives while there is something to write. The writer is the only
// one that writes, in whole frames, several in one write where they are there.
type conn struct {
	// Static.
	g        *Gateway
	net      net.Conn
	user     string
	name     string
	userJSON []byte
	room     string // with which it was opened, or empty
	member   *membership.Member

	heard   atomic.Int64 // when the client was last heard of, ns since the gateway's start
	pinged  atomic.Bool  // since then
	hurried atomic.Bool  // nothing but a close frame is written any more, and soon

	mu sync.Mutex
	// Guarded by mu.
	queue   []*frame
	frames  int    // queued or being written
	bytes   int    // of them
	writing bool   // a writer lives
	closed  bool   // nothing is taken any more
	code    uint16 // of the close frame that is to follow the queue, or 0
}

// taken is what became of a frame.
type taken uint8

const (
	gone      taken = iota // the connection is closed
	elsewhere              // the connection is not in the room
	queued
	full // the client is too slow: it has just been cut off
)

// tell queues a frame that is for this connection alone.
func (c *conn) tell(f *frame) { c.send(f, "") }

// send queues a frame, or cuts the client off. It never waits. A frame of a room is
// taken by a connection in it: the lock puts it in front of the word that the client
// has left, or keeps it out.
func (c *conn) send(f *frame, room string) taken {
	cfg, size := &c.g.cfg, f.size(c.userJSON)
	c.mu.Lock()
	switch {
	case c.closed:
		c.mu.Unlock()
		return gone
	case room != "" && !c.member.In(room):
		c.mu.Unlock()
		return elsewhere
	case c.frames > 0 && (c.frames >= cfg.QueueFrames || c.bytes+size > cfg.QueueBytes):
		c.byeLocked(closeSlow, true)
		c.mu.Unlock()
		c.g.count.slow.Inc()
		return full
	case c.g.crowded(c.frames, c.bytes+size):
		c.byeLocked(closeSlow, true)
		c.mu.Unlock()
		c.g.count.crowded.Inc()
		return full
	}
	c.g.hold(f)
	c.queue = append(c.queue, f)
	c.frames++
	c.bytes += size
	c.startLocked()
	c.mu.Unlock()
	return queued
}

// startLocked makes sure that there is a writer.
func (c *conn) startLocked() {
	if c.writing {
		return
	}
	c.writing = true
	c.g.writers.Add(1)
	// The connection's reader holds the group open: see Gateway.begin.
	c.g.clients.Go(c.writeLoop)
}

// bye closes the connection with a code, which the client gets after what waits for
// it, or at once, instead of that. The first code counts.
func (c *conn) bye(code uint16, atOnce bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byeLocked(code, atOnce)
}

func (c *conn) byeLocked(code uint16, atOnce bool) {
	if c.closed {
		return
	}
	c.closed, c.code = true, code
	if atOnce {
		c.dropLocked()
		c.hurried.Store(true)
		// What is being written must be whole in front of a close frame, and a client that
		// reads nothing must not hold the memory for long.
		_ = c.net.SetWriteDeadline(time.Now().Add(c.g.cfg.CloseTimeout))
	}
	c.startLocked()
}

// dropLocked forgets what is queued.
func (c *conn) dropLocked() {
	c.settleLocked(c.queue)
	c.queue = nil
}

// settleLocked takes frames off the books.
func (c *conn) settleLocked(frames []*frame) {
	for _, f := range frames {
		c.bytes -= f.size(c.userJSON)
		c.g.drop(f)
	}
	c.frames -= len(frames)
}

// writeBytes is how much is gathered for one write: what a client that does not read
// holds beside its queue. Frames with more than copyBytes are not gathered but written
// from where all their readers have them.
const writeBytes, copyBytes = 16 << 10, 4 << 10

// writeLoop writes until the queue is empty.
func (c *conn) writeLoop() {
	defer c.g.writers.Add(-1)
	var batch, rest []*frame // rest of the batch
	defer c.g.caught("writer", func() {
		c.settle(rest)
		c.shut()
	})
	buf := c.g.buffers.take()
	defer c.g.buffers.release(buf)
	for {
		var code uint16
		if batch, code = c.next(batch); len(batch) == 0 {
			if code != 0 {
				c.writeClose(code)
			}
			return
		}
		rest = batch
		for len(rest) > 0 && !c.hurried.Load() {
			n, tail := 0, []byte(nil)
			for n < len(rest) && len(tail) == 0 && len(buf.b) < writeBytes {
				buf.b, tail = rest[n].appendTo(buf.b, c.userJSON)
				n++
			}
			if c.write(buf, tail) != nil {
				c.shut()
				break
			}
			c.settle(rest[:n])
			rest = rest[n:]
		}
		c.settle(rest) // It is left when the connection is closed or about to be.
		rest = nil
	}
}

func (c *conn) settle(frames []*frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settleLocked(frames)
}

// next takes what is queued and gives the last batch's slice back. When there is
// nothing the writer has ended, and writes the close frame if there is a code.
func (c *conn) next(done []*frame) ([]*frame, uint16) {
	clear(done)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queue) > 0 {
		batch := c.queue
		c.queue = done[:0]
		return batch, 0
	}
	if cap(c.queue) > 16 {
		c.queue = nil // An idle connection keeps little.
	}
	code := c.code
	c.code = 0
	c.writing = code != 0 // Nobody writes after a close frame.
	return nil, code
}

// write writes what is gathered and tail, and empties the buffer.
func (c *conn) write(buf *buffer, tail []byte) error {
	c.setWriteDeadline()
	var n int64
	var err error
	if len(tail) == 0 {
		var written int
		written, err = c.net.Write(buf.b)
		n = int64(written)
	} else {
		buf.two = [2][]byte{buf.b, tail}
		buf.vector = buf.two[:]
		n, err = buf.vector.WriteTo(c.net)
		clear(buf.two[:])
	}
	c.g.count.bytesSent.AddInt64(n)
	buf.b = buf.b[:0]
	return err //nolint:wrapcheck // It ends the connection and is shown to nobody.
}

func (c *conn) setWriteDeadline() {
	_ = c.net.SetWriteDeadline(time.Now().Add(c.g.cfg.WriteTimeout)) // An error shows in the write.
	if c.hurried.Load() {                                            // Whoever hurries sets the deadline after the flag.
		_ = c.net.SetWriteDeadline(time.Now().Add(c.g.cfg.CloseTimeout))
	}
}

// writeClose writes the last frame and leaves it to the client to close: closing here
// while it still sends would take from it what it has not read.
func (c *conn) writeClose(code uint16) {
	c.setWriteDeadline()
	if _, err := c.net.Write(closeFrame(code)); err != nil {
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
	c.dropLocked()
	c.mu.Unlock()
	return !errors.Is(c.net.Close(), net.ErrClosed) // Nothing is left to be done about other errors.
}

// hold and drop count the queues that a frame waits in, and its bytes once.
func (g *Gateway) hold(f *frame) {
	if f.holders.Add(1) == 1 {
		g.held.Add(f.bytes())
	}
}

func (g *Gateway) drop(f *frame) {
	if f.holders.Add(-1) == 0 {
		g.held.Add(-f.bytes())
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

// buffers keeps the memory that writers gather frames in.
type buffers struct{ pool sync.Pool }

type buffer struct {
	b      []byte
	two    [2][]byte
	vector net.Buffers // of two
}

func (p *buffers) take() *buffer {
	if b, ok := p.pool.Get().(*buffer); ok {
		return b
	}
	return new(buffer)
}

func (p *buffers) release(b *buffer) {
	b.b = b.b[:0]
	p.pool.Put(b)
}
