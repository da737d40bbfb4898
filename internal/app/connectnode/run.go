package connectnode

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/hooks"
	"github.com/push-manager/push-manager/internal/invoke"
	"github.com/push-manager/push-manager/internal/refgateway"
	"github.com/push-manager/push-manager/internal/telemetry"
)

// Command is the program as a command.
func Command() cli.Command {
	return cli.Command{Name: "connect-node", Help: "Run the reference Connect-Node.", New: func() cli.Settings { return &Config{} }}
}

// ConnectNode is a running reference Connect-Node.
type ConnectNode struct {
	*refgateway.Gateway

	life   app.Lifecycle
	tokens *jwt.Verifier // nil where clients need none
	hooks  *hooks.Hooks  // nil where nobody is told of clients
}

// hooksDrain is how long a node that ends goes on to send what waits for its hooks. The rest is sent after the next start.
const hooksDrain = 2 * time.Second

// Start starts a Connect-Node.
func Start(ctx context.Context, cfg Config, logger *slog.Logger) (_ *ConnectNode, err error) {
	n := &ConnectNode{}
	defer n.life.StopAfter(ctx, &err)
	g := cfg.Gateway
	g.Logger, g.Metrics, g.Pushctl = logger, metrics.NewSet(), invoke.As("pushctl")
	app.Report(logger, g.Metrics, cfg.TLS.ReloadInterval, &cfg.TLS.Certificates, &cfg.ClientTLS, &cfg.ControllerTLS.Certificates, &cfg.Etcd.TLS)
	cfg.Tracing.Service, cfg.Tracing.Instance, cfg.Tracing.Logger, cfg.Tracing.Metrics = "connect-node", g.NodeID, logger, g.Metrics
	tracer, err := telemetry.NewTracer(ctx, cfg.Tracing)
	if err != nil {
		return nil, err
	}
	n.life.Add("traces", app.WithGrace(tracer.Close))
	if tracer != nil {
		g.Trace = func(traceparent string) func() {
			end := tracer.Served(traceparent, "hand over")
			return func() { end(nil) }
		}
	}
	if g.Etcd, err = n.life.Etcd(cfg.Etcd); err != nil {
		return nil, err
	}
	if g.Credentials, err = n.life.Node(cfg.TLS); err != nil {
		return nil, err
	}
	if g.Members.Credentials, err = n.life.Controller(cfg.ControllerTLS); err != nil {
		return nil, err
	}
	if cfg.ClientTLS.On() {
		source, err := n.life.Certificates(cfg.ClientTLS)
		if err != nil {
			return nil, err
		}
		g.ClientTLS = source.ServerConfig(certs.Side{MinVersion: app.MinVersion(cfg.MinVersion)}, "http/1.1")
	}
	if cfg.ClientAuth == "jwt" {
		g.NoTenants = !cfg.ClientTenants
		cfg.ClientTokens.ReloadInterval, cfg.ClientTokens.Logger, cfg.ClientTokens.Metrics = cfg.TLS.ReloadInterval, logger, g.Metrics
		if g.Tokens, err = jwt.New(cfg.ClientTokens); err != nil {
			return nil, fmt.Errorf("client_auth.jwt: %w", err)
		}
		n.tokens = g.Tokens
		n.life.Add("issuers of tokens", app.Closing(g.Tokens.Close))
	}
	if cfg.Hooks.File != "" {
		cfg.Hooks.Node, cfg.Hooks.ReloadInterval, cfg.Hooks.Logger, cfg.Hooks.Metrics = g.NodeID, cfg.TLS.ReloadInterval, logger, g.Metrics
		if g.Hooks, err = hooks.Open(cfg.Hooks); err != nil {
			return nil, fmt.Errorf("HOOKS_DIR: %w", err)
		}
		n.hooks = g.Hooks
		n.life.Add("hooks", app.WithTimeout(hooksDrain, g.Hooks.Close))
	}
	n.life.Insecure(logger, g.Metrics, cfg.insecure)
	if n.Gateway, err = refgateway.New(g); err != nil {
		return nil, err
	}
	if err := n.Start(); err != nil {
		if listen, ok := errors.AsType[*refgateway.ListenError](err); ok {
			keys := map[string]string{"GRPCAddress": "GRPC_PORT", "HTTPAddress": "HTTP_PORT", "MetricsAddress": "METRICS_PORT"}
			return nil, app.ListenError(keys[listen.Field], listen.Err)
		}
		return nil, err
	}
	n.life.Add("gateway", func(ctx context.Context) error {
		defer n.Close()
		return n.Gateway.Drain(ctx)
	})
	logger.Info("connect-node runs", "id", g.NodeID, "grpc", n.GRPCAddr().String(), "http", n.HTTPAddr().String(),
		"metrics", n.MetricsAddr())
	return n, nil
}

// Drain implements cli.Program: the node leaves etcd and the Controller, its
// managers and clients.
func (n *ConnectNode) Drain(ctx context.Context) error { return n.life.Stop(ctx) }

// Reload has certificates and the issuers' keys read again soon.
func (n *ConnectNode) Reload() {
	n.life.Reload()
	if n.tokens != nil {
		n.tokens.Reload()
	}
	if n.hooks != nil {
		n.hooks.Reload()
	}
}

// Failed implements cli.Program. The gateway logs what ends one of its listeners.
func (n *ConnectNode) Failed() <-chan error { return nil }
