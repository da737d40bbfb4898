package load

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// job is a push that is due, on its way to a caller.
type job struct {
	order order
	due   moment
	held  bool
	conn  int
}

// callers makes the unary calls. Callers are started as they are needed and stay.
type callers struct {
	run       *run
	recorders []*recorder
	jobs      chan job // not buffered: who takes one has nothing else to do

	// Owned by the goroutine that paces.
	started int
	group   sync.WaitGroup
}

func (u *callers) recorder(caller int) *recorder { return u.recorders[caller%len(u.recorders)] }

// open paces the open loop and waits for the callers.
func (u *callers) open(ctx context.Context) {
	r := u.run
	p, s, choose := r.pacer(), newSchedule(&r.cfg, 0, 1), newChooser(r, 0)
	held := false // since the last time that nothing was overdue
	due := s.next()
	for n := 0; p.wait(due); n++ {
		j := job{order: choose.next(), due: due, held: held, conn: n % len(r.conns)}
		free, sent := u.give(ctx, p, j)
		if !sent {
			break
		}
		held = held || !free
		if due = s.next(); due > p.now {
			held = false
		}
	}
	r.unsent(s, due)
	close(u.jobs)
	u.group.Wait()
}

// give hands a job to a caller, a new one if there may be one more. free is whether it
// did not have to wait for one.
func (u *callers) give(ctx context.Context, p *pacer, j job) (free, sent bool) {
	select {
	case u.jobs <- j:
		return true, true
	default:
	}
	if u.started < u.run.cfg.InFlight {
		caller := u.started
		u.started++
		u.group.Go(func() { u.serve(ctx, caller, j) })
		return true, true
	}
	j.held = true
	u.run.full.Store(true)
	timer := time.NewTimer(time.Duration(p.end.Load() - p.clock.now()))
	defer timer.Stop()
	select {
	case u.jobs <- j:
		p.now = p.clock.now()
		return false, true
	case <-p.stop:
	case <-timer.C:
	}
	return false, false
}

func (u *callers) serve(ctx context.Context, caller int, j job) {
	c := u.caller(caller)
	for ok := true; ok; j, ok = <-u.jobs {
		_ = c.call(ctx, j, u.run.clock.now())
	}
}

// afterError slows a closed loop down: a server that is not there fails calls in no time.
const afterError = 2 * time.Millisecond

// closed keeps all callers busy until the end.
func (u *callers) closed(ctx context.Context) {
	r := u.run
	for i := range r.cfg.InFlight {
		u.group.Go(func() {
			c, choose := u.caller(i), newChooser(r, i)
			for n := i; !r.over(); n++ {
				now := r.clock.now()
				if !c.call(ctx, job{order: choose.next(), due: now, conn: n % len(r.conns)}, now) {
					time.Sleep(afterError)
				}
			}
		})
	}
	u.group.Wait()
}

// caller makes one call after the other.
type caller struct {
	run      *run
	recorder *recorder
	head     []byte
	request  *request
	reply    reply
}

func (u *callers) caller(i int) *caller {
	return &caller{run: u.run, recorder: u.recorder(i), request: new(request)}
}

// call makes one call and tells whether there was an answer.
func (c *caller) call(ctx context.Context, j job, sent moment) bool {
	r := c.run
	c.head = r.encoder.head(c.head[:0], j.order)
	c.request.set(c.head, r.encoder.content.of(j.order.kind))
	r.started()
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	err := r.conns[j.conn].Invoke(ctx, j.order.kind.method(), c.request, &c.reply, grpc.StaticMethod())
	cancel()
	e := ended{kind: j.order.kind, held: j.held, due: j.due, sent: max(sent, 1), done: r.clock.now()}
	if err == nil {
		e.outcome, e.code, e.targets = c.reply.outcome(), codes.OK, c.reply.targets
	} else {
		e.outcome, e.code = outcomeOfError(err)
		c.head, c.request = nil, new(request) // gRPC may not be done with them
	}
	r.ended(c.recorder, &e)
	return err == nil
}
