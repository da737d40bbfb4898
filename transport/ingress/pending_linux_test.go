package ingress

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/push-manager/push-manager/engine"
)

// sockets are the two ends of a connection.
func sockets(t *testing.T) (client, server net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	defer func() { _ = listener.Close() }()
	client, err = net.Dial("tcp", listener.Addr().String())
	ok(t, err)
	t.Cleanup(func() { _ = client.Close() })
	server, err = listener.Accept()
	ok(t, err)
	t.Cleanup(func() { _ = server.Close() })
	return client, server
}

// What waits in a socket is known to the byte.
func TestConnectionKnowsWhatItHasNotRead(t *testing.T) {
	client, server := sockets(t)
	l := limiterOf(1 << 20)
	defer l.close()
	c := newConn(server, l, time.Hour)
	c.note(engine.Normal, l.now())
	_, err := client.Write(make([]byte, 1000))
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

// A process that was stopped for longer than headers are awaited finds them when it goes on.
func TestHeadersThatHaveComeAreReadHoweverLate(t *testing.T) {
	client, server := sockets(t)
	l := limiterOf(1 << 20)
	defer l.close()
	c := newConn(server, l, time.Hour)
	_, err := io.WriteString(client, http2.ClientPreface+"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x02\x01\x04\x00\x00\x00\x01\x82\x82")
	ok(t, err)
	const all = len(http2.ClientPreface) + 2*frameHead + 2
	_, err = io.ReadFull(c, make([]byte, all-2))
	ok(t, err)
	c.headers.waited = time.Hour
	n, err := io.ReadFull(c, make([]byte, 1))
	if n != 1 || err != nil {
		t.Errorf("%d bytes of what had come, %v", n, err)
	}
	_, err = io.ReadFull(c, make([]byte, 1))
	ok(t, err)
	if c.headers.begun() {
		t.Error("the headers are whole")
	}
	_, err = io.WriteString(client, "\x00")
	ok(t, err)
	_, err = io.ReadFull(c, make([]byte, 1))
	ok(t, err)
	c.headers.waited = time.Hour
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nothing had come, and reading returned %v", err)
	}
}
