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
	pubsub "github.com/push-manager/push-manager/proto"
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

// lanes serve a node without Deliver over one connection. A key always has the
// same lane and a lane has one call in flight, so order per key holds. All fields
// but conn and seed are guarded by the link's mu.
type lanes struct {
	conn    *grpc.ClientConn
	seed    maphash.Seed
	lanes   []lane
	count   int    // deliveries that wait
	bytes   int    // of those
	calls   int    // in flight
	retry   int64  // running time at which a stalled link is tried again
	cause   error  // why the session must end
	doubt   func() // makes the link try Deliver again soon
	strikes int
	tasks   sync.WaitGroup // of lanes that are busy
}

type lane struct {
	queue queue
	busy  bool // a task drains it
}

func newLanes(conn *grpc.ClientConn, count int) *lanes {
	return &lanes{conn: conn, seed: maphash.MakeSeed(), lanes: make([]lane, count), doubt: func() {}}
}

// of finds the lane of a delivery. Broadcasts have the first.
func (ls *lanes) of(d *engine.Delivery) *lane {
	key := d.Room()
	switch {
	case d.Everybody():
		return &ls.lanes[0]
	case key != "":
	case d.Group() != nil:
		key = d.Group().Users[0]
	case len(d.Users()) > 0:
		key = d.Users()[0]
	}
	return &ls.lanes[maphash.String(ls.seed, key)%uint64(len(ls.lanes))]
}

// expire appends to dst what has waited beyond its deadline. Age is no sign of
// trouble here: a burst for one user waits for one call after the other, and a node
// that does not answer its calls is found by their timeout.
func (ls *lanes) expire(dst []*engine.Delivery, now int64) []*engine.Delivery {
	for i := range ls.lanes {
		q := &ls.lanes[i].queue
		count, bytes := q.len, q.bytes
		dst = q.popExpired(dst, math.MinInt64, now)
		ls.count -= count - q.len
		ls.bytes -= bytes - q.bytes
	}
	return dst
}

// popAll appends everything that waits to dst.
func (ls *lanes) popAll(dst []*engine.Delivery) []*engine.Delivery {
	for i := range ls.lanes {
		dst = ls.lanes[i].queue.popAll(dst)
	}
	ls.count, ls.bytes = 0, 0
	return dst
}

// waiting appends to dst the lanes that have work and no task, since the pool was
// full. They count as busy from now on.
func (ls *lanes) waiting(dst []*lane) []*lane {
	for i := range ls.lanes {
		if la := &ls.lanes[i]; la.queue.len > 0 && ls.claim(la) {
			dst = append(dst, la)
		}
	}
	return dst
}

// claim marks a lane as having a task. False means that it has one. Each claim ends
// with release.
func (ls *lanes) claim(la *lane) bool {
	if la.busy {
		return false
	}
	la.busy = true
	ls.tasks.Add(1)
	return true
}

func (ls *lanes) release(la *lane) {
	la.busy = false
	ls.tasks.Done()
}

// sendUnaryLocked queues e in its lane. It returns the lane when a task must be
// launched for it.
func (l *Link) sendUnaryLocked(e entry) (*lane, engine.Reason) {
	ls := l.lanes
	if !l.fitsLocked(e.d.Priority(), ls.count, ls.bytes+e.size) {
		return nil, engine.DropQueueFull
	}
	la := ls.push(e)
	l.lookLocked()
	if !ls.claim(la) {
		return nil, engine.Sent
	}
	return la, engine.Sent
}

// launch gives a lane that was marked busy its task. When the pool is full, the
// clock tries again.
func (l *Link) launch(ls *lanes, la *lane) {
	if err := l.set.cfg.Go(l.shard, func() { l.drain(ls, la) }); err != nil {
		l.mu.Lock()
		ls.release(la)
		l.lookLocked()
		l.mu.Unlock()
	}
}

// drain makes the calls of a lane, one after the other.
func (l *Link) drain(ls *lanes, la *lane) {
	for range laneTurn {
		e, ok := l.nextCall(ls, la)
		if !ok {
			return
		}
		l.deliver(ls, e)
	}
	l.launch(ls, la) // to the end of the line
}

// nextCall takes the lane's next delivery. False means that the task is over.
func (l *Link) nextCall(ls *lanes, la *lane) (entry, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if la.queue.len == 0 {
		ls.release(la)
		return entry{}, false
	}
	e := la.queue.pop()
	ls.count--
	ls.bytes -= e.size
	ls.calls++
	return e, true
}

// deliver makes the call for one delivery and settles it.
func (l *Link) deliver(ls *lanes, e entry) {
	defer l.callEnded(ls)
	defer func() {
		if r := recover(); r != nil {
			l.set.panicked("call", r)
			e.d.Lose(engine.LostInternal)
			e.d.Drop(engine.DropInternal)
		}
	}()
	if !e.d.TrySend() {
		return
	}
	var a engine.Ack
	if e.d.Targets() > 0 || e.d.Everybody() { // else nobody is left that it is for
		var (
			sent bool
			err  error
		)
		l.set.meters.unaryCalls.Inc()
		if a, sent, err = l.call(ls, e); err != nil {
			l.set.meters.unaryFailures.Inc()
			l.failCall(ls, e, sent, err)
			return
		}
	}
	_, err := e.d.Ack(a)
	l.answered(ls, err != nil)
}

// callEnded counts a call out. The last one of a link that ends, ends its session.
func (l *Link) callEnded(ls *lanes) {
	l.mu.Lock()
	ls.calls--
	last := l.endsLocked() && l.lanes == ls && l.lanesIdleLocked()
	cancel := l.cancel
	l.mu.Unlock()
	if last && cancel != nil {
		cancel()
	}
}

// answered notes that the node has answered a call, perhaps with a lie.
func (l *Link) answered(ls *lanes, lie bool) {
	l.mu.Lock()
	var cancel context.CancelFunc
	if l.lanes == ls {
		if l.stalled {
			l.stalled = false
			l.refreshLocked()
		}
		if lie {
			ls.strikes++
		}
		if ls.strikes >= strikesMax {
			ls.cause = errLies
			cancel = l.cancel
		}
	}
	l.mu.Unlock()
	if lie {
		l.set.meters.strikes.Inc()
	}
	if cancel != nil {
		cancel()
	}
}

// call makes the call that delivers e. With an error, sent tells whether the
// request may have left.
func (l *Link) call(ls *lanes, e entry) (a engine.Ack, sent bool, err error) {
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
	if err := ls.conn.Invoke(ctx, method, &outFrame{mem.NewBuffer(buf, &l.set.buffers)}, &in, opts...); err != nil {
		st, _ := status.FromError(err)
		if !e.d.Everybody() && e.d.Targets() == 1 && st.Code() == codes.ResourceExhausted && refusal(st) {
			// What PushMessage has no field for: the user is there.
			return engine.Ack{Failed: theUser(e.d), Text: plain(st.Message())}, true, nil
		}
		return a, to.Addr != nil, err //nolint:wrapcheck // failCall reads its status
	}
	a, err = decode(in.b, e.d)
	if err == nil && e.d.Everybody() && a.Delivered+a.FailedUsers > l.set.cfg.NodeUsers {
		err = fmt.Errorf("%w: %d users", errReply, a.Delivered+a.FailedUsers)
	}
	return a, true, err
}

// failCall settles a delivery whose call has failed.
func (l *Link) failCall(ls *lanes, e entry, sent bool, err error) {
	st, _ := status.FromError(err)
	if st.Code() == codes.Unimplemented {
		l.mu.Lock()
		doubt := ls.doubt
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
		l.answered(ls, true)
	case st.Code() != codes.DeadlineExceeded:
		e.d.Lose(engine.LostStream)
	case l.set.clock.of(time.Now()) >= e.deadline:
		e.d.Lose(engine.LostDeadline)
	default:
		e.d.Lose(engine.LostAck)
		l.stall(ls)
	}
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

// stall makes the link refuse deliveries for an ack timeout: the node does not
// answer its calls.
func (l *Link) stall(ls *lanes) {
	l.mu.Lock()
	var list []*engine.Delivery
	if l.lanes == ls {
		if !l.stalled {
			l.set.meters.stalls.Inc()
		}
		l.stalled = true
		ls.retry = l.set.clock.ran.Load() + int64(l.set.cfg.AckTimeout)
		l.refreshLocked()
		l.lookLocked()
		list = ls.popAll(nil)
	}
	l.mu.Unlock()
	drop(list, engine.DropStalled)
}

// unstallLanesLocked gives the node another chance once the stall has lasted.
func (l *Link) unstallLanesLocked(ran int64) {
	if l.stalled && ran >= l.lanes.retry {
		l.stalled = false
		l.refreshLocked()
	}
}

// serveUnary serves the node over conn until that breaks or the node has Deliver.
func (l *Link) serveUnary(ctx context.Context, conn *grpc.ClientConn) error {
	ls := newLanes(conn, l.set.cfg.UnaryLanes)
	tried := time.Now()
	l.mu.Lock()
	l.lanes = ls
	l.setLocked(unary)
	for l.queue.len > 0 { // taken while the node was probed
		e := l.queue.pop()
		ls.push(e)
	}
	idle := l.leaving && l.lanesIdleLocked()
	l.mu.Unlock()
	l.node.reachable(true)
	upgraded := false
	for !idle && !upgraded && ctx.Err() == nil && conn.GetState() == connectivity.Ready {
		wait, doubt := context.WithDeadline(ctx, tried.Add(deliverAgain))
		l.mu.Lock()
		ls.doubt = doubt
		l.mu.Unlock()
		if !conn.WaitForStateChange(wait, connectivity.Ready) {
			pause(ctx, time.Until(tried.Add(l.set.cfg.BackoffMax)))
			upgraded = l.hasDeliver(ctx, conn)
			tried = time.Now()
		}
		doubt()
	}
	l.mu.Lock()
	l.lanes = nil
	l.setLocked(connecting)
	ls.moveTo(&l.queue)
	err := ls.cause
	l.mu.Unlock()
	// A node that stops gracefully still answers the calls in flight, and each has its
	// deadline. A link that is closed does not wait for them.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	ls.tasks.Wait()
	stop()
	switch {
	case err != nil:
		return err
	case upgraded:
		return errUpgraded
	}
	return errLostConn
}

// hasDeliver tries whether the node has Deliver by now. It may run behind the same
// connection, a proxy's, or have been told to.
func (l *Link) hasDeliver(ctx context.Context, conn *grpc.ClientConn) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, err := l.open(ctx, time.AfterFunc(l.set.cfg.DialTimeout, cancel), conn)
	return err == nil
}

// pause waits for d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// push queues e in its lane.
func (ls *lanes) push(e entry) *lane {
	la := ls.of(e.d)
	la.queue.push(e)
	ls.count++
	ls.bytes += e.size
	return la
}

// moveTo empties the lanes into q, which keeps the order of each key.
func (ls *lanes) moveTo(q *queue) {
	for i := range ls.lanes {
		for from := &ls.lanes[i].queue; from.len > 0; {
			q.push(from.pop())
		}
	}
	ls.count, ls.bytes = 0, 0
}

// appendCall encodes the request of a unary method; PushMessage and
// PushMessageBatch have the same fields.
func appendCall(b []byte, d *engine.Delivery) []byte {
	p := d.Payload()
	if d.Everybody() {
		return append(appendLen(b, broadcastContent, len(p)), p...)
	}
	users := d.Users()
	if g := d.Group(); g != nil {
		users = g.Users
	}
	b = appendWithout(b, callUsers, users, d.Except())
	b = appendOptional(b, callRoom, d.Room())
	return append(appendLen(b, callContent, len(p)), p...)
}

func ackOfMessage(b []byte, d *engine.Delivery) (engine.Ack, error) {
	var r pubsub.PushMessageResponse
	if err := r.UnmarshalVT(b); err != nil {
		return engine.Ack{}, fmt.Errorf("%w: %w", errReply, err)
	}
	if r.GetSuccess() {
		return engine.Ack{Delivered: 1}, nil
	}
	return engine.Ack{NotHere: theUser(d), Text: plain(r.GetMessage())}, nil
}

func ackOfBatch(b []byte, _ *engine.Delivery) (engine.Ack, error) {
	var r pubsub.PushMessageBatchResponse
	if err := r.UnmarshalVT(b); err != nil {
		return engine.Ack{}, fmt.Errorf("%w: %w", errReply, err)
	}
	return engine.Ack{
		Delivered: int(r.GetDeliveredCount()), NotHere: r.GetFailedUserIds(), Failed: r.GetUnreachedUserIds(), Text: plain(r.GetMessage()),
	}, nil
}

func ackOfBroadcast(b []byte, _ *engine.Delivery) (engine.Ack, error) {
	var r pubsub.BroadcastResponse
	if err := r.UnmarshalVT(b); err != nil {
		return engine.Ack{}, fmt.Errorf("%w: %w", errReply, err)
	}
	n, unreached := int(r.GetDeliveredCount()), int(r.GetUnreachedCount())
	return engine.Ack{
		Delivered: n, FailedUsers: unreached, Refused: !r.GetSuccess() && n == 0 && unreached == 0, Text: plain(r.GetMessage()),
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
