package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine/route"
)

func iOS() []Match { return []Match{{Key: "platform", Values: []string{"ios"}}} }

// filtering sets a filter.
func filtering(p *Push, filter []Match) *Push {
	p.Options = &Options{Filter: filter}
	return p
}

// conns are the platforms of a user's connections, by node. A user without any is not on the node.
type conns map[string]map[string][]string // node, user

// answers is a node that filters, and one that does not if can is false.
func (c conns) answers(node string, can bool) func(*Delivery) {
	return func(d *Delivery) {
		if !can {
			d.Drop(DropNoFilter)
			return
		}
		var a Ack
		want := d.Options().Filter[0]
		users := d.all()
		if d.Everybody() {
			users = slices.Sorted(maps.Keys(c[node]))
		}
		for _, user := range users {
			switch has := c[node][user]; {
			case len(has) == 0 && d.Everybody():
			case len(has) == 0:
				a.NotHere = append(a.NotHere, user)
			case slices.ContainsFunc(has, func(p string) bool { return slices.Contains(want.Values, p) != want.Not }):
				a.Delivered++
			default:
				a.Filtered++
				if d.NamesFiltered() {
					a.LeftOut = append(a.LeftOut, user)
				}
			}
		}
		if _, err := d.Ack(a); err != nil {
			panic(err)
		}
	}
}

// A user is delivered with any connection that matches on any node that is tried, filtered with none and a connection somewhere, and
// offline without a connection: each user exactly so, whoever is on several nodes, has moved, or is on a node that cannot filter.
func TestEachFilteredUserCountsAsTheModelSays(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld()
		w.tune = func(c *route.Config) { c.TTL, c.StaleTTL, c.LookupTimeout = time.Hour, time.Hour, time.Minute }
		w.config.Timeout = time.Minute // a busy machine changes nothing
		e := w.engineFor(rt)
		before, after := drawPlaces(rt, "before"), drawPlaces(rt, "after")
		w.rooms["r"], w.users = before, before
		users := slices.Sorted(maps.Keys(before))
		kind := rapid.SampledFrom([]Kind{ToRoom, ToUsers, ToUser, ToAll}).Draw(rt, "kind")
		if kind != ToRoom { // who was nowhere may be told so by the look-up before, which is just ending, or be looked up anew
			users = slices.DeleteFunc(users, func(user string) bool { return len(before[user]) == 0 })
		}
		if len(users) == 0 {
			kind, users = ToRoom, slices.Sorted(maps.Keys(before))
		}
		filter := iOS()
		filter[0].Not = rapid.Bool().Draw(rt, "not")
		var p *Push
		switch kind {
		case ToRoom:
			p = toRoom("r", rapid.SliceOfN(rapid.SampledFrom([]string{"u0", "u3"}), 0, 2).Draw(rt, "exclude")...)
			users = slices.DeleteFunc(users, func(user string) bool { return slices.Contains(p.Exclude, user) })
		case ToUsers:
			p = toUsers(users...)
		case ToUser:
			p, users = toUser(users[0]), users[:1]
		default:
			p = push(&Push{Request: Request{Kind: ToAll}})
		}
		if _, err := e.Do(context.Background(), toRoom("r")); err != nil {
			rt.Fatal(err)
		}
		if len(users) > 0 {
			if _, err := e.Do(context.Background(), toUsers(users...)); err != nil {
				rt.Fatal(err)
			}
		}
		w.rooms["r"], w.users = after, after
		here, can := conns{}, map[string]bool{}
		for _, id := range nodeIDs {
			here[id], can[id] = map[string][]string{}, rapid.IntRange(0, 4).Draw(rt, id+" filters") > 0
			for i := range 8 {
				user := fmt.Sprintf("u%d", i)
				here[id][user] = rapid.SliceOfN(rapid.SampledFrom([]string{"ios", "web"}), 0, 2).Draw(rt, id+" "+user)
			}
			w.nodes[id].answer = here.answers(id, can[id])
		}
		matches := func(node, user string) bool {
			return slices.ContainsFunc(here[node][user], func(p string) bool { return (p == "ios") != filter[0].Not })
		}

		want := Result{}
		if kind == ToAll {
			for _, id := range nodeIDs {
				for user, has := range here[id] {
					switch {
					case !can[id] || len(has) == 0:
					case matches(id, user):
						want.Delivered++
					default:
						want.Filtered++
						want.Offline++
					}
				}
			}
			users = nil
		}
		for _, user := range users {
			tried, missed := slices.Clone(before[user]), false
			for _, id := range tried {
				missed = missed || can[id] && len(here[id][user]) == 0
			}
			if missed { // one look-up
				for _, id := range after[user] {
					if !slices.Contains(tried, id) {
						tried = append(tried, id)
					}
				}
			}
			var delivered, failed, filtered bool
			for _, id := range tried {
				delivered = delivered || can[id] && matches(id, user)
				failed = failed || !can[id]
				filtered = filtered || can[id] && len(here[id][user]) > 0
			}
			switch {
			case delivered:
				want.Delivered++
			case failed:
				want.Failed++
			case filtered:
				want.Filtered++
				want.Offline++
			default:
				want.Offline++
			}
		}
		want.Targets = want.Delivered + want.Offline + want.Failed
		r, err := e.Do(context.Background(), filtering(p, filter))
		if err != nil {
			rt.Fatal(err)
		}
		got := Result{Targets: r.Targets, Delivered: r.Delivered, Offline: r.Offline, Failed: r.Failed, Unknown: r.Unknown, Filtered: r.Filtered}
		if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			rt.Fatalf("got  %+v\nwant %+v\nhere %v, can %v, before %v, after %v", got, want, here, can, before, after)
		}
	})
}

func TestAFilteredUserIsNotLookedUpAgain(t *testing.T) {
	w := newWorld()
	w.users["u"] = []string{"A"}
	w.nodes["A"].answer = ack(Ack{Filtered: 1})
	e := w.engine(t)
	r := do(t, e, filtering(toUser("u"), iOS()))
	if r.Filtered != 1 || r.Offline != 1 || r.Found || r.Success() {
		t.Errorf("got %+v", r)
	}
	if n := w.lookedUp(); n != 1 {
		t.Errorf("%d look-ups", n)
	}
}

func TestANodeThatCannotFilterSaysSoOfItsUsers(t *testing.T) {
	w := newWorld()
	w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"A"}, "u3": {"B"}}
	w.nodes["A"].answer = func(d *Delivery) { d.Drop(DropNoFilter) }
	w.nodes["B"].answer = ack(Ack{Delivered: 1})
	r := do(t, w.engine(t), filtering(toRoom("r"), iOS()))
	want := []NodeFailure{{"A", "failed: node cannot filter", 2}}
	if r.Delivered != 1 || r.Failed != 2 || !slices.Equal(r.NodeFailures, want) {
		t.Errorf("got %+v", r)
	}
}

// A node that does not say by name whom its filter leaves out leaves in doubt who has other connections elsewhere, and nobody else.
func TestWhoIsOnTwoNodesIsUnknownWhereNobodyIsNamed(t *testing.T) {
	w := newWorld()
	w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"A"}, "both": {"A", "B"}}
	named := false
	w.nodes["A"].answer = func(d *Delivery) { named = d.NamesFiltered(); ack(Ack{Delivered: 2, Filtered: 1})(d) }
	w.nodes["B"].answer = ack(Ack{Delivered: 1})
	r := do(t, w.engine(t), filtering(toRoom("r"), iOS()))
	if !named || r.Delivered != 2 || r.Filtered != 0 || r.Unknown != 1 {
		t.Errorf("asked for names: %t, got %+v", named, r)
	}
}

func TestAcksThatCannotBeOfAFilter(t *testing.T) {
	tests := map[string]struct {
		ack    Ack
		filter []Match
		shared bool
	}{
		"filtered without a filter":   {ack: Ack{Delivered: 1, Filtered: 1}},
		"more filtered than users":    {ack: Ack{Delivered: 1, Filtered: 2}, filter: iOS()},
		"a negative count":            {ack: Ack{Delivered: 2, Filtered: -1}, filter: iOS()},
		"named, and not asked for":    {ack: Ack{Delivered: 1, Filtered: 1, LeftOut: []string{"u1"}}, filter: iOS()},
		"named, and not counted":      {ack: Ack{Delivered: 1, LeftOut: []string{"u1"}}, filter: iOS(), shared: true},
		"named, and not one of them":  {ack: Ack{Delivered: 1, Filtered: 1, LeftOut: []string{"u9"}}, filter: iOS(), shared: true},
		"named as filtered and gone":  {ack: Ack{Filtered: 1, LeftOut: []string{"u1"}, NotHere: []string{"u1"}}, filter: iOS(), shared: true},
		"refused and filtered":        {ack: Ack{Filtered: 1, Refused: true}, filter: iOS()},
		"filtered and all of the two": {ack: Ack{Delivered: 2, Filtered: 1}, filter: iOS()},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.rooms["r"] = map[string][]string{"u1": {"A"}, "u2": {"A"}}
			if tt.shared {
				w.rooms["r"]["u2"] = []string{"A", "B"}
			}
			var late error
			w.nodes["A"].answer = func(d *Delivery) { _, late = d.Ack(tt.ack) }
			p := toRoom("r")
			if tt.filter != nil {
				filtering(p, tt.filter)
			}
			r := do(t, w.engine(t), p)
			if late == nil || r.Unknown == 0 || r.Filtered != 0 {
				t.Errorf("%v: got %+v", late, r)
			}
		})
	}
	t.Run("a broadcast that names users", func(t *testing.T) {
		w := newWorld()
		for _, n := range w.nodes {
			n.answer = ack(Ack{Filtered: 1, LeftOut: []string{"u1"}})
		}
		r := do(t, w.engine(t), filtering(push(&Push{Request: Request{Kind: ToAll}}), iOS()))
		if r.Targets != 0 || len(r.NodeFailures) != 3 {
			t.Errorf("got %+v", r)
		}
	})
}

func TestFiltersThatAreRefused(t *testing.T) {
	values := func(n int) []string {
		list := make([]string, n)
		for i := range list {
			list[i] = fmt.Sprint(i)
		}
		return list
	}
	tests := map[string]struct {
		options Options
		field   string
		code    string
	}{
		"too many":          {Options{Filter: slices.Repeat(iOS(), 9)}, "options.filter", CodeTooMany},
		"no key":            {Options{Filter: []Match{{Values: []string{"x"}}}}, "options.filter[0].key", CodeRequired},
		"a long key":        {Options{Filter: []Match{{Key: strings.Repeat("x", 65), Values: []string{"x"}}}}, "options.filter[0].key", CodeIDTooLong},
		"no values":         {Options{Filter: []Match{iOS()[0], {Key: "k"}}}, "options.filter[1].values", CodeRequired},
		"too many values":   {Options{Filter: []Match{iOS()[0], {Key: "k", Values: values(33)}}}, "options.filter[1].values", CodeTooMany},
		"an empty value":    {Options{Filter: []Match{{Key: "k", Values: []string{"x", ""}}}}, "options.filter[0].values[1]", CodeRequired},
		"a long value":      {Options{Filter: []Match{{Key: "k", Values: []string{strings.Repeat("x", 65)}}}}, "options.filter[0].values[0]", CodeIDTooLong},
		"a control in one":  {Options{Filter: []Match{{Key: "k", Values: []string{"a\nb"}}}}, "options.filter[0].values[0]", CodeIDMalformed},
		"beside the store":  {Options{Filter: iOS(), Store: true, MessageID: "m"}, "options.filter", CodeUnavailable},
		"the most there is": {Options{Filter: slices.Repeat([]Match{{Key: strings.Repeat("k", 64), Values: values(32)}}, 8)}, "", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			limits := Limits{store: true}.withDefaults()
			p := toUser("u")
			p.Options = &tt.options
			err := limits.Check(&p.Request)
			invalid := &InvalidError{}
			if tt.field == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.As(err, &invalid) || invalid.Field != tt.field || invalid.Code != tt.code {
				t.Errorf("got %v, want %s of %s", err, tt.code, tt.field)
			}
		})
	}
}
