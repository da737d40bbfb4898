package devstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/invoke"
	"github.com/push-manager/push-manager/internal/telemetry"
)

// readyTimeout is how long everything may take to find each other.
const readyTimeout = 30 * time.Second

// Command is push-manager dev. It tells people on out what runs where.
func Command(out io.Writer) cli.Command {
	return cli.Command{
		Name: "dev",
		Help: "Run everything on this machine: etcd, a Controller, Connect-Nodes and Push-Manager.",
		New:  func() cli.Settings { return &devConfig{out: out} },
	}
}

// devConfig is the configuration of push-manager dev.
type devConfig struct {
	out io.Writer

	nodes, basePort int
	dataDir         string
	drainTimeout    time.Duration
	log             telemetry.LogConfig
	tracing         telemetry.TracingConfig
}

// Bind implements cli.Settings.
func (c *devConfig) Bind(s *config.Set) {
	s.Int(&c.nodes, "nodes", 3, 1, maxNodes, "Number of Connect-Nodes.")
	s.Int(&c.basePort, "base_port", ContractPorts, ContractPorts, 65535-5-2*maxNodes,
		"First of the ports in use, one after the other: etcd (2), Controller, push API, metrics, then two for each node (gRPC, WebSocket). 0: any free ones. -1: the usual ones.")
	s.Text(&c.dataDir, "data_dir", "", "Directory for etcd's data, which is kept. Empty: a temporary one, which is removed at the end.")
	s.Duration(&c.drainTimeout, "drain_timeout", 8*time.Second, time.Millisecond, "Longest time to stop everything in good order.")
	c.log.Level = "warn" // what runs where is told on standard output
	c.log.Bind(s)
	c.tracing.Bind(s)
}

// Validate implements cli.Settings.
func (c *devConfig) Validate(s *config.Set, lookupEnv func(string) (string, bool)) error {
	if info, err := os.Stat(c.dataDir); err == nil && !info.IsDir() {
		return s.Errorf("data_dir", "%s is no directory", c.dataDir)
	}
	return c.tracing.Validate(lookupEnv)
}

// LogConfig implements cli.Settings.
func (c *devConfig) LogConfig() telemetry.LogConfig { return c.log }

// Timeout implements cli.Settings.
func (c *devConfig) Timeout() time.Duration { return c.drainTimeout }

// Start implements cli.Settings.
func (c *devConfig) Start(ctx context.Context, logger *slog.Logger) (cli.Program, error) {
	s, err := Start(ctx, Config{Nodes: c.nodes, BasePort: c.basePort, DataDir: c.dataDir, Tracing: c.tracing, Logger: logger})
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			err = fmt.Errorf("%w (another set of ports: --base-port 0)", err)
		}
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := s.WaitReady(ctx); err != nil {
		stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.drainTimeout)
		defer cancel()
		return nil, errors.Join(err, s.Drain(stopCtx))
	}
	if err := s.describe(c.out, c.dataDir); err != nil {
		stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.drainTimeout)
		defer cancel()
		return nil, errors.Join(err, s.Drain(stopCtx))
	}
	return s, nil
}

// describe tells what runs where, and how to see a push arrive.
func (s *Stack) describe(out io.Writer, dataDir string) error {
	var b strings.Builder
	line := func(name, address, more string) { fmt.Fprintf(&b, "  %-16s %-18s %s\n", name, address, more) }
	b.WriteString("\nEverything runs on this machine:\n\n")
	line("Push-Manager", local(s.Address()), "gRPC; metrics and health at http://"+local(s.pushManager.HTTPAddr()))
	line("Controller", local(s.ControllerAddress()), "gRPC")
	for _, n := range s.Nodes() {
		line(n.ID, local(n.GRPC), "gRPC; page and WebSocket at http://"+local(n.HTTP))
	}
	data := s.etcd.dir
	if dataDir == "" {
		data += ", removed at the end"
	}
	line("etcd", local(s.EtcdEndpoint()), "data in "+data)

	pushctl := invoke.As("pushctl")
	listen, room, user := pushctl+" listen --user alice --room lobby", pushctl+` room lobby "Hello"`, pushctl+` user alice "Hello, Alice"`
	if ws := "ws://" + local(s.Nodes()[0].HTTP) + "/ws"; ws != "ws://localhost:8080/ws" {
		listen += " --url " + ws
	}
	if address := local(s.Address()); address != "localhost:50053" {
		room += " --address " + address
		user += " --address " + address
	}
	fmt.Fprintf(&b, "\nReady. Open http://%s in a browser, or copy these, each into a terminal of its own:\n\n  %s\n  %s\n  %s\n\nCtrl-C stops everything.\n",
		local(s.Nodes()[0].HTTP), listen, room, user)
	_, err := io.WriteString(out, b.String())
	return err
}

// local writes a loopback address as people do.
func local(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host != "127.0.0.1" {
		return address
	}
	return net.JoinHostPort("localhost", port)
}
