package client

import (
	"context"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Disconnect says which connections Client.Disconnect closes, and what their clients are told. User or Room is set, and not both.
type Disconnect struct {
	// User is all connections of one user; with Device, those that have given it as their device_id.
	User, Device string
	// Room is all connections that are in the room.
	Room string

	// Code is the close code, 4000 to 4999: after 4400 to 4499 clients do not come back. 0: 4000, or with RefuseFor 4410.
	Code int
	// Reason is for people, 120 bytes at most.
	Reason string
	// RefuseFor is for how long the user, or the device, may not connect, and the room not be joined; 0: they may come back at once.
	RefuseFor time.Duration
}

// Disconnected is what became of it.
type Disconnected struct {
	// Success is true if every Connect-Node has answered.
	Success bool
	// Message says the same for people and logs.
	Message string
	// Connections were closed, on so many Nodes that have answered.
	Connections, Nodes int
	// Failures name the other nodes. A refusal holds there, too, as soon as the node reads it in etcd.
	Failures []Failure
}

// Disconnect closes connections on all Connect-Nodes. After an error of which [Error] says that nothing was sent nobody was disconnected;
// after another one, such as the end of ctx, they may have been.
func (c *Client) Disconnect(ctx context.Context, d Disconnect) (Disconnected, error) {
	request := &pubsub.DisconnectRequest{
		UserId: d.User, DeviceId: d.Device, RoomId: d.Room, Code: uint32(max(d.Code, 0)), Reason: d.Reason,
	}
	if d.RefuseFor != 0 {
		request.RefuseFor = durationpb.New(d.RefuseFor)
	}
	return c.disconnect(ctx, request)
}

// AllowAgain ends what Disconnect with RefuseFor has begun. Of d only User, Device and Room count, which must be as they were there.
func (c *Client) AllowAgain(ctx context.Context, d Disconnect) (Disconnected, error) {
	return c.disconnect(ctx, &pubsub.DisconnectRequest{UserId: d.User, DeviceId: d.Device, RoomId: d.Room, AllowAgain: true})
}

func (c *Client) disconnect(ctx context.Context, request *pubsub.DisconnectRequest) (Disconnected, error) {
	var r pubsub.DisconnectResponse
	if err := c.do(ctx, pubsub.PresenceService_Disconnect_FullMethodName, request, &r); err != nil {
		return Disconnected{}, err
	}
	return Disconnected{
		Success: r.GetSuccess(), Message: r.GetMessage(), Connections: int(r.GetDisconnected()), Nodes: int(r.GetNodes()), Failures: failuresOf(r.GetNodeFailures()),
	}, nil
}

// failuresOf reads what a reply says of nodes.
func failuresOf(list []*pubsub.NodeFailure) []Failure {
	var failures []Failure
	for _, f := range list {
		failure := Failure{Node: f.GetNodeId(), Outcome: Failed, Reason: f.GetReason(), Users: max(int(f.GetUsers()), 0)}
		if strings.HasPrefix(f.GetReason(), "unknown") {
			failure.Outcome = Unknown
		}
		failures = append(failures, failure)
	}
	return failures
}
