package clienttest

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/push-manager/push-manager/client"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Push is what the server was asked for.
type Push struct {
	// Target is "user:alice", "users", "room:lobby", "rooms" or "everybody".
	Target string
	// Users are those of PushToUsers, Rooms those of PushToRooms, Except those that a push to a room, or to several, leaves out.
	Users, Rooms, Except []string
	Message              client.Message

	MessageID      string
	TTL            time.Duration
	AckByClient    bool
	StoreIfOffline bool
	AsyncReceipt   bool
	CollapseKey    string
	Priority       client.Priority

	// Token is what the caller has shown, "" for nothing.
	Token string
	// Streamed: it came over a Stream.
	Streamed bool
}

// targets are how many users the push is for, as far as the push says it.
func (p *Push) targets() int {
	if p.Target != "users" {
		return 1
	}
	users := slices.Clone(p.Users)
	slices.Sort(users)
	return len(slices.Compact(users))
}

// Server answers pushes until its test ends. All methods may be called from several goroutines.
type Server struct {
	tb       testing.TB
	listener *bufconn.Listener
	server   *grpc.Server
	health   *health.Server
	serving  sync.WaitGroup
	over     chan struct{} // closed at the end of the test

	mu sync.Mutex
	// Guarded by mu.
	handle  func(Push) Reply
	pushes  []Push
	conns   map[net.Conn]struct{}
	drained chan struct{} // closed by Drain, then another one
}

// NewServer starts a Server that delivers every push.
func NewServer(tb testing.TB) *Server {
	tb.Helper()
	s := &Server{tb: tb, listener: bufconn.Listen(1 << 20), over: make(chan struct{}), conns: map[net.Conn]struct{}{}, drained: make(chan struct{})}
	s.Reply(Delivered())
	s.server, s.health = grpc.NewServer(), health.NewServer()
	pubsub.RegisterPushManagerServiceServer(s.server, service{s: s})
	grpc_health_v1.RegisterHealthServer(s.server, s.health)
	s.SetReady(true)
	s.Serve(s.listener)
	tb.Cleanup(func() {
		close(s.over)
		s.server.Stop()
		s.serving.Wait()
	})
	return s
}

// Serve answers at a listener of the test's, too, until stop is called or the test ends. Clients need no Options for it.
func (s *Server) Serve(l net.Listener) (stop func()) {
	s.serving.Go(func() { _ = s.server.Serve(listener{l, s}) }) // ends with Stop, or with l
	return func() {
		_ = l.Close()
		s.Break()
	}
}

// SetReady says by grpc.health.v1 whether the server is ready. It is, at first. Clients do not call one that is not.
func (s *Server) SetReady(ready bool) {
	now := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if ready {
		now = grpc_health_v1.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("pubsub.PushManagerService", now)
}

// Options connect a Client to the server; the target does not matter.
func (s *Server) Options() []client.Option {
	return []client.Option{
		client.WithTransportCredentials(insecure.NewCredentials()),
		client.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.listener.DialContext(ctx) })),
	}
}

// Client makes a Client of the server, which is closed when the test ends.
func (s *Server) Client(options ...client.Option) *client.Client {
	s.tb.Helper()
	c, err := client.New("passthrough:///push-manager", append(s.Options(), options...)...)
	if err != nil {
		s.tb.Fatal(err)
	}
	s.tb.Cleanup(func() { _ = c.Close() })
	return c
}

// Reply answers pushes with one reply after the other, and all further ones with the last one.
func (s *Server) Reply(replies ...Reply) {
	s.tb.Helper()
	if len(replies) == 0 {
		s.tb.Fatal("clienttest: Reply without a reply")
	}
	var mu sync.Mutex
	s.Handle(func(Push) Reply {
		mu.Lock()
		defer mu.Unlock()
		r := replies[0]
		if len(replies) > 1 {
			replies = replies[1:]
		}
		return r
	})
}

// Handle answers pushes with what f says. It may be called from several goroutines; those of one Stream come in order.
func (s *Server) Handle(f func(Push) Reply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handle = f
}

// Pushes are those that came so far, each try by itself.
func (s *Server) Pushes() []Push {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.pushes)
}

// Drain ends Streams as an instance does that shuts down: what it has not answered was not taken. Others may be opened at once.
func (s *Server) Drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.drained)
	s.drained = make(chan struct{})
}

// Break cuts all connections.
func (s *Server) Break() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.conns {
		_ = conn.Close()
	}
	clear(s.conns)
}

func (s *Server) draining() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drained
}

// listener notes the connections.
type listener struct {
	net.Listener

	s *Server
}

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.s.mu.Lock()
		l.s.conns[conn] = struct{}{}
		l.s.mu.Unlock()
	}
	return conn, err
}

// service is the gRPC side of a Server.
type service struct {
	pubsub.UnimplementedPushManagerServiceServer

	s *Server
}

// fields are what requests of pushes have in common.
type fields interface {
	GetContent() *pubsub.MessageContent
	GetOptions() *pubsub.PushOptions
}

// take notes a push and asks for its reply.
func (s *Server) take(ctx context.Context, p Push, r fields, streamed bool) (Push, Reply) {
	c, o := r.GetContent(), r.GetOptions()
	p.Message = client.Message{Type: client.Type(c.GetType()), Data: c.GetData(), Metadata: c.GetMetadata()}
	if c.GetTimestamp() != 0 {
		p.Message.Time = time.Unix(c.GetTimestamp(), 0)
	}
	p.MessageID, p.CollapseKey, p.Priority = o.GetMessageId(), o.GetCollapseKey(), client.Priority(o.GetPriority())
	p.TTL = time.Duration(o.GetTtlMs()) * time.Millisecond
	p.AckByClient = o.GetAck() == pubsub.AckPolicy_ACK_CLIENT
	p.StoreIfOffline = o.GetOffline() == pubsub.OfflinePolicy_OFFLINE_STORE
	p.AsyncReceipt = o.GetReceipt() == pubsub.ReceiptMode_RECEIPT_ASYNC
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("authorization")) > 0 {
		p.Token = strings.TrimPrefix(md.Get("authorization")[0], "Bearer ")
	}
	p.Streamed = streamed
	s.mu.Lock()
	s.pushes = append(s.pushes, p)
	handle := s.handle
	s.mu.Unlock()
	return p, handle(p)
}

// answer does a unary push.
func (s *Server) answer(ctx context.Context, p Push, r fields) (client.Result, error) {
	p, reply := s.take(ctx, p, r, false)
	switch {
	case reply.breaks:
		s.Break()
		return client.Result{}, status.Error(codes.Unavailable, "broken")
	case reply.hangs:
		select {
		case <-ctx.Done():
		case <-s.over:
		}
		return client.Result{}, status.FromContextError(context.Canceled).Err()
	case reply.status != nil:
		return client.Result{}, reply.status.Err()
	}
	return reply.what(p), nil
}

// PushToUser implements pubsub.PushManagerServiceServer, as the other four do.
func (v service) PushToUser(ctx context.Context, r *pubsub.PushToUserRequest) (*pubsub.PushToUserResponse, error) {
	a, err := v.s.answer(ctx, Push{Target: "user:" + r.GetUserId()}, r)
	if err != nil {
		return nil, err
	}
	return &pubsub.PushToUserResponse{Success: a.Success, Message: a.Message, Summary: summary(a)}, nil
}

// PushToUsers see PushToUser.
func (v service) PushToUsers(ctx context.Context, r *pubsub.PushToUsersRequest) (*pubsub.PushToUsersResponse, error) {
	a, err := v.s.answer(ctx, Push{Target: "users", Users: r.GetUserIds()}, r)
	if err != nil {
		return nil, err
	}
	return &pubsub.PushToUsersResponse{Success: a.Success, Message: a.Message, DeliveredCount: int32(a.Delivered), Summary: summary(a)}, nil
}

// PushToRoom see PushToUser.
func (v service) PushToRoom(ctx context.Context, r *pubsub.PushToRoomRequest) (*pubsub.PushToRoomResponse, error) {
	a, err := v.s.answer(ctx, Push{Target: "room:" + r.GetRoomId(), Except: r.GetExcludeUserIds()}, r)
	if err != nil {
		return nil, err
	}
	return &pubsub.PushToRoomResponse{Success: a.Success, Message: a.Message, DeliveredCount: int32(a.Delivered), Summary: summary(a)}, nil
}

// PushToRooms see PushToUser.
func (v service) PushToRooms(ctx context.Context, r *pubsub.PushToRoomsRequest) (*pubsub.PushToRoomsResponse, error) {
	a, err := v.s.answer(ctx, Push{Target: "rooms", Rooms: r.GetRoomIds(), Except: r.GetExcludeUserIds()}, r)
	if err != nil {
		return nil, err
	}
	return &pubsub.PushToRoomsResponse{Success: a.Success, Message: a.Message, DeliveredCount: int32(a.Delivered), Summary: summary(a)}, nil
}

// BroadcastMessage see PushToUser.
func (v service) BroadcastMessage(ctx context.Context, r *pubsub.BroadcastMessageRequest) (*pubsub.BroadcastMessageResponse, error) {
	a, err := v.s.answer(ctx, Push{Target: "everybody"}, r)
	if err != nil {
		return nil, err
	}
	return &pubsub.BroadcastMessageResponse{Success: a.Success, Message: a.Message, TotalDelivered: int32(a.Delivered), Summary: summary(a)}, nil
}

// PushStream answers one push after the other.
func (v service) PushStream(stream grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error {
	drained := v.s.draining()
	incoming := make(chan *pubsub.PushStreamRequest)
	ended := make(chan struct{})
	ctx := stream.Context()
	go func() { // ends with the call
		for {
			r, err := stream.Recv()
			if err != nil {
				close(ended)
				return
			}
			select {
			case incoming <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		select {
		case <-drained:
			return refusal(codes.Unavailable, "DRAINING", 10*time.Millisecond).Err()
		case <-v.s.over:
			return status.Error(codes.Unavailable, "the test is over")
		case <-ended:
			return nil
		case r := <-incoming:
			for _, one := range append(r.GetBatch(), r) {
				a, err := v.s.streamed(ctx, one)
				if err == nil && a != nil {
					err = stream.Send(a)
				}
				if err != nil {
					return err
				}
			}
		}
	}
}

// streamed answers one push of a stream; nil: it gets no answer. An error ends the stream.
func (s *Server) streamed(ctx context.Context, r *pubsub.PushStreamRequest) (*pubsub.PushStreamResponse, error) {
	var p Push
	var f fields
	switch push := r.GetPush().(type) {
	case *pubsub.PushStreamRequest_ToUser:
		p, f = Push{Target: "user:" + push.ToUser.GetUserId()}, push.ToUser
	case *pubsub.PushStreamRequest_ToUsers:
		p, f = Push{Target: "users", Users: push.ToUsers.GetUserIds()}, push.ToUsers
	case *pubsub.PushStreamRequest_ToRoom:
		p, f = Push{Target: "room:" + push.ToRoom.GetRoomId(), Except: push.ToRoom.GetExcludeUserIds()}, push.ToRoom
	case *pubsub.PushStreamRequest_ToRooms:
		p, f = Push{Target: "rooms", Rooms: push.ToRooms.GetRoomIds(), Except: push.ToRooms.GetExcludeUserIds()}, push.ToRooms
	case *pubsub.PushStreamRequest_Broadcast:
		p, f = Push{Target: "everybody"}, push.Broadcast
	default:
		return nil, nil //nolint:nilnil // a batch
	}
	p, reply := s.take(ctx, p, f, true)
	a := &pubsub.PushStreamResponse{Id: r.GetId()}
	switch {
	case reply.breaks:
		s.Break()
		return nil, status.Error(codes.Unavailable, "broken")
	case reply.hangs:
		return nil, nil //nolint:nilnil // see above
	case reply.status != nil:
		a.Error = reply.status.Proto()
		return a, nil
	}
	result := reply.what(p)
	switch r.GetPush().(type) {
	case *pubsub.PushStreamRequest_ToUser:
		a.Result = &pubsub.PushStreamResponse_ToUser{ToUser: &pubsub.PushToUserResponse{Success: result.Success, Message: result.Message, Summary: summary(result)}}
	case *pubsub.PushStreamRequest_ToUsers:
		a.Result = &pubsub.PushStreamResponse_ToUsers{ToUsers: &pubsub.PushToUsersResponse{Success: result.Success, Message: result.Message, DeliveredCount: int32(result.Delivered), Summary: summary(result)}}
	case *pubsub.PushStreamRequest_ToRoom:
		a.Result = &pubsub.PushStreamResponse_ToRoom{ToRoom: &pubsub.PushToRoomResponse{Success: result.Success, Message: result.Message, DeliveredCount: int32(result.Delivered), Summary: summary(result)}}
	case *pubsub.PushStreamRequest_ToRooms:
		a.Result = &pubsub.PushStreamResponse_ToRooms{ToRooms: &pubsub.PushToRoomsResponse{Success: result.Success, Message: result.Message, DeliveredCount: int32(result.Delivered), Summary: summary(result)}}
	default:
		a.Result = &pubsub.PushStreamResponse_Broadcast{Broadcast: &pubsub.BroadcastMessageResponse{Success: result.Success, Message: result.Message, TotalDelivered: int32(result.Delivered), Summary: summary(result)}}
	}
	return a, nil
}
