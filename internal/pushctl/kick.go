package pushctl

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	pubsub "github.com/push-manager/push-manager/proto"
)

type kickCmd struct {
	User   string `arg:"" optional:"" help:"The user. Leave it out with --room."`
	Device string `placeholder:"ID" help:"Only connections of the user with this device_id."`
	Room   string `placeholder:"ROOM" help:"Everybody's connections that are in this room."`
	apiFlags

	Code       uint32        `placeholder:"4000" help:"Close code, 4000 to 4999: after 4400 to 4499 clients do not come back. Default: 4000, with --refuse-for 4410."`
	Reason     string        `placeholder:"TEXT" help:"What the clients are told."`
	RefuseFor  time.Duration `placeholder:"1h" help:"How long the user or device may not connect, or the room not be joined. Default: they may come back at once."`
	AllowAgain bool          `help:"Disconnect nobody, and end what --refuse-for has begun."`
	Timeout    time.Duration `default:"5s" help:"Longest time for the call."`
}

// Run closes connections on all nodes. Its exit code is 0 if all nodes have answered.
func (c *kickCmd) Run(ctx context.Context, t *terminal) error {
	request := &pubsub.DisconnectRequest{
		UserId: c.User, DeviceId: c.Device, RoomId: c.Room, Code: c.Code, Reason: c.Reason, AllowAgain: c.AllowAgain,
	}
	if c.RefuseFor != 0 {
		request.RefuseFor = durationpb.New(c.RefuseFor)
	}
	who := fmt.Sprintf("user %q", c.User)
	switch {
	case (c.User == "") == (c.Room == ""):
		return &usageError{"give a user or --room"}
	case c.Device != "" && c.Room != "":
		return &usageError{"--device: is for a user, not for a room"}
	case c.Device != "":
		who += fmt.Sprintf(", device %q", c.Device)
	case c.Room != "":
		who = fmt.Sprintf("room %q", c.Room)
	}
	var r *pubsub.DisconnectResponse
	if err := c.callOver(ctx, c.Timeout, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		r, err = pubsub.NewPresenceServiceClient(conn).Disconnect(ctx, request)
		return err
	}); err != nil {
		return err
	}
	text := fmt.Sprintf("%s: %s closed on %s", who, plural(r.GetDisconnected(), "connection"), plural(r.GetNodes(), "node"))
	switch {
	case c.AllowAgain:
		text = who + ": may come back"
	case c.RefuseFor > 0:
		text += fmt.Sprintf(", refused for %v", c.RefuseFor)
	}
	code := exitOK
	var lines strings.Builder
	for _, f := range r.GetNodeFailures() {
		fmt.Fprintf(&lines, "\n  %s: %s", clean(f.GetNodeId()), t.paint(red, clean(f.GetReason())))
		if code = max(code, exitFailed); strings.HasPrefix(f.GetReason(), "unknown") {
			code = exitUnknown
		}
	}
	if !r.GetSuccess() && code == exitOK { // there is no node
		code = exitFailed
		fmt.Fprintf(&lines, "\n  %s", clean(r.GetMessage()))
	}
	if err := t.tell(r, text+lines.String()); err != nil || code == exitOK {
		return err
	}
	return &outcome{code: code}
}
