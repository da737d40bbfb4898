package faultbench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lxzan/gws"
	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// newLastingTown is a town whose clients acknowledge, for callers who wait: what is promised here
// is not how fast a machine is.
func newLastingTown(t *testing.T, plan townPlan) *town {
	t.Helper()
	plan.acks = true
	plan.managerEnv = append(lenient(), plan.managerEnv...)
	c := newTownOf(t, plan)
	c.ledger.clientsLeave = false
	t.Cleanup(func() {
		for _, v := range c.everyVisit() {
			v.close()
		}
		c.readers.Wait()
	})
	return c
}

// everyVisit is all connections that there have been.
func (t *town) everyVisit() (all []*visit) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, list := range t.byUser {
		all = append(all, list...)
	}
	return all
}

// enter connects a user and waits until pushes reach it.
func (t *town) enter(user string, g *gate) *visit {
	t.t.Helper()
	var v *visit
	eventually(t.t, user+" connects", func() error {
		if v = t.open(user, g, ""); v == nil {
			return errStill
		}
		return nil
	})
	v.awaitReady()
	return v
}

func (v *visit) awaitReady() {
	v.t.t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-v.told:
	case <-v.ended:
		v.t.t.Fatalf("%s: the gateway has gone", v.id)
	case <-timer.C:
		v.t.t.Fatalf("%s: the gateway does not say that pushes reach the user", v.id)
	}
}

// saw is the client's own view: ids in the order in which they came, and which of them were
// replayed.
func (v *visit) saw() (ids []string, replayed map[string]bool) {
	l := v.t.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	replayed = map[string]bool{}
	for _, a := range l.arrivals {
		if a.client == v.id {
			ids = append(ids, a.push)
			replayed[a.push] = replayed[a.push] || a.replayed
		}
	}
	return ids, replayed
}

// awaits waits until so many messages have come to the connection.
func (v *visit) awaits(n int) {
	v.t.t.Helper()
	eventually(v.t.t, fmt.Sprintf("%s gets %d messages", v.id, n), func() error {
		if ids, _ := v.saw(); len(ids) < n {
			return fmt.Errorf("%d came: %v", len(ids), ids)
		}
		return nil
	})
}

// settle waits until what is owed has come, and holds the ledgers against each other.
func (t *town) settle() {
	t.t.Helper()
	owed := func() []violation { return t.ledger.check(patience) }
	found := owed()
	for end := time.Now().Add(patience); len(found) > 0 && time.Now().Before(end); found = owed() {
		wait(50 * time.Millisecond)
	}
	for i, v := range found {
		if i == 5 {
			t.t.Errorf("and %d more", len(found)-i)
			break
		}
		t.t.Errorf("%s is broken: %s\n%s %s\n%s", v.rule, v.text, v.push, failures(v.push.summary), t.ledger.history(v.push))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, w := range t.wrong {
		t.t.Error(w)
	}
	t.t.Logf("in all: %v", t.ledger.tally(0, t.ledger.now(), nil))
}

// with is a push with options by one who waits.
func (r request) with(o *pubsub.PushOptions) request {
	r = patiently(r)
	r.options = o
	return r
}

// insist pushes a message until an answer says what became of it, each try through the next
// Push-Manager, as a Biz-Server behind a balancer does.
func insist(managers []*manager, first int, r request) *push {
	for i := 0; ; i++ {
		m := managers[(first+i)%len(managers)]
		p := m.ask(context.Background(), m, r)
		if p.err == nil && p.summary.GetFailed()+p.summary.GetUnknown() == 0 || i == 20 {
			return p
		}
		r.again, r.options = p, p.options
	}
}

// want checks what a push was answered.
func want(t testing.TB, p *push, ok func(*pubsub.DeliverySummary) bool, what string) {
	t.Helper()
	if p.err != nil || !ok(p.summary) {
		t.Errorf("%s, not %v %q %s", what, p, p.message, failures(p.summary))
	}
}

func isStored(s *pubsub.DeliverySummary) bool { return s.GetOffline() == 1 && s.GetStored() == 1 }
func isAcked(s *pubsub.DeliverySummary) bool  { return s.GetDelivered() == 1 && s.GetAcked() == 1 }

// loseAcks has the acknowledgements of links get lost one way, until it is told to stop: of one
// link of eighteen or so at a time.
func loseAcks(links []*proxy, r *rand.Rand, stop <-chan struct{}) {
	for {
		p := links[r.IntN(len(links))]
		p.set(replies, toxic{drop: true, some: 6})
		wait(300 * time.Millisecond)
		p.heal()
		select {
		case <-stop:
			return
		default:
			wait(100 * time.Millisecond)
		}
	}
}

// retrying pushes n messages, to users and to rooms, over links whose acknowledgements get lost.
// Whoever gets no clear answer tries again.
func retrying(b *bench, managers []*manager, links []*proxy, n int, draw func(*rand.Rand, int) request) {
	stop := make(chan struct{})
	var harm, callers sync.WaitGroup
	harm.Go(func() { loseAcks(links, rand.New(rand.NewPCG(b.seed, 1)), stop) })
	const count = 16
	for i := range count {
		r := rand.New(rand.NewPCG(b.seed, uint64(100+i)))
		callers.Go(func() {
			for range n / count {
				insist(managers, r.IntN(len(managers)), draw(r, i))
			}
		})
	}
	callers.Wait()
	close(stop)
	harm.Wait()
}

// TestLastingRetryThroughAnotherInstanceArrivesOnce: acknowledgements get lost, and callers try
// again with the same id through another Push-Manager. No connection gets a message twice, the
// last answer counts what the clients have, and some of it as duplicates.
func TestLastingRetryThroughAnotherInstanceArrivesOnce(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 3, gates: 3, managerEnv: prompt(), proxied: true})
	c.ledger.clientsLeave = true
	c.ledger.stays = func(user string) bool { return strings.HasPrefix(user, "stays") }
	users := names("stays", 30)
	for i, name := range users {
		c.enter(name, c.gates[i%3])
	}
	for i := range 10 { // they move between gateways and rooms all the while
		p := &person{t: c, name: fmt.Sprint("moves", i), r: rand.New(rand.NewPCG(c.seed, uint64(1000+i)))}
		c.people.Go(func() { p.live(500 * time.Millisecond) })
	}
	var links []*proxy
	for _, g := range c.gates {
		links = append(links, g.link)
	}
	retrying(c.bench, c.managers, links, long(800, 20_000), func(r *rand.Rand, caller int) request {
		q := user(users[caller%15*2+r.IntN(2)]) // each user has one caller, or two
		if r.IntN(4) == 0 {
			q = room(c.anyRoom(r))
		}
		q.options = &pubsub.PushOptions{}
		return q
	})
	close(c.stop)
	c.people.Wait()
	c.settle()
	if all := c.ledger.tally(0, c.ledger.now(), nil); all.duplicates == 0 || all.unknown == 0 {
		t.Errorf("nothing was tried again that had arrived: %v", all)
	}
}

// TestLastingWithoutRingsRetriesArriveTwice is the counter-proof: nodes that do not remember ids
// take a message again. The checker sees it, and nothing is counted as a duplicate.
func TestLastingWithoutRingsRetriesArriveTwice(t *testing.T) {
	t.Parallel()
	b := &bench{t: t, seed: seedOf(t), ledger: newLedger(), world: newWorld(), etcd: etcdtest.Start(t), unwatch: func() {}}
	b.watch(starved)
	t.Cleanup(func() { b.unwatch() })
	b.client = b.etcd.Client()
	b.controller = newController(t, b.world)
	node := newWireNode(t, b.ledger, "n", wireConfig{})
	link := newProxy(t, node.address)
	b.register("n", link.addr())
	b.connect(node, "u")
	managers := []*manager{b.launch("pm-0", prompt()...), b.launch("pm-1", prompt()...)}
	for _, m := range managers {
		m.reaches(1)
	}
	link.set(replies, toxic{drop: true})
	q := user("u")
	q.options = &pubsub.PushOptions{}
	first := managers[0].push(q)
	if first.summary.GetUnknown() != 1 {
		t.Errorf("the acknowledgement was lost: %v", first)
	}
	link.heal()
	link.cut()
	q.again = first
	last := insist(managers, 1, q)
	if last.summary.GetDelivered() != 1 || last.summary.GetDuplicates() != 0 {
		t.Errorf("the node knows no ids: %v", last)
	}
	if found := b.ledger.check(patience); !slices.ContainsFunc(found, func(v violation) bool { return v.rule == "I3" }) {
		t.Errorf("found %v, and it arrived twice", found)
	}
}

// TestLastingReusedIDReachesNobody: an id that was used for another content is refused by the
// Push-Manager that knows it, and failed at a node that does. Ids have bounds.
func TestLastingReusedIDReachesNobody(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 2, gates: 1})
	v := c.enter("u", c.gates[0])
	ask := func(m *manager, id, content string) (*pubsub.PushToUserResponse, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return m.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "u", Content: &pubsub.MessageContent{Data: []byte(content)}, Options: &pubsub.PushOptions{MessageId: id}})
	}
	longest := strings.Repeat("i", 64)
	for _, m := range c.managers {
		r, err := ask(m, longest, "first")
		if err != nil || r.GetSummary().GetDelivered() != 1 || r.GetSummary().GetMessageId() != longest {
			t.Errorf("%v %v", r, err)
		}
	}
	if _, err := ask(c.managers[0], longest, "second"); (&push{err: err}).code() != codes.AlreadyExists || reasonOf(err) != "MESSAGE_ID_REUSED" {
		t.Errorf("at the same instance: %v", err)
	}
	if r, err := ask(c.managers[0], "other", "second id"); err != nil || r.GetSummary().GetDelivered() != 1 {
		t.Errorf("%v %v", r, err)
	}
	if r, err := ask(c.managers[1], "other", "second content"); err != nil || r.GetSummary().GetFailed() != 1 || r.GetSuccess() {
		t.Errorf("at another instance: %v %v", r, err)
	}
	for _, id := range []string{strings.Repeat("i", 65), "a\x00b", "a\nb", "\x7f"} {
		if _, err := ask(c.managers[0], id, "bad id"); (&push{err: err}).code() != codes.InvalidArgument || !strings.Contains(err.Error(), "options.message_id") {
			t.Errorf("%q: %v", id, err)
		}
	}
	if r, err := ask(c.managers[0], "", "no id"); err != nil || r.GetSummary().GetDelivered() != 1 || r.GetSummary().GetMessageId() != "" {
		t.Errorf("%v %v", r, err)
	}
	v.awaits(3)
	if ids, _ := v.saw(); !slices.Equal(ids, []string{"first", "second", "no"}) { // up to the first space
		t.Errorf("the client got %q", ids)
	}
}

// TestLastingHalfOpenClientIsFoundAndMissesNothing: a client's machine is gone without a word.
// Nothing of that time counts as delivered, the connection is cut, and what is stored comes to
// the next one, in order.
func TestLastingHalfOpenClientIsFoundAndMissesNothing(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 1, gates: 1, managerEnv: storeAt(startStore(t))})
	m, g := c.managers[0], c.gates[0]
	way := newProxy(t, g.http)
	v := c.openAt("u", g, way.addr(), "")
	v.awaitReady()
	for range long(20, 100) {
		want(t, m.push(user("u").with(lasting())), isAcked, "acknowledged")
	}
	way.set(requests, toxic{drop: true})
	way.set(replies, toxic{drop: true})
	hole := time.Now()
	drop := &pubsub.PushOptions{Ack: pubsub.AckPolicy_ACK_CLIENT, AckTimeoutMs: 2000}
	store := lasting()
	store.AckTimeoutMs = 2000
	want(t, m.push(user("u").with(drop)), func(s *pubsub.DeliverySummary) bool { return s.GetUnknown() == 1 }, "unknown")
	t.Logf("the first push into the hole was answered after %v", time.Since(hole).Round(time.Millisecond))
	eventually(t, "the half-open connection is cut", func() error {
		select {
		case <-v.ended:
			return nil
		default:
			return errStill
		}
	})
	cut := time.Since(hole)
	t.Logf("cut after %v: half of the timeout of 2 s, and 2 s", cut.Round(time.Millisecond))
	if cut > 20*time.Second && c.ledger.calm(0, c.ledger.now()) {
		t.Errorf("cut after %v: the idle timeout is no way to find it", cut)
	}
	// Once more, with the store, and pushes one after the other.
	v = c.openAt("w", g, func() string { way = newProxy(t, g.http); return way.addr() }(), "")
	v.awaitReady()
	way.set(requests, toxic{drop: true})
	way.set(replies, toxic{drop: true})
	for range 5 {
		want(t, m.push(user("w").with(store)), isStored, "stored")
	}
	if all := c.ledger.tally(0, c.ledger.now(), func(p *push) bool { return p.key == "w" }); all.unsure == 0 {
		t.Errorf("a frame was in the hole, and nobody is unsure: %v", all)
	}
	again := c.enter("w", g)
	again.awaits(5)
	c.settle()
}

// TestLastingReplayComesBeforeWhatIsNew: messages are stored, and the user connects while one
// caller goes on pushing through all Push-Managers. Nothing is missing, twice or out of order, and
// a queue of 64 frames does for it.
func TestLastingReplayComesBeforeWhatIsNew(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 3, gates: 2, managerEnv: storeAt(startStore(t)), gatewayEnv: []string{"QUEUE_FRAMES=64"}})
	for range long(120, 500) {
		want(t, c.managers[0].push(user("u").with(lasting())), isStored, "stored")
	}
	stop := make(chan struct{})
	var caller sync.WaitGroup
	caller.Go(func() {
		pace := time.NewTicker(5 * time.Millisecond)
		defer pace.Stop()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-pace.C:
				c.managers[i%3].push(user("u").with(lasting()))
			}
		}
	})
	wait(200 * time.Millisecond)
	v := c.enter("u", c.gates[0])
	v.awaits(long(200, 900)) // one after the other: each takes the 50 ms in which a gateway gathers acknowledgements
	v.close()
	wait(200 * time.Millisecond)
	again := c.enter("u", c.gates[1]) // elsewhere, with what was stored meanwhile
	again.awaits(long(50, 500))
	close(stop)
	caller.Wait()
	c.settle()
	_, replayed := v.saw()
	if n := 0; len(replayed) > 0 {
		for _, was := range replayed {
			if was {
				n++
			}
		}
		t.Logf("%d replayed, of %d", n, len(replayed))
	}
	select {
	case <-again.ended:
		t.Error("the client was cut off")
	default:
	}
}

// TestLastingSlowStoreHoldsNobodyBack: the store answers after five seconds. A live push to a user
// who has just connected comes before that, and what is stored comes, too.
func TestLastingSlowStoreHoldsNobodyBack(t *testing.T) {
	t.Parallel()
	store := startStore(t)
	way := newProxy(t, store.address())
	c := newLastingTown(t, townPlan{managers: 1, gates: 1, managerEnv: []string{"STORE=nats://" + way.addr(), "STORE_REPLICAS=1"}})
	c.ledger.unordered = true // that is what is given up
	m := c.managers[0]
	kept := m.push(user("u").with(lasting()))
	want(t, kept, isStored, "stored")
	way.set(replies, toxic{delay: 5 * time.Second})
	v := c.enter("u", c.gates[0])
	live := m.push(user("u").with(&pubsub.PushOptions{Ack: pubsub.AckPolicy_ACK_CLIENT, AckTimeoutMs: 20_000}))
	want(t, live, isAcked, "acknowledged")
	t.Logf("a live push took %v", live.took().Round(time.Millisecond))
	v.awaits(1)
	if ids, _ := v.saw(); ids[0] != live.id {
		t.Errorf("the client got %v: the store's answer was waited for", ids)
	}
	way.heal()
	v.awaits(2)
	c.settle()
}

// TestLastingStoreKilledAmidWritesKeepsWhatWasStored: the store's process is killed again and
// again while messages are stored. What was answered as stored comes, nothing is answered so
// while there is no store, and pushes to users who are online go on.
func TestLastingStoreKilledAmidWritesKeepsWhatWasStored(t *testing.T) {
	t.Parallel()
	store := startStore(t)
	c := newLastingTown(t, townPlan{managers: 2, gates: 2, managerEnv: storeAt(store)})
	away, here := names("away", 200), names("here", 20)
	for i, name := range here {
		c.enter(name, c.gates[i%2])
	}
	stop := make(chan struct{})
	var callers sync.WaitGroup
	keepPushing := func(i int, users []string, o *pubsub.PushOptions, pause time.Duration) {
		m, r := c.managers[i%2], rand.New(rand.NewPCG(c.seed, uint64(i)))
		callers.Go(func() {
			for n := i; ; n += 8 {
				select {
				case <-stop:
					return
				default:
					q := user(users[n%len(users)])
					q.deadline, q.options = 10*time.Second, o
					m.ask(context.Background(), m, q)
					wait(time.Duration(r.Int64N(int64(pause))))
				}
			}
		})
	}
	for i := range 8 {
		keepPushing(i, away, &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE}, long(10*time.Millisecond, time.Millisecond))
	}
	for i := range 2 {
		keepPushing(i, here, &pubsub.PushOptions{Ack: pubsub.AckPolicy_ACK_CLIENT}, 10*time.Millisecond)
	}
	lastStored := func(since time.Duration) (n int) {
		return c.ledger.tally(since, c.ledger.now(), nil).stored
	}
	wait(long(500*time.Millisecond, 5*time.Second))
	var down []span
	for range long(2, 10) {
		store.kill()
		begin := c.ledger.now()
		wait(long(700*time.Millisecond, 3*time.Second))
		down = append(down, span{begin, c.ledger.now()})
		store.boot()
		back := c.ledger.now()
		t.Logf("messages are stored again %v after the store is back", eventually(t, "messages are stored again", func() error {
			if lastStored(back) == 0 {
				return errStill
			}
			return nil
		}).Round(time.Millisecond))
		wait(long(300*time.Millisecond, 3*time.Second))
	}
	close(stop)
	callers.Wait()
	for _, d := range down {
		if lost := c.ledger.tally(d.from, d.to, func(p *push) bool { return p.end < d.to }); lost.stored > 0 {
			t.Errorf("%d are said to be stored while there is no store: %v", lost.stored, lost)
		}
	}
	online := func(p *push) bool { return strings.HasPrefix(p.key, "here") }
	if all := c.ledger.tally(0, c.ledger.now(), online); all.success != all.pushes && c.ledger.calm(0, c.ledger.now()) {
		t.Errorf("pushes to those who are online suffered: %v", all)
	}
	during := func(p *push) bool {
		return online(p) && slices.ContainsFunc(down, func(d span) bool { return p.start > d.from && p.start < d.to })
	}
	t.Logf("online: p99 %v, while the store was down %v", c.ledger.p99(online), c.ledger.p99(during))
	for i, name := range away {
		c.enter(name, c.gates[i%2])
	}
	c.settle()
}

// p99 is that of the pushes that pick picks.
func (l *ledger) p99(pick func(*push) bool) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var took []time.Duration
	for _, p := range l.pushes {
		if p.done && pick(p) {
			took = append(took, p.took())
		}
	}
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return took[len(took)*99/100].Round(time.Microsecond)
}

// TestLastingNodeKilledBeforeTheClientAcknowledges: frames are with the clients, who have not
// acknowledged them, when the gateway is killed. The answer says stored and unsure without waiting
// for time-outs, and the next connection gets each once.
func TestLastingNodeKilledBeforeTheClientAcknowledges(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 2, gates: 2, managerEnv: storeAt(startStore(t))})
	const users, each = 5, 3
	o := lasting()
	o.AckTimeoutMs = 25_000
	var slowest time.Duration
	for round := range long(2, 200) {
		dies, other := c.gates[round%2], c.gates[(round+1)%2]
		mine := names(fmt.Sprint("r", round, "-"), users)
		var answers sync.WaitGroup
		var mu sync.Mutex
		var answered []*push
		for i, name := range mine {
			v := c.enter(name, dies)
			v.hushed.Store(true)
			for n := range each {
				m := c.managers[(i+n)%2]
				answers.Go(func() {
					p := m.push(user(name).with(o))
					mu.Lock()
					answered = append(answered, p)
					mu.Unlock()
				})
			}
		}
		begun := c.ledger.now()
		eventually(t, "all frames are with the clients", func() error {
			if n := c.ledger.arrived(0, func(a arrival) bool { return slices.Contains(mine, a.user) }); n < users*each {
				return fmt.Errorf("%d of %d", n, users*each)
			}
			return nil
		})
		killed := time.Now()
		c.ledger.note("%s is killed", dies.id)
		dies.kill()
		answers.Wait()
		took := time.Since(killed)
		slowest = max(slowest, took)
		if took > 10*time.Second && c.ledger.calm(begun, c.ledger.now()) {
			t.Errorf("answered %v after the node was killed: that is a time-out", took)
		}
		for _, p := range answered {
			want(t, p, func(s *pubsub.DeliverySummary) bool { return isStored(s) && s.GetUnsure() == 1 }, "stored and unsure")
		}
		for _, name := range mine {
			c.enter(name, other).awaits(each)
		}
		c.bootGate(dies)
		for _, m := range c.managers {
			m.reaches(2)
		}
	}
	t.Logf("the slowest answer came %v after the kill", slowest.Round(time.Millisecond))
	c.settle()
}

// TestLastingConnectingMomentLosesNothing: users connect at the moment at which they are pushed
// to, and one of the store's three servers is behind. What was stored comes without another
// connection.
func TestLastingConnectingMomentLosesNothing(t *testing.T) {
	slow(t)
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 3, gates: 3, managerEnv: storeAt(startStores(t, 200*time.Millisecond)...)})
	eventually(t, "the store takes messages", func() error {
		q := user("first").with(lasting())
		if p := c.managers[0].push(q); p.summary.GetStored() != 1 {
			return fmt.Errorf("%v %s", p, failures(p.summary))
		}
		return nil
	})
	c.ledger.absent = func(user string) bool { return user == "first" }
	var keepers sync.WaitGroup
	defer keepers.Wait()
	over := make(chan struct{})
	defer close(over)
	const at = 20 // a machine cannot connect everybody in one moment
	for round := range long(8, 10_000/at) {
		var all sync.WaitGroup
		for i := range at {
			name := fmt.Sprintf("m%d-%d", round, i)
			r := rand.New(rand.NewPCG(c.seed, uint64(round*at+i)))
			before, later := time.Duration(r.Int64N(int64(100*time.Millisecond))), 50*time.Millisecond
			here := make(chan struct{})
			all.Go(func() { <-here })
			keepers.Go(func() { // a gateway cuts off who does not answer, as nobody does while a machine stands still
				wait(before)
				for come := 0; ; {
					v := c.open(name, c.gates[i%3], "")
					if v == nil {
						wait(10 * time.Millisecond)
						continue
					}
					if come++; come == 1 {
						close(here)
					}
					select {
					case <-v.ended:
					case <-over:
						return
					}
				}
			})
			all.Go(func() {
				wait(later)
				c.managers[r.IntN(3)].push(user(name).with(lasting()))
			})
		}
		all.Wait()
	}
	c.settle()
	all := c.ledger.tally(0, c.ledger.now(), nil)
	if all.stored < 2 || all.delivered == 0 {
		t.Errorf("nobody connected just then: %v", all)
	}
}

// TestLastingExpiryAndQuota: what has expired is not shown, and what is beyond a user's share or
// the store's room is not called stored, and pushes nothing old out.
func TestLastingExpiryAndQuota(t *testing.T) {
	t.Parallel()
	const most = 20
	c := newLastingTown(t, townPlan{managers: 1, gates: 1, managerEnv: append(storeAt(startStore(t)), fmt.Sprint("STORE_MAX_PER_USER=", most))})
	m := c.managers[0]
	c.ledger.late = slackForCI
	brief := lasting()
	brief.TtlMs = 1000
	for range 3 {
		want(t, m.push(user("brief").with(brief)), isStored, "stored")
	}
	expired := c.ledger.now() + 1500*time.Millisecond
	for range most {
		want(t, m.push(user("full").with(lasting())), isStored, "stored")
	}
	for range 2 {
		p := m.push(user("full").with(lasting()))
		want(t, p, func(s *pubsub.DeliverySummary) bool {
			return s.GetOffline() == 1 && s.GetStored() == 0 && strings.Contains(failures(s), "store")
		}, "offline, and why it is not stored")
		if p.success {
			t.Errorf("not stored is no success: %v", p)
		}
	}
	full := c.enter("full", c.gates[0])
	full.awaits(most)
	wait(expired - c.ledger.now())
	v := c.enter("brief", c.gates[0])
	last := m.push(user("brief").with(lasting()))
	want(t, last, isAcked, "acknowledged")
	v.awaits(1)
	if ids, _ := v.saw(); !slices.Equal(ids, []string{last.id}) {
		t.Errorf("what had expired was shown: %v", ids)
	}
	eventually(t, "there is room again", func() error { // the trim follows the client's word
		v.t.mu.Lock()
		gone := full.closed > 0
		v.t.mu.Unlock()
		if !gone {
			full.close()
		}
		if p := m.push(user("full").with(lasting())); p.summary.GetStored() != 1 {
			return fmt.Errorf("%v %s", p, failures(p.summary))
		}
		return nil
	})
	c.enter("full", c.gates[0])
	c.settle()
}

// TestLastingFullStoreKeepsWhatIsOld: a store that is full refuses what is new.
func TestLastingFullStoreKeepsWhatIsOld(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 1, gates: 1, managerEnv: append(storeAt(startStore(t)), "STORE_MAX_BYTES=4MiB", "STORE_PARTITIONS=1")})
	m := c.managers[0]
	refused := 0
	users := names("u", 20)
	for i := 0; i < 200 && refused < 5; i++ {
		q := user(users[i%len(users)]).with(lasting())
		q.size = 64 << 10
		p := m.push(q)
		if p.summary.GetStored() == 0 {
			refused++
			want(t, p, func(s *pubsub.DeliverySummary) bool {
				return s.GetOffline() == 1 && strings.Contains(failures(s), "full")
			}, "the store is full")
		}
	}
	if refused < 5 {
		t.Errorf("only %d were refused", refused)
	}
	for _, name := range users {
		c.enter(name, c.gates[0])
	}
	c.settle()
}

// TestLastingForgetLeavesNothing: what is stored for a user who is forgotten is not replayed.
func TestLastingForgetLeavesNothing(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 2, gates: 1, managerEnv: storeAt(startStore(t))})
	for i := range 10 {
		want(t, c.managers[i%2].push(user("u").with(lasting())), isStored, "stored")
		want(t, c.managers[i%2].push(user("other").with(lasting())), isStored, "stored")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := c.managers[1].ForgetUser(ctx, &pubsub.ForgetUserRequest{UserId: "u"})
	if err != nil || r.GetMessages() != 10 {
		t.Errorf("%v %v", r, err)
	}
	v, other := c.enter("u", c.gates[0]), c.enter("other", c.gates[0])
	last := c.managers[0].push(user("u").with(lasting()))
	want(t, last, isAcked, "acknowledged")
	other.awaits(10)
	if ids, _ := v.saw(); !slices.Equal(ids, []string{last.id}) {
		t.Errorf("forgotten, and shown: %v", ids)
	}
	c.ledger.absent = func(user string) bool { return user == "u" }
	c.settle()
}

// TestLastingBroadcastsAreNotStored: nothing is promised that nobody keeps.
func TestLastingBroadcastsAreNotStored(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 2, gates: 1})
	for _, q := range []request{user("u"), room("r"), everybody()} { // without a store, of any kind
		if p := c.managers[0].push(q.with(lasting())); p.code() != codes.InvalidArgument || !strings.Contains(p.err.Error(), "options.offline") {
			t.Errorf("%v", p)
		}
	}
	stored := c.launch("pm-store", append(lenient(storeAt(startStore(t))...), "CONTROLLER_ADDRESS="+c.bench.controller.address)...)
	stored.reaches(1)
	if p := stored.push(everybody().with(lasting())); p.code() != codes.InvalidArgument || !strings.Contains(p.err.Error(), "options.offline") {
		t.Errorf("%v", p)
	}
}

// rawFrames keeps what a gateway sends, byte for byte.
type rawFrames struct {
	gws.BuiltinEventHandler

	mu  sync.Mutex
	got []string
}

// OnMessage implements gws.Event.
func (f *rawFrames) OnMessage(_ *gws.Conn, m *gws.Message) {
	defer func() { _ = m.Close() }()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.got = append(f.got, m.Data.String())
}
