package program

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/controller"
	"github.com/push-manager/push-manager/internal/telemetry"
	"github.com/push-manager/push-manager/transport/discovery"
)

// ControllerConfig is the configuration of the reference Controller.
type ControllerConfig struct {
	ListenAddress string
	GRPCPort      int
	MetricsPort   int
	AllowInsecure bool
	PprofRemote   bool
	DrainTimeout  time.Duration

	Log        telemetry.LogConfig
	Controller controller.Config
	Etcd       EtcdConfig
}

// Bind implements Settings.
func (c *ControllerConfig) Bind(s *config.Set) {
	s.Text(&c.ListenAddress, "listen_address", "127.0.0.1", "Address that both ports listen on. Anything but loopback needs allow_insecure.")
	s.Port(&c.GRPCPort, "grpc_port", 50051, "Port of the Controller's API, with health and reflection.")
	s.Port(&c.MetricsPort, "metrics_port", 9095, "HTTP port: /metrics, /healthz, /readyz, /debug/pprof/.")
	s.Bool(&c.AllowInsecure, "allow_insecure", false, "Listen on an address that others can reach, without TLS and authentication.")
	s.Bool(&c.PprofRemote, "pprof_remote", false, "Let clients of other machines read profiles.")
	s.Int(&c.Controller.MaxUsers, "max_users", 0, 0, math.MaxInt32, "Users in one room; 0 for any number.")
	s.Duration(&c.Controller.NodeGrace, "node_grace", 15*time.Second, time.Millisecond, "How long a Connect-Node may be gone from etcd before its users are.")
	s.Duration(&c.DrainTimeout, "drain_timeout", 8*time.Second, time.Millisecond, "Longest time to finish what is in flight when asked to stop.")
	c.Log.Bind(s)
	c.Etcd.Bind(s)
}

// Settle implements Settings.
func (c *ControllerConfig) Settle(s *config.Set, _ func(string) (string, bool)) error {
	if err := checkListen(s, c.ListenAddress, c.AllowInsecure); err != nil {
		return err
	}
	return c.Etcd.Settle(s)
}

// LogConfig implements Settings.
func (c *ControllerConfig) LogConfig() telemetry.LogConfig { return c.Log }

// Timeout implements Settings.
func (c *ControllerConfig) Timeout() time.Duration { return c.DrainTimeout }

// Start implements Settings.
func (c *ControllerConfig) Start(ctx context.Context, logger *slog.Logger) (Program, error) {
	return StartController(ctx, *c, logger)
}

// Controller is a running reference Controller.
type Controller struct {
	// Static after StartController.
	api    net.Listener
	http   *telemetry.HTTP
	server *controller.Server
	etcd   *clientv3.Client

	serving  sync.WaitGroup
	failed   chan error
	draining chan struct{} // closed by Drain
}

// StartController starts a Controller.
func StartController(ctx context.Context, cfg ControllerConfig, logger *slog.Logger) (_ *Controller, err error) {
	c := &Controller{failed: make(chan error, 1), draining: make(chan struct{})}
	var built parts
	defer func() {
		if err != nil {
			err = errors.Join(err, built.stop(ctx))
		}
	}()
	if c.api, err = listen(ctx, cfg.ListenAddress, cfg.GRPCPort, "GRPC_PORT"); err != nil {
		return nil, err
	}
	built.add("listener", func(context.Context) error { return ignoreClosed(c.api.Close()) })
	ops, err := listen(ctx, cfg.ListenAddress, cfg.MetricsPort, "METRICS_PORT")
	if err != nil {
		return nil, err
	}
	built.add("listener", func(context.Context) error { return ignoreClosed(ops.Close()) })
	if c.etcd, err = discovery.NewClient(cfg.Etcd.ClientConfig); err != nil {
		return nil, err
	}
	built.add("etcd client", func(context.Context) error { return ignoreCanceled(c.etcd.Close()) })
	set := metrics.NewSet()
	own := cfg.Controller
	own.Client, own.Logger, own.Metrics = c.etcd, logger, set
	if c.server, err = controller.New(own); err != nil {
		return nil, err
	}
	if c.http, err = telemetry.StartHTTP(telemetry.HTTPConfig{
		Listener: ops, Metrics: set, NotReady: c.NotReady, PprofRemote: cfg.PprofRemote, Logger: logger,
	}); err != nil {
		return nil, err
	}
	c.serving.Go(func() {
		if err := c.server.Serve(c.api); err != nil {
			c.failed <- fmt.Errorf("controller: %w", err)
		}
	})
	logger.Info("controller runs", "grpc", c.GRPCAddr(), "http", c.HTTPAddr())
	return c, nil
}

// Drain implements Program.
func (c *Controller) Drain(ctx context.Context) error {
	close(c.draining)
	err := c.server.Drain(ctx)
	c.server.Close()
	c.serving.Wait()
	err = errors.Join(err, ignoreCanceled(c.etcd.Close()))
	tail, cancel := context.WithTimeout(context.WithoutCancel(ctx), tailTimeout)
	defer cancel()
	return errors.Join(err, c.http.Close(tail))
}

// NotReady says why the Controller should not be asked: only that it stops.
func (c *Controller) NotReady() []string {
	select {
	case <-c.draining:
		return []string{"draining"}
	default:
		return nil
	}
}

// Failed implements Program.
func (c *Controller) Failed() <-chan error { return c.failed }

// GRPCAddr is where the API listens.
func (c *Controller) GRPCAddr() string { return c.api.Addr().String() }

// HTTPAddr is where metrics and health are.
func (c *Controller) HTTPAddr() string { return c.http.Addr().String() }
