package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// settledAfter is how long a change stream has to live before its end counts as a
// first failure again.
const settledAfter = 10 * time.Second

// watchLoop keeps the change stream open.
func (c *Controller) watchLoop(ctx context.Context, changes Changes) {
	failures := 0
	for ctx.Err() == nil {
		if c.noWatch.missing() {
			// Looked at again each second: the connection may be made anew.
			sleep(ctx, time.Second)
			continue
		}
		began := time.Now()
		err := c.watch(ctx, changes)
		if ctx.Err() != nil {
			return
		}
		if status.Code(err) == codes.Unimplemented {
			if c.noWatch.note(c.cfg.ProbeAgainAfter) {
				c.log.Info("the controller has no WatchRoutes: answers are good for a TTL")
			}
			continue
		}
		if time.Since(began) >= settledAfter {
			failures = 0
		}
		if failures == 0 {
			c.log.Warn("the change stream broke, opening it again", "err", err)
		}
		pause := c.cfg.MaxBackoff
		if failures < 16 {
			pause = min(pause, minBackoff<<failures)
		}
		failures++
		sleep(ctx, jitter(pause))
	}
}

// watch runs one change stream to its end. It waits for the connection, so a
// Controller that is away costs nothing.
func (c *Controller) watch(ctx context.Context, changes Changes) error {
	ctx, cancel := context.WithCancel(ctx) // frees the stream however this ends
	defer cancel()
	stream, err := c.client.WatchRoutes(ctx, &pubsub.WatchRoutesRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("watch routes: %w", err)
	}
	synced := false
	defer func() {
		if synced {
			c.watched.Store(false)
			changes.SetWatched(false)
			c.m.breaks.Inc()
		}
	}()
	for {
		msg, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("watch routes: %w", err)
		}
		c.heard()
		if !synced {
			if !msg.GetSynced() {
				return errors.New("watch routes: the first message has no synced")
			}
			synced = true
			changes.InvalidateAll()
			changes.SetWatched(true)
			c.watched.Store(true)
			c.log.Info("the change stream is in sync")
		}
		c.apply(msg, changes)
	}
}

func (c *Controller) apply(msg *pubsub.WatchRoutesResponse, changes Changes) {
	if msg.GetAll() {
		changes.InvalidateAll()
		c.m.changes.Inc()
		return
	}
	if n := len(msg.GetRoomIds()) + len(msg.GetUserIds()); n > 0 {
		changes.Invalidate(msg.GetRoomIds(), msg.GetUserIds())
		c.m.changes.Add(n)
	}
}
