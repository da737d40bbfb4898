package link

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// replayer notes what it is told.
type replayer struct {
	mu     sync.Mutex
	told   []string
	askers map[Asker]int // how often each has gone
	last   Asker
	then   func(a Asker, gate uint64) // what a catchup brings about, nil for nothing
}

func (r *replayer) note(a Asker, format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told = append(r.told, fmt.Sprintf(format, args...))
	if r.askers == nil {
		r.askers = map[Asker]int{}
	}
	r.askers[a] += 0
	r.last = a
}

func (r *replayer) Catchup(a Asker, gate uint64, user string, window int) {
	r.note(a, "%s: catchup %d %s %d", a.Node(), gate, user, window)
	if r.then != nil {
		r.then(a, gate)
	}
}

func (r *replayer) Taken(a Asker, gate, seq uint64) {
	r.note(a, "%s: taken %d %d", a.Node(), gate, seq)
}

func (r *replayer) Gone(a Asker) {
	r.note(a, "%s: gone", a.Node())
	r.mu.Lock()
	defer r.mu.Unlock()
	r.askers[a]++
}

func (r *replayer) heard() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.told)
}

func (r *replayer) asker() Asker {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}

// script is a node that acknowledges what it gets, and beside that says what the test wants.
type script struct {
	*fakeNode
	pending bool // clients of deliveries with want_ack are to acknowledge

	mu     sync.Mutex // guards stream and what is sent on it
	stream deliverStream
}

// scripted is a node with these features.
func scripted(features ...pubsub.Feature) *script {
	s := &script{fakeNode: &fakeNode{id: "A", hello: &pubsub.HelloReply{
		ProtocolVersion: 1, NodeId: "A", BootId: "b", MaxAudienceMembers: 1000, OnlineUsers: 3, Features: features,
	}}}
	s.answer = func(seq uint64, users []string, _ string, r *pubsub.DeliverResponse) {
		r.Acks = append(r.Acks, &pubsub.AckRange{First: seq, Delivered: []uint32{uint32(len(users))}})
	}
	s.deliver = func(st deliverStream) error { return s.serve(mutual{st, s}) }
	return s
}

// mutual lets the test send, too.
type mutual struct {
	deliverStream
	s *script
}

func (m mutual) Recv() (*pubsub.DeliverRequest, error) {
	f, err := m.deliverStream.Recv()
	m.s.mu.Lock()
	m.s.stream = m.deliverStream
	m.s.mu.Unlock()
	return f, err
}

func (m mutual) Send(r *pubsub.DeliverResponse) error {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	if m.s.pending {
		for _, a := range r.GetAcks() {
			a.Pending = a.GetDelivered()
		}
	}
	return m.deliverStream.Send(r)
}

// say sends frames on the node's last stream, and waits until they have been read.
func (s *script) say(frames ...*pubsub.DeliverResponse) {
	s.mu.Lock()
	st := s.stream
	for _, r := range frames {
		_ = st.Send(r)
	}
	s.mu.Unlock()
	synctest.Wait()
}

// nudges are those that have arrived.
func (s *script) nudges() (list []*pubsub.Nudge) {
	for _, f := range s.all() {
		list = append(list, f.GetNudges()...)
	}
	return list
}

// ends are those of replays that have arrived.
func (s *script) ends() (list []string) {
	for _, f := range s.all() {
		for _, e := range f.GetReplayEnds() {
			list = append(list, fmt.Sprintf("%d %d %s", e.GetGate(), e.GetSeq(), e.GetError()))
		}
	}
	return list
}

// scriptedWorld is a world with one scripted node, to which there is a link.
func scriptedWorld(t *testing.T, cfg Config, s *script) *world {
	t.Helper()
	w := newWorld(t, cfg)
	w.start("a:1", s.fakeNode)
	w.register("A", "a:1")
	w.up(1)
	synctest.Wait()
	w.room("r", "A", "u1", "u2", "u3")
	return w
}

func TestReplaysAreOfferedWhereThereIsSomebodyToSendThem(t *testing.T) {
	for _, cfg := range []Config{{}, {Replayer: &replayer{}}} {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, cfg)
			offered := make(chan []pubsub.Feature, 1)
			w.start("a:1", &fakeNode{id: "A", deliver: func(st deliverStream) error {
				f, err := st.Recv()
				if err == nil {
					offered <- f.GetHello().GetFeatures()
				}
				return err
			}})
			w.register("A", "a:1")
			if got := slices.Contains(<-offered, pubsub.Feature_FEATURE_REPLAY); got != (cfg.Replayer != nil) {
				t.Errorf("offered: %v", got)
			}
		})
	}
}

func TestOptionsReachNodesThatHaveTheFeature(t *testing.T) {
	for name, features := range map[string][]pubsub.Feature{"a node of before": nil, "a node that can": lasting} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := scripted(features...)
				w := scriptedWorld(t, Config{Replayer: &replayer{}}, n)
				p := w.toUser("u1", "x")
				p.Options = &engine.Options{MessageID: "m", Sender: "s", PayloadHash: 7, TTL: time.Second, CollapseKey: "k"}
				if r := w.do(p); r.Delivered != 1 {
					t.Errorf("%+v", r)
				}
				d := n.sent()[0].GetDeliveries()[0]
				if can := features != nil; (d.GetMessageId() == "m") != can || (d.GetSender() == "s") != can || (d.GetPayloadHash() == 7) != can ||
					(d.GetTtlMs() > 0) != can || (d.GetCollapseKey() == "k") != can {
					t.Errorf("arrived: %v", d)
				}
			})
		})
	}
}

// toGate7 is a replayed message.
func (w *world) toGate7() *engine.Push {
	p := w.toUser("u1", "stored")
	p.Options = &engine.Options{MessageID: "m", Replay: &engine.Replay{Node: "A", Gate: 7, Seq: 9, After: 8, Room: "r"}}
	return p
}

func TestReplayedMessageGoesToNodesThatKnowReplaysOnly(t *testing.T) {
	without := slices.DeleteFunc(slices.Clone(lasting), func(x pubsub.Feature) bool { return x == pubsub.Feature_FEATURE_REPLAY })
	for name, test := range map[string]struct {
		node *fakeNode
		can  bool
	}{
		"a node that knows them": {scripted(lasting...).fakeNode, true},
		"a node that does not":   {scripted(without...).fakeNode, false},
		"a node without Deliver": {unaryNode("A"), false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{Replayer: &replayer{}})
				w.start("a:1", test.node)
				w.register("A", "a:1")
				w.up(1)
				w.room("r", "A", "u1")
				r := w.do(w.toGate7())
				if test.can {
					p := test.node.sent()[0].GetDeliveries()[0].GetReplay()
					if r.Delivered != 1 || p.GetGate() != 7 || p.GetSeq() != 9 || p.GetAfter() != 8 {
						t.Errorf("%v, %+v", p, r)
					}
					return
				}
				if r.Failed != 1 || reasons(r) != "failed: "+engine.DropNoReplay.String() {
					t.Errorf("%+v", r)
				}
				if got := test.node.received(t); len(got) > 0 {
					t.Errorf("arrived: %q", got)
				}
			})
		})
	}
}

// nudged is the answer to a nudge.
type nudged struct {
	mu    sync.Mutex
	calls []bool
	at    time.Time
}

func (n *nudged) done(taken bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls, n.at = append(n.calls, taken), time.Now()
}

// is checks that there was this one answer, or none yet.
func (n *nudged) is(t *testing.T, what string, want ...bool) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if !slices.Equal(n.calls, want) {
		t.Errorf("%s: answers %v, want %v", what, n.calls, want)
	}
}

func TestNudgeIsSentAtOnceAndAnswered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := scripted(lasting...)
		w := scriptedWorld(t, Config{Replayer: &replayer{}}, n)
		l := w.set.Link(0, "A")
		var first, second nudged
		l.Nudge("u1", 5, first.done)
		l.Nudge("u2", 6, second.done)
		synctest.Wait()
		got := n.nudges()
		if len(got) != 2 || got[0].GetUserId() != "u1" || got[0].GetSeq() != 5 || got[1].GetUserId() != "u2" || got[0].GetToken() == got[1].GetToken() {
			t.Fatalf("%v", got)
		}
		first.is(t, "before its answer")
		n.say(&pubsub.DeliverResponse{NudgesTaken: []uint64{got[1].GetToken()}})
		first.is(t, "the first, without its answer")
		second.is(t, "the second", true)
		n.say(&pubsub.DeliverResponse{NudgesTaken: []uint64{got[0].GetToken(), got[1].GetToken()}}) // one of them again
		first.is(t, "the first", true)
		second.is(t, "the second", true)
		if st := w.set.Stats(); st.Nudges != 0 || w.set.meters.strikes.Get() != 0 {
			t.Errorf("%+v, %d strikes", st, w.set.meters.strikes.Get())
		}
	})
}

func TestNudgeThatIsNotAnsweredIsNotTaken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := scripted(lasting...)
		w := scriptedWorld(t, Config{Replayer: &replayer{}}, n)
		l, begun := w.set.Link(0, "A"), time.Now()
		var late, left, down nudged
		l.Nudge("u1", 5, late.done)
		synctest.Wait()
		token := n.nudges()[0].GetToken()
		time.Sleep(1100 * time.Millisecond)
		late.is(t, "after the ack timeout", false)
		if took := late.at.Sub(begun); took < 900*time.Millisecond || took > 1100*time.Millisecond {
			t.Errorf("given up after %v", took)
		}
		n.say(&pubsub.DeliverResponse{NudgesTaken: []uint64{token}})
		late.is(t, "after all", false)
		l.Nudge("u1", 6, left.done)
		synctest.Wait()
		n.kill()
		synctest.Wait()
		left.is(t, "when the stream has ended", false)
		l.Nudge("u1", 7, down.done)
		down.is(t, "without a stream", false)
		if got := w.set.meters.strikes.Get(); got != 0 {
			t.Errorf("%d strikes", got)
		}
	})
}

func TestNudgeIsRefusedAtOnceWhereItCannotBeTaken(t *testing.T) {
	for name, n := range map[string]*fakeNode{
		"a node of before":         {id: "A"},
		"a node without Deliver":   unaryNode("A"),
		"a node that is not there": nil,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{Replayer: &replayer{}})
				if n != nil {
					w.start("a:1", n)
				}
				w.register("A", "a:1")
				if n != nil {
					w.up(1)
				}
				var got nudged
				w.set.Link(0, "A").Nudge("u1", 5, got.done)
				got.is(t, name, false)
			})
		})
	}
	bubble(t, func(t *testing.T) { // no store: no replays, whatever the node names
		w := scriptedWorld(t, Config{}, scripted(lasting...))
		var got nudged
		w.set.Link(0, "A").Nudge("u1", 5, got.done)
		got.is(t, "without a store", false)
	})
}

// A node that reads nothing gets so many nudges and no more; they go out in several frames.
func TestNudgesAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := scripted(lasting...)
		read := make(chan struct{})
		n.deliver = func(st deliverStream) error { return n.serve(mutual{gated{st, read}, n}) }
		w := scriptedWorld(t, Config{Replayer: &replayer{}, MaxFrameBytes: 1024, FrameBytes: 1024}, n)
		l := w.set.Link(0, "A")
		answers := make([]nudged, nudgesMax+1)
		for i := range answers {
			l.Nudge(fmt.Sprintf("user-%0200d", i), uint64(i), answers[i].done)
		}
		synctest.Wait()
		answers[nudgesMax].is(t, "the one too many", false)
		answers[0].is(t, "the first")
		close(read)
		synctest.Wait()
		var tokens []uint64
		for _, nudge := range n.nudges() {
			tokens = append(tokens, nudge.GetToken())
		}
		if len(tokens) != nudgesMax {
			t.Fatalf("%d nudges", len(tokens))
		}
		for _, f := range n.all() {
			if size := f.SizeVT(); size > 1024 {
				t.Errorf("a frame of %d bytes", size)
			}
		}
		n.say(&pubsub.DeliverResponse{NudgesTaken: tokens})
		for i := range nudgesMax {
			answers[i].is(t, fmt.Sprint(i), true)
		}
	})
}

func TestNudgeThatWasNeverSentCannotBeTaken(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := scripted(lasting...)
		w := scriptedWorld(t, Config{Replayer: &replayer{}}, n)
		n.say(&pubsub.DeliverResponse{NudgesTaken: []uint64{0, 1}})
		if got := w.set.meters.strikes.Get(); got != 2 {
			t.Errorf("%d strikes", got)
		}
		n.say(&pubsub.DeliverResponse{NudgesTaken: []uint64{1}})
		synctest.Wait()
		if w.set.meters.quarantines.Get() != 1 {
			t.Error("not in quarantine")
		}
	})
}

// Whatever happens to the stream meanwhile, each nudge has exactly one answer.
func TestEachNudgeHasOneAnswer(t *testing.T) {
	w := newWorld(t, Config{Replayer: &replayer{}, AckTimeout: 100 * time.Millisecond, BackoffMin: 25 * time.Millisecond, BackoffMax: 25 * time.Millisecond})
	n := scripted(lasting...)
	n.deliver = func(st deliverStream) error {
		if _, err := n.greet(st); err != nil {
			return err
		}
		for i := 0; ; i++ {
			f, err := st.Recv()
			if err != nil {
				return err
			}
			r := &pubsub.DeliverResponse{Heartbeat: f.GetHeartbeat()}
			for _, nudge := range f.GetNudges() {
				if nudge.GetSeq()%5 != 0 { // some have no answer, some two
					r.NudgesTaken = append(r.NudgesTaken, nudge.GetToken())
				}
				if nudge.GetSeq()%7 == 0 {
					r.NudgesTaken = append(r.NudgesTaken, nudge.GetToken())
				}
			}
			if err := st.Send(r); err != nil || i%50 == 49 {
				return err // the stream breaks now and then
			}
		}
	}
	w.start("a:1", n.fakeNode)
	w.register("A", "a:1")
	w.up(1)
	answers := make([]nudged, 4000)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := g; i < len(answers); i += 4 {
				w.set.Link(0, "A").Nudge("u1", uint64(i), answers[i].done)
				if i%50 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	wg.Wait()
	w.set.Close()
	taken := 0
	for i := range answers {
		if n := len(answers[i].calls); n != 1 {
			t.Fatalf("nudge %d has %d answers", i, n)
		}
		if answers[i].calls[0] {
			taken++
		}
	}
	if taken == 0 {
		t.Error("none was taken")
	}
}

func TestCatchupsReachTheReplayer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, n := &replayer{}, scripted(lasting...)
		w := scriptedWorld(t, Config{Replayer: r}, n)
		n.say(
			&pubsub.DeliverResponse{
				Catchups:    []*pubsub.Catchup{{UserId: "u1", Gate: 7, Window: 64}, {UserId: "shop/ü", Gate: 3}},
				ReplayTaken: []*pubsub.ReplayTaken{{Gate: 7, Seq: 4}},
			},
			&pubsub.DeliverResponse{ReplayTaken: []*pubsub.ReplayTaken{{Gate: 7, Seq: 5}}},
		)
		want := []string{"A: catchup 7 u1 64", "A: catchup 3 shop/ü 0", "A: taken 7 4", "A: taken 7 5"}
		if got := r.heard(); !slices.Equal(got, want) {
			t.Errorf("heard %q", got)
		}
		if st := w.set.Stats(); st.Gates != 2 {
			t.Errorf("%+v", st)
		}
		a := r.asker()
		a.End(7, 9, "")
		a.End(3, 0, "store\nis down")
		a.End(7, 10, "") // it has ended
		a.End(99, 1, "") // nobody has asked
		synctest.Wait()
		if got := n.ends(); !slices.Equal(got, []string{"7 9 ", "3 0 store is down"}) {
			t.Errorf("ends %q", got)
		}
		n.say(&pubsub.DeliverResponse{ReplayTaken: []*pubsub.ReplayTaken{{Gate: 7, Seq: 9}}}) // the last page, behind its end
		n.kill()
		synctest.Wait()
		if got := r.heard(); !slices.Equal(got, append(want, "A: taken 7 9", "A: gone")) {
			t.Errorf("heard %q", got)
		}
		a.End(7, 11, "") // does nothing any more
		if st := w.set.Stats(); st.Gates != 0 || w.set.meters.strikes.Get() != 0 {
			t.Errorf("%+v, %d strikes", st, w.set.meters.strikes.Get())
		}
	})
}

// Every stream of a node that knows replays goes once, however it ends, and is another one each time.
func TestEachStreamOfANodeThatAsksGoesOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := &replayer{}
		w := newWorld(t, Config{Replayer: r, Shards: 2})
		n, old := scripted(lasting...), &fakeNode{id: "B"}
		w.start("a:1", n.fakeNode)
		w.start("b:1", old)
		w.register("A", "a:1", "B", "b:1")
		w.up(4)
		synctest.Wait()
		n.say(&pubsub.DeliverResponse{Catchups: []*pubsub.Catchup{{UserId: "u1", Gate: 1}}})
		w.nodes["a:1"].kill()
		w.nodes["b:1"].kill()
		time.Sleep(time.Second)
		n = scripted(lasting...)
		w.start("a:1", n.fakeNode)
		time.Sleep(5 * time.Second)
		n.say(&pubsub.DeliverResponse{Catchups: []*pubsub.Catchup{{UserId: "u1", Gate: 1}}})
		w.set.Close()
		if len(r.askers) != 4 {
			t.Errorf("%d streams", len(r.askers))
		}
		for a, gone := range r.askers {
			if gone != 1 || a.Node() != "A" {
				t.Errorf("a stream of %s has gone %d times", a.Node(), gone)
			}
		}
	})
}

func TestWhatCannotBeAskedIsAViolation(t *testing.T) {
	long := string(make([]byte, 1000))
	for name, test := range map[string]struct {
		features []pubsub.Feature
		say      *pubsub.DeliverResponse
		strikes  uint64
	}{
		"by a node that has not offered replays": {nil, &pubsub.DeliverResponse{Catchups: []*pubsub.Catchup{{UserId: "u1", Gate: 1}, {UserId: "u2", Gate: 2}}}, 1},
		"for a gate that is open":                {lasting, &pubsub.DeliverResponse{Catchups: []*pubsub.Catchup{{UserId: "u1", Gate: 1}, {UserId: "u1", Gate: 1}}}, 1},
		"for gate 0":                             {lasting, &pubsub.DeliverResponse{Catchups: []*pubsub.Catchup{{UserId: "u1"}}, ReplayTaken: []*pubsub.ReplayTaken{{Seq: 1}}}, 2},
		"for nobody":                             {lasting, &pubsub.DeliverResponse{Catchups: []*pubsub.Catchup{{Gate: 1}}}, 1},
		"for what is no id":                      {lasting, &pubsub.DeliverResponse{Catchups: []*pubsub.Catchup{{UserId: "a\nb", Gate: 1}, {UserId: long, Gate: 2}}}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, n := &replayer{}, scripted(test.features...)
				w := scriptedWorld(t, Config{Replayer: r}, n)
				n.say(test.say)
				if got := w.set.meters.strikes.Get(); got != test.strikes {
					t.Errorf("%d strikes, want %d", got, test.strikes)
				}
				if n := len(r.heard()); n > 1 {
					t.Errorf("heard %q", r.heard())
				}
			})
		})
	}
}

// A node whose users all connect at once has an honest answer for each that is too much, and one that asks and does not
// listen is a nuisance.
func TestOpenGatesAreBounded(t *testing.T) {
	r := &replayer{}
	w := newWorld(t, Config{Replayer: r})
	l := newLink(w.set, newNode(w.set, Node{"A", "a:1"}), 0)
	s := newStream(l, nil, &pubsub.HelloReply{Features: lasting})
	gate := uint64(0)
	ask := func(n int) (strikes int) {
		s.r.resp.catchups = nil
		for range n {
			gate++
			s.r.resp.catchups = append(s.r.resp.catchups, catchup{user: "u1", gate: gate})
		}
		return s.replays()
	}
	if strikes := ask(gatesMax); strikes != 0 || len(r.heard()) != gatesMax {
		t.Errorf("%d strikes, %d were asked", strikes, len(r.heard()))
	}
	if strikes := ask(10); strikes != 0 || len(s.asker.ends) != 10 || s.asker.ends[0].reason != tooManyReplays || len(r.heard()) != gatesMax {
		t.Errorf("%d strikes, ends %+v", strikes, s.asker.ends)
	}
	for i := range gatesMax {
		s.asker.End(uint64(i+1), 1, "")
	}
	if strikes := ask(1000); strikes != 1000 || len(s.asker.open) != 0 || len(s.asker.ends) != gatesMax+10 {
		t.Errorf("%d strikes, %d gates, %d ends", strikes, len(s.asker.open), len(s.asker.ends))
	}
}
