package controller

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/refcontroller/redisstore"
	"github.com/push-manager/push-manager/internal/telemetry"
)

// Command is the program as a command.
func Command() cli.Command {
	return cli.Command{Name: "controller", Help: "Run the reference Controller.", New: func() cli.Settings { return &Config{} }}
}

// Controller is a running reference Controller.
type Controller struct {
	// Static after Start.
	api  net.Listener
	http *telemetry.HTTP

	server atomic.Pointer[refcontroller.Server] // metrics and health are served before it is there

	life     app.Lifecycle
	serving  sync.WaitGroup
	failed   chan error
	draining chan struct{} // closed by Drain
}

// Start starts a Controller.
func Start(ctx context.Context, cfg Config, logger *slog.Logger) (_ *Controller, err error) {
	c := &Controller{failed: make(chan error, 1), draining: make(chan struct{})}
	defer c.life.StopAfter(ctx, &err)
	if c.api, err = c.life.Listen(ctx, cfg.ListenAddress, cfg.GRPCPort, "GRPC_PORT"); err != nil {
		return nil, err
	}
	ops, err := c.life.Listen(ctx, cfg.MetricsAddress, cfg.MetricsPort, "METRICS_PORT")
	if err != nil {
		return nil, err
	}
	set := metrics.NewSet()
	if c.http, err = telemetry.StartHTTP(telemetry.HTTPConfig{
		Listener: ops, Metrics: set, NotReady: func(...string) []string { return c.NotReady() }, Notes: c.notes, PprofRemote: cfg.PprofRemote, Logger: logger,
	}); err != nil {
		return nil, err
	}
	c.life.Add("metrics and health", app.WithGrace(c.http.Close)) // the last to go: they show how a stop goes on
	c.life.Insecure(logger, set, cfg.insecure)
	app.Report(logger, set, cfg.TLS.ReloadInterval, &cfg.TLS.Certificates, &cfg.Etcd.TLS)
	cfg.Tracing.Service, cfg.Tracing.Instance, cfg.Tracing.Logger, cfg.Tracing.Metrics = "controller", c.GRPCAddr(), logger, set
	tracer, err := telemetry.NewTracer(ctx, cfg.Tracing)
	if err != nil {
		return nil, err
	}
	c.life.Add("traces", app.WithGrace(tracer.Close))
	etcd, err := c.life.Etcd(cfg.Etcd)
	if err != nil {
		return nil, err
	}
	own := cfg.Controller
	own.Client, own.Logger, own.Metrics = etcd, logger, set
	if tracer != nil {
		own.Trace = func(traceparent, method string) func(error) {
			return tracer.Served(traceparent, strings.TrimPrefix(method, "/"))
		}
	}
	if own.Credentials, err = c.life.Node(cfg.TLS); err != nil {
		return nil, err
	}
	if cfg.Store.Kind == storeRedis {
		store := redisstore.New(redisstore.Config{
			Target: cfg.Store.redis, Prefix: cfg.Store.RedisPrefix, MaxUsers: own.MaxUsers, Logger: logger, Metrics: set,
		})
		c.life.Add("Redis", func(context.Context) error { return store.Close() })
		own.Store, own.MaxUsers = store, 0
	}
	server, err := refcontroller.New(own)
	if err != nil {
		return nil, err
	}
	c.server.Store(server)
	c.life.Add("API", c.stopServing)
	c.serving.Go(func() {
		if err := server.Serve(c.api); err != nil {
			c.failed <- fmt.Errorf("controller: %w", err)
		}
	})
	logger.Info("controller runs", "grpc", c.GRPCAddr(), "http", c.HTTPAddr())
	return c, nil
}

// Drain implements cli.Program.
func (c *Controller) Drain(ctx context.Context) error {
	close(c.draining)
	return c.life.Stop(ctx)
}

func (c *Controller) stopServing(ctx context.Context) error {
	defer c.serving.Wait()
	server := c.server.Load()
	defer server.Close()
	return server.Drain(ctx)
}

// NotReady says why the Controller should not be asked, nothing when it may.
func (c *Controller) NotReady() []string {
	select {
	case <-c.draining:
		return []string{"draining"}
	default:
	}
	if server := c.server.Load(); server == nil || !server.Opened() {
		return []string{"starting"}
	}
	return nil
}

// notes is what an operator may want to know although the Controller is ready: it
// has to be reached by the nodes whose reports it waits for.
func (c *Controller) notes() (notes []string) {
	server := c.server.Load()
	if server == nil {
		return nil
	}
	if why := server.WarmingUp(); why != "" {
		notes = append(notes, "warming up: "+why)
	}
	if why := server.Etcd(); why != "" {
		notes = append(notes, "etcd: "+why)
	}
	return notes
}

// Reload has certificates read again soon.
func (c *Controller) Reload() { c.life.Reload() }

// Failed implements cli.Program.
func (c *Controller) Failed() <-chan error { return c.failed }

// GRPCAddr is where the API listens.
func (c *Controller) GRPCAddr() string { return c.api.Addr().String() }

// HTTPAddr is where metrics and health are.
func (c *Controller) HTTPAddr() string { return c.http.Addr().String() }
