package link

import (
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
)

// modelEntry is an entry of the model of a queue.
type modelEntry struct {
	d        *engine.Delivery
	key      string // "" for none
	size     int
	deadline int64
}

// TestQueueKeepsTheLatestInThePlaceOfTheOneBefore holds a queue against a list in which everything is looked for anew.
func TestQueueKeepsTheLatestInThePlaceOfTheOneBefore(t *testing.T) {
	w := newWorld(t, Config{})
	w.room("r", "A", "u1", "u2", "u3")
	w.room("s", "A", "u1")
	key := func(p *engine.Push, key string) *engine.Push {
		p.Options = &engine.Options{CollapseKey: key}
		return p
	}
	// Each name is a target and key; those with the same replace each other.
	kinds := map[string]func() *engine.Push{
		"":         func() *engine.Push { return w.toUser("u1", "x") },
		"u1 k":     func() *engine.Push { return key(w.toUser("u1", "x"), "k") },
		"u1 l":     func() *engine.Push { return key(w.toUser("u1", "x"), "l") },
		"u2 k":     func() *engine.Push { return key(w.toUser("u2", "x"), "k") },
		"r k":      func() *engine.Push { return key(w.toRoom("r", "x"), "k") },
		"r k - u2": func() *engine.Push { return key(w.toRoom("r", "x", "u2"), "k") },
		"s k":      func() *engine.Push { return key(w.toRoom("s", "x"), "k") },
	}
	names := slices.Sorted(maps.Keys(kinds))
	deliveries := map[string][]*engine.Delivery{}
	for _, name := range names {
		for range 5 {
			deliveries[name] = append(deliveries[name], w.delivery(t, kinds[name]()))
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		var sum load
		q := queue{load: &sum}
		var model []modelEntry
		now := int64(0)
		pop := func() (entry, modelEntry) {
			e, m := q.pop(), model[0]
			model = model[1:]
			if e.d != m.d || e.size != m.size {
				t.Fatalf("popped %+v, want %+v", e, m)
			}
			return e, m
		}
		t.Repeat(map[string]func(*rapid.T){
			"send": func(t *rapid.T) {
				name := rapid.SampledFrom(names).Draw(t, "name")
				e := entry{
					d: rapid.SampledFrom(deliveries[name]).Draw(t, "delivery"), size: rapid.IntRange(1, 100).Draw(t, "size"),
					deadline: now + int64(rapid.IntRange(1, 50).Draw(t, "deadline")), at: now,
				}
				m := modelEntry{e.d, name, e.size, e.deadline}
				if name == "" {
					q.push(e)
					model = append(model, m)
					return
				}
				k := collapseKeyOf(e.d, e.d.Options())
				// The latest with the key, if it is for the same users.
				at := -1
				for i := range model {
					if model[i].key != "" && collapseKeyOf(model[i].d, model[i].d.Options()) == k {
						at = i
					}
				}
				older := q.latestOf(k, e.d)
				if at < 0 || model[at].key != name {
					if older != nil {
						t.Fatalf("%q replaces %+v", name, older)
					}
					q.pushLatest(e, k)
					model = append(model, m)
					return
				}
				if older == nil || older.d != model[at].d {
					t.Fatalf("%q replaces %+v, want %+v", name, older, model[at])
				}
				age := older.at
				if got := q.replace(older, e, k); got != model[at].d {
					t.Fatal("another one was replaced")
				}
				if older.at != age {
					t.Fatal("its age is its own")
				}
				model[at] = m
			},
			"pop": func(t *rapid.T) {
				if len(model) > 0 {
					pop()
				}
			},
			"pop and put back": func(t *rapid.T) {
				if len(model) > 0 {
					e, m := pop()
					q.pushFront(e)
					model = append([]modelEntry{m}, model...)
				}
			},
			"expire": func(t *rapid.T) {
				now += int64(rapid.IntRange(0, 20).Draw(t, "time"))
				got := q.popExpired(nil, -1, now)
				var want []*engine.Delivery
				model = slices.DeleteFunc(model, func(m modelEntry) bool {
					if m.deadline <= now {
						want = append(want, m.d)
					}
					return m.deadline <= now
				})
				if !slices.Equal(got, want) {
					t.Fatalf("%d expired, want %d", len(got), len(want))
				}
			},
			"": func(t *rapid.T) { // what holds after each step
				bytes, keyed := 0, map[collapseKey]bool{}
				for i, m := range model {
					if e := q.slot(i); e.d != m.d || e.size != m.size {
						t.Fatalf("place %d has %+v, want %+v", i, e, m)
					}
					bytes += m.size
					if m.key != "" {
						keyed[collapseKeyOf(m.d, m.d.Options())] = true
					}
				}
				if q.len != len(model) || sum != (load{len(model), bytes}) {
					t.Fatalf("%d entries, %+v; want %d, %d bytes", q.len, sum, len(model), bytes)
				}
				if len(q.latest) > len(keyed) || (q.latest != nil) != (len(q.latest) > 0) {
					t.Fatalf("%d places of %d keys", len(q.latest), len(keyed))
				}
			},
		})
	})
}

func TestNewerMessageTakesThePlaceOfTheOlderInTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{DialTimeout: 4 * time.Second, QueueAge: 4 * time.Second, QueueLen: 4})
		n := &fakeNode{id: "A", gate: make(chan struct{})}
		w.start("a:1", n)
		w.register("A", "a:1")
		w.room("r", "A", "u1", "u2")
		with := func(p *engine.Push, o engine.Options) *pending {
			p.Options = &o
			f := w.begin(p)
			synctest.Wait()
			return f
		}
		k := engine.Options{CollapseKey: "k"}
		first := with(w.toUser("u1", "1"), k)
		other := with(w.toUser("u2", "other"), k)
		plain := with(w.toUser("u1", "plain"), engine.Options{})
		room := with(w.toRoom("r", "room 1"), k)
		// The queue is full: what takes a place needs none.
		second := with(w.toUser("u1", "2"), k)
		if r := w.end(first); r.Failed != 1 || reasons(r) != "failed: "+engine.DropReplaced.String() {
			t.Errorf("the one before: %+v", r)
		}
		again := with(w.toRoom("r", "room 2"), k)
		if r := w.end(room); r.Failed != 2 {
			t.Errorf("the room's before: %+v", r)
		}
		if r := w.end(with(w.toUser("u1", "3"), engine.Options{CollapseKey: "l"})); reasons(r) != "failed: "+engine.DropQueueFull.String() {
			t.Errorf("another key: %+v", r)
		}
		close(n.gate)
		for _, f := range []*pending{second, other, plain, again} {
			if r := w.end(f); r.Delivered != r.Targets || r.Targets == 0 {
				t.Errorf("%+v", r)
			}
		}
		if got := n.received(t); !slices.Equal(got, []string{"u1 2", "u2 other", "u1 plain", "u1 room 2", "u2 room 2"}) {
			t.Errorf("arrived: %q", got)
		}
		if got := w.set.meters.replaced.Get(); got != 2 {
			t.Errorf("%d replaced", got)
		}
		l := w.set.Link(0, "A").(*Link)
		l.mu.Lock()
		if l.queue.latest != nil {
			t.Errorf("places of an empty queue: %v", l.queue.latest)
		}
		l.mu.Unlock()
	})
}

// A message out of the store, which is an old one, takes nobody's place, nor does one to several users, to everybody or in the log of
// its room.
func TestWhatIsNotForOneTargetIsNotReplaced(t *testing.T) {
	w := newWorld(t, Config{})
	w.room("r", "A", "u1", "u2")
	for _, user := range []string{"u1", "u2"} {
		w.delivery(t, w.toUser(user, "so that the route is known"))
	}
	o := &engine.Options{CollapseKey: "k"}
	several := func() *engine.Push {
		p := w.push(&engine.Push{Request: engine.Request{Kind: engine.ToUsers, Users: []string{"u1", "u2"}}}, "x")
		p.Options = o
		return p
	}
	for w.delivery(t, several()).Targets() < 2 { // a route is published right behind the first push that uses it
		time.Sleep(time.Millisecond)
	}
	stored, logged := w.toUser("u1", "x"), w.toRoom("r", "x")
	for what, p := range map[string]*engine.Push{"several users": several(), "everybody": w.toAll("x"), "a message out of the store": stored, "a message in a log": logged} {
		if p.Options = o; p == logged {
			p.Options = &engine.Options{CollapseKey: "k", Store: true}
		}
		d := w.delivery(t, p)
		of := *o
		if p == stored {
			of.Replay = &engine.Replay{Node: "A", Gate: 1, Seq: 1}
		}
		if p == logged {
			of = *p.Options
		}
		if key := collapseKeyOf(d, &of); key != (collapseKey{}) {
			t.Errorf("%s: %+v", what, key)
		}
	}
}
