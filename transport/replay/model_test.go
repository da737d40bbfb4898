package replay

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/link"
	connectnode "github.com/push-manager/push-manager/transport/node"
	"github.com/push-manager/push-manager/transport/store"
)

// The protocol of lasting delivery under random schedules, over the real parts of both sides: engines, links, spools and
// replays of three managers, two nodes with their gates, inboxes and rings. Around them is what a test has to make up: a
// Controller that hears of connections late, users who move between the nodes and drop connections with messages in
// them, clients that acknowledge, wires and a store that take their time. Time is virtual, and each user is a schedule
// of their own.

var (
	schedules = flag.Int("model.schedules", 200, "random schedules of the protocol as designed")
	modelSeed = flag.Uint64("model.seed", 0, "seed of the first batch of schedules; 0: another one each time")
)

const (
	batch    = 100 // schedules in one world
	managers = 3
	callers  = 2 // of each user, one push after the other
	pushes   = 8 // of each caller
	sessions = 3 // before the last one, which stays
)

// variant is the protocol with something left out. The real parts stay as they are: what leads to them is changed.
type variant struct {
	name            string
	noNudge         bool // the node is never told
	nudgeNotAwaited bool // the push is answered before the node has taken the nudge
	earlyRead       bool // the node asks before the Controller knows of the connection
	noGate          bool // live messages do not wait
	staleReads      bool // the store answers from a replica that lags
}

// findings are what was wrong with a number of schedules.
type findings struct {
	lost, inverted, doubled, unanswered int
	example                             string
}

func (f *findings) bad() int { return f.lost + f.inverted + f.doubled + f.unanswered }

func (f *findings) note(count *int, format string, args ...any) {
	*count++
	if f.example == "" {
		f.example = fmt.Sprintf(format, args...)
	}
}

func TestProtocol(t *testing.T) {
	first := *modelSeed
	if first == 0 {
		first = rand.Uint64()
	}
	for _, v := range []variant{
		{name: "as designed"},
		{name: "no second look-up and nudge", noNudge: true},
		{name: "answered before the nudge is taken", nudgeNotAwaited: true},
		{name: "store read before the Controller knows", earlyRead: true},
		{name: "no gate", noGate: true},
		{name: "last read from any replica", staleReads: true},
	} {
		t.Run(v.name, func(t *testing.T) {
			designed, all, run := v == variant{name: v.name}, findings{}, 0
			// One that is broken has to be found within ten times as many.
			for designed && run < *schedules || !designed && all.bad() == 0 && run < 10**schedules {
				seed := first + uint64(run)
				before := all.bad()
				synctest.Test(t, func(t *testing.T) { newModel(t, v, seed).run(&all) })
				if run += batch; designed && all.bad() > before {
					t.Errorf("-model.seed=%d: %s", seed, all.example)
				}
			}
			t.Logf("%d schedules from seed %d: %d lost, %d out of order, %d twice, %d not answered well (%s)",
				run, first, all.lost, all.inverted, all.doubled, all.unanswered, all.example)
			if !designed && all.bad() == 0 {
				t.Errorf("nothing went wrong in %d schedules", run)
			}
		})
	}
}

// model is a world.
type model struct {
	t     *testing.T
	v     variant
	store *lagging
	nodes [2]*modelNode
	pms   [managers]*modelManager

	mu sync.Mutex
	// Guarded by mu.
	random   *rand.Rand
	presence map[string]string // the Controller's view
}

// pause takes up to most.
func (m *model) pause(most time.Duration) { time.Sleep(time.Duration(m.intn(int(most)))) }

func (m *model) intn(n int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.random.IntN(n)
}

// tardy is a connection whose bytes take their time.
type tardy struct {
	net.Conn

	m *model
}

func (c tardy) Write(b []byte) (int, error) {
	c.m.pause(2 * time.Millisecond)
	return c.Conn.Write(b)
}

func (c tardy) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.m.pause(2 * time.Millisecond)
	return n, err
}

// lagging is a store whose replicas may lag, if it is told so.
type lagging struct {
	*memory

	m *model
	// Guarded by memory.mu.
	stored map[uint64]time.Time
}

func (l *lagging) Append(ctx context.Context, entries []store.Entry) []error {
	l.m.pause(3 * time.Millisecond)
	errs := l.memory.Append(ctx, entries)
	l.mu.Lock()
	for i := range entries {
		l.stored[entries[i].Seq] = time.Now()
	}
	l.mu.Unlock()
	l.m.pause(3 * time.Millisecond)
	return errs
}

// hidden tells whether a replica that lags by so much does not have the message yet.
func (l *lagging) hidden(seq uint64, lag time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Since(l.stored[seq]) < lag
}

func (l *lagging) lag() time.Duration {
	if !l.m.v.staleReads || l.m.intn(2) == 0 {
		return 0
	}
	return time.Duration(l.m.intn(int(30 * time.Millisecond)))
}

func (l *lagging) Read(ctx context.Context, user string, after uint64, most, bytes int) ([]store.Entry, bool, error) {
	l.m.pause(3 * time.Millisecond)
	page, more, err := l.memory.Read(ctx, user, after, most, bytes)
	if lag := l.lag(); lag > 0 {
		if i := slices.IndexFunc(page, func(e store.Entry) bool { return l.hidden(e.Seq, lag) }); i >= 0 {
			page, more = page[:i], false
		}
	}
	l.m.pause(3 * time.Millisecond)
	return page, more, err
}

func (l *lagging) Any(ctx context.Context, users []string) ([]bool, error) {
	l.m.pause(3 * time.Millisecond)
	some, err := l.memory.Any(ctx, users)
	for i := range some {
		if lag := l.lag(); some[i] && lag > 0 {
			some[i] = slices.ContainsFunc(l.places(users[i]), func(seq uint64) bool { return !l.hidden(seq, lag) })
		}
	}
	l.m.pause(3 * time.Millisecond)
	return some, err
}

// modelNode is a Connect-Node.
type modelNode struct {
	id     string
	users  *connectnode.Users[*device]
	server *connectnode.Server
	grpc   *grpc.Server
	lis    *bufconn.Listener
}

// modelManager is a Push-Manager from the engine to its links.
type modelManager struct {
	shards  *shard.Set
	routes  *route.Directory
	links   *link.Set
	spool   *store.Spool
	replays *Service
	engine  *engine.Engine
}

func newModel(t *testing.T, v variant, seed uint64) *model {
	m := &model{t: t, v: v, random: rand.New(rand.NewPCG(seed, 1)), presence: map[string]string{}}
	m.store = &lagging{memory: newMemory(), m: m, stored: map[uint64]time.Time{}}
	for i := range m.nodes {
		m.nodes[i] = m.newNode(string(rune('A' + i)))
	}
	for i := range m.pms {
		m.pms[i] = m.newManager(fmt.Sprint("pm", i))
	}
	for _, pm := range m.pms {
		for pm.links.Stats().Live < len(m.nodes) {
			time.Sleep(5 * time.Millisecond)
		}
	}
	return m
}

func (m *model) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *model) newNode(id string) *modelNode {
	n := &modelNode{id: id, lis: bufconn.Listen(1 << 20), users: connectnode.NewLastingUsers[*device](
		pubsub.Feature_FEATURE_DEDUPE, pubsub.Feature_FEATURE_CLIENT_ACK, pubsub.Feature_FEATURE_EXPIRY, pubsub.Feature_FEATURE_REPLAY)}
	var err error
	n.server, err = connectnode.New(connectnode.Config{NodeID: id, Sessions: n.users})
	m.must(err)
	n.grpc = grpc.NewServer(append(connectnode.ServerOptions(), grpc.WaitForHandlers(true))...)
	n.server.Attach(n.grpc)
	go n.grpc.Serve(n.lis)
	m.t.Cleanup(func() {
		n.grpc.Stop()
		n.server.Close()
	})
	return n
}

func (m *model) newManager(id string) *modelManager {
	pm := &modelManager{}
	var err error
	pm.shards, err = shard.New(shard.Config{Count: 1})
	m.must(err)
	goOn := func(_ int, task func()) error { return pm.shards.At(0).Go(task) }
	pm.routes, err = route.New(route.Config{Source: m, Shards: 1, Shard: func(string) int { return 0 }, Go: goOn})
	m.must(err)
	pm.replays, err = New(Config{Store: m.store, Page: 4, Start: func(p *engine.Push, c engine.Completer) error { return pm.engine.Start(p, c) }})
	m.must(err)
	pm.links, err = link.New(link.Config{ManagerID: id, Go: goOn, Replayer: pm.replays, Dialer: func(ctx context.Context, addr string) (net.Conn, error) {
		for _, n := range m.nodes {
			if strings.HasPrefix(addr, n.id) {
				c, err := n.lis.DialContext(ctx)
				return tardy{c, m}, err
			}
		}
		return nil, errors.New("no such node")
	}})
	m.must(err)
	pm.spool, err = store.NewSpool(m.t.Context(), store.SpoolConfig{Store: m.store, Usage: func(context.Context, int) (int64, error) { return 0, nil }})
	m.must(err)
	pm.engine, err = engine.New(engine.Config{Shards: pm.shards, Directory: pm.routes, Network: network{pm.links, m}, Spool: pm.spool})
	m.must(err)
	var nodes []link.Node
	for _, n := range m.nodes {
		nodes = append(nodes, link.Node{ID: n.id, Addr: n.id + ":1"})
	}
	m.must(pm.links.Update(nodes))
	m.t.Cleanup(func() {
		m.must(pm.engine.Drain(context.Background()))
		m.must(pm.replays.Close(context.Background()))
		m.must(pm.spool.Close(context.Background()))
		pm.links.Close()
		pm.routes.Close()
		m.must(pm.shards.Close(context.Background()))
	})
	return pm
}

// network is the links, whose nudges may be left out.
type network struct {
	*link.Set

	m *model
}

func (n network) Link(shard int, node string) engine.Link {
	l := n.Set.Link(shard, node)
	if l == nil || !n.m.v.noNudge && !n.m.v.nudgeNotAwaited {
		return l
	}
	return nudging{l, n.m}
}

type nudging struct {
	engine.Link

	m *model
}

func (n nudging) Nudge(user string, seq uint64, done func(bool)) {
	if n.m.v.nudgeNotAwaited {
		time.AfterFunc(time.Duration(n.m.intn(int(20*time.Millisecond))), func() { n.Link.Nudge(user, seq, func(bool) {}) })
	}
	done(true)
}

// Users implements route.Source: the Controller.
func (m *model) Users(_ context.Context, users []string, nodes [][]string) error {
	m.pause(3 * time.Millisecond)
	m.mu.Lock()
	for i, user := range users {
		if node := m.presence[user]; node != "" {
			nodes[i] = []string{node}
		}
	}
	m.mu.Unlock()
	m.pause(3 * time.Millisecond)
	return nil
}

// Room implements route.Source.
func (m *model) Room(context.Context, string, func(user, node []byte)) (bool, uint64, error) {
	return false, 0, nil
}

func (m *model) setPresence(user, node string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.presence[user] = node
}

// device is a connection, at the node and at the client.
type device struct {
	m      *model
	client *client
	wake   chan struct{} // has room for one

	mu sync.Mutex
	// Guarded by mu.
	inbox  connectnode.Inbox[string]
	queue  []connectnode.Entry[string]
	closed bool
}

func (d *device) Deliver(m *connectnode.Message) connectnode.Outcome { return d.DeliverLasting(m, nil) }

func (d *device) DeliverLasting(m *connectnode.Message, c *connectnode.Confirmation) connectnode.Outcome {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	if out, settled := d.inbox.Check(m, c, len(m.Data), now); settled {
		return out
	}
	e, queue, out := d.inbox.Take(m, c, string(m.Data), len(m.Data), now)
	if queue {
		d.queue = append(d.queue, e)
		d.signal()
	}
	return out
}

func (d *device) signal() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

func (d *device) Opened() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.popLocked()
}

func (d *device) popLocked() {
	for e, ok := d.inbox.Pop(time.Now()); ok; e, ok = d.inbox.Pop(time.Now()) {
		d.queue = append(d.queue, e)
	}
	d.signal()
}

// serve writes what is queued to the client, which acknowledges, until the connection ends.
func (d *device) serve() {
	for range d.wake {
		for {
			d.mu.Lock()
			if d.closed {
				d.mu.Unlock()
				return
			}
			if len(d.queue) == 0 {
				d.mu.Unlock()
				break
			}
			e := d.queue[0]
			d.queue = d.queue[1:]
			written := d.inbox.Write(&e, time.Now())
			d.mu.Unlock()
			if !written {
				continue
			}
			d.m.pause(3 * time.Millisecond)
			if !d.hand(e.Frame) {
				return
			}
			d.m.pause(3 * time.Millisecond)
			d.mu.Lock()
			if !d.closed && e.Ack != 0 {
				if err := d.inbox.Ack(e.Ack); err != nil {
					panic(err)
				}
				d.popLocked()
			}
			d.mu.Unlock()
		}
	}
}

// hand gives a frame to the client. False means that the connection has ended.
func (d *device) hand(frame string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.client.got = append(d.client.got, got{frame, d})
	}
	return !d.closed
}

// client is a user with one connection at a time.
type client struct {
	user string
	got  []got // in order; guarded by the mu of the device that is connected
}

type got struct {
	text string
	by   *device
}

// connect is the way in: the gate is closed from the beginning, and what is stored is asked for once the
// Controller knows.
func (m *model) connect(c *client, n *modelNode, devices *sync.WaitGroup) (d *device, gate *connectnode.Gate) {
	d = &device{m: m, client: c, wake: make(chan struct{}, 1)}
	gate = n.server.Gate(c.user, d, 8)
	d.inbox.Acks = true
	if !m.v.noGate {
		d.inbox.Gate = gate
	}
	devices.Go(d.serve)
	n.users.Add(c.user, d)
	if m.v.earlyRead {
		gate.Ready()
	}
	m.pause(10 * time.Millisecond)
	m.setPresence(c.user, n.id)
	m.pause(3 * time.Millisecond)
	gate.Ready()
	return d, gate
}

func (m *model) disconnect(d *device, gate *connectnode.Gate, n *modelNode) {
	d.mu.Lock()
	d.closed = true
	d.inbox.Close()
	d.mu.Unlock()
	n.users.Remove(d.client.user, d)
	gate.Leave()
	d.signal()
	m.pause(10 * time.Millisecond)
	m.setPresence(d.client.user, "")
}

// run runs a batch of schedules and looks at what came of them.
func (m *model) run(f *findings) {
	var working, devices sync.WaitGroup
	clients := make([]*client, batch)
	promised := make([][callers][pushes]string, batch)
	var last sync.Map // of *device: how to end it
	for i := range clients {
		c := &client{user: fmt.Sprint("user", i)}
		clients[i] = c
		for caller := range callers {
			working.Go(func() {
				for k := range pushes {
					promised[i][caller][k] = m.push(c.user, fmt.Sprintf("%d/%d", caller, k))
					m.pause(20 * time.Millisecond)
				}
			})
		}
		working.Go(func() {
			for session := range sessions + 1 {
				m.pause(40 * time.Millisecond)
				n := m.nodes[m.intn(len(m.nodes))]
				d, gate := m.connect(c, n, &devices)
				if session == sessions {
					last.Store(d, func() { m.disconnect(d, gate, n) })
					return
				}
				m.pause(80 * time.Millisecond)
				m.disconnect(d, gate, n)
			}
		})
	}
	working.Wait()
	time.Sleep(20 * time.Second) // nodes may ask once more
	last.Range(func(_, end any) bool { end.(func())(); return true })
	devices.Wait()
	for i, c := range clients {
		c.check(f, &promised[i])
	}
}

// push pushes through one of the managers, and returns what became of it.
func (m *model) push(user, text string) string {
	payload, err := (&pubsub.MessageContent{Data: []byte(text)}).MarshalVT()
	if err != nil {
		return err.Error()
	}
	result, err := m.pms[m.intn(managers)].engine.Do(context.Background(), &engine.Push{Request: engine.Request{
		Kind: engine.ToUser, User: user, Payload: payload, Content: engine.Content{Present: true, DataLen: len(text)},
		Options: &engine.Options{MessageID: text, Sender: "s", PayloadHash: 1, ClientAck: true, AckTimeout: 2 * time.Second, Store: true},
	}})
	switch {
	case err != nil:
		return err.Error()
	case result.Delivered == 1:
		return "delivered"
	case result.Stored == 1:
		return "stored"
	}
	return fmt.Sprintf("%+v", result)
}

// check holds what the client got against what was promised.
func (c *client) check(f *findings, promised *[callers][pushes]string) {
	first, twice := map[string]int{}, map[got]bool{}
	for i, g := range c.got {
		if twice[g] {
			f.note(&f.doubled, "%s got %s twice on one connection", c.user, g.text)
		}
		twice[g] = true
		if _, had := first[g.text]; !had { // the client's own ring
			first[g.text] = i
		}
	}
	for caller := range callers {
		for k, answer := range promised[caller] {
			text := fmt.Sprintf("%d/%d", caller, k)
			at, ok := first[text]
			switch {
			case answer != "delivered" && answer != "stored":
				f.note(&f.unanswered, "%s: %s was answered %s", c.user, text, answer)
			case !ok:
				f.note(&f.lost, "%s never got %s, which was %s", c.user, text, answer)
			case k > 0 && at < first[fmt.Sprintf("%d/%d", caller, k-1)]:
				f.note(&f.inverted, "%s got %s before the one before it", c.user, text)
			}
		}
	}
}
