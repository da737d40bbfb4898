package node

import (
	"hash/maphash"
	"slices"
	"sync"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// The times of replay.
const (
	// replayPatience is how long a gate stays closed without an answer: a live push is not held longer
	// because a store is slow.
	replayPatience = 2 * time.Second
	// After a replay that has failed the node asks again in firstRetry, then twice as long each.
	firstRetry, lastRetry = time.Second, 30 * time.Second
	// replayTick is how often gates that wait for something are looked at.
	replayTick = 200 * time.Millisecond
	// A manager whose stream is back may have stored for users whom it could not reach here:
	// resyncDelay later (several streams come back together) all users are asked for again,
	// resyncUsers in each tick, 1,000 a second.
	resyncDelay = time.Second
	resyncUsers = 200
	// replayMost bounds the messages of one replay that a client has not taken: more than an Inbox lets be.
	replayMost = 4 * UnackedFrames
)

// replays are the gates of a node and what is asked for them. A user's connections have a gate and ask
// each for itself: what one has acknowledged is gone for the others, and nothing else is.
//
// The lock is taken within those of connections, and within it that of a stream's acks.
type replays struct {
	// Static.
	server *Server
	seed   maphash.Seed
	wake   chan struct{} // 1: there is something for the loop
	stop   chan struct{} // closed by Close

	mu sync.Mutex
	// Guarded by mu.
	gates    map[string][]*Gate // of each user
	total    int
	asks     map[uint64]*ask // by gate number, which is not used twice
	numbers  uint64
	streams  offers
	waiting  map[*Gate]struct{} // for an answer or a time
	opened   []*Gate            // to be told so
	looping  bool
	closed   bool
	resyncAt time.Time // zero: not due
	resync   []string  // users yet to be asked for again
}

// gateState is what replays know of a gate.
type gateState struct {
	isReady  bool // the Controller knows of the connection
	gone     bool
	closedAt time.Time // or the last sign of life of the replay that it is closed for
	repeats  bool      // that has ended: it is closed for what was stored meanwhile, and signs of life do not count
	ask      *ask      // nil: nothing is asked
	again    bool      // nudged since
	failures int       // in a row
	retryAt  time.Time // when to ask again; zero: need not
}

// ask is one Catchup.
type ask struct {
	// Static.
	replays *replays
	gate    *Gate
	number  uint64

	// Guarded by replays.mu.
	on    *stream      // where it was asked; nil: that stream has ended, or the connection
	since time.Time    // of the last sign of life
	last  uint64       // place that was handed over
	hole  bool         // one was not
	out   []handedOver // not yet reported as taken
}

type handedOver struct {
	seq  uint64
	done bool
}

func newReplays(s *Server) *replays {
	return &replays{
		server: s, seed: maphash.MakeSeed(), wake: make(chan struct{}, 1), stop: make(chan struct{}),
		gates: make(map[string][]*Gate), asks: make(map[uint64]*ask), waiting: make(map[*Gate]struct{}),
	}
}

// close ends the loop. It may be called again.
func (r *replays) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.closed = true
		close(r.stop)
	}
}

// gate makes a gate.
func (r *replays) gate(user string, conn Gated, window int, now time.Time) *Gate {
	open := &Gate{user: user, conn: conn}
	if !r.server.does.replay {
		return open
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.total >= r.server.cfg.MaxGates {
		r.server.count.gatesRefused.Inc()
		return open
	}
	if !r.looping {
		if !r.server.goUntilClose(r.run) {
			return open
		}
		r.looping = true
	}
	g := &Gate{replays: r, user: user, conn: conn, window: clampUint32(window)}
	r.gates[user] = append(r.gates[user], g)
	r.total++
	if len(r.streams) > 0 {
		r.closeLocked(g, now)
	}
	return g
}

// closeLocked closes g. One that is closed stays so for no longer than it would have.
func (r *replays) closeLocked(g *Gate, now time.Time) {
	if !g.closed.Swap(true) {
		g.closedAt, g.repeats = now, false
	}
	r.waitLocked(g)
}

// lives notes a sign of life of a replay.
func (a *ask) lives(now time.Time) {
	a.since = now
	if g := a.gate; !g.repeats {
		g.closedAt = now
	}
}

func (r *replays) openLocked(g *Gate) {
	if g.closed.Swap(false) {
		r.opened = append(r.opened, g)
		r.signal()
	}
}

// waitLocked has the loop look at g.
func (r *replays) waitLocked(g *Gate) {
	r.waiting[g] = struct{}{}
	if len(r.waiting) == 1 {
		r.signal()
	}
}

func (r *replays) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *replays) ready(g *Gate, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if g.gone || g.isReady {
		return
	}
	g.isReady = true
	r.askLocked(g, now, len(r.streams) > 0)
	g.closedAt = now // The Controller was waited for until now.
}

func (r *replays) leave(g *Gate) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if g.gone {
		return
	}
	g.gone = true
	g.closed.Store(false)
	r.total--
	rest := slices.DeleteFunc(r.gates[g.user], func(other *Gate) bool { return other == g })
	if len(rest) == 0 {
		delete(r.gates, g.user)
	} else {
		r.gates[g.user] = rest
	}
	delete(r.waiting, g)
	r.dropLocked(g)
}

// dropLocked forgets what is asked for g.
func (r *replays) dropLocked(g *Gate) {
	if g.ask != nil {
		delete(r.asks, g.ask.number)
		g.ask.on = nil
		g.ask = nil
	}
}

// askLocked asks for what is stored for g's user, if there is whom to ask. closed: direct messages are to
// wait for the answer.
func (r *replays) askLocked(g *Gate, now time.Time, closed bool) {
	r.dropLocked(g)
	g.again, g.retryAt = false, time.Time{}
	st := r.pickLocked(g)
	if st == nil {
		r.openLocked(g) // All are asked for when a manager comes.
		return
	}
	r.numbers++
	a := &ask{replays: r, gate: g, number: r.numbers, on: st, since: now}
	g.ask, r.asks[a.number] = a, a
	if closed {
		r.closeLocked(g, now)
	}
	r.waitLocked(g)
	r.server.count.catchups.Inc()
	st.acks.askCatchup(&pubsub.Catchup{UserId: g.user, Gate: a.number, Window: g.window})
}

// pickLocked is the stream on which to ask: always of the same manager for a user, as long as the managers
// are the same and answer.
func (r *replays) pickLocked(g *Gate) *stream {
	return r.streams.pick(maphash.String(r.seed, g.user) + uint64(g.failures))
}

// join makes st known as one that replays.
func (r *replays) join(st *stream, hello *pubsub.Hello, now time.Time) {
	if !r.server.does.replay || !slices.Contains(hello.GetFeatures(), pubsub.Feature_FEATURE_REPLAY) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.numbers++
	r.streams.add(st, hello, r.seed, r.numbers)
	if r.total > 0 && r.resyncAt.IsZero() {
		r.resyncAt = now.Add(resyncDelay)
		r.signal()
	}
}

// part forgets st, and asks elsewhere for what was asked on it.
func (r *replays) part(st *stream, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.streams.remove(st) {
		return
	}
	for _, a := range r.asks {
		if a.on != st {
			continue
		}
		g, since := a.gate, a.since
		r.askLocked(g, now, g.closed.Load())
		if g.ask != nil {
			g.ask.since = since // It is one wait.
		}
	}
}

// end takes a ReplayEnd that has come on st.
func (r *replays) end(st *stream, number uint64, failure string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.asks[number]
	if a == nil || a.on != st {
		return // of a connection that is gone, or asked for again elsewhere
	}
	g := a.gate
	on := a.on
	switch {
	case failure != "":
		r.failLocked(g, now)
	case g.again:
		r.closeLocked(g, now)
		if !g.repeats { // All that follow have one patience: what waits may be why more is stored.
			g.repeats, g.closedAt = true, now
		}
		r.askLocked(g, now, false)
	default:
		r.dropLocked(g)
		g.failures = 0
		delete(r.waiting, g)
		r.openLocked(g)
	}
	a.on = on // What is not acknowledged yet is still reported.
}

// failLocked opens the gate, and asks again later.
func (r *replays) failLocked(g *Gate, now time.Time) {
	r.dropLocked(g)
	r.server.count.replaysFailed.Inc()
	g.retryAt = now.Add(g.backoff())
	g.failures++
	r.waitLocked(g)
	r.openLocked(g)
}

func (g *gateState) backoff() time.Duration {
	return min(firstRetry<<min(g.failures, 5), lastRetry)
}

// nudge closes the user's gates and has the store read again.
func (r *replays) nudge(user string, now time.Time) {
	r.server.count.nudges.Inc()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.gates[user] {
		switch {
		case !g.isReady: // It asks later anyway.
			r.closeLocked(g, now)
		case g.ask != nil && g.closed.Load():
			g.again = true
		default:
			r.askLocked(g, now, true)
		}
	}
}

// route finds the connection for a message out of the store, and notes it as handed over.
func (r *replays) route(number, seq, after uint64, user string, now time.Time) (a *ask, behind bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a = r.asks[number]
	if a == nil || a.gate.user != user {
		return nil, false
	}
	if after != 0 && after != a.last || after == 0 && a.last != 0 && a.hole || len(a.out) >= replayMost {
		a.hole = true
		return nil, true
	}
	a.lives(now)
	a.out = append(a.out, handedOver{seq: seq})
	return a, false
}

// handed tells what became of the message that was routed last.
func (r *replays) handed(a *ask, seq uint64, out Outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch out {
	case Delivered, Pending, Duplicate, Reused, Expired:
		a.last, a.hole = seq, false
		r.server.count.replayed.Inc()
	default:
		a.hole = true
		a.out = slices.DeleteFunc(a.out, func(h handedOver) bool { return h.seq == seq && !h.done })
	}
}

// taken is called by the connection, for what its client has.
func (a *ask) taken(seq uint64) {
	r := a.replays
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range a.out {
		if a.out[i].seq == seq {
			a.out[i].done = true
		}
	}
	n := 0
	for n < len(a.out) && a.out[n].done {
		n++
	}
	if n == 0 {
		return
	}
	upTo := a.out[n-1].seq
	a.out = slices.Delete(a.out, 0, n)
	a.lives(now)
	if a.on != nil {
		a.on.acks.replayTaken(a.number, upTo)
	}
}

// lost is called by the connection when its client has not acknowledged in time: the replay is over, and
// what was not taken is asked for again.
func (a *ask) lost() {
	r := a.replays
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.gate.ask == a {
		r.failLocked(a.gate, now)
	}
}

// run is the loop: it opens gates and asks again in time.
func (r *replays) run() {
	ticker := time.NewTicker(replayTick)
	defer ticker.Stop()
	for {
		r.mu.Lock()
		idle := len(r.waiting) == 0 && r.resyncAt.IsZero() && len(r.resync) == 0
		r.mu.Unlock()
		tick := ticker.C
		if idle {
			tick = nil
		}
		select {
		case <-r.stop:
			return
		case <-r.wake:
		case <-tick:
			r.look(time.Now())
		}
		r.tell()
	}
}

// look does what is due.
func (r *replays) look(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for g := range r.waiting {
		r.lookAtLocked(g, now)
	}
	if !r.resyncAt.IsZero() && !now.Before(r.resyncAt) {
		r.resyncAt, r.resync = time.Time{}, r.resync[:0]
		for user := range r.gates {
			r.resync = append(r.resync, user)
		}
	}
	n := min(len(r.resync), resyncUsers)
	for _, user := range r.resync[:n] {
		for _, g := range r.gates[user] {
			if g.isReady {
				if g.ask == nil {
					r.askLocked(g, now, false)
				}
				break
			}
		}
	}
	if r.resync = r.resync[n:]; len(r.resync) == 0 {
		r.resync = nil
	}
}

func (r *replays) lookAtLocked(g *Gate, now time.Time) {
	a := g.ask
	switch {
	case a != nil:
		patience := replayPatience
		if len(a.out) > 0 { // It is the client that is waited for, and the connection that knows for how long.
			patience += replayAckTimeout
		}
		if g.closed.Load() && now.Sub(g.closedAt) >= patience {
			r.server.count.opensLate.Inc()
			r.openLocked(g)
		}
		if now.Sub(a.since) >= patience+g.backoff() {
			g.failures++
			r.server.count.replaysFailed.Inc()
			r.askLocked(g, now, false)
		}
	case !g.retryAt.IsZero():
		if !now.Before(g.retryAt) {
			r.askLocked(g, now, false)
		}
	case g.closed.Load() && now.Sub(g.closedAt) < replayPatience:
		return
	case g.closed.Load():
		r.server.count.opensLate.Inc()
		r.openLocked(g)
		fallthrough
	default:
		delete(r.waiting, g)
	}
}

// tell tells connections that their gates have opened.
func (r *replays) tell() {
	r.mu.Lock()
	opened := r.opened
	r.opened = nil
	r.mu.Unlock()
	for _, g := range opened {
		r.tellOne(g)
	}
}

func (r *replays) tellOne(g *Gate) {
	defer func() {
		if v := recover(); v != nil {
			r.server.panicked("Opened", v)
		}
	}()
	g.conn.Opened()
}

// sizes are for the gauges.
func (r *replays) sizes() (gates, closed, asked int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for g := range r.waiting {
		if g.closed.Load() {
			closed++
		}
	}
	return r.total, closed, len(r.asks)
}
