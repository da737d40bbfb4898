package node

import (
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"

	pubsub "github.com/push-manager/push-manager/proto"
)

// The protocol of replay under random schedules: one user who moves between two nodes, with a client that
// acknowledges and drops connections; three managers; a store whose replicas lag. Streams, gates and inboxes
// are those of this package, managers and the Controller a model of what theirs have to do.

// modelPushes is how many each of two callers makes, one after the other.
const modelPushes = 6

var (
	errLost     = errors.New("lost")
	errInverted = errors.New("out of order")
)

// variant is what is left out.
type variant struct {
	noNudge, earlyRead, noGate, staleLastRead bool
}

type storedMsg struct {
	id  string
	seq uint64
}

type world struct {
	v     variant
	r     *rand.Rand
	procs []*proc

	nodes    [2]*Server
	links    [3][2]*modelLink
	presence *modelConn // the Controller's view
	cur      *modelConn // nil while the user is away
	store    []storedMsg
	seq      uint64
	lagged   uint64 // what the slow replica has
	got      []string
	promised map[string]string
	broken   error
}

type modelConn struct {
	*phone

	node  int
	alive bool
}

// modelLink is a manager's stream to a node.
type modelLink struct {
	w      *world
	node   int
	st     *stream
	out    outgoing
	next   uint64
	frames []*pubsub.DeliverRequest // on their way to the node

	acked  map[uint64]string // what became of a delivery: taken, pending, not taken
	final  map[uint64]string // what its receipts said: acked, unacked
	taken  map[uint64]uint64 // by gate
	nudged map[uint64]bool
}

type proc struct {
	next func() (func() bool, bool)
	stop func()
	cond func() bool
	wait func(func() bool) // what it calls to let others run
}

func now() bool { return true }

// spawn starts a process. It calls wait to let others run until a condition holds.
func (w *world) spawn(f func(wait func(func() bool))) {
	type stopped struct{}
	p := &proc{cond: now}
	p.next, p.stop = iter.Pull(func(yield func(func() bool) bool) {
		defer func() {
			if v := recover(); v != nil {
				if _, ok := v.(stopped); !ok {
					panic(v)
				}
			}
		}()
		p.wait = func(c func() bool) {
			if !yield(c) {
				panic(stopped{})
			}
		}
		f(p.wait)
	})
	w.procs = append(w.procs, p)
}

// run lets processes run, one step of a random one at a time, until none can.
func (w *world) run() bool {
	var ready []*proc
	for range 50_000 {
		ready = ready[:0]
		for _, p := range w.procs {
			if p.cond() {
				ready = append(ready, p)
			}
		}
		if len(ready) == 0 || w.broken != nil {
			return true
		}
		p := ready[w.r.IntN(len(ready))]
		if c, ok := p.next(); ok {
			p.cond = c
		} else {
			w.procs = slices.DeleteFunc(w.procs, func(other *proc) bool { return other == p })
		}
	}
	return false
}

func (l *modelLink) send(f *pubsub.DeliverRequest) {
	if n := len(f.GetDeliveries()); n > 0 {
		f.FirstSeq = l.next
		l.next += uint64(n)
	}
	l.frames = append(l.frames, f)
}

// read is the node's reader.
func (l *modelLink) read(wait func(func() bool)) {
	for {
		wait(func() bool { return len(l.frames) > 0 })
		b, err := l.frames[0].MarshalVT()
		if err == nil {
			err = l.st.take(b)
		}
		if err != nil {
			l.w.broken = err
			return
		}
		l.frames = l.frames[1:]
	}
}

func (l *modelLink) owes() bool {
	a := l.st.acks
	r := a.receipts
	due := len(r.due) > 0 && slices.ContainsFunc(r.due, func(d *awaited) bool { return d.seq < a.first })
	return due || len(a.counts)+len(a.replay.catchups)+len(a.replay.taken)+len(a.replay.nudges) > 0
}

// answer takes what the node says to the manager.
func (l *modelLink) answer(wait func(func() bool)) {
	for {
		wait(l.owes)
		if r := l.st.acks.receipts; len(r.due) > 0 {
			r.dueAt = l.st.now() // Time does not pass here.
		}
		l.st.acks.take(&l.out)
		r := &l.out.response
		for _, a := range r.GetAcks() {
			for i, n := range a.GetDelivered() {
				what := "taken"
				switch {
				case n == 0:
					what = "not taken"
				case len(a.GetPending()) > 0 && a.GetPending()[i] > 0:
					what = "pending"
				}
				l.acked[a.GetFirst()+uint64(i)] = what
			}
		}
		for _, receipt := range r.GetReceipts() {
			if l.acked[receipt.GetSeq()] == "" || l.final[receipt.GetSeq()] != "" {
				l.w.broken = fmt.Errorf("a receipt of %d before its ack, or twice", receipt.GetSeq())
			}
			l.final[receipt.GetSeq()] = "unacked"
			if receipt.GetAcked() > 0 {
				l.final[receipt.GetSeq()] = "acked"
			}
		}
		for _, t := range r.GetReplayTaken() {
			l.taken[t.GetGate()] = t.GetSeq()
			l.w.store = slices.DeleteFunc(slices.Clone(l.w.store), func(s storedMsg) bool { return s.seq <= t.GetSeq() })
		}
		for _, token := range r.GetNudgesTaken() {
			l.nudged[token] = true
		}
		for _, c := range r.GetCatchups() {
			gate := c.GetGate()
			l.w.spawn(func(wait func(func() bool)) { l.replay(gate, wait) })
		}
	}
}

// replay is what a manager does when it is asked.
func (l *modelLink) replay(gate uint64, wait func(func() bool)) {
	w, sent := l.w, uint64(0)
	for {
		wait(now)
		stale := w.r.IntN(2) == 0 && w.lagged < w.seq
		var page []storedMsg
		for _, s := range w.store {
			if s.seq > sent && (!stale || s.seq <= w.lagged) {
				page = append(page, s)
			}
		}
		for _, s := range page {
			d := lasting(s.id, "u")
			d.Replay = &pubsub.ReplayPlace{Gate: gate, Seq: s.seq, After: sent}
			l.send(&pubsub.DeliverRequest{Deliveries: []*pubsub.Delivery{d}})
			sent = s.seq
			seq := l.next - 1
			wait(func() bool { return l.acked[seq] != "" })
			if l.acked[seq] == "not taken" {
				return // The connection is gone.
			}
		}
		if len(page) > 0 {
			gone := func() bool { return w.nodes[l.node].replays.asks[gate] == nil }
			wait(func() bool { return l.taken[gate] >= sent || gone() })
			if l.taken[gate] < sent {
				return
			}
			continue
		}
		if stale && !w.v.staleLastRead {
			continue // The last look goes to the leader.
		}
		l.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: gate, Seq: sent}}})
		return
	}
}

// push is what a manager does with a push that asks for the store and for the client's acknowledgement.
func (w *world) push(pm int, id string, wait func(func() bool)) string {
	wait(now)
	if c := w.presence; c != nil {
		l := w.links[pm][c.node]
		d := lasting(id, "u")
		d.WantAck, d.AckTimeoutMs = true, 1<<30
		l.send(&pubsub.DeliverRequest{Deliveries: []*pubsub.Delivery{d}})
		seq := l.next - 1
		wait(func() bool { return l.acked[seq] != "" })
		switch l.acked[seq] {
		case "taken":
			return "delivered"
		case "pending":
			wait(func() bool { return l.final[seq] != "" })
			if l.final[seq] == "acked" {
				return "delivered"
			}
		}
	}
	wait(now)
	w.seq++
	seq := w.seq
	w.store = append(w.store, storedMsg{id, seq})
	wait(now) // its acknowledgement
	if c := w.presence; c != nil && !w.v.noNudge {
		l := w.links[pm][c.node]
		l.send(&pubsub.DeliverRequest{Nudges: []*pubsub.Nudge{{UserId: "u", Seq: seq, Token: seq}}})
		wait(func() bool { return l.nudged[seq] })
	}
	return "stored"
}

func (w *world) connect(wait func(func() bool)) *modelConn {
	at := w.r.IntN(2)
	s := w.nodes[at]
	p := &phone{user: "u", server: s, desk: newDesk(true)}
	c := &modelConn{phone: p, node: at, alive: true}
	gate := s.Gate("u", held1{p}, 0)
	if !w.v.noGate {
		p.desk.inbox.Gate = gate
	}
	s.lasting.(*Users[*phone]).Add("u", p)
	w.cur = c
	if w.v.earlyRead {
		gate.Ready()
		wait(now)
	}
	wait(now)
	w.presence = c
	wait(now)
	gate.Ready()
	w.spawn(func(wait func(func() bool)) { // the writer, and the client at its other end
		for c.alive {
			wait(func() bool { return !c.alive || len(p.desk.queue) > 0 })
			if !c.alive {
				return
			}
			n := len(p.desk.wire)
			p.desk.write(1)
			wait(now)
			for _, e := range p.desk.wire[n:] {
				if !c.alive {
					return
				}
				w.got = append(w.got, e.Frame)
				wait(now)
				if c.alive && p.desk.inbox.Ack(e.Ack) != nil {
					w.broken = errors.New("an ack is refused")
				}
			}
		}
	})
	return c
}

// held1 is a phone that writes when the model says so.
type held1 struct{ p *phone }

func (h held1) DeliverLasting(m *Message, c *Confirmation) Outcome { return h.p.desk.offer(m, c) }
func (h held1) Opened()                                            { h.p.desk.fill() }

func (w *world) drop(c *modelConn, wait func(func() bool)) {
	c.alive = false
	w.cur = nil
	w.nodes[c.node].lasting.(*Users[*phone]).Remove("u", c.phone)
	c.desk.inbox.Close()
	for _, g := range slices.Clone(w.nodes[c.node].replays.gates["u"]) {
		g.Leave()
	}
	wait(now) // The Controller hears of it later.
	if w.presence == c {
		w.presence = nil
	}
}

// modelNodes are made once: a schedule gives them new users and streams.
func modelNodes(t testing.TB) (nodes [2]*Server) {
	t.Helper()
	for i := range nodes {
		s, err := New(Config{NodeID: fmt.Sprint(i), Sessions: NewLastingUsers[*phone](everyFeature...)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.Close)
		nodes[i] = s
	}
	return nodes
}

func schedule(nodes [2]*Server, v variant, seed uint64) error {
	w := &world{v: v, r: rand.New(rand.NewPCG(seed, 1)), nodes: nodes, promised: map[string]string{}}
	defer func() {
		for _, p := range w.procs {
			p.stop()
		}
	}()
	for n, s := range nodes {
		users := NewUsers[*phone]()
		users.lasting = func(p *phone, m *Message, c *Confirmation) Outcome { return p.desk.offer(m, c) }
		s.lasting, s.replays = users, newReplays(s)
		s.replays.looping = true // The model is the loop.
		w.spawn(func(wait func(func() bool)) {
			for {
				wait(func() bool { return len(s.replays.opened) > 0 })
				s.replays.tell()
			}
		})
		for pm := range 3 {
			l := &modelLink{w: w, node: n, next: 1, acked: map[uint64]string{}, final: map[uint64]string{}, taken: map[uint64]uint64{}, nudged: map[uint64]bool{}}
			l.st = &stream{server: s, acks: newAcks(1<<20, s.online, &s.count), next: 1, aud: audiences{byID: map[uint32]*audience{}}}
			s.replays.join(l.st, &pubsub.Hello{InstanceId: fmt.Sprint(pm), Features: everyFeature}, l.st.now())
			w.links[pm][n] = l
			w.spawn(l.read)
			w.spawn(l.answer)
		}
	}
	w.spawn(func(wait func(func() bool)) { // the replica that lags
		for {
			wait(func() bool { return w.lagged < w.seq })
			w.lagged++
		}
	})
	finished := 0
	for caller := range 2 {
		w.spawn(func(wait func(func() bool)) {
			for k := range modelPushes {
				id := fmt.Sprintf("%d-%d", caller, k)
				w.promised[id] = w.push(w.r.IntN(3), id, wait)
				for range w.r.IntN(16) {
					wait(now)
				}
			}
			finished++
		})
	}
	w.spawn(func(wait func(func() bool)) {
		for range 3 {
			for range w.r.IntN(25) {
				wait(now)
			}
			c := w.connect(wait)
			for range w.r.IntN(100) {
				wait(now)
			}
			w.drop(c, wait)
		}
		wait(now)
		w.connect(wait) // and stays
	})
	switch done := w.run(); {
	case w.broken != nil:
		return w.broken
	case !done:
		return errors.New("does not come to rest")
	case finished < 2:
		return errors.New("a push was never answered")
	}
	first := map[string]int{}
	for i, id := range w.got {
		if _, ok := first[id]; !ok {
			first[id] = i
		}
	}
	for id, outcome := range w.promised {
		if _, ok := first[id]; !ok {
			return fmt.Errorf("%w: %s was %s", errLost, id, outcome)
		}
	}
	for caller := range 2 {
		for k := 1; k < modelPushes; k++ {
			if first[fmt.Sprintf("%d-%d", caller, k)] < first[fmt.Sprintf("%d-%d", caller, k-1)] {
				return fmt.Errorf("%w: %d of caller %d", errInverted, k, caller)
			}
		}
	}
	return nil
}

func TestReplayLosesAndInvertsNothing(t *testing.T) {
	nodes := modelNodes(t)
	for seed := range uint64(1500) {
		if err := schedule(nodes, variant{}, seed); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

// TestEachPartOfReplayIsNeeded leaves one out at a time: the schedules above must then find it. What comes of a
// nudge that nobody waits for shows in the model of transport/replay, which has the engine in it.
func TestEachPartOfReplayIsNeeded(t *testing.T) {
	nodes := modelNodes(t)
	for name, v := range map[string]variant{
		"no second look-up and nudge":            {noNudge: true},
		"store read before the Controller knows": {earlyRead: true},
		"no gate":                                {noGate: true},
		"last read from any replica":             {staleLastRead: true},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(20_000) { // all are found in the first 1,000 or so
				if err := schedule(nodes, v, seed); err != nil {
					t.Logf("seed %d: %v", seed, err)
					if !errors.Is(err, errLost) && !errors.Is(err, errInverted) {
						t.Fatal(err)
					}
					return
				}
			}
			t.Error("nothing was lost or out of order")
		})
	}
}
