package discovery

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/google/go-cmp/cmp"
)

// bench drives a registry through virtual time.
type bench struct {
	t     *testing.T
	r     *registry
	now   time.Time
	alive map[string]bool
	rev   int64
	set   []Node
	told  int
}

func newBench(t *testing.T, maxNodes int) *bench {
	b := &bench{t: t, now: time.Unix(1000, 0), alive: map[string]bool{}}
	cfg := Config{MaxNodes: maxNodes, Grace: 15 * time.Second, Alive: func(id string) bool { return b.alive[id] }}
	cfg.Logger = slog.New(slog.DiscardHandler)
	b.r = newRegistry(cfg, newWatcherMetrics(metrics.NewSet(), "test"))
	return b
}

func (b *bench) after(d time.Duration) { b.now = b.now.Add(d); b.settle() }

func (b *bench) settle() {
	if set, changed := b.r.settle(b.now); changed {
		b.set = set
		b.told++
	}
}

func (b *bench) entry(key, id, addr string) entry {
	b.rev++
	return entry{key: key, node: Node{ID: id, Addr: addr}, created: b.rev, modified: b.rev}
}

func (b *bench) put(ids ...string) {
	for _, id := range ids {
		b.r.put(b.now, b.entry(id, id, id+":1"))
	}
	b.settle()
}

func (b *bench) remove(keys ...string) {
	for _, key := range keys {
		b.r.remove(key)
	}
	b.settle()
}

func (b *bench) want(ids ...string) {
	b.t.Helper()
	var got []string
	for _, n := range b.set {
		got = append(got, n.ID)
	}
	if diff := cmp.Diff(ids, got); diff != "" {
		b.t.Fatalf("the set differs (-want +got):\n%s", diff)
	}
}

func TestDeadNodeGoesWithItsKey(t *testing.T) {
	b := newBench(t, 10)
	b.put("a", "b", "c")
	b.alive["a"], b.alive["c"] = true, true
	b.remove("b")
	b.want("a", "c")
}

func TestLivingNodeIsHeldForTheGrace(t *testing.T) {
	b := newBench(t, 10)
	b.put("a", "b", "c")
	b.alive["b"] = true
	b.remove("b")
	b.after(14 * time.Second)
	b.want("a", "b", "c")
	if b.told != 1 {
		t.Fatalf("the set was told %d times", b.told)
	}
	b.after(time.Second)
	b.want("a", "c")
}

func TestHeldNodeGoesAsSoonAsItsLinkEnds(t *testing.T) {
	b := newBench(t, 10)
	b.put("a", "b", "c")
	b.alive["b"] = true
	b.remove("b")
	b.after(time.Second)
	b.want("a", "b", "c")
	b.alive["b"] = false
	b.after(time.Second)
	b.want("a", "c")
}

func TestHeldNodeThatComesBackDoesNotFlap(t *testing.T) {
	b := newBench(t, 10)
	b.put("a", "b", "c")
	b.alive["b"] = true
	b.remove("b")
	b.after(10 * time.Second)
	b.put("b")
	b.after(time.Minute)
	b.want("a", "b", "c")
	if b.told != 1 {
		t.Fatalf("the set was told %d times", b.told)
	}
}

func TestNewAddressIsToldAtOnce(t *testing.T) {
	b := newBench(t, 10)
	b.put("a", "b")
	b.alive["a"] = true
	b.r.put(b.now, b.entry("a", "a", "elsewhere:2"))
	b.settle()
	if want := (Node{ID: "a", Addr: "elsewhere:2"}); b.set[0] != want || len(b.set) != 2 {
		t.Fatalf("got %v", b.set)
	}
}

func TestAllKeysPutAgainChangesNothing(t *testing.T) {
	b := newBench(t, 10)
	b.put("a", "b", "c")
	b.put("a", "b", "c")
	if b.told != 1 {
		t.Fatalf("the set was told %d times", b.told)
	}
}

func TestMostNodesVanishingKeepsTheLiving(t *testing.T) {
	b := newBench(t, 10)
	b.put("a", "b", "c", "d", "e")
	b.alive["a"], b.alive["b"], b.alive["c"] = true, true, true
	b.r.replace(b.now, nil, false)
	b.settle()
	b.want("a", "b", "c")
	b.after(time.Hour)
	b.want("a", "b", "c")
	if b.r.m.panics.Get() != 1 || b.r.m.panicking.Load() != 1 {
		t.Fatal("no alarm")
	}

	b.alive["c"] = false
	b.after(time.Second)
	b.want("a", "b")

	// etcd knows the majority again: the rest gets its ordinary grace.
	b.put("b", "c", "d")
	b.want("a", "b", "c", "d")
	b.after(14 * time.Second)
	b.want("a", "b", "c", "d")
	b.after(time.Second)
	b.want("b", "c", "d")
	if b.r.m.panicking.Load() != 0 {
		t.Fatal("the alarm stays")
	}
}

func TestOneOfOneIsNoPanic(t *testing.T) {
	b := newBench(t, 10)
	b.put("a")
	b.alive["a"] = true
	b.remove("a")
	b.after(15 * time.Second)
	b.want()
}

func TestMalformedValueLeavesWhatWasKnown(t *testing.T) {
	b := newBench(t, 10)
	b.put("a", "b")
	b.r.put(b.now, entry{key: "a", bad: errors.New("garbage"), modified: 90})
	b.r.put(b.now, entry{key: "x", bad: errors.New("garbage"), modified: 91})
	b.r.put(b.now, entry{key: "x", bad: errors.New("garbage"), modified: 91})
	b.settle()
	b.want("a", "b")
	if n := b.r.m.badValues.Get(); n != 2 {
		t.Fatalf("%d bad values counted, want 2: one sighting each", n)
	}
	b.remove("a")
	b.want("b")
}

func TestLaterKeyWinsTheID(t *testing.T) {
	b := newBench(t, 10)
	first, second := b.entry("k1", "a", "one:1"), b.entry("k2", "a", "two:1")
	for _, order := range [][]entry{{first, second}, {second, first}} {
		b.r.replace(b.now, order, false)
		b.settle()
		if len(b.set) != 1 || b.set[0].Addr != "two:1" {
			t.Fatalf("got %v", b.set)
		}
	}
	if n := b.r.m.conflicts.Get(); n != 1 {
		t.Fatalf("%d conflicts counted", n)
	}
	b.remove("k2")
	if b.set[0].Addr != "one:1" {
		t.Fatalf("got %v", b.set)
	}
}

func TestTooManyNodesKeepsTheFirst(t *testing.T) {
	b := newBench(t, 3)
	b.put("m", "n")
	var list []entry
	for i := range 100 {
		list = append(list, b.entry(fmt.Sprintf("a%02d", i), fmt.Sprintf("a%02d", i), "h:1"))
	}
	list = append(list, b.entry("m", "m", "m:1"), b.entry("n", "n", "n:1"))
	b.r.replace(b.now, list, false)
	b.settle()
	b.want("a00", "m", "n")
	if b.r.m.overLimit.Get() != 99 {
		t.Fatalf("%d refused", b.r.m.overLimit.Get())
	}
}

func TestDoubtfulListRemovesNothing(t *testing.T) {
	b := newBench(t, 10)
	b.put("a", "b")
	b.r.replace(b.now, []entry{b.entry("c", "c", "c:1")}, true)
	b.settle()
	b.want("a", "b", "c")
	b.r.replace(b.now, []entry{b.entry("c", "c", "c:1")}, false)
	b.settle()
	b.want("c")
}

func TestForeignKeysAreIgnoredAndCountedOnce(t *testing.T) {
	var log logText
	b := newBench(t, 10)
	b.r.log = slog.New(slog.NewTextHandler(&log, nil))
	b.put("a")
	for range 5 { // its owner writes it again and again
		b.rev++
		b.r.put(b.now, entry{key: "zone/a", foreign: true, created: 2, modified: b.rev})
		b.after(time.Minute)
	}
	b.want("a")
	if n := b.r.m.foreign.Get(); n != 1 {
		t.Errorf("counted %d times, want 1", n)
	}
	if n := strings.Count(log.String(), "zone/a"); n != 1 {
		t.Errorf("logged %d times, want 1:\n%s", n, &log)
	}
	b.remove("zone/a")
	b.r.put(b.now, entry{key: "zone/a", foreign: true, created: 9, modified: 9})
	if n := b.r.m.foreign.Get(); n != 2 {
		t.Errorf("a key that came again is counted %d times in all, want 2", n)
	}
	for i := range 100 {
		b.r.put(b.now, entry{key: fmt.Sprintf("zone/%d", i), foreign: true, created: 10, modified: 10})
	}
	if n := len(b.r.foreign); n > 10 {
		t.Errorf("%d foreign keys are kept, the bound is 10", n)
	}
}

func TestContestedIDsAreShownWhileTheyLast(t *testing.T) {
	b := newBench(t, 10)
	b.r.put(b.now, b.entry("x", "n", "old:1"))
	b.r.put(b.now, b.entry("y", "n", "new:1"))
	b.settle()
	if b.set[0].Addr != "new:1" {
		t.Errorf("the node is at %s, the key created last says new:1", b.set[0].Addr)
	}
	if n := b.r.m.contested.Load(); n != 1 {
		t.Errorf("%d ids are contested, want 1", n)
	}
	b.remove("y")
	if n := b.r.m.contested.Load(); n != 0 || b.set[0].Addr != "old:1" {
		t.Errorf("after the winner has gone %d ids are contested and the node is at %s, want 0 and old:1", n, b.set[0].Addr)
	}
}
