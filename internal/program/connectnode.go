package program

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/gateway"
	"github.com/push-manager/push-manager/internal/invoke"
	"github.com/push-manager/push-manager/internal/telemetry"
	"github.com/push-manager/push-manager/transport/compression"
)

// ConnectNodeConfig is the configuration of the reference Connect-Node.
type ConnectNodeConfig struct {
	ListenAddress string
	GRPCPort      int
	HTTPPort      int
	MetricsPort   int
	AllowInsecure bool
	DrainTimeout  time.Duration

	Log     telemetry.LogConfig
	Gateway gateway.Config
	Etcd    EtcdConfig
}

// Bind implements Settings.
func (c *ConnectNodeConfig) Bind(s *config.Set) {
	g := &c.Gateway
	s.ID(&g.NodeID, "node_id", "connect-node-1", "Id of this node, another one for each.")
	s.Text(&c.ListenAddress, "listen_address", "127.0.0.1", "Address that all ports listen on. Anything but loopback needs allow_insecure.")
	s.Port(&c.GRPCPort, "grpc_port", 50052, "Port for Push-Manager.")
	s.Port(&c.HTTPPort, "http_port", 8080, "Port for clients: the WebSocket at /ws, a page at /.")
	s.Port(&c.MetricsPort, "metrics_port", 9094, "HTTP port: /metrics, /healthz, /readyz.")
	s.Text(&g.ControllerAddress, "controller_address", "localhost:50051", "The Controller, as any gRPC target.")
	s.Address(&g.AdvertiseAddress, "advertise_address", "", "HOST:PORT that Push-Manager reaches this node at, for etcd. Empty: found out.")
	s.Address(&g.PushManagerAddress, "push_manager_address", "localhost:50053", "Push-Manager's HOST:PORT, shown on the page.")
	s.Bool(&c.AllowInsecure, "allow_insecure", false, "Listen on an address that others can reach, without TLS and authentication.")
	s.List(&g.AllowedOrigins, "allowed_origins", "", "Origins of pages that may connect, such as https://app.example.com; * for all. Pages from this machine always may, and those of the host that they connect to: its IP address, or its name unless the connection comes over loopback.")
	s.Int(&g.MaxConnections, "max_connections", 100_000, 1, math.MaxInt32, "Clients connected at once.")
	s.Int(&g.MaxRooms, "max_rooms", 100, 1, 1<<16, "Rooms of one connection.")
	s.Int(&g.QueueFrames, "queue_frames", 4096, 1, 1<<20, "Frames that may wait for one client; one that is behind by more is cut off.")
	s.Bytes(&g.QueueBytes, "queue_bytes", 1<<20, 1, math.MaxInt32, "The same in bytes.")
	s.Bytes(&g.QueueTotalBytes, "queue_total_bytes", 256<<20, 1<<10, math.MaxInt32, "Bytes that may wait for all clients together; what waits for many counts once. From half of it on those with the longest queues are cut off.")
	s.Int(&g.MessageRate, "message_rate", 50, 1, 1<<20, "Frames a second that are read from one client. After a pause it may send max_rooms and two seconds' worth more at once; what is beyond waits in its socket.")
	s.List(&g.Compression, "compression", strings.Join(compression.Names(), ","), "Codecs in which frames of Push-Manager may come. off: none.")
	s.Duration(&c.DrainTimeout, "drain_timeout", 8*time.Second, time.Millisecond, "Longest time to leave in good order when asked to stop.")
	c.Log.Bind(s)
	c.Etcd.Bind(s)
}

// Settle implements Settings.
func (c *ConnectNodeConfig) Settle(s *config.Set, _ func(string) (string, bool)) error {
	if err := CheckListen(s, c.ListenAddress, c.AllowInsecure); err != nil {
		return err
	}
	if err := CheckPorts(s, Port{"grpc_port", c.GRPCPort}, Port{"http_port", c.HTTPPort}, Port{"metrics_port", c.MetricsPort}); err != nil {
		return err
	}
	if err := CheckAddresses(s, c.Gateway.AdvertiseAddress, c.Gateway.ControllerAddress, false); err != nil {
		return err
	}
	if n := len(c.Gateway.NodeID); n > gateway.MaxNodeIDBytes {
		return s.Problem("node_id", "has %d bytes, the limit is %d", n, gateway.MaxNodeIDBytes)
	}
	for _, origin := range c.Gateway.AllowedOrigins {
		u, err := url.Parse(origin)
		if origin != "*" && (err != nil || u.Scheme == "" || u.Host == "" || u.Path != "" || strings.ContainsFunc(origin, unicode.IsSpace)) {
			return s.Problem("allowed_origins", "%q is no origin such as https://app.example.com", origin)
		}
	}
	if _, err := compression.Parse(c.Gateway.Compression); err != nil {
		return s.Problem("compression", "%v", err)
	}
	if err := c.Etcd.Settle(s); err != nil {
		return err
	}
	address := func(port int) string { return net.JoinHostPort(c.ListenAddress, strconv.Itoa(port)) }
	c.Gateway.GRPCAddress, c.Gateway.HTTPAddress, c.Gateway.MetricsAddress = address(c.GRPCPort), address(c.HTTPPort), address(c.MetricsPort)
	if ip := net.ParseIP(c.ListenAddress); c.Gateway.AdvertiseAddress == "" && (c.ListenAddress == "" || ip.IsUnspecified()) {
		c.Gateway.AdvertiseAddress = Advertised("", &net.TCPAddr{IP: net.IPv4zero, Port: c.GRPCPort})
	}
	return nil
}

// LogConfig implements Settings.
func (c *ConnectNodeConfig) LogConfig() telemetry.LogConfig { return c.Log }

// Timeout implements Settings.
func (c *ConnectNodeConfig) Timeout() time.Duration { return c.DrainTimeout }

// GarbageShare is asked by Main. A gateway allocates when clients come and next to nothing for
// a push, so rare collections are not worth the memory.
func (c *ConnectNodeConfig) GarbageShare() int { return 16 }

// Start implements Settings.
func (c *ConnectNodeConfig) Start(ctx context.Context, logger *slog.Logger) (Program, error) {
	return StartConnectNode(ctx, *c, logger)
}

// ConnectNode is a running reference Connect-Node.
type ConnectNode struct {
	*gateway.Gateway

	parts Parts
}

// StartConnectNode starts a Connect-Node.
func StartConnectNode(ctx context.Context, cfg ConnectNodeConfig, logger *slog.Logger) (_ *ConnectNode, err error) {
	n := &ConnectNode{}
	defer n.parts.StopAfter(ctx, &err)
	etcd, err := n.parts.Etcd(cfg.Etcd)
	if err != nil {
		return nil, err
	}
	g := cfg.Gateway
	g.Etcd, g.Logger, g.Metrics, g.Pushctl = etcd, logger, metrics.NewSet(), invoke.As("pushctl")
	if n.Gateway, err = gateway.New(g); err != nil {
		return nil, err
	}
	if err := n.Start(); err != nil {
		if listen, ok := errors.AsType[*gateway.ListenError](err); ok {
			keys := map[string]string{"GRPCAddress": "GRPC_PORT", "HTTPAddress": "HTTP_PORT", "MetricsAddress": "METRICS_PORT"}
			return nil, listenError(keys[listen.Field], listen.Err)
		}
		return nil, err
	}
	n.parts.Add("gateway", func(ctx context.Context) error {
		defer n.Close()
		return n.Gateway.Drain(ctx)
	})
	logger.Info("connect-node runs", "id", g.NodeID, "grpc", n.GRPCAddr().String(), "http", n.HTTPAddr().String(),
		"metrics", n.MetricsAddr())
	return n, nil
}

// Drain implements Program: the node leaves etcd and the Controller, its
// managers and clients.
func (n *ConnectNode) Drain(ctx context.Context) error { return n.parts.Stop(ctx) }

// Failed implements Program. The gateway logs what ends one of its listeners.
func (n *ConnectNode) Failed() <-chan error { return nil }
