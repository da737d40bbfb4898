package faultbench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/freeport"
)

// chaosEnv is how long the faults last; without it the run is skipped.
const chaosEnv = "CHAOS_DURATION"

// foreignEnv is a command that makes the first node one in another language: it gets what a child gets, and says what one says.
const foreignEnv = "FOREIGN_NODE"

// TestChaos runs three Push-Managers, five nodes and two Controllers under faults that
// overlap at random, heals everything and holds the ledgers against each other. SEED
// makes the same faults again.
func TestChaos(t *testing.T) {
	text := os.Getenv(chaosEnv)
	if text == "" {
		t.Skipf("random faults: set %s=30s, or run make chaos", chaosEnv)
	}
	duration, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("%s: %v", chaosEnv, err)
	}
	c := newCity(t)
	plan := c.plan(duration)
	for _, f := range plan {
		t.Logf("%8v  %s for %v", f.at.Round(time.Millisecond), f.name(c), f.lasts.Round(time.Millisecond))
	}
	begun := c.ledger.now()
	c.traffic()
	c.more(500)
	calm := c.ledger.now()
	if all := c.ledger.tally(0, calm, nil); all.success != all.pushes && !c.starvedSince(begun) {
		t.Errorf("before the first fault: %v", all)
	}
	c.hurried.Store(true)
	c.execute(plan)
	c.settle(plan, calm)
}

// patientDeadline is what callers grant before the first fault, when every push has to
// succeed: how fast the machine is is not the question.
const patientDeadline = 3 * time.Second

const (
	cityManagers = 3
	cityNodes    = 5
	cityUsers    = 100
	cityRooms    = 10
)

// city is the deployment that chaos breaks.
type city struct {
	*bench
	managers    []*manager
	nodes       []*citizen
	controllers []*controller
	loads       []*load
	streams     sync.WaitGroup
	stop        chan struct{}
	hurried     atomic.Bool // callers ask for deadlines that a loaded machine may miss

	// locks are held by the fault that has a part in its hands.
	locks map[string]*sync.Mutex
}

// citizen is a real node behind a proxy, over several lives of its process.
type citizen struct {
	id    string
	child *child // guarded by the node's lock
	proxy *proxy

	foreign []string // what is run in place of transport/node; nil: nothing is
}

func newCity(t *testing.T) *city {
	t.Helper()
	c := &city{bench: newBench(t), stop: make(chan struct{}), locks: map[string]*sync.Mutex{}}
	c.controllers = []*controller{c.controller, newController(t, c.world)}
	users := names("u", cityUsers)
	for i := range cityNodes {
		n := &citizen{id: fmt.Sprint("n", i)}
		mine := users[i*len(users)/cityNodes : (i+1)*len(users)/cityNodes]
		if i == 0 {
			n.foreign = strings.Fields(os.Getenv(foreignEnv))
		}
		n.child = newChild(t, c.ledger, n.id, freeport.Addr(t), "", n.foreign...)
		n.child.connect(mine...)
		c.world.place(n.id, mine...)
		n.proxy = newProxy(t, n.child.address)
		c.register(n.id, n.proxy.addr())
		c.nodes = append(c.nodes, n)
	}
	r := rand.New(rand.NewPCG(c.seed, 1))
	for _, id := range names("r", cityRooms) {
		for _, i := range r.Perm(cityUsers)[:15] {
			c.world.join(id, users[i])
		}
	}
	for i := range cityManagers {
		m := c.launch(fmt.Sprint("pm-", i), prompt("LOOKUP_TIMEOUT=300ms", "ETCD_REQUEST_TIMEOUT=1s",
			"CONTROLLER_ADDRESS="+c.controllers[0].address+","+c.controllers[1].address)...)
		m.reaches(cityNodes)
		m.good(user("u0"))
		m.rest()
		c.managers = append(c.managers, m)
	}
	for _, f := range c.faults() {
		for i := range f.targets {
			c.locks[f.part+fmt.Sprint(i)] = &sync.Mutex{}
		}
	}
	t.Cleanup(c.end)
	return c
}

// traffic begins to push through all Push-Managers, at a pace that leaves the machine
// some air.
func (c *city) traffic() {
	for _, m := range c.managers {
		c.loads = append(c.loads, m.callers(6, func(r *rand.Rand) request {
			wait(time.Duration(1+r.IntN(8)) * time.Millisecond)
			q := c.any(r)
			q.deadline = time.Duration(200+r.IntN(3800)) * time.Millisecond
			if !c.hurried.Load() {
				q.deadline = max(q.deadline, patientDeadline)
			}
			return q
		}))
		c.streams.Go(func() {
			r := rand.New(rand.NewPCG(c.seed, 100))
			for {
				select {
				case <-c.stop:
					return
				default:
				}
				requests := make([]request, 50)
				for i := range requests {
					requests[i] = c.any(r)
				}
				m.stream(requests)
				wait(50 * time.Millisecond)
			}
		})
	}
}

// any is a push of any kind.
func (c *city) any(r *rand.Rand) request {
	switch n := r.IntN(20); {
	case n == 0:
		return everybody()
	case n < 3:
		q := request{kind: toUsers, key: "some", deadline: 4 * time.Second}
		for range 5 {
			q.users = append(q.users, fmt.Sprint("u", r.IntN(cityUsers)))
		}
		return q
	case n < 9:
		return room(fmt.Sprint("r", r.IntN(cityRooms)))
	default:
		return user(fmt.Sprint("u", r.IntN(cityUsers)))
	}
}

func (c *city) more(n int64) {
	for _, l := range c.loads {
		l.more(n / int64(len(c.loads)))
	}
}

func (c *city) end() {
	select {
	case <-c.stop:
	default:
		close(c.stop)
	}
	for _, l := range c.loads {
		l.end()
	}
	c.streams.Wait()
}

// fault is one kind of harm.
type fault struct {
	name    string
	part    string // what it is done to
	targets int
	do      func(target int, r *rand.Rand, last func())
}

// faults lists what can happen. Corrupted bytes are not among them: without TLS a
// payload that arrives as another one is nobody's lie.
func (c *city) faults() []fault {
	link := func(name string, harm func(p *proxy, r *rand.Rand), lossy bool) fault {
		return fault{name, "link ", cityNodes, func(i int, r *rand.Rand, last func()) {
			p := c.nodes[i].proxy
			harm(p, r)
			last()
			p.heal()
			if lossy { // a connection that has lost bytes is good for nothing
				p.cut()
			}
		}}
	}
	with := func(x toxic) func(*proxy, *rand.Rand) {
		return func(p *proxy, r *rand.Rand) {
			if d := direction(r.IntN(3)); d != 2 {
				p.set(d, x)
				return
			}
			p.set(requests, x)
			p.set(replies, x)
		}
	}
	return []fault{
		{"kill", "node ", cityNodes, func(i int, _ *rand.Rand, last func()) { c.nodes[i].child.kill(); last(); c.restart(i) }},
		{"stop", "node ", cityNodes, func(i int, _ *rand.Rand, last func()) { c.nodes[i].child.stop(); last(); c.nodes[i].child.cont() }},
		{"leave in order", "node ", cityNodes, func(i int, _ *rand.Rand, last func()) {
			c.nodes[i].child.signal(sigterm)
			last()
			<-c.nodes[i].child.read
			c.restart(i)
		}},
		link("reset", func(p *proxy, _ *rand.Rand) { p.reset() }, false),
		link("cut and refuse", func(p *proxy, _ *rand.Rand) { p.refuse(true); p.reset() }, false),
		link("delay", with(toxic{delay: 100 * time.Millisecond, jitter: 50 * time.Millisecond}), false),
		link("lose", with(toxic{drop: true}), true),
		link("hold", with(toxic{hold: true}), false),
		link("narrow", with(toxic{rate: 16 << 10}), false),
		link("slice", with(toxic{slice: 1}), false),
		c.controllerFault("stop", nil),
		c.controllerFault("mute", func(x *controller) { x.mute = true }),
		c.controllerFault("slow", func(x *controller) { x.delay = 200 * time.Millisecond }),
		c.controllerFault("fail", func(x *controller) { x.errors = 0.5 }),
		c.controllerFault("stale", func(x *controller) { x.stale = c.world.freeze() }),
		{"restart", "etcd ", 1, func(_ int, _ *rand.Rand, last func()) { c.etcd.Stop(); last(); c.etcd.Restart() }},
		{"key gone", "key ", cityNodes, func(i int, _ *rand.Rand, last func()) { c.tryRemove(nodeKeys + c.nodes[i].id); last(); c.announce(i) }},
		{"key garbage", "key ", cityNodes, func(i int, _ *rand.Rand, last func()) { c.tryPut(nodeKeys+c.nodes[i].id, "{"); last(); c.announce(i) }},
		{"kill", "manager ", cityManagers, func(i int, _ *rand.Rand, last func()) { c.managers[i].kill(); last(); c.managers[i].boot() }},
		{"stop", "manager ", cityManagers, func(i int, _ *rand.Rand, last func()) { c.managers[i].stop(); last(); c.managers[i].cont() }},
		{"drain", "manager ", cityManagers, func(i int, _ *rand.Rand, last func()) {
			c.managers[i].signal(sigterm)
			<-c.managers[i].done
			last()
			c.managers[i].boot()
		}},
		{"move users", "users ", 1, func(_ int, r *rand.Rand, _ func()) { c.move(r) }},
		{"move users", "users ", 1, func(_ int, r *rand.Rand, _ func()) { c.move(r) }},
	}
}

func (c *city) controllerFault(name string, harm func(*controller)) fault {
	return fault{name, "controller ", len(c.controllers), func(i int, _ *rand.Rand, last func()) {
		x := c.controllers[i]
		if harm == nil {
			x.stop()
			last()
			x.start()
			return
		}
		x.change(harm)
		last()
		x.change(func(x *controller) { x.mute, x.delay, x.errors, x.stale = false, 0, 0, nil })
	}}
}

// restart starts a new process of a node where the old one was, with the users that it
// has according to the Controllers.
func (c *city) restart(i int) {
	n := c.nodes[i]
	n.child = newChild(c.t, c.ledger, n.id, n.child.address, "", n.foreign...)
	n.child.connect(c.world.at(n.id)...)
}

// move takes some users from one node to another, if no other fault has either.
func (c *city) move(r *rand.Rand) {
	order := r.Perm(cityNodes)[:2]
	from, to := c.nodes[order[0]], c.nodes[order[1]]
	for _, i := range order {
		lock := c.locks[fmt.Sprint("node ", i)]
		if !lock.TryLock() {
			return
		}
		defer lock.Unlock()
	}
	for range 5 {
		id := fmt.Sprint("u", r.IntN(cityUsers))
		c.world.mu.Lock()
		here := c.world.users[id] == from.id
		c.world.mu.Unlock()
		if here {
			from.child.leave(id)
			to.child.connect(id)
			c.world.place(to.id, id)
		}
	}
}

// announce, tryPut and tryRemove write to etcd, which may be away.
func (c *city) announce(i int) {
	c.tryPut(nodeKeys+c.nodes[i].id, value(c.t, c.nodes[i].id, c.nodes[i].proxy.addr()))
}

func (c *city) tryPut(key, value string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, _ = c.client.Put(ctx, key, value)
}

func (c *city) tryRemove(key string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, _ = c.client.Delete(ctx, key)
}

// event is a fault that is to happen.
type event struct {
	at, lasts    time.Duration
	kind, target int
	seed         uint64
}

func (e event) name(c *city) string {
	f := c.faults()[e.kind]
	return fmt.Sprintf("%s%d: %s", f.part, e.target, f.name)
}

// plan draws the faults of a run: about two a second, of up to two seconds.
func (c *city) plan(duration time.Duration) []event {
	r := rand.New(rand.NewPCG(c.seed, 2))
	faults := c.faults()
	var events []event
	for at := time.Duration(0); ; {
		at += time.Duration(100+r.IntN(800)) * time.Millisecond
		kind := r.IntN(len(faults))
		e := event{at: at, lasts: time.Duration(50+r.IntN(1950)) * time.Millisecond, kind: kind, target: r.IntN(faults[kind].targets), seed: r.Uint64()}
		if at+e.lasts > duration {
			return events
		}
		events = append(events, e)
	}
}

// execute makes the faults happen and returns when the last one is over.
func (c *city) execute(plan []event) {
	begun := time.Now()
	faults := c.faults()
	var running sync.WaitGroup
	for _, e := range plan {
		wait(time.Until(begun.Add(e.at)))
		running.Go(func() {
			f := faults[e.kind]
			lock := c.locks[fmt.Sprint(f.part, e.target)]
			lock.Lock() // a part is in one fault's hands at a time
			defer lock.Unlock()
			c.ledger.note("%s begins", e.name(c))
			f.do(e.target, rand.New(rand.NewPCG(e.seed, 0)), func() { wait(e.lasts) })
			c.ledger.note("%s is over", e.name(c))
		})
	}
	running.Wait()
}

// settle checks that everything is well again, and what was promised meanwhile.
func (c *city) settle(plan []event, calm time.Duration) {
	c.t.Helper()
	healed := c.ledger.now()
	for i := range c.nodes {
		c.announce(i)
	}
	for _, m := range c.managers {
		m.ready()
		took := m.reaches(cityNodes)
		c.t.Logf("%s is connected to all nodes %v after the last fault", m.id, took.Round(time.Millisecond))
	}
	for _, m := range c.managers {
		m.good(room("r1"))
	}
	wait(5 * redial) // the connections of the other callers
	again := c.ledger.now()
	c.more(500)
	c.end()
	for _, n := range c.nodes {
		n.child.flush()
	}
	if all := c.ledger.tally(again, c.ledger.now(), nil); all.success*1000 < all.pushes*999 && !c.starvedSince(again-afterwards) {
		c.t.Errorf("after everything has healed: %v", all)
	}
	for _, m := range c.managers {
		m.atRest()
		for _, part := range []string{`panics_total{part="engine"}`, `panics_total{part="ingress"}`, "link_panics_total"} {
			if n := m.metric(part); n != 0 {
				c.t.Errorf("%s: %s is %v", m.id, part, n)
			}
		}
	}
	if c.starvedSince(0) {
		c.t.Log("the machine was so busy that it let nobody run for a while: the timings say little")
	}
	during := c.ledger.tally(calm, healed, nil)
	c.t.Logf("%d faults: %v", len(plan), during)
	c.t.Logf("unknown: %.2f %% of targets", 100*float64(during.unknown)/float64(max(during.targets, 1)))
	if during.unknown*50 > during.targets {
		c.t.Errorf("more than 2 %% of targets are unknown")
	}
	// A fault lasts as long on a machine that lets nobody run, but few pushes are made
	// beside those that it hits: neither counts.
	judged := func(p *push) bool { return !c.ledger.nearFreezeLocked(p, besideFreeze) }
	pushes := c.ledger.tally(calm, healed, judged).pushes
	unsure := c.ledger.tally(calm, healed, func(p *push) bool { return judged(p) && p.summary.GetUnknown() > 0 }).pushes
	c.t.Logf("unknown in part or whole: %d of %d pushes, %.2f %%; %d are left out: the machine did not let us run",
		unsure, pushes, 100*float64(unsure)/float64(max(pushes, 1)), during.pushes-pushes)
	if unsure*50 > pushes {
		c.t.Errorf("more than 2 %% of pushes are unknown in part or whole")
	}
	c.strayUnknowns()
}

// starvedSince tells whether the machine let nobody run, after a moment.
func (c *city) starvedSince(since time.Duration) bool { return !c.ledger.calm(since, c.ledger.now()) }

// afterwards is how long a fault may have consequences: the silence timeout, and an
// ack that is awaited beyond it.
const afterwards = 6 * time.Second

// besideFreeze is how long before and after a time in which nobody could run pushes may be
// late for that: twice the ack timeout.
const besideFreeze = 2 * time.Second

// strayUnknowns finds pushes that are unknown although nothing was wrong.
func (c *city) strayUnknowns() {
	c.t.Helper()
	c.ledger.mu.Lock()
	var spans [][2]time.Duration
	open := map[string]time.Duration{}
	for _, n := range c.ledger.notes {
		if name, ok := strings.CutSuffix(n.text, " begins"); ok {
			open[name] = n.at
		}
		if name, ok := strings.CutSuffix(n.text, " is over"); ok {
			spans = append(spans, [2]time.Duration{open[name], n.at + afterwards})
		}
	}
	pushes := slices.Clone(c.ledger.pushes)
	c.ledger.mu.Unlock()
	strays := 0
	for _, p := range pushes {
		if p.summary.GetUnknown() == 0 || slices.ContainsFunc(spans, func(s [2]time.Duration) bool { return p.start <= s[1] && p.end >= s[0] }) {
			continue
		}
		if strays++; strays <= 3 {
			c.t.Errorf("unknown while nothing was wrong: %v\n%s", p, c.ledger.history(p))
		}
	}
	c.t.Logf("%d pushes were unknown while nothing was wrong", strays)
}
