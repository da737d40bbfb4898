package conformance

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"

	pubsub "github.com/push-manager/push-manager/proto"
)

// lastDisconnect comes behind the checks that need all users: one of them is disconnected.
func lastDisconnect() check {
	return check{name: "disconnect/user", expect: "a user who is disconnected is not here any more, and those before it in the frame reach the user still", users: 2, clients: true, run: disconnectUser}
}

func disconnectChecks() []check {
	return []check{
		{name: "disconnect/answers", expect: "a disconnect is answered with its token and the number of connections: 0 for a user, a device and a room that are not here", run: disconnects},
		{name: "disconnect/lifted", expect: "a refusal that is lifted again, or is older than that, leaves the users alone", run: refusals},
		{name: "disconnect/invalid", expect: "a disconnect without a token, for nobody, or for a user and a room, is a broken stream", run: invalidDisconnects},
		{name: "disconnect/unnamed", expect: "a node that does not name FEATURE_DISCONNECT says nothing to a disconnect, and closes nothing", users: 1, run: unnamedDisconnect},
	}
}

// disconnectLink opens a stream to a node that disconnects.
func (t *tester) disconnectLink(ctx context.Context) (*link, error) {
	hello := t.helloOf()
	hello.Features = []pubsub.Feature{pubsub.Feature_FEATURE_DISCONNECT}
	l, err := t.open(ctx, hello)
	if err == nil && !l.has(pubsub.Feature_FEATURE_DISCONNECT) {
		l.close()
		return nil, &skipped{"the node does not do it (features has no FEATURE_DISCONNECT)"}
	}
	return l, err
}

// closes sends disconnects, and waits for the answers.
func (l *link) closes(ctx context.Context, list ...*pubsub.Disconnect) error {
	if err := l.write(&pubsub.DeliverRequest{Disconnects: list}); err != nil {
		return err
	}
	return l.until(ctx, fmt.Sprintf("the answers to %d disconnects", len(list)), func() bool {
		for _, d := range list {
			if _, ok := l.closed[d.GetToken()]; !ok {
				return false
			}
		}
		return true
	})
}

func disconnects(ctx context.Context, t *tester) error {
	l, err := t.disconnectLink(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	nobody := t.cfg.Absent
	list := []*pubsub.Disconnect{
		{Token: 1, UserId: nobody, Code: 4000, Reason: "conformance"},
		{Token: 2, UserId: nobody, DeviceId: "conformance", Code: 4999},
		{Token: 3, RoomId: nobody, Code: 4410, Reason: "conformance"},
	}
	if len(t.cfg.Users) > 0 {
		list = append(list, &pubsub.Disconnect{Token: 4, UserId: t.cfg.Users[0], DeviceId: "conformance-none", Code: 4000})
	}
	if err := l.closes(ctx, list...); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range list {
		if n := l.closed[d.GetToken()]; n != 0 {
			return fmt.Errorf("%d connections were closed for %v, which nobody is", n, d)
		}
	}
	return nil
}

func disconnectUser(ctx context.Context, t *tester) error {
	l, err := t.disconnectLink(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	user := t.cfg.Users[len(t.cfg.Users)-1]
	content, token := t.content()
	f := l.frame(&pubsub.Delivery{Content: content, UserIds: []string{user}})
	f.Disconnects = []*pubsub.Disconnect{{Token: 1, UserId: user, Code: 4410, Reason: "conformance", RefuseMs: 1000, Revision: 3}}
	if err := l.write(f); err != nil {
		return err
	}
	if err := l.until(ctx, "the answer to a disconnect", func() bool { _, ok := l.closed[1]; return ok }); err != nil {
		return err
	}
	l.mu.Lock()
	n := l.closed[1]
	l.mu.Unlock()
	if n < 1 {
		return fmt.Errorf("no connection of user %q, who is here, was closed", user)
	}
	if err := t.arrived.until(ctx, user, token); err != nil {
		return err
	}
	ended, cancel := context.WithTimeout(ctx, t.cfg.Within)
	defer cancel()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		here, _, err := t.isHere(ctx, user)
		if err != nil || !here {
			return err
		}
		select {
		case <-look.C:
		case <-ended.Done():
			return fmt.Errorf("user %q is still here", user)
		}
	}
}

func refusals(ctx context.Context, t *tester) error {
	l, err := t.disconnectLink(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	refuse := &pubsub.Disconnect{Token: 1, UserId: t.cfg.Absent, Code: 4410, RefuseMs: 60_000, Revision: 1}
	lift := &pubsub.Disconnect{Token: 2, UserId: t.cfg.Absent, Code: 4000, AllowAgain: true, Revision: 2}
	older := &pubsub.Disconnect{Token: 3, UserId: t.cfg.Absent, Code: 4410, RefuseMs: 60_000, Revision: 1}
	if err := l.closes(ctx, refuse, lift, older); err != nil {
		return err
	}
	for _, user := range t.cfg.Users {
		here, _, err := t.isHere(ctx, user)
		if err == nil && !here {
			err = fmt.Errorf("user %q is not here any more, after a refusal of %q", user, t.cfg.Absent)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func invalidDisconnects(ctx context.Context, t *tester) error {
	for what, d := range map[string]*pubsub.Disconnect{
		"without a token":          {UserId: t.cfg.Absent, Code: 4000},
		"for nobody":               {Token: 1, Code: 4000},
		"for a user and a room":    {Token: 1, UserId: t.cfg.Absent, RoomId: t.cfg.Absent, Code: 4000},
		"with a code of WebSocket": {Token: 1, UserId: t.cfg.Absent, Code: 1000},
	} {
		l, err := t.disconnectLink(ctx)
		if err != nil {
			return err
		}
		if err = l.write(&pubsub.DeliverRequest{Disconnects: []*pubsub.Disconnect{d}}); err == nil {
			err = l.ends(ctx, codes.FailedPrecondition)
		}
		l.close()
		if err != nil {
			return fmt.Errorf("a disconnect %s: %w", what, err)
		}
	}
	return nil
}

// unnamedDisconnect leaves it to take to notice an answer.
func unnamedDisconnect(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	if l.has(pubsub.Feature_FEATURE_DISCONNECT) {
		return nil // the other checks are about it
	}
	user := t.cfg.Users[0]
	if err := l.write(&pubsub.DeliverRequest{Disconnects: []*pubsub.Disconnect{{Token: 1, UserId: user, Code: 4000}}}); err != nil {
		return err
	}
	if err := l.fence(ctx); err != nil {
		return err
	}
	here, _, err := t.isHere(ctx, user)
	if err == nil && !here {
		err = fmt.Errorf("user %q was disconnected", user)
	}
	return err
}
