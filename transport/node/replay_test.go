package node

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	pubsub "github.com/push-manager/push-manager/proto"
)

// replaying opens a stream of a manager that offers replay.
func (b *lastingBench) replaying(t testing.TB, instance string) *manager {
	t.Helper()
	m, err := b.open(t, &pubsub.Hello{ProtocolVersion: 1, ManagerId: instance, InstanceId: instance, Features: everyFeature})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return m
}

// asked waits for one Catchup.
func (m *manager) asked() *pubsub.Catchup {
	m.t.Helper()
	r := m.recv()
	if len(r.GetCatchups()) != 1 {
		m.t.Fatalf("%v instead of a catchup", r)
	}
	return r.GetCatchups()[0]
}

// stored is a message out of the store.
func stored(c *pubsub.Catchup, id string, seq, after uint64) *pubsub.Delivery {
	d := lasting(id, c.GetUserId())
	d.Replay = &pubsub.ReplayPlace{Gate: c.GetGate(), Seq: seq, After: after}
	return d
}

func (m *manager) end(c *pubsub.Catchup, failure string) {
	m.t.Helper()
	m.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: c.GetGate(), Error: failure}}})
	synctest.Wait()
}

func (m *manager) silent(for1 time.Duration) {
	m.t.Helper()
	time.Sleep(for1)
	m.send(&pubsub.DeliverRequest{Heartbeat: 9})
	if r := m.recv(); r.GetHeartbeat() != 9 {
		m.t.Errorf("%v instead of nothing", r)
	}
}

func (p *phone) want(t testing.TB, frames ...string) {
	t.Helper()
	synctest.Wait()
	if got := p.shown(); !slices.Equal(got, frames) {
		t.Errorf("shown %q, want %q", got, frames)
	}
}

func TestWhatWasStoredComesBeforeWhatIsNew(t *testing.T) {
	for name, acks := range map[string]bool{"acknowledges": true, "cannot acknowledge": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := serveLasting(t, Config{})
				m := b.replaying(t, "pm")
				p := b.call("u", acks)
				m.deliver(lasting("new-1", "u"), toUsers("new-2", "u"))
				m.waitAck(2)
				m.silent(time.Second) // The Controller does not know yet.
				p.want(t)
				p.desk.inbox.Gate.Ready()
				c := m.asked()
				if c.GetUserId() != "u" || c.GetGate() == 0 || c.GetWindow() != 32 {
					t.Errorf("asked %v", c)
				}
				m.deliver(stored(c, "old-1", 7, 0), stored(c, "old-2", 9, 7), lasting("new-3", "u"))
				r := m.recv()
				if acks {
					wantFrame(t, r, &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{ack(3, 1, 1, 1)}})
					p.want(t, "old-1", "old-2")
					p.ack()
					wantFrame(t, m.recv(), &pubsub.DeliverResponse{ReplayTaken: []*pubsub.ReplayTaken{{Gate: c.GetGate(), Seq: 9}}})
				} else if r.ReplayTaken == nil { // The two may come apart.
					wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{ack(3, 1, 1, 1)}})
				}
				if p.desk.wire[0].Replayed != true {
					t.Error("not marked")
				}
				m.end(c, "")
				p.want(t, "old-1", "old-2", "new-1", "new-2", "new-3")
				m.deliver(toUsers("new-4", "u"))
				m.waitAck(6)
				p.want(t, "old-1", "old-2", "new-1", "new-2", "new-3", "new-4")
			})
		})
	}
}

func TestWithoutAManagerThatReplaysTheGateIsOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		m := b.mustOpen(t)
		p := b.call("u", true)
		p.desk.inbox.Gate.Ready()
		m.deliver(toUsers("a", "u"))
		m.waitAck(1)
		p.want(t, "a")
		// One comes, and is asked.
		b.replaying(t, "pm").asked()
		m.deliver(toUsers("b", "u"))
		m.waitAck(2)
		p.want(t, "a", "b")
	})
}

func TestAGateNeverHangsOnTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		m := b.replaying(t, "pm")
		began := time.Now()
		p := b.call("u", true)
		m.deliver(toUsers("a", "u"))
		m.waitAck(1)
		p.want(t)
		time.Sleep(replayPatience + replayTick)
		p.want(t, "a") // The Controller was not heard of.

		p.desk.inbox.Gate.Ready()
		c := m.asked()
		m.deliver(toUsers("b", "u"))
		m.waitAck(2)
		time.Sleep(replayPatience - time.Millisecond)
		p.want(t, "a")
		time.Sleep(replayTick)
		p.want(t, "a", "b")
		b.metric(t, "connect_node_gate_open_without_store_total 2")
		// What comes late is shown all the same.
		m.deliver(stored(c, "late", 1, 0))
		m.waitAck(3)
		p.want(t, "a", "b", "late")
		p.ack()
		m.recv()
		m.end(c, "")
		m.silent(4 * time.Second)
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

func TestAReplayThatFailsIsAskedForAgainLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		m := b.replaying(t, "pm")
		p := b.call("u", true)
		p.desk.inbox.Gate.Ready()
		c := m.asked()
		for _, pause := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second} {
			m.deliver(toUsers(fmt.Sprint(pause), "u"))
			m.waitAck(m.next - 1)
			began := time.Now()
			m.end(c, "store: not reachable")
			if n := len(p.shown()); n != int(m.next-1) {
				t.Errorf("%d are shown", n)
			}
			again := m.asked()
			if took := time.Since(began); took < pause || took > pause+replayTick {
				t.Errorf("asked again after %v, want %v", took, pause)
			}
			if again.GetGate() == c.GetGate() {
				t.Error("a number is used twice")
			}
			c = again
		}
		m.end(c, "")
		m.silent(8 * time.Second)
	})
}

func TestANudgeClosesTheGatesAndHasTheStoreReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		m := b.replaying(t, "pm")
		p, q := b.call("u", true), b.call("u", false)
		var asked []*pubsub.Catchup
		for _, g := range []*phone{p, q} {
			g.desk.inbox.Gate.Ready()
			asked = append(asked, m.asked())
		}
		m.end(asked[0], "")
		m.end(asked[1], "")
		nudge := func(token uint64, users ...string) *pubsub.DeliverResponse {
			f := &pubsub.DeliverRequest{}
			for _, u := range users {
				f.Nudges = append(f.Nudges, &pubsub.Nudge{UserId: u, Seq: 1, Token: token})
				token++
			}
			m.send(f)
			return m.recv()
		}
		got := nudge(5, "stranger")
		wantFrame(t, got, &pubsub.DeliverResponse{NudgesTaken: []uint64{5}})
		got = nudge(6, "u")
		for len(got.GetCatchups()) < 2 || len(got.GetNudgesTaken()) < 1 { // They may come apart.
			more := m.recv()
			got.Catchups = append(got.Catchups, more.GetCatchups()...)
			got.NudgesTaken = append(got.NudgesTaken, more.GetNudgesTaken()...)
		}
		m.deliver(toUsers("live", "u"))
		m.waitAck(1)
		p.want(t)
		// Another one while the store is read: it is read once more.
		wantFrame(t, nudge(7, "u"), &pubsub.DeliverResponse{NudgesTaken: []uint64{7}})
		for _, c := range got.GetCatchups() {
			m.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: c.GetGate()}}})
			again := m.asked()
			p.want(t)
			q.want(t)
			asked = append(asked, again)
		}
		for i, c := range asked[2:] {
			m.deliver(stored(c, "stored", 1, 0))
			m.waitAck(uint64(i) + 2)
			m.end(c, "")
		}
		p.want(t, "stored", "live")
		q.want(t, "stored", "live")
		b.metric(t, "connect_node_nudges_total 3")
	})
}

// A message is stored once more when a caller tries again before the first copy was shown.
func TestWhatIsStoredTwiceDoesNotHoldUpItsReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		m := b.replaying(t, "pm")
		p := b.call("u", true)
		p.desk.inbox.Gate.Ready()
		c := m.asked()
		m.deliver(stored(c, "a", 1, 0), stored(c, "b", 2, 1), stored(c, "a", 3, 2))
		m.waitAck(3)
		p.want(t, "a", "b")
		p.ack()
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{ReplayTaken: []*pubsub.ReplayTaken{{Gate: c.GetGate(), Seq: 3}}})
	})
}

func TestNudgesKeepNoGateClosed(t *testing.T) {
	nudge := func(m *manager, token uint64) {
		m.send(&pubsub.DeliverRequest{Nudges: []*pubsub.Nudge{{UserId: "u", Seq: token, Token: token}}})
		wantFrame(m.t, m.recv(), &pubsub.DeliverResponse{NudgesTaken: []uint64{token}})
	}
	t.Run("of a connection that the Controller does not know", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := serveLasting(t, Config{})
			m := b.replaying(t, "pm")
			p := b.call("u", true)
			m.deliver(toUsers("live", "u"))
			m.waitAck(1)
			for i := range uint64(4) {
				nudge(m, i+1)
				time.Sleep(replayPatience / 3)
			}
			p.want(t, "live")
		})
	})
	t.Run("of one for whom more is stored all the while", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := serveLasting(t, Config{})
			m := b.replaying(t, "pm")
			p := b.call("u", true)
			p.desk.inbox.Gate.Ready()
			c := m.asked()
			m.deliver(toUsers("live", "u"))
			m.waitAck(1)
			for i := range uint64(8) { // each replay brings something in time, and more is stored before it ends
				time.Sleep(replayPatience / 3)
				if slices.Contains(p.shown(), "live") {
					if i < 3 {
						t.Errorf("shown %q", p.shown())
					}
					return
				}
				m.deliver(stored(c, fmt.Sprint("stored-", i), i+1, 0))
				m.waitAck(i + 2)
				p.ack()
				m.recv()
				nudge(m, i+1)
				m.end(c, "")
				c = m.asked()
			}
			t.Errorf("shown %q", p.shown())
		})
	})
}

func TestWhatAnEndedStreamWasAskedIsAskedElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		streams := map[string]*manager{"pm-1": b.replaying(t, "pm-1"), "pm-2": b.replaying(t, "pm-2")}
		p := b.call("u", true)
		p.desk.inbox.Gate.Ready()
		synctest.Wait()
		b.server.replays.mu.Lock()
		on := p.desk.inbox.Gate.ask.on.key.instance
		b.server.replays.mu.Unlock()
		first := streams[on]
		delete(streams, on)
		c := first.asked()
		first.deliver(stored(c, "a", 1, 0), toUsers("live", "u"))
		first.waitAck(2)
		first.send(&pubsub.DeliverRequest{Drain: true})
		_ = first.wantEnd(codes.OK)
		for _, second := range streams {
			c = second.asked()
			p.want(t, "a")
			// It has not been acknowledged, and comes again: with its id, so it is not shown again.
			second.deliver(stored(c, "a", 1, 0), stored(c, "b", 2, 1))
			second.waitAck(2)
			p.ack()
			for second.recv().GetReplayTaken()[0].GetSeq() < 2 {
			}
			second.end(c, "")
			p.want(t, "a", "b", "live")
			second.send(&pubsub.DeliverRequest{Drain: true})
			_ = second.wantEnd(codes.OK)
		}
		// Nobody is left: the gate is open, and a manager that comes is asked.
		b.replaying(t, "pm-3").asked()
	})
}

func TestAllUsersAreAskedForAgainSlowlyWhenAStreamIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		m := b.replaying(t, "pm")
		const users = 3 * resyncUsers
		for i := range users {
			b.call(fmt.Sprint("u", i), true).desk.inbox.Gate.Ready()
			b.call(fmt.Sprint("u", i), true).desk.inbox.Gate.Ready()
		}
		asked := map[string]int{}
		answer := func(n int) {
			clear(asked)
			for n > 0 {
				for _, c := range m.recv().GetCatchups() {
					asked[c.GetUserId()]++
					n--
					m.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: c.GetGate()}}})
				}
			}
		}
		answer(2 * users)
		m.send(&pubsub.DeliverRequest{Drain: true})
		_ = m.wantEnd(codes.OK)
		m = b.replaying(t, "pm")
		began := time.Now()
		answer(users)
		if took := time.Since(began); took < resyncDelay+2*replayTick {
			t.Errorf("%d were asked for in %v", users, took)
		}
		if len(asked) != users {
			t.Errorf("%d users were asked for", len(asked))
		}
	})
}

func TestMessagesOutOfTheStoreGoBehindTheirGateOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		m := b.replaying(t, "pm")
		p, other := b.call("u", true), b.call("u", true)
		p.desk.inbox.Gate.Ready()
		c := m.asked()
		stranger := stored(c, "x", 1, 0)
		stranger.UserIds = []string{"somebody else"}
		two := stored(c, "x", 1, 0)
		two.UserIds = []string{"u", "v"}
		m.deliver(stored(c, "a", 5, 0), stored(c, "c", 9, 7), stored(c, "b", 7, 5), stored(&pubsub.Catchup{UserId: "u", Gate: 99}, "x", 1, 0), stranger, two)
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{
			Acks: []*pubsub.AckRange{ack(1, 1, 0, 1, 0, 0, 0)},
			Misses: []*pubsub.Miss{
				{Seq: 2, Refused: true, Reason: reasonBehind},
				{Seq: 4, NotHere: []string{"u"}},
				{Seq: 5, NotHere: []string{"somebody else"}},
				{Seq: 6, Refused: true, Reason: "a message out of the store is for one user"},
			},
		})
		p.want(t, "a", "b")
		other.want(t)
		m.deliver(stored(c, "c", 9, 7))
		m.waitAck(7)
		p.hangUp(b.users)
		m.deliver(stored(c, "d", 10, 9))
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{ack(8, 0)}, Misses: []*pubsub.Miss{{Seq: 8, NotHere: []string{"u"}}}})
		m.end(c, "")
		m.silent(time.Second)
	})
}

func TestNothingIsTakenThatTheClientHasNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		m := b.replaying(t, "pm")
		p := b.call("u", true)
		p.desk.inbox.Gate.Ready()
		c := m.asked()
		m.deliver(lasting("held", "u"), lasting("had", "v"))
		m.waitAck(2)
		// The second stands behind the gate, too: out of the store it goes ahead, and once.
		m.deliver(stored(c, "a", 1, 0), stored(c, "held", 2, 1), stored(c, "b", 3, 2))
		m.waitAck(5)
		p.want(t, "a", "held", "b")
		if err := p.desk.inbox.Ack(p.desk.wire[1].Ack); err != nil {
			t.Fatal(err)
		}
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{ReplayTaken: []*pubsub.ReplayTaken{{Gate: c.GetGate(), Seq: 2}}})
		// What the client has is taken at once, what it had with another content is of no use.
		reused := stored(c, "a", 5, 4)
		reused.PayloadHash = 9
		m.deliver(stored(c, "a", 4, 3), reused)
		m.waitAck(7)
		p.ack()
		var taken uint64
		for taken < 5 {
			for _, r := range m.recv().GetReplayTaken() {
				taken = r.GetSeq()
			}
		}
		m.end(c, "")
		p.want(t, "a", "held", "b")
	})
}

func TestAClientThatDoesNotAcknowledgeAReplayIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		m := b.replaying(t, "pm")
		p := b.call("u", true)
		p.desk.inbox.Gate.Ready()
		c := m.asked()
		m.deliver(stored(c, "a", 1, 0), toUsers("live", "u"))
		m.waitAck(2)
		time.Sleep(replayAckTimeout - time.Second)
		p.want(t, "a")
		time.Sleep(time.Second)
		p.mu.Lock()
		p.desk.tick(time.Since(p.desk.now))
		p.flushLocked()
		p.mu.Unlock()
		began := time.Now()
		c = m.asked()
		if took := time.Since(began); took > firstRetry+replayTick {
			t.Errorf("asked again after %v", took)
		}
		p.want(t, "a", "live")
		m.deliver(stored(c, "a", 1, 0))
		m.waitAck(3)
		p.want(t, "a", "live", "a")
	})
}

func TestGatesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{MaxGates: 1})
		m := b.replaying(t, "pm")
		p := b.call("u", true)
		q := b.call("v", true)
		q.desk.inbox.Gate.Ready()
		m.deliver(toUsers("a", "v"))
		m.waitAck(1)
		q.want(t, "a")
		b.metric(t, "connect_node_gates_refused_total 1")
		b.metric(t, "connect_node_replay_gates 1")
		b.metric(t, "connect_node_replay_gates_closed 1")
		p.hangUp(b.users)
		p.hangUp(b.users)
		b.call("v", true).desk.inbox.Gate.Ready()
		m.asked()
		b.metric(t, "connect_node_replays 1")
	})
}

func TestAManagerThatNudgesAndDoesNotReadIsCutOff(t *testing.T) {
	b := serveLasting(t, Config{MaxUnacked: 10})
	m := b.mustOpen(t)
	f := &pubsub.DeliverRequest{}
	for i := range uint64(11) {
		f.Nudges = append(f.Nudges, &pubsub.Nudge{UserId: "u", Token: i + 1})
	}
	m.send(f)
	_ = m.wantEnd(codes.FailedPrecondition)
}

func TestManagersShareTheUsersAndKeepThem(t *testing.T) {
	b := serveLasting(t, Config{})
	r := b.server.replays
	for i := range 3 {
		st := b.take(t, nil)
		r.join(st, &pubsub.Hello{InstanceId: fmt.Sprint(i % 2), Features: everyFeature}, time.Now())
	}
	per := map[*stream]int{}
	for i := range 1000 {
		g := &Gate{user: fmt.Sprint(i)}
		st := r.pickLocked(g)
		per[st]++
		if r.pickLocked(g) != st {
			t.Fatal("another one the second time")
		}
	}
	if len(per) != 3 {
		t.Errorf("asked %v", per)
	}
	for _, n := range per {
		if n < 150 {
			t.Errorf("asked %v", per)
		}
	}
}
