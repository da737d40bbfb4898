package controller

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/transport/discovery"
)

// reaper ends the memberships of nodes that are gone from etcd.
type reaper struct {
	// Static.
	store   Store
	grace   time.Duration
	log     *slog.Logger
	dropped *metrics.Counter
	watcher *discovery.Watcher
	// The addresses of the nodes registered; replaced by the watcher, never changed.
	nodes atomic.Pointer[map[string]string]

	// Owned by loop: since when a node with memberships is not registered.
	missing map[string]time.Time
}

func newReaper(cfg Config) (*reaper, error) {
	r := &reaper{
		store:   cfg.Store,
		grace:   cfg.NodeGrace,
		log:     cfg.Logger,
		dropped: cfg.Metrics.GetOrCreateCounter("controller_nodes_dropped_total"),
		missing: map[string]time.Time{},
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

func (r *reaper) onNodes(nodes []discovery.Node) {
	known := make(map[string]string, len(nodes))
	for _, n := range nodes {
		known[n.ID] = n.Addr
	}
	r.nodes.Store(&known)
}

// address is where a node is registered, empty when it is not.
func (r *reaper) address(node string) string {
	if known := r.nodes.Load(); known != nil {
		return (*known)[node]
	}
	return ""
}

func (r *reaper) loop(ctx context.Context) {
	tick := time.NewTicker(min(time.Second, r.grace))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := r.look(ctx, time.Now()); err != nil && ctx.Err() == nil {
				r.log.Warn("cannot end the memberships of dead nodes", "err", err)
			}
		}
	}
}

// look compares the nodes that have memberships with those registered. While etcd
// is silent nobody can tell, and all begin anew when it speaks again.
func (r *reaper) look(ctx context.Context, now time.Time) error {
	known := r.nodes.Load()
	if known == nil || r.watcher.Stale() > 0 {
		clear(r.missing)
		return nil
	}
	nodes, err := r.store.Nodes(ctx)
	if err != nil {
		return err
	}
	missing := make(map[string]time.Time)
	for _, node := range nodes {
		if _, ok := (*known)[node]; ok {
			continue
		}
		since, ok := r.missing[node]
		if !ok {
			since = now
		}
		missing[node] = since
	}
	r.missing = missing
	for node, since := range missing {
		if now.Sub(since) < r.grace {
			continue
		}
		n, err := r.store.DropNode(ctx, node)
		if err != nil {
			return err
		}
		delete(missing, node)
		r.dropped.Inc()
		r.log.Warn("node is gone from etcd: its memberships ended", "node", node, "memberships", n)
	}
	return nil
}
