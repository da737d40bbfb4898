package replay

import (
	"context"
	"time"
)

const (
	// ackTimeout is how long a client may take to acknowledge a message of a call.
	ackTimeout = 2 * time.Second
	// callWindow is how many messages of a call are on their way at a time: nobody has said what the connections hold.
	callWindow = 16
)

// Replay sends a user what is stored for them, to their connections on one node, as ordinary messages to the user. It is for gateways
// that do not ask, and for Controllers. It returns how many messages of the first page the node has taken; the rest follows. What was
// delivered is trimmed: where the client can acknowledge, that is what it has acknowledged.
//
// Without a gate, live messages may overtake, and messages come again to connections that have had them, unless the node
// de-duplicates. The error is ctx's or wraps one of ErrStore, ErrBusy, ErrClosed and ErrNotTaken.
func (s *Service) Replay(ctx context.Context, user, node string) (int, error) {
	done := make(chan answer, 1)
	r := &replay{node: node, user: user, window: callWindow, since: time.Now(), call: done}
	s.mu.Lock()
	switch {
	case s.closed:
		s.mu.Unlock()
		return 0, ErrClosed
	case len(s.calls) >= maxCalls:
		s.mu.Unlock()
		s.meters.ended[resultRefused].Inc()
		return 0, ErrBusy
	}
	s.calls[r] = struct{}{}
	s.putLocked(r, &s.fresh)
	s.mu.Unlock()
	select {
	case a := <-done:
		return a.messages, a.err
	case <-ctx.Done():
		s.leave(r)
		return 0, ctx.Err() //nolint:wrapcheck // the caller's own
	}
}

// leave ends a replay whose caller has left before the first page was with the node.
func (s *Service) leave(r *replay) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.gone.Store(true)
	r.call = nil
	if r.in != nil {
		s.forgetLocked(r)
	}
	s.meters.ended[resultGone].Inc()
}

// Forget erases what is stored for a user, and says how many messages it was. Nothing of it is sent any more. The error is ErrStore.
func (s *Service) Forget(ctx context.Context, user string) (int, error) {
	n, err := s.cfg.Store.Forget(ctx, user)
	// Pages that were read before.
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, gates := range s.gates {
		for _, r := range gates {
			if r.user == user {
				r.forgotten.Store(true)
			}
		}
	}
	for r := range s.calls {
		if r.user == user {
			r.forgotten.Store(true)
		}
	}
	return n, storeError(err)
}
