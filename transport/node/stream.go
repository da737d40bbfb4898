package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

var (
	errBroken  = errors.New("broken stream")
	errDrained = errors.New("manager goes") // ends a stream in good order
)

// stream is one Deliver stream. The call waits for its two goroutines, the reader and the
// sender of acks, and ends it.
type stream struct {
	// Static.
	server *Server
	acks   *acks
	codec  pubsub.Codec // in which frames may come

	// Static after enter.
	key        seatKey
	attempt    uint64
	seat       *seat         // nil: the manager has no instance id
	superseded chan struct{} // closed when a newer stream has taken the seat

	taking  atomic.Bool    // the reader has a frame
	closing sync.WaitGroup // those who close the connections of a room

	// Owned by the reader.
	aud      audiences
	next     uint64 // seq of the next delivery
	request  request
	delivery delivery
	came     time.Time // the frame in hand; zero until it is asked for
	tally    tally     // since the last hand-over to acks
	users    int       // handed over since then
	messages []Message
	sum      sum // not counted yet
}

// messagesMost is how many messages are made at once: few enough that a gateway that
// keeps one does not keep many.
const messagesMost = 64

// Deliver implements pubsub.ConnectNodeServiceServer.
func (s *Server) Deliver(call grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse]) error {
	if s.cfg.UnaryOnly {
		return status.Error(codes.Unimplemented, "method Deliver not implemented")
	}
	hello, err := s.greeted(call)
	if err != nil {
		return s.broken(call.Context(), hello, err)
	}
	st := &stream{
		server: s,
		acks:   newAcks(s.cfg.MaxUnacked, s.online, &s.count),
		aud:    audiences{byID: make(map[uint32]*audience), maxMembers: s.cfg.MaxAudienceMembers},
		next:   1,
		codec:  s.pick(hello),
	}
	if err := s.enter(st, hello); err != nil {
		return err
	}
	defer s.leave(st)
	if err := st.awaitHands(call.Context(), s.cfg.TakeoverTimeout); err != nil {
		return err
	}
	if err := s.reply(call, hello, st.codec); err != nil {
		return err
	}
	s.calls.Go(func() {
		var panicked error // Nobody is told: the manager misses its acks and breaks off.
		defer guarded{s}.caught("acks", &panicked)
		// The error is that of the stream, which the reader gets, too.
		_ = st.acks.sendLoop(countingStream{call, s})
	})
	s.replays.join(st, hello, time.Now())
	s.roomLogs.join(st, hello, time.Now())
	read := make(chan error, 1)
	s.calls.Go(func() { read <- st.read(call) })
	select {
	case err = <-read:
	case <-st.superseded:
		if st.taking.Load() {
			err = <-read // soon: it takes no other frame
		} else {
			err = errSuperseded // the end of the call ends the reader
		}
	}
	st.closing.Wait()
	s.replays.part(st, time.Now())
	s.roomLogs.part(st, time.Now())
	if errors.Is(err, errDrained) {
		st.acks.receipts.hurry()
	} else {
		st.acks.receipts.forget() // The manager knows no more of them.
	}
	st.acks.finish()
	// The sender writes what is owed. A manager that does not read must not keep the call:
	// its end cancels the stream, and the sender with it.
	timer := time.NewTimer(s.cfg.FlushTimeout)
	defer timer.Stop()
	select {
	case <-st.acks.gone:
	case <-call.Context().Done():
	case <-timer.C:
	}
	if errors.Is(err, errDrained) {
		return nil
	}
	return s.broken(call.Context(), hello, err)
}

// broken turns the end of a stream into its status.
func (s *Server) broken(ctx context.Context, hello *pubsub.Hello, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return nil
	}
	if !errors.Is(err, errBroken) {
		return err
	}
	s.count.broken.Inc()
	s.unreported.Add(1)
	s.warn.Do(func() {
		s.cfg.Logger.WarnContext(ctx, "deliver stream broken",
			slog.String("manager", hello.GetManagerId()), slog.Uint64("shard", uint64(hello.GetShard())), slog.Any("error", err),
			slog.Int64("unreported", s.unreported.Swap(0)-1))
	})
	return status.Error(codes.FailedPrecondition, err.Error())
}

// read is the reader: it takes frames until the stream ends. A panic ends the stream.
func (st *stream) read(call grpc.ServerStream) (err error) {
	defer func() { st.server.count.members.Add(float64(-st.aud.members)) }()
	defer guarded{st.server}.caught("Deliver", &err)
	var f frame
	for {
		f.raw = false
		if err := call.RecvMsg(&f); err != nil {
			return err //nolint:wrapcheck // io.EOF or the status of the stream.
		}
		// Who supersedes the stream, and sees that no frame is taken, ends the call: either
		// that is seen here, or the frame there.
		st.taking.Store(true)
		if st.isSuperseded() {
			return errSuperseded
		}
		data, err := f.bytes()
		if err != nil {
			return err
		}
		st.server.count.frames.Inc()
		members := st.aud.members
		err = st.take(data)
		if d := st.aud.members - members; d != 0 {
			st.server.count.members.Add(float64(d))
		}
		if err != nil {
			return err
		}
		f.data = nil
		st.taking.Store(false)
		if st.isSuperseded() {
			return errSuperseded
		}
	}
}

// take applies one frame: deliveries in order, then forgotten audiences, then
// the rest.
func (st *stream) take(data []byte) error {
	r := &st.request
	st.came = time.Time{}
	if err := r.parse(data); err != nil {
		return fmt.Errorf("%w: frame: %w", errBroken, err)
	}
	if r.isPacked {
		if err := st.unpack(r); err != nil {
			return fmt.Errorf("%w: compressed frame: %w", errBroken, err)
		}
	}
	if r.hasHello {
		return fmt.Errorf("%w: a second hello", errBroken)
	}
	if len(r.deliveries) > 0 && r.firstSeq != st.next {
		return fmt.Errorf("%w: first_seq %d instead of %d", errBroken, r.firstSeq, st.next)
	}
	err := st.deliverAll(r.deliveries)
	// What was handed over is acked even if the frame breaks the stream.
	if ackErr := st.handAcks(); err == nil {
		err = ackErr
	}
	if err != nil {
		return err
	}
	for _, id := range r.forget {
		st.aud.forget(id)
	}
	if err := st.replay(r); err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	if err := st.roomLog(r); err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	if err := st.disconnects(r); err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	if r.heartbeat != 0 {
		st.acks.beat(r.heartbeat)
	}
	if r.drain {
		return errDrained
	}
	return nil
}

// replay takes what a frame says of replay.
func (st *stream) replay(r *request) error {
	if !st.server.does.replay || len(r.ends) == 0 && len(r.nudges) == 0 {
		return nil
	}
	for _, b := range r.ends {
		var e replayEnd
		if err := e.parse(b); err != nil {
			return err
		}
		st.server.replays.end(st, e.gate, e.failure, time.Now())
	}
	tokens := make([]uint64, 0, len(r.nudges))
	for _, b := range r.nudges {
		var n nudge
		if err := n.parse(b); err != nil {
			return err
		}
		st.server.replays.nudge(n.user, time.Now())
		tokens = append(tokens, n.token)
	}
	st.acks.nudgesTaken(tokens) // now that the gates are closed
	if st.acks.overdue() {
		return errTooManyUnacked
	}
	return nil
}

// roomLog takes what a frame says of the logs of rooms.
func (st *stream) roomLog(r *request) error {
	if !st.server.does.roomLog {
		return nil
	}
	for _, b := range r.marks {
		var m logMark
		if err := m.parse(b); err != nil {
			return err
		}
		if err := st.server.roomLogs.mark(st, &m, time.Now()); err != nil {
			return err
		}
	}
	for _, b := range r.pages {
		p, err := st.logPage(b)
		if err != nil {
			return err
		}
		if err := st.server.roomLogs.page(st, p, time.Now()); err != nil {
			return err
		}
	}
	return nil
}

// unpack replaces r, which holds a compressed frame, by that frame.
func (st *stream) unpack(r *request) error {
	switch {
	case st.codec == pubsub.Codec_NONE:
		return errors.New("no codec was agreed on")
	case r.hasHello || r.hasMore():
		return errors.New("something else beside it")
	}
	// Not reused: strings and payloads of the deliveries point into it.
	data, err := st.server.decoder.Decode(r.compressed, r.rawBytes, st.codec)
	if err != nil {
		return err //nolint:wrapcheck // take does.
	}
	st.server.count.compressed.Inc()
	if err := r.parse(data); err != nil {
		return err
	}
	if r.isPacked {
		return errors.New("compressed twice")
	}
	return nil
}

func (st *stream) deliverAll(deliveries [][]byte) error {
	if st.seat != nil && len(deliveries) > 0 {
		select {
		case st.seat.hands <- struct{}{}:
			defer func() { <-st.seat.hands }()
		case <-st.superseded:
			return errSuperseded
		}
	}
	for i, b := range deliveries {
		if st.isSuperseded() {
			return errSuperseded // nobody waits for the rest
		}
		if err := st.deliver(b, len(deliveries)-i); err != nil {
			return fmt.Errorf("%w: delivery %d: %w", errBroken, st.next, err)
		}
		st.next++
		// Acks of a large frame do not wait for its end: a manager counts the time.
		if st.users >= 1024 {
			if err := st.handAcks(); err != nil {
				return err
			}
		}
	}
	return nil
}

// handAcks gives what has happened since the last call to the sender.
func (st *stream) handAcks() error {
	t := &st.tally
	if len(t.counts) == 0 {
		return nil
	}
	st.server.count.add(&st.sum) // before anybody is told
	st.sum = sum{}
	err := st.acks.add(t)
	clear(t.misses)
	*t = tally{counts: t.counts[:0], dups: t.dups[:0], pending: t.pending[:0], filtered: t.filtered[:0], misses: t.misses[:0]}
	st.users = 0
	if errors.Is(err, errTooManyUnacked) {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	return err
}

// deliver hands one delivery over, of so many that are left in the frame, and notes its
// ack. An error breaks the stream.
func (st *stream) deliver(b []byte, left int) error {
	d := &st.delivery
	if err := d.parse(b); err != nil {
		return err
	}
	if len(st.messages) == 0 {
		st.messages = make([]Message, min(left, messagesMost))
	}
	m := &st.messages[0] // the gateway may keep it, so it is never used again
	st.messages = st.messages[1:]
	m.RoomID, m.Traceparent = d.room, d.traceparent
	if err := m.parseContent(d.content); err != nil {
		return err
	}
	users, skip, err := st.targets(d, m)
	if err != nil {
		return err
	}
	if d.traceparent != "" && st.server.cfg.Trace != nil {
		defer st.server.cfg.Trace(d.traceparent)()
	}
	var o handover
	if d.isLasting && st.server.lasting != nil {
		m.Options = st.options(d)
	}
	switch {
	case st.server.draining.Load():
		o.refused = true
	case m.Options != nil || len(d.matches) > 0:
		st.deliverLasting(users, skip, m, &o)
	case d.everybody, d.scope != "":
		st.server.broadcast(d.scope, Filter{}, m, &o)
		st.tally.reached = max(st.tally.reached, clampUint32(o.delivered+o.failedUsers))
	default:
		st.server.handOver(users, skip, m, &o)
	}
	if m.Options != nil && m.Options.Log != nil && !o.refused {
		st.server.roomLogs.live(m)
	}
	// The ack is kept until handAcks.
	t := &st.tally
	st.users += o.delivered + len(o.notHere) + len(o.failed) + o.filtered
	n := len(t.counts)
	t.counts = append(t.counts, clampUint32(o.delivered))
	if o.duplicates > 0 {
		t.dups = padded(t.dups, n, []uint32{clampUint32(o.duplicates)}, 1)
	} else if len(t.dups) > 0 {
		t.dups = append(t.dups, 0)
	}
	if o.pending > 0 {
		t.pending = padded(t.pending, n, []uint32{clampUint32(o.pending)}, 1)
	} else if len(t.pending) > 0 {
		t.pending = append(t.pending, 0)
	}
	if o.filtered > 0 {
		t.filtered = padded(t.filtered, n, []uint32{clampUint32(o.filtered)}, 1)
	} else if len(t.filtered) > 0 {
		t.filtered = append(t.filtered, 0)
	}
	if miss := o.miss(st.next); miss != nil {
		t.misses = append(t.misses, miss)
	}
	st.sum.of(&o)
	return nil
}

var (
	errTargets  = errors.New("exactly one of user_ids, audience, everybody and scope must be set")
	errScope    = errors.New("scope: must be the name of a tenant and a slash")
	errUnscoped = errors.New("scope: this node cannot tell tenants apart, and has not said so")
	errRooms    = errors.New("room_ids: with user_ids only, and without room_id")
	errOneRoom  = errors.New("room_ids: this node cannot take several rooms, and has not said so")
	errNoFilter = fmt.Errorf("%w: this node cannot filter, and has not said that it can", errFilter)
	errPlaced   = fmt.Errorf("%w: beside replay or log", errFilter)
)

// filterOf is the filter of a delivery that has one. The error breaks the stream.
func (s *Server) filterOf(d *delivery) (Filter, error) {
	switch {
	case s.filtering == nil:
		return Filter{}, errNoFilter
	case d.hasReplay || d.hasLog:
		return Filter{}, errPlaced
	}
	return filterOf(d.matches)
}

// targets says for whom d is: users without those at the places in skip.
func (st *stream) targets(d *delivery, m *Message) (users []string, skip []int32, err error) {
	set := 0
	for _, is := range [...]bool{len(d.users) > 0, d.hasAudience, d.everybody, d.scope != ""} {
		if is {
			set++
		}
	}
	if set != 1 {
		return nil, nil, errTargets
	}
	switch {
	case d.scope == "":
	case !ids.IsScope(d.scope):
		return nil, nil, errScope
	case st.server.scoped == nil:
		return nil, nil, errUnscoped
	}
	if len(d.rooms)+len(d.audRooms) > 0 && !st.server.does.rooms {
		return nil, nil, errOneRoom
	}
	if len(d.rooms) > 0 {
		if len(d.users) == 0 || d.room != "" {
			return nil, nil, errRooms
		}
		m.Rooms = roomsOf(d.rooms)
	}
	if len(d.matches) > 0 {
		if d.filter, err = st.server.filterOf(d); err != nil {
			return nil, nil, err
		}
	}
	if !d.hasAudience {
		if len(d.except) > 0 {
			return nil, nil, errors.New("except_user_ids without an audience")
		}
		return d.users, nil, nil
	}
	au, err := st.aud.apply(d)
	if err != nil {
		return nil, nil, err
	}
	m.RoomID, m.Rooms = au.room, au.rooms
	skip, err = st.aud.skipped(au, d.except)
	return au.members, skip, err
}

// countingStream counts frames and lets others run before each: what becomes
// ready meanwhile goes into the next frame instead of into one of its own.
type countingStream struct {
	grpc.ServerStream
	server *Server
}

func (c countingStream) SendMsg(m any) error {
	c.server.count.ackFrames.Inc()
	err := c.ServerStream.SendMsg(m)
	runtime.Gosched()
	return err //nolint:wrapcheck // sendLoop does.
}
