package refcontroller

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/label"
	pubsub "github.com/push-manager/push-manager/proto"
)

// maxRequestBytes is what 10,000 ids of the longest kind need.
const maxRequestBytes = 4 << 20

// openLate is how long a Controller with a shared store waits until it may answer look-ups before it takes calls: others answer
// them meanwhile. After that the nodes have to reach it, because it may be waiting for their reports.
const openLate = 2 * time.Second

// Server is a Controller on a listener.
type Server struct {
	// Static after New.
	log    *slog.Logger
	grpc   *grpc.Server
	health *health.Server
	svc    *service
	roster *roster
	m      handles
	wg     sync.WaitGroup
	opened chan struct{} // closed when calls are taken

	trace func(traceparent, method string) func(error) // nil: nothing is traced; static

	startOnce, drainOnce, closeOnce sync.Once
	// Written under startOnce.
	stop context.CancelFunc
}

// New makes a Server that does nothing until Serve.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	cfg = cfg.withDefaults()
	s := &Server{log: cfg.Logger, trace: cfg.Trace, m: newHandles(cfg.Metrics), stop: func() {}, health: health.NewServer(), opened: make(chan struct{})}
	s.svc = &service{
		store: cfg.Store,
		hub: &hub{
			most:      cfg.WatchPending,
			overflows: cfg.Metrics.GetOrCreateCounter("controller_watch_overflows_total"),
			changes:   cfg.Metrics.GetOrCreateCounter("controller_changes_total"),
			lapses:    cfg.Metrics.GetOrCreateCounter("controller_watch_lapses_total"),
			watchers:  map[*watcher]struct{}{},
		},
		draining: make(chan struct{}),
		panicked: s.panicked,
		log:      cfg.Logger, impostors: rate.Sometimes{Interval: 10 * time.Second},
	}
	var err error
	if s.roster, err = newRoster(cfg); err != nil {
		return nil, fmt.Errorf("controller: %w", err)
	}
	s.svc.roster = s.roster
	cfg.Store.Notify(s.svc.hub.tell)
	if s.svc.shared = s.roster.shared; s.svc.shared != nil {
		s.svc.hub.told = s.told
		cfg.Store.Notify(s.tell)
	}
	s.gauges(cfg.Metrics, cfg.Store)
	options := s.options()
	if cfg.Credentials != nil {
		options = append(options, grpc.Creds(cfg.Credentials))
	}
	s.grpc = grpc.NewServer(options...)
	pubsub.RegisterControllerServiceServer(s.grpc, s.svc)
	grpc_health_v1.RegisterHealthServer(s.grpc, s.health)
	s.health.SetServingStatus(pubsub.ControllerService_ServiceDesc.ServiceName, grpc_health_v1.HealthCheckResponse_SERVING)
	if !cfg.NoReflection {
		reflection.Register(s.grpc)
	}
	return s, nil
}

func (s *Server) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxConcurrentStreams(1024),
		grpc.MaxHeaderListSize(16 << 10),
		grpc.ConnectionTimeout(5 * time.Second),
		grpc.WaitForHandlers(true), // Close owns what they have started
		// Push-Manager pings each 10 s while it watches; gRPC's default would cut
		// it off for that.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	}
}

func (s *Server) gauges(set *metrics.Set, store Store) {
	gauge := func(name string, read func() int) {
		set.GetOrCreateGauge(name, func() float64 { return float64(read()) })
	}
	gauge("controller_rooms", func() int { return store.Counts().Rooms })
	gauge("controller_users", func() int { return store.Counts().Users })
	gauge("controller_memberships", func() int { return store.Counts().Memberships })
	gauge("controller_watchers", s.svc.hub.len)
	gauge("controller_watch_waiting", s.svc.hub.waiting)
	gauge("controller_warming_up", func() int {
		if s.roster.isWarm() {
			return 0
		}
		return 1
	})
	gauge("controller_nodes_awaited", func() int { return len(*s.roster.awaited.Load()) })
}

// Serve answers on lis until Drain or Close. It owns lis. With a shared store it begins when look-ups may be answered, or 2 s
// later: Opened tells when.
func (s *Server) Serve(lis net.Listener) error {
	s.startOnce.Do(func() {
		ctx, cancel := context.WithCancel(context.Background())
		s.stop = cancel
		if s.roster.watcher != nil {
			s.roster.watcher.Start()
		}
		s.wg.Go(func() { s.roster.loop(ctx) })
		if s.svc.shared != nil {
			s.wg.Go(func() { s.svc.shared.Run(ctx, s.svc.hub.settle) })
		}
		s.wg.Go(func() {
			defer close(s.opened)
			if s.svc.shared != nil {
				s.awaitWarmth(ctx)
			}
		})
	})
	<-s.opened
	err := s.grpc.Serve(lis)
	select {
	case <-s.svc.draining:
		return nil // maybe before it has begun
	default:
	}
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// awaitWarmth waits until look-ups may be answered, for openLate at most.
func (s *Server) awaitWarmth(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, openLate)
	defer cancel()
	for {
		w := s.roster.warmth.Load()
		select {
		case <-w.warm:
			return
		case <-w.cold: // there is another store
		case <-s.svc.draining:
			return
		case <-ctx.Done():
			return
		}
	}
}

// Opened tells whether calls are taken yet.
func (s *Server) Opened() bool {
	select {
	case <-s.opened:
		return true
	default:
		return false
	}
}

// tell passes on what a shared store says.
func (s *Server) tell(c Change) {
	s.svc.hub.tell(c)
	if s.roster.warmth.Load().store != s.roster.store.ID() {
		s.roster.nudge()
	}
}

// told is the time before which all that was visible in a shared store has been told. Of one that was
// lost nobody knows.
func (s *Server) told() time.Time {
	if !s.roster.isWarm() {
		return time.Time{}
	}
	return s.svc.shared.Told()
}

// WarmingUp says why look-ups are not answered yet, "" when they are. Reports are
// taken all the same.
func (s *Server) WarmingUp() string {
	if s.roster.isWarm() {
		return ""
	}
	return s.roster.waiting()
}

// Etcd says why it is not known which nodes are registered, "" when it is, or without etcd.
func (s *Server) Etcd() string {
	w := s.roster.watcher
	if w == nil || w.Synced() {
		return ""
	}
	if why := w.Why(); why != "" {
		return "has not answered yet: " + why
	}
	return "has not answered yet"
}

// Drain refuses new calls, ends the change streams and waits for the calls under
// way, at most until ctx ends. Close follows.
func (s *Server) Drain(ctx context.Context) error {
	s.drainOnce.Do(func() {
		s.health.Shutdown()
		close(s.svc.draining)
	})
	done := make(chan struct{})
	s.wg.Go(func() {
		defer close(done)
		s.grpc.GracefulStop()
	})
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		s.grpc.Stop() // a peer that does not read must not hold us
		<-done
		return fmt.Errorf("drain: %w", ctx.Err())
	}
}

// Close ends everything and waits for it.
func (s *Server) Close() {
	s.closeOnce.Do(func() {
		s.grpc.Stop()
		s.startOnce.Do(func() { close(s.opened) }) // Serve after Close starts nothing
		s.stop()
		if s.roster.watcher != nil {
			s.roster.watcher.Close()
		}
	})
	s.svc.readers.Wait()
	s.wg.Wait()
}

// handles counts requests by method and result.
type handles map[string]*[3]*metrics.Counter

const (
	resultOK = iota
	resultInvalid
	resultError
)

func newHandles(set *metrics.Set) handles {
	h := handles{}
	desc := pubsub.ControllerService_ServiceDesc
	add := func(method string) {
		var c [3]*metrics.Counter
		for i, result := range []string{"ok", "invalid", "error"} {
			c[i] = set.GetOrCreateCounter(label.Name("controller_requests_total", "method", method, "result", result))
		}
		h["/"+desc.ServiceName+"/"+method] = &c
	}
	for _, m := range desc.Methods {
		add(m.MethodName)
	}
	for _, m := range desc.Streams {
		add(m.StreamName)
	}
	return h
}

// count notes how a call of ours ended; health and reflection are not counted.
func (h handles) count(method string, err error) {
	c := h[method]
	if c == nil {
		return
	}
	switch status.Code(err) {
	case codes.OK:
		c[resultOK].Inc()
	case codes.InvalidArgument:
		c[resultInvalid].Inc()
	default:
		c[resultError].Inc()
	}
}

func (s *Server) unary(ctx context.Context, in any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (out any, err error) {
	if s.trace != nil {
		if parents := metadata.ValueFromIncomingContext(ctx, "traceparent"); len(parents) == 1 {
			end := s.trace(parents[0], info.FullMethod)
			defer func() { end(err) }()
		}
	}
	defer func() {
		if p := recover(); p != nil {
			err = s.panicked(info.FullMethod, p)
		}
		s.m.count(info.FullMethod, err)
	}()
	return next(ctx, in)
}

func (s *Server) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = s.panicked(info.FullMethod, p)
		}
		s.m.count(info.FullMethod, err)
	}()
	return next(srv, stream)
}

func (s *Server) panicked(method string, p any) error {
	s.log.Error("panic in a call", "method", method, "panic", p, "stack", strings.TrimSpace(string(debug.Stack())))
	return status.Error(codes.Internal, "internal error")
}
