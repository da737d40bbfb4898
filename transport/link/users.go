package link

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Errors of ListUsers.
var (
	// ErrNoList says that a node does not name its users.
	ErrNoList = errors.New("the node does not name its users")
	// ErrNotConnected says that there is no connection to a node, or no such node.
	ErrNotConnected = errors.New("there is no connection to the node")
)

// NodeIDs are the ids of all registered nodes, ordered.
func (s *Set) NodeIDs() []string {
	nodes := s.snapshot.Load().nodes
	list := make([]string, len(nodes))
	for i, n := range nodes {
		list[i] = n.id
	}
	return list
}

// ListUsers asks a node for users whose ids begin with scope and whose turn is first or later, limit of them at most, ordered by turn. Each
// user from first up to and with the turn last is named. Ids are as the node has them, and may be none that can be pushed to. The error is or wraps one of those above, or is the node's.
func (s *Set) ListUsers(ctx context.Context, node string, first uint64, limit int, scope string) (users []string, last uint64, err error) {
	conn := s.connOf(node)
	if conn == nil {
		return nil, 0, ErrNotConnected
	}
	buf := s.buffers.take()
	request := pubsub.ListUsersRequest{FirstTurn: first, Limit: uint32(limit), Scope: scope}
	b, err := request.MarshalVT()
	if err != nil {
		return nil, 0, fmt.Errorf("list users: %w", err)
	}
	*buf = append(*buf, b...)
	var in inFrame
	if err := conn.Invoke(ctx, pubsub.ConnectNodeService_ListUsers_FullMethodName, &outFrame{mem.NewBuffer(buf, &s.buffers)}, &in, s.call...); err != nil {
		if status.Code(err) == codes.Unimplemented {
			return nil, 0, ErrNoList
		}
		return nil, 0, fmt.Errorf("list users: %w", err)
	}
	var reply pubsub.ListUsersResponse
	if err := reply.UnmarshalVT(in.b); err != nil {
		return nil, 0, fmt.Errorf("list users: %w: %w", errReply, err)
	}
	if users, last = reply.GetUserIds(), reply.GetLastTurn(); !listed(users, first, last, scope) {
		return nil, 0, fmt.Errorf("list users: %w", errReply)
	}
	return users, last, nil
}

// listed tells whether a list of users is what was asked for. One of more users than were asked for is one: their frame was not too
// large, and some may have the same turn.
func listed(users []string, first, last uint64, scope string) bool {
	before := first
	for _, user := range users {
		turn := ids.Turn(user)
		if turn < before || turn > last || !strings.HasPrefix(user, scope) {
			return false
		}
		before = turn
	}
	if last != ids.LastTurn && (len(users) == 0 || before != last) { // nobody was left out: whoever goes on behind it would ask for ever
		return false
	}
	return last >= first && len(slices.Compact(slices.Clone(users))) == len(users)
}

// connOf is a connection to a node that has said who it is, nil for none.
func (s *Set) connOf(id string) *grpc.ClientConn {
	n := s.snapshot.Load().byID[id]
	if n == nil {
		return nil
	}
	for _, l := range n.links {
		l.mu.Lock()
		conn := l.conn
		l.mu.Unlock()
		if conn != nil {
			return conn
		}
	}
	return nil
}
