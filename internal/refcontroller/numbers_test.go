package refcontroller

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/push-manager/push-manager/internal/slots"
)

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
