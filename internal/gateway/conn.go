package gateway

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lxzan/gws"
)

// conn is one client. Its messages wait in a bounded queue for its writer, a
// goroutine that lives while there is something to write. The writer is the only
// one that writes, in whole frames, several in one write where they are there.
type conn struct {
	// Static.
	g        *Gateway
	ws       *gws.Conn
	net      net.Conn
	user     string
	name     string
	userJSON []byte
	room     string // with which it was opened, or empty

	heard  atomic.Int64 // when the client was last heard of, ns since the gateway's start
	pinged atomic.Bool  // since then

	mu sync.Mutex
	// Guarded by mu.
	queue   []outgoing
	frames  int // queued or being written
	bytes   int
	writing bool // a writer lives
	closed  bool // nothing is taken any more

	rooms rooms
}

// in tells whether the client is in a room.
func (c *conn) in(room string) bool { return c.rooms.has(room) }

// identity implements holder, as roomSet, joined, left and refused do.
func (c *conn) identity() (user, name string) { return c.user, c.name }

func (c *conn) roomSet() *rooms { return &c.rooms }

// outgoing is one frame for a client: a push, a frame as it stands, or the last
// one with its close code.
type outgoing struct {
	push  *push
	frame []byte
	close uint16
	size  int
}

// taken is what became of an outgoing frame.
type taken uint8

const (
	gone taken = iota // the connection is closed
	queued
	full // the client is too slow: it has just been cut off
)

func (c *conn) sendPush(p *push) taken {
	return c.send(outgoing{push: p, size: len(p.head) + len(c.userJSON) + len(p.tail)})
}

func (c *conn) sendFrame(frame []byte) { c.send(outgoing{frame: frame, size: len(frame)}) }

// send queues a frame or cuts the client off. It never waits.
func (c *conn) send(o outgoing) taken {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return gone
	}
	cfg := &c.g.cfg
	if o.close == 0 && c.frames > 0 && (c.frames >= cfg.QueueFrames || c.bytes+o.size > cfg.QueueBytes) {
		c.closed = true
		c.mu.Unlock()
		c.g.count.slow.Inc()
		c.shut()
		return full
	}
	c.queue = append(c.queue, o)
	c.frames++
	c.bytes += o.size
	c.closed = o.close != 0
	start := !c.writing
	c.writing = true
	c.mu.Unlock()
	if start {
		// The connection's reader holds the group open: see Gateway.serve.
		c.g.clients.Go(c.writeLoop)
	}
	return queued
}

// writeBytes is how much is gathered for one write.
const writeBytes = 32 << 10

// writeLoop writes until the queue is empty.
func (c *conn) writeLoop() {
	buf := c.g.buffers.take()
	defer func() { c.g.buffers.release(buf) }()
	var batch []outgoing
	for {
		var ok bool
		if batch, ok = c.next(batch); !ok {
			return
		}
		for i := range batch {
			o := &batch[i]
			switch {
			case o.push != nil:
				buf.b = o.push.appendFrame(buf.b, c.userJSON)
			case o.frame != nil:
				buf.b = append(buf.b, o.frame...)
			}
			if len(buf.b) < writeBytes && i < len(batch)-1 && batch[i+1].close == 0 {
				continue
			}
			if !c.write(buf, o.close) {
				c.shut()
				return
			}
		}
	}
}

// next takes what is queued and gives the last batch's slice back. False: there
// is nothing, and the writer has ended.
func (c *conn) next(done []outgoing) ([]outgoing, bool) {
	size := 0
	for i := range done {
		size += done[i].size
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frames -= len(done)
	c.bytes -= size
	if len(c.queue) == 0 {
		c.writing = false
		if cap(c.queue) > 16 {
			c.queue = nil // An idle connection keeps little.
		}
		return nil, false
	}
	clear(done)
	batch := c.queue
	c.queue = done[:0]
	return batch, true
}

// write writes what is gathered, and the close frame when code is not 0.
func (c *conn) write(buf *buffer, code uint16) bool {
	_ = c.net.SetWriteDeadline(time.Now().Add(c.g.cfg.WriteTimeout)) // An error shows in the write.
	if len(buf.b) > 0 {
		// Past gws, which would write each message by itself: a frame in one
		// Write is whole on the wire, and gws writes only when it closes.
		n, err := c.net.Write(buf.b)
		c.g.count.bytesSent.Add(n)
		buf.b = buf.b[:0]
		if err != nil {
			return false
		}
	}
	if code == 0 {
		return true
	}
	_ = c.ws.WriteClose(code, []byte("node is going")) // Closed either way.
	return true
}

// shut closes the connection without a word, which ends its reader and writer. It tells
// whether nobody had done so before.
func (c *conn) shut() (first bool) {
	c.mu.Lock()
	c.closed = true
	c.queue = nil
	c.mu.Unlock()
	return !errors.Is(c.net.Close(), net.ErrClosed) // Nothing is left to be done about other errors.
}

// buffers keeps the memory that writers gather frames in.
type buffers struct{ pool sync.Pool }

type buffer struct{ b []byte }

func (p *buffers) take() *buffer {
	if b, ok := p.pool.Get().(*buffer); ok {
		return b
	}
	return new(buffer)
}

func (p *buffers) release(b *buffer) {
	if cap(b.b) > 8*writeBytes {
		return // One large push must not stay in memory for ever.
	}
	b.b = b.b[:0]
	p.pool.Put(b)
}
