package engine

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/push-manager/push-manager/engine/route"
)

// place sets where a room's member is, nowhere for none.
func (w *world) place(room, user string, nodes ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.rooms[room] == nil {
		w.rooms[room] = map[string][]string{}
	}
	if w.users[user] = nodes; len(nodes) == 0 {
		delete(w.rooms[room], user)
	} else {
		w.rooms[room][user] = nodes
	}
}

// begin starts p in an Order.
func begin(t *testing.T, e *Engine, o *Order, p *Push, c Completer) *Push {
	t.Helper()
	p.Order = o
	if err := e.Start(p, c); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return p
}

// gotBy lists whom a node was sent something for, delivery by delivery.
func (n *testNode) gotBy() (users [][]string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, d := range slices.Concat(n.got, n.kept) {
		users = append(users, d.all())
	}
	return users
}

// pushes lists whose deliveries a node was sent and has taken.
func (n *testNode) pushes() (list []*Push) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, d := range n.got {
		list = append(list, d.push)
	}
	return list
}

func wantGot(t *testing.T, what string, n *testNode, want ...[]string) {
	t.Helper()
	if got := n.gotBy(); !slices.EqualFunc(got, want, slices.Equal[[]string]) {
		t.Errorf("%s: node %s got %v, want %v", what, n.id, got, want)
	}
}

// settle has a node answer all that it has kept.
func (n *testNode) settle(answer func(*Delivery)) {
	n.mu.Lock()
	kept := n.kept
	n.kept, n.keep = nil, false
	n.mu.Unlock()
	for _, d := range kept {
		if d.TrySend() {
			answer(d)
		}
	}
	synctest.Wait()
}

func TestSlowNodeHoldsBackNobodyElseOfARoomThatChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.place("r", "u1", "A")
		w.place("r", "u2", "B")
		w.nodes["B"].keep = true // it owes every ack
		var o order
		var stream Order
		begin(t, e, &stream, toRoom("r"), &o)
		time.Sleep(1100 * time.Millisecond)
		w.place("r", "u3", "A") // joins
		begin(t, e, &stream, toRoom("r"), &o)
		time.Sleep(1100 * time.Millisecond)
		w.place("r", "u1") // leaves
		begin(t, e, &stream, toRoom("r"), &o)
		time.Sleep(1100 * time.Millisecond)
		w.place("r", "u4", "B") // joins at the slow node
		begin(t, e, &stream, toRoom("r"), &o)
		wantGot(t, "while B owes its acks", w.nodes["A"], []string{"u1"}, []string{"u1", "u3"}, []string{"u3"}, []string{"u3"})
		wantGot(t, "while B owes its acks", w.nodes["B"], []string{"u2"}, []string{"u2"}, []string{"u2"}, []string{"u2", "u4"})
		if n := e.Stats().Fences; n != 0 {
			t.Errorf("%d deliveries were held back though nobody has moved", n)
		}
		w.nodes["B"].settle(func(d *Delivery) { _, _ = d.Ack(Ack{Delivered: d.Targets()}) })
	})
}

// TestUserWhoMovedWaitsAndNobodyElse moves u2 from the slow node B to A.
func TestUserWhoMovedWaitsAndNobodyElse(t *testing.T) {
	for name, answer := range map[string]func(*Delivery){
		"the old node had the user": func(d *Delivery) { _, _ = d.Ack(Ack{Delivered: d.Targets()}) },
		"it does not":               notHere("u2"),
		"its stream broke":          func(d *Delivery) { d.Lose(LostStream) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				e := w.engine(t)
				w.place("r", "u1", "A")
				w.place("r", "u2", "B")
				w.place("r", "u3", "C")
				w.nodes["B"].keep = true
				var o order
				var stream Order
				begin(t, e, &stream, toRoom("r"), &o)
				time.Sleep(1100 * time.Millisecond)
				w.place("r", "u2", "A")
				later := []*Push{
					begin(t, e, &stream, toRoom("r"), &o),
					begin(t, e, &stream, toRoom("r", "u1"), &o),
				}
				wantGot(t, "while B owes its ack", w.nodes["A"], []string{"u1"}, []string{"u1"})
				wantGot(t, "while B owes its ack", w.nodes["C"], []string{"u3"}, []string{"u3"}, []string{"u3"})
				if s := e.Stats(); s.Fenced != 2 || s.Fences != 2 {
					t.Errorf("%d deliveries wait, %d did, want 2 and 2", s.Fenced, s.Fences)
				}
				w.nodes["B"].settle(answer)
				healed := [][]string{{"u1"}, {"u1"}, {"u2"}, {"u2"}}
				if name == "it does not" {
					healed = append(healed, []string{"u2"})
				}
				wantGot(t, "afterwards", w.nodes["A"], healed...)
				for i, p := range later {
					if r, err := p.Result(); err != nil || !r.Success() {
						t.Errorf("push %d: %+v, %v", i+2, r, err)
					}
				}
				if s := e.Stats(); s.Fenced != 0 || s.InFlight != 0 || len(stream.fences) != 0 {
					t.Errorf("left behind: %d wait, %d in flight, %d fences", s.Fenced, s.InFlight, len(stream.fences))
				}
				begin(t, e, &stream, toRoom("r"), &o)
				wantGot(t, "when all is over", w.nodes["A"], append(healed, []string{"u1", "u2"})...)
			})
		})
	}
}

// TestAckWaitsForNothingThatItBringsAbout: what an ack sets free, and what it has sent again, is
// sent by somebody else than the reader of the node's acks.
func TestAckWaitsForNothingThatItBringsAbout(t *testing.T) {
	for name, answer := range map[string]func(*Delivery){
		"a fence falls": func(d *Delivery) { _, _ = d.Ack(Ack{Delivered: d.Targets()}) },
		"a heal":        notHere("u2"),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				e := w.engine(t)
				w.place("r", "u2", "B")
				w.place("s", "u4", "B")
				w.nodes["B"].keep = true
				var o order
				var stream Order
				first := begin(t, e, &stream, toRoom("r"), &o)
				other := begin(t, e, &stream, toRoom("s"), &o)
				time.Sleep(1100 * time.Millisecond)
				w.place("r", "u2", "A")
				moved := begin(t, e, &stream, toRoom("r"), &o)
				on := make(chan struct{})
				w.nodes["A"].answer = func(d *Delivery) {
					<-on
					_, _ = d.Ack(Ack{Delivered: d.Targets()})
				}
				kept := w.nodes["B"].kept
				if len(kept) != 2 || kept[0].push != first || kept[1].push != other {
					t.Fatalf("B has %d deliveries", len(kept))
				}
				for i, answer := range []func(*Delivery){answer, func(d *Delivery) { _, _ = d.Ack(Ack{Delivered: 1}) }} {
					kept[i].TrySend()
					answer(kept[i])
				}
				synctest.Wait()
				if got := w.nodes["A"].pushes(); len(got) != 1 {
					t.Errorf("A was sent %d deliveries, want the first one, which it holds up", len(got))
				}
				if r, err := other.Result(); err != nil || !r.Success() {
					t.Errorf("a push whose ack came meanwhile: %+v, %v", r, err)
				}
				if n := e.Stats().Backlog; name == "a fence falls" && n != 1 { // a heal goes on in its look-up
					t.Errorf("a backlog of %d while its task is held up", n)
				}
				close(on)
				synctest.Wait()
				if n := e.Stats().Backlog; n != 0 {
					t.Errorf("a backlog of %d when all is done", n)
				}
				if r, err := moved.Result(); err != nil || !r.Success() || o.done != 3 {
					t.Errorf("the push that waited: %+v, %v; %d of 3 have ended", r, err, o.done)
				}
			})
		})
	}
}

// TestFenceHoldsThoughItsAnswerIsGivenAgain: an answer serves as a stale one for a while,
// and whoever was sent by that does not wait for the end.
func TestFenceHoldsThoughItsAnswerIsGivenAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.place("r", "u", "A")
		w.nodes["A"].keep = true
		var o order
		var stream Order
		first := begin(t, e, &stream, toRoom("r"), &o)
		time.Sleep(1100 * time.Millisecond)
		w.place("r", "u", "B")
		second := begin(t, e, &stream, toRoom("r"), &o)
		time.Sleep(1100 * time.Millisecond)
		w.down = errors.New("too slow")
		short := toRoom("r")
		short.Timeout = 300 * time.Millisecond
		begin(t, e, &stream, short, &o)
		time.Sleep(1100 * time.Millisecond)
		w.down = nil
		last := []*Push{begin(t, e, &stream, toRoom("r"), &o), begin(t, e, &stream, toRoom("r"), &o)}
		wantGot(t, "while A owes its ack", w.nodes["B"])
		if n := len(stream.fences[e.shards.Hash("r")<<1|1]); n > 3 {
			t.Errorf("%d fences, one for each change of the answer is enough", n)
		}
		w.nodes["A"].settle(notHere("u"))
		got := w.nodes["B"].pushes()
		if !slices.Equal(got, append([]*Push{first, second}, last...)) || o.done != 5 {
			t.Errorf("%d came, in another order than they were started; %d pushes have ended", len(got), o.done)
		}
	})
}

// halt is a Budget that stops a push before it sends.
type halt struct{ armed, on chan struct{} }

func (h *halt) Charge(int) {
	select {
	case <-h.armed:
		<-h.on
	default:
	}
}

// TestFenceFallsWhenAllIsSentAgain has the answers for two users come apart, and the sending by
// the first of them take longer than all that the second one needs.
func TestFenceFallsWhenAllIsSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		u, v := "u0", "v0" // of one home: their delivery is one
		for i := 0; e.shards.For(u) != e.shards.For(v); i++ {
			v = fmt.Sprint("v", i)
		}
		w.place("r", u, "B")
		w.place("r", v, "B")
		w.nodes["B"].keep = true
		var o order
		var stream Order
		first := toUsers(u, v)
		stop := &halt{armed: make(chan struct{}, 1), on: make(chan struct{})}
		first.Budget = stop
		begin(t, e, &stream, first, &o)
		time.Sleep(1100 * time.Millisecond)
		w.gate = make(chan struct{})
		w.place("r", u, "A")
		w.place("r", v, "A")
		other := begin(t, e, nil, toUser(v), &o) // has v looked up
		second := begin(t, e, &stream, toUser(v), &o)
		w.nodes["B"].settle(func(d *Delivery) { _, _ = d.Ack(Ack{NotHere: []string{u, v}}) })
		stop.armed <- struct{}{}
		w.gate <- struct{}{} // the one for v is answered
		synctest.Wait()
		w.gate <- struct{}{}
		synctest.Wait()
		wantGot(t, "while the first push for "+v+" is not sent again", w.nodes["A"], []string{v}, []string{u})
		close(stop.on)
		synctest.Wait()
		got := w.nodes["A"].pushes()
		if !slices.Equal(got, []*Push{other, first, first, second}) || o.done != 3 {
			t.Errorf("the pushes came in another order, and %d of 3 have ended", o.done)
		}
	})
}

// TestHealsKeepTheOrderOfPushes has a node answer the later push first.
func TestHealsKeepTheOrderOfPushes(t *testing.T) {
	room, user, users := func() *Push { return toRoom("r") }, func() *Push { return toUser("u") }, func() *Push { return toUsers("u", "w") }
	for name, start := range map[string][2]func() *Push{
		"to a room": {room, room}, "to a user": {user, user}, "to several, to one": {users, user}, "to one, to several": {user, users},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				e := w.engine(t)
				w.place("r", "u", "B")
				w.nodes["B"].keep = true
				var o order
				var stream Order
				pushes := []*Push{begin(t, e, &stream, start[0](), &o), begin(t, e, &stream, start[1](), &o)}
				late := start[1]()
				late.Timeout = 100 * time.Millisecond
				begin(t, e, &stream, late, &o)
				w.place("r", "u", "A")
				kept := w.nodes["B"].kept
				for _, d := range slices.Backward(kept[1:]) {
					d.TrySend()
					notHere("u")(d)
				}
				synctest.Wait()
				wantGot(t, "before the first one is answered", w.nodes["A"])
				time.Sleep(200 * time.Millisecond)
				synctest.Wait()
				if r, err := late.Result(); o.ended() != 1 || err != nil || r.Failed != 1 {
					t.Errorf("a push that ended while it waited: %+v, %v", r, err)
				}
				kept[0].TrySend()
				notHere("u")(kept[0])
				synctest.Wait()
				got := w.nodes["A"].pushes()
				if !slices.Equal(got, pushes) || o.done != 3 {
					t.Errorf("%d came, in another order than they were started; %d of 3 have ended", len(got), o.done)
				}
			})
		})
	}
}

// TestHealEndsHoweverSoonItsAnswerCame has the answer come while the look-up is still being
// asked for, again and again: one time in some hundred thousand both meet.
func TestHealEndsHoweverSoonItsAnswerCame(t *testing.T) {
	e := newWorld().engine(t)
	for range many(300_000) {
		p := &Push{}
		p.engine, p.done = e, &order{}
		p.pending.Store(2)
		h := &healer{d: &Delivery{push: p}}
		h.d.state.Store(denied)
		var asked sync.WaitGroup
		asked.Go(h.asked)
		h.d.endHeal(Sent)
		asked.Wait()
		if h.d.state.Load() != settled {
			t.Fatal("the delivery is never settled")
		}
	}
}

func TestStreamsDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		w.place("r", "u", "B")
		w.nodes["B"].keep = true
		var o order
		var one, other Order
		begin(t, e, &one, toRoom("r"), &o)
		begin(t, e, &one, toUser("u"), &o)
		time.Sleep(1100 * time.Millisecond)
		w.place("r", "u", "A")
		begin(t, e, &other, toRoom("r"), &o)
		begin(t, e, &other, toUser("u"), &o)
		wantGot(t, "pushes of the other stream", w.nodes["A"], []string{"u"}, []string{"u"})
		begin(t, e, &one, toRoom("r"), &o)
		begin(t, e, &one, toUser("u"), &o)
		wantGot(t, "pushes of the same stream", w.nodes["A"], []string{"u"}, []string{"u"})
		w.nodes["B"].settle(notHere("u"))
		wantGot(t, "afterwards", w.nodes["A"], []string{"u"}, []string{"u"}, []string{"u"}, []string{"u"}, []string{"u"}, []string{"u"})
	})
}

// TestPushesToSeveralUsersNeverWaitForEachOther has all users move while pushes to them
// all are under way, in one stream and in two.
func TestPushesToSeveralUsersNeverWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		users := []string{"a", "b", "c", "d"}
		var streams [2]Order
		var o order
		var pushes []*Push
		for i := range 40 {
			for k, u := range users {
				w.place("r", u, nodeIDs[(i+k)%3])
			}
			for _, n := range w.nodes {
				n.mu.Lock()
				n.keep = true
				n.mu.Unlock()
			}
			for s := range streams {
				pushes = append(pushes, begin(t, e, &streams[s], toUsers(users...), &o))
			}
			time.Sleep(70 * time.Millisecond)
			n := w.nodes[nodeIDs[i%3]]
			n.settle(func(d *Delivery) { _, _ = d.Ack(Ack{Delivered: d.Targets()}) })
		}
		for range pushes {
			for _, id := range nodeIDs {
				w.nodes[id].settle(func(d *Delivery) { _, _ = d.Ack(Ack{Delivered: d.Targets()}) })
			}
		}
		if o.done != len(pushes) {
			t.Errorf("%d of %d pushes are finished though no node owes an ack", o.done, len(pushes))
		}
		if s := e.Stats(); s.Fences == 0 || s.Fenced != 0 {
			t.Errorf("%d were held back, %d are", s.Fences, s.Fenced)
		}
	})
}

// TestOrderHoldsThoughTheRouteWasEvicted has others push the user out of the cache while
// a push to the old node is under way.
func TestOrderHoldsThoughTheRouteWasEvicted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.tune = func(c *route.Config) { c.MaxUsers = 2 }
		e := w.engine(t)
		w.place("r", "u", "A")
		w.nodes["A"].keep = true
		var o order
		var stream Order
		begin(t, e, &stream, toUser("u"), &o)
		w.place("r", "u", "B")
		for i := range 50 {
			id := fmt.Sprint("other", i)
			w.place("x", id, "C")
			for range 3 {
				do(t, e, toUser(id))
			}
		}
		time.Sleep(time.Second)
		begin(t, e, &stream, toUser("u"), &o)
		wantGot(t, "before the first push is healed", w.nodes["B"])
		w.nodes["A"].settle(notHere("u"))
		wantGot(t, "afterwards", w.nodes["B"], []string{"u"}, []string{"u"})
	})
}

// TestManyWhoMovedAtOnceWaitWithTheirNode moves more users than are looked at one by one.
func TestManyWhoMovedAtOnceWaitWithTheirNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := w.engine(t)
		const many = mostMoved + 1
		for i := range many {
			w.place("r", fmt.Sprintf("u%05d", i), "B")
		}
		w.place("r", "a", "A")
		w.place("r", "c", "C")
		w.nodes["B"].keep = true
		var o order
		var stream Order
		begin(t, e, &stream, toRoom("r"), &o)
		time.Sleep(1100 * time.Millisecond)
		for i := range many {
			w.place("r", fmt.Sprintf("u%05d", i), "A")
		}
		begin(t, e, &stream, toRoom("r"), &o)
		time.Sleep(1100 * time.Millisecond)
		w.place("r", "a")
		p := begin(t, e, &stream, toRoom("r"), &o)
		wantGot(t, "nobody came to C, which", w.nodes["C"], []string{"c"}, []string{"c"}, []string{"c"})
		if n := len(w.nodes["A"].gotBy()); n != 1 {
			t.Errorf("node A got %d deliveries before B's answer, want the first push's", n)
		}
		w.nodes["B"].settle(func(d *Delivery) { _, _ = d.Ack(Ack{NotHere: slices.Clone(d.all())}) })
		got := w.nodes["A"].gotBy()
		var sizes []int
		for _, users := range got {
			sizes = append(sizes, len(users))
		}
		if want := []int{1, many, many + 1, many}; !slices.Equal(sizes, want) {
			t.Errorf("node A got deliveries for %v users, want %v", sizes, want)
		}
		if r, err := p.Result(); err != nil || r.Delivered != many+1 {
			t.Errorf("last push: %+v, %v", r, err)
		}
	})
}

// TestOrderKeepsNothingOfPushesThatAreOver: they may be large.
func TestOrderKeepsNothingOfPushesThatAreOver(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	w.place("r", "u", "A")
	w.place("r", "v", "B")
	w.nodes["B"].answer = notHere("v")
	do(t, e, toUser("u"))
	var stream Order
	var gone [3]weak.Pointer[Push]
	for i := range gone {
		p := []*Push{toUser("u"), toUsers("u", "w"), toRoom("r")}[i]
		p.Order = &stream
		told := waiter{done: make(chan struct{}, 1)}
		if err := e.Start(p, &told); err != nil {
			t.Fatal(err)
		}
		<-told.done
		gone[i] = weak.Make(p)
	}
	atMost := func(what string, most int) {
		kept := len(gone)
		for end := time.Now().Add(10 * time.Second); kept > most && time.Now().Before(end); time.Sleep(time.Millisecond) {
			for _, node := range w.nodes {
				node.got = nil
			}
			runtime.GC()
			kept = 0
			for _, p := range gone {
				if p.Value() != nil {
					kept++
				}
			}
		}
		if kept > most {
			t.Errorf("%s %d pushes, want %d", what, kept, most)
		}
	}
	atMost("an Order keeps", 1) // the first one might be used again
	stream.Trim()
	atMost("an Order that was trimmed keeps", 0)
	runtime.KeepAlive(&stream)
}

func TestOrderedPushesOfCachedRoutesAllocateNothing(t *testing.T) {
	w := newWorld()
	w.tune = func(c *route.Config) { c.TTL = time.Hour }
	e := w.engine(t)
	w.place("r", "u1", "A")
	w.place("r", "u2", "B")
	for _, n := range w.nodes {
		n.quiet = true
	}
	var stream Order
	told := waiter{done: make(chan struct{}, 1)}
	for name, p := range map[string]*Push{"room": toRoom("r"), "user": toUser("u1")} {
		push := func() {
			kind, room, user, payload, content := p.Kind, p.Room, p.User, p.Payload, p.Content
			p.Reset()
			p.Kind, p.Room, p.User, p.Payload, p.Content, p.Order = kind, room, user, payload, content, &stream
			if err := e.Start(p, &told); err != nil {
				t.Fatal(err)
			}
			<-told.done
		}
		do(t, e, &Push{Request: Request{Kind: p.Kind, Room: p.Room, User: p.User, Payload: p.Payload, Content: p.Content}})
		for !p.Reusable() || p.mark[0].push != nil { // until the answer is in the cache, and known to be
			push()
			time.Sleep(time.Millisecond)
		}
		if n := testing.AllocsPerRun(1000, push); n > 0 {
			t.Errorf("%s: %v allocations a push", name, n)
		}
	}
}

// TestOrderKeepsItsPromises sends pushes of several streams to rooms and users, while
// members come, go and move, nodes are slow, do not have the users any more, or lose
// what they got, or answer in another order, and routes are evicted. Whatever comes:
//
//   - pushes of one stream to one room or user arrive at a connection in order, and once;
//   - who never moves waits for nobody;
//   - every push ends.
func TestOrderKeepsItsPromises(t *testing.T) {
	for seed := range many(150) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { orderModel(t, rand.New(rand.NewPCG(seed, 11))) })
		})
	}
}

// arrival is a line of what one connection got: pushes of one stream to one key.
type arrival struct {
	user   string
	conn   int
	stream byte
	key    string
}

// dawdler lets others run before a push sends, as a busy machine does.
type dawdler struct{}

func (dawdler) Charge(int) {
	for range rand.IntN(4) * rand.IntN(4) {
		runtime.Gosched()
	}
}

func orderModel(t *testing.T, rng *rand.Rand) {
	w := newWorld()
	w.tune = func(c *route.Config) {
		if rng.IntN(2) == 0 {
			c.MaxUsers, c.MaxMembers = 3, 8
		}
		if rng.IntN(3) == 0 {
			c.TTL = time.Millisecond
		}
	}
	e := w.engine(t)
	watched := rng.IntN(2) == 0
	e.directory.Vouch(map[bool]time.Time{true: time.Now().Add(1000 * time.Hour), false: time.Now()}[watched])

	var mu sync.Mutex
	at := map[string]string{} // node by user
	conn := map[string]int{}  // the user's connection
	got := map[arrival][]byte{}
	started := map[*byte]time.Time{} // by payload
	users := []string{"u0", "u1", "u2", "u3", "u4", "u5"}
	still := users[:2] // who never move
	rooms := []string{"r", "s"}
	move := func(user, node string) {
		mu.Lock()
		at[user] = node
		conn[user]++
		mu.Unlock()
		in := rooms
		if node == "" {
			in = nil
		}
		w.mu.Lock()
		w.users[user] = []string{node}
		if node == "" {
			w.users[user] = nil
		}
		for _, r := range rooms {
			delete(w.rooms[r], user)
		}
		for _, r := range in {
			w.rooms[r][user] = []string{node}
		}
		w.mu.Unlock()
		if watched {
			e.directory.Invalidate(rooms, []string{user})
		}
	}
	for _, r := range rooms {
		w.rooms[r] = map[string][]string{}
	}
	for i, u := range users {
		move(u, nodeIDs[i%3])
	}
	type owed struct {
		d  *Delivery
		at time.Time
	}
	stop := make(chan struct{})
	var nodes sync.WaitGroup
	for _, id := range nodeIDs {
		latency := time.Duration(rng.IntN(3)*rng.IntN(400)) * time.Millisecond
		losing := rng.IntN(4) == 0
		mixed := rng.IntN(2) == 0
		q := make(chan owed, 10_000)
		w.nodes[id].answer = func(d *Delivery) {
			now := time.Now()
			mu.Lock()
			for _, u := range still {
				if first, ok := started[&d.Payload()[0]]; ok && d.has(u) && !now.Equal(first) {
					t.Errorf("%s, who never moves, waited for %s", u, now.Sub(first))
				}
			}
			mu.Unlock()
			q <- owed{d, now.Add(latency)}
		}
		nodes.Go(func() {
			for n := 0; ; n++ {
				var next owed
				select {
				case next = <-q:
				case <-stop:
					return
				}
				time.Sleep(time.Until(next.at))
				d := next.d
				var a Ack
				mu.Lock()
				for _, u := range d.all() {
					if at[u] != id {
						a.NotHere = append(a.NotHere, u)
						continue
					}
					a.Delivered++
					key := d.Room()
					if key == "" {
						key = "user " + u
					}
					line := arrival{u, conn[u], d.Payload()[0], key}
					got[line] = append(got[line], d.Payload()[1])
				}
				mu.Unlock()
				switch {
				case losing && n%7 == 0:
					d.Lose(LostStream)
				case mixed && n%3 == 0:
					nodes.Go(func() {
						time.Sleep(time.Duration(n%11) * 20 * time.Millisecond)
						_, _ = d.Ack(a)
					})
				default:
					_, _ = d.Ack(a)
				}
			}
		})
	}
	var o order
	var streams [2]Order
	const pushes = 120
	for i := range pushes {
		s := rng.IntN(len(streams))
		p := &Push{Request: Request{Order: &streams[s], Payload: []byte{byte(s), byte(i)}, Content: Content{Present: true}, Budget: dawdler{}}}
		switch rng.IntN(4) {
		case 0:
			p.Kind, p.User = ToUser, users[rng.IntN(len(users))]
		case 1:
			p.Kind, p.Users = ToUsers, users[rng.IntN(len(users)-1):]
		default:
			p.Kind, p.Room = ToRoom, rooms[rng.IntN(len(rooms))]
			if rng.IntN(4) == 0 {
				p.Exclude = users[rng.IntN(len(users)):][:1]
			}
		}
		if rng.IntN(3) == 0 {
			p.Timeout = time.Duration(rng.IntN(1000)+1) * time.Millisecond
		}
		mu.Lock()
		started[&p.Payload[0]] = time.Now()
		mu.Unlock()
		if err := e.Start(p, &o); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		switch rng.IntN(4) {
		case 0:
			node := nodeIDs[rng.IntN(3)]
			if rng.IntN(6) == 0 {
				node = ""
			}
			move(users[2+rng.IntN(4)], node)
		case 1:
			time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
		}
	}
	time.Sleep(20 * time.Second)
	synctest.Wait()
	close(stop)
	nodes.Wait()
	if o.done != pushes {
		t.Errorf("%d of %d pushes finished", o.done, pushes)
	}
	for line, seq := range got {
		if !slices.IsSorted(seq) || len(slices.Compact(slices.Clone(seq))) != len(seq) {
			t.Errorf("stream %d to %s arrived at connection %d of %s as %v", line.stream, line.key, line.conn, line.user, seq)
		}
	}
	if s := e.Stats(); s.Fenced != 0 || s.Directory.Waiting != 0 {
		t.Errorf("left behind: %d held back, %d in line", s.Fenced, s.Directory.Waiting)
	}
	for i := range streams {
		if n := len(streams[i].fences); n != 0 {
			t.Errorf("stream %d: %d fences stand", i, n)
		}
	}
}

// TestMembersWhoComeAndGoPutUpNoFence is the model without moves.
func TestMembersWhoComeAndGoPutUpNoFence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(1, 2))
		w := newWorld()
		e := w.engine(t)
		e.directory.Vouch(time.Now().Add(1000 * time.Hour))
		for _, n := range w.nodes {
			n.keep = true
		}
		var o order
		var stream Order
		members := map[string]bool{}
		for i := range 300 {
			u := fmt.Sprint("u", rng.IntN(30))
			if members[u] = !members[u]; members[u] {
				w.place("r", u, nodeIDs[int(u[1])%3]) // back to where it was
			} else {
				w.place("r", u)
			}
			e.directory.Invalidate([]string{"r"}, nil)
			begin(t, e, &stream, toRoom("r"), &o)
			if i%50 < 49 {
				continue
			}
			for _, n := range w.nodes {
				n.settle(func(d *Delivery) { _, _ = d.Ack(Ack{Delivered: d.Targets()}) })
				n.keep = true
			}
		}
		if n := e.Stats().Fences; n != 0 {
			t.Errorf("%d deliveries were held back", n)
		}
		if o.done != 300 {
			t.Errorf("%d of 300 pushes finished", o.done)
		}
		if n := cap(stream.under); n > 512 {
			t.Errorf("places for %d pushes though no more than 50 were under way", n)
		}
	})
}

// TestPushToManyCostsTheSameBehindOthers: what a push to many users of an Order costs does not
// grow with those before it that have no answer yet, nor with the square of its users, whether
// users have moved meanwhile or not.
func TestPushToManyCostsTheSameBehindOthers(t *testing.T) {
	const many, before = 2000, 40
	for name, moves := range map[string]bool{"nobody has moved": false, "all have": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.tune = func(c *route.Config) { c.TTL = time.Hour }
			e := w.engine(t)
			var users []string
			for i := range many {
				users = append(users, fmt.Sprintf("u%05d", i))
				w.place("r", users[i], "A")
			}
			w.nodes["A"].keep, w.nodes["B"].keep = true, true
			var o order
			var stream Order
			pushes, out := 0, 0
			push := func() {
				p := toUsers(users...)
				p.Order = &stream
				if err := e.Start(p, &o); err != nil {
					t.Fatal(err)
				}
				pushes++
			}
			staged := func() { // with a link, or behind a fence
				for out += many; ; time.Sleep(time.Millisecond) {
					if o.ended() > 0 {
						t.Fatal("a push has reached its deadline before all was staged")
					}
					n := int(e.Stats().Fenced)
					for _, users := range w.nodes["A"].gotBy() {
						n += len(users)
					}
					if n >= out {
						return
					}
				}
			}
			push()
			staged()
			if moves {
				for _, user := range users {
					w.place("r", user, "B")
				}
				e.directory.Invalidate(nil, users)
				push()
				staged()
			}
			first := testing.AllocsPerRun(1, push)
			for range before {
				push()
			}
			last := testing.AllocsPerRun(1, push)
			if last > first+many {
				t.Errorf("%v allocations for the last push, %v for an early one", last, first)
			}
			for o.ended() < pushes {
				for _, n := range w.nodes {
					n.mu.Lock()
					kept := n.kept
					n.kept = nil
					n.mu.Unlock()
					for _, d := range kept {
						d.TrySend()
						_, _ = d.Ack(Ack{Delivered: d.Targets()})
					}
				}
			}
			if len(stream.marks) != 0 || len(stream.fences) != 0 {
				t.Errorf("left behind: %d marks, %d fences", len(stream.marks), len(stream.fences))
			}
		})
	}
}
