package faultbench

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lxzan/gws"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/position"
	pubsub "github.com/push-manager/push-manager/proto"
)

// returner is one of many clients that come back to a room: too many for the ledger.
type returner struct {
	gws.BuiltinEventHandler

	want []string // ids, in order
	done chan struct{}

	// Owned by the reader until done is closed.
	next  int
	wrong string
}

// OnMessage implements gws.Event.
func (c *returner) OnMessage(_ *gws.Conn, message *gws.Message) {
	defer func() { _ = message.Close() }()
	var m struct {
		Type     string `json:"type"`
		Replayed bool   `json:"replayed"`
		ID       string `json:"id"`
	}
	if err := json.Unmarshal(message.Bytes(), &m); err != nil {
		c.end(err.Error())
		return
	}
	switch {
	case m.Type == "gap" || m.Type == "error":
		c.end("it was told " + string(message.Bytes()))
	case m.Type != "text" || slices.Contains(c.want[:c.next], m.ID) && m.Replayed:
	case c.next >= len(c.want) || m.ID != c.want[c.next] || !m.Replayed:
		c.end(fmt.Sprintf("behind %d of %d came %.200s", c.next, len(c.want), message.Bytes()))
	default:
		if c.next++; c.next == len(c.want) {
			c.end("")
		}
	}
}

// OnClose implements gws.Event.
func (c *returner) OnClose(_ *gws.Conn, err error) {
	c.end(fmt.Sprintf("it was closed behind %d: %v", c.next, err))
}

func (c *returner) end(wrong string) {
	select {
	case <-c.done:
	default:
		c.wrong = wrong
		close(c.done)
	}
}

// sum is all values of a metric, whatever its labels.
func (m *manager) sum(name string) (n float64) {
	m.b.t.Helper()
	values, err := m.read()
	if err != nil {
		m.b.t.Fatal(err)
	}
	for key, v := range values {
		if base, _, _ := strings.Cut(key, "{"); base == "push_manager_"+name {
			n += v
		}
	}
	return n
}

// written is how much a store has on its disk.
func (s *storeServer) written() (bytes int64) {
	s.t.Helper()
	_ = filepath.WalkDir(strings.Split(s.spec, ",")[1], func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil //nolint:nilerr // it was there a moment ago
		}
		if info, err := d.Info(); err == nil {
			bytes += info.Size()
		}
		return nil
	})
	return bytes
}

// TestLastingRoomOfAHundredThousand: a message to a room is written once, whoever is away; and when members come back together,
// the store is read for all of them together.
func TestLastingRoomOfAHundredThousand(t *testing.T) {
	t.Parallel()
	members, here, back, pushes := long(2_000, 100_000), long(200, 10_000), long(200, 10_000), long(30, 100)
	b := &bench{t: t, seed: seedOf(t), ledger: newLedger(), world: newWorld(), etcd: etcdtest.Start(t), unwatch: func() {}}
	b.watch(starved)
	t.Cleanup(func() { b.unwatch() })
	b.client = b.etcd.Client()
	b.controller = newController(t, b.world)
	users := names("u", members)
	b.world.join("r", users...)
	node := newWireNode(t, newLedger(), "wire", wireConfig{})
	b.register("wire", node.address)
	b.connect(node, users[:here]...)
	c := &town{bench: b, stop: make(chan struct{})}
	p := freeport.Take(t, 3)
	g := &gate{id: "gate", http: "127.0.0.1:" + p[1], grpc: "127.0.0.1:" + p[0], metrics: "http://127.0.0.1:" + p[2]}
	g.env = []string{"NODE_ID=gate", "GRPC_PORT=" + p[0], "HTTP_PORT=" + p[1], "METRICS_PORT=" + p[2], "CONTROLLER_ADDRESS=" + b.controller.address, "ETCD_ENDPOINTS=" + b.etcd.Endpoint()}
	c.bootGate(g)
	store := startStore(t)
	m := b.launch("pm-0", lenient(storeAt(store)...)...)
	m.reaches(2)

	push := func() *push {
		q := room("r").with(&pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE})
		q.size = 128
		return m.push(q)
	}
	marker := push()
	appended, wrote, before := m.sum("store_append_total"), store.written(), m.residentBytes()
	var ids []string
	for range pushes {
		p := push()
		want(t, p, func(s *pubsub.DeliverySummary) bool {
			return int(s.GetDelivered()) == here && int(s.GetOffline()) == members-here && s.GetStored() == s.GetOffline() && s.GetPosition() != ""
		}, "stored for all who are away")
		ids = append(ids, p.summary.GetMessageId())
	}
	if got := m.sum("store_append_total") - appended; int(got) != pushes {
		t.Errorf("%d pushes are %v appends", pushes, got)
	}
	if got := store.written() - wrote; got > 1<<20 {
		t.Errorf("%d pushes are %d bytes on the disk", pushes, got)
	} else {
		t.Logf("%d pushes to a room of %d are %d bytes on the disk", pushes, members, got)
	}

	reads := m.sum("room_log_store_reads_total")
	memory := m.residentBytes()
	begun := time.Now()
	q := url.Values{"room_id": {"r"}, "resume": {marker.summary.GetPosition()}}
	var dialing, reading sync.WaitGroup
	var failed atomic.Int64
	all := make([]*returner, back)
	conns := make([]*gws.Conn, back)
	for w := range 32 {
		dialing.Go(func() {
			for i := w; i < back; i += 32 {
				client := &returner{want: ids, done: make(chan struct{})}
				q := url.Values{"user_id": {users[here+i]}, "room_id": q["room_id"], "resume": q["resume"]}
				ws, _, err := gws.NewClient(client, &gws.ClientOption{Addr: "ws://" + g.http + "/ws?" + q.Encode(), HandshakeTimeout: patience})
				if err != nil {
					failed.Add(1)
					continue
				}
				all[i], conns[i] = client, ws
				reading.Go(ws.ReadLoop)
			}
		})
	}
	dialing.Wait()
	t.Cleanup(func() {
		for _, ws := range conns {
			if ws != nil {
				_ = ws.NetConn().Close()
			}
		}
		reading.Wait()
	})
	if failed.Load() > 0 {
		t.Fatalf("%d clients could not connect", failed.Load())
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for i, client := range all {
		select {
		case <-client.done:
			if client.wrong != "" {
				t.Fatalf("%s: %s", users[here+i], client.wrong)
			}
		case <-timer.C:
			t.Fatalf("%s has not all that was said", users[here+i])
		}
	}
	took := time.Since(begun)
	if got, most := m.sum("room_log_store_reads_total")-reads, 2*(took.Seconds()+1); got > most {
		t.Errorf("%v reads of the store within %v", got, took)
	}
	more := m.residentBytes() - memory
	if more > 64<<20 && !raceEnabled {
		t.Errorf("%v bytes more in Push-Manager", more)
	}
	t.Logf("%d members had their %d messages after %v: %v reads of the store, %v MiB more in Push-Manager, which the pushes had brought %v MiB",
		back, pushes, took.Round(time.Millisecond), m.sum("room_log_store_reads_total")-reads, int(more)>>20, int(memory-before)>>20)
}

// residentBytes is the memory of the process.
func (m *manager) residentBytes() float64 {
	m.b.t.Helper()
	values, err := m.read()
	if err != nil {
		m.b.t.Fatal(err)
	}
	return values["process_resident_memory_bytes"]
}

// roam is a member of rooms who connects here and there, is away in between, and keeps its position.
func (t *town) roam(user string, rooms []string, r *rand.Rand, pause time.Duration) {
	var now *visit
	defer func() {
		if now != nil {
			now.close()
		}
	}()
	sleep := func(d time.Duration, ended <-chan struct{}) bool {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ended:
		case <-t.stop:
			return false
		}
		return true
	}
	for {
		before := now
		if g := t.anyGate(r); g != nil {
			now = t.come(user, rooms, g)
		}
		if before != nil { // for a moment it is at both
			before.close()
		}
		if now == nil {
			if !sleep(100*time.Millisecond, nil) {
				return
			}
			continue
		}
		if !sleep(time.Duration(r.ExpFloat64()*float64(pause)), now.ended) {
			return
		}
		if r.IntN(2) == 0 {
			now.close()
			now = nil
			if !sleep(time.Duration(r.ExpFloat64()*float64(pause)), nil) {
				return
			}
		}
	}
}

// come connects a member to all its rooms; nil: the gateway did not take it.
func (t *town) come(user string, rooms []string, g *gate) *visit {
	v := t.open(user, g, rooms[0])
	if v != nil {
		for _, room := range rooms[1:] {
			v.join(room)
		}
	}
	return v
}

// harmLogs does one thing to what brings the messages of rooms to their members.
func (t *town) harmLogs(r *rand.Rand) {
	g := t.gates[r.IntN(len(t.gates))]
	m := t.managers[r.IntN(len(t.managers))]
	pause := time.Duration(300+r.IntN(2500)) * time.Millisecond
	switch r.IntN(7) {
	case 0:
		t.ledger.note("the links of %s are cut", g.id)
		g.link.refuse(true)
		g.link.cut()
	case 1:
		t.ledger.note("requests to %s get lost", g.id)
		g.link.set(requests, toxic{drop: true, some: 3})
	case 2:
		t.ledger.note("replies of %s get lost", g.id)
		g.link.set(replies, toxic{drop: true, some: 3})
	case 3:
		t.ledger.note("%s is slow to reach", g.id)
		g.link.set(requests, toxic{delay: 2 * time.Second})
	case 4, 5:
		t.ledger.note("%s is killed", m.id)
		m.kill()
		wait(pause)
		m.boot()
		m.ready()
		t.ledger.note("%s is there", m.id)
		return
	default:
		t.harm(r)
		return
	}
	wait(pause)
	g.link.heal()
	t.ledger.note("%s is as it was", g.id)
}

// moving runs members who move between nodes, and callers, while links are cut, queues are filled and Push-Managers are killed.
// It returns the town at rest, with everybody connected, and who is in which rooms.
func moving(t *testing.T, highest bool) (*town, map[string][]string) {
	c := newLastingTown(t, townPlan{
		managers: 3, gates: 3, managerEnv: prompt(storeAt(startStore(t))...), gatewayEnv: []string{"QUEUE_FRAMES=64"},
		proxied: true, resumes: true, highest: highest,
	})
	c.ledger.clientsLeave, c.ledger.unordered = true, true
	rooms := names("log", 3)
	members := map[string][]string{}
	for i, user := range names("m", long(12, 60)) {
		r := rand.New(rand.NewPCG(c.seed, uint64(3000+i)))
		in := rooms[:1+i%len(rooms)]
		members[user] = in
		c.people.Go(func() { c.roam(user, in, r, long(1500*time.Millisecond, 4*time.Second)) })
	}
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for i := range 6 {
		r := rand.New(rand.NewPCG(c.seed, uint64(200+i)))
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				q := room(pick(r, rooms))
				q.options = &pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE, Ack: pubsub.AckPolicy(r.IntN(2)), AckTimeoutMs: 1000}
				if r.IntN(10) == 0 {
					q.size = 32 << 10 // so that what waits is much
				}
				insistOnce(c.managers, r.IntN(len(c.managers)), q)
				wait(time.Duration(r.Int64N(int64(60 * time.Millisecond))))
			}
		})
	}
	faults := 0
	for r, end := rand.New(rand.NewPCG(c.seed, 7)), c.ledger.now()+long(10*time.Second, 10*time.Minute); c.ledger.now() < end; faults++ {
		c.harmLogs(r)
		wait(500 * time.Millisecond)
	}
	close(stop)
	callers.Wait()
	close(c.stop)
	c.people.Wait()
	for user, rooms := range members {
		eventually(t, user+" connects", func() error {
			if c.come(user, rooms, c.gates[0]) == nil {
				return errStill
			}
			return nil
		})
	}
	t.Logf("%d faults", faults)
	return c, members
}

// TestLastingMembersWhoMove miss nothing that stands in the log of a room: whatever happens to links, queues and Push-Managers.
func TestLastingMembersWhoMove(t *testing.T) {
	slow(t)
	t.Parallel()
	c, members := moving(t, false)
	missed := c.missed(members)
	for end := time.Now().Add(patience); len(missed) > 0 && time.Now().Before(end); missed = c.missed(members) {
		wait(100 * time.Millisecond)
	}
	for user, ids := range missed {
		t.Errorf("%s has missed %d: %v", user, len(ids), ids[:min(len(ids), 5)])
	}
	if n := c.gaps(); n > 0 {
		t.Errorf("%d members are told of a gap, and all is kept", n)
	}
	judged := 0
	c.ledger.tally(0, c.ledger.now(), func(p *push) bool {
		if p.summary.GetPosition() != "" {
			judged++
		}
		return false
	})
	if judged == 0 {
		t.Error("nothing stands in a log")
	}
	t.Logf("%d messages in logs", judged)
	c.settle()
}

// TestLastingHighestSeenLosesMessages is the counter-proof: clients that take the furthest message they have seen for
// their position, as most do, miss others, and the checker sees it.
func TestLastingHighestSeenLosesMessages(t *testing.T) {
	if !long(false, true) {
		t.Skipf("it takes minutes: set %s=1, or run make lasting", longEnv)
	}
	t.Parallel()
	c, members := moving(t, true)
	wait(10 * time.Second)
	if missed := c.missed(members); len(missed) == 0 {
		t.Error("nobody has missed anything")
	}
}

// TestLastingOldPositionGetsAGap: of another log, and one behind which not all is kept. What is left comes.
func TestLastingOldPositionGetsAGap(t *testing.T) {
	t.Parallel()
	c := newLastingTown(t, townPlan{managers: 1, gates: 1, managerEnv: storeAt(startStore(t)), resumes: true})
	c.ledger.clientsLeave, c.ledger.unordered = true, true
	m, g := c.managers[0], c.gates[0]
	q := room("r").with(&pubsub.PushOptions{Offline: pubsub.OfflinePolicy_OFFLINE_STORE})
	first := m.push(q)
	want(t, first, func(s *pubsub.DeliverySummary) bool { return s.GetPosition() != "" }, "in the log")
	gapFor := func(user, token string) {
		t.Helper()
		c.mu.Lock()
		if c.positions == nil {
			c.positions = map[string]*kept{}
		}
		c.positions[user] = &kept{token: token, gaps: map[string]bool{}}
		c.mu.Unlock()
		c.openAt(user, g, g.http, "r").awaitReady()
		eventually(t, user+" is told of a gap", func() error {
			c.mu.Lock()
			defer c.mu.Unlock()
			if !c.positions[user].gaps["r"] {
				return errStill
			}
			return nil
		})
	}
	gapFor("of-another-log", (&position.Position{Epoch: 1, Places: []position.Place{{Partition: 0, Seq: 1}}}).String())
	kept := long(0, 10_000)
	if kept == 0 {
		return
	}
	var callers sync.WaitGroup
	for range 16 {
		callers.Go(func() {
			for range kept/16 + 2 {
				m.ask(context.Background(), m, q)
			}
		})
	}
	callers.Wait()
	gapFor("long-ago", first.summary.GetPosition())
}
