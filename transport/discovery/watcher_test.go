package discovery

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

// watched is a Watcher and what it has told.
type watched struct {
	*Watcher
	mu    sync.Mutex
	told  [][]Node
	alive atomic.Bool // all links
}

func watch(t *testing.T, client *clientv3.Client, change func(*Config)) *watched {
	t.Helper()
	w := &watched{}
	cfg := Config{
		Client:         client,
		Alive:          func(string) bool { return w.alive.Load() },
		ProbeInterval:  100 * time.Millisecond,
		ConfirmAfter:   8 * time.Second,
		ResyncInterval: time.Hour, // or a list that is due anyway passes for one that is needed
		RequestTimeout: time.Second,
		OnChange: func(nodes []Node) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.told = append(w.told, nodes)
		},
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if w.Watcher, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	w.Start()
	t.Cleanup(w.Close)
	return w
}

// has waits until the set is exactly ids.
func (w *watched) has(t *testing.T, ids ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%q known, have %v", ids, w.Nodes()), func() bool {
		var got []string
		for _, n := range w.Nodes() {
			got = append(got, n.ID)
		}
		return w.Synced() && slices.Equal(got, ids)
	})
}

func (w *watched) changes() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.told)
}

// neverLost fails when any set told so far lacks one of ids.
func (w *watched) neverLost(t *testing.T, ids ...string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, set := range w.told {
		for _, id := range ids {
			if !slices.ContainsFunc(set, func(n Node) bool { return n.ID == id }) {
				t.Fatalf("%q was removed: %v", id, set)
			}
		}
	}
}

func put(t *testing.T, client *clientv3.Client, id, addr string, opts ...clientv3.OpOption) {
	t.Helper()
	value, err := encodeValue(id, addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	putRaw(t, client, ConnectNodePrefix+id, value, opts...)
}

func putRaw(t *testing.T, client *clientv3.Client, key, value string, opts ...clientv3.OpOption) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := client.Put(ctx, key, value, opts...); err != nil {
		t.Fatal(err)
	}
}

func del(t *testing.T, client *clientv3.Client, key string, opts ...clientv3.OpOption) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := client.Delete(ctx, key, opts...); err != nil {
		t.Fatal(err)
	}
}

func TestNodesComeGoAndMove(t *testing.T) {
	client := etcdtest.Start(t).Client()
	put(t, client, "a", "127.0.0.1:1")
	putRaw(t, client, "/services/connect-node-2/z", `{"Addr":"h:1"}`)
	w := watch(t, client, nil)
	w.has(t, "a")
	put(t, client, "b", "127.0.0.1:2")
	w.has(t, "a", "b")
	put(t, client, "a", "127.0.0.1:3")
	eventually(t, "the new address", func() bool { return w.Nodes()[0].Addr == "127.0.0.1:3" })
	del(t, client, ConnectNodePrefix+"b")
	w.has(t, "a")
	before := w.changes()
	put(t, client, "a", "127.0.0.1:3")
	putRaw(t, client, ConnectNodePrefix+"bad", "garbage")
	putRaw(t, client, ConnectNodePrefix+"a", strings.Repeat("x", 1<<20))
	put(t, client, "c", "127.0.0.1:4")
	w.has(t, "a", "c")
	if n := w.changes(); n != before+1 {
		t.Fatalf("%d changes told for one", n-before)
	}
	if n := w.m.badValues.Get(); n != 2 {
		t.Fatalf("%d bad values counted", n)
	}
}

func TestEmptyPrefixIsToldOnce(t *testing.T) {
	client := etcdtest.Start(t).Client()
	w := watch(t, client, nil)
	w.has(t)
	if n := w.changes(); n != 1 {
		t.Fatalf("told %d times", n)
	}
}

func TestListsOfManyPagesAreComplete(t *testing.T) {
	client := etcdtest.Start(t).Client()
	const many = 3*pageSize + 1
	for from := 0; from < many; from += 100 {
		var ops []clientv3.Op
		for i := from; i < min(from+100, many); i++ {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("%sn%04d", ConnectNodePrefix, i), `{"Addr":"h:1"}`))
		}
		if _, err := client.Txn(t.Context()).Then(ops...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	w := watch(t, client, nil)
	eventually(t, "all nodes known", func() bool { return len(w.Nodes()) == many })
	if n := w.changes(); n != 1 {
		t.Fatalf("told in %d pieces", n)
	}
}

// A report costs what all nodes cost: when all of them start, one by one, there is not one for each.
func TestNodesThatComeOneByOneAreReportedTogether(t *testing.T) {
	client := etcdtest.Start(t).Client()
	w := watch(t, client, nil)
	w.has(t)
	const many = 500
	began := time.Now()
	var puts sync.WaitGroup
	for i := range 10 {
		puts.Go(func() {
			for n := i; n < many; n += 10 {
				put(t, client, fmt.Sprintf("n%04d", n), "h:1")
			}
		})
	}
	puts.Wait()
	eventually(t, "all nodes known", func() bool { return len(w.Nodes()) == many })
	if n, most := w.changes(), int(time.Since(began)/settleEvery)+3; n > most {
		t.Errorf("told %d times, want %d at most", n, most)
	}
}

func TestEtcdDownAtStart(t *testing.T) {
	server := etcdtest.Reserve(t)
	client, err := NewClient(ClientConfig{Endpoints: []string{server.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	set := metrics.NewSet()
	w := watch(t, client, func(c *Config) { c.Metrics = set })
	eventually(t, "a failed list", func() bool { return w.m.listError.Get() > 0 })
	if w.Synced() || w.changes() != 0 || w.Stale() == 0 {
		t.Fatal("something is known before etcd was there")
	}
	server.Restart()
	began := time.Now()
	w.has(t)
	if took := time.Since(began); took > 10*time.Second { // the exact bound holds in virtual time: recovery
		t.Errorf("known %v after etcd came up", took)
	}
	if w.Stale() != 0 {
		t.Error("still stale")
	}
}

func TestCompactionWhileDisconnected(t *testing.T) {
	server := etcdtest.Start(t)
	direct := server.Client()
	proxy := etcdtest.NewProxy(t, server.Endpoint())
	put(t, direct, "a", "h:1")
	put(t, direct, "b", "h:1")
	w := watch(t, etcdtest.NewClient(t, proxy.Addr()), func(c *Config) {
		// Only the watch itself may notice.
		c.MinBackoff, c.MaxBackoff = 50*time.Millisecond, 100*time.Millisecond
	})
	w.has(t, "a", "b")
	eventually(t, "the watch is open", func() bool { return w.m.listOK.Get() == 1 })

	proxy.Cut()
	eventually(t, "etcd is noticed to be away", func() bool { return w.Stale() > 0 })
	del(t, direct, ConnectNodePrefix+"a")
	for range 20 {
		put(t, direct, "c", "h:1")
	}
	now, err := direct.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := direct.Compact(t.Context(), now.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	w.neverLost(t, "a", "b")
	lists := w.m.listOK.Get()
	proxy.Mend()
	w.has(t, "b", "c")
	put(t, direct, "d", "h:1")
	w.has(t, "b", "c", "d")
	if n := w.m.listOK.Get() - lists; n > 2 {
		t.Errorf("%d lists to recover", n)
	}
	if w.m.breakCompacted.Get() == 0 {
		t.Log("the watch was resumed by a list before it could report the compaction")
	}
}

func TestEtcdRestartRemovesNothing(t *testing.T) {
	server := etcdtest.Start(t)
	client := server.Client()
	put(t, client, "a", "h:1")
	w := watch(t, client, nil)
	w.has(t, "a")
	server.Stop()
	eventually(t, "staleness rises", func() bool { return w.Stale() > 300*time.Millisecond })
	w.neverLost(t, "a")
	server.Restart()
	eventually(t, "staleness ends", func() bool { return w.Stale() == 0 })
	put(t, client, "b", "h:1")
	w.has(t, "a", "b")
	if n := w.changes(); n != 2 {
		t.Errorf("%d changes told, want 2", n)
	}
}

func TestWipedEtcdRemovesNothingUntilAListAgrees(t *testing.T) {
	t.Parallel() // it waits for ConfirmAfter
	server := etcdtest.Start(t)
	client := server.Client()
	for range 50 { // history for a revision that can be seen to go back
		put(t, client, "a", "h:1")
	}
	put(t, client, "b", "h:1")
	w := watch(t, client, nil)
	w.has(t, "a", "b")
	server.Wipe()
	eventually(t, "the wipe is seen", func() bool { return w.m.listBack.Get() > 0 })
	w.neverLost(t, "a", "b")
	put(t, client, "b", "h:2") // registers again
	put(t, client, "c", "h:1")
	w.has(t, "a", "b", "c")
	w.has(t, "b", "c") // the second list agrees that a is gone
	if w.Nodes()[0].Addr != "h:2" {
		t.Fatalf("got %v", w.Nodes())
	}
	if took := w.m.listBack.Get(); took != 1 {
		t.Errorf("%d lists went back", took)
	}
}

// TestWipedEtcdIsSeenWhenItIsBack: the watch goes on by itself and says nothing, since
// what it waits for lies far in the future of the new history.
func TestWipedEtcdIsSeenWhenItIsBack(t *testing.T) {
	server := etcdtest.Start(t)
	client := server.Client()
	for range 50 {
		put(t, client, "a", "h:1")
	}
	ours, err := NewClient(ClientConfig{Endpoints: []string{server.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ours.Close() })
	w := watch(t, ours, func(c *Config) { c.ProbeInterval = time.Hour })
	w.has(t, "a")
	for range 3 {
		back := w.m.listBack.Get()
		server.Wipe()
		eventually(t, "the wipe is seen", func() bool { return w.m.listBack.Get() > back })
		for range 50 {
			put(t, client, "a", "h:1")
		}
	}
	w.neverLost(t, "a")
}

func TestRevokedLeaseIsBridgedWhileTheLinkLives(t *testing.T) {
	t.Parallel() // it waits for Grace
	client := etcdtest.Start(t).Client()
	lease, err := client.Grant(t.Context(), 60)
	if err != nil {
		t.Fatal(err)
	}
	put(t, client, "a", "h:1", clientv3.WithLease(lease.ID))
	put(t, client, "b", "h:1")
	w := watch(t, client, func(c *Config) { c.Grace = 8 * time.Second })
	w.has(t, "a", "b")
	w.alive.Store(true)
	if _, err := client.Revoke(t.Context(), lease.ID); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a is held", func() bool { return w.m.held.Load() == 1 })
	put(t, client, "a", "h:1")
	eventually(t, "a is back", func() bool { return w.m.held.Load() == 0 })
	if n := w.changes(); n != 1 {
		t.Fatalf("the set flapped: %d changes told", n)
	}
	del(t, client, ConnectNodePrefix+"a")
	eventually(t, "a is held", func() bool { return w.m.held.Load() == 1 })
	w.has(t, "b")
}

func TestDeletedPrefixKeepsLivingNodes(t *testing.T) {
	client := etcdtest.Start(t).Client()
	for _, id := range []string{"a", "b", "c"} {
		put(t, client, id, "h:1")
	}
	w := watch(t, client, func(c *Config) { c.Grace = time.Millisecond })
	w.has(t, "a", "b", "c")
	w.alive.Store(true)
	del(t, client, ConnectNodePrefix, clientv3.WithPrefix())
	eventually(t, "the alarm", func() bool { return w.m.panicking.Load() == 1 })
	w.neverLost(t, "a", "b", "c")
	w.alive.Store(false)
	w.has(t)
}

func TestCloseBeforeStart(t *testing.T) {
	client := etcdtest.NewClient(t, "127.0.0.1:1")
	w, err := New(Config{Client: client, OnChange: func([]Node) {}})
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	w.Start()
	w.Close()
}

func TestConfigNamesWhatIsWrong(t *testing.T) {
	_, err := New(Config{Grace: -1, MaxNodes: -1})
	for _, want := range []string{"Client", "OnChange", "Grace", "MaxNodes"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}

// TestKeysBelowANodesKeyAreNoNodes, neither in a list nor in a watch: one that ends in the id of a node does not take it over.
func TestKeysBelowANodesKeyAreNoNodes(t *testing.T) {
	etcd := etcdtest.Start(t)
	client := etcd.Client()
	put := func(key, addr string) {
		t.Helper()
		if _, err := client.Put(t.Context(), key, `{"Op":0,"Addr":"`+addr+`"}`); err != nil {
			t.Fatal(err)
		}
	}
	put(ConnectNodePrefix+"node-1", "127.0.0.1:1")
	put(ConnectNodePrefix+"zone-a/node-1", "127.0.0.1:2") // created later
	put("/services/connect-node-2/node-9", "127.0.0.1:9")
	w := watch(t, client, nil)
	w.has(t, "node-1")
	put(ConnectNodePrefix+"zone-b/node-1", "127.0.0.1:3")
	put(ConnectNodePrefix+"zone-b/node-2", "127.0.0.1:4")
	put(ConnectNodePrefix+"node-3", "127.0.0.1:5") // comes after them
	w.has(t, "node-1", "node-3")
	if got := w.Nodes()[0].Addr; got != "127.0.0.1:1" {
		t.Errorf("node-1 is at %s, want 127.0.0.1:1", got)
	}
	if n := w.m.foreign.Get(); n != 3 {
		t.Errorf("%d foreign keys are counted, want 3", n)
	}
}
