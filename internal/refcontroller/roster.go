package refcontroller

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/transport/discovery"
)

const (
	// silentAfter is how long a node that calls SyncNode may say nothing before it
	// counts as dead: three of its calls are missing then.
	silentAfter = 6 * time.Second
	// warmupMost is for how many times Config.Warmup nodes that are still reporting
	// are waited for. With the default that is a minute: for that long Push-Manager
	// serves stale routes.
	warmupMost = 4
	// wordMemory is how long the word of a node that says no more is kept.
	wordMemory = 10 * time.Minute
	// maxStrangers is how many nodes may report without being registered: as many as may
	// be registered. Before etcd has been listed, and without etcd, all are strangers.
	maxStrangers = 4096
	// named is how many nodes a line names: enough that one knows where to look.
	named = 5
)

// roster is the nodes there are: those registered in etcd and those that report.
// It knows when the Controller may be believed, and ends the memberships of nodes
// that are dead.
type roster struct {
	// Static after newRoster.
	store   Store
	grace   time.Duration
	warmup  time.Duration
	log     *slog.Logger
	dropped *metrics.Counter
	refused *metrics.Counter
	watcher *discovery.Watcher // nil without etcd
	shared  Shared             // store, if others work on it, too
	wake    chan struct{}      // holds a token when something has happened

	// The nodes registered; replaced by the watcher, never changed. nil before etcd
	// has been listed.
	registered atomic.Pointer[map[string]discovery.Node]
	// Whether the store there is may be believed; replaced by loop when there is another one.
	warmth atomic.Pointer[warmth]
	// For whom the Controller waits before it is believed; replaced by loop.
	awaited atomic.Pointer[[]string]

	mu sync.Mutex
	// Guarded by mu.
	words     map[string]word
	strangers map[string]time.Time // by node that is not registered: its last report

	// Owned by loop.
	began, looked time.Time
	failures      rate.Sometimes       // to end memberships
	missing       map[string]time.Time // since when a node with memberships is not registered
}

// word is the latest SyncNode of a node.
type word struct {
	boot string
	at   time.Time
	told string // the ID of the store that it has reported everything to
}

// warmth is whether a store may be believed.
type warmth struct {
	store string        // its ID
	warm  chan struct{} // closed when it may
	cold  chan struct{} // closed when another one has taken its place
}

func (w *warmth) isWarm() bool {
	select {
	case <-w.warm:
		return true
	default:
		return false
	}
}

func newRoster(cfg Config) (*roster, error) {
	r := &roster{
		store:   cfg.Store,
		grace:   cfg.NodeGrace,
		warmup:  cfg.Warmup,
		log:     cfg.Logger,
		dropped: cfg.Metrics.GetOrCreateCounter("controller_nodes_dropped_total"),
		refused: cfg.Metrics.GetOrCreateCounter("controller_reports_refused_total"),
		wake:    make(chan struct{}, 1),
		words:   map[string]word{},
		missing: map[string]time.Time{},

		failures:  rate.Sometimes{Interval: 10 * time.Second},
		strangers: map[string]time.Time{},
	}
	r.awaited.Store(&[]string{})
	r.shared, _ = cfg.Store.(Shared)
	r.find(cfg.Store.ID())
	if cfg.Client == nil {
		return r, nil
	}
	var err error
	r.watcher, err = discovery.New(discovery.Config{
		Client: cfg.Client, Prefix: cfg.NodePrefix, OnChange: r.onNodes,
		// That etcd is silent has to be known before a grace ends.
		ProbeInterval: min(5*time.Second, cfg.NodeGrace/2),
		Logger:        cfg.Logger, Metrics: cfg.Metrics, MetricsPrefix: "controller",
	})
	return r, err
}

// find begins anew with the store that there is now.
func (r *roster) find(id string) {
	w := &warmth{store: id, warm: make(chan struct{}), cold: make(chan struct{})}
	if r.warmup == 0 && (r.shared == nil || id != "") { // One that has not been reached cannot be believed.
		close(w.warm)
	}
	if before := r.warmth.Swap(w); before != nil {
		close(before.cold)
	}
}

func (r *roster) onNodes(nodes []discovery.Node) {
	known := make(map[string]discovery.Node, len(nodes))
	for _, n := range nodes {
		known[n.ID] = n
	}
	r.registered.Store(&known)
	r.nudge()
}

func (r *roster) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *roster) node(id string) discovery.Node {
	if known := r.registered.Load(); known != nil {
		return (*known)[id]
	}
	return discovery.Node{}
}

func (r *roster) isRegistered(id string) bool {
	known := r.registered.Load()
	if known == nil {
		return false
	}
	_, ok := (*known)[id]
	return ok
}

// admit refuses the report of a node that is one too many: each is remembered for a while,
// and whoever makes up ids must not make us grow.
func (r *roster) admit(id string, now time.Time) error {
	if r.isRegistered(id) {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.strangers[id]; !known && len(r.strangers) >= maxStrangers {
		r.refused.Inc()
		return status.Errorf(codes.ResourceExhausted, "node %q is not registered in etcd, and neither are %d others that report", id, maxStrangers)
	}
	r.strangers[id] = now
	return nil
}

// address is where a node is registered, empty when it is not.
func (r *roster) address(id string) string { return r.node(id).Addr }

// boot is the process of a node that is registered. Empty: there is none, it does
// not say, or etcd is out of reach and what it said may be old.
func (r *roster) boot(id string) string {
	if r.watcher == nil || r.watcher.Stale() > 0 {
		return ""
	}
	return r.node(id).BootID
}

// heard notes that a node has called.
func (r *roster) heard(node, boot, told string, now time.Time) {
	r.mu.Lock()
	r.words[node] = word{boot, now, told}
	r.mu.Unlock()
	if told != "" && !r.isWarm() {
		r.nudge()
	}
}

func (r *roster) isWarm() bool {
	w := r.warmth.Load()
	return w.isWarm() && w.store == r.store.ID()
}

// believed is an error while look-ups must not be answered.
func (r *roster) believed() error {
	if r.isWarm() {
		return nil
	}
	return status.Error(codes.Unavailable, "the controller has just started: "+r.waiting())
}

// waiting says for whom the Controller waits, in words.
func (r *roster) waiting() string {
	if r.shared != nil && r.store.ID() == "" {
		return "it has not reached its store yet"
	}
	awaited := *r.awaited.Load()
	switch n := len(awaited); {
	case n == 0:
		return "it waits to hear from the nodes"
	case n > named:
		return fmt.Sprintf("%s and %d more nodes have not reported all their users yet", strings.Join(awaited[:named], ", "), n-named)
	default:
		return strings.Join(awaited, ", ") + " has not reported all users yet"
	}
}

// lookSoon is how often a Controller that is not believed looks whether others have kept the store: until then it answers
// nothing.
const lookSoon = 50 * time.Millisecond

func (r *roster) loop(ctx context.Context) {
	often := min(time.Second, r.grace)
	timer := time.NewTimer(0)
	defer timer.Stop()
	r.began = time.Now()
	r.looked = r.began
	for {
		r.look(ctx, time.Now())
		if r.shared != nil && !r.isWarm() {
			timer.Reset(min(lookSoon, often))
		} else {
			timer.Reset(often)
		}
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-r.wake:
		}
	}
}

func (r *roster) look(ctx context.Context, now time.Time) {
	if now.Sub(r.looked) > silentAfter/2 {
		// This process stood still: what the nodes said meanwhile is still to be read.
		r.mu.Lock()
		for id, w := range r.words {
			w.at = now
			r.words[id] = w
		}
		r.mu.Unlock()
	}
	r.looked = now
	r.mu.Lock()
	maps.DeleteFunc(r.words, func(_ string, w word) bool { return now.Sub(w.at) > wordMemory })
	maps.DeleteFunc(r.strangers, func(id string, last time.Time) bool { return now.Sub(last) > wordMemory || r.isRegistered(id) })
	r.mu.Unlock()
	if r.shared != nil {
		r.share(ctx, now)
	}
	if w := r.warmth.Load(); !w.isWarm() && r.warmedUp(w.store, now) {
		r.awaited.Store(&[]string{})
		if r.shared != nil {
			r.shared.Believe(w.store)
		}
		close(w.warm)
	}
	if r.watcher == nil || r.store.ID() == "" {
		return
	}
	if err := r.reap(ctx, now); err != nil && ctx.Err() == nil {
		r.failures.Do(func() { r.log.Warn("cannot end the memberships of dead nodes", "err", err) })
	}
}

// share finds out whether the store is still the one from before, and what nodes have said to
// other Controllers.
func (r *roster) share(ctx context.Context, now time.Time) {
	id := r.store.ID()
	if id != r.warmth.Load().store {
		r.began = now
		r.find(id)
	}
	if id == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	words, err := r.shared.Words(ctx)
	if err != nil || r.store.ID() != id {
		return // What else is asked of the store says why.
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for node, said := range words {
		w := word{boot: said.Boot, at: now.Add(-said.Ago)}
		if said.Complete {
			w.told = id
		}
		if r.words[node].at.Before(w.at) {
			r.words[node] = w
		}
	}
}

// warmedUp tells whether all registered nodes have reported everything, or enough
// time has passed for those that have not.
func (r *roster) warmedUp(store string, now time.Time) bool {
	took := now.Sub(r.began)
	if r.shared != nil {
		switch {
		case store == "":
			return false // It has not been reached.
		case r.shared.Believed() && r.store.ID() == store:
			r.log.Info("another controller has kept the store: look-ups are answered", "took", took)
			return true
		}
	}
	known := r.registered.Load()
	if r.watcher == nil || known == nil {
		if took < r.warmup {
			return false
		}
		r.log.Warn("the time to warm up is over, and which nodes there are is not known", "took", took)
		return true
	}
	var awaited []string
	reporting := false
	r.mu.Lock()
	for id, n := range *known {
		w, ok := r.words[id]
		ok = ok && (n.BootID == "" || n.BootID == w.boot)
		if ok && w.told == store {
			continue
		}
		awaited = append(awaited, id)
		reporting = reporting || ok && now.Sub(w.at) < silentAfter
	}
	r.mu.Unlock()
	slices.Sort(awaited)
	r.awaited.Store(&awaited)
	switch {
	case len(awaited) == 0:
		r.log.Info("all registered nodes have reported: look-ups are answered", "nodes", len(*known), "took", took)
		return true
	case took >= warmupMost*r.warmup, took >= r.warmup && !reporting:
		r.log.Warn("the time to warm up is over: look-ups are answered without the users of some nodes",
			"missing", strings.Join(awaited, " "), "took", took)
		return true
	}
	return false
}

// reap compares the nodes that have memberships with those registered. While etcd
// is silent nobody can tell, and all begin anew when it speaks again.
func (r *roster) reap(ctx context.Context, now time.Time) error {
	known := r.registered.Load()
	if known == nil || r.watcher.Stale() > 0 {
		clear(r.missing)
		return nil
	}
	nodes, err := r.store.Nodes(ctx)
	if err != nil {
		return err
	}
	missing := make(map[string]time.Time)
	for id, boot := range nodes {
		if n, ok := (*known)[id]; ok && (boot == "" || n.BootID == "" || n.BootID == boot) {
			continue
		}
		since, ok := r.missing[id]
		if !ok {
			since = now
		}
		missing[id] = since
	}
	r.missing = missing
	var dead []string
	memberships := 0
	defer func() {
		if len(dead) > 0 { // In one line: how many there are is up to who reports.
			r.log.Warn("nodes are gone from etcd: their memberships ended",
				"nodes", strings.Join(dead[:min(len(dead), named)], " "), "count", len(dead), "memberships", memberships)
		}
	}()
	for id, since := range missing {
		// A node that was lost in etcd and lives says so: it gets the grace. One that
		// spoke and is silent does not need it.
		r.mu.Lock()
		w, spoke := r.words[id]
		r.mu.Unlock()
		if silent := spoke && now.Sub(w.at) >= silentAfter; !silent && now.Sub(since) < r.grace {
			continue
		}
		n, err := r.store.DropNode(ctx, id)
		if err != nil {
			return err
		}
		delete(missing, id)
		r.dropped.Inc()
		dead = append(dead, id)
		memberships += n
	}
	return nil
}
