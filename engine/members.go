package engine

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"time"
)

// Members are the users in a room, sorted, each once: as a push to the room would find them. found tells whether the room
// exists. It waits for a look-up until ctx ends.
func (e *Engine) Members(ctx context.Context, room string) (users []string, found bool, err error) {
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
		return nil, false, err
	}
	s := snaps[room]
	if s == nil {
		return nil, false, fmt.Errorf("look up the room: %w", x.Err)
	}
	users = slices.Clone(s.Unplaced)
	for _, g := range s.Groups {
		users = append(users, g.Users...)
	}
	slices.Sort(users)
	return slices.Compact(users), s.Found, nil
}

// Nodes is how many nodes there are.
func (e *Engine) Nodes() int { return len(e.network.Links(0)) }
