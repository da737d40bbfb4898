package faultbench

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

// Faults of Connect-Nodes, by their ids in docs/faults.md. Each has a node "bad"
// that something happens to and a node "good" that must not suffer from it.

// street is the usual deployment: ten users at each of the two nodes, and a room
// "mixed" over both.
type street struct {
	*bench
	bad, good []string // users
}

func newStreet(t *testing.T) *street {
	t.Helper()
	t.Parallel()
	return aloneInStreet(t)
}

// aloneInStreet is the same for a test that shares something with others.
func aloneInStreet(t *testing.T) *street {
	t.Helper()
	return aloneInStreetOf(t, etcdtest.Start(t))
}

// aloneInStreetOf is the same with an etcd that runs already.
func aloneInStreetOf(t *testing.T, etcd *etcdtest.Server) *street {
	t.Helper()
	s := &street{bench: newBenchOf(t, etcd), bad: names("bad", 10), good: names("good", 10)}
	s.world.join("mixed", append(s.bad, s.good...)...)
	s.world.join("bad room", s.bad...)
	s.world.join("good room", s.good...)
	return s
}

// someBad and someGood make a push for the users of one node: to one user or to
// the room.
func (s *street) someBad(r *rand.Rand) request  { return some(r, s.bad, "bad room") }
func (s *street) someGood(r *rand.Rand) request { return some(r, s.good, "good room") }

func some(r *rand.Rand, users []string, roomID string) request {
	if r.IntN(4) == 0 {
		return room(roomID)
	}
	return user(pick(r, users))
}

// forBad and forGood pick the pushes to one node.
func forBad(p *push) bool  { return strings.HasPrefix(p.key, "bad") }
func forGood(p *push) bool { return strings.HasPrefix(p.key, "good") }

// unharmed checks that pushes to the good node did not suffer since a moment (I9), while the
// machine let our own nodes and callers run. Of the few pushes of a test one may be late all
// the same.
func (s *street) unharmed(since time.Duration) {
	s.t.Helper()
	all := s.ledger.tally(since, s.ledger.now(), forGood)
	judged := s.ledger.tally(since, s.ledger.now(), func(p *push) bool { return forGood(p) && !s.ledger.nearFreezeLocked(p, besideFreeze) })
	s.t.Logf("I9: to the other node: %v; %d are left out: the machine did not let us run", all, all.pushes-judged.pushes)
	if all.success == 0 || judged.pushes-judged.success > max(1, judged.pushes/1000) {
		s.t.Errorf("the other node suffered: %v", judged)
	}
}

// some pushes to the bad node since a moment.
func (s *street) tallyBad(since time.Duration) tally {
	all := s.ledger.tally(since, s.ledger.now(), forBad)
	s.t.Logf("to the bad node: %v", all)
	return all
}

// noErrors fails the test when a call failed as a call. Callers that could not run are late to
// see their answers.
func (s *street) noErrors(all tally) {
	s.t.Helper()
	failed := -all.late
	for _, n := range all.errors {
		failed += n
	}
	if failed > 0 {
		s.t.Errorf("calls failed: %v", all)
	}
}

// N1.
func TestKilledNodeLeavesInFlightUnknownAndQueuedFailed(t *testing.T) {
	s := newStreet(t)
	bad := s.child("bad", s.bad...)
	s.child("good", s.good...)
	// Nothing but the broken connection can settle the pushes in time.
	m := s.manage(2, "LINK_WINDOW=32", "LINK_ACK_TIMEOUT=30s", "LINK_QUEUE_AGE=30s", "LINK_SILENCE=60s", "PUSH_TIMEOUT=30s")
	m.good(room("mixed"))
	m.rest()
	others := m.callers(8, s.someGood)
	bad.stop()
	since := s.ledger.now()
	long := func(r *rand.Rand) request { q := user(pick(r, s.bad)); q.deadline = 20 * time.Second; return q }
	victims := m.callers(300, long)
	m.until("link_queue_deliveries", func(v float64) bool { return v >= 100 }) // the good node has 8 at most
	victims.halt()
	s.ledger.note("node bad killed")
	killed := s.ledger.now()
	bad.kill()
	victims.end()
	took := s.ledger.now() - killed
	all := s.tallyBad(since)
	t.Logf("resolved after %v", took.Round(time.Millisecond))
	if took > 10*time.Second { // their own deadline is the next that would
		t.Errorf("resolved only after %v", took)
	}
	if all.unknown == 0 || all.unknown > 2*32 || all.failed < 50 || all.unknown+all.failed != all.targets {
		t.Errorf("in flight is unknown and queued is failed: %v", all)
	}
	s.noErrors(all)
	if m.connections("bad") != 0 {
		t.Error("the dead node still has connections")
	}
	if p := m.push(patiently(user(s.bad[0]))); p.summary.GetFailed() != 1 || p.took() > 10*time.Second {
		t.Errorf("a push to the dead node: %v", p)
	}
	others.more(volume)
	others.end()
	s.unharmed(since)
	m.atRest()
}

// N2.
func TestPushToADeadIdleNodeFailsAtOnce(t *testing.T) {
	s := newStreet(t)
	bad := s.child("bad", s.bad...)
	s.child("good", s.good...)
	m := s.manage(2)
	m.good(room("mixed"))
	m.rest()
	bad.kill()
	took := eventually(t, "unroutable", func() error {
		if m.connections("bad") != 0 {
			return errStill
		}
		return nil
	})
	t.Logf("unroutable after %v", took.Round(time.Millisecond))
	since := s.ledger.now()
	callers := m.callers(8, s.someBad)
	callers.more(volume)
	callers.end()
	all := s.tallyBad(since)
	s.noErrors(all)
	if all.failed != all.targets || all.targets == 0 {
		t.Errorf("all is failed: %v", all)
	}
	if n := s.ledger.arrived(since, at("bad")); n > 0 {
		t.Errorf("%d arrived at a dead node", n)
	}
	if all.median > time.Second { // a program that waits lets all of them wait
		t.Errorf("half of them took %v", all.median)
	}
	m.atRest()
}

// N3.
func TestStoppedNodeIsUnknownOnceAndThenFailedAtOnce(t *testing.T) {
	s := newStreet(t)
	bad := s.child("bad", s.bad...)
	s.child("good", s.good...)
	m := s.manage(2, prompt()...)
	m.good(room("mixed"))
	m.rest()
	others := m.callers(4, s.someGood)
	s.ledger.note("node bad stopped")
	bad.stop()
	since := s.ledger.now()
	victims := m.callers(40, s.someBad)
	suspect := m.until("link_stalls_total", func(v float64) bool { return v >= 1 })
	closed := suspect + eventually(t, "the streams are closed", func() error {
		if m.connections("bad") != 0 {
			return errStill
		}
		return nil
	})
	victims.halt()
	victims.end()
	t.Logf("suspect after %v, closed after %v", suspect.Round(time.Millisecond), closed.Round(time.Millisecond))
	if closed > 7*time.Second+slackForCI {
		t.Errorf("closed only after %v", closed)
	}
	others.more(volume)
	others.end()
	all := s.tallyBad(since)
	s.noErrors(all)
	if all.unknown == 0 || all.failed == 0 || all.delivered != 0 {
		t.Errorf("unknown first, then failed: %v", all)
	}
	// Each of the 40 callers can be unknown only with its first pushes, before the
	// link is stalled.
	if unknown := s.ledger.tally(since, s.ledger.now(), func(p *push) bool { return forBad(p) && p.summary.GetUnknown() > 0 }); unknown.pushes > 80 {
		t.Errorf("%d pushes are unknown", unknown.pushes)
	}
	s.unharmed(since)
	bad.cont()
	m.good(room("mixed"))
	m.atRest()
}

// N4.
func TestLateAcksChangeNothing(t *testing.T) {
	s := newStreet(t)
	bad := s.child("bad", s.bad...)
	m := s.manage(1, prompt("LINK_SILENCE=60s")...)
	m.good(room("bad room"))
	bad.stop()
	before := m.metric("push_success_total")
	var pushes []*push
	for range 5 { // one after the other: the first is unknown, what follows fails
		pushes = append(pushes, m.push(user("bad1")))
	}
	unknown := 0
	for _, p := range pushes {
		unknown += int(p.summary.GetUnknown())
	}
	if unknown != 1 || pushes[0].summary.GetUnknown() != 1 {
		t.Errorf("the first is unknown: %v", pushes)
	}
	bad.cont()
	m.until("link_late_acks_total", func(v float64) bool { return v == float64(unknown) })
	if after := m.metric("push_success_total"); after != before {
		t.Errorf("late acks were counted as %v successes", after-before)
	}
	m.good(user("bad1"))
	if n := m.metric("link_strikes_total"); n != 0 {
		t.Errorf("a late ack is no lie: %v strikes", n)
	}
}

// N5 and N18.
func TestNodeThatNeverReadsHarmsOnlyItsOwnUsers(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	s.wire("good", s.good...)
	const limit = 256 << 10
	m := s.manage(2, prompt("LINK_QUEUE_BYTES=256KiB", "PUSH_TIMEOUT=30s")...)
	m.good(room("mixed"))
	m.rest()
	before := s.ledger.now()
	calm := m.callers(8, s.someGood)
	calm.more(volume)
	calm.end()
	quiet := s.ledger.tally(before, s.ledger.now(), forGood)

	s.ledger.note("node bad reads no more")
	bad.pause()
	since := s.ledger.now()
	others := m.callers(8, s.someGood)
	victims := m.callers(200, func(r *rand.Rand) request {
		q := patiently(user(pick(r, s.bad))) // over both shards
		q.size = 8 << 10
		return q
	})
	most := 0.0
	m.until("link_stalled", func(v float64) bool {
		most = max(most, m.metric("link_queue_bytes"))
		return v == 2
	})
	at := s.ledger.now()
	victims.more(volume)
	others.more(volume)
	victims.halt()
	victims.end()
	others.end()
	all := s.tallyBad(since)
	s.noErrors(all)
	if all.unknown == 0 || all.failed == 0 || all.delivered != 0 {
		t.Errorf("what was written is unknown, all else failed: %v", all)
	}
	if most > 2*limit {
		t.Errorf("%v bytes were queued, the limit is %d for each of two shards", most, limit)
	}
	stalled := s.ledger.tally(at, s.ledger.now(), forBad)
	t.Logf("once it was stalled: %v; most bytes in its queue: %v", stalled, most)
	if stalled.median > slackForCI+time.Second { // a program that waits lets all of them wait
		t.Errorf("half of the pushes to a stalled node took %v", stalled.median)
	}
	s.unharmed(since)
	now := s.ledger.tally(since, s.ledger.now(), forGood)
	t.Logf("slowest push to the other node: %v, and %v before", now.slowest, quiet.slowest)
	bad.resume()
	m.good(room("mixed"))
	m.atRest()
}

// N7.
func TestNodeThatNeverAcksEndsUnknown(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	s.wire("good", s.good...)
	m := s.manage(2, prompt("LINK_WINDOW=100")...)
	m.good(room("mixed"))
	m.rest()
	s.ledger.note("node bad acknowledges nothing")
	bad.play(func(a *answer) { a.silent = true })
	since := s.ledger.now()
	others := m.callers(4, s.someGood)
	victims := m.callers(300, s.someBad)
	most := 0.0
	m.until("link_stalled", func(v float64) bool {
		most = max(most, m.metric("link_window_deliveries"))
		return v == 2
	})
	victims.halt()
	victims.end()
	others.more(volume)
	others.end()
	all := s.tallyBad(since)
	s.noErrors(all)
	if all.unknown == 0 || all.failed == 0 || all.delivered != 0 {
		t.Errorf("unknown at the ack deadline, then failed: %v", all)
	}
	if most > 4*100 { // two shards, two nodes
		t.Errorf("%v deliveries were in the windows", most)
	}
	m.until("link_window_deliveries", func(v float64) bool { return v == 0 })
	s.unharmed(since)
	bad.play(nil)
	m.good(room("mixed"))
	m.atRest()
}

// N9.
func TestNodeThatLeavesLeavesNothingUnknown(t *testing.T) {
	s := newStreet(t)
	bad := newChild(t, s.ledger, "bad", "127.0.0.1:0", s.etcd.Endpoint())
	s.children = append(s.children, bad)
	bad.connect(s.bad...)
	s.world.place("bad", s.bad...)
	good := s.child("good", s.good...)
	m := s.manage(2)
	m.good(room("mixed"))
	m.rest()
	since := s.ledger.now()
	callers := m.callers(16, s.someBad)
	callers.more(volume / 2)
	good.connect(s.bad...) // its users connect again elsewhere
	s.world.place("good", s.bad...)
	s.ledger.note("node bad leaves")
	bad.signal(sigterm)
	<-bad.done
	callers.more(volume)
	callers.end()
	all := s.tallyBad(since)
	s.noErrors(all)
	if all.unknown != 0 || all.success*1000 < all.pushes*999 {
		t.Errorf("all have arrived: %v", all)
	}
	if n := m.metric("link_drain_notices_total"); n == 0 {
		t.Error("the node did not say that it goes")
	}
	m.good(room("mixed"))
	m.atRest()
}

// N15.
func TestAllNodesDownFailsEveryPushAtOnce(t *testing.T) {
	s := newStreet(t)
	one, two := s.child("bad", s.bad...), s.child("good", s.good...)
	m := s.manage(2)
	m.good(everybody())
	m.rest()
	one.kill()
	two.kill()
	m.reaches(0)
	since := s.ledger.now()
	callers := m.callers(8, func(r *rand.Rand) request {
		if r.IntN(3) == 0 {
			return everybody()
		}
		return room("mixed")
	})
	callers.more(volume)
	callers.end()
	all := s.ledger.tally(since, s.ledger.now(), nil)
	t.Log(all)
	s.noErrors(all)
	if all.success > 0 || all.delivered+all.unknown+all.offline > 0 {
		t.Errorf("all is failed: %v", all)
	}
	for _, id := range []string{"bad", "good"} {
		s.remove(nodeKeys + id)
	}
	m.until("nodes", func(v float64) bool { return v == 0 })
	if r, err := m.BroadcastMessage(t.Context(), broadcast()); err != nil || r.GetSuccess() || !strings.Contains(r.GetMessage(), "no ") {
		t.Errorf("a broadcast to nobody: %v %v", r, err)
	}
	m.atRest()
}

// N6; its priorities are in rows_overload_test.go.
func TestSlowNodeGetsWhatItManagesAndTheRestFails(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	s.wire("good", s.good...)
	m := s.manage(2, prompt()...)
	m.good(room("mixed"))
	m.rest()
	since := s.ledger.now()
	bad.play(func(*answer) { wait(100 * time.Millisecond) }) // ten a second, on each of two streams
	others := m.callers(4, s.someGood)
	victims := m.callers(100, s.someBad)
	m.until("link_stalls_total", func(v float64) bool { return v >= 2 })
	learned := s.ledger.now() // what it can take
	wait(2 * time.Second)
	victims.halt()
	victims.end()
	others.more(volume / 5)
	others.end()
	s.noErrors(s.tallyBad(since))
	all := s.tallyBad(learned)
	if all.failed == 0 || all.unknown > all.targets/20 {
		t.Errorf("what it cannot take fails, and is not unknown: %v", all)
	}
	s.unharmed(since)
	bad.play(nil)
	m.good(room("mixed"))
	m.atRest()
}

// N8.
func TestNodeInACrashLoopIsNoHotLoop(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	s.wire("good", s.good...)
	m := s.manage(2)
	m.good(room("mixed"))
	m.rest()
	since := s.ledger.now()
	dials := m.metric("link_dials_total")
	others := m.callers(4, s.someGood)
	victims := m.callers(8, s.someBad)
	for range 20 {
		bad.stop()
		wait(50 * time.Millisecond)
		bad.start()
		wait(100 * time.Millisecond)
	}
	victims.end()
	others.more(volume / 5)
	others.end()
	lasted := s.ledger.now() - since
	s.noErrors(s.tallyBad(since))
	s.unharmed(since)
	// Two links. A node that announces itself is tried at once, twice a second at most, and the
	// pauses begin anew at 50 ms and double: with five eighths of each as the least, that is
	// five attempts in half a second.
	if n := m.metric("link_dials_total") - dials; n > 2*(5+10*lasted.Seconds()) {
		t.Errorf("%v attempts in %v", n, lasted)
	}
	m.good(room("mixed"))
	m.atRest()
}

// N16.
func TestRollingDeployOfAllNodesLosesNothing(t *testing.T) {
	s := newStreet(t)
	ids, users := names("n", 5), names("u", 25)
	nodes := make([]*child, len(ids))
	begin := func(i int) {
		nodes[i] = newChild(t, s.ledger, ids[i], "127.0.0.1:0", s.etcd.Endpoint())
		s.children = append(s.children, nodes[i])
	}
	for i := range nodes {
		begin(i)
		nodes[i].connect(users[5*i : 5*i+5]...)
		s.world.place(ids[i], users[5*i:5*i+5]...)
	}
	s.world.join("all", users...)
	m := s.manage(len(nodes))
	m.good(room("all"))
	m.rest()
	since := s.ledger.now()
	callers := m.callers(8, func(r *rand.Rand) request { return some(r, users, "all") })
	for i := range nodes {
		callers.more(volume / 5)
		s.ledger.note("%s is replaced", ids[i])
		mine, next := s.world.at(ids[i]), nodes[(i+1)%len(nodes)]
		next.connect(mine...) // its users connect again elsewhere
		s.world.place(next.id, mine...)
		nodes[i].signal(sigterm)
		<-nodes[i].done
		begin(i)
		m.reaches(len(nodes))
	}
	callers.more(volume / 5)
	callers.end()
	all := s.ledger.tally(since, s.ledger.now(), nil)
	t.Log(all)
	s.noErrors(all)
	if all.unknown != 0 || all.success*1000 < all.pushes*999 {
		t.Errorf("nothing is unknown, and nearly all arrive: %v", all)
	}
	m.good(room("all"))
	m.atRest()
}
