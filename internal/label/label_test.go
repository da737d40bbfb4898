package label_test

import (
	"strings"
	"testing"

	"github.com/VictoriaMetrics/metrics"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/push-manager/push-manager/internal/label"
)

// FuzzName: whatever a label holds, the metrics library takes the name, and Prometheus reads the value that was meant.
func FuzzName(f *testing.F) {
	for _, value := range []string{
		"", "connect-node-1", "pod-\u200d1", `a\`, `\"`, `a"b`, "a\nb", `\n`, "}", "{,=", "\u2028", "\ufeff", "\U0001F468\u200d\U0001F469", "\xff\xfe", "#", " ", "\t",
	} {
		f.Add(value)
	}
	f.Fuzz(func(t *testing.T, value string) {
		name := label.Name("up", "node_id", value, "part", "x")
		if err := metrics.ValidateMetric(name); err != nil {
			t.Fatalf("the metrics library refuses %q: %v", name, err)
		}
		set := metrics.NewSet()
		set.GetOrCreateCounter(name).Set(7)
		set.GetOrCreateSummaryExt(label.Name("took", "node_id", value), 1e9, []float64{0.5}).Update(1)
		var page strings.Builder
		set.WritePrometheus(&page)
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(strings.NewReader(page.String()))
		if err != nil {
			t.Fatalf("Prometheus cannot read it: %v\n%s", err, page.String())
		}
		labels := families["up"].GetMetric()[0].GetLabel()
		if got, want := labels[0].GetValue(), strings.ToValidUTF8(value, "\uFFFD"); got != want || labels[0].GetName() != "node_id" {
			t.Errorf("%s is read as %q, want %q", labels[0].GetName(), got, want)
		}
		if labels[1].GetValue() != "x" {
			t.Errorf("the next label is read as %q, want x", labels[1].GetValue())
		}
	})
}

func TestNameWithoutLabelsIsPlain(t *testing.T) {
	if got := label.Name("up"); got != "up" {
		t.Errorf("%q, want up", got)
	}
}
