package faultbench

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Faults of the Controller, by their ids in docs/faults.md.

// retryInfo tells whether an error says when to try again.
func retryInfo(err error) bool {
	for _, detail := range status.Convert(err).Details() {
		if r, ok := detail.(*errdetails.RetryInfo); ok && r.GetRetryDelay().AsDuration() > 0 {
			return true
		}
	}
	return false
}

// fresh makes pushes to users nobody has asked for before: each needs a look-up.
func (s *street) fresh(n int) func(*rand.Rand) request {
	var mu sync.Mutex
	users := names("cold", n)
	s.world.place("good", users...)
	next := 0
	return func(*rand.Rand) request {
		mu.Lock()
		defer mu.Unlock()
		next++
		return patiently(user(users[next%n]))
	}
}

// C1.
func TestControllerAwayServesKnownRoutesAndRefusesOthers(t *testing.T) {
	s := newStreet(t)
	s.wire("good", s.good...)
	m := s.manage(1, lenient()...)
	m.good(room("good room"))
	for _, id := range s.good {
		m.good(user(id))
	}
	m.rest()
	s.ledger.note("the Controller is gone")
	s.controller.stop()
	wait(1200 * time.Millisecond) // no route is fresh any more
	since := s.ledger.now()
	known, cold := m.callers(8, s.someGood), m.callers(8, s.fresh(5000))
	known.more(volume)
	cold.more(volume / 2)
	known.end()
	cold.end()
	s.unharmed(since)
	forCold := func(p *push) bool { return !forGood(p) }
	all := s.ledger.tally(since, s.ledger.now(), forCold)
	t.Logf("unknown routes: %v", all)
	if all.errors[codes.Unavailable] != all.pushes || all.bare != 0 {
		t.Errorf("all are refused, and it is said that nothing was sent: %v", all)
	}
	if all.median > time.Second { // a program that waits lets all of them wait
		t.Errorf("half of the refusals took %v", all.median)
	}
	if p := m.push(user("nobody knows")); !retryInfo(p.err) || reasonOf(p.err) != "CONTROLLER_UNAVAILABLE" {
		t.Errorf("%v %v", p.err, status.Convert(p.err).Details())
	}
	s.controller.start()
	m.good(user("good1"))
	eventually(t, "unknown routes are looked up again", func() error {
		s.world.place("good") // nobody: cold users are offline, and that is an answer
		if p := m.push(user("cold1")); p.err != nil {
			return p.err
		}
		return nil
	})
	m.atRest()
}

// C2.
func TestMuteControllerIsGivenUpAtTheLookupTimeout(t *testing.T) {
	s := newStreet(t)
	s.wire("good", s.good...)
	m := s.manage(1, lenient("LOOKUP_TIMEOUT=300ms")...)
	m.good(room("good room"))
	for _, id := range s.good {
		m.good(user(id))
	}
	m.rest()
	s.controller.change(func(c *controller) { c.mute = true })
	since := s.ledger.now()
	cold := m.callers(100, s.fresh(5000))
	known := m.callers(8, s.someGood)
	cold.more(volume)
	known.more(volume / 5)
	cold.end()
	known.end()
	s.unharmed(since)
	all := s.ledger.tally(since, s.ledger.now(), func(p *push) bool { return !forGood(p) })
	t.Logf("unknown routes: %v", all)
	if all.errors[codes.Unavailable] != all.pushes || all.bare != 0 {
		t.Errorf("all are refused, and it is said that nothing was sent: %v", all)
	}
	if all.slowest > 10*time.Second { // the callers' own deadline is the next that would end it
		t.Errorf("a look-up was given up only after %v", all.slowest)
	}
	s.controller.change(func(c *controller) { c.mute = false })
	m.good(user("good1"))
	m.atRest()
}

// C3.
func TestFailingControllerIsAskedAgainWithinABudget(t *testing.T) {
	s := newStreet(t)
	n := s.wire("good", s.good...)
	cold := s.fresh(20_000)
	s.connect(n, names("cold", 20_000)...)
	m := s.manage(1, lenient("LOOKUP_TIMEOUT=300ms")...)
	m.good(room("good room"))
	m.rest()
	s.controller.change(func(c *controller) { c.errors = 0.5 })
	since := s.ledger.now()
	callers := m.callers(16, cold)
	callers.more(2 * volume)
	callers.end()
	all := s.ledger.tally(since, s.ledger.now(), nil)
	t.Log(all)
	if all.success == 0 || all.errors[codes.Unavailable] == 0 || all.success+all.errors[codes.Unavailable] != all.pushes || all.bare != 0 {
		t.Errorf("either delivered or refused: %v", all)
	}
	retries, lookups := m.metric("controller_retries_total"), float64(all.pushes)
	t.Logf("%v look-ups, %v of them again", lookups, retries)
	if retries > 0.1*lookups+20 || retries == 0 {
		t.Errorf("%v retries for %v look-ups", retries, lookups)
	}
	s.controller.change(func(c *controller) { c.errors, c.delay = 0, 2*time.Second })
	slowly := s.ledger.now()
	callers = m.callers(50, cold)
	callers.more(100)
	callers.end()
	if all := s.ledger.tally(slowly, s.ledger.now(), nil); all.errors[codes.Unavailable] != all.pushes || all.slowest > 10*time.Second {
		t.Errorf("two seconds are longer than a look-up may take: %v", all)
	}
	s.controller.change(func(c *controller) { c.delay = 0 })
	m.good(user("good1"))
	m.atRest()
}

// C4.
func TestStaleRouteIsHealedByOneLookup(t *testing.T) {
	s := newStreet(t)
	bad := s.wire("bad", s.bad...)
	good := s.wire("good", s.good...)
	m := s.manage(2, lenient("ROUTE_CACHE_TTL=1h")...)
	m.good(room("mixed"))
	for _, id := range s.bad {
		m.good(user(id))
	}
	m.rest()
	since := s.ledger.now()
	someBad := func(r *rand.Rand) request { return patiently(s.someBad(r)) }
	callers := m.callers(16, someBad)
	callers.more(volume / 2)
	for _, id := range s.bad { // behind everybody's back
		good.users.connect(id)
		s.world.place("good", id)
		bad.users.leave(id)
	}
	callers.more(volume)
	callers.end()
	all := s.tallyBad(since)
	s.noErrors(all)
	if all.success != all.pushes {
		t.Errorf("all have moved and all are reached: %v", all)
	}
	if m.metric("heals_total") == 0 {
		t.Error("nothing was looked up again")
	}

	// The Controller believes what is not true any more: then the user is offline.
	s.controller.change(func(c *controller) { c.stale = s.world.freeze() })
	for _, id := range s.bad {
		good.users.leave(id)
	}
	since = s.ledger.now()
	callers = m.callers(16, someBad)
	callers.more(volume)
	callers.end()
	all = s.tallyBad(since)
	s.noErrors(all)
	if all.offline != all.targets {
		t.Errorf("all are offline: %v", all)
	}
	s.controller.change(func(c *controller) { c.stale = nil })
	m.atRest()
}

// C5.
func TestStampedeForOneRoomIsOneLookup(t *testing.T) {
	s := newStreet(t)
	n := s.wire("good", s.good...)
	m := s.manage(1, lenient("API_PUSH_STREAM_IN_FLIGHT=20000", "LINK_QUEUE_LENGTH=20000", "ROUTE_CACHE_TTL=1h")...)
	m.good(user("good1"))
	m.rest()
	crowd := names("crowd", 50)
	s.connect(n, crowd...)
	s.world.join("cold room", crowd...)
	s.controller.change(func(c *controller) { c.delay = 500 * time.Millisecond })
	before := s.controller.lookups.Load()
	requests := make([]request, 10*volume)
	for i := range requests {
		requests[i] = patiently(room("cold room"))
	}
	since := s.ledger.now()
	m.stream(requests)
	if n := s.controller.lookups.Load() - before; n != 1 {
		t.Errorf("%d look-ups", n)
	}
	all := s.ledger.tally(since, s.ledger.now(), nil)
	t.Log(all)
	if all.success != len(requests) || all.delivered != len(requests)*len(crowd) {
		t.Errorf("all arrive: %v", all)
	}
	m.atRest()
}

// C6; a million members with make faults.
func TestHugeRoomIsDeliveredOrRefused(t *testing.T) {
	s := newStreet(t)
	n := s.wire("good", s.good...)
	size := 50_000
	if raceEnabled {
		size = 10_000
	}
	m := s.manage(1, lenient("GOMEMLIMIT=1GiB")...)
	m.good(room("good room"))
	m.rest()
	members := names("member", size)
	s.connect(n, members...)
	s.world.join("huge", members...)
	// The Controller names each twice: a user is a member once.
	s.world.join("huge", members[:100]...)
	for range 3 {
		p := m.push(patiently(room("huge")))
		t.Log(p.code(), p.summary, p.took())
		if p.summary.GetTargets() != int32(size) || !p.success {
			t.Errorf("%v", p)
		}
	}
	m.good(room("good room"))
	t.Logf("memory: %.0f MiB, and %.0f before", m.resident()/(1<<20), m.baseline["process_resident_memory_bytes"]/(1<<20))
}

// C7: the Controller names a node that etcd does not know, one without a name, and for
// every node an address that is not its own.
func TestOnlyEtcdSaysWhereANodeIs(t *testing.T) {
	s := newStreet(t)
	s.wire("good", s.good...)
	trap, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var trapped atomic.Int64
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			conn, err := trap.Accept()
			if err != nil {
				return
			}
			trapped.Add(1)
			_ = conn.Close()
		}
	})
	defer watch.Wait()
	defer func() { _ = trap.Close() }()
	s.controller.change(func(c *controller) { c.trap = trap.Addr().String() })
	s.world.place("not registered", "lost")
	s.world.nameless("homeless")
	s.world.join("odd room", "lost", "homeless", "good1")
	m := s.manage(1)

	if p := m.push(user("good1")); !p.success {
		t.Errorf("the address of a registered node does not matter: %v", p)
	}
	if p := m.push(user("homeless")); p.err != nil || p.summary.GetOffline() != 1 {
		t.Errorf("a node without a name is none: %v", p)
	}
	for _, r := range []request{user("lost"), room("odd room")} {
		p := m.push(r)
		if p.err != nil || p.summary.GetFailed() != 1 || len(p.summary.GetNodeFailures()) != 1 || p.summary.GetNodeFailures()[0].GetReason() != "failed: node not registered" {
			t.Errorf("a node that is not registered: %v", p)
		}
		if r.kind == toRoom && (p.summary.GetTargets() != 3 || p.summary.GetDelivered() != 1 || p.summary.GetOffline() != 1) {
			t.Errorf("the others of the room: %v", p)
		}
	}
	wait(time.Second) // for connections that must not come
	if n := trapped.Load(); n != 0 || m.connections("not registered") != -1 {
		t.Errorf("%d connections to where the Controller says", n)
	}
}

// resident is the memory that the process has.
func (m *manager) resident() float64 {
	m.b.t.Helper()
	values, err := m.read()
	if err != nil {
		m.b.t.Fatal(err)
	}
	return values["process_resident_memory_bytes"]
}

// C6, in full.
func TestRoomOfAMillionMembersStaysWithinMemory(t *testing.T) {
	slow(t)
	s := newStreet(t)
	nodes := []*wireNode{s.wire("n0"), s.wire("n1"), s.wire("n2"), s.wire("n3")}
	m := s.manage(4, "LOOKUP_TIMEOUT=20s", "PUSH_TIMEOUT=30s", "LINK_ACK_TIMEOUT=20s")
	m.rest()
	const size = 1_000_000
	for i, n := range nodes {
		members := names(fmt.Sprint("member", i, "/"), size/len(nodes))
		s.connect(n, members...)
		s.world.join("million", members...)
	}
	r := room("million")
	r.deadline = 0
	p := m.push(r)
	t.Log(p.code(), p.summary, p.took())
	if !p.success && p.code() != codes.ResourceExhausted && p.code() != codes.Unavailable {
		t.Errorf("%v", p)
	}
	if now := m.resident(); now > 1<<30 {
		t.Errorf("the process has %.0f MiB", now/(1<<20))
	}
}

// N17; 100,000 users with make faults. The Controller has no change stream and routes
// are trusted for long: each user's move is found by the push that comes too late.
func TestUsersWhoMoveInMassesAreFoundWithOneLookupEach(t *testing.T) {
	s := newStreet(t)
	count, span := 4*volume, 2*time.Second
	if os.Getenv(slowEnv) != "" {
		count, span = 100_000, 10*time.Second
	}
	crowd := names("crowd", count)
	old := s.wire("bad", crowd...)
	next := s.wire("good", s.good...)
	m := s.manage(2, lenient("ROUTE_CACHE_TTL=1h")...)
	requests := make([]request, count)
	for i, id := range crowd {
		requests[i] = patiently(user(id))
	}
	through := func(list []request) {
		for part := range slices.Chunk(list, 200) { // the pools have room for so many look-ups
			m.stream(part)
		}
	}
	through(requests) // all routes are known
	m.rest()
	lookups := s.controller.lookups.Load()
	if lookups > int64(count)+10 {
		t.Errorf("%d look-ups for %d users", lookups, count)
	}
	since := s.ledger.now()
	var movers sync.WaitGroup
	movers.Go(func() {
		const steps = 100
		for part := range slices.Chunk(crowd, max(count/steps, 1)) {
			for _, id := range part { // each is somewhere at any time
				next.users.connect(id)
				s.world.place("good", id)
				old.users.leave(id)
			}
			wait(span / steps)
		}
	})
	others := m.callers(4, s.someGood)
	shuffled := slices.Clone(requests)
	rand.New(rand.NewPCG(s.seed, 17)).Shuffle(count, func(i, k int) { shuffled[i], shuffled[k] = shuffled[k], shuffled[i] })
	through(shuffled)
	movers.Wait()
	through(shuffled)
	others.end()
	s.unharmed(since)
	all := s.ledger.tally(since, s.ledger.now(), func(p *push) bool { return !forGood(p) })
	again := s.controller.lookups.Load() - lookups
	t.Logf("%d users moved in %v: %d look-ups, %v heals; %v", count, span, again, m.metric("heals_total"), all)
	if all.success*100 < all.pushes*99 || all.pushes != 2*count {
		t.Errorf("nearly all arrive: %v", all)
	}
	if again > int64(count)+int64(len(s.good))+10 || again < int64(count)/2 {
		t.Errorf("%d look-ups for %d users who moved once", again, count)
	}
	m.atRest()
}
