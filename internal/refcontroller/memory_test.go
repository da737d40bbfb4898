package refcontroller

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/internal/slots"
)

// member is a membership in the model.
type member struct{ user, room, node string }

// model is the store as a map: what it answers is computed from scratch.
type model struct {
	joined map[member]int // when
	names  map[member]string
	clock  int
}

// answers is what every look-up over a small world says.
type answers struct {
	rooms map[string]string
	users map[string]string
}

var (
	worldUsers = []string{"u1", "u2", "u3"}
	worldRooms = []string{"r1", "r2", "r3"}
	worldNodes = []string{"n1", "n2", "n3"}
)

func (m *model) answers() answers {
	a := answers{map[string]string{}, map[string]string{}}
	for _, room := range worldRooms {
		var lines []string
		for k := range m.joined {
			if k.room == room {
				lines = append(lines, fmt.Sprintf("%s@%s(%s)", k.user, k.node, m.names[k]))
			}
		}
		slices.Sort(lines)
		a.rooms[room] = fmt.Sprint(lines)
	}
	for _, user := range worldUsers {
		var own []member
		for k := range m.joined {
			if k.user == user {
				own = append(own, k)
			}
		}
		slices.SortFunc(own, func(a, b member) int { return cmp.Compare(m.joined[b], m.joined[a]) })
		var nodes []string
		for _, k := range own {
			if !slices.Contains(nodes, k.node) {
				nodes = append(nodes, k.node)
			}
		}
		a.users[user] = fmt.Sprint(nodes)
		if len(own) > 0 {
			a.users[user] += " in " + own[0].room
		}
	}
	return a
}

func storeAnswers(t *rapid.T, s Store) answers {
	a := answers{map[string]string{}, map[string]string{}}
	for _, room := range worldRooms {
		info, err := s.Room(context.Background(), room)
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, u := range info.GetUsers() {
			lines = append(lines, fmt.Sprintf("%s@%s(%s)", u.GetUserId(), u.GetNodeId(), u.GetUserName()))
		}
		if info != nil && len(lines) == 0 {
			t.Fatalf("room %q is known and empty", room)
		}
		slices.Sort(lines)
		a.rooms[room] = fmt.Sprint(lines)
	}
	presences, err := s.Users(context.Background(), worldUsers)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range presences {
		a.users[worldUsers[i]] = fmt.Sprint(p.Nodes)
		if p.Room != "" {
			a.users[worldUsers[i]] += " in " + p.Room
		}
	}
	return a
}

// The store answers like the model, and names every answer that has changed.
func TestMemoryAgreesWithItsModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := NewMemory(0)
		m := model{joined: map[member]int{}, names: map[member]string{}}
		named := answers{map[string]string{}, map[string]string{}}
		s.Notify(func(c Change) {
			for _, r := range c.Rooms {
				named.rooms[r] = "changed"
			}
			for _, u := range c.Users {
				named.users[u] = "changed"
			}
		})
		before := m.answers()
		ctx := context.Background()
		draw := func() member {
			return member{
				rapid.SampledFrom(worldUsers).Draw(t, "user"), rapid.SampledFrom(worldRooms).Draw(t, "room"),
				rapid.SampledFrom(worldNodes).Draw(t, "node"),
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"join": func(t *rapid.T) {
				k, name := draw(), rapid.SampledFrom([]string{"", "name"}).Draw(t, "name")
				if _, err := s.Join(ctx, Join{Reporter: Reporter{Node: k.node}, User: k.user, Room: k.room, Name: name}); err != nil {
					t.Fatal(err)
				}
				m.clock++
				m.joined[k], m.names[k] = m.clock, name
			},
			"leave": func(t *rapid.T) {
				k := draw()
				_, want := m.joined[k]
				got, err := s.Leave(ctx, Leave{Reporter: Reporter{Node: k.node}, User: k.user, Room: k.room})
				if err != nil || got != want {
					t.Fatal(got, err)
				}
				delete(m.joined, k)
			},
			"leave all nodes": func(t *rapid.T) {
				k := draw()
				count := len(m.joined)
				maps.DeleteFunc(m.joined, func(o member, _ int) bool { return o.user == k.user && o.room == k.room })
				got, err := s.Leave(ctx, Leave{User: k.user, Room: k.room})
				if err != nil || got != (len(m.joined) < count) {
					t.Fatal(got, err)
				}
			},
			"drop node": func(t *rapid.T) {
				k := draw()
				count := len(m.joined)
				maps.DeleteFunc(m.joined, func(o member, _ int) bool { return o.node == k.node })
				got, err := s.DropNode(ctx, k.node)
				if err != nil || got != count-len(m.joined) {
					t.Fatal(got, err)
				}
			},
			"": func(t *rapid.T) {
				want, got := m.answers(), storeAnswers(t, s)
				if !maps.Equal(want.rooms, got.rooms) || !maps.Equal(want.users, got.users) {
					t.Fatalf("got %v\nwant %v", got, want)
				}
				checkNamed(t, "room", before.rooms, got.rooms, named.rooms)
				checkNamed(t, "user", before.users, got.users, named.users)
				checkCounts(t, s, &m)
				before = got
				clear(named.rooms)
				clear(named.users)
			},
		})
	})
}

func checkNamed(t *rapid.T, what string, before, after, named map[string]string) {
	for key := range after {
		if before[key] != after[key] && named[key] == "" {
			t.Fatalf("%s %q changed from %s to %s and was not named", what, key, before[key], after[key])
		}
	}
}

func checkCounts(t *rapid.T, s *Memory, m *model) {
	perRoom := map[string]map[string]bool{}
	users := map[string]bool{}
	for k := range m.joined {
		if perRoom[k.room] == nil {
			perRoom[k.room] = map[string]bool{}
		}
		perRoom[k.room][k.user] = true
		users[k.user] = true
	}
	if got, want := s.Counts(), (Counts{len(perRoom), len(users), len(m.joined)}); got != want {
		t.Fatalf("counts %v, want %v", got, want)
	}
	stats, err := s.Rooms(context.Background())
	if err != nil || len(stats) != len(perRoom) {
		t.Fatal(stats, err)
	}
	for _, r := range stats {
		if int(r.GetUserCount()) != len(perRoom[r.GetRoomId()]) {
			t.Fatalf("room %q counts %d users", r.GetRoomId(), r.GetUserCount())
		}
	}
	for _, n := range s.nodes {
		if n.count == 0 {
			t.Fatalf("node %q is kept without members", n.id)
		}
	}
}

func TestDropNodeSparesJoinsAfterTheCall(t *testing.T) {
	s := NewMemory(0)
	const many = 5*dropChunk + 7
	for i := range many {
		if _, err := s.Join(t.Context(), Join{Reporter: Reporter{Node: "n"}, User: fmt.Sprint("old", i), Room: "r"}); err != nil {
			t.Fatal(err)
		}
	}
	later := 0
	var others sync.WaitGroup
	s.Notify(func(c Change) { // called in the middle of the drop, and for what is done there
		if len(c.Users) == 1 {
			return
		}
		later++
		i := later
		others.Go(func() {
			_, _ = s.Join(t.Context(), Join{Reporter: Reporter{Node: "n"}, User: fmt.Sprint("new", i), Room: "r"})
			_, _ = s.Leave(t.Context(), Leave{Reporter: Reporter{Node: "n"}, User: fmt.Sprint("old", many-i), Room: "r"})
		})
	})
	n, err := s.DropNode(t.Context(), "n")
	others.Wait()
	if err != nil || n < many-later || later < 5 {
		t.Fatal(n, later, err)
	}
	if c := s.Counts(); c != (Counts{1, later, later}) {
		t.Fatal(c)
	}
}

func TestMemoryConcurrently(t *testing.T) {
	s := NewMemory(0)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			node := fmt.Sprint("n", w)
			for i := range 500 {
				user, room := fmt.Sprint("u", i%50), fmt.Sprint("r", i%7)
				_, _ = s.Join(t.Context(), Join{Reporter: Reporter{Node: node}, User: user, Room: room})
				_, _ = s.Room(t.Context(), room)
				_, _ = s.Users(t.Context(), []string{user})
				if i%3 == 0 {
					_, _ = s.Leave(t.Context(), Leave{Reporter: Reporter{Node: node}, User: user, Room: room})
				}
			}
			_, _ = s.DropNode(t.Context(), node)
		})
	}
	wg.Wait()
	if c := s.Counts(); c != (Counts{}) {
		t.Fatalf("left behind: %v", c)
	}
}

func BenchmarkJoin(b *testing.B) {
	s := NewMemory(0)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		_, _ = s.Join(b.Context(), Join{Reporter: Reporter{Node: "n"}, User: fmt.Sprint("u", i%1_000_000), Room: fmt.Sprint("r", i%10_000)})
		i++
	}
}

// A report that finds its change made already is answered once those who watch have
// been told of it: its caller relies on that.
func TestChangeIsVisibleAndToldInOneStep(t *testing.T) {
	by := func(seq uint64) Reporter { return Reporter{Node: "n", Boot: "b", Seq: seq} }
	join := func(s *Memory, seq uint64) error {
		_, err := s.Join(t.Context(), Join{Reporter: by(seq), User: "u", Room: "r"})
		return err
	}
	slot := slots.Of(slots.Hash("u", "r"))
	for name, tc := range map[string]struct {
		empty bool // nobody is there before
		do    func(s *Memory, seq uint64) error
	}{
		"join": {true, join},
		"leave": {false, func(s *Memory, seq uint64) error {
			_, err := s.Leave(t.Context(), Leave{Reporter: by(seq), User: "u", Room: "r"})
			return err
		}},
		"slot": {true, func(s *Memory, seq uint64) error {
			return s.SetSlot(t.Context(), by(seq), slot, []Join{{User: "u", Room: "r"}})
		}},
		"begin": {false, func(s *Memory, seq uint64) error {
			_, err := s.Begin(t.Context(), by(seq))
			return err
		}},
		"drop": {false, func(s *Memory, _ uint64) error {
			_, err := s.DropNode(t.Context(), "n")
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := NewMemory(0)
			if !tc.empty {
				if err := join(s, 1); err != nil {
					t.Fatal(err)
				}
			}
			telling, tell := make(chan struct{}), make(chan struct{})
			s.Notify(func(Change) {
				close(telling) // A second time panics: only one of the two has changed anything.
				<-tell
			})
			first, second, look := make(chan error, 1), make(chan error, 1), make(chan error, 1)
			go func() { first <- tc.do(s, 2) }()
			<-telling
			go func() { second <- tc.do(s, 3) }()
			go func() {
				_, err := s.Users(t.Context(), []string{"u"})
				look <- err
			}()
			passed := time.NewTimer(50 * time.Millisecond)
			defer passed.Stop()
			select {
			case <-second:
				t.Error("the second report returns, and nobody has been told")
				second <- nil
			case <-look:
				t.Error("a look-up shows it, and nobody has been told")
				look <- nil
			case <-passed.C:
			}
			close(tell)
			if err := cmp.Or(<-first, <-second, <-look); err != nil {
				t.Error(err)
			}
		})
	}
}
