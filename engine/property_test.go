package engine

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

var nodeIDs = []string{"A", "B", "C"}

// drawPlaces draws where each of some users is.
func drawPlaces(t *rapid.T, label string) map[string][]string {
	places := map[string][]string{}
	for i := range rapid.IntRange(0, 8).Draw(t, label+" users") {
		user := fmt.Sprintf("u%d", i)
		places[user] = rapid.SliceOfNDistinct(rapid.SampledFrom(nodeIDs), 0, 3, rapid.ID[string]).Draw(t, label+" "+user)
	}
	return places
}

// fate is what a node does with one user of one delivery; the node's whole-delivery
// fates are in whole.
type fate struct {
	whole   int // 0 ack, 1 lost, 2 refused, 3 declined, 4 unreachable, 5 short count
	notHere map[string]bool
	failed  map[string]bool
}

// TestBooksBalanceWhateverNodesAnswer holds every outcome against a record of what
// the nodes did, over random rooms, routes that went stale, and answers.
func TestBooksBalanceWhateverNodesAnswer(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld()
		e := w.engineFor(rt)
		before, after := drawPlaces(rt, "before"), drawPlaces(rt, "after")
		w.rooms["r"], w.users = before, before
		users := slices.Sorted(maps.Keys(before))
		kind := rapid.SampledFrom([]Kind{ToRoom, ToUsers}).Draw(rt, "kind")
		if len(users) == 0 {
			kind = ToRoom
		}
		mk := func() *Push {
			if kind == ToRoom {
				return toRoom("r", rapid.SliceOfN(rapid.SampledFrom([]string{"u0", "u3", "u5", "x"}), 0, 3).Draw(rt, "exclude")...)
			}
			return toUsers(users...)
		}
		if _, err := e.Do(context.Background(), toRoom("r")); err != nil {
			rt.Fatal(err)
		}
		if len(users) > 0 {
			if _, err := e.Do(context.Background(), toUsers(users...)); err != nil {
				rt.Fatal(err)
			}
		}
		w.rooms["r"], w.users = after, after
		var ledger sync.Mutex
		reached := map[string]bool{} // users that some node handed it to and said so
		maybe := map[string]bool{}   // users for whom a delivery was lost
		for _, id := range nodeIDs {
			f := fate{whole: rapid.IntRange(0, 5).Draw(rt, id), notHere: map[string]bool{}, failed: map[string]bool{}}
			for i := range 8 {
				switch rapid.IntRange(0, 4).Draw(rt, fmt.Sprintf("%s u%d", id, i)) {
				case 0:
					f.notHere[fmt.Sprintf("u%d", i)] = true
				case 1:
					f.failed[fmt.Sprintf("u%d", i)] = true
				}
			}
			w.nodes[id].script(f, &ledger, reached, maybe)
		}
		p := mk()
		r, err := e.Do(context.Background(), p)
		if err != nil {
			rt.Fatal(err)
		}
		if sum := r.Delivered + r.Offline + r.Failed + r.Unknown; r.Targets != sum || r.Targets != p.targets {
			rt.Fatalf("targets %d, sum %d, users %d: %+v", r.Targets, sum, p.targets, r)
		}
		if r.Delivered > len(reached) || r.Unknown > len(maybe) {
			rt.Fatalf("%d delivered of %d reached, %d unknown of %d lost: %+v", r.Delivered, len(reached), r.Unknown, len(maybe), r)
		}
		// A short count hides which users were reached: those reached may then be
		// unknown, never the other way round.
		if r.Delivered+r.Unknown < len(reached) {
			rt.Fatalf("%d delivered, %d unknown, %d reached: %+v", r.Delivered, r.Unknown, len(reached), r)
		}
		blamed := 0
		for _, f := range r.NodeFailures {
			if strings.Contains(f.Reason, "internal") {
				rt.Fatalf("tally were mended: %+v", r)
			}
			blamed += f.Users
		}
		if blamed != r.Failed+r.Unknown {
			rt.Fatalf("node failures name %d users of %d: %+v", blamed, r.Failed+r.Unknown, r)
		}
	})
}

// engineFor is engine for a rapid check, whose cleanups run after each example.
func (w *world) engineFor(rt *rapid.T) *Engine {
	e, stop, err := w.build()
	if err != nil {
		rt.Fatal(err)
	}
	rt.Cleanup(stop)
	return e
}

func (n *testNode) script(f fate, mu *sync.Mutex, reached, maybe map[string]bool) {
	switch f.whole {
	case 3:
		n.decline = DropQueueFull
	case 4:
		n.decline = DropUnreachable
	}
	n.answer = func(d *Delivery) {
		if f.whole == 1 {
			mu.Lock()
			for _, u := range d.all() {
				maybe[u] = true
			}
			mu.Unlock()
			d.Lose(LostStream)
			return
		}
		a := Ack{Refused: f.whole == 2}
		mu.Lock()
		for _, u := range d.all() {
			switch {
			case a.Refused:
			case f.notHere[u]:
				a.NotHere = append(a.NotHere, u)
			case f.failed[u]:
				a.Failed = append(a.Failed, u)
			default:
				a.Delivered++
				reached[u] = true
			}
		}
		if f.whole == 5 && a.Delivered > 0 { // one was reached, and the count hides which
			a.Delivered--
			for _, u := range d.all() {
				maybe[u] = true
			}
		}
		mu.Unlock()
		if _, err := d.Ack(a); err != nil {
			panic(err)
		}
	}
}

// order gathers completions and the payloads that nodes get, in order.
type order struct {
	mu   sync.Mutex
	done int
}

func (o *order) Complete(*Push) {
	o.mu.Lock()
	o.done++
	o.mu.Unlock()
}

func (o *order) ended() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.done
}

// TestStreamOrderSurvivesMovesAndLookups starts pushes to one user one after another
// without waiting, while the user moves between nodes and nodes answer late and
// in any interleaving; what arrives at one connection must be in order.
// many is how often a test tries what comes by chance: so often with LONG=1, else a third of that.
func many(n uint64) uint64 {
	if os.Getenv("LONG") == "" {
		return n / 3
	}
	return n
}

func TestStreamOrderSurvivesMovesAndLookups(t *testing.T) {
	for seed := range many(100) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { streamOrder(t, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
}

func streamOrder(t *testing.T, rng *rand.Rand) {
	w := newWorld()
	e := w.engine(t)
	var mu sync.Mutex
	at := "A"              // where the user is
	conns := [][]byte{nil} // what reached each connection of the user, one after the other
	w.users["u"] = []string{at}
	var nodes sync.WaitGroup
	stop := make(chan struct{})
	for _, id := range nodeIDs {
		q := make(chan *Delivery, 1000)
		delay := time.Duration(rng.IntN(2000)) * time.Microsecond
		w.nodes[id].answer = func(d *Delivery) { q <- d }
		nodes.Go(func() {
			for {
				var d *Delivery
				select {
				case d = <-q:
				case <-stop:
					return
				}
				time.Sleep(delay)
				mu.Lock()
				here := at == id
				if here {
					last := len(conns) - 1
					conns[last] = append(conns[last], d.Payload()[0])
				}
				mu.Unlock()
				if here {
					_, _ = d.Ack(Ack{Delivered: 1})
				} else {
					_, _ = d.Ack(Ack{NotHere: []string{"u"}})
				}
			}
		})
	}
	const pushes = 200
	var o order
	var stream Order
	for i := range pushes {
		p := &Push{Request: Request{Kind: ToUser, User: "u", Order: &stream, Payload: []byte{byte(i)}, Content: Content{Present: true}}}
		if rng.IntN(4) == 0 {
			p.Kind, p.User, p.Users = ToUsers, "", []string{"u", "v"}
		}
		if err := e.Start(p, &o); err != nil {
			t.Fatal(err)
		}
		if rng.IntN(40) == 0 {
			mu.Lock()
			at = nodeIDs[rng.IntN(len(nodeIDs))]
			conns = append(conns, nil)
			mu.Unlock()
			w.mu.Lock()
			w.users["u"] = []string{at}
			w.mu.Unlock()
		}
		time.Sleep(time.Duration(rng.IntN(400)) * time.Microsecond)
	}
	time.Sleep(10 * time.Second) // everything has answered or expired
	close(stop)
	nodes.Wait()
	if o.done != pushes {
		t.Errorf("%d of %d pushes finished", o.done, pushes)
	}
	n := 0
	for _, arrived := range conns {
		n += len(arrived)
		if !slices.IsSorted(arrived) {
			t.Errorf("arrived out of order: %v", arrived)
		}
	}
	if n < pushes/4 {
		t.Errorf("only %d of %d arrived", n, pushes)
	}
}
