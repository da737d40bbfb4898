package conformance

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"

	pubsub "github.com/push-manager/push-manager/proto"
)

func audienceChecks() []check {
	return []check{
		{name: "audience/life", expect: "an audience is defined, used, changed, used without some and forgotten, and each time the members of then are meant", users: 2, audiences: true, run: audienceLife},
		{name: "audience/except", expect: "who is left out gets nothing", users: 2, clients: true, audiences: true, run: audienceExcept},
		{name: "audience/disagreement", expect: "an audience that the two sides see differently ends the stream with FAILED_PRECONDITION", audiences: true, run: audienceDisagreement},
	}
}

func audienceLife(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	u0, u1, absent := t.cfg.Users[0], t.cfg.Users[1], t.cfg.Absent
	other := t.strangers(1, 0)[0]
	for _, step := range []struct {
		what     string
		audience *pubsub.Audience
		except   []string
		forget   uint32
		here     int
		notHere  []string
	}{
		{"defined", &pubsub.Audience{Id: 7, Version: 1, RoomId: t.cfg.Room, Join: []string{u0, absent}}, nil, 0, 1, []string{absent}},
		{"used", &pubsub.Audience{Id: 7, Version: 1}, nil, 0, 1, []string{absent}},
		{"used without one", &pubsub.Audience{Id: 7, Version: 1}, []string{absent}, 0, 1, nil},
		{"used as before", &pubsub.Audience{Id: 7, Version: 1}, nil, 0, 1, []string{absent}},
		{"with one more", &pubsub.Audience{Id: 7, Version: 2, Join: []string{u1}}, nil, 0, 2, []string{absent}},
		{"changed, used without one who has just joined", &pubsub.Audience{Id: 7, Version: 3, Leave: []string{u0, absent}, Join: []string{other}}, []string{other}, 0, 1, nil},
		{"used after the change", &pubsub.Audience{Id: 7, Version: 3}, nil, 0, 1, []string{other}},
		{"another one beside it", &pubsub.Audience{Id: 8, Version: 1, RoomId: t.cfg.Room, Join: []string{u0, u1}}, nil, 0, 2, nil},
		{"used in the frame that forgets it", &pubsub.Audience{Id: 8, Version: 1}, []string{u0}, 8, 1, nil},
		{"nobody left", &pubsub.Audience{Id: 7, Version: 4, Leave: []string{u1, other}}, nil, 0, 0, nil},
		{"one is back", &pubsub.Audience{Id: 7, Version: 5, Join: []string{u0}}, nil, 0, 1, nil},
	} {
		content, _ := t.content()
		f := l.frame(&pubsub.Delivery{Content: content, Audience: step.audience, ExceptUserIds: step.except})
		if step.forget != 0 {
			f.ForgetAudiences = []uint32{step.forget}
		}
		if err := l.accounted(ctx, f, step.here, step.notHere...); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return l.fence(ctx)
}

func audienceExcept(ctx context.Context, t *tester) error {
	l, err := t.open(ctx, nil)
	if err != nil {
		return err
	}
	defer l.close()
	in, out := t.cfg.Users[0], t.cfg.Users[1]
	content, token := t.content()
	d := &pubsub.Delivery{Content: content, Audience: &pubsub.Audience{Id: 1, Version: 1, RoomId: t.cfg.Room, Join: []string{in, out}}, ExceptUserIds: []string{out}}
	f := l.frame(d)
	l.members(f.GetFirstSeq(), 1)
	if err := l.write(f); err != nil {
		return err
	}
	if err := l.all(ctx); err != nil {
		return err
	}
	if err := t.arrived.until(ctx, in, token); err != nil {
		return err
	}
	return t.nobody(ctx, token, out)
}

func audienceDisagreement(ctx context.Context, t *tester) error {
	absent, other := t.cfg.Absent, t.strangers(1, 0)[0]
	for _, c := range []struct {
		what   string
		bad    *pubsub.Audience
		except []string
	}{
		{"a change of one that was never defined", &pubsub.Audience{Id: 2, Version: 2, Join: []string{absent}}, nil},
		{"two versions on", &pubsub.Audience{Id: 1, Version: 3, Join: []string{other}}, nil},
		{"a version back", &pubsub.Audience{Id: 1, Version: 0}, nil},
		{"defined again", &pubsub.Audience{Id: 1, Version: 1, RoomId: t.cfg.Room, Join: []string{absent}}, nil},
		{"who joins is a member", &pubsub.Audience{Id: 1, Version: 2, Join: []string{absent}}, nil},
		{"who leaves is no member", &pubsub.Audience{Id: 1, Version: 2, Leave: []string{other}}, nil},
		{"who is excepted is no member", &pubsub.Audience{Id: 1, Version: 1}, []string{other}},
		{"changed after it was forgotten", &pubsub.Audience{Id: 3, Version: 2, Leave: []string{absent}}, nil},
	} {
		l, err := t.open(ctx, nil)
		if err != nil {
			return err
		}
		defer l.close()
		a, _ := t.content()
		f := l.frame(
			&pubsub.Delivery{Content: a, Audience: &pubsub.Audience{Id: 1, Version: 1, RoomId: t.cfg.Room, Join: []string{absent}}},
			&pubsub.Delivery{Content: a, Audience: &pubsub.Audience{Id: 3, Version: 1, RoomId: t.cfg.Room, Join: []string{absent}}})
		l.members(1, 1)
		l.members(2, 1)
		f.ForgetAudiences = []uint32{3}
		if err := l.write(f); err != nil {
			return err
		}
		content, token := t.content()
		if err := l.write(&pubsub.DeliverRequest{FirstSeq: 3, Deliveries: []*pubsub.Delivery{{Content: content, Audience: c.bad, ExceptUserIds: c.except}}}); err != nil {
			return err
		}
		err = l.ends(ctx, codes.FailedPrecondition)
		if err == nil {
			err = l.all(ctx)
		}
		if err == nil {
			err = t.nobody(ctx, token, t.cfg.Users...)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.what, err)
		}
	}
	return nil
}
