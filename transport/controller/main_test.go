package controller

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	pubsub "github.com/push-manager/push-manager/proto"
)

func TestMain(m *testing.M) {
	// The metrics library starts one goroutine for each length of summary, for
	// ever: here and not inside of a synctest bubble, which would wait for it.
	newHandles(nil, metrics.NewSet())
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/VictoriaMetrics/metrics.summariesSwapCron"))
}

// script is a Controller that answers what the test says. Methods without a
// function are UNIMPLEMENTED.
type script struct {
	pubsub.UnimplementedControllerServiceServer
	room  func(context.Context, *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error)
	user  func(context.Context, *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error)
	users func(context.Context, *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error)
	// members is ListMembers.
	members func() (*pubsub.ListMembersResponse, error)
	watch   func(grpc.ServerStreamingServer[pubsub.WatchRoutesResponse]) error
	// follow is FollowRoutes after the caller's first message.
	follow func(grpc.BidiStreamingServer[pubsub.FollowRoutesRequest, pubsub.FollowRoutesResponse]) error
}

var errNone = status.Error(codes.Unimplemented, "not here")

func (s *script) GetRoomInfo(ctx context.Context, in *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
	if s.room == nil {
		return nil, errNone
	}
	return s.room(ctx, in)
}

func (s *script) GetUserNode(ctx context.Context, in *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
	if s.user == nil {
		return nil, errNone
	}
	return s.user(ctx, in)
}

func (s *script) GetUserNodes(ctx context.Context, in *pubsub.GetUserNodesRequest) (*pubsub.GetUserNodesResponse, error) {
	if s.users == nil {
		return nil, errNone
	}
	return s.users(ctx, in)
}

func (s *script) ListMembers(context.Context, *pubsub.ListMembersRequest) (*pubsub.ListMembersResponse, error) {
	if s.members == nil {
		return nil, errNone
	}
	return s.members()
}

func (s *script) WatchRoutes(_ *pubsub.WatchRoutesRequest, stream grpc.ServerStreamingServer[pubsub.WatchRoutesResponse]) error {
	if s.watch == nil {
		return errNone
	}
	return s.watch(stream)
}

func (s *script) FollowRoutes(stream grpc.BidiStreamingServer[pubsub.FollowRoutesRequest, pubsub.FollowRoutesResponse]) error {
	if s.follow == nil {
		return errNone
	}
	if first, err := stream.Recv(); err != nil || first.GetLeaseMs() != 3000 || !first.GetDeltas() {
		return status.Errorf(codes.InvalidArgument, "lease_ms is %d, deltas %v (%v)", first.GetLeaseMs(), first.GetDeltas(), err)
	}
	return s.follow(stream)
}

// serving is a script behind a listener in memory that can go down and come back.
type serving struct {
	script *script
	mu     sync.Mutex
	lis    *bufconn.Listener
	srv    *grpc.Server
	done   chan struct{}
}

func serve(t *testing.T, s *script) *serving {
	t.Helper()
	v := &serving{script: s}
	v.up()
	t.Cleanup(v.down)
	return v
}

func (v *serving) up() {
	v.mu.Lock()
	defer v.mu.Unlock()
	lis := bufconn.Listen(1 << 20)
	srv := grpc.NewServer(grpc.MaxRecvMsgSize(64<<20), grpc.MaxSendMsgSize(512<<20),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second}))
	pubsub.RegisterControllerServiceServer(srv, v.script)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(lis) }()
	v.lis, v.srv, v.done = lis, srv, done
}

func (v *serving) down() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.srv != nil {
		v.srv.Stop()
		<-v.done
		v.srv, v.lis = nil, nil
	}
}

func (v *serving) dial(ctx context.Context, _ string) (net.Conn, error) {
	v.mu.Lock()
	lis := v.lis
	v.mu.Unlock()
	if lis == nil {
		return nil, errors.New("refused")
	}
	return lis.DialContext(ctx)
}

// connect makes a Controller for v.
func connect(t *testing.T, v *serving, cfg Config) *Controller {
	t.Helper()
	cfg.Address = "passthrough:///memory"
	cfg.DialOptions = append(cfg.DialOptions, grpc.WithContextDialer(v.dial))
	return open(t, cfg)
}

func open(t *testing.T, cfg Config) *Controller {
	t.Helper()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

// logbook is a log that can be searched.
type logbook struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logbook) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logbook) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.buf.String(), what)
}

func (l *logbook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }
