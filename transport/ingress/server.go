package ingress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/tap"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

const (
	serviceName      = "pubsub.PushManagerService"
	pushStreamName   = "PushStream"
	pushStreamMethod = "/" + serviceName + "/" + pushStreamName
)

// lingerWatchers is how long a health watcher is given to be told NOT_SERVING once
// the pushes are done; then its stream ends, which says the same.
const lingerWatchers = 100 * time.Millisecond

// goAwayBound is how long clients are given, once they are told to go, until what they
// still send on an old connection is refused. It is for those who are far away: the
// others are gone after a round trip.
const goAwayBound = 250 * time.Millisecond

// ErrStuck says that a handler did not return although its call had ended, which is a
// fault of our own and must not keep the process from its end. Serve waits for that
// handler.
var ErrStuck = errors.New("calls do not end")

// closeBound is how long handlers get to notice that their calls are cut off. They
// wait for nothing but that.
const closeBound = 2 * time.Second

// Server serves PushManagerService, health and reflection.
type Server struct {
	// Static after New.
	cfg      Config
	decoder  *decoder
	statuses *statuses
	metrics  *instruments
	grpc     *grpc.Server
	codec    codec
	services []Service
	health   *health.Server
	callers  *callers // nil: nobody is limited
	throttle *throttle.Throttle
	space    *space
	unzipper *unzipper     // nil: nothing may be compressed
	turns    chan struct{} // of convert
	streams  *streams
	mostOpen [4]int64 // unary calls that are open, by rank of the priority
	usual    *reply   // of a PushToUser that was delivered
	// What is remembered of pushes with a message id, and of those with receipts.
	messageIDs *messageIDs
	receipts   *receipts
	watching   watching
	unread     time.Duration // how long watches may stay unread once the server has drained otherwise

	calls sync.Pool // of *call

	// serving is what SetServing said last: while it is false, pushes are refused.
	serving atomic.Bool
	// healthy is what SetHealthy said last, and telling is held while health is told:
	// what was said last is what it says.
	healthy atomic.Bool
	telling sync.Mutex

	begun atomic.Bool // Serve has been called

	// The way down: announced is when health went NOT_SERVING, drained ends PushStreams
	// once they are answered, draining refuses new pushes, idle tells Drain that the
	// last push may be done, closing ends the streams of the other services.
	announceOnce sync.Once
	announced    time.Time // written by Announce, under its once
	draining     atomic.Bool
	drainOnce    sync.Once     // guards the closing of drained
	drained      chan struct{} // closed when PushStreams are to end
	idle         chan struct{} // one token
	closeOnce    sync.Once
	closing      chan struct{} // closed when no push is under way any more

	// Readers of streams, which end after their handlers.
	readers sync.WaitGroup

	lastRefusal atomic.Pointer[time.Time] // the last one that was logged
}

// New makes a Server. Nothing runs before Serve.
func New(cfg Config) (*Server, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Server{
		cfg:      cfg,
		decoder:  newDecoder(cfg.Engine.Limits()),
		statuses: newStatuses(),
		codec:    newCodec(),
		metrics:  newInstruments(cfg.Metrics),
		health:   health.NewServer(),
		usual:    newReply(toUser, new(engine.Push), &engine.Result{Found: true, Targets: 1, Delivered: 1}),
		unread:   unreadWatches,
		drained:  make(chan struct{}),
		idle:     make(chan struct{}, 1),
		closing:  make(chan struct{}),
	}
	var err error
	if s.callers, err = newCallers(&cfg); err != nil {
		return nil, err
	}
	s.callers.show(cfg.Metrics)
	s.space = newSpace(cfg.BodyBytes, cfg.Streams+max(cfg.BodyBytes/2/cfg.StreamWindow, 16), cfg.Metrics)
	s.turns = make(chan struct{}, max(runtime.GOMAXPROCS(0)/2, 1))
	if cfg.Gzip {
		s.unzipper = newUnzipper(cfg.MaxRecvBytes, s.panicked)
	}
	s.streams = newStreams(cfg.Streams, cfg.StreamsPerConnection, cfg.Metrics)
	for _, p := range engine.Priorities() {
		s.mostOpen[p.Rank()] = int64(p.Share(cfg.OpenCalls))
	}
	cfg.Metrics.GetOrCreateGauge("push_manager_api_open_limit", func() float64 { return float64(cfg.OpenCalls) })
	s.messageIDs = newMessageIDs(idsMost, cfg.Metrics)
	s.receipts = &receipts{
		log: cfg.Receipts, told: cfg.OnReceipt, faults: s.panicked, total: cfg.Metrics.GetOrCreateCounter("push_manager_receipts_total"),
		booked: func(p *engine.Push, res *engine.Result) {
			s.metrics.recordConfirmed(res)
			s.messageIDs.confirm(p, res)
		},
	}
	if cfg.Receipts == nil {
		s.receipts.log = newReceiptRing(receiptsMost, receiptsBytes, cfg.Metrics)
	}
	s.throttle = throttle.New(throttle.Config{
		Calls: cfg.Calls, Timeout: cfg.ConnectionTimeout, HalfOpen: cfg.Handshakes,
		Connections: cfg.Connections, ConnectionsPerNetwork: cfg.ConnectionsPerAddress,
		Metrics: cfg.Metrics, Logger: cfg.Logger, Panicked: s.panicked, Opened: s.opened(),
	})
	s.grpc = grpc.NewServer(append(s.options(), cfg.Options...)...)
	for _, own := range []*grpc.ServiceDesc{s.desc(), s.jobsDesc(), s.presenceDesc()} {
		s.grpc.RegisterService(own, s)
		s.services = append(s.services, Service{own, s})
	}
	others := services{s.grpc, s}
	healthpb.RegisterHealthServer(others, s.health)
	s.healthy.Store(true)
	s.SetServing(true)
	if !cfg.DisableReflection {
		reflection.Register(others)
	}
	return s, nil
}

// SetServing says whether pushes can be routed. While they cannot, health says
// NOT_SERVING and every push is refused with NOT_READY, those of open PushStreams
// included. A new Server serves; one that drains stays NOT_SERVING whatever is said
// here.
func (s *Server) SetServing(serving bool) {
	s.serving.Store(serving)
	s.tellHealth()
}

// SetHealthy says whether pushes can be delivered. While they cannot, health says
// NOT_SERVING, so that balancers turn to other instances, and pushes that come all the
// same are answered with what becomes of them. A new Server is healthy.
func (s *Server) SetHealthy(healthy bool) {
	s.healthy.Store(healthy)
	s.tellHealth()
}

func (s *Server) tellHealth() {
	s.telling.Lock()
	defer s.telling.Unlock()
	status := healthpb.HealthCheckResponse_NOT_SERVING
	if s.serving.Load() && s.healthy.Load() {
		status = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", status)
	s.health.SetServingStatus(serviceName, status)
}

// Serving is what SetServing said last.
func (s *Server) Serving() bool { return s.serving.Load() }

func (s *Server) options() []grpc.ServerOption {
	c := &s.cfg
	options := []grpc.ServerOption{
		grpc.ForceServerCodecV2(s.codec),
		grpc.Creds(s.throttle.Credentials(c.Credentials)),
		grpc.MaxRecvMsgSize(c.MaxRecvBytes),
		grpc.MaxHeaderListSize(uint32(c.MaxHeaderBytes)),
		grpc.MaxConcurrentStreams(uint32(c.MaxStreams)),
		grpc.ConnectionTimeout(c.ConnectionTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: c.KeepaliveTime, Timeout: c.KeepaliveTimeout, MaxConnectionAge: c.ConnectionAge}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: c.KeepaliveMinTime, PermitWithoutStream: true}),
		grpc.NumStreamWorkers(uint32(c.StreamWorkers)),
		grpc.StaticStreamWindowSize(int32(c.StreamWindow)),
		grpc.StaticConnWindowSize(int32(c.ConnWindow)),
		grpc.InTapHandle(s.tap),
		grpc.WaitForHandlers(true), // Close leaves no handler behind
	}
	if c.Gzip {
		// It lets compressed calls in, and decompresses those of health and reflection, up to MaxRecvBytes. A compressor of package
		// encoding would be that of all servers and clients of the process.
		options = append(options, grpc.RPCDecompressor(grpc.NewGZIPDecompressor())) //nolint:staticcheck // as above, and promised for all of 1.x
	}
	return options
}

// tap counts in a unary call of the push API, before more of its connection is read.
func (s *Server) tap(ctx context.Context, call *tap.Info) (context.Context, error) {
	service, method, _ := strings.Cut(strings.TrimPrefix(call.FullMethodName, "/"), "/")
	streams := method == pushStreamName || method == watchReceipts.String() || method == watchJob.String() || method == watchPresence.String()
	if (service == serviceName || service == jobServiceName || service == presenceServiceName) && !streams {
		ctx = s.throttle.Tap(ctx, call.Header)
	}
	return ctx, nil
}

// desc is the generated description of the service with handlers that take the
// bytes of a request.
func (s *Server) desc() *grpc.ServiceDesc {
	d := &grpc.ServiceDesc{
		ServiceName: serviceName,
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{
			StreamName:    pushStreamName,
			Handler:       s.pushStream,
			ServerStreams: true,
			ClientStreams: true,
		}, {
			StreamName:    watchReceipts.String(),
			Handler:       s.watchReceipts,
			ServerStreams: true,
		}},
		Metadata: pubsub.PushManagerService_ServiceDesc.Metadata,
	}
	for a := range apis {
		d.Methods = append(d.Methods, grpc.MethodDesc{MethodName: a.String(), Handler: s.unaryHandler(a)})
	}
	for a, do := range map[api]func(context.Context, *callInfo, *audit.Entry) ([]byte, error){
		forgetUser: s.forget, replay: s.replayUser, explain: s.explain,
	} {
		d.Methods = append(d.Methods, grpc.MethodDesc{MethodName: a.String(), Handler: s.callHandler(a, do)})
	}
	return d
}

// Serve accepts connections until Drain or Close, and returns nil then. It may be
// called for several listeners.
func (s *Server) Serve(l net.Listener) error {
	s.begun.Store(true)
	if err := s.grpc.Serve(l); err != nil {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// Announce says NOT_SERVING and goes on as before, until Drain. It may be called
// again.
func (s *Server) Announce() {
	s.announceOnce.Do(func() {
		s.health.Shutdown()
		s.announced = time.Now()
	})
}

// Drain says NOT_SERVING, goes on for Config.DrainNotice since that was said, tells
// clients to go elsewhere, refuses new pushes and returns when those under way, open
// PushStreams included, are answered. When ctx ends before, the rest is cut off and
// the error says so; it is ErrStuck, too, if Close says that. A Server that never served
// has nobody to tell, and is drained at once.
func (s *Server) Drain(ctx context.Context) error {
	var stopped <-chan struct{}
	if s.cfg.DrainNotice > 0 && s.begun.Load() {
		stopped = s.sendAway(ctx)
	}
	s.startDraining()
	s.waitIdle(ctx)
	s.closeOnce.Do(func() { close(s.closing) })
	if stopped == nil {
		stopped = s.stopGracefully()
	}
	pause(ctx, stopped, s.unread)
	s.watching.cutOff()
	select {
	case <-stopped:
		return nil
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("drain the push API: %w", ctx.Err()), s.Close())
	}
}

// Close cuts everything off and returns when nothing runs any more, or after 2 s with
// ErrStuck.
func (s *Server) Close() error {
	s.startDraining()
	s.closeOnce.Do(func() { close(s.closing) })
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.grpc.Stop()
		s.readers.Wait()
	}()
	bound := time.NewTimer(closeBound)
	defer bound.Stop()
	select {
	case <-stopped:
		return nil
	case <-bound.C:
		return fmt.Errorf("close the push API with %d pushes in flight: %w", s.metrics.inflight.Load(), ErrStuck)
	}
}

// sendAway refuses nobody: it goes on for as long as balancers need to notice, and then
// closes the listeners and every connection in HTTP/2's good order (GOAWAY). What a client
// sends before it has heard of that is still taken, and what comes too late for that its
// gRPC sends again on another connection, by itself.
func (s *Server) sendAway(ctx context.Context) (stopped <-chan struct{}) {
	s.Announce()
	pause(ctx, nil, time.Until(s.announced.Add(s.cfg.DrainNotice)))
	s.endStreams()
	s.throttle.Close() // what was sent before a client hears of it is read and taken
	stopped = s.stopGracefully()
	pause(ctx, stopped, goAwayBound)
	return stopped
}

// stopGracefully closes the listeners, tells all clients to go and then closes stopped
// when the last one is gone. Close ends it if they stay.
func (s *Server) stopGracefully() <-chan struct{} {
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.grpc.GracefulStop()
		s.readers.Wait()
	}()
	return stopped
}

// pause waits for d, but no longer than until ctx ends or over is closed.
func pause(ctx context.Context, over <-chan struct{}, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-over:
	case <-ctx.Done():
	}
}

func (s *Server) startDraining() {
	s.Announce()
	s.draining.Store(true)
	s.throttle.Close() // what is refused need not wait, and what ends has to be heard
	s.endStreams()
}

func (s *Server) endStreams() { s.drainOnce.Do(func() { close(s.drained) }) }

func (s *Server) waitIdle(ctx context.Context) {
	for s.metrics.inflight.Load() > 0 {
		select {
		case <-s.idle:
		case <-ctx.Done():
			return
		}
	}
}

// notify leaves a token in c, which holds one.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
