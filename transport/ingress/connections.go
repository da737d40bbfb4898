package ingress

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/time/rate"
)

var errTooManyConnections = errors.New("too many connections")

// connections bounds the connections that have said hello, in all and of each network: each has
// its buffers and goroutines, whether anything is asked on it or not. One more is closed:
// those that are there may be in use.
type connections struct {
	// Static.
	all, each int
	refused   *metrics.Counter
	log       *slog.Logger

	warn rate.Sometimes

	mu   sync.Mutex
	of   map[string]int // by network; none is 0
	open int
}

func newConnections(c *Config) *connections {
	s := &connections{
		all: c.Connections, each: c.ConnectionsPerAddress,
		refused: c.Metrics.GetOrCreateCounter("push_manager_api_connections_refused_total"),
		log:     c.Logger,
		warn:    rate.Sometimes{Interval: time.Second},
		of:      make(map[string]int),
	}
	c.Metrics.GetOrCreateGauge("push_manager_api_connections", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(s.open)
	})
	return s
}

// check refuses the connection, if it would be one too many.
func (p *place) check() error {
	if p == nil {
		return nil
	}
	s, network := p.all, p.network
	s.mu.Lock()
	open, of := s.open, s.of[network]
	s.mu.Unlock()
	if open < s.all && of < s.each {
		return nil
	}
	s.refused.Inc()
	s.warn.Do(func() {
		s.log.Warn("too many connections: new ones are refused", "network", network, "connections", open, "of_the_network", of)
	})
	return errTooManyConnections
}

// place is that of one connection. One that nobody counts is nil.
type place struct {
	all     *connections
	network string
	taken   bool // guarded by all.mu
	gone    bool // guarded by all.mu
}

// take counts the connection in, until leave. It is for when gRPC has taken the connection: of
// one that it gives up before, nobody would be told.
func (p *place) take() {
	if p == nil {
		return
	}
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	if p.taken || p.gone {
		return
	}
	p.taken = true
	p.all.open++
	p.all.of[p.network]++
}

// leave may be called again, and before take.
func (p *place) leave() {
	if p == nil {
		return
	}
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	if p.gone = true; !p.taken {
		return
	}
	p.taken = false
	p.all.open--
	if p.all.of[p.network]--; p.all.of[p.network] == 0 {
		delete(p.all.of, p.network)
	}
}
