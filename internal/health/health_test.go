package health

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// patient is a Monitor of two checks whose reasons the test sets, and all that it has
// told.
type patient struct {
	*Monitor
	set *metrics.Set

	mu   sync.Mutex
	why  map[string]string
	told []bool
	log  bytes.Buffer // Owned by the monitor until it is closed.
}

// because sets the reason of a check.
func (p *patient) because(name, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.why[name] = why
}

func (p *patient) reason(name string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.why[name]
}

func (p *patient) changed(ready bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told = append(p.told, ready)
}

func (p *patient) changes() []bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.told)
}

// start begins in a bubble, and returns between two looks.
func start(t *testing.T, patience time.Duration, why map[string]string) *patient {
	t.Helper()
	p := &patient{why: why, set: metrics.NewSet()}
	var checks []Check
	for _, name := range []string{"nodes", "controller"} {
		checks = append(checks, Check{Name: name, Why: func() string { return p.reason(name) }})
	}
	m, err := New(Config{Checks: checks, Patience: patience, OnChange: p.changed, Metrics: p.set, Logger: slog.New(slog.NewTextHandler(&p.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	p.Monitor = m
	if got := m.NotReady(); !slices.Equal(got, []string{"starting"}) {
		t.Errorf("before the first look: %q", got)
	}
	m.Start()
	t.Cleanup(m.Close)
	time.Sleep(interval / 2)
	return p
}

// after lets time pass and then looks at what is said.
func (p *patient) after(t *testing.T, d time.Duration, reasons ...string) {
	t.Helper()
	time.Sleep(d)
	synctest.Wait()
	if got := p.NotReady(); !slices.Equal(got, reasons) {
		t.Errorf("not ready: %q, want %q", got, reasons)
	}
	var b bytes.Buffer
	p.set.WritePrometheus(&b)
	want := "push_manager_ready 1\n"
	if len(reasons) > 0 {
		want = "push_manager_ready 0\n"
	}
	if !strings.Contains(b.String(), want) {
		t.Errorf("metrics lack %q:\n%s", want, b.String())
	}
}

// gauge checks the gauge of one reason.
func (p *patient) gauge(t *testing.T, name, value string) {
	t.Helper()
	var b bytes.Buffer
	p.set.WritePrometheus(&b)
	if want := `push_manager_not_ready{reason="` + name + `"} ` + value + "\n"; !strings.Contains(b.String(), want) {
		t.Errorf("metrics lack %q:\n%s", want, b.String())
	}
}

func TestEachReasonEndsReadinessAndItsEndBringsItBack(t *testing.T) {
	for _, name := range []string{"nodes", "controller"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := start(t, 2*time.Second, map[string]string{})
				p.after(t, time.Minute)
				p.because(name, "it is away")
				p.after(t, 1900*time.Millisecond)
				p.gauge(t, name, "0")
				p.after(t, 600*time.Millisecond, "it is away")
				p.gauge(t, name, "1")
				p.because(name, "it is away for long")
				p.after(t, time.Hour, "it is away for long")
				p.because(name, "")
				p.after(t, interval)
				p.gauge(t, name, "0")
				if !slices.Equal(p.changes(), []bool{true, false, true}) {
					t.Errorf("told %v", p.changes())
				}
			})
		})
	}
}

func TestNotReadyFromTheStartWithoutPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, time.Hour, map[string]string{"nodes": "no node", "controller": "no controller"})
		p.after(t, 0, "no node", "no controller")
		p.because("nodes", "")
		p.after(t, interval, "no controller")
		// Of one reason the next may take the place: there was no moment without any.
		p.because("nodes", "no node again")
		p.because("controller", "")
		p.after(t, interval, "no node again")
		p.because("nodes", "")
		p.after(t, interval)
		if !slices.Equal(p.changes(), []bool{false, true}) {
			t.Errorf("told %v", p.changes())
		}
	})
}

// TestPeerThatIsNeverReachedIsLoggedOnce: whoever starts a program without its Controller reads why nothing works.
func TestPeerThatIsNeverReachedIsLoggedOnce(t *testing.T) {
	for took, warnings := range map[time.Duration]int{4 * time.Second: 0, 6 * time.Second: 1, time.Hour: 1} {
		synctest.Test(t, func(t *testing.T) {
			p := start(t, 2*time.Second, map[string]string{"controller": "has not answered yet"})
			p.after(t, took, "has not answered yet")
			p.because("controller", "")
			p.after(t, interval)
			p.because("controller", "away")
			p.after(t, 3*time.Second, "away")
			p.Close()
			text := p.log.String()
			if n := strings.Count(text, "level=WARN msg=\"not ready since the start"); n != warnings || n > 0 && !strings.Contains(text, `reasons="has not answered yet"`) {
				t.Errorf("ready after %v: %d warnings, want %d:\n%s", took, n, warnings, text)
			}
		})
	}
}

// TestFlappingIsNotPassedOn: a peer that is away for less than the patience, again and
// again, changes nothing; one that is away for longer is told once each time.
func TestFlappingIsNotPassedOn(t *testing.T) {
	for away, changes := range map[time.Duration]int{1500 * time.Millisecond: 0, 3 * time.Second: 20} {
		synctest.Test(t, func(t *testing.T) {
			p := start(t, 2*time.Second, map[string]string{})
			for range 10 {
				p.because("nodes", "no node")
				time.Sleep(away)
				p.because("nodes", "")
				time.Sleep(away)
			}
			synctest.Wait()
			if got := len(p.changes()) - 1; got != changes {
				t.Errorf("away for %v ten times: %d changes, want %d", away, got, changes)
			}
		})
	}
}

// TestTimeInWhichWeDidNotRunDoesNotCount: a process that was stopped finds what was true
// before its peers could say otherwise.
func TestTimeInWhichWeDidNotRunDoesNotCount(t *testing.T) {
	p, err := New(Config{Patience: 2 * time.Second, Checks: []Check{{Name: "nodes", Why: func() string { return "no node" }}}})
	if err != nil {
		t.Fatal(err)
	}
	p.ready = true
	for i := range 10 {
		if p.look(min(time.Hour, stepMax)); p.ready != (i < 4) {
			t.Fatalf("ready %v after %d looks, each after an hour in which nothing ran", p.ready, i+1)
		}
	}
	p.Close()
}

func TestDrainIsForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, 0, map[string]string{})
		p.after(t, time.Second)
		p.Drain()
		p.after(t, 0, "draining")
		p.gauge(t, "draining", "1")
		p.because("nodes", "no node")
		p.after(t, interval, "draining", "no node")
		p.because("nodes", "")
		p.after(t, time.Minute, "draining")
	})
}

// TestExcludedChecksGiveNoReason: nothing else is left out, above all not that it starts or drains.
func TestExcludedChecksGiveNoReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, 0, map[string]string{"nodes": "no node", "controller": "no controller"})
		check := func(want []string, exclude ...string) {
			t.Helper()
			if got := p.NotReady(exclude...); !slices.Equal(got, want) {
				t.Errorf("without %q: %q, want %q", exclude, got, want)
			}
		}
		check([]string{"no controller"}, "nodes")
		check([]string{"no node"}, "controller", "other")
		check(nil, p.Names()...)
		p.after(t, 0, "no node", "no controller")
		p.Drain()
		check([]string{"draining"}, p.Names()...)
		m, err := New(p.cfg)
		if err != nil {
			t.Fatal(err)
		}
		p.Monitor, m = m, p.Monitor
		m.Close()
		check([]string{"starting"}, p.Names()...)
	})
}

func TestConfigNamesWhatIsWrong(t *testing.T) {
	_, err := New(Config{Patience: -1, Checks: []Check{{Name: "x"}, {Why: func() string { return "" }}}})
	if err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("%v", err)
	}
}
