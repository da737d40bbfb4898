package faultbench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/internal/redistest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// upgradeEnv is the path of push-manager of the release before; without it these tests are skipped. upgradeRateEnv is how many
// pushes are made in a second. See make upgrade.
const (
	upgradeEnv     = "UPGRADE_FROM"
	upgradeRateEnv = "UPGRADE_RATE"
)

// role is what a process is.
type role uint8

const (
	roleController role = iota
	roleNode
	roleManager
)

func (r role) String() string { return [...]string{"Controllers", "Connect-Nodes", "Push-Managers"}[r] }

// rollout is a deployment with users and callers, whose processes are replaced one at a time.
type rollout struct {
	*town
	before, after string // paths of both releases
	load          *mixedLoad
	hasty         float64 // see town.hasty
	away          []awayUser
	rows          []rolloutRow
}

// rolloutRow is what callers were told while one kind of process was replaced.
type rolloutRow struct {
	what     string
	from, to time.Duration
	counts   outcomes
}

// awayUser is one for whom messages are stored.
type awayUser struct {
	name  string
	count int
}

// TestUpgradeAndBack replaces everything by the new release and then by the old one again, in the order that docs/operations.md has.
func TestUpgradeAndBack(t *testing.T) {
	r := newRollout(t)
	for _, what := range []role{roleController, roleNode, roleManager} {
		r.replace(what, true)
	}
	for _, what := range []role{roleManager, roleNode, roleController} {
		r.replace(what, false)
	}
	r.judge()
}

// TestReleasesWorkTogetherInAnyMix replaces one kind of process after the other so that there is every mix that the order of an
// upgrade does not have.
func TestReleasesWorkTogetherInAnyMix(t *testing.T) {
	r := newRollout(t)
	for _, step := range []struct {
		what role
		up   bool
	}{
		{roleManager, true}, {roleController, true}, {roleNode, true}, // new Push-Managers first
		{roleController, false}, {roleManager, false}, {roleNode, false}, // new Connect-Nodes last
	} {
		r.replace(step.what, step.up)
	}
	r.judge()
}

func newRollout(t *testing.T) *rollout {
	t.Helper()
	before := os.Getenv(upgradeEnv)
	if before == "" {
		t.Skipf("set %s to push-manager of the release before, or run make upgrade", upgradeEnv)
	}
	if _, err := exec.LookPath("haproxy"); err != nil {
		t.Skip("there is no haproxy (Debian: package haproxy)")
	}
	rate := 5000
	if text := os.Getenv(upgradeRateEnv); text != "" {
		var err error
		if rate, err = strconv.Atoi(text); err != nil || rate < 100 {
			t.Fatalf("%s=%q, want a number from 100", upgradeRateEnv, text)
		}
	}
	plan := townPlan{
		managers: 3, gates: 3, controllers: 2, program: before, acks: true, resumes: true,
		managerEnv: lenient(storeAt(startStores(t, 0)...)...),
	}
	if settings, err := exec.CommandContext(t.Context(), before, "controller", "--print-config").Output(); err != nil {
		t.Fatalf("%s: %v", before, err)
	} else if strings.Contains(string(settings), "controller_store:") {
		redis := redistest.Start(t)
		plan.controllerEnv = []string{"CONTROLLER_STORE=redis", "REDIS_URL=redis://127.0.0.1:" + redis.Port}
	} else {
		t.Log("the release before knows no Redis: one Controller, in memory")
		plan.controllers = 1
	}
	r := &rollout{town: newTownOf(t, plan), before: before, after: pushManager(t)}
	t.Cleanup(func() {
		for _, v := range r.everyVisit() {
			v.close()
		}
		r.readers.Wait()
	})
	front := r.balance(r.managers)
	front.PushManagerServiceClient = front.dial()
	r.rooms = names("log", 5)
	for i, user := range names("m", 20) { // with a room whose messages are kept
		rnd := rand.New(rand.NewPCG(r.seed, uint64(3000+i)))
		r.people.Go(func() { r.roam(user, []string{r.rooms[i%len(r.rooms)]}, rnd, 10*time.Second) })
	}
	r.users = names("u", 200)
	for i, user := range r.users {
		rnd := rand.New(rand.NewPCG(r.seed, uint64(1000+i)))
		r.people.Go(func() { r.dwell(user, rnd) })
	}
	eventually(t, "all users are there", func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, user := range r.users {
			if !slices.ContainsFunc(r.byUser[user], func(v *visit) bool { return v.ready > 0 }) {
				return errors.New(user + " is not")
			}
		}
		return nil
	})
	eventually(t, "the store takes messages through the balancer", func() error {
		p := front.ask(context.Background(), front, user("first").with(lasting()))
		if p.summary.GetStored() != 1 {
			return fmt.Errorf("%v %s", p, failures(p.summary))
		}
		return nil
	})
	r.away = append(r.away, awayUser{"first", 1})
	logs := &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE}
	if p := front.ask(context.Background(), front, room(r.rooms[0]).with(logs)); p.code() == codes.InvalidArgument {
		t.Log("the release before knows no logs of rooms: they are not used") // as long as not everything is replaced
		logs = nil
	}
	r.load = r.mixed(front, rate, logs)
	wait(2 * time.Second)
	r.row("all of the release before")
	r.store("at the beginning")
	return r
}

// row ends the counting of one step.
func (r *rollout) row(what string) {
	row := rolloutRow{what: what, to: r.ledger.now(), counts: r.load.take()}
	if n := len(r.rows); n > 0 {
		row.from = r.rows[n-1].to
	} else {
		row.from = r.load.begun
	}
	r.rows = append(r.rows, row)
}

// store has every Push-Manager store a message for a user who is away.
func (r *rollout) store(when string) {
	r.t.Helper()
	a := awayUser{name: fmt.Sprint("away-", len(r.rows)), count: len(r.managers)}
	for _, m := range r.managers {
		want(r.t, m.push(user(a.name).with(lasting())), isStored, "stored "+when)
	}
	r.away = append(r.away, a)
}

// collect has all who are away come: whatever release has stored it, they get it, by whatever release now runs.
func (r *rollout) collect() {
	r.t.Helper()
	for i, a := range r.away {
		v := r.enter(a.name, r.gates[i%len(r.gates)])
		v.awaits(a.count)
		v.close()
	}
	r.away = nil
}

// replace stops each process of a kind and starts the other release in its place. The next one has its turn when this one is ready
// and in use.
func (r *rollout) replace(what role, up bool) {
	r.t.Helper()
	r.program = r.before
	name := fmt.Sprintf("%v go back", what)
	if up {
		r.program, name = r.after, fmt.Sprintf("%v go up", what)
	}
	r.ledger.note("%s", name)
	switch what {
	case roleController:
		for _, c := range r.controllers {
			c.signal(syscall.SIGTERM)
			<-c.done
			r.bootController(c)
			ready(r.t, c.id, c.metrics)
			wait(pauseBetween)
		}
	case roleNode:
		for _, g := range r.gates {
			r.hasty += r.town.hasty(g)
			r.close(g)
			g.signal(syscall.SIGTERM)
			<-g.done
			r.bootGate(g)
			r.mark(g, false)
			r.allReach()
			wait(pauseBetween)
		}
	case roleManager:
		for _, m := range r.managers {
			r.restartManager(m)
			r.allReach()
			wait(pauseBetween)
		}
	}
	r.row(name)
	r.collect()
	r.store("after " + name)
}

func (r *rollout) allReach() {
	for _, m := range r.managers {
		m.reaches(len(r.gates))
	}
}

// judge ends callers and people, and holds what was told against what came.
func (r *rollout) judge() {
	r.t.Helper()
	close(r.stop)
	r.callers.Wait()
	r.row("the last answers")
	r.collect()
	r.people.Wait()
	for _, g := range r.gates {
		r.hasty += r.town.hasty(g)
	}
	r.ledger.unordered = r.hasty > 0
	members := map[string][]string{}
	for i, user := range names("m", 20) {
		members[user] = []string{r.rooms[i%len(r.rooms)]}
		r.come(user, members[user], r.gates[i%len(r.gates)])
	}
	eventually(r.t, "members have what stands in the logs of their rooms", func() error {
		for user, ids := range r.missed(members) {
			return fmt.Errorf("%s has missed %d: %v", user, len(ids), ids[:min(len(ids), 5)])
		}
		return nil
	})
	for _, user := range r.users { // what is stored for them
		r.enter(user, r.gates[0])
	}
	r.settle()
	r.ledger.mu.Lock()
	pushes, arrivals := slices.Clone(r.ledger.pushes), slices.Clone(r.ledger.arrivals)
	r.ledger.mu.Unlock()
	r.owed(pushes, arrivals)
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, w := range r.wrong {
		if i == 10 {
			r.t.Errorf("and %d more", len(r.wrong)-i)
			break
		}
		r.t.Error(w)
	}
	r.report(len(arrivals))
}

// report tells a person what happened, and fails where a call failed.
func (r *rollout) report(arrived int) {
	r.t.Helper()
	var text strings.Builder
	table := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintln(table, "step\ttook\tpushes\ta second\tdelivered\tstored\toffline\ttried twice\tfailed\tunknown\t")
	var all outcomes
	line := func(what string, took time.Duration, c outcomes) {
		_, _ = fmt.Fprintf(table, "%s\t%v\t%d\t%.0f\t%d\t%d\t%d\t%d\t%d\t%d\t\n", what, took.Round(100*time.Millisecond), c.pushes,
			float64(c.pushes)/max(took.Seconds(), 0.001), c.delivered, c.stored, c.offline, c.again, c.failed, c.unknown)
	}
	for _, row := range r.rows {
		line(row.what, row.to-row.from, row.counts)
		all.add(row.counts)
	}
	line("all", r.rows[len(r.rows)-1].to-r.rows[0].from, all)
	_ = table.Flush()
	r.t.Logf("%d Controllers, %d Connect-Nodes and %d Push-Managers behind HAProxy, one replaced at a time\n%s", len(r.controllers), len(r.gates), len(r.managers), text.String())
	for _, why := range slices.Sorted(maps.Keys(all.why)) {
		r.t.Logf("tried twice: %d because %s", all.why[why], why)
	}
	r.t.Logf("offline: the user had no connection at that moment, its Connect-Node being replaced. %d messages arrived at clients, none twice unless an error above says so; %v times a gateway did not wait for the store",
		arrived, r.hasty)
	if all.failed+all.unknown > 0 {
		r.t.Errorf("%d pushes failed, %d are unknown, although they were tried twice", all.failed, all.unknown)
	}
	if all.pushes < 1000 {
		r.t.Errorf("%d pushes prove nothing", all.pushes)
	}
}

// outcomes are what callers of one target each were told in the end. Of a room, a push that succeeded counts as delivered.
type outcomes struct {
	pushes, delivered, stored, offline, failed, unknown, again int

	why map[string]int // pushes that were tried twice, by what was said the first time
}

func (o *outcomes) add(p outcomes) {
	o.pushes += p.pushes
	o.delivered += p.delivered
	o.stored += p.stored
	o.offline += p.offline
	o.failed += p.failed
	o.unknown += p.unknown
	o.again += p.again
	if o.why == nil {
		o.why = map[string]int{}
	}
	for why, n := range p.why {
		o.why[why] += n
	}
}

// mixedLoad is callers who push in all ways, each as a Biz-Server should: it asks once more where it is told that nothing was sent or
// that the push has failed, which means that it was not delivered, and where the message has an id. Only then.
type mixedLoad struct {
	r     *rollout
	begun time.Duration
	told  atomic.Int64 // pushes whose history was printed

	mu     sync.Mutex
	counts outcomes
}

// Of the pushes in a second, in percent. The rest goes through PushStreams.
const (
	shareUnary   = 20 // one by one
	shareLasting = 8  // with everything that options have, to users
	shareLogs    = 2  // to rooms, whose messages are kept where both releases can
	streamBatch  = 50 // pushes of one PushStream
)

func (r *rollout) mixed(front *manager, rate int, logs *pubsub.PushOptions) *mixedLoad {
	l := &mixedLoad{r: r, begun: r.ledger.now()}
	callers := 0
	begin := func(count, perSecond int, do func(rnd *rand.Rand, front *manager, n int)) {
		for i := range count {
			callers++
			rnd := rand.New(rand.NewPCG(r.seed, uint64(100+callers)))
			own := &manager{b: r.bench, id: fmt.Sprint(front.id, " ", callers), api: front.api}
			own.PushManagerServiceClient = own.dial() // so that the balancer has many connections
			r.callers.Go(func() {
				tick := time.NewTicker(time.Second * time.Duration(count) / time.Duration(perSecond))
				defer tick.Stop()
				for n := i; ; n += count {
					select {
					case <-r.stop:
						return
					case <-tick.C:
						do(rnd, own, n)
					}
				}
			})
		}
	}
	begin(12, rate*shareUnary/100, func(rnd *rand.Rand, front *manager, _ int) {
		l.push(front, patiently(user(pick(rnd, r.users))))
	})
	begin(12, rate*shareLasting/100, func(_ *rand.Rand, front *manager, n int) {
		l.push(front, user(r.users[n%len(r.users)]).with(lasting())) // each user has one caller, so there is an order
	})
	begin(4, rate*shareLogs/100, func(rnd *rand.Rand, front *manager, _ int) {
		l.push(front, room(pick(rnd, r.rooms)).with(logs))
	})
	begin(8, rate*(100-shareUnary-shareLasting-shareLogs)/100/streamBatch, func(rnd *rand.Rand, front *manager, _ int) {
		requests := make([]request, streamBatch)
		for i := range requests {
			requests[i] = patiently(user(pick(rnd, r.users)))
		}
		l.stream(front, requests)
	})
	return l
}

// retryPause is how long a caller waits until it tries once more what was not delivered.
const retryPause = 500 * time.Millisecond

// twice tells why a push is tried once more, "" if it is not.
func twice(p *push) string {
	s := p.summary
	switch {
	case p.err != nil && p.safe() && p.code() == codes.Unavailable:
		return fmt.Sprintf("nothing was sent: %v %s", p.code(), reasonOf(p.err))
	case p.err != nil && !p.safe() && p.options != nil:
		return fmt.Sprintf("the call broke, and the message has an id: %v", p.code())
	case s.GetUnknown() > 0 && p.options != nil:
		return "it is unknown, and the message has an id"
	case p.options != nil && s.GetOffline() > s.GetStored() && s.GetPosition() == "" && strings.Contains(failures(s), "store: "):
		return "the store did not answer in time, and the message has an id"
	case s.GetFailed() == s.GetTargets() && s.GetFailed() > 0 && len(s.GetNodeFailures()) > 0:
		return "it was not delivered: " + s.GetNodeFailures()[0].GetReason()
	}
	return ""
}

func (l *mixedLoad) push(front *manager, q request) {
	p := front.ask(context.Background(), front, q)
	var c outcomes
	if why := twice(p); why != "" {
		c.again, c.why = 1, map[string]int{why: 1}
		if p.err == nil {
			wait(retryPause)
		}
		if p.options != nil {
			q.again, q.options = p, p.options
		}
		p = front.ask(context.Background(), front, q)
	}
	l.count(p, &c)
	l.done(c)
}

// stream pushes a batch on one PushStream, and what was not sent on another one.
func (l *mixedLoad) stream(front *manager, requests []request) {
	var c outcomes
	var late []request
	for i, p := range front.stream(requests) {
		if why := twice(p); why != "" {
			c.add(outcomes{again: 1, why: map[string]int{why + ", on a PushStream": 1}})
			late = append(late, requests[i])
			continue
		}
		l.count(p, &c)
	}
	if len(late) > 0 {
		wait(retryPause)
		for _, p := range front.stream(late) {
			l.count(p, &c)
		}
	}
	l.done(c)
}

// count adds what became of a push in the end.
func (l *mixedLoad) count(p *push, c *outcomes) {
	c.pushes++
	s := p.summary
	stored := p.kind == toRoom && s.GetPosition() != ""
	switch {
	case p.err != nil && p.safe() || s.GetFailed() > 0 && !stored:
		c.failed++
	case p.err != nil || s.GetUnknown() > 0 && !stored:
		c.unknown++
	case s.GetStored() > 0:
		c.stored++
		return
	case s.GetOffline() > 0 && !stored:
		c.offline++
		if p.options == nil {
			return
		}
	default:
		c.delivered++
		return
	}
	if l.told.Add(1) <= 5 {
		l.r.t.Errorf("%v %s\n%s", p, failures(s), l.r.ledger.history(p))
	}
}

func (l *mixedLoad) done(c outcomes) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts.add(c)
}

// take returns what was counted since it was taken last.
func (l *mixedLoad) take() outcomes {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.counts
	l.counts = outcomes{}
	return c
}
