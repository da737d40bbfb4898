package route

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// versioned is a source whose answers have a revision.
type versioned struct {
	*source

	revision uint64 // guarded by mu
}

func (v *versioned) Room(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	v.mu.Lock()
	revision := v.revision
	v.mu.Unlock()
	found, _, err := v.source.Room(ctx, room, add)
	return found, revision, err
}

// moving runs a test on a directory that a change stream vouches for. The room r has u and v on n.
func moving(t *testing.T, revision uint64, run func(v *versioned, d *Directory, ask func() *teller)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		v := &versioned{source: &source{rooms: map[string][][2]string{"r": {{"u", "n"}, {"v", "n"}}}}, revision: revision}
		d := newDirectory(t, v.source, func(c *Config) { c.Source, c.LookupTimeout = v, time.Hour })
		d.InvalidateAll()
		d.Vouch(time.Now().Add(time.Hour))
		run(v, d, func() *teller {
			w := &teller{}
			if w.snap = d.Rooms.Cached(0, "r", time.Now()); w.snap == nil {
				d.Rooms.Ask(0, []string{"r"}, time.Now(), w)
			}
			synctest.Wait()
			return w
		})
	})
}

func TestMoveThatAnAnswerHasAlreadyDoesNotUndoIt(t *testing.T) {
	moving(t, 10, func(v *versioned, d *Directory, ask func() *teller) {
		ask()
		d.Moved([]Move{{Room: "r", User: "u", Node: "n", Left: true, Revision: 9}})
		if w := ask(); !w.snap.Has("u") {
			t.Error("who has come with the answer is not in it after an older move")
		}
		for range 2 { // It may come twice.
			d.Moved([]Move{{Room: "r", User: "u", Node: "n", Left: true, Revision: 11}})
			if w := ask(); w.snap.Has("u") || !w.snap.Has("v") || w.snap.Users != 1 {
				t.Errorf("after a newer one: %v", w.snap)
			}
		}
		if v.lookups != 1 {
			t.Errorf("%d look-ups", v.lookups)
		}
	})
}

func TestAnswerThatMovesCannotBeComparedWithIsForgottenAtOne(t *testing.T) {
	for name, revision := range map[string]uint64{"without a revision": 0, "older than what was told before": 19} {
		t.Run(name, func(t *testing.T) {
			moving(t, revision, func(v *versioned, d *Directory, ask func() *teller) {
				d.Moved([]Move{{Room: "other", User: "x", Node: "n", Revision: 20}})
				ask()
				v.set(func(s *source) { s.rooms["r"] = [][2]string{{"v", "n"}} })
				d.Moved([]Move{{Room: "r", User: "u", Node: "n", Left: true, Revision: 21}})
				if d.Rooms.Cached(0, "r", time.Now()) != nil {
					t.Error("it is still answered with")
				}
				if w := ask(); w.snap.Has("u") || v.lookups != 2 {
					t.Errorf("answered with %v after %d look-ups", w.snap, v.lookups)
				}
			})
		})
	}
}

func TestMoveDuringALookUpIsInWhatIsAnsweredAfterIt(t *testing.T) {
	moving(t, 10, func(v *versioned, d *Directory, ask func() *teller) {
		gate := make(chan struct{})
		v.set(func(s *source) { s.gate = gate })
		ask()
		d.Moved([]Move{{Room: "r", User: "u", Node: "n", Left: true, Revision: 11}, {Room: "r", User: "w", Node: "m", Revision: 11}})
		after := ask()
		close(gate)
		synctest.Wait()
		for what, s := range map[string]*Snapshot{"waits": after.snap, "comes later": ask().snap} {
			if s == nil || s.Has("u") || !s.Has("v") || !s.Has("w") || s.Users != 2 {
				t.Errorf("who %s gets %v", what, s)
			}
		}
		if v.lookups != 1 {
			t.Errorf("%d look-ups", v.lookups)
		}
	})
}

// What one store has told says nothing about the answer of another one.
func TestMovesFromBeforeANewStreamAreNotAppliedToAnAnswer(t *testing.T) {
	moving(t, 10, func(v *versioned, d *Directory, ask func() *teller) {
		gate := make(chan struct{})
		v.set(func(s *source) { s.gate = gate })
		before := ask()
		d.Moved([]Move{{Room: "r", User: "u", Node: "n", Left: true, Revision: 1000}})
		after := ask()
		d.InvalidateAll()
		close(gate)
		synctest.Wait()
		if !before.snap.Has("u") || !after.snap.Has("u") {
			t.Errorf("answered with %v and %v", before.snap, after.snap)
		}
		if v.lookups != 2 { // Who has come behind the move waits for a newer answer than that.
			t.Errorf("%d look-ups", v.lookups)
		}
	})
}
