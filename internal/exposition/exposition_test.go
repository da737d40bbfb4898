package exposition

import (
	"strings"
	"testing"

	"github.com/VictoriaMetrics/metrics"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/push-manager/push-manager/docs"
)

const page = "# Metrics\n" +
	"| metric | type | meaning |\n|---|---|---|\n" +
	"| `push_manager_push_total` | counter | Target users; see [there](x.md#y) and `A|B` or C:\\D |\n" +
	"| `took_seconds{api}` | summary | How long |\n" +
	"| `size_bytes{api, le}` | histogram | How much |\n" +
	"| `size_bytes_sum` | gauge | Another one |\n" +
	"| `push_manager_discovery_nodes` | gauge | Nodes |\n"

func TestFamiliesHaveTheTypeAndMeaningOfTheirRow(t *testing.T) {
	plain := strings.Join([]string{
		`push_manager_push_total 1`,
		`took_seconds_sum{api="a"} 1`,
		`took_seconds{api="a",quantile="0.5"} 1`,
		`controller_discovery_nodes 1`,
		`took_seconds_count{api="a"} 1`,
		`size_bytes_sum 3`,
		`size_bytes_bucket{api="a",le="1"} 1`,
		`nobody_knows 4`,
	}, "\n") + "\n"
	want := strings.Join([]string{
		`# HELP push_manager_push_total Target users; see there and A|B or C:\\D`,
		`# TYPE push_manager_push_total counter`,
		`push_manager_push_total 1`,
		`# HELP took_seconds How long`,
		`# TYPE took_seconds summary`,
		`took_seconds_sum{api="a"} 1`,
		`took_seconds{api="a",quantile="0.5"} 1`,
		`took_seconds_count{api="a"} 1`,
		`# HELP controller_discovery_nodes Nodes`,
		`# TYPE controller_discovery_nodes gauge`,
		`controller_discovery_nodes 1`,
		`# HELP size_bytes_sum Another one`,
		`# TYPE size_bytes_sum gauge`,
		`size_bytes_sum 3`,
		`# HELP size_bytes How much`,
		`# TYPE size_bytes histogram`,
		`size_bytes_bucket{api="a",le="1"} 1`,
		`nobody_knows 4`,
	}, "\n") + "\n"
	if got := string(annotate([]byte(plain), families(page))); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestTypesOfTheTableAreTypes: a slip in a row would be a page that Prometheus refuses.
func TestTypesOfTheTableAreTypes(t *testing.T) {
	all := families(docs.Metrics)
	if len(all) < 100 {
		t.Fatalf("%d families are described, there are more", len(all))
	}
	for name, f := range all {
		switch f.kind {
		case "counter", "gauge", "summary", "histogram", "untyped":
		default:
			t.Errorf("%s has the type %q", name, f.kind)
		}
		if strings.TrimSpace(f.help) == "" {
			t.Errorf("%s has no meaning", name)
		}
	}
}

func TestGoAndProcessAreDescribed(t *testing.T) {
	var text strings.Builder
	if err := Write(&text, metrics.NewSet()); err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text.String()))
	if err != nil {
		t.Fatalf("Prometheus cannot read it: %v\n%s", err, text.String())
	}
	for name, f := range families {
		if f.GetHelp() == "" {
			t.Errorf("%s is not in docs/metrics.md", name)
		}
	}
}
