package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Errors of ListMembers that are no route.ErrUnavailable.
var (
	ErrNoPages   = errors.New("the controller cannot list the members of a room in pages")
	ErrPageGone  = errors.New("the controller's store was lost since the last page: begin again")
	ErrPageToken = errors.New("must be a next_page_token, or empty")
)

const (
	// maxPageToken is that of the proto.
	maxPageToken = 512
	// maxPageBytes bounds a page, and the whereabouts of so many users at a time.
	maxPageBytes     = 16 << 20
	whereaboutsBatch = 100
)

// ListMembers asks for a page of the members of a room, see the proto. A token of the Controller that is too long is
// refused; members whose ids no push could name are left out.
func (c *Controller) ListMembers(ctx context.Context, room, token string, size int) (*pubsub.ListMembersResponse, error) {
	if len(token) > maxPageToken {
		return nil, ErrPageToken
	}
	if c.noPages.missing() {
		return nil, ErrNoPages
	}
	began := time.Now()
	var reply *pubsub.ListMembersResponse
	request := &pubsub.ListMembersRequest{RoomId: room, PageToken: token, PageSize: uint32(max(size, 0))}
	err := c.call(ctx, func(ctx context.Context) (err error) {
		reply, err = c.client.ListMembers(ctx, request, grpc.MaxCallRecvMsgSize(maxPageBytes))
		return err
	})
	if err == nil && len(reply.GetNextPageToken()) > maxPageToken {
		err = fmt.Errorf("next_page_token has %d bytes", len(reply.GetNextPageToken()))
	}
	if err != nil {
		c.m.lookup(kindMembers, resultError, began)
		switch status.Code(err) { //nolint:exhaustive // all others are the Controller's
		case codes.Unimplemented:
			if c.noPages.note(c.cfg.ProbeAgainAfter) {
				c.log.Info("the controller has no ListMembers: the members of rooms cannot be listed")
			}
			return nil, ErrNoPages
		case codes.OutOfRange:
			return nil, ErrPageGone
		case codes.InvalidArgument:
			return nil, fmt.Errorf("%w: %w", ErrPageToken, err) // the room has been checked
		}
		return nil, fmt.Errorf("list members of room %q: %w: %w", room, c.why(err), err)
	}
	c.m.lookup(kindMembers, resultOf(len(reply.GetMembers()) > 0), began)
	members := reply.GetMembers()[:0]
	for _, m := range reply.GetMembers() {
		if ids.Check(m.GetUserId(), ids.MaxScopedBytes) != nil || m.GetNodeId() != "" && ids.Check(m.GetNodeId(), ids.MaxBytes) != nil {
			c.m.badIDs.Inc()
			continue
		}
		members = append(members, m)
	}
	reply.Members = members
	return reply, nil
}

// Whereabouts asks where users are, and for their rooms: answers[i] for users[i]. A Controller that does not tell rooms
// leaves them out. Nodes and rooms whose ids no push could name are left out.
func (c *Controller) Whereabouts(ctx context.Context, users []string) (answers []*pubsub.GetUserNodeResponse, err error) {
	began := time.Now()
	answers = make([]*pubsub.GetUserNodeResponse, 0, len(users))
	for len(users) > 0 && err == nil {
		some := users[:min(len(users), whereaboutsBatch, c.cfg.BatchUsers)]
		users = users[len(some):]
		var reply []*pubsub.GetUserNodeResponse
		if reply, err = c.whereabouts(ctx, some); err == nil {
			answers = append(answers, reply...)
		}
	}
	if err != nil {
		c.m.lookup(kindPresence, resultError, began)
		return nil, fmt.Errorf("%w: %w", c.why(err), err)
	}
	online := false
	for _, a := range answers {
		a.NodeIds = c.nodesOf(a)
		a.Found = len(a.GetNodeIds()) > 0
		online = online || a.GetFound()
		rooms := a.GetRoomIds()[:0]
		for _, room := range a.GetRoomIds() {
			if ids.Check(room, ids.MaxScopedBytes) != nil {
				c.m.badIDs.Inc()
				continue
			}
			rooms = append(rooms, room)
		}
		if a.RoomIds = rooms; !a.GetFound() {
			a.RoomIds = nil
		}
	}
	c.m.lookup(kindPresence, resultOf(online), began)
	return answers, nil
}

func (c *Controller) whereabouts(ctx context.Context, users []string) ([]*pubsub.GetUserNodeResponse, error) {
	if !c.noBatch.missing() {
		var reply *pubsub.GetUserNodesResponse
		err := c.call(ctx, func(ctx context.Context) (err error) {
			reply, err = c.client.GetUserNodes(ctx, &pubsub.GetUserNodesRequest{UserIds: users, WithRooms: true}, grpc.MaxCallRecvMsgSize(maxPageBytes))
			return err
		})
		switch {
		case status.Code(err) == codes.Unimplemented:
			c.noBatch.note(c.cfg.ProbeAgainAfter)
		case err != nil:
			return nil, fmt.Errorf("get whereabouts of %d users: %w", len(users), err)
		case len(reply.GetUsers()) != len(users):
			return nil, fmt.Errorf("get whereabouts of %d users: the reply has %d", len(users), len(reply.GetUsers()))
		default:
			return reply.GetUsers(), nil
		}
	}
	answers := make([]*pubsub.GetUserNodeResponse, len(users))
	err := c.each(ctx, len(users), func(ctx context.Context, i int) error {
		answers[i] = &pubsub.GetUserNodeResponse{}
		err := c.call(ctx, func(ctx context.Context) error {
			reply, err := c.client.GetUserNode(ctx, &pubsub.GetUserNodeRequest{UserId: users[i], WithRooms: true}, grpc.MaxCallRecvMsgSize(maxPageBytes))
			if err == nil {
				answers[i] = reply
			}
			return err
		})
		if err != nil && status.Code(err) != codes.NotFound { // which is as with rooms
			return fmt.Errorf("get whereabouts of user %q: %w", users[i], err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return answers, nil
}
