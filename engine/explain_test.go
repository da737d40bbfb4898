package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// TestExplainNamesWhatAPushDoes explains a push, makes it, and compares: the nodes, the users of each, who is offline and who is
// excluded, and that nothing was sent for the explanation.
func TestExplainNamesWhatAPushDoes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld()
		e := w.engineFor(rt)
		w.rooms["r"] = drawPlaces(rt, "places")
		w.users = w.rooms["r"]
		users := slices.Sorted(maps.Keys(w.users))
		kinds := []func() *Push{
			func() *Push { return toRoom("r", "u1", "u1", "u4", "x") }, func() *Push { return toRoom("nowhere") },
			func() *Push { return toUser("u2") }, func() *Push { return toUsers(append(users, "x")...) },
			func() *Push { return push(&Push{Request: Request{Kind: ToAll}}) },
		}
		mk := rapid.SampledFrom(kinds).Draw(rt, "push")
		if rapid.Bool().Draw(rt, "cached") {
			if _, err := e.Do(context.Background(), mk()); err != nil {
				rt.Fatal(err)
			}
			for _, n := range w.nodes {
				n.got = nil
			}
		}
		asked := w.lookedUp()
		x, err := e.Explain(context.Background(), mk(), rapid.Bool().Draw(rt, "refresh"))
		if err != nil {
			rt.Fatal(err)
		}
		if n := w.lookedUp() - asked; x.LookedUp == 0 && n > 0 || n > x.LookedUp {
			rt.Fatalf("%d look-ups, and %+v", n, x)
		}
		planned := map[string][]string{}
		for _, p := range x.Planned {
			if p.Link.State != "up" || p.Link.Verdict != Sent || p.Size <= 0 {
				rt.Fatalf("planned %+v", p)
			}
			planned[p.Node] = append(planned[p.Node], p.Users...)
		}
		for id, n := range w.nodes {
			if len(n.got) > 0 {
				rt.Fatalf("node %s got something for an explanation", id)
			}
		}
		p := mk()
		r, err := e.Do(context.Background(), p)
		if err != nil {
			rt.Fatal(err)
		}
		done := map[string][]string{}
		for id, n := range w.nodes {
			for _, d := range n.got {
				done[id] = append(done[id], d.all()...)
			}
		}
		for _, all := range []map[string][]string{planned, done} {
			for id := range all {
				slices.Sort(all[id])
			}
		}
		if diff := cmp.Diff(done, planned); diff != "" {
			rt.Fatalf("done and explained differ:\n%s", diff)
		}
		if p.Kind != ToAll && (x.Targets != r.Targets || len(x.Offline) != r.Offline) || x.Found != r.Found {
			rt.Fatalf("%+v, and done %+v", x, r)
		}
		if p.Kind == ToRoom && p.Room == "r" {
			want := slices.DeleteFunc([]string{"u1", "u4"}, func(user string) bool { _, is := w.users[user]; return !is })
			if !slices.Equal(x.Excluded, want) {
				rt.Fatalf("excluded %v, want %v", x.Excluded, want)
			}
		}
		if n := e.InFlight(); n != 0 {
			rt.Fatalf("%d in flight", n)
		}
	})
}

func TestExplainSaysWhatAKeysRouteIsWorth(t *testing.T) {
	w := newWorld()
	w.users = map[string][]string{"u": {"A"}, "v": {"B"}}
	e := w.engine(t)
	do(t, e, toUser("u"))
	for known := (time.Time{}); known.IsZero(); { // It is in memory when all who waited for it have been told.
		known, _ = e.directory.Users.Known("u")
	}
	w.down = errors.New("away")
	x, err := e.Explain(context.Background(), toUsers("u", "v"), false)
	if err != nil || x.Cached != 1 || x.LookedUp != 1 || !slices.Equal(x.Unlocated, []string{"v"}) || x.Err == nil || len(x.Planned) != 1 {
		t.Errorf("with the controller away: %+v, %v", x, err)
	}
	if age := time.Since(x.Known); age < 0 || age > time.Minute || x.Watched {
		t.Errorf("known %v ago, watched %v", age, x.Watched)
	}
	w.down = nil
	w.nodes["A"].decline = DropQueueFull
	delete(w.nodes, "B")
	x, err = e.Explain(context.Background(), toUsers("u", "v"), true)
	if err != nil || x.Cached != 0 || x.LookedUp != 2 || len(x.Planned) != 2 {
		t.Fatalf("refreshed: %+v, %v", x, err)
	}
	var verdicts []string
	for _, p := range x.Planned {
		verdicts = append(verdicts, fmt.Sprint(p.Node, ": ", p.Link.Verdict))
	}
	if want := []string{"A: queue full", "B: node not registered"}; !slices.Equal(verdicts, want) {
		t.Errorf("verdicts %q, want %q", verdicts, want)
	}
}

func TestExplainRefusesWhatAPushWouldBeRefusedFor(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	var invalid *InvalidError
	if _, err := e.Explain(context.Background(), toUser(""), false); !errors.As(err, &invalid) || invalid.Field != "user_id" {
		t.Errorf("no id: %v", err)
	}
	w.gate = make(chan struct{})
	defer close(w.gate)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := e.Explain(ctx, toUser("u"), false); !errors.Is(err, ErrCanceled) {
		t.Errorf("canceled: %v", err)
	}
	w.linksPanic = true
	if _, err := e.Explain(context.Background(), push(&Push{Request: Request{Kind: ToAll}}), false); !errors.Is(err, ErrInternal) {
		t.Errorf("panic: %v", err)
	}
}
