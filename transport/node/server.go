package node

import (
	"container/list"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/compression"
	"github.com/push-manager/push-manager/transport/discovery"
)

// Server is the Connect-Node side of pubsub.ConnectNodeService.
type Server struct {
	pubsub.UnimplementedConnectNodeServiceServer

	// Static after New.
	cfg          Config
	bootID       string
	scoped       Scoped       // Sessions, nil where they cannot tell tenants apart
	lasting      Lasting      // Sessions, nil where they take no part in lasting delivery
	filtering    Filtering    // Sessions, nil where they cannot filter
	lister       Lister       // Sessions, nil where they do not name their users
	describer    Describer    // Sessions, nil where they do not tell which connections their users have
	disconnector Disconnector // Sessions, nil where they close no connections
	refusals     refusals
	closesRoom   sync.Mutex    // held by who closes the connections of a room
	listing      chan struct{} // held by the call that lists users
	does         lastingParts
	replays      *replays
	roomLogs     *roomLogs
	features     []pubsub.Feature
	codecs       []pubsub.Codec // in which frames may come
	decoder      *compression.Decoder
	count        counters
	plain        sync.Once // warns of a grpc.Server without ServerOptions

	warn       rate.Sometimes // of broken streams: who opens them decides how many there are
	unreported atomic.Int64   // of those, since the last line

	draining atomic.Bool
	calls    sync.WaitGroup // streams and their senders; joined under mu unless draining

	mu sync.Mutex
	// Guarded by mu.
	streams      map[*stream]struct{}
	seats        map[seatKey]*seat
	silent       list.List               // without a hello, the oldest first; of chan struct{}
	emptied      chan struct{}           // closed when the last stream ends while draining; nil before Drain
	registration *discovery.Registration // nil: not registered
	refusing     *discovery.RefusalWatch // nil: not registered, or nobody is disconnected here
}

// New returns a node that is to be attached to a grpc.Server.
func New(cfg Config) (*Server, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("node config: %w", err)
	}
	codecs, err := compression.Parse(cfg.Compression)
	if err != nil {
		return nil, fmt.Errorf("node config: %w", err)
	}
	decoder, err := compression.NewDecoder(maxFrameBytes)
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	s := &Server{cfg: cfg, bootID: rand.Text(), codecs: codecs, decoder: decoder, warn: rate.Sometimes{Interval: 10 * time.Second}, listing: make(chan struct{}, 1)}
	s.lister, _ = cfg.Sessions.(Lister)
	s.describer, _ = cfg.Sessions.(Describer)
	s.refusals.byKey, s.refusals.close = make(map[string]refusal), func(d *Disconnect) { s.disconnect(d) }
	s.disconnector, _ = cfg.Sessions.(Disconnector)
	if scoped, ok := cfg.Sessions.(Scoped); ok {
		s.scoped, s.features = scoped, []pubsub.Feature{pubsub.Feature_FEATURE_SCOPE}
	}
	if lasting, ok := cfg.Sessions.(Lasting); ok {
		features := lasting.Features()
		if s.does, err = partsOf(features); err != nil {
			return nil, fmt.Errorf("node config: %w", err)
		}
		if s.does.roomLog && !s.does.dedupe {
			return nil, fmt.Errorf("node config: %w", errRoomLogAlone)
		}
		s.lasting, s.features = lasting, append(s.features, features...)
	}
	if filtering, ok := cfg.Sessions.(Filtering); ok && filtering.Filters() {
		s.filtering, s.features = filtering, append(s.features, pubsub.Feature_FEATURE_FILTER)
	}
	if s.disconnector != nil {
		s.features = append(s.features, pubsub.Feature_FEATURE_DISCONNECT)
	}
	s.replays, s.roomLogs = newReplays(s), newRoomLogs(s)
	s.streams, s.seats = make(map[*stream]struct{}), make(map[seatKey]*seat)
	s.count = newCounters(cfg.Metrics)
	newGauges(cfg.Metrics, s)
	return s, nil
}

// ServerOptions are what a grpc.Server needs that serves a node. Without the
// keepalive policy it cuts managers off after half a minute
// (too_many_pings); without the codec each frame is decoded twice.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		// A manager that has vanished without a word is noticed, too.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		grpc.MaxRecvMsgSize(maxFrameBytes),
		grpc.StaticStreamWindowSize(windowBytes),
		grpc.StaticConnWindowSize(4 * windowBytes),
		grpc.ConnectionTimeout(5 * time.Second), // Of the handshake; the default is two minutes.
		grpc.MaxHeaderListSize(16 << 10),
		grpc.ForceServerCodecV2(newCodec()),
	}
}

// Attach registers the service. gs should have been made with ServerOptions.
func (s *Server) Attach(gs grpc.ServiceRegistrar) {
	pubsub.RegisterConnectNodeServiceServer(gs, guarded{s})
}

// NodeID is the id under which the node is registered.
func (s *Server) NodeID() string { return s.cfg.NodeID }

// BootID tells this process from an earlier one at the same address.
func (s *Server) BootID() string { return s.bootID }

// Streams is the number of Deliver streams open now.
func (s *Server) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams)
}

// Drain tells all managers that the node goes, refuses what crosses that notice
// on the wire, writes the acks it owes and returns when all managers have
// closed their streams. When ctx ends first it returns the context's error, and
// the gateway stops its grpc.Server, which breaks the rest. It may be called
// again.
func (s *Server) Drain(ctx context.Context) error {
	s.draining.Store(true)
	s.mu.Lock()
	if s.emptied == nil {
		s.emptied = make(chan struct{})
		if len(s.streams) == 0 {
			close(s.emptied)
		}
		for st := range s.streams {
			st.acks.drain()
		}
	}
	emptied := s.emptied
	s.mu.Unlock()
	select {
	case <-emptied:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("drain node: %d streams left: %w", s.Streams(), ctx.Err())
	}
}

// Close waits for the goroutines of streams. The grpc.Server is stopped before,
// which ends them.
func (s *Server) Close() {
	s.mu.Lock()
	s.draining.Store(true)
	s.mu.Unlock()
	s.replays.close()
	s.roomLogs.close()
	s.calls.Wait()
}

// goUntilClose runs f, which Close ends and waits for, unless the node drains.
func (s *Server) goUntilClose(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining.Load() {
		return false
	}
	s.calls.Go(f)
	return true
}

// pending is the number of users whose clients are waited for.
func (s *Server) pending() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.streams {
		n += st.acks.receipts.pending()
	}
	return n
}

// enter admits a stream.
func (s *Server) enter(st *stream, hello *pubsub.Hello) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Under the lock: a stream is either told by Drain or refused here.
	if s.draining.Load() {
		return errDraining
	}
	if len(s.streams) >= s.cfg.MaxStreams {
		return status.Errorf(codes.ResourceExhausted, "more than %d streams", s.cfg.MaxStreams)
	}
	if err := s.sitLocked(st, hello); err != nil {
		return err
	}
	s.streams[st] = struct{}{}
	s.calls.Add(1)
	return nil
}

func (s *Server) leave(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.calls.Done()
	delete(s.streams, st)
	s.riseLocked(st)
	if len(s.streams) == 0 && s.emptied != nil {
		close(s.emptied) // Nobody enters any more: this is the last one.
	}
}

// online asks the gateway, whose panic is not ours.
func (s *Server) online() (n uint32) {
	defer func() {
		if r := recover(); r != nil {
			s.panicked("Online", r)
			n = 0
		}
	}()
	return clampUint32(s.cfg.Sessions.Online())
}

func (s *Server) panicked(method string, value any) {
	s.count.panics.Inc()
	s.cfg.Logger.Error("sessions panicked", slog.String("method", method), slog.Any("panic", value))
}

func clampUint32(n int) uint32 {
	return uint32(min(max(n, 0), math.MaxUint32))
}
