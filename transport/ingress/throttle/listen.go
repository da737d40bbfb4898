package throttle

import (
	"net"
	"runtime"

	"google.golang.org/grpc/credentials"
)

// listener makes connections for a server other than gRPC's.
type listener struct {
	net.Listener
	throttle *Throttle
}

// Listen has the connections of l throttled, counted and bounded with those of gRPC, whatever they speak above them:
// HTTP/1.1 or HTTP/2, in plain text or over TLS. They are *Conn. Their server must bound the time of a handshake and of
// headers, and tell Greet of each request.
func (t *Throttle) Listen(l net.Listener) net.Listener { return listener{l, t} }

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err //nolint:wrapcheck // net/http asks whether it is one that passes
	}
	c := newConn(raw, l.throttle, l.throttle.conns.accept(raw))
	c.opaque = true
	c.slot.keep()
	return c, nil
}

// Greet is told of each request of a connection of Listen, before anything is done for it: by the first one it has said
// hello. info is what is known of its other side. The error says that the connection is one too many: its server should
// close it.
func (c *Conn) Greet(info credentials.AuthInfo) error {
	c.greet.Do(func() {
		if c.throttle.cfg.Opened != nil {
			c.Session = c.throttle.cfg.Opened(info)
		}
		if c.refused = c.slot.hello(); c.refused == nil {
			c.slot.confirm()
			c.greeted.Store(true)
		}
	})
	return c.refused
}

// SendAway closes ToldToGo of a connection of Listen, whose client cannot say itself that it has heard.
func (c *Conn) SendAway() {
	c.away.Do(func() {
		c.throttle.told.Inc()
		close(c.toldToGo)
	})
}

// readOpaque is Read where nothing of what is read is looked at.
func (c *Conn) readOpaque(b []byte) (int, error) {
	greeted, t := c.greeted.Load(), c.throttle
	if greeted && t.crowded() {
		runtime.Gosched() // as in Read
		b = b[:min(len(b), readSize)]
	}
	n, err := c.Conn.Read(b)
	if n > 0 && greeted && t.crowded() {
		c.wait()
	}
	return n, err //nolint:wrapcheck // net/http asks what it is
}
