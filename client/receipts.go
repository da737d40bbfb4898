package client

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Receipt is what clients have said of a push with [AsyncReceipt].
type Receipt struct {
	// Position is where Receipts goes on behind this one.
	Position string
	// MessageID and Target ("room:lobby", "user:alice", "users", "everybody") name the push.
	MessageID, Target string
	// Result counts what is known so far.
	Result Result
	// Final: nothing more comes of this push.
	Final bool
	// Unacked are users who have not acknowledged, 100 at most.
	Unacked []string
	At      time.Time
}

// Receipts are those of the caller's own pushes, from behind a position on; "" is from now on. They go on until ctx ends, or with an error,
// which is the last thing they give. Begin again with the Position of the last Receipt; after RECEIPTS_GONE with "".
func (c *Client) Receipts(ctx context.Context, after string) iter.Seq2[Receipt, error] {
	return func(yield func(Receipt, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var given peer.Peer
		stream, err := pubsub.NewPushManagerServiceClient(c.conn).WatchReceipts(ctx, &pubsub.WatchReceiptsRequest{After: after}, grpc.Peer(&given))
		for err == nil {
			var r *pubsub.WatchReceiptsResponse
			if r, err = stream.Recv(); err != nil {
				break
			}
			p := r.GetReceipt()
			result, failed := resultOfSummary(p.GetSummary())
			if failed != nil {
				yield(Receipt{}, failed)
				return
			}
			result.Success = result.Failed == 0 && result.Unknown == 0 && len(result.Failures) == 0
			if !yield(Receipt{
				Position: r.GetPosition(), MessageID: p.GetMessageId(), Target: p.GetTarget(), Result: result,
				Final: p.GetFinal(), Unacked: p.GetUnackedUserIds(), At: p.GetAt().AsTime(),
			}, nil) {
				return
			}
		}
		switch {
		case ctx.Err() != nil:
			yield(Receipt{}, ctx.Err())
		case errors.Is(err, io.EOF):
			yield(Receipt{}, io.ErrUnexpectedEOF)
		default:
			yield(Receipt{}, errorOf(err, given.Addr != nil))
		}
	}
}
