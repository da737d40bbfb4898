package load

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server answers pushes in memory.
type server struct {
	pubsub.UnimplementedPushManagerServiceServer

	grpc   *grpc.Server
	listen *bufconn.Listener
	done   chan error

	// answer is asked before each answer. nil: delivered.
	answer func(ctx context.Context, request proto.Message) (*pubsub.DeliverySummary, error)

	mu  sync.Mutex
	got []proto.Message
	at  []time.Time
}

func start(t *testing.T, answer func(context.Context, proto.Message) (*pubsub.DeliverySummary, error)) *server {
	t.Helper()
	s := &server{grpc: grpc.NewServer(), answer: answer, done: make(chan error, 1), listen: bufconn.Listen(1 << 20)}
	pubsub.RegisterPushManagerServiceServer(s.grpc, s)
	go func() { s.done <- s.grpc.Serve(s.listen) }()
	return s
}

func (s *server) close() {
	s.grpc.Stop()
	<-s.done
}

// config has what all tests want. Virtual time has no naps of the kernel's.
func (s *server) config() Config {
	return Config{
		Addresses: []string{"passthrough:///memory"},
		DialOptions: []grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.listen.DialContext(ctx) }),
		},
		Rate: 100, Duration: 2 * time.Second, Mix: Mix{ToUser: 1}, Payload: []byte("hello"), nap: time.Sleep,
	}
}

func (s *server) take(ctx context.Context, m proto.Message) (*pubsub.DeliverySummary, error) {
	s.mu.Lock()
	s.got = append(s.got, proto.Clone(m))
	s.at = append(s.at, time.Now())
	s.mu.Unlock()
	if s.answer == nil {
		return &pubsub.DeliverySummary{Targets: 1, Delivered: 1}, nil
	}
	return s.answer(ctx, m)
}

func good(s *pubsub.DeliverySummary) bool {
	return s.GetDelivered() > 0 && s.GetFailed()+s.GetUnknown() == 0 && len(s.GetNodeFailures()) == 0
}

func (s *server) PushToRoom(ctx context.Context, m *pubsub.PushToRoomRequest) (*pubsub.PushToRoomResponse, error) {
	sum, err := s.take(ctx, m)
	return &pubsub.PushToRoomResponse{Success: good(sum), DeliveredCount: sum.GetDelivered(), Message: "room", Summary: sum}, err
}

func (s *server) PushToUser(ctx context.Context, m *pubsub.PushToUserRequest) (*pubsub.PushToUserResponse, error) {
	sum, err := s.take(ctx, m)
	return &pubsub.PushToUserResponse{Success: good(sum), Message: "user", Summary: sum}, err
}

func (s *server) PushToUsers(ctx context.Context, m *pubsub.PushToUsersRequest) (*pubsub.PushToUsersResponse, error) {
	sum, err := s.take(ctx, m)
	return &pubsub.PushToUsersResponse{Success: good(sum), DeliveredCount: sum.GetDelivered(), Message: "users", Summary: sum}, err
}

func (s *server) BroadcastMessage(ctx context.Context, m *pubsub.BroadcastMessageRequest) (*pubsub.BroadcastMessageResponse, error) {
	sum, err := s.take(ctx, m)
	return &pubsub.BroadcastMessageResponse{Success: good(sum), TotalDelivered: sum.GetDelivered(), Message: "all", Summary: sum}, err
}

func (s *server) PushStream(stream grpc.BidiStreamingServer[pubsub.PushStreamRequest, pubsub.PushStreamResponse]) error {
	ctx := stream.Context()
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		out := &pubsub.PushStreamResponse{Id: m.GetId()}
		switch push := m.GetPush().(type) {
		case *pubsub.PushStreamRequest_ToRoom:
			r, e := s.PushToRoom(ctx, push.ToRoom)
			out.Result, err = &pubsub.PushStreamResponse_ToRoom{ToRoom: r}, e
		case *pubsub.PushStreamRequest_ToUser:
			r, e := s.PushToUser(ctx, push.ToUser)
			out.Result, err = &pubsub.PushStreamResponse_ToUser{ToUser: r}, e
		case *pubsub.PushStreamRequest_ToUsers:
			r, e := s.PushToUsers(ctx, push.ToUsers)
			out.Result, err = &pubsub.PushStreamResponse_ToUsers{ToUsers: r}, e
		case *pubsub.PushStreamRequest_Broadcast:
			r, e := s.BroadcastMessage(ctx, push.Broadcast)
			out.Result, err = &pubsub.PushStreamResponse_Broadcast{Broadcast: r}, e
		default:
			return status.Error(codes.InvalidArgument, "nothing to push")
		}
		if errors.Is(err, errBreak) {
			return status.Error(codes.Unavailable, "broken")
		}
		if err != nil {
			out.Result, out.Error = nil, status.Convert(err).Proto()
		}
		if err := stream.Send(out); err != nil {
			return err
		}
	}
}

// errBreak ends a PushStream.
var errBreak = errors.New("break")

// refusal is a status with which the server says that nothing was sent.
func refusal(t *testing.T, code codes.Code) error {
	t.Helper()
	s, err := status.New(code, "no").WithDetails(&errdetails.ErrorInfo{Domain: "push-manager", Reason: "NO"})
	ok(t, err)
	return s.Err()
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
