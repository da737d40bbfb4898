package faultbench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	pubsub "github.com/push-manager/push-manager/proto"
)

// dwell keeps a user connected, at one gateway or another, until the town ends: a client that
// connects again when its gateway goes.
func (t *town) dwell(user string, r *rand.Rand) {
	for {
		var v *visit
		if g := t.anyGate(r); g != nil {
			v = t.open(user, g, "")
		}
		var ended <-chan struct{}
		if v != nil {
			ended = v.ended
		} else {
			pause := make(chan struct{})
			time.AfterFunc(20*time.Millisecond, func() { close(pause) })
			ended = pause
		}
		select {
		case <-ended:
		case <-t.stop:
			return // what is on its way is still to come: the test closes the connection
		}
	}
}

// TestLastingRollingRestartLosesNothing: everything is restarted, one after the other, behind
// HAProxy, while users are pushed to with everything that options have. Whoever is told that
// nothing was sent, or is told nothing, asks once more with the same id. No message is lost, shown
// twice at one connection, or out of order, unless a gateway says that it did not wait for the store.
func TestLastingRollingRestartLosesNothing(t *testing.T) {
	slow(t)
	t.Parallel()
	if _, err := exec.LookPath("haproxy"); err != nil {
		t.Skip("there is no haproxy (Debian: package haproxy)")
	}
	stores := startStores(t, 0)
	c := newLastingTown(t, townPlan{managers: 3, gates: 3, managerEnv: storeAt(stores...)})
	front := c.balance(c.managers)
	users := names("u", 60)
	for i, name := range users {
		r := rand.New(rand.NewPCG(c.seed, uint64(500+i)))
		c.people.Go(func() { c.dwell(name, r) })
	}
	eventually(t, "pushes succeed through the balancer", func() error {
		p := front.ask(context.Background(), front.dial(), user("first").with(lasting()))
		if p.summary.GetStored() != 1 {
			return fmt.Errorf("%v %s", p, failures(p.summary))
		}
		return nil
	})
	c.ledger.absent = func(user string) bool { return user == "first" }
	var calls, retries, lost atomic.Int64
	stop := make(chan struct{})
	const callers = 12
	rate := long(120, 2000)
	for i := range callers {
		api := front.dial()
		c.callers.Go(func() {
			tick := time.NewTicker(time.Second * callers / time.Duration(rate))
			defer tick.Stop()
			for n := i; ; n += callers { // each user has one caller
				select {
				case <-stop:
					return
				case <-tick.C:
				}
				calls.Add(1)
				q := user(users[n%len(users)]).with(lasting())
				p := front.ask(context.Background(), api, q)
				if p.err != nil && (p.code() == codes.Unavailable || !p.safe()) || p.summary.GetFailed()+p.summary.GetUnknown() > 0 {
					retries.Add(1)
					q.again, q.options = p, p.options
					p = front.ask(context.Background(), api, q)
				}
				if p.err != nil || p.summary.GetDelivered()+p.summary.GetStored() != 1 {
					lost.Add(1)
					t.Errorf("not delivered and not stored: %v %s\n%s", p, failures(p.summary), c.ledger.history(p))
				}
			}
		})
	}
	wait(time.Second)
	hasty := 0.0
	for _, m := range long(c.managers[:1], c.managers) {
		c.restartManager(m)
		m.reaches(len(c.gates))
		wait(pauseBetween)
	}
	for _, g := range long(c.gates[:1], c.gates) {
		c.ledger.note("%s is drained", g.id)
		c.mark(g, true)
		hasty += c.hasty(g)
		g.signal(syscall.SIGTERM)
		<-g.done
		c.bootGate(g)
		c.mark(g, false)
		for _, m := range c.managers {
			m.reaches(len(c.gates))
		}
		wait(pauseBetween)
	}
	for _, s := range long(stores[:1], stores) {
		c.ledger.note("%s is restarted", s.name)
		s.signal(syscall.SIGTERM)
		<-s.done
		s.boot()
		wait(long(2*time.Second, 10*time.Second)) // until it has caught up
	}
	close(stop)
	c.callers.Wait()
	for _, g := range c.gates {
		hasty += c.hasty(g)
	}
	c.ledger.unordered = hasty > 0
	c.settle()
	close(c.stop)
	c.people.Wait()
	t.Logf("%d pushes, %d tried again, %d lost; %v gates opened before the store had answered", calls.Load(), retries.Load(), lost.Load(), hasty)
}

// hasty is how often a gateway has shown what is new before what is stored, because the store did not
// answer: then there is no order.
func (t *town) hasty(g *gate) float64 {
	t.t.Helper()
	values, err := readMetrics(g.metrics)
	if err != nil {
		t.t.Error(err)
	}
	return values["connect_node_gate_open_without_store_total"] + values["connect_node_replay_failed_total"]
}

// mark says whether clients may come to a gateway.
func (t *town) mark(g *gate, leaving bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g.leaving = leaving
}

// TestLastingChaos is people who come, move and go while gateways are killed, stopped and
// drained and the store's process is killed, and what callers of pushes with options are told.
func TestLastingChaos(t *testing.T) {
	slow(t)
	t.Parallel()
	store := startStore(t)
	c := newLastingTown(t, townPlan{managers: 3, gates: 3, managerEnv: prompt(storeAt(store)...)})
	c.ledger.clientsLeave, c.ledger.unordered = true, true // links break, and the store does not always answer
	people := names("p", long(30, 200))
	for i, name := range people {
		p := &person{t: c, name: name, r: rand.New(rand.NewPCG(c.seed, uint64(1000+i)))}
		c.people.Go(func() { p.live(long(time.Second, 2*time.Second)) })
	}
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for i := range 12 {
		r := rand.New(rand.NewPCG(c.seed, uint64(100+i)))
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				q := user(pick(r, people))
				q.options = &pubsub.PushOptions{Ack: pubsub.AckPolicy(r.IntN(2)), Offline: pubsub.OfflinePolicy(r.IntN(2)), AckTimeoutMs: uint32(r.IntN(3)) * 1000}
				if r.IntN(5) == 0 {
					q = room(c.anyRoom(r))
					q.options = &pubsub.PushOptions{Ack: pubsub.AckPolicy(r.IntN(2))}
				}
				insistOnce(c.managers, r.IntN(len(c.managers)), q)
				wait(time.Duration(r.Int64N(int64(20 * time.Millisecond))))
			}
		})
	}
	faults := 0
	for r, end := rand.New(rand.NewPCG(c.seed, 7)), c.ledger.now()+long(8*time.Second, 5*time.Minute); c.ledger.now() < end; faults++ {
		if r.IntN(3) == 0 {
			c.ledger.note("the store is killed")
			store.kill()
			wait(time.Duration(r.Int64N(int64(2 * time.Second))))
			store.boot()
			c.ledger.note("the store is there")
		} else {
			c.harm(r)
		}
		wait(time.Second)
	}
	close(stop)
	callers.Wait()
	close(c.stop)
	c.people.Wait()
	for _, name := range people { // everybody comes once more
		c.enter(name, c.gates[0])
	}
	c.settle()
	t.Logf("%d faults", faults)
}

// insistOnce is insist with one more try at most.
func insistOnce(managers []*manager, first int, r request) {
	for i := range 2 {
		m := managers[(first+i)%len(managers)]
		p := m.ask(context.Background(), m, r)
		if p.err == nil && p.summary.GetFailed()+p.summary.GetUnknown() == 0 {
			return
		}
		r.again, r.options = p, p.options
	}
}
