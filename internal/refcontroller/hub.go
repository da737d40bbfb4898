package refcontroller

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	pubsub "github.com/push-manager/push-manager/proto"
)

// frameNames is how many names, or deltas, one message of the change stream has at most:
// 1 MiB at the limit of ids, of which a delta has three.
const frameNames = 1000

// ackWithin is how long a report waits for a follower before the follower's lease is
// not renewed any more.
const ackWithin = time.Second

const (
	// relapse is how soon a follower is late again that is late often: a pause of its process
	// now and then is none of its faults.
	relapse = time.Minute
	// muteLeases is for how many of its leases nobody waits for such a one. With 2 it slows
	// reports for a third of the time at most, and Push-Manager's lease of 3 s is renewed
	// before it takes the stream for dead (15 s).
	muteLeases = 2
)

// hub passes changes on to the watchers, and knows which followers may still trust
// answers from before a change.
type hub struct {
	// Static.
	most      int // names that may be pending for one watcher
	overflows *metrics.Counter
	changes   *metrics.Counter
	lapses    *metrics.Counter // leases that ran out while a report waited
	// Every change that was visible before this has been told. nil: before now.
	told func() time.Time

	mu       sync.RWMutex
	watchers map[*watcher]struct{}
}

// watcher is one change stream. Names that change again before they are sent are
// sent once.
type watcher struct {
	// Holds a token while something is to be sent. Never closed.
	wake chan struct{}
	// Static. How long a follower trusts its answers after a mark; 0: it is none, and
	// nobody waits for it.
	lease  time.Duration
	deltas bool // it takes deltas in place of names

	mu           sync.Mutex
	rooms, users map[string]struct{}
	moves        map[place]moved // the last one of each place is enough
	all          bool            // too much for names

	// Of followers. Changes are numbered as they are told: sent is the number of the
	// last one that went out, and the seq of its message.
	noted, sent, acked uint64
	mark               uint64    // to be sent back, 0 for none
	marked             time.Time // when it came
	heard              uint64    // the last mark that came
	trusted            time.Time // the follower trusts nothing after this
	waits              []wait    // in the order of noted
	// The follower's lease ran out while it owed this: nothing is sent back before it
	// is acknowledged.
	owed  uint64
	late  time.Time // when it was late last, see judgeLocked
	muted time.Time // nothing is sent back before this
}

// place is where a Move is about.
type place struct{ room, user, node string }

// moved is the last Move of a place.
type moved struct {
	left     bool
	revision uint64
}

// wait is a report that waits for a follower.
type wait struct {
	noted uint64
	since time.Time
	by    *settling
}

// settling is a report that is answered once everybody knows of it.
type settling struct {
	left atomic.Int64 // followers, and one while they are counted
	done chan struct{}
}

func (s *settling) less() {
	if s.left.Add(-1) == 0 {
		close(s.done)
	}
}

// join adds a watcher: every change told from now on reaches it. A follower trusts
// what it looks up from now on for its lease.
func (h *hub) join(lease time.Duration, deltas bool) *watcher {
	w := &watcher{wake: make(chan struct{}, 1), lease: lease, deltas: deltas, trusted: time.Now().Add(lease)}
	w.emptyLocked()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchers[w] = struct{}{}
	return w
}

// leave ends a watcher. Whose stream has ended trusts nothing.
func (h *hub) leave(w *watcher) {
	h.mu.Lock()
	delete(h.watchers, w)
	h.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.releaseLocked(w.noted)
}

// toldUntil is the time before which all that was visible has been told.
func (h *hub) toldUntil(now time.Time) time.Time {
	if h.told == nil {
		return now
	}
	return h.told()
}

func (h *hub) len() int {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return len(h.watchers)
}

// settle returns once every follower has acknowledged what was told so far, or
// trusts nothing from before it any more.
func (h *hub) settle(ctx context.Context) error {
	s := &settling{done: make(chan struct{})}
	s.left.Store(1)
	var waited []*watcher
	var first time.Time
	now := time.Now()
	h.mu.RLock()
	for w := range h.watchers {
		if until, ok := w.await(s, now); ok {
			waited = append(waited, w)
			first = earlier(first, until)
		}
	}
	h.mu.RUnlock()
	s.less()
	if len(waited) == 0 {
		return nil
	}
	timer := time.NewTimer(time.Until(first))
	defer timer.Stop()
	for {
		select {
		case <-s.done:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("wait for those who watch: %w", ctx.Err())
		case now := <-timer.C:
			first = now.Add(ackWithin)
			for _, w := range waited {
				if until, lapsed := w.lapse(now); lapsed {
					h.lapses.Inc()
				} else if until.After(now) {
					first = earlier(first, until)
				}
			}
			timer.Reset(time.Until(first))
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// await makes s wait for the follower, if there is need. until is when its trust ends.
func (w *watcher) await(s *settling, now time.Time) (until time.Time, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lease == 0 || w.acked == w.noted || !now.Before(w.trusted) {
		return until, false
	}
	s.left.Add(1)
	w.waits = append(w.waits, wait{noted: w.noted, since: now, by: s})
	return w.trusted, true
}

// lapse lets go of all who wait for a follower whose trust has ended. Otherwise it
// returns when that will be.
func (w *watcher) lapse(now time.Time) (until time.Time, lapsed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if now.Before(w.trusted) || len(w.waits) == 0 {
		return w.trusted, false
	}
	w.owed = w.waits[len(w.waits)-1].noted
	w.judgeLocked(now)
	w.releaseLocked(w.noted)
	return until, true
}

// judgeLocked is called before those who wait are let go. If one has waited for too long the
// follower is late, and if it is so again and again, its lease is not renewed for a while: then
// nobody waits for it. Reports from before it was late last belong to the same delay.
func (w *watcher) judgeLocked(now time.Time) {
	if len(w.waits) == 0 || now.Sub(w.waits[0].since) < ackWithin || w.waits[0].since.Before(w.late) {
		return
	}
	if now.Sub(w.late) < relapse {
		w.muted = now.Add(muteLeases * w.lease)
	}
	w.late = now
}

// releaseLocked lets go of those who wait for changes up to through.
func (w *watcher) releaseLocked(through uint64) {
	n := 0
	for n < len(w.waits) && w.waits[n].noted <= through {
		w.waits[n].by.less()
		n++
	}
	w.waits = slices.Delete(w.waits, 0, n)
}

// hear takes what a follower has said.
func (w *watcher) hear(in *pubsub.FollowRoutesRequest, now time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if through := in.GetThrough(); through != 0 {
		if through > w.sent || through < w.acked {
			return invalid("through", fmt.Sprintf("is %d, after %d of %d", through, w.acked, w.sent))
		}
		w.acked = through
		w.judgeLocked(now)
		w.releaseLocked(through)
	}
	if mark := in.GetMark(); mark != 0 {
		if mark <= w.heard {
			return invalid("mark", fmt.Sprintf("is %d, after %d", mark, w.heard))
		}
		w.heard, w.mark, w.marked = mark, mark, now
	}
	if w.mark != 0 {
		w.rouse() // an acknowledgement may be what it waited for
	}
	return nil
}

// rouse has the sender look again.
func (w *watcher) rouse() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// waiting counts the reports that wait, once for each follower.
func (h *hub) waiting() int {
	h.mu.RLock()
	defer h.mu.RUnlock()
	n := 0
	for w := range h.watchers {
		w.mu.Lock()
		n += len(w.waits)
		w.mu.Unlock()
	}
	return n
}

// tell notes a change for all watchers. It does not block.
func (h *hub) tell(c Change) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if !c.All && len(c.Moves)+len(c.Rooms)+len(c.Users) == 0 {
		for w := range h.watchers {
			w.recheck()
		}
		return
	}
	h.changes.Inc()
	for w := range h.watchers {
		if w.note(c, h.most) {
			h.overflows.Inc()
		}
	}
}

// note adds a change to what is pending, and tells whether that was too much.
func (w *watcher) note(c Change, most int) (overflow bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noted++
	if c.All {
		w.emptyLocked()
		w.all = true
	}
	if !w.all {
		for _, m := range c.Moves {
			if w.deltas {
				w.moves[place{m.Room, m.User, m.Node}] = moved{m.Left, c.Revision}
				continue
			}
			w.rooms[m.Room] = struct{}{}
			w.users[m.User] = struct{}{}
		}
		for _, room := range c.Rooms {
			w.rooms[room] = struct{}{}
		}
		for _, user := range c.Users {
			w.users[user] = struct{}{}
		}
		if overflow = len(w.moves)+len(w.rooms)+len(w.users) > most; overflow {
			w.emptyLocked()
			w.all = true
		}
	}
	w.rouse()
	return overflow
}

// emptyLocked leaves nothing pending.
func (w *watcher) emptyLocked() {
	w.all = false
	w.rooms, w.users, w.moves = map[string]struct{}{}, map[string]struct{}{}, map[place]moved{}
}

// recheck has the sender of a mark look again.
func (w *watcher) recheck() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mark != 0 {
		w.rouse()
	}
}

// follow empties what is pending into messages for a follower: the changes, and the
// mark behind them if it came before told: all that was visible then is among them.
func (w *watcher) follow(now, told time.Time) []*pubsub.FollowRoutesResponse {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*pubsub.FollowRoutesResponse
	for _, changes := range w.takeLocked() {
		out = append(out, &pubsub.FollowRoutesResponse{Changes: changes})
	}
	if len(out) > 0 {
		w.sent = w.noted
		out[len(out)-1].Seq = w.sent
	}
	// Renewing the lease of one that does not acknowledge would have reports wait for
	// it without an end.
	late := len(w.waits) > 0 && now.Sub(w.waits[0].since) >= ackWithin
	if w.mark == 0 || w.marked.After(told) || w.acked < w.owed || late || now.Before(w.muted) {
		return out
	}
	if len(out) == 0 {
		out = append(out, &pubsub.FollowRoutesResponse{})
	}
	out[len(out)-1].Mark = w.mark
	w.mark, w.trusted = 0, w.marked.Add(w.lease)
	return out
}

// take empties what is pending into messages.
func (w *watcher) take() []*pubsub.WatchRoutesResponse {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.takeLocked()
}

func (w *watcher) takeLocked() []*pubsub.WatchRoutesResponse {
	all, rooms, users, moves := w.all, w.rooms, w.users, w.moves
	if !all && len(rooms)+len(users)+len(moves) == 0 {
		return nil
	}
	w.emptyLocked()
	if all {
		return []*pubsub.WatchRoutesResponse{{All: true}}
	}
	var frames []*pubsub.WatchRoutesResponse
	for names := range slices.Chunk(slices.Collect(maps.Keys(rooms)), frameNames) {
		frames = append(frames, &pubsub.WatchRoutesResponse{RoomIds: names})
	}
	for names := range slices.Chunk(slices.Collect(maps.Keys(users)), frameNames) {
		if last := len(frames) - 1; last >= 0 && len(frames[last].UserIds) == 0 && len(frames[last].RoomIds)+len(names) <= frameNames {
			frames[last].UserIds = names // the usual case: one join, one message
			continue
		}
		frames = append(frames, &pubsub.WatchRoutesResponse{UserIds: names})
	}
	deltas := make([]*pubsub.MemberDelta, 0, len(moves))
	for at, m := range moves {
		deltas = append(deltas, &pubsub.MemberDelta{RoomId: at.room, UserId: at.user, NodeId: at.node, Left: m.left, Revision: m.revision})
	}
	for some := range slices.Chunk(deltas, frameNames) {
		frames = append(frames, &pubsub.WatchRoutesResponse{Deltas: some})
	}
	return frames
}
