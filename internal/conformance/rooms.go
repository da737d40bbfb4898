package conformance

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"

	pubsub "github.com/push-manager/push-manager/proto"
)

func roomsChecks() []check {
	return []check{
		{name: "rooms/several", expect: "a push to several rooms is for the users who are in any of them, once, by user_ids and by an audience; who is in none of them is not_here", users: 2, audiences: true, run: severalRooms},
		{name: "rooms/once", expect: "a client in several of the rooms is shown the message once", users: 1, clients: true, run: roomsOnce},
		{name: "rooms/disagreement", expect: "room_ids beside room_id, or without user_ids and an audience, end the stream with FAILED_PRECONDITION", run: roomsDisagreement},
	}
}

// roomsLink opens a stream to a node that takes several rooms.
func (t *tester) roomsLink(ctx context.Context) (*link, error) {
	hello := t.helloOf()
	hello.Features = []pubsub.Feature{pubsub.Feature_FEATURE_ROOMS}
	l, err := t.open(ctx, hello)
	if err != nil {
		return nil, err
	}
	if !l.has(pubsub.Feature_FEATURE_ROOMS) {
		l.close()
		return nil, &skipped{"the node does not do it (features has no FEATURE_ROOMS)"}
	}
	return l, nil
}

// elsewhere is a room that nobody is in.
func (t *tester) elsewhere() string { return t.cfg.Room + "-elsewhere" }

func severalRooms(ctx context.Context, t *tester) error {
	l, err := t.roomsLink(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	u0, u1, absent := t.cfg.Users[0], t.cfg.Users[1], t.cfg.Absent
	in, out := []string{t.elsewhere(), t.cfg.Room}, []string{t.elsewhere(), t.elsewhere() + "-2"}
	for _, step := range []struct {
		what     string
		delivery *pubsub.Delivery
		here     int
		notHere  []string
	}{
		{"user_ids", &pubsub.Delivery{UserIds: []string{u0, u1, absent}, RoomIds: in}, 2, []string{absent}},
		{"user_ids, rooms that they are not in", &pubsub.Delivery{UserIds: []string{u0, u1}, RoomIds: out}, 0, []string{u0, u1}},
		{"an audience", &pubsub.Delivery{Audience: &pubsub.Audience{Id: 1, Version: 1, RoomIds: in, Join: []string{u0, absent}}}, 1, []string{absent}},
		{"the audience again", &pubsub.Delivery{Audience: &pubsub.Audience{Id: 1, Version: 1}}, 1, []string{absent}},
		{"with one more", &pubsub.Delivery{Audience: &pubsub.Audience{Id: 1, Version: 2, Join: []string{u1}}, ExceptUserIds: []string{absent}}, 2, nil},
		{"an audience of rooms that they are not in", &pubsub.Delivery{Audience: &pubsub.Audience{Id: 2, Version: 1, RoomIds: out, Join: []string{u0}}}, 0, []string{u0}},
	} {
		step.delivery.Content, _ = t.content()
		if err := l.accounted(ctx, l.frame(step.delivery), step.here, step.notHere...); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return l.fence(ctx)
}

func roomsOnce(ctx context.Context, t *tester) error {
	l, err := t.roomsLink(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	user := t.cfg.Users[0]
	content, token := t.content()
	behind, last := t.content()
	if _, err := l.deliver(
		&pubsub.Delivery{Content: content, UserIds: []string{user}, RoomIds: []string{t.cfg.Room, t.elsewhere(), t.cfg.Room}},
		&pubsub.Delivery{Content: behind, UserIds: []string{user}},
	); err != nil {
		return err
	}
	if err := l.all(ctx); err != nil {
		return err
	}
	if err := t.arrived.until(ctx, user, last); err != nil {
		return err
	}
	if n := t.arrived.count(user, token); n != 1 {
		return fmt.Errorf("the client was shown it %d times", n)
	}
	return nil
}

func roomsDisagreement(ctx context.Context, t *tester) error {
	absent := t.cfg.Absent
	rooms := []string{t.cfg.Room, t.elsewhere()}
	for _, c := range []struct {
		what string
		bad  *pubsub.Delivery
	}{
		{"room_ids beside room_id", &pubsub.Delivery{UserIds: []string{absent}, RoomId: t.cfg.Room, RoomIds: rooms}},
		{"room_ids for everybody", &pubsub.Delivery{Everybody: true, RoomIds: rooms}},
		{"room_ids beside an audience", &pubsub.Delivery{Audience: &pubsub.Audience{Id: 1, Version: 1, RoomId: t.cfg.Room, Join: []string{absent}}, RoomIds: rooms}},
		{"an audience of both", &pubsub.Delivery{Audience: &pubsub.Audience{Id: 1, Version: 1, RoomId: t.cfg.Room, RoomIds: rooms, Join: []string{absent}}}},
	} {
		l, err := t.roomsLink(ctx)
		if err != nil {
			return err
		}
		defer l.close()
		content, token := t.content()
		c.bad.Content = content
		if err := l.write(&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{c.bad}}); err != nil {
			return err
		}
		err = l.ends(ctx, codes.FailedPrecondition)
		if err == nil {
			err = t.nobody(ctx, token, t.cfg.Users...)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.what, err)
		}
	}
	return nil
}
