package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// stableAfter is how long a stream must have lived for its break to be answered
// with an attempt at once: a node in a crash loop stays on the backoff curve.
const stableAfter = 500 * time.Millisecond

var (
	errNobody        = errors.New("nobody answers")
	errDialTimeout   = fmt.Errorf("%w within the dial timeout", errNobody)
	errUnimplemented = errors.New("the node has no Deliver")
	errWrongNode     = errors.New("the address belongs to another node")
	errVersion       = errors.New("the node speaks another protocol version")
	errCodec         = errors.New("the node wants a codec that was not offered")
)

// wrongNodeError is errWrongNode with what the node there says that it is.
type wrongNodeError struct{ said string }

func (e *wrongNodeError) Error() string {
	return fmt.Sprintf("%v: it says that it is %q", errWrongNode, plain(e.said))
}
func (*wrongNodeError) Unwrap() error { return errWrongNode }

// run keeps the link connected until it is closed.
func (l *Link) run() {
	defer close(l.done)
	defer l.finish()
	var (
		pause = l.set.cfg.BackoffMin
		first = true // the queue takes deliveries while this attempt runs
		fresh = true // the last attempt has not failed
	)
	for l.begin(first) {
		t, err := l.await(!fresh)
		switch {
		case t == nil && err == nil:
			return
		case err != nil:
			l.fail(err)
			first, fresh = false, false
			continue
		}
		started := time.Now()
		reached, err := l.session(t)
		if l.over() {
			return
		}
		fresh = reached
		switch {
		case errors.Is(err, errLies):
			l.fail(err)
			l.quarantine()
			first, pause = false, l.set.cfg.BackoffMin
		case reached && time.Since(started) >= stableAfter && !atFault(err):
			first, pause = true, l.set.cfg.BackoffMin
			l.set.meters.reconnects.Inc()
		case !reached:
			l.fail(err)
			first = false // its address has the pause
		default:
			if l.wasSound() {
				pause = l.set.cfg.BackoffMin
			}
			l.fail(err)
			if l.sleep(jitter(pause)) {
				pause = l.set.cfg.BackoffMin // announced anew
			} else {
				pause = min(2*pause, l.set.cfg.BackoffMax)
			}
			first = false
		}
	}
}

// await waits for the link's turn to dial. An error is what another link has found at the
// same address. Without either the link is over.
func (l *Link) await(failing bool) (*turn, error) {
	d := l.set.dials
	t := d.join(l, failing)
	patience := time.NewTimer(l.set.cfg.DialTimeout)
	defer patience.Stop()
	for {
		select {
		case err := <-t.verdict:
			if err != nil {
				return nil, err
			}
			return t, nil
		case <-l.kick:
			if l.needless() {
				d.leave(t)
				return nil, nil //nolint:nilnil // See above.
			}
			d.hurry(t)
		case <-patience.C:
			if !failing {
				l.fail(errNoTurn) // callers do not wait for longer than for a dial
			}
			if l.needless() {
				d.leave(t)
				return nil, nil //nolint:nilnil // See above.
			}
		}
	}
}

// needless tells that a link without a stream need not dial any more: it is closed, or
// leaves and has nothing to send.
func (l *Link) needless() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closing != engine.Sent || l.leaving && l.queue.len == 0
}

// atFault tells whether a stream has ended in a way that an attempt at once would
// not mend.
func atFault(err error) bool {
	return errors.Is(err, errDrained) || errors.Is(err, errSilent) || errors.Is(err, errOwing)
}

// begin opens the next attempt. False means that the link is closed.
func (l *Link) begin(first bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.endsLocked() {
		return false
	}
	if first {
		l.setLocked(connecting)
	}
	l.sound = false
	return true
}

// wasSound tells whether the node did its part for a while, before it let the last
// stream down. An outage of a node that works is over as soon as it can be; one that
// takes streams and owes what they bring stays on the backoff curve.
func (l *Link) wasSound() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sound
}

// fail makes the link refuse deliveries and drops what is queued.
func (l *Link) fail(err error) {
	l.mu.Lock()
	l.setLocked(down)
	list := l.queue.popAll(nil)
	l.mu.Unlock()
	drop(list, engine.DropUnreachable)
	l.node.unreachable(err)
}

// finish settles what is left when run ends.
func (l *Link) finish() {
	l.mu.Lock()
	if l.closing == engine.Sent {
		l.closing = engine.DropDraining
	}
	why := l.closing
	l.setLocked(closed)
	list := l.queue.popAll(nil)
	l.mu.Unlock()
	drop(list, why)
}

// sleep waits for the backoff. True means that it was cut short.
func (l *Link) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return false
	case <-l.kick:
		return true
	}
}

// quarantine keeps the link down for as long as a lie costs.
func (l *Link) quarantine() {
	l.set.meters.quarantines.Inc()
	if left, ok := l.node.say(); ok {
		l.set.log.Warn("link quarantined", "node", l.node.id, "addr", l.node.addr, "shard", l.shard,
			"for", l.set.cfg.Quarantine, "unreported", left)
	}
	until := time.Now().Add(l.set.cfg.Quarantine)
	for !l.over() && time.Until(until) > 0 {
		l.sleep(time.Until(until))
	}
}

// jitter spreads the attempts of many links: three quarters to five quarters of d.
func jitter(d time.Duration) time.Duration {
	return d*3/4 + rand.N(d/2+1)
}

// session is one connection from dial to end. It tells whether the node was
// reached and why the connection has ended. It ends the turn that it has been given.
func (l *Link) session(t *turn) (reached bool, err error) {
	// The stream outlives every caller: its life ends with close or leave.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if !l.own(cancel) {
		l.set.dials.leave(t)
		return false, context.Canceled
	}
	defer l.own(nil)
	l.set.meters.dials.Inc()
	wire := &wire{dial: l.set.cfg.Dialer}
	defer wire.close()
	began := time.Now()
	conn, s, err := l.connect(ctx, cancel, wire)
	l.set.dials.done(t, time.Since(began), err)
	if conn != nil {
		defer conn.Close() //nolint:errcheck // it is gone either way
	}
	switch {
	case errors.Is(err, errUnimplemented):
		l.set.loseCanary(l.node)
		return true, l.serveUnary(ctx, conn)
	case err != nil:
		l.set.meters.dialFailures.Inc()
		return false, err
	}
	err = l.serve(s, cancel)
	if !errors.Is(err, errDrained) && !errors.Is(err, io.EOF) {
		wire.abort()
	}
	return true, err
}

// connect dials the node and opens a stream.
func (l *Link) connect(ctx context.Context, cancel context.CancelFunc, wire *wire) (*grpc.ClientConn, *stream, error) {
	timer := time.AfterFunc(l.set.cfg.DialTimeout, cancel)
	defer timer.Stop()
	if err := wire.connect(ctx, l.node.addr); err != nil {
		if !timer.Stop() {
			return nil, nil, errDialTimeout
		}
		return nil, nil, fmt.Errorf("%w: dial: %w", errNobody, err)
	}
	conn, err := grpc.NewClient("passthrough:///"+l.node.addr, append([]grpc.DialOption{grpc.WithContextDialer(wire.take)}, l.set.dial...)...)
	if err != nil {
		return nil, nil, fmt.Errorf("dial: %w", err)
	}
	s, err := l.open(ctx, timer, conn)
	return conn, s, err
}

// own makes cancel the way to end the session. False means that the link is
// closed already.
func (l *Link) own(cancel context.CancelFunc) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancel = cancel
	return l.closing == engine.Sent
}

// open says hello on a new stream. The timer ends ctx.
func (l *Link) open(ctx context.Context, timer *time.Timer, conn *grpc.ClientConn) (*stream, error) {
	rpc, err := conn.NewStream(ctx, &pubsub.ConnectNodeService_ServiceDesc.Streams[0],
		pubsub.ConnectNodeService_Deliver_FullMethodName, l.set.call...)
	var hello *helloReply
	if err == nil {
		hello, err = l.greet(rpc)
	}
	if !timer.Stop() {
		return nil, errDialTimeout
	}
	if err != nil {
		return nil, err
	}
	if err := l.check(hello); err != nil {
		return nil, err
	}
	return newStream(l, rpc, *hello), nil
}

// greet sends hello and receives the reply.
func (l *Link) greet(rpc grpc.ClientStream) (*helloReply, error) {
	hello, err := (&pubsub.DeliverRequest{Hello: &pubsub.Hello{
		ProtocolVersion: protocolVersion,
		ManagerId:       l.set.cfg.ManagerID,
		InstanceId:      l.set.instance,
		Attempt:         l.set.hellos.Add(1),
		Shard:           uint32(l.shard),
		Shards:          uint32(l.set.cfg.Shards),
		NodeId:          l.node.id,
		Codecs:          l.set.squeeze.codecs,
	}}).MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("hello: %w", err)
	}
	buf := l.set.buffers.take()
	*buf = append(*buf, hello...)
	// An error of SendMsg says less than the status that RecvMsg then returns.
	_ = rpc.SendMsg(&outFrame{mem.NewBuffer(buf, &l.set.buffers)})
	var in inFrame
	if err := rpc.RecvMsg(&in); err != nil {
		if status.Code(err) == codes.Unimplemented {
			return nil, errUnimplemented
		}
		return nil, fmt.Errorf("hello: %w", err)
	}
	var r response
	if err := r.decode(in.b, 0); err != nil {
		return nil, fmt.Errorf("hello: %w", err)
	}
	if r.hello == nil {
		return nil, fmt.Errorf("hello: %w: the first frame has no hello", errWire)
	}
	return r.hello, nil
}

// check judges the node's hello.
func (l *Link) check(h *helloReply) error {
	if h.version < max(protocolVersion-1, 1) || h.version > protocolVersion {
		return fmt.Errorf("%w: %d", errVersion, h.version)
	}
	if h.node != l.node.id {
		return &wrongNodeError{said: h.node}
	}
	if h.codec != pubsub.Codec_NONE && !slices.Contains(l.set.squeeze.codecs, h.codec) {
		return fmt.Errorf("%w: %d", errCodec, h.codec)
	}
	if int(h.online) > l.set.cfg.NodeUsers {
		l.set.meters.strikes.Inc()
		return fmt.Errorf("%w: %d users, link.node_users is %d", errLies, h.online, l.set.cfg.NodeUsers)
	}
	if l.node.booted(h.boot) {
		l.set.meters.restarts.Inc()
	}
	return nil
}

// serve runs an open stream to its end.
func (l *Link) serve(s *stream, cancel context.CancelFunc) error {
	if l.set.cfg.Canary > 0 {
		l.set.keepCanary(l.node)
		defer l.set.leaveCanary(l.node)
	}
	l.mu.Lock()
	l.stream = s
	l.setLocked(up)
	l.mu.Unlock()
	l.node.reachable(false)
	go s.writeLoop() // ends before serve does
	err := s.guardedRead()
	l.broken(s, err)
	cancel()
	<-s.written
	l.mu.Lock()
	if s.cause != nil && !errors.Is(err, errDrained) {
		err = s.cause
	}
	l.mu.Unlock()
	return err
}

// guardedRead is readLoop with a net below it.
func (s *stream) guardedRead() (err error) {
	defer func() {
		if r := recover(); r != nil {
			s.link.set.panicked("reader", r)
			for _, o := range s.r.owed {
				if o.d != nil {
					o.d.Lose(engine.LostInternal)
				}
			}
			err = errPanic
		}
	}()
	return s.readLoop()
}

// broken settles what the stream had written. The queue is kept: the next attempt
// follows at once, or drops it.
func (l *Link) broken(s *stream, err error) {
	l.mu.Lock()
	s.dead = true
	l.ringLocked()
	l.stream = nil
	l.setLocked(connecting)
	list := s.win.popAll(nil)
	l.mu.Unlock()
	why := engine.LostStream
	if errors.Is(err, errPanic) {
		why = engine.LostInternal
	}
	lose(list, why)
}

// kill ends a stream from outside its reader.
func (l *Link) kill(s *stream, cause error) {
	l.mu.Lock()
	if s.cause == nil {
		s.cause = cause
	}
	cancel := l.cancel
	current := l.stream == s
	l.mu.Unlock()
	if current && cancel != nil {
		cancel()
	}
}

// tick looks at what is due. It is called by the clock.
func (l *Link) tick(now, ran int64, scratch *due) {
	cfg, m := &l.set.cfg, l.set.meters
	var (
		kill error
		left context.CancelFunc
	)
	l.mu.Lock()
	scratch.expired = l.queue.popExpired(scratch.expired, ran-int64(cfg.QueueAge), now)
	s := l.stream
	if s != nil {
		kill = l.watchLocked(s, now, ran, scratch)
	}
	lanes := l.lanes
	if lanes != nil {
		scratch.expired = lanes.expire(scratch.expired, now)
		l.unstallLanesLocked(ran)
		scratch.launch = lanes.waiting(scratch.launch)
		if l.endsLocked() && l.lanesIdleLocked() {
			left = l.cancel
		}
	}
	l.look.Store(l.nextLookLocked())
	l.mu.Unlock()

	if left != nil {
		left()
	}
	if kill != nil {
		if errors.Is(kill, errSilent) {
			m.silences.Inc()
		}
		l.kill(s, kill)
	}
	for _, lane := range scratch.launch {
		l.launch(lanes, lane)
	}
	scratch.launch = scratch.launch[:0]
	scratch.settle()
}

// watchLocked finds what is due on a stream, and why it must end if it must.
func (l *Link) watchLocked(s *stream, now, ran int64, out *due) error {
	cfg := &l.set.cfg
	s.win.measure(ran, int64(cfg.AckTimeout))
	out.late = s.win.popOverdue(out.late, ran-int64(cfg.AckTimeout))
	out.left = s.win.popExpired(out.left, now)
	if s.win.stalled() && !l.stalled {
		l.stalled = true
		s.ackAt = ran
		s.win.slow()
		l.refreshLocked()
		l.set.meters.stalls.Inc()
	}
	if l.stalled {
		out.stalled = l.queue.popAll(out.stalled)
	}
	measure := s.canary.due(ran, cfg.Canary)
	if measure {
		s.canary.start(ran)
	}
	if (measure || ran-s.beatAt >= int64(cfg.Heartbeat)) && !s.beatDue {
		s.beatDue = true
		l.set.meters.heartbeats.Inc()
	}
	l.ringLocked()
	switch {
	case ran-s.inAt >= int64(cfg.Silence):
		return errSilent
	case l.stalled && ran-s.ackAt >= int64(cfg.Silence):
		return errOwing
	case s.drainSent && s.win.live == 0 && ran-max(s.inAt, s.ackAt) >= int64(cfg.AckTimeout):
		return errDrained
	}
	return s.drainedLocked()
}

// nextLookLocked is the running time at which the clock must look again.
func (l *Link) nextLookLocked() int64 {
	s := l.stream
	switch {
	case l.queue.len > 0 || l.lanes != nil && (l.lanes.count > 0 || l.stalled):
		return 0
	case s == nil:
		return noDeadline
	case !s.win.empty() || s.beatDue || l.state != up || s.drainSent:
		return 0
	default:
		return min(s.beatAt+int64(l.set.cfg.Heartbeat), s.inAt+int64(l.set.cfg.Silence), s.canary.next(l.set.cfg.Canary))
	}
}

// due is the clock's scratch: what one link has to settle.
type due struct {
	expired []*engine.Delivery // in the queue: age or deadline
	stalled []*engine.Delivery // in the queue of a stalled link
	late    []*engine.Delivery // written: no ack in time
	left    []*engine.Delivery // written: the caller's deadline
	launch  []*lane
}

func (s *due) settle() {
	drop(s.expired, engine.DropExpired)
	drop(s.stalled, engine.DropStalled)
	lose(s.late, engine.LostAck)
	lose(s.left, engine.LostDeadline)
	for _, list := range []*[]*engine.Delivery{&s.expired, &s.stalled, &s.late, &s.left} {
		clear(*list)
		*list = (*list)[:0]
	}
}

// abandon settles, after a panic, what the clock still owed.
func (s *due) abandon() {
	drop(s.expired, engine.DropInternal)
	drop(s.stalled, engine.DropInternal)
	lose(s.late, engine.LostInternal)
	lose(s.left, engine.LostInternal)
	*s = due{}
}
