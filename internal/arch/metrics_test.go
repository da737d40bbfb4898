package arch

import (
	"bufio"
	"context"
	"fmt"
	"go/ast"
	"go/token"
	"io"
	"maps"
	"net/http"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/programs"
)

// metricsTable is the one place where all metrics are described.
const metricsTable = "docs/metrics.md"

var (
	// A literal that is a metric's name, with or without labels.
	metricLiteral = regexp.MustCompile(`^((?:push_manager|controller|connect_node)_[a-z0-9_]*[a-z0-9])(?:\{.*)?$`)
	// The first cell of a row of the table.
	metricRow = regexp.MustCompile("(?m)^\\| `([a-zA-Z0-9_]+)(?:\\{[^`]*)?` \\|")
	// A name in an exposition.
	metricLine = regexp.MustCompile(`^(?:push_manager|controller|connect_node)_[a-z0-9_]+`)
)

// TestMetricsAreDocumented: the metrics that running programs show, and the names that stand in the code, are those in
// the table, both ways.
func TestMetricsAreDocumented(t *testing.T) {
	documented := map[string]bool{}
	for _, row := range metricRow.FindAllStringSubmatch(read(t, metricsTable), -1) {
		if documented[row[1]] {
			t.Errorf("%s describes %s twice", metricsTable, row[1])
		}
		documented[row[1]] = true
	}
	known := metricLiterals(t)
	for name, where := range shownMetrics(t) {
		if base := baseName(name); documented[base] {
			name = base // a part of a histogram or a summary
		}
		known[name] = where
	}
	for _, name := range slices.Sorted(maps.Keys(known)) {
		if !documented[name] {
			t.Errorf("%s: metric %s is not in %s", known[name], name, metricsTable)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(documented)) {
		if metricLine.MatchString(name) && known[name] == "" { // others are of Go and the process
			t.Errorf("%s: nothing has the metric %s", metricsTable, name)
		}
	}
}

// TestRulesAndDashboardUseDocumentedMetrics: an alert on a name that nobody exports would never fire, and a panel would be empty.
func TestRulesAndDashboardUseDocumentedMetrics(t *testing.T) {
	var documented []string
	for _, row := range metricRow.FindAllStringSubmatch(read(t, metricsTable), -1) {
		documented = append(documented, row[1])
	}
	for _, file := range []string{"deploy/prometheus/alerts.yml", "deploy/prometheus/slo.yml", "deploy/grafana/push-manager.json"} {
		for _, name := range regexp.MustCompile(`\b(?:push_manager|connect_node|controller)_[a-z0-9_]+`).FindAllString(read(t, file), -1) {
			if !slices.Contains(documented, name) && !slices.Contains(documented, baseName(name)) {
				t.Errorf("%s uses %s, which is not in %s", file, name, metricsTable)
			}
		}
	}
}

// TestLabelsAreWrittenByOne: what Go quotes, Prometheus may refuse to read.
func TestLabelsAreWrittenByOne(t *testing.T) {
	quoted := regexp.MustCompile(`^[a-z_]+\{(?:[a-z_]+="[^"]*",)*[a-z_]+=(?:%|$)`)
	for _, src := range sources(t) {
		if src.test() || src.generated() {
			continue
		}
		for node := range ast.Preorder(src.file) {
			literal, ok := node.(*ast.BasicLit)
			if !ok || literal.Kind != token.STRING {
				continue
			}
			if text, err := strconv.Unquote(literal.Value); err == nil && quoted.MatchString(text) {
				t.Errorf("%s: %s: labels with values of variables are for label.Name", src.path(), literal.Value)
			}
		}
	}
}

// baseName is a metric's name without what a histogram or summary adds.
func baseName(name string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if base, ok := strings.CutSuffix(name, suffix); ok {
			return base
		}
	}
	return name
}

// metricLiterals collects the names of metrics that stand in product files as one literal, with a file for each. Names
// that are put together are seen by shownMetrics only.
func metricLiterals(t *testing.T) map[string]string {
	t.Helper()
	names := map[string]string{}
	for _, src := range sources(t) {
		if src.test() || src.generated() {
			continue
		}
		for node := range ast.Preorder(src.file) {
			literal, ok := node.(*ast.BasicLit)
			if !ok || literal.Kind != token.STRING {
				continue
			}
			text, err := strconv.Unquote(literal.Value)
			if err != nil {
				t.Fatalf("%s: %v", src.path(), err)
			}
			// Keys of the configuration look alike.
			if found := metricLiteral.FindStringSubmatch(text); found != nil && !strings.HasSuffix(text, "_address") && !strings.HasSuffix(text, "_tls") && !strings.HasSuffix(text, "_file") && text != "controller_store" {
				names[found[1]] = src.path()
			}
		}
	}
	return names
}

// shownMetrics collects the names that a running Push-Manager shows.
func shownMetrics(t *testing.T) map[string]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	t.Cleanup(func() {
		if err := programs.Remove(); err != nil {
			t.Error(err)
		}
	})
	dev := exec.CommandContext(ctx, programs.Path(t, "push-manager"), "dev", "--base-port=0", "--nodes=1")
	out, err := dev.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Start(); err != nil {
		t.Fatalf("start push-manager dev: %v", err)
	}
	defer func() {
		if err := dev.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := dev.Wait(); err != nil {
			t.Errorf("stop push-manager dev: %v", err)
		}
	}()
	names := map[string]string{}
	err = scrape(ctx, announced(t, out), func(name string) {
		names[name] = "push-manager"
		// The entry in etcd is the same part in a Connect-Node.
		if rest, ok := strings.CutPrefix(name, "push_manager_registration_"); ok {
			names["connect_node_registration_"+rest] = "connect-node"
		}
	})
	if err != nil {
		t.Errorf("metrics of push-manager: %v", err)
	}
	return names
}

// announced waits until dev says that it is ready, and returns the address that it gave for its metrics.
func announced(t *testing.T, out io.Reader) (address string) {
	t.Helper()
	metricsAt := regexp.MustCompile(`metrics and health at http://(\S+)`)
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if found := metricsAt.FindStringSubmatch(lines.Text()); found != nil {
			address = found[1]
		}
		if strings.HasPrefix(lines.Text(), "Ready") && address != "" {
			return address
		}
	}
	t.Fatal("push-manager dev did not get ready")
	return ""
}

// scrape reads the names of our metrics from one program.
func scrape(ctx context.Context, address string, add func(name string)) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return fmt.Errorf("make the request: %w", err)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	response, err := transport.RoundTrip(request)
	if err != nil {
		return fmt.Errorf("scrape: %w", err)
	}
	defer response.Body.Close()
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		if name := metricLine.FindString(lines.Text()); name != "" {
			add(name)
		}
	}
	return lines.Err()
}
