package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"

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
	join := func(t fataler, user, room, node string) {
		if _, err := s.Join(ctx, refcontroller.Join{Reporter: refcontroller.Reporter{Node: node}, User: user, Room: room, Name: "Name of " + user}); err != nil {
			t.Fatal(err)
		}
	}
	leave := func(t fataler, m member) {
		if _, err := s.Leave(ctx, refcontroller.Leave{Reporter: refcontroller.Reporter{Node: m.node}, User: m.user, Room: m.room}); err != nil {
			t.Fatal(err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		room := newWorld().rooms[0]
		size := rapid.SampledFrom([]int{0, 1, 7, 60, 300}).Draw(t, "size")
		most := rapid.SampledFrom([]int{1, 10, 50, 1000}).Draw(t, "page")
		there := map[member]bool{} // false: it has come or left meanwhile
		order := []member{}
		for i := range size {
			m := member{fmt.Sprint("u", i/2), room, fmt.Sprint("n", i%2)}
			join(t, m.user, m.room, m.node)
			there[m] = true
			order = append(order, m)
		}
		changes, left := rapid.IntRange(0, 20).Draw(t, "changes between pages"), 60
		named := s.pages(t, room, most, func() {
			for i := range min(changes, left) {
				left--
				switch m := rapid.SampledFrom(order).Draw(t, "who"); {
				case rapid.Bool().Draw(t, "leaves"):
					leave(t, m)
					there[m] = false
				default:
					m = member{fmt.Sprint("new", len(order), "-", i), room, "n0"}
					join(t, m.user, m.room, m.node)
					there[m] = false
					order = append(order, m)
				}
			}
		})
		for m, stayed := range there {
			if stayed && named[m] == 0 {
				t.Fatalf("%v was there all the time, and in no page of %d", m, most)
			}
			if changes == 0 && named[m] != 1 {
				t.Fatalf("%v is in %d pages of a room that did not change", m, named[m])
			}
		}
		for m := range named {
			if _, known := there[m]; !known {
				t.Fatalf("%v was never there", m)
			}
		}
	})

	// What a page says beside its members, and what is no place in a room.
	room := newWorld().rooms[0]
	for i := range 1500 {
		join(t, fmt.Sprint("u", i), room, "n0")
	}
	join(t, "u0", room, "n1")
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
