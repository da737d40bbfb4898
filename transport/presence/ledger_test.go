package presence_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/redistest"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/refcontroller/redisstore"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/controller"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/node/membership"
	"github.com/push-manager/push-manager/transport/presence"
)

const (
	ledgerUsers = 12
	ledgerNodes = 3
)

var ledgerRooms = []string{"r0", "r1"}

// controllers are one or two Controllers that can be restarted, on a store in memory or on one Redis.
type controllers struct {
	t       *testing.T
	etcd    *etcdtest.Server
	redis   *redistest.Server // nil: in memory
	addrs   []string
	stopped []func()
}

func (c *controllers) start(i int) {
	c.t.Helper()
	cfg := refcontroller.Config{Client: c.etcd.Client(), Warmup: 15 * time.Second}
	closing := func() {}
	if c.redis != nil {
		target, err := redisstore.Parse(c.redis.URL())
		if err != nil {
			c.t.Fatal(err)
		}
		store := redisstore.New(redisstore.Config{Target: target})
		cfg.Store, closing = store, func() { _ = store.Close() }
	}
	server, err := refcontroller.New(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	lis, err := (&net.ListenConfig{}).Listen(c.t.Context(), "tcp", c.addrs[i])
	if err != nil {
		c.t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(lis) }()
	c.stopped[i] = func() {
		server.Close()
		<-served
		closing()
	}
}

// many is a gRPC target of all addresses.
func (c *controllers) many() (string, grpc.DialOption) {
	list := manual.NewBuilderWithScheme("list")
	var state resolver.State
	for _, addr := range c.addrs {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: addr})
	}
	list.InitialState(state)
	return "list:///controllers", grpc.WithResolvers(list)
}

// gateway is a node: who is connected to it, and in which rooms.
type gateway struct {
	id      string
	reports *membership.Reporter
	members map[string]*membership.Member // by user
	rooms   map[string]map[string]bool    // by user
}

type heard struct{}

func (heard) Joined(string)          {}
func (heard) Left(string)            {}
func (heard) Refused(string, string) {}

// truth is the ledger of what the gateways have: as a watch of everything would keep it.
func truth(gateways []*gateway, of presence.Watcher) map[string]string {
	l := map[string]string{}
	add := func(key, node string) {
		if l[key] != "" {
			node = l[key] + "," + node
		}
		l[key] = node
	}
	for _, g := range gateways {
		for user, rooms := range g.rooms {
			switch {
			case of.Room != "":
				if rooms[of.Room] {
					add(of.Room+"|"+user, g.id)
				}
			case user == of.User:
				add("|"+user, g.id)
				for room := range rooms {
					l[room+"|"+user] = ""
				}
			}
		}
	}
	return l
}

// book is the ledger of a watch.
type book struct {
	of presence.Watcher

	mu        sync.Mutex
	state     map[string]string // nil: no snapshot yet
	next      map[string]string // the snapshot under way
	position  string
	events    map[string]int // changes, by user
	snapshots map[pubsub.SnapshotReason]int
	wrong     error
}

func (b *book) take(m *pubsub.WatchPresenceResponse) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	put := func(l map[string]string, e *pubsub.PresenceEntry) {
		l[e.GetRoomId()+"|"+e.GetUserId()] = strings.Join(e.GetNodeIds(), ",")
	}
	if s := m.GetSnapshot(); s != nil {
		if s.GetFirst() {
			b.next = map[string]string{}
			b.snapshots[s.GetReason()]++
		}
		for _, e := range s.GetEntries() {
			put(b.next, e)
		}
		if s.GetLast() {
			b.state = b.next
		}
	}
	for _, c := range m.GetChanges().GetChanges() {
		e := c.GetEntry()
		key := e.GetRoomId() + "|" + e.GetUserId()
		was, known := b.state[key]
		b.events[e.GetUserId()]++
		switch c.GetKind() {
		case pubsub.PresenceChangeKind_JOINED, pubsub.PresenceChangeKind_CONNECTED:
			if put(b.state, e); known {
				b.wrong = fmt.Errorf("%v, and it was there", c)
			}
		case pubsub.PresenceChangeKind_LEFT, pubsub.PresenceChangeKind_DISCONNECTED:
			if delete(b.state, key); !known {
				b.wrong = fmt.Errorf("%v, and it was not there", c)
			}
		default:
			if put(b.state, e); !known || was == b.state[key] {
				b.wrong = fmt.Errorf("%v, and it was %q", c, was)
			}
		}
	}
	if m.GetPosition() != "" {
		b.position = m.GetPosition()
	}
	return nil
}

// forget begins a new count of changes.
func (b *book) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = map[string]int{}
}

// TestWatchersKeepTheTruth lets users come, go and move while Controllers are restarted, are away and lose their store, while watches
// are broken off and go on from their position. What is applied from each watch equals what the gateways have whenever that
// has settled, and nobody is told of more changes than there were.
func TestWatchersKeepTheTruth(t *testing.T) {
	t.Run("in memory", func(t *testing.T) { testLedgers(t, nil) })
	t.Run("on Redis", func(t *testing.T) { testLedgers(t, redistest.Start(t)) })
}

func testLedgers(t *testing.T, redis *redistest.Server) {
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	c := &controllers{t: t, etcd: etcdtest.Start(t), redis: redis}
	n := 1
	if redis != nil {
		n = 2
	}
	for _, port := range freeport.Take(t, n) {
		c.addrs, c.stopped = append(c.addrs, "127.0.0.1:"+port), append(c.stopped, func() {})
	}
	for i := range c.addrs {
		c.start(i)
		t.Cleanup(func() { c.stopped[i]() })
	}

	target, option := c.many()
	var gateways []*gateway
	for i := range ledgerNodes {
		g := &gateway{id: fmt.Sprint("n", i), members: map[string]*membership.Member{}, rooms: map[string]map[string]bool{}}
		r, err := discovery.Register(t.Context(), discovery.RegistrationConfig{
			Client: c.etcd.Client(), ID: g.id, Addr: "10.0.0.1:1", Metadata: map[string]string{"boot_id": "boot of " + g.id},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = r.Close(context.Background()) })
		g.reports, err = membership.New(membership.Config{NodeID: g.id, BootID: "boot of " + g.id, Controller: target, SyncInterval: 200 * time.Millisecond, DialOptions: []grpc.DialOption{option}})
		if err != nil {
			t.Fatal(err)
		}
		g.reports.Start()
		t.Cleanup(g.reports.Close)
		gateways = append(gateways, g)
	}

	// Push-Manager's side.
	asks, err := controller.New(controller.Config{Address: strings.Join(c.addrs, ",")})
	if err != nil {
		t.Fatal(err)
	}
	var tasks sync.WaitGroup
	dir, err := route.New(route.Config{
		Source: asks, Shards: 1, Shard: func(string) int { return 0 }, LookupTimeout: 5 * time.Second,
		Go: func(_ int, task func()) error { tasks.Go(task); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := presence.New(presence.Config{
		Controller: asks, Room: roomsOf(dir), Linger: 3 * time.Second,
		Connections: func(context.Context, string, []string) ([]*pubsub.UserConnections, error) {
			return nil, errors.New("nobody")
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	asks.Start(s.Following(dir))
	t.Cleanup(func() {
		s.Close()
		_ = asks.Close()
		tasks.Wait()
		dir.Close()
	})

	// Each watch is broken off now and then, and goes on from its position.
	var books []*book
	watching, done := context.WithCancel(t.Context())
	var watches sync.WaitGroup
	t.Cleanup(func() { done(); watches.Wait() })
	for _, of := range []presence.Watcher{{Room: "r0"}, {Room: "r1"}, {User: "u0"}, {User: "u1"}} {
		b := &book{of: of, events: map[string]int{}, snapshots: map[pubsub.SnapshotReason]int{}}
		books = append(books, b)
		watches.Go(func() {
			for watching.Err() == nil {
				ctx, cancel := context.WithTimeout(watching, time.Duration(500+rand.IntN(1500))*time.Millisecond)
				w := b.of
				b.mu.Lock()
				w.Position = b.position
				b.mu.Unlock()
				w.May, w.Send, w.Sees = func() error { return nil }, b.take, func(string) bool { return true }
				_ = s.Watch(ctx, &w) // the Controller may be away: again
				cancel()
			}
		})
	}

	changes := map[string]int{} // of users, in this phase
	act := func() {
		g, user := gateways[rng.IntN(len(gateways))], fmt.Sprint("u", rng.IntN(ledgerUsers))
		m := g.members[user]
		switch {
		case m == nil:
			m = g.reports.Member(user, "", heard{})
			if err := m.Join(""); err != nil {
				t.Fatal(err)
			}
			g.members[user], g.rooms[user] = m, map[string]bool{}
		case rng.IntN(4) == 0:
			m.Close()
			changes[user] += 1 + len(g.rooms[user]) // of a user's watch each room ends
			delete(g.members, user)
			delete(g.rooms, user)
			return
		}
		room := ledgerRooms[rng.IntN(len(ledgerRooms))]
		changes[user] += 2 // it may have connected, too
		if g.rooms[user][room] {
			delete(g.rooms[user], room)
			if err := m.Leave(room); err != nil {
				t.Fatal(err)
			}
			return
		}
		g.rooms[user][room] = true
		if err := m.Join(room); err != nil {
			t.Fatal(err)
		}
	}
	settle := func(what string) {
		t.Helper()
		end := time.Now().Add(2 * time.Minute)
		for _, b := range books {
			for {
				want := truth(gateways, b.of)
				b.mu.Lock()
				equal, wrong, have := b.state != nil && maps.Equal(b.state, want), b.wrong, maps.Clone(b.state)
				b.mu.Unlock()
				if wrong != nil {
					t.Fatalf("%s, %s%s: %v", what, b.of.Room, b.of.User, wrong)
				}
				if equal {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("%s: %s%s has %v, want %v", what, b.of.Room, b.of.User, have, want)
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
	}
	still := func(what string) {
		t.Helper()
		time.Sleep(200 * time.Millisecond) // more would come now
		settle(what + ", a little later")
		for _, b := range books {
			b.mu.Lock()
			for user, n := range b.events {
				if n > changes[user] {
					t.Errorf("%s, %s%s: %d changes of %q are told, and there were %d at most", what, b.of.Room, b.of.User, n, user, changes[user])
				}
			}
			for reason, n := range b.snapshots {
				if reason != pubsub.SnapshotReason_SNAPSHOT_INITIAL || n > 1 {
					t.Errorf("%s, %s%s: %d snapshots for %v", what, b.of.Room, b.of.User, n, reason)
				}
			}
			b.mu.Unlock()
		}
	}

	faults := map[string]func(){
		"nothing": func() {},
		"a Controller is restarted": func() {
			i := rng.IntN(len(c.addrs))
			c.stopped[i]()
			c.start(i)
		},
		"the Controllers are away for a while": func() {
			for i := range c.addrs {
				c.stopped[i]()
			}
			time.Sleep(time.Second)
			for i := range c.addrs {
				c.start(i)
			}
		},
	}
	if redis != nil {
		faults["Redis is lost"] = func() {
			redis.Kill()
			redis.Up()
		}
	}
	if redis != nil && os.Getenv("LONG") == "" { // the rest is as with memory
		maps.DeleteFunc(faults, func(what string, _ func()) bool { return what != "Redis is lost" })
	}
	for range 20 {
		act()
	}
	settle("at the beginning")
	rounds := 1
	if os.Getenv("LONG") != "" {
		rounds = 10
	}
	for range rounds {
		for what, fault := range faults {
			for _, quiet := range []bool{true, false} {
				if os.Getenv("LONG") == "" && (quiet != (rng.IntN(2) == 0)) {
					continue // one of the two, as chance has it
				}
				clear(changes)
				for _, b := range books {
					b.forget()
				}
				if fault(); !quiet {
					for range 30 {
						act()
						time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond)
					}
				}
				settle(what)
				still(what)
			}
		}
	}
}

// roomsOf asks a directory as the engine does.
func roomsOf(dir *route.Directory) func(ctx context.Context, room string) (*route.Snapshot, error) {
	return func(ctx context.Context, room string) (*route.Snapshot, error) {
		now := time.Now()
		if s := dir.Rooms.Cached(0, room, now); s != nil {
			return s, nil
		}
		a := make(answer, 1)
		dir.Rooms.Ask(0, []string{room}, now, a)
		select {
		case s := <-a:
			if s == nil {
				return nil, engine.ErrUnavailable
			}
			return s, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// answer waits for what a look-up brings.
type answer chan *route.Snapshot

func (answer) Lookup(ctx context.Context, _ string) (context.Context, func(error)) {
	return ctx, func(error) {}
}

func (a answer) Routed(_ []string, snaps []*route.Snapshot, _ error) {
	if len(snaps) == 0 {
		close(a)
		return
	}
	a <- snaps[0]
}
