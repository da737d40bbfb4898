package refgateway

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/node/membership"
)

// ListenError is an error of Start: an address of the Config cannot be listened on.
type ListenError struct {
	Field string // of Config
	Err   error
}

func (e *ListenError) Error() string { return e.Field + ": " + e.Err.Error() }

// Unwrap is why.
func (e *ListenError) Unwrap() error { return e.Err }

// Gateway is a Connect-Node whose clients come over WebSocket.
type Gateway struct {
	// Static after New.
	cfg        Config
	began      time.Time
	users      *node.Users[*conn]
	wheel      wheel // of connections with something unacknowledged
	unverified unverified
	members    *membership.Reporter
	node       *node.Server
	grpc       *grpc.Server
	health     *health.Server
	count      counters
	deflater   *deflater // nil: nothing is compressed
	cores      int       // that write to clients
	line       line      // of connections that wait for them
	idle       sync.Pool // of *writer

	held    atomic.Int64 // bytes of the frames in all queues, each counted once
	kept    atomic.Int64 // the same of all inboxes
	waiting atomic.Int64 // frames in all inboxes, counted for each
	writers atomic.Int64 // clients for whom something waits

	lastID      atomic.Uint64 // of a connection
	panicLogged atomic.Int64  // when, in ns since began
	draining    atomic.Bool
	clients     sync.WaitGroup // readers and writers; entered through admit
	loops       sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu.
	admitted int  // clients, from the handshake on
	closed   bool // nobody is admitted any more
	started  bool
	empty    chan struct{} // closed when the last client has ended; nil unless somebody waits
	stop     context.CancelFunc

	// Static after Start.
	grpcLis, httpLis, metricsLis net.Listener
	servers                      []*http.Server
}

// New returns a gateway that does nothing until Start.
func New(cfg Config) (*Gateway, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("gateway config: %w", err)
	}
	g := &Gateway{
		cfg: cfg.withDefaults(), began: time.Now(), users: newUsers(), health: health.NewServer(),
		cores: min(runtime.GOMAXPROCS(0), maxWriters),
	}
	g.unverified = unverified{
		mostOfNetwork: g.cfg.Unverified, most: max(1, g.cfg.MaxConnections/unverifiedShare), networks: make(map[string]*list.List),
	}
	var err error
	g.node, err = node.New(node.Config{NodeID: g.cfg.NodeID, Sessions: sessions{g.users}, Compression: g.cfg.Compression, Trace: g.cfg.Trace, Logger: g.cfg.Logger, Metrics: g.cfg.Metrics})
	if err != nil {
		return nil, err
	}
	members := g.cfg.Members
	members.NodeID, members.BootID, members.Logger, members.Metrics = g.cfg.NodeID, g.node.BootID(), g.cfg.Logger, g.cfg.Metrics
	if g.cfg.Etcd != nil {
		members.Registered = g.node.Registered
	}
	if g.members, err = membership.New(members); err != nil {
		return nil, err
	}
	newCounters(g)
	if g.cfg.Deflate {
		g.deflater = newDeflater(g)
	}
	options := node.ServerOptions()
	if g.cfg.Credentials != nil {
		options = append(options, grpc.Creds(g.cfg.Credentials))
	}
	g.grpc = grpc.NewServer(append(options, grpc.ChainUnaryInterceptor(g.guardUnary), grpc.ChainStreamInterceptor(g.guardStream))...)
	g.node.Attach(g.grpc)
	healthpb.RegisterHealthServer(g.grpc, g.health)
	reflection.Register(g.grpc)
	return g, nil
}

// Start listens, serves and registers. The Controller and etcd need not be there
// yet. After an error the gateway is closed.
func (g *Gateway) Start() error {
	ctx, stop := context.WithCancel(context.Background())
	g.mu.Lock()
	g.stop, g.started = stop, true
	g.mu.Unlock()
	if err := g.listen(ctx); err != nil {
		g.Close()
		return err
	}

	g.members.Start()
	g.loops.Go(func() { g.sweepLoop(ctx) })
	g.loops.Go(func() { g.wheelLoop(ctx) })
	clients := g.httpLis
	if g.cfg.ClientTLS != nil {
		clients = tls.NewListener(clients, g.cfg.ClientTLS)
	}
	g.serveHTTP(clients, g.clientHandler())
	if g.metricsLis != nil {
		g.serveHTTP(g.metricsLis, g.metricsHandler())
	}
	g.loops.Go(func() { g.ended("grpc", g.grpc.Serve(g.grpcLis)) })
	if g.cfg.Etcd == nil {
		return nil
	}
	if err := g.node.Register(g.cfg.Etcd, g.advertised()); err != nil {
		g.Close()
		return err
	}
	return nil
}

func (g *Gateway) listen(ctx context.Context) error {
	var listenConfig net.ListenConfig
	for _, l := range []struct {
		field, addr string
		lis         *net.Listener
	}{
		{"GRPCAddress", g.cfg.GRPCAddress, &g.grpcLis},
		{"HTTPAddress", g.cfg.HTTPAddress, &g.httpLis},
		{"MetricsAddress", g.cfg.MetricsAddress, &g.metricsLis},
	} {
		if l.addr == "" {
			continue
		}
		lis, err := listenConfig.Listen(ctx, "tcp", l.addr)
		if err != nil {
			return &ListenError{Field: l.field, Err: err}
		}
		*l.lis = lis
	}
	return nil
}

func (g *Gateway) serveHTTP(lis net.Listener, h http.Handler) {
	s := newHTTPServer(h, g.cfg.Logger)
	g.servers = append(g.servers, s)
	g.loops.Go(func() { g.ended("http", s.Serve(lis)) })
}

// ended is where a server's error ends.
func (g *Gateway) ended(what string, err error) {
	if err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, grpc.ErrServerStopped) {
		g.cfg.Logger.Error("server ended", slog.String("server", what), slog.Any("error", err))
	}
}

func (g *Gateway) sweepLoop(ctx context.Context) {
	ticker := time.NewTicker(max(g.cfg.PingInterval/8, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			g.sweep()
		}
	}
}

func (g *Gateway) advertised() string {
	if g.cfg.AdvertiseAddress != "" {
		return g.cfg.AdvertiseAddress
	}
	return g.grpcLis.Addr().String()
}

// GRPCAddr is where managers are served. Valid after Start, like the next two.
func (g *Gateway) GRPCAddr() net.Addr { return g.grpcLis.Addr() }

// HTTPAddr is where clients are served.
func (g *Gateway) HTTPAddr() net.Addr { return g.httpLis.Addr() }

// MetricsAddr is where metrics are served, nil when they are not.
func (g *Gateway) MetricsAddr() net.Addr {
	if g.metricsLis == nil {
		return nil
	}
	return g.metricsLis.Addr()
}

// The checks that /readyz can leave out.
const (
	checkController = "controller"
	checkDiscovery  = "discovery"
)

// NotReady tells why the gateway should not get clients, nothing when it should. What the checks in exclude say is left out.
func (g *Gateway) NotReady(exclude ...string) (reasons []string) {
	g.mu.Lock()
	started := g.started
	g.mu.Unlock()
	switch {
	case !started:
		return []string{"not started"}
	case g.draining.Load():
		return []string{membership.ErrGoing.Error()}
	}
	if !g.members.Ready() && !slices.Contains(exclude, checkController) {
		reasons = append(reasons, "controller not reachable")
	}
	if g.cfg.Etcd != nil && !g.node.Registered() && !slices.Contains(exclude, checkDiscovery) {
		why := "not registered in etcd"
		if last := g.node.Unregistered(); last != "" {
			why += ": " + last
		}
		reasons = append(reasons, why)
	}
	return reasons
}

// admit counts a client in, before its handshake.
func (g *Gateway) admit() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || g.draining.Load() || g.admitted >= g.cfg.MaxConnections {
		return false
	}
	g.admitted++
	g.clients.Add(1) // Keeps the group open for the reader and the writers.
	return true
}

func (g *Gateway) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.admitted--
	g.clients.Done()
	if g.admitted == 0 && g.empty != nil {
		close(g.empty)
		g.empty = nil
	}
}

// Drain leaves in good order: the node goes out of etcd, the Controller hears who leaves, managers
// are told and finish, clients get what is queued for them and the close code 1001. What does not
// end before ctx does is left to Close. New clients are refused from the beginning.
func (g *Gateway) Drain(ctx context.Context) error {
	g.draining.Store(true)
	g.health.Shutdown()
	var errs []error
	errs = append(errs, g.node.Deregister(ctx))
	// The Controller is first. Once it has answered managers know that nobody is here, and
	// without that a push would fail at a node that has drained, although its user may already
	// be elsewhere. Until then pushes are delivered.
	reporting, reported := halfOf(ctx)
	defer reported()
	reporting, reported = context.WithTimeout(reporting, g.cfg.LeaveTimeout)
	defer reported()
	errs = append(errs, g.members.Drain(reporting))
	// What clients have not acknowledged is the managers' again before the clients are elsewhere.
	g.users.Each(func(conns []*conn) {
		for _, c := range conns {
			c.forget()
		}
	})
	// A manager that is stuck must not take the time of the clients.
	bounded, cancel := halfOf(ctx)
	defer cancel()
	errs = append(errs, g.node.Drain(bounded), g.closeClients(ctx))
	return errors.Join(errs...)
}

// halfOf bounds a step by half of the time that is left.
func halfOf(ctx context.Context) (context.Context, context.CancelFunc) {
	if deadline, ok := ctx.Deadline(); ok {
		return context.WithTimeout(ctx, time.Until(deadline)/2)
	}
	return context.WithCancel(ctx)
}

// closeClients says goodbye to all clients and waits until they have gone.
func (g *Gateway) closeClients(ctx context.Context) error {
	g.users.Each(func(conns []*conn) {
		for _, c := range conns {
			c.bye(closeGoingAway, false)
		}
	})
	g.unverified.each(func(c *conn) { c.bye(closeGoingAway, false) })
	g.mu.Lock()
	if g.admitted == 0 {
		g.mu.Unlock()
		return nil
	}
	if g.empty == nil {
		g.empty = make(chan struct{})
	}
	empty := g.empty
	g.mu.Unlock()
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("close clients: %d left: %w", g.users.Connections(), ctx.Err())
	}
}

// Close ends everything at once and waits for it. It may follow Drain, and may be
// called again.
func (g *Gateway) Close() {
	g.mu.Lock()
	g.draining.Store(true)
	closed, stop := g.closed, g.stop
	g.closed = true
	g.mu.Unlock()
	if closed {
		return
	}
	// Bounded: etcd may be away, and the lease ends by itself.
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := g.node.Deregister(ctx); err != nil {
		g.cfg.Logger.Warn("deregister", slog.Any("error", err))
	}
	g.grpc.Stop()
	g.node.Close()
	for _, s := range g.servers {
		_ = s.Close() // Its listener is closed either way.
	}
	for _, lis := range []net.Listener{g.grpcLis, g.httpLis, g.metricsLis} {
		if lis != nil {
			_ = lis.Close() // Mostly the second time.
		}
	}
	g.members.Close() // Leaves that Drain has not reported are not reported.
	g.users.Each(func(conns []*conn) {
		for _, c := range conns {
			c.shut()
		}
	})
	g.unverified.each(func(c *conn) { c.shut() })
	g.clients.Wait()
	if stop != nil {
		stop()
	}
	g.loops.Wait()
}
