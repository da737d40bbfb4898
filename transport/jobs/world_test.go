package jobs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/node"
)

func TestMain(m *testing.M) {
	metrics.NewSet().NewSummaryExt("warm", time.Minute, []float64{0.5}) // it has a goroutine for the life of the process
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent())
}

// world is an etcd, real nodes over loopback, and a Controller in memory.
type world struct {
	t      testing.TB
	etcd   *etcdtest.Server
	client *clientv3.Client
	prefix string
	nodes  map[string]*gateway

	mu    sync.Mutex
	at    map[string][]*conn  // connections of each user
	rooms map[string][]string // members
	got   map[string]int      // messages, by user
	last  time.Time           // when the last one came
	where map[string]string   // the room of the last message
	hang  bool                // connections take nothing
	down  bool                // the Controller does not answer
}

func newWorld(t testing.TB, etcd *etcdtest.Server, nodes ...string) *world {
	t.Helper()
	w := &world{
		t: t, etcd: etcd, client: etcdtest.NewClient(t, etcd.Endpoint()), prefix: fmt.Sprintf("/jobs-%d", rand.Uint64()), nodes: map[string]*gateway{},
		at: map[string][]*conn{}, rooms: map[string][]string{}, got: map[string]int{}, where: map[string]string{},
	}
	for _, id := range nodes {
		users := node.NewUsers[*conn]()
		w.addNode(id, users, several{users})
	}
	return w
}

// several are connections that take pushes to several rooms.
type several struct{ *node.Users[*conn] }

func (several) Features() []pubsub.Feature { return []pubsub.Feature{pubsub.Feature_FEATURE_ROOMS} }

// gateway is a Connect-Node.
type gateway struct {
	id, addr string
	users    *node.Users[*conn]
}

// conn is a connection of a user.
type conn struct {
	w    *world
	user string
	node string
	room string // "" for any
}

// Attributes implements node.Attributed: the user is one of them, and the room another.
func (c *conn) Attributes() node.Attributes {
	is := map[string]string{"user": c.user}
	if c.room != "" {
		is["in"] = c.room
	}
	a, err := node.NewAttributes(is)
	if err != nil {
		panic(err)
	}
	return a
}

// IsFor implements node.Attributed.
func (c *conn) IsFor(m *node.Message) bool {
	_, is := c.roomOf(m)
	return is
}

// roomOf is the room of a message that the connection is in, "" for none.
func (c *conn) roomOf(m *node.Message) (room string, is bool) {
	rooms := []string{m.RoomID}
	if m.Rooms != nil {
		rooms = m.Rooms.List()
	}
	for _, room := range rooms {
		if room == "" || c.room == "" || c.room == room {
			return room, true
		}
	}
	return "", false
}

// Deliver implements node.Conn.
func (c *conn) Deliver(m *node.Message) node.Outcome {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	room, is := c.roomOf(m)
	if !is {
		return node.NotHere
	}
	if c.w.hang {
		return node.Failed
	}
	c.w.got[c.user]++
	c.w.where[c.user] = room
	c.w.last = time.Now()
	return node.Delivered
}

func (w *world) addNode(id string, users *node.Users[*conn], sessions node.Sessions) {
	w.t.Helper()
	s, err := node.New(node.Config{NodeID: id, Sessions: sessions})
	ok(w.t, err)
	l, err := (&net.ListenConfig{}).Listen(w.t.Context(), "tcp", "127.0.0.1:0")
	ok(w.t, err)
	gs := grpc.NewServer(node.ServerOptions()...)
	s.Attach(gs)
	served := make(chan error, 1)
	go func() { served <- gs.Serve(l) }()
	w.t.Cleanup(func() {
		gs.Stop()
		<-served
		s.Close()
	})
	w.nodes[id] = &gateway{id, l.Addr().String(), users}
}

// connect connects a user to a node; room is the one that the connection is in, "" for all that there are.
func (w *world) connect(user, nodeID, room string) *conn {
	c := &conn{w, user, nodeID, room}
	w.mu.Lock()
	w.at[user] = append(w.at[user], c)
	w.mu.Unlock()
	w.nodes[nodeID].users.Add(user, c)
	return c
}

func (w *world) leave(c *conn) {
	w.nodes[c.node].users.Remove(c.user, c)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at[c.user] = slices.DeleteFunc(w.at[c.user], func(has *conn) bool { return has == c })
}

// crowd connects n users, spread over the nodes.
func (w *world) crowd(n int) (users []string) {
	ids := slices.Sorted(maps.Keys(w.nodes))
	for i := range n {
		user := fmt.Sprint("u", i)
		w.connect(user, ids[i%len(ids)], "")
		users = append(users, user)
	}
	return users
}

// move has users reconnect elsewhere until the function is called.
func (w *world) move(users []string) (end func()) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	ids := slices.Sorted(maps.Keys(w.nodes))
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				time.Sleep(time.Millisecond)
			}
			user := users[rand.IntN(len(users))]
			w.mu.Lock()
			old := w.at[user][0]
			w.mu.Unlock()
			w.leave(old)
			w.connect(user, ids[rand.IntN(len(ids))], "")
		}
	})
	return func() { close(stop); wg.Wait() }
}

// Room implements route.Source.
func (w *world) Room(_ context.Context, room string, add func(user, node []byte)) (bool, uint64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.down {
		return false, 0, route.ErrAway
	}
	members, found := w.rooms[room]
	for _, user := range members {
		if len(w.at[user]) == 0 {
			add([]byte(user), nil)
		}
		for _, c := range w.at[user] {
			add([]byte(user), []byte(c.node))
		}
	}
	return found, 0, nil
}

// Users implements route.Source.
func (w *world) Users(_ context.Context, users []string, nodes [][]string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.down {
		return route.ErrAway
	}
	for i, user := range users {
		for _, c := range w.at[user] {
			nodes[i] = append(nodes[i], c.node)
		}
	}
	return nil
}

// manager is a Push-Manager without its API.
type manager struct {
	*Service

	w      *world
	name   string
	client *clientv3.Client
	set    *metrics.Set
	stop   func()
	alive  bool
	once   sync.Once
}

func (w *world) manager(name string, change func(*Config)) *manager {
	w.t.Helper()
	t := w.t
	shards, err := shard.New(shard.Config{Count: 2})
	ok(t, err)
	goOn := func(i int, task func()) error { return shards.At(i).Go(task) }
	directory, err := route.New(route.Config{Source: w, Shards: shards.Len(), Shard: func(key string) int { return shards.For(key).Index() }, Go: goOn})
	ok(t, err)
	links, err := link.New(link.Config{Shards: shards.Len(), Go: goOn, ManagerID: name})
	ok(t, err)
	var list []link.Node
	for _, n := range w.nodes {
		list = append(list, link.Node{ID: n.id, Addr: n.addr})
	}
	ok(t, links.Update(list))
	e, err := engine.New(engine.Config{
		Shards: shards, Directory: directory, Network: links, Limits: engine.Limits{Users: 300}, // fewer than jobs push to at a time, if they may
	})
	ok(t, err)
	m := &manager{w: w, name: name, client: etcdtest.NewClient(t, w.etcd.Endpoint()), set: metrics.NewSet()}
	cfg := Config{
		Client: m.client, Engine: e, Nodes: links, ManagerID: name, NoList: func(err error) bool { return errors.Is(err, link.ErrNoList) },
		TTL: 2 * time.Second, MaxRate: 100_000, Metrics: m.set, Logger: slog.New(slog.DiscardHandler), RequestTimeout: time.Second,
	}
	if change != nil {
		change(&cfg)
	}
	m.Service, err = New(cfg)
	ok(t, err)
	m.store.prefix = w.prefix
	m.stop = func() {
		links.Close()
		directory.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		ok(t, shards.Close(ctx))
	}
	t.Cleanup(m.close)
	eventually(t, "links", func() bool { return links.Reachable() == len(list) })
	m.Start()
	m.alive = true
	return m
}

// runner is who runs a job, by etcd.
func (w *world) runner(id string) string {
	r, err := w.client.Get(w.t.Context(), w.prefix+"/owner/-/"+id)
	if err != nil || len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

// close ends the manager in good order.
func (m *manager) close() {
	m.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		ok(m.w.t, m.Close(ctx))
		m.stop()
	})
}

// kill ends it at once: what it knows is lost, and etcd is told nothing.
func (m *manager) kill() {
	m.once.Do(func() {
		m.alive = false
		_ = m.client.Close()
		gone, cancel := context.WithCancel(context.Background())
		cancel()
		_ = m.Close(gone)
		m.stop()
	})
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (m *manager) create(id string, spec *pubsub.BroadcastJobSpec) *pubsub.BroadcastJob {
	m.w.t.Helper()
	j, _, err := m.Create(m.w.t.Context(), "", "", id, engine.Low, spec)
	ok(m.w.t, err)
	return j
}

func (m *manager) job(id string) *pubsub.BroadcastJob {
	m.w.t.Helper()
	var j *pubsub.BroadcastJob
	eventually(m.w.t, "an answer of etcd", func() bool {
		var err error
		j, err = m.Get(m.w.t.Context(), "", id)
		return err == nil
	})
	return j
}

// ends waits until a job is over, and checks that its counts add up.
func (m *manager) ends(id string, state pubsub.JobState) *pubsub.BroadcastJob {
	m.w.t.Helper()
	var j *pubsub.BroadcastJob
	eventually(m.w.t, "the end of "+id, func() bool {
		j = m.job(id)
		return j.GetEndTime() != nil && j.GetProgress().GetInFlight() == 0
	})
	p := j.GetProgress()
	if sum := p.GetDelivered() + p.GetOffline() + p.GetFailed() + p.GetUnknown(); sum != p.GetTargets() || j.GetState() != state {
		m.w.t.Errorf("%s: %d of %d targets in %v", j.GetState(), sum, p.GetTargets(), j)
	}
	return j
}

// arrived is how many messages have come, and who has got more than one.
func (w *world) arrived() (n int, twice []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for user, times := range w.got {
		n += times
		if times > 1 {
			twice = append(twice, user)
		}
	}
	return n, twice
}

// onlyOnce fails if anybody has got a message twice, and returns how many have come.
func (w *world) onlyOnce() int {
	w.t.Helper()
	n, twice := w.arrived()
	if len(twice) > 0 {
		w.t.Errorf("%d users have got it more than once, such as %q", len(twice), twice[0])
	}
	return n
}
