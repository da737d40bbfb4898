package main

import (
	"bytes"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
)

// TestMetricsOfAllProgramsAreWhatPrometheusWants: each family has its meaning and type, and a node's id is read as it is,
// whatever it holds. promtool, where there is one, finds nothing to say.
func TestMetricsOfAllProgramsAreWhatPrometheusWants(t *testing.T) {
	const node = "pod-\u200d\"1\\"
	p := freeport.Take(t, 7)
	etcd := etcdtest.Start(t)
	common := []string{"ETCD_ENDPOINTS=" + etcd.Endpoint(), "CONTROLLER_ADDRESS=127.0.0.1:" + p[0]}
	execute(t, append(common, "GRPC_PORT="+p[0], "METRICS_PORT="+p[1]), "controller")
	execute(t, append(common, "GRPC_PORT="+p[2], "HTTP_PORT=0", "METRICS_PORT="+p[3]), "push-manager")
	execute(t, append(common, "GRPC_PORT="+p[4], "METRICS_PORT="+p[5], "HTTP_PORT="+p[6], "NODE_ID="+node), "connect-node")
	at := func(port, path string) string { return "http://127.0.0.1:" + port + path }
	answers(t, at(p[3], "/readyz"), http.StatusOK)
	until(t, "the way to the node is measured", func() bool {
		return strings.Contains(answers(t, at(p[3], "/metrics"), http.StatusOK), "push_manager_link_heartbeat_seconds_count{node_id=")
	})

	promtool := findPromtool(t)
	for name, port := range map[string]string{"push-manager": p[3], "controller": p[1], "connect-node": p[5]} {
		page := answers(t, at(port, "/metrics"), http.StatusOK)
		parser := expfmt.NewTextParser(model.LegacyValidation)
		families, err := parser.TextToMetricFamilies(strings.NewReader(page))
		if err != nil {
			t.Errorf("%s: Prometheus cannot read it: %v", name, err)
			continue
		}
		for metric, family := range families {
			if family.GetHelp() == "" || !strings.Contains(page, "# TYPE "+metric+" ") {
				t.Errorf("%s: %s is without HELP or TYPE: it lacks a row in docs/metrics.md", name, metric)
			}
		}
		if name == "push-manager" {
			got := families["push_manager_node_connections"].GetMetric()[0].GetLabel()[0].GetValue()
			if got != node {
				t.Errorf("the node %q is read as %q", node, got)
			}
		}
		if promtool == "" {
			continue
		}
		check := exec.CommandContext(t.Context(), promtool, "check", "metrics")
		check.Stdin = strings.NewReader(page)
		if out, err := check.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
			t.Errorf("%s: promtool check metrics: %v\n%s", name, err, out)
		}
	}
}

// findPromtool is "" where there is none, which only CI must not be without.
func findPromtool(t *testing.T) string {
	t.Helper()
	if path, err := exec.LookPath("promtool"); err == nil {
		return path
	}
	if path, err := filepath.Abs("../../.tmp/bin/promtool"); err == nil {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("promtool is missing (Debian: package prometheus)")
	}
	t.Log("SKIPPED: metrics were not checked with promtool, which is missing (Debian: package prometheus)")
	return ""
}

// TestNoProgramWritesUnasked: a library's lines on standard error would be in the middle of --help, and no JSON in a log
// of JSON. The metrics library has one for hosts without pressure stall information, before any main; so what silences it
// must come first, on every host.
func TestNoProgramWritesUnasked(t *testing.T) {
	for _, name := range []string{"push-manager", "controller", "connect-node", "pushctl", "pushload"} {
		cmd := exec.CommandContext(t.Context(), filepath.Join(binaries, name), "--help")
		cmd.Env = append(os.Environ(), "GODEBUG=inittrace=1")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s --help: %v", name, err)
		}
		order := map[string]int{}
		for i, line := range strings.Split(stderr.String(), "\n") {
			if rest, traced := strings.CutPrefix(line, "init "); traced {
				pkg, _, _ := strings.Cut(rest, " ")
				order[pkg] = i + 1
			} else if line != "" {
				t.Errorf("%s --help writes %q to standard error", name, line)
			}
		}
		silenced, made := order["github.com/push-manager/push-manager/internal/stdlog"], order["github.com/VictoriaMetrics/metrics"]
		if made != 0 && (silenced == 0 || silenced > made) {
			t.Errorf("%s: stdlog is initialised as number %d, the metrics library as %d (0: not at all)", name, silenced, made)
		}
	}
}
