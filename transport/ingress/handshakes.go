package ingress

import (
	"container/list"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/time/rate"
)

// handshakes bounds the connections of each network that have not said hello, which is the
// preface of HTTP/2 and a frame of settings (RFC 9113, section 3.4). Such a one has a goroutine
// and buffers for Config.ConnectionTimeout, whoever opened it. One more costs the oldest its
// place: who means to speak does so at once, also where many share an address with somebody
// who does not.
type handshakes struct {
	// Static.
	limit   int
	timeout time.Duration
	evicted *metrics.Counter
	log     *slog.Logger

	warn rate.Sometimes

	mu  sync.Mutex
	of  map[string]*list.List // of *handshake, by network, the oldest first; none is empty
	all int
}

func newHandshakes(c *Config) *handshakes {
	h := &handshakes{
		limit:   c.Handshakes,
		timeout: c.ConnectionTimeout,
		evicted: c.Metrics.GetOrCreateCounter("push_manager_api_handshakes_evicted_total"),
		log:     c.Logger,
		warn:    rate.Sometimes{Interval: time.Second},
		of:      make(map[string]*list.List),
	}
	c.Metrics.GetOrCreateGauge("push_manager_api_handshakes", func() float64 {
		h.mu.Lock()
		defer h.mu.Unlock()
		return float64(h.all)
	})
	return h
}

// begin counts a connection from there, until the handshake ends or its time is over.
func (h *handshakes) begin(from net.Addr, conn io.Closer) *handshake {
	one := &handshake{all: h, network: networkOf(from), conn: conn}
	var oldest *handshake
	h.mu.Lock()
	line := h.of[one.network]
	if line != nil && line.Len() >= h.limit {
		oldest, _ = line.Front().Value.(*handshake)
		h.endLocked(oldest)
		line = h.of[one.network]
	}
	if line == nil {
		line = list.New()
		h.of[one.network] = line
	}
	one.place = line.PushBack(one)
	h.all++
	// gRPC closes what has not said hello by then, and not always by the net.Conn that it
	// got from us.
	one.bound = time.AfterFunc(h.timeout, one.end)
	h.mu.Unlock()
	if oldest != nil {
		_ = oldest.conn.Close() // it may be closed already
		h.evicted.Inc()
		h.warn.Do(func() {
			h.log.Warn("too many connections without a handshake: the oldest are closed", "network", one.network, "limit", h.limit)
		})
	}
	return one
}

// endLocked may be called again.
func (h *handshakes) endLocked(s *handshake) {
	if s.place == nil {
		return
	}
	line := h.of[s.network]
	line.Remove(s.place)
	if line.Len() == 0 {
		delete(h.of, s.network)
	}
	s.place = nil
	s.bound.Stop()
	h.all--
}

// handshake is that of one connection. One that nobody counts is nil.
type handshake struct {
	// Static after begin.
	all     *handshakes
	network string
	conn    io.Closer
	bound   *time.Timer

	place *list.Element // in its line, nil when it is over; guarded by all.mu
}

// end may be called again.
func (s *handshake) end() {
	if s == nil {
		return
	}
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	s.all.endLocked(s)
}

// networkBits is what a customer has of IPv6 addresses at least (RFC 6177, section 2).
const networkBits = 64

// networkOf is what an address belongs to, for a bound that more addresses must not get
// round: of IPv6 the first half.
func networkOf(a net.Addr) string {
	host := hostOf(a)
	ip, err := netip.ParseAddr(host)
	if err != nil || ip.Unmap().Is4() {
		return host
	}
	network, err := ip.WithZone("").Prefix(networkBits)
	if err != nil {
		return host
	}
	return network.String()
}

// hostOf is an address without its port.
func hostOf(a net.Addr) string {
	text := a.String()
	if host, _, err := net.SplitHostPort(text); err == nil {
		return host
	}
	return text
}
