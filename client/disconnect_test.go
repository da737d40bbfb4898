package client_test

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/push-manager/push-manager/client"
	pubsub "github.com/push-manager/push-manager/proto"
)

// presence keeps what it is asked for.
type presence struct {
	pubsub.UnimplementedPresenceServiceServer

	asked []*pubsub.DisconnectRequest
}

func (p *presence) Disconnect(_ context.Context, r *pubsub.DisconnectRequest) (*pubsub.DisconnectResponse, error) {
	p.asked = append(p.asked, r)
	return &pubsub.DisconnectResponse{
		Disconnected: 4, Nodes: 2, Message: "1 of 3", NodeFailures: []*pubsub.NodeFailure{{NodeId: "n", Reason: "unknown: no acknowledgement in time"}},
	}, nil
}

func TestDisconnectAsksAndTellsWhatThereIs(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p, server := new(presence), grpc.NewServer()
	pubsub.RegisterPresenceServiceServer(server, p)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(lis) }()
	defer func() {
		server.Stop()
		<-ended
	}()
	c, err := client.New(lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	got, err := c.Disconnect(t.Context(), client.Disconnect{User: "u", Device: "d", Code: 4200, Reason: "why", RefuseFor: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if got.Success || got.Connections != 4 || got.Nodes != 2 || got.Message != "1 of 3" || len(got.Failures) != 1 || got.Failures[0].Outcome != client.Unknown {
		t.Errorf("%+v", got)
	}
	if _, err := c.Disconnect(t.Context(), client.Disconnect{Room: "r"}); err != nil {
		t.Error(err)
	}
	if _, err := c.AllowAgain(t.Context(), client.Disconnect{User: "u", Code: 4200}); err != nil {
		t.Error(err)
	}
	for i, want := range []*pubsub.DisconnectRequest{
		{UserId: "u", DeviceId: "d", Code: 4200, Reason: "why", RefuseFor: durationpb.New(time.Hour)}, {RoomId: "r"}, {UserId: "u", AllowAgain: true},
	} {
		if !proto.Equal(p.asked[i], want) {
			t.Errorf("asked for %v, want %v", p.asked[i], want)
		}
	}
}
