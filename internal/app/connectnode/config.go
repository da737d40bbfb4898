package connectnode

import (
	"context"
	"log/slog"
	"math"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/hooks"
	"github.com/push-manager/push-manager/internal/refgateway"
	"github.com/push-manager/push-manager/internal/telemetry"
	"github.com/push-manager/push-manager/transport/compression"
)

// Config is the configuration of the reference Connect-Node.
type Config struct {
	ListenAddress  string
	GRPCPort       int
	HTTPPort       int
	MetricsPort    int
	MetricsAddress string
	AllowInsecure  bool
	DrainTimeout   time.Duration

	Log     telemetry.LogConfig
	Tracing telemetry.TracingConfig
	Gateway refgateway.Config
	Etcd    app.EtcdConfig

	TLS           app.NodeTLS // for Push-Managers
	ControllerTLS app.ControllerTLS
	ClientTLS     app.Certificates
	MinVersion    string // of ClientTLS
	TrustDomain   string

	Hooks hooks.Config

	ClientAuth    string
	ClientTenants bool
	ClientTokens  jwt.Config

	insecure []string // what its settings allow
}

// Bind implements cli.Settings.
func (c *Config) Bind(s *config.Set) {
	g, d := &c.Gateway, refgateway.Defaults()
	s.ID(&g.NodeID, "node_id", "connect-node-1", "Id of this node, another one for each.")
	s.Text(&c.ListenAddress, "listen_address", "127.0.0.1", "Address to listen on. Anything but loopback needs TLS and authentication on both ports, or allow_insecure.")
	s.Port(&c.GRPCPort, "grpc_port", 50052, "Port for Push-Manager.")
	s.Port(&c.HTTPPort, "http_port", 8080, "Port for clients: the WebSocket at /ws, a page at /.")
	s.Port(&c.MetricsPort, "metrics_port", 9094, "HTTP port: /metrics, /healthz, /readyz.")
	app.BindMetricsAddress(s, &c.MetricsAddress)
	s.Text(&g.Members.Controller, "controller_address", "localhost:50051", "The Controller, as any gRPC target.")
	s.Address(&g.AdvertiseAddress, "advertise_address", "", "HOST:PORT that Push-Manager reaches this node at, for etcd. Empty: found out.")
	s.Address(&g.PushManagerAddress, "push_manager_address", d.PushManagerAddress, "Push-Manager's HOST:PORT, shown on the page.")
	s.Bool(&g.PushManagerTLS, "push_manager_tls", false, "The push API has TLS: the lines on the page show a certificate.")
	s.Bool(&c.AllowInsecure, "allow_insecure", false, app.AllowInsecureHelp)
	s.List(&g.AllowedOrigins, "ws.allowed_origins", "", "Origins of pages that may connect, such as https://app.example.com; * for all but null. Pages from this machine always may, and those of the host that they connect to: its IP address, or its name unless the connection comes over loopback.").Env("ALLOWED_ORIGINS")
	s.Bool(&g.TokenInQuery, "ws.token_in_query", false, "Also take the tokens of clients as token in the address. Whatever stands in an address is logged on its way by others.")
	s.Choice(&c.ClientAuth, "client_auth.mode", "none", "Whether clients need a token. none: they are who they say. jwt: they are who an issuer of client_auth.jwt says.", "none", "jwt")
	s.Bool(&c.ClientTenants, "client_auth.tenants", true, "Tokens may name a tenant, and a client without one may neither be nor join what begins like a tenant's, such as shop/lobby. false: there are no tenants, and ids are as they are.")
	s.Int(&g.Unverified, "client_auth.unverified", d.Unverified, 1, 1<<20, "Connections of one address (IPv6: of one /64) whose token has not been verified; one more costs the oldest its place. They have 5 s.")
	c.ClientTokens.Bind(s, "client_auth.jwt")
	s.Int(&g.MaxConnections, "max_connections", d.MaxConnections, 1, math.MaxInt32, "Clients connected at once.")
	s.Int(&g.Members.MaxRooms, "max_rooms", d.Members.MaxRooms, 1, 1<<16, "Rooms of one connection.")
	s.Int(&g.QueueFrames, "queue_frames", d.QueueFrames, 1, 1<<20, "Frames that may wait for one client; one that is behind by more is cut off.")
	s.Bytes(&g.QueueBytes, "queue_bytes", d.QueueBytes, 1, math.MaxInt32, "The same in bytes.")
	s.Bytes(&g.QueueTotalBytes, "queue_total_bytes", d.QueueTotalBytes, 1<<10, math.MaxInt32, "Bytes that may wait for all clients together; what waits for many counts once. From half of it on those with the longest queues are cut off.")
	s.Int(&g.MessageRate, "message_rate", d.MessageRate, 1, 1<<20, "Frames a second that are read from one client. After a pause it may send max_rooms and two seconds' worth more at once; what is beyond waits in its socket.")
	s.Bool(&g.Deflate, "client.deflate", false, "Compress messages to clients that offer permessage-deflate, as browsers do. A push is compressed once for all of them.")
	s.Int(&g.DeflateMinBytes, "client.deflate_min_bytes", d.DeflateMinBytes, 64, 1<<20, "Length from which on a message is compressed.")
	s.List(&g.Compression, "compression", strings.Join(compression.Names(), ","), "Codecs in which frames of Push-Manager may come. off: none.")
	s.Text(&c.Hooks.File, "hooks.file", "", "YAML file of the URLs that are told who connects, disconnects, joins and leaves (docs/hooks.md). It is read again while it changes. Empty: nobody is told.")
	s.Text(&c.Hooks.Dir, "hooks.dir", "connect-node-hooks", "Directory for what is to be sent to them. One process has it at a time.")
	s.Bytes(&c.Hooks.QueueBytes, "hooks.queue_bytes", 256<<20, 1<<20, 1<<40, "What may wait on disk for one of them. The oldest goes when there is more.")
	s.Duration(&c.DrainTimeout, "drain_timeout", 8*time.Second, time.Millisecond, "Longest time to leave in good order when asked to stop.")
	c.Log.Bind(s)
	c.Tracing.BindServed(s)
	c.ClientTLS.Role = "clients"
	c.ClientTLS.Bind(s, "tls", "", "")
	app.BindMinVersion(s, &c.MinVersion, "tls", "the port for clients")
	c.TLS.Bind(s, "node", "Push-Managers", certs.KindManager)
	c.ControllerTLS.Bind(s)
	app.BindTrust(s, &c.TrustDomain, &c.TLS.ReloadInterval)
	c.Etcd.Bind(s)
}

// Validate implements cli.Settings.
func (c *Config) Validate(s *config.Set, lookupEnv func(string) (string, bool)) error {
	if err := c.Tracing.Validate(lookupEnv); err != nil {
		return err //nolint:wrapcheck // it names the key
	}
	if err := app.CheckPorts(s, app.Port{Key: "grpc_port", Number: c.GRPCPort}, app.Port{Key: "http_port", Number: c.HTTPPort}, app.Port{Key: "metrics_port", Number: c.MetricsPort}); err != nil {
		return err
	}
	if err := app.CheckAddresses(s, c.Gateway.AdvertiseAddress, c.Gateway.Members.Controller, false); err != nil {
		return err
	}
	if n := len(c.Gateway.NodeID); n > refgateway.MaxNodeIDBytes {
		return s.Errorf("node_id", "has %d bytes, the limit is %d", n, refgateway.MaxNodeIDBytes)
	}
	for _, origin := range c.Gateway.AllowedOrigins {
		u, err := url.Parse(origin)
		if origin != "*" && (err != nil || u.Scheme == "" || u.Host == "" || u.Path != "" || strings.ContainsFunc(origin, unicode.IsSpace)) {
			return s.Errorf("ws.allowed_origins", "%q is no origin such as https://app.example.com", origin)
		}
	}
	if _, err := compression.Parse(c.Gateway.Compression); err != nil {
		return s.Errorf("compression", "%v", err)
	}
	switch jwtOn := c.ClientAuth == "jwt"; {
	case jwtOn && len(c.ClientTokens.Issuers) == 0:
		return s.Errorf("client_auth.jwt", "missing, while client_auth.mode is jwt: it says whose tokens count")
	case !jwtOn && len(c.ClientTokens.Issuers) > 0:
		return s.Errorf("client_auth.mode", "is none, while client_auth.jwt is set: nobody would be asked for a token")
	case jwtOn:
		if err := c.ClientTokens.Check(s, "client_auth.jwt"); err != nil {
			return err
		}
	}
	if err := app.CheckTrustDomain(s, c.TrustDomain); err != nil {
		return err
	}
	if err := c.ClientTLS.Validate(s); err != nil {
		return err
	}
	if err := c.TLS.Validate(s, c.TrustDomain); err != nil {
		return err
	}
	if err := c.ControllerTLS.Validate(s, c.TrustDomain); err != nil {
		return err
	}
	if c.Hooks.File != "" {
		c.Hooks.AllowPlain = c.AllowInsecure
		if err := hooks.Check(c.Hooks.File, c.AllowInsecure); err != nil {
			return s.Errorf("hooks.file", "%v", err)
		}
	}
	risks := app.NewRisks(s, c.AllowInsecure)
	if err := risks.Listen(c.ListenAddress, c.missing()); err != nil {
		return err
	}
	if err := app.CheckMetricsAddress(s, &c.MetricsAddress, c.ListenAddress, false, risks); err != nil {
		return err
	}
	if err := c.Etcd.Validate(s, risks); err != nil {
		return err
	}
	c.insecure = risks.Found()
	address := func(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }
	c.Gateway.GRPCAddress, c.Gateway.HTTPAddress = address(c.ListenAddress, c.GRPCPort), address(c.ListenAddress, c.HTTPPort)
	c.Gateway.MetricsAddress = address(c.MetricsAddress, c.MetricsPort)
	if ip := net.ParseIP(c.ListenAddress); c.Gateway.AdvertiseAddress == "" && (c.ListenAddress == "" || ip.IsUnspecified()) {
		c.Gateway.AdvertiseAddress = app.Advertised("", &net.TCPAddr{IP: net.IPv4zero, Port: c.GRPCPort})
	}
	return nil
}

// missing is what others who can reach the ports would not need.
func (c *Config) missing() string {
	var list []string
	if !c.ClientTLS.On() {
		list = append(list, "TLS on HTTP_PORT (TLS_CERT_FILE, TLS_KEY_FILE)")
	}
	if c.ClientAuth != "jwt" {
		list = append(list, "authentication of clients (CLIENT_AUTH_MODE=jwt)")
	}
	if without := c.TLS.Missing(); without != "" {
		list = append(list, without)
	}
	return strings.Join(list, ", ")
}

// LogConfig implements cli.Settings.
func (c *Config) LogConfig() telemetry.LogConfig { return c.Log }

// Timeout implements cli.Settings.
func (c *Config) Timeout() time.Duration { return c.DrainTimeout }

// GarbageShare is asked by Main. A gateway allocates when clients come and next to nothing for
// a push, so rare collections are not worth the memory.
func (c *Config) GarbageShare() int { return 16 }

// Start implements cli.Settings.
func (c *Config) Start(ctx context.Context, logger *slog.Logger) (cli.Program, error) {
	return Start(ctx, *c, logger)
}
