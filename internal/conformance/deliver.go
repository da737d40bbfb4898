package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

func deliverChecks() []check {
	return []check{
		{name: "deliver/users", expect: "users who are here are counted, the others are named as not_here in the frame of the ack", users: 2, run: deliverUsers},
		{name: "deliver/nobody-here", expect: "a delivery for users who are not here is acknowledged with 0 and all of them as not_here", run: deliverNobody},
		{name: "deliver/acks", expect: "each of 1,000 deliveries is acknowledged once, and the sums add up", run: deliverAcks},
		{name: "deliver/order", expect: "deliveries reach a user once each and in their order", users: 1, clients: true, run: deliverOrder},
		{name: "deliver/everybody", expect: "a delivery to everybody reaches every user here, and counts no more than are online", users: 1, run: deliverEverybody},
		{name: "deliver/scope", expect: "a delivery with a scope reaches the users whose ids begin with it, and nobody else", run: deliverScope},
		{name: "deliver/no-target", expect: "a delivery that says for nobody ends the stream with FAILED_PRECONDITION, and is never for everybody", run: deliverNoTarget},
		{name: "deliver/two-targets", expect: "a delivery that says twice for whom ends the stream with FAILED_PRECONDITION", run: deliverTwoTargets},
		{name: "deliver/gap", expect: "a first_seq that is not the next one ends the stream with FAILED_PRECONDITION, after the acks owed", run: deliverGap},
		{name: "deliver/heartbeat", expect: "each heartbeat is answered in time, with its number and the users online", run: heartbeats},
		{name: "deliver/drain", expect: "a manager's drain is answered with the acks owed and the end of the stream with OK", run: managerDrains},
	}
}

// to is a delivery of a new message to users.
func (t *tester) to(users ...string) (*pubsub.Delivery, string) {
	content, token := t.content()
	return &pubsub.Delivery{Content: content, UserIds: users}, token
}

// is compares what became of a delivery with what should have.
func (o outcome) is(delivered int, notHere ...string) error {
	slices.Sort(o.notHere)
	slices.Sort(notHere)
	if o.refused || int(o.delivered) != delivered || len(o.failed)+len(o.reused) > 0 || !slices.Equal(o.notHere, notHere) {
		return fmt.Errorf("delivered to %d and not_here %s, failed %s, refused %t, instead of %d and not_here %s", o.delivered, some(o.notHere), some(o.failed), o.refused, delivered, some(notHere))
	}
	return nil
}

// some writes the first of many users.
func some(users []string) string {
	if len(users) > 3 {
		return fmt.Sprintf("%q and %d more", users[:3], len(users)-3)
	}
	return fmt.Sprintf("%q", users)
}

func deliverUsers(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	u := t.cfg.Users
	for _, c := range []struct {
		users   []string
		here    int
		notHere []string
	}{
		{[]string{u[0]}, 1, nil},
		{[]string{u[0], u[1]}, 2, nil},
		{[]string{u[0], t.cfg.Absent, u[1]}, 2, []string{t.cfg.Absent}},
	} {
		d, token := t.to(c.users...)
		o, err := l.ask(ctx, d)
		if err == nil {
			err = o.is(c.here, c.notHere...)
		}
		if err != nil {
			return fmt.Errorf("to %q: %w", c.users, err)
		}
		for _, user := range c.users {
			if user == t.cfg.Absent || t.cfg.Client == nil {
				continue
			}
			if err := t.arrived.until(ctx, user, token); err != nil {
				return err
			}
		}
	}
	return nil
}

func deliverNobody(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	users := t.strangers(3, 0)
	d, _ := t.to(users...)
	o, err := l.ask(ctx, d)
	if err != nil {
		return err
	}
	return o.is(0, users...)
}

// strangers are users who are not connected; their ids have at least so many bytes.
func (t *tester) strangers(n, size int) []string {
	users := make([]string, n)
	for i := range users {
		users[i] = fmt.Sprintf("%s-stranger-%0*d", t.manager, max(1, size-len(t.manager)-10), i)
	}
	return users
}

func deliverAcks(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	// No more than the node has said it takes at a time.
	n := 1000
	if t.unacked > 0 {
		n = min(n, int(t.unacked))
	}
	for l.next <= uint64(n) {
		var frame []*pubsub.Delivery
		for range min(100, n-int(l.next)+1) {
			d, _ := t.to(t.strangers(1+len(frame)%3, 0)...)
			frame = append(frame, d)
		}
		if _, err := l.deliver(frame...); err != nil {
			return err
		}
	}
	if err := l.all(ctx); err != nil {
		return err
	}
	return l.fence(ctx) // an ack that comes twice comes before its answer
}

func deliverOrder(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	user := t.cfg.Users[0]
	var tokens []string
	for size := 1; len(tokens) < 100; size++ {
		var frame []*pubsub.Delivery
		for range size {
			d, token := t.to(user)
			frame, tokens = append(frame, d), append(tokens, token)
		}
		if _, err := l.deliver(frame...); err != nil {
			return err
		}
	}
	if err := l.all(ctx); err != nil {
		return err
	}
	for _, token := range tokens {
		if err := t.arrived.until(ctx, user, token); err != nil {
			return err
		}
	}
	return t.arrived.inOrder(user, tokens)
}

func deliverEverybody(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	content, token := t.content()
	o, err := l.ask(ctx, &pubsub.Delivery{Content: content, Everybody: true})
	if err != nil {
		return err
	}
	if int(o.delivered) < len(t.cfg.Users) {
		return fmt.Errorf("delivered to %d users, and at least %d are connected", o.delivered, len(t.cfg.Users))
	}
	if t.cfg.Client == nil {
		return nil
	}
	for _, user := range t.cfg.Users {
		if err := t.arrived.until(ctx, user, token); err != nil {
			return err
		}
	}
	return nil
}

// deliverScope needs no users of tenants: nobody is in a scope that the test makes up.
func deliverScope(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	if !slices.Contains(l.hello.GetFeatures(), pubsub.Feature_FEATURE_SCOPE) {
		return &skipped{"the node does not tell tenants apart (features has no FEATURE_SCOPE)"}
	}
	inScope := map[string][]string{"conformance-nobody/": nil}
	for _, user := range t.cfg.Users {
		if tenant, _, ok := strings.Cut(user, "/"); ok && ids.CheckTenant(tenant) == nil {
			inScope[ids.Scope(tenant)] = append(inScope[ids.Scope(tenant)], user)
		} else { // of no tenant, whatever its id begins with
			begin := user[:min(len(user), ids.MaxTenantBytes)]
			if ids.CheckTenant(begin) == nil {
				inScope[ids.Scope(begin)] = nil
			}
		}
	}
	for scope, want := range inScope {
		content, token := t.content()
		o, err := l.ask(ctx, &pubsub.Delivery{Content: content, Scope: scope})
		switch {
		case err != nil:
			return fmt.Errorf("scope %q: %w", scope, err)
		case len(want) == 0 && (o.delivered > 0 || o.failedUsers > 0), int(o.delivered) < len(want):
			return fmt.Errorf("scope %q: delivered to %d users and failed for %d, and %d of those given are in it", scope, o.delivered, o.failedUsers, len(want))
		}
		others := slices.DeleteFunc(slices.Clone(t.cfg.Users), func(user string) bool { return slices.Contains(want, user) })
		if err := t.nobody(ctx, token, others...); err != nil {
			return fmt.Errorf("scope %q: %w", scope, err)
		}
	}
	return t.brokenAfter(ctx, &pubsub.Delivery{Scope: "conformance-nobody/", Everybody: true, Content: &pubsub.MessageContent{}})
}

// brokenAfter sends a sound delivery and what breaks the stream, in one frame: the
// delivery is acknowledged, and then the stream ends.
func (t *tester) brokenAfter(ctx context.Context, bad *pubsub.Delivery) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	sound, _ := t.to(t.cfg.Absent)
	f := l.frame(sound)
	f.Deliveries = append(f.Deliveries, bad)
	if err := l.write(f); err != nil {
		return err
	}
	if err := l.ends(ctx, codes.FailedPrecondition); err != nil {
		return err
	}
	if err := l.all(ctx); err != nil {
		return fmt.Errorf("what was handed over before is not acknowledged: %w", err)
	}
	return nil
}

func deliverNoTarget(ctx context.Context, t *tester) error {
	content, token := t.content()
	err := t.brokenAfter(ctx, &pubsub.Delivery{Content: content})
	return errors.Join(err, t.nobody(ctx, token, t.cfg.Users...))
}

func deliverTwoTargets(ctx context.Context, t *tester) error {
	audience := &pubsub.Audience{Id: 1, Version: 1, RoomId: t.cfg.Room, Join: []string{t.cfg.Absent}}
	for what, bad := range map[string]*pubsub.Delivery{
		"user_ids and everybody": {UserIds: []string{t.cfg.Absent}, Everybody: true},
		"user_ids and audience":  {UserIds: []string{t.cfg.Absent}, Audience: audience},
		"audience and everybody": {Audience: audience, Everybody: true},
	} {
		content, token := t.content()
		bad.Content = content
		err := errors.Join(t.brokenAfter(ctx, bad), t.nobody(ctx, token, t.cfg.Users...))
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	return nil
}

func deliverGap(ctx context.Context, t *tester) error {
	for what, seq := range map[string]uint64{"1 and then 3": 3, "1 and then 1 again": 1, "1 and then 0": 0} {
		l, err := t.open(ctx, nil)
		if err != nil {
			return err
		}
		defer l.close()
		first, _ := t.to(t.cfg.Absent)
		bad, _ := t.to(t.cfg.Absent)
		if _, err := l.deliver(first); err != nil {
			return err
		}
		if err := l.write(&pubsub.DeliverRequest{FirstSeq: seq, Deliveries: []*pubsub.Delivery{bad}}); err != nil {
			return err
		}
		err = l.ends(ctx, codes.FailedPrecondition)
		if err == nil {
			err = l.all(ctx)
		}
		if err != nil {
			return fmt.Errorf("first_seq %s: %w", what, err)
		}
	}
	late, _ := t.to(t.cfg.Absent)
	if err := t.breaks(ctx, &pubsub.DeliverRequest{Hello: t.helloOf()}, &pubsub.DeliverRequest{FirstSeq: 2, Deliveries: []*pubsub.Delivery{late}}); err != nil {
		return fmt.Errorf("first_seq 2 at the start: %w", err)
	}
	return nil
}

func heartbeats(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	for _, n := range []uint64{1, 2, 3, 1 << 40} {
		d, _ := t.to(t.cfg.Absent)
		f := l.frame(d)
		f.Heartbeat = n // beside deliveries it is one as well
		if err := l.write(f); err != nil {
			return err
		}
		if err := l.until(ctx, fmt.Sprintf("the answer to heartbeat %d", n), func() bool { return l.beat == n }); err != nil {
			return err
		}
		l.mu.Lock()
		online := l.online
		l.mu.Unlock()
		if int(online) < len(t.cfg.Users) {
			return fmt.Errorf("online_users is %d, and at least %d users are connected", online, len(t.cfg.Users))
		}
	}
	return l.all(ctx)
}

func managerDrains(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	d, _ := t.to(t.cfg.Absent)
	f := l.frame(d, d, d)
	f.Drain = true
	if err := l.write(f); err != nil {
		return err
	}
	if err := l.ends(ctx, codes.OK); err != nil {
		return err
	}
	return l.all(ctx)
}
