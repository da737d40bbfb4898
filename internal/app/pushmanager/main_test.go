package pushmanager

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// The pool library keeps two goroutines of a pool of its own from the start on,
		goleak.IgnoreCurrent(),
		// and the metrics library one for each window of its summaries.
		goleak.IgnoreAnyFunction("github.com/VictoriaMetrics/metrics.summariesSwapCron"))
}
