package route

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// askUnion waits for the union of some rooms.
func askUnion(t *testing.T, d *Directory, rooms ...string) (*Snapshot, error) {
	t.Helper()
	u := d.Union(rooms)
	if s := u.Cached(now()); s != nil {
		return s, nil
	}
	w := &teller{}
	u.Ask(now(), w)
	synctest.Wait()
	if w.n != 1 {
		t.Fatalf("told %d times", w.n)
	}
	return w.snap, w.err
}

func TestUnionIsKeptAndBroughtUpToDate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &versioned{source: &source{rooms: map[string][][2]string{
			"r": room("u@A", "v@A", "w@B"), "s": room("v@A", "x@B"),
		}}, revision: 1}
		d := newDirectory(t, v.source, func(c *Config) { c.Source = v })
		d.InvalidateAll()
		d.Vouch(time.Now().Add(time.Hour))
		first, err := askUnion(t, d, "r", "s")
		if err != nil || first.Users != 4 || !slices.Equal(first.Group("A").Users, []string{"u", "v"}) || !slices.Equal(first.Group("B").Users, []string{"w", "x"}) {
			t.Fatalf("%+v, %v", first, err)
		}
		if again := d.Union([]string{"r", "s"}).Cached(now()); again != first {
			t.Error("an answer that has not changed is another one")
		}
		// v leaves one room and stays in the other: the same users, the same answer.
		d.Moved([]Move{{Room: "r", User: "v", Node: "A", Left: true, Revision: 2}})
		if s := d.Union([]string{"r", "s"}).Cached(now()); s != first {
			t.Errorf("%+v", s)
		}
		// Then the other one, and y comes: only what has changed is new.
		d.Moved([]Move{{Room: "s", User: "v", Node: "A", Left: true, Revision: 3}, {Room: "s", User: "y", Node: "A", Revision: 4}})
		s := d.Union([]string{"r", "s"}).Cached(now())
		if s == nil || s.Users != 4 || !slices.Equal(s.Group("A").Users, []string{"u", "y"}) || s.Group("B") != first.Group("B") {
			t.Errorf("%+v", s)
		}
		d.Invalidate([]string{"s"}, nil)
		if s := d.Union([]string{"r", "s"}).Cached(now()); s != nil {
			t.Errorf("of a room that is not known any more: %+v", s)
		}
		if n := v.count(); n != 2 {
			t.Errorf("%d look-ups, want one for each room", n)
		}
		if n := d.Stats().Unions; n != 1 {
			t.Errorf("%d unions are kept", n)
		}
	})
}

func TestUnionLooksUpFewRoomsAtATimeAndTellsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		running, most := 0, 0
		s := &source{rooms: map[string][][2]string{}}
		var list []string
		for i := range 200 {
			name := fmt.Sprint("r", i)
			list = append(list, name)
			s.rooms[name] = room(fmt.Sprintf("u%d@A", i), "all@B")
		}
		slow := sourceFunc(func(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
			mu.Lock()
			running++
			most = max(most, running)
			mu.Unlock()
			time.Sleep(time.Millisecond)
			mu.Lock()
			running--
			mu.Unlock()
			return s.Room(ctx, room, add)
		})
		d := newDirectory(t, s, func(c *Config) { c.Source, c.TTL, c.Places = slow, time.Hour, 32 })
		u := d.Union(list)
		var told []string
		var tellers []*teller
		for i := range 5 {
			w := &teller{name: fmt.Sprint(i), told: &told, mu: &mu}
			tellers = append(tellers, w)
			u.Ask(now(), w)
			time.Sleep(time.Millisecond)
		}
		if u.Cached(now()) != nil {
			t.Error("somebody overtakes those who wait")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if !slices.Equal(told, []string{"0", "1", "2", "3", "4"}) || most != 8 || s.count() != 200 {
			t.Errorf("told %v, %d look-ups at a time, %d in all", told, most, s.count())
		}
		for _, w := range tellers {
			if w.err != nil || w.snap.Users != 201 {
				t.Errorf("%s: %v, %v", w.name, w.snap, w.err)
			}
		}
		if u.Cached(now()) == nil {
			t.Error("it is not in memory")
		}
	})
}

// sourceFunc is a Source of rooms.
type sourceFunc func(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error)

func (f sourceFunc) Room(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	return f(ctx, room, add)
}
func (sourceFunc) Users(context.Context, []string, [][]string) error { return nil }

func TestUnionOfRoomsThatCannotAllBeLookedUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A"), "s": room("v@B")}}
		down := true
		d := newDirectory(t, s, func(c *Config) {
			c.Source = sourceFunc(func(ctx context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
				if room == "s" && down {
					return false, 0, ErrAway
				}
				return s.Room(ctx, room, add)
			})
		})
		snap, err := askUnion(t, d, "r", "s")
		partial, is := errors.AsType[*PartialError](err)
		if !is || partial.Rooms != 1 || !errors.Is(err, ErrAway) || snap == nil || snap.Users != 1 || snap.Group("B") != nil {
			t.Errorf("%+v, %v", snap, err)
		}
		if snap, err := askUnion(t, d, "s", "s"); snap != nil || !errors.Is(err, ErrAway) {
			t.Errorf("no room: %+v, %v", snap, err)
		}
		down = false
		if snap, err := askUnion(t, d, "r", "s"); err != nil || snap.Users != 2 {
			t.Errorf("%+v, %v", snap, err)
		}
		// What serves as a stale answer makes a stale one.
		down = true
		time.Sleep(2 * time.Second)
		snap, err = askUnion(t, d, "r", "s")
		if err != nil || snap.Users != 2 || snap.Stale == nil || snap.Stale.Changed {
			t.Errorf("%+v, %v", snap, err)
		}
	})
}

func TestUnionOfAFullPoolIsMadeAllTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A"), "s": room("v@B")}}
		full := false
		d := newDirectory(t, s, func(c *Config) {
			run := c.Go
			c.TTL = time.Hour
			c.Go = func(shard int, task func()) error {
				if full {
					return errors.New("full")
				}
				return run(shard, task)
			}
		})
		for _, name := range []string{"r", "s"} {
			if _, err := ask(t, d, name); err != nil {
				t.Fatal(err)
			}
		}
		full = true
		if snap, err := askUnion(t, d, "r", "s"); err != nil || snap.Users != 2 {
			t.Errorf("of rooms in memory: %+v, %v", snap, err)
		}
		if _, err := askUnion(t, d, "x", "y"); !errors.Is(err, ErrOverloaded) {
			t.Errorf("of others: %v", err)
		}
	})
}

func TestUnionsAreMadeInTurnAndNotByWhoAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A"), "s": room("v@B")}}
		d := newDirectory(t, s, func(c *Config) { c.TTL = time.Hour })
		all := int64(max(runtime.GOMAXPROCS(0)/2, 1))
		if !d.unions.makers.TryAcquire(all) || d.unions.makers.TryAcquire(1) {
			t.Fatal("others than half of the cores may make unions")
		}
		began, u := time.Now(), d.Union([]string{"r", "s"})
		asks, heals := &teller{}, &teller{}
		u.Ask(now(), asks)
		u.Refresh([]string{"u"}, missing(now()), heals)
		_, err := d.Unite(t.Context(), []*Snapshot{{Found: true, Users: 1, Unplaced: []string{"x"}}})
		if waited := time.Since(began); waited != unionTime || !errors.Is(err, ErrOverloaded) {
			t.Errorf("after %s: %v", waited, err)
		}
		synctest.Wait()
		if asks.n != 1 || heals.n != 1 || !errors.Is(asks.err, ErrOverloaded) || !errors.Is(heals.err, ErrOverloaded) {
			t.Errorf("told %d and %d times: %v, %v", asks.n, heals.n, asks.err, heals.err)
		}
		d.unions.makers.Release(all)
		if snap, err := askUnion(t, d, "r", "s"); err != nil || snap.Users != 2 {
			t.Errorf("when the turn comes: %+v, %v", snap, err)
		}
	})
}

func TestUnionsThatAreNotUsedAreLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A"), "s": room("v@B")}}
		d := newDirectory(t, s, func(c *Config) { c.MaxMembers, c.TTL = 1000, time.Hour })
		first := d.Union([]string{"r", "s"})
		for i := range 1000 {
			d.Union([]string{"r", fmt.Sprint(i)})
		}
		synctest.Wait()
		d.unions.cache.CleanUp()
		if n := d.Stats().Unions; n > 100 {
			t.Errorf("%d unions are kept", n)
		}
		if !first.Kept() {
			if again := d.Union([]string{"r", "s"}); again == first {
				t.Error("what is let go of is given again")
			}
		}
	})
}

// held is how many members the kept unions have: their own, and those of the answers about their rooms.
func held(d *Directory) (members int) {
	d.unions.cache.CleanUp()
	for _, u := range d.unions.cache.All() {
		if u.base != nil {
			members += u.base.Users
		}
		for _, s := range u.snaps {
			if s != nil {
				members += s.Users
			}
		}
	}
	return members
}

// The rooms of a list may have far more members than the list, and the cache of rooms may have let go of them.
func TestUnionsKeepNoMoreMembersThanTheyMay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 8000
		s := &source{rooms: map[string][][2]string{}}
		var everybody []string
		for i := range 100 {
			everybody = append(everybody, fmt.Sprintf("u%d@A", i))
		}
		d := newDirectory(t, s, func(c *Config) { c.MaxMembers, c.TTL = most, time.Hour })
		for i := range 40 {
			var list []string
			for k := range 10 {
				name := fmt.Sprint("r", i, "-", k)
				list = append(list, name)
				s.rooms[name] = room(everybody...)
			}
			if snap, err := askUnion(t, d, list...); err != nil || snap.Users != 100 {
				t.Fatalf("%+v, %v", snap, err)
			}
		}
		synctest.Wait()
		if n := held(d); n > most || n == 0 {
			t.Errorf("%d members are kept, at most %d may be", n, most)
		}
	})
}

// A list is made while its rooms are nearly empty, and they fill.
func TestUnionsThatGrowKeepNoMoreMembersThanTheyMay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 8000
		v := &versioned{source: &source{rooms: map[string][][2]string{"r": room("u@A")}}, revision: 1}
		d := newDirectory(t, v.source, func(c *Config) { c.Source, c.MaxMembers = v, most })
		d.InvalidateAll()
		d.Vouch(time.Now().Add(time.Hour))
		var lists []*Union
		for i := range 20 {
			name := fmt.Sprint("s", i)
			v.rooms[name] = room("v@A")
			if _, err := askUnion(t, d, "r", name); err != nil {
				t.Fatal(err)
			}
			lists = append(lists, d.Union([]string{"r", name}))
		}
		for i := range 20 {
			var moves []Move
			for k := range 50 {
				moves = append(moves, Move{Room: "r", User: fmt.Sprint("m", i, "-", k), Node: "A", Revision: uint64(2 + i)})
			}
			d.Moved(moves)
			for _, u := range lists {
				if s := u.Cached(now()); s == nil || s.Users != 2+50*(i+1) {
					t.Fatalf("%+v", s)
				}
			}
			synctest.Wait()
		}
		if n := held(d); n > most || n == 0 {
			t.Errorf("%d members are kept, at most %d may be", n, most)
		}
	})
}

// The cache says that an answer is evicted before it does not show it any more. What changes after that is noted nowhere.
func TestUnionDoesNotRelyOnAnAnswerThatIsJustBeingEvicted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A"), "s": room("v@B")}}
		d := newDirectory(t, s, func(c *Config) { c.TTL = time.Hour })
		if _, err := askUnion(t, d, "r", "s"); err != nil {
			t.Fatal(err)
		}
		u := d.Union([]string{"r", "s"})
		if s := u.Cached(now()); s == nil || s.Users != 2 {
			t.Fatalf("%+v", s)
		}
		e, _ := d.Rooms.cache.GetIfPresent("r")
		e.gone.Store(true)
		d.Rooms.changes.Add(1)
		u.Cached(now())
		d.Rooms.cache.Invalidate("r")
		d.Rooms.changes.Add(^uint64(0)) // which Invalidate has counted once more
		s.set(func(s *source) { s.rooms["r"] = room("u@A", "x@A") })
		d.Moved([]Move{{Room: "r", User: "x", Node: "A", Revision: 2}})
		if s, err := askUnion(t, d, "r", "s"); err != nil || s.Users != 3 {
			t.Errorf("after a change: %+v, %v", s, err)
		}
	})
}
