package engine

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// Members are the users in a room, sorted, each once: as a push to the room would find them. found tells whether the room
// exists. It waits for a look-up until ctx ends.
func (e *Engine) Members(ctx context.Context, room string) (users []string, found bool, err error) {
	s, err := e.Room(ctx, room)
	if err != nil {
		return nil, false, err
	}
	users = slices.Clone(s.Unplaced)
	for _, g := range s.Groups {
		users = append(users, g.Users...)
	}
	slices.Sort(users)
	return slices.Compact(users), s.Found, nil
}

// Room is where the members of a room are: what a push to it would go by. It waits for a look-up until ctx ends.
func (e *Engine) Room(ctx context.Context, room string) (s *route.Snapshot, err error) {
	defer func() {
		if v := recover(); v != nil {
			e.panics.Add(1)
			e.logger.Error("panic while the members of a room were asked for", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
			err = ErrInternal
		}
	}()
	x := Explanation{Known: time.Now()}
	snaps, err := e.ask(ctx, e.directory.Rooms, []string{room}, false, &x)
	if err != nil {
		return nil, err
	}
	if s = snaps[room]; s == nil {
		return nil, fmt.Errorf("look up the room: %w", x.Err)
	}
	return s, nil
}

// Nodes is how many nodes there are.
func (e *Engine) Nodes() int { return len(e.network.Links(0)) }
