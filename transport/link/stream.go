package link

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/wire"
	pubsub "github.com/push-manager/push-manager/proto"
)

// strikesMax is how many protocol violations end a stream.
const strikesMax = 3

const (
	// frameSpare is room in a frame for what stands beside the deliveries: some
	// forgotten audiences at least, and controls.
	frameSpare = 64
	// controlBytes is the most that a heartbeat and a drain take.
	controlBytes = 16
	// controlsMax is how many nudges, and how many ends of replays, are in a frame at most.
	controlsMax = 256
)

var (
	errSilent    = errors.New("nothing came from the node")
	errOwing     = errors.New("the node does not acknowledge")
	errViolation = errors.New("the node claims what cannot be")
	errDrained   = errors.New("the node has drained")
	errPanic     = errors.New("internal error")
)

var _ way = (*stream)(nil)

// stream is one open Deliver stream. Its writer and its reader are one goroutine
// each; they share what link.mu guards.
type stream struct {
	// Static after the hello.
	link    *Link
	rpc     grpc.ClientStream
	hello   *pubsub.HelloReply
	can     features      // what we have offered and the node has
	asker   *asker        // the node, as one that asks for replays
	logs    *logAsker     // and for logs of rooms
	wake    chan struct{} // wakes the writer; holds one token at most
	written chan struct{} // closed when the writer has ended

	// Guarded by link.mu.
	win       window
	idle      bool // the writer waits for wake
	dead      bool // nothing is written any more
	beat      uint64
	beatDue   bool  // the writer shall send beat
	beatAt    int64 // running time of the last heartbeat
	fresh     bool  // the last frame had a heartbeat for the broadcast that follows
	answered  uint64
	timed     uint64    // the heartbeat whose way to the node and back is measured, 0 while none is
	timedAt   time.Time // when it was written
	begun     int64     // running time of the start
	inAt      int64     // running time of the last frame from the node
	ackAt     int64     // running time of the last ack, or of the start of a stall
	leftAt    int64     // running time from which on only receipts were awaited, 0 before the node drains
	drainSent bool
	receipts  receipts
	nudges    nudges

	disconnects disconnects

	w writing
	r reading
}

// writing is what the writer owns.
type writing struct {
	auds    *audiences
	batch   []entry            // taken from the queue
	kept    []entry            // encoded, on their way into the window
	traced  []*engine.Delivery // in the frame. They stay ours: a push with a trace is not Reusable
	control control
	out     outFrame
	// Of the controls: the nudges up to this token, and so many ends of replays, are in the frame.
	nudged uint64
	ended  int
	// Of the logs of rooms: so many marks, pages and messages of these are in the frame.
	marked, paged, entries int
	closed                 uint64 // the token of the last disconnect in the frame, 0 for none
	sizes                  []int  // scratch: of the messages of a page, 0 for those that are left out
}

// reading is what the reader owns.
type reading struct {
	in         inFrame
	resp       response
	owed       []owed  // what the frame acknowledges
	waits      []int64 // of our frames that it ends: how long they have waited, in nanoseconds
	online     uint32  // users on the node
	strikes    int
	lastStrike int64
}

// control is what a frame says beside its deliveries.
type control struct {
	first uint64
	beat  uint64
	drain bool
	// As many as find room, in order.
	nudges []nudge
	ends   []replayEnd
	marks  []*LogMark
	pages  []*LogPage
	closes []*asked
}

// owed is a delivery with the node's answer to it.
type owed struct {
	d   *engine.Delivery
	ack *ack
}

func newStream(l *Link, rpc grpc.ClientStream, hello *pubsub.HelloReply) *stream {
	cfg, ran := &l.set.cfg, l.set.clock.ran.Load()
	limit := cfg.Window
	if n := hello.GetMaxUnacked(); n > 0 {
		limit = min(limit, int(n))
	}
	members := min(cfg.AudienceMembers, int(hello.GetMaxAudienceMembers()))
	s := &stream{
		link: l, rpc: rpc, hello: hello, can: featuresOf(hello.GetFeatures()) & featuresOf(l.set.offers),
		wake: make(chan struct{}, 1), written: make(chan struct{}),
		win: newWindow(limit), begun: ran, inAt: ran, ackAt: ran, beatAt: ran, nudges: newNudges(),
		w: writing{auds: newAudiences(members, l.set.meters)},
		r: reading{online: hello.GetOnlineUsers()},
	}
	s.asker = &asker{link: l, stream: s}
	s.logs = &logAsker{link: l, stream: s}
	return s
}

// serve runs the stream to its end, and says why that came. cancel ends the stream.
func (s *stream) serve(cancel context.CancelFunc) error {
	l := s.link
	l.mu.Lock()
	l.way = s
	l.setLocked(up)
	l.mu.Unlock()
	l.node.reachable(false)
	go s.writeLoop() // ends before serve does
	err := s.readLoop()

	// What was written is settled. The queue is kept: the next attempt follows at once, or
	// drops it.
	l.mu.Lock()
	s.dead = true
	s.wakeLocked()
	l.way = nil
	l.setLocked(connecting)
	list := s.win.popAll(nil)
	unconfirmed, nudged := s.receipts.popAll(), s.nudges.popAll()
	s.disconnects.popAll()
	s.asker.closeLocked()
	s.logs.closeLocked()
	l.mu.Unlock()
	why := engine.LostStream
	if errors.Is(err, errPanic) {
		why = engine.LostInternal
	}
	lose(list, why)
	for _, d := range unconfirmed {
		d.LoseReceipts()
	}
	l.refused(nudged)
	if s.can.has(pubsub.Feature_FEATURE_REPLAY) {
		l.set.cfg.Replayer.Gone(s.asker)
	}
	if s.can.has(pubsub.Feature_FEATURE_ROOM_LOG) {
		l.set.cfg.RoomLogs.Gone(s.logs)
	}
	cancel()
	<-s.written
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cause != nil && !errors.Is(err, errDrained) {
		err = l.cause
	}
	return err
}

// workLocked tells whether the writer can send something now.
func (s *stream) workLocked() bool {
	l := s.link
	if s.beatDue || l.leaving && l.queue.len == 0 && !s.drainSent || s.nudges.waiting() || len(s.asker.ends)+len(s.logs.marks)+len(s.logs.pages) > 0 ||
		len(s.disconnects.due(&l.queue, l.set.clock.ran.Load())) > 0 {
		return true
	}
	return l.queue.len > 0 && !l.stalled && l.state == up && s.win.free() > 0 && s.win.bytes < l.set.cfg.WindowBytes
}

// wakeLocked wakes the writer if it waits and has something to do.
func (s *stream) wakeLocked() {
	if s.idle && (s.dead || s.workLocked()) {
		s.idle = false
		s.wake <- struct{}{} // never blocks: one token for each time it was idle
	}
}

// writeLoop sends until the stream is dead or broken.
func (s *stream) writeLoop() {
	l, m := s.link, s.link.set.meters
	defer close(s.written)
	defer func() {
		if r := recover(); r != nil {
			l.set.panicked("writer", r)
			for _, list := range [][]entry{s.w.kept, s.w.batch} {
				for _, e := range list {
					e.d.Lose(engine.LostInternal)
					e.d.Drop(engine.DropInternal)
				}
			}
			s.end(errPanic)
		}
	}()
	for s.pick() {
		buf := l.set.buffers.take()
		b, rest := s.encode(*buf)
		*buf = b
		if !s.commit(rest) || len(b) == 0 {
			l.set.buffers.Put(buf)
			continue
		}
		buf = l.set.compressor.frame(buf, s.hello.GetCodec())
		m.frames.Inc()
		m.bytes.Add(len(*buf))
		if n := len(s.w.kept); n > 0 {
			m.deliveries.Add(n)
			m.perFrame.Update(float64(n))
		}
		if s.w.marked+s.w.paged > 0 {
			m.logMarks.Add(s.w.marked)
			m.logPages.Add(s.w.paged)
			m.logEntries.Add(s.w.entries)
		}
		clear(s.w.kept) // the window has them
		s.w.kept = s.w.kept[:0]
		s.w.out.buf = mem.NewBuffer(buf, &l.set.buffers)
		if err := s.rpc.SendMsg(&s.w.out); err != nil {
			// What is in the window is unknown: gRPC does not promise that none of it
			// was written. An EOF means that the reader is getting the reason.
			if !errors.Is(err, io.EOF) {
				s.end(fmt.Errorf("send: %w", err))
			}
			return
		}
		for _, d := range s.w.traced {
			d.Written()
		}
	}
}

// end ends the stream from its writer.
func (s *stream) end(cause error) {
	s.link.mu.Lock()
	cancel := s.link.endLocked(cause)
	s.link.mu.Unlock()
	cancel()
}

// pick waits until there is something to send, and moves what the next frame may hold from
// the queue to the batch. False means that the stream is dead.
func (s *stream) pick() bool {
	l, cfg := s.link, &s.link.set.cfg
	l.mu.Lock()
	defer l.mu.Unlock()
	for !s.dead && !s.workLocked() {
		s.idle = true
		l.mu.Unlock()
		<-s.wake
		l.mu.Lock()
	}
	if s.dead {
		return false
	}
	l.mu.Unlock()
	runtime.Gosched() // whoever is about to send gets into the same frame
	l.mu.Lock()

	s.w.batch = s.w.batch[:0]
	if l.state == up && !l.stalled && !s.dead {
		bytes, most := 0, min(cfg.FrameLen, s.win.free())
		budget := min(cfg.FrameBytes, cfg.WindowBytes-s.win.bytes)
		fresh := s.fresh
		s.fresh = false
		for l.queue.len > 0 && len(s.w.batch) < most && bytes < budget {
			if l.queue.slot(0).d.Everybody() && !fresh {
				s.beatDue, s.fresh = true, true
				break // it goes with the next frame
			}
			e := l.queue.pop()
			bytes += e.size
			s.w.batch = append(s.w.batch, e)
		}
		s.win.full = s.win.full || len(s.w.batch) == s.win.free()
	}
	s.w.control = control{
		first: s.win.next, drain: l.leaving && l.queue.len == 0 && !s.drainSent,
		nudges: s.nudges.unwritten(s.w.control.nudges[:0], controlsMax),
		ends:   append(s.w.control.ends[:0], s.asker.ends[:min(len(s.asker.ends), controlsMax)]...),
		marks:  append(s.w.control.marks[:0], s.logs.marks[:min(len(s.logs.marks), controlsMax)]...),
		pages:  s.w.control.pages[:0],
		closes: append(s.w.control.closes[:0], s.disconnects.due(&l.queue, l.set.clock.ran.Load())...),
	}
	for _, a := range s.w.control.closes {
		a.taken = true
	}
	for _, p := range s.logs.pages {
		s.w.control.pages = append(s.w.control.pages, p.LogPage)
	}
	s.drainSent = s.drainSent || s.w.control.drain
	if s.beatDue {
		s.beatDue = false
		s.beat++
		s.beatAt = l.set.clock.ran.Load()
		s.w.control.beat = s.beat
		if s.timed == 0 {
			s.timed, s.timedAt = s.beat, time.Now()
		}
	}
	return true
}

// encode appends the frame to b. Deliveries that it contains are claimed and in
// kept; those from batch[rest] on found no room.
func (s *stream) encode(b []byte) ([]byte, int) {
	l, cfg := s.link, &s.link.set.cfg
	s.w.kept = s.w.kept[:0]
	clear(s.w.traced)
	s.w.traced = s.w.traced[:0]
	b = wire.AppendUint(b, reqFirstSeq, s.w.control.first)
	rest := len(s.w.batch)
	for i := range s.w.batch {
		e := &s.w.batch[i]
		if len(s.w.kept) > 0 && len(b) >= cfg.FrameBytes {
			rest = i
			break
		}
		if e.d.Settled() {
			continue
		}
		if e.d.Everybody() && e.d.Scope() != "" && !s.can.has(pubsub.Feature_FEATURE_SCOPE) {
			e.d.Drop(engine.DropUnscoped) // it was taken before the node said what it can
			continue
		}
		if e.d.Rooms() != nil && !s.can.has(pubsub.Feature_FEATURE_ROOMS) {
			e.d.Drop(engine.DropNoRooms)
			continue
		}
		if e.d.Targets() == 0 && !e.d.Everybody() {
			if e.d.TrySend() {
				_, _ = e.d.Ack(engine.Ack{}) // nobody is left that it is for
			}
			continue
		}
		var more extras
		if o := e.d.Options(); o != nil {
			var why engine.Reason
			if more, why = extrasOf(e.d, o, s.can, time.Now()); why != engine.Sent {
				e.d.Drop(why)
				continue
			}
			e.deadline = l.set.clock.of(e.d.Deadline()) // what it is worth is for the node to mind
		}
		to := s.w.auds.address(e.d)
		size := sizeDelivery(e.d, &to) + more.size()
		if len(b)+size+frameSpare > cfg.MaxFrameBytes {
			s.w.auds.undo(e.d.RoomKey(), &to)
			if len(s.w.kept) > 0 {
				rest = i
				break
			}
			e.d.Drop(engine.DropTooLarge)
			continue
		}
		if !e.d.TrySend() {
			s.w.auds.undo(e.d.RoomKey(), &to)
			continue
		}
		b = more.append(appendDelivery(b, e.d, &to, size))
		e.size = size
		s.w.kept = append(s.w.kept, *e)
		if e.d.Traced() {
			s.w.traced = append(s.w.traced, e.d)
		}
	}
	if len(s.w.kept) == 0 {
		b = b[:0]
	}
	b = s.w.auds.endFrame(b, cfg.MaxFrameBytes-controlBytes)
	b = s.w.appendControls(b, cfg.MaxFrameBytes-controlBytes)
	if s.w.closed = 0; rest == len(s.w.batch) { // else pushes that were first are still to come
		b = s.w.appendCloses(b, cfg.MaxFrameBytes-controlBytes)
	}
	b = s.w.appendLogs(b, cfg.FrameBytes, cfg.MaxFrameBytes-controlBytes, time.Now())
	b = wire.AppendUint(b, reqHeartbeat, s.w.control.beat)
	if s.w.control.drain && rest == len(s.w.batch) {
		b = wire.AppendUint(b, reqDrain, 1)
	}
	return b, rest
}

// appendControls appends to a frame the controls for which it has room below most bytes.
func (w *writing) appendControls(b []byte, most int) []byte {
	w.nudged, w.ended = 0, 0
	for i := range w.control.nudges {
		n := &w.control.nudges[i]
		size := n.size()
		if len(b)+wire.SizeLen(reqNudges, size) > most {
			break
		}
		if n.done != nil {
			b = n.append(b, size)
		}
		w.nudged = n.token
	}
	for i := range w.control.ends {
		e := &w.control.ends[i]
		size := e.size()
		if len(b)+wire.SizeLen(reqReplayEnds, size) > most {
			break
		}
		b = e.append(b, size)
		w.ended = i + 1
	}
	return b
}

// appendCloses appends to a frame the disconnects for which it has room below most bytes.
func (w *writing) appendCloses(b []byte, most int) []byte {
	for _, a := range w.control.closes {
		size := a.size()
		if len(b)+wire.SizeLen(reqDisconnects, size) > most {
			break
		}
		b = a.append(b, size)
		w.closed = a.token
	}
	return b
}

// commit puts what was encoded into the window, just before it is written, and
// the rest of the batch back into the queue. False means that nothing is written: the
// stream has died in the meantime, or its node goes. The stream ends once the window is
// empty, so what got into it now would be lost.
func (s *stream) commit(rest int) bool {
	l := s.link
	l.mu.Lock()
	if s.dead || (l.state != up || l.closing != engine.Sent) && len(s.w.batch) > 0 {
		why := engine.DropUnreachable
		if !s.dead {
			why = l.refusal
			s.drainSent = s.drainSent && !s.w.control.drain
			s.beatDue = s.beatDue || s.w.control.beat != 0
		}
		l.mu.Unlock()
		for _, list := range [][]entry{s.w.kept, s.w.batch[rest:]} {
			for _, e := range list {
				e.d.Drop(why)
			}
		}
		s.w.kept, s.w.batch = s.w.kept[:0], s.w.batch[:0]
		return false
	}
	if rest < len(s.w.batch) {
		for i := len(s.w.batch) - 1; i >= rest; i-- {
			l.queue.pushFront(s.w.batch[i])
		}
		s.drainSent = s.drainSent && !s.w.control.drain
	}
	ran := l.set.clock.ran.Load()
	for _, e := range s.w.kept {
		e.at = ran
		s.win.push(e)
	}
	if len(s.w.kept) > 0 {
		s.win.slot(s.win.next - 1).written = l.set.clock.of(time.Now())
	}
	s.nudges.wrote(s.w.nudged + 1)
	if s.w.ended > 0 {
		s.asker.wroteLocked(s.w.ended)
	}
	if s.w.marked+s.w.paged > 0 {
		s.logs.wroteLocked(s.w.marked, s.w.paged)
	}
	if s.w.closed > 0 {
		s.disconnects.wrote(s.w.closed)
	}
	l.tickNow()
	l.mu.Unlock()
	clear(s.w.control.nudges)
	clear(s.w.control.closes)
	clear(s.w.control.marks)
	clear(s.w.control.pages)
	clear(s.w.batch)
	s.w.batch = s.w.batch[:0]
	return true
}

// readLoop receives until the stream ends and says why.
func (s *stream) readLoop() (err error) {
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
	for {
		if err := s.rpc.RecvMsg(&s.r.in); err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if err := s.r.resp.decode(s.r.in.b, s.win.max); err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if err := s.receive(); err != nil {
			return err
		}
	}
}

// receive acts on one frame.
func (s *stream) receive() error {
	l, r := s.link, &s.r.resp
	if r.hello != nil {
		return fmt.Errorf("%w: a second hello", errWire)
	}
	var refused []*engine.Delivery
	late, strikes, notice := 0, r.stray, false
	switch {
	case int(r.online) > l.set.cfg.NodeUsers:
		strikes++
	case r.heartbeat != 0 || r.online != 0:
		s.r.online = r.online
	}
	var trip time.Duration
	l.mu.Lock()
	ran := l.set.clock.ran.Load()
	s.inAt = ran
	if r.heartbeat != 0 {
		if r.heartbeat <= s.answered || r.heartbeat > s.beat {
			strikes++
		}
		s.answered = max(s.answered, min(r.heartbeat, s.beat))
		if s.timed != 0 && s.answered >= s.timed {
			s.timed, trip = 0, time.Since(s.timedAt)
		}
	}
	s.r.owed, s.r.waits = s.r.owed[:0], s.r.waits[:0]
	var now int64
	if len(r.acks) > 0 {
		now = l.set.clock.of(time.Now())
	}
	for i := range r.acks {
		if at := s.win.writtenAt(r.acks[i].seq); at != 0 {
			s.r.waits = append(s.r.waits, now-at)
		}
		d, ok := s.win.ack(r.acks[i].seq)
		switch {
		case !ok:
			strikes++
		case d == nil:
			late++
		default:
			s.r.owed = append(s.r.owed, owed{d, &r.acks[i]})
		}
	}
	if len(r.acks) > 0 {
		s.ackAt = ran
		s.win.widen(len(r.acks))
		if l.stalled && !s.win.stalled() { // nothing that is overdue is owed any more
			l.stalled = false
			l.refreshLocked()
		}
	}
	if (len(r.acks) > 0 || s.win.live == 0) && !l.stalled && ran-s.begun >= int64(stableAfter) {
		l.healthy = true
	}
	if r.drain && l.state == up {
		notice = true
		l.setLocked(draining)
		refused = l.queue.popAll(nil)
	}
	s.wakeLocked()
	ended := s.drainedLocked()
	l.mu.Unlock()

	if trip > 0 {
		l.node.beats.Update(trip.Seconds())
	}
	for _, wait := range s.r.waits {
		l.node.acks.Update(time.Duration(wait).Seconds())
	}
	drop(refused, engine.DropDraining)
	return cmp.Or(s.settle(late, strikes, notice), ended)
}

// settle settles what the frame acknowledged, counts what came with it and tells whether the
// stream goes on.
func (s *stream) settle(late, strikes int, notice bool) error {
	l, m := s.link, s.link.set.meters
	for i := range s.r.owed {
		o := &s.r.owed[i]
		more := s.r.resp.counts(o.ack)
		a := engine.Ack{
			Delivered: int(o.ack.delivered), Duplicates: int(more.duplicates), Pending: int(more.pending), Filtered: int(more.filtered),
		}
		if miss := o.ack.miss; miss != nil {
			a.NotHere, a.Failed, a.Reused, a.LeftOut = miss.notHere, miss.failed, miss.reused, miss.filtered
			a.FailedUsers, a.Refused, a.Text = int(miss.failedUsers), miss.refused, miss.reason
		}
		// A claim about a broadcast is cut to the users that the node has.
		if online := int(s.r.online); o.d.Everybody() && (a.Delivered > online || a.FailedUsers > online-a.Delivered || a.Filtered > online-a.Delivered-a.FailedUsers) {
			m.clamped.Inc()
			a.Delivered = min(a.Delivered, online)
			a.FailedUsers = min(a.FailedUsers, online-a.Delivered)
			a.Filtered = min(a.Filtered, online-a.Delivered-a.FailedUsers)
			a.Duplicates, a.Pending = min(a.Duplicates, a.Delivered), min(a.Pending, a.Delivered)
		}
		ok, err := o.d.Ack(a)
		switch {
		case err != nil:
			strikes++
		case !ok:
			late++
		case a.Pending > 0 && o.d.AwaitsReceipts():
			s.await(o.ack.seq, o.d)
		}
		o.d = nil
	}
	strikes += s.confirm() + s.replays() + s.roomLogs() + s.disconnected()
	if n := len(s.r.resp.acks); n > 0 {
		m.acks.Add(n)
	}
	if late > 0 {
		m.lateAcks.Add(late)
	}
	if notice {
		m.drainNotices.Inc()
		if left, ok := l.node.say(); ok {
			l.set.log.Info("node drains", "node", l.node.id, "shard", l.shard, "unreported", left)
		}
	}
	if strikes == 0 {
		return nil
	}
	m.strikes.Add(strikes)
	now := l.set.clock.ran.Load()
	if now-s.r.lastStrike > int64(l.set.cfg.Quarantine) {
		s.r.strikes = 0 // the ones before are long ago
	}
	s.r.strikes += strikes
	s.r.lastStrike = now
	if s.r.strikes >= strikesMax {
		return errViolation
	}
	return nil
}

// drainedLocked tells why a stream ends on which nothing is awaited any more, nil while
// something is or more may be written.
func (s *stream) drainedLocked() error {
	switch {
	case s.link.state != draining || s.win.live > 0:
		return nil
	case s.win.empty() && len(s.receipts.open) > 0:
		// A node that goes gives them up at once. It is not kept from going by people.
		ran := s.link.set.clock.ran.Load()
		if s.leftAt == 0 {
			s.leftAt = ran
		}
		if ran-s.leftAt < int64(s.link.set.cfg.AckTimeout) {
			return nil
		}
		return errDrained
	case s.win.empty():
		return errDrained
	case s.win.stalled():
		return errOwing
	}
	return nil // nobody waits any more, but it may still come
}

// tickLocked implements way.
func (s *stream) tickLocked(now, ran int64, out *due) (next int64, end error) {
	l, cfg, m := s.link, &s.link.set.cfg, s.link.set.meters
	s.win.measure(ran, int64(cfg.AckTimeout))
	out.late = s.win.popOverdue(out.late, ran-int64(cfg.AckTimeout))
	out.left = s.win.popExpired(out.left, now)
	s.receipts.sweep(ran)
	out.nudged = s.nudges.popLate(out.nudged, ran-int64(cfg.AckTimeout))
	if s.win.stalled() && !l.stalled {
		l.stalled = true
		s.ackAt = ran
		s.win.narrow()
		l.refreshLocked()
		m.stalls.Inc()
		l.node.stalls.Inc()
	}
	if l.stalled {
		out.stalled = l.queue.popAll(out.stalled)
	}
	if ran-s.beatAt >= int64(cfg.Heartbeat) && !s.beatDue {
		s.beatDue = true
		m.heartbeats.Inc()
	}
	s.wakeLocked()
	switch {
	case ran-s.inAt >= int64(cfg.Silence):
		m.silences.Inc()
		return 0, errSilent
	case l.stalled && ran-s.ackAt >= int64(cfg.Silence):
		return 0, errOwing
	case s.drainSent && s.win.live == 0 && ran-max(s.inAt, s.ackAt) >= int64(cfg.AckTimeout):
		return 0, errDrained
	case !s.win.empty() || s.beatDue || l.state != up || s.drainSent || len(s.nudges.list)+len(s.disconnects.waiting) > 0:
		return 0, s.drainedLocked()
	}
	return min(s.beatAt+int64(cfg.Heartbeat), s.inAt+int64(cfg.Silence)), nil
}

// popLocked implements way: everything that waits is in the link's queue.
func (s *stream) popLocked(dst []*engine.Delivery) []*engine.Delivery { return dst }

// owesLocked implements way.
func (s *stream) owesLocked() (awaited, anything bool) {
	open := len(s.receipts.open) > 0
	return s.win.live > 0 || open, !s.win.empty() || open
}

// statsLocked implements way.
func (s *stream) statsLocked(t *Stats) {
	t.Unacked += s.win.live
	t.UnackedBytes += s.win.bytes
	t.Unconfirmed += len(s.receipts.open)
	t.Nudges += s.nudges.open()
	t.Gates += len(s.asker.open)
	t.LogReads += len(s.logs.open) + len(s.logs.pages)
	t.LogBytes += s.logs.markBytes + s.logs.pageBytes
	if s.hello.GetCodec() != pubsub.Codec_NONE {
		t.Compressing++
	}
}

// describeLocked implements way.
func (s *stream) describeLocked(t *engine.LinkState) {
	t.Unacked, t.Window = s.win.live, s.win.cwnd
	if !s.win.empty() {
		t.UnackedFor = time.Duration(s.link.set.clock.ran.Load() - s.win.slot(s.win.low).at)
	}
	for _, f := range s.link.set.offers {
		if s.can.has(f) {
			t.Features = append(t.Features, featureName(f))
		}
	}
}
