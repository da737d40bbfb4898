package discovery

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// An outage of minutes, under a bubble's clock.

// recovery is how soon everything has to be as it should when etcd is back.
const recovery = 2 * time.Second

// minutes is how long etcd is away.
const minutes = 5 * time.Minute

// The longest waits and shortest pauses of the client, the Watcher and the Registration,
// spelled out again: what etcd is asked for while it is away follows from them.
const (
	swallowed = time.Second            // an attempt to connect that nobody answers
	redial    = 400 * time.Millisecond // after one: gRPC's backoff ends at 500 ms, less a fifth of jitter
	again     = 500 * time.Millisecond // after a failed request: ours ends at 1 s, less half of it as jitter
	unheard   = 3 * time.Second        // a request that waits for a connection, with RequestTimeout set to it
	probing   = 5 * time.Second        // between probes
	rampUp    = 6                      // attempts in the second in which a backoff grows from its beginning
	tries     = 2                      // of each request that may be repeated, by the client
)

// outage is a way for etcd to be out of reach.
type outage struct {
	begin, end func(*scriptedEtcd)
	dials      int           // the most attempts to connect meanwhile
	every      time.Duration // the least time between two requests of a kind
}

// requests is how many of one kind an outage may cost.
func (o outage) requests() int { return int(minutes/o.every) + rampUp }

func eachOutage(t *testing.T, test func(*testing.T, outage)) {
	for name, o := range map[string]outage{
		"refuses":   {begin: (*scriptedEtcd).stop, end: (*scriptedEtcd).serve, dials: int(minutes/redial) + rampUp, every: unheard},
		"is silent": {begin: (*scriptedEtcd).fallSilent, end: (*scriptedEtcd).speak, dials: int(minutes/(swallowed+redial)) + rampUp, every: unheard},
		"no leader": {begin: (*scriptedEtcd).loseLeader, end: (*scriptedEtcd).findLeader, dials: 0, every: again},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, o) })
		})
	}
}

// away lets etcd be out of reach for five minutes, looks at each quarter of one, and
// checks what was asked of it meanwhile.
func (o outage) away(t *testing.T, etcd *scriptedEtcd, requests int, look func(since time.Duration)) {
	t.Helper()
	time.Sleep(minutes + rand.N(time.Minute)) // all is well, and any moment of it may be the last
	etcd.dials.take()
	etcd.requests.take()
	o.begin(etcd)
	goroutines := 0
	for began := time.Now(); time.Since(began) < minutes; {
		time.Sleep(15 * time.Second)
		synctest.Wait()
		look(time.Since(began))
		switch n := runtime.NumGoroutine(); {
		case goroutines == 0:
			goroutines = n
		case n > goroutines+10:
			t.Fatalf("%d goroutines, there were %d", n, goroutines)
		}
	}
	dials, busiest := etcd.dials.take()
	t.Logf("dialled %d times, at most %d in a second", dials, busiest)
	if dials > o.dials || busiest > rampUp {
		t.Errorf("dialled too often, %d and %d are right", o.dials, rampUp)
	}
	asked, busiest := etcd.requests.take()
	t.Logf("asked %d times, at most %d in a second", asked, busiest)
	if most := 2 * rampUp * tries; asked > requests || busiest > most {
		t.Errorf("asked too often, %d and %d are right", requests, most)
	}
}

// soon waits until ok holds and returns how long that took.
func soon(t *testing.T, what string, ok func() bool) time.Duration {
	t.Helper()
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		synctest.Wait()
		took := time.Since(began)
		switch {
		case ok():
			return took
		case took > recovery:
			t.Fatalf("not within %v: %s", recovery, what)
		}
	}
}

func (e *scriptedEtcd) putNode(t *testing.T, id string) {
	t.Helper()
	value, err := encodeValue(id, "127.0.0.1:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	e.put(ConnectNodePrefix+id, value, 0)
}

// The nodes, and afterwards one that is new, one that is gone, and one that is gone while
// its link lives. The watch goes on where it ended.
func TestFiveMinutesWithoutEtcdRemoveNoNode(t *testing.T) {
	eachOutage(t, func(t *testing.T, o outage) { watchThrough(t, o, false) })
}

// The same, and the watch cannot go on where it ended.
func TestFiveMinutesWithoutEtcdAndItsHistory(t *testing.T) {
	eachOutage(t, func(t *testing.T, o outage) { watchThrough(t, o, true) })
}

func watchThrough(t *testing.T, o outage, compacted bool) {
	etcd := startScripted(t)
	for _, id := range []string{"gone", "linked", "stays", "stays2"} {
		etcd.putNode(t, id)
	}
	set := metrics.NewSet()
	w := watch(t, etcd.client(t), func(c *Config) {
		c.ProbeInterval, c.ConfirmAfter, c.RequestTimeout = 0, 0, unheard // as in production
		c.Alive = func(id string) bool { return id == "linked" }
		c.Metrics = set
	})
	stale := func() time.Duration {
		return time.Duration(set.GetOrCreateGauge("push_manager_discovery_stale_seconds", nil).Get() * float64(time.Second))
	}
	w.has(t, "gone", "linked", "stays", "stays2")
	probes := int(minutes/probing) + 1
	o.away(t, etcd, (o.requests()+probes)*tries+2, func(since time.Duration) { // and a watch that is opened anew
		w.knows(t, "gone", "linked", "stays", "stays2")
		if got := stale(); got < since || got > since+probing {
			t.Fatalf("stale for %v, %v into the outage", got, since)
		}
	})
	if n := w.changes(); n != 1 {
		t.Fatalf("%d changes told, one of them before the outage", n)
	}

	etcd.del(ConnectNodePrefix + "gone")
	etcd.del(ConnectNodePrefix + "linked")
	etcd.putNode(t, "new")
	if compacted {
		etcd.compact()
	}
	time.Sleep(rand.N(10 * time.Second)) // back at any moment of what is tried meanwhile
	o.end(etcd)
	took := soon(t, "all that has happened is known", func() bool {
		return stale() == 0 && slices.Equal(w.ids(), []string{"linked", "new", "stays", "stays2"})
	})
	t.Logf("all is known after %v", took)
	w.neverLost(t, "linked", "stays", "stays2")
	time.Sleep(14 * time.Second) // the grace of a node whose link lives is 15 s
	w.knows(t, "linked", "new", "stays", "stays2")
	time.Sleep(2*time.Second + recovery)
	w.knows(t, "new", "stays", "stays2")
	if got := stale(); got != 0 {
		t.Errorf("stale for %v", got)
	}
	w.neverLost(t, "stays", "stays2")
	w.neverTwice(t)
}

func TestRegistersAgainAfterFiveMinutesWithoutEtcd(t *testing.T) {
	eachOutage(t, func(t *testing.T, o outage) {
		etcd := startScripted(t)
		r, err := NewRegistration(RegistrationConfig{Client: etcd.client(t), ID: "n1", Addr: "127.0.0.1:7", RequestTimeout: unheard})
		if err != nil {
			t.Fatal(err)
		}
		r.Start()
		t.Cleanup(func() { closeRegistration(t, r) })
		<-r.Ready()
		first := etcd.present(r.Key()).GetLease()
		const ttl = 10 * time.Second
		const checks = 5 // until the lease is known to be lost
		// Leases are asked for, and streams to keep one alive, each with a pause of its own.
		o.away(t, etcd, 2*o.requests()+checks*tries, func(since time.Duration) {
			if kv := etcd.present(r.Key()); since > ttl && kv != nil {
				t.Fatalf("still there %v into the outage: %v", since, kv)
			}
			// The keep-alive looks at its deadline each second, and a check may be under way.
			if since > ttl+time.Second+unheard && r.Registered() {
				t.Fatalf("registered, it thinks, %v into the outage", since)
			}
		})
		time.Sleep(rand.N(10 * time.Second))
		o.end(etcd)
		took := soon(t, "registered again", func() bool { return r.Registered() && etcd.present(r.Key()) != nil })
		t.Logf("registered again after %v", took)
		kv := etcd.present(r.Key())
		if string(kv.GetValue()) != r.value || kv.GetLease() == first {
			t.Errorf("registered %v, the first lease was %d", kv, first)
		}
	})
}

func (w *watched) ids() []string {
	var ids []string
	for _, n := range w.Nodes() {
		ids = append(ids, n.ID)
	}
	return ids
}

// knows fails unless the set is exactly ids, now.
func (w *watched) knows(t *testing.T, ids ...string) {
	t.Helper()
	if got := w.ids(); !slices.Equal(got, ids) {
		t.Fatalf("known are %q, not %q", got, ids)
	}
}

// neverTwice fails when any set told so far has a node twice, or came twice in a row.
func (w *watched) neverTwice(t *testing.T) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, set := range w.told {
		for j := 1; j < len(set); j++ {
			if set[j-1].ID >= set[j].ID {
				t.Errorf("told out of order or twice: %v", set)
			}
		}
		if i > 0 && slices.Equal(w.told[i-1], set) {
			t.Errorf("told twice in a row: %v", set)
		}
	}
}
