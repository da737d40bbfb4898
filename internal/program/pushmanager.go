package program

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/telemetry"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/controller"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/link"
)

// Bounds of single steps of a stop, which share the whole's.
const (
	deregisterTimeout = time.Second // etcd may be away: the lease ends by itself
	tailTimeout       = time.Second // for what comes after the pushes: spans, scrapes
)

// PushManager is a running Push-Manager.
type PushManager struct {
	// Static after StartPushManager.
	cfg        PushManagerConfig
	log        *slog.Logger
	metrics    *metrics.Set
	api, ops   net.Listener
	tracer     *telemetry.Tracer
	shards     *shard.Set
	controller *controller.Controller
	directory  *route.Directory
	links      *link.Set
	engine     *engine.Engine
	ingress    *ingress.Server
	watcher    *discovery.Watcher
	entry      *discovery.Registration
	http       *telemetry.HTTP

	parts    parts
	serving  sync.WaitGroup
	failed   chan error
	draining atomic.Bool
}

// StartPushManager builds the parts in order; a stop takes them apart in reverse.
func StartPushManager(ctx context.Context, cfg PushManagerConfig, logger *slog.Logger) (_ *PushManager, err error) {
	m := &PushManager{cfg: cfg, log: logger, metrics: metrics.NewSet(), failed: make(chan error, 1)}
	defer func() {
		if err != nil {
			stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tailTimeout)
			defer cancel()
			err = errors.Join(err, m.parts.stop(stopCtx))
		}
	}()
	for _, step := range []func(context.Context) error{
		m.listen,     // both ports are ours, or nothing starts
		m.observe,    // traces
		m.route,      // shards, Controller, directory
		m.connect,    // links to the nodes that are found in etcd
		m.serve,      // the engine and the push API in front of it
		m.announce,   // our own entry in etcd
		m.operations, // metrics and health, last: they look at everything
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	m.log.Info("push-manager runs", "id", cfg.ManagerID, "grpc", m.GRPCAddr(), "http", m.HTTPAddr(), "shards", m.shards.Len())
	return m, nil
}

func (m *PushManager) listen(ctx context.Context) (err error) {
	if m.api, err = listen(ctx, m.cfg.ListenAddress, m.cfg.GRPCPort, "GRPC_PORT"); err != nil {
		return err
	}
	m.parts.add("listener", func(context.Context) error { return ignoreClosed(m.api.Close()) })
	if m.ops, err = listen(ctx, m.cfg.ListenAddress, m.cfg.MetricsPort, "METRICS_PORT"); err != nil {
		return err
	}
	m.parts.add("listener", func(context.Context) error {
		if m.http != nil {
			return nil // its own now
		}
		return m.ops.Close()
	})
	return nil
}

func (m *PushManager) observe(ctx context.Context) (err error) {
	telemetry.BuildInfo(m.metrics)
	cfg := m.cfg.Tracing
	cfg.Logger, cfg.Metrics = m.log, m.metrics
	if m.tracer, err = telemetry.NewTracer(ctx, cfg); err != nil {
		return err
	}
	m.parts.add("traces", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tailTimeout)
		defer cancel()
		return m.tracer.Close(ctx)
	})
	return nil
}

func (m *PushManager) route(context.Context) (err error) {
	cfg := m.cfg.Shards
	cfg.Logger = m.log
	if m.shards, err = shard.New(cfg); err != nil {
		return err
	}
	m.parts.add("shards", m.shards.Close)

	toController := m.cfg.Controller
	toController.Logger, toController.Metrics = m.log, m.metrics
	if m.controller, err = controller.New(toController); err != nil {
		return err
	}
	m.parts.add("controller", func(context.Context) error { return m.controller.Close() })

	routes := m.cfg.Routes
	routes.Source = &source{Source: m.controller, listed: func() bool { return m.watcher.Synced() }}
	routes.Homes = m.shards.Len()
	routes.Home = func(key string) int { return m.shards.For(key).Index() }
	routes.Go = func(home int, task func()) error { return m.shards.At(home).Go(task) }
	if m.directory, err = route.New(routes); err != nil {
		return err
	}
	m.parts.add("directory", func(context.Context) error { m.directory.Close(); return nil })
	return nil
}

func (m *PushManager) connect(context.Context) (err error) {
	cfg := m.cfg.Links
	cfg.Shards, cfg.ManagerID, cfg.Logger, cfg.Metrics = m.shards.Len(), m.cfg.ManagerID, m.log, m.metrics
	cfg.Go = func(shard int, task func()) error { return m.shards.At(shard).Go(task) }
	if m.links, err = link.New(cfg); err != nil {
		return err
	}
	m.parts.add("links", func(ctx context.Context) error {
		defer m.links.Close()
		return m.links.Drain(ctx)
	})

	etcd, err := discovery.NewClient(m.cfg.Etcd.ClientConfig)
	if err != nil {
		return err
	}
	m.parts.add("etcd client", func(context.Context) error { return ignoreCanceled(etcd.Close()) })
	watch := m.cfg.Discovery
	watch.Client, watch.Logger, watch.Metrics = etcd, m.log, m.metrics
	watch.OnChange, watch.Alive = m.update, m.alive
	if m.watcher, err = discovery.New(watch); err != nil {
		return err
	}
	m.parts.add("discovery", func(context.Context) error { m.watcher.Close(); return nil })
	m.entry, err = discovery.NewRegistration(discovery.RegistrationConfig{
		Client: etcd, Prefix: discovery.PushManagerPrefix, ID: m.cfg.ManagerID,
		Addr:           advertised(m.cfg.AdvertiseAddress, m.api.Addr()),
		RequestTimeout: m.cfg.Etcd.RequestTimeout, Logger: m.log, Metrics: m.metrics,
	})
	return err
}

func (m *PushManager) serve(context.Context) (err error) {
	cfg := m.cfg.Engine
	cfg.Shards, cfg.Directory, cfg.Network = m.shards, m.directory, m.links
	if m.engine, err = engine.New(cfg); err != nil {
		return err
	}
	m.parts.add("engine", m.engine.Drain)

	api := m.cfg.Ingress
	api.Engine, api.Logger, api.Metrics = m.engine, m.log, m.metrics
	if m.tracer != nil {
		api.Trace = m.tracer.Trace
	}
	if m.ingress, err = ingress.New(api); err != nil {
		return err
	}
	m.controller.Start(m.directory)
	m.watcher.Start()
	m.serving.Go(func() {
		if err := m.ingress.Serve(m.api); err != nil {
			m.failed <- err
		}
	})
	m.parts.add("push API", func(ctx context.Context) error {
		defer m.serving.Wait()
		return m.ingress.Drain(ctx)
	})
	return nil
}

func (m *PushManager) announce(context.Context) error {
	m.entry.Start()
	m.parts.add("registration", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, deregisterTimeout)
		defer cancel()
		return m.entry.Close(ctx)
	})
	return nil
}

func (m *PushManager) operations(context.Context) (err error) {
	collector := telemetry.NewEngineMetrics(m.engine, m.metrics)
	m.http, err = telemetry.StartHTTP(telemetry.HTTPConfig{
		Listener: m.ops, Metrics: m.metrics, Collect: collector.Collect,
		NotReady: m.NotReady, PprofRemote: m.cfg.PprofRemote, Logger: m.log,
	})
	return err
}

// Drain stops in the reverse order of the start. Metrics and health go last: an
// operator wants to see how a stop goes on.
func (m *PushManager) Drain(ctx context.Context) error {
	m.draining.Store(true)
	err := m.parts.stop(ctx)
	tail, cancel := context.WithTimeout(context.WithoutCancel(ctx), tailTimeout)
	defer cancel()
	return errors.Join(err, m.http.Close(tail))
}

// Failed gets an error when the push API cannot be served any more.
func (m *PushManager) Failed() <-chan error { return m.failed }

// GRPCAddr is where the push API listens.
func (m *PushManager) GRPCAddr() string { return m.api.Addr().String() }

// HTTPAddr is where metrics and health are.
func (m *PushManager) HTTPAddr() string { return m.ops.Addr().String() }

// NotReady says why pushes cannot be delivered now, nothing when they can.
func (m *PushManager) NotReady() (reasons []string) {
	if m.draining.Load() {
		reasons = append(reasons, "draining")
	}
	if !m.watcher.Synced() {
		reasons = append(reasons, "etcd has not answered yet: no Connect-Nodes are known")
	}
	if healthy, reason := m.controller.Healthy(); !healthy {
		reasons = append(reasons, reason)
	}
	return reasons
}

// Reachable is the number of Connect-Nodes with a live stream.
func (m *PushManager) Reachable() int { return m.links.Reachable() }

func (m *PushManager) update(nodes []discovery.Node) {
	next := make([]link.Node, len(nodes))
	for i, n := range nodes {
		next[i] = link.Node(n)
	}
	if err := m.links.Update(next); err != nil {
		m.log.Error("some nodes cannot be used", "error", err)
	}
}

// alive vouches for a node that is gone from etcd while its streams live.
func (m *PushManager) alive(id string) bool {
	for _, n := range m.links.Nodes() {
		if n.ID == id {
			return n.Connections > 0 && !n.Draining
		}
	}
	return false
}

// source asks the Controller only once it is known where the nodes are: until
// then every answer would look like a room full of unknown nodes.
type source struct {
	route.Source

	listed func() bool
}

var errNotListed = fmt.Errorf("%w: etcd has not answered yet", route.ErrUnavailable)

// Room implements route.Source.
func (s *source) Room(ctx context.Context, room string, add func(user, node string)) (bool, error) {
	if !s.listed() {
		return false, errNotListed
	}
	return s.Source.Room(ctx, room, add)
}

// Users implements route.Source.
func (s *source) Users(ctx context.Context, users []string, nodes [][]string) error {
	if !s.listed() {
		return errNotListed
	}
	return s.Source.Users(ctx, users, nodes)
}

func listen(ctx context.Context, host string, port int, key string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	return l, nil
}
