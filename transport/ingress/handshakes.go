package ingress

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/net/http2"
)

// errHandshakes ends a connection that would be one of too many without a handshake.
var errHandshakes = errors.New("too many connections of this address without a handshake")

// helloBytes is what every client says first: the preface of HTTP/2, and a frame of settings
// that may be empty (RFC 9113, section 3.4).
const helloBytes = int64(len(http2.ClientPreface) + 9)

// handshakes bounds the connections of each address that have not said hello. Such a one has
// a goroutine and buffers for Config.ConnectionTimeout, whoever opened it.
type handshakes struct {
	// Static.
	limit   int
	timeout time.Duration
	refused *metrics.Counter

	mu  sync.Mutex
	of  map[string]int // by address, of those that have some
	all int
}

func newHandshakes(limit int, timeout time.Duration, set *metrics.Set) *handshakes {
	h := &handshakes{
		limit:   limit,
		timeout: timeout,
		refused: set.GetOrCreateCounter("push_manager_api_connections_refused_total"),
		of:      make(map[string]int),
	}
	set.GetOrCreateGauge("push_manager_api_handshakes", func() float64 {
		h.mu.Lock()
		defer h.mu.Unlock()
		return float64(h.all)
	})
	return h
}

// begin counts a connection from there, until the handshake ends or its time is over.
func (h *handshakes) begin(from net.Addr) (*handshake, error) {
	address := hostOf(from)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.of[address] >= h.limit {
		h.refused.Inc()
		return nil, errHandshakes
	}
	h.of[address]++
	h.all++
	one := &handshake{all: h, address: address}
	// gRPC closes what has not said hello by then, and not always by the net.Conn that it
	// got from us.
	one.bound = time.AfterFunc(h.timeout, one.end)
	return one, nil
}

// handshake is that of one connection. One that nobody counts is nil.
type handshake struct {
	// Static after begin.
	all     *handshakes
	address string
	bound   *time.Timer

	over bool // guarded by all.mu
}

// end may be called again.
func (s *handshake) end() {
	if s == nil {
		return
	}
	h := s.all
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.over {
		return
	}
	s.over = true
	s.bound.Stop()
	h.all--
	if h.of[s.address]--; h.of[s.address] == 0 {
		delete(h.of, s.address)
	}
}

// hostOf is an address without its port.
func hostOf(a net.Addr) string {
	text := a.String()
	if host, _, err := net.SplitHostPort(text); err == nil {
		return host
	}
	return text
}
