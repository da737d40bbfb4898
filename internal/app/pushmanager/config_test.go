package pushmanager

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

// load runs Push-Manager's configuration through flags, environment and file.
func load(t *testing.T, flags map[string]string, env map[string]string, yaml string) (*Config, error) {
	t.Helper()
	var c Config
	s := config.New()
	c.Bind(s)
	o := config.Options{Flags: flags, NoFile: yaml == "", LookupEnv: func(name string) (string, bool) {
		v, ok := env[name]
		return v, ok
	}}
	if yaml != "" {
		o.File = filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(o.File, []byte(yaml), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Load(o); err != nil {
		return nil, err
	}
	return &c, c.Validate(s, o.LookupEnv)
}

func TestDefaultsAreThoseOfTheContract(t *testing.T) {
	c, err := load(t, nil, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	l := c.Engine.Limits
	for name, ok := range map[string]bool{
		"MANAGER_ID":         c.ManagerID == "push-manager-1",
		"LISTEN_ADDRESS":     c.ListenAddress == "127.0.0.1",
		"GRPC_PORT":          c.GRPCPort == 50053,
		"METRICS_PORT":       c.MetricsPort == 9093,
		"CONTROLLER_ADDRESS": c.Controller.Address == "localhost:50051",
		"ETCD_ENDPOINTS":     len(c.Etcd.Endpoints) == 1 && c.Etcd.Endpoints[0] == "localhost:2379",
		"limits": l.IDBytes == 256 && l.DataBytes == 256<<10 && l.MetadataEntries == 32 && l.MetadataBytes == 8<<10 &&
			l.Exclude == 10_000 && l.Users == 10_000 && c.Ingress.MaxRecvBytes == 1<<20,
		"timeouts":         c.Engine.Timeout.Seconds() == 5 && c.Routes.TTL.Seconds() == 1,
		"shards":           c.Shards.Count == max(runtime.GOMAXPROCS(0)/2, 1),
		"tracing":          !c.Tracing.Enabled,
		"overload":         c.Ingress.PriorityMax == "critical" && c.Ingress.Rate == 0 && c.Ingress.Calls == 384,
		"LINK_COMPRESSION": slices.Equal(c.Links.Compression, []string{"off"}) && c.Links.CompressionMinBytes == 1<<10,
	} {
		if !ok {
			t.Errorf("the default of %s is another", name)
		}
	}
}

func TestContractVariablesAndSectionsAreRead(t *testing.T) {
	c, err := load(t, nil, map[string]string{
		"MANAGER_ID": "pm-2", "LISTEN_ADDRESS": "0.0.0.0", "ALLOW_INSECURE": "true", "GRPC_PORT": "1", "METRICS_PORT": "2",
		"CONTROLLER_ADDRESS": "dns:///controller:1", "ETCD_ENDPOINTS": "a:1,b:2", "PPROF_REMOTE": "true",
	}, "etcd:\n  dial_timeout: 9s\n  request_timeout: 8s\ntracing:\n  enabled: true\n  endpoint: c:4317\n  sample_rate: 0.5\n")
	if err != nil {
		t.Fatal(err)
	}
	for field, ok := range map[string]bool{
		"MANAGER_ID":                        c.ManagerID == "pm-2",
		"LISTEN_ADDRESS":                    c.ListenAddress == "0.0.0.0",
		"ALLOW_INSECURE":                    c.AllowInsecure,
		"GRPC_PORT":                         c.GRPCPort == 1,
		"METRICS_PORT":                      c.MetricsPort == 2,
		"PPROF_REMOTE":                      c.PprofRemote,
		"CONTROLLER_ADDRESS":                c.Controller.Address == "dns:///controller:1",
		"ETCD_ENDPOINTS":                    slices.Equal(c.Etcd.Endpoints, []string{"a:1", "b:2"}),
		"etcd.dial_timeout":                 c.Etcd.DialTimeout.Seconds() == 9,
		"etcd.request_timeout of discovery": c.Discovery.RequestTimeout.Seconds() == 8,
		"etcd.request_timeout of our entry": c.Entry.RequestTimeout.Seconds() == 8,
	} {
		if !ok {
			t.Errorf("%s is not what was set", field)
		}
	}
	if !c.Tracing.Enabled || c.Tracing.Endpoint != "c:4317" || c.Tracing.SampleRate != 0.5 || c.Tracing.Instance != "pm-2" {
		t.Errorf("%+v", c.Tracing)
	}
}

func TestWhatIsInsecureIsNamed(t *testing.T) {
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost")
	secured := map[string]string{"LISTEN_ADDRESS": "0.0.0.0", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "TLS_CLIENT_CA_FILE": ca.File, "TLS_CLIENT_AUTH": "require"}
	for name, tc := range map[string]struct {
		env  map[string]string
		want []string // in the names, one each
	}{
		"nothing":                     {nil, nil},
		"allowed and not needed":      {map[string]string{"ALLOW_INSECURE": "true", "PPROF_REMOTE": "true", "ETCD_ENDPOINTS": "127.0.0.1:1,[::1]:2,localhost:3"}, nil},
		"TLS and certificates":        {secured, nil},
		"metrics for others":          {map[string]string{"METRICS_ADDRESS": "0.0.0.0"}, nil},
		"etcd over TLS":               {map[string]string{"ETCD_ENDPOINTS": "etcd:1", "ETCD_TLS_CA_FILE": ca.File, "ETCD_TLS_SERVER_NAME": "x"}, nil},
		"etcd over TLS of the system": {map[string]string{"ETCD_ENDPOINTS": "https://etcd:1"}, nil},
		"everything": {map[string]string{"ALLOW_INSECURE": "true", "LISTEN_ADDRESS": "::", "PPROF_REMOTE": "true", "ETCD_ENDPOINTS": "etcd:1", "LINK_TLS_MIGRATE": "true", "LINK_TLS_CA_FILE": ca.File},
			[]string{"TLS_CERT_FILE", "profiles", "LINK_TLS_MIGRATE", "etcd:1"}},
		"a migration": {map[string]string{"LINK_TLS_MIGRATE": "true", "LINK_TLS_CA_FILE": ca.File}, []string{"LINK_TLS_MIGRATE"}},
	} {
		c, err := load(t, nil, tc.env, "")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(c.insecure) != len(tc.want) {
			t.Errorf("%s: %q", name, c.insecure)
			continue
		}
		for i, part := range tc.want {
			if !strings.Contains(c.insecure[i], part) {
				t.Errorf("%s: %q, want %s", name, c.insecure[i], part)
			}
		}
	}
}

func TestCompressionIsSetInEachWay(t *testing.T) {
	for name, tc := range map[string]struct {
		flags, env map[string]string
		yaml       string
	}{
		"flags":       {flags: map[string]string{"link-compression": "zstd,s2", "link-compression-min-bytes": "2KiB"}},
		"environment": {env: map[string]string{"LINK_COMPRESSION": "zstd, s2", "LINK_COMPRESSION_MIN_BYTES": "2048"}},
		"file":        {yaml: "link:\n  compression: zstd,s2\n  compression_min_bytes: 2KiB\n"},
		"file, list":  {yaml: "link:\n  compression: [zstd, s2]\n  compression_min_bytes: 2KiB\n"},
	} {
		c, err := load(t, tc.flags, tc.env, tc.yaml)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !slices.Equal(c.Links.Compression, []string{"zstd", "s2"}) || c.Links.CompressionMinBytes != 2<<10 {
			t.Errorf("%s: %v from %d bytes on", name, c.Links.Compression, c.Links.CompressionMinBytes)
		}
		if err := c.Links.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Off is what some dialects of YAML take for a boolean.
	c, err := load(t, nil, nil, "link:\n  compression: off\n")
	if err != nil || !slices.Equal(c.Links.Compression, []string{"off"}) {
		t.Errorf("off in the file: %v, %v", err, c)
	}
}

func TestWhatCannotWorkStopsTheStartAndNamesTheKey(t *testing.T) {
	notPEM := filepath.Join(t.TempDir(), "x.pem")
	if err := os.WriteFile(notPEM, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost")
	_, otherKey := ca.Issue("localhost")
	for name, tc := range map[string]struct {
		env  map[string]string
		yaml string
		want string
	}{
		"open to others":           {env: map[string]string{"LISTEN_ADDRESS": "0.0.0.0"}, want: "LISTEN_ADDRESS"},
		"open to others, v6":       {env: map[string]string{"LISTEN_ADDRESS": "::"}, want: "ALLOW_INSECURE"},
		"no address":               {env: map[string]string{"LISTEN_ADDRESS": "my host"}, want: "LISTEN_ADDRESS"},
		"one port twice":           {env: map[string]string{"GRPC_PORT": "9093"}, want: "METRICS_PORT"},
		"port":                     {env: map[string]string{"METRICS_PORT": "65536"}, want: "METRICS_PORT"},
		"no shards":                {env: map[string]string{"SHARDS": "0"}, want: "SHARDS"},
		"too many shards":          {env: map[string]string{"SHARDS": "257"}, want: "SHARDS"},
		"negative limit":           {yaml: "limits:\n  data_bytes: -1\n", want: "limits.data_bytes"},
		"no limit":                 {yaml: "limits:\n  users: 0\n", want: "limits.users"},
		"request too small":        {yaml: "limits:\n  data_bytes: 2MiB\n", want: "LIMITS_REQUEST_BYTES"},
		"heartbeat":                {yaml: "link:\n  heartbeat: 4s\n", want: "LINK_SILENCE"},
		"codec":                    {env: map[string]string{"LINK_COMPRESSION": "s2,gzip"}, want: "LINK_COMPRESSION: \"gzip\" is none of off, s2, zstd"},
		"codec in the file":        {yaml: "link:\n  compression: [s2, s2]\n", want: "link.compression"},
		"compressed size":          {env: map[string]string{"LINK_COMPRESSION_MIN_BYTES": "17MiB"}, want: "LINK_COMPRESSION_MIN_BYTES"},
		"backoff":                  {yaml: "link:\n  backoff_max: 30ms\n", want: "link.backoff_max"},
		"no patience":              {env: map[string]string{"NOT_READY_AFTER": "-1s"}, want: "NOT_READY_AFTER"},
		"bad duration":             {env: map[string]string{"ROUTE_CACHE_TTL": "1"}, want: "ROUTE_CACHE_TTL"},
		"unknown key":              {yaml: "redis: x\n", want: "redis"},
		"unknown etcd key":         {yaml: "etcd:\n  endpoint: x\n", want: "etcd.endpoint"},
		"network":                  {env: map[string]string{"DISCOVERY_ALLOW_NETWORKS": "10.0.0.0"}, want: "DISCOVERY_ALLOW_NETWORKS"},
		"etcd CA not there":        {env: map[string]string{"ETCD_TLS_CA_FILE": "/nowhere"}, want: "ETCD_TLS_CA_FILE"},
		"etcd CA no PEM":           {env: map[string]string{"ETCD_TLS_CA_FILE": notPEM}, want: "ETCD_TLS_CA_FILE"},
		"etcd key alone":           {env: map[string]string{"ETCD_TLS_KEY_FILE": notPEM}, want: "ETCD_TLS_CERT_FILE"},
		"etcd cert alone":          {env: map[string]string{"ETCD_TLS_CERT_FILE": notPEM}, want: "ETCD_TLS_KEY_FILE"},
		"etcd cert no PEM":         {env: map[string]string{"ETCD_TLS_CERT_FILE": notPEM, "ETCD_TLS_KEY_FILE": notPEM}, want: "ETCD_TLS_CERT_FILE"},
		"TLS, no callers":          {env: map[string]string{"LISTEN_ADDRESS": "0.0.0.0", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "TLS_CLIENT_CA_FILE": ca.File}, want: "TLS_CLIENT_AUTH=require"},
		"TLS and profiles":         {env: map[string]string{"LISTEN_ADDRESS": "0.0.0.0", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "TLS_CLIENT_CA_FILE": ca.File, "TLS_CLIENT_AUTH": "require", "PPROF_REMOTE": "true"}, want: "PPROF_REMOTE"},
		"TLS, authority":           {env: map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "TLS_CLIENT_AUTH": "require"}, want: "TLS_CLIENT_CA_FILE"},
		"authority alone":          {env: map[string]string{"TLS_CLIENT_CA_FILE": ca.File}, want: "TLS_CERT_FILE"},
		"TLS, another key":         {env: map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": otherKey}, want: "TLS_CERT_FILE"},
		"TLS, no PEM":              {env: map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "TLS_CLIENT_CA_FILE": notPEM}, want: "TLS_CLIENT_CA_FILE"},
		"links, no CA":             {env: map[string]string{"LINK_TLS_CERT_FILE": cert, "LINK_TLS_KEY_FILE": key}, want: "LINK_TLS_CA_FILE"},
		"role, no CA":              {env: map[string]string{"LINK_TLS_IDENTITY": "role"}, want: "LINK_TLS_CA_FILE"},
		"role of nobody":           {env: map[string]string{"LINK_TLS_IDENTITY": "role", "LINK_TLS_CA_FILE": ca.File}, want: "LINK_TLS_ALLOWED_SANS"},
		"role of a domain":         {env: map[string]string{"LINK_TLS_IDENTITY": "role", "LINK_TLS_CA_FILE": ca.File, "LINK_TLS_ALLOWED_SANS": "connect-node/*"}, want: "trust_domain"},
		"trust domain":             {env: map[string]string{"TRUST_DOMAIN": "https://x"}, want: "TRUST_DOMAIN"},
		"TLS version":              {env: map[string]string{"TLS_MIN_VERSION": "1.1"}, want: "TLS_MIN_VERSION"},
		"etcd elsewhere":           {env: map[string]string{"ETCD_ENDPOINTS": "localhost:2379,etcd:2379"}, want: `ETCD_ENDPOINTS: etcd at "etcd:2379" is spoken to without TLS (ETCD_TLS_CA_FILE): only with ALLOW_INSECURE=true`},
		"etcd elsewhere, by IP":    {env: map[string]string{"ETCD_ENDPOINTS": "http://10.0.0.1:2379"}, want: "ALLOW_INSECURE"},
		"etcd, a name without TLS": {env: map[string]string{"ETCD_TLS_SERVER_NAME": "etcd"}, want: "ETCD_TLS_SERVER_NAME"},
		"metrics address":          {env: map[string]string{"METRICS_ADDRESS": "my host"}, want: "METRICS_ADDRESS"},
		"profiles for all":         {env: map[string]string{"METRICS_ADDRESS": "0.0.0.0", "PPROF_REMOTE": "true"}, want: "PPROF_REMOTE"},
		"migration to nothing":     {env: map[string]string{"LINK_TLS_MIGRATE": "true"}, want: "LINK_TLS_CA_FILE"},
		"Controller, no CA":        {env: map[string]string{"CONTROLLER_TLS_CERT_FILE": cert, "CONTROLLER_TLS_KEY_FILE": key}, want: "CONTROLLER_TLS_CA_FILE"},
		"Controller, a name alone": {env: map[string]string{"CONTROLLER_TLS_SERVER_NAME": "c"}, want: "CONTROLLER_TLS_CA_FILE"},
		"Controller, two names":    {env: map[string]string{"CONTROLLER_TLS_CA_FILE": ca.File, "CONTROLLER_TLS_SERVER_NAME": "c", "CONTROLLER_TLS_ALLOWED_SANS": "c"}, want: "CONTROLLER_TLS_SERVER_NAME"},
		"Controller, anybody":      {env: map[string]string{"CONTROLLER_TLS_CA_FILE": ca.File, "CONTROLLER_TLS_ALLOWED_SANS": "*"}, want: "CONTROLLER_TLS_ALLOWED_SANS"},
		"Controller, no PEM":       {env: map[string]string{"CONTROLLER_TLS_CA_FILE": notPEM}, want: "CONTROLLER_TLS_CA_FILE"},
		"sampler":                  {env: map[string]string{"OTEL_TRACES_SAMPLER": "x"}, want: "OTEL_TRACES_SAMPLER"},
		"advertised address":       {env: map[string]string{"ADVERTISE_ADDRESS": "x"}, want: "ADVERTISE_ADDRESS"},
		"manager id":               {env: map[string]string{"MANAGER_ID": "a/b"}, want: "MANAGER_ID"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, nil, tc.env, tc.yaml)
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("%v, want one line with %s", err, tc.want)
			}
			if !errors.Is(err, config.ErrUsage) {
				t.Errorf("%v is no usage error", err)
			}
		})
	}
}
