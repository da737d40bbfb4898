package presence

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
)

// nobody is a Controller who knows nobody.
type nobody struct{}

func (nobody) ListMembers(context.Context, string, string, int) (*pubsub.ListMembersResponse, error) {
	return &pubsub.ListMembersResponse{}, nil
}

func (nobody) Whereabouts(_ context.Context, users []string) ([]*pubsub.GetUserNodeResponse, error) {
	all := make([]*pubsub.GetUserNodeResponse, len(users))
	for i := range all {
		all[i] = &pubsub.GetUserNodeResponse{}
	}
	return all, nil
}

func (nobody) Watched() bool      { return true }
func (nobody) Renewed() time.Time { return time.Time{} }

func newService(t *testing.T, watched int) *Service {
	t.Helper()
	s, err := New(Config{
		Controller: nobody{}, Watched: watched, Linger: time.Hour,
		Room: func(context.Context, string) (*route.Snapshot, error) { return nil, errors.New("no rooms") },
		Connections: func(context.Context, string, []string) ([]*pubsub.UserConnections, error) {
			return nil, errors.New("no nodes")
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// TestATenantTakesItsShareOfWhatIsWatchedAndNoMore also when it watches one user after the other for a moment.
func TestATenantTakesItsShareOfWhatIsWatchedAndNoMore(t *testing.T) {
	s := newService(t, 8)
	follow := func(scope, user string) (*subject, error) { return s.follow(scope, target{id: scope + user}) }
	for _, user := range []string{"a", "b"} {
		if _, err := follow("shop/", user); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := follow("shop/", "c"); !errors.Is(err, ErrFull) {
		t.Errorf("more than a quarter for one tenant: %v", err)
	}
	if _, err := follow("bank/", "a"); err != nil {
		t.Errorf("for another tenant: %v", err)
	}
	if again, err := follow("shop/", "a"); err != nil || again.watchers != 2 {
		t.Errorf("what is watched already: %v", err)
	}
}

// TestWhatNobodyWatchesAnyMoreGivesWay to what somebody wants to watch.
func TestWhatNobodyWatchesAnyMoreGivesWay(t *testing.T) {
	s := newService(t, 2)
	ended := make(chan *subject, 8)
	s.begin = func(sub *subject) {
		s.wg.Go(func() {
			s.followLoop(t.Context(), sub)
			ended <- sub
		})
	}
	first, err := s.follow("", target{id: "a"})
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.follow("", target{id: "b"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.follow("", target{id: "c"}); !errors.Is(err, ErrFull) {
		t.Errorf("one too many: %v", err)
	}
	s.unfollow(first)
	time.Sleep(time.Millisecond)
	s.unfollow(second)
	if _, err := s.follow("", target{id: "c"}); err != nil {
		t.Errorf("in the place of what nobody watches: %v", err)
	}
	if again, err := s.follow("", target{id: "b"}); err != nil || again != second {
		t.Errorf("the one that was watched later is not there any more: %v", err)
	}
	if n := s.count.Load(); n != 2 {
		t.Errorf("%d are counted", n)
	}
	select {
	case sub := <-ended:
		if sub != first {
			t.Error("another one has ended")
		}
	case <-time.NewTimer(30 * time.Second).C:
		t.Error("what has given way is followed still")
	}
}

// slow is a state that takes as long as it is told to find out what has changed.
type slow struct {
	userState

	asked, answer chan struct{}
}

func (s slow) to(state, target, int) (changes []*pubsub.PresenceChange, fits bool) {
	close(s.asked)
	<-s.answer
	return nil, true
}

// TestALargeRoomThatIsComparedHoldsNobodyUp who begins to watch something else: the change stream would wait for them.
func TestALargeRoomThatIsComparedHoldsNobodyUp(t *testing.T) {
	s := newService(t, 8)
	large, err := s.follow("", target{id: "large"})
	if err != nil {
		t.Fatal(err)
	}
	state := slow{asked: make(chan struct{}), answer: make(chan struct{})}
	sub := &subject{target: target{id: "large"}, state: state, moved: make(chan struct{}), watchers: 1, named: make(chan struct{}, 1)}
	s.mu.Lock()
	s.subjects[large.target] = sub // in the place of the one with a loop
	s.mu.Unlock()
	compared := make(chan struct{})
	go func() {
		defer close(compared)
		s.take(sub, userState{})
	}()
	<-state.asked
	began := make(chan error, 1)
	go func() {
		_, err := s.follow("", target{id: "other"})
		began <- err
	}()
	select {
	case err := <-began:
		if err != nil {
			t.Error(err)
		}
	case <-time.NewTimer(10 * time.Second).C:
		t.Error("it waits for the large room")
	}
	close(state.answer)
	<-compared
}

// held is a Controller that answers nobody of one tenant.
type held struct {
	nobody

	scope string
}

func (h held) Whereabouts(ctx context.Context, users []string) ([]*pubsub.GetUserNodeResponse, error) {
	if strings.HasPrefix(users[0], h.scope) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return h.nobody.Whereabouts(ctx, users)
}

// TestATenantThatAsksMuchKeepsNoOtherOneWaiting neither with calls that take long nor with pages.
func TestATenantThatAsksMuchKeepsNoOtherOneWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newService(t, 8)
		s.cfg.Controller = held{scope: "shop/"}
		ctx, cancel := context.WithCancel(t.Context())
		var shop sync.WaitGroup
		sees := func(string) bool { return true }
		for range 2 * s.cfg.Reads {
			shop.Go(func() { _, _ = s.Users(ctx, "shop/", []string{"a"}, false, sees) })
		}
		synctest.Wait()
		if asking := len(s.shared.places); asking != s.cfg.Reads/4 {
			t.Errorf("%d of %d places are one tenant's", asking, s.cfg.Reads)
		}
		for _, scope := range []string{"bank/", ""} {
			began := time.Now()
			if _, err := s.Users(ctx, scope, []string{"a"}, false, sees); err != nil || time.Since(began) > 0 {
				t.Errorf("a call of %q: %v after %v", scope, err, time.Since(began))
			}
		}
		cancel()
		shop.Wait()
		if n := len(s.shared.places) + len(s.turnsOf("shop/")[0].places); n > 0 {
			t.Errorf("%d places are not given back", n)
		}
		began := time.Now()
		for range 60 {
			shop.Go(func() {
				if _, err := s.Members(t.Context(), "shop/", "r", "", 0); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if _, err := s.Members(t.Context(), "bank/", "r", "", 0); err != nil || time.Since(began) > 0 {
			t.Errorf("a page: %v after %v", err, time.Since(began))
		}
		shop.Wait()
		if took := time.Since(began); took < 2*time.Second || took > 3*time.Second {
			t.Errorf("60,000 members after %v", took)
		}
	})
}

// TestMoreChangesThanAreKeptAreASnapshot for everybody who watches, also for who had read all.
func TestMoreChangesThanAreKeptAreASnapshot(t *testing.T) {
	const members = 100_000
	s := newService(t, 1000)
	sub := &subject{target: target{true, "r"}, named: make(chan struct{}, 1), moved: make(chan struct{})}
	large := &route.Snapshot{Found: true, Users: members}
	for n := range 10 {
		g := &route.Group{Node: fmt.Sprint("n", n)}
		for i := range members / 10 {
			g.Users = append(g.Users, fmt.Sprintf("u%06d", n*members/10+i))
		}
		large.Groups = append(large.Groups, g)
	}
	s.take(sub, roomState{large})
	before := place{n: sub.first + uint64(len(sub.changes))}
	empty := roomState{&route.Snapshot{}}
	s.take(sub, empty)
	all, some, next, _ := sub.read(before)
	if all != empty || len(some) > 0 || len(sub.changes) > 0 || sub.has(before.n) || !sub.has(next) {
		t.Errorf("a room that empties: snapshot %v, %d changes, %d are kept", all != nil, len(some), len(sub.changes))
	}
	one := &route.Snapshot{Found: true, Users: 1, Unplaced: []string{"u"}}
	s.take(sub, roomState{one})
	if all, some, _, _ := sub.read(place{n: next}); all != nil || len(some) != 1 {
		t.Errorf("what comes then: snapshot %v, %d changes", all != nil, len(some))
	}
}
