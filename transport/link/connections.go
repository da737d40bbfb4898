package link

import (
	"context"
	"errors"
	"fmt"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// ErrNoConnections says that a node does not tell which connections its users have.
var ErrNoConnections = errors.New("the node does not tell which connections its users have")

// ListConnections asks a node which connections users have there: answers[i] for users[i]. It asks as often as the answers
// need. The error is or wraps ErrNoConnections or ErrNotConnected, or is the node's.
func (s *Set) ListConnections(ctx context.Context, node string, users []string) (answers []*pubsub.UserConnections, err error) {
	conn := s.connOf(node)
	if conn == nil {
		return nil, ErrNotConnected
	}
	for bytes := 0; len(answers) < len(users); {
		request := pubsub.ListConnectionsRequest{UserIds: users[len(answers):]}
		b, err := request.MarshalVT()
		if err != nil {
			return nil, fmt.Errorf("list connections: %w", err)
		}
		buf := s.buffers.take()
		*buf = append(*buf, b...)
		var in inFrame
		if err := conn.Invoke(ctx, pubsub.ConnectNodeService_ListConnections_FullMethodName, &outFrame{mem.NewBuffer(buf, &s.buffers)}, &in, s.call...); err != nil {
			switch status.Code(err) {
			case codes.Unimplemented:
				return nil, ErrNoConnections
			case codes.DeadlineExceeded:
				return nil, fmt.Errorf("list connections: %w", context.DeadlineExceeded)
			default:
				return nil, fmt.Errorf("list connections: %w", err)
			}
		}
		var reply pubsub.ListConnectionsResponse
		if err := reply.UnmarshalVT(in.b); err != nil {
			return nil, fmt.Errorf("list connections: %w: %w", errReply, err)
		}
		said := reply.GetUsers()
		if bytes += len(in.b); !described(said, len(users)-len(answers)) || bytes > connectionBytes {
			return nil, fmt.Errorf("list connections: %w", errReply)
		}
		answers = append(answers, said...)
	}
	return answers, nil
}

// Bounds of what a node says: of the connections of one user, and of all that were asked for. A reply to a caller has less.
const connectionsMost, connectionBytes = 100, 16 << 20

// described tells whether a node has said of the next users what was asked for, of one of them at least, in valid UTF-8: as what is
// made of it has to be.
func described(said []*pubsub.UserConnections, asked int) bool {
	if len(said) == 0 || len(said) > asked {
		return false
	}
	for _, u := range said {
		if len(u.GetConnections()) > connectionsMost {
			return false
		}
		for _, c := range u.GetConnections() {
			valid := utf8.ValidString(c.GetConnectionId()) && utf8.ValidString(c.GetDeviceId())
			for key, value := range c.GetAttributes() {
				valid = valid && utf8.ValidString(key) && utf8.ValidString(value)
			}
			for _, room := range c.GetRoomIds() {
				valid = valid && utf8.ValidString(room)
			}
			if !valid {
				return false
			}
		}
	}
	return true
}
