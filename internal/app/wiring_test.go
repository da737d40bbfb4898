package app_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

// otherValues are values of keys that anyValue does not find: those that only some words are right for.
func otherValues(ca string) map[string]map[string]string {
	tokens := map[string]string{"CLIENT_AUTH_MODE": "jwt", "CLIENT_AUTH_JWT": "[{issuer: idp, audience: gateway, hs_secret_file: " + ca + ".secret}]"}
	keys := map[string]string{"AUTH_MODE": "required", "AUTH_POLICY_FILE": ca + ".policy", "AUTH_API_KEYS_FILE": ca + ".keys"}
	hook := map[string]string{"RECEIPT_WEBHOOK_URL": "https://a", "RECEIPT_WEBHOOK_SECRET_FILE": ca + ".secret"}
	hooks := map[string]string{"HOOKS_FILE": ca + ".hooks", "HOOKS_DIR": "elsewhere"}
	redis := map[string]string{"CONTROLLER_STORE": "redis", "REDIS_URL": "redis://127.0.0.1:1"}
	return map[string]map[string]string{
		"receipt_webhook.url":         hook,
		"receipt_webhook.secret_file": hook,
		"hooks.file":                  hooks,
		"hooks.dir":                   {"HOOKS_DIR": "elsewhere"},
		"hooks.queue_bytes":           {"HOOKS_QUEUE_BYTES": "2MiB"},
		"controller_store":            redis,
		"redis_url":                   redis,
		"redis_url_file":              {"CONTROLLER_STORE": "redis", "REDIS_URL_FILE": ca + ".redis"},
		"redis_ca_file":               {"CONTROLLER_STORE": "redis", "REDIS_URL": "rediss://a:1", "REDIS_CA_FILE": ca},
		"redis_prefix":                {"CONTROLLER_STORE": "redis", "REDIS_URL": "redis://127.0.0.1:1", "REDIS_PREFIX": "other"},
		"auth.mode":                   keys,
		"auth.policy_file":            keys,
		"auth.api_keys_file":          keys,
		"auth.jwt":                    {"AUTH_MODE": "required", "AUTH_POLICY_FILE": ca + ".policy", "AUTH_JWT": "[{issuer: idp, audience: api, hs_secret_file: " + ca + ".secret}]"},
		"link.tls.migrate":            {"LINK_TLS_MIGRATE": "true", "LINK_TLS_CA_FILE": ca},
		"controller.tls.server_name":  {"CONTROLLER_TLS_SERVER_NAME": "c", "CONTROLLER_TLS_CA_FILE": ca},
		"controller.tls.allowed_sans": {"CONTROLLER_TLS_ALLOWED_SANS": "c", "CONTROLLER_TLS_CA_FILE": ca},
		"etcd.tls.server_name":        {"ETCD_TLS_SERVER_NAME": "c", "ETCD_TLS_CA_FILE": ca},
		"client_auth.mode":            tokens,
		"client_auth.jwt":             tokens,
		"listen_address":              {"LISTEN_ADDRESS": "127.0.0.9"},
		"allow_insecure":              {"ALLOW_INSECURE": "true", "LISTEN_ADDRESS": "0.0.0.0"},
		"metrics_address":             {"METRICS_ADDRESS": "127.0.0.9"},
		"etcd.endpoints":              {"ETCD_ENDPOINTS": "127.0.0.1:77"},
		"etcd.username":               {"ETCD_USERNAME": "u", "ETCD_PASSWORD": "p"},
		"etcd.password":               {"ETCD_USERNAME": "u", "ETCD_PASSWORD": "p"},
		"api.body_bytes":              {"API_BODY_BYTES": "2MiB"},
		"link.compression":            {"LINK_COMPRESSION": "zstd"},
		"link.heartbeat":              {"LINK_HEARTBEAT": "1500ms"},
		"link.backoff_min":            {"LINK_BACKOFF_MIN": "60ms"},
		"discovery.allow_networks":    {"DISCOVERY_ALLOW_NETWORKS": "10.0.0.0/8"},
		"drain_timeout":               {"DRAIN_TIMEOUT": "1s"}, // shorter than two notices
		"tracing.endpoint":            {"TRACING_ENDPOINT": "c:4317"},
		"limits.request_bytes":        {"LIMITS_REQUEST_BYTES": "2MiB"},
		"trust_domain":                {"TRUST_DOMAIN": "prod.example"},
		"tls.client_auth":             {"TLS_CLIENT_AUTH": "none"},
		"link.tls.identity":           {"LINK_TLS_IDENTITY": "none"},
		"tls.min_version":             {"TLS_MIN_VERSION": "1.2"},
		"quota.on_error":              {"QUOTA_ON_ERROR": "deny"},
		"store":                       {"STORE": "embedded"},
		"store_dir":                   {"STORE": "embedded", "STORE_DIR": "elsewhere"},
		"store_sync":                  {"STORE_SYNC": "always"},
		"store_max_ttl":               {"STORE_MAX_TTL": "25h"},
		"store_max_bytes":             {"STORE_MAX_BYTES": "20MiB"},
		"store_replicas":              {"STORE_REPLICAS": "2"},
		"store_username":              {"STORE": "nats://localhost", "STORE_USERNAME": "u", "STORE_PASSWORD": "p"},
		"store_password":              {"STORE": "nats://localhost", "STORE_USERNAME": "u", "STORE_PASSWORD": "p"},
		"store_password_file":         {"STORE": "nats://localhost", "STORE_USERNAME": "u", "STORE_PASSWORD_FILE": ca + ".secret"},
		"store_credentials_file":      {"STORE": "nats://localhost", "STORE_CREDENTIALS_FILE": ca},
		"store_tls.server_name":       {"STORE": "tls://localhost", "STORE_TLS_SERVER_NAME": "c"},
	}
}

// handedTo are the fields that a key of a program changes where that is not just one of the package that it is for: those
// of the whole, which start hands on by name, and those of several packages.
var handedTo = map[string]map[string][]string{
	"serve": {
		"receipt_webhook.url":         {"Webhook.Config.URL", "Webhook.SecretFile"},
		"receipt_webhook.secret_file": {"Webhook.Config.URL", "Webhook.SecretFile"},
		"jobs":                        {"Jobs.On"},
		"presence":                    {"Presence.On"},
		"refusals":                    {"Refusals"},
		"manager_id":                  {"Entry.ID", "Jobs.Config.ManagerID", "Links.ManagerID", "ManagerID", "Tracing.Instance"},
		"listen_address":              {"ListenAddress", "MetricsAddress"},
		"metrics_address":             {"MetricsAddress"},
		"auth.mode":                   {"Auth.KeysFile", "Auth.Mode", "Auth.PolicyFile"},
		"auth.policy_file":            {"Auth.KeysFile", "Auth.Mode", "Auth.PolicyFile"},
		"auth.api_keys_file":          {"Auth.KeysFile", "Auth.Mode", "Auth.PolicyFile"},
		"auth.jwt":                    {"Auth.Mode", "Auth.PolicyFile", "Auth.Tokens.Issuers"},
		"link.tls.migrate":            {"LinkTLS.Migrate", "Links.Migrate", "insecure"},
		"grpc_port":                   {"GRPCPort"},
		"http_port":                   {"HTTPPort"},
		"metrics_port":                {"MetricsPort"},
		"advertise_address":           {"AdvertiseAddress"},
		"allow_insecure":              {"AllowInsecure", "ListenAddress", "MetricsAddress", "insecure"},
		"pprof_remote":                {"PprofRemote"},
		"reflection":                  {"Ingress.DisableReflection", "Reflection"},
		"drain_timeout":               {"DrainTimeout", "Ingress.DrainNotice"},
		"trust_domain":                {"TrustDomain"},
		"tls.reload_interval":         {"TLS.Certificates.Config.ReloadInterval"}, // and those of all others: TestRotationOfEverything
		"etcd.request_timeout":        {"Discovery.RequestTimeout", "Entry.RequestTimeout", "Etcd.RequestTimeout", "Jobs.Config.RequestTimeout", "Quotas.RequestTimeout"},
		"etcd.username":               {"Etcd.ClientConfig.Password", "Etcd.ClientConfig.Username"},
		"etcd.password":               {"Etcd.ClientConfig.Password", "Etcd.ClientConfig.Username"},
		"discovery.allow_networks":    {"Discovery.AllowNets", "allowNets"},
		"tracing.enabled":             {"Tracing.Enabled", "Tracing.Endpoint"},
		"store":                       {"Store.Config.Dir", "Store.Where"},
		"store_dir":                   {"Store.Config.Dir", "Store.Directory", "Store.Where"},
		"store_sync":                  {"Store.Config.SyncAlways", "Store.Sync"},
		"store_max_ttl":               {"Engine.Limits.MaxTTL", "Store.Config.MaxTTL"},
		"store_username":              {"Store.Config.Password", "Store.Config.URLs", "Store.Config.Username", "Store.Where"},
		"store_password":              {"Store.Config.Password", "Store.Config.URLs", "Store.Config.Username", "Store.Where"},
		"store_password_file":         {"Store.Config.Password", "Store.Config.URLs", "Store.Config.Username", "Store.Where"},
		"store_credentials_file":      {"Store.Config.CredentialsFile", "Store.Config.URLs", "Store.Where"},
		"store_tls.server_name":       {"Store.Config.URLs", "Store.ServerName", "Store.Where"},
		"limits.data_bytes":           {"Engine.Limits.DataBytes", "Store.Config.MaxMessageBytes"},
		"limits.metadata_bytes":       {"Engine.Limits.MetadataBytes", "Store.Config.MaxMessageBytes"},
	},
	"controller": {
		"tracing.enabled":  {"Tracing.Enabled", "Tracing.Endpoint"},
		"controller_store": {"Store.Kind", "Store.RedisURL"},
		"redis_url":        {"Store.Kind", "Store.RedisURL"},
		"redis_url_file":   {"Store.Kind", "Store.RedisURL"},
		"redis_ca_file":    {"Store.Kind", "Store.RedisCAFile", "Store.RedisURL"},
		"redis_prefix":     {"Store.Kind", "Store.RedisPrefix", "Store.RedisURL"},
		"listen_address":   {"ListenAddress", "MetricsAddress"},
		"metrics_address":  {"MetricsAddress"},
		"trust_domain":     {"TrustDomain"},
		"grpc_port":        {"GRPCPort"},
		"metrics_port":     {"MetricsPort"},
		"allow_insecure":   {"AllowInsecure", "ListenAddress", "MetricsAddress", "insecure"},
		"pprof_remote":     {"PprofRemote"},
		"drain_timeout":    {"DrainTimeout"},
		"etcd.username":    {"Etcd.ClientConfig.Password", "Etcd.ClientConfig.Username"},
		"etcd.password":    {"Etcd.ClientConfig.Password", "Etcd.ClientConfig.Username"},
	},
	"connect-node": {
		"hooks.file":          {"Hooks.Dir", "Hooks.File"},
		"tracing.enabled":     {"Tracing.Enabled", "Tracing.Endpoint"},
		"listen_address":      {"Gateway.GRPCAddress", "Gateway.HTTPAddress", "Gateway.MetricsAddress", "ListenAddress", "MetricsAddress"},
		"metrics_address":     {"Gateway.MetricsAddress", "MetricsAddress"},
		"tls.min_version":     {"MinVersion"},
		"client_auth.mode":    {"ClientAuth", "ClientTokens.Issuers"},
		"client_auth.jwt":     {"ClientAuth", "ClientTokens.Issuers"},
		"client_auth.tenants": {"ClientTenants"},
		"grpc_port":           {"GRPCPort", "Gateway.GRPCAddress"},
		"http_port":           {"Gateway.HTTPAddress", "HTTPPort"},
		"trust_domain":        {"TrustDomain"},
		"metrics_port":        {"Gateway.MetricsAddress", "MetricsPort"},
		"allow_insecure":      {"AllowInsecure", "Gateway.AdvertiseAddress", "Gateway.GRPCAddress", "Gateway.HTTPAddress", "Gateway.MetricsAddress", "ListenAddress", "MetricsAddress", "insecure"},
		"drain_timeout":       {"DrainTimeout"},
		"etcd.username":       {"Etcd.ClientConfig.Password", "Etcd.ClientConfig.Username"},
		"etcd.password":       {"Etcd.ClientConfig.Password", "Etcd.ClientConfig.Username"},
	},
}

// TestEveryKeyIsHandedToItsPackages: another value of any key changes the Configs that the packages get, all of them that
// it is for. What start does with the fields of the whole has tests of its own.
func TestEveryKeyIsHandedToItsPackages(t *testing.T) {
	ca := etcdtest.NewCA(t).File
	for file, text := range map[string][]byte{
		".secret": bytes.Repeat([]byte("s"), 32), ".redis": []byte("redis://127.0.0.1:1"), ".keys": []byte("{}"),
		".hooks":  []byte("{version: 1, hooks: [{name: a, url: 'https://a', secret_file: " + ca + ".secret, events: [join]}]}"),
		".policy": []byte("{version: 1, callers: [{name: a, match: [{san: a.b}], allow: [{methods: [BroadcastMessage]}]}]}"),
	} {
		if err := os.WriteFile(ca+file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, made := range map[string]func() cli.Settings{
		"serve":        func() cli.Settings { return &pushmanager.Config{} },
		"controller":   func() cli.Settings { return &controller.Config{} },
		"connect-node": func() cli.Settings { return &connectnode.Config{} },
	} {
		defaults := made()
		if err := cli.Fill(defaults, nil); err != nil {
			t.Fatal(err)
		}
		set := config.New()
		made().Bind(set)
		for _, key := range set.Keys() {
			if key.Name() == "etcd.password_file" {
				continue // TestFilesForEtcdAreHandedOver
			}
			if strings.Contains(key.Name(), "tls.") && strings.HasSuffix(key.Name(), "_file") {
				continue // TestFilesForTLSAreHandedOver, TestFilesForEtcdAreHandedOver
			}
			values := []map[string]string{otherValues(ca)[key.Name()]}
			if values[0] == nil {
				values = values[:0]
				for _, value := range []string{"true", "false", "7", "0.25", "333ms", "4s", "1234", "2KiB", "10.0.0.1:77", "https://a", "json", "debug", "low", "s2"} {
					values = append(values, map[string]string{key.Variable(): value})
				}
			}
			var changed []string
			for _, env := range values {
				other := made()
				if cli.Fill(other, env) != nil {
					continue // no value for this one
				}
				changed = differences(reflect.ValueOf(defaults).Elem(), reflect.ValueOf(other).Elem(), "")
				changed = slices.DeleteFunc(changed, func(path string) bool { return strings.HasSuffix(path, ".Files.CA") }) // beside another key
				if len(changed) > 0 {
					break
				}
			}
			want, several := handedTo[name][key.Name()]
			switch {
			case len(changed) == 0:
				t.Errorf("%s: %s: no value of this test changes anything", name, key.Name())
			case several && !slices.Equal(changed, want):
				t.Errorf("%s: %s changes %v, want %v", name, key.Name(), changed, want)
			case !several && (len(changed) > 1 || !strings.Contains(changed[0], ".")):
				t.Errorf("%s: %s changes %v, want one field of one package; where it is for several, say so in handedTo", name, key.Name(), changed)
			}
		}
	}
}

func TestFilesForEtcdAreHandedOver(t *testing.T) {
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("127.0.0.1")
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, made := range map[string]func() (cli.Settings, *app.EtcdConfig){
		"serve":        func() (cli.Settings, *app.EtcdConfig) { c := &pushmanager.Config{}; return c, &c.Etcd },
		"controller":   func() (cli.Settings, *app.EtcdConfig) { c := &controller.Config{}; return c, &c.Etcd },
		"connect-node": func() (cli.Settings, *app.EtcdConfig) { c := &connectnode.Config{}; return c, &c.Etcd },
	} {
		settings, etcd := made()
		if err := cli.Fill(settings, map[string]string{"ETCD_USERNAME": "u", "ETCD_PASSWORD_FILE": password, "ETCD_TLS_CA_FILE": ca.File, "ETCD_TLS_CERT_FILE": cert, "ETCD_TLS_KEY_FILE": key}); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if etcd.Password != "secret" {
			t.Errorf("%s: the password is %q", name, etcd.Password)
		}
		if want := (certs.Files{Cert: cert, Key: key, CA: ca.File}); etcd.TLS.Files != want || !etcd.Secured() {
			t.Errorf("%s: TLS is %+v", name, etcd.TLS)
		}
	}
}

func TestFilesForTLSAreHandedOver(t *testing.T) {
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("127.0.0.1")
	want := certs.Files{Cert: cert, Key: key, CA: ca.File}
	var pm pushmanager.Config
	var cn connectnode.Config
	var c controller.Config
	for name, part := range map[string]struct {
		settings     cli.Settings
		files        *certs.Files
		section, key string
	}{
		"push API":                   {&pm, &pm.TLS.Files, "TLS", "CLIENT_CA_FILE"},
		"links":                      {&pm, &pm.LinkTLS.Files, "LINK_TLS", "CA_FILE"},
		"node":                       {&cn, &cn.TLS.Files, "NODE_TLS", "CLIENT_CA_FILE"},
		"Controller of Push-Manager": {&pm, &pm.ControllerTLS.Files, "CONTROLLER_TLS", "CA_FILE"},
		"Controller of the node":     {&cn, &cn.ControllerTLS.Files, "CONTROLLER_TLS", "CA_FILE"},
		"Controller":                 {&c, &c.TLS.Files, "NODE_TLS", "CLIENT_CA_FILE"},
	} {
		if err := cli.Fill(part.settings, map[string]string{"TRUST_DOMAIN": "test", part.section + "_CERT_FILE": cert, part.section + "_KEY_FILE": key, part.section + "_" + part.key: ca.File}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if *part.files != want {
			t.Errorf("%s: %+v", name, *part.files)
		}
		for variable, file := range map[string]string{"CERT_FILE": cert, "KEY_FILE": key} {
			err := cli.Fill(part.settings, map[string]string{part.section + "_" + variable: file})
			if err == nil || !strings.Contains(err.Error(), part.section) {
				t.Errorf("%s: %s alone: %v", name, variable, err)
			}
		}
	}
}

// differences are the paths of the fields that differ, in order. Functions, pointers and interfaces are not looked into.
func differences(a, b reflect.Value, path string) (paths []string) {
	switch a.Kind() {
	case reflect.Func, reflect.Pointer, reflect.Interface, reflect.Chan, reflect.Map:
		return nil
	case reflect.Struct:
		for i := range a.NumField() {
			paths = append(paths, differences(a.Field(i), b.Field(i), path+"."+a.Type().Field(i).Name)...)
		}
		slices.Sort(paths)
		return paths
	default:
		if fmt.Sprint(a) != fmt.Sprint(b) {
			return []string{strings.TrimPrefix(path, ".")}
		}
		return nil
	}
}
