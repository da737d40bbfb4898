package controller

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Room implements route.Source.
func (c *Controller) Room(ctx context.Context, room string, add func(user, node []byte)) (found bool, revision uint64, err error) {
	began := time.Now()
	found, revision, err = c.room(ctx, room, add)
	if err != nil {
		c.m.lookup(kindRoom, resultError, began)
		return false, 0, fmt.Errorf("get room %q: %w: %w", room, c.why(err), err)
	}
	c.m.lookup(kindRoom, resultOf(found), began)
	return found, revision, nil
}

func (c *Controller) room(ctx context.Context, room string, add func(user, node []byte)) (found bool, revision uint64, err error) {
	var reply rawReply
	defer reply.release()
	request := &pubsub.GetRoomInfoRequest{RoomId: room}
	err = c.call(ctx, func(ctx context.Context) error {
		return c.conn.Invoke(ctx, pubsub.ControllerService_GetRoomInfo_FullMethodName, request, &reply, grpc.ForceCodecV2(c.codec))
	})
	if status.Code(err) == codes.NotFound {
		return false, 0, nil // not what the contract says, and clear all the same
	}
	if err != nil {
		return false, 0, err
	}
	w := walk{add: add, maxMembers: c.cfg.MaxMembers}
	err = w.response(reply.buf.ReadOnlyData())
	if w.skipped > 0 {
		c.m.badIDs.Add(w.skipped)
	}
	if err != nil {
		return false, 0, fmt.Errorf("reply: %w", err)
	}
	if store := *c.store.Load(); store != "" && string(w.store) == store {
		revision = w.revision
	}
	return w.found, revision, nil
}

// why tells a Controller that cannot be asked from one that did not answer well, or not
// in time.
func (c *Controller) why(err error) error {
	if status.Code(err) == codes.Unavailable || !c.Healthy() {
		return route.ErrAway
	}
	return route.ErrUnavailable
}

func resultOf(found bool) result {
	if found {
		return resultFound
	}
	return resultNotFound
}

// Users implements route.Source.
func (c *Controller) Users(ctx context.Context, users []string, nodes [][]string) error {
	began := time.Now()
	k := kindUsers
	var err error
	if len(users) == 1 {
		k = kindUser
		nodes[0], err = c.user(ctx, users[0])
	} else {
		err = c.users(ctx, users, nodes)
	}
	if err != nil {
		c.m.lookup(k, resultError, began)
		return fmt.Errorf("%w: %w", c.why(err), err)
	}
	online := slices.ContainsFunc(nodes, func(n []string) bool { return len(n) > 0 })
	c.m.lookup(k, resultOf(online), began)
	return nil
}

// users asks in batches where the Controller has them and one by one where not.
func (c *Controller) users(ctx context.Context, users []string, nodes [][]string) error {
	for len(users) > 0 {
		if c.noBatch.missing() {
			return c.eachUser(ctx, users, nodes)
		}
		n := min(len(users), c.cfg.BatchUsers)
		err := c.batch(ctx, users[:n], nodes[:n])
		if status.Code(err) == codes.Unimplemented {
			if c.noBatch.note(c.cfg.ProbeAgainAfter) {
				c.log.Info("the controller has no GetUserNodes: users are looked up one by one")
			}
			continue
		}
		if err != nil {
			return err
		}
		users, nodes = users[n:], nodes[n:]
	}
	return nil
}

func (c *Controller) batch(ctx context.Context, users []string, nodes [][]string) error {
	var reply *pubsub.GetUserNodesResponse
	err := c.call(ctx, func(ctx context.Context) (err error) {
		reply, err = c.client.GetUserNodes(ctx, &pubsub.GetUserNodesRequest{UserIds: users})
		return err
	})
	if err != nil {
		return fmt.Errorf("get nodes of %d users: %w", len(users), err)
	}
	if len(reply.GetUsers()) != len(users) {
		return fmt.Errorf("get nodes of %d users: the reply has %d", len(users), len(reply.GetUsers()))
	}
	for i, u := range reply.GetUsers() {
		nodes[i] = c.nodesOf(u)
	}
	return nil
}

// eachUser asks for one user at a time, Parallel at once. The first error ends it.
func (c *Controller) eachUser(ctx context.Context, users []string, nodes [][]string) error {
	return c.each(ctx, len(users), func(ctx context.Context, i int) (err error) {
		nodes[i], err = c.user(ctx, users[i])
		return err
	})
}

// each does n things, Parallel at once. The first error ends it.
func (c *Controller) each(ctx context.Context, n int, do func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		wg   sync.WaitGroup
		next atomic.Int64
	)
	for range min(c.cfg.Parallel, n) {
		wg.Go(func() {
			defer func() { // These goroutines work on what the Controller says.
				if v := recover(); v != nil {
					cancel(fmt.Errorf("look up a user: panic: %v", v))
				}
			}()
			for i := next.Add(1) - 1; i < int64(n) && ctx.Err() == nil; i = next.Add(1) - 1 {
				if err := do(ctx, int(i)); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

func (c *Controller) user(ctx context.Context, user string) (_ []string, err error) {
	defer func() { // It runs on goroutines of its own, and works on what the Controller says.
		if v := recover(); v != nil {
			err = fmt.Errorf("look up a user: panic: %v", v)
		}
	}()
	var reply *pubsub.GetUserNodeResponse
	err = c.call(ctx, func(ctx context.Context) (err error) {
		reply, err = c.client.GetUserNode(ctx, &pubsub.GetUserNodeRequest{UserId: user})
		return err
	})
	if status.Code(err) == codes.NotFound {
		return nil, nil // as with rooms
	}
	if err != nil {
		return nil, fmt.Errorf("get node of user %q: %w", user, err)
	}
	return c.nodesOf(reply), nil
}

// nodesOf is where a reply says that the user is, each node once.
func (c *Controller) nodesOf(reply *pubsub.GetUserNodeResponse) []string {
	if !reply.GetFound() {
		return nil
	}
	named := reply.GetNodeIds()
	if len(named) == 0 {
		named = []string{reply.GetNodeId()}
	}
	nodes := make([]string, 0, len(named))
	for _, id := range named {
		if ids.Check(id, ids.MaxBytes) != nil {
			c.m.badIDs.Inc()
			continue
		}
		if !slices.Contains(nodes, id) {
			nodes = append(nodes, id)
		}
	}
	return nodes
}
