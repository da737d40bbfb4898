package throttle

import (
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// socket is a connection that comes from an address, and tells that it was closed.
type socket struct {
	net.Conn
	from   string
	closed bool
}

func (s *socket) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s.from))
}

func (s *socket) Close() error {
	s.closed = true
	return nil
}

func TestHalfOpenConnectionsAreBoundedByNetwork(t *testing.T) {
	cfg := configOf()
	cfg.HalfOpen = 1
	all := newConnections(&cfg)
	slots, sockets := make(map[string]*slot), make(map[string]*socket)
	for _, c := range []struct{ from, evicts string }{
		{"192.0.2.1:1", ""},
		{"192.0.2.2:1", ""},
		{"192.0.2.1:2", "192.0.2.1:1"},
		{"[2001:db8::1]:1", ""},
		{"[2001:db8:0:1::1]:1", ""},
		{"[2001:db8::2:1]:1", "[2001:db8::1]:1"},
		{"[::ffff:192.0.2.2]:2", "192.0.2.2:1"},
		{"192.0.2.3:1", ""},
	} {
		sockets[c.from] = &socket{from: c.from}
		slots[c.from] = all.accept(sockets[c.from])
		for from, s := range sockets {
			if s.closed != (from == c.evicts) {
				t.Errorf("one more from %s: that from %s is closed: %v", c.from, from, s.closed)
			}
		}
		delete(sockets, c.evicts)
	}
	for _, p := range slots {
		p.close()
		p.close()
	}
	if len(all.networks) != 0 || all.halfOpen != 0 {
		t.Errorf("%d of %v are left", all.halfOpen, all.networks)
	}
}

func TestConnectionsAreBoundedByNetworkAndInAll(t *testing.T) {
	for _, test := range []struct {
		all, each int
		taken     string // of the six that come
	}{{3, 2, "yynynn"}, {0, 2, "yynyyn"}, {3, 0, "yyynnn"}, {0, 0, "yyyyyy"}} {
		cfg := configOf()
		cfg.Connections, cfg.ConnectionsPerNetwork = test.all, test.each
		all := newConnections(&cfg)
		var slots []*slot
		taken := ""
		for _, from := range []string{"192.0.2.1:1", "192.0.2.1:2", "192.0.2.1:3", "192.0.2.2:1", "192.0.2.2:2", "192.0.2.2:3"} {
			p := all.accept(&socket{from: from})
			if p.hello() == nil {
				p.confirm()
				taken += "y"
			} else {
				p.close()
				taken += "n"
			}
			slots = append(slots, p)
		}
		if taken != test.taken {
			t.Errorf("of %d, %d each: %s, want %s", test.all, test.each, taken, test.taken)
		}
		for _, p := range slots {
			p.close()
			p.close()
			p.confirm() // too late
		}
		if all.open != 0 || all.halfOpen != 0 || len(all.networks) != 0 {
			t.Errorf("%d and %d of %v are left", all.open, all.halfOpen, all.networks)
		}
	}
}

// gRPC may close the socket of a connection without a word to us, until it reads on after the hello.
func TestSlotThatNobodyFreesIsFreeWithItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := configOf()
		cfg.Timeout, cfg.HalfOpen = time.Second, 1
		all := newConnections(&cfg)
		open := func() int {
			all.mu.Lock()
			defer all.mu.Unlock()
			return all.open
		}
		first := &socket{from: "192.0.2.1:1"}
		all.accept(first)
		time.Sleep(time.Second)
		synctest.Wait()
		second := all.accept(&socket{from: "192.0.2.1:2"})
		if first.closed {
			t.Error("its slot was not free")
		}
		ok(t, second.hello())
		if open() != 1 {
			t.Errorf("%d are open", open())
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if open() != 0 {
			t.Errorf("%d are open, of one that gRPC has given up", open())
		}
		second.confirm()  // it has not, and we were late
		second.end(false) // its timer, too
		time.Sleep(time.Minute)
		if open() != 1 {
			t.Errorf("%d are open", open())
		}
		second.close()
	})
}

// accepted is a listener with connections that were made before.
type accepted chan net.Conn

func (a accepted) Accept() (net.Conn, error) { return <-a, nil }
func (accepted) Close() error                { return nil }
func (accepted) Addr() net.Addr              { return nil }

// TestAConnectionOfAnotherServerKeepsItsPlaceUntilItCloses: that server may give it more time for its first request than a
// hello has.
func TestAConnectionOfAnotherServerKeepsItsPlaceUntilItCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := configOf()
		cfg.HalfOpen, cfg.Timeout = 1, time.Second
		th := New(cfg)
		defer th.Close()
		raw := make(accepted, 2)
		l := th.Listen(raw)
		sockets := []*socket{{from: "192.0.2.1:1"}, {from: "192.0.2.1:2"}}
		var conns [2]net.Conn
		for i, s := range sockets {
			raw <- s
			var err error
			if conns[i], err = l.Accept(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * cfg.Timeout)
		}
		if !sockets[0].closed || sockets[1].closed {
			t.Errorf("closed for those that came later: %v, %v", sockets[0].closed, sockets[1].closed)
		}
		for _, c := range conns {
			_ = c.Close()
		}
		if th.conns.halfOpen != 0 || len(th.conns.networks) != 0 {
			t.Errorf("%d are left", th.conns.halfOpen)
		}
	})
}
