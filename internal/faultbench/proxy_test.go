package faultbench

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// direction is one way through a proxy.
type direction int

const (
	requests direction = iota // from whoever dialed
	replies                   // to whoever dialed
)

// toxic is what a proxy does to the bytes that go one way. The zero toxic passes them
// on.
type toxic struct {
	delay, jitter time.Duration // later, in order
	rate          int           // bytes a second, 0 without a limit
	slice         int           // bytes at a time, 0 for as they come
	drop          bool          // swallowed: the sender believes that they arrive
	hold          bool          // not read: the sender's buffers fill up
	flip          int           // each so many-th byte is another one, 0 for none
	some          int           // on each so many-th connection only, 0 for on all
}

// proxy passes TCP on to one address and harms it on the way.
type proxy struct {
	listener net.Listener
	wg       sync.WaitGroup
	stop     chan struct{}

	mu sync.Mutex
	// Guarded by mu.
	target  string
	toxics  [2]toxic
	changed chan struct{} // closed when toxics change
	down    bool
	pairs   map[*pair]struct{}
	dials   int
}

// pair is one connection through the proxy.
type pair struct {
	in, out net.Conn
	number  int // in the order of dials
}

func (c *pair) close() { _, _ = c.in.Close(), c.out.Close() }

// newProxy listens in front of target until the test ends.
func newProxy(t testing.TB, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, target: target, stop: make(chan struct{}), changed: make(chan struct{}), pairs: map[*pair]struct{}{}}
	p.wg.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

func (p *proxy) close() {
	_ = p.listener.Close()
	close(p.stop)
	p.cut()
	p.wg.Wait()
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

// set changes what happens to the bytes that go one way.
func (p *proxy) set(d direction, x toxic) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.toxics[d] = x
	close(p.changed)
	p.changed = make(chan struct{})
}

// heal lets everything through again.
func (p *proxy) heal() {
	p.set(requests, toxic{})
	p.set(replies, toxic{})
	p.refuse(false)
}

// refuse makes the proxy cut every new connection, or no more.
func (p *proxy) refuse(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
}

// cut ends all connections in the regular way.
func (p *proxy) cut() {
	p.each(func(c *pair) { c.close() })
}

// reset ends all connections with a RST.
func (p *proxy) reset() {
	p.each(func(c *pair) {
		for _, conn := range []net.Conn{c.in, c.out} {
			if tcp, ok := conn.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0)
			}
		}
		c.close()
	})
}

func (p *proxy) each(do func(*pair)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.pairs {
		do(c)
	}
}

// dialed is how many connections there have been.
func (p *proxy) dialed() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dials
}

func (p *proxy) accept() {
	for {
		in, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		target, down := p.target, p.down
		p.dials++
		number := p.dials
		p.mu.Unlock()
		if down {
			_ = in.Close()
			continue
		}
		out, err := net.Dial("tcp", target)
		if err != nil {
			_ = in.Close()
			continue
		}
		c := &pair{in, out, number}
		p.mu.Lock()
		p.pairs[c] = struct{}{}
		p.mu.Unlock()
		var both sync.WaitGroup
		p.lane(&both, c, requests)
		p.lane(&both, c, replies)
		p.wg.Go(func() {
			both.Wait()
			p.mu.Lock()
			delete(p.pairs, c)
			p.mu.Unlock()
		})
	}
}

// lane carries one direction of a connection: a reader, and a writer who lets each
// piece wait until it is due. When one ends, so does the connection.
func (p *proxy) lane(both *sync.WaitGroup, c *pair, d direction) {
	from, to := c.in, c.out
	if d == replies {
		from, to = c.out, c.in
	}
	pieces := make(chan piece, 256) // what is on its way while it is delayed
	both.Go(func() {
		defer close(pieces)
		defer c.close()
		p.read(from, c, d, pieces)
	})
	both.Go(func() {
		defer c.close()
		for x := range pieces {
			if !p.write(to, c, d, x) {
				c.close()
				for range pieces { // the reader must not wait for us
				}
				return
			}
		}
	})
}

// piece is what was read at once.
type piece struct {
	data []byte
	due  time.Time
}

func (p *proxy) read(from net.Conn, c *pair, d direction, pieces chan<- piece) {
	last := time.Now()
	for {
		if _, ok := p.ready(c, d); !ok {
			return
		}
		buf := make([]byte, 16<<10)
		n, err := from.Read(buf)
		x, ok := p.ready(c, d)
		if !ok {
			return
		}
		if n > 0 && !x.drop {
			if x.flip > 0 {
				for i := rand.N(x.flip); i < n; i += x.flip {
					buf[i] ^= 0x55
				}
			}
			due := time.Now().Add(x.delay)
			if x.jitter > 0 {
				due = due.Add(rand.N(2*x.jitter) - x.jitter)
			}
			if due.Before(last) {
				due = last // TCP keeps the order
			}
			last = due
			pieces <- piece{buf[:n], due}
		}
		if err != nil {
			return // an error other than EOF is the other side's, too
		}
	}
}

// ready waits while the direction is held, and returns what is to be done.
func (p *proxy) ready(c *pair, d direction) (toxic, bool) {
	for {
		p.mu.Lock()
		x, changed := p.toxicLocked(c, d), p.changed
		p.mu.Unlock()
		if !x.hold {
			return x, true
		}
		select {
		case <-changed:
		case <-p.stop:
			return x, false
		}
	}
}

// toxicLocked is what is done to a connection.
func (p *proxy) toxicLocked(c *pair, d direction) toxic {
	if x := p.toxics[d]; x.some == 0 || c.number%x.some == 0 {
		return x
	}
	return toxic{}
}

func (p *proxy) write(to net.Conn, c *pair, d direction, x piece) bool {
	if !p.pause(time.Until(x.due)) {
		return false
	}
	for len(x.data) > 0 {
		p.mu.Lock()
		how := p.toxicLocked(c, d)
		p.mu.Unlock()
		n := len(x.data)
		if how.slice > 0 {
			n = min(n, how.slice)
		}
		if how.rate > 0 {
			n = min(n, max(how.rate/50, 1)) // fifty writes a second
			if !p.pause(time.Duration(n) * time.Second / time.Duration(how.rate)) {
				return false
			}
		}
		if _, err := to.Write(x.data[:n]); err != nil {
			return false
		}
		x.data = x.data[n:]
	}
	return true
}

func (p *proxy) pause(d time.Duration) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-p.stop:
		return false
	}
}

// TestProxyHarmsWhatItSays: a fault that does not happen proves nothing.
func TestProxyHarmsWhatItSays(t *testing.T) {
	t.Parallel()
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			served.Go(func() { _, _ = io.Copy(c, c); _ = c.Close() })
		}
	})
	t.Cleanup(func() { _ = echo.Close(); served.Wait() })
	p := newProxy(t, echo.Addr().String())
	dial := func() net.Conn {
		c, err := net.Dial("tcp", p.addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	ask := func(c net.Conn, wait time.Duration) (string, error) {
		if _, err := c.Write([]byte("hello")); err != nil {
			return "", err
		}
		_ = c.SetReadDeadline(time.Now().Add(wait))
		buf := make([]byte, 5)
		n, err := io.ReadFull(c, buf)
		return string(buf[:n]), err
	}

	c := dial()
	if got, err := ask(c, patience); got != "hello" {
		t.Fatalf("%q %v", got, err)
	}
	p.set(replies, toxic{delay: 100 * time.Millisecond, slice: 1})
	begin := time.Now()
	if got, err := ask(c, patience); got != "hello" || time.Since(begin) < 90*time.Millisecond {
		t.Errorf("delayed: %q %v after %v", got, err, time.Since(begin))
	}
	p.set(replies, toxic{drop: true, some: 7})
	if got, err := ask(c, patience); got != "hello" {
		t.Errorf("lost on another connection: %q %v", got, err)
	}
	p.set(replies, toxic{flip: 2})
	if got, err := ask(c, patience); got == "hello" {
		t.Errorf("corrupted: %q %v", got, err)
	}
	p.set(replies, toxic{rate: 25})
	begin = time.Now()
	if got, err := ask(c, patience); got != "hello" || time.Since(begin) < 150*time.Millisecond {
		t.Errorf("slow: %q %v after %v", got, err, time.Since(begin))
	}
	for _, lost := range []toxic{{drop: true}, {hold: true}} {
		p.set(replies, lost)
		if got, err := ask(dial(), 50*time.Millisecond); got != "" {
			t.Errorf("%+v: %q %v", lost, got, err)
		}
	}
	p.heal()
	c = dial()
	if got, err := ask(c, patience); got != "hello" {
		t.Fatalf("healed: %q %v", got, err)
	}
	p.reset()
	if _, err := ask(c, patience); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("reset: %v", err)
	}
	p.refuse(true)
	if got, err := ask(dial(), patience); err == nil {
		t.Errorf("refused: %q", got)
	}
}
