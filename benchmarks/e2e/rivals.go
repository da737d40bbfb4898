package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/telemetry"
	pubsub "github.com/push-manager/push-manager/proto"
)

// where is how a rival is reached: its API, and its metrics and profiles.
type where struct {
	API string `json:"api"`
	Ops string `json:"ops"`
}

// serveRival serves one rival until the part ends.
func serveRival(ctx context.Context, p *part, srv *grpc.Server) error {
	l, err := listen(ctx)
	if err != nil {
		return err
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.Serve(l) })
	p.onStop(func() { srv.Stop(); serving.Wait() })
	ops, err := telemetry.StartHTTP(telemetry.HTTPConfig{Address: "127.0.0.1:0"})
	if err != nil {
		return err
	}
	p.onStop(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = ops.Close(ctx)
	})
	handle(p, "address", func(context.Context, none) (where, error) {
		return where{API: l.Addr().String(), Ops: ops.Addr().String()}, nil
	})
	return nil
}

// The replies of a push that reached everybody. Their sizes are those of
// Push-Manager's replies.
func userReply() *pubsub.PushToUserResponse {
	return &pubsub.PushToUserResponse{Success: true, Summary: &pubsub.DeliverySummary{Targets: 1, Delivered: 1}}
}

func roomReply(n int) *pubsub.PushToRoomResponse {
	return &pubsub.PushToRoomResponse{
		Success: true, DeliveredCount: int32(n), Summary: &pubsub.DeliverySummary{Targets: int32(n), Delivered: int32(n)},
	}
}

func broadcastReply(n int) *pubsub.BroadcastMessageResponse {
	return &pubsub.BroadcastMessageResponse{
		Success: true, TotalDelivered: int32(n), Summary: &pubsub.DeliverySummary{Targets: int32(n), Delivered: int32(n)},
	}
}

// echo is a bare grpc-go server: it decodes a push and answers it, and that is all.
type echo struct {
	pubsub.UnimplementedPushManagerServiceServer
}

func (echo) PushToUser(context.Context, *pubsub.PushToUserRequest) (*pubsub.PushToUserResponse, error) {
	return userReply(), nil
}

func (echo) PushToRoom(context.Context, *pubsub.PushToRoomRequest) (*pubsub.PushToRoomResponse, error) {
	return roomReply(100), nil
}

func (echo) BroadcastMessage(context.Context, *pubsub.BroadcastMessageRequest) (*pubsub.BroadcastMessageResponse, error) {
	return broadcastReply(100), nil
}

// echoRole is the echo with grpc-go's stock settings.
func echoRole(ctx context.Context, p *part) error {
	srv := grpc.NewServer()
	pubsub.RegisterPushManagerServiceServer(srv, echo{})
	return serveRival(ctx, p, srv)
}

// floorRole is the echo with the server settings of transport/ingress, Push-Manager's
// garbage collection, and a codec that hands bytes through: what grpc-go costs at the
// least.
func floorRole(ctx context.Context, p *part) error {
	cli.TuneMemory(slog.New(slog.DiscardHandler))
	srv := grpc.NewServer(
		grpc.ForceServerCodecV2(rawCodec{}),
		grpc.MaxRecvMsgSize(1<<20),
		grpc.MaxHeaderListSize(16<<10),
		grpc.MaxConcurrentStreams(256),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.NumStreamWorkers(512),
		grpc.StaticStreamWindowSize(256<<10),
		grpc.StaticConnWindowSize(1<<20),
	)
	answer, err := proto.Marshal(userReply())
	if err != nil {
		return fmt.Errorf("encode the reply: %w", err)
	}
	srv.RegisterService(&grpc.ServiceDesc{
		ServiceName: pubsub.PushManagerService_ServiceDesc.ServiceName,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: "PushToUser",
			Handler: func(_ any, _ context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				var in raw
				if err := dec(&in); err != nil {
					return nil, err
				}
				return &raw{b: answer}, nil
			},
		}},
	}, struct{}{})
	return serveRival(ctx, p, srv)
}

// peers is what the naive designs have to know.
type peers struct {
	Controller string            `json:"controller"`
	Nodes      map[string]string `json:"nodes"`
}

// naive is the design that comes first to mind: for each push it asks the
// Controller where the user or the room is, and calls each node there is somebody
// on. It has the stock settings of grpc-go.
type naive struct {
	pubsub.UnimplementedPushManagerServiceServer

	// Static after start.
	controller pubsub.ControllerServiceClient
	nodes      map[string]pubsub.ConnectNodeServiceClient
}

func newNaive(p *part) (*naive, error) {
	arg, err := roleArg[peers]()
	if err != nil {
		return nil, err
	}
	n := &naive{nodes: map[string]pubsub.ConnectNodeServiceClient{}}
	dial := func(address string) (*grpc.ClientConn, error) {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err == nil {
			p.onStop(func() { _ = conn.Close() })
		}
		return conn, err
	}
	conn, err := dial(arg.Controller)
	if err != nil {
		return nil, err
	}
	n.controller = pubsub.NewControllerServiceClient(conn)
	for id, address := range arg.Nodes {
		conn, err := dial(address)
		if err != nil {
			return nil, err
		}
		n.nodes[id] = pubsub.NewConnectNodeServiceClient(conn)
	}
	return n, nil
}

func naiveRole(ctx context.Context, p *part) error {
	n, err := newNaive(p)
	if err != nil {
		return err
	}
	srv := grpc.NewServer()
	pubsub.RegisterPushManagerServiceServer(srv, n)
	return serveRival(ctx, p, srv)
}

// PushToUser is one look-up and one push, each a unary call.
func (n *naive) PushToUser(ctx context.Context, r *pubsub.PushToUserRequest) (*pubsub.PushToUserResponse, error) {
	where, err := n.controller.GetUserNode(ctx, &pubsub.GetUserNodeRequest{UserId: r.GetUserId()})
	if err != nil {
		return nil, err
	}
	node := n.nodes[where.GetNodeId()]
	if node == nil {
		return nil, errNoNode
	}
	reply, err := node.PushMessage(ctx, &pubsub.PushMessageRequest{UserId: r.GetUserId(), Content: r.GetContent()})
	if err != nil {
		return nil, err
	}
	out := userReply()
	out.Success = reply.GetSuccess()
	return out, nil
}

// PushToRoom is one look-up and one unary call per node, all at once, with the
// members that the node holds. One call per member would be a strawman.
func (n *naive) PushToRoom(ctx context.Context, r *pubsub.PushToRoomRequest) (*pubsub.PushToRoomResponse, error) {
	room, err := n.controller.GetRoomInfo(ctx, &pubsub.GetRoomInfoRequest{RoomId: r.GetRoomId()})
	if err != nil {
		return nil, err
	}
	byNode := map[string][]string{}
	for _, u := range room.GetRoomInfo().GetUsers() {
		byNode[u.GetNodeId()] = append(byNode[u.GetNodeId()], u.GetUserId())
	}
	type outcome struct {
		delivered int
		err       error
	}
	outcomes := make(chan outcome, len(byNode))
	for id, users := range byNode {
		go func() {
			node := n.nodes[id]
			if node == nil {
				outcomes <- outcome{err: errNoNode}
				return
			}
			reply, err := node.PushMessageBatch(ctx, &pubsub.PushMessageBatchRequest{UserIds: users, RoomId: r.GetRoomId(), Content: r.GetContent()})
			outcomes <- outcome{int(reply.GetDeliveredCount()), err}
		}()
	}
	delivered := 0
	for range byNode {
		o := <-outcomes
		if o.err != nil {
			err = o.err
		}
		delivered += o.delivered
	}
	if err != nil {
		return nil, err
	}
	return roomReply(delivered), nil
}

// BroadcastMessage is one unary call per node, all at once.
func (n *naive) BroadcastMessage(ctx context.Context, r *pubsub.BroadcastMessageRequest) (*pubsub.BroadcastMessageResponse, error) {
	var (
		mu        sync.Mutex
		wg        sync.WaitGroup
		delivered int
		failed    error
	)
	for _, node := range n.nodes {
		wg.Go(func() {
			reply, err := node.Broadcast(ctx, &pubsub.BroadcastRequest{Content: r.GetContent()})
			mu.Lock()
			defer mu.Unlock()
			delivered += int(reply.GetDeliveredCount())
			if err != nil {
				failed = err
			}
		})
	}
	wg.Wait()
	if failed != nil {
		return nil, failed
	}
	return broadcastReply(delivered), nil
}
