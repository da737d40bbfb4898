package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
)

// programMain runs a command line as main does, and returns its exit code and what it wrote to standard error.
func programMain(t *testing.T, args ...string) (code int, stderr string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan string)
	go func() {
		text, _ := io.ReadAll(r)
		read <- string(text)
	}()
	outWas, errWas := os.Stdout, os.Stderr
	os.Stdout, os.Stderr = null, w
	code = cli.Main(commandLine(), args)
	os.Stdout, os.Stderr = outWas, errWas
	_, _ = w.Close(), null.Close() // nobody reads what is lost
	stderr = <-read
	_ = r.Close()
	return code, stderr
}

// wrongSettings are values that are wrong for one key only. No value of any key holds a control character.
var wrongSettings = map[string]map[string][]string{
	"serve": {
		"listen_address":           {"0.0.0.0", "my host", "127.0.0.1:80"},
		"controller_address":       {"http://controller:50051", "a b:1", "h:99999", ":", "unknown:///x", "dns:///", "a:1,b:x", "%zz://"},
		"advertise_address":        {"x", "h:0", "0.0.0.0:1", "[fe80::1%eth0]:1", "a b:1"},
		"etcd.endpoints":           {"etcd", "ftp://etcd:2379", "etcd:0", "http://etcd:2379,https://etcd:2379", ","},
		"etcd.tls.ca_file":         {"/nowhere", "/dev/zero", "."},
		"tls.client_ca_file":       {"/nowhere"},
		"tls.client_auth":          {"require", "maybe"},
		"tls.min_version":          {"1.1", "TLS1.3"},
		"etcd.username":            {"without a password"},
		"etcd.password":            {"without-a-user"},
		"etcd.password_file":       {"/nowhere", "/dev/zero"},
		"tracing.endpoint":         {"x", "ftp://h:1", "http://", "http://a b:1", "h:0"},
		"discovery.allow_networks": {"10.0.0.0", "x/8"},
		"link.compression":         {"gzip", "s2,s2"},
		"link.silence":             {"500ms"},
		"link.backoff_max":         {"30ms"},
		"limits.request_bytes":     {"1KiB"},
		"metrics_port":             {"50053", "65536", "-1"},
		"http_port":                {"50053", "9093", "-1"},
		"http.allowed_origins":     {"app.example.com", "https://a.example/", "https://*.example", "*"},
		"tracing.sample_rate":      {"NaN", "1.01", "-0.1"},
		"not_ready_after":          {"-1s", "25h"},
		"shards":                   {"0", "257", "1e3", "0x10"},
		"log_level":                {"loud"},
		"limits.data_bytes":        {"65MiB", "1MB", "-1"},
		"manager_id":               {"a/b", strings.Repeat("a", 257)},
	},
	"controller": {
		"listen_address": {"::"},
		"etcd.endpoints": {"etcd"},
		"grpc_port":      {"9095"},
		"metrics_port":   {"50051"},
	},
	"connect-node": {
		"listen_address":     {"10.0.0.1"},
		"node_id":            {"a/b", strings.Repeat("a", 251)},
		"controller_address": {"http://controller:50051", "a b:1", "a:1,b:1"},
		"advertise_address":  {"0.0.0.0:1"},
		"ws.allowed_origins": {"app.example.com", "https://a b", "https://a/path"},
		"compression":        {"gzip"},
		"grpc_port":          {"8080", "9094"},
		"http_port":          {"50052", "9094"},
		"metrics_port":       {"50052", "8080"},
	},
	"dev": {
		"data_dir":         {"/etc/passwd"},
		"tracing.endpoint": {"x"},
		"base_port":        {"-2", "65535"},
	},
}

// TestEveryWrongSettingExitsWith2AndItsName: for every key of every program, from a flag, from the environment, and from
// the file where the program reads one.
func TestEveryWrongSettingExitsWith2AndItsName(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, cmd := range commandLine().Commands {
		if cmd.New == nil {
			continue // flags of its own
		}
		set := config.New()
		cmd.New().Bind(set)
		tried := map[string]bool{}
		for _, key := range set.Keys() {
			tried[key.Name()] = true
			for _, value := range append([]string{"\x01"}, wrongSettings[cmd.Name][key.Name()]...) {
				want := []string{key.Name(), key.Variable()}
				check := func(source string, code int, text string) {
					t.Helper()
					line, more, _ := strings.Cut(strings.TrimSpace(text), "\n")
					named := false
					for _, name := range want {
						named = named || strings.Contains(line, name)
					}
					if code != cli.ExitUsage || !named || more != "" {
						t.Errorf("%s: %s=%.40q from %s: exit code %d, want 2 and one line with the key's name, got %q", cmd.Name, key.Name(), value, source, code, text)
					}
				}
				if flag := key.Flag(); flag != "" {
					want = append(want, flag)
					code, text := programMain(t, cmd.Name, "--print-config", "--"+flag+"="+value)
					check("a flag", code, text)
				}

				t.Setenv(key.Variable(), value)
				code, text := programMain(t, cmd.Name, "--print-config")
				if err := os.Unsetenv(key.Variable()); err != nil {
					t.Fatal(err)
				}
				check("the environment", code, text)

				if !cmd.File {
					continue
				}
				file := filepath.Join(t.TempDir(), "c.yaml")
				if err := os.WriteFile(file, []byte(yamlOf(key.Name(), value)), 0o600); err != nil {
					t.Fatal(err)
				}
				code, text = programMain(t, cmd.Name, "--print-config", "--config-file="+file)
				check("the file", code, text)
			}
		}
		for name := range wrongSettings[cmd.Name] {
			if !tried[name] {
				t.Errorf("%s has no key %s", cmd.Name, name)
			}
		}
	}
}

// yamlOf is a file with one value.
func yamlOf(name, value string) string {
	var b strings.Builder
	path := strings.Split(name, ".")
	for i, part := range path {
		b.WriteString(strings.Repeat("  ", i) + part + ":")
		if i+1 < len(path) {
			b.WriteString("\n")
		}
	}
	quoted := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\x01", `\x01`).Replace(value)
	return b.String() + ` "` + quoted + "\"\n"
}

func TestWrongSettingOfOpenTelemetryIsNamed(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, value := range map[string]string{
		"OTEL_EXPORTER_OTLP_ENDPOINT":        "::::",
		"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "ftp://x:1",
		"OTEL_TRACES_SAMPLER":                "x",
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(name, value)
			if code, text := programMain(t, "--print-config"); code != cli.ExitUsage || !strings.Contains(text, name) {
				t.Errorf("exit code %d, want 2 and the name, got %q", code, text)
			}
		})
	}
}
