package link

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// dialLog notes who is dialled when. Addresses without a node refuse, or are holes.
type dialLog struct {
	w *world

	mu      sync.Mutex
	at      map[string][]time.Duration
	begun   time.Time
	holes   bool // those that nobody answers do not refuse either
	now     int
	busiest int
}

func newDialLog() *dialLog { return &dialLog{at: map[string][]time.Duration{}, begun: time.Now()} }

func (g *dialLog) dial(ctx context.Context, addr string) (net.Conn, error) {
	g.mu.Lock()
	g.at[addr] = append(g.at[addr], time.Since(g.begun))
	g.now++
	g.busiest = max(g.busiest, g.now)
	holes := g.holes
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		g.now--
		g.mu.Unlock()
	}()
	conn, err := g.w.dialNode(ctx, addr)
	if err != nil && holes {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return conn, err
}

func (g *dialLog) of(addr string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.at[addr])
}

// busy is the most dials that were under way at a time, and that began within a second.
func (g *dialLog) busy() (together, most int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []time.Duration
	for _, at := range g.at {
		all = append(all, at...)
	}
	slices.Sort(all)
	for i, j := 0, 0; j < len(all); j++ {
		for all[j]-all[i] >= time.Second {
			i++
		}
		most = max(most, j-i+1)
	}
	return g.busiest, most
}

// many makes up registrations: so many ids, each at the address that it gets.
func many(count int, addr func(i int) string) (idAddr []string) {
	for i := range count {
		idAddr = append(idAddr, fmt.Sprint("gone-", i), addr(i))
	}
	return idAddr
}

func at(addr string) func(int) string { return func(int) string { return addr } }

// A dead address is one suspicion, however many ids and shards want to go there.
func TestDeadAddressIsDialledOnceForAll(t *testing.T) {
	for name, holes := range map[string]bool{"refuses": false, "hole": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				g := newDialLog()
				g.holes = holes
				g.w = newWorld(t, Config{Shards: 4, Dialer: g.dial})
				g.w.register(many(50, at("dead:1"))...)
				synctest.Wait()
				if n := g.of("dead:1"); n != 1 {
					t.Errorf("%d dials at first", n)
				}
				time.Sleep(1100 * time.Millisecond)
				if st := g.w.set.Stats(); st.Live != 0 {
					t.Errorf("%+v", st)
				}
				g.w.room("r", "gone-7", "u1")
				began := time.Now()
				if r := g.w.do(g.w.toUser("u1", "x")); r.Failed != 1 || time.Since(began) != 0 {
					t.Errorf("after %v: %+v", time.Since(began), r)
				}
				time.Sleep(time.Minute)
				if n := g.of("dead:1"); n < 50 || n > 110 { // the longest pause is 750 ms, give or take
					t.Errorf("%d dials in a minute", n)
				}
				g.w.start("dead:1", &fakeNode{id: "gone-7"})
				time.Sleep(2 * time.Second)
				if st := g.w.set.Nodes(); g.w.set.Stats().Live != 4 || !g.w.set.Alive("gone-7") {
					t.Errorf("back: %+v of %d", g.w.set.Stats(), len(st))
				}
			})
		})
	}
}

// So is the address of a living node under which others are registered. That node's own
// links do not wait for them.
func TestAddressOfAnotherNodeIsDialledOnceForAll(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newDialLog()
		g.w = newWorld(t, Config{Shards: 4, Dialer: g.dial})
		n := g.w.start("a:1", &fakeNode{id: "A"})
		g.w.register(append(many(500, at("a:1")), "A", "a:1")...)
		synctest.Wait()
		if st := g.w.set.Stats(); st.Live != 4 {
			t.Errorf("at once: %+v", st)
		}
		if n := g.of("a:1"); n > 8 {
			t.Errorf("%d dials at first", n)
		}
		time.Sleep(time.Minute)
		if n := g.of("a:1"); n > 115 {
			t.Errorf("%d dials in a minute", n)
		}
		for range 10 { // it restarts, and is back at once
			old := n
			n = g.w.start("a:1", &fakeNode{id: "A"})
			old.kill()
			synctest.Wait()
			if st := g.w.set.Stats(); st.Live != 4 {
				t.Errorf("after a restart: %+v", st)
			}
			time.Sleep(time.Second)
		}
	})
}

// However many nodes are gone: dials have a bound, and those that may succeed do not wait.
func TestDeadNodesLeaveTheDialsToOthers(t *testing.T) {
	for name, holes := range map[string]bool{"refuse": false, "holes": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				g := newDialLog()
				g.holes = holes
				g.w = newWorld(t, Config{Dialer: g.dial, Dials: 20, DialRate: 100})
				gone := many(300, func(i int) string { return fmt.Sprint("dead:", i) })
				n := g.w.start("a:1", &fakeNode{id: "A"})
				g.w.register(append(slices.Clone(gone), "A", "a:1")...)
				time.Sleep(30 * time.Second) // by now all have failed
				for i := range 10 {
					old := n
					n = g.w.start("a:1", &fakeNode{id: "A"})
					old.kill()
					g.w.start(fmt.Sprint("new:", i), &fakeNode{id: fmt.Sprint("N", i)})
					gone = append(gone, fmt.Sprint("N", i), fmt.Sprint("new:", i))
					g.w.register(append(slices.Clone(gone), "A", "a:1")...)
					time.Sleep(50 * time.Millisecond)
					if !g.w.set.Alive("A") || !g.w.set.Alive(fmt.Sprint("N", i)) {
						t.Errorf("after 50 ms: restarted node alive %v, new node alive %v", g.w.set.Alive("A"), g.w.set.Alive(fmt.Sprint("N", i)))
					}
					time.Sleep(time.Second)
				}
				back := g.w.start("dead:123", &fakeNode{id: "gone-123"})
				most := 300 * time.Second / 50 // half of the rate
				if holes {
					most = 300 * time.Second / 10 // half of those under way, a second each
				}
				time.Sleep(most + 2*time.Second)
				if back.opened() != 1 {
					t.Errorf("%d streams to a node that is back for %v", back.opened(), most)
				}
				if together, inSecond := g.busy(); together > 20 || inSecond > 110 {
					t.Errorf("%d dials at a time, %d in a second", together, inSecond)
				}
			})
		})
	}
}

// A link whose turn does not come holds its pushes no longer than one that dials.
func TestLinkWithoutATurnIsDownAfterTheDialTimeout(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newDialLog()
		g.holes = true
		g.w = newWorld(t, Config{Dialer: g.dial, Dials: 2})
		g.w.register(many(50, func(i int) string { return fmt.Sprint("dead:", i) })...)
		synctest.Wait()
		g.w.room("r", "gone-49", "u1")
		began := time.Now()
		if r := g.w.do(g.w.toUser("u1", "x")); r.Failed != 1 || time.Since(began) > 1050*time.Millisecond {
			t.Errorf("after %v: %+v", time.Since(began), r)
		}
		began = time.Now()
		if r := g.w.do(g.w.toUser("u1", "x")); r.Failed != 1 || time.Since(began) != 0 {
			t.Errorf("again, after %v: %+v", time.Since(began), r)
		}
	})
}

// Whatever nodes and registrations do, turns are given back, and who lives is reached.
func TestTurnsAreGivenBack(t *testing.T) {
	for range 20 {
		seed := rand.Uint64()
		bubble(t, func(t *testing.T) {
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 0))
			g := newDialLog()
			g.holes = r.IntN(2) == 0
			g.w = newWorld(t, Config{Shards: 1 + r.IntN(3), Dialer: g.dial, Dials: 2 + r.IntN(6), DialRate: 20 + r.IntN(200)})
			lives := map[string]*fakeNode{}
			for range 40 {
				addr := fmt.Sprint("addr:", r.IntN(6))
				switch r.IntN(3) {
				case 0:
					if n := lives[addr]; n != nil {
						n.kill()
					}
					lives[addr] = g.w.start(addr, &fakeNode{id: fmt.Sprint("id", r.IntN(6))})
				case 1:
					if n := lives[addr]; n != nil {
						n.kill()
						g.w.mu.Lock()
						delete(g.w.nodes, addr)
						g.w.mu.Unlock()
						delete(lives, addr)
					}
				case 2:
					var nodes []string
					for id := range r.IntN(8) {
						nodes = append(nodes, fmt.Sprint("id", id), fmt.Sprint("addr:", r.IntN(6)))
					}
					g.w.register(nodes...)
				}
				time.Sleep(time.Duration(r.IntN(500)) * time.Millisecond)
			}
			var nodes []string
			for addr, n := range lives {
				if !slices.Contains(nodes, n.id) {
					nodes = append(nodes, n.id, addr)
				}
			}
			g.w.register(nodes...)
			time.Sleep(10 * time.Second)
			for i := 0; i < len(nodes); i += 2 {
				if !g.w.set.Alive(nodes[i]) {
					t.Errorf("%s at %s lives, and is not reached", nodes[i], nodes[i+1])
				}
			}
			g.w.set.Close()
			d := g.w.set.dials
			if d.busy != [2]int{} || d.waiting() != 0 {
				t.Errorf("dials under way %v, %d wait", d.busy, d.waiting())
			}
		})
	}
}
