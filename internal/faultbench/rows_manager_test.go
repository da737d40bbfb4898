package faultbench

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// Faults of Push-Manager itself, by their ids in docs/faults.md.

// P1, without the balancer.
func TestPushManagerThatLeavesFinishesWhatItHasTaken(t *testing.T) {
	s := newStreet(t)
	for _, n := range []*wireNode{s.wire("bad", s.bad...), s.wire("good", s.good...)} {
		n.play(func(a *answer) { a.after = 100 * time.Millisecond })
	}
	m := s.manage(2)
	m.good(room("mixed"))
	since := s.ledger.now()
	callers := m.callers(32, func(r *rand.Rand) request { return some(r, append(s.bad, s.good...), "mixed") })
	callers.more(volume / 2)
	s.ledger.note("asked to stop")
	left := time.Now()
	m.signal(sigterm)
	<-m.done
	took := time.Since(left)
	callers.more(volume / 5)
	callers.end()
	all := s.ledger.tally(since, s.ledger.now(), nil)
	t.Logf("stopped after %v: %v", took.Round(time.Millisecond), all)
	if code := m.cmd.ProcessState.ExitCode(); code != 0 || took > 10*time.Second {
		t.Errorf("exit code %d after %v", code, took)
	}
	if all.unknown+all.failed != 0 || all.success+all.errors[codes.Unavailable] != all.pushes {
		t.Errorf("each push is delivered or refused: %v", all)
	}
	// A refusal without ErrorInfo is one of the connection: that did not send either.
	arrived := map[string]int{}
	s.ledger.mu.Lock()
	defer s.ledger.mu.Unlock()
	for _, a := range s.ledger.arrivals {
		arrived[a.push]++
	}
	for _, p := range s.ledger.pushes {
		if p.err != nil && arrived[p.id] > 0 {
			t.Errorf("it arrived: %v", p)
		}
	}
}

// P2.
func TestKilledPushManagerLeavesNoStreamAndPushesNothingTwice(t *testing.T) {
	s := newStreet(t)
	nodes := []*wireNode{s.wire("bad", s.bad...), s.wire("good", s.good...)}
	m := s.manage(2)
	m.good(room("mixed"))
	since := s.ledger.now()
	callers := m.callers(32, func(r *rand.Rand) request { return some(r, append(s.bad, s.good...), "mixed") })
	for range 3 {
		callers.more(volume / 5)
		s.ledger.note("Push-Manager killed")
		m.kill()
		took := eventually(t, "its streams end", func() error {
			if n := nodes[0].open.Load() + nodes[1].open.Load(); n != 0 {
				return fmt.Errorf("%d are open", n)
			}
			return nil
		})
		t.Logf("its streams ended after %v", took.Round(time.Millisecond))
		m.boot()
		m.ready()
		m.reaches(2)
	}
	callers.more(volume / 2)
	callers.end()
	m.good(room("mixed"))
	all := s.ledger.tally(since, s.ledger.now(), nil)
	t.Log(all)
	if all.bare == 0 || all.delivered == 0 {
		t.Errorf("some were under way when it died, and some arrived: %v", all)
	}
}

// L8: a node whose server has gRPC's own keepalive policy, which ours do not have.
func TestNodeWithoutOurKeepalivePolicyStaysConnected(t *testing.T) {
	slow(t)
	s := newStreet(t)
	plain := newWireNode(t, s.ledger, "bad", wireConfig{plain: true})
	s.register("bad", plain.address)
	s.connect(plain, s.bad...)
	s.wire("good", s.good...)
	m := s.manage(2)
	m.good(room("mixed"))
	m.rest()
	since := s.ledger.now()
	others := m.callers(1, s.someGood)
	wait(70 * time.Second) // an idle connection is cut off after half a minute
	others.end()
	t.Logf("%v attempts to connect in 70 s", m.metric("link_dials_total"))
	if n := m.metric("link_dials_total"); n > 4+2*4 {
		t.Errorf("%v attempts to connect in 70 s: the backoff does not hold", n)
	}
	m.good(room("mixed"))
	s.unharmed(since)
	m.atRest()
}
