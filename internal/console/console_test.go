package console

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/link"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// world is what a console is asked about.
type world struct {
	nodes    []link.NodeDetails
	callers  []ingress.CallerStatus
	state    State
	others   []Instance
	asked    int // for others
	pages    []Page
	log      *Warnings
	settings []config.Value
	set      *metrics.Set
}

func (w *world) console(t testing.TB) *Console {
	t.Helper()
	if w.set == nil {
		w.set = metrics.NewSet()
	}
	if w.log == nil {
		w.log = NewWarnings(200)
	}
	c, err := New(Config{
		About:   About{ID: "push-manager-1", Version: "v1.2.3", Started: time.Now(), GRPC: "127.0.0.1:50053", Shards: 2, Store: "embedded"},
		Metrics: w.set, Collect: func() {}, State: func() State { return w.state },
		Nodes: func(use func(*link.NodeDetails)) {
			for i := range w.nodes {
				use(&w.nodes[i])
			}
		},
		Latencies: func() ([]float64, map[string][]uint64) {
			return []float64{.001, .01}, map[string][]uint64{"PushToRoom": {1, 2, 3}}
		},
		Callers: func() []ingress.CallerStatus { return w.callers },
		Others: func(context.Context) ([]Instance, error) {
			w.asked++
			return w.others, nil
		},
		Settings: w.settings, Warnings: w.log, Pages: func() []Page { return w.pages },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// manyNodes are as those of a large deployment are: long names, all figures in use.
func manyNodes(n int, state string) []link.NodeDetails {
	all := make([]link.NodeDetails, n)
	for i := range all {
		all[i] = link.NodeDetails{
			Node: link.Node{ID: fmt.Sprintf("gateway-eu-west-%04d", i), Addr: fmt.Sprintf("10.120.%d.%d:50052", i/250, i%250)}, State: state,
			BootID: "K7QZ5N2VXW3P6RTL4MJY8DCEAB", Connections: 2, Links: 2, Window: 1024, Unacked: 12, UnackedFor: 3 * time.Millisecond, Features: 0xfe,
			Breaks: 1, Acks: []uint64{100_000, 50_000, 1000, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		}
	}
	return all
}

func get(t testing.TB, c *Console, name string, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, "/console/"+name, http.NoBody)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	if h := c.Data()[name]; h != nil {
		h.ServeHTTP(w, r)
	} else {
		c.Files(http.NotFoundHandler()).ServeHTTP(w, r)
	}
	return w
}

// read is a snapshot as a page reads it.
type read struct {
	Nodes struct {
		Columns []string
		Rows    [][]any
		LeftOut int `json:"left_out"`
	}
	Callers struct {
		Rows    [][]any
		LeftOut int `json:"left_out"`
	}
	Metrics   map[string]float64
	Instances []Instance
	Warnings  int
	State     State
	Pages     []Page
}

func snapshotOf(t testing.TB, c *Console) (s read, size int) {
	t.Helper()
	w := get(t, c, "snapshot")
	if w.Code != http.StatusOK {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	size = w.Body.Len()
	if err := json.Unmarshal(w.Body.Bytes(), &s); err != nil {
		t.Fatal(err)
	}
	return s, size
}

func TestASnapshotOf500NodesHas64KiBAtMost(t *testing.T) {
	callers := make([]ingress.CallerStatus, 1000)
	for i := range callers {
		callers[i] = ingress.CallerStatus{Name: fmt.Sprintf("caller-%d", i), Tenant: "tenant", Rate: 1000, RateLeft: 1000, Daily: 1e9, DailyUsed: int64(i)}
	}
	for name, c := range map[string]struct {
		nodes   []link.NodeDetails
		leftOut bool
	}{
		"500":                           {nodes: manyNodes(500, link.NodeUp)},
		"5000":                          {nodes: manyNodes(5000, link.NodeUp), leftOut: true},
		"500 with the longest ids":      {nodes: longest(500), leftOut: true},
		"500 that cannot be reached":    {nodes: manyNodes(500, link.NodeDown)},
		"one of 5000 cannot be reached": {nodes: append(manyNodes(5000, link.NodeUp), link.NodeDetails{Node: link.Node{ID: "the last one"}, State: link.NodeDown}), leftOut: true},
	} {
		w := &world{nodes: c.nodes, callers: callers, others: make([]Instance, 1000)}
		s, size := snapshotOf(t, w.console(t))
		t.Logf("%s: %d bytes, %d nodes, %d left out", name, size, len(s.Nodes.Rows), s.Nodes.LeftOut)
		if size > 64<<10 {
			t.Errorf("%s: %d bytes", name, size)
		}
		if len(s.Nodes.Rows)+s.Nodes.LeftOut != len(c.nodes) || s.Nodes.LeftOut > 0 != c.leftOut || len(s.Callers.Rows)+s.Callers.LeftOut != len(callers) {
			t.Errorf("%s: %d nodes and %d left out, %d callers and %d left out", name, len(s.Nodes.Rows), s.Nodes.LeftOut, len(s.Callers.Rows), s.Callers.LeftOut)
		}
		if last := c.nodes[len(c.nodes)-1]; last.State == link.NodeDown && !slices.ContainsFunc(s.Nodes.Rows, func(row []any) bool { return row[0] == last.ID }) {
			t.Errorf("%s: a node that cannot be reached is left out", name)
		}
		for _, row := range s.Nodes.Rows {
			if len(row) != len(s.Nodes.Columns) {
				t.Fatalf("%s: %v under %v", name, row, s.Nodes.Columns)
			}
		}
	}
}

func TestInstancesWithLongNamesLeaveRoomForNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{nodes: manyNodes(200, link.NodeUp), others: make([]Instance, 100)}
		for i := range w.others {
			w.others[i] = Instance{ID: strings.Repeat("<", 256), Address: "10.0.0.2:50053", URL: "http://" + strings.Repeat("&", 120)}
		}
		c := w.console(t)
		snapshotOf(t, c)
		synctest.Wait() // they are known with the next one
		time.Sleep(every)
		s, size := snapshotOf(t, c)
		if size > 64<<10 || len(s.Nodes.Rows) != 200 || len(s.Instances) == 0 {
			t.Errorf("%d bytes, %d nodes, %d instances", size, len(s.Nodes.Rows), len(s.Instances))
		}
	})
}

// Reasons may be words of others, and some are as many as there are nodes.
func TestLongReasonsAndManyLeaveRoomForNodes(t *testing.T) {
	long := strings.Repeat("<", 100_000)
	w := &world{
		nodes: manyNodes(100, link.NodeUp), pages: make([]Page, 1000),
		state: State{NotReady: slices.Repeat([]string{long}, 1000), ControllerTrouble: long, EtcdTrouble: long},
	}
	s, size := snapshotOf(t, w.console(t))
	if size > 64<<10 || len(s.Nodes.Rows) != 100 || len(s.Pages) != pagesMost || len(s.State.NotReady) != reasonsMost {
		t.Errorf("%d bytes, %d nodes, %d pages, %d reasons", size, len(s.Nodes.Rows), len(s.Pages), len(s.State.NotReady))
	}
	for _, text := range append(s.State.NotReady, s.State.ControllerTrouble, s.State.EtcdTrouble) {
		if len(text) > textMax+len("…") {
			t.Errorf("%d bytes of text", len(text))
		}
	}
}

// longest have ids that JSON makes longer still.
func longest(n int) []link.NodeDetails {
	all := manyNodes(n, link.NodeUp)
	for i := range all {
		all[i].ID = strings.Repeat("<", 256)
	}
	return all
}

// TestOneSnapshotASecondIsMadeForAllWhoLook, and none while nobody does.
func TestOneSnapshotASecondIsMadeForAllWhoLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{nodes: manyNodes(10, link.NodeUp)}
		c := w.console(t)
		made := func() uint64 { return w.set.GetOrCreateCounter("push_manager_console_snapshots_total").Get() }
		var viewers sync.WaitGroup
		for range 50 {
			viewers.Go(func() {
				for range 100 { // ten seconds
					get(t, c, "snapshot")
					time.Sleep(100 * time.Millisecond)
				}
			})
		}
		viewers.Wait()
		if n := made(); n != 10 {
			t.Errorf("%d snapshots in ten seconds", n)
		}
		time.Sleep(time.Hour)
		if n := made(); n != 10 {
			t.Errorf("%d snapshots while nobody looked", n-10)
		}
		if w.asked != 1 {
			t.Errorf("other instances were asked for %d times", w.asked)
		}
		if age := get(t, c, "snapshot").Header().Get("X-Snapshot-Age"); age != "0" {
			t.Errorf("a new snapshot is %s ms old", age)
		}
		time.Sleep(700 * time.Millisecond)
		if age := get(t, c, "snapshot").Header().Get("X-Snapshot-Age"); age != "700" {
			t.Errorf("a snapshot of 700 ms ago is %s ms old", age)
		}
	})
}

func TestOtherInstancesAreShownUntilTheyAreKnownNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{others: []Instance{{ID: "push-manager-2", Address: "10.0.0.2:50053", URL: "http://10.0.0.2:8053"}}}
		c := w.console(t)
		snapshotOf(t, c)
		synctest.Wait()
		time.Sleep(every)
		if s, _ := snapshotOf(t, c); !slices.Equal(s.Instances, w.others) {
			t.Errorf("%v", s.Instances)
		}
		c.cfg.Others = func(context.Context) ([]Instance, error) { return nil, errors.New("etcd is away") }
		time.Sleep(askEvery)
		snapshotOf(t, c)
		synctest.Wait()
		time.Sleep(every)
		if s, _ := snapshotOf(t, c); len(s.Instances) != 1 {
			t.Errorf("%v while etcd is away", s.Instances)
		}
	})
}

// TestTimesOfAcknowledgementsAreThoseOfLately, not of the whole life of a node.
func TestTimesOfAcknowledgementsAreThoseOfLately(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{nodes: manyNodes(1, link.NodeUp)}
		c := w.console(t)
		p99 := func() float64 {
			s, _ := snapshotOf(t, c)
			return s.Nodes.Rows[0][slices.Index(s.Nodes.Columns, "ack_p99_ms")].(float64)
		}
		if ms := p99(); ms > 5 {
			t.Fatalf("%v ms", ms)
		}
		for range 3 { // slow from now on
			time.Sleep(ackWindow)
			w.nodes[0].Acks = slices.Clone(w.nodes[0].Acks)
			w.nodes[0].Acks[8] += 100 // 100 to 250 ms
			p99()
		}
		if ms := p99(); ms < 100 || ms > 250 {
			t.Errorf("%v ms, want 100 to 250", ms)
		}
	})
}

func TestMetricsAreThoseOfTheDocumentsWithoutThePrefix(t *testing.T) {
	w := &world{set: metrics.NewSet()}
	w.set.GetOrCreateCounter("push_manager_push_success_total").Add(7)
	w.set.GetOrCreateCounter(`push_manager_refused_total{priority="low",reason="busy"}`).Add(3)
	w.set.GetOrCreateCounter(`push_manager_refused_total{priority="low",reason="rate"}`)
	w.set.GetOrCreateGauge("push_manager_pushes_in_flight", func() float64 { return 5 })
	w.set.GetOrCreateCounter("push_manager_not_for_the_console_total").Add(1)
	s, _ := snapshotOf(t, w.console(t))
	want := map[string]float64{"push_success_total": 7, `refused_total{priority="low",reason="busy"}`: 3, "pushes_in_flight": 5}
	if fmt.Sprint(s.Metrics) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", s.Metrics, want)
	}
}

func TestACompressedSnapshotIsTheSame(t *testing.T) {
	w := &world{nodes: manyNodes(500, link.NodeUp)}
	c := w.console(t)
	plain, packed := get(t, c, "snapshot"), get(t, c, "snapshot", "Accept-Encoding", "gzip, br")
	if packed.Header().Get("Content-Encoding") != "gzip" || packed.Body.Len() > plain.Body.Len()/4 {
		t.Fatalf("%v, %d of %d bytes", packed.Header(), packed.Body.Len(), plain.Body.Len())
	}
	z, err := gzip.NewReader(packed.Body)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(z); err != nil || string(b) != plain.Body.String() {
		t.Errorf("%v, %d bytes, want %d", err, len(b), plain.Body.Len())
	}
}

// TestThePageLoadsWhatIsOursAlone: policy, headers, and nothing in its files that the policy would stop.
func TestThePageLoadsWhatIsOursAlone(t *testing.T) {
	c := (&world{}).console(t)
	inline := regexp.MustCompile(`(?i)<script>|<style|\sstyle=|\son[a-z]+=|javascript:|https?://[^" ]*["'] *(?:rel|type|src)`)
	danger := regexp.MustCompile(`innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function`)
	pages := 0
	err := fs.WalkDir(page, "page", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name = strings.TrimPrefix(name, "page/")
		w := get(t, c, name)
		h := w.Header()
		policy := h.Get("Content-Security-Policy")
		if w.Code != http.StatusOK || !strings.HasPrefix(policy, "default-src 'none'; script-src 'self'; style-src 'self';") || strings.Contains(policy, "unsafe") ||
			!strings.Contains(policy, "frame-ancestors 'none'") || h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Set-Cookie") != "" {
			t.Errorf("%s: %d %v", name, w.Code, h)
		}
		if again := get(t, c, name, "If-None-Match", h.Get("ETag")); again.Code != http.StatusNotModified {
			t.Errorf("%s: %d for one who has it", name, again.Code)
		}
		text := w.Body.String()
		if found := inline.FindString(text); strings.HasSuffix(name, ".html") && found != "" {
			t.Errorf("%s has %q", name, found)
		}
		if found := danger.FindString(text); strings.HasSuffix(name, ".js") && !strings.HasPrefix(name, "uplot/") && found != "" {
			t.Errorf("%s has %q", name, found)
		}
		pages++
		return nil
	})
	if err != nil || pages < 10 {
		t.Errorf("%v, %d files", err, pages)
	}
	if w := get(t, c, "../../etc/passwd"); w.Code != http.StatusNotFound {
		t.Errorf("%d for a path that is not there", w.Code)
	}
	if w := get(t, c, ""); !strings.Contains(w.Body.String(), "Push-Manager console") {
		t.Errorf("%s at /console/", w.Body)
	}
}

func TestWarningsAreTheLastOnesOfTheLogAndBounded(t *testing.T) {
	ring := NewWarnings(3)
	var inner strings.Builder
	log := slog.New(ring.Handler(slog.NewTextHandler(&inner, &slog.HandlerOptions{Level: slog.LevelError})))
	log.Info("not kept")
	log.With("node", "n-1").WithGroup("g").Warn("first", "a", 1, slog.Group("h", "b", "two\nlines"))
	log.Warn(strings.Repeat("x", 10_000), "y", strings.Repeat("y", 10_000)) //nolint:sloglint // it is about long ones
	log.Error("third", "err", errors.New("<img src=x onerror=alert(1)>"))
	log.Warn("fourth")
	if strings.Contains(inner.String(), "first") || !strings.Contains(inner.String(), "third") {
		t.Errorf("the log has other levels than before: %s", inner.String())
	}
	var got struct {
		Total   int
		Entries []warning
	}
	if err := json.Unmarshal(ring.json(), &got); err != nil {
		t.Fatal(err)
	}
	if got.Total != 4 || len(got.Entries) != 3 || got.Entries[0].Message != "fourth" || got.Entries[1].Message != "third" || len(got.Entries[2].Message) != messageMax {
		t.Errorf("%+v", got)
	}
	if v := got.Entries[1].Values; len(v) != 1 || v[0] != [2]string{"err", "<img src=x onerror=alert(1)>"} {
		t.Errorf("%q", v)
	}
	ring = NewWarnings(3)
	log = slog.New(ring.Handler(slog.DiscardHandler))
	log.With("node", "n-1").WithGroup("g").Warn("first", "a", 1, slog.Group("h", "b", "two\nlines"))
	if v := fmt.Sprint(ring.last[0].Values); v != "[[node n-1] [g.a 1] [g.h.b two lines]]" {
		t.Errorf("%s", v)
	}
}

// TestWarningsAreEncodedOnceForAllWhoLook, however many lines come: and none is missing a second later.
func TestWarningsAreEncodedOnceForAllWhoLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ring := NewWarnings(3)
		log := slog.New(ring.Handler(slog.DiscardHandler))
		log.Warn("first")
		encodings := map[*byte]bool{}
		for range 500 { // 50 viewers, ten seconds
			encodings[&ring.json()[0]] = true
			time.Sleep(20 * time.Millisecond)
		}
		if len(encodings) != 1 {
			t.Errorf("%d encodings of one line", len(encodings))
		}
		clear(encodings)
		for range 500 {
			log.Warn("one more")
			encodings[&ring.json()[0]] = true
			time.Sleep(20 * time.Millisecond)
		}
		if len(encodings) != 10 {
			t.Errorf("%d encodings in ten seconds in which there was always a new line", len(encodings))
		}
		log.Warn("the last one")
		time.Sleep(every)
		if text := string(ring.json()); !strings.Contains(text, `"total":502`) || !strings.Contains(text, "the last one") {
			t.Errorf("a second later: %s", text)
		}
	})
}

// TestCallersNearestToALimitAreShown, as if all were sorted: whichever way they come in.
func TestCallersNearestToALimitAreShown(t *testing.T) {
	all := make([]ingress.CallerStatus, 5000)
	for i := range all {
		all[i] = ingress.CallerStatus{Name: fmt.Sprintf("caller-%04d", i), Rate: 10_000, RateLeft: i / 2}
	}
	sorted := slices.Clone(all)
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	s, _ := snapshotOf(t, (&world{callers: all}).console(t))
	if len(s.Callers.Rows) < 50 || len(s.Callers.Rows)+s.Callers.LeftOut != len(all) {
		t.Fatalf("%d callers, %d left out", len(s.Callers.Rows), s.Callers.LeftOut)
	}
	for i, row := range s.Callers.Rows {
		if row[0] != sorted[i].Name {
			t.Fatalf("row %d is %v, want %s", i, row, sorted[i].Name)
		}
	}
	short := make([]ingress.CallerStatus, 1000) // as many as possible fit
	for i := range short {
		short[i].Name = string(rune('a' + i%26))
	}
	if s, _ := snapshotOf(t, (&world{callers: short}).console(t)); len(s.Callers.Rows) != callersMost {
		t.Errorf("%d of %d callers of the shortest rows", len(s.Callers.Rows), callersMost)
	}
}

func BenchmarkCallers(b *testing.B) {
	all := make([]ingress.CallerStatus, 10_000)
	for i := range all {
		all[i] = ingress.CallerStatus{Name: fmt.Sprintf("caller-%d", i), Rate: 1000, RateLeft: rand.IntN(1000)}
	}
	for b.Loop() {
		callers(all)
	}
}

func BenchmarkSnapshot(b *testing.B) {
	for _, n := range []int{3, 500} {
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			c := (&world{nodes: manyNodes(n, link.NodeUp)}).console(b)
			for b.Loop() {
				c.last = nil
				if _, err := c.snapshot(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
