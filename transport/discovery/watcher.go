package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"

	"github.com/push-manager/push-manager/internal/pause"
)

// pageSize is how many keys one request of a list asks for: at etcd's limit of
// 1.5 MiB a value, a page stays below the client's receive limit.
const pageSize = 128

// settleEvery is how long changes are gathered before the set is reported again. What a report
// costs grows with the set, and when all nodes start each change is one.
const settleEvery = 50 * time.Millisecond

// settledAfter is how long a watch has to live before its end counts as a first
// failure again and not as one more in a row.
const settledAfter = 10 * time.Second

// Watcher keeps the set of registered nodes. See the package's doc for what it
// promises.
type Watcher struct {
	// Static after New.
	cfg Config
	m   *watcherMetrics
	wg  sync.WaitGroup
	out absence // owned by the loop

	// Written by Start, under once.
	once sync.Once
	stop context.CancelFunc

	// Written by the loop, read by anybody.
	nodes atomic.Pointer[[]Node]
}

// New makes a Watcher that does nothing until Start.
func New(cfg Config) (*Watcher, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("discovery: %w", err)
	}
	cfg = cfg.withDefaults()
	return &Watcher{
		cfg: cfg, m: newWatcherMetrics(cfg.Metrics, cfg.MetricsPrefix),
		out: absence{log: cfg.Logger, message: "discovery is interrupted, the nodes known stay"},
	}, nil
}

// Start begins to watch. etcd does not have to be there yet.
func (w *Watcher) Start() {
	w.once.Do(func() {
		ctx, cancel := context.WithCancel(context.Background())
		w.stop = cancel
		w.since(time.Now())
		reconnected := make(chan struct{}, 1)
		w.wg.Go(func() { newWatching(w).loop(ctx, reconnected) })
		w.wg.Go(func() { w.follow(ctx, reconnected) })
	})
}

// follow reports each time that the client has connected. A watch goes on over a new
// connection by itself, and is silent when the etcd at its end has another history.
func (w *Watcher) follow(ctx context.Context, reconnected chan<- struct{}) {
	conn := w.cfg.Client.ActiveConnection()
	for state := conn.GetState(); conn.WaitForStateChange(ctx, state); {
		if state = conn.GetState(); state != connectivity.Ready {
			continue
		}
		select {
		case reconnected <- struct{}{}:
		default:
		}
	}
}

// Close stops watching and waits until OnChange cannot be called any more.
func (w *Watcher) Close() {
	w.once.Do(func() { w.stop = func() {} }) // never started
	w.stop()
	w.wg.Wait()
}

// Synced tells whether etcd has been listed at least once.
func (w *Watcher) Synced() bool { return w.nodes.Load() != nil }

// Stale is how long etcd has been out of reach, 0 while it is not.
func (w *Watcher) Stale() time.Duration { return w.m.stale() }

// Why says in a line why etcd is out of reach: a certificate, a password, a port that refuses.
// It is "" while etcd answers.
func (w *Watcher) Why() string { return w.out.Why() }

// Nodes is the set as last reported, ordered by id.
func (w *Watcher) Nodes() []Node {
	nodes := w.nodes.Load()
	if nodes == nil {
		return nil
	}
	return slices.Clone(*nodes)
}

// since marks etcd as out of reach since t, unless it is already.
func (w *Watcher) since(t time.Time) { w.m.staleSince.CompareAndSwap(nil, &t) }

// watching is the state of the loop, which owns all of it.
type watching struct {
	*Watcher
	log *slog.Logger
	reg *registry

	// The revision that reg stands for; events up to it are old news.
	rev int64
	// The highest revision and raft term etcd has ever shown. A later answer with
	// less means that its history went back.
	seenRev  int64
	seenTerm uint64

	told time.Time   // when the set was last reported
	due  *time.Timer // when what has changed since may be

	lastWord time.Time // when etcd last answered anything
	failures int       // in a row
	again    int       // outdated lists in a row
	doubt    time.Time // until when a list is not believed about what is missing

	listed   chan listing // answer of a list under way
	listing  bool
	unlisted bool        // the last list failed
	retry    *time.Timer // when to list next
	probed   chan probe  // answer of a probe under way
	probing  bool
	probeAt  time.Time // when to probe next
	unproven bool      // connected again, and no probe has told since whether it is the same etcd

	// The watch. opening delivers its channel once etcd has confirmed it; both
	// are nil without one.
	opening   chan clientv3.WatchChan
	events    clientv3.WatchChan
	opened    time.Time
	stopWatch context.CancelFunc
}

// listing is a complete list, or why there is none.
type listing struct {
	err     error
	entries []entry
	rev     int64
	term    uint64
	asked   int64 // seenRev when the list was asked for
	began   time.Time
}

// probe is a sign of life, or why there is none.
type probe struct {
	err   error
	rev   int64
	term  uint64
	asked int64
}

func newWatching(w *Watcher) *watching {
	return &watching{
		Watcher:   w,
		log:       w.cfg.Logger,
		reg:       newRegistry(w.cfg, w.m),
		lastWord:  time.Now(),
		listed:    make(chan listing, 1),
		retry:     time.NewTimer(0),
		due:       time.NewTimer(settleEvery),
		probed:    make(chan probe, 1),
		stopWatch: func() {},
	}
}

func (l *watching) loop(ctx context.Context, reconnected <-chan struct{}) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	defer l.retry.Stop()
	defer l.due.Stop()
	defer func() { l.stopWatch() }()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.retry.C:
			l.list(ctx)
		case <-l.due.C:
		case got := <-l.listed:
			l.onListed(ctx, got)
		case events := <-l.opening:
			l.opening, l.events, l.opened = nil, events, time.Now()
		case resp, ok := <-l.events:
			l.onEvents(resp, ok)
		case got := <-l.probed:
			l.onProbed(got)
		case <-tick.C:
			l.onTick(ctx)
		case <-reconnected:
			l.probeAt, l.unproven = time.Now(), true // is it still the etcd that we know?
			l.onTick(ctx)
		}
		l.settle()
	}
}

// settle reports the set when it has changed: at once, and after that no sooner than
// settleEvery. Before the first list there is nothing to tell; the first list is told even when
// it is empty.
func (l *watching) settle() {
	if l.rev == 0 {
		return
	}
	now := time.Now()
	if early := settleEvery - now.Sub(l.told); early > 0 {
		l.due.Reset(early)
		return
	}
	nodes, changed := l.reg.settle(now)
	if !changed && l.nodes.Load() != nil {
		return
	}
	l.told = now
	l.m.changes.Inc()
	l.nodes.Store(&nodes)
	l.cfg.OnChange(slices.Clone(nodes))
}

// list asks etcd for everything, in the background, one list at a time.
func (l *watching) list(ctx context.Context) {
	if l.listing {
		return
	}
	l.listing = true
	asked, began := l.seenRev, time.Now()
	l.wg.Go(func() {
		got := l.listAll(ctx)
		got.asked, got.began = asked, began
		l.listed <- got
	})
}

// listAll reads the prefix page by page at one revision.
func (w *Watcher) listAll(ctx context.Context) listing {
	var got listing
	from, end := w.cfg.Prefix, clientv3.GetPrefixRangeEnd(w.cfg.Prefix)
	for {
		opts := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(got.rev)}
		pageCtx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), w.cfg.RequestTimeout)
		pageCtx, below := withRequestError(pageCtx)
		resp, err := w.cfg.Client.Get(pageCtx, from, opts...)
		cancel()
		if err != nil {
			return listing{err: fmt.Errorf("prefix %s: %w", w.cfg.Prefix, below.explain(err))}
		}
		if got.rev == 0 {
			got.rev, got.term = resp.Header.GetRevision(), resp.Header.GetRaftTerm()
		}
		for _, kv := range resp.Kvs {
			got.entries = append(got.entries, w.entryOf(kv))
		}
		if !resp.More || len(resp.Kvs) == 0 {
			return got
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

// entryOf reads one key.
func (w *Watcher) entryOf(kv *mvccpb.KeyValue) entry {
	e := entry{key: string(kv.Key), created: kv.CreateRevision, modified: kv.ModRevision}
	if e.foreign = !ofNode(w.cfg.Prefix, e.key); !e.foreign {
		e.node, e.bad = parseNode(e.key, kv.Value, w.cfg.AllowNets)
	}
	return e
}

func (l *watching) onListed(ctx context.Context, got listing) {
	l.listing = false
	l.unlisted = got.err != nil
	if l.unlisted {
		l.m.listError.Inc()
		l.failed(got.began, fmt.Errorf("list: %w", got.err))
		return
	}
	back := l.wentBack(got.rev, got.term, got.asked)
	if !back && got.rev < l.rev && l.again < 3 {
		// The watch was faster than this list: what it says is history.
		l.m.listOutdated.Inc()
		l.again++
		l.retry.Reset(0)
		return
	}
	l.again = 0
	l.answered(got.rev, got.term)
	now := time.Now()
	if back {
		l.m.listBack.Inc()
		l.log.Error("etcd's history went back: no node is removed until a second list agrees",
			"revision", got.rev, "seen", got.asked, "confirm_after", l.cfg.ConfirmAfter)
		l.seenRev, l.seenTerm = got.rev, got.term
		l.doubt = now.Add(l.cfg.ConfirmAfter)
	} else {
		l.m.listOK.Inc()
	}
	next, doubtful := pause.Jitter(l.cfg.ResyncInterval), now.Before(l.doubt)
	if doubtful {
		next = l.doubt.Sub(now)
	}
	l.reg.replace(now, got.entries, doubtful)
	l.rev = got.rev
	l.retry.Reset(next)
	l.watch(ctx)
}

// wentBack tells whether an answer comes from before what etcd had shown when it
// was asked. Linearizable reads do not do that, a wiped or restored etcd does.
func (l *watching) wentBack(rev int64, term uint64, asked int64) bool {
	return rev < asked || term < l.seenTerm
}

// watch replaces the watch by one from the current revision on. Each list brings
// a new one, so a watch that died in silence is replaced within the minute.
func (l *watching) watch(ctx context.Context) {
	l.stopWatch()
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	opening := make(chan clientv3.WatchChan, 1)
	l.stopWatch, l.opening, l.events = cancel, opening, nil
	from := l.rev + 1
	l.wg.Go(func() {
		// Watch returns only when etcd has confirmed it.
		opening <- l.cfg.Client.Watch(ctx, l.cfg.Prefix, clientv3.WithPrefix(), clientv3.WithRev(from))
	})
}

func (l *watching) onEvents(resp clientv3.WatchResponse, ok bool) {
	err := resp.Err()
	if !ok {
		err = errors.New("watch closed")
	}
	if err != nil {
		l.onBroken(err)
		return
	}
	l.answered(resp.Header.GetRevision(), resp.Header.GetRaftTerm())
	now, rev := time.Now(), l.rev
	for _, ev := range resp.Events {
		if ev.Kv.ModRevision <= l.rev {
			continue // the list has it
		}
		rev = ev.Kv.ModRevision
		key := string(ev.Kv.Key)
		if ev.Type == clientv3.EventTypeDelete {
			l.reg.remove(key)
			continue
		}
		l.reg.put(now, l.entryOf(ev.Kv))
	}
	l.rev = rev
}

// onBroken gives the watch up; a list follows.
func (l *watching) onBroken(err error) {
	switch {
	case errors.Is(err, rpctypes.ErrCompacted):
		l.m.breakCompacted.Inc()
	case errors.Is(err, rpctypes.ErrNoLeader):
		l.m.breakNoLeader.Inc()
	default:
		l.m.breakOther.Inc()
	}
	l.stopWatch()
	l.opening, l.events = nil, nil
	if time.Since(l.opened) >= settledAfter {
		l.failures = 0
		l.out.forget()
	}
	l.failed(time.Now(), fmt.Errorf("watch: %w", err))
}

// onTick asks etcd for a sign of life when it is time to. The once-a-second
// settling of held nodes follows in loop.
func (l *watching) onTick(ctx context.Context) {
	now := time.Now()
	if !l.unlisted && l.events != nil && now.Sub(l.opened) >= settledAfter {
		l.failures = 0
		l.out.forget()
	}
	if l.probing || now.Before(l.probeAt) {
		return
	}
	l.probing = true
	l.probeAt = now.Add(l.cfg.ProbeInterval)
	asked := l.seenRev
	l.wg.Go(func() {
		reqCtx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), l.cfg.RequestTimeout)
		defer cancel()
		reqCtx, below := withRequestError(reqCtx)
		resp, err := l.cfg.Client.Get(reqCtx, l.cfg.Prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		err = below.explain(err)
		var header *etcdserverpb.ResponseHeader
		if err == nil {
			header = resp.Header
		}
		l.probed <- probe{err: err, rev: header.GetRevision(), term: header.GetRaftTerm(), asked: asked}
	})
}

func (l *watching) onProbed(got probe) {
	l.probing = false
	if got.err != nil {
		l.since(l.lastWord)
		l.out.goesOn(got.err)
		if l.unproven { // the watch may be silent for good: that must not last a whole interval
			l.probeAt = time.Now().Add(l.cfg.MinBackoff)
		}
		return
	}
	l.unproven = false
	if l.wentBack(got.rev, got.term, got.asked) {
		l.retry.Reset(0) // the list finds the same and deals with it
		return
	}
	l.answered(got.rev, got.term)
}

// answered notes a good word from etcd.
func (l *watching) answered(rev int64, term uint64) {
	l.lastWord = time.Now()
	l.seenRev = max(l.seenRev, rev)
	l.seenTerm = max(l.seenTerm, term)
	l.out.ends()
	if since := l.m.staleSince.Swap(nil); since != nil && l.nodes.Load() != nil {
		l.log.Info("etcd answers again", "after", time.Since(*since).Round(time.Millisecond))
	}
}

// failed plans the next list after an attempt that began then, later with each failure
// in a row.
func (l *watching) failed(began time.Time, err error) {
	l.out.goesOn(err)
	l.since(l.lastWord)
	l.retry.Reset(retryIn(began, l.failures, l.cfg.MinBackoff, l.cfg.MaxBackoff))
	l.failures++
}

// retryIn is how long to wait for the next attempt, after one that failed and failures
// before it. It counts from the beginning of the failed one: a request waits for a
// connection as long as it may, and when that was longer than the pause, the next one
// takes its place at once. So one is there to go out with the connection, and nothing is
// added to the time until that is back. A fleet is in step then, at one request each in that
// time.
func retryIn(began time.Time, failures int, shortest, longest time.Duration) time.Duration {
	d := longest
	if failures < 16 {
		d = min(d, shortest<<failures)
	}
	return max(0, pause.Jitter(d)-time.Since(began))
}
