package node

import (
	"context"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Lister is what Sessions also are that can name their users, as [Users] do. Without it broadcast jobs for everybody pass
// the node by.
type Lister interface {
	// EachUser calls yield with the id of every user who has a live connection now, in any order, until it returns false. It
	// holds no lock meanwhile that anything else waits for. Who comes or goes meanwhile may be named or not.
	EachUser(yield func(user string) bool)
}

// Bounds of an answer of ListUsers. A manager takes frames of 1 MiB.
const (
	listUsers = 10_000
	listBytes = 900 << 10
)

// ListUsers implements pubsub.ConnectNodeServiceServer. It looks at all users, one call after the other.
func (s *Server) ListUsers(ctx context.Context, r *pubsub.ListUsersRequest) (*pubsub.ListUsersResponse, error) {
	if s.lister == nil {
		return nil, status.Error(codes.Unimplemented, "the gateway does not name its users")
	}
	if r.GetScope() != "" && !ids.IsScope(r.GetScope()) {
		return nil, status.Error(codes.InvalidArgument, "scope: not that of a tenant")
	}
	select {
	case s.listing <- struct{}{}:
		defer func() { <-s.listing }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	line := ids.Line{First: r.GetFirstTurn(), Last: ids.LastTurn, Limit: listUsers}
	if n := r.GetLimit(); n > 0 && n < listUsers {
		line.Limit = int(n)
	}
	s.lister.EachUser(func(user string) bool {
		if strings.HasPrefix(user, r.GetScope()) {
			line.Add(user)
		}
		return ctx.Err() == nil
	})
	if ctx.Err() != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	size := 0
	for i, u := range line.Users() {
		if size += len(u.User) + 4; size > listBytes {
			line.Cut(i)
			break
		}
	}
	reply := &pubsub.ListUsersResponse{LastTurn: line.Last}
	for _, u := range line.Users() {
		reply.UserIds = append(reply.UserIds, u.User)
	}
	return reply, nil
}
