package route

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestWordThatHasRunOutIsNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		d.InvalidateAll()
		d.Vouch(time.Now().Add(3 * time.Second))
		present, _ := ask(t, d, "r")
		ask(t, d, "nowhere")
		early := now()
		time.Sleep(3*time.Second - time.Nanosecond)
		ask(t, d, "r")
		ask(t, d, "nowhere")
		if n := s.count(); n != 2 || !d.Stats().Watched {
			t.Fatalf("%d look-ups while somebody vouches, watched %v", n, d.Stats().Watched)
		}
		time.Sleep(time.Nanosecond)
		if d.Stats().Watched {
			t.Error("still watched")
		}
		if d.Rooms.Cached(0, "r", now()) != nil || d.Rooms.Cached(0, "nowhere", now()) != nil {
			t.Error("an answer serves that nobody vouches for any more")
		}
		// Who asked before the end gets the answer, however late that is.
		if d.Rooms.Cached(0, "r", early) != present {
			t.Error("an answer that was vouched for when it was asked for does not serve")
		}
		// The stream lives, and its word is good again: nothing has to be asked anew.
		d.Vouch(time.Now().Add(3 * time.Second))
		if d.Rooms.Cached(0, "r", now()) != present || d.Rooms.Cached(0, "nowhere", now()) == nil {
			t.Error("what was named by nobody was forgotten")
		}
		d.Vouch(time.Now())
		ask(t, d, "r")
		ask(t, d, "nowhere")
		ask(t, d, "r") // within the TTL
		ask(t, d, "nowhere")
		if n := s.count(); n != 5 {
			t.Errorf("%d look-ups, want one for the room and one each time for the absence", n)
		}
	})
}

// A change is not told to a Push-Manager whose stream has ended: what it looked up a
// moment before may be from before that change.
func TestAnswerThatWasVouchedForHasNoTTLAfterThat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		d.InvalidateAll()
		d.Vouch(time.Now().Add(time.Hour))
		ask(t, d, "r")
		time.Sleep(time.Millisecond)
		d.Vouch(time.Now())
		s.set(func(s *source) { s.rooms["r"] = room("u@A", "v@B") })
		if snap, _ := ask(t, d, "r"); snap.Users != 2 {
			t.Errorf("%d users, 2 are there", snap.Users)
		}
		ask(t, d, "r")
		if n := s.count(); n != 2 {
			t.Errorf("%d look-ups, want one after the end and a TTL for its answer", n)
		}
	})
}

// What a stream vouched for was true up to its end, and serves that much longer while
// the Controller is away; later streams add nothing to it.
func TestStaleAnswersAgeFromTheEndOfTheirStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		d.InvalidateAll()
		d.Vouch(time.Now().Add(time.Hour))
		ask(t, d, "r")
		time.Sleep(time.Minute)
		d.Vouch(time.Now()) // the stream broke
		s.set(func(s *source) { s.err = ErrUnavailable })
		time.Sleep(20 * time.Second)
		d.InvalidateAll() // another one
		d.Vouch(time.Now().Add(time.Hour))
		time.Sleep(39 * time.Second)
		if snap, err := ask(t, d, "r"); err != nil || snap == nil {
			t.Errorf("59 s after the stream's end: %v, %v", snap, err)
		}
		if d.Rooms.Cached(0, "r", now()) == nil {
			t.Error("a stale answer does not serve for a TTL")
		}
		time.Sleep(2 * time.Second)
		if snap, err := ask(t, d, "r"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("61 s after the stream's end: %v, %v", snap, err)
		}
	})
}

// A stale answer serves for its TTL alone: no stream vouches for it.
func TestNobodyVouchesForAStaleAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		ask(t, d, "r")
		d.InvalidateAll()
		d.Vouch(time.Now().Add(time.Hour))
		s.set(func(s *source) { s.err = ErrUnavailable })
		if snap, err := ask(t, d, "r"); err != nil || snap.Users != 1 {
			t.Fatalf("got %v, %v", snap, err)
		}
		s.set(func(s *source) { s.err, s.rooms["r"] = nil, room("u@A", "v@B") })
		time.Sleep(time.Second)
		if snap, _ := ask(t, d, "r"); snap.Users != 2 {
			t.Errorf("%d users after the TTL, 2 are there", snap.Users)
		}
	})
}

// Forgetting everything does not touch what is cached, so it may come often.
func TestForgettingEverythingCostsTheSameHoweverMuchIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{users: map[string][]string{}}
		d := newDirectory(t, s)
		d.InvalidateAll()
		d.Vouch(time.Now().Add(time.Hour))
		allocs := func() float64 { return testing.AllocsPerRun(10, d.InvalidateAll) }
		before := allocs()
		users := make([]string, 20_000)
		for i := range users {
			users[i] = fmt.Sprint("u", i)
			s.users[users[i]] = []string{"A"}
		}
		askUsers(d, users, make([]*Snapshot, len(users)), &teller{})
		synctest.Wait()
		for _, u := range users {
			if d.Users.Cached(0, u, now()) == nil {
				t.Fatalf("%s is not cached", u)
			}
		}
		if after := allocs(); after > before+1 {
			t.Errorf("%v allocations with 20,000 users, %v with none", after, before)
		}
		for _, u := range users {
			if d.Users.Cached(0, u, now()) != nil {
				t.Fatalf("the answer for %s serves after everything was forgotten", u)
			}
		}
	})
}

// While somebody waits for a look-up, nobody gets the answer from before it: not even when
// the word of the change stream is good again meanwhile.
func TestWordThatIsGoodAgainLetsNobodyOvertake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{rooms: map[string][][2]string{"r": room("u@A")}}
		d := newDirectory(t, s)
		d.InvalidateAll()
		d.Vouch(time.Now().Add(time.Second))
		ask(t, d, "r")
		time.Sleep(2 * time.Second)
		gate := make(chan struct{})
		s.set(func(s *source) { s.gate = gate })
		var first, second teller
		d.Rooms.Ask(0, []string{"r"}, now(), &first)
		synctest.Wait()
		d.Vouch(time.Now().Add(time.Hour))
		if d.Rooms.Cached(0, "r", now()) != nil {
			t.Error("a later query was answered before the one that waits")
		}
		d.Rooms.Ask(0, []string{"r"}, now(), &second)
		close(gate)
		synctest.Wait()
		if d.Rooms.Cached(0, "r", now()) == nil {
			t.Error("the new answer is not good")
		}
	})
}
