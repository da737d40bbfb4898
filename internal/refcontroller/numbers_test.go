package refcontroller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/internal/slots"
)

// numbered is a report of the one node in these tests, on its way.
type numbered struct {
	seq   uint64
	k     member
	joins bool
	// The slot's members when the report is about a whole slot.
	slot    int
	members []Join
}

func (r numbered) run(s *Memory) error {
	by := Reporter{Node: r.k.node, Boot: "boot", Seq: r.seq}
	var err error
	switch {
	case r.members != nil:
		err = s.SetSlot(context.Background(), by, r.slot, r.members)
	case r.joins:
		_, err = s.Join(context.Background(), Join{Reporter: by, User: r.k.user, Room: r.k.room})
	default:
		_, err = s.Leave(context.Background(), Leave{Reporter: by, User: r.k.user, Room: r.k.room})
	}
	return err
}

// Reports overtake each other, come twice and come late. In the end there is what
// the node said last of each user and room.
func TestReportsInAnyOrderEndInWhatWasSaidLast(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := NewMemory(0)
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
			if err != nil && !errors.Is(err, ErrOld) {
				t.Fatal(err)
			}
			// Whoever still waits for the answer reports again.
			if err != nil && r.members == nil && newest[r.k] == r.seq {
				say(r.k)
			}
		}
		draw := func(t *rapid.T) member {
			return member{rapid.SampledFrom(worldUsers).Draw(t, "user"), rapid.SampledFrom(worldRooms).Draw(t, "room"), "n"}
		}
		t.Repeat(map[string]func(*rapid.T){
			"change": func(t *rapid.T) {
				k := draw(t)
				truth[k] = !truth[k]
				say(k)
			},
			"whole slot": func(t *rapid.T) {
				slot := slots.Of(slots.Hash(draw(t).user, draw(t).room))
				r := numbered{seq: number(), k: member{node: "n"}, slot: slot, members: []Join{}}
				for k, in := range truth {
					if in && slots.Of(slots.Hash(k.user, k.room)) == slot {
						r.members = append(r.members, Join{User: k.user, Room: k.room})
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
				if err := under[rapid.IntRange(0, len(under)-1).Draw(t, "which")].run(s); err != nil && !errors.Is(err, ErrOld) {
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
				digests[slots.Of(slots.Hash(k.user, k.room))] += slots.Hash(k.user, k.room)
			}
		}
		if got, want := storeAnswers(t, s).rooms, want.answers().rooms; !maps.Equal(got, want) {
			t.Fatalf("got %v\nwant %v", got, want)
		}
		differing, err := s.Differing(context.Background(), Reporter{Node: "n", Boot: "boot"}, digests)
		if err != nil || len(differing) > 0 {
			t.Fatalf("slots %v differ, %v", differing, err)
		}
	})
}

func TestWhatAnEarlierProcessReportsLateChangesNothing(t *testing.T) {
	s := NewMemory(0)
	ctx := t.Context()
	report := func(boot string, seq uint64) Reporter { return Reporter{Node: "n", Boot: boot, Seq: seq} }
	join := func(by Reporter, user string) error {
		_, err := s.Join(ctx, Join{Reporter: by, User: user, Room: "r"})
		return err
	}
	if err := join(report("first", 900), "u"); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Begin(ctx, report("second", 1)); n != 1 || err != nil {
		t.Fatalf("%d ended, %v", n, err)
	}
	if err := join(report("first", 901), "u"); !errors.Is(err, ErrOtherBoot) {
		t.Errorf("late join: %v", err)
	}
	if err := join(report("second", 2), "v"); err != nil {
		t.Fatal(err)
	}
	if left, err := s.Leave(ctx, Leave{Reporter: report("first", 902), User: "v", Room: "r"}); left || !errors.Is(err, ErrOtherBoot) {
		t.Errorf("late leave: %v, %v", left, err)
	}
	if n, err := s.Begin(ctx, report("second", 1)); n != 0 || err != nil { // The call at the start comes again.
		t.Errorf("%d ended, %v", n, err)
	}
	if c := s.Counts(); c != (Counts{Rooms: 1, Users: 1, Memberships: 1}) {
		t.Errorf("%+v", c)
	}
	if n, err := s.Begin(ctx, report("second", 3)); n != 1 || err != nil { // The node goes.
		t.Errorf("%d ended, %v", n, err)
	}
	if err := join(report("second", 2), "v"); !errors.Is(err, ErrOld) {
		t.Errorf("join from before the end: %v", err)
	}
}

func TestReportsWithoutNumbersAreExecutedAsTheyCome(t *testing.T) {
	s := NewMemory(0)
	ctx := t.Context()
	for range 3 {
		if _, err := s.Join(ctx, Join{Reporter: Reporter{Node: "n", Seq: 1}, User: "u", Room: "r"}); err != nil {
			t.Fatal(err)
		}
		if left, err := s.Leave(ctx, Leave{Reporter: Reporter{Node: "n", Seq: 1}, User: "u", Room: "r"}); !left || err != nil {
			t.Fatal(left, err)
		}
	}
	// A node that goes back to a version without numbers.
	if _, err := s.Join(ctx, Join{Reporter: Reporter{Node: "n", Boot: "b", Seq: 1}, User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Begin(ctx, Reporter{Node: "n"}); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if _, err := s.Join(ctx, Join{Reporter: Reporter{Node: "n"}, User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
}

// size is about the memory that a node has beside its memberships.
func (n *node) size() uintptr {
	size := unsafe.Sizeof(*n)
	for _, group := range n.groups {
		if group != nil {
			size += unsafe.Sizeof(*group)
		}
	}
	return size
}

// A report about nothing takes no memory, and is the last one all the same.
func TestNodeThatHasNothingIsSmall(t *testing.T) {
	s := NewMemory(0)
	ctx := t.Context()
	by := Reporter{Node: "n", Boot: "b"}
	for slot := range slots.Count {
		by.Seq++
		if err := s.SetSlot(ctx, by, slot, nil); err != nil {
			t.Fatal(err)
		}
	}
	for u := range 1000 {
		by.Seq++
		if _, err := s.Leave(ctx, Leave{Reporter: by, User: fmt.Sprint(u), Room: "r"}); err != nil {
			t.Fatal(err)
		}
	}
	if size := s.nodes["n"].size(); size > 1<<10 {
		t.Errorf("it has %d bytes", size)
	}
	if _, err := s.Join(ctx, Join{Reporter: by, User: "7", Room: "r"}); !errors.Is(err, ErrOld) {
		t.Errorf("a join that is not above: %v", err)
	}
	by.Seq++
	if _, err := s.Join(ctx, Join{Reporter: by, User: "7", Room: "r"}); err != nil {
		t.Error(err)
	}
	if size := s.nodes["n"].size(); size > 3<<10 {
		t.Errorf("with one membership it has %d bytes", size)
	}
}

// To look for nodes that are silent takes time, in which nobody else is answered.
func TestNewNodesDoNotLookAtAllOthersEachTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewMemory(0)
		join := func(node string) {
			t.Helper()
			if _, err := s.Begin(t.Context(), Reporter{Node: node, Boot: "b", Seq: 1}); err != nil {
				t.Fatal(err)
			}
		}
		join("old")
		time.Sleep(nodeMemory + time.Second)
		join("a") // finds it
		s.nodes["old"] = &node{id: "old"}
		join("b")
		if s.nodes["old"] == nil {
			t.Error("b has looked at all of them, right after a")
		}
		time.Sleep(sweepEvery)
		if join("c"); s.nodes["old"] != nil {
			t.Error("nobody looks any more")
		}
	})
}

// Whoever has left leaves nothing behind: numbers are kept for slots and nodes.
func TestMemoryOfNumbersIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewMemory(0)
		for n := range 100 {
			by := Reporter{Node: fmt.Sprint("n", n), Boot: "b"}
			for u := range 100 {
				by.Seq++
				if _, err := s.Join(t.Context(), Join{Reporter: by, User: fmt.Sprint(u), Room: "r"}); err != nil {
					t.Fatal(err)
				}
				by.Seq++
				if _, err := s.Leave(t.Context(), Leave{Reporter: by, User: fmt.Sprint(u), Room: "r"}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if len(s.users) > 0 || len(s.rooms) > 0 || len(s.nodes) != 100 {
			t.Errorf("%d users, %d rooms, %d nodes are kept", len(s.users), len(s.rooms), len(s.nodes))
		}
		for _, n := range s.nodes {
			if size := n.size(); size > 1<<10 {
				t.Fatalf("a node without memberships has %d bytes", size)
			}
		}
		time.Sleep(nodeMemory + time.Second)
		if _, err := s.Join(t.Context(), Join{Reporter: Reporter{Node: "new", Boot: "b", Seq: 1}, User: "u", Room: "r"}); err != nil {
			t.Fatal(err)
		}
		if len(s.nodes) != 1 {
			t.Errorf("%d nodes are kept", len(s.nodes))
		}
	})
}
