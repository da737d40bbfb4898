package presence

import (
	"context"
	"errors"
	"testing"
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
	case <-time.After(30 * time.Second):
		t.Error("what has given way is followed still")
	}
}

// slow is a state that takes as long as it is told to find out what has changed.
type slow struct {
	userState

	asked, answer chan struct{}
}

func (s slow) to(state, target) []*pubsub.PresenceChange {
	close(s.asked)
	<-s.answer
	return nil
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
	case <-time.After(10 * time.Second):
		t.Error("it waits for the large room")
	}
	close(state.answer)
	<-compared
}
