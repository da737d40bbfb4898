package conformance

import (
	"context"
	"fmt"
	"slices"

	"google.golang.org/grpc/codes"

	pubsub "github.com/push-manager/push-manager/proto"
)

func filterChecks() []check {
	return []check{
		{name: "filter/users", expect: "of users, a filter leaves out those without a matching connection: they are filtered and not not_here, and nobody is named unasked", users: 1, run: filterUsers},
		{name: "filter/audience", expect: "of an audience it does the same", users: 1, audiences: true, run: filterAudience},
		{name: "filter/everybody", expect: "of everybody it does the same, in numbers", users: 1, run: filterEverybody},
		{name: "filter/named", expect: "with name_filtered the miss names who is filtered, and nobody else as such", users: 1, run: filterNamed},
		{name: "filter/malformed", expect: "a Match without a key or without values, nine of them, and a filter beside replay or log end the stream with FAILED_PRECONDITION", run: filterMalformed},
	}
}

// unmatched asks for an attribute that nobody has. Its contrary is for everybody.
func unmatched() *pubsub.Match {
	return &pubsub.Match{Key: "conformance.nobody", Values: []string{"1", "2"}}
}

func contrary(m *pubsub.Match) *pubsub.Match {
	return &pubsub.Match{Key: m.GetKey(), Values: m.GetValues(), Not: !m.GetNot()}
}

// filterLink opens a stream to a node that filters.
func (t *tester) filterLink(ctx context.Context) (*link, error) {
	hello := t.helloOf()
	hello.Features = []pubsub.Feature{pubsub.Feature_FEATURE_FILTER}
	l, err := t.open(ctx, hello)
	if err != nil {
		return nil, err
	}
	if !l.has(pubsub.Feature_FEATURE_FILTER) {
		l.close()
		return nil, &skipped{"the node does not do it (features has no FEATURE_FILTER)"}
	}
	return l, nil
}

// filteredIs compares what became of a delivery with a filter with what should have.
func (o outcome) filteredIs(delivered, filtered int, leftOut, notHere []string) error {
	if err := o.is(delivered, notHere...); err != nil {
		return err
	}
	slices.Sort(o.leftOut)
	if int(o.filtered) != filtered || !slices.Equal(o.leftOut, leftOut) {
		return fmt.Errorf("%d filtered, of them by name %s, instead of %d and %s", o.filtered, some(o.leftOut), filtered, some(leftOut))
	}
	return nil
}

// filters are deliveries with one filter each, and whether it lets the users of the check pass.
func (t *tester) filters() []struct {
	what   string
	filter []*pubsub.Match
	passes bool
} {
	no := unmatched()
	return []struct {
		what   string
		filter []*pubsub.Match
		passes bool
	}{
		{"an attribute that nobody has", []*pubsub.Match{no}, false},
		{"not an attribute that nobody has", []*pubsub.Match{contrary(no)}, true},
		{"two matches of which one does not hold", []*pubsub.Match{contrary(no), no}, false},
		{"two matches that hold", []*pubsub.Match{contrary(no), {Key: "conformance.other", Values: []string{"x"}, Not: true}}, true},
	}
}

func filterUsers(ctx context.Context, t *tester) error {
	user := t.cfg.Users[0]
	l, err := t.filterLink(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	for _, room := range []string{"", t.cfg.Room} {
		for _, c := range t.filters() {
			d, token := t.to(user, t.cfg.Absent)
			d.RoomId, d.Filter = room, c.filter
			o, err := l.ask(ctx, d)
			if err == nil && c.passes {
				err = o.filteredIs(1, 0, nil, []string{t.cfg.Absent})
			} else if err == nil {
				err = o.filteredIs(0, 1, nil, []string{t.cfg.Absent})
			}
			if err == nil && c.passes && t.cfg.Client != nil {
				err = t.arrived.until(ctx, user, token)
			} else if err == nil && !c.passes {
				err = t.nobody(ctx, token, user)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", c.what, err)
			}
		}
	}
	return l.fence(ctx)
}

func filterAudience(ctx context.Context, t *tester) error {
	user := t.cfg.Users[0]
	l, err := t.filterLink(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	audience := &pubsub.Audience{Id: 1, Version: 1, RoomId: t.cfg.Room, Join: []string{user, t.cfg.Absent}}
	for _, c := range t.filters() {
		content, _ := t.content()
		f := l.frame(&pubsub.Delivery{Content: content, Audience: audience, Filter: c.filter})
		audience = &pubsub.Audience{Id: 1, Version: 1}
		l.members(f.GetFirstSeq(), 2)
		if err := l.write(f); err != nil {
			return err
		}
		o, err := l.outcome(ctx, f.GetFirstSeq())
		if err == nil && c.passes {
			err = o.filteredIs(1, 0, nil, []string{t.cfg.Absent})
		} else if err == nil {
			err = o.filteredIs(0, 1, nil, []string{t.cfg.Absent})
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.what, err)
		}
	}
	return nil
}

func filterEverybody(ctx context.Context, t *tester) error {
	l, err := t.filterLink(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	for _, c := range t.filters() {
		content, token := t.content()
		o, err := l.ask(ctx, &pubsub.Delivery{Content: content, Everybody: true, Filter: c.filter})
		switch {
		case err != nil:
		case o.failedUsers > 0 || o.refused:
			err = fmt.Errorf("failed for %d users, refused %t", o.failedUsers, o.refused)
		case c.passes && (int(o.delivered) < len(t.cfg.Users) || o.filtered > 0), !c.passes && (o.delivered > 0 || int(o.filtered) < len(t.cfg.Users)):
			err = fmt.Errorf("%d delivered and %d filtered, and %d users are known to be here", o.delivered, o.filtered, len(t.cfg.Users))
		case !c.passes:
			err = t.nobody(ctx, token, t.cfg.Users[0])
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.what, err)
		}
	}
	return nil
}

func filterNamed(ctx context.Context, t *tester) error {
	user := t.cfg.Users[0]
	l, err := t.filterLink(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	for _, c := range t.filters() {
		d, _ := t.to(user, t.cfg.Absent)
		d.Filter, d.NameFiltered = c.filter, true
		o, err := l.ask(ctx, d)
		if err == nil && c.passes {
			err = o.filteredIs(1, 0, nil, []string{t.cfg.Absent})
		} else if err == nil {
			err = o.filteredIs(0, 1, []string{user}, []string{t.cfg.Absent})
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.what, err)
		}
	}
	return nil
}

func filterMalformed(ctx context.Context, t *tester) error {
	for _, c := range []struct {
		what string
		set  func(*pubsub.Delivery)
	}{
		{"a Match without a key", func(d *pubsub.Delivery) { d.Filter[0].Key = "" }},
		{"a Match without values", func(d *pubsub.Delivery) { d.Filter[0].Values = nil }},
		{"nine of them", func(d *pubsub.Delivery) { d.Filter = slices.Repeat(d.GetFilter(), 9) }},
		{"a filter beside replay", func(d *pubsub.Delivery) { d.Replay = &pubsub.ReplayPlace{Gate: 1, Seq: 1} }},
		{"a filter beside log", func(d *pubsub.Delivery) { d.Log = &pubsub.LogPosition{Seq: 1, Epoch: 1} }},
	} {
		l, err := t.filterLink(ctx)
		if err != nil {
			return err
		}
		d, _ := t.to(t.cfg.Absent)
		d.Filter = []*pubsub.Match{unmatched()}
		c.set(d)
		_, err = l.deliver(d)
		if err == nil {
			err = l.ends(ctx, codes.FailedPrecondition)
		}
		l.close()
		if err != nil {
			return fmt.Errorf("%s: %w", c.what, err)
		}
	}
	return nil
}
