package client

import (
	"cmp"
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/internal/pause"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// Of one message: what Push-Manager takes, and bytes that one read of its connection has room for.
	maxBatch      = 1024
	maxBatchBytes = 64 << 10
	// A message of so many is good. For them a smaller one waits for so long, while there are answers to come.
	goodBatch = 64
	maxLinger = 250 * time.Microsecond

	sweepEvery = 25 * time.Millisecond
	// silence is for how long a call may owe answers and bring none before another one takes its place: three times what Push-Manager
	// takes for a push by default.
	silence = 15 * time.Second
	// maxReopen is the longest pause before a call, whatever Push-Manager says.
	maxReopen = 30 * time.Second
)

// errSilent is why a call was ended that owed answers.
var errSilent = errors.New("no answer came for " + silence.String())

// lane is one PushStream at a time, and what was not answered on it.
//
// The queue is always in the order of ids, which is that of Send. What is to be repeated goes back to where it was.
type lane struct {
	// Static after its start.
	c    *Client
	room *semaphore.Weighted
	size int64         // of room
	unit int64         // what a push takes of it at least
	wake chan struct{} // for the writer, one token: there is something in the queue
	full chan struct{} // for the writer, one token: there are enough for a message
	busy chan struct{} // for the sweeper, one token: there is a push
	idle chan struct{} // closed when the lane is closed and nothing is left

	mu sync.Mutex
	// Guarded by mu.
	lastID  uint64
	left    int        // pushes that are not settled
	queue   []*Pending // to be written, in the order of ids
	open    map[uint64]*Pending
	delayed []*Pending // refused, to be queued again when they are due
	keys    map[keyOf]*key
	message uint64 // number of the last message
	closed  bool
	cancel  context.CancelCauseFunc // of the call, nil without one
	owing   time.Time               // since when answers are owed and none comes, zero if none is owed
}

// keyOf is what pushes are kept in order for.
type keyOf struct {
	kind kind
	id   string
}

// key is a user or a room with pushes that are not settled.
type key struct {
	of      keyOf
	left    int
	written uint64     // the highest id that was written
	waiting *Pending   // refused; later ones wait behind it
	held    []*Pending // they
}

func (t *Target) ordered() bool { return t.kind == toUser || t.kind == toRoom || t.kind == toRooms }

func newLane(c *Client, cfg StreamConfig) *lane {
	unit := max(int64(cfg.MaxBytes)/int64(cfg.MaxOpen), 1)
	size := min(unit*int64(cfg.MaxOpen), int64(cfg.MaxBytes)) // MaxBytes that are left over would be room for one more than MaxOpen
	return &lane{
		c: c, size: size, unit: unit, room: semaphore.NewWeighted(size),
		wake: make(chan struct{}, 1), busy: make(chan struct{}, 1), full: make(chan struct{}, 1), idle: make(chan struct{}),
		open: map[uint64]*Pending{}, keys: map[keyOf]*key{},
	}
}

func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// enqueue takes a push, unless the lane is closed.
func (l *lane) enqueue(p *Pending) bool {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return false
	}
	l.lastID++
	l.left++
	p.id = l.lastID
	if p.target.ordered() {
		of := keyOf{p.target.kind, p.target.id}
		k := l.keys[of]
		if k == nil {
			k = &key{of: of}
			l.keys[of] = k
		}
		k.left++
		p.key = k
	}
	first := l.left == 1
	l.queue = append(l.queue, p)
	full := len(l.queue) == goodBatch
	l.mu.Unlock()
	if full {
		notify(l.full)
	}
	if first {
		notify(l.busy)
	}
	notify(l.wake)
	return true
}

// close takes no more.
func (l *lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	if l.left == 0 {
		close(l.idle)
	}
}

// run has a call open whenever there is something to push, until ctx ends.
func (l *lane) run(ctx context.Context) {
	defer l.abandon()
	failures := 0
	for {
		for l.empty() {
			select {
			case <-l.wake:
			case <-l.idle:
				return
			case <-ctx.Done():
				return
			}
		}
		answered, delay := l.serve(ctx)
		if failures++; answered {
			failures = 0
		}
		select {
		case <-l.idle:
			return
		default:
		}
		if delay == 0 {
			delay = backoff(failures)
		}
		if !pause.For(ctx, min(delay, maxReopen)) {
			return
		}
	}
}

func (l *lane) empty() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queue) == 0
}

// serve opens a call and writes to it until it ends. It tells whether anything was answered, and when to come back, if Push-Manager said so.
func (l *lane) serve(ctx context.Context) (answered bool, delay time.Duration) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l.setCancel(cancel)
	defer l.setCancel(nil)
	desc := &grpc.StreamDesc{StreamName: "PushStream", ServerStreams: true, ClientStreams: true}
	stream, err := l.c.conn.NewStream(ctx, desc, pubsub.PushManagerService_PushStream_FullMethodName, grpc.ForceCodecV2(frames{}))
	if err != nil {
		if ctx.Err() == nil {
			l.unopened(errorOf(err, false))
		}
		return false, 0
	}
	over := make(chan struct{})
	var ended *Error
	go func() { // waited for below
		defer close(over)
		answered, ended = l.receive(ctx, stream)
	}()
	l.write(stream, over)
	<-over
	return answered, l.broken(ctx, ended)
}

func (l *lane) setCancel(cancel context.CancelCauseFunc) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancel, l.owing = cancel, time.Time{}
}

// write sends what is queued until the call ends.
func (l *lane) write(stream grpc.ClientStream, over <-chan struct{}) {
	shut := l.idle // all is answered, and nothing more comes
	linger := time.NewTimer(maxLinger)
	linger.Stop()
	defer linger.Stop()
	for {
		if l.mayGrow() {
			linger.Reset(maxLinger)
			select {
			case <-linger.C:
			case <-l.full:
			case <-over:
				return
			}
		}
		if batch := l.take(); batch != nil {
			if stream.SendMsg(batch) != nil {
				return // RecvMsg has the reason
			}
			continue
		}
		select {
		case <-l.wake:
		case <-shut:
			shut = nil
			_ = stream.CloseSend() // always nil
		case <-over:
			return
		}
	}
}

// mayGrow tells whether the next message should wait for more pushes: it is small, and there are answers to come, so nobody waits for this one
// alone. Small messages cost several times more.
func (l *lane) mayGrow() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queue) > 0 && len(l.queue) < goodBatch && len(l.open) > 0 && !l.closed
}

// take moves pushes from the queue to those that are open, and returns them as one message. nil: there are none.
func (l *lane) take() frame {
	l.mu.Lock()
	defer l.mu.Unlock()
	size, n, kept := 0, 0, 0
	for _, p := range l.queue {
		if k := p.key; k != nil && k.waiting != nil && k.waiting.id < p.id {
			k.held = append(k.held, p)
			kept++
			continue
		}
		if size += len(p.body) + maxHead; n > 0 && (n == maxBatch || size > maxBatchBytes || p.alone) {
			break
		}
		if n == 0 {
			l.message++
		}
		l.queue[n] = p // n is never behind where we are
		n++
		kept++
		if p.alone {
			break
		}
	}
	taken := l.queue[:n]
	defer func() {
		rest := copy(l.queue, l.queue[kept:])
		clear(l.queue[rest:])
		l.queue = l.queue[:rest]
	}()
	if n == 0 {
		return nil
	}
	message := make(frame, 0, min(size, maxBatchBytes+len(taken[0].body)+maxHead))
	for _, p := range taken {
		message = appendPush(message, p.id, p.body)
		p.message = l.message
		l.open[p.id] = p
		if p.key != nil {
			p.key.written = max(p.key.written, p.id)
		}
	}
	if l.owing.IsZero() {
		l.owing = time.Now()
	}
	return message
}

// receive settles what is answered until the call ends, and tells how.
func (l *lane) receive(ctx context.Context, stream grpc.ClientStream) (answered bool, ended *Error) {
	var answers []answer
	for {
		var message frame
		if err := stream.RecvMsg(&message); err != nil {
			if errors.Is(err, io.EOF) {
				return answered, &Error{Code: codes.Unavailable, Message: "the stream was ended without an answer"}
			}
			if errors.Is(context.Cause(ctx), errSilent) { // it is broken, and not canceled by anybody
				return answered, &Error{Code: codes.Unavailable, Message: errSilent.Error()}
			}
			ended = errorOf(err, true)
			// What has answered does know the method.
			ended.NotSent = ended.NotSent && (ended.Reason != "" || !answered)
			return answered, ended
		}
		var err error
		if answers, err = decode(message, answers[:0]); err != nil {
			l.hangUp()
			return answered, unusable(err.Error())
		}
		answered = true
		l.settle(ctx, answers)
		clear(answers)
	}
}

// hangUp ends the call.
func (l *lane) hangUp() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cancel != nil {
		l.cancel(nil)
	}
}

// settle takes over answers. Those for pushes that are not open are ignored: their deadline has passed, or they never were.
func (l *lane) settle(ctx context.Context, answers []answer) {
	var ended []*Pending
	refused := answers[:0]
	l.mu.Lock()
	for i := range answers {
		a := answers[i]
		p := l.open[a.id]
		if p == nil {
			continue
		}
		delete(l.open, a.id)
		failed := a.failed
		if failed == nil && a.kind != p.target.kind {
			failed = unusable("the answer is that of another kind of push")
		}
		if failed == nil {
			p.result = a.result
			ended = append(ended, p)
			continue
		}
		a.failed, a.push = failed, p
		// Whatever is sent to the key from now on waits until it is known whether this one is repeated.
		if k := p.key; k != nil {
			if a.inOrder = k.written == p.id && k.waiting == nil; a.inOrder {
				k.waiting = p
			}
		} else {
			a.inOrder = true
		}
		refused = append(refused, a)
	}
	if l.owing = time.Now(); len(l.open) == 0 {
		l.owing = time.Time{}
	}
	l.mu.Unlock()
	for i := range refused {
		if p := refused[i].push; !l.repeat(ctx, p, refused[i].failed, refused[i].inOrder) {
			p.err = p.tries.last
			ended = append(ended, p)
		}
	}
	l.end(ended)
}

// repeat has a push sent again later, if it may be.
func (l *lane) repeat(ctx context.Context, p *Pending, failed *Error, inOrder bool) bool {
	delay, again := p.tries.next(ctx, time.Until(p.deadline), failed, inOrder)
	l.mu.Lock()
	defer l.mu.Unlock()
	if again {
		p.due = time.Now().Add(delay)
		l.delayed = append(l.delayed, p)
		return true
	}
	l.freeLocked(p)
	return false
}

// freeLocked lets go of what waits behind a push.
func (l *lane) freeLocked(p *Pending) {
	if k := p.key; k != nil && k.waiting == p {
		k.waiting = nil
		l.requeueLocked(k.held...)
		k.held = nil
	}
}

// requeueLocked puts pushes where they were in the queue.
func (l *lane) requeueLocked(all ...*Pending) {
	if len(all) == 0 {
		return
	}
	l.queue = append(slices.Clip(l.queue), all...)
	slices.SortFunc(l.queue, func(a, b *Pending) int { return cmp.Compare(a.id, b.id) })
	notify(l.wake)
}

// end closes the accounts of pushes that are in none of the lists any more.
func (l *lane) end(all []*Pending) {
	if len(all) == 0 {
		return
	}
	weight := int64(0)
	l.mu.Lock()
	for _, p := range all {
		weight += p.weight
		p.body = nil // whoever keeps a Pending does not keep the message
		if k := p.key; k != nil {
			if k.left--; k.left == 0 {
				delete(l.keys, k.of)
			}
		}
	}
	if l.left -= len(all); l.left == 0 && l.closed {
		close(l.idle)
	}
	l.mu.Unlock()
	for _, p := range all {
		endSpan(p.span, &p.result, p.err)
		close(p.done)
	}
	l.room.Release(weight)
}

// broken settles what a call has left without an answer, and returns when Push-Manager wants to see the next one, 0 if it does not say.
func (l *lane) broken(ctx context.Context, ended *Error) (delay time.Duration) {
	l.mu.Lock()
	open := slices.SortedFunc(maps.Values(l.open), func(a, b *Pending) int { return cmp.Compare(a.id, b.id) })
	clear(l.open)
	l.owing = time.Time{}
	l.mu.Unlock()
	if len(open) == 0 {
		return ended.RetryAfter
	}
	// With a Reason, none of them was taken, and those in messages before the first of them were answered.
	notTaken := ended.NotSent && ended.Reason != ""
	first := open[0].message
	inFirst := 0
	for inFirst < len(open) && open[inFirst].message == first {
		inFirst++
	}
	paid := notTaken && ended.retry && l.c.budget.trySpend() // one refusal, however many pushes it is for
	var dead, again []*Pending
	for i, p := range open {
		failed := *ended
		var ok bool
		switch {
		case notTaken && ended.retry:
			ok = p.tries.nextPaid(ctx, time.Until(p.deadline), &failed, paid)
		case notTaken && ended.ofMessage():
			// The fault is in the first message. If it had several pushes, each one goes alone now.
			p.alone = p.alone || i < inFirst
			ok = i >= inFirst || inFirst > 1
			p.tries.note(&failed)
		default:
			_, ok = p.tries.next(ctx, time.Until(p.deadline), &failed, true)
		}
		if ok {
			again = append(again, p)
			continue
		}
		p.err = p.tries.last
		dead = append(dead, p)
	}
	l.mu.Lock()
	l.requeueLocked(again...)
	l.mu.Unlock()
	l.end(dead)
	return ended.RetryAfter
}

// unopened ends what is queued, because no call can be opened for it.
func (l *lane) unopened(failed *Error) {
	l.mu.Lock()
	queue := l.queue
	l.queue = nil
	l.mu.Unlock()
	for _, p := range queue {
		e := *failed
		p.tries.note(&e)
		p.err = p.tries.last
	}
	l.end(queue)
}

// sweepLoop ends pushes whose deadline has passed, and has those repeated that are due.
func (l *lane) sweepLoop(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if !l.sweep(time.Now()) {
				tick.Stop()
			}
		case <-l.busy:
			tick.Reset(sweepEvery)
		case <-l.idle:
			return
		case <-ctx.Done():
			return
		}
	}
}

// sweep tells whether there is anything left to look after.
func (l *lane) sweep(now time.Time) bool {
	l.mu.Lock()
	var dead []*Pending
	expire := func(p *Pending, text string, sent bool) bool {
		if now.Before(p.deadline) {
			return false
		}
		p.tries.maybe = p.tries.maybe || sent
		p.err = &Error{Code: codes.DeadlineExceeded, Message: text, NotSent: !p.tries.maybe, Tries: p.tries.n}
		dead = append(dead, p)
		return true
	}
	unsent := func(p *Pending) bool { return expire(p, "the deadline passed before the push was sent", false) }
	l.queue = slices.DeleteFunc(l.queue, unsent)
	for _, p := range l.open {
		if expire(p, "the deadline passed before the push was answered", true) {
			delete(l.open, p.id)
		}
	}
	var due []*Pending
	l.delayed = slices.DeleteFunc(l.delayed, func(p *Pending) bool {
		if p.key != nil {
			p.key.held = slices.DeleteFunc(p.key.held, unsent)
		}
		switch {
		case unsent(p):
			p.err = p.tries.last
			l.freeLocked(p)
		case now.Before(p.due):
			return false
		default:
			l.freeLocked(p)
			due = append(due, p)
		}
		return true
	})
	l.requeueLocked(due...)
	if !l.owing.IsZero() && now.Sub(l.owing) > silence && l.cancel != nil {
		l.cancel(errSilent)
	}
	l.mu.Unlock()
	l.end(dead)
	// Only now: a push that came in the meantime has not been told to the sweeper if the dead ones were still counted.
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.left > 0 || !l.owing.IsZero()
}

// abandon ends whatever is left when the Stream ends before its pushes.
func (l *lane) abandon() {
	l.close()
	l.mu.Lock()
	all := slices.Concat(l.queue, l.delayed)
	for _, k := range l.keys {
		all = append(all, k.held...)
		k.held = nil
	}
	l.queue, l.delayed = nil, nil
	l.mu.Unlock()
	for _, p := range all {
		p.err = &Error{Code: codes.Canceled, Message: ErrClosed.Error(), NotSent: !p.tries.maybe, Tries: p.tries.n, cause: ErrClosed}
	}
	l.end(all)
}
