package node

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// TestPanicInACallEndsThatCall breaks the node on purpose: what it panics on it counts.
func TestPanicInACallEndsThatCall(t *testing.T) {
	b := serve(t, Config{Sessions: newGateway()})
	b.server.count.unary, b.server.count.frames = nil, nil
	if _, err := b.client.PushMessage(t.Context(), &pubsub.PushMessageRequest{UserId: "a", Content: text("x")}); status.Code(err) != codes.Internal {
		t.Error("PushMessage:", err)
	}
	if _, err := b.client.PushMessageBatch(t.Context(), &pubsub.PushMessageBatchRequest{UserIds: []string{"a"}, Content: text("x")}); status.Code(err) != codes.Internal {
		t.Error("PushMessageBatch:", err)
	}
	if _, err := b.client.Broadcast(t.Context(), &pubsub.BroadcastRequest{Content: text("x")}); status.Code(err) != codes.Internal {
		t.Error("Broadcast:", err)
	}
	m := b.mustOpen(t)
	m.deliver(toUsers("1", "a"))
	if err := m.wantEnd(codes.Internal); status.Code(err) != codes.Internal {
		t.Error("Deliver:", err)
	}
	if got := b.server.count.panics.Get(); got != 4 {
		t.Errorf("%d panics counted", got)
	}
}
