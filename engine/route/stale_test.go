package route

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func watched(d *Directory) {
	d.InvalidateAll()
	d.Vouch(time.Now().Add(1000 * time.Hour))
}

func TestKnownChangeIsAnsweredWithTheOldRouteOnlyWhileTheControllerIsAway(t *testing.T) {
	for name, vouched := range map[string]bool{"watched": true, "not watched any more": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
				d := newDirectory(t, s)
				watched(d)
				first, _ := ask(t, d, "r")
				time.Sleep(3 * time.Second)
				until := time.Now()
				s.set(func(s *source) { s.rooms["r"], s.err = room("v@B"), ErrUnavailable })
				d.Invalidate([]string{"r"}, nil)
				d.Vouch(map[bool]time.Time{true: time.Now().Add(1000 * time.Hour), false: time.Now()}[vouched])
				for range 2 { // the first time must not make it good again
					if snap, err := ask(t, d, "r"); !errors.Is(err, ErrUnavailable) || snap != nil {
						t.Fatalf("look-up that failed at a Controller that is there: %+v, %v", snap, err)
					}
				}
				s.set(func(s *source) { s.err = ErrAway })
				for range 2 {
					snap, err := ask(t, d, "r")
					if err != nil || snap.Stale == nil || !snap.Stale.Changed {
						t.Fatalf("Controller away: %+v, %v, want the old answer, marked as changed", snap, err)
					}
					if !snap.Stale.Known.Equal(until) {
						t.Errorf("known to be true until %s, want %s", snap.Stale.Known, until)
					}
					if snap.Groups[0] != first.Groups[0] {
						t.Error("the old answer has other groups")
					}
					time.Sleep(2 * time.Second)
				}
				s.set(func(s *source) { s.err = nil })
				if snap, err := ask(t, d, "r"); err != nil || snap.Stale != nil || snap.Groups[0].Node != "B" {
					t.Errorf("Controller back: %+v, %v", snap, err)
				}
			})
		})
	}
}

func TestChangeWhileItIsLookedUpIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		ask(t, d, "r")
		time.Sleep(2 * time.Second)
		s.set(func(s *source) { s.gate = make(chan struct{}) }) // the look-up will be slow
		var w teller
		d.Rooms.Ask(0, []string{"r"}, now(), &w)
		synctest.Wait()
		d.Invalidate([]string{"r"}, nil)
		time.Sleep(time.Second)
		synctest.Wait()
		if w.n != 1 || !errors.Is(w.err, ErrUnavailable) {
			t.Errorf("told %d, %+v, %v", w.n, w.snap, w.err)
		}
	})
}

func TestAnswerThatChangedWhileItCameIsNoFallback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}, gate: gate}
		d := newDirectory(t, s)
		var w teller
		d.Rooms.Ask(0, []string{"r"}, now(), &w)
		synctest.Wait()
		d.Invalidate([]string{"r"}, nil)
		var behind teller
		d.Rooms.Ask(0, []string{"r"}, now(), &behind)
		s.set(func(s *source) { s.gate, s.err = nil, ErrUnavailable })
		close(gate)
		synctest.Wait()
		if w.n != 1 || w.err != nil {
			t.Fatalf("who asked before the change: told %d, %v", w.n, w.err)
		}
		if behind.n != 1 || !errors.Is(behind.err, ErrUnavailable) {
			t.Errorf("who asked after it, in the same line: told %d, %v", behind.n, behind.err)
		}
		if snap, err := ask(t, d, "r"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("after it: %+v, %v", snap, err)
		}
	})
}

// Who waits behind a change for a newer answer does not make what has changed good again,
// when the newer answer does not come.
func TestChangeIsNotForgottenByWhoWaitsBehindIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		watched(d)
		ask(t, d, "r")
		time.Sleep(30 * time.Second)
		gate := make(chan struct{})
		s.set(func(s *source) { s.gate, s.err = gate, ErrUnavailable })
		var healer, behind teller
		d.Rooms.Refresh(0, []string{"r"}, missing(time.Now()), &healer)
		synctest.Wait()
		s.set(func(s *source) { s.rooms["r"] = room("u@A", "v@B") })
		d.Invalidate([]string{"r"}, nil)
		d.Rooms.Ask(0, []string{"r"}, now(), &behind)
		close(gate)
		synctest.Wait()
		if !errors.Is(behind.err, ErrUnavailable) {
			t.Errorf("who asked after the change: %+v, %v", behind.snap, behind.err)
		}
		s.set(func(s *source) { s.gate, s.err = nil, nil })
		time.Sleep(10 * time.Second)
		snap, err := ask(t, d, "r")
		if err != nil || snap.Users != 2 {
			t.Errorf("10 s later, the controller answers: %+v, %v", snap, err)
		}
	})
}

// The same for a change that comes while those before it are told.
func TestChangeWhileTheLineIsToldIsNotForgotten(t *testing.T) {
	for name, fails := range map[string]error{"slow": ErrUnavailable, "away": ErrAway} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
				d := newDirectory(t, s)
				watched(d)
				var behind teller
				first := teller{then: func() {
					s.set(func(s *source) { s.rooms["r"], s.err = room("u@A", "v@B"), fails })
					d.Invalidate([]string{"r"}, nil)
					d.Rooms.Ask(0, []string{"r"}, now(), &behind)
				}}
				d.Rooms.Ask(0, []string{"r"}, now(), &first)
				synctest.Wait()
				if errors.Is(fails, ErrAway) {
					if behind.err != nil || behind.snap.Stale == nil || !behind.snap.Stale.Changed {
						t.Errorf("away: %+v, %v", behind.snap, behind.err)
					}
				} else if !errors.Is(behind.err, ErrUnavailable) {
					t.Errorf("slow: %+v, %v", behind.snap, behind.err)
				}
				s.set(func(s *source) { s.err = nil })
				time.Sleep(10 * time.Second)
				snap, err := ask(t, d, "r")
				if err != nil || snap.Users != 2 {
					t.Errorf("10 s later, the controller answers: %+v, %v", snap, err)
				}
			})
		})
	}
}

func TestStaleAnswersSayUntilWhenTheyWereTrue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}, users: map[string][]string{"u": {"A"}}}
		d := newDirectory(t, s)
		asked := time.Now()
		first, _ := ask(t, d, "r")
		time.Sleep(2 * time.Second)
		s.set(func(s *source) { s.err = ErrUnavailable })
		d.InvalidateAll() // a new change stream, or a Controller that does not know: no known change
		for range 3 {
			snap, err := ask(t, d, "r")
			if err != nil || snap.Stale == nil || snap.Stale.Changed || !snap.Stale.Known.Equal(asked) {
				t.Fatalf("got %+v, %v, want the answer of %s", snap, err, asked)
			}
			time.Sleep(10 * time.Second)
		}
		s.set(func(s *source) { s.err = nil })
		if snap, _ := ask(t, d, "r"); snap != first {
			t.Errorf("an equal answer is another snapshot: %+v", snap)
		}
	})
}

// A stale answer may become visible between somebody's look into the cache and their place in
// the line: who comes after them waits, too.
func TestStaleAnswerLetsNobodyOvertake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		ask(t, d, "r")
		time.Sleep(2 * time.Second)
		gate := make(chan struct{})
		s.set(func(s *source) { s.err = ErrUnavailable })
		var healer, second teller
		first := teller{then: func() {
			if d.Rooms.Cached(0, "r", now()) != nil { // the second looks here
				t.Error("answered before the first was told")
			}
			s.set(func(s *source) { s.gate = gate })
			d.Rooms.Refresh(0, []string{"r"}, missing(now()), &healer)
		}}
		d.Rooms.Ask(0, []string{"r"}, now(), &first)
		synctest.Wait() // the first has a stale answer, the healer's look-up is at the gate
		d.Rooms.Ask(0, []string{"r"}, now(), &second)
		if second.n == 0 && d.Rooms.Cached(0, "r", now()) != nil {
			t.Error("a later query was answered before the second, which waits")
		}
		close(gate)
		synctest.Wait()
		if first.n != 1 || healer.n != 1 || second.n != 1 || second.err != nil {
			t.Errorf("told %d, %d and %d, %v", first.n, healer.n, second.n, second.err)
		}
	})
}

func TestFullPoolLeavesStaleAnswersToServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A"), "changed": room("u@A")}}
		full := false
		var tasks sync.WaitGroup
		d := newDirectory(t, s, func(c *Config) {
			c.Go = func(_ int, task func()) error {
				if full {
					return errors.New("full")
				}
				tasks.Go(task)
				return nil
			}
		})
		ask(t, d, "r")
		ask(t, d, "changed")
		time.Sleep(2 * time.Second)
		full = true
		d.Invalidate([]string{"changed"}, nil)
		if snap, err := ask(t, d, "r"); err != nil || snap.Stale == nil {
			t.Errorf("cached: %+v, %v", snap, err)
		}
		for _, r := range []string{"changed", "unknown"} {
			if _, err := ask(t, d, r); !errors.Is(err, ErrOverloaded) {
				t.Errorf("%s: %v", r, err)
			}
		}
		tasks.Wait()
	})
}

// Who is told by a look-up, and asks for a newer answer than that at once, waits behind it. The look-up has the only place.
func TestWhoWaitsForANewerAnswerNeedsNoOtherPlaceOfAFullPool(t *testing.T) {
	for _, panics := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := &source{users: map[string][]string{"u": {"A"}}, panics: panics}
			place := make(chan struct{}, 1)
			d := newDirectory(t, s, func(c *Config) {
				run := c.Go
				c.Go = func(shard int, task func()) error {
					select {
					case place <- struct{}{}:
						return run(shard, func() {
							defer func() { <-place }()
							task()
						})
					default:
						return errors.New("full")
					}
				}
			})
			second := &teller{}
			first := &teller{then: func() {
				time.Sleep(time.Nanosecond)
				s.set(func(s *source) { s.users["u"], s.panics = []string{"B"}, false })
				d.Users.Refresh(0, []string{"u"}, missing(now()), second)
			}}
			d.Users.Ask(0, []string{"u"}, now(), first)
			time.Sleep(time.Second)
			synctest.Wait()
			if panics { // the place is the task's until it has ended
				if second.n != 1 || !errors.Is(second.err, ErrOverloaded) {
					t.Errorf("after a panic: told %d times, %v", second.n, second.err)
				}
			} else if second.n != 1 || second.err != nil || second.snap.Group("B") == nil {
				t.Errorf("told %d times: %+v, %v", second.n, second.snap, second.err)
			}
		})
	}
}

func TestHitsHaveAnswersLookedUpBeforeTheyAreTooOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		ask(t, d, "r")
		time.Sleep(740 * time.Millisecond)
		d.Rooms.Cached(0, "r", now())
		synctest.Wait()
		if n := s.count(); n != 1 {
			t.Fatalf("%d look-ups before three quarters of the TTL", n)
		}
		time.Sleep(140 * time.Millisecond)
		s.set(func(s *source) { s.rooms["r"], s.gate = room("u@B"), make(chan struct{}) })
		for range 10 {
			if snap := d.Rooms.Cached(0, "r", now()); snap == nil || snap.Groups[0].Node != "A" {
				t.Fatalf("while it is looked up: %+v", snap)
			}
		}
		synctest.Wait()
		if n := s.count(); n != 2 {
			t.Errorf("%d look-ups, want one more for all hits", n)
		}
		s.set(func(s *source) { close(s.gate); s.gate = nil })
		synctest.Wait()
		time.Sleep(740 * time.Millisecond) // beyond the TTL of the first answer
		if snap := d.Rooms.Cached(0, "r", now()); snap == nil || snap.Groups[0].Node != "B" {
			t.Errorf("afterwards: %+v", snap)
		}
		// A look-up ahead of time that fails takes nothing away.
		time.Sleep(140 * time.Millisecond)
		s.set(func(s *source) { s.err = ErrUnavailable })
		d.Rooms.Cached(0, "r", now())
		synctest.Wait()
		if snap := d.Rooms.Cached(0, "r", now()); snap == nil || snap.Stale != nil {
			t.Errorf("after a failure within the TTL: %+v", snap)
		}
	})
}

func TestKeysThatCameTogetherAreNotLookedUpTogetherAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{}}
		d := newDirectory(t, s)
		const keys = 1000
		for i := range keys {
			r := fmt.Sprint("r", i)
			s.set(func(s *source) { s.rooms[r] = room("u@A") })
			ask(t, d, r)
		}
		most, before := 0, s.count()
		for range 100 {
			time.Sleep(10 * time.Millisecond)
			for i := range keys {
				if d.Rooms.Cached(0, fmt.Sprint("r", i), now()) == nil {
					t.Fatalf("r%d is not cached", i)
				}
			}
			synctest.Wait()
			n := s.count()
			most, before = max(most, n-before), n
		}
		if before != 2*keys || most > keys/4 {
			t.Errorf("%d look-ups of %d keys, up to %d within 10 ms", before, keys, most)
		}
	})
}

// ghosts asks as pushes to a room do: the node does not have some of its members.
func ghosts(t *testing.T, d *Directory, users ...string) (snap *Snapshot) {
	t.Helper()
	if _, err := ask(t, d, "r"); err != nil {
		t.Fatal(err)
	}
	var w teller
	d.Rooms.Refresh(0, []string{"r"}, Missing{Node: "A", Users: users, Since: time.Now()}, &w)
	synctest.Wait()
	if w.n != 1 || w.err != nil {
		t.Fatalf("told %d, %v", w.n, w.err)
	}
	return w.snap
}

func TestGhostCostsOneLookupInATTL(t *testing.T) {
	for name, vouched := range map[string]bool{"watched": true, "not watched": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &source{rooms: map[string][][2]string{"r": room("u@A", "ghost@A", "v@B")}}
				d := newDirectory(t, s)
				if vouched {
					watched(d)
				}
				ask(t, d, "r")
				time.Sleep(10 * time.Millisecond)
				const seconds = 30
				for range seconds * 100 {
					ghosts(t, d, "ghost")
					time.Sleep(10 * time.Millisecond)
				}
				// Not watched, it is looked up a little more often than once in a TTL anyway.
				if n := s.count(); n > seconds*4/3+2 || vouched && n > seconds+2 {
					t.Errorf("%d look-ups in %d s", n, seconds)
				}
				if st := d.Stats(); st.Confirmed < seconds*90 {
					t.Errorf("%d of %d were answered from memory", st.Confirmed, seconds*100)
				}
			})
		})
	}
}

func TestGhostDoesNotHideWhoHasMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A", "ghost@A")}}
		d := newDirectory(t, s)
		step := func() { time.Sleep(time.Millisecond) }
		ask(t, d, "r")
		step()
		ghosts(t, d, "ghost")
		step()
		s.set(func(s *source) { s.rooms["r"] = room("u@B", "ghost@A") })
		if snap := ghosts(t, d, "ghost", "u"); snap.Group("B") == nil {
			t.Fatal("u, of whom nobody had said that A does not have it, was not looked up")
		}
		step()
		s.set(func(s *source) { s.rooms["r"] = room("u@A", "ghost@A") })
		d.Invalidate([]string{"r"}, nil)
		ask(t, d, "r")
		step()
		s.set(func(s *source) { s.rooms["r"] = room("u@B", "ghost@A") })
		if snap := ghosts(t, d, "ghost", "u"); snap.Group("B") == nil {
			t.Fatal("u was on B meanwhile: what A said before holds no more")
		}
		// Quiet for two TTL: the ghost may have come and gone.
		for range 3 {
			step()
			ghosts(t, d, "ghost")
		}
		time.Sleep(2500 * time.Millisecond)
		ask(t, d, "r")
		step()
		s.set(func(s *source) { s.rooms["r"] = room("u@B", "ghost@C") })
		if snap := ghosts(t, d, "ghost"); snap.Group("C") == nil {
			t.Error("the ghost, which came back and moved, is taken for one still")
		}
	})
}

func TestRestOfTheRoomIsServedWhileAGhostIsLookedUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A", "ghost@A")}}
		d := newDirectory(t, s)
		watched(d)
		ask(t, d, "r")
		time.Sleep(time.Millisecond)
		s.set(func(s *source) { s.gate = make(chan struct{}) })
		var w teller
		d.Rooms.Refresh(0, []string{"r"}, Missing{Node: "A", Users: []string{"ghost"}, Since: time.Now()}, &w)
		synctest.Wait()
		if n := s.count(); n != 2 {
			t.Fatalf("%d look-ups", n)
		}
		if d.Rooms.Cached(0, "r", now()) == nil {
			t.Error("the room is not served meanwhile")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if w.n != 1 || !errors.Is(w.err, ErrUnavailable) {
			t.Errorf("told %d, %v", w.n, w.err)
		}
		if snap := d.Rooms.Cached(0, "r", now()); snap == nil || snap.Stale != nil {
			t.Errorf("after the look-up has failed: %+v", snap)
		}
	})
}

func TestDenialsAreForgotten(t *testing.T) {
	e := &entry{snap: &Snapshot{}, fetched: 1}
	for i := range 5000 {
		user := fmt.Sprintf("u%06d", i)
		e.snap.Groups = []*Group{{Node: "A", Users: []string{user}}}
		e.note("A", []string{user}, nanos(i*100), 1000)
		if n := len(e.absent); n > 128 {
			t.Fatalf("%d denials are kept of the last 20", n)
		}
	}
}

// newborn is a Controller that has just started.
type newborn struct {
	source

	at time.Time
}

func (n *newborn) Renewed() time.Time { return n.at }

func doubtful(t *testing.T) (*newborn, *Directory) {
	t.Helper()
	s := &newborn{source: source{rooms: map[string][][2]string{}, users: map[string][]string{"u": {"A"}}}}
	d := newDirectory(t, &s.source, func(c *Config) { c.Source = s })
	var members []string
	for i := range 1000 {
		members = append(members, fmt.Sprintf("u%04d@A", i))
	}
	s.rooms["r"] = room(members...)
	ask(t, d, "r")
	d.Users.Ask(0, []string{"u"}, now(), &teller{})
	synctest.Wait()
	time.Sleep(10 * time.Second)
	return s, d
}

func TestControllerThatMayJustHaveStartedIsNotBelievedAtOnce(t *testing.T) {
	tests := map[string]func(s *newborn){
		"a fraction of the room": func(s *newborn) { s.rooms["r"], s.users["u"] = s.rooms["r"][:24], nil },
		"no such room":           func(s *newborn) { delete(s.rooms, "r"); delete(s.users, "u") },
		"members without a node": func(s *newborn) {
			members := slices.Clone(s.rooms["r"])
			for i := range members {
				members[i][1] = ""
			}
			s.rooms["r"], s.users["u"] = members, []string{""}
		},
	}
	for name, restart := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, d := doubtful(t)
				all := s.rooms["r"]
				s.at = time.Now()
				s.set(func(*source) { restart(s) })
				for range 4 {
					snap, err := ask(t, d, "r")
					if err != nil || snap.Users != 1000 || snap.Stale == nil {
						t.Fatalf("room: %+v, %v, want the old answer", snap, err)
					}
					var w teller
					if u := d.Users.Cached(0, "u", now()); u == nil {
						d.Users.Ask(0, []string{"u"}, now(), &w)
						synctest.Wait()
						if w.err != nil || !w.snap.Found || w.snap.Stale == nil {
							t.Fatalf("user: %+v, %v, want the old answer", w.snap, w.err)
						}
					}
					time.Sleep(time.Second)
				}
				if n := d.Stats().Doubted; n != 2 {
					t.Errorf("%d look-ups were doubted, want one for each key", n)
				}
				s.set(func(*source) { s.rooms["r"], s.users["u"] = all, []string{"A"} })
				time.Sleep(time.Second)
				if snap, err := ask(t, d, "r"); err != nil || snap.Users != 1000 || snap.Stale != nil {
					t.Errorf("when the Controller knows all again: %+v, %v", snap, err)
				}
			})
		})
	}
}

func TestControllerThatStaysWithItIsBelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := doubtful(t)
		s.at = time.Now()
		s.set(func(*source) { s.rooms["r"] = s.rooms["r"][:24] })
		lookups := s.count()
		ask(t, d, "r")
		time.Sleep(doubtFor)
		if snap, err := ask(t, d, "r"); err != nil || snap.Users != 24 || snap.Stale != nil {
			t.Errorf("the second time: %+v, %v", snap, err)
		}
		if n := s.count() - lookups; n != 2 {
			t.Errorf("%d look-ups, want 2", n)
		}
		s.at = time.Now() // and again
		time.Sleep(2 * time.Second)
		s.set(func(*source) { s.rooms["r"] = s.rooms["r"][:12] })
		if snap, err := ask(t, d, "r"); err != nil || snap.Users != 12 {
			t.Errorf("half of the members: %+v, %v", snap, err)
		}
	})
}

func TestChangeThatWasAnnouncedIsNoSuccessThoughItIsDoubted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := doubtful(t)
		watched(d)
		s.at = time.Now()
		s.set(func(*source) { s.rooms["r"] = s.rooms["r"][:24] })
		d.Invalidate([]string{"r"}, nil)
		if snap, err := ask(t, d, "r"); err != nil || snap.Users != 1000 || snap.Stale == nil || !snap.Stale.Changed {
			t.Errorf("got %+v, %v, want the old answer, marked as changed", snap, err)
		}
	})
}

// stuck answers nothing about some rooms.
type stuck struct{ source }

func (s *stuck) Room(ctx context.Context, key string, add func(user, node []byte)) (bool, uint64, error) {
	if strings.HasPrefix(key, "stuck") {
		<-ctx.Done()
		return false, 0, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
	}
	time.Sleep(5 * time.Millisecond)
	return s.source.Room(ctx, key, add)
}

// TestLookupsThatHangLeavePlacesToOthers has 1,500 of them come in a second, in a pool of
// 256.
func TestLookupsThatHangLeavePlacesToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stuck{source{rooms: map[string][][2]string{}}}
		const healthy = 200
		for i := range healthy {
			s.rooms[fmt.Sprint("ok", i)] = room("u@A")
		}
		var mu sync.Mutex
		running, most := 0, 0
		var tasks sync.WaitGroup
		d := newDirectory(t, &s.source, func(c *Config) {
			c.Source = s
			c.Go = func(_ int, task func()) error {
				mu.Lock()
				defer mu.Unlock()
				if running == 256 {
					return errors.New("full")
				}
				running++
				most = max(most, running)
				tasks.Go(func() {
					task()
					mu.Lock()
					running--
					mu.Unlock()
				})
				return nil
			}
		})
		var told []*teller
		for i := range 3000 {
			d.Rooms.Ask(0, []string{fmt.Sprint("stuck", i)}, now(), &teller{})
			if i%15 == 0 {
				w := new(teller)
				told = append(told, w)
				d.Rooms.Ask(0, []string{fmt.Sprint("ok", i/15)}, now(), w)
			}
			time.Sleep(time.Second / 1500)
		}
		time.Sleep(time.Second)
		for i, w := range told {
			if w.n != 1 || w.err != nil {
				t.Fatalf("healthy room %d: told %d, %v", i, w.n, w.err)
			}
		}
		if most > 240 {
			t.Errorf("up to %d of 256 places were taken", most)
		}
		tasks.Wait()
	})
}

func TestLookupHasItsTimeWhileThePoolIsEmpty(t *testing.T) {
	d := newDirectory(t, &source{})
	for _, c := range []struct {
		running, least, most int64
	}{{1, 300, 300}, {128, 75, 77}, {256, 9, 10}, {5000, 9, 10}} {
		if got := d.timeout(c.running); got.Milliseconds() < c.least || got.Milliseconds() > c.most {
			t.Errorf("one of %d look-ups has %s, want %d to %d ms", c.running, got, c.least, c.most)
		}
	}
}
