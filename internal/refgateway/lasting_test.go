package refgateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"google.golang.org/grpc"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// manager is a Push-Manager on one stream that does what a test says.
type manager struct {
	t      testing.TB
	stream grpc.BidiStreamingClient[pubsub.DeliverRequest, pubsub.DeliverResponse]
	reply  *pubsub.HelloReply

	sending sync.Mutex // one Send at a time

	mu sync.Mutex
	// Guarded by mu.
	next     uint64
	acks     map[uint64]ack
	receipts map[uint64]receipt
	misses   map[uint64]*pubsub.Miss
	catchups []*pubsub.Catchup
	taken    map[uint64]uint64 // by gate
	follows  []*pubsub.LogFollow
	reads    []*pubsub.LogRead
	log      *roomLog // nil: the test answers what is read
}

type ack struct{ delivered, duplicates, pending uint32 }

type receipt struct {
	acked   uint32
	unacked int
	final   bool
}

// manage opens a stream of a manager, which may replay.
func manage(t testing.TB, n pubsub.ConnectNodeServiceClient, name string, features ...pubsub.Feature) *manager {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := n.Deliver(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{
		t: t, stream: stream, next: 1, acks: map[uint64]ack{}, receipts: map[uint64]receipt{},
		misses: map[uint64]*pubsub.Miss{}, taken: map[uint64]uint64{},
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	m.send(&pubsub.DeliverRequest{Hello: &pubsub.Hello{ProtocolVersion: 1, ManagerId: name, InstanceId: name, Shards: 1, Features: features}})
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	m.reply = first.GetHello()
	wg.Go(m.read)
	return m
}

func (m *manager) send(r *pubsub.DeliverRequest) {
	m.t.Helper()
	m.sending.Lock()
	defer m.sending.Unlock()
	if err := m.stream.Send(r); err != nil {
		m.t.Fatal(err)
	}
}

func (m *manager) read() {
	for {
		r, err := m.stream.Recv()
		if err != nil {
			return
		}
		m.mu.Lock()
		for _, a := range r.GetAcks() {
			for i, n := range a.GetDelivered() {
				of := ack{delivered: n}
				if i < len(a.GetDuplicates()) {
					of.duplicates = a.GetDuplicates()[i]
				}
				if i < len(a.GetPending()) {
					of.pending = a.GetPending()[i]
				}
				m.acks[a.GetFirst()+uint64(i)] = of
			}
		}
		for _, miss := range r.GetMisses() {
			m.misses[miss.GetSeq()] = miss
		}
		for _, got := range r.GetReceipts() {
			of := m.receipts[got.GetSeq()]
			m.receipts[got.GetSeq()] = receipt{of.acked + got.GetAcked(), of.unacked + len(got.GetUnacked()), of.final || got.GetFinal()}
		}
		m.catchups = append(m.catchups, r.GetCatchups()...)
		m.reads = append(m.reads, r.GetLogReads()...)
		if r.GetLogFollow() != nil {
			m.follows = append(m.follows, r.GetLogFollow())
		}
		log := m.log
		for _, taken := range r.GetReplayTaken() {
			m.taken[taken.GetGate()] = taken.GetSeq()
		}
		m.mu.Unlock()
		for _, read := range r.GetLogReads() {
			if log != nil {
				m.sending.Lock()
				_ = m.stream.Send(&pubsub.DeliverRequest{LogPages: []*pubsub.LogPage{log.page(read)}}) // the next Recv says why not
				m.sending.Unlock()
			}
		}
	}
}

// deliver sends deliveries in one frame, and returns the seq of the first.
func (m *manager) deliver(ds ...*pubsub.Delivery) uint64 {
	m.t.Helper()
	m.mu.Lock()
	first := m.next
	m.next += uint64(len(ds))
	m.mu.Unlock()
	m.send(&pubsub.DeliverRequest{FirstSeq: first, Deliveries: ds})
	return first
}

// ackOf waits for what the node says of a delivery at once.
func (m *manager) ackOf(seq uint64) (got ack) {
	m.t.Helper()
	eventually(m.t, "it is acked", func() (ok bool) {
		m.mu.Lock()
		defer m.mu.Unlock()
		got, ok = m.acks[seq]
		return ok
	})
	return got
}

// wantAck demands what the node says of a delivery at once.
func (m *manager) wantAck(seq uint64, want ack) *pubsub.Miss {
	m.t.Helper()
	got := m.ackOf(seq)
	m.mu.Lock()
	miss := m.misses[seq]
	m.mu.Unlock()
	if got != want {
		m.t.Fatalf("delivery %d: %+v %v, want %+v", seq, got, miss, want)
	}
	return miss
}

// wantReceipt demands what comes of a delivery in the end.
func (m *manager) wantReceipt(seq uint64, want receipt) {
	m.t.Helper()
	want.final = true
	var got receipt
	eventually(m.t, "there is a final receipt", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		got = m.receipts[seq]
		return got.final
	})
	if got != want {
		m.t.Fatalf("delivery %d: %+v, want %+v", seq, got, want)
	}
}

// catchup waits for the n-th question for what is stored.
func (m *manager) catchup(n int) *pubsub.Catchup {
	m.t.Helper()
	var got *pubsub.Catchup
	eventually(m.t, "the node asks for what is stored", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.catchups) >= n {
			got = m.catchups[n-1]
		}
		return got != nil
	})
	return got
}

func (m *manager) wantTaken(gate, seq uint64) {
	m.t.Helper()
	eventually(m.t, fmt.Sprintf("what was stored is taken up to %d", seq), func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.taken[gate] == seq
	})
}

// to is a delivery to users, with an id of its own if id is not empty.
func to(id, text string, users ...string) *pubsub.Delivery {
	return &pubsub.Delivery{
		UserIds: users, Content: &pubsub.MessageContent{Data: []byte(text), Timestamp: 1},
		MessageId: id, PayloadHash: crc32.ChecksumIEEE([]byte(text)), Sender: "tests",
	}
}

// asking is a delivery whose clients are to acknowledge.
func asking(id, text string, users ...string) *pubsub.Delivery {
	d := to(id, text, users...)
	d.WantAck, d.AckTimeoutMs = true, uint32(patience.Milliseconds())
	return d
}

func stored(gate, seq uint64, id, text, user string) *pubsub.Delivery {
	d := to(id, text, user)
	d.Replay = &pubsub.ReplayPlace{Gate: gate, Seq: seq, After: seq - 1}
	return d
}

// marked is textFrame for a client that acknowledges.
func marked(user, text, marks string) string {
	return strings.TrimSuffix(textFrame("", user, text), "}") + marks + "}"
}

// acker connects a client with ack=1.
func acker(t testing.TB, g *Gateway, user string) *device {
	t.Helper()
	d, _, err := dialQuery(g, "ack=1&user_id="+user, nil)
	if err != nil {
		t.Fatal(err)
	}
	d.listen(t)
	return d
}

// ready demands the first word.
func (d *device) ready(user string) *device {
	d.t.Helper()
	d.want(fmt.Sprintf(`{"type":"ready","user_id":%q,"node_id":"node-1"}`, user))
	return d
}

const anHour = `{"type":"ack","ack":3600}`

// TestClientsWithAckGetMoreAndOthersTheOldBytes: whatever options a push has. These are the lines of docs/client-protocol.md.
func TestClientsWithAckGetMoreAndOthersTheOldBytes(t *testing.T) {
	g, n := start(t, newController(t), nil)
	old, with := connect(t, g, "u", ""), acker(t, g, "u").ready("u")
	m := manage(t, n, "pm")
	if !slices.Contains(m.reply.GetFeatures(), pubsub.Feature_FEATURE_CLIENT_ACK) || len(m.reply.GetFeatures()) != 10 {
		t.Errorf("the node does %v", m.reply.GetFeatures())
	}
	long := strings.Repeat("x", 3*copyBytes)
	for _, test := range []struct {
		d     *pubsub.Delivery
		text  string
		marks string
	}{
		{to("", "Hello", "u"), "Hello", ``},
		{to("m-1", "Hello", "u"), "Hello", `,"id":"m-1"`},
		{asking("m-2", "Hello", "u"), "Hello", `,"id":"m-2","ack":1`},
		{asking("", "Hello", "u"), "Hello", `,"ack":2`},
		{asking("a\"\\ü", long, "u"), long, `,"id":"a\"\\ü","ack":3`},
		{to("m-4", long, "u"), long, `,"id":"m-4"`},
		{to("", long, "u"), long, ``},
	} {
		m.deliver(test.d)
		old.want(textFrame("", "u", test.text))
		with.want(marked("u", test.text, test.marks))
	}
	everybody := to("m-5", "all")
	everybody.Everybody = true
	m.deliver(everybody)
	old.want(broadcastFrame("u", "all"))
	with.want(strings.TrimSuffix(broadcastFrame("u", "all"), "}") + `,"id":"m-5"}`)
	old.wantNothing()
	with.wantNothing()
	page, err := os.ReadFile("../../docs/client-protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, marks := range []string{`,"id":"m-1"`, `,"id":"m-2","ack":17`, `,"id":"m-0","ack":18,"replayed":true`} {
		if line := "< " + marked("u", "Hello", marks) + "\n"; !bytes.Contains(page, []byte(line)) {
			t.Errorf("the page does not have %s", line)
		}
	}
}

func TestAckIsOneNumberForAllBeforeIt(t *testing.T) {
	g, n := start(t, newController(t), nil)
	d, m := acker(t, g, "u").ready("u"), manage(t, n, "pm")
	first := m.deliver(asking("1", "1", "u"), asking("2", "2", "u"), to("3", "3", "u"), asking("4", "4", "u"), asking("5", "5", "u"))
	for i, marks := range []string{`,"id":"1","ack":1`, `,"id":"2","ack":2`, `,"id":"3"`, `,"id":"4","ack":3`, `,"id":"5","ack":4`} {
		d.want(marked("u", fmt.Sprint(i+1), marks))
	}
	for i, pending := range []uint32{1, 1, 0, 1, 1} {
		m.wantAck(first+uint64(i), ack{delivered: 1, pending: pending})
	}
	d.say(`{"type":"ack","ack":3}`)
	for _, seq := range []uint64{first, first + 1, first + 3} {
		m.wantReceipt(seq, receipt{acked: 1})
	}
	d.say(`{"type":"ack","ack":3}`)       // again is no error
	d.say(` { "ack" : 4, "type":"ack" }`) // nor is another way to write it
	m.wantReceipt(first+4, receipt{acked: 1})
	d.wantNothing()
	if waiting := g.waiting.Load(); waiting != 0 {
		t.Errorf("%d frames still wait", waiting)
	}
	if acks, acked := g.count.acks.Get(), g.count.acked.Get(); acks != 3 || acked != 4 {
		t.Errorf("%d acknowledgements of %d pushes are counted", acks, acked)
	}
}

// TestHostileAcksChangeNothing: they are errors like other bad messages.
func TestHostileAcksChangeNothing(t *testing.T) {
	g, n := start(t, newController(t), nil)
	d, m := acker(t, g, "u").ready("u"), manage(t, n, "pm")
	seq := m.deliver(asking("1", "1", "u"))
	d.want(marked("u", "1", `,"id":"1","ack":1`))
	for _, number := range []string{
		`2`, `18446744073709551615`, `18446744073709551616`, `99999999999999999999999999`, `0`, `-1`, `1.5`, `1e0`, `"1"`, `null`, `true`, `[1]`, `{}`,
	} {
		d.say(`{"type":"ack","ack":` + number + `}`)
		d.wantError("ack")
	}
	d.say(`{"type":"ack"}`)
	d.wantError("ack")
	d.say(`{"type":"ack","ack":01}`)
	d.wantError("message")
	d.say(`{"type":"acks","ack":1}`)
	d.want(`{"type":"error","message":"type: must be join, leave, refresh, ping or ack"}`)
	m.mu.Lock()
	if len(m.receipts) > 0 {
		t.Errorf("confirmed: %v", m.receipts)
	}
	m.mu.Unlock()
	d.say(`{"type":"ack","ack":1}`)
	m.wantReceipt(seq, receipt{acked: 1})

	old := connect(t, g, "old", "")
	old.say(`{"type":"ack","ack":1}`)
	old.want(`{"type":"error","message":"type: must be join, leave, refresh or ping"}`)
	old.say(`{"type":"ping","ack":"what"}`)
	old.want(`{"type":"pong"}`)
	for query, field := range map[string]string{"user_id=u&ack=2": "ack: must be 1", "user_id=u&ack=true": "ack: must be 1", "user_id=u&ack=1&ack=1": "ack: given 2 times"} {
		if got := get(t, "http://"+g.HTTPAddr().String()+"/ws?"+query); !strings.Contains(got, field) {
			t.Errorf("%s: %s", query, got)
		}
	}
	if _, _, err := dialQuery(g, "user_id=v&ack=0&later=token", nil); err != nil {
		t.Error(err)
	}
}

func FuzzAck(f *testing.F) {
	for _, s := range []string{`{"type":"ack","ack":18}`, `{"type":"ack","ack":01}`, `{"type":"ack","ack":}`, `{"type":"ack","ack":9999999999999999999}`, `{"type":"ack","ack":1}}`, ``} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		number, ok := ackOf(b)
		if !ok {
			return
		}
		var m struct {
			Type string
			Ack  uint64
		}
		if err := json.Unmarshal(b, &m); err != nil || m.Type != "ack" || m.Ack != number {
			t.Errorf("%s: %d, %+v, %v", b, number, m, err)
		}
	})
}

func BenchmarkAckOf(b *testing.B) {
	text := []byte(anHour)
	for b.Loop() {
		if n, ok := ackOf(text); !ok || n != 3600 {
			b.Fatal(n)
		}
	}
}

// TestAcksAreNotPaced: a client that acknowledges each push has as many frames as it gets.
func TestAcksAreNotPaced(t *testing.T) {
	g, n := start(t, newController(t), func(c *Config) { c.Members.MaxRooms, c.MessageRate = 1, 10 })
	d, m := acker(t, g, "u").ready("u"), manage(t, n, "pm")
	for i := 1; i <= 60; i++ {
		seq := m.deliver(asking(fmt.Sprint(i), "x", "u"))
		d.want(marked("u", "x", fmt.Sprintf(`,"id":"%d","ack":%d`, i, i)))
		d.say(fmt.Sprintf(`{"type":"ack","ack":%d}`, i))
		m.wantReceipt(seq, receipt{acked: 1})
	}
	if paced := g.count.paced.Get(); paced != 0 {
		t.Errorf("%d acknowledgements were read later", paced)
	}
	for range 40 {
		d.say(`{"type":"ack","ack":60}`) // confirms nothing
	}
	eventually(t, "those that confirm nothing are paced", func() bool { return g.count.paced.Get() > 0 })
}

// TestMessageReachesAConnectionOnceThroughTwoManagers, whether or not it acknowledges.
func TestMessageReachesAConnectionOnceThroughTwoManagers(t *testing.T) {
	g, n := start(t, newController(t), nil)
	old, with := connect(t, g, "old", ""), acker(t, g, "with").ready("with")
	one, two := manage(t, n, "pm-1"), manage(t, n, "pm-2")
	one.wantAck(one.deliver(to("m", "x", "old")), ack{delivered: 1})
	two.wantAck(two.deliver(to("m", "x", "old")), ack{delivered: 1, duplicates: 1})
	old.want(textFrame("", "old", "x"))
	old.wantNothing()

	first := one.deliver(asking("m", "x", "with"))
	one.wantAck(first, ack{delivered: 1, pending: 1})
	second := two.deliver(asking("m", "x", "with"))
	two.wantAck(second, ack{delivered: 1, pending: 1}) // until the client has said so
	with.want(marked("with", "x", `,"id":"m","ack":1`))
	with.wantNothing()
	with.say(`{"type":"ack","ack":1}`)
	one.wantReceipt(first, receipt{acked: 1})
	two.wantReceipt(second, receipt{acked: 1})
	two.wantAck(two.deliver(asking("m", "x", "with")), ack{delivered: 1, duplicates: 1})

	other := two.deliver(to("m", "another content", "old"))
	if miss := two.wantAck(other, ack{}); !slices.Equal(miss.GetReused(), []string{"old"}) {
		t.Errorf("an id that is used again: %v", miss)
	}
	stranger := to("m", "another content", "old")
	stranger.Sender = "somebody else"
	two.wantAck(two.deliver(stranger), ack{delivered: 1})
	old.want(textFrame("", "old", "another content"))
	old.wantNothing()
	if got := g.count.duplicates.Get(); got != 2 {
		t.Errorf("%d duplicates are counted", got)
	}
}

// TestHalfOpenClientIsCutOff: it takes what is sent, and says nothing. So does one whose machine is gone.
func TestHalfOpenClientIsCutOff(t *testing.T) {
	g, n := start(t, newController(t), nil)
	gone := shake(t, g, "ack=1&user_id=gone", "", "")
	lives := acker(t, g, "lives").ready("lives")
	eventually(t, "it is known", func() bool { return len(g.users.Of("gone")) == 1 })
	m := manage(t, n, "pm")
	d := asking("m", "x", "gone", "lives")
	d.AckTimeoutMs = 400
	seq := m.deliver(d)
	m.wantAck(seq, ack{delivered: 2, pending: 2})
	m.wantReceipt(seq, receipt{unacked: 2})
	lives.want(marked("lives", "x", `,"id":"m","ack":1`))
	lives.want(marked("lives", "x", `,"id":"m","ack":1,"replayed":true`)) // once more, to whoever failed with it
	eventually(t, "the half-open client is cut off", func() bool { return g.users.Connections() == 1 })
	lives.wantNothing() // whoever answers pings stays
	eventually(t, "it is counted", func() bool { return g.count.unanswered.Get() == 1 })
	if _, frames := gone.untilClose(t); frames < 3 { // ready, the push, the ping
		t.Errorf("the half-open client was sent %d frames", frames)
	}
	// What was given up is not remembered: a later try is shown.
	again := m.deliver(asking("m", "x", "lives"))
	lives.want(marked("lives", "x", `,"id":"m","ack":2`))
	lives.say(`{"type":"ack","ack":2}`)
	m.wantReceipt(again, receipt{acked: 1})
}

// TestWhatIsUnacknowledgedIsGivenUpAtTheEnd of a connection, at once.
func TestWhatIsUnacknowledgedIsGivenUpAtTheEnd(t *testing.T) {
	for name, end := range map[string]func(*Gateway, *device){
		"the client closes":   func(_ *Gateway, d *device) { _ = d.ws.WriteClose(1000, nil) },
		"the connection ends": func(_ *Gateway, d *device) { _ = d.ws.NetConn().Close() },
		"it is cut off":       func(g *Gateway, _ *device) { g.users.Of("u")[0].bye(closeSlow, true) },
		"the node drains": func(g *Gateway, _ *device) {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			var wg sync.WaitGroup
			wg.Go(func() { _ = g.Drain(ctx) }) // which waits for the manager, that does not end its stream
			t.Cleanup(func() {
				cancel()
				wg.Wait()
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			g, n := start(t, newController(t), nil)
			d, m := acker(t, g, "u").ready("u"), manage(t, n, "pm")
			seq := m.deliver(asking("m", "x", "u"))
			d.want(marked("u", "x", `,"id":"m","ack":1`))
			began := time.Now()
			end(g, d)
			m.wantReceipt(seq, receipt{unacked: 1})
			if took := time.Since(began); took > patience/4 {
				t.Errorf("after %v", took)
			}
		})
	}
}

// TestUnacknowledgedPushesAreBounded: what goes beyond is not taken, and the client stays.
func TestUnacknowledgedPushesAreBounded(t *testing.T) {
	g, n := start(t, newController(t), nil)
	d, m := acker(t, g, "u").ready("u"), manage(t, n, "pm")
	for i := 1; i <= node.UnackedFrames; i++ {
		m.deliver(asking(fmt.Sprint(i), "x", "u"))
		d.want(marked("u", "x", fmt.Sprintf(`,"id":"%d","ack":%d`, i, i)))
	}
	if miss := m.wantAck(m.deliver(asking("more", "x", "u")), ack{}); !slices.Equal(miss.GetFailed(), []string{"u"}) || !strings.Contains(miss.GetReason(), "acknowledge") {
		t.Errorf("beyond the bound: %v", miss)
	}
	m.wantAck(m.deliver(to("", "needs none", "u")), ack{delivered: 1})
	d.want(textFrame("", "u", "needs none"))
	d.say(fmt.Sprintf(`{"type":"ack","ack":%d}`, node.UnackedFrames))
	m.wantReceipt(1, receipt{acked: 1})
	m.wantAck(m.deliver(asking("more", "x", "u")), ack{delivered: 1, pending: 1})
	if got := g.count.stalled.Get(); got != 1 {
		t.Errorf("%d stalled pushes are counted", got)
	}
}

// TestUnacknowledgedPushesTogetherAreBounded: those who acknowledge are served, the others get no more, and nobody is cut off.
func TestUnacknowledgedPushesTogetherAreBounded(t *testing.T) {
	const bound, size = 1 << 20, 64 << 10
	g, n := start(t, newController(t), func(c *Config) { c.QueueTotalBytes = bound })
	m := manage(t, n, "pm")
	for i := range 10 {
		acker(t, g, fmt.Sprint("mute-", i)).ready(fmt.Sprint("mute-", i))
	}
	text := strings.Repeat("x", size)
	for round := range 3 {
		for i := range 10 {
			m.deliver(asking(fmt.Sprint(round), text+fmt.Sprint(i), fmt.Sprint("mute-", i))) // another frame for each
		}
	}
	eventually(t, "they get no more", func() bool { return g.count.stalled.Get() > 10 })
	if kept := g.kept.Load(); kept < bound/2 || kept > bound/2+3*size {
		t.Errorf("%d bytes are kept, the bound is half of %d for those who leave something", kept, bound)
	}
	well := acker(t, g, "well").ready("well")
	for i := 1; i <= 3; i++ {
		seq := m.deliver(asking(fmt.Sprint(i), "y", "well"))
		well.want(marked("well", "y", fmt.Sprintf(`,"id":"%d","ack":%d`, i, i)))
		well.say(fmt.Sprintf(`{"type":"ack","ack":%d}`, i))
		m.wantReceipt(seq, receipt{acked: 1})
	}
	if g.users.Connections() != 11 || g.count.crowded.Get() != 0 {
		t.Error("somebody was cut off")
	}
}

// TestWhatWasStoredComesFirst: in order, before what was pushed meanwhile; also to a client that cannot acknowledge, whose
// connection's taking counts then.
func TestWhatWasStoredComesFirst(t *testing.T) {
	const pages, page = 3, 20
	for name, acks := range map[string]bool{"acknowledges": true, "does not": false} {
		t.Run(name, func(t *testing.T) {
			c := newController(t)
			g, n := start(t, c, func(c *Config) { c.QueueFrames = 64 })
			m := manage(t, n, "pm", pubsub.Feature_FEATURE_REPLAY)
			query, frame := "user_id=u", func(text, _ string) string { return textFrame("", "u", text) }
			if acks {
				query, frame = query+"&ack=1", func(text, marks string) string { return marked("u", text, marks) }
			}
			d, _, err := dialQuery(g, query, nil)
			if err != nil {
				t.Fatal(err)
			}
			d.t = t
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(d.ws.ReadLoop)
			defer d.ws.NetConn().Close()
			asked := m.catchup(1)
			if asked.GetUserId() != "u" || asked.GetWindow() == 0 || asked.GetWindow() > 64 || !c.has("u", "@node:node-1") {
				t.Errorf("asked for %v", asked)
			}
			d.ready("u")
			direct := m.deliver(to("", "direct 1", "u"), to("d-2", "direct 2", "u"))
			m.wantAck(direct+1, ack{delivered: 1})
			d.wantNothing() // they wait
			seq := uint64(0)
			for range pages {
				for range page {
					seq++
					m.deliver(stored(asked.GetGate(), seq, fmt.Sprint("s-", seq), fmt.Sprint("stored ", seq), "u"))
					d.want(frame(fmt.Sprint("stored ", seq), fmt.Sprintf(`,"id":"s-%d","ack":%d,"replayed":true`, seq, seq)))
				}
				if acks {
					d.say(fmt.Sprintf(`{"type":"ack","ack":%d}`, seq))
				}
				m.wantTaken(asked.GetGate(), seq)
			}
			d.wantNothing()
			m.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: asked.GetGate(), Seq: seq}}})
			d.want(textFrame("", "u", "direct 1"))
			d.want(frame("direct 2", `,"id":"d-2"`))
			m.wantAck(m.deliver(to("", "direct 3", "u")), ack{delivered: 1})
			d.want(textFrame("", "u", "direct 3"))
			if held, replayed := g.count.held.Get(), g.count.replayed.Get(); held != 2 || replayed != pages*page {
				t.Errorf("%d held, %d replayed are counted", held, replayed)
			}
		})
	}
}

// TestStoredPushesDoNotCutAClientOff: what its queue has no room for stays in the store, and is asked for again.
func TestStoredPushesDoNotCutAClientOff(t *testing.T) {
	g, n := start(t, newController(t), func(c *Config) { c.QueueFrames, c.SocketBuffer = 16, 4<<10 })
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_REPLAY)
	c := deaf(t, g, "u")
	asked := m.catchup(1)
	text := strings.Repeat("x", 128<<10)
	const all = 40
	seq := uint64(1)
	for ; seq <= all; seq++ {
		first := m.deliver(stored(asked.GetGate(), seq, fmt.Sprint("s-", seq), text+fmt.Sprint(seq), "u"))
		if m.ackOf(first).delivered == 0 {
			break
		}
	}
	if seq > all || g.users.Connections() != 1 || g.count.slow.Get() != 0 {
		t.Fatalf("of a client that does not read: %d taken, %d connections, %d cut off", seq-1, g.users.Connections(), g.count.slow.Get())
	}
	go func() { _, _ = io.Copy(io.Discard, c.br) }()
	m.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: asked.GetGate(), Error: "not taken"}}})
	eventually(t, "it has read what waited", func() bool { return g.writers.Load() == 0 })
	for n, taken := 2, false; !taken; n++ { // the node asks again and again
		rest := stored(m.catchup(n).GetGate(), seq, fmt.Sprint("s-", seq), text, "u")
		rest.Replay.After = 0
		taken = m.ackOf(m.deliver(rest)).delivered == 1
	}
	_ = c.Close()
}

// TestNothingIsHeldWithoutAStore: no manager can replay.
func TestNothingIsHeldWithoutAStore(t *testing.T) {
	c := newController(t)
	g, n := start(t, c, nil)
	m := manage(t, n, "pm")
	c.stop() // it never knows of the connection
	d := acker(t, g, "u")
	eventually(t, "it is connected", func() bool { return g.users.Connections() == 1 })
	m.wantAck(m.deliver(to("", "x", "u")), ack{delivered: 1})
	d.want(textFrame("", "u", "x"))
	if held := g.count.held.Get(); held != 0 {
		t.Errorf("%d pushes were held", held)
	}
}

// TestHeldPushOfARoomIsNotShownAfterLeft.
func TestHeldPushOfARoomIsNotShownAfterLeft(t *testing.T) {
	g, n := start(t, newController(t), nil)
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_REPLAY)
	d := acker(t, g, "u").ready("u")
	d.say(`{"type":"join","room_id":"r"}`)
	d.want(`{"type":"joined","room_id":"r"}`)
	asked := m.catchup(1)
	push := to("1", "to the room", "u")
	push.RoomId = "r"
	m.wantAck(m.deliver(push, to("2", "to the user", "u"))+1, ack{delivered: 1})
	d.say(`{"type":"leave","room_id":"r"}`)
	d.want(`{"type":"left","room_id":"r"}`)
	m.send(&pubsub.DeliverRequest{ReplayEnds: []*pubsub.ReplayEnd{{Gate: asked.GetGate()}}})
	d.want(marked("u", "to the user", `,"id":"2"`))
	d.wantNothing()
}

// TestHeldPushIsShownWhenTheNodeDrains: it was answered as delivered.
func TestHeldPushIsShownWhenTheNodeDrains(t *testing.T) {
	g, n := start(t, newController(t), nil)
	m := manage(t, n, "pm", pubsub.Feature_FEATURE_REPLAY)
	d := acker(t, g, "u").ready("u")
	m.catchup(1)
	m.wantAck(m.deliver(to("", "x", "u")), ack{delivered: 1})
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_ = g.Drain(ctx) // the manager does not end its stream
	d.want(textFrame("", "u", "x"))
	d.wantClose(closeGoingAway)
}

// blocked is a client whose socket takes no more, so that pushes wait in its queue.
func blocked(t *testing.T, g *Gateway, m *manager, query string) *rawClient {
	t.Helper()
	c := shake(t, g, query+"&user_id=u", "", "")
	_ = c.Conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	eventually(t, "it is known", func() bool { return len(g.users.Of("u")) == 1 })
	of := g.users.Of("u")[0]
	eventually(t, "its socket takes no more", func() bool {
		m.wantAck(m.deliver(to("", strings.Repeat("x", 64<<10), "u")), ack{delivered: 1})
		of.mu.Lock()
		defer of.mu.Unlock()
		return len(of.queue) > 2
	})
	return c
}

// shown reads until a push with the text last, and returns the texts that are short.
func (c *rawClient) shown(t *testing.T, last string) (texts []string) {
	t.Helper()
	for {
		op, payload, err := c.frame()
		if err != nil {
			t.Fatal(err)
		}
		var m struct{ Data struct{ Content string } }
		if op != ws.OpText || json.Unmarshal(payload, &m) != nil || m.Data.Content == "" || len(m.Data.Content) > 1000 {
			continue
		}
		texts = append(texts, m.Data.Content)
		if m.Data.Content == last {
			return texts
		}
	}
}

func small(c *Config) { c.QueueFrames, c.QueueBytes, c.SocketBuffer = 10_000, 64<<20, 4<<10 }

// TestExpiredPushIsNotShown, from the queue of a connection.
func TestExpiredPushIsNotShown(t *testing.T) {
	for _, query := range []string{"ack=0", "ack=1"} {
		g, n := start(t, newController(t), small)
		m := manage(t, n, "pm")
		c := blocked(t, g, m, query)
		short, long := asking("short", "short", "u"), to("long", "long", "u")
		short.TtlMs, long.TtlMs = 50, uint32(patience.Milliseconds())
		m.wantAck(m.deliver(short, long, to("last", "last", "u"))+2, ack{delivered: 1})
		time.Sleep(60 * time.Millisecond)
		if got := c.shown(t, "last"); !slices.Equal(got, []string{"long", "last"}) {
			t.Errorf("%s: shown %q", query, got)
		}
		if got := g.count.expired.Get(); got != 1 {
			t.Errorf("%s: %d expired pushes are counted", query, got)
		}
		if query == "ack=1" {
			m.wantReceipt(m.next-3, receipt{unacked: 1})
		}
	}
}

// TestNewerPushTakesThePlaceOfAnOlder with the same collapse key, while that waits. Who waits for the acknowledgement of
// the older gets that of the newer.
func TestNewerPushTakesThePlaceOfAnOlder(t *testing.T) {
	g, n := start(t, newController(t), small)
	m := manage(t, n, "pm")
	c := blocked(t, g, m, "ack=1")
	keyed := func(id, text, key string) *pubsub.Delivery {
		d := asking(id, text, "u")
		d.CollapseKey = key
		return d
	}
	first := m.deliver(keyed("a1", "a old", "a"), keyed("b1", "b", "b"), keyed("a2", "a older", "a"), asking("x", "x", "u"), keyed("a3", "a new", "a"), to("", "last", "u"))
	m.wantAck(first+5, ack{delivered: 1})
	if got := c.shown(t, "last"); !slices.Equal(got, []string{"a new", "b", "x", "last"}) {
		t.Errorf("shown %q", got)
	}
	of := g.users.Of("u")[0]
	eventually(t, "all is written", func() bool { return g.writers.Load() == 0 })
	of.mu.Lock()
	if of.bytes != 0 || of.frames != 0 || len(of.places) != 0 {
		t.Errorf("%d bytes, %d frames, %d places on the books of an empty queue", of.bytes, of.frames, len(of.places))
	}
	of.mu.Unlock()
	_, _ = c.Write([]byte(masked(0x81, `{"type":"ack","ack":4}`))) // numbers of those that were replaced are left out
	for _, seq := range []uint64{first, first + 1, first + 2, first + 3, first + 4} {
		m.wantReceipt(seq, receipt{acked: 1})
	}
	if got := g.count.collapsed.Get(); got != 2 {
		t.Errorf("%d collapsed pushes are counted", got)
	}
}

// TestWheelComesInTime, also to what is further away than it reaches, and keeps nothing.
func TestWheelComesInTime(t *testing.T) {
	var w wheel
	c := timer{conn: new(conn)}
	for _, d := range []time.Duration{-time.Hour, 0, wheelStep / 2, wheelStep, 10 * wheelStep, time.Hour} {
		w.add(c, time.Now().Add(d))
		turns := 0
		for ; len(w.next()) == 0; turns++ {
			if turns > wheelSlots {
				t.Fatalf("%v: never", d)
			}
		}
		want := min(max(int(d/wheelStep), 0)+1, wheelSlots-1)
		if turns < want-1 || turns > want {
			t.Errorf("%v: after %d turns, want %d", d, turns, want)
		}
	}
}

// TestWheelForgetsTimersThatWereReplaced: each timer that comes while something is unacknowledged would be set again for it.
func TestWheelForgetsTimersThatWereReplaced(t *testing.T) {
	g, n := start(t, newController(t), nil)
	m := manage(t, n, "pm")
	acker(t, g, "u").ready("u")
	c := g.users.Of("u")[0]
	m.deliver(asking("long", "long", "u"))
	eventually(t, "something is unacknowledged", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return !c.armed.IsZero()
	})
	for i := range 20 {
		now := time.Now()
		g.wheel.add(timer{c, now.Add(-time.Duration(i+1) * time.Hour)}, now)
	}
	eventually(t, "one timer is left", func() bool {
		g.wheel.mu.Lock()
		defer g.wheel.mu.Unlock()
		timers := 0
		for _, slot := range g.wheel.slots {
			timers += len(slot)
		}
		return timers == 1
	})
}
