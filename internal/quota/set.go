package quota

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/label"
	"github.com/push-manager/push-manager/internal/pause"
	"github.com/push-manager/push-manager/internal/plain"
)

// Prefix begins all keys.
const Prefix = "/push-manager/quota/"

const (
	// keep is how long a key lives after its writer's lease was granted: the day, and one more to look at it.
	keep = 48 * time.Hour
	// perRequest is how many quotas share a request. etcd allows 128 operations in one, and each has two here.
	perRequest = 64
	// refresh is how often the counter of a quota in use is read when nothing is taken from it, refreshIdle that of
	// others and of those that are used up.
	refresh     = time.Second
	refreshIdle = 5 * time.Second
	// firstPause and lastPause bound the pause after a request that failed. It doubles.
	firstPause, lastPause = 100 * time.Millisecond, 2 * time.Second
)

// The values of Config.OnError.
const (
	Allow = "allow"
	Deny  = "deny"
)

// Config of a Set. Client is required.
type Config struct {
	// Client reaches etcd. The caller closes it after the Set.
	Client *clientv3.Client
	// OnError is what happens to pushes while etcd does not answer and the slice is spent: Allow, which is the
	// default, or Deny.
	OnError string
	// RequestTimeout bounds one request. Default 3 s.
	RequestTimeout time.Duration

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own

	now func() time.Time // nil: the clock
}

// Limits are the pushes a day of those that have a quota, by name.
type Limits struct{ Tenants, Callers map[string]int64 }

// quotas is what the limits of one policy became.
type quotas struct{ tenants, callers map[string]*Quota }

// Set is all quotas of a Push-Manager.
type Set struct {
	// Static after New.
	cfg                   Config
	wake                  chan struct{}
	stop                  context.CancelFunc
	end                   sync.WaitGroup
	requests, failed, bad *metrics.Counter

	current atomic.Pointer[quotas] // replaced under mu

	// Owned by loop.
	lease   clientv3.LeaseID // of the day's keys, 0 for none
	backoff time.Duration
	retryAt time.Time

	mu   sync.Mutex
	day  time.Time // its beginning
	away bool      // the last request failed
}

// New makes a Set without quotas.
func New(cfg Config) *Set {
	if cfg.OnError == "" {
		cfg.OnError = Allow
	}
	if cfg.RequestTimeout == 0 {
		cfg.RequestTimeout = 3 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	if cfg.now == nil {
		cfg.now = time.Now
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &Set{
		cfg: cfg, wake: make(chan struct{}, 1), stop: stop, day: dayOf(cfg.now()),
		requests: cfg.Metrics.GetOrCreateCounter(`push_manager_quota_requests_total{result="ok"}`),
		failed:   cfg.Metrics.GetOrCreateCounter(`push_manager_quota_requests_total{result="failed"}`),
		bad:      cfg.Metrics.GetOrCreateCounter("push_manager_quota_bad_counters_total"),
	}
	s.current.Store(&quotas{})
	cfg.Metrics.GetOrCreateGauge("push_manager_quota_etcd_up", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.away {
			return 0
		}
		return 1
	})
	s.end.Go(func() { s.loop(ctx) })
	return s
}

func (s *Set) deny() bool { return s.cfg.OnError == Deny }

// Tenant is the quota of a tenant, nil if it has none.
func (s *Set) Tenant(name string) *Quota { return s.current.Load().tenants[name] }

// Caller is the quota of a caller, nil if it has none.
func (s *Set) Caller(name string) *Quota { return s.current.Load().callers[name] }

// Update sets who has a quota. Those that stay keep what they have spent, with another limit if need be. A limit of
// 0 or less is none.
func (s *Set) Update(l Limits) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.current.Load()
	next := &quotas{
		tenants: s.updateLocked(before.tenants, l.Tenants, Prefix),
		callers: s.updateLocked(before.callers, l.Callers, Prefix+"_callers/"),
	}
	for name := range before.tenants {
		if next.tenants[name] == nil {
			for _, metric := range metricsOf(name) {
				s.cfg.Metrics.UnregisterMetric(metric)
			}
		}
	}
	for name, q := range next.tenants {
		names := metricsOf(name)
		s.cfg.Metrics.GetOrCreateGauge(names[0], func() float64 { used, _ := s.Usage(q); return float64(used) })
		s.cfg.Metrics.GetOrCreateGauge(names[1], func() float64 { _, limit := s.Usage(q); return float64(limit) })
	}
	s.current.Store(next)
	notify(s.wake)
}

func metricsOf(tenant string) [2]string {
	return [...]string{
		label.Name("push_manager_quota_used", "tenant", tenant),
		label.Name("push_manager_quota_limit", "tenant", tenant),
	}
}

func (s *Set) updateLocked(before map[string]*Quota, limits map[string]int64, prefix string) map[string]*Quota {
	next := make(map[string]*Quota, len(limits))
	for name, limit := range limits {
		if limit <= 0 {
			continue
		}
		q := before[name]
		if q == nil {
			q = &Quota{prefix: prefix + url.PathEscape(name) + "/", wake: s.wake}
		}
		q.limit = limit
		q.boundLocked(s.away, s.deny())
		next[name] = q
	}
	return next
}

// Usage is what is spent of a quota today over all instances, as far as this one knows, and its limit. What others
// hold counts as spent.
func (s *Set) Usage(q *Quota) (used, limit int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(q.counter-q.left.Load(), 0), q.limit
}

// Close gives back what is held and ends the Set. Take goes on to work with what is left then: nothing but credit.
// When etcd cannot be told within ctx, what was held is lost until midnight.
func (s *Set) Close(ctx context.Context) {
	s.stop()
	s.end.Wait()
	if err := s.giveBack(ctx); err != nil {
		s.cfg.Logger.Warn("quotas held in advance are not given back", "error", plain.Line(err.Error(), 300))
	}
}

func (s *Set) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.wake:
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		timer.Reset(s.turn(ctx))
	}
}

// turn does what has to be done now, and tells when there is more. A panic is no reason to end: etcd's answers are input.
func (s *Set) turn(ctx context.Context) (next time.Duration) {
	defer func() {
		if v := recover(); v != nil {
			s.cfg.Logger.Error("panic in the quotas", "panic", v, "stack", string(debug.Stack()))
			next = lastPause
		}
	}()
	now := s.cfg.now()
	s.begin(now)
	next = min(refresh, Resets(now).Sub(now))
	if wait := time.Until(s.retryAt); wait > 0 {
		return min(wait, next)
	}
	for _, chunk := range s.dueNow(time.Now()) {
		if err := s.exchange(ctx, chunk); err != nil {
			return min(s.failure(ctx, err), next)
		}
		s.success()
	}
	if len(s.dueNow(time.Now())) > 0 { // others were faster, or there was more credit taken meanwhile
		return pause.Jitter(2 * time.Millisecond)
	}
	return next
}

// all is a sequence of the quotas there are.
func (s *Set) all() func(func(*Quota) bool) {
	return func(yield func(*Quota) bool) {
		c := s.current.Load()
		for _, m := range []map[string]*Quota{c.tenants, c.callers} {
			for q := range maps.Values(m) {
				if !yield(q) {
					return
				}
			}
		}
	}
}

// dueNow is the quotas to ask etcd about, in chunks for a request each. Of a quota that is used up a slice is not
// asked for with each push that is refused.
func (s *Set) dueNow(now time.Time) (chunks [][]*Quota) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for q := range s.all() {
		age := now.Sub(q.read)
		switch rest := q.restLocked(); {
		case age >= refreshIdle, age >= refresh && q.left.Load() != q.unmoved:
		case !q.due.Load() || rest == 0:
			continue
		case q.wantLocked() == 0:
			q.due.Store(false)
			continue
		}
		if n%perRequest == 0 {
			chunks = append(chunks, nil)
		}
		chunks[n/perRequest] = append(chunks[n/perRequest], q)
		n++
	}
	return chunks
}

// exchange reads the counters of some quotas, and takes from them what is wanted: for each a compare-and-swap of its
// own, all in one request.
func (s *Set) exchange(ctx context.Context, chunk []*Quota) error {
	if s.lease == 0 {
		ctx, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
		defer cancel()
		granted, err := s.cfg.Client.Grant(ctx, int64(keep/time.Second))
		if err != nil {
			return fmt.Errorf("grant a lease: %w", err)
		}
		s.lease = granted.ID
	}
	s.mu.Lock()
	changes := make([]change, len(chunk))
	for i, q := range chunk {
		changes[i].quota = q
		if q.due.Swap(false) { // whoever spends from now on says so again
			changes[i].add = q.wantLocked()
		}
	}
	s.mu.Unlock()
	return s.commit(ctx, changes)
}

// change is what is added to the counter of a quota: below 0 it is given back.
type change struct {
	quota *Quota
	add   int64
}

// commit asks for changes and books what became of each.
func (s *Set) commit(ctx context.Context, changes []change) error {
	s.mu.Lock()
	day := s.day.Format("20060102")
	ops := make([]clientv3.Op, len(changes))
	for i, c := range changes {
		key := c.quota.key(day)
		ops[i] = clientv3.OpGet(key)
		if c.add != 0 {
			put := clientv3.OpPut(key, strconv.FormatInt(c.quota.counter+c.add, 10), clientv3.WithLease(s.lease))
			unchanged := clientv3.Compare(clientv3.ModRevision(key), "=", c.quota.revision)
			ops[i] = clientv3.OpTxn([]clientv3.Cmp{unchanged}, []clientv3.Op{put}, []clientv3.Op{ops[i]})
		}
	}
	s.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	asked := time.Now()
	reply, err := s.cfg.Client.Txn(ctx).Then(ops...).Commit()
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		s.lease = 0
	}
	if err != nil {
		return fmt.Errorf("read and raise counters: %w", err)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = false
	for i, c := range changes {
		q, answer := c.quota, reply.Responses[i]
		q.read = asked
		if txn := answer.GetResponseTxn(); txn != nil {
			if txn.Succeeded {
				q.grantedLocked(c.add, reply.Header.Revision, asked)
				q.boundLocked(false, s.deny())
				continue
			}
			q.due.Store(true)
			answer = txn.Responses[0]
		}
		var value []byte
		var revision int64
		if kvs := answer.GetResponseRange().GetKvs(); len(kvs) > 0 {
			value, revision = kvs[0].Value, kvs[0].ModRevision
		}
		if !q.learnLocked(value, revision) {
			s.bad.Inc()
			if !q.doubted {
				q.doubted = true
				s.cfg.Logger.Warn("the counter of a quota is not what this program writes, it will be replaced",
					"key", q.key(day), "value", plain.Line(string(value[:min(len(value), 64)]), 64), "taken", q.taken)
			}
		}
		q.boundLocked(false, s.deny())
	}
	return nil
}

func (s *Set) success() {
	s.requests.Inc()
	if s.backoff != 0 {
		s.backoff = 0
		s.cfg.Logger.Info("etcd answers again, quotas are exact")
		s.bound()
	}
}

// failure notes that etcd does not answer, and tells when to ask again.
func (s *Set) failure(ctx context.Context, err error) time.Duration {
	if ctx.Err() != nil {
		return refresh // this ends
	}
	s.failed.Inc()
	s.mu.Lock()
	first := !s.away
	s.away = true
	s.mu.Unlock()
	if first {
		s.bound()
		s.cfg.Logger.Warn("etcd does not answer, quotas go on with what they have", "error", plain.Line(err.Error(), 300), "then", s.cfg.OnError)
	}
	s.backoff = min(max(s.backoff*2, firstPause), lastPause)
	wait := pause.Jitter(s.backoff)
	s.retryAt = time.Now().Add(wait)
	return wait
}

// bound sets what all quotas go by, after away has changed.
func (s *Set) bound() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for q := range s.all() {
		q.boundLocked(s.away, s.deny())
	}
}

// giveBack returns what is held to the counters, as far as they do not move meanwhile.
func (s *Set) giveBack(ctx context.Context) error {
	for range 3 {
		var changes []change
		s.mu.Lock()
		for q := range s.all() {
			if n := min(q.left.Load(), q.taken); n > 0 {
				changes = append(changes, change{q, -n})
			}
		}
		s.mu.Unlock()
		if len(changes) == 0 || s.lease == 0 {
			return nil
		}
		for len(changes) > 0 {
			n := min(len(changes), perRequest)
			if err := s.commit(ctx, changes[:n]); err != nil {
				return err
			}
			changes = changes[n:]
		}
	}
	return nil
}
