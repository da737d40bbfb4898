package node

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/ids"
	pubsub "github.com/push-manager/push-manager/proto"
)

// silent is a connection that takes everything.
type silent struct{ _ int }

func (*silent) Deliver(*Message) Outcome { return Delivered }

func listingNode(t *testing.T, sessions Sessions) *Server {
	t.Helper()
	s, err := New(Config{NodeID: "n", Sessions: sessions})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// A manager reads all users page by page, each in its turn and each once.
func TestListUsersNamesEverybodyInTheOrderOfTurns(t *testing.T) {
	users := NewUsers[*silent]()
	for i := range 1000 {
		users.Add(fmt.Sprint("u", i), &silent{})
		users.Add(fmt.Sprint("shop/u", i), &silent{})
	}
	users.Add("u1", &silent{}) // once more
	s := listingNode(t, users)
	for scope, want := range map[string]int{"": 2000, "shop/": 1000, "news/": 0} {
		var all []string
		first, pages := uint64(0), 0
		for {
			r, err := s.ListUsers(t.Context(), &pubsub.ListUsersRequest{FirstTurn: first, Limit: 300, Scope: scope})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.GetUserIds()) > 300 {
				t.Errorf("%d users on a page", len(r.GetUserIds()))
			}
			for _, user := range r.GetUserIds() {
				if turn := ids.Turn(user); turn < first || turn > r.GetLastTurn() || !strings.HasPrefix(user, scope) {
					t.Errorf("%q has turn %d, asked for %d, up to %d", user, turn, first, r.GetLastTurn())
				}
			}
			all = append(all, r.GetUserIds()...)
			if pages++; r.GetLastTurn() == ids.LastTurn {
				break
			}
			first = r.GetLastTurn() + 1
		}
		if !slices.IsSortedFunc(all, func(a, b string) int {
			if ids.Turn(a) < ids.Turn(b) {
				return -1
			}
			return 1
		}) {
			t.Errorf("scope %q: not in order", scope)
		}
		slices.Sort(all)
		if n := len(slices.Compact(all)); n != want || pages != max(1, (want+299)/300) {
			t.Errorf("scope %q: %d users on %d pages, want %d", scope, n, pages, want)
		}
	}
}

func TestAListOfUsersFitsIntoAFrame(t *testing.T) {
	users := NewUsers[*silent]()
	for i := range 9000 {
		users.Add(fmt.Sprintf("%0250d", i), &silent{}) // 2.2 MiB
	}
	s := listingNode(t, users)
	r, err := s.ListUsers(t.Context(), &pubsub.ListUsersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	last := r.GetUserIds()[len(r.GetUserIds())-1]
	if size := r.SizeVT(); size > 1<<20 || size < 800<<10 || r.GetLastTurn() != ids.Turn(last) {
		t.Errorf("%d bytes, up to %d", size, r.GetLastTurn())
	}
}

// nameless are Sessions that do not name their users.
type nameless struct{ Sessions }

func TestANodeThatNamesNoUsersSaysSo(t *testing.T) {
	s := listingNode(t, nameless{NewUsers[*silent]()})
	if _, err := s.ListUsers(t.Context(), &pubsub.ListUsersRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("%v", err)
	}
	s = listingNode(t, NewUsers[*silent]())
	if _, err := s.ListUsers(t.Context(), &pubsub.ListUsersRequest{Scope: "shop"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("%v", err)
	}
}

// panicking names a user and fails.
type panicking struct{ Sessions }

func (panicking) EachUser(yield func(string) bool) { yield("a"); panic("a bug of the gateway") }

func TestAPanicWhileUsersAreListedEndsTheCall(t *testing.T) {
	s := listingNode(t, panicking{NewUsers[*silent]()})
	for range 2 { // the second finds no lock held
		if _, err := (guarded{s}).ListUsers(t.Context(), &pubsub.ListUsersRequest{}); status.Code(err) != codes.Internal {
			t.Errorf("%v", err)
		}
	}
}

func BenchmarkListUsers(b *testing.B) {
	users := NewUsers[*silent]()
	for i := range 100_000 {
		users.Add(fmt.Sprint("user-", i), &silent{})
	}
	s, err := New(Config{NodeID: "n", Sessions: users})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.ListUsers(b.Context(), &pubsub.ListUsersRequest{Limit: 5000}); err != nil {
			b.Fatal(err)
		}
	}
}
