package arch

import (
	"go/ast"
	"go/token"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// metricsTable is the one place where all metrics are described.
const metricsTable = "docs/metrics.md"

var (
	// A literal that is a metric's name, with or without labels.
	metricLiteral = regexp.MustCompile(`^((?:push_manager|controller|connect_node)_[a-z0-9_]+)(?:\{.*)?$`)
	// The first cell of a row of the table.
	metricRow = regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)(?:\\{[^`]*)?` \\|")
)

// TestMetricsAreDocumented: the names in the code are those in the table, both ways.
func TestMetricsAreDocumented(t *testing.T) {
	documented := map[string]bool{}
	for _, row := range metricRow.FindAllStringSubmatch(read(t, metricsTable), -1) {
		if documented[row[1]] {
			t.Errorf("%s describes %s twice", metricsTable, row[1])
		}
		documented[row[1]] = true
	}
	used := metricNames(t)
	if len(used) == 0 {
		t.Fatal("found no metric in the code")
	}
	for _, name := range slices.Sorted(maps.Keys(used)) {
		if !documented[name] {
			t.Errorf("%s: metric %s is not in %s", used[name], name, metricsTable)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(documented)) {
		if used[name] == "" {
			t.Errorf("%s: no code has the metric %s", metricsTable, name)
		}
	}
}

// metricNames collects the names of metrics from the string literals of product files, with a file for each.
func metricNames(t *testing.T) map[string]string {
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
			if found := metricLiteral.FindStringSubmatch(text); found != nil {
				names[found[1]] = src.path()
			}
		}
	}
	return names
}

// TestAlertsUseRealMetrics: an alert on a name that nobody exports would never fire.
func TestAlertsUseRealMetrics(t *testing.T) {
	names := metricNames(t)
	rules := read(t, "deploy/prometheus/alerts.yml")
	for _, name := range regexp.MustCompile(`\bpush_manager_[a-z0-9_]+`).FindAllString(rules, -1) {
		if names[name] == "" && names[strings.TrimSuffix(name, "_bucket")] == "" {
			t.Errorf("alerts.yml uses %s, which no code exports", name)
		}
	}
}
