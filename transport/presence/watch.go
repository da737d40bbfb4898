package presence

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// partMost is how many entries, or changes, one message has.
	partMost = 1000
	// firstTime is how long a watch waits for the first word about a room or user that nobody has watched.
	firstTime = 5 * time.Second
	// mayEvery is how often a watch that has nothing to send asks whether its caller may still watch.
	mayEvery = time.Second
	// maxPosition bounds a position: 26 letters of the subject, and a number.
	maxPosition = 64
)

// Watcher is who watches, and what.
type Watcher struct {
	Scope      string
	Room, User string // one of them, as the caller knows it
	Position   string
	// Sees tells which rooms of a user the caller may be shown, by its own name for them.
	Sees func(room string) bool
	// May fails once the caller may not watch any more.
	May func() error
	// Send sends a message. Its error ends the watch.
	Send func(*pubsub.WatchPresenceResponse) error
}

// place is how far a watcher has got: n changes of the subject. With a reason it needs a snapshot first.
type place struct {
	n      uint64
	reason pubsub.SnapshotReason
}

// Watch sends what is true of a room or user, and what changes, until ctx or the Service ends, or with an error.
func (s *Service) Watch(ctx context.Context, w *Watcher) error {
	of := target{id: w.Scope + w.User}
	if w.Room != "" {
		of = target{room: true, id: w.Scope + w.Room}
	}
	name, number, found := strings.Cut(w.Position, ".")
	n, err := strconv.ParseUint(number, 10, 64)
	if w.Position != "" && (!found || err != nil || len(w.Position) > maxPosition) {
		return ErrPosition
	}
	sub, err := s.follow(w.Scope, of)
	if err != nil {
		return err
	}
	defer s.unfollow(sub)
	at := place{n: n}
	switch {
	case w.Position == "":
		at.reason = pubsub.SnapshotReason_SNAPSHOT_INITIAL
	case name != sub.name || !sub.has(n):
		at.reason = pubsub.SnapshotReason_SNAPSHOT_POSITION_GONE
	}
	first := time.NewTimer(firstTime)
	defer first.Stop()
	may := time.NewTicker(mayEvery)
	defer may.Stop()
	for {
		if err := w.May(); err != nil {
			return err
		}
		all, some, next, moved := sub.read(at)
		switch {
		case all != nil:
			reason := at.reason
			if reason == 0 {
				reason = pubsub.SnapshotReason_SNAPSHOT_FELL_BEHIND
			}
			if err := s.snapshot(ctx, w, sub, all, reason, next); err != nil {
				return err
			}
			at = place{n: next}
			continue
		case len(some) > 0:
			if err := w.changes(sub, some, next); err != nil {
				return err
			}
			at.n = next
			continue
		}
		select {
		case <-moved:
		case <-may.C:
		case <-first.C:
			if err := sub.unseen(); err != nil {
				return err
			}
		case <-s.ended:
			return engine.ErrDraining
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller knows why
		}
	}
}

// has tells whether what follows n changes is kept.
func (sub *subject) has(n uint64) bool {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	return n >= sub.first && n <= sub.first+uint64(len(sub.changes))
}

// read is what comes next at a place, and the place behind that: a snapshot, or changes. There may be neither, until moved is closed.
func (sub *subject) read(at place) (all state, some []*pubsub.PresenceChange, next uint64, moved <-chan struct{}) {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	last := sub.first + uint64(len(sub.changes))
	switch {
	case sub.state == nil:
		return nil, nil, at.n, sub.moved
	case at.reason != 0 || at.n < sub.first:
		return sub.state, nil, last, nil
	default: // what is read is not changed any more
		some = sub.changes[at.n-sub.first:]
		some = some[:min(len(some), partMost):min(len(some), partMost)]
		return nil, some, at.n + uint64(len(some)), sub.moved
	}
}

// unseen is why a subject has not been seen yet, nil once it has.
func (sub *subject) unseen() error {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	switch {
	case sub.state != nil:
		return nil
	case sub.err == nil:
		return fmt.Errorf("%w: it has not answered yet", engine.ErrUnavailable)
	default:
		return fmt.Errorf("%w: %v", engine.ErrUnavailable, sub.err) //nolint:errorlint // it may be a status of the Controller's, which is not the caller's
	}
}

func (sub *subject) position(n uint64) string { return sub.name + "." + strconv.FormatUint(n, 10) }

// snapshot sends all that is known.
func (s *Service) snapshot(ctx context.Context, w *Watcher, sub *subject, all state, reason pubsub.SnapshotReason, n uint64) error {
	s.m.snapshots[reason].Inc()
	part := &pubsub.PresenceSnapshot{Reason: reason, First: true}
	send := func(position string) error {
		part.Last = position != ""
		err := w.Send(&pubsub.WatchPresenceResponse{Position: position, What: &pubsub.WatchPresenceResponse_Snapshot{Snapshot: part}})
		part = &pubsub.PresenceSnapshot{Reason: reason}
		return err
	}
	var failed error
	all.entries(sub.target, func(e *pubsub.PresenceEntry) bool {
		if e = w.shown(e); e == nil {
			return true
		}
		if len(part.GetEntries()) == partMost {
			if failed = ctx.Err(); failed == nil {
				failed = w.May()
			}
			if failed == nil {
				failed = send("")
			}
			if failed != nil {
				return false
			}
		}
		part.Entries = append(part.Entries, e)
		return true
	})
	if failed != nil {
		return failed
	}
	return send(sub.position(n))
}

// changes sends some changes. Those that the caller is not shown are left out; what is left may be none.
func (w *Watcher) changes(sub *subject, some []*pubsub.PresenceChange, n uint64) error {
	out := &pubsub.PresenceChanges{}
	for _, c := range some {
		if e := w.shown(c.GetEntry()); e != nil {
			out.Changes = append(out.Changes, &pubsub.PresenceChange{Kind: c.GetKind(), Entry: e})
		}
	}
	if len(out.GetChanges()) == 0 {
		return nil
	}
	return w.Send(&pubsub.WatchPresenceResponse{Position: sub.position(n), What: &pubsub.WatchPresenceResponse_Changes{Changes: out}})
}

// shown is an entry as the caller is shown it, nil for one that it is not.
func (w *Watcher) shown(e *pubsub.PresenceEntry) *pubsub.PresenceEntry {
	user, own := strings.CutPrefix(e.GetUserId(), w.Scope)
	if !own {
		return nil
	}
	room := w.Room
	if w.Room == "" && e.GetRoomId() != "" { // a room of a user
		if room = shownRoom(e.GetRoomId(), w.Scope); room == "" || !w.Sees(room) {
			return nil
		}
	}
	return &pubsub.PresenceEntry{UserId: user, RoomId: room, NodeIds: e.GetNodeIds()}
}
