package controller

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/telemetry"
)

// Command is the program as a command.
func Command() cli.Command {
	return cli.Command{Name: "controller", Help: "Run the reference Controller.", New: func() cli.Settings { return &Config{} }}
}

// Config is the configuration of the reference Controller.
type Config struct {
	ListenAddress string
	GRPCPort      int
	MetricsPort   int
	AllowInsecure bool
	PprofRemote   bool
	DrainTimeout  time.Duration

	Log        telemetry.LogConfig
	Controller refcontroller.Config
	Etcd       app.EtcdConfig
}

// Bind implements cli.Settings.
func (c *Config) Bind(s *config.Set) {
	s.Text(&c.ListenAddress, "listen_address", "127.0.0.1", "Address that both ports listen on. Anything but loopback needs allow_insecure.")
	s.Port(&c.GRPCPort, "grpc_port", 50051, "Port of the Controller's API, with health and reflection.")
	s.Port(&c.MetricsPort, "metrics_port", 9095, "HTTP port: /metrics, /healthz, /readyz, /debug/pprof/.")
	s.Bool(&c.AllowInsecure, "allow_insecure", false, "Listen on an address that others can reach, without TLS and authentication.")
	s.Bool(&c.PprofRemote, "pprof_remote", false, "Let clients of other machines read profiles.")
	s.Int(&c.Controller.MaxUsers, "max_users", 0, 0, math.MaxInt32, "Users in one room; 0 for any number.")
	s.Duration(&c.Controller.NodeGrace, "node_grace", 15*time.Second, time.Millisecond, "How long a Connect-Node may be gone from etcd before its users are.")
	s.Duration(&c.Controller.Warmup, "warmup", 15*time.Second, 0, "How long look-ups fail after the start while registered Connect-Nodes have not reported their users. 0: not at all.")
	s.Duration(&c.DrainTimeout, "drain_timeout", 8*time.Second, time.Millisecond, "Longest time to finish what is in flight when asked to stop.")
	c.Log.Bind(s)
	c.Etcd.Bind(s)
}

// Settle implements cli.Settings.
func (c *Config) Settle(s *config.Set, _ func(string) (string, bool)) error {
	if err := app.CheckListen(s, c.ListenAddress, c.AllowInsecure); err != nil {
		return err
	}
	if err := app.CheckPorts(s, app.Port{Key: "grpc_port", Number: c.GRPCPort}, app.Port{Key: "metrics_port", Number: c.MetricsPort}); err != nil {
		return err
	}
	return c.Etcd.Settle(s)
}

// LogConfig implements cli.Settings.
func (c *Config) LogConfig() telemetry.LogConfig { return c.Log }

// Timeout implements cli.Settings.
func (c *Config) Timeout() time.Duration { return c.DrainTimeout }

// Start implements cli.Settings.
func (c *Config) Start(ctx context.Context, logger *slog.Logger) (cli.Program, error) {
	return Start(ctx, *c, logger)
}

// Controller is a running reference Controller.
type Controller struct {
	// Static after Start.
	api  net.Listener
	http *telemetry.HTTP

	server atomic.Pointer[refcontroller.Server] // metrics and health are served before it is there

	parts    app.Parts
	serving  sync.WaitGroup
	failed   chan error
	draining chan struct{} // closed by Drain
}

// Start starts a Controller.
func Start(ctx context.Context, cfg Config, logger *slog.Logger) (_ *Controller, err error) {
	c := &Controller{failed: make(chan error, 1), draining: make(chan struct{})}
	defer c.parts.StopAfter(ctx, &err)
	if c.api, err = c.parts.Listen(ctx, cfg.ListenAddress, cfg.GRPCPort, "GRPC_PORT"); err != nil {
		return nil, err
	}
	ops, err := c.parts.Listen(ctx, cfg.ListenAddress, cfg.MetricsPort, "METRICS_PORT")
	if err != nil {
		return nil, err
	}
	set := metrics.NewSet()
	if c.http, err = telemetry.StartHTTP(telemetry.HTTPConfig{
		Listener: ops, Metrics: set, NotReady: c.NotReady, Notes: c.notes, PprofRemote: cfg.PprofRemote, Logger: logger,
	}); err != nil {
		return nil, err
	}
	c.parts.Add("metrics and health", app.Tail(c.http.Close)) // the last to go: they show how a stop goes on
	etcd, err := c.parts.Etcd(cfg.Etcd)
	if err != nil {
		return nil, err
	}
	own := cfg.Controller
	own.Client, own.Logger, own.Metrics = etcd, logger, set
	server, err := refcontroller.New(own)
	if err != nil {
		return nil, err
	}
	c.server.Store(server)
	c.parts.Add("API", c.stopServing)
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
	return c.parts.Stop(ctx)
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
	if c.server.Load() == nil {
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

// Failed implements cli.Program.
func (c *Controller) Failed() <-chan error { return c.failed }

// GRPCAddr is where the API listens.
func (c *Controller) GRPCAddr() string { return c.api.Addr().String() }

// HTTPAddr is where metrics and health are.
func (c *Controller) HTTPAddr() string { return c.http.Addr().String() }
