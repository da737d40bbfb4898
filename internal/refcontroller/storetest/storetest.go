package storetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Run holds a store against its promises. open makes one that works until the test ends, is
// empty, and has been given tell by Notify; its rooms have a limit unless it is 0.
func Run(t *testing.T, open func(t *testing.T, limit int, tell func(refcontroller.Change)) refcontroller.Store) {
	for name, test := range map[string]func(*testing.T, *suite){
		"answers like a model and names every answer that has changed":      testModel,
		"reports in any order end in what was said last":                    testAnyOrder,
		"what an earlier process reports late changes nothing":              testEarlierProcess,
		"reports without numbers are executed as they come":                 testWithoutNumbers,
		"a slot becomes what was said, but for what was said later":         testSlot,
		"the numbers of reports have 64 bits":                               testLargeNumbers,
		"a large room is whole, and so is a node with many":                 testLarge,
		"names and metadata are kept, whatever is in them":                  testContents,
		"many report at once":                                               testConcurrently,
		"a change has been told when its report returns":                    testTold,
		"a node has the process that reports it, and none when it is empty": testNodes,
	} {
		t.Run(name, func(t *testing.T) {
			s := &suite{}
			s.Store = open(t, 0, s.tell)
			test(t, s)
		})
	}
	t.Run("a room at its limit takes nobody in", func(t *testing.T) {
		s := &suite{}
		s.Store = open(t, 2, s.tell)
		testLimit(t, s)
	})
}

// RunRoutes holds routes that follow what a store tells of its changes against the store, and pages of its rooms against
// who is there.
func RunRoutes(t *testing.T, open func(t *testing.T, limit int, tell func(refcontroller.Change)) refcontroller.Store) {
	for name, test := range map[string]func(*testing.T, *suite){
		"routes are right that are kept up to date by what is told":    testRoutes,
		"a room that changes while it is read becomes the right route": testRoutesAtOnce,
		"pages of a room have everybody who stays":                     testMembers,
	} {
		t.Run(name, func(t *testing.T) {
			s := &suite{}
			s.Store = open(t, 0, s.tell)
			test(t, s)
		})
	}
}

// suite is a store with what it has told.
type suite struct {
	refcontroller.Store

	mu           sync.Mutex
	rooms, users map[string]int // Guarded by mu. How often each was named.
	also         func(refcontroller.Change)
}

func (s *suite) tell(c refcontroller.Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.also != nil && (c.All || len(c.Moves)+len(c.Rooms) > 0) {
		s.also(c)
	}
	if s.rooms == nil {
		s.rooms, s.users = map[string]int{}, map[string]int{}
	}
	for _, m := range c.Moves {
		s.rooms[m.Room]++
		s.users[m.User]++
	}
	for _, room := range c.Rooms {
		s.rooms[room]++
	}
	for _, user := range c.Users {
		s.users[user]++
	}
}

// told empties what was named.
func (s *suite) told() (rooms, users map[string]int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rooms, users = s.rooms, s.users
	s.rooms, s.users = map[string]int{}, map[string]int{}
	return rooms, users
}

// worlds tells the worlds of one run from each other: one store serves them all.
var worlds atomic.Int64 //nolint:gochecknoglobals // see above

// world is a few users, rooms and nodes that no other test has.
type world struct{ users, rooms, nodes []string }

func newWorld() world {
	n := worlds.Add(1)
	var w world
	for i := range 3 {
		w.users = append(w.users, fmt.Sprintf("w%d-u%d", n, i))
		w.rooms = append(w.rooms, fmt.Sprintf("w%d-r%d", n, i))
		w.nodes = append(w.nodes, fmt.Sprintf("w%d-n%d", n, i))
	}
	return w
}

// member is a membership in the model.
type member struct{ user, room, node string }

func (w world) draw(t *rapid.T) member {
	return member{rapid.SampledFrom(w.users).Draw(t, "user"), rapid.SampledFrom(w.rooms).Draw(t, "room"), rapid.SampledFrom(w.nodes).Draw(t, "node")}
}

// model is the store as a map: what it answers is computed from scratch.
type model struct {
	joined map[member]int // when
	names  map[member]string
	clock  int
}

// answers is what every look-up over a world says.
type answers struct{ rooms, users map[string]string }

func (m *model) answers(w world) answers {
	a := answers{map[string]string{}, map[string]string{}}
	for _, room := range w.rooms {
		var lines []string
		for k := range m.joined {
			if k.room == room {
				lines = append(lines, fmt.Sprintf("%s@%s(%s)", k.user, k.node, m.names[k]))
			}
		}
		slices.Sort(lines)
		a.rooms[room] = fmt.Sprint(lines)
	}
	for _, user := range w.users {
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
			var rooms []string
			for _, k := range own {
				rooms = append(rooms, k.room)
			}
			slices.Sort(rooms)
			a.users[user] += fmt.Sprint(" in ", own[0].room, " of ", slices.Compact(rooms))
		}
	}
	return a
}

type fataler interface{ Fatal(args ...any) }

func (s *suite) answers(t fataler, w world) answers {
	a := answers{map[string]string{}, map[string]string{}}
	for _, room := range w.rooms {
		info, _, err := s.Room(context.Background(), room)
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, u := range info.GetUsers() {
			lines = append(lines, fmt.Sprintf("%s@%s(%s)", u.GetUserId(), u.GetNodeId(), u.GetUserName()))
		}
		if info != nil && len(lines) == 0 {
			t.Fatal("known and empty: ", room)
		}
		slices.Sort(lines)
		a.rooms[room] = fmt.Sprint(lines)
	}
	presences, err := s.Users(context.Background(), w.users, true)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range presences {
		a.users[w.users[i]] = fmt.Sprint(p.Nodes)
		if p.Room != "" {
			a.users[w.users[i]] += fmt.Sprint(" in ", p.Room, " of ", p.Rooms)
		}
	}
	return a
}

func by(node string) refcontroller.Reporter { return refcontroller.Reporter{Node: node} }

func testModel(t *testing.T, s *suite) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		m := model{joined: map[member]int{}, names: map[member]string{}}
		before := m.answers(w)
		s.told()
		ctx := context.Background()
		t.Repeat(map[string]func(*rapid.T){
			"join": func(t *rapid.T) {
				k, name := w.draw(t), rapid.SampledFrom([]string{"", "name"}).Draw(t, "name")
				if _, err := s.Join(ctx, refcontroller.Join{Reporter: by(k.node), User: k.user, Room: k.room, Name: name}); err != nil {
					t.Fatal(err)
				}
				m.clock++
				m.joined[k], m.names[k] = m.clock, name
			},
			"leave": func(t *rapid.T) {
				k := w.draw(t)
				_, want := m.joined[k]
				got, err := s.Leave(ctx, refcontroller.Leave{Reporter: by(k.node), User: k.user, Room: k.room})
				if err != nil || got != want {
					t.Fatal(got, err)
				}
				delete(m.joined, k)
			},
			"leave all nodes": func(t *rapid.T) {
				k := w.draw(t)
				count := len(m.joined)
				maps.DeleteFunc(m.joined, func(o member, _ int) bool { return o.user == k.user && o.room == k.room })
				got, err := s.Leave(ctx, refcontroller.Leave{User: k.user, Room: k.room})
				if err != nil || got != (len(m.joined) < count) {
					t.Fatal(got, err)
				}
			},
			"drop node": func(t *rapid.T) {
				k := w.draw(t)
				count := len(m.joined)
				maps.DeleteFunc(m.joined, func(o member, _ int) bool { return o.node == k.node })
				got, err := s.DropNode(ctx, k.node)
				if err != nil || got != count-len(m.joined) {
					t.Fatal(got, err)
				}
			},
			"": func(t *rapid.T) {
				want, got := m.answers(w), s.answers(t, w)
				if !maps.Equal(want.rooms, got.rooms) || !maps.Equal(want.users, got.users) {
					t.Fatalf("got %v\nwant %v", got, want)
				}
				rooms, users := s.told()
				checkNamed(t, before.rooms, got.rooms, rooms)
				checkNamed(t, before.users, got.users, users)
				s.checkRooms(t, w, &m)
				before = got
			},
		})
		for _, node := range w.nodes { // The next world's list of rooms is not to grow.
			if _, err := s.DropNode(ctx, node); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func checkNamed(t *rapid.T, before, after map[string]string, named map[string]int) {
	for key := range after {
		if before[key] != after[key] && named[key] == 0 {
			t.Fatalf("%q changed from %s to %s and was not named", key, before[key], after[key])
		}
	}
}

func (s *suite) checkRooms(t *rapid.T, w world, m *model) {
	users := map[string]map[string]bool{}
	for k := range m.joined {
		if users[k.room] == nil {
			users[k.room] = map[string]bool{}
		}
		users[k.room][k.user] = true
	}
	stats, err := s.Rooms(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.IsSortedFunc(stats, func(a, b *pubsub.RoomStats) int { return strings.Compare(a.GetRoomId(), b.GetRoomId()) }) {
		t.Fatal("rooms are not in order")
	}
	for _, r := range stats {
		if slices.Contains(w.rooms, r.GetRoomId()) {
			if int(r.GetUserCount()) != len(users[r.GetRoomId()]) {
				t.Fatalf("room %q counts %d users", r.GetRoomId(), r.GetUserCount())
			}
			delete(users, r.GetRoomId())
		}
	}
	if len(users) > 0 {
		t.Fatalf("not in the list: %v", users)
	}
}

// numbered is a report on its way.
type numbered struct {
	seq   uint64
	k     member
	joins bool
	// The slot's members when the report is about a whole slot.
	slot    int
	members []refcontroller.Join
}

func (r numbered) run(s refcontroller.Store) error {
	by := refcontroller.Reporter{Node: r.k.node, Boot: "boot", Seq: r.seq}
	var err error
	switch {
	case r.members != nil:
		err = s.SetSlot(context.Background(), by, r.slot, r.members)
	case r.joins:
		_, err = s.Join(context.Background(), refcontroller.Join{Reporter: by, User: r.k.user, Room: r.k.room})
	default:
		_, err = s.Leave(context.Background(), refcontroller.Leave{Reporter: by, User: r.k.user, Room: r.k.room})
	}
	return err
}

func slotOf(user, room string) int { return slots.Of(slots.Hash(user, room)) }

// Reports overtake each other, come twice and come late.
func testAnyOrder(t *testing.T, s *suite) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		node := w.nodes[0]
		seq := uint64(0)
		truth := map[member]bool{}
		newest := map[member]uint64{}
		var under []numbered // reports under way
		number := func() uint64 { seq++; return seq }
		say := func(k member) {
			r := numbered{seq: number(), k: k, joins: truth[k]}
			newest[k] = r.seq
			under = append(under, r)
		}
		deliver := func(i int) {
			r := under[i]
			under = append(under[:i:i], under[i+1:]...)
			err := r.run(s)
			if err != nil && !errors.Is(err, refcontroller.ErrOld) {
				t.Fatal(err)
			}
			// Whoever still waits for the answer reports again.
			if err != nil && r.members == nil && newest[r.k] == r.seq {
				say(r.k)
			}
		}
		draw := func(t *rapid.T) member { k := w.draw(t); k.node = node; return k }
		t.Repeat(map[string]func(*rapid.T){
			"change": func(t *rapid.T) {
				k := draw(t)
				truth[k] = !truth[k]
				say(k)
			},
			"whole slot": func(t *rapid.T) {
				k := draw(t)
				slot := slotOf(k.user, k.room)
				r := numbered{seq: number(), k: member{node: node}, slot: slot, members: []refcontroller.Join{}}
				for k, in := range truth {
					if in && slotOf(k.user, k.room) == slot {
						r.members = append(r.members, refcontroller.Join{User: k.user, Room: k.room})
					}
				}
				under = append(under, r)
			},
			"deliver": func(t *rapid.T) {
				if len(under) == 0 {
					t.Skip()
				}
				deliver(rapid.IntRange(0, len(under)-1).Draw(t, "which"))
			},
			"deliver a copy": func(t *rapid.T) {
				if len(under) == 0 {
					t.Skip()
				}
				if err := under[rapid.IntRange(0, len(under)-1).Draw(t, "which")].run(s); err != nil && !errors.Is(err, refcontroller.ErrOld) {
					t.Fatal(err)
				}
			},
		})
		for len(under) > 0 {
			deliver(rapid.IntRange(0, len(under)-1).Draw(t, "which"))
		}
		want := model{joined: map[member]int{}}
		digests := make([]uint64, slots.Count)
		for k, in := range truth {
			if in {
				want.joined[k] = 1
				digests[slotOf(k.user, k.room)] += slots.Hash(k.user, k.room)
			}
		}
		if got, want := s.answers(t, w).rooms, want.answers(w).rooms; !maps.Equal(got, want) {
			t.Fatalf("got %v\nwant %v", got, want)
		}
		differing, err := s.Differing(context.Background(), refcontroller.Reporter{Node: node, Boot: "boot"}, digests)
		if err != nil || len(differing) > 0 {
			t.Fatalf("slots %v differ, %v", differing, err)
		}
	})
}

func testEarlierProcess(t *testing.T, s *suite) {
	ctx := t.Context()
	report := func(boot string, seq uint64) refcontroller.Reporter {
		return refcontroller.Reporter{Node: "n", Boot: boot, Seq: seq}
	}
	join := func(by refcontroller.Reporter, user string) error {
		_, err := s.Join(ctx, refcontroller.Join{Reporter: by, User: user, Room: "r"})
		return err
	}
	if err := join(report("first", 900), "u"); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Begin(ctx, report("second", 1)); n != 1 || err != nil {
		t.Fatalf("%d ended, %v", n, err)
	}
	if err := join(report("first", 901), "u"); !errors.Is(err, refcontroller.ErrOtherBoot) {
		t.Errorf("late join: %v", err)
	}
	if err := join(report("second", 2), "v"); err != nil {
		t.Fatal(err)
	}
	left, err := s.Leave(ctx, refcontroller.Leave{Reporter: report("first", 902), User: "v", Room: "r"})
	if left || !errors.Is(err, refcontroller.ErrOtherBoot) {
		t.Errorf("late leave: %v, %v", left, err)
	}
	if err := s.SetSlot(ctx, report("first", 903), slotOf("v", "r"), nil); !errors.Is(err, refcontroller.ErrOtherBoot) {
		t.Errorf("late slot: %v", err)
	}
	if n, err := s.Begin(ctx, report("second", 1)); n != 0 || err != nil { // The call at the start comes again.
		t.Errorf("%d ended, %v", n, err)
	}
	if info, _, err := s.Room(ctx, "r"); err != nil || len(info.GetUsers()) != 1 || info.GetUsers()[0].GetUserId() != "v" {
		t.Errorf("%v, %v", info, err)
	}
	if n, err := s.Begin(ctx, report("second", 3)); n != 1 || err != nil { // The node goes.
		t.Errorf("%d ended, %v", n, err)
	}
	if err := join(report("second", 2), "v"); !errors.Is(err, refcontroller.ErrOld) {
		t.Errorf("join from before the end: %v", err)
	}
}

func testWithoutNumbers(t *testing.T, s *suite) {
	ctx := t.Context()
	for range 3 {
		if _, err := s.Join(ctx, refcontroller.Join{Reporter: refcontroller.Reporter{Node: "n", Seq: 1}, User: "u", Room: "r"}); err != nil {
			t.Fatal(err)
		}
		left, err := s.Leave(ctx, refcontroller.Leave{Reporter: refcontroller.Reporter{Node: "n", Seq: 1}, User: "u", Room: "r"})
		if !left || err != nil {
			t.Fatal(left, err)
		}
	}
	// A node that goes back to a version without numbers.
	if _, err := s.Join(ctx, refcontroller.Join{Reporter: refcontroller.Reporter{Node: "n", Boot: "b", Seq: 1}, User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Begin(ctx, by("n")); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if _, err := s.Join(ctx, refcontroller.Join{Reporter: by("n"), User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
}

func testSlot(t *testing.T, s *suite) {
	ctx := t.Context()
	at := func(seq uint64) refcontroller.Reporter { return refcontroller.Reporter{Node: "n", Boot: "b", Seq: seq} }
	slot := slotOf("kept", "r")
	var other string // in the same slot
	for i := 0; other == ""; i++ {
		if name := fmt.Sprint("other-", i); slotOf(name, "r") == slot {
			other = name
		}
	}
	if _, err := s.Join(ctx, refcontroller.Join{Reporter: at(10), User: "kept", Room: "r", Name: "later"}); err != nil {
		t.Fatal(err)
	}
	list := []refcontroller.Join{{User: other, Room: "r", Name: "o"}}
	if err := s.SetSlot(ctx, at(5), slot, list); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprint([]string{"kept later", other + " o"})
	users := func() string {
		info, _, err := s.Room(ctx, "r")
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, u := range info.GetUsers() {
			out = append(out, u.GetUserId()+" "+u.GetUserName())
		}
		slices.Sort(out)
		return fmt.Sprint(out)
	}
	if got := users(); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if err := s.SetSlot(ctx, at(5), slot, nil); !errors.Is(err, refcontroller.ErrOld) {
		t.Errorf("the same number again: %v", err)
	}
	if err := s.SetSlot(ctx, at(11), slot, nil); err != nil || users() != "[]" {
		t.Errorf("%v, left: %s", err, users())
	}
}

func testLargeNumbers(t *testing.T, s *suite) {
	ctx := t.Context()
	const most = ^uint64(0)
	at := func(seq uint64) refcontroller.Reporter { return refcontroller.Reporter{Node: "n", Boot: "b", Seq: seq} }
	if _, err := s.Leave(ctx, refcontroller.Leave{Reporter: at(most - 1), User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	for seq, want := range map[uint64]error{most - 2: refcontroller.ErrOld, most - 1: refcontroller.ErrOld, 9: refcontroller.ErrOld} {
		if _, err := s.Join(ctx, refcontroller.Join{Reporter: at(seq), User: "u", Room: "r"}); !errors.Is(err, want) {
			t.Errorf("%d: %v", seq, err)
		}
	}
	if _, err := s.Join(ctx, refcontroller.Join{Reporter: at(most), User: "u", Room: "r"}); err != nil {
		t.Error(err)
	}
}

func testLarge(t *testing.T, s *suite) {
	ctx := t.Context()
	const most = 3500
	digests := make([]uint64, slots.Count)
	lists := map[int][]refcontroller.Join{}
	var users []string
	for i := range most {
		user := fmt.Sprint("u", i)
		users = append(users, user)
		digests[slotOf(user, "r")] += slots.Hash(user, "r")
		lists[slotOf(user, "r")] = append(lists[slotOf(user, "r")], refcontroller.Join{User: user, Room: "r"})
	}
	at := refcontroller.Reporter{Node: "n", Boot: "b"}
	for slot, list := range lists {
		at.Seq++
		if err := s.SetSlot(ctx, at, slot, list); err != nil {
			t.Fatal(err)
		}
	}
	if differing, err := s.Differing(ctx, at, digests); len(differing) > 0 || err != nil {
		t.Errorf("%d slots differ, %v", len(differing), err)
	}
	info, _, err := s.Room(ctx, "r")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, u := range info.GetUsers() {
		found[u.GetUserId()] = true
	}
	if len(info.GetUsers()) != most || len(found) != most {
		t.Errorf("%d members, %d of them different", len(info.GetUsers()), len(found))
	}
	presences, err := s.Users(ctx, append(users, "nobody"), false)
	if err != nil || len(presences) != most+1 {
		t.Fatal(len(presences), err)
	}
	for i, p := range presences {
		if (len(p.Nodes) == 1) != (i < most) {
			t.Fatalf("user %d: %v", i, p)
		}
	}
	if n, err := s.DropNode(ctx, "n"); n != most || err != nil {
		t.Errorf("%d ended, %v", n, err)
	}
	if info, _, err := s.Room(ctx, "r"); info != nil || err != nil {
		t.Errorf("left: %v, %v", info, err)
	}
}

func testContents(t *testing.T, s *suite) {
	ctx := t.Context()
	metadata := map[string]string{"": "", "k": "\x00\n 1 2", "0 0 0 0 0 0\n": "ü"}
	ids := []string{"a:b", "{x}", "ü%d*", "acme/" + strings.Repeat("x", 200), " ", "r:", "meta"}
	for _, id := range ids {
		j := refcontroller.Join{Reporter: by("n:1"), User: id, Room: id, Name: "\n\x00 name", Metadata: metadata}
		joined, err := s.Join(ctx, j)
		if err != nil || len(joined.Room.GetUsers()) != 1 {
			t.Fatal(joined, err)
		}
		j.WithoutUsers = true
		if joined, err = s.Join(ctx, j); err != nil || joined.Room.GetRoomId() != id || len(joined.Room.GetUsers()) != 0 {
			t.Fatal("asked without members:", joined, err)
		}
		info, _, err := s.Room(ctx, id)
		if err != nil || len(info.GetUsers()) != 1 {
			t.Fatal(info, err)
		}
		u := info.GetUsers()[0]
		if u.GetUserId() != id || u.GetNodeId() != "n:1" || u.GetUserName() != j.Name || !maps.Equal(u.GetMetadata(), metadata) || u.GetJoinedAt() == 0 || info.GetCreatedAt() == 0 {
			t.Errorf("%q: %v", id, info)
		}
	}
	presences, err := s.Users(ctx, ids, false)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range presences {
		if p.Room != ids[i] || !slices.Equal(p.Nodes, []string{"n:1"}) {
			t.Errorf("%q: %v", ids[i], p)
		}
	}
}

func testConcurrently(t *testing.T, s *suite) {
	var wg sync.WaitGroup
	nodes := []string{"n0", "n1", "n2", "n3"}
	for _, node := range nodes {
		wg.Go(func() {
			for i := range 150 {
				user, room := fmt.Sprint("u", i%50), fmt.Sprint("r", i%7)
				_, err := s.Join(t.Context(), refcontroller.Join{Reporter: by(node), User: user, Room: room})
				_, _, roomErr := s.Room(t.Context(), room)
				_, userErr := s.Users(t.Context(), []string{user}, true)
				if err := errors.Join(err, roomErr, userErr); err != nil {
					t.Error(err)
				}
				if i%3 == 0 {
					_, _ = s.Leave(t.Context(), refcontroller.Leave{Reporter: by(node), User: user, Room: room})
				}
			}
		})
	}
	wg.Wait()
	for _, node := range nodes {
		if _, err := s.DropNode(t.Context(), node); err != nil {
			t.Error(err)
		}
	}
	if rooms, err := s.Rooms(t.Context()); len(rooms) > 0 || err != nil {
		t.Errorf("left behind: %v, %v", rooms, err)
	}
}

func testTold(t *testing.T, s *suite) {
	ctx := t.Context()
	at := func(seq uint64) refcontroller.Reporter { return refcontroller.Reporter{Node: "n", Boot: "b", Seq: seq} }
	for i, do := range []func() error{
		func() error {
			_, err := s.Join(ctx, refcontroller.Join{Reporter: at(1), User: "u", Room: "r"})
			return err
		},
		func() error {
			_, err := s.Join(ctx, refcontroller.Join{Reporter: at(2), User: "u", Room: "r", Name: "new"})
			return err
		},
		func() error {
			_, err := s.Leave(ctx, refcontroller.Leave{Reporter: at(3), User: "u", Room: "r"})
			return err
		},
		func() error {
			return s.SetSlot(ctx, at(4), slotOf("u", "r"), []refcontroller.Join{{User: "u", Room: "r"}})
		},
		func() error { return s.SetSlot(ctx, at(5), slotOf("u", "r"), nil) },
		func() error {
			_, err := s.Join(ctx, refcontroller.Join{Reporter: at(6), User: "u", Room: "r"})
			return err
		},
		func() error { _, err := s.Begin(ctx, at(7)); return err },
		func() error {
			_, err := s.Join(ctx, refcontroller.Join{Reporter: at(8), User: "u", Room: "r"})
			return err
		},
		func() error { _, err := s.DropNode(ctx, "n"); return err },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
		if rooms, users := s.told(); rooms["r"] != 1 || users["u"] != 1 {
			t.Errorf("report %d: told %v and %v", i, rooms, users)
		}
	}
	// What changes nothing is not told.
	if _, err := s.Leave(ctx, refcontroller.Leave{Reporter: at(9), User: "u", Room: "r"}); err != nil {
		t.Error(err)
	}
	if rooms, users := s.told(); len(rooms)+len(users) > 0 {
		t.Errorf("told %v and %v", rooms, users)
	}
}

func testNodes(t *testing.T, s *suite) {
	ctx := t.Context()
	if _, err := s.Join(ctx, refcontroller.Join{Reporter: by("plain"), User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Join(ctx, refcontroller.Join{Reporter: refcontroller.Reporter{Node: "numbered", Boot: "b", Seq: 1}, User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Begin(ctx, refcontroller.Reporter{Node: "empty", Boot: "b", Seq: 1}); err != nil {
		t.Fatal(err)
	}
	nodes, err := s.Nodes(ctx)
	if want := map[string]string{"plain": "", "numbered": "b"}; err != nil || !maps.Equal(nodes, want) {
		t.Errorf("%v, want %v, %v", nodes, want, err)
	}
	if s.ID() == "" {
		t.Error("the store has no name")
	}
}

func testLimit(t *testing.T, s *suite) {
	ctx := t.Context()
	join := func(user, node string) bool {
		joined, err := s.Join(ctx, refcontroller.Join{Reporter: by(node), User: user, Room: "r"})
		if err != nil || joined.Room == nil {
			t.Fatal(joined, err)
		}
		return !joined.Full
	}
	for _, tc := range []struct {
		user, node string
		want       bool
	}{{"a", "n", true}, {"b", "n", true}, {"c", "n", false}, {"a", "m", true}, {"a", "n", true}} {
		if got := join(tc.user, tc.node); got != tc.want {
			t.Errorf("%s at %s is let in: %v", tc.user, tc.node, got)
		}
	}
	if _, err := s.Leave(ctx, refcontroller.Leave{User: "a", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	if !join("c", "n") {
		t.Error("there is room again, and c is not let in")
	}
}
