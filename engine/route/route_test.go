package route

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// source is a Controller in memory. Look-ups wait for gate if there is one.
type source struct {
	mu      sync.Mutex
	rooms   map[string][][2]string // user, node
	users   map[string][]string
	err     error
	panics  bool
	gate    chan struct{}
	lookups int
}

func (s *source) enter(ctx context.Context) error {
	s.mu.Lock()
	s.lookups++
	gate, err, panics := s.gate, s.err, s.panics
	s.mu.Unlock()
	if panics {
		panic("source")
	}
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
	return err
}

func (s *source) Room(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	s.mu.Lock()
	members, ok := s.rooms[room] // the answer is fixed before the gate opens
	s.mu.Unlock()
	if err := s.enter(ctx); err != nil {
		return false, 0, err
	}
	for _, m := range members {
		add([]byte(m[0]), []byte(m[1]))
	}
	return ok, 0, nil
}

func (s *source) Users(ctx context.Context, users []string, nodes [][]string) error {
	s.mu.Lock()
	for i, user := range users {
		nodes[i] = s.users[user]
	}
	s.mu.Unlock()
	return s.enter(ctx)
}

func (s *source) set(f func(*source)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

func (s *source) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lookups
}

func newDirectory(t *testing.T, s *source, change ...func(*Config)) *Directory {
	t.Helper()
	var tasks sync.WaitGroup
	c := Config{
		Source: s, Shards: 1, Shard: func(string) int { return 0 },
		Go: func(_ int, task func()) error {
			tasks.Go(func() {
				defer func() { _ = recover() }() // as the pool does
				task()
			})
			return nil
		},
	}
	for _, f := range change {
		f(&c)
	}
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tasks.Wait(); d.Close() })
	return d
}

// teller records what it is told, under its name, in a shared list.
type teller struct {
	name string
	told *[]string
	mu   *sync.Mutex
	snap *Snapshot
	err  error
	n    int
	then func()
	own  sync.Mutex // several look-ups may tell at once
}

func (w *teller) Lookup(ctx context.Context, _ string) (context.Context, func(error)) {
	return ctx, func(error) {}
}

func (w *teller) Routed(keys []string, snaps []*Snapshot, err error) {
	w.own.Lock()
	defer w.own.Unlock()
	if w.mu != nil {
		w.mu.Lock()
		*w.told = append(*w.told, w.name)
		w.mu.Unlock()
	}
	w.n += len(keys)
	w.err = err
	if len(snaps) > 0 {
		w.snap = snaps[0]
	}
	if w.then != nil {
		w.then()
	}
}

func now() time.Time { return time.Now() }

// askUsers gets what is cached and asks for the rest.
func askUsers(d *Directory, users []string, snaps []*Snapshot, w Waiter) {
	var missing []string
	for i, user := range users {
		if snaps[i] = d.Users.Cached(0, user, time.Now()); snaps[i] == nil {
			missing = append(missing, user)
		}
	}
	if len(missing) > 0 {
		d.Users.Ask(0, missing, time.Now(), w)
	}
}

// missing is that A does not have u.
func missing(since time.Time) Missing {
	return Missing{Node: "A", Users: []string{"u"}, Since: since}
}

// ask waits for the snapshot of a room.
func ask(t *testing.T, d *Directory, room string) (*Snapshot, error) {
	t.Helper()
	if s := d.Rooms.Cached(0, room, now()); s != nil {
		return s, nil
	}
	w := &teller{}
	d.Rooms.Ask(0, []string{room}, now(), w)
	synctest.Wait()
	if w.n != 1 {
		t.Fatalf("told %d times", w.n)
	}
	return w.snap, w.err
}

func room(pairs ...string) [][2]string {
	var members [][2]string
	for _, p := range pairs {
		user, node, _ := strings.Cut(p, "@")
		members = append(members, [2]string{user, node})
	}
	return members
}

func TestManyAsksOneLookupAnswersInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}, gate: make(chan struct{})}
		d := newDirectory(t, s)
		var told []string
		var mu sync.Mutex
		var want []string
		for i := range 10_000 {
			name := fmt.Sprint(i)
			want = append(want, name)
			d.Rooms.Ask(0, []string{"r"}, now(), &teller{name: name, told: &told, mu: &mu})
		}
		synctest.Wait()
		close(s.gate)
		synctest.Wait()
		if n := s.count(); n != 1 {
			t.Errorf("%d look-ups", n)
		}
		if !slices.Equal(told, want) {
			t.Errorf("told out of order")
		}
		if d.Rooms.Cached(0, "r", now()) == nil {
			t.Error("not in the cache afterwards")
		}
	})
}

func TestAnswersAreGoodForTheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		first, _ := ask(t, d, "r")
		time.Sleep(749 * time.Millisecond)
		if again, _ := ask(t, d, "r"); again != first || s.count() != 1 {
			t.Errorf("looked up again within the TTL")
		}
		time.Sleep(251 * time.Millisecond)
		if again, _ := ask(t, d, "r"); again != first || s.count() != 2 {
			t.Errorf("%d look-ups; an equal answer must be the same snapshot", s.count())
		}
	})
}

func TestAbsenceIsNotCachedUnlessWatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{}}
		d := newDirectory(t, s)
		for range 3 {
			if snap, err := ask(t, d, "r"); err != nil || snap.Found {
				t.Fatalf("got %+v, %v", snap, err)
			}
		}
		if n := s.count(); n != 3 {
			t.Errorf("%d look-ups", n)
		}
		d.InvalidateAll()
		d.Vouch(time.Now().Add(1000 * time.Hour))
		ask(t, d, "r")
		ask(t, d, "r")
		if n := s.count(); n != 4 {
			t.Errorf("%d look-ups while watched", n)
		}
		s.set(func(s *source) { s.rooms["r"] = room("u@A") })
		d.Invalidate([]string{"r"}, nil)
		if snap, _ := ask(t, d, "r"); !snap.Found {
			t.Error("the change was not seen")
		}
	})
}

func TestWatchedAnswersLiveUntilChangedOrTheStreamBreaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		d.InvalidateAll()
		d.Vouch(time.Now().Add(1000 * time.Hour))
		ask(t, d, "r")
		time.Sleep(time.Hour)
		ask(t, d, "r")
		if n := s.count(); n != 1 {
			t.Errorf("%d look-ups", n)
		}
		d.Vouch(time.Now())
		ask(t, d, "r")
		if n := s.count(); n != 2 {
			t.Errorf("%d look-ups after the stream broke", n)
		}
		d.InvalidateAll()
		d.Vouch(time.Now().Add(1000 * time.Hour))
		ask(t, d, "r")
		if n := s.count(); n != 3 {
			t.Errorf("%d look-ups after it came back", n)
		}
	})
}

func TestAskAfterAChangeNeverGetsTheAnswerFromBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}, gate: gate}
		d := newDirectory(t, s)
		d.InvalidateAll()
		d.Vouch(time.Now().Add(1000 * time.Hour))
		var before, after teller
		d.Rooms.Ask(0, []string{"r"}, now(), &before)
		synctest.Wait() // the old answer is on its way
		s.set(func(s *source) { s.rooms["r"], s.gate = room("u@A", "v@B"), nil })
		d.Invalidate([]string{"r"}, nil)
		d.Rooms.Ask(0, []string{"r"}, now(), &after)
		close(gate)
		synctest.Wait()
		if before.snap.Users != 1 || after.snap == nil || after.snap.Users != 2 {
			t.Errorf("before the change %+v, after it %+v", before.snap, after.snap)
		}
		if snap, _ := ask(t, d, "r"); snap.Users != 2 {
			t.Errorf("cached %+v", snap)
		}
	})
}

func TestStaleAnswerServesWhileTheControllerIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		ask(t, d, "r")
		s.set(func(s *source) { s.err = ErrUnavailable })
		time.Sleep(2 * time.Second)
		if snap, err := ask(t, d, "r"); err != nil || snap.Users != 1 {
			t.Errorf("got %+v, %v", snap, err)
		}
		tries := s.count()
		ask(t, d, "r")
		if s.count() != tries {
			t.Error("each push asks a Controller that is away")
		}
		if _, err := ask(t, d, "other"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("uncached: %v", err)
		}
		time.Sleep(2 * time.Minute)
		if _, err := ask(t, d, "r"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("beyond the stale TTL: %v", err)
		}
	})
}

func TestLookupIsBoundedInTimeAndSurvivesAPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{gate: make(chan struct{})}
		d := newDirectory(t, s)
		var w teller
		d.Rooms.Ask(0, []string{"r"}, now(), &w)
		time.Sleep(301 * time.Millisecond)
		synctest.Wait()
		if w.n != 1 || !errors.Is(w.err, ErrUnavailable) {
			t.Errorf("after the timeout: told %d, %v", w.n, w.err)
		}
		s.set(func(s *source) { s.panics = true })
		if _, err := ask(t, d, "r"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("after a panic: %v", err)
		}
		s.set(func(s *source) { s.panics, s.gate = false, nil })
		if _, err := ask(t, d, "r"); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})
}

func TestFullPoolIsAnErrorForTheWholeLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := errors.New("full")
		d := newDirectory(t, &source{}, func(c *Config) { c.Go = func(int, func()) error { return full } })
		if _, err := ask(t, d, "r"); !errors.Is(err, ErrOverloaded) || !errors.Is(err, full) {
			t.Errorf("room: %v", err)
		}
		w := &teller{}
		askUsers(d, []string{"u", "v"}, make([]*Snapshot, 2), w)
		if w.n != 2 || !errors.Is(w.err, ErrOverloaded) {
			t.Errorf("users: told %d, %v", w.n, w.err)
		}
		if n := d.Stats().Waiting; n != 0 {
			t.Errorf("%d still waiting", n)
		}
	})
}

func TestUsersShareOneLookupAndAreToldTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{users: map[string][]string{"a": {"A"}, "b": {"A", "B"}, "c": {"C"}}}
		d := newDirectory(t, s)
		var w teller
		calls := 0
		w.then = func() { calls++ }
		askUsers(d, []string{"a", "b"}, make([]*Snapshot, 2), &w)
		synctest.Wait()
		if s.count() != 1 || calls != 1 || w.n != 2 {
			t.Errorf("%d look-ups, told %d keys in %d calls", s.count(), w.n, calls)
		}
		snaps := make([]*Snapshot, 3)
		askUsers(d, []string{"a", "b", "c"}, snaps, &w)
		synctest.Wait()
		if snaps[0] == nil || snaps[1] == nil || snaps[2] != nil || s.count() != 2 || w.n != 3 {
			t.Errorf("got %v, %d look-ups, told %d", snaps, s.count(), w.n)
		}
		if !slices.Equal(snaps[1].Shared, []string{"b"}) {
			t.Errorf("user on two nodes: %+v", snaps[1])
		}
	})
}

func TestRefreshLooksUpOnceForAllWhoKnowBetter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		used := time.Now()
		ask(t, d, "r")
		time.Sleep(time.Millisecond)
		since := time.Now()
		s.set(func(s *source) { s.rooms["r"] = room("u@B") })
		time.Sleep(time.Millisecond) // the answer may be there before b asks, and is newer
		var a, b, c teller
		d.Rooms.Refresh(0, []string{"r"}, missing(since), &a)
		d.Rooms.Refresh(0, []string{"r"}, missing(since), &b)
		synctest.Wait()
		time.Sleep(time.Millisecond)
		d.Rooms.Refresh(0, []string{"r"}, missing(used), &c) // the answer is newer than what c used
		if s.count() != 2 {
			t.Errorf("%d look-ups", s.count())
		}
		for _, w := range []*teller{&a, &b, &c} {
			if w.n != 1 || w.snap.Groups[0].Node != "B" {
				t.Errorf("told %d, %+v", w.n, w.snap)
			}
		}
	})
}

// TestSnapshotsSayWhatTheControllerSaid compares snapshots with a plain model, for
// members in any order, with duplicates, on several nodes or none.
// Who has an answer asks again before the line is gone: the answer is not older, and no
// look-up is made for it.
func TestNobodyGetsAnOlderAnswerThanTheyHad(t *testing.T) {
	for name, again := range map[string]func(d *Directory, w Waiter){
		"a push": func(d *Directory, w Waiter) {
			if snap := d.Rooms.Cached(0, "r", now()); snap != nil {
				w.Routed([]string{"r"}, []*Snapshot{snap}, nil)
				return
			}
			d.Rooms.Ask(0, []string{"r"}, now(), w)
		},
		"a push that was contradicted before the look-up": func(d *Directory, w Waiter) {
			d.Rooms.Refresh(0, []string{"r"}, missing(time.Now().Add(-time.Nanosecond)), w)
		},
		"a push that is contradicted as the one before was": func(d *Directory, w Waiter) {
			d.Rooms.Refresh(0, []string{"r"}, Missing{Node: "A", Users: []string{"ghost"}, Since: time.Now()}, w)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &source{rooms: map[string][][2]string{"r": room("u@A", "ghost@A")}}
				d := newDirectory(t, s)
				ask(t, d, "r")
				time.Sleep(time.Millisecond)
				s.set(func(s *source) { s.rooms["r"] = room("u@B", "ghost@A") })
				since := time.Now()
				time.Sleep(time.Millisecond)
				var second teller
				first := teller{then: func() { again(d, &second) }}
				d.Rooms.Refresh(0, []string{"r"}, Missing{Node: "A", Users: []string{"u", "ghost"}, Since: since}, &first)
				synctest.Wait()
				if first.n != 1 || second.n != 1 || second.err != nil || second.snap != first.snap || first.snap.Group("B") == nil {
					t.Errorf("first told %d, %+v, then %d, %+v, %v", first.n, first.snap, second.n, second.snap, second.err)
				}
				if n := s.count(); n != 2 {
					t.Errorf("%d look-ups, want 2", n)
				}
				if snap := d.Rooms.Cached(0, "r", now()); snap != first.snap {
					t.Errorf("%+v is in the cache, want %+v", snap, first.snap)
				}
			})
		})
	}
}

// Who refreshes an answer that is just being told stands behind those who wait for it.
func TestRefreshPassesNobodyInLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		ask(t, d, "r")
		gate := make(chan struct{})
		s.set(func(s *source) { s.gate = gate })
		time.Sleep(time.Millisecond)
		since := time.Now()
		time.Sleep(time.Millisecond)
		var mu sync.Mutex
		var told []string
		third := &teller{name: "third", told: &told, mu: &mu}
		second := &teller{name: "second", told: &told, mu: &mu}
		first := &teller{name: "first", told: &told, mu: &mu, then: func() { d.Rooms.Refresh(0, []string{"r"}, missing(since), third) }}
		d.Rooms.Refresh(0, []string{"r"}, missing(since), first)
		d.Rooms.Refresh(0, []string{"r"}, missing(since), second)
		synctest.Wait()
		close(gate)
		synctest.Wait()
		if !slices.Equal(told, []string{"first", "second", "third"}) {
			t.Errorf("told %v", told)
		}
	})
}

// Where more ask than can be told, the line does not come to its end. What it tells gets no older
// than any other answer all the same, and neither does an error.
func TestLineThatDoesNotEndTellsNoOldAnswers(t *testing.T) {
	for name, down := range map[string]error{"answers": nil, "errors": ErrUnavailable} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &source{rooms: map[string][][2]string{"r": room("u@A")}, err: down}
				d := newDirectory(t, s)
				asks := 0
				var w teller
				w.then = func() {
					if asks++; asks > 100 { // of 50 ms
						return
					}
					w.own.Unlock() // of the one that is being told
					d.Rooms.Ask(0, []string{"r"}, now(), &w)
					time.Sleep(50 * time.Millisecond)
					w.own.Lock()
				}
				d.Rooms.Ask(0, []string{"r"}, now(), &w)
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if n := s.count(); asks <= 100 || n < 4 {
					t.Errorf("%d look-ups for %d who asked within 5 s", n, asks)
				}
			})
		})
	}
}

// Pushes go on with what is known while somebody who knows better has it looked up once more.
func TestAnswerIsVisibleWhileTheNextIsLookedUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		ask(t, d, "r")
		s.set(func(s *source) { s.rooms["r"] = room("u@A", "v@B") })
		time.Sleep(time.Millisecond)
		gate := make(chan struct{})
		var second teller
		first := teller{then: func() {
			s.set(func(s *source) { s.gate = gate })
			time.Sleep(time.Millisecond)
			d.Rooms.Refresh(0, []string{"r"}, Missing{Node: "A", Users: []string{"v"}, Since: time.Now()}, &second)
		}}
		d.Rooms.Refresh(0, []string{"r"}, missing(time.Now().Add(-time.Nanosecond)), &first)
		synctest.Wait() // at the gate
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if snap := d.Rooms.Cached(0, "r", now()); snap == nil || snap != first.snap || second.n != 0 {
			t.Errorf("%+v is in the cache, want %+v; second told %d", snap, first.snap, second.n)
		}
		close(gate)
		synctest.Wait()
		if n := s.count(); n != 3 || second.n != 1 || second.snap != first.snap {
			t.Errorf("%d look-ups; second told %d, %+v", n, second.n, second.snap)
		}
	})
}

func TestSnapshotsSayWhatTheControllerSaid(t *testing.T) {
	seed := maphash.MakeSeed()
	rapid.Check(t, func(rt *rapid.T) {
		draw := func(label string) map[string][]string {
			m := map[string][]string{}
			for range rapid.IntRange(0, 12).Draw(rt, label) {
				u := rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f"}).Draw(rt, "user")
				m[u] = append(m[u], rapid.SampledFrom([]string{"", "A", "B", "C"}).Draw(rt, "node"))
			}
			return m
		}
		build := func(m map[string][]string, old *Snapshot) *Snapshot {
			b := newBuilder(seed, newNames())
			type pair struct{ user, node string }
			var pairs []pair
			for _, u := range slices.Sorted(maps.Keys(m)) {
				for _, n := range m[u] {
					pairs = append(pairs, pair{u, n})
				}
			}
			for _, p := range rapid.Permutation(pairs).Draw(rt, "order") {
				b.add([]byte(p.user), []byte(p.node))
			}
			return b.snapshot(true, old)
		}
		first := draw("members")
		s := build(first, nil)
		verify(rt, s, first)
		if build(first, s) != s {
			rt.Fatal("an equal answer is another snapshot")
		}
		second := draw("members later")
		next := build(second, s)
		verify(rt, next, second)
		for _, g := range next.Groups {
			if old := s.Group(g.Node); old != nil && slices.Equal(old.Users, g.Users) && old != g && old.hash == g.hash {
				rt.Fatalf("unchanged group of %s is another pointer", g.Node)
			}
		}
	})
}

func verify(rt *rapid.T, s *Snapshot, m map[string][]string) {
	users := 0
	for user, nodes := range m {
		users++
		on := map[string]bool{}
		for _, n := range nodes {
			if n != "" {
				on[n] = true
			}
		}
		for _, id := range []string{"A", "B", "C"} {
			g := s.Group(id)
			if (g != nil && g.Has(user)) != on[id] {
				rt.Fatalf("%s on %s: want %v in %+v", user, id, on[id], s)
			}
		}
		if slices.Contains(s.Shared, user) != (len(on) > 1) {
			rt.Fatalf("shared %v, %s is on %v", s.Shared, user, on)
		}
		if slices.Contains(s.Unplaced, user) != (len(on) == 0) {
			rt.Fatalf("unplaced %v, %s is on %v", s.Unplaced, user, on)
		}
	}
	if s.Users != users {
		rt.Fatalf("%d users, want %d: %+v", s.Users, users, s)
	}
	for _, g := range s.Groups {
		if !slices.IsSorted(g.Users) || len(slices.Compact(slices.Clone(g.Users))) != len(g.Users) {
			rt.Fatalf("group of %s: %v", g.Node, g.Users)
		}
	}
}

func TestAnswersThatWereVouchedForServeWhileTheControllerIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		d.InvalidateAll()
		d.Vouch(time.Now().Add(1000 * time.Hour))
		ask(t, d, "r")
		time.Sleep(time.Hour) // the change stream vouches for it all the time
		s.set(func(s *source) { s.err = ErrUnavailable })
		d.Vouch(time.Now())
		time.Sleep(30 * time.Second)
		if snap, err := ask(t, d, "r"); err != nil || snap.Users != 1 {
			t.Errorf("got %+v, %v", snap, err)
		}
		time.Sleep(31 * time.Second)
		if _, err := ask(t, d, "r"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("beyond the stale TTL: %v", err)
		}
	})
}

func TestRefreshTakesNoAnswerThatIsNotTheControllers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		ask(t, d, "r")
		time.Sleep(time.Millisecond)
		s.set(func(s *source) { s.err = ErrUnavailable })
		gate := make(chan struct{})
		s.set(func(s *source) { s.gate = gate })
		var first, second teller
		d.Rooms.Refresh(0, []string{"r"}, missing(time.Now()), &first)
		synctest.Wait()
		d.Rooms.Refresh(0, []string{"r"}, missing(time.Now()), &second)
		var push teller
		d.Rooms.Ask(0, []string{"r"}, now(), &push)
		close(gate)
		synctest.Wait()
		for _, w := range []*teller{&first, &second} {
			if w.n != 1 || !errors.Is(w.err, ErrUnavailable) {
				t.Errorf("told %d: %+v, %v", w.n, w.snap, w.err)
			}
		}
		if push.n != 1 || push.err != nil {
			t.Errorf("a push is not served: %v", push.err)
		}
	})
}

func TestRefreshTakesNoAnswerThatHasChangedSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		d.InvalidateAll()
		d.Vouch(time.Now().Add(1000 * time.Hour))
		began := time.Now()
		time.Sleep(time.Millisecond)
		ask(t, d, "r")
		s.set(func(s *source) { s.rooms["r"] = room("u@B") })
		d.Invalidate([]string{"r"}, nil)
		var w teller
		d.Rooms.Refresh(0, []string{"r"}, missing(began), &w)
		synctest.Wait()
		if w.n != 1 || w.snap.Groups[0].Node != "B" {
			t.Errorf("told %d: %+v", w.n, w.snap)
		}
	})
}

func TestAllWhoWaitForTheSameUsersAreToldTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const users, asks = 10_000, 4
		s := &source{users: map[string][]string{}, gate: make(chan struct{})}
		var names []string
		for i := range users {
			u := fmt.Sprintf("u%05d", i)
			names, s.users[u] = append(names, u), []string{"A"}
		}
		d := newDirectory(t, s)
		var told [asks]teller
		var calls [asks]int
		for i := range told {
			told[i].then = func() { calls[i]++ }
			askUsers(d, names, make([]*Snapshot, users), &told[i])
		}
		synctest.Wait()
		d.Invalidate(nil, names) // whoever asks from now on wants a newer answer
		var after teller
		askUsers(d, names, make([]*Snapshot, users), &after)
		close(s.gate)
		synctest.Wait()
		for i := range told {
			if told[i].n != users || calls[i] > 2*users/drainBatch {
				t.Errorf("ask %d: told %d keys in %d calls", i, told[i].n, calls[i])
			}
		}
		if n := s.count(); after.n != users || n > 2+users/drainBatch {
			t.Errorf("after the change: told %d keys, %d look-ups", after.n, n)
		}
	})
}
