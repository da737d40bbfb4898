package node

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

var everyFeature = []pubsub.Feature{
	pubsub.Feature_FEATURE_DEDUPE, pubsub.Feature_FEATURE_CLIENT_ACK, pubsub.Feature_FEATURE_EXPIRY,
	pubsub.Feature_FEATURE_COLLAPSE, pubsub.Feature_FEATURE_REPLAY,
}

// phone is a connection of a client, with a gateway's code around its Inbox.
type phone struct {
	user   string
	server *Server
	answer bool // it acknowledges whatever it gets at once

	mu   sync.Mutex
	desk *desk // Guarded by mu.
}

func (p *phone) Deliver(m *Message) Outcome { return p.DeliverLasting(m, nil) }

func (p *phone) DeliverLasting(m *Message, c *Confirmation) Outcome {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.desk.now = time.Now()
	out := p.desk.offer(m, c)
	p.flushLocked()
	return out
}

func (p *phone) Opened() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.desk.now = time.Now()
	p.desk.fill()
	p.flushLocked()
}

func (p *phone) flushLocked() {
	p.desk.write(len(p.desk.queue))
	for p.desk.inbox.Waiting() && len(p.desk.queue) > 0 {
		p.desk.write(len(p.desk.queue))
	}
	if p.answer && len(p.desk.wire) > 0 {
		p.ackLocked()
	}
}

func (p *phone) ackLocked() {
	n := uint64(0)
	for _, e := range p.desk.wire {
		n = max(n, e.Ack)
	}
	if err := p.desk.inbox.Ack(n); err != nil {
		panic(err)
	}
}

// ack acknowledges what was shown.
func (p *phone) ack() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ackLocked()
}

func (p *phone) shown() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.desk.shown()
}

func (p *phone) hangUp(users *Users[*phone]) {
	users.Remove(p.user, p)
	p.mu.Lock()
	p.desk.inbox.Close()
	gate := p.desk.inbox.Gate
	p.mu.Unlock()
	gate.Leave()
}

// call connects a client.
func call(s *Server, users *Users[*phone], user string, acks bool) *phone {
	p := &phone{user: user, server: s, desk: newDesk(acks)}
	p.desk.inbox.Gate = s.Gate(user, p, 32)
	users.Add(user, p)
	return p
}

type lastingBench struct {
	*bench

	users   *Users[*phone]
	metrics *metrics.Set
}

func serveLasting(t testing.TB, cfg Config, features ...pubsub.Feature) *lastingBench {
	t.Helper()
	if features == nil {
		features = everyFeature
	}
	users := NewLastingUsers[*phone](features...)
	cfg.Sessions, cfg.Metrics = users, metrics.NewSet()
	return &lastingBench{serve(t, cfg), users, cfg.Metrics}
}

func (b *lastingBench) call(user string, acks bool) *phone {
	return call(b.server, b.users, user, acks)
}

func (b *lastingBench) metric(t testing.TB, line string) {
	t.Helper()
	var out bytes.Buffer
	b.metrics.WritePrometheus(&out)
	if !strings.Contains(out.String(), line+"\n") {
		t.Errorf("no %q in\n%s", line, out.String())
	}
}

// lasting is a delivery with options.
func lasting(id string, user ...string) *pubsub.Delivery {
	return &pubsub.Delivery{Content: text(id), UserIds: user, MessageId: id, Sender: "caller", PayloadHash: 1}
}

func wantAck(d *pubsub.Delivery, timeout time.Duration) *pubsub.Delivery {
	d.WantAck, d.AckTimeoutMs = true, uint32(timeout.Milliseconds())
	return d
}

func wantFrame(t testing.TB, got, want *pubsub.DeliverResponse) {
	t.Helper()
	if !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func ack(first uint64, delivered ...uint32) *pubsub.AckRange {
	return &pubsub.AckRange{First: first, Delivered: delivered}
}

func TestFeaturesOfSessionsAreNamedInTheReplyToHello(t *testing.T) {
	b := serveLasting(t, Config{})
	want := append([]pubsub.Feature{pubsub.Feature_FEATURE_SCOPE}, everyFeature...)
	if got := b.mustOpen(t).reply.GetFeatures(); !slices.Equal(got, want) {
		t.Errorf("features %v, want %v", got, want)
	}
	if got := serve(t, Config{Sessions: NewUsers[*phone]()}).mustOpen(t).reply.GetFeatures(); !slices.Equal(got, want[:1]) {
		t.Errorf("of Sessions that take no part: %v", got)
	}
	if _, err := New(Config{NodeID: "n", Sessions: NewLastingUsers[*phone](pubsub.Feature(99))}); err == nil {
		t.Error("a feature that there is not is named")
	}
}

// TestANodeWithoutFeaturesIgnoresOptions: it answers byte for byte as if they were not there.
func TestANodeWithoutFeaturesIgnoresOptions(t *testing.T) {
	for name, sessions := range map[string]Sessions{"older sessions": newGateway(), "no features": NewUsers[*phone]()} {
		t.Run(name, func(t *testing.T) {
			b := serve(t, Config{Sessions: sessions})
			if users, ok := sessions.(*Users[*phone]); ok {
				users.Add("u", &phone{desk: newDesk(true)})
			}
			m := b.mustOpen(t)
			d := wantAck(lasting("a", "u"), time.Second)
			d.TtlMs, d.CollapseKey, d.Replay = 1, "k", &pubsub.ReplayPlace{Gate: 1, Seq: 1}
			for i := range uint64(2) {
				m.send(&pubsub.DeliverRequest{FirstSeq: m.next, Deliveries: []*pubsub.Delivery{d},
					Nudges: []*pubsub.Nudge{{UserId: "u", Token: 1}}, ReplayEnds: []*pubsub.ReplayEnd{{Gate: 1}}})
				m.next++
				wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{ack(i+1, 1)}})
			}
			m.send(&pubsub.DeliverRequest{Heartbeat: 1})
			if r := m.recv(); len(r.GetReceipts())+len(r.GetNudgesTaken())+len(r.GetCatchups()) > 0 || r.GetHeartbeat() != 1 {
				t.Errorf("got %v", r)
			}
		})
	}
}

func TestDuplicatesAndReusedIdsAreTold(t *testing.T) {
	b := serveLasting(t, Config{})
	p := b.call("u", false)
	m := b.mustOpen(t)
	reused := lasting("a", "u")
	reused.PayloadHash = 2
	other := lasting("a", "u")
	other.Sender = "somebody else"
	m.deliver(lasting("a", "u"), lasting("a", "u"), toUsers("plain", "u"), reused, other)
	got := m.recv()
	wantFrame(t, got, &pubsub.DeliverResponse{
		Acks:   []*pubsub.AckRange{{First: 1, Delivered: []uint32{1, 1, 1, 0, 1}, Duplicates: []uint32{0, 1, 0, 0, 0}}},
		Misses: []*pubsub.Miss{{Seq: 4, Reused: []string{"u"}}},
	})
	if got := p.shown(); !slices.Equal(got, []string{"a", "plain", "a"}) {
		t.Errorf("shown: %q", got)
	}
	// Whoever has nothing to say of them says it as ever.
	m.deliver(lasting("b", "u"))
	wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{ack(6, 1)}})
	b.metric(t, "connect_node_duplicate_users_total 1")
	b.metric(t, "connect_node_reused_users_total 1")
}

func TestAUserIsADuplicateIfNoConnectionTookIt(t *testing.T) {
	b := serveLasting(t, Config{})
	b.call("u", false)
	m := b.mustOpen(t)
	m.deliver(lasting("a", "u"))
	m.waitAck(1)
	late := b.call("u", false)
	m.deliver(lasting("a", "u"))
	wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{ack(2, 1)}})
	m.deliver(lasting("a", "u"))
	wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 3, Delivered: []uint32{1}, Duplicates: []uint32{1}}}})
	if got := late.shown(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("shown: %q", got)
	}
}

func TestABroadcastWithAnIdIsShownOnce(t *testing.T) {
	b := serveLasting(t, Config{})
	p := b.call("u", true)
	m := b.mustOpen(t)
	d := wantAck(&pubsub.Delivery{Content: text("a"), Everybody: true, MessageId: "a"}, time.Second)
	m.deliver(d, d)
	wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{ack(1, 1, 1)}, OnlineUsers: 1})
	if got := p.shown(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("shown: %q", got)
	}
}

func TestWhatHasExpiredIsNotHandedOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		p := b.call("u", false)
		st := b.take(t, p)
		d := lasting("a", "u", "v")
		d.TtlMs = 50
		st.came = time.Now().Add(-50 * time.Millisecond)
		data, err := d.MarshalVT()
		if err != nil {
			t.Fatal(err)
		}
		if err := st.deliver(data, 1); err != nil {
			t.Fatal(err)
		}
		if len(st.tally.misses) != 1 || !slices.Equal(st.tally.misses[0].GetFailed(), []string{"u", "v"}) || st.tally.misses[0].GetReason() != "expired" {
			t.Errorf("misses %v", st.tally.misses)
		}
		if len(p.shown()) > 0 {
			t.Error("shown")
		}
		st.came = time.Now().Add(-49 * time.Millisecond)
		if err := st.deliver(data, 1); err != nil {
			t.Fatal(err)
		}
		if got := p.shown(); !slices.Equal(got, []string{"a"}) {
			t.Errorf("shown: %q", got)
		}
	})
}

// take is a stream without a connection.
func (b *lastingBench) take(t testing.TB, _ *phone) *stream {
	t.Helper()
	return &stream{server: b.server, acks: newAcks(1<<20, b.server.online, &b.server.count), next: 1,
		aud: audiences{byID: map[uint32]*audience{}, maxMembers: 1000}}
}

// receipts reads frames with nothing but receipts until all of some seqs are final.
func (m *manager) receipts(seqs ...uint64) map[uint64]*pubsub.Receipt {
	m.t.Helper()
	sums := map[uint64]*pubsub.Receipt{}
	for final := 0; final < len(seqs); {
		for _, r := range m.recv().GetReceipts() {
			sum := sums[r.GetSeq()]
			if sum.GetFinal() {
				m.t.Errorf("seq %d: a receipt behind the final one", r.GetSeq())
			}
			if sum == nil {
				sum = &pubsub.Receipt{Seq: r.GetSeq()}
				sums[r.GetSeq()] = sum
			}
			sum.Acked += r.GetAcked()
			sum.Unacked = append(sum.Unacked, r.GetUnacked()...)
			if sum.Final = r.GetFinal(); sum.Final {
				final++
			}
		}
	}
	return sums
}

func TestReceiptsComeBehindTheirAcksGatheredFor50ms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		alice, bob := b.call("alice", true), b.call("bob", true)
		b.call("carol", false)
		m := b.mustOpen(t)
		m.deliver(wantAck(lasting("a", "alice", "bob", "carol", "dave"), 8*time.Second), wantAck(lasting("b", "alice"), 8*time.Second), lasting("c", "alice"))
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{
			Acks:   []*pubsub.AckRange{{First: 1, Delivered: []uint32{3, 1, 1}, Pending: []uint32{2, 1, 0}}},
			Misses: []*pubsub.Miss{{Seq: 1, NotHere: []string{"dave"}}},
		})
		synctest.Wait()
		b.metric(t, "connect_node_pending_users 3")
		began := time.Now()
		alice.ack()
		got := m.recv()
		slices.SortFunc(got.GetReceipts(), func(a, b *pubsub.Receipt) int { return int(a.GetSeq()) - int(b.GetSeq()) })
		wantFrame(t, got, &pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 1}, {Seq: 2, Acked: 1, Final: true}}})
		if took := time.Since(began); took != receiptDelay {
			t.Errorf("after %v", took)
		}
		bob.hangUp(b.users)
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Unacked: []string{"bob"}, Final: true}}})
		synctest.Wait()
		b.metric(t, "connect_node_pending_users 0")
		b.metric(t, `connect_node_receipts_total{result="acked"} 2`)
		b.metric(t, `connect_node_receipts_total{result="unacked"} 1`)
	})
}

func TestWhoDoesNotAcknowledgeInTimeIsGivenUpByName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		b.call("alice", true)
		bob := b.call("bob", true)
		bob.answer = true
		m := b.mustOpen(t)
		began := time.Now()
		m.deliver(wantAck(lasting("a", "alice", "bob"), 3*time.Second), wantAck(lasting("b", "alice"), 5*time.Second))
		m.waitAck(2)
		got := m.receipts(1, 2)
		if took := time.Since(began); took < 5*time.Second || took > 5*time.Second+50*time.Millisecond {
			t.Errorf("after %v", took)
		}
		for seq, want := range map[uint64]*pubsub.Receipt{
			1: {Seq: 1, Acked: 1, Unacked: []string{"alice"}, Final: true},
			2: {Seq: 2, Unacked: []string{"alice"}, Final: true},
		} {
			if !proto.Equal(got[seq], want) {
				t.Errorf("got %v, want %v", got[seq], want)
			}
		}
	})
}

func TestOneConnectionOfSeveralIsEnough(t *testing.T) {
	for name, c := range map[string]struct {
		acks    []bool // of the connections
		do      func(users *Users[*phone], ps []*phone)
		pending []uint32
		want    *pubsub.Receipt
	}{
		"one acknowledges": {[]bool{true, true}, func(_ *Users[*phone], ps []*phone) { ps[1].ack() },
			[]uint32{1}, &pubsub.Receipt{Seq: 1, Acked: 1, Final: true}},
		"one is gone, the other acknowledges": {[]bool{true, true}, func(users *Users[*phone], ps []*phone) { ps[0].hangUp(users); ps[1].ack() },
			[]uint32{1}, &pubsub.Receipt{Seq: 1, Acked: 1, Final: true}},
		"both acknowledge": {[]bool{true, true}, func(_ *Users[*phone], ps []*phone) { ps[0].ack(); ps[1].ack() },
			[]uint32{1}, &pubsub.Receipt{Seq: 1, Acked: 1, Final: true}},
		"both are gone": {[]bool{true, true}, func(users *Users[*phone], ps []*phone) { ps[0].hangUp(users); ps[1].hangUp(users) },
			[]uint32{1}, &pubsub.Receipt{Seq: 1, Unacked: []string{"u"}, Final: true}},
		"one cannot": {[]bool{true, false}, func(users *Users[*phone], ps []*phone) { ps[0].hangUp(users) }, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := serveLasting(t, Config{})
				var ps []*phone
				for _, acks := range c.acks {
					ps = append(ps, b.call("u", acks))
				}
				m := b.mustOpen(t)
				m.deliver(wantAck(lasting("a", "u"), 10*time.Second))
				wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1}, Pending: c.pending}}})
				c.do(b.users, ps)
				if c.want != nil {
					wantFrame(t, m.recv(), &pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{c.want}})
				}
				time.Sleep(15 * time.Second)
				m.send(&pubsub.DeliverRequest{Heartbeat: 1})
				if r := m.recv(); len(r.GetReceipts()) > 0 || r.GetHeartbeat() != 1 {
					t.Errorf("afterwards: %v", r)
				}
			})
		})
	}
}

func TestAnAckBeforeTheHandingOverIsDoneCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		b.call("u", true).answer = true
		m := b.mustOpen(t)
		m.deliver(wantAck(lasting("a", "u"), time.Minute))
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1}, Pending: []uint32{1}}}})
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 1, Final: true}}})
	})
}

func TestANodeThatDrainsGivesUpAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		b.call("u", true)
		m := b.mustOpen(t)
		m.deliver(wantAck(lasting("a", "u"), time.Minute))
		m.waitAck(1)
		began := time.Now()
		var drained sync.WaitGroup
		drained.Go(func() { _ = b.server.Drain(t.Context()) })
		got := m.receipts(1)[1]
		if took := time.Since(began); took > 0 || !slices.Equal(got.GetUnacked(), []string{"u"}) {
			t.Errorf("after %v: %v", took, got)
		}
		m.send(&pubsub.DeliverRequest{Drain: true})
		_ = m.wantEnd(codes.OK)
		drained.Wait()
	})
}

func TestWhatIsHandedOverWhileTheNodeBeginsToDrainIsGivenUp(t *testing.T) {
	b := serveLasting(t, Config{})
	st := b.take(t, nil)
	st.acks.drain()
	a := st.acks.receipts.await(1, time.Now().Add(time.Minute), 1)
	a.settle(a.confirmation("u"), Pending)
	a.handedOver()
	if got := st.acks.receipts.take(nil, 2, time.Now()); len(got) != 1 || !got[0].GetFinal() || len(got[0].GetUnacked()) != 1 {
		t.Errorf("%v", got)
	}
}

func TestAManagerThatGoesHearsWhatClientsHaveSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		b.call("u", true).answer = true
		m := b.mustOpen(t)
		m.send(&pubsub.DeliverRequest{FirstSeq: 1, Deliveries: []*pubsub.Delivery{wantAck(lasting("a", "u"), time.Minute)}, Drain: true})
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: 1, Delivered: []uint32{1}, Pending: []uint32{1}}}})
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{Receipts: []*pubsub.Receipt{{Seq: 1, Acked: 1, Final: true}}})
		_ = m.wantEnd(codes.OK)
	})
}

func TestAStreamThatEndsForgetsItsReceipts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		p := b.call("u", true)
		hello := &pubsub.Hello{ProtocolVersion: 1, InstanceId: "i"}
		old, err := b.open(t, hello)
		if err != nil {
			t.Fatal(err)
		}
		old.deliver(wantAck(lasting("a", "u"), time.Minute))
		old.waitAck(1)
		synctest.Wait()
		b.metric(t, "connect_node_pending_users 1")
		young, err := b.open(t, hello)
		if err != nil {
			t.Fatal(err)
		}
		_ = old.wantEnd(codes.Aborted)
		synctest.Wait()
		b.metric(t, "connect_node_pending_users 0")
		p.ack()
		time.Sleep(time.Second)
		young.send(&pubsub.DeliverRequest{Heartbeat: 1})
		wantFrame(t, young.recv(), &pubsub.DeliverResponse{Heartbeat: 1, OnlineUsers: 1})
	})
}

func TestReceiptsOfManyUsersAreSplitIntoFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		var users []string
		var phones []*phone
		for i := range 3000 {
			users = append(users, fmt.Sprintf("user-%0100d", i))
			phones = append(phones, b.call(users[i], true))
		}
		m := b.mustOpen(t)
		m.deliver(wantAck(lasting("a", users...), time.Minute))
		m.waitAck(1)
		for _, p := range phones {
			p.hangUp(b.users)
		}
		if got := m.receipts(1)[1]; len(got.GetUnacked()) != len(users) {
			t.Errorf("%d unacked", len(got.GetUnacked()))
		}
	})
}

func TestDeliveriesThatWaitForClientsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{MaxUnacked: 2})
		b.call("u", true)
		m := b.mustOpen(t)
		for i := range uint64(3) {
			m.deliver(wantAck(lasting(fmt.Sprint(i), "u"), time.Minute))
			r := m.recv()
			if i < 2 {
				wantFrame(t, r, &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: i + 1, Delivered: []uint32{1}, Pending: []uint32{1}}}})
			} else {
				wantFrame(t, r, &pubsub.DeliverResponse{Acks: []*pubsub.AckRange{ack(3, 0)}, Misses: []*pubsub.Miss{{Seq: 3, Failed: []string{"u"}, Reason: reasonTooMany}}})
			}
		}
	})
}

func TestAPanicAmidAMessageThatWantsAcksFailsTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := serveLasting(t, Config{})
		b.call("a", true)
		b.call("b", true).desk = nil
		b.call("c", true)
		m := b.mustOpen(t)
		m.deliver(wantAck(lasting("x", "a", "b", "c"), time.Second))
		wantFrame(t, m.recv(), &pubsub.DeliverResponse{
			Acks:   []*pubsub.AckRange{{First: 1, Delivered: []uint32{1}, Pending: []uint32{1}}},
			Misses: []*pubsub.Miss{{Seq: 1, Failed: []string{"b", "c"}, Reason: reasonPanic}},
		})
		if got := m.receipts(1)[1]; !slices.Equal(got.GetUnacked(), []string{"a"}) {
			t.Errorf("%v", got)
		}
	})
}
