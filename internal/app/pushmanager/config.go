package pushmanager

import (
	"context"
	"crypto/tls"
	"log/slog"
	"math"
	"net/netip"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/console"
	"github.com/push-manager/push-manager/internal/health"
	"github.com/push-manager/push-manager/internal/pressure"
	"github.com/push-manager/push-manager/internal/quota"
	"github.com/push-manager/push-manager/internal/telemetry"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/compression"
	"github.com/push-manager/push-manager/transport/controller"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/ingress/web"
	"github.com/push-manager/push-manager/transport/link"
	"github.com/push-manager/push-manager/transport/replay"
)

// Config is the Configs of the packages that Push-Manager is made of, and what is
// of the whole.
type Config struct {
	ManagerID        string
	ListenAddress    string
	AdvertiseAddress string
	GRPCPort         int
	HTTPPort         int // 0: off, FreePort: any
	MetricsPort      int
	MetricsAddress   string
	AllowInsecure    bool
	TrustDomain      string
	PprofRemote      bool
	Reflection       bool
	DrainTimeout     time.Duration

	Log        telemetry.LogConfig
	Tracing    telemetry.TracingConfig
	Shards     shard.Config
	Routes     route.Config
	Engine     engine.Config
	Pressure   pressure.Config
	Links      link.Config
	Ingress    ingress.Config
	Web        web.Config
	Controller controller.Config
	Discovery  discovery.Config
	Entry      discovery.RegistrationConfig
	Etcd       app.EtcdConfig
	Health     health.Config
	TLS        apiTLS
	Auth       authConfig
	Quotas     quota.Config
	Audit      audit.Config
	LinkTLS    linkTLS
	Store      storeConfig
	Replays    replay.Config
	Webhook    webhookConfig
	Jobs       jobsConfig
	Presence   presenceConfig
	Refusals   int

	ControllerTLS app.ControllerTLS

	// Pages are links for the console, of a stack that is for trying. No setting says so.
	Pages func() []console.Page

	settings *config.Set // what Bind was called with, for the console

	nodeCheck func(id string) certs.Check // of certificates

	allowNets []string
	insecure  []string // what its settings allow
}

// apiTLS is the section tls.
type apiTLS struct {
	app.Certificates

	ClientAuth, MinVersion string
}

func (c *apiTLS) bind(s *config.Set) {
	c.Role = "api"
	c.Bind(s, "tls", "client_ca_file", "PEM file of the authorities that callers' certificates are checked with. Empty: no certificates of callers.")
	s.Choice(&c.ClientAuth, "tls.client_auth", "optional", "Whether callers of the push API need a certificate of these authorities. With require the address may be one that others reach, and without auth.mode=required every holder of one may do everything.",
		"none", "optional", "require")
	app.BindMinVersion(s, &c.MinVersion, "tls", "the push API")
}

func (c *apiTLS) validate(s *config.Set) error {
	switch {
	case c.Cert == "" && c.Key == "" && c.CA != "":
		return s.Errorf("tls.cert_file", "missing, while tls.client_ca_file is set")
	case c.CA == "" && c.ClientAuth == "require":
		return s.Errorf("tls.client_ca_file", "missing, while tls.client_auth is require")
	}
	return c.Validate(s)
}

// certificates tells whether callers can show one.
func (c *apiTLS) certificates() bool { return c.CA != "" && c.ClientAuth != "none" }

// missing is what others who can reach the push API would not need. policy tells that every caller must be one of the
// policy; without it, every caller must have a certificate of our authorities.
func (c *apiTLS) missing(policy bool) string {
	const authentication = "authentication (AUTH_MODE=required and AUTH_POLICY_FILE, or TLS_CLIENT_AUTH=require and TLS_CLIENT_CA_FILE)"
	known := policy || c.ClientAuth == "require"
	switch {
	case !c.On() && !known:
		return "TLS (TLS_CERT_FILE, TLS_KEY_FILE) and " + authentication
	case !c.On():
		return "TLS (TLS_CERT_FILE, TLS_KEY_FILE)"
	case !known:
		return authentication
	}
	return ""
}

func (c *apiTLS) side() certs.Side {
	side := certs.Side{MinVersion: app.MinVersion(c.MinVersion)}
	switch {
	case c.ClientAuth == "require":
		side.ClientAuth = tls.RequireAndVerifyClientCert
	case c.certificates():
		side.ClientAuth = tls.VerifyClientCertIfGiven
	}
	return side
}

// linkTLS is the section link.tls.
type linkTLS struct {
	app.Certificates

	Identity    string
	AllowedSANs []string
	Migrate     bool
}

func (c *linkTLS) bind(s *config.Set) {
	c.Role = "link"
	c.Bind(s, "link.tls", "ca_file", "PEM file of the authorities that nodes' certificates are checked with. Set: every node is spoken to over TLS.")
	s.Choice(&c.Identity, "link.tls.identity", "id", "What a node's certificate must name. id: the node that is registered; role: one of link.tls.allowed_sans; none: nothing.", "id", "role", "none")
	s.List(&c.AllowedSANs, "link.tls.allowed_sans", "", "Names that do for every node with link.tls.identity=role, such as connect-node/*: paths of the trust domain, URIs, DNS names; a star at the end stands for any rest.")
	s.Bool(&c.Migrate, "link.tls.migrate", false, "Speak in plain text to nodes that do not know TLS, while they are changed one by one. Insecure: whoever can write to etcd or is on the way can be such a node.")
}

// check returns what judges a node's certificate, by the id that the node is registered under.
func (c *linkTLS) check(s *config.Set, trustDomain string) (func(id string) certs.Check, error) {
	switch {
	case c.CA == "" && (c.On() || c.Identity == "role" || c.Migrate):
		return nil, s.Errorf("link.tls.ca_file", "missing, while other keys of link.tls are set")
	case c.Identity == "none":
		return func(string) certs.Check { return certs.Anybody }, c.Validate(s)
	case c.Identity == "role":
		role, err := certs.Allowed(trustDomain, c.AllowedSANs)
		if err != nil {
			return nil, s.Errorf("link.tls.allowed_sans", "%v", err)
		}
		return func(string) certs.Check { return role }, c.Validate(s)
	}
	return func(id string) certs.Check { return certs.Node(trustDomain, id) }, c.Validate(s)
}

// FreePort as Config.HTTPPort stands for any port that is free. No setting says so: 0 is off.
const FreePort = -1

// maxRequest bounds what limits.request_bytes may be: such a request is held in
// memory for each call under way.
const maxRequest = 64 << 20

// leastLinkTime is as fine as the links' clock is.
const leastLinkTime = 25 * time.Millisecond

// Bind adds all keys. Validate must follow Load.
func (c *Config) Bind(s *config.Set) {
	c.settings = s
	s.ID(&c.ManagerID, "manager_id", "push-manager-1", "Name of this instance: in etcd, metrics and traces.")
	s.Text(&c.ListenAddress, "listen_address", "127.0.0.1", "Address to listen on. Anything but loopback needs TLS and auth.mode=required (or tls.client_auth=require), or allow_insecure.")
	s.Port(&c.GRPCPort, "grpc_port", 50053, "Port of the push API, with health and reflection.")
	s.Port(&c.HTTPPort, "http_port", 8053, "Port of the push API over HTTP (Connect, gRPC-Web and JSON) and of the console. 0: off.")
	s.List(&c.Web.Origins, "http.allowed_origins", "", "Origins of pages that may push over HTTP, such as https://app.example.com. Empty: pages of push-manager's own alone.")
	s.Port(&c.MetricsPort, "metrics_port", 9093, "HTTP port: /metrics, /healthz, /readyz, /debug/pprof/.")
	app.BindMetricsAddress(s, &c.MetricsAddress)
	s.Text(&c.Controller.Address, "controller_address", "localhost:50051", "The Controller, as any gRPC target or several HOST:PORT separated by commas.")
	s.Address(&c.AdvertiseAddress, "advertise_address", "", "HOST:PORT that others reach the push API at, for etcd. Empty: found out.")
	s.Bool(&c.AllowInsecure, "allow_insecure", false, app.AllowInsecureHelp)
	s.Bool(&c.PprofRemote, "pprof_remote", false, "Let clients of other machines read profiles.")
	s.Bool(&c.Reflection, "reflection", true, "Serve gRPC reflection on the push API's port.")
	s.Duration(&c.DrainTimeout, "drain_timeout", 8*time.Second, time.Millisecond, "Longest time to finish what is in flight when asked to stop.")
	s.Duration(&c.Ingress.DrainNotice, "drain_notice", time.Second, config.OrZero, "How long pushes are still taken after readiness went off, so that balancers notice. More than half of drain_timeout counts as half.")
	s.Duration(&c.Health.Patience, "not_ready_after", 2*time.Second, config.OrZero, "How long pushes must have been impossible to deliver for readiness to go off. It comes back at once.")
	c.Log.Bind(s)

	s.Auto(&c.Shards.Count, "shards", shard.Defaults().Count, shard.MaxCount, "Fixed lanes of work, each with a stream to every node. auto: one for every two cores.")
	s.Int(&c.Shards.PoolSize, "pool_size", shard.Defaults().PoolSize, 1, 1<<16, "Goroutines of each shard that may wait for a look-up or an old node.")
	s.Duration(&c.Engine.Timeout, "push_timeout", engine.Defaults().Timeout, time.Millisecond, "Longest time of a push, whatever its caller asks for.")
	s.Int(&c.Engine.MaxInFlight, "max_in_flight", engine.Defaults().MaxInFlight, 1, 1<<24, "Pushes that are not finished; more are refused, low priorities from half of it on.")
	c.bindOverload(s)
	c.bindRoutes(s)
	c.bindLimits(s)
	c.bindLinks(s)
	c.bindAPI(s)
	c.TLS.bind(s)
	c.Auth.bind(s)
	bindQuota(&c.Quotas, s)
	bindAudit(&c.Audit, s)
	c.LinkTLS.bind(s)
	c.Store.bind(s)
	bindReplays(&c.Replays, s)
	c.Webhook.bind(s)
	c.Jobs.bind(s)
	c.Presence.bind(s)
	c.bindRefusals(s)
	c.ControllerTLS.Bind(s)
	app.BindTrust(s, &c.TrustDomain, &c.TLS.ReloadInterval)
	c.Etcd.Bind(s)
	s.Duration(&c.Discovery.Grace, "discovery.grace", discovery.Defaults().Grace, config.Positive, "How long a node stays that is gone from etcd while its streams live.")
	s.Int(&c.Discovery.MaxNodes, "discovery.max_nodes", discovery.Defaults().MaxNodes, 1, 1<<20, "Connect-Nodes taken notice of.")
	s.List(&c.allowNets, "discovery.allow_networks", "", "Networks such as 10.0.0.0/8 that Connect-Nodes may be in. Empty: any.")
	c.Tracing.Bind(s)
}

func (c *Config) bindOverload(s *config.Set) {
	a, d := &c.Ingress, ingress.Defaults()
	s.Choice(&a.PriorityMax, "priority_max", d.PriorityMax, "Highest priority that a caller may claim with x-priority: low, normal, high or critical. A higher claim counts as this.",
		"low", "normal", "high", "critical")
	s.Int(&a.Rate, "rate_limit", d.Rate, 0, 1<<30, "What one caller may spend in a second: 1 for a push, 1 for each node that it is sent to, and 1 for each of several rooms that is looked up for it. 0: as much as it likes.")
	s.Int(&a.RateBurst, "rate_burst", d.RateBurst, 0, 1<<30, "How much of that may be saved up. 0: a second's.")
	s.Int(&a.RateCallers, "rate_callers", d.RateCallers, 1, 1<<24, "Callers told apart at a time, by the address that they call from.")
}

func (c *Config) bindRoutes(s *config.Set) {
	d := route.Defaults()
	s.Duration(&c.Routes.TTL, "route_cache_ttl", d.TTL, time.Millisecond, "How long a route is trusted when the Controller has no change stream.")
	s.Duration(&c.Routes.StaleTTL, "route_stale_ttl", d.StaleTTL, time.Millisecond, "How long a route may serve while the Controller cannot be reached.")
	s.Duration(&c.Routes.LookupTimeout, "lookup_timeout", d.LookupTimeout, time.Millisecond, "Longest look-up at the Controller.")
	s.Int(&c.Routes.MaxMembers, "route_cache_members", d.MaxMembers, 1, math.MaxInt32, "Members of all cached rooms together. Lists of rooms that are pushed to together may have as many again.")
	s.Int(&c.Routes.MaxUsers, "route_cache_users", d.MaxUsers, 1, math.MaxInt32, "Users in the cache.")
}

func (c *Config) bindLimits(s *config.Set) {
	l, d := &c.Engine.Limits, engine.Defaults().Limits
	s.Int(&l.IDBytes, "limits.id_bytes", d.IDBytes, 1, 4096, "Longest room or user id.")
	s.Bytes(&l.DataBytes, "limits.data_bytes", d.DataBytes, 1, maxRequest, "Largest data of a message.")
	s.Int(&l.MetadataEntries, "limits.metadata_entries", d.MetadataEntries, 1, 1<<16, "Entries in the metadata of a message.")
	s.Bytes(&l.MetadataBytes, "limits.metadata_bytes", d.MetadataBytes, 1, maxRequest, "Largest metadata of a message, keys and values together.")
	s.Int(&l.Exclude, "limits.exclude_users", d.Exclude, 1, 1<<20, "Users in the exclude list of one push.")
	s.Int(&l.Users, "limits.users", d.Users, 1, 1<<20, "Users in the list of one push.")
	s.Int(&l.Rooms, "limits.rooms", d.Rooms, 1, 1<<16, "Rooms in the list of one push.")
	s.Bytes(&c.Ingress.MaxRecvBytes, "limits.request_bytes", ingress.Defaults().MaxRecvBytes, 1<<10, maxRequest, "Largest request.")
}

func (c *Config) bindLinks(s *config.Set) {
	const least = leastLinkTime
	l, d := &c.Links, link.Defaults()
	s.Duration(&l.AckTimeout, "link.ack_timeout", d.AckTimeout, least, "How long a node may owe an acknowledgement.")
	s.Duration(&l.DialTimeout, "link.dial_timeout", d.DialTimeout, least, "Longest attempt to reach a node.")
	s.Duration(&l.Heartbeat, "link.heartbeat", d.Heartbeat, least, "Pause between two heartbeats of a stream.")
	s.Duration(&l.Silence, "link.silence", d.Silence, least, "How long a node may say nothing before its stream is closed.")
	s.Duration(&l.BackoffMin, "link.backoff_min", d.BackoffMin, least, "First pause between two attempts to reach a node; it doubles.")
	s.Duration(&l.BackoffMax, "link.backoff_max", d.BackoffMax, least, "Longest pause between two attempts to reach a node.")
	s.Int(&l.Dials, "link.dials", d.Dials, 2, 1<<16, "Attempts to reach nodes that are under way at a time. Nodes that keep failing come last, with half of it at most.")
	s.Int(&l.DialRate, "link.dial_rate", d.DialRate, 2, 1<<20, "Attempts to reach nodes that begin in a second. The same holds.")
	s.Bytes(&l.QueueBytes, "link.queue_bytes", d.QueueBytes, 1, math.MaxInt32, "Bytes that may wait for one stream to a node.")
	s.Int(&l.QueueLen, "link.queue_length", d.QueueLen, 1, 1<<20, "Deliveries that may wait for one stream to a node.")
	s.Duration(&l.QueueAge, "link.queue_age", d.QueueAge, least, "How long a delivery may wait for its stream.")
	s.Int(&l.Window, "link.window", d.Window, 1, 1<<20, "Deliveries of one stream that may be without acknowledgement.")
	s.Bytes(&l.WindowBytes, "link.window_bytes", d.WindowBytes, 1, math.MaxInt32, "The same in bytes.")
	s.Bytes(&l.FrameBytes, "link.frame_bytes", d.FrameBytes, 1, 16<<20, "Size at which a frame to a node is closed.")
	s.List(&l.Compression, "link.compression", compression.Off, "Codecs for frames to nodes, the preferred one first: s2 (cheap), zstd (small). Each node picks one that it knows. off: none.")
	s.Bytes(&l.CompressionMinBytes, "link.compression_min_bytes", d.CompressionMinBytes, 1, 16<<20, "Size from which on a frame is compressed.")
	s.Int(&l.AudienceMembers, "link.audience_members", d.AudienceMembers, 1, math.MaxInt32, "Members of all audiences that one stream names to its node.")
	s.Int(&l.NodeUsers, "link.node_users", d.NodeUsers, 1, math.MaxInt32, "Users that one node may claim to have. A node that claims more is left alone, as after other protocol violations.")
	s.Int(&l.UnaryLanes, "link.unary_lanes", d.UnaryLanes, 1, 1024, "Calls under way, for each shard, to a node without Deliver.")
}

func (c *Config) bindAPI(s *config.Set) {
	a, d := &c.Ingress, ingress.Defaults()
	s.Bytes(&a.MaxHeaderBytes, "api.header_bytes", d.MaxHeaderBytes, 1<<10, 16<<20, "Largest headers of a call.")
	s.Bool(&a.Gzip, "api.gzip", false, "Take requests that are compressed with gzip (grpc-encoding, Content-Encoding). limits.request_bytes bounds them on the wire, and what they become. Replies are not compressed.")
	s.Int(&a.MaxStreams, "api.streams", d.MaxStreams, 1, 1<<20, "Calls under way on one connection.")
	s.Int(&a.Calls, "api.calls", d.Calls, 1, 1<<20, "Unary calls worked on at a time for each core: younger than 50 ms and not answered. While there are more, connections are not read, the lowest priority first.")
	s.Duration(&a.ConnectionTimeout, "api.handshake_timeout", d.ConnectionTimeout, time.Millisecond, "Longest handshake of a connection, and longest wait for the rest of headers that have begun.")
	s.Int(&a.Handshakes, "api.handshakes", d.Handshakes, 1, 1<<20, "Connections of one address (IPv6: of one /64) that have not made their handshake; one more costs the oldest its place.")
	s.Duration(&a.KeepaliveTime, "api.keepalive_time", d.KeepaliveTime, time.Second, "Silence after which a client is asked whether it is there.")
	s.Duration(&a.KeepaliveTimeout, "api.keepalive_timeout", d.KeepaliveTimeout, time.Second, "How long its answer may take.")
	s.Duration(&a.KeepaliveMinTime, "api.keepalive_min_time", d.KeepaliveMinTime, time.Millisecond, "How often a client may ask the same.")
	s.Int(&a.StreamWorkers, "api.stream_workers", d.StreamWorkers, 1, 1<<16, "Goroutines kept for calls.")
	s.AutoBytes(&a.BodyBytes, "api.body_bytes", 1<<20, math.MaxInt, "Memory for requests that are being read and pushes that are not answered. auto: a quarter of the memory limit (1GiB without one).")
	s.Duration(&a.BodyTimeout, "api.body_timeout", d.BodyTimeout, time.Millisecond, "How long a request of more than 4 KiB, or a large message of a PushStream, may take to come in once there is memory for it; 1s while others wait for memory.")
	s.Auto(&a.OpenCalls, "api.open_calls", 0, 1<<24, "Unary calls open on all connections. auto: as many as a quarter of the memory limit holds, 24 KiB each (131072 without one).")
	s.Auto(&a.Streams, "api.push_streams", 0, 1<<24, "PushStreams open on all connections. auto: as many as a quarter of the memory limit holds, 100 KiB each (16384 without one).")
	s.Int(&a.StreamsPerConnection, "api.push_streams_per_connection", d.StreamsPerConnection, 1, 1<<20, "PushStreams open on one connection; fewer than api.streams, the rest is left to unary calls.")
	s.AutoOrNone(&a.Connections, "api.connections", 1<<24, "Connections that have said hello. auto: as many as an eighth of the memory limit holds, 96 KiB each (16384 without one). 0: no bound.")
	s.AutoOrNone(&a.ConnectionsPerAddress, "api.connections_per_address", 1<<24, "The same of one address (IPv6: of one /64). auto: three quarters of all. 0: no bound.")
	s.Duration(&a.ConnectionAge, "api.connection_age", d.ConnectionAge, config.OrZero, "Age at which a connection is told to go, give or take a tenth; its PushStreams end when all they took is answered. 0s: never.")
	s.Int(&a.StreamInflight, "api.push_stream_in_flight", d.StreamInflight, 1, 1<<20, "Pushes of one PushStream that are not answered; at the bound it is not read.")
	s.Bytes(&a.StreamInflightBytes, "api.push_stream_bytes", d.StreamInflightBytes, 1<<10, 1<<30, "The same in bytes.")
}

// Validate checks what more than one key has a say in. Its errors name the keys.
func (c *Config) Validate(s *config.Set, lookupEnv func(string) (string, bool)) error {
	if err := c.TLS.validate(s); err != nil {
		return err
	}
	if err := c.Auth.validate(s, c.TLS.certificates()); err != nil {
		return err
	}
	if err := app.CheckTrustDomain(s, c.TrustDomain); err != nil {
		return err
	}
	var err error
	if c.nodeCheck, err = c.LinkTLS.check(s, c.TrustDomain); err != nil {
		return err
	}
	if err := c.ControllerTLS.Validate(s, c.TrustDomain); err != nil {
		return err
	}
	risks := app.NewRisks(s, c.AllowInsecure)
	if err := risks.Listen(c.ListenAddress, c.TLS.missing(c.Auth.on())); err != nil {
		return err
	}
	if err := app.CheckMetricsAddress(s, &c.MetricsAddress, c.ListenAddress, c.PprofRemote, risks); err != nil {
		return err
	}
	if c.Links.Migrate = c.LinkTLS.Migrate; c.Links.Migrate {
		risks.Asked("nodes that do not know TLS are spoken to in plain text (LINK_TLS_MIGRATE)")
	}
	if err := app.CheckPorts(s, app.Port{Key: "grpc_port", Number: c.GRPCPort}, app.Port{Key: "http_port", Number: c.HTTPPort}, app.Port{Key: "metrics_port", Number: c.MetricsPort}); err != nil {
		return err
	}
	if err := app.CheckAddresses(s, c.AdvertiseAddress, c.Controller.Address, true); err != nil {
		return err
	}
	for _, origin := range c.Web.Origins {
		if err := web.CheckOrigin(origin); err != nil {
			return s.Errorf("http.allowed_origins", "%v", err)
		}
	}
	l := &c.Engine.Limits
	switch {
	case c.Links.Silence <= c.Links.Heartbeat:
		return s.Errorf("link.silence", "%v must be longer than link.heartbeat (%v)", c.Links.Silence, c.Links.Heartbeat)
	case c.Links.BackoffMax < c.Links.BackoffMin:
		return s.Errorf("link.backoff_max", "%v must not be below link.backoff_min (%v)", c.Links.BackoffMax, c.Links.BackoffMin)
	case c.Ingress.ConnectionAge != 0 && c.Ingress.ConnectionAge < time.Second:
		return s.Errorf("api.connection_age", "%v must be 0s or at least 1s", c.Ingress.ConnectionAge)
	case c.Ingress.StreamsPerConnection >= c.Ingress.MaxStreams:
		return s.Errorf("api.push_streams_per_connection", "%d must be below api.streams (%d), or unary calls beside them would never begin", c.Ingress.StreamsPerConnection, c.Ingress.MaxStreams)
	case l.DataBytes+l.MetadataBytes > c.Ingress.MaxRecvBytes:
		return s.Errorf("limits.request_bytes", "%s cannot hold limits.data_bytes (%s) and limits.metadata_bytes (%s)",
			config.FormatBytes(c.Ingress.MaxRecvBytes), config.FormatBytes(l.DataBytes), config.FormatBytes(l.MetadataBytes))
	}
	if _, err := compression.Parse(c.Links.Compression); err != nil {
		return s.Errorf("link.compression", "%v", err)
	}
	for _, text := range c.allowNets {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return s.Errorf("discovery.allow_networks", "%q is not a network like 10.0.0.0/8", text)
		}
		c.Discovery.AllowNets = append(c.Discovery.AllowNets, prefix)
	}
	if err := c.Etcd.Validate(s, risks); err != nil {
		return err
	}
	if err := c.Store.validate(s, risks); err != nil {
		return err
	}
	if err := c.Webhook.validate(s, risks); err != nil {
		return err
	}
	c.insecure = risks.Found()
	if err := c.Tracing.Validate(lookupEnv); err != nil {
		return err
	}
	c.Discovery.RequestTimeout, c.Entry.RequestTimeout = c.Etcd.RequestTimeout, c.Etcd.RequestTimeout
	c.Quotas.RequestTimeout, c.Jobs.RequestTimeout = c.Etcd.RequestTimeout, c.Etcd.RequestTimeout
	c.Jobs.ManagerID = c.ManagerID
	l.MaxTTL, c.Store.MaxMessageBytes = c.Store.MaxTTL, l.DataBytes+l.MetadataBytes+besidePayload
	c.Entry.Prefix, c.Entry.ID, c.Links.ManagerID = discovery.PushManagerPrefix, c.ManagerID, c.ManagerID
	c.Ingress.DisableReflection = !c.Reflection
	c.Ingress.DrainNotice = min(c.Ingress.DrainNotice, c.DrainTimeout/2) // what is under way needs some time, too
	c.Tracing.Service, c.Tracing.Instance = "push-manager", c.ManagerID
	return nil
}

// LogConfig implements cli.Settings.
func (c *Config) LogConfig() telemetry.LogConfig { return c.Log }

// Timeout implements cli.Settings.
func (c *Config) Timeout() time.Duration { return c.DrainTimeout }

// Start implements cli.Settings.
func (c *Config) Start(ctx context.Context, log *slog.Logger) (cli.Program, error) {
	m, err := Start(ctx, *c, log)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// report gives all packages the same log and the same metrics.
func (c *Config) report(log *slog.Logger) *metrics.Set {
	set := metrics.NewSet()
	telemetry.BuildInfo(set)
	c.Tracing.Logger, c.Tracing.Metrics = log, set
	c.Controller.Logger, c.Controller.Metrics = log, set
	c.Links.Logger, c.Links.Metrics = log, set
	c.Discovery.Logger, c.Discovery.Metrics = log, set
	c.Entry.Logger, c.Entry.Metrics = log, set
	c.Ingress.Logger, c.Ingress.Metrics = log, set
	c.Web.Logger, c.Web.Metrics = log, set
	c.Health.Logger, c.Health.Metrics = log, set
	app.Report(log, set, c.TLS.ReloadInterval, &c.TLS.Certificates, &c.LinkTLS.Certificates, &c.ControllerTLS.Certificates, &c.Etcd.TLS, &c.Store.Files)
	c.Quotas.Logger, c.Quotas.Metrics = log, set
	c.Audit.Logger, c.Audit.Metrics = log, set
	c.Store.Logger, c.Store.Metrics = log, set
	c.Replays.Logger, c.Replays.Metrics = log, set
	c.Webhook.Logger, c.Webhook.Metrics = log, set
	c.Jobs.Logger, c.Jobs.Metrics = log, set
	c.Presence.Logger, c.Presence.Metrics = log, set
	c.Pressure.Logger, c.Pressure.Metrics = log, set
	c.Shards.Logger, c.Engine.Logger = log, log // their counters are shown by telemetry
	return set
}
