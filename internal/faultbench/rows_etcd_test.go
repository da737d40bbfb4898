package faultbench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

// Faults of discovery, by their ids in docs/faults.md. Pushes go on through all of
// them.

// whole is a street with both nodes, a Push-Manager and traffic to everybody.
type whole struct {
	*street
	nodes map[string]*wireNode
	m     *manager
	since time.Duration
	all   *load
}

// run starts traffic to the good node, by callers who have time.
func (s *street) run(env ...string) *whole {
	s.t.Helper()
	return s.runFor(func(r *rand.Rand) request { return patiently(s.someGood(r)) }, env...)
}

func (s *street) runFor(next func(*rand.Rand) request, env ...string) *whole {
	s.t.Helper()
	w := &whole{street: s, nodes: map[string]*wireNode{"bad": s.wire("bad", s.bad...), "good": s.wire("good", s.good...)}}
	w.m = s.manage(2, lenient(env...)...)
	w.m.good(room("mixed"))
	w.m.rest()
	w.since = s.ledger.now()
	w.all = w.m.callers(4, next)
	return w
}

// nothingLost is undisturbed with as many pushes as a fault has to meet.
func (w *whole) nothingLost() {
	w.t.Helper()
	w.all.more(volume)
	w.undisturbed()
}

// E2; five minutes with make faults.
func TestEtcdOutageRemovesNoNode(t *testing.T) {
	w := newStreet(t).run("ETCD_REQUEST_TIMEOUT=1s")
	outage := 3 * time.Second
	if os.Getenv(slowEnv) != "" {
		outage = 5 * time.Minute
	}
	w.ledger.note("etcd is gone")
	w.etcd.Stop()
	lasts(t, outage, "both nodes stay", func() error {
		if n := w.m.metric("nodes"); n != 2 {
			return fmt.Errorf("%v nodes are known", n)
		}
		return nil
	})
	took := w.m.until("discovery_stale_seconds", func(v float64) bool { return v > 1 })
	t.Logf("known to be stale %v later", took.Round(time.Millisecond))
	w.etcd.Restart()
	back := w.m.until("discovery_stale_seconds", func(v float64) bool { return v == 0 })
	t.Logf("etcd is heard again after %v", back.Round(time.Millisecond))
	third := w.wire("third", "third1")
	found := eventually(t, "a new node is found", func() error {
		if third.open.Load() != 2 {
			return errStill
		}
		return nil
	})
	t.Logf("a new node is found after %v", found.Round(time.Millisecond))
	third.stop() // a node that is gone goes with its key
	w.remove(nodeKeys + "third")
	w.m.until("nodes", func(v float64) bool { return v == 2 })
	w.all.more(volume)
	w.all.end()
	if all := w.ledger.tally(w.since, w.ledger.now(), nil); all.success != all.pushes {
		t.Errorf("pushes were harmed: %v", all)
	}
	w.m.atRest()
}

// E3: the member that the watch hangs on is alone. What it says is old news, and
// nothing but its own word tells.
func TestEtcdMemberWithoutLeaderIsNotTrusted(t *testing.T) {
	slow(t)
	t.Parallel()
	members := etcdtest.StartCluster(t, 3)
	s := aloneInStreetOf(t, members[0])
	w := s.run("ETCD_REQUEST_TIMEOUT=2s")
	every := s.launch("pm-2", "ETCD_REQUEST_TIMEOUT=2s",
		"ETCD_ENDPOINTS="+members[0].Endpoint()+","+members[1].Endpoint()+","+members[2].Endpoint())
	every.reaches(2)
	breaks := w.m.metric(`discovery_watch_breaks_total{reason="no_leader"}`)
	s.ledger.note("two of three members of etcd are gone")
	members[1].Stop()
	members[2].Stop()
	noticed := w.m.until(`discovery_watch_breaks_total{reason="no_leader"}`, func(v float64) bool { return v > breaks })
	t.Logf("no leader: noticed after %v", noticed.Round(time.Millisecond))
	w.m.until("discovery_stale_seconds", func(v float64) bool { return v > 1 })
	for _, m := range []*manager{w.m, every} {
		lasts(t, 2*time.Second, "both nodes stay", func() error {
			if n := m.metric("nodes"); n != 2 {
				return fmt.Errorf("%v nodes are known", n)
			}
			return nil
		})
	}
	etcdtest.RestartAll(members[1], members[2])
	back := w.m.until("discovery_stale_seconds", func(v float64) bool { return v == 0 })
	t.Logf("etcd is heard again after %v", back.Round(time.Millisecond))
	third := w.wire("third", "third1")
	eventually(t, "a new node is found by both", func() error {
		if third.open.Load() != 4 {
			return errStill
		}
		return nil
	})
	s.ledger.note("the first member is gone, for good")
	members[0].Stop()
	s.client = members[1].Client()
	fourth := w.wire("fourth", "fourth1")
	elsewhere := eventually(t, "a new node is found through another member", func() error {
		if fourth.open.Load() != 2 {
			return errStill
		}
		return nil
	})
	t.Logf("watching elsewhere after %v", elsewhere.Round(time.Millisecond))
	w.all.more(volume)
	w.all.end()
	if all := w.ledger.tally(w.since, w.ledger.now(), nil); all.success != all.pushes {
		t.Errorf("pushes were harmed: %v", all)
	}
}

// E4.
func TestCompactionWhileCutOffIsCaughtUpOnce(t *testing.T) {
	s := newStreet(t)
	front := etcdtest.NewProxy(t, s.etcd.Endpoint())
	w := s.run("ETCD_ENDPOINTS="+front.Addr(), "ETCD_REQUEST_TIMEOUT=1s")
	lists := w.m.metric(`discovery_lists_total{result="ok"}`)
	front.Cut()
	w.ledger.note("cut off from etcd")
	for i := range 50 {
		w.register(fmt.Sprint("passing", i%5), "127.0.0.1:1")
	}
	for i := range 5 {
		w.remove(nodeKeys + fmt.Sprint("passing", i))
	}
	third := w.wire("third", "third1")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	now, err := w.client.Get(ctx, nodeKeys)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.client.Compact(ctx, now.Header.GetRevision(), clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	front.Mend()
	took := eventually(t, "what has happened is known", func() error {
		if third.open.Load() != 2 {
			return errStill
		}
		return nil
	})
	t.Logf("caught up after %v", took.Round(time.Millisecond))
	if n := w.m.metric("nodes"); n != 3 {
		t.Errorf("%v nodes are known", n)
	}
	settled := w.m.metric(`discovery_lists_total{result="ok"}`)
	if settled-lists > 5 {
		t.Errorf("it was listed %v times", settled-lists)
	}
	w.all.more(volume)
	if n := w.m.metric(`discovery_lists_total{result="ok"}`) - settled; n > 1 {
		t.Errorf("it is listed on and on: %v times", n)
	}
	w.all.end()
	if all := w.ledger.tally(w.since, w.ledger.now(), nil); all.success != all.pushes {
		t.Errorf("pushes were harmed: %v", all)
	}
	w.m.atRest()
}

// E5.
func TestWipedEtcdRemovesNoNode(t *testing.T) {
	w := newStreet(t).run("ETCD_REQUEST_TIMEOUT=1s")
	w.ledger.note("etcd's data is gone")
	w.etcd.Wipe()
	lasts(t, 2*time.Second, "both nodes stay", func() error {
		if n := w.m.metric("nodes"); n != 2 {
			return fmt.Errorf("%v nodes are known", n)
		}
		return nil
	})
	for id, n := range w.nodes { // as nodes do that notice
		w.register(id, n.address)
	}
	w.m.until("discovery_held_nodes", func(v float64) bool { return v == 0 })
	w.nothingLost()
}

// E6.
func TestDeletedPrefixKeepsNodesThatLive(t *testing.T) {
	w := newStreet(t).run()
	w.remove(nodeKeys, clientv3.WithPrefix())
	w.ledger.note("all keys are gone")
	w.m.until("discovery_panic", func(v float64) bool { return v == 1 })
	lasts(t, time.Second, "both nodes stay", func() error {
		if n := w.m.metric("nodes"); n != 2 {
			return fmt.Errorf("%v nodes are known", n)
		}
		return nil
	})
	for id, n := range w.nodes {
		w.register(id, n.address)
	}
	w.m.until("discovery_panic", func(v float64) bool { return v == 0 })
	w.nothingLost()
}

// N13.
func TestRevokedLeaseOfALivingNodeIsBridged(t *testing.T) {
	s := newStreet(t)
	const grace = 8 * time.Second // much longer than it has to stay: a busy machine notices late
	w := s.run(fmt.Sprint("DISCOVERY_GRACE=", grace))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	lease, err := w.client.Grant(ctx, 60)
	if err != nil {
		t.Fatal(err)
	}
	bad := w.nodes["bad"]
	w.put(nodeKeys+"bad", value(t, "bad", bad.address), clientv3.WithLease(lease.ID))
	if _, err := w.client.Revoke(ctx, lease.ID); err != nil {
		t.Fatal(err)
	}
	w.ledger.note("bad's lease is revoked")
	w.m.until("discovery_held_nodes", func(v float64) bool { return v == 1 })
	lasts(t, time.Second, "it stays", func() error {
		if p := w.m.push(patiently(user("bad1"))); !p.success {
			return fmt.Errorf("%v", p)
		}
		return nil
	})
	w.register("bad", bad.address) // it has noticed
	w.m.until("discovery_held_nodes", func(v float64) bool { return v == 0 })
	w.nothingLost()
	removed := w.ledger.now()
	w.remove(nodeKeys + "bad") // and now for good
	w.m.until("nodes", func(v float64) bool { return v == 1 })
	took := w.ledger.now() - removed
	t.Logf("removed after %v", took.Round(time.Millisecond))
	if took < grace {
		t.Error("the grace was not granted")
	}
	w.m.good(user("good1"))
}

// E7.
func TestGarbageInEtcdHarmsNobody(t *testing.T) {
	w := newStreet(t).run()
	garbage := []string{
		"", "garbage", "{", "[]", "null", `{"Addr":""}`, `{"Addr":"nowhere"}`, `{"Addr":"127.0.0.1:0"}`, `{"Addr":"127.0.0.1:99999"}`,
		`{"Addr":"file:///etc/passwd"}`, `{"Addr":"unix:///tmp/x"}`, `{"Addr":1}`, strings.Repeat("{", 10_000), strings.Repeat("x", 1<<20),
		`{"Addr":"127.0.0.1:1","Metadata":{"node_id":"` + strings.Repeat("n", 300) + `"}}`, "\xff\xfe", `{"Addr":"127.0.0.1:1\n"}`,
	}
	for i, v := range garbage {
		w.put(nodeKeys+fmt.Sprint("garbage", i), v)
		w.put(nodeKeys+"bad", v) // a bad value leaves what was known
	}
	w.m.until("discovery_bad_value_total", func(v float64) bool { return v >= float64(len(garbage)) })
	third := w.wire("third", "third1")
	eventually(t, "the next good one is found", func() error {
		if third.open.Load() != 2 {
			return errStill
		}
		return nil
	})
	third.stop() // a node that is gone goes with its key
	w.remove(nodeKeys + "third")
	w.m.until("nodes", func(v float64) bool { return v == 2 })
	w.m.good(room("mixed"))
	if n := strings.Count(w.m.out.String(), "malformed"); n > 3 {
		t.Errorf("%d lines of log for it", n)
	}
	w.all.more(volume)
	w.all.end()
	if all := w.ledger.tally(w.since, w.ledger.now(), nil); all.success != all.pushes {
		t.Errorf("pushes were harmed: %v", all)
	}
	w.m.atRest()
}

// E8.
func TestAllKeysPutAgainTouchNoStream(t *testing.T) {
	w := newStreet(t).run()
	for range 100 {
		for id, n := range w.nodes {
			w.register(id, n.address)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	lease, err := w.client.Grant(ctx, 60)
	if err != nil {
		t.Fatal(err)
	}
	for id, n := range w.nodes {
		w.put(nodeKeys+id, value(t, id, n.address), clientv3.WithLease(lease.ID))
	}
	w.nothingLost()
}
