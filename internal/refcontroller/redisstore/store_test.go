package redisstore

import (
	"context"
	"fmt"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/internal/redistest"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/refcontroller/storetest"
)

func TestMain(m *testing.M) {
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
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatal("not within 30 s: " + what)
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
