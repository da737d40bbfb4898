package storetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/push-manager/push-manager/internal/refcontroller"
)

// pages reads a room in pages, and calls between after each but the last. It counts how often each membership was named.
func (s *suite) pages(t fataler, room string, most int, between func()) map[member]int {
	named := map[member]int{}
	for from := (refcontroller.Cursor{}); ; {
		page, err := s.Members(context.Background(), room, from, most)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range page.Members {
			named[member{m.GetUserId(), room, m.GetNodeId()}]++
		}
		if page.Next == (refcontroller.Cursor{}) {
			return named
		}
		if page.Next == from {
			t.Fatal("a page leads to itself")
		}
		from = page.Next
		between()
	}
}

// testMembers reads a room in pages while its members come and go.
func testMembers(t *testing.T, s *suite) {
	ctx := t.Context()
	join := func(user, room, node string) {
		if _, err := s.Join(ctx, refcontroller.Join{Reporter: refcontroller.Reporter{Node: node}, User: user, Room: room, Name: "Name of " + user}); err != nil {
			t.Fatal(err)
		}
	}
	leave := func(m member) {
		if _, err := s.Leave(ctx, refcontroller.Leave{Reporter: refcontroller.Reporter{Node: m.node}, User: m.user, Room: m.room}); err != nil {
			t.Fatal(err)
		}
	}
	for seed := range uint64(24) {
		rng := rand.New(rand.NewPCG(seed, 3))
		room := newWorld().rooms[0]
		size := []int{0, 1, 7, 60, 200}[rng.IntN(5)]
		most := []int{1, 10, 50, 1000}[rng.IntN(4)]
		there := map[member]bool{} // false: it has come or left meanwhile
		order := []member{}
		for i := range size {
			m := member{fmt.Sprint("u", i/2), room, fmt.Sprint("n", i%2)}
			join(m.user, m.room, m.node)
			there[m] = true
			order = append(order, m)
		}
		changes, left := rng.IntN(20), 60
		named := s.pages(t, room, most, func() {
			for i := range min(changes, left) {
				left--
				m := order[rng.IntN(len(order))]
				if rng.IntN(2) == 0 {
					leave(m)
					there[m] = false
					continue
				}
				m = member{fmt.Sprint("new", len(order), "-", i), room, "n0"}
				join(m.user, m.room, m.node)
				there[m] = false
				order = append(order, m)
			}
		})
		for m, stayed := range there {
			if stayed && named[m] == 0 {
				t.Fatalf("seed %d: %v was there all the time, and in no page of %d", seed, m, most)
			}
			if changes == 0 && named[m] != 1 {
				t.Fatalf("seed %d: %v is in %d pages of a room that did not change", seed, m, named[m])
			}
		}
		for m := range named {
			if _, known := there[m]; !known {
				t.Fatalf("seed %d: %v was never there", seed, m)
			}
		}
	}

	// What a page says beside its members, and what is no place in a room.
	room := newWorld().rooms[0]
	for i := range 1500 {
		join(fmt.Sprint("u", i), room, "n0")
	}
	join("u0", room, "n1")
	page, err := s.Members(ctx, room, refcontroller.Cursor{}, 1000)
	if err != nil || page.Users != 1500 || page.Next.Store != s.ID() || len(page.Members) < 500 || len(page.Members) > 1501 {
		t.Fatalf("%d members, %d users, next %v: %v", len(page.Members), page.Users, page.Next, err)
	}
	if m := page.Members[0]; m.GetUserName() != "Name of "+m.GetUserId() || m.GetJoinedAt() == 0 {
		t.Errorf("%v", m)
	}
	if page, err := s.Members(ctx, "nobody's", refcontroller.Cursor{}, 10); err != nil || len(page.Members) != 0 || page.Next != (refcontroller.Cursor{}) {
		t.Errorf("%v, %v", page, err)
	}
	if _, err := s.Members(ctx, room, refcontroller.Cursor{Store: "another", At: page.Next.At}, 10); !errors.Is(err, refcontroller.ErrOtherStore) {
		t.Errorf("a place in another store: %v", err)
	}
	for _, at := range []string{"", "0", "-1", "x", "99999999999999999999999"} {
		if _, err := s.Members(ctx, room, refcontroller.Cursor{Store: s.ID(), At: at}, 10); !errors.Is(err, refcontroller.ErrCursor) {
			t.Errorf("%q: %v", at, err)
		}
	}
}
