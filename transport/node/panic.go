package node

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// guarded is the service as it is attached: gRPC leaves panics of handlers to end the
// process, and what managers send must not. A call that panics ends with INTERNAL: what
// it has done is unknown.
type guarded struct{ *Server }

func (s guarded) caught(method string, err *error) {
	if v := recover(); v != nil {
		s.panicked(method, v)
		*err = status.Error(codes.Internal, reasonPanic)
	}
}

func (s guarded) PushMessage(ctx context.Context, r *pubsub.PushMessageRequest) (_ *pubsub.PushMessageResponse, err error) {
	defer s.caught("PushMessage", &err)
	return s.Server.PushMessage(ctx, r)
}

func (s guarded) PushMessageBatch(ctx context.Context, r *pubsub.PushMessageBatchRequest) (_ *pubsub.PushMessageBatchResponse, err error) {
	defer s.caught("PushMessageBatch", &err)
	return s.Server.PushMessageBatch(ctx, r)
}

func (s guarded) Broadcast(ctx context.Context, r *pubsub.BroadcastRequest) (_ *pubsub.BroadcastResponse, err error) {
	defer s.caught("Broadcast", &err)
	return s.Server.Broadcast(ctx, r)
}

func (s guarded) ListUsers(ctx context.Context, r *pubsub.ListUsersRequest) (_ *pubsub.ListUsersResponse, err error) {
	defer s.caught("ListUsers", &err)
	return s.Server.ListUsers(ctx, r)
}

func (s guarded) ListConnections(ctx context.Context, r *pubsub.ListConnectionsRequest) (_ *pubsub.ListConnectionsResponse, err error) {
	defer s.caught("ListConnections", &err)
	return s.Server.ListConnections(ctx, r)
}

func (s guarded) Deliver(call grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse]) (err error) {
	defer s.caught("Deliver", &err)
	return s.Server.Deliver(call)
}
