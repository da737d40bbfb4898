package pushmanager

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/console"
	"github.com/push-manager/push-manager/internal/health"
	"github.com/push-manager/push-manager/internal/pressure"
	"github.com/push-manager/push-manager/internal/telemetry"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/controller"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/ingress/web"
	"github.com/push-manager/push-manager/transport/jobs"
	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/presence"
	"github.com/push-manager/push-manager/transport/store"
	"github.com/push-manager/push-manager/transport/store/jetstream"
)

// deregisterTimeout bounds leaving etcd, which may be away: the lease ends by itself.
const deregisterTimeout = time.Second

// Command is Push-Manager as a command.
func Command() cli.Command {
	return cli.Command{Name: "serve", Help: "Serve the push API. Needs no name.", File: true, New: func() cli.Settings { return &Config{} }}
}

// Start builds Push-Manager in order; Drain takes it apart in reverse. Its peers
// (etcd, the Controller, nodes) may still be away when it returns.
func Start(ctx context.Context, cfg Config, log *slog.Logger) (_ *PushManager, err error) {
	m := &PushManager{log: log, failed: make(chan error, 1)}
	defer m.life.StopAfter(ctx, &err)
	if err = m.listen(ctx, cfg); err != nil { // all ports are ours, or nothing starts
		return nil, err
	}
	m.life.Add("metrics and health", app.WithGrace(m.closeHTTP)) // the last to go: they show how a stop goes on
	log = m.keepWarnings(log)
	set := cfg.report(log)
	if err = m.openAudit(&cfg); err != nil {
		return nil, err
	}
	if m.tracer, err = telemetry.NewTracer(ctx, cfg.Tracing); err != nil {
		return nil, err
	}
	m.life.Add("traces", app.WithGrace(m.tracer.Close))

	// Where the users are: the shards ask the Controller, the directory keeps the answers.
	if m.shards, err = shard.New(cfg.Shards); err != nil {
		return nil, err
	}
	m.life.Add("shards", m.shards.Close)
	if cfg.Controller.Credentials, err = m.life.Controller(cfg.ControllerTLS); err != nil {
		return nil, err
	}
	if m.controller, err = controller.New(cfg.Controller); err != nil {
		return nil, err
	}
	m.life.Add("controller", func(context.Context) error { return m.controller.Close() })
	cfg.Routes.Source, cfg.Routes.Shards, cfg.Routes.Shard, cfg.Routes.Go = m.controller, m.shards.Len(), m.shardOf, m.goOn
	cfg.Routes.Places = m.shards.At(0).Stats().Limit
	if m.directory, err = route.New(cfg.Routes); err != nil {
		return nil, err
	}
	m.life.Add("directory", app.Closing(m.directory.Close))

	if cfg.Discovery.Client, err = m.life.Etcd(cfg.Etcd); err != nil {
		return nil, err
	}
	// The store of messages for users who are not reached, and what sends them later. It goes when links and engine are done with it.
	openStore := func(cfg *Config) error { return m.openStore(ctx, cfg) }
	for _, open := range []func(*Config) error{openStore, m.openReplays, m.openRoomLogs, m.openReceipts, m.openWebhook} {
		if err = open(&cfg); err != nil {
			return nil, err
		}
	}

	// The way to them: a stream from each shard to each node that is found in etcd.
	cfg.Links.Shards, cfg.Links.Go = m.shards.Len(), m.goOn
	if err = m.secureLinks(&cfg); err != nil {
		return nil, err
	}
	if m.links, err = link.New(cfg.Links); err != nil {
		return nil, err
	}
	m.life.Add("links", m.stopLinks)
	cfg.Discovery.OnChange, cfg.Discovery.Alive = m.update, m.links.Alive
	if m.watcher, err = discovery.New(cfg.Discovery); err != nil {
		return nil, err
	}
	m.life.Add("discovery", app.Closing(m.watcher.Close))

	// The engine, and the push API in front of it.
	cfg.Engine.Shards, cfg.Engine.Directory, cfg.Engine.Network = m.shards, m.directory, m.links
	if err = m.startEngine(cfg.Engine, cfg.Pressure); err != nil {
		return nil, err
	}
	cfg.Ingress.Engine, cfg.Ingress.Trace = m.engine, m.tracer.TraceFunc()
	m.life.Insecure(log, set, cfg.insecure)
	if cfg.Auth.on() {
		cfg.Ingress.Quotas = m.startQuotas(cfg)
		if cfg.Ingress.Auth, err = cfg.Auth.open(&m.life, cfg.TLS.ReloadInterval, log, set, cfg.Ingress.Quotas, m.audit); err != nil {
			return nil, err
		}
	}
	if err = m.openJobs(&cfg); err != nil {
		return nil, err
	}
	if err = m.newAPI(&cfg, set); err != nil {
		return nil, err
	}
	m.ingress.SetServing(false) // until etcd has said which nodes there are
	m.ingress.SetHealthy(false) // until health has had a look
	m.controller.Start(m.changes())
	m.watcher.Start()
	if m.jobs != nil {
		m.jobs.Start()
	}
	m.life.Add("push API", m.stopServing)
	if err = m.watchHealth(cfg); err != nil {
		return nil, err
	}

	// Our own entry in etcd; metrics and health, which look at everything.
	if err = m.show(cfg, set); err != nil {
		return nil, err
	}
	m.serve() // at last: a start that fails has served nobody, and need not tell anybody that it stops
	log.Info("push-manager runs", "id", cfg.ManagerID, "grpc", m.GRPCAddr(), "http", m.HTTPAddr(), "push_api_http", m.WebAddr(), "shards", m.shards.Len())
	return m, nil
}

// newAPI makes the push API, over gRPC and over HTTP, with the same certificates, and what it tells of presence.
func (m *PushManager) newAPI(cfg *Config, set *metrics.Set) (err error) {
	cfg.Ingress.Disconnector = m.disconnector(cfg)
	if err = m.openPresence(cfg); err != nil {
		return err
	}
	if cfg.TLS.On() {
		source, err := m.life.Certificates(cfg.TLS.Certificates)
		if err != nil {
			return err
		}
		cfg.Ingress.Credentials = source.Server(cfg.TLS.side())
		cfg.Web.TLS = source.ServerConfig(cfg.TLS.side(), "h2", "http/1.1")
	}
	if m.ingress, err = ingress.New(cfg.Ingress); err != nil {
		return err
	}
	if m.web == nil {
		return nil
	}
	cfg.Web.Ingress = m.ingress
	if err = m.openConsole(cfg, set); err != nil {
		return err
	}
	m.webServer, err = web.New(cfg.Web)
	return err
}

// secureLinks gives the links their credentials, where they have TLS.
func (m *PushManager) secureLinks(cfg *Config) error {
	if !cfg.LinkTLS.On() {
		return nil
	}
	source, err := m.life.Certificates(cfg.LinkTLS.Certificates)
	if err != nil {
		return err
	}
	cfg.Links.Credentials = func(id string) credentials.TransportCredentials {
		return source.Client(certs.Side{Check: cfg.nodeCheck(id)})
	}
	return nil
}

// PushManager is Push-Manager, running.
type PushManager struct {
	// Static after start.
	log        *slog.Logger
	api, ops   net.Listener
	web        net.Listener      // nil: the push API is not served over HTTP
	tracer     *telemetry.Tracer // nil: nothing is traced
	audit      *audit.Log        // nil: nothing is written
	shards     *shard.Set
	controller *controller.Controller
	directory  *route.Directory
	links      *link.Set
	watcher    *discovery.Watcher
	store      *jetstream.Store // nil: nothing is stored
	spool      *store.Spool     // nil, too, then
	engine     *engine.Engine
	jobs       *jobs.Service     // nil: there are none
	presence   *presence.Service // nil: nobody is told
	ingress    *ingress.Server
	webServer  *web.Server // nil, too, then, and so are the warnings, for the console
	warnings   *console.Warnings
	collect    func() // brings the metrics of the engine up to date
	health     *health.Monitor
	entry      *discovery.Registration
	http       *telemetry.HTTP // nil until all the others run

	life    app.Lifecycle
	serving sync.WaitGroup
	failed  chan error
}

// Drain stops in the reverse order of the start. Readiness and health go off first, while
// pushes are still taken.
func (m *PushManager) Drain(ctx context.Context) error {
	m.health.Drain()
	m.ingress.Announce()
	return m.life.Stop(ctx)
}

// Reload has certificates, the policy and keys read again soon, and the file of the audit log opened again.
func (m *PushManager) Reload() {
	m.life.Reload()
	if m.audit != nil {
		m.audit.Reload()
	}
}

// Failed gets an error when the push API cannot be served any more.
func (m *PushManager) Failed() <-chan error { return m.failed }

// GRPCAddr is where the push API listens.
func (m *PushManager) GRPCAddr() string { return m.api.Addr().String() }

// WebAddr is where the push API is served over HTTP, "" for nowhere.
func (m *PushManager) WebAddr() string {
	if m.web == nil {
		return ""
	}
	return m.web.Addr().String()
}

// HTTPAddr is where metrics and health are.
func (m *PushManager) HTTPAddr() string { return m.ops.Addr().String() }

// NotReady says why pushes cannot be delivered now, nothing when they can.
func (m *PushManager) NotReady() []string { return m.health.NotReady() }

// Reachable is the number of Connect-Nodes with a live stream.
func (m *PushManager) Reachable() int { return m.links.Reachable() }

func (m *PushManager) show(cfg Config, set *metrics.Set) (err error) {
	cfg.Entry.Client, cfg.Entry.Addr = cfg.Discovery.Client, app.Advertised(cfg.AdvertiseAddress, m.api.Addr())
	if url := m.webURL(&cfg); url != "" {
		cfg.Entry.Metadata = maps.Clone(cfg.Entry.Metadata)
		if cfg.Entry.Metadata == nil {
			cfg.Entry.Metadata = map[string]string{}
		}
		cfg.Entry.Metadata[urlKey] = url
	}
	if m.entry, err = discovery.NewRegistration(cfg.Entry); err != nil {
		return err
	}
	m.entry.Start()
	m.life.Add("registration", app.WithTimeout(deregisterTimeout, m.entry.Close))
	m.http, err = telemetry.StartHTTP(m.operations(cfg, set))
	return err
}

func (m *PushManager) listen(ctx context.Context, cfg Config) (err error) {
	if m.api, err = m.life.Listen(ctx, cfg.ListenAddress, cfg.GRPCPort, "GRPC_PORT"); err != nil {
		return err
	}
	if cfg.HTTPPort != 0 {
		if m.web, err = m.life.Listen(ctx, cfg.ListenAddress, max(cfg.HTTPPort, 0), "HTTP_PORT"); err != nil {
			return err
		}
	}
	m.ops, err = m.life.Listen(ctx, cfg.MetricsAddress, cfg.MetricsPort, "METRICS_PORT")
	return err
}

// shardOf and goOn are the shards as the directory and the links need them.
func (m *PushManager) shardOf(key string) int            { return m.shards.For(key).Index() }
func (m *PushManager) goOn(shard int, task func()) error { return m.shards.At(shard).Go(task) }

// update gets all nodes that are registered in etcd. From its first call on pushes
// can be routed; before, every room would look like one full of unknown nodes.
func (m *PushManager) update(nodes []discovery.Node) {
	next := make([]link.Node, len(nodes))
	for i, n := range nodes {
		next[i] = link.Node{ID: n.ID, Addr: n.Addr}
	}
	if err := m.links.Update(next); err != nil {
		m.log.Error("some nodes cannot be used", "error", err)
	}
	if !m.ingress.Serving() {
		m.ingress.SetServing(true)
	}
}

func (m *PushManager) stopLinks(ctx context.Context) error {
	defer m.links.Close()
	return m.links.Drain(ctx)
}

// startEngine makes the engine, and lets it refuse pushes while memory runs out.
func (m *PushManager) startEngine(cfg engine.Config, watch pressure.Config) (err error) {
	if m.engine, err = engine.New(cfg); err != nil {
		return err
	}
	m.life.Add("engine", m.engine.Drain)
	watch.Shed = m.engine.Shed
	monitor, err := pressure.Start(watch)
	if err != nil {
		return err
	}
	m.life.Add("overload", app.Closing(monitor.Close))
	return nil
}

func (m *PushManager) serve() {
	m.serving.Go(func() {
		if err := m.ingress.Serve(m.api); err != nil {
			m.fail(err)
		}
	})
	if m.web == nil {
		return
	}
	m.serving.Go(func() {
		if err := m.webServer.Serve(m.web); err != nil {
			m.fail(err)
		}
	})
}

// stopServing drains both ways to the push API at a time: that over HTTP follows the other one.
func (m *PushManager) stopServing(ctx context.Context) error {
	var overHTTP error
	var draining sync.WaitGroup
	if m.web != nil {
		draining.Go(func() { overHTTP = m.webServer.Drain(ctx) })
	}
	err := m.ingress.Drain(ctx)
	draining.Wait()
	err = errors.Join(err, overHTTP)
	if !errors.Is(err, ingress.ErrStuck) { // or serve would wait for a handler that has been given up
		m.serving.Wait()
	}
	return err
}

func (m *PushManager) operations(cfg Config, set *metrics.Set) telemetry.HTTPConfig {
	m.collect = telemetry.NewEngineMetrics(m.engine, set).Collect
	return telemetry.HTTPConfig{
		Listener: m.ops, Metrics: set, Collect: m.collect,
		NotReady: m.health.NotReady, Checks: m.health.Names(), PprofRemote: cfg.PprofRemote, Logger: m.log,
	}
}

func (m *PushManager) closeHTTP(ctx context.Context) error {
	if m.http == nil {
		return nil
	}
	return m.http.Close(ctx)
}
