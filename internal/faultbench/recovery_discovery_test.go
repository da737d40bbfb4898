package faultbench

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

// How soon what is true in etcd is known again, however it was hidden. Pushes go on
// through all of it, and no node that lives may be let go.

// converged is by when a node that etcd knows is pushed to.
const converged = 2 * time.Second

// often is how often something is repeated: n times where time is taken, else few.
func often(n, few int) int {
	if os.Getenv(slowEnv) != "" || os.Getenv(timesEnv) != "" {
		return n
	}
	return few
}

// keeper watches that nodes which live stay known.
type keeper struct {
	m    *manager
	stop chan struct{}
	wg   sync.WaitGroup

	mu   sync.Mutex
	lost []string
}

func (m *manager) keeps(nodes ...string) *keeper {
	k := &keeper{m: m, stop: make(chan struct{})}
	k.wg.Go(func() {
		for {
			select {
			case <-k.stop:
				return
			default:
			}
			values, err := m.read()
			for _, id := range nodes {
				if _, ok := values["push_manager_node_connections{node_id="+strconv.Quote(id)+"}"]; !ok && err == nil {
					k.mu.Lock()
					k.lost = append(k.lost, id)
					k.mu.Unlock()
				}
			}
			wait(20 * time.Millisecond)
		}
	})
	return k
}

// end reports what was lost.
func (k *keeper) end() {
	k.m.b.t.Helper()
	close(k.stop)
	k.wg.Wait()
	if len(k.lost) > 0 {
		k.m.b.t.Errorf("nodes that live were let go %d times: %v", len(k.lost), slices.Compact(k.lost))
	}
}

// asked is how often discovery has asked etcd for anything: lists and watches.
func (m *manager) asked() (n float64) {
	m.b.t.Helper()
	values, err := m.read()
	if err != nil {
		m.b.t.Fatal(err)
	}
	for name, v := range values {
		if strings.HasPrefix(name, "push_manager_discovery_lists_total{") || strings.HasPrefix(name, "push_manager_discovery_watch_breaks_total{") {
			n += v
		}
	}
	return n
}

// judge checks how long it took to converge, again and again. Without TIMES patience is the
// only bound of what a machine that lets nobody run had a part in.
func (b *bench) judge(what string, list []span) {
	b.t.Helper()
	length := func(s span) time.Duration { return s.to - s.from }
	all, bound := spread(list, length), converged
	judged := all
	if os.Getenv(timesEnv) == "" {
		calm := slices.DeleteFunc(slices.Clone(list), func(s span) bool { return !b.ledger.calm(s.from, s.to) })
		judged, bound = spread(calm, length), converged+slackForCI
	}
	b.t.Logf("| %s | %d times | bound %v | %v |", what, len(list), converged, all)
	if judged.max > bound {
		b.t.Errorf("%s: converged only after %v", what, judged.max)
	}
}

// E2, E4, E5 and E7, one after the other.
func TestRecoveryOfDiscovery(t *testing.T) {
	s := newStreet(t)
	front := etcdtest.NewProxy(t, s.etcd.Endpoint())
	w := s.run("ETCD_ENDPOINTS="+front.Addr(), "ETCD_REQUEST_TIMEOUT=1s")
	keeper := w.m.keeps("bad", "good")
	outage := time.Duration(often(5, 2)) * time.Second
	for _, trouble := range []struct {
		name string
		make func() // returns as soon as etcd tells the truth again
	}{
		{"compacted while cut off", func() { w.compactBehind(front) }},
		{"etcd away", func() { front.Cut(); wait(outage); front.Mend() }},
		{"etcd's data wiped", func() { w.etcd.Wipe() }},
		{"garbage values", func() {
			for i, v := range []string{"", "{", `{"Addr":"nowhere"}`, strings.Repeat("x", 1<<20), "\xff\xfe"} {
				w.put(nodeKeys+fmt.Sprint("garbage", i), v)
				w.put(nodeKeys+"bad", v)
			}
		}},
	} {
		var took []span
		asked, since := w.m.asked(), time.Now()
		for i := range often(10, 1) {
			w.ledger.note("%s", trouble.name)
			trouble.make()
			over := w.ledger.now()
			w.ledger.note("%s is over", trouble.name)
			id := fmt.Sprintf("new %d", i)
			fresh := w.wire(id)
			for known, n := range w.nodes { // as nodes do that notice that their key is gone
				w.register(known, n.address)
			}
			eventually(t, "a new node is connected", func() error {
				if fresh.open.Load() != 2 {
					return errStill
				}
				return nil
			})
			took = append(took, span{over, w.ledger.now()})
			fresh.stop()
			w.remove(nodeKeys + id)
			w.m.until("nodes", func(v float64) bool { return v == 2 })
		}
		// The pauses between two attempts in vain grow to a second, half of it at least.
		lasted := time.Since(since).Seconds()
		calls := w.m.asked() - asked
		t.Logf("%s: etcd was asked %v times in %.1f s", trouble.name, calls, lasted)
		if most := 10*float64(len(took)) + 4*lasted; calls > most {
			t.Errorf("%s: etcd was asked %v times, more than %v", trouble.name, calls, most)
		}
		w.judge(trouble.name, took)
	}
	keeper.end()
	w.all.more(volume)
	w.all.end()
	if all := w.ledger.tally(w.since, w.ledger.now(), nil); all.success != all.pushes {
		t.Errorf("pushes were harmed: %v", all)
	}
	w.m.atRest()
}

// compactBehind cuts Push-Manager off from etcd, has much happen there, forgets how it
// came to that, and lets Push-Manager see it.
func (w *whole) compactBehind(front *etcdtest.Proxy) {
	w.t.Helper()
	front.Cut()
	for i := range 50 {
		w.register(fmt.Sprint("passing", i%5), "127.0.0.1:1")
	}
	for i := range 5 {
		w.remove(nodeKeys + fmt.Sprint("passing", i))
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	now, err := w.client.Get(ctx, nodeKeys)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.client.Compact(ctx, now.Header.GetRevision(), clientv3.WithCompactPhysical()); err != nil {
		w.t.Fatal(err)
	}
	front.Mend()
}

// N10, again and again.
func TestRecoveryOfANodeThatMovesOnAndOn(t *testing.T) {
	w := newStreet(t).run()
	keeper := w.m.keeps("bad", "good")
	old := w.nodes["bad"]
	asked, dials := w.m.asked(), w.m.metric("link_dials_total")
	moves := often(100, 10)
	took := make([]span, moves)
	for i := range took {
		fresh := newWireNode(t, w.ledger, "bad", wireConfig{})
		fresh.users.node = fmt.Sprint("bad ", i)
		for _, user := range w.bad {
			fresh.users.connect(user)
		}
		w.ledger.note("bad has a new address")
		begin := w.ledger.now()
		w.register("bad", fresh.address)
		eventually(t, "the new address is used, and the old one is not", func() error {
			if a, b := fresh.open.Load(), old.open.Load(); a != 2 || b != 0 {
				return fmt.Errorf("%d streams to the new one, %d to the old one", a, b)
			}
			return nil
		})
		took[i] = span{begin, w.ledger.now()}
		if p := w.m.push(patiently(user("bad1"))); !p.success {
			t.Errorf("at the new address: %v", p)
		}
		old.stop()
		old = fresh
	}
	keeper.end()
	w.judge("same id, new address", took)
	if n := w.m.asked() - asked; n > 5+time.Since(w.ledger.begun).Minutes()*2 { // fewer than moves, whatever broke once
		t.Errorf("etcd was asked %v times: the watch tells all of it", n)
	}
	w.m.reaches(2) // and no link is left over
	// An attempt that a loaded machine lets time out is made again: some are, no loop is.
	if n := w.m.metric("link_dials_total") - dials; n < float64(2*moves) || n > float64(4*moves) {
		t.Errorf("%v connections for %d moves and two shards", n, moves)
	}
	w.all.more(volume)
	w.all.end()
	if all := w.ledger.tally(w.since, w.ledger.now(), nil); all.success != all.pushes {
		t.Errorf("pushes to the other node were harmed: %v", all)
	}
	w.m.atRest()
}
