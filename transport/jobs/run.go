package jobs

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// tick is how often turns end, and what became of users is written: four small writes a second for each job. More than
	// writesMost for all jobs that run here are spread over more time, tickMost at most.
	tick       = 250 * time.Millisecond
	tickMost   = 2 * time.Second
	writesMost = 40 // a second
	// glanceEvery is how often the record is read while nothing is to be written.
	glanceEvery = 500 * time.Millisecond
	// burst bounds what a job catches up on when it was held up, in time.
	burst = time.Second
	// openTime bounds the users that are open, at the rate that is set: nodes that do not keep up slow the job down.
	openTime = 5 * time.Second
	// openLeast is how many may always be open.
	openLeast = 1000
	// pushUsers is how many users one push has.
	pushUsers = 500
	// againFirst and againLast are the pause before a push is tried again of which nothing was sent.
	againFirst, againLast = 100 * time.Millisecond, time.Second
	// stallTime is for how long something that holds a job up is told.
	stallTime = 2 * time.Second
	// speedTime is over which time the speed is measured.
	speedTime = 5 * time.Second
)

var (
	errPanic = errors.New("internal error")
	errLost  = errors.New("another instance runs the job")
	errLate  = errors.New("the deadline of the job has passed")
)

// run is a job that this instance runs.
type run struct {
	// Static after start.
	svc      *Service
	key      key
	scope    string // before the ids of the tenant
	spec     *pubsub.BroadcastJobSpec
	own      *ownership
	content  engine.Content
	priority engine.Priority
	options  *engine.Options  // nil without a filter
	rooms    *engine.RoomList // of a filter, which tells in which of several rooms somebody gets it; else nil
	deadline time.Time

	// Owned by loop.
	base     record
	rev      int64     // of base, as it stands in etcd
	seen     time.Time // when that was written or read
	pages    pages
	payload  []byte    // once the job has begun
	tokens   float64   // turns that may end now
	filled   time.Time // when they were counted
	launched []sample  // lately

	pushes sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu.
	got      outcomes // not booked yet
	passedBy []string // nodes, not booked yet
	left     int64    // users whose push is under way
	hold     string   // what holds the job up
	held     time.Time
	state    string // that of base, for pushes
	leaves   bool   // the job is left to others
}

// sample is how many turns had ended by a time.
type sample struct {
	at    time.Time
	turns int64
}

// plan is what the next write says, and whom it is for.
type plan struct {
	record record
	chunk  int // users of the page
	page   *page
	got    outcomes
}

// begin takes over the job.
func (r *run) begin(ctx context.Context) error {
	for {
		cur, spec, err := r.svc.store.get(ctx, r.key)
		if err != nil {
			return err
		}
		if !cur.due(time.Now()) {
			return errLost
		}
		next := cur.record
		lost := next.Open
		next.takeOver(r.svc.cfg.ManagerID)
		next.judge(time.Now())
		next.Write++
		rev, err := r.svc.store.write(ctx, r.key, &next, cur.rev)
		switch {
		case errors.Is(err, errConflict):
			continue
		case err != nil:
			return err // if it was written all the same, another take-over does no harm
		}
		if lost > 0 {
			r.svc.metrics.takeovers.Inc()
			r.svc.metrics.count(counts{Unknown: lost})
			r.svc.cfg.Logger.Warn("job taken over, and some of its users are unknown", "tenant", r.key.tenant, "job", r.key.id, "users", lost)
		}
		r.base, r.rev, r.spec, r.state = next, rev, spec, next.State
		r.priority, r.deadline = next.Priority, next.Deadline
		if filter := spec.GetFilter(); len(filter) > 0 {
			r.options = new(engine.Options)
			for _, m := range filter {
				r.options.Filter = append(r.options.Filter, engine.Match{Key: m.GetKey(), Values: m.GetValues(), Not: m.GetNot()})
			}
			if rooms := spec.GetRoomIds(); len(rooms) > 1 {
				r.rooms = engine.NewRoomList(rooms).Scoped(r.scope)
			}
		}
		c := spec.GetContent()
		r.content = engine.Content{Present: true, DataLen: len(c.GetData()), MetadataEntries: len(c.GetMetadata()), Timestamp: c.GetTimestamp()}
		for k, v := range c.GetMetadata() {
			r.content.MetadataBytes += len(k) + len(v)
		}
		r.pages = pages{run: r, failing: map[string]time.Time{}, told: map[string]bool{}}
		r.filled, r.seen = time.Now(), time.Now()
		return nil
	}
}

// loop runs the job until it is over, is paused, or belongs to somebody else; or until stop is closed. What is under way
// then is waited for until ctx ends.
func (r *run) loop(ctx context.Context, stop <-chan struct{}) error {
	defer r.pushes.Wait()
	defer r.giveUp() // or what was not sent would be tried for ever once another instance runs the job
	defer r.pages.drop()
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		stopping := false
		select {
		case <-stop:
			stopping = true
		case <-r.own.over:
			stopping = true
		default:
		}
		if stopping {
			r.giveUp() // what was not sent is not tried again
		}
		if err := r.step(ctx, stopping); err != nil {
			return err
		}
		r.mu.Lock()
		idle := r.left == 0 && r.got.empty()
		r.mu.Unlock()
		if rests := r.base.ended() || r.base.State == paused || stopping; rests && idle {
			return nil
		}
		every, quit, lost := r.svc.writeEvery(), stop, r.own.over
		if stopping {
			every, quit, lost = tick, nil, nil
		}
		ticker.Reset(every)
		select {
		case <-ticker.C:
		case <-quit:
		case <-lost:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// writeEvery is how often a job is written, by how many run here.
func (s *Service) writeEvery() time.Duration {
	return min(max(tick, time.Duration(s.metrics.running.Load())*time.Second/writesMost), tickMost)
}

// step writes what has become of users, ends the next turns, and sends to those whose turn it was.
func (r *run) step(ctx context.Context, stopping bool) error {
	r.mu.Lock()
	got, passed := r.got, r.passedBy
	r.got, r.passedBy = outcomes{}, nil
	r.mu.Unlock()
	var p *plan
	for wait := againFirst; ; {
		if p == nil {
			if p = r.plan(got, passed, stopping); p == nil {
				return r.glance(ctx)
			}
		}
		rev, err := r.svc.store.write(ctx, r.key, &p.record, r.rev)
		if err == nil {
			r.done(ctx, p, stored{record: p.record, rev: rev})
			return nil
		}
		if !errors.Is(err, errConflict) {
			r.svc.metrics.etcdErrors.Inc()
		}
		cur, err := r.svc.store.getRecord(ctx, r.key)
		switch {
		case errors.Is(err, ErrUnknown):
			return errLost // somebody has deleted it
		case err == nil && cur.Run != r.base.Run:
			return errLost
		case err == nil && cur.Write == p.record.Write: // it was made
			r.done(ctx, p, *cur) // and a caller may have changed the job since
			return nil
		case err == nil && cur.rev != r.rev: // a caller has changed the job, so it never will be
			r.follow(*cur)
			p = nil
		case !pause.For(ctx, wait): // it was not made, or may be made yet. What is made once more is the same
			return ctx.Err()
		default:
			wait = min(2*wait, againLast)
		}
	}
}

// follow goes by a record as it stands in etcd.
func (r *run) follow(cur stored) {
	r.base, r.rev, r.seen = cur.record, cur.rev, time.Now()
	r.setState(cur.State)
}

// glance looks whether a caller has changed the job, while there is nothing to write that would tell.
func (r *run) glance(ctx context.Context) error {
	if time.Since(r.seen) < glanceEvery {
		return nil
	}
	cur, err := r.svc.store.getRecord(ctx, r.key)
	switch {
	case errors.Is(err, ErrUnknown):
		return errLost
	case err != nil:
		r.svc.metrics.etcdErrors.Inc() // nothing is written either
	case cur.Run != r.base.Run:
		return errLost
	default:
		r.follow(*cur)
	}
	return nil
}

// plan is the next write, nil if there is nothing to write.
func (r *run) plan(got outcomes, passed []string, stopping bool) *plan {
	now := time.Now()
	p := &plan{record: r.base, got: got}
	next := &p.record
	changes := !got.empty() || len(passed) > 0
	next.book(got)
	next.pass(passed)
	next.Nodes = r.svc.cfg.Engine.Nodes()
	changes = next.judge(now) || changes
	if reason := r.heldUp(now); next.State == running && reason != next.Reason {
		next.Reason, changes = reason, true
	}
	if next.State != running {
		r.pages.drop()
		next.Speed = 0
	}
	if next.State != running || stopping || next.Done {
		r.tokens, r.filled, r.launched = 0, now, nil
	} else {
		rate := float64(next.Rate)
		r.tokens = min(r.tokens+now.Sub(r.filled).Seconds()*rate, max(1, rate*max(burst, 2*r.svc.writeEvery()).Seconds()))
		r.filled = now
		if page := r.pages.get(next.Next, r.want()); page != nil {
			n := int(min(r.tokens, float64(max(openLeast, int64(rate*openTime.Seconds()))-next.Open)))
			if n > 0 {
				r.announce(p, page, n)
				changes = true
			}
		}
	}
	if !changes {
		return nil
	}
	next.Write++
	return p
}

func (r *run) want() int {
	return min(max(int(float64(r.base.Rate)*pageTime.Seconds()), pageLeast), pageMost)
}

// announce plans the turns of the first n users of a page, and of those with the turn of the last of them.
func (r *run) announce(p *plan, page *page, n int) {
	users := page.users
	n = min(n, len(users))
	for n > 0 && n < len(users) && users[n].turn == users[n-1].turn {
		n++
	}
	p.chunk, p.page = n, page
	last := page.last // of the turns that are over
	if n < len(users) {
		last = users[n-1].turn
	}
	next := &p.record
	if last == ids.LastTurn {
		next.announce(n, last, true)
	} else {
		next.announce(n, last+1, false)
	}
	next.expect(len(users)-n, page.found, page.first, page.last)
	now := time.Now()
	r.launched = append(r.launched, sample{now, next.targets()})
	r.launched = slices.DeleteFunc(r.launched, func(s sample) bool { return now.Sub(s.at) > speedTime })
	if first := r.launched[0]; now.Sub(first.at) > tick/2 {
		next.Speed = float64(next.targets()-first.turns) / now.Sub(first.at).Seconds()
	}
}

// done follows what was written.
func (r *run) done(ctx context.Context, p *plan, written stored) {
	r.follow(written)
	r.svc.metrics.count(p.got.counts)
	if p.page == nil {
		return
	}
	chunk := slices.Clone(p.page.users[:p.chunk])
	r.pages.take(p.chunk)
	r.tokens -= float64(p.chunk)
	r.launch(ctx, chunk)
}

// launch sends to users whose turn is over.
func (r *run) launch(ctx context.Context, users []user) {
	if len(users) == 0 {
		return
	}
	if r.payload == nil {
		c := proto.CloneOf(r.spec.GetContent())
		if c.GetTimestamp() == 0 {
			c.Timestamp = r.base.Began.Unix()
		}
		b, err := c.MarshalVT()
		if err != nil { // it was read from bytes
			b = []byte{}
		}
		r.payload = b
	}
	r.mu.Lock()
	r.left += int64(len(users))
	r.mu.Unlock()
	r.svc.metrics.open.Add(int64(len(users)))
	rooms := r.spec.GetRoomIds()
	if r.rooms != nil {
		rooms = nil
	}
	byRoom := make([][]string, max(len(rooms), 1))
	for _, u := range users {
		at := min(u.room, len(byRoom)-1)
		byRoom[at] = append(byRoom[at], u.id)
	}
	for i, all := range byRoom {
		room := ""
		if len(rooms) > 0 {
			room = r.scope + rooms[i]
		}
		for list := range slices.Chunk(all, min(pushUsers, r.svc.cfg.Engine.Limits().Users)) {
			r.pushes.Go(func() { r.push(ctx, room, list) })
		}
	}
}

// push sends to users of one room, of the several rooms of a filter, or of none, and notes what has become of them. A push of which nothing was sent is tried
// again for as long as the job runs.
func (r *run) push(ctx context.Context, room string, users []string) {
	n := int64(len(users))
	o := outcomes{counts: counts{Unknown: n}, failures: []failure{{Reason: "unknown: " + errPanic.Error(), Users: n}}}
	defer func() {
		r.svc.metrics.open.Add(-n)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.left -= n
		r.got.add(o)
	}()
	defer r.recovered("push", func() {})
	fails := func(why error) {
		o = outcomes{counts: counts{Failed: n}, failures: []failure{{Reason: "failed: " + why.Error(), Users: n}}}
	}
	e := r.svc.cfg.Engine
	for wait := againFirst; ; wait = min(2*wait, againLast) {
		if !time.Now().Before(r.deadline) { // etcd may have been away for long between the plan and its write
			fails(errLate)
			return
		}
		p := &engine.Push{Request: engine.Request{
			Kind: engine.ToUsers, Users: users, Scope: r.scope, Payload: r.payload, Content: r.content, Priority: r.priority, Options: r.options,
		}}
		switch {
		case room != "":
			p.Kind, p.Room, p.Users, p.Only = engine.ToRoom, room, nil, users
		case r.rooms != nil:
			p.Kind, p.Rooms, p.Users, p.Only = engine.ToRooms, r.rooms, nil, users
		}
		var res engine.Result
		err := e.Admit(p.Priority)
		if err == nil {
			res, err = e.Do(ctx, p)
		}
		if err == nil {
			o = r.outcomesOf(&res, n)
			return
		}
		if _, invalid := errors.AsType[*engine.InvalidError](err); invalid || errors.Is(err, engine.ErrInternal) {
			fails(err)
			return
		}
		// Nothing was sent. The job may be paused or left by the time that it would be tried again.
		r.stalls(err.Error())
		for state := paused; state == paused && time.Now().Before(r.deadline); {
			if !pause.For(ctx, pause.Jitter(wait)) {
				fails(err)
				return
			}
			if state = r.currentState(); state != running && state != paused {
				fails(err)
				return
			}
		}
	}
}

// outcomesOf is what became of the n users of a push.
func (r *run) outcomesOf(res *engine.Result, n int64) outcomes {
	o := outcomes{counts: counts{Delivered: int64(res.Delivered), Offline: int64(res.Offline), Failed: int64(res.Failed), Unknown: int64(res.Unknown)}}
	switch rest := n - o.counts.total(); {
	case rest > 0: // who is no member of the room any more
		o.counts.Offline += rest
	case rest < 0: // it cannot be
		o.counts = counts{Unknown: n}
	}
	for _, f := range res.NodeFailures {
		reason := f.Reason
		if r.scope != "" {
			reason = strings.ReplaceAll(reason, r.scope, "")
		}
		o.failures = addFailures(o.failures, []failure{{f.Node, reason, int64(f.Users)}})
	}
	return o
}

func (r *run) setState(state string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state = state
}

func (r *run) giveUp() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaves = true
}

// currentState is that of the job for pushes of which nothing was sent, "" once it leaves this instance.
func (r *run) currentState() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leaves {
		return ""
	}
	return r.state
}

// stalls notes what holds the job up.
func (r *run) stalls(why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hold, r.held = plain.Line(why, textMax), time.Now() // it may be a node's own words, and stands in etcd
}

// heldUp is what holds the job up now, "" for nothing.
func (r *run) heldUp(now time.Time) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hold == "" || now.Sub(r.held) > stallTime {
		return ""
	}
	return heldPrefix + r.hold
}

// noted adds a failure without users. passedBy tells that its node is passed by.
func (r *run) noted(f failure, passedBy bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got.failures = addFailures(r.got.failures, []failure{f})
	if passedBy {
		r.passedBy = append(r.passedBy, f.Node)
	}
}

// recovered keeps a fault of ours from ending the process, and calls then.
func (r *run) recovered(where string, then func()) {
	if v := recover(); v != nil {
		r.svc.metrics.panics.Inc()
		r.svc.cfg.Logger.Error("panic in a job", "where", where, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
		then()
	}
}
