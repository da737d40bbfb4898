package link

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/internal/plain"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Field numbers of proto/connect_node.proto. PushMessage and PushMessageBatch have the same.
const (
	callUsers, callRoom, callContent = 1, 2, 3
	broadcastContent                 = 1
)

// laneTurn is how many calls one task makes before it lets others have its place
// in the pool.
const laneTurn = 64

// deliverAgain is how often a node that has had no Deliver is asked for it.
const deliverAgain = time.Minute

var (
	errLostConn = errors.New("the connection to the node broke")
	errUpgraded = errors.New("the node has Deliver now")
	errReply    = errors.New("a reply that cannot be")
)

var _ way = (*calls)(nil)

// calls serve a node without Deliver over one connection. A key always has the same lane
// and a lane has one call in flight, so order per key holds. The dispatcher moves what is
// queued to the lanes and gives those that have work a task in the pool.
type calls struct {
	// Static after newCalls.
	link *Link
	conn *grpc.ClientConn
	seed maphash.Seed
	wake chan struct{} // wakes the dispatcher

	// Guarded by link.mu.
	lanes    []lane
	inFlight int
	retryAt  int64  // running time at which a stalled link is tried again
	doubt    func() // makes the link try Deliver again soon
	strikes  int

	tasks sync.WaitGroup // of lanes that are busy; joined under link.mu while the link's way is this one
}

type lane struct {
	queue queue
	busy  bool // a task drains it
}

// serveCalls serves the node over conn until that breaks or the node has Deliver.
func (l *Link) serveCalls(ctx context.Context, conn *grpc.ClientConn) error {
	c := &calls{
		link: l, conn: conn, seed: maphash.MakeSeed(), wake: make(chan struct{}, 1),
		lanes: make([]lane, l.set.cfg.UnaryLanes), doubt: func() {},
	}
	for i := range c.lanes {
		c.lanes[i].queue.load = &l.load
	}
	tried := time.Now()
	l.mu.Lock()
	l.way = c
	l.setLocked(unary)
	c.wakeLocked() // for what was taken while the node was probed
	l.mu.Unlock()
	l.node.unscoped.Store(true)
	l.node.reachable(true)
	var dispatcher sync.WaitGroup
	dispatcher.Go(c.dispatch)
	upgraded := false
	for !upgraded && ctx.Err() == nil && conn.GetState() == connectivity.Ready {
		wait, doubt := context.WithDeadline(ctx, tried.Add(deliverAgain))
		l.mu.Lock()
		c.doubt = doubt
		l.mu.Unlock()
		if !conn.WaitForStateChange(wait, connectivity.Ready) {
			// It may run behind the same connection, a proxy's, or have been told to.
			pause.For(ctx, time.Until(tried.Add(l.set.cfg.BackoffMax)))
			attempt, cancel := context.WithCancel(ctx)
			_, err := l.open(attempt, time.AfterFunc(l.set.cfg.DialTimeout, cancel), conn)
			cancel()
			upgraded, tried = err == nil, time.Now()
		}
		doubt()
	}
	l.mu.Lock()
	c.sortLocked() // what is left in the queue comes after what its lane holds
	l.way = nil
	l.setLocked(connecting)
	for i := range c.lanes {
		for q := &c.lanes[i].queue; q.len > 0; {
			l.queue.push(q.pop()) // keeps the order of each key
		}
	}
	c.wakeLocked()
	cause := l.cause
	l.mu.Unlock()
	dispatcher.Wait()
	// A node that stops gracefully still answers the calls in flight, and each has its
	// deadline. A link that is closed does not wait for them.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	c.tasks.Wait()
	stop()
	switch {
	case cause != nil:
		return cause
	case upgraded:
		return errUpgraded
	}
	return errLostConn
}

// dispatch gives the lanes their deliveries and their tasks until the session ends. The last
// answer of a link that ends, ends its session.
func (c *calls) dispatch() {
	l := c.link
	var launch []*lane
	for range c.wake {
		l.mu.Lock()
		if l.way != c {
			l.mu.Unlock()
			return
		}
		c.sortLocked()
		for i := range c.lanes {
			if la := &c.lanes[i]; la.queue.len > 0 && !la.busy {
				la.busy = true
				c.tasks.Add(1)
				launch = append(launch, la)
			}
		}
		cancel := func() {}
		if l.endsLocked() && l.load.len == 0 && c.inFlight == 0 {
			cancel = l.cancel
		}
		l.mu.Unlock()
		cancel()
		for _, la := range launch {
			c.launch(la)
		}
		launch = launch[:0]
	}
}

// sortLocked moves what is queued to the lanes.
func (c *calls) sortLocked() {
	for q := &c.link.queue; q.len > 0; {
		e := q.pop()
		c.laneOf(e.d).queue.push(e)
	}
}

// laneOf finds the lane of a delivery. Broadcasts have the first.
func (c *calls) laneOf(d *engine.Delivery) *lane {
	key := d.Room()
	switch {
	case d.Everybody():
		return &c.lanes[0]
	case key != "":
	case d.Group() != nil:
		key = d.Group().Users[0]
	case len(d.Users()) > 0:
		key = d.Users()[0]
	}
	return &c.lanes[maphash.String(c.seed, key)%uint64(len(c.lanes))]
}

// launch gives a lane that was marked busy its task. When the pool is full, the
// clock tries again.
func (c *calls) launch(la *lane) {
	if err := c.link.set.cfg.Go(c.link.shard, func() { c.drain(la) }); err != nil {
		c.link.mu.Lock()
		la.busy = false
		c.tasks.Done()
		c.link.tickNow()
		c.link.mu.Unlock()
	}
}

// drain makes the calls of a lane, one after the other.
func (c *calls) drain(la *lane) {
	l := c.link
	for range laneTurn {
		l.mu.Lock()
		if la.queue.len == 0 {
			la.busy = false
			c.tasks.Done()
			l.mu.Unlock()
			return
		}
		e := la.queue.pop()
		c.inFlight++
		l.mu.Unlock()
		c.deliver(e)
	}
	c.launch(la) // to the end of the line
}

// deliver makes the call for one delivery and settles it.
func (c *calls) deliver(e entry) {
	l, m := c.link, c.link.set.meters
	defer func() {
		if r := recover(); r != nil {
			l.set.panicked("call", r)
			e.d.Lose(engine.LostInternal)
			e.d.Drop(engine.DropInternal)
		}
		l.mu.Lock()
		c.inFlight--
		if l.endsLocked() {
			c.wakeLocked()
		}
		l.mu.Unlock()
	}()
	if !e.d.TrySend() {
		return
	}
	if e.d.Everybody() && e.d.Scope() != "" {
		e.d.Drop(engine.DropUnscoped) // Broadcast would reach everybody
		return
	}
	if e.d.Rooms() != nil {
		e.d.Drop(engine.DropNoRooms) // a call has one room
		return
	}
	if o := e.d.Options(); o != nil {
		if _, why := extrasOf(e.d, o, 0, time.Now()); why != engine.Sent {
			e.d.Drop(why)
			return
		}
		e.deadline = l.set.clock.of(e.d.Deadline())
	}
	if e.d.Targets() == 0 && !e.d.Everybody() {
		_, _ = e.d.Ack(engine.Ack{}) // nobody is left that it is for
		return
	}
	m.unaryCalls.Inc()
	began := time.Now()
	a, sent, err := c.call(e)
	if err == nil {
		l.node.acks.Update(time.Since(began).Seconds())
		_, violation := e.d.Ack(a)
		c.answered(violation != nil)
		return
	}
	m.unaryFailures.Inc()
	st, _ := status.FromError(err)
	if st.Code() == codes.Unimplemented {
		l.mu.Lock()
		doubt := c.doubt
		l.mu.Unlock()
		doubt()
	}
	switch {
	case !sent:
		e.d.Drop(engine.DropUnreachable)
	case refusal(st):
		e.d.Drop(engine.DropRefused)
	case errors.Is(err, errReply):
		e.d.Lose(engine.LostCount)
		c.answered(true)
	case st.Code() != codes.DeadlineExceeded:
		e.d.Lose(engine.LostStream)
	case l.set.clock.of(time.Now()) >= e.deadline:
		e.d.Lose(engine.LostDeadline)
	default:
		e.d.Lose(engine.LostAck)
		c.stall()
	}
}

// answered notes that the node has answered a call, perhaps with what cannot be.
func (c *calls) answered(violation bool) {
	l := c.link
	l.mu.Lock()
	cancel := func() {}
	if l.way == c {
		if l.stalled {
			l.stalled = false
			l.refreshLocked()
		}
		if violation {
			c.strikes++
		}
		if c.strikes >= strikesMax {
			cancel = l.endLocked(errViolation)
		}
	}
	l.mu.Unlock()
	if violation {
		l.set.meters.strikes.Inc()
	}
	cancel()
}

// stall makes the link refuse deliveries for an ack timeout: the node does not
// answer its calls.
func (c *calls) stall() {
	l := c.link
	l.mu.Lock()
	var list []*engine.Delivery
	if l.way == c {
		if !l.stalled {
			l.set.meters.stalls.Inc()
			l.node.stalls.Inc()
		}
		l.stalled = true
		c.retryAt = l.set.clock.ran.Load() + int64(l.set.cfg.AckTimeout)
		l.refreshLocked()
		l.tickNow()
		list = l.popLocked()
	}
	l.mu.Unlock()
	drop(list, engine.DropStalled)
}

// wakeLocked implements way.
func (c *calls) wakeLocked() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// tickLocked implements way. Age is no sign of trouble in a lane: a burst for one user waits
// for one call after the other, and a node that does not answer its calls is found by their
// timeout.
func (c *calls) tickLocked(now, ran int64, out *due) (next int64, end error) {
	l := c.link
	for i := range c.lanes {
		out.expired = c.lanes[i].queue.popExpired(out.expired, math.MinInt64, now)
	}
	if l.stalled && ran >= c.retryAt { // another chance
		l.stalled = false
		l.refreshLocked()
	}
	if l.load.len > 0 || l.endsLocked() {
		c.wakeLocked() // the pool may have been full
	}
	if l.stalled {
		return 0, nil
	}
	return noDeadline, nil
}

// popLocked implements way.
func (c *calls) popLocked(dst []*engine.Delivery) []*engine.Delivery {
	for i := range c.lanes {
		dst = c.lanes[i].queue.popAll(dst)
	}
	return dst
}

// owesLocked implements way.
func (c *calls) owesLocked() (awaited, anything bool) { return c.inFlight > 0, c.inFlight > 0 }

// statsLocked implements way.
func (c *calls) statsLocked(t *Stats) {
	t.Unary++
	t.Unacked += c.inFlight
}

// describeLocked implements way.
func (c *calls) describeLocked(t *engine.LinkState) { t.Unacked, t.Window = c.inFlight, len(c.lanes) }

// call makes the call that delivers e. With an error, sent tells whether the
// request may have left.
func (c *calls) call(e entry) (a engine.Ack, sent bool, err error) {
	l := c.link
	wait := l.set.cfg.AckTimeout
	if e.deadline != noDeadline {
		wait = min(wait, time.Until(e.d.Deadline()))
	}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	if tp := e.d.Traceparent(); tp != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", tp)
	}
	buf := l.set.buffers.take()
	method, decode := pubsub.ConnectNodeService_PushMessageBatch_FullMethodName, ackOfBatch
	switch {
	case e.d.Everybody():
		method, decode = pubsub.ConnectNodeService_Broadcast_FullMethodName, ackOfBroadcast
	case e.d.Targets() == 1:
		method, decode = pubsub.ConnectNodeService_PushMessage_FullMethodName, ackOfMessage
	}
	*buf = appendCall(*buf, e.d)
	var (
		to peer.Peer
		in inFrame
	)
	opts := append(slices.Clone(l.set.call), grpc.Peer(&to))
	if err := c.conn.Invoke(ctx, method, &outFrame{mem.NewBuffer(buf, &l.set.buffers)}, &in, opts...); err != nil {
		st, _ := status.FromError(err)
		if !e.d.Everybody() && e.d.Targets() == 1 && st.Code() == codes.ResourceExhausted && refusal(st) {
			// What PushMessage has no field for: the user is there.
			return engine.Ack{Failed: theUser(e.d), Text: plain.Line(st.Message(), textMax)}, true, nil
		}
		return a, to.Addr != nil, err //nolint:wrapcheck // deliver reads its status
	}
	a, err = decode(in.b, e.d)
	if err == nil && e.d.Everybody() && a.Delivered+a.FailedUsers > l.set.cfg.NodeUsers {
		err = fmt.Errorf("%w: %d users", errReply, a.Delivered+a.FailedUsers)
	}
	return a, true, err
}

// refusal tells whether a status says that the node did nothing.
func refusal(st *status.Status) bool {
	switch st.Code() { //nolint:exhaustive // what is not listed may have been delivered
	case codes.Unimplemented, codes.InvalidArgument, codes.FailedPrecondition,
		codes.PermissionDenied, codes.Unauthenticated:
		return true
	case codes.ResourceExhausted:
		// Our own gRPC says this about a reply that is too long, after the fact.
		return !strings.Contains(st.Message(), "larger than max")
	}
	return false
}

// appendCall encodes the request of a unary method.
func appendCall(b []byte, d *engine.Delivery) []byte {
	p := d.Payload()
	if d.Everybody() {
		return wire.AppendBytes(b, broadcastContent, p)
	}
	users := d.Users()
	if g := d.Group(); g != nil {
		users = g.Users
	}
	b = appendWithout(b, callUsers, users, d.Except())
	b = wire.AppendString(b, callRoom, d.Room())
	return wire.AppendBytes(b, callContent, p)
}

func ackOfMessage(b []byte, d *engine.Delivery) (engine.Ack, error) {
	var r pubsub.PushMessageResponse
	if err := r.UnmarshalVT(b); err != nil {
		return engine.Ack{}, fmt.Errorf("%w: %w", errReply, err)
	}
	if r.GetSuccess() {
		return engine.Ack{Delivered: 1}, nil
	}
	return engine.Ack{NotHere: theUser(d), Text: plain.Line(r.GetMessage(), textMax)}, nil
}

func ackOfBatch(b []byte, _ *engine.Delivery) (engine.Ack, error) {
	var r pubsub.PushMessageBatchResponse
	if err := r.UnmarshalVT(b); err != nil {
		return engine.Ack{}, fmt.Errorf("%w: %w", errReply, err)
	}
	return engine.Ack{
		Delivered: int(r.GetDeliveredCount()), NotHere: r.GetFailedUserIds(), Failed: r.GetUnreachedUserIds(), Text: plain.Line(r.GetMessage(), textMax),
	}, nil
}

func ackOfBroadcast(b []byte, _ *engine.Delivery) (engine.Ack, error) {
	var r pubsub.BroadcastResponse
	if err := r.UnmarshalVT(b); err != nil {
		return engine.Ack{}, fmt.Errorf("%w: %w", errReply, err)
	}
	n, unreached := int(r.GetDeliveredCount()), int(r.GetUnreachedCount())
	return engine.Ack{
		Delivered: n, FailedUsers: unreached, Refused: !r.GetSuccess() && n == 0 && unreached == 0, Text: plain.Line(r.GetMessage(), textMax),
	}, nil
}

// theUser is the one user that d is for.
func theUser(d *engine.Delivery) []string {
	users := d.Users()
	if g := d.Group(); g != nil {
		users = g.Users
	}
	except := d.Except()
	for _, u := range users {
		if len(except) > 0 && except[0] == u {
			except = except[1:]
			continue
		}
		return []string{u}
	}
	return nil
}
