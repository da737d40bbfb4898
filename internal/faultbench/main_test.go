package faultbench

import (
	"flag"
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/internal/programs"
)

// patience is how long a test waits for what must happen. It is long: only a failure
// takes it.
const patience = time.Minute

// slowEnv runs the slow tests, too.
const slowEnv = "SLOW_FAULTS"

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		os.Exit(serveChild(spec))
	}
	if spec := os.Getenv(storeEnv); spec != "" {
		os.Exit(serveStore(spec))
	}
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f != nil && f.Value.String() == f.DefValue {
		_ = f.Value.Set("4") // the tests mostly wait
	}
	// Lasting goroutines: ants keeps those of its default pool, from its
	// initialisation on.
	ignore := goleak.IgnoreCurrent()
	code := m.Run()
	if err := programs.Remove(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if code == 0 {
		if err := goleak.Find(ignore, goleak.IgnoreAnyFunction("github.com/VictoriaMetrics/metrics.summariesSwapCron")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// pushManager returns the path of the program.
func pushManager(t testing.TB) string {
	t.Helper()
	if path := os.Getenv(binaryEnv); path != "" {
		return path
	}
	return programs.Path(t, "push-manager")
}

// slow skips a test that takes long, unless it was asked for.
func slow(t *testing.T) {
	t.Helper()
	if os.Getenv(slowEnv) == "" && os.Getenv(longEnv) == "" {
		t.Skipf("slow: set %s=1, or run make faults", slowEnv)
	}
}

// longEnv runs the tests of lasting delivery with their full figures.
const longEnv = "LONG"

// long is one figure for every day, and another one with LONG.
func long[T any](every, full T) T {
	if os.Getenv(longEnv) != "" {
		return full
	}
	return every
}

// eventually waits for ok, which says what is missing while it is not true, and
// returns how long it took.
func eventually(t testing.TB, what string, ok func() error) time.Duration {
	t.Helper()
	begin := time.Now()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return time.Since(begin)
		}
		if time.Since(begin) > patience {
			t.Fatalf("%s: %v", what, err)
		}
		<-tick.C
	}
}

// lasts fails as soon as ok does, within d.
func lasts(t testing.TB, d time.Duration, what string, ok func() error) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(d); time.Now().Before(end); <-tick.C {
		if err := ok(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
}
