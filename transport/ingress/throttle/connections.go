package throttle

import (
	"container/list"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/time/rate"

	"github.com/push-manager/push-manager/internal/remote"
)

var errTooManyConnections = errors.New("too many connections")

// connections bounds them. One that has not said hello, which is the preface of HTTP/2 and a frame
// of settings (RFC 9113, section 3.4), has a goroutine and buffers for Config.Timeout, whoever opened
// it. One more costs the oldest its slot: who means to speak does so at once, also where many share
// an address with somebody who does not. One that has said hello may be in use: there the new one is
// closed.
type connections struct {
	// Static.
	cfg              *Config
	refused, evicted *metrics.Counter

	warn rate.Sometimes

	mu             sync.Mutex
	networks       map[string]*neighbors // none is empty
	open, halfOpen int
}

// neighbors are the connections of one network.
type neighbors struct {
	open     int
	halfOpen list.List // of *slot, the oldest first
}

// slot is the place of one connection.
type slot struct {
	// Static.
	conns   *connections
	network string
	socket  net.Conn
	// expire frees the slot of a connection that gRPC has given up: it closes the socket, and not
	// always the Conn that it got from us.
	expire *time.Timer

	// Guarded by conns.mu.
	halfOpen  *list.Element
	open      bool
	confirmed bool
	closed    bool
}

func newConnections(cfg *Config) *connections {
	s := &connections{
		cfg:      cfg,
		refused:  cfg.Metrics.GetOrCreateCounter("push_manager_api_connections_refused_total"),
		evicted:  cfg.Metrics.GetOrCreateCounter("push_manager_api_handshakes_evicted_total"),
		warn:     rate.Sometimes{Interval: time.Second},
		networks: make(map[string]*neighbors),
	}
	gauge := func(name string, n *int) {
		cfg.Metrics.GetOrCreateGauge(name, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return float64(*n)
		})
	}
	gauge("push_manager_api_connections", &s.open)
	gauge("push_manager_api_handshakes", &s.halfOpen)
	cfg.Metrics.GetOrCreateGauge("push_manager_api_connections_limit", func() float64 { return float64(cfg.Connections) })
	return s
}

// accept gives a connection its slot, until it is closed or its time is over.
func (s *connections) accept(socket net.Conn) *slot {
	p := &slot{conns: s, network: remote.Network(socket.RemoteAddr()), socket: socket}
	var oldest *slot
	s.mu.Lock()
	n := s.networks[p.network]
	if n == nil {
		n = new(neighbors)
		s.networks[p.network] = n
	}
	p.halfOpen = n.halfOpen.PushBack(p)
	s.halfOpen++
	if n.halfOpen.Len() > s.cfg.HalfOpen {
		oldest = n.halfOpen.Front().Value.(*slot)
		oldest.closed = true
		oldest.freeLocked()
	}
	p.expire = time.AfterFunc(s.cfg.Timeout, func() { p.end(false) })
	s.mu.Unlock()
	if oldest != nil {
		_ = oldest.socket.Close() // it may be closed already
		s.evicted.Inc()
		s.warn.Do(func() {
			s.cfg.Logger.Warn("too many connections without a handshake: the oldest are closed", "network", p.network, "limit", s.cfg.HalfOpen)
		})
	}
	return p
}

// hello tells whether a connection that has said hello is one too many.
func (p *slot) hello() error {
	s := p.conns
	s.mu.Lock()
	of := 0
	if n := s.networks[p.network]; n != nil {
		of = n.open
	}
	open := s.open
	fits := (s.cfg.Connections <= 0 || open < s.cfg.Connections) && (s.cfg.ConnectionsPerNetwork <= 0 || of < s.cfg.ConnectionsPerNetwork)
	p.freeLocked()
	if fits && !p.closed {
		p.openLocked()
		p.expire.Reset(s.cfg.Timeout)
	}
	s.mu.Unlock()
	if fits {
		return nil
	}
	s.refused.Inc()
	s.warn.Do(func() {
		s.cfg.Logger.Warn("too many connections: new ones are refused", "network", p.network, "connections", open, "of_the_network", of)
	})
	return errTooManyConnections
}

// confirm keeps the slot until the connection is closed: gRPC has taken it, and will do so.
func (p *slot) confirm() {
	p.conns.mu.Lock()
	defer p.conns.mu.Unlock()
	p.expire.Stop()
	p.confirmed = true
	if !p.open && !p.closed {
		p.openLocked()
	}
}

// keep has the slot of a connection that has said nothing end with it, and not before: its server closes what it has got
// from us, and may give it more time than Config.Timeout.
func (p *slot) keep() { p.expire.Stop() }

func (p *slot) close() { p.end(true) }

// end frees the slot. closed: for good.
func (p *slot) end(closed bool) {
	p.conns.mu.Lock()
	defer p.conns.mu.Unlock()
	if p.confirmed && !closed { // its time was over just then
		return
	}
	p.closed = p.closed || closed
	p.expire.Stop()
	p.freeLocked()
}

func (p *slot) openLocked() {
	s := p.conns
	n := s.networks[p.network]
	if n == nil {
		n = new(neighbors)
		s.networks[p.network] = n
	}
	n.open++
	s.open++
	p.open = true
}

// freeLocked may be called again.
func (p *slot) freeLocked() {
	s := p.conns
	n := s.networks[p.network]
	if p.halfOpen != nil {
		n.halfOpen.Remove(p.halfOpen)
		p.halfOpen = nil
		s.halfOpen--
	}
	if p.open {
		p.open = false
		n.open--
		s.open--
	}
	if n != nil && n.open == 0 && n.halfOpen.Len() == 0 {
		delete(s.networks, p.network)
	}
}
