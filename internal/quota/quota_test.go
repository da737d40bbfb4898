package quota

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/transport/discovery"
)

// clock is a wall clock that tests set.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time           { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) set(to time.Time)         { c.ahead.Store(int64(time.Until(to))) }
func (c *clock) date() string             { return c.now().UTC().Format("20060102") }
func noon() time.Time                     { return dayOf(time.Now()).Add(12 * time.Hour) }
func tenants(limit int64) Limits          { return Limits{Tenants: map[string]int64{"shop": limit}} }
func (c *clock) keyOf(name string) string { return Prefix + name + "/" + c.date() }

// instance is a Push-Manager's quotas, with an etcd client as the program makes it.
func instance(t *testing.T, etcd *etcdtest.Server, cfg Config) *Set {
	t.Helper()
	client, err := discovery.NewClient(discovery.ClientConfig{Endpoints: []string{etcd.Endpoint()}})
	must(t, err)
	cfg.Client = client
	s := New(cfg)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.Close(ctx)
		_ = client.Close()
	})
	return s
}

// TestQuotasNeedTheRightToTheirPrefix: docs/security.md names it. Without it QUOTA_ON_ERROR decides.
func TestQuotasNeedTheRightToTheirPrefix(t *testing.T) {
	for prefix, enough := range map[string]bool{Prefix: true, "/services/push-manager/": false} {
		etcd := etcdtest.Start(t)
		etcd.EnableAuth("pm", "secret", prefix)
		client, err := discovery.NewClient(discovery.ClientConfig{Endpoints: []string{etcd.Endpoint()}, Username: "pm", Password: "secret"})
		must(t, err)
		s := New(Config{Client: client, OnError: Deny})
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			s.Close(ctx)
			_ = client.Close()
		})
		s.Update(tenants(100))
		q, counted := s.Tenant("shop"), false
		for deadline := time.Now().Add(time.Minute); !counted && s.failed.Get() == 0 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			_ = q.Take()
			reply, err := client.Get(t.Context(), Prefix, clientv3.WithPrefix())
			counted = err == nil && reply.Count > 0
		}
		if counted != enough {
			t.Errorf("with the right to %s: counted %v", prefix, counted)
		}
		if err := q.Take(); !enough && !errors.Is(err, ErrUnavailable) {
			t.Errorf("without the right: %v", err)
		}
	}
}

// spend takes pushes until nothing is left of the day, and returns how many there were. It asks again while a slice
// is on its way.
func spend(t *testing.T, quotas ...*Quota) int64 {
	t.Helper()
	var total atomic.Int64
	var all sync.WaitGroup
	deadline := time.Now().Add(time.Minute)
	for _, q := range quotas {
		for range 4 {
			all.Go(func() {
				for time.Now().Before(deadline) {
					switch err := q.Take(); {
					case err == nil:
						total.Add(1)
					case errors.Is(err, ErrUsedUp):
						return
					default:
						time.Sleep(time.Millisecond)
					}
				}
				t.Error("the quota was not used up in time")
			})
		}
	}
	all.Wait()
	return total.Load()
}

// takeMany takes n pushes, all of which must pass.
func takeMany(t *testing.T, q *Quota, n int) {
	t.Helper()
	for i := range n {
		if err := q.Take(); err != nil {
			t.Fatalf("push %d of %d: %v", i, n, err)
		}
	}
}

func refused(t *testing.T, q *Quota, want error) {
	t.Helper()
	if err := q.Take(); !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

// value is what stands at a key, "" for nothing.
func value(t *testing.T, etcd *etcdtest.Server, key string) string {
	t.Helper()
	reply, err := etcd.Client().Get(t.Context(), key)
	must(t, err)
	if len(reply.Kvs) == 0 {
		return ""
	}
	return string(reply.Kvs[0].Value)
}

// counter is the count at a key, -1 if there is none.
func counter(t *testing.T, etcd *etcdtest.Server, key string) int64 {
	t.Helper()
	if n, ok := parse([]byte(value(t, etcd, key))); ok {
		return n
	}
	return -1
}

func TestThreeInstancesStopWithinAPercentOfTheLimit(t *testing.T) {
	etcd := etcdtest.Start(t)
	for name, test := range map[string]struct {
		limit int64
		idle  int // instances that spend one push each in the morning, and nothing after it
	}{
		"all-spend":     {limit: 100_000},
		"two-are-idle":  {limit: 100_000, idle: 2},
		"a-large-limit": {limit: 3_000_000, idle: 1},
		"a-small-limit": {limit: 1_000},
	} {
		t.Run(name, func(t *testing.T) {
			var all []*Quota
			for range 3 {
				s := instance(t, etcd, Config{})
				s.Update(Limits{Tenants: map[string]int64{name: test.limit}})
				all = append(all, s.Tenant(name))
			}
			for _, q := range all {
				takeMany(t, q, 1)
			}
			total := 3 + spend(t, all[test.idle:]...)
			t.Logf("limit %d, passed %d", test.limit, total)
			if off := test.limit - total; off*100 > test.limit || off < 0 {
				t.Errorf("%d pushes passed, limit %d; etcd was there, so there was no reason to let more pass", total, test.limit)
			}
		})
	}
}

func TestAPushNeverWaitsWhileEtcdIsAway(t *testing.T) {
	etcd := etcdtest.Start(t)
	s := instance(t, etcd, Config{RequestTimeout: time.Hour})
	s.Update(tenants(1_000_000))
	q := s.Tenant("shop")
	takeMany(t, q, 1)
	etcd.Stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 10_000 {
			_ = q.Take()
		}
	}()
	eventually(t, "10,000 pushes: one of them waits for etcd", func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	})
	if n := testing.AllocsPerRun(1000, func() { _ = q.Take() }); n != 0 {
		t.Errorf("a push allocates %v times", n)
	}
}

func (s *Set) isAway() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.away
}

func TestAllowedWithoutEtcdUntilOneInstanceAloneHasUsedUpTheDay(t *testing.T) {
	etcd := etcdtest.Start(t)
	var c clock
	c.set(noon())
	s := instance(t, etcd, Config{now: c.now})
	s.Update(tenants(10_000))
	q := s.Tenant("shop")
	takeMany(t, q, 100)
	eventually(t, "the pushes are in the counter", func() bool { return counter(t, etcd, c.keyOf("shop")) >= 100 })
	etcd.Stop()
	eventually(t, "it is noticed that etcd is away", s.isAway)
	takeMany(t, q, 3_000)
	if rest := spend(t, q); rest != 6_900 {
		t.Errorf("%d pushes passed after that, want 6900", rest)
	}
	etcd.Restart()
	eventually(t, "what passed is booked when etcd is back", func() bool { return counter(t, etcd, c.keyOf("shop")) == 10_000 })
	eventually(t, "the instance knows it", func() bool { return errors.Is(q.Take(), ErrUsedUp) }) // etcd knew it first
	if n := spend(t, q); n != 0 {
		t.Errorf("%d pushes passed beyond the day's", n)
	}
}

func TestDeniedWithoutEtcdOnceTheSliceIsSpent(t *testing.T) {
	etcd := etcdtest.Start(t)
	s := instance(t, etcd, Config{OnError: Deny})
	s.Update(tenants(100_000))
	q := s.Tenant("shop")
	eventually(t, "the counter is known", func() bool { return q.Take() == nil })
	eventually(t, "a slice is here", func() bool { return q.left.Load() > 10 })
	etcd.Stop()
	eventually(t, "it is noticed that etcd is away", s.isAway)
	passed := 0
	for q.Take() == nil {
		passed++
	}
	if passed == 0 || passed > 1000 {
		t.Errorf("%d pushes passed, want what was here", passed)
	}
	refused(t, q, ErrUnavailable)
	etcd.Restart()
	eventually(t, "pushes pass when etcd is back", func() bool { return q.Take() == nil })
}

func TestDeniedFromTheStartUntilTheCounterIsKnown(t *testing.T) {
	s := instance(t, etcdtest.Reserve(t), Config{OnError: Deny})
	s.Update(tenants(100_000))
	refused(t, s.Tenant("shop"), ErrUnavailable)
}

func TestTheDayChangesAtMidnightWithoutAGap(t *testing.T) {
	etcd := etcdtest.Start(t)
	var c clock
	c.set(noon())
	fast := instance(t, etcd, Config{now: c.now, OnError: Deny})
	slow := instance(t, etcd, Config{now: func() time.Time { return c.now().Add(-time.Minute) }, OnError: Deny})
	fast.Update(tenants(1_000))
	slow.Update(tenants(1_000))
	mine, other := fast.Tenant("shop"), slow.Tenant("shop")
	if n := spend(t, mine); n != 1_000 {
		t.Fatalf("%d pushes passed, want 1000", n)
	}
	eventually(t, "the other one knows", func() bool { used, _ := slow.Usage(other); return used == 1_000 })
	refused(t, other, ErrUsedUp)
	yesterday := c.keyOf("shop")

	c.set(Resets(noon()).Add(time.Second))
	eventually(t, "the new day has begun", func() bool {
		err := mine.Take()
		if errors.Is(err, ErrPending) || errors.Is(err, ErrUnavailable) {
			t.Error("a new day begins with a wait for etcd")
		}
		return err == nil
	})
	refused(t, other, ErrUsedUp) // its day is not over
	eventually(t, "the new key is there", func() bool { return counter(t, etcd, c.keyOf("shop")) > 0 })
	if n := counter(t, etcd, yesterday); n != 1_000 {
		t.Errorf("yesterday's counter is %d, want 1000", n)
	}

	begun := fast.today()
	c.set(Resets(noon()).Add(-time.Second))
	fast.begin(c.now())
	if fast.today() != begun {
		t.Error("a clock that is set back by seconds begins yesterday again")
	}
	c.set(noon().AddDate(0, 0, -3)) // it was wrong for long
	eventually(t, "the true day has begun", func() bool { return mine.Take() == nil && counter(t, etcd, c.keyOf("shop")) > 0 })
}

func (s *Set) today() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.day
}

func TestAHostileCounterHarmsItsQuotaAlone(t *testing.T) {
	etcd := etcdtest.Start(t)
	for name, test := range map[string]struct {
		value string
		stops bool // the quota is used up; otherwise it goes on, and the counter is a count again
	}{
		"empty":             {value: ""},
		"garbage":           {value: "\x00\xff{not a number\n"},
		"negative":          {value: "-5000000"},
		"a-plus":            {value: "+5"},
		"beyond-64-bits":    {value: strings.Repeat("9", 30)},
		"a-megabyte":        {value: strings.Repeat("1", 1<<20)},
		"less-than-we-took": {value: "0"},
		"huge":              {value: "9223372036854775807", stops: true},
		"the-limit":         {value: "100000", stops: true},
	} {
		t.Run(name, func(t *testing.T) {
			var log syncBuffer
			var c clock
			c.set(noon())
			s := instance(t, etcd, Config{now: c.now, Logger: slog.New(slog.NewTextHandler(&log, nil))})
			s.Update(Limits{Tenants: map[string]int64{"hit-" + name: 100_000, "spared-" + name: 100_000}})
			hit, spared := s.Tenant("hit-"+name), s.Tenant("spared-"+name)
			takeMany(t, hit, 50)
			takeMany(t, spared, 50)
			eventually(t, "both are counted", func() bool {
				return counter(t, etcd, c.keyOf("hit-"+name)) >= 50 && counter(t, etcd, c.keyOf("spared-"+name)) >= 50
			})
			_, err := etcd.Client().Put(t.Context(), c.keyOf("hit-"+name), test.value)
			must(t, err)
			if test.stops {
				eventually(t, "it is used up", func() bool { return errors.Is(hit.Take(), ErrUsedUp) })
			} else {
				takeMany(t, hit, 500)
				eventually(t, "the counter is whole again", func() bool { return counter(t, etcd, c.keyOf("hit-"+name)) >= 550 })
			}
			takeMany(t, spared, 500)
			said, want := strings.Count(log.String(), "not what this program writes"), 1
			if test.stops {
				want = 0 // it may be true
			}
			if said != want || len(log.String()) > 2000 {
				t.Errorf("said %d times, want %d:\n%s", said, want, log.String())
			}
		})
	}
}

// syncBuffer is a log that is read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestTenantsAndCallersHaveCountersOfTheirOwn(t *testing.T) {
	etcd := etcdtest.Start(t)
	var c clock
	c.set(noon())
	s := instance(t, etcd, Config{now: c.now})
	s.Update(Limits{Tenants: map[string]int64{"a": 100_000, "none": 0}, Callers: map[string]int64{"a": 100_000, "b/c": 100_000}})
	takeMany(t, s.Tenant("a"), 1)
	takeMany(t, s.Caller("b/c"), 1)
	if s.Tenant("b/c") != nil || s.Tenant("none") != nil || s.Caller("nobody") != nil {
		t.Error("somebody has a quota without a limit")
	}
	for _, name := range []string{"a", "_callers/b%2Fc"} {
		eventually(t, "the counter of "+name, func() bool { return counter(t, etcd, c.keyOf(name)) > 0 })
	}
	reply, err := etcd.Client().Get(t.Context(), c.keyOf("a"))
	must(t, err)
	lease, err := etcd.Client().TimeToLive(t.Context(), clientv3.LeaseID(reply.Kvs[0].Lease))
	must(t, err)
	if lease.GrantedTTL != 48*60*60 {
		t.Errorf("the key lives for %d s", lease.GrantedTTL)
	}
}

func TestAnotherLimitKeepsWhatIsSpent(t *testing.T) {
	etcd := etcdtest.Start(t)
	set := metrics.NewSet()
	s := instance(t, etcd, Config{Metrics: set})
	s.Update(tenants(1_000))
	q := s.Tenant("shop")
	first := spend(t, q)
	s.Update(tenants(1_500))
	second := spend(t, q)
	if s.Tenant("shop") != q || first != 1_000 || second != 500 {
		t.Errorf("%d and %d more pushes passed, want 1000 and 500", first, second)
	}
	s.Update(tenants(200))
	refused(t, q, ErrUsedUp)
	shown := func() string {
		var b bytes.Buffer
		set.WritePrometheus(&b)
		return b.String()
	}
	for _, line := range []string{`push_manager_quota_used{tenant="shop"} 1500`, `push_manager_quota_limit{tenant="shop"} 200`} {
		if !strings.Contains(shown(), line) {
			t.Errorf("no %s in\n%s", line, shown())
		}
	}
	s.Update(Limits{})
	if s.Tenant("shop") != nil || strings.Contains(shown(), "shop") {
		t.Error("a tenant stays that has left the policy")
	}
}

func TestWhatIsHeldIsGivenBackAtTheEnd(t *testing.T) {
	etcd := etcdtest.Start(t)
	var c clock
	c.set(noon())
	s := instance(t, etcd, Config{now: c.now})
	s.Update(tenants(1_000_000))
	takeMany(t, s.Tenant("shop"), 10)
	eventually(t, "a slice is here", func() bool { return s.Tenant("shop").left.Load() > 500 })
	s.Close(t.Context())
	if n := counter(t, etcd, c.keyOf("shop")); n != 10 {
		t.Errorf("the counter is %d, want 10", n)
	}
}

// FuzzCounter: whatever stands in a counter, no more than the limit is taken from it, and nothing negative is written.
func FuzzCounter(f *testing.F) {
	for _, v := range []string{"", "0", "12", "-1", "100000", "9223372036854775807", "99999999999999999999", "1e3", " 1", "１"} {
		f.Add([]byte(v), int64(100_000), int64(500), int64(-20))
	}
	f.Fuzz(func(t *testing.T, value []byte, limit, taken, left int64) {
		if limit <= 0 || taken < 0 || taken > limit || left > limit || left < -limit {
			return
		}
		q := &Quota{wake: make(chan struct{}, 1), limit: limit, counter: taken, taken: taken}
		q.left.Store(left)
		q.learnLocked(value, 1)
		q.boundLocked(false, false)
		want := q.wantLocked()
		if q.counter < taken || want < 0 || want > q.restLocked() || want > 0 && q.counter+want > limit {
			t.Fatalf("value %q: counter %d, wants %d of %d", value, q.counter, want, limit)
		}
		if q.floor.Load() > 0 || q.floor.Load() < -q.restLocked() {
			t.Fatalf("floor %d with %d left", q.floor.Load(), q.restLocked())
		}
	})
}
