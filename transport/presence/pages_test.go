package presence_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/redistest"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/refcontroller/redisstore"
	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/controller"
	"github.com/push-manager/push-manager/transport/presence"
)

// TestPagesOfAMillionMembersHoldNoPushUp reads a room of a million in pages, again and again, while pushes run that need a look-up at
// the same Controller each. It tells the percentiles of pushes with and without, by turns.
func TestPagesOfAMillionMembersHoldNoPushUp(t *testing.T) {
	if os.Getenv("LONG") == "" {
		t.Skip("a room of a million takes minutes: LONG=1 runs it")
	}
	t.Run("in memory", func(t *testing.T) { testPages(t, refcontroller.NewMemory(0), 1_000_000) })
	t.Run("on Redis", func(t *testing.T) {
		target, err := redisstore.Parse(redistest.Start(t).URL())
		if err != nil {
			t.Fatal(err)
		}
		store := redisstore.New(redisstore.Config{Target: target})
		t.Cleanup(func() { _ = store.Close() })
		testPages(t, store, 1_000_000)
	})
}

// everywhere is a network of one node that takes everything at once.
type everywhere struct{}

func (everywhere) Link(int, string) engine.Link               { return everywhere{} }
func (everywhere) Links(int) []engine.Link                    { return []engine.Link{everywhere{}} }
func (everywhere) Node() string                               { return "n0" }
func (everywhere) Scopes() bool                               { return true }
func (everywhere) Nudge(_ string, _ uint64, done func(bool))  { done(false) }
func (everywhere) Describe(*engine.Delivery) engine.LinkState { return engine.LinkState{} }
func (everywhere) Send(d *engine.Delivery) engine.Reason {
	if d.TrySend() {
		_, _ = d.Ack(engine.Ack{Delivered: d.Targets()})
	}
	return engine.Sent
}

func testPages(t *testing.T, store refcontroller.Store, members int) {
	server, err := refcontroller.New(refcontroller.Config{Store: store})
	if err != nil {
		t.Fatal(err)
	}
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(lis) }()
	t.Cleanup(func() { server.Close(); <-served })
	for store.ID() == "" {
		time.Sleep(time.Millisecond)
	}

	// Everybody in the large room, and rooms of 20.
	bySlot := map[int][]refcontroller.Join{}
	add := func(user, room string) {
		slot := slots.Of(slots.Hash(user, room))
		bySlot[slot] = append(bySlot[slot], refcontroller.Join{User: user, Room: room, Name: "Name of " + user})
	}
	for i := range members {
		add(fmt.Sprintf("user-%07d", i), "large")
	}
	const rooms = 2000
	for i := range rooms * 20 {
		add(fmt.Sprintf("user-%07d", i), fmt.Sprint("room-", i/20))
	}
	for slot, joins := range bySlot {
		if err := store.SetSlot(t.Context(), refcontroller.Reporter{Node: "n0", Boot: "b", Seq: 1}, slot, joins); err != nil {
			t.Fatal(err)
		}
	}
	bySlot = nil
	runtime.GC()

	asks, err := controller.New(controller.Config{Address: lis.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	shards, err := shard.New(shard.Config{Count: 2})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := route.New(route.Config{
		Source: asks, Shards: shards.Len(), LookupTimeout: 5 * time.Second,
		Shard: func(key string) int { return shards.For(key).Index() }, Go: func(i int, task func()) error { return shards.At(i).Go(task) },
	})
	if err != nil {
		t.Fatal(err)
	}
	e, err := engine.New(engine.Config{Shards: shards, Directory: dir, Network: everywhere{}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := presence.New(presence.Config{
		Controller: asks, Room: e.Room,
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
		_ = e.Drain(context.Background())
		_ = shards.Close(context.Background())
		dir.Close()
	})

	// One push each two milliseconds; of three one needs a look-up, of a room that nobody knows.
	pushes := 0
	window := func(d time.Duration) []time.Duration {
		var took []time.Duration
		var mu sync.Mutex
		var open sync.WaitGroup
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(d); time.Now().Before(end); {
			<-tick.C
			pushes++
			room := fmt.Sprint("room-", pushes%rooms)
			if pushes%3 == 0 {
				room = fmt.Sprint("nobody's-", pushes)
			}
			open.Go(func() {
				p := &engine.Push{Request: engine.Request{Kind: engine.ToRoom, Room: room, Payload: []byte("x"), Content: engine.Content{Present: true, DataLen: 1}}}
				began := time.Now()
				if _, err := e.Do(context.Background(), p); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				took = append(took, time.Since(began))
			})
		}
		open.Wait()
		return took
	}
	read, pages, rounds := 0, 0, 0
	paging := func(ctx context.Context) {
		seen := map[string]struct{}{}
		for token := ""; ctx.Err() == nil; {
			page, err := s.Members(ctx, "", "large", token, 1000)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			pages++
			read += len(page.GetMembers())
			for _, m := range page.GetMembers() {
				seen[m.GetUserId()] = struct{}{}
			}
			if token = page.GetNextPageToken(); token == "" {
				if rounds++; len(seen) != members {
					t.Errorf("%d members in all pages", len(seen))
				}
				clear(seen)
			}
		}
	}
	var without, with []time.Duration
	window(3 * time.Second) // the first look-ups
	for range 4 {
		without = append(without, window(3*time.Second)...)
		ctx, cancel := context.WithCancel(t.Context())
		var reader sync.WaitGroup
		reader.Go(func() { paging(ctx) })
		with = append(with, window(3*time.Second)...)
		cancel()
		reader.Wait()
	}
	// At the end the room is read to its end, which 3 s may be too short for.
	ctx, cancel := context.WithCancel(t.Context())
	began := time.Now()
	for token := ""; ; {
		page, err := s.Members(ctx, "", "large", token, 1000)
		if err != nil {
			t.Fatal(err)
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	cancel()
	whole := time.Since(began)
	of := func(took []time.Duration, part float64) time.Duration {
		slices.Sort(took)
		return took[int(float64(len(took)-1)*part)].Round(time.Microsecond)
	}
	t.Logf("%d pushes without pages: p50 %v, p99 %v; %d with %d pages (%d members): p50 %v, p99 %v; all %d members in %v",
		len(without), of(without, .5), of(without, .99), len(with), pages, read, of(with, .5), of(with, .99), members, whole.Round(time.Millisecond))
	if a, b := of(without, .99), of(with, .99); b > a*12/10+500*time.Microsecond {
		t.Errorf("p99 is %v with pages, and %v without", b, a)
	}
}
