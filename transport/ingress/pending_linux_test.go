package ingress

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
)

// What waits in a socket is known to the byte.
func TestConnectionKnowsWhatItHasNotRead(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	defer func() { _ = listener.Close() }()
	client, err := net.Dial("tcp", listener.Addr().String())
	ok(t, err)
	defer func() { _ = client.Close() }()
	server, err := listener.Accept()
	ok(t, err)
	l := limiterOf(1 << 20)
	defer l.close()
	c := newConn(server, l)
	c.note(engine.Normal, l.now())
	_, err = client.Write(make([]byte, 1000))
	ok(t, err)
	for end := time.Now().Add(10 * time.Second); c.unread() < 1000 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if n := c.unread(); n != 1000 {
		t.Errorf("%d bytes wait, want 1000", n)
	}
	_, err = io.ReadFull(c, make([]byte, 400))
	ok(t, err)
	if n := c.unread(); n != 600 || c.age.mark != 1000 {
		t.Errorf("%d bytes wait, want 600; %d had come", n, c.age.mark)
	}
	ok(t, c.Close())
	if n := c.unread(); n != 0 {
		t.Errorf("%d bytes wait in a socket that is closed", n)
	}
}
