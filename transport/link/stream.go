package link

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"

	"github.com/push-manager/push-manager/engine"
)

// protocolVersion is the version of Deliver that we speak; the one before it is
// accepted, too.
const protocolVersion = 1

// strikesMax is how many lies end a stream.
const strikesMax = 3

var (
	errSilent  = errors.New("nothing came from the node")
	errOwing   = errors.New("the node does not acknowledge")
	errLies    = errors.New("the node claims what cannot be")
	errDrained = errors.New("the node has drained")
	errPanic   = errors.New("internal error")
)

// stream is one open Deliver stream. Its writer and its reader are one goroutine
// each; they share what link.mu guards.
type stream struct {
	// Static after the hello.
	link    *Link
	rpc     grpc.ClientStream
	hello   helloReply
	bell    chan struct{} // wakes the writer; holds one token at most
	written chan struct{} // closed when the writer has ended

	// Guarded by link.mu.
	win       window
	idle      bool  // the writer waits for the bell
	dead      bool  // nothing is written any more
	cause     error // why the clock has ended the stream
	beat      uint64
	beatDue   bool  // the writer shall send beat
	beatAt    int64 // running time of the last heartbeat
	fresh     bool  // the last frame had a heartbeat for the broadcast that follows
	answered  uint64
	canary    canary
	begun     int64 // running time of the start
	inAt      int64 // running time of the last frame from the node
	ackAt     int64 // running time of the last ack, or of the start of a stall
	drainSent bool

	w writing
	r reading
}

// writing is what the writer owns.
type writing struct {
	auds    *audiences
	batch   []entry // taken from the queue
	kept    []entry // encoded, on their way into the window
	control control
	out     outFrame
}

// reading is what the reader owns.
type reading struct {
	in         inFrame
	resp       response
	owed       []owed // what the frame acknowledges
	online     uint32 // users on the node
	strikes    int
	lastStrike int64
}

// control is what a frame says beside its deliveries.
type control struct {
	first uint64
	beat  uint64
	drain bool
}

func newStream(l *Link, rpc grpc.ClientStream, hello helloReply) *stream {
	cfg, ran := &l.set.cfg, l.set.clock.ran.Load()
	limit := cfg.Window
	if hello.unacked > 0 {
		limit = min(limit, int(hello.unacked))
	}
	members := min(cfg.AudienceMembers, int(hello.members))
	return &stream{
		link: l, rpc: rpc, hello: hello,
		bell: make(chan struct{}, 1), written: make(chan struct{}),
		win: newWindow(limit), begun: ran, inAt: ran, ackAt: ran, beatAt: ran, canary: canary{at: ran - int64(cfg.Canary)}, // the first at once
		w: writing{auds: newAudiences(members, l.set.meters)},
		r: reading{online: hello.online},
	}
}

// workLocked tells whether the writer can send something now.
func (s *stream) workLocked() bool {
	l := s.link
	if s.beatDue || l.leaving && l.queue.len == 0 && !s.drainSent {
		return true
	}
	return l.queue.len > 0 && !l.stalled && l.state == up && s.roomLocked()
}

// roomLocked tells whether the window takes another delivery.
func (s *stream) roomLocked() bool {
	if s.win.free() <= 0 {
		s.win.pace.full = true
		return false
	}
	return s.win.bytes < s.link.set.cfg.WindowBytes
}

// writeLoop sends until the stream is dead or broken.
func (s *stream) writeLoop() {
	defer close(s.written)
	defer func() {
		if r := recover(); r != nil {
			s.link.set.panicked("writer", r)
			lose(deliveries(s.w.kept), engine.LostInternal)
			lose(deliveries(s.w.batch), engine.LostInternal)
			drop(deliveries(s.w.batch), engine.DropInternal)
			s.link.kill(s, errPanic)
		}
	}()
	for s.wait() {
		runtime.Gosched() // whoever is about to send gets into the same frame
		if !s.gather() {
			continue
		}
		if err := s.rpc.SendMsg(&s.w.out); err != nil {
			// What is in the window is unknown: gRPC does not promise that none of it
			// was written. An EOF means that the reader is getting the reason.
			if !errors.Is(err, io.EOF) {
				s.link.kill(s, fmt.Errorf("send: %w", err))
			}
			return
		}
	}
}

// wait returns true when there is something to send, false when the stream is dead.
func (s *stream) wait() bool {
	l := s.link
	for {
		l.mu.Lock()
		if s.dead {
			l.mu.Unlock()
			return false
		}
		if s.workLocked() {
			l.mu.Unlock()
			return true
		}
		s.idle = true
		l.mu.Unlock()
		<-s.bell
	}
}

// gather makes the next frame of what is queued and puts its deliveries into the
// window. False means that there is nothing to send after all.
func (s *stream) gather() bool {
	s.pick()
	pool := &s.link.set.buffers
	buf := pool.take()
	b, rest := s.encode(*buf)
	*buf = b
	if !s.commit(rest) || len(b) == 0 {
		pool.Put(buf)
		return false
	}
	m := s.link.set.meters
	buf = s.link.set.squeeze.frame(buf, s.hello.codec)
	m.frames.Inc()
	m.bytes.Add(len(*buf))
	if n := len(s.w.kept); n > 0 {
		m.deliveries.Add(n)
		m.perFrame.Update(float64(n))
	}
	clear(s.w.kept) // the window has them
	s.w.kept = s.w.kept[:0]
	s.w.out.buf = mem.NewBuffer(buf, pool)
	return true
}

// pick moves what the next frame may hold from the queue to the batch.
func (s *stream) pick() {
	l, cfg := s.link, &s.link.set.cfg
	s.w.batch = s.w.batch[:0]
	s.w.control = control{}
	l.mu.Lock()
	defer l.mu.Unlock()
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
	}
	s.w.control.first = s.win.next
	if s.beatDue {
		s.beatDue = false
		s.beat++
		s.beatAt = l.set.clock.ran.Load()
		s.w.control.beat = s.beat
		s.canary.leave(s.beat)
	}
	s.w.control.drain = l.leaving && l.queue.len == 0 && !s.drainSent
	s.drainSent = s.drainSent || s.w.control.drain
}

// encode appends the frame to b. Deliveries that it contains are claimed and in
// kept; those from batch[rest] on found no room.
func (s *stream) encode(b []byte) ([]byte, int) {
	cfg := &s.link.set.cfg
	s.w.kept = s.w.kept[:0]
	b = appendUint(b, reqFirstSeq, s.w.control.first)
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
		if e.d.Targets() == 0 && !e.d.Everybody() {
			if e.d.TrySend() {
				_, _ = e.d.Ack(engine.Ack{}) // nobody is left that it is for
			}
			continue
		}
		to := s.w.auds.address(e.d)
		size := sizeDelivery(e.d, &to)
		if len(b)+size+frameSpare > cfg.MaxFrameBytes {
			s.w.auds.undo(e.d.Room(), &to)
			if len(s.w.kept) > 0 {
				rest = i
				break
			}
			e.d.Drop(engine.DropTooLarge)
			continue
		}
		if !e.d.TrySend() {
			s.w.auds.undo(e.d.Room(), &to)
			continue
		}
		b = appendDelivery(b, e.d, &to, size)
		e.size = size
		s.w.kept = append(s.w.kept, *e)
	}
	if len(s.w.kept) == 0 {
		b = b[:0]
	}
	b = s.w.auds.endFrame(b, cfg.MaxFrameBytes-controlBytes)
	b = appendUint(b, reqHeartbeat, s.w.control.beat)
	if s.w.control.drain && rest == len(s.w.batch) {
		b = appendUint(b, reqDrain, 1)
	}
	return b, rest
}

const (
	// frameSpare is room in a frame for what stands beside the deliveries: some
	// forgotten audiences at least, and controls.
	frameSpare = 64
	// controlBytes is the most that a heartbeat and a drain take.
	controlBytes = 16
)

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
		drop(deliveries(s.w.kept), why)
		drop(deliveries(s.w.batch[rest:]), why)
		s.w.kept, s.w.batch = s.w.kept[:0], s.w.batch[:0]
		return false
	}
	if rest < len(s.w.batch) {
		for i := len(s.w.batch) - 1; i >= rest; i-- {
			l.queue.unpop(s.w.batch[i])
		}
		s.drainSent = s.drainSent && !s.w.control.drain
	}
	ran := l.set.clock.ran.Load()
	for _, e := range s.w.kept {
		e.at = ran
		s.win.push(e)
	}
	l.lookLocked()
	l.mu.Unlock()
	clear(s.w.batch)
	s.w.batch = s.w.batch[:0]
	return true
}

func deliveries(list []entry) []*engine.Delivery {
	ds := make([]*engine.Delivery, len(list))
	for i, e := range list {
		ds[i] = e.d
	}
	return ds
}

// owed is a delivery with the node's answer to it.
type owed struct {
	d   *engine.Delivery
	ack ack
}

// readLoop receives until the stream ends and says why.
func (s *stream) readLoop() error {
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
	late, strikes, notice := 0, 0, false
	switch {
	case int(r.online) > l.set.cfg.NodeUsers:
		strikes++
	case r.heartbeat != 0 || r.online != 0:
		s.r.online = r.online
	}
	r.markAcked()
	var trip time.Duration
	l.mu.Lock()
	ran := l.set.clock.ran.Load()
	s.inAt = ran
	if r.heartbeat != 0 {
		if r.heartbeat <= s.answered || r.heartbeat > s.beat {
			strikes++
		}
		s.answered = max(s.answered, min(r.heartbeat, s.beat))
		trip = s.canary.back(s.answered)
	}
	s.r.owed = s.r.owed[:0]
	for _, a := range r.acks {
		d, ok := s.win.ack(a.seq)
		switch {
		case !ok:
			strikes++
		case d == nil:
			late++
		default:
			s.r.owed = append(s.r.owed, owed{d, a})
		}
	}
	if len(r.acks) > 0 {
		s.ackAt = ran
		s.win.quicken(len(r.acks))
		l.unstallLocked()
	}
	if (len(r.acks) > 0 || s.win.live == 0) && !l.stalled && ran-s.begun >= int64(stableAfter) {
		l.sound = true
	}
	if r.drain && l.state == up {
		notice = true
		l.setLocked(draining)
		refused = l.queue.popAll(nil)
	}
	l.ringLocked()
	ended := s.drainedLocked()
	l.mu.Unlock()

	if trip > 0 {
		l.node.canary.Load().Update(trip.Seconds())
	}
	drop(refused, engine.DropDraining)
	strikes += s.settle(&late)
	return cmp.Or(s.verdict(late, strikes, notice), ended)
}

// drainedLocked tells why a stream ends on which nothing is awaited any more, nil while
// something is or more may be written.
func (s *stream) drainedLocked() error {
	switch {
	case s.link.state != draining || s.win.live > 0:
		return nil
	case s.win.empty():
		return errDrained
	case s.win.stalled():
		return errOwing
	}
	return nil // nobody waits any more, but it may still come

}

// settle settles what the frame acknowledged and returns the number of lies.
func (s *stream) settle(late *int) int {
	strikes := 0
	for i := range s.r.owed {
		o := &s.r.owed[i]
		a := engine.Ack{Delivered: int(o.ack.delivered)}
		if m := s.r.resp.miss(o.ack.seq); m != nil {
			a.NotHere, a.Failed = m.notHere, m.failed
			a.FailedUsers, a.Refused, a.Text = int(m.failedUsers), m.refused, m.reason
		}
		if o.d.Everybody() {
			s.clamp(&a)
		}
		ok, err := o.d.Ack(a)
		switch {
		case err != nil:
			strikes++
		case !ok:
			*late++
		}
		o.d = nil
	}
	return strikes
}

// clamp keeps the claim about a broadcast below the users that the node has.
func (s *stream) clamp(a *engine.Ack) {
	online := int(s.r.online)
	if a.Delivered > online || a.FailedUsers > online-a.Delivered {
		s.link.set.meters.clamped.Inc()
		a.Delivered = min(a.Delivered, online)
		a.FailedUsers = min(a.FailedUsers, online-a.Delivered)
	}
}

// verdict counts what came and tells whether the stream goes on.
func (s *stream) verdict(late, strikes int, notice bool) error {
	l, m := s.link, s.link.set.meters
	for i := range s.r.resp.misses {
		if !s.r.resp.misses[i].acked {
			strikes++
		}
	}
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
	if strikes > 0 {
		m.strikes.Add(strikes)
		now := l.set.clock.ran.Load()
		if now-s.r.lastStrike > int64(l.set.cfg.Quarantine) {
			s.r.strikes = 0 // the ones before are long ago
		}
		s.r.strikes += strikes
		s.r.lastStrike = now
		if s.r.strikes >= strikesMax {
			return errLies
		}
	}
	return nil
}

// unstallLocked ends a stall when nothing that is overdue is owed any more.
func (l *Link) unstallLocked() {
	if l.stalled && !l.stream.win.stalled() {
		l.stalled = false
		l.refreshLocked()
	}
}
