// Biz-server pushes a text to a room, and again only what is safe to push again:
//
//	go run ./examples/biz-server lobby "Hello"
package main

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: biz-server ROOM TEXT")
	}
	addr := cmp.Or(os.Getenv("PUSH_MANAGER_ADDRESS"), "localhost:50053")
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	reply, err := push(ctx, pubsub.NewPushManagerServiceClient(conn), &pubsub.PushToRoomRequest{
		RoomId: os.Args[1], Content: &pubsub.MessageContent{Data: []byte(os.Args[2])},
	})
	if err != nil {
		log.Fatal(err) // Without ErrorInfo nobody knows whether it was pushed.
	}
	s := reply.GetSummary() // Each target is in one of four counts. Partial results are results.
	fmt.Println(reply.GetMessage(), "delivered", s.GetDelivered(), "offline", s.GetOffline(), "failed", s.GetFailed(), "unknown", s.GetUnknown())
}

// push tries until ctx ends. An error with RetryInfo says that nothing was sent, and when to push again.
func push(ctx context.Context, api pubsub.PushManagerServiceClient, r *pubsub.PushToRoomRequest) (*pubsub.PushToRoomResponse, error) {
	reply, err := api.PushToRoom(ctx, r, grpc.WaitForReady(true))
	for _, detail := range status.Convert(err).Details() {
		if again, ok := detail.(*errdetails.RetryInfo); ok && ctx.Err() == nil {
			time.Sleep(again.GetRetryDelay().AsDuration())
			return push(ctx, api, r)
		}
	}
	return reply, err
}
