package controller

import (
	"context"
	"log/slog"
	"math"
	"time"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/telemetry"
)

// Config is the configuration of the reference Controller.
type Config struct {
	ListenAddress  string
	GRPCPort       int
	MetricsPort    int
	AllowInsecure  bool
	MetricsAddress string
	PprofRemote    bool
	DrainTimeout   time.Duration

	Log        telemetry.LogConfig
	Controller refcontroller.Config
	Store      StoreConfig
	Etcd       app.EtcdConfig

	Tracing     telemetry.TracingConfig
	TLS         app.NodeTLS
	TrustDomain string

	insecure []string // what its settings allow
}

// Bind implements cli.Settings.
func (c *Config) Bind(s *config.Set) {
	s.Text(&c.ListenAddress, "listen_address", "127.0.0.1", "Address to listen on. Anything but loopback needs node.tls, or allow_insecure.")
	s.Port(&c.GRPCPort, "grpc_port", 50051, "Port of the Controller's API, with health and reflection.")
	s.Port(&c.MetricsPort, "metrics_port", 9095, "HTTP port: /metrics, /healthz, /readyz, /debug/pprof/.")
	app.BindMetricsAddress(s, &c.MetricsAddress)
	s.Bool(&c.AllowInsecure, "allow_insecure", false, app.AllowInsecureHelp)
	s.Bool(&c.PprofRemote, "pprof_remote", false, "Let clients of other machines read profiles.")
	c.Store.bind(s)
	s.Int(&c.Controller.MaxUsers, "max_users", 0, 0, math.MaxInt32, "Users in one room; 0 for any number.")
	s.Duration(&c.Controller.NodeGrace, "node_grace", refcontroller.Defaults().NodeGrace, time.Millisecond, "How long a Connect-Node may be gone from etcd before its users are.")
	s.Duration(&c.Controller.Warmup, "warmup", 15*time.Second, 0, "How long look-ups fail after the start, or after the store was lost, while registered Connect-Nodes have not reported their users. 0: not at all.")
	s.Duration(&c.DrainTimeout, "drain_timeout", 8*time.Second, time.Millisecond, "Longest time to finish what is in flight when asked to stop.")
	c.Log.Bind(s)
	c.Tracing.BindServed(s)
	c.TLS.Bind(s, "controller", "Push-Managers and Connect-Nodes", certs.KindManager, certs.KindNode)
	app.BindTrust(s, &c.TrustDomain, &c.TLS.ReloadInterval)
	c.Etcd.Bind(s)
}

// Validate implements cli.Settings.
func (c *Config) Validate(s *config.Set, lookupEnv func(string) (string, bool)) error {
	if err := c.Tracing.Validate(lookupEnv); err != nil {
		return err //nolint:wrapcheck // it names the key
	}
	if err := app.CheckTrustDomain(s, c.TrustDomain); err != nil {
		return err
	}
	if err := c.TLS.Validate(s, c.TrustDomain); err != nil {
		return err
	}
	risks := app.NewRisks(s, c.AllowInsecure)
	if err := risks.Listen(c.ListenAddress, c.TLS.Missing()); err != nil {
		return err
	}
	if err := app.CheckMetricsAddress(s, &c.MetricsAddress, c.ListenAddress, c.PprofRemote, risks); err != nil {
		return err
	}
	if err := app.CheckPorts(s, app.Port{Key: "grpc_port", Number: c.GRPCPort}, app.Port{Key: "metrics_port", Number: c.MetricsPort}); err != nil {
		return err
	}
	if err := c.Etcd.Validate(s, risks); err != nil {
		return err
	}
	if err := c.Store.validate(s, risks); err != nil {
		return err
	}
	c.insecure = risks.Found()
	return nil
}

// LogConfig implements cli.Settings.
func (c *Config) LogConfig() telemetry.LogConfig { return c.Log }

// Timeout implements cli.Settings.
func (c *Config) Timeout() time.Duration { return c.DrainTimeout }

// Start implements cli.Settings.
func (c *Config) Start(ctx context.Context, logger *slog.Logger) (cli.Program, error) {
	return Start(ctx, *c, logger)
}
