package presence

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/controller"
)

// Bounds that no setting changes.
const (
	// PageMost is how many members a page has, about, and what a page_size of 0 stands for.
	PageMost = 1000
	// membersPerSecond is how many members all callers together read from pages, beyond a first membersBurst: at some 2 us of
	// CPU each, at the Controller and here, a tenth of two cores. Pushes keep the rest.
	membersPerSecond = 100_000
	membersBurst     = 10_000
	// UsersMost is how many users one call asks for.
	UsersMost = 1000
	// replyBytes bounds the answer of Users: clients of gRPC take 4 MiB by default.
	replyBytes = 3 << 20
)

// Errors, beside engine.ErrUnavailable, ErrOverloaded and ErrDraining.
var (
	// Of the Controller.
	ErrNoPages   = controller.ErrNoPages
	ErrPageGone  = controller.ErrPageGone
	ErrPageToken = controller.ErrPageToken

	ErrTooLarge = errors.New("the reply would be too large: ask for fewer")
	ErrFull     = errors.New("this instance watches as many rooms and users as it may, in all or for one tenant")
	ErrPosition = errors.New("must be a position that WatchPresence has answered, or empty")
)

// Controller is who is asked where rooms and users are; *controller.Controller is one.
type Controller interface {
	ListMembers(ctx context.Context, room, token string, size int) (*pubsub.ListMembersResponse, error)
	Whereabouts(ctx context.Context, users []string) ([]*pubsub.GetUserNodeResponse, error)
	// Watched tells whether the change stream vouches for what has not been named.
	Watched() bool
	Renewed() time.Time
}

var _ Controller = (*controller.Controller)(nil)

// Config of a Service. Zero fields mean the defaults; Controller, Room and Connections are required.
type Config struct {
	Controller Controller
	// Room is engine.Engine.Room.
	Room func(ctx context.Context, room string) (*route.Snapshot, error)
	// Connections is link.Set.ListConnections.
	Connections func(ctx context.Context, node string, users []string) ([]*pubsub.UserConnections, error)

	// Reads is how many calls, and looks at what is watched, ask the Controller or nodes at a time, and a quarter of it is how many of
	// one tenant do. Default 16. Others wait.
	Reads int
	// Watched is how many rooms and users are watched at a time, those of the last minute included. A tenant has a share of it
	// (ids.TenantShare). Default 1,000.
	Watched int
	// WatchedMembers is how many members watched rooms may have together when another one comes. Default 4,000,000.
	WatchedMembers int
	// Linger is for how long a room or user that nobody watches any more is followed, for who comes back. Default 1 m.
	Linger time.Duration

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

// Defaults are what the zero fields of a Config stand for: a program takes the defaults of its keys from here.
func Defaults() Config { return Config{}.withDefaults() }

func (c Config) withDefaults() Config {
	defaultTo(&c.Reads, 16)
	defaultTo(&c.Watched, 1000)
	defaultTo(&c.WatchedMembers, 4_000_000)
	defaultTo(&c.Linger, time.Minute)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = metrics.NewSet()
	}
	return c
}

func defaultTo[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Service answers. Its methods are safe for concurrent use.
type Service struct {
	// Static after New.
	cfg    Config
	log    *slog.Logger
	m      *instruments
	shared turns          // of all callers
	begin  func(*subject) // begins to follow one
	stop   context.CancelFunc
	ended  <-chan struct{} // closed by Close
	wg     sync.WaitGroup  // those who follow

	tenants sync.Map // of turns, by scope: of each tenant that has asked since the start

	watched
}

// turns bounds what callers ask for: how many are asking at a time, and how many members they read from pages.
type turns struct {
	places chan struct{}
	pace   *rate.Limiter
}

// turnsOf is what bounds a caller of a scope: a tenant has a quarter of what there is for all.
func (s *Service) turnsOf(scope string) []turns {
	if scope == "" {
		return []turns{s.shared}
	}
	own, known := s.tenants.Load(scope)
	if !known {
		places := make(chan struct{}, ids.TenantShare(s.cfg.Reads, 0))
		own, _ = s.tenants.LoadOrStore(scope, turns{places, rate.NewLimiter(membersPerSecond/4, membersBurst/4)})
	}
	return []turns{own.(turns), s.shared}
}

// New makes a Service. Close ends it.
func New(cfg Config) (*Service, error) {
	cfg = cfg.withDefaults()
	switch {
	case cfg.Controller == nil || cfg.Room == nil || cfg.Connections == nil:
		return nil, errors.New("presence: Controller, Room and Connections are required")
	case cfg.Reads < 0 || cfg.Watched < 0 || cfg.WatchedMembers < 0 || cfg.Linger < 0:
		return nil, errors.New("presence: a bound is negative")
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Service{cfg: cfg, log: cfg.Logger, shared: turns{make(chan struct{}, cfg.Reads), rate.NewLimiter(membersPerSecond, membersBurst)}, stop: cancel, ended: ctx.Done()}
	s.begin = func(sub *subject) { s.wg.Go(func() { s.followLoop(ctx, sub) }) }
	s.subjects = map[target]*subject{}
	s.m = newInstruments(s, cfg.Metrics)
	return s, nil
}

// Close ends what is followed. Watches end with engine.ErrDraining.
func (s *Service) Close() {
	s.stop()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.wg.Wait()
}

// enter takes a place among those of a scope who ask, and gives it back with the function that it returns.
func (s *Service) enter(ctx context.Context, scope string) (leave func(), err error) {
	var taken []turns
	leave = func() {
		for _, t := range taken {
			<-t.places
		}
	}
	for _, t := range s.turnsOf(scope) {
		select {
		case t.places <- struct{}{}:
		default:
			s.m.waiting.Add(1)
			select {
			case t.places <- struct{}{}:
			case <-ctx.Done():
				err = fmt.Errorf("%w: too many ask for presence", engine.ErrOverloaded)
			}
			s.m.waiting.Add(-1)
			if err != nil {
				leave()
				return nil, err
			}
		}
		taken = append(taken, t)
	}
	return leave, nil
}

// recovered turns a panic into an error, of what is made of what Controllers and nodes say.
func (s *Service) recovered(where string, err *error) {
	if v := recover(); v != nil {
		s.m.panics.Inc()
		s.log.Error("panic in presence", "where", where, "panic", v, "stack", string(debug.Stack()))
		*err = engine.ErrInternal
	}
}

// Members is a page of the members of a room. One that comes too early waits for its turn.
func (s *Service) Members(ctx context.Context, scope, room, token string, size int) (*pubsub.GetRoomMembersResponse, error) {
	for _, t := range s.turnsOf(scope) {
		if err := t.pace.WaitN(ctx, cmp.Or(min(size, PageMost), PageMost)); err != nil {
			return nil, fmt.Errorf("%w: too many members are read", engine.ErrOverloaded)
		}
	}
	leave, err := s.enter(ctx, scope)
	if err != nil {
		return nil, err
	}
	defer leave()
	page, err := s.cfg.Controller.ListMembers(ctx, scope+room, token, size)
	if err != nil {
		return nil, err //nolint:wrapcheck // it says what was asked
	}
	out := &pubsub.GetRoomMembersResponse{NextPageToken: page.GetNextPageToken(), UserCount: page.GetUserCount()}
	for _, m := range page.GetMembers() {
		user, own := strings.CutPrefix(m.GetUserId(), scope)
		if !own {
			continue
		}
		member := &pubsub.RoomMember{UserId: user, UserName: strings.ToValidUTF8(m.GetUserName(), "�"), NodeId: m.GetNodeId()}
		if at := m.GetJoinedAt(); at > 0 {
			member.JoinTime = &timestamppb.Timestamp{Seconds: at}
		}
		out.Members = append(out.Members, member)
	}
	return out, nil
}

// shownRoom is a room as a caller of the scope knows it; "" for one that is not to be shown. The rooms in which each node
// keeps all its users are none.
func shownRoom(room, scope string) string {
	room, own := strings.CutPrefix(room, scope)
	if !own || strings.HasPrefix(room, ids.ReservedRooms) {
		return ""
	}
	return room
}
