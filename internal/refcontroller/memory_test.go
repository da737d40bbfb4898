package refcontroller

import (
	"cmp"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/slots"
)

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
		if len(c.Moves) == 1 {
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
				_, _, _ = s.Room(t.Context(), room)
				_, _ = s.Users(t.Context(), []string{user}, true)
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
				_, err := s.Users(t.Context(), []string{"u"}, false)
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

func TestMemoryCountsAndKeepsNothingOfWhoHasLeft(t *testing.T) {
	s := NewMemory(0)
	for _, node := range []string{"n", "m"} {
		for _, user := range []string{"u", "v", "w"} {
			if _, err := s.Join(t.Context(), Join{Reporter: Reporter{Node: node}, User: user, Room: "of " + user}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if c := s.Counts(); c != (Counts{Rooms: 3, Users: 3, Memberships: 6}) {
		t.Error(c)
	}
	for _, node := range []string{"n", "m"} {
		if _, err := s.DropNode(t.Context(), node); err != nil {
			t.Fatal(err)
		}
	}
	if c := s.Counts(); c != (Counts{}) || len(s.nodes) > 0 {
		t.Error(c, s.nodes)
	}
}
