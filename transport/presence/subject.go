package presence

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/controller"
)

const (
	// gather is for how long changes gather before one look is made at all of them, and gatherMember how much longer for
	// each member: a look at a large room costs its size.
	gather       = 20 * time.Millisecond
	gatherMember = 250 * time.Nanosecond
	// lookTime bounds one look.
	lookTime = 5 * time.Second
	// How often is looked though nothing was named: while a change stream vouches for that, and while none does, with so
	// much more for each member of a room.
	lookWatched   = 10 * time.Second
	lookUnwatched = time.Second
	lookMember    = 10 * time.Microsecond
	// A look that failed is made again after the first of these, twice that, up to the second.
	retryFirst = 100 * time.Millisecond
	retryLast  = 2 * time.Second
	// doubtFor is how long after a new connection to the Controller it is not believed that a user is somewhere no more, as
	// with rooms (engine/route).
	doubtFor = 5 * time.Second
	// ringMost is how many changes of one subject are kept, and changesMost of all subjects together.
	ringMost    = 8192
	changesMost = 1 << 20
)

// target is a room or a user, with the tenant before it.
type target struct {
	room bool
	id   string
}

// watched are the rooms and users that are followed.
type watched struct {
	count atomic.Int64 // of subjects: most of the time there is none, and nothing to be told

	mu sync.RWMutex
	// Guarded by mu.
	closed   bool
	subjects map[target]*subject
}

// subject is a room or a user that is followed, for all who watch it.
type subject struct {
	// Static.
	target target
	scope  string        // of the tenant who has it followed
	name   string        // begins its positions, and those of no other
	named  chan struct{} // holds a token when it is to be looked at

	// Guarded by watched.mu.
	watchers int
	idle     time.Time // since then it has none

	mu sync.Mutex
	// Guarded by mu.
	state   state // nil: it has not been seen yet
	err     error // of the last look, while it has not
	first   uint64
	changes []*pubsub.PresenceChange // the last ones; first is the number of changes[0]
	moved   chan struct{}            // closed and made anew when any of these changes
}

// follow finds the subject of a target of a scope, or begins to follow it. It is watched until unfollow.
func (s *Service) follow(scope string, of target) (*subject, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, engine.ErrDraining
	}
	sub := s.subjects[of]
	if sub == nil {
		if !s.roomLocked(scope) {
			return nil, ErrFull
		}
		sub = &subject{target: of, scope: scope, name: rand.Text(), named: make(chan struct{}, 1), moved: make(chan struct{})}
		s.subjects[of] = sub
		s.count.Add(1)
		s.begin(sub)
	}
	sub.watchers++
	return sub, nil
}

func (s *Service) unfollow(sub *subject) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sub.watchers--; sub.watchers == 0 {
		sub.idle = time.Now()
	}
}

// roomLocked makes room for one more subject of a scope, and tells whether there is room. Subjects that nobody watches any more end
// before their time where it is needed: the one that nobody has watched for the longest time first.
func (s *Service) roomLocked(scope string) bool {
	for {
		members, inUse, own := 0, 0, 0
		var idle, idleOwn *subject
		for _, sub := range s.subjects {
			members += sub.size()
			older := func(other *subject) bool { return sub.watchers == 0 && (other == nil || sub.idle.Before(other.idle)) }
			if older(idle) {
				idle = sub
			}
			if sub.watchers > 0 {
				inUse++
			}
			if sub.scope == scope {
				own++
				if older(idleOwn) {
					idleOwn = sub
				}
			}
		}
		switch {
		case scope != "" && own >= ids.TenantShare(s.cfg.Watched, inUse):
			idle = idleOwn
		case len(s.subjects) < s.cfg.Watched && members <= s.cfg.WatchedMembers:
			return true
		}
		if idle == nil {
			return false
		}
		delete(s.subjects, idle.target)
		s.count.Add(-1)
		idle.look() // its loop finds that it is over
	}
}

func (sub *subject) size() int {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	if sub.state == nil {
		return 0
	}
	return sub.state.size()
}

// over ends a subject that nobody has watched for the time, and tells so.
func (s *Service) over(sub *subject) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.subjects[sub.target] != sub { // another one needed the place
		return true
	}
	if sub.watchers > 0 || time.Since(sub.idle) < s.cfg.Linger {
		return false
	}
	delete(s.subjects, sub.target)
	s.count.Add(-1)
	return true
}

// followLoop looks at a subject whenever it is named, and now and then.
func (s *Service) followLoop(ctx context.Context, sub *subject) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	retry := retryFirst
	for {
		wait := lookWatched
		size, err := sub.size(), s.look(ctx, sub)
		switch {
		case err != nil:
			wait, retry = retry, min(2*retry, retryLast)
		case !s.cfg.Controller.Watched():
			wait, retry = lookUnwatched+time.Duration(size)*lookMember, retryFirst
		default:
			retry = retryFirst
		}
		timer.Reset(min(wait, s.cfg.Linger))
		select {
		case <-timer.C:
		case <-sub.named:
			timer.Reset(gather + time.Duration(size)*gatherMember)
			select {
			case <-timer.C:
			case <-ctx.Done():
				return
			}
		case <-ctx.Done():
			return
		}
		if s.over(sub) {
			return
		}
	}
}

var errDoubted = errors.New("the controller may not know all yet")

// look finds out what is true now.
func (s *Service) look(ctx context.Context, sub *subject) (err error) {
	defer func() {
		result := lookOK
		switch {
		case errors.Is(err, errDoubted):
			result = lookDoubted
		case err != nil:
			result = lookFailed
		}
		s.m.looks[result].Inc()
		if err != nil {
			sub.failed(err)
		}
	}()
	defer s.recovered("a look", &err)
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	leave, err := s.enter(ctx, sub.scope)
	if err != nil {
		return err
	}
	defer leave()
	if sub.target.room {
		snap, err := s.cfg.Room(ctx, sub.target.id)
		switch {
		case err != nil:
			return err
		case snap.Stale != nil || snap.Doubted:
			return errDoubted
		}
		s.take(sub, roomState{snap})
		return nil
	}
	answers, err := s.cfg.Controller.Whereabouts(ctx, []string{sub.target.id})
	if err != nil {
		return err //nolint:wrapcheck // it says what was asked
	}
	now := userState{slices.Clone(answers[0].GetNodeIds()), answers[0].GetRoomIds()}
	slices.Sort(now.nodes)
	slices.Sort(now.rooms)
	now.rooms = slices.Compact(now.rooms)
	if time.Since(s.cfg.Controller.Renewed()) < doubtFor && sub.lacks(now) {
		return errDoubted
	}
	s.take(sub, now)
	return nil
}

// lacks tells whether something of the user has ended.
func (sub *subject) lacks(now userState) bool {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	was, ok := sub.state.(userState)
	gone := func(was, now []string) bool {
		return slices.ContainsFunc(was, func(one string) bool { return !slices.Contains(now, one) })
	}
	return ok && (gone(was.nodes, now.nodes) || gone(was.rooms, now.rooms))
}

// failed notes why nothing is known yet.
func (sub *subject) failed(err error) {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	sub.err = err
}

// take makes next the state, and keeps what has changed for those who watch. Only the loop of the subject calls it.
func (s *Service) take(sub *subject, next state) {
	most := min(ringMost, changesMost/s.cfg.Watched)
	sub.mu.Lock()
	was := sub.state
	sub.mu.Unlock()
	var changes []*pubsub.PresenceChange
	fits := true
	if was != nil {
		// Without the lock: it takes long for a large room, and whoever begins to watch something asks each subject for its size.
		if changes, fits = was.to(next, sub.target, most); fits && len(changes) == 0 {
			sub.mu.Lock()
			sub.state, sub.err = next, nil
			sub.mu.Unlock()
			return
		}
	}
	sub.mu.Lock()
	defer sub.mu.Unlock()
	sub.state, sub.err = next, nil
	if was != nil {
		s.m.changes.Add(len(changes))
		sub.changes = append(sub.changes, changes...)
	}
	switch {
	case !fits: // nobody goes on behind it without a snapshot
		sub.first += uint64(len(sub.changes)) + 1
		sub.changes = nil
	case len(sub.changes) > most+most/4:
		gone := len(sub.changes) - most
		sub.changes = slices.Clone(sub.changes[gone:])
		sub.first += uint64(gone)
	}
	close(sub.moved)
	sub.moved = make(chan struct{})
}

// look has the subject looked at.
func (sub *subject) look() {
	select {
	case sub.named <- struct{}{}:
	default:
	}
}

// following passes on what the change stream says, and has those subjects looked at that it is about.
type following struct {
	controller.Changes

	s *Service
}

// Following is what a change stream tells in place of changes: changes hears of everything first.
func (s *Service) Following(changes controller.Changes) controller.Changes {
	return following{changes, s}
}

// Invalidate implements controller.Changes.
func (f following) Invalidate(rooms, users []string) {
	f.Changes.Invalidate(rooms, users)
	if f.s.count.Load() == 0 {
		return
	}
	f.s.mu.RLock()
	defer f.s.mu.RUnlock()
	for _, id := range rooms {
		f.s.nameLocked(target{true, id})
	}
	for _, id := range users {
		f.s.nameLocked(target{false, id})
	}
}

// Moved implements controller.Changes.
func (f following) Moved(moves []route.Move) {
	f.Changes.Moved(moves)
	if f.s.count.Load() == 0 {
		return
	}
	f.s.mu.RLock()
	defer f.s.mu.RUnlock()
	for i := range moves {
		f.s.nameLocked(target{true, moves[i].Room})
		f.s.nameLocked(target{false, moves[i].User})
	}
}

// InvalidateAll implements controller.Changes.
func (f following) InvalidateAll() {
	f.Changes.InvalidateAll()
	f.s.mu.RLock()
	defer f.s.mu.RUnlock()
	for _, sub := range f.s.subjects {
		sub.look()
	}
}

func (s *Service) nameLocked(of target) {
	if sub := s.subjects[of]; sub != nil {
		sub.look()
	}
}
