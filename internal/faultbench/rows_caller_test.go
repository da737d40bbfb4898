package faultbench

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Faults of callers, by their ids in docs/faults.md.

// B1.
func TestCallersWhoLeaveLeaveTheBooksBalanced(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	s.wire("good", s.good...)
	m := s.manage(2)
	m.good(room("mixed"))
	m.rest()
	bad.play(func(a *answer) { a.after = rand.N(20 * time.Millisecond) })
	api := m.dial()
	// Long enough that some arrive, short enough that most do not: what that is, the machine says.
	var all tally
	for most := 20 * time.Millisecond; most < 5*time.Second; most *= 2 {
		since := s.ledger.now()
		s.leave(m, api, most)
		all = s.ledger.tally(since, s.ledger.now(), nil)
		t.Logf("within %v: %v", most, all)
		if all.success >= all.pushes/10 {
			break
		}
	}
	if all.errors[codes.Canceled] == 0 || all.errors[codes.DeadlineExceeded] == 0 || all.success == 0 {
		t.Errorf("some leave and some do not: %v", all)
	}
	m.hears(api)
	m.atRest()
	counted, err := m.read()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, outcome := range []string{"success", "failed", "unknown", "offline"} {
		sum += counted["push_manager_push_"+outcome+"_total"]
	}
	if total := counted["push_manager_push_total"]; total != sum || total == 0 {
		t.Errorf("%v targets were counted, their outcomes are %v", total, sum)
	}
	bad.play(nil)
	m.good(room("mixed"))
}

// leave lets callers push to a room and go after at most so long, half of them by a deadline
// and half without a word.
func (s *street) leave(m *manager, api pubsub.PushManagerServiceClient, most time.Duration) {
	var callers sync.WaitGroup
	for i := range 16 {
		callers.Go(func() {
			r := rand.New(rand.NewPCG(s.seed, uint64(i)))
			for range volume / 10 {
				after := time.Duration(r.Int64N(int64(most)))
				ctx, cancel := context.WithTimeout(s.t.Context(), after)
				if r.IntN(2) == 0 { // cancelled, and not expired
					ctx, cancel = context.WithCancel(s.t.Context())
					stop := time.AfterFunc(after, cancel)
					defer stop.Stop()
				}
				q := room("mixed")
				q.deadline = 0
				m.ask(ctx, api, q)
				cancel()
			}
		})
	}
	callers.Wait()
}

// B2.
func TestNothingIsWrittenAfterTheDeadline(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	m := s.manage(1, "LINK_WINDOW=32", "LINK_ACK_TIMEOUT=10m", "LINK_SILENCE=11m", "LINK_QUEUE_AGE=10m")
	m.good(user("bad1"))
	m.rest()
	bad.pause()
	since := s.ledger.now()
	short := func(r *rand.Rand) request { q := user(pick(r, s.bad)); q.deadline = 100 * time.Millisecond; return q }
	callers := m.callers(300, short)
	callers.more(volume)
	m.until(`deliveries_total{reason="expired before it was sent"}`, func(v float64) bool { return v > 0 })
	callers.settle()
	all := s.tallyBad(since)
	if all.success > 0 || all.pushes == 0 {
		t.Errorf("nobody could be reached: %v", all)
	}
	late, expired := s.ledger.now(), map[string]bool{}
	s.ledger.tally(since, late, func(p *push) bool { expired[p.id] = true; return true })
	bad.resume()
	m.good(user("bad1"))
	// What stood in the windows had been written in time. Nothing else comes.
	if n := s.ledger.arrived(late, func(a arrival) bool { return expired[a.push] }); n == 0 || n > 2*32 {
		t.Errorf("%d arrived after their deadline, the windows are 32 each", n)
	}
	for _, d := range []time.Duration{time.Nanosecond, time.Millisecond} {
		before := s.ledger.now()
		q := user("bad1")
		q.deadline = d
		for range 200 {
			m.push(q)
		}
		if all := s.ledger.tally(before, s.ledger.now(), nil); all.errors[codes.DeadlineExceeded]+all.success+all.unknown != all.pushes {
			t.Errorf("with a deadline of %v: %v", d, all)
		}
	}
	m.atRest()
}

// B3.
func TestCallWithoutADeadlineGetsTheDefault(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	m := s.manage(1, "PUSH_TIMEOUT=500ms", "LINK_ACK_TIMEOUT=60s")
	m.good(user("bad1"))
	m.rest()
	bad.play(func(a *answer) { a.silent = true })
	since := s.ledger.now()
	endless := func(r *rand.Rand) request { q := user(pick(r, s.bad)); q.deadline = 0; return q }
	callers := m.callers(100, endless)
	callers.more(volume / 2)
	callers.end()
	all := s.tallyBad(since)
	// What was written is unknown, and what waited behind it has expired there.
	if all.unknown != all.targets || all.unknown == 0 || all.pushes-all.unknown > all.errors[codes.DeadlineExceeded] || all.bare > 0 {
		t.Errorf("all end: %v", all)
	}
	if all.slowest > 500*time.Millisecond+slackForCI {
		t.Errorf("the slowest took %v", all.slowest)
	}
	if m.metric("link_window_deliveries") != 0 {
		t.Error("something is still owed to callers who have gone")
	}
}

// B4: pushes through a stream while routes change and a link breaks; the checker sees to
// the order (I10).
func TestStreamKeepsTheOrderOfEachKey(t *testing.T) {
	s := newStreet(t)
	_, link := s.behind("bad", s.bad...)
	good := s.wire("good", s.good...)
	m := s.manage(2, "ROUTE_CACHE_TTL=50ms")
	m.good(room("mixed"))
	m.rest()
	r := rand.New(rand.NewPCG(s.seed, 0))
	requests := make([]request, 5*volume)
	for i := range requests {
		requests[i] = some(r, append(s.bad, s.good...), "mixed")
	}
	since := s.ledger.now()
	done := make(chan struct{})
	var breaker sync.WaitGroup
	breaker.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			wait(30 * time.Millisecond)
			if i%10 == 9 {
				link.reset()
			}
			id := names("visitor", 1)[0]
			if i%2 == 0 {
				s.connect(good, id)
				s.world.join("mixed", id)
			}
		}
	})
	for range 3 {
		m.stream(requests)
	}
	close(done)
	breaker.Wait()
	all := s.ledger.tally(since, s.ledger.now(), nil)
	t.Log(all)
	if all.delivered < volume {
		t.Errorf("too little arrives for a test of order: %v", all)
	}
	m.good(room("mixed"))
	m.atRest()
}
