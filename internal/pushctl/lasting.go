package pushctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

type forgetCmd struct {
	User string `arg:"" help:"The user."`
	apiFlags

	Timeout time.Duration `default:"30s" help:"Longest time for it."`
}

// Run erases what is stored for a user.
func (c *forgetCmd) Run(ctx context.Context, t *terminal) error {
	var r *pubsub.ForgetUserResponse
	if err := c.call(ctx, c.Timeout, func(ctx context.Context, api pubsub.PushManagerServiceClient) (err error) {
		r, err = api.ForgetUser(ctx, &pubsub.ForgetUserRequest{UserId: c.User})
		return err
	}); err != nil {
		return err
	}
	return t.tell(r, fmt.Sprintf("user %q: erased %s", c.User, plural(r.GetMessages(), "message")))
}

type replayCmd struct {
	User string `arg:"" help:"The user."`
	Node string `arg:"" help:"The Connect-Node that the user is connected to."`
	apiFlags

	Timeout time.Duration `default:"30s" help:"Longest time for it."`
}

// Run has what is stored for a user sent to a node.
func (c *replayCmd) Run(ctx context.Context, t *terminal) error {
	var r *pubsub.ReplayResponse
	if err := c.call(ctx, c.Timeout, func(ctx context.Context, api pubsub.PushManagerServiceClient) (err error) {
		r, err = api.Replay(ctx, &pubsub.ReplayRequest{UserId: c.User, NodeId: c.Node})
		return err
	}); err != nil {
		return err
	}
	return t.tell(r, fmt.Sprintf("user %q: %s taken by %q", c.User, plural(r.GetMessages(), "message"), c.Node))
}

type receiptsCmd struct {
	After string `placeholder:"POSITION" help:"Go on behind this receipt; -o json shows the position of each."`
	apiFlags
}

// Run prints receipts until it is interrupted, or the stream ends.
func (c *receiptsCmd) Run(ctx context.Context, t *terminal) error {
	conn, _, done, err := c.connect()
	if err != nil {
		return err
	}
	defer done()
	stream, err := pubsub.NewPushManagerServiceClient(conn).WatchReceipts(ctx, &pubsub.WatchReceiptsRequest{After: c.After})
	for err == nil {
		var r *pubsub.WatchReceiptsResponse
		if r, err = stream.Recv(); err == nil {
			err = t.tell(r, receiptLine(t, r.GetReceipt()))
		}
	}
	s, answered := status.FromError(err)
	switch {
	case ctx.Err() != nil, errors.Is(err, io.EOF), s.Code() == codes.Canceled:
		return nil
	case !answered:
		return err
	}
	return fmt.Errorf("watch receipts at %s: %s: %s", clean(c.Address), words(s.Code()), clean(s.Message()))
}

func receiptLine(t *terminal, r *pubsub.PushReceipt) string {
	s := r.GetSummary()
	var line strings.Builder
	fmt.Fprintf(&line, "%s %s %s: delivered to %d of %d", t.paint(grey, r.GetAt().AsTime().Local().Format(time.TimeOnly)),
		clean(r.GetMessageId()), clean(r.GetTarget()), s.GetDelivered(), s.GetTargets())
	if rest := counts(s); rest != "" {
		line.WriteString(" (" + rest + ")")
	}
	for _, user := range r.GetUnackedUserIds() {
		line.WriteString("\n  not acknowledged by " + clean(user))
	}
	return line.String()
}
