package faultbench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
)

// honestyEnv is how long people come and go; without it the run is skipped.
const honestyEnv = "HONESTY_DURATION"

// What the town does, in a second.
const (
	townActs   = 200  // people who connect, move, leave, or change rooms
	townPushes = 2000 // half of them in PushStreams
)

const (
	townPeople = 300
	townRooms  = 30

	// townHold is how long after its answer a push is judged: longer than any node is
	// stopped, and whatever is still to arrive has arrived. townLap is as in soak.
	townHold = 8 * time.Second
	townLap  = 2 * time.Second
)

// TestHonesty runs the programs as they ship, and real WebSocket clients that come, move and
// go, while gateways are killed, stopped and drained and the Controller is restarted. What
// callers are told is held against what clients got:
//
//   - who stayed connected for 200 ms, and until after the answer, misses nothing that says
//     delivered, and is never said to be offline
//   - nothing arrives that was said to be failed or offline
//   - nothing arrives twice at one connection, or in another order than promised
//   - a room's push reaches connections that are in the room, and no others
func TestHonesty(t *testing.T) {
	text := os.Getenv(honestyEnv)
	if text == "" {
		t.Skipf("long: set %s=5m, or run make honesty", honestyEnv)
	}
	duration, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("%s: %v", honestyEnv, err)
	}
	town := newTown(t)
	begun := town.ledger.now()
	town.populate()
	pushed := town.push()
	var all tally
	all.errors = town.ledger.tally(0, 0, nil).errors
	judge := func(until time.Duration) {
		done := town.ledger.takeOut(until, until-townLap)
		for _, v := range done.check(slackForCI) {
			town.broken("%s: %s\n    %v", v.rule, v.text, v.push)
		}
		var old []*push
		for _, p := range done.pushes {
			if p.end < until-townLap {
				old = append(old, p)
				all.add(p)
			}
		}
		town.owed(old, done.arrivals)
		town.forget(until - 2*townLap - defaultDeadline - slackForCI)
	}
	faults := 0
	for end, r := begun+duration, rand.New(rand.NewPCG(town.seed, 7)); town.ledger.now() < end; faults++ {
		if elapsed := town.ledger.now() - begun; faults > 0 && elapsed > duration/2 && town.controllers[0].lives == 1 {
			town.restartController()
		} else {
			town.harm(r)
		}
		for range 2 {
			wait(2 * time.Second)
			judge(town.ledger.now() - townHold)
		}
	}
	took := town.ledger.now() - begun
	close(town.stop)
	town.callers.Wait()
	town.people.Wait()
	town.readers.Wait()
	judge(town.ledger.now() + time.Hour)

	t.Logf("%v with %d faults: %.0f acts/s, %.0f pushes/s, %d refusals to clients, %d times when the machine let nobody run", took.Round(time.Second), faults,
		float64(town.acts.Load())/took.Seconds(), float64(pushed.Load())/took.Seconds(), town.refused.Load(), len(town.ledger.frozen))
	t.Log(all)
	t.Logf("%d promises broken", len(town.wrong))
	for i, w := range town.wrong {
		if i == 20 {
			break
		}
		t.Error(w)
	}
	if len(town.wrong) > 0 {
		for _, n := range town.ledger.notes {
			t.Logf("%12v  %s", n.at.Round(time.Millisecond), n.text)
		}
	}
	if all.delivered < int(took.Seconds())*100 {
		t.Errorf("%d deliveries prove nothing", all.delivered)
	}
}

// gate is a gateway over several lives of its process.
type gate struct {
	*process

	id      string
	http    string // where clients connect
	grpc    string // where Push-Managers do, without a proxy
	metrics string
	env     []string
	link    *proxy // between Push-Managers and it, nil where there is none

	leaving bool // it takes nobody now; guarded by town.mu
}

// controllerLives is a Controller over several lives of its process.
type controllerLives struct {
	*process

	id      string
	metrics string
	env     []string
	lives   int
}

// townPlan is what a town has.
type townPlan struct {
	managers, gates        int
	controllers            int      // 0: one
	controllerEnv          []string // more of their settings; without any they keep all in memory
	program                string   // path of the push-manager that all begin with, "" for ours
	managerEnv, gatewayEnv []string // more of their settings
	acks                   bool     // clients acknowledge what asks for it
	resumes                bool     // clients keep their positions in the logs of rooms
	highest                bool     // the position is that of the last message they saw, and not what they were told: a mistake
	proxied                bool     // Push-Managers reach the gateways through a proxy each
}

func newTown(t *testing.T) *town {
	t.Helper()
	return newTownOf(t, townPlan{managers: 2, gates: 3, managerEnv: prompt("LOOKUP_TIMEOUT=300ms")})
}

func newTownOf(t *testing.T, plan townPlan) *town {
	t.Helper()
	b := &bench{t: t, seed: seedOf(t), ledger: newLedger(), world: newWorld(), etcd: etcdtest.Start(t), program: plan.program, unwatch: func() {}}
	b.ledger.clientsLeave = true
	b.watch(starved)
	t.Cleanup(func() { b.unwatch() })
	b.client = b.etcd.Client()
	c := &town{bench: b, plan: plan, stop: make(chan struct{}), rooms: names("r", townRooms), users: names("u", townPeople), byUser: map[string][]*visit{}}
	var addresses []string
	for i := range max(plan.controllers, 1) {
		p := freeport.Take(t, 2)
		addresses = append(addresses, "127.0.0.1:"+p[0])
		one := &controllerLives{id: fmt.Sprint("controller-", i), metrics: "http://127.0.0.1:" + p[1]}
		one.env = append([]string{"GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1], "ETCD_ENDPOINTS=" + b.etcd.Endpoint()}, plan.controllerEnv...)
		c.controllers = append(c.controllers, one)
		c.bootController(one)
	}
	address := strings.Join(addresses, ",")
	b.controller = &controller{address: address} // for those who ask where it is; ours are processes
	for i := range plan.gates {
		p := freeport.Take(t, 3)
		g := &gate{id: fmt.Sprint("g", i), http: "127.0.0.1:" + p[1], grpc: "127.0.0.1:" + p[0], metrics: "http://127.0.0.1:" + p[2]}
		g.env = append([]string{"NODE_ID=" + g.id, "GRPC_PORT=" + p[0], "HTTP_PORT=" + p[1], "METRICS_PORT=" + p[2],
			"CONTROLLER_ADDRESS=" + addresses[i%len(addresses)], "ETCD_ENDPOINTS=" + b.etcd.Endpoint()}, plan.gatewayEnv...) // a node takes one
		if plan.proxied {
			g.link = newProxy(t, "127.0.0.1:"+p[0])
			g.env = append(g.env, "ADVERTISE_ADDRESS="+g.link.addr())
		}
		c.bootGate(g)
		c.gates = append(c.gates, g)
	}
	for i := range plan.managers {
		m := c.launch(fmt.Sprint("pm-", i), append([]string{"CONTROLLER_ADDRESS=" + address}, plan.managerEnv...)...)
		m.reaches(len(c.gates))
		c.managers = append(c.managers, m)
	}
	return c
}

func (t *town) bootController(c *controllerLives) {
	c.process = run(t.t, c.id, exec.Command(t.binary(), "controller"), c.env)
	c.lives++
}

func (t *town) bootGate(g *gate) {
	t.t.Helper()
	g.process = run(t.t, g.id, exec.Command(t.binary(), "connect-node"), g.env)
	ready(t.t, g.id, g.metrics)
}

// populate starts the people.
func (t *town) populate() {
	for i, name := range t.users {
		p := &person{t: t, name: name, r: rand.New(rand.NewPCG(t.seed, uint64(1000+i)))}
		t.people.Go(func() { p.live(time.Second * townPeople / townActs) })
	}
	wait(2 * time.Second)
}

// push starts the callers: half of the pushes one by one, half in PushStreams.
func (t *town) push() *atomic.Int64 {
	var count atomic.Int64
	const callers, batch = 16, 25
	draw := func(r *rand.Rand) request {
		if r.IntN(4) == 0 {
			return room(t.anyRoom(r))
		}
		return user(pick(r, t.users))
	}
	every := func(pause time.Duration, do func()) {
		ticker := time.NewTicker(pause)
		defer ticker.Stop()
		for {
			select {
			case <-t.stop:
				return
			case <-ticker.C:
				do()
			}
		}
	}
	for i := range callers {
		m := t.managers[i%len(t.managers)]
		r := rand.New(rand.NewPCG(t.seed, uint64(100+i)))
		t.callers.Go(func() {
			every(time.Second*callers/(townPushes/2), func() {
				m.ask(context.Background(), m, draw(r))
				count.Add(1)
			})
		})
	}
	for i, m := range t.managers {
		r := rand.New(rand.NewPCG(t.seed, uint64(200+i)))
		t.callers.Go(func() {
			every(time.Second*batch*2/(townPushes/2), func() {
				requests := make([]request, batch)
				for i := range requests {
					requests[i] = draw(r)
				}
				count.Add(int64(len(m.stream(requests))))
			})
		})
	}
	return &count
}

// harm does something to a gateway and waits until it is there again.
func (t *town) harm(r *rand.Rand) {
	g := t.gates[r.IntN(len(t.gates))]
	pause := time.Duration(500+r.IntN(3000)) * time.Millisecond
	switch r.IntN(3) {
	case 0:
		t.ledger.note("%s is killed", g.id)
		t.close(g)
		g.kill()
		wait(pause)
		t.bootGate(g)
	case 1:
		t.ledger.note("%s is stopped for %v", g.id, pause)
		g.stop()
		wait(pause)
		g.cont()
	default:
		t.ledger.note("%s is drained", g.id)
		t.close(g)
		g.signal(syscall.SIGTERM)
		<-g.done
		t.bootGate(g)
	}
	t.mu.Lock()
	g.leaving = false
	t.mu.Unlock()
	t.ledger.note("%s is there", g.id)
}

// close notes that a gateway goes: nothing is owed to its connections from here on.
func (t *town) close(g *gate) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g.leaving = true
	now := t.ledger.now()
	for _, visits := range t.byUser {
		for _, v := range visits {
			if v.gate == g && v.closed == 0 {
				v.closed = now
			}
		}
	}
}

// restartController kills the Controller, whose memory is all it has, and starts another.
func (t *town) restartController() {
	t.ledger.note("the controller is killed")
	t.controllers[0].kill()
	wait(500 * time.Millisecond)
	t.bootController(t.controllers[0])
	t.ledger.note("another controller")
}
