package engine

import (
	"context"
	"errors"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// TestPushToAFewOfARoomReachesThoseAndNobodyElse pushes to some members, to somebody who is none, and looks what each node got.
func TestPushToAFewOfARoomReachesThoseAndNobodyElse(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld()
		e := w.engineFor(rt)
		w.rooms["r"] = drawPlaces(rt, "places")
		w.users = w.rooms["r"]
		all := append(slices.Sorted(maps.Keys(w.users)), "stranger")
		only := rapid.SliceOfDistinct(rapid.SampledFrom(all), rapid.ID[string]).Draw(rt, "only")
		if only == nil {
			only = []string{}
		}
		members, found, err := e.Members(context.Background(), "r")
		if err != nil || !found || !slices.Equal(append(slices.Clone(members), "stranger"), all) {
			rt.Fatalf("members %q, %v, %v", members, found, err)
		}
		p := toRoom("r")
		p.Only = only
		r, err := e.Do(context.Background(), p)
		if err != nil {
			rt.Fatal(err)
		}
		want, got := map[string][]string{}, map[string][]string{}
		targets, offline := 0, 0
		for _, user := range only {
			nodes, member := w.users[user]
			if member {
				targets++
			}
			if member && len(nodes) == 0 {
				offline++
			}
			for _, id := range nodes {
				want[id] = append(want[id], user)
			}
		}
		for id, n := range w.nodes {
			for _, d := range n.got {
				if d.Room() != "r" || d.Everybody() {
					rt.Fatalf("node %s got a delivery for room %q", id, d.Room())
				}
				got[id] = append(got[id], d.all()...)
			}
		}
		for id := range want {
			slices.Sort(want[id])
		}
		if diff := cmp.Diff(want, got); diff != "" {
			rt.Fatalf("want and got:\n%s", diff)
		}
		if r.Targets != targets || r.Offline != offline || r.Delivered != targets-offline || !r.Found {
			rt.Fatalf("%+v, want %d targets, %d of them offline", r, targets, offline)
		}
	})
}

func TestAFewMembersCannotBeChosenAndExcluded(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	p := toRoom("r", "a")
	p.Only = []string{"b"}
	_, err := e.Do(t.Context(), p)
	if invalid, is := errors.AsType[*InvalidError](err); !is || invalid.Field != "exclude_user_ids" {
		t.Errorf("%v", err)
	}
}

func TestMembersOfARoomThatIsNotKnownAndOfOneThatCannotBeAskedFor(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	if users, found, err := e.Members(t.Context(), "nowhere"); len(users) > 0 || found || err != nil {
		t.Errorf("%q %v %v", users, found, err)
	}
	w.mu.Lock()
	w.down = errors.New("away")
	w.mu.Unlock()
	if _, _, err := e.Members(t.Context(), "r"); !errors.Is(err, ErrUnavailable) {
		t.Errorf("%v", err)
	}
}
