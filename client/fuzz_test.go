package client_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/client"
	pubsub "github.com/push-manager/push-manager/proto"
)

// raw passes bytes on as they are.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil //nolint:forcetypeassert // ours
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize() //nolint:forcetypeassert // ours
	return nil
}

// FuzzReplies has a server answer with any bytes, over gRPC: nothing panics or hangs, and what is no account is no Result.
func FuzzReplies(f *testing.F) {
	for _, m := range []proto.Message{
		&pubsub.PushToUserResponse{Success: true, Message: "m", Summary: &pubsub.DeliverySummary{Targets: 1, Delivered: 1, NodeFailures: []*pubsub.NodeFailure{{NodeId: "n", Reason: "failed: x", Users: -1}}}},
		deliveredTo(1), deliveredTo(0), deliveredTo(1 << 63),
		&pubsub.PushStreamResponse{Batch: []*pubsub.PushStreamResponse{deliveredTo(1), deliveredTo(1), deliveredTo(2)}},
		&pubsub.PushStreamResponse{Id: 1, Batch: []*pubsub.PushStreamResponse{{Batch: []*pubsub.PushStreamResponse{deliveredTo(1)}}}},
		&pubsub.PushStreamResponse{Id: 1, Result: &pubsub.PushStreamResponse_ToRoom{ToRoom: &pubsub.PushToRoomResponse{}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{0x52, 0xff, 0xff, 0xff, 0xff, 0x0f})
	var mu sync.Mutex
	var reply []byte
	listen := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var got []byte
		for {
			if stream.RecvMsg(&got) != nil {
				return nil //nolint:nilerr // the caller has gone
			}
			mu.Lock()
			b := reply
			mu.Unlock()
			if err := stream.SendMsg(b); err != nil {
				return err
			}
			if method, _ := grpc.MethodFromServerStream(stream); method != pubsub.PushManagerService_PushStream_FullMethodName {
				return nil
			}
		}
	}))
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listen) })
	c, err := client.New("passthrough:///fuzz", client.WithTransportCredentials(insecure.NewCredentials()), client.WithoutHealthChecks(),
		client.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listen.DialContext(ctx) })))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = c.Close(); server.Stop(); serving.Wait() })
	f.Fuzz(func(t *testing.T, b []byte) {
		mu.Lock()
		reply = b
		mu.Unlock()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		check := func(r client.Result, err error) {
			if err == nil && (r.Targets != r.Delivered+r.Offline+r.Failed+r.Unknown || min(r.Targets, r.Stored, r.Acked) < 0) {
				t.Errorf("%+v", r)
			}
			if err != nil && !errors.Is(err, client.ErrUnknown) {
				t.Errorf("nobody said that nothing was sent: %v", err)
			}
		}
		check(c.PushToUser(ctx, "alice", client.Text("x")))
		s := c.Stream(client.StreamConfig{})
		soon, cancel := context.WithTimeout(ctx, 50*time.Millisecond) // an answer for others is none
		defer cancel()
		if p, err := s.Send(soon, client.User("alice"), client.Text("x")); err == nil {
			r, err := p.Wait(ctx)
			if errors.Is(err, context.DeadlineExceeded) {
				err = nil // perhaps before it was sent
			}
			check(r, err)
		}
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
	})
}
