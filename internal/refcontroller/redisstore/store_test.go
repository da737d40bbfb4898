package redisstore

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/redistest"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/refcontroller/storetest"
	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		serveChild(strings.Split(text, " "))
		return
	}
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("github.com/VictoriaMetrics/metrics.summariesSwapCron"),
		// go-redis keeps one for the process (redis/go-redis#3620).
		goleak.IgnoreAnyFunction("github.com/redis/go-redis/v9/internal/pool.startGlobalTimeCache.func1"))
}

// opened is a store of a Controller that nobody watches.
func opened(tb testing.TB, cfg Config, url string, tell func(refcontroller.Change)) *Store {
	tb.Helper()
	s := running(tb, cfg, url, tell, func(context.Context) error { return nil })
	eventually(tb, "the store is found", func() bool { return s.ID() != "" })
	return s
}

func running(tb testing.TB, cfg Config, url string, tell func(refcontroller.Change), settle func(context.Context) error) *Store {
	tb.Helper()
	var err error
	if cfg.Target, err = Parse(url); err != nil {
		tb.Fatal(err)
	}
	s := New(cfg)
	s.Notify(tell)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); s.Run(ctx, settle) }()
	tb.Cleanup(func() {
		cancel()
		<-ended
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatal("not within two minutes: " + what)
		}
	}
}

func nothing(refcontroller.Change) {}

func TestRedisIsAStore(t *testing.T) {
	server := redistest.Start(t)
	n := 0
	storetest.Run(t, func(t *testing.T, limit int, tell func(refcontroller.Change)) refcontroller.Store {
		n++
		return opened(t, Config{Prefix: fmt.Sprint("test-", n), MaxUsers: limit}, server.URL(), tell)
	})
}

// Of rooms that are read in pages of a few members each, and change meanwhile.
func TestRoomsThatAreReadInPages(t *testing.T) {
	server := redistest.Start(t, "--hash-max-listpack-entries", "0")
	n := 0
	storetest.RunRoutes(t, func(t *testing.T, limit int, tell func(refcontroller.Change)) refcontroller.Store {
		n++
		s := opened(t, Config{Prefix: fmt.Sprint("test-", n), MaxUsers: limit}, server.URL(), tell)
		s.page = 2
		return s
	})
}

// A Controller that was not there for an entry of the stream says that anything may have changed.
func TestGapInTheStreamIsToldAsAll(t *testing.T) {
	server := redistest.Start(t)
	told := make(chan refcontroller.Change, 1000)
	s := opened(t, Config{}, server.URL(), func(c refcontroller.Change) {
		if c.All || len(c.Users)+len(c.Moves) > 0 {
			told <- c
		}
	})
	err := s.client.Eval(t.Context(), `local n = redis.call('HINCRBY', KEYS[1], 'n', 5)
		return redis.call('XADD', KEYS[2], n .. '-0', 'r', 'r', 'u', 'missed')`, []string{s.keys[0], s.changes}).Err()
	if err != nil {
		t.Fatal(err)
	}
	if c := <-told; !c.All {
		t.Errorf("told %v", c)
	}
	if _, err := s.Join(t.Context(), refcontroller.Join{Reporter: refcontroller.Reporter{Node: "n"}, User: "u", Room: "r"}); err != nil {
		t.Fatal(err)
	}
	if c := <-told; c.All || c.Moves[0].User != "u" {
		t.Errorf("after the gap: told %v", c)
	}
}

func join(s *Store, user string) error {
	_, err := s.Join(context.Background(), refcontroller.Join{Reporter: refcontroller.Reporter{Node: "n"}, User: user, Room: "r"})
	return err
}

// Redis that was emptied is another store: nothing is read from it, or written into it, as if it were
// the one from before.
func TestEmptiedRedisIsAnotherStore(t *testing.T) {
	server := redistest.Start(t)
	for name, empty := range map[string]func(s *Store){
		"flushed":   func(s *Store) { s.client.FlushAll(context.Background()) },
		"restarted": func(*Store) { server.Kill(); server.Up() },
	} {
		t.Run(name, func(t *testing.T) {
			s := opened(t, Config{}, server.URL(), nothing)
			if err := join(s, "u"); err != nil {
				t.Fatal(err)
			}
			before := s.ID()
			s.Believe(before)
			eventually(t, "it is believed", s.Believed)
			if err := s.Hear(t.Context(), refcontroller.Reporter{Node: "n", Boot: "b"}, before); err != nil {
				t.Fatal(err)
			}
			words, err := s.Words(t.Context())
			if err != nil || !words["n"].Complete || words["n"].Boot != "b" {
				t.Errorf("%v, %v", words, err)
			}
			empty(s)
			for s.ID() == before { // What is answered is an error, or from before.
				presences, err := s.Users(t.Context(), []string{"u"}, false)
				if err == nil && len(presences[0].Nodes) == 0 && s.ID() == before {
					t.Fatal("the user is offline in the store from before")
				}
			}
			if s.Believed() {
				t.Error("it is still believed")
			}
			eventually(t, "reports are taken", func() bool { return join(s, "v") == nil })
			if err := s.Hear(t.Context(), refcontroller.Reporter{Node: "n", Boot: "b"}, before); err != nil {
				t.Fatal(err)
			}
			if words, err := s.Words(t.Context()); err != nil || words["n"].Complete {
				t.Errorf("the node has told the store from before: %v, %v", words, err)
			}
		})
	}
}

// A report waits for those who watch at other Controllers, and for a Controller that is dead until nobody
// can trust it any more.
func TestReportsWaitForTheOtherControllers(t *testing.T) {
	server := redistest.Start(t)
	a := opened(t, Config{}, server.URL(), nothing)
	settled := make(chan struct{})
	b := running(t, Config{}, server.URL(), nothing, func(ctx context.Context) error {
		select {
		case <-settled:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	eventually(t, "they know each other", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return b.ID() != "" && len(a.others) == 1
	})
	if err := join(a, "u"); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := a.Settle(short); err == nil {
		t.Error("nobody at the other Controller has acknowledged, and the report is answered")
	}
	close(settled)
	if err := a.Settle(t.Context()); err != nil {
		t.Error(err)
	}

	// One that is killed says nothing any more.
	err := a.client.Eval(t.Context(), `local t = redis.call('TIME')
		local n = redis.call('HINCRBY', KEYS[1], 'n', 1)
		redis.call('XADD', KEYS[2], n .. '-0', 'j', 'dead 0')
		return redis.call('HSET', KEYS[3], 'dead', string.format('%.0f', t[1] * 1000) .. ' 1500 0')`,
		[]string{a.keys[0], a.changes, strings.TrimSuffix(a.keys[0], "meta") + "controllers"}).Err()
	if err != nil {
		t.Fatal(err)
	}
	if err := join(a, "v"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := a.Settle(t.Context()); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took < 500*time.Millisecond {
		t.Errorf("it was waited for %v, and may be trusted for longer", took)
	}
}

// What was visible when Vouch was called has been told when it returns.
func TestVouchIsBehindWhatWasVisible(t *testing.T) {
	server := redistest.Start(t)
	told := make(chan string, 100)
	s := opened(t, Config{}, server.URL(), func(c refcontroller.Change) {
		for _, m := range c.Moves {
			told <- m.User
		}
	})
	other := opened(t, Config{}, server.URL(), nothing)
	for i := range 10 {
		user := fmt.Sprint("u", i)
		if err := join(other, user); err != nil {
			t.Fatal(err)
		}
		before := time.Now()
		if err := s.Vouch(t.Context(), 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if !s.Told().After(before) {
			t.Error("told until before the call")
		}
		select {
		case got := <-told:
			if got != user {
				t.Errorf("told %q, not %q", got, user)
			}
		default:
			t.Errorf("%q was not told", user)
		}
	}
}

func TestClusterIsAStore(t *testing.T) {
	// Without a port of its own the bus takes one 10,000 higher, which may be anybody's.
	server := redistest.Start(t, "--cluster-enabled", "yes", "--cluster-port", freeport.Take(t, 1)[0])
	n := 0
	storetest.Run(t, func(t *testing.T, limit int, tell func(refcontroller.Change)) refcontroller.Store {
		n++
		cfg := Config{Prefix: fmt.Sprint("test-", n), MaxUsers: limit}
		if n == 1 {
			target, err := Parse(server.URL())
			if err != nil {
				t.Fatal(err)
			}
			one := target.client()
			defer one.Close()
			eventually(t, "the slots are served", func() bool {
				_ = one.Do(t.Context(), "CLUSTER", "ADDSLOTSRANGE", 0, 16383).Err()
				info, err := one.ClusterInfo(t.Context()).Result()
				return err == nil && strings.Contains(info, "cluster_state:ok")
			})
		}
		return opened(t, cfg, server.URL()+"?addr="+server.Addr(), tell)
	})
}

// A replica takes over: it is another store, with what it had, and reports go on there.
func TestReplicaThatTakesOverIsAnotherStore(t *testing.T) {
	primary := redistest.Start(t)
	replica := redistest.Start(t, "--replicaof", "127.0.0.1", primary.Port)
	sentinel := redistest.Sentinel(t, primary)
	s := opened(t, Config{}, sentinel.URL()+"?master_name=primary&addr="+sentinel.Addr(), nothing)
	if err := join(s, "u"); err != nil {
		t.Fatal(err)
	}
	asked := redis.NewSentinelClient(&redis.Options{Addr: sentinel.Addr()})
	defer asked.Close()
	copied := redis.NewClient(&redis.Options{Addr: replica.Addr()})
	defer copied.Close()
	eventually(t, "the replica has a copy, and is known", func() bool {
		list, err := asked.Replicas(t.Context(), "primary").Result()
		n, countErr := copied.HGet(t.Context(), s.keys[0], "count").Int()
		return err == nil && len(list) == 1 && list[0]["master-link-status"] == "ok" && countErr == nil && n == 1
	})
	before := s.ID()
	primary.Kill()
	eventually(t, "the replica is found", func() bool { return s.ID() != before && s.ID() != "" })
	eventually(t, "reports are taken", func() bool { return join(s, "v") == nil })
	presences, err := s.Users(t.Context(), []string{"u", "v"}, false)
	if err != nil || len(presences[0].Nodes) != 1 || len(presences[1].Nodes) != 1 {
		t.Errorf("%v, %v", presences, err)
	}
}

// FuzzStored reads what may stand in Redis.
func FuzzStored(f *testing.F) {
	f.Add("u\x00n", "1 00000000000000000001 1 1700000000 1 2\n", "1 2 3")
	f.Add("", "1 2 3", "1024 1")
	f.Fuzz(func(_ *testing.T, field, record, head string) {
		info := &pubsub.RoomInfo{}
		_ = members(info, []string{field, record, field}, nil)
		_ = members(info, []string{field, record}, map[string]struct{}{})
		_, _, _, _ = parseHead(head)
		_, _ = parseDigests([]string{head, record})
		_, _ = presences(&reply{rest: []any{[]any{field, head}, []any{record, record}}}, 2, nil, true)
		_, _ = Parse(record)
	})
}

func TestURLsOfAllForms(t *testing.T) {
	for text, want := range map[string]string{
		"redis://u:secret@h:1/2": "[h:1] tls=false",
		"rediss://h":             "[h:6379] tls=true",
		"redis://h1:1?addr=h2:2": "[h1:1 h2:2] tls=false",
		"rediss://:secret@s1:1/3?master_name=m&addr=s2:2": "[s1:1 s2:2] tls=true",
		"http://h":                      "error",
		"redis://":                      "error",
		"h:1":                           "error",
		"redis://h?secret=1":            "error",
		"redis://:sec\x7fret@h":         "error",
		"redis://u:secret@h:1/database": "error",
	} {
		target, err := Parse(text)
		got := "error"
		if err == nil {
			addresses := target.Addresses()
			got = fmt.Sprintf("%v tls=%v", addresses, target.TLS())
		} else if strings.Contains(err.Error(), "secret@") {
			t.Errorf("%s: the error has the password: %v", text, err)
		}
		if got != want {
			t.Errorf("%s: %s, want %s (%v)", text, got, want, err)
		}
	}
}

func BenchmarkJoin(b *testing.B) {
	s := opened(b, Config{}, redistest.Start(b).URL(), nothing)
	var n atomic.Int64
	b.ReportAllocs()
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			i := n.Add(1)
			_, err := s.Join(b.Context(), refcontroller.Join{Reporter: refcontroller.Reporter{Node: "n"}, User: fmt.Sprint("u", i), Room: fmt.Sprint("r", i%1000)})
			if err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkDropNode(b *testing.B) {
	s := opened(b, Config{}, redistest.Start(b).URL(), nothing)
	for b.Loop() {
		b.StopTimer()
		for i := range 10_000 {
			hi, lo := halves(slots.Hash(fmt.Sprint("u", i), "r"))
			if _, err := s.do(b.Context(), "join", "n", "", number(0), fmt.Sprint("u", i), "r", slots.Of(slots.Hash(fmt.Sprint("u", i), "r")), hi, lo, "", 0, 0); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
		if n, err := s.DropNode(b.Context(), "n"); n != 10_000 || err != nil {
			b.Fatal(n, err)
		}
	}
}
