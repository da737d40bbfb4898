package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/engine/route"
)

// TestPushByAStaleRouteSaysSo holds for all kinds of push: whether it is a success is a
// matter of what the nodes answer, unless the route is known to have changed.
func TestPushByAStaleRouteSaysSo(t *testing.T) {
	for _, c := range []struct {
		name    string
		changed bool
	}{{"not confirmed", false}, {"known to have changed", true}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				e := w.engine(t)
				w.place("r", "u", "A")
				pushes := []*Push{toRoom("r"), toUser("u"), toUsers("u", "u")}
				for _, p := range pushes {
					if r := do(t, e, p); r.Stale != 0 || r.Changed || !r.Success() {
						t.Fatalf("kind %d, before: %+v", p.Kind, r)
					}
				}
				time.Sleep(3 * time.Second)
				w.mu.Lock()
				w.down = fmt.Errorf("%w: gone", route.ErrAway)
				w.mu.Unlock()
				if c.changed {
					e.directory.Invalidate([]string{"r"}, []string{"u"})
				}
				for _, p := range []*Push{toRoom("r"), toUser("u"), toUsers("u", "u")} {
					r := do(t, e, p)
					if r.Delivered != 1 || r.Stale != 3*time.Second {
						t.Errorf("kind %d: delivered %d by a route of %s ago, want 1 and 3s", p.Kind, r.Delivered, r.Stale)
					}
					if r.Changed != c.changed || r.Success() == c.changed {
						t.Errorf("kind %d: changed %v, success %v", p.Kind, r.Changed, r.Success())
					}
				}
				want := [2]uint64{3, 0}
				if c.changed {
					want[1] = 3
				}
				if s := e.Stats(); s.Stale != want[0] || s.Changed != want[1] {
					t.Errorf("%d stale and %d changed are counted, want %v", s.Stale, s.Changed, want)
				}
			})
		})
	}
}

func TestKnownChangeThatCannotBeLookedUpIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.rooms["r"] = map[string][]string{}
		if r := do(t, e, toRoom("r")); !r.Success() {
			t.Fatalf("empty room: %+v", r)
		}
		w.gate = make(chan struct{}) // a million members, which take their time
		e.directory.Invalidate([]string{"r"}, nil)
		if r, err := e.Do(context.Background(), toRoom("r")); !errors.Is(err, ErrUnavailable) {
			t.Errorf("got %+v, %v", r, err)
		}
		close(w.gate)
	})
}

// TestGhostInARoomCostsOneLookupInATTL has a node that does not have a member whom the
// Controller lists there.
func TestGhostInARoomCostsOneLookupInATTL(t *testing.T) {
	for name, script := range map[string]func(w *world){
		"a member who is not there": func(w *world) { w.nodes["A"].answer = notHere("ghost") },
		"a node that is not there":  func(w *world) { w.nodes["A"].decline = DropUnreachable },
		"a node that refuses":       func(w *world) { w.nodes["A"].answer = ack(Ack{Refused: true}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				e := w.engine(t)
				e.directory.Vouch(time.Now().Add(1000 * time.Hour))
				w.place("r", "u", "B")
				w.place("r", "ghost", "A")
				script(w)
				const seconds = 5
				for range seconds * 1000 {
					r := do(t, e, toRoom("r"))
					if r.Delivered != 1 || r.Offline+r.Failed != 1 {
						t.Fatalf("got %+v", r)
					}
					time.Sleep(time.Millisecond)
				}
				if n := w.lookedUp(); n > seconds+3 {
					t.Errorf("%d look-ups in %d s", n, seconds)
				}
			})
		})
	}
}

// TestRefusedPushLeavesNothing: an overload is no time for garbage.
func TestRefusedPushLeavesNothing(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	e.gate.closed.Store(true)
	p := toUser("u")
	p.Arrived = time.Now()
	ctx := context.Background()
	if n := testing.AllocsPerRun(1000, func() { _, _ = e.Do(ctx, p) }); n > 0 {
		t.Errorf("%v allocations for each push that is refused", n)
	}
}

// renewedWorld is a world whose Controller may just have started.
type renewedWorld struct {
	*world

	at time.Time
}

func (w *renewedWorld) Renewed() time.Time { return w.at }

// TestHealTakesNobodyForOfflineByADoubtedAnswer: where a Controller that has just started
// has a user is where the push goes; that it has not one is not believed.
func TestHealTakesNobodyForOfflineByADoubtedAnswer(t *testing.T) {
	for _, c := range []struct {
		name                       string
		push                       func() *Push
		answer                     func(w *world)
		delivered, failed, offline int
	}{
		{"room, not here", func() *Push { return toRoom("r") },
			func(w *world) { w.nodes["A"].answer = notHere("u1", "u2", "u3", "u4") }, 1, 3, 0},
		{"room, not reachable", func() *Push { return toRoom("r") },
			func(w *world) { w.nodes["A"].decline = DropUnreachable }, 1, 3, 0},
		{"user, not here", func() *Push { return toUser("u2") },
			func(w *world) { w.nodes["A"].answer = notHere("u2") }, 0, 1, 0},
		{"users, not here", func() *Push { return toUsers("u1", "u2", "u3", "u4") },
			func(w *world) {
				w.nodes["A"].answer = func(d *Delivery) { _, _ = d.Ack(Ack{NotHere: slices.Clone(d.Users())}) }
			}, 1, 3, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				source := &renewedWorld{world: w}
				w.tune = func(c *route.Config) { c.Source = source }
				e := w.engine(t)
				users := []string{"u1", "u2", "u3", "u4"}
				for _, u := range users {
					w.place("r", u, "A")
				}
				do(t, e, toRoom("r"))
				do(t, e, toUsers(users...))
				time.Sleep(10 * time.Second)
				source.at = time.Now()
				for _, u := range users {
					w.place("r", u)
				}
				w.place("r", "u1", "B")
				c.answer(w)
				for i := range 3 { // by one look-up, and by those that it spares
					r := do(t, e, c.push())
					if r.Delivered != c.delivered || r.Failed != c.failed || r.Offline != c.offline || r.Success() {
						t.Errorf("push %d: %+v, success %v; want %d delivered, %d failed, %d offline", i, r, r.Success(), c.delivered, c.failed, c.offline)
					}
					time.Sleep(100 * time.Millisecond)
				}
				if n := w.lookedUp(); n > 12 {
					t.Errorf("%d look-ups", n)
				}
				// When the time is over it is believed.
				time.Sleep(5 * time.Second)
				if r := do(t, e, c.push()); r.Failed != 0 || r.Delivered != c.delivered {
					t.Errorf("5 s later: %+v", r)
				}
			})
		})
	}
}
