package e2e_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/push-manager/push-manager/benchmarks/e2e"
	"github.com/push-manager/push-manager/internal/programs"
)

// rounds and turn are for the benchmarks: the defaults give an impression, the bars
// are measured by pushbench.
var (
	rounds = flag.Int("rounds", 10, "turns of each server in a benchmark")
	turn   = flag.Duration("turn", 250*time.Millisecond, "length of a turn in a benchmark")
)

func TestMain(m *testing.M) {
	e2e.Role()
	code := m.Run()
	if err := programs.Remove(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// long skips what keeps a machine busy for long.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("LONG") == "" {
		t.Skip("it keeps the machine busy: set LONG=1, or run make bench-test")
	}
}

// TestSuitesRun keeps the harness from rotting: each suite with one short turn in a
// small world. It says nothing about speed.
func TestSuitesRun(t *testing.T) {
	if testing.Short() {
		t.Skip("starts many processes")
	}
	suites := []string{"user", "change"}
	if os.Getenv("LONG") != "" {
		suites = append(suites, "stream", "tls", "memory", "store", "room", "members", "tlsstream", "open2k", "allocs", "ids", "reconnects", "payload")
	}
	b, err := e2e.Start(t.Context(), e2e.Options{
		Binary: programs.Path(t, "push-manager"), Rounds: 1, Turn: 20 * time.Millisecond, InFlight: 8, StreamInFlight: 64, Short: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for _, s := range e2e.Suites() {
		if !slices.Contains(suites, s.Name) { // the others are like one of these
			continue
		}
		begin := time.Now()
		r, err := s.Run(t.Context(), b)
		// A machine that stands still for a turn says nothing about the harness.
		for again := 2; again > 0 && err == nil && idle(r) != ""; again-- {
			r, err = s.Run(t.Context(), b)
		}
		if err != nil {
			t.Fatalf("%s: %v", s.Name, err)
		}
		t.Logf("%s: %.1f s", s.Name, time.Since(begin).Seconds())
		if s.Bars != (len(r.Bars) > 0) {
			t.Errorf("%s: %d bars, says %v", s.Name, len(r.Bars), s.Bars)
		}
		// On a busy machine a push may fail; that nothing is pushed means that the harness is broken.
		if bar := idle(r); bar != "" {
			t.Errorf("%s", bar)
		}
		var text bytes.Buffer
		if err := r.Write(&text); err != nil || len(r.Rows) > 0 && !strings.Contains(text.String(), "p99-ms") {
			t.Errorf("%s: %v\n%s", s.Name, err, &text)
		}
		if err := r.WriteJSON(&text); err != nil {
			t.Errorf("%s: %v", s.Name, err)
		}
	}
}

// idle is a bar for which nothing was done, or empty.
func idle(r *e2e.Result) string {
	for _, bar := range r.Bars {
		if strings.Contains(bar.Failure, "nothing") {
			return bar.String()
		}
	}
	return ""
}

// TestOverloadRuns keeps the flood from rotting. It says nothing about speed: on a busy
// machine nothing may be good.
func TestOverloadRuns(t *testing.T) {
	long(t)
	b, err := e2e.Start(t.Context(), e2e.Options{Binary: programs.Path(t, "push-manager"), Short: true})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	all, err := b.Overload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range all {
		for p, offered := range o.By.Offered {
			if ended := o.By.Good[p] + o.By.Late[p] + o.By.Refused[p] + o.By.Failed[p] + o.By.GivenUp[p] + o.By.Held[p]; ended != offered {
				t.Errorf("%s at %v: of %d offered %d have ended: %+v", o.What, o.Times, offered, ended, o.By)
			}
		}
		if len(o.Turns) != 1 || len(o.Floods) != 1 || o.Turns[0].Offered == 0 || len(o.Bars()) < 2 {
			t.Errorf("nothing was offered: %+v", o)
		}
	}
	var text bytes.Buffer
	if err := e2e.WriteOverloads(&text, all); err != nil || strings.Count(text.String(), "\n") != 1+len(all) {
		t.Errorf("%v\n%s", err, &text)
	}
}

// TestClientsRun keeps the way to WebSocket clients from rotting. It says nothing about speed.
func TestClientsRun(t *testing.T) {
	long(t)
	b, err := e2e.Start(t.Context(), e2e.Options{Binary: programs.Path(t, "push-manager"), Rounds: 2, Short: true})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	results, err := b.Clients(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	for i, rows := range []int{6, 1} {
		if len(results) != 2 || len(results[i].Rows) != rows {
			t.Fatalf("results: %+v", results)
		}
		for _, row := range results[i].Rows {
			if v := row.Columns[0].Figure.Value; v <= 0 {
				t.Errorf("%s: %s is %v", row.Name, row.Columns[0].Name, v)
			}
		}
	}
}

// TestScaleRuns keeps the large run from rotting, in small: everything arrives, once. It says nothing about speed.
func TestScaleRuns(t *testing.T) {
	long(t)
	if _, err := exec.LookPath("redis-server"); err != nil && os.Getenv("CI") != "true" {
		t.Skip("redis-server is missing (Debian: package redis-server)")
	}
	b, err := e2e.Start(t.Context(), e2e.Options{Binary: programs.Path(t, "push-manager"), Short: true})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	results, err := b.Scale(t.Context(), e2e.Scaling{
		Clients: 60, Nodes: 3, Rooms: 12, Big: 30, Pause: 100 * time.Millisecond, Each: 300 * time.Millisecond, BigRate: 20, RoomRate: 100, UserRate: 100, Everybody: 2,
	}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	for i, rows := range []int{1, 4, 4} {
		if len(results) != 3 || len(results[i].Rows) != rows {
			t.Fatalf("results: %+v", results)
		}
		if err := results[i].WriteLong(&text); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s", &text)
}

// TestSaturatedPushesShareFramesAndWrites watches counts, which do not depend on the
// speed of the machine.
func TestSaturatedPushesShareFramesAndWrites(t *testing.T) {
	long(t)
	b, err := e2e.Start(t.Context(), e2e.Options{Binary: programs.Path(t, "push-manager"), Rounds: 5})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for _, s := range e2e.Suites() {
		if s.Name != "counts" {
			continue
		}
		r, err := s.Run(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		for _, bar := range r.Bars {
			t.Log(bar)
			if bar.Short() {
				t.Errorf("%s", bar)
			}
		}
	}
}

// BenchmarkSuites shows the tables as benchmarks. Each suite runs once, whatever b.N
// says: its turns are the repetition.
//
//	go test -run '^$' -bench 'Suites/suite=user' ./benchmarks/e2e -rounds 40
func BenchmarkSuites(b *testing.B) {
	var bench *e2e.Bench
	defer func() {
		if bench != nil {
			bench.Close()
		}
	}()
	for _, s := range e2e.Suites() {
		b.Run("suite="+s.Name, func(b *testing.B) {
			if bench == nil {
				var err error
				if bench, err = e2e.Start(b.Context(), e2e.Options{Rounds: *rounds, Turn: *turn}); err != nil {
					b.Fatal(err)
				}
			}
			r, err := s.Run(b.Context(), bench)
			if err != nil {
				b.Fatal(err)
			}
			for _, row := range r.Rows {
				b.Run("server="+strings.ReplaceAll(row.Name, " ", "-"), func(b *testing.B) {
					b.ReportMetric(0, "ns/op") // of no meaning here
					for _, c := range row.Columns {
						b.ReportMetric(c.Figure.Value, c.Name)
					}
				})
			}
		})
	}
}
