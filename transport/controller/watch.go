package controller

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/pause"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// settledAfter is how long a change stream has to live before its end counts as a
	// first failure again.
	settledAfter = 10 * time.Second
	// maxChangesBytes bounds one message of the change stream.
	maxChangesBytes = 16 << 20

	// lease is how long the change stream's word is good after the moment of which is
	// known that every change before it has been applied.
	lease = 3 * time.Second
	// markEvery is how often that is asked for.
	markEvery = time.Second
	// silentAfter ends a stream whose connection lives and on which no mark comes
	// back. A connection that is dead has been found out before.
	silentAfter = 15 * time.Second
	// maxMarks bounds the marks on their way.
	maxMarks = 2 * int(silentAfter/markEvery)

	// watchTick is how often the directory is told that the stream's word is good.
	watchTick = 100 * time.Millisecond
	// maxPause is for how long it is told so. Longer ago the last tick cannot be:
	// otherwise this process was not running, and may not have read what has changed.
	maxPause = 5 * watchTick
)

var (
	errPaused = errors.New("this process did not run for a while, and the controller has no FollowRoutes")
	errSilent = fmt.Errorf("no mark has come back for %v", silentAfter)
)

// watchLoop keeps the change stream open.
func (c *Controller) watchLoop(ctx context.Context, changes Changes) {
	failures := 0
	for ctx.Err() == nil {
		if c.noWatch.missing() {
			// Looked at again each second: the connection may be made anew.
			pause.For(ctx, time.Second)
			continue
		}
		began, follow := time.Now(), !c.noFollow.missing()
		err := c.watch(ctx, changes, follow)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errPaused):
			c.log.Info("the change stream is opened again", "reason", err)
			continue
		case status.Code(err) == codes.Unimplemented && follow:
			if c.noFollow.note(c.cfg.ProbeAgainAfter) {
				c.log.Info("the controller has no FollowRoutes: a push right after a join may miss the new member, and a silent change stream is found out by its connection alone")
			}
			continue
		case status.Code(err) == codes.Unimplemented:
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
		wait := c.cfg.MaxBackoff
		if failures < 16 {
			wait = min(wait, minBackoff<<failures)
		}
		failures++
		pause.For(ctx, pause.Jitter(wait))
	}
}

// watch runs one change stream to its end. It waits for the connection, so a
// Controller that is away costs nothing.
func (c *Controller) watch(ctx context.Context, changes Changes, follow bool) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{c: c, changes: changes, end: cancel, wake: make(chan struct{}, 1)}
	var keeper sync.WaitGroup
	defer func() {
		if p := recover(); p != nil {
			err = c.fault(faultPanic, fmt.Sprint("panic: ", p))
		}
		cancel(nil) // frees the stream however this ends
		keeper.Wait()
		if w.synced {
			w.vouch(time.Time{}, time.Now(), lossBroken)
			c.watchedBefore = true
			c.m.breaks.Inc()
		}
		if cause := context.Cause(ctx); errors.Is(cause, errPaused) || errors.Is(cause, errSilent) {
			err = cause
		}
	}()
	opts := []grpc.CallOption{grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxChangesBytes)}
	if follow {
		if w.follows, err = c.client.FollowRoutes(ctx, opts...); err != nil {
			return fmt.Errorf("follow routes: %w", err)
		}
		w.proof = time.Now()
		// An error of Send is said by Recv.
		_ = w.follows.Send(&pubsub.FollowRoutesRequest{LeaseMs: uint32(lease / time.Millisecond), Deltas: true})
	} else if w.watches, err = c.client.WatchRoutes(ctx, &pubsub.WatchRoutesRequest{}, opts...); err != nil {
		return fmt.Errorf("watch routes: %w", err)
	}
	for {
		msg, err := w.recv()
		if err != nil {
			return fmt.Errorf("watch routes: %w", err)
		}
		c.heard()
		if !w.synced {
			if !msg.GetChanges().GetSynced() {
				return c.fault(faultSync, "the first message has no synced")
			}
			if c.watchedBefore {
				c.renew()
			}
			store := msg.GetChanges().GetStoreId()
			c.store.Store(&store) // before what was answered by then is forgotten
			changes.InvalidateAll()
			w.synced = true
			keeper.Go(func() { w.keep(ctx) })
			c.log.Info("the change stream is in sync", "followed", follow)
		}
		if err := w.apply(msg); err != nil {
			return err
		}
	}
}

// watch is one change stream. Its goroutines are the one that reads, in
// Controller.watch, and the keeper.
type watch struct {
	// Static. One of the two streams is there.
	c       *Controller
	changes Changes
	end     context.CancelCauseFunc
	follows grpc.BidiStreamingClient[pubsub.FollowRoutesRequest, pubsub.FollowRoutesResponse]
	watches grpc.ServerStreamingClient[pubsub.WatchRoutesResponse]
	// Holds a token when there is something to acknowledge, or a mark has come back.
	wake chan struct{}

	// Owned by the reader.
	synced bool

	mu      sync.Mutex
	through uint64    // applied
	marks   []mark    // on their way, the oldest first
	proof   time.Time // every change before this has been applied

	// Owned by the keeper, and by the reader once that has ended.
	vouched bool
	until   time.Time // if vouched
}

// mark is one that was sent.
type mark struct {
	n  uint64
	at time.Time
}

func (w *watch) recv() (*pubsub.FollowRoutesResponse, error) {
	if w.follows != nil {
		return w.follows.Recv()
	}
	changes, err := w.watches.Recv()
	if err != nil {
		return nil, err
	}
	return &pubsub.FollowRoutesResponse{Changes: changes}, nil
}

// apply forgets what has changed, and notes how far that goes.
func (w *watch) apply(msg *pubsub.FollowRoutesResponse) error {
	in := msg.GetChanges()
	if in.GetAll() {
		w.changes.InvalidateAll()
		w.c.m.changes.Inc()
	} else if n := len(in.GetRoomIds()) + len(in.GetUserIds()); n > 0 {
		w.changes.Invalidate(in.GetRoomIds(), in.GetUserIds())
		w.c.m.changes.Add(n)
	}
	if deltas := in.GetDeltas(); len(deltas) > 0 {
		w.changes.Moved(w.moves(deltas))
		w.c.m.deltas.Add(len(deltas))
	}
	if msg.GetSeq() == 0 && msg.GetMark() == 0 {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if seq := msg.GetSeq(); seq != 0 {
		if seq <= w.through {
			return w.c.fault(faultSeq, fmt.Sprintf("seq is %d, after %d", seq, w.through))
		}
		w.through = seq
	}
	if n := msg.GetMark(); n != 0 {
		i := 0
		for i < len(w.marks) && w.marks[i].n != n {
			i++
		}
		if i == len(w.marks) {
			return w.c.fault(faultMark, fmt.Sprintf("mark %d is none that was sent", n))
		}
		w.proof = w.marks[i].at
		w.marks = append(w.marks[:0], w.marks[i+1:]...)
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
	return nil
}

// moves are the deltas that can be applied. Of the others the rooms and users are forgotten:
// whether a route has one without a revision cannot be told.
func (w *watch) moves(deltas []*pubsub.MemberDelta) []route.Move {
	moves := make([]route.Move, 0, len(deltas))
	for _, d := range deltas {
		if ids.Check(d.GetUserId(), ids.MaxScopedBytes) != nil || ids.Check(d.GetNodeId(), ids.MaxBytes) != nil {
			w.c.m.badIDs.Inc()
		} else if d.GetRevision() != 0 {
			moves = append(moves, route.Move{Room: d.GetRoomId(), User: d.GetUserId(), Node: d.GetNodeId(), Left: d.GetLeft(), Revision: d.GetRevision()})
			continue
		}
		w.changes.Invalidate([]string{d.GetRoomId()}, []string{d.GetUserId()})
	}
	return moves
}

// keep acknowledges what is applied, asks for proofs, and vouches for the directory's
// answers as far as they go.
func (w *watch) keep(ctx context.Context) {
	tick := time.NewTicker(watchTick)
	defer tick.Stop()
	var (
		ran     = time.Now() // when this loop ran last
		synced  = ran        // a Controller may take its time until then
		resumed time.Time    // the end of the last pause: proofs from before do not count
		marked  = w.proof    // when the last mark was sent
		marks   uint64
		acked   uint64
	)
	for ctx.Err() == nil {
		now := time.Now()
		paused := now.Sub(ran) >= maxPause
		ran = now
		switch {
		case w.follows == nil && paused:
			w.vouch(time.Time{}, now, lossPaused)
			w.end(errPaused)
			return
		case w.follows == nil:
			w.vouch(now.Add(maxPause), now, lossPaused)
		default:
			if paused {
				resumed = now
			}
			w.mu.Lock()
			out := pubsub.FollowRoutesRequest{Through: w.through}
			if due := now.Sub(marked) >= markEvery || marked.Before(resumed); due && len(w.marks) < maxMarks {
				marks++
				out.Mark, marked = marks, now
				w.marks = append(w.marks, mark{marks, now})
			}
			proof := w.proof
			w.mu.Unlock()
			w.c.proved.Store(int64(proof.Sub(w.c.made)))
			if proof.Before(resumed) {
				w.vouch(time.Time{}, now, lossPaused)
			} else {
				w.vouch(earlier(proof.Add(lease), now.Add(maxPause)), now, lossSilent)
			}
			if now.Sub(proof) >= silentAfter && now.Sub(synced) >= silentAfter {
				w.end(errSilent)
				return
			}
			if out.Through == acked && out.Mark == 0 {
				break
			}
			if out.Through != acked {
				acked = out.Through
				w.c.m.acks.Inc()
			}
			if w.follows.Send(&out) != nil {
				return // the reader hears why
			}
		}
		select {
		case <-ctx.Done():
		case <-w.wake:
		case <-tick.C:
		}
	}
}

// vouch tells the directory until when its answers are good, and counts why they are
// not any more.
func (w *watch) vouch(until, now time.Time, why loss) {
	if now.Before(until) {
		w.vouched, w.until = true, until
		w.changes.Vouch(until)
		w.c.vouched.Store(int64(until.Sub(w.c.made)))
		return
	}
	if !w.vouched {
		return
	}
	w.vouched = false
	w.c.m.losses[why].Inc()
	if why == lossSilent {
		w.c.log.Warn("the change stream is silent: the controller is asked instead", "for", lease)
	}
	if now.Before(w.until) { // otherwise it has ended by itself
		w.changes.Vouch(now)
		w.c.vouched.Store(int64(now.Sub(w.c.made)))
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// fault counts what a Controller did against the protocol, and returns it as an error.
func (c *Controller) fault(f fault, text string) error {
	c.m.faults[f].Inc()
	return errors.New("watch routes: " + text)
}
