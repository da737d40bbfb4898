package node

import (
	"cmp"
	"context"
	"fmt"
	"math"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// PushMessage implements pubsub.ConnectNodeServiceServer. A user who is here and
// was not reached is RESOURCE_EXHAUSTED: success=false says that there is no
// connection.
func (s *Server) PushMessage(_ context.Context, r *pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
	if r.GetUserId() == "" {
		return nil, status.Error(codes.InvalidArgument, "user_id: required")
	}
	m, err := s.unaryMessage(r.GetContent(), r.GetRoomId())
	if err != nil {
		return nil, err
	}
	var o handover
	users := [1]string{r.GetUserId()}
	s.handOver(users[:], nil, m, &o)
	o.count(&s.count)
	switch {
	case len(o.failed) > 0:
		return nil, status.Error(codes.ResourceExhausted, cmp.Or(o.reason, reasonNotTaken))
	case len(o.notHere) > 0:
		return &pubsub.PushMessageResponse{Message: fmt.Sprintf("user %q is not here", r.GetUserId())}, nil
	}
	return &pubsub.PushMessageResponse{Success: true}, nil
}

// PushMessageBatch implements pubsub.ConnectNodeServiceServer.
func (s *Server) PushMessageBatch(_ context.Context, r *pubsub.PushMessageBatchRequest) (*pubsub.PushMessageBatchResponse, error) {
	if len(r.GetUserIds()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "user_ids: required, empty is not everybody")
	}
	m, err := s.unaryMessage(r.GetContent(), r.GetRoomId())
	if err != nil {
		return nil, err
	}
	var o handover
	s.handOver(r.GetUserIds(), nil, m, &o)
	o.count(&s.count)
	reply := &pubsub.PushMessageBatchResponse{
		Success:          len(o.notHere)+len(o.failed) == 0,
		DeliveredCount:   clampInt32(o.delivered),
		FailedUserIds:    o.notHere,
		UnreachedUserIds: o.failed,
	}
	if len(o.failed) > 0 {
		reply.Message = cmp.Or(o.reason, reasonNotTaken)
	}
	return reply, nil
}

// Broadcast implements pubsub.ConnectNodeServiceServer.
func (s *Server) Broadcast(_ context.Context, r *pubsub.BroadcastRequest) (*pubsub.BroadcastResponse, error) {
	m, err := s.unaryMessage(r.GetContent(), "")
	if err != nil {
		return nil, err
	}
	var o handover
	s.broadcast("", Filter{}, m, &o)
	o.count(&s.count)
	reply := &pubsub.BroadcastResponse{
		Success:        o.failedUsers == 0,
		DeliveredCount: clampInt32(o.delivered),
		UnreachedCount: clampInt32(o.failedUsers),
	}
	if o.failedUsers > 0 {
		reply.Message = cmp.Or(o.reason, reasonNotTaken)
	}
	return reply, nil
}

// unaryMessage is the message of a unary call, and refuses it while the node
// drains: not with UNAVAILABLE, which also says that a connection broke and
// leaves the manager in doubt.
func (s *Server) unaryMessage(c *pubsub.MessageContent, room string) (*Message, error) {
	s.count.unary.Inc()
	if s.draining.Load() {
		return nil, status.Error(codes.FailedPrecondition, "node is draining")
	}
	if c == nil {
		return nil, status.Error(codes.InvalidArgument, "content: required")
	}
	encoded, err := c.MarshalVT()
	if err != nil {
		return nil, status.Errorf(codes.Internal, "encode content: %v", err)
	}
	return &Message{
		Type:      c.GetType(),
		Data:      c.GetData(),
		Timestamp: c.GetTimestamp(),
		Metadata:  c.GetMetadata(),
		Encoded:   encoded,
		RoomID:    room,
	}, nil
}

func clampInt32(n int) int32 {
	return int32(min(n, math.MaxInt32))
}
