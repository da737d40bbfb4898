package load

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"

	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	reopenEvery = 100 * time.Millisecond
	// A SendMsg of this length has waited for the server's flow control.
	blockedFor = int64(time.Millisecond)
)

// lane is one PushStream with its sender. Its receiver lives as long as a stream does.
type lane struct {
	// Static after its start.
	run      *run
	conn     *grpc.ClientConn
	recorder *recorder
	table    *table

	// Owned by the sender.
	pacer    *pacer
	schedule *schedule // nil: closed loop
	choose   *chooser
	stream   *stream // nil: there is none
	tried    moment  // to open one

	broken atomic.Bool // the stream has ended: set by its receiver
}

// stream is a PushStream until it ends.
type stream struct {
	grpc.ClientStream

	cancel context.CancelFunc
	over   chan struct{} // closed by the receiver when it ends
	err    error         // why; to be read after over
}

// open opens a stream. What is wrong with it shows when something is received.
func (l *lane) open(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	desc := &grpc.StreamDesc{StreamName: "PushStream", ServerStreams: true, ClientStreams: true}
	cs, err := l.conn.NewStream(ctx, desc, pubsub.PushManagerService_PushStream_FullMethodName, grpc.StaticMethod())
	if err != nil {
		cancel()
		return
	}
	l.broken.Store(false)
	l.stream = &stream{ClientStream: cs, cancel: cancel, over: make(chan struct{})}
	go l.receiveLoop(l.stream)
}

// receiveLoop settles pushes until the stream ends. close waits for it.
func (l *lane) receiveLoop(s *stream) {
	defer close(s.over)
	defer l.broken.Store(true)
	var r streamReply
	for {
		if s.err = s.RecvMsg(&r); s.err != nil {
			return
		}
		e := ended{code: codes.OK}
		if !l.table.settle(r.id, &e) {
			continue
		}
		e.done = l.run.clock.now()
		if r.err != nil {
			e.outcome, e.code = outcomeOf(r.err)
		} else {
			e.outcome, e.targets = r.outcome(), r.targets
		}
		l.run.ended(l.recorder, &e)
	}
}

// close waits for a stream that is over and counts what it leaves without an answer.
func (l *lane) close() {
	if l.stream == nil {
		return
	}
	<-l.stream.over
	l.stream.cancel()
	_, code := outcomeOfError(l.stream.err)
	if errors.Is(l.stream.err, io.EOF) {
		code = codes.Unavailable // ended, and not every push was answered
	}
	l.stream = nil
	l.end(l.table.clear(), code)
}

func (l *lane) end(all []ended, code codes.Code) {
	now := l.run.clock.now()
	for i := range all {
		all[i].outcome, all[i].code, all[i].done = Unknown, code, now
		l.run.ended(l.recorder, &all[i])
	}
}

// loop sends until the run ends and returns when all is answered or given up.
func (l *lane) loop(ctx context.Context) {
	held := false
	for {
		due := l.pacer.now
		if l.schedule != nil {
			if due = l.schedule.next(); due > l.pacer.now {
				held = false
			}
		}
		if !l.pacer.wait(due) {
			l.unsent(due)
			break
		}
		o := l.choose.next()
		index, waited, ok := l.place(ctx, &o, due)
		held = (held || waited) && l.schedule != nil // a closed loop is nothing but held
		if !ok {
			continue
		}
		if index < 0 {
			l.unsent(due)
			break
		}
		if l.schedule == nil {
			due = l.pacer.now
		}
		blocked := l.send(index, &o, due, held)
		held = held || blocked
	}
	if l.stream != nil {
		_ = l.stream.CloseSend() // always nil
	}
	l.close()
}

// unsent counts what was due and is not sent.
func (l *lane) unsent(due moment) {
	if l.schedule != nil {
		l.run.unsent(l.schedule, due)
	}
}

// place finds a place for a push on the stream. ok=false: there is no stream and the
// push has been counted as refused. An index below 0: the run has ended.
func (l *lane) place(ctx context.Context, o *order, due moment) (index int, waited, ok bool) {
	for {
		if !l.connected(ctx) {
			l.refuse(o, due)
			return 0, waited, false
		}
		if index, ok := l.table.tryTake(); ok {
			return index, waited, true
		}
		waited = true
		l.run.full.Store(l.schedule != nil)
		if !l.wait() {
			return -1, waited, true
		}
	}
}

// wait waits until there may be a place. false: the run has ended.
func (l *lane) wait() bool {
	timer := time.NewTimer(time.Duration(l.pacer.end.Load() - l.run.clock.now()))
	defer timer.Stop()
	defer func() { l.pacer.now = l.run.clock.now() }()
	select {
	case <-l.table.freed:
		return true
	case <-l.stream.over:
		return true
	case <-l.pacer.stop:
	case <-timer.C:
	}
	return false
}

// connected tells whether there is a stream. After one has broken it opens another as
// soon as the connection is back.
func (l *lane) connected(ctx context.Context) bool {
	if l.stream != nil && !l.broken.Load() {
		return true
	}
	l.close()
	if l.pacer.now-l.tried < int64(reopenEvery) {
		return false
	}
	l.tried = l.pacer.now
	if l.conn.GetState() != connectivity.Ready {
		l.conn.Connect()
		return false
	}
	l.open(ctx)
	return l.stream != nil
}

// refuse counts a push that found no stream.
func (l *lane) refuse(o *order, due moment) {
	r := l.run
	r.started()
	r.ended(l.recorder, &ended{kind: o.kind, outcome: Refused, code: codes.Unavailable, due: due, done: r.clock.now()})
	if l.schedule == nil {
		time.Sleep(afterError)
	}
	l.pacer.now = r.clock.now()
}

// send sends a push and tells whether the server made it wait.
func (l *lane) send(index int, o *order, due moment, held bool) (blocked bool) {
	p, sent := &l.table.places[index], l.pacer.now
	if p.request == nil {
		p.request = new(request)
	}
	e := l.run.encoder
	id := l.table.launch(index, o.kind, due, max(sent, 1), held)
	p.head = e.streamHead(p.head[:0], id, *o)
	p.request.set(p.head, e.content.of(o.kind))
	l.run.started()
	// An error says that the stream is over: its receiver learns why.
	_ = l.stream.SendMsg(p.request)
	l.pacer.now = l.run.clock.now()
	return l.pacer.now-sent > blockedFor
}
