package conformance

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// arrivals is what has reached the users.
type arrivals struct {
	// Static after watch.
	within  time.Duration
	ended   chan error // of a client that should have gone on
	clients sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu.
	changed chan struct{}
	texts   map[string][]string
}

// watch connects the users. They are waited for by whoever ends ctx.
func watch(ctx context.Context, cfg *Config) *arrivals {
	// An ack is told before a client has read: that takes its own time.
	a := &arrivals{within: 5 * cfg.Within, ended: make(chan error, len(cfg.Users)), changed: make(chan struct{}), texts: make(map[string][]string)}
	if cfg.Client == nil {
		return a
	}
	for _, user := range cfg.Users {
		a.clients.Go(func() {
			err := cfg.Client(ctx, user, func(text string) { a.add(user, text) })
			if ctx.Err() == nil {
				a.ended <- fmt.Errorf("user %q ended: %w", user, err)
			}
		})
	}
	return a
}

func (a *arrivals) wait() { a.clients.Wait() }

func (a *arrivals) add(user, text string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.texts[user] = append(a.texts[user], text)
	close(a.changed)
	a.changed = make(chan struct{})
}

// until waits for a message.
func (a *arrivals) until(ctx context.Context, user, token string) error {
	timer := time.NewTimer(a.within)
	defer timer.Stop()
	for {
		a.mu.Lock()
		changed := a.changed
		a.mu.Unlock()
		if a.count(user, token) > 0 {
			return nil
		}
		select {
		case <-changed:
		case <-timer.C:
			return fmt.Errorf("a message acknowledged as delivered did not reach user %q", user)
		case <-ctx.Done():
			return fmt.Errorf("a message acknowledged as delivered did not reach user %q: %w", user, context.Cause(ctx))
		}
	}
}

// count is how often a message has reached a user.
func (a *arrivals) count(user, token string) int { return len(a.places(user, token)) }

// places are the numbers of the texts that held a message.
func (a *arrivals) places(user, token string) []int {
	a.mu.Lock()
	defer a.mu.Unlock()
	var at []int
	for i, text := range a.texts[user] {
		if strings.Contains(text, token) {
			at = append(at, i)
		}
	}
	return at
}

// inOrder tells whether messages have reached a user once each, in this order.
func (a *arrivals) inOrder(user string, tokens []string) error {
	last := -1
	for i, token := range tokens {
		at := a.places(user, token)
		switch {
		case len(at) != 1:
			return fmt.Errorf("message %d of %d reached user %q %d times", i+1, len(tokens), user, len(at))
		case at[0] < last:
			return fmt.Errorf("message %d of %d reached user %q before an earlier one", i+1, len(tokens), user)
		}
		last = at[0]
	}
	return nil
}

// nobody tells whether a message has reached none of the users: once a later one has
// reached each of them, it would have.
func (t *tester) nobody(ctx context.Context, token string, users ...string) error {
	if t.cfg.Client == nil {
		return nil
	}
	for _, user := range users {
		here, later, err := t.isHere(ctx, user)
		if err != nil || !here {
			return fmt.Errorf("user %q cannot be reached any more: %w", user, err)
		}
		if err := t.arrived.until(ctx, user, later); err != nil {
			return err
		}
	}
	if i := slices.IndexFunc(users, func(user string) bool { return t.arrived.count(user, token) > 0 }); i >= 0 {
		return fmt.Errorf("it reached user %q", users[i])
	}
	return nil
}
