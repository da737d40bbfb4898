package client

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Client pushes over connections to all instances of a target, in turn. It connects with its first push.
type Client struct {
	// Static after New.
	cfg     config
	conn    *grpc.ClientConn
	release func()
	budget  *budget
}

// New makes a Client for a target. Nothing is connected yet; an error is about the target or an option.
//
//	localhost:50053                      one address; a name with several addresses stands for all of them
//	pm-1:50053,pm-2:50053                a list
//	dns:///push-manager.default.svc:50053 any other gRPC target
//	etcd:///                             with WithResolver and package etcdresolver
//
// Connections are in plain text unless an option says otherwise.
func New(target string, options ...Option) (*Client, error) {
	cfg, err := newConfig(options)
	if err != nil {
		return nil, fmt.Errorf("push client: %w", err)
	}
	target, dial, release, err := cfg.dial(target)
	if err != nil {
		return nil, fmt.Errorf("push client: %w", err)
	}
	conn, err := grpc.NewClient(target, dial...)
	if err != nil {
		release()
		return nil, fmt.Errorf("push client: target %q: %w", target, err)
	}
	return &Client{cfg: cfg, conn: conn, release: release, budget: newBudget(cfg.retries)}, nil
}

// Close ends the connections. Calls that are open end with an error; those that were sent are unknown. Close Streams first.
func (c *Client) Close() error {
	err := c.conn.Close()
	c.release()
	return err
}

// Conn is the connection, for other services of Push-Manager with generated code. Calls over it are not repeated.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }

// PushToUser pushes to all connections of a user.
func (c *Client) PushToUser(ctx context.Context, user string, m Message, options ...PushOption) (Result, error) {
	return c.Push(ctx, User(user), m, options...)
}

// PushToUsers pushes to several users, 10,000 by default at most. Each counts once.
func (c *Client) PushToUsers(ctx context.Context, users []string, m Message, options ...PushOption) (Result, error) {
	return c.Push(ctx, Users(users...), m, options...)
}

// PushToRoom pushes to the members of a room. [Room] and Push leave out some of them.
func (c *Client) PushToRoom(ctx context.Context, room string, m Message, options ...PushOption) (Result, error) {
	return c.Push(ctx, Room(room), m, options...)
}

// PushToRooms pushes to the members of several rooms, 1,000 by default at most, each user once. [Rooms] and Push leave out some of them.
func (c *Client) PushToRooms(ctx context.Context, rooms []string, m Message, options ...PushOption) (Result, error) {
	return c.Push(ctx, Rooms(rooms...), m, options...)
}

// Broadcast pushes to everybody who is connected.
func (c *Client) Broadcast(ctx context.Context, m Message, options ...PushOption) (Result, error) {
	return c.Push(ctx, Everybody(), m, options...)
}

// Push pushes to a target. The deadline of ctx is that of the push; without one it is that of [WithTimeout].
func (c *Client) Push(ctx context.Context, to Target, m Message, options ...PushOption) (Result, error) {
	ctx, cancel := c.withDeadline(ctx)
	defer cancel()
	ctx, end := c.trace(ctx, to.kind.method())
	result, err := c.push(ctx, to, m, options)
	end(&result, err)
	return result, err
}

func (c *Client) withDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, c.cfg.timeout)
}

func (c *Client) push(ctx context.Context, to Target, m Message, options []PushOption) (Result, error) {
	request, o, err := newRequest(to, m, options)
	if err != nil {
		return Result{}, err
	}
	var result Result
	err = c.try(ctx, to, o.MessageID, func() (failed *Error) {
		reply := to.kind.newReply()
		if failed = c.call(ctx, to.kind.path(), request, reply); failed == nil {
			result, failed = resultOf(to.kind, reply)
		}
		return failed
	})
	return result, err
}

// try does a call until it succeeds or may not be repeated.
func (c *Client) try(ctx context.Context, to Target, messageID string, do func() *Error) error {
	deadline, _ := ctx.Deadline()
	tries := c.newTries(to, messageID)
	for {
		failed := do()
		if failed == nil {
			return nil
		}
		delay, again := tries.next(ctx, time.Until(deadline), failed, true)
		if !again || !tries.wait(ctx, delay) {
			return tries.last
		}
	}
}

// call makes one call, once.
func (c *Client) call(ctx context.Context, path string, request, reply any) *Error {
	// gRPC fills it in for a call that was given to a connection. Before that nothing can have left.
	var given peer.Peer
	err := c.conn.Invoke(ctx, path, request, reply, grpc.Peer(&given))
	if err == nil {
		return nil
	}
	return errorOf(err, given.Addr != nil)
}

// ForgetUser erases what is stored for a user, and tells how many messages that were.
func (c *Client) ForgetUser(ctx context.Context, user string) (messages int, err error) {
	var reply pubsub.ForgetUserResponse
	err = c.do(ctx, pubsub.PushManagerService_ForgetUser_FullMethodName, &pubsub.ForgetUserRequest{UserId: user}, &reply)
	return int(reply.GetMessages()), err
}

// Replay has what is stored for a user sent to their connections on a node, and tells how many messages the node has taken
// so far. Gateways that ask by themselves need no Replay.
func (c *Client) Replay(ctx context.Context, user, node string) (messages int, err error) {
	var reply pubsub.ReplayResponse
	err = c.do(ctx, pubsub.PushManagerService_Replay_FullMethodName, &pubsub.ReplayRequest{UserId: user, NodeId: node}, &reply)
	return int(reply.GetMessages()), err
}

// do calls a method that is no push until it is answered, as push does.
func (c *Client) do(ctx context.Context, path string, request, reply any) error {
	ctx, cancel := c.withDeadline(ctx)
	defer cancel()
	return c.try(ctx, Target{}, "", func() *Error { return c.call(ctx, path, request, reply) })
}
