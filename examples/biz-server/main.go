// Biz-server pushes a text to a room, and again only what is safe to push again:
//
//	go run ./examples/biz-server lobby "Hello"
package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

func main() {
	if len(os.Args) != 3 {
		fail("usage: biz-server ROOM TEXT")
	}
	conn, err := grpc.NewClient(cmp.Or(os.Getenv("PUSH_MANAGER_ADDRESS"), "localhost:50053"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fail(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	reply, err := push(ctx, pubsub.NewPushManagerServiceClient(conn), &pubsub.PushToRoomRequest{
		RoomId: os.Args[1], Content: &pubsub.MessageContent{Data: []byte(os.Args[2])},
	})
	if err != nil {
		fail("not pushed:", err) // without ErrorInfo nobody knows whether it was
	}
	s := reply.GetSummary() // Each target is in one of four counts. Partial results are results.
	fmt.Println(reply.GetMessage(), "delivered", s.GetDelivered(), "offline", s.GetOffline(), "failed", s.GetFailed(), "unknown", s.GetUnknown())
}

// push tries until ctx ends. An error that carries ErrorInfo says that nothing was sent.
func push(ctx context.Context, api pubsub.PushManagerServiceClient, r *pubsub.PushToRoomRequest) (*pubsub.PushToRoomResponse, error) {
	for {
		reply, err := api.PushToRoom(ctx, r, grpc.WaitForReady(true))
		safe, wait := false, 100*time.Millisecond
		for _, detail := range status.Convert(err).Details() {
			switch d := detail.(type) {
			case *errdetails.ErrorInfo:
				safe = d.GetDomain() == "push-manager"
			case *errdetails.RetryInfo:
				wait = d.GetRetryDelay().AsDuration()
			}
		}
		if code := status.Code(err); !safe || code != codes.Unavailable && code != codes.ResourceExhausted {
			return reply, err
		}
		select {
		case <-time.NewTimer(wait).C:
		case <-ctx.Done():
			return nil, err
		}
	}
}

func fail(why ...any) {
	_, _ = fmt.Fprintln(os.Stderr, why...)
	os.Exit(1)
}
