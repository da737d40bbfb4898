package ingress

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/transport/ingress/throttle"
)

// streamed is the part of a call that came on a PushStream.
type streamed struct {
	// Owned by the reader until the push has finished, by the writer from then on.
	stream   *stream
	message  *message
	id       uint64
	known    bool            // api is what the message asked for
	err      error           // refused: the engine has not got it
	account  *account        // owed a leave; nil for none
	who      *auth.Principal // for the audit log
	end      func(engine.Result, error)
	claim    *idClaim      // of a push with a message id that the engine has
	result   engine.Result // of one that it did not get, if answered
	answered bool

	finished atomic.Bool // so that a panic cannot answer a push twice
	next     *call       // in stream.done and stream.free
}

// stream is one PushStream. Its reader takes messages and starts their pushes,
// whoever completes a push puts it on a list, and the writer, which is the handler's
// goroutine, answers what is on the list. What is answered goes back to the reader, to
// be used again.
type stream struct {
	// Static after its start.
	srv      *Server
	wake     chan struct{} // for the writer, one token: done, taken or read have changed
	freed    chan struct{} // for the reader, one token: answered has changed
	deadline time.Time     // of the stream, zero for none
	conn     *throttle.Conn
	wire     rawCall
	peer     string // for the audit log, as trace is
	trace    string

	// Owned by the reader.
	info       callInfo
	order      engine.Order
	head       [messageHead]byte
	takenBytes int64
	calls      *call
	messages   *message
	share      share
	watch      bodyWatch
	unread     replyWatch

	// Owned by the writer.
	replies replies

	batched atomic.Bool // the client sends batches, and gets them

	// What is taken and not answered is in flight. The writer stores stopped before
	// it looks at taken, the reader adds to taken before it looks at stopped: a
	// message is either waited for or dropped before anything is done for it.
	taken         atomic.Int64
	answered      atomic.Int64
	answeredBytes atomic.Int64
	stopped       atomic.Bool // nothing more is taken
	gone          atomic.Bool // the client is: what completes is only booked
	slow          atomic.Bool // a message does not come in: nothing more is taken
	writing       atomic.Bool // replies are
	lost          atomic.Bool // pushes are, after a panic: they are not waited for

	done atomic.Pointer[call] // completed pushes, the last one first

	// What the reader has of free calls and messages while it waits for a message.
	laidByCalls    atomic.Pointer[call]
	laidByMessages atomic.Pointer[message]

	// Answered, and free to be used again. Filled by the writer, emptied by the reader;
	// how much it is, about.
	free         atomic.Pointer[call]
	freeMessages atomic.Pointer[message]
	spareCalls   atomic.Int64
	spareBytes   atomic.Int64

	// The reader writes readErr, then read: why it ended. io.EOF is a half-close, nil
	// that it was stopped.
	readErr error
	read    atomic.Bool
}

func (s *Server) pushStream(_ any, ss grpc.ServerStream) (err error) {
	ctx := ss.Context()
	info, err := s.admit(ctx, apis)
	if err != nil {
		if s.cfg.Audit != nil {
			s.auditRefusal(info.auditEntry(ctx, "PushStream"), nil, err)
		}
		return s.rejectStream(ss, "PushStream", info.priority, err)
	}
	defer s.leave(&info)
	s.metrics.streams.Add(1)
	defer s.metrics.streams.Add(-1)
	conn := info.conn
	conn.Note(info.priority, time.Now())
	st := &stream{srv: s, conn: conn, wire: info.wire, info: info, wake: make(chan struct{}, 1), freed: make(chan struct{}, 1)}
	st.share.space, st.share.holder, st.share.priority = s.space, conn, info.priority
	st.watch.space, st.watch.conn, st.watch.most, st.watch.giveUp = s.space, conn, s.cfg.BodyTimeout, st.giveUp
	st.unread.st, st.share.began = st, st.unread.begin
	st.deadline, _ = ctx.Deadline()
	if s.cfg.Audit != nil {
		st.peer, st.trace = peerOf(ctx), traceID(info.header(ctx, traceKey))
	}
	defer func() {
		if v := recover(); v != nil {
			s.panicked("PushStream", v)
			err = s.statuses.mayBeSent.status.Err()
			st.lost.Store(true)
		}
		st.abandon()
	}()
	s.readers.Go(func() { st.readLoop(ctx) })
	return st.writeLoop(ctx, ss)
}

// readLoop takes messages until the client has no more, the stream breaks or the
// writer has stopped it. It outlives the handler at most until gRPC has noticed.
func (st *stream) readLoop(ctx context.Context) {
	defer func() {
		if v := recover(); v != nil {
			st.srv.panicked("PushStream", v)
			st.readErr = st.srv.statuses.mayBeSent.status.Err()
			st.lost.Store(true)
		}
		st.read.Store(true)
		notify(st.wake)
		st.settle()
	}()
	for st.hasRoom(ctx) {
		m, err := st.readMessage(ctx)
		if st.readErr = err; err != nil {
			return
		}
		st.takenBytes += int64(len(m.in.wire))
		more, err := st.takeMessage(ctx, m)
		st.layBy()
		if st.readErr = err; err != nil || !more {
			return
		}
	}
}

// readMessage awaits a message and reads it, once there is space for it. An error is that of
// the stream, or io.EOF.
func (st *stream) readMessage(ctx context.Context) (*message, error) {
	next, err := st.srv.next(st.wire, st.head[:])
	if err == nil {
		err = next.begin(st.wire)
	}
	if err != nil {
		return nil, st.readError(err)
	}
	scope := scopeBytes(st.info.tenant())
	bytes := messageBytes(next.becomes, scope)
	if next.zip != nil {
		bytes += int64(next.size)
	}
	if err := st.takeSpace(ctx, bytes); err != nil {
		next.begun.Free()
		return nil, err
	}
	m := st.newMessage()
	m.bytes = bytes
	if bytes <= shareFree { // it has nothing that others could have
		err = m.in.fill(st.wire, next)
	} else {
		st.watch.begin()
		err = m.in.fill(st.wire, next)
		if !st.watch.end() {
			return nil, st.srv.statuses.slow.status.Err()
		}
	}
	if err == nil {
		err = st.srv.convert(ctx, st.wire, &m.in, next, 0)
	}
	if err != nil {
		return nil, st.readError(err)
	}
	if next.zip != nil { // now it is known what it has become
		m.bytes = messageBytes(len(m.in.wire), scope)
		st.share.untake(bytes - m.bytes)
	}
	return m, nil
}

// takeSpace waits until there is space for a message. An error is that of the stream.
func (st *stream) takeSpace(ctx context.Context, bytes int64) error {
	for !st.share.tryTake(bytes) {
		// Our own pushes that are answered make room, too.
		if st.taken.Load() == st.answered.Load() {
			if err := st.share.wait(ctx, bytes); err != nil {
				return ctx.Err()
			}
			return nil
		}
		select {
		case <-st.freed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// giveUp ends the stream for a message that does not come in, once all that was taken is
// answered. The reader ends with the handler.
func (st *stream) giveUp() {
	st.srv.metrics.countRefusal(st.share.priority, errSlow)
	st.slow.Store(true)
	st.stopped.Store(true)
	notify(st.wake)
}

// readError is the end of a stream that cannot be read: because its client has half-closed or
// has gone, or for what it has sent.
func (st *stream) readError(err error) error {
	if errors.Is(err, io.EOF) {
		return err
	}
	why := unread(err)
	if !errors.Is(why, engine.ErrCanceled) && !errors.Is(why, engine.ErrDeadline) {
		return st.unanswerable(why)
	}
	if _, known := status.FromError(err); !known {
		err = status.FromContextError(context.Canceled).Err()
	}
	return err // bare: some may have been sent
}

// hasRoom waits while as much is in flight as may be. Not reading is how the client
// is told to wait: its flow control window fills up.
func (st *stream) hasRoom(ctx context.Context) bool {
	c := &st.srv.cfg
	for st.taken.Load()-st.answered.Load() >= int64(c.StreamInflight) ||
		st.takenBytes-st.answeredBytes.Load() >= int64(c.StreamInflightBytes) {
		select {
		case <-st.freed:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// takeMessage starts the pushes of a message. False means that the stream has been
// stopped, an error that it ends: something does not even say which push it is.
func (st *stream) takeMessage(ctx context.Context, m *message) (more bool, err error) {
	r, err := st.srv.decoder.stream(m.in.wire)
	if err != nil && (r.batch > 0 || !r.whole && !r.hasID) {
		return false, st.unanswerable(err)
	}
	m.left = max(r.batch, 1)
	if !st.take(m.left) {
		return false, nil
	}
	now := time.Now()
	st.conn.Note(st.info.priority, now)
	if r.batch == 0 {
		st.start(ctx, st.newCall(m, now), &r, err)
		return true, nil
	}
	st.batched.Store(true)
	left := r.batch
	eachInBatch(m.in.wire, func(push []byte) bool {
		var one streamRequest
		if one, err = st.srv.decoder.stream(push); one.batch > 0 {
			err = &engine.InvalidError{Field: "batch", Code: engine.CodeMalformed, Description: "must not hold another batch"}
		}
		if err != nil && !one.whole && !one.hasID {
			st.taken.Add(int64(-left))
			err = st.unanswerable(err)
			return false
		}
		st.start(ctx, st.newCall(m, now), &one, err)
		left, err = left-1, nil
		return true
	})
	return err == nil, err
}

// unanswerable is the end of a stream.
func (st *stream) unanswerable(err error) error {
	st.srv.metrics.malformed.Inc()
	return st.srv.refuse("PushStream", err).status.Err()
}

// take counts n pushes in, unless nothing more is taken.
func (st *stream) take(n int) bool {
	st.taken.Add(int64(n))
	if st.stopped.Load() {
		st.taken.Add(int64(-n))
		notify(st.wake)
		return false
	}
	return true
}

// start hands the push to the engine. What is refused is completed at once, as is a
// push that came with an error.
func (st *stream) start(ctx context.Context, c *call, r *streamRequest, err error) {
	given := false
	defer func() {
		if v := recover(); v != nil {
			st.srv.panicked("PushStream", v)
			c.err = panicError(given)
			st.complete(c)
		}
	}()
	c.id, c.api, c.known = r.id, r.api, r.asked
	if err == nil && !r.asked {
		err = &engine.InvalidError{Field: "push", Code: engine.CodeRequired, Description: "must say what to push to"}
	}
	if err == nil {
		err = st.prepare(ctx, c, r.body)
	}
	if err == nil {
		given = true
		if c.push.Options != nil && c.push.Options.MessageID != "" {
			err = c.startOnce()
		} else {
			err = st.srv.cfg.Engine.Start(&c.push, c)
		}
	}
	if err != nil { // otherwise Complete is called, or was
		c.err = err
		st.complete(c)
	}
}

func (st *stream) prepare(ctx context.Context, c *call, body []byte) error {
	s := st.srv
	if s.cfg.Auth != nil && !s.cfg.Auth.Valid(st.info.principal, c.push.Arrived) {
		if err := s.authenticate(ctx, &st.info); err != nil {
			c.who = st.info.principal // who it was
			return err
		}
		s.grant(ctx, &st.info)
	}
	c.who = st.info.principal
	st.info.allow(c)
	if err := s.admitPush(&st.info); err != nil {
		return err
	}
	c.account = st.info.account
	if s.cfg.Trace != nil {
		c.push.Trace, c.end = s.cfg.Trace(ctx, c.api.String())
	}
	o, err := s.decoder.decode(c.api, body, &c.push)
	if err != nil {
		return err
	}
	if err := s.authorize(st.info.principal, c.api, &c.push); err != nil {
		return err
	}
	if err := s.applyOptions(&st.info, &c.push, o); err != nil {
		return err
	}
	c.enterTenant()
	c.push.Order = &st.order
	if !st.deadline.IsZero() {
		c.push.Timeout = max(st.deadline.Sub(c.push.Arrived), time.Nanosecond)
	}
	return nil
}

// Complete is called by the engine once, on any goroutine.
func (c *call) Complete(p *engine.Push) {
	if c.claim != nil {
		res, err := p.Result()
		c.stream.srv.messageIDs.finish(c.claim, res, err)
	}
	c.stream.complete(c)
}

// complete puts c on the list of the writer and never waits. Who finds the list
// empty wakes the writer, so a burst wakes it once.
func (st *stream) complete(c *call) {
	if !c.finished.CompareAndSwap(false, true) {
		return
	}
	for {
		last := st.done.Load()
		c.next = last
		if st.done.CompareAndSwap(last, c) {
			if last == nil {
				notify(st.wake)
			}
			break
		}
	}
	if st.gone.Load() {
		st.bookList(st.completed())
	}
}

// completed empties the list and returns it in the order of completion.
func (st *stream) completed() *call {
	var first *call
	for c := st.done.Swap(nil); c != nil; {
		next := c.next
		c.next, first = first, c
		c = next
	}
	return first
}

// writeLoop answers pushes until the stream is over: the client has half-closed or
// the server drains, and all that was taken is answered; or the client has gone.
func (st *stream) writeLoop(ctx context.Context, ss grpc.ServerStream) error {
	drained, toldToGo := st.srv.drained, st.conn.ToldToGo()
	look := time.NewTimer(shareLook)
	look.Stop()
	defer look.Stop()
	looks := false
	for {
		select {
		case <-st.wake:
		case <-look.C:
			looks = st.trim()
			if looks {
				look.Reset(shareLook)
			}
			continue
		case <-drained:
			drained = nil
			st.stopped.Store(true)
		case <-toldToGo:
			toldToGo = nil
			st.stopped.Store(true)
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err() // bare: some may have been sent
		}
		if err := st.answerDone(ss); err != nil {
			return err
		}
		if !looks && st.share.holds() {
			looks = true
			look.Reset(shareLook)
		}
		if over, err := st.over(); over {
			return err
		}
	}
}

// over tells whether all that was taken is answered and no more will be.
func (st *stream) over() (bool, error) {
	read, stopped := st.read.Load(), st.stopped.Load()
	if !read && !stopped || !st.lost.Load() && st.taken.Load() != st.answered.Load() {
		return false, nil
	}
	switch {
	case st.slow.Load():
		return true, st.srv.statuses.slow.status.Err()
	case !read || st.readErr == nil:
		return true, st.srv.statuses.draining.status.Err()
	case errors.Is(st.readErr, io.EOF):
		return true, nil
	default:
		return true, st.readErr
	}
}

// answerDone sends the replies of all completed pushes. After an error the rest is
// still booked.
func (st *stream) answerDone(ss grpc.ServerStream) error {
	now := time.Now()
	st.writing.Store(true)
	defer st.writing.Store(false)
	for c := st.completed(); c != nil; {
		var err error
		if st.batched.Load() {
			c, err = st.answerBatch(ss, c, now)
		} else {
			c, err = st.answerOne(ss, c, now)
		}
		if err != nil {
			st.bookList(c)
			return err
		}
	}
	notify(st.freed)
	return nil
}

// answerOne answers c in a message of its own and returns the one behind it.
func (st *stream) answerOne(ss grpc.ServerStream, c *call, now time.Time) (next *call, err error) {
	next = c.next
	res, err := st.book(c, now)
	var r *reply
	if err != nil {
		r = newStreamError(c.id, st.srv.refuse(c.api.String(), err).wire)
	} else {
		r = st.srv.newStreamReply(c.id, c.api, &c.push, &res)
	}
	err = ss.SendMsg(r)
	var free chain
	st.release(c, &free)
	st.giveBack(&free)
	st.answered.Add(1) // of a client that has gone, too
	return next, err
}

// answerBatch answers c and those behind it in one message, and returns the first that
// is not in it.
func (st *stream) answerBatch(ss grpc.ServerStream, c *call, now time.Time) (next *call, err error) {
	var free chain
	n := 0
	st.replies.begin()
	for ; c != nil && st.replies.fits(); n++ {
		next = c.next
		st.answerInto(&st.replies, c, now)
		st.release(c, &free)
		c = next
	}
	err = ss.SendMsg(&st.replies)
	st.giveBack(&free)
	st.answered.Add(int64(n)) // of a client that has gone, too
	return c, err
}

// answerInto books c and appends its reply to a batch.
func (st *stream) answerInto(b *replies, c *call, now time.Time) {
	res, err := st.book(c, now)
	one := b.one[:0]
	if err != nil {
		one = appendStreamError(one, c.id, st.srv.refuse(c.api.String(), err).wire)
	} else {
		one = st.srv.appendStreamReply(one, c.id, c.api, &c.push, &res)
	}
	b.add(one)
}

// book counts a push that is done and ends its span.
func (st *stream) book(c *call, now time.Time) (engine.Result, error) {
	var res engine.Result
	err := c.err
	if c.answered {
		res = c.result
	} else if err == nil {
		res, err = c.push.Result()
	}
	if c.end != nil {
		c.end(res, err)
	}
	if c.account != nil {
		c.account.leave(err != nil && !errors.Is(err, errMayBeSent))
	}
	if err != nil {
		st.srv.metrics.countRefusal(c.push.Priority, err)
	}
	if st.srv.cfg.Audit != nil {
		entry := func() audit.Entry { return auditEntry(c.who, st.peer, st.trace, c.api.String()) }
		if err != nil {
			st.srv.auditRefusal(entry(), &c.push, err)
		} else {
			st.srv.auditPush(c.api, &c.push, &res, entry)
		}
	}
	if c.known {
		st.srv.metrics.record(c.api, &c.push, &res, err, now.Sub(c.push.Arrived))
	} else {
		st.srv.metrics.malformed.Inc()
	}
	return res, err
}

// abandon ends the writer's part: what is in flight is booked when it completes, on
// the goroutine that completes it. The swaps of the list decide who books a push
// that completes meanwhile.
func (st *stream) abandon() {
	st.stopped.Store(true)
	st.gone.Store(true)
	st.bookList(st.completed())
}

func (st *stream) bookList(c *call) {
	n := int64(0)
	for now := time.Now(); c != nil; c = c.next {
		_, _ = st.book(c, now) // nobody is there to be told
		n++
	}
	st.answered.Add(n)
	st.settle()
}

// settle gives back the space of a stream that is over when the last of its pushes is.
func (st *stream) settle() {
	if st.gone.Load() && st.read.Load() && (st.lost.Load() || st.taken.Load() == st.answered.Load()) {
		st.share.giveBack()
	}
}
