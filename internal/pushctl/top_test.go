package pushctl

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"
)

// instance serves metrics that grow with each look. begun is the look from which on it counts anew.
func instance(t *testing.T, begun int64, links string) (address string) {
	t.Helper()
	var looks atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := looks.Add(1) + 10
		if begun > 0 && n >= begun+10 {
			n -= begun + 9
		}
		if r.URL.Path != "/metrics" {
			http.NotFound(w, r)
			return
		}
		_, _ = fmt.Fprintf(w, `# TYPE push_manager_api_requests_total counter
push_manager_api_requests_total{api="PushToRoom",status="success"} %d
push_manager_api_requests_total{api="PushToUser",status="failed"} %d
push_manager_push_success_total %d
push_manager_push_failed_total %d
# TYPE push_manager_api_latency_seconds histogram
push_manager_api_latency_seconds_bucket{api="PushToRoom",le="0.001"} %d
push_manager_api_latency_seconds_bucket{api="PushToRoom",le="0.01"} %d
push_manager_api_latency_seconds_bucket{api="PushToRoom",le="+Inf"} %d
push_manager_api_latency_seconds_sum{api="PushToRoom"} 1
push_manager_api_latency_seconds_count{api="PushToRoom"} %d
push_manager_pushes_in_flight 3
push_manager_ready %d
push_manager_not_ready{reason="controller"} %d
push_manager_build_info{version="v1%s",go="go"} 1
%s
`, 60*n, 40*n, 90*n, 10*n, 50*n, 100*n, 100*n, 100*n, b2i(begun == 0), b2i(begun > 0), "\x1b", links)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestTopAndWatchShowWhatHappenedBetweenTwoLooks(t *testing.T) {
	home(t)
	const up = `push_manager_node_connections{node_id="n1"} 4
push_manager_node_connections{node_id="n2"} 0
push_manager_node_queue_bytes{node_id="n1"} 2048
push_manager_node_queue_age_seconds{node_id="n1"} 1.5`
	const alsoUp = `push_manager_node_connections{node_id="n1"} 4
push_manager_node_connections{node_id="n2"} 4`
	first, second := instance(t, 0, up), instance(t, 2, alsoUp)
	list := first + "," + "http://" + second + "/metrics,127.0.0.1:1"
	code, out, errOut := pushctl(t, "", "top", "-o", "json", "--interval=100ms", "--count=2", "--metrics", list)
	if code != exitOK || errOut != "" || strings.Count(out, "\n") != 2 {
		t.Fatalf("exit %d, %q, %q", code, out, errOut)
	}
	for i, line := range strings.Split(strings.TrimSpace(out), "\n") {
		var v view
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatal(err)
		}
		if len(v.Instances) != 3 || v.Ready != 1 || v.Nodes != 2 || v.NodesUp != 1 {
			t.Fatalf("%+v", v)
		}
		// What grew between two looks. The second instance begins anew between the first and the second, and so counts 100, too.
		for j, r := range []rates{v.Instances[0].rates, v.Instances[1].rates} {
			pushes, delivered := r.Pushes*v.Seconds, r.Delivered*v.Seconds
			if pushes < 40 || pushes > 250 || // 100, over times that differ a little from instance to instance
				math.Abs(delivered-0.9*pushes) > 1 || math.Abs(r.Failed*v.Seconds-0.1*pushes) > 1 {
				t.Errorf("line %d, instance %d: %.1f pushes, %.1f delivered in %v s", i, j, pushes, delivered, v.Seconds)
			}
			if r.P50 == nil || *r.P50 != 1 || *r.P99 < 9 || *r.P99 > 10 || r.InFlight != 3 {
				t.Errorf("%+v", r)
			}
		}
		if v.Total.InFlight != 6 || v.Instances[2].Error == "" || v.Instances[1].NotReady[0] != "controller" || v.Instances[0].Version != "v1 " {
			t.Errorf("%+v", v)
		}
		if n := v.Links[0]; n.ID != "n1" || n.Links != 8 || n.QueueBytes != 2048 || n.QueueAge != 1.5 || n.Without != 0 {
			t.Errorf("%+v", n)
		}
		if n := v.Links[1]; n.ID != "n2" || n.Without != 1 {
			t.Errorf("%+v", n)
		}
	}
	for command, wants := range map[string][]string{
		"top":   {"instances 1 of 3", "nodes 1 of 2", "PUSH/S", "all", "127.0.0.1:1 does not answer", second + " is not ready: controller", "n1", "2.0 KiB", "down for 1 of 3"},
		"watch": {"PUSH/S", "1/2  1/3"},
	} {
		code, out, errOut := pushctl(t, "", command, "--interval=100ms", "--count=1", "--metrics", list)
		if code != exitOK || errOut != "" || strings.Contains(out, "\x1b") {
			t.Errorf("%s: exit %d, %q, %q", command, code, out, errOut)
		}
		for _, want := range wants {
			if !strings.Contains(out, want) {
				t.Errorf("%s: %q is not in\n%s", command, want, out)
			}
		}
	}
}

func TestTopAndWatchAreRefusedWhatTheyCannotShow(t *testing.T) {
	home(t)
	text := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("\x1b[31m{{{")) }))
	defer text.Close()
	away := httptest.NewServer(http.RedirectHandler("http://127.0.0.1:1/", http.StatusFound))
	defer away.Close()
	for line, want := range map[string]struct {
		code int
		text string
	}{
		"--metrics=":              {exitUsage, "--metrics: give 1 to 256"},
		"--metrics=https://a:1":   {exitUsage, "is not HOST:PORT"},
		"--metrics=a:1/x":         {exitUsage, "is not HOST:PORT"},
		"--metrics=user:pass@a:1": {exitUsage, "is not HOST:PORT"},
		"--interval=1ms":          {exitUsage, "--interval"},
		"--count=-1":              {exitUsage, "--count"},
		"--metrics=127.0.0.1:1":   {exitError, "there are no metrics at 127.0.0.1:1"},
		"--metrics=" + strings.TrimPrefix(text.URL, "http://"): {exitError, "what it answers are no metrics"},
		"--metrics=" + strings.TrimPrefix(away.URL, "http://"): {exitError, "status 302"},
	} {
		for _, command := range []string{"top", "watch"} {
			code, out, errOut := pushctl(t, "", command, line)
			if code != want.code || !strings.Contains(errOut, want.text) || strings.Contains(out+errOut, "\x1b") {
				t.Errorf("%s %s: exit %d, %q", command, line, code, errOut)
			}
		}
	}
}

// TestTopAndWatchShowARealPushManager: the names of the metrics are those that it exports.
func TestTopAndWatchShowARealPushManager(t *testing.T) {
	home(t)
	address, _, _ := dev(t)
	if code, _, errOut := pushctl(t, "", "user", "nobody", "x", "--address", address["Push-Manager"]); code != exitOffline {
		t.Fatalf("exit %d, %q", code, errOut)
	}
	s := newScraper([]string{address["metrics"]})
	defer s.close()
	now := s.all(t.Context())
	if now[0].err != nil {
		t.Fatal(now[0].err)
	}
	for _, name := range []string{
		"push_manager_api_requests_total", "push_manager_push_success_total", "push_manager_push_offline_total", "push_manager_push_stored_total", "push_manager_push_failed_total",
		"push_manager_push_unknown_total", "push_manager_refused_total", "push_manager_pushes_in_flight", "push_manager_api_latency_seconds", "push_manager_build_info", "push_manager_ready",
		"push_manager_not_ready", "push_manager_node_connections", "push_manager_node_queue_bytes", "push_manager_node_queue_age_seconds", "push_manager_node_stalled_links",
		"push_manager_node_breaks_total", "push_manager_link_ack_seconds",
	} {
		if len(now[0].families[name].GetMetric()) == 0 {
			t.Errorf("there is no %s", name)
		}
	}
	v := look(s.targets, []*sample{{at: now[0].at.Add(-1e9)}}, now)
	if v.Total.Offline != 1 || v.Total.Pushes != 1 || v.Ready != 1 || v.NodesUp != 2 || v.Total.P99 == nil {
		t.Errorf("%+v", v)
	}
}

func TestMetricsOfTooManyLinesAreNotTakenApart(t *testing.T) {
	for name, body := range map[string]string{"lines": strings.Repeat("a 1\n", maxParts+1), "labels": "a{" + strings.Repeat(`b="",`, maxParts+1) + "} 1\n"} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) }))
		s := newScraper([]string{strings.TrimPrefix(server.URL, "http://")})
		if _, err := s.one(t.Context(), s.targets[0]); err == nil || !strings.Contains(err.Error(), "lines and labels") {
			t.Errorf("%s: %v", name, err)
		}
		s.close()
		server.Close()
	}
}

func TestAPictureIsPaintedOverTheOneBefore(t *testing.T) {
	got := painted("a\nb\nc\n", 0)
	if want := "\x1b[Ha\x1b[K\r\nb\x1b[K\r\nc\x1b[K\x1b[J"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := painted("a\nb\nc\nd\n", 3); !strings.Contains(got, "b\x1b[K\r\nand 2 lines more") || strings.Contains(got, "c") {
		t.Errorf("%q", got)
	}
}

// TestAQuantileLiesInTheBucketThatHoldsIt, for any histogram.
func TestAQuantileLiesInTheBucketThatHoldsIt(t *testing.T) {
	if !math.IsNaN(quantile(0.5, nil)) || !math.IsNaN(quantile(0.5, map[float64]float64{1: 0, math.Inf(1): 0})) {
		t.Error("there is a quantile of nothing")
	}
	rapid.Check(t, func(t *rapid.T) {
		counts, bound, total := map[float64]float64{}, 0.0, 0.0
		var bounds []float64
		for range rapid.IntRange(1, 8).Draw(t, "buckets") {
			bound += rapid.Float64Range(0.001, 10).Draw(t, "width")
			total += float64(rapid.IntRange(0, 5).Draw(t, "count"))
			counts[bound] = total
			bounds = append(bounds, bound)
		}
		counts[math.Inf(1)] = total
		if total == 0 {
			return
		}
		q := rapid.Float64Range(0.01, 1).Draw(t, "q")
		got, low := quantile(q, counts), 0.0
		for _, bound := range bounds {
			if counts[bound] >= q*total {
				if got < low || got > bound {
					t.Fatalf("%v is not in %v to %v: %v", got, low, bound, counts)
				}
				return
			}
			low = bound
		}
	})
}

// FuzzMetrics: whatever an instance answers is shown or refused.
func FuzzMetrics(f *testing.F) {
	f.Add([]byte("push_manager_node_connections{node_id=\"n\"} NaN\n"))
	f.Add([]byte("# TYPE push_manager_api_latency_seconds histogram\npush_manager_api_latency_seconds_bucket{le=\"x\"} 1\n"))
	var body atomic.Pointer[[]byte]
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(*body.Load()) }))
	f.Cleanup(s.Close)
	scrape := newScraper([]string{strings.TrimPrefix(s.URL, "http://")})
	f.Cleanup(scrape.close)
	f.Fuzz(func(t *testing.T, text []byte) {
		body.Store(&text)
		now := scrape.all(t.Context())
		term := &terminal{format: formatWide}
		v := look(scrape.targets, now, now)
		if picture := term.picture(v); strings.ContainsFunc(picture, func(r rune) bool { return r < ' ' && r != '\n' }) {
			t.Fatalf("%q", picture)
		}
		if _, err := jsonOf(v); err != nil {
			t.Fatal(err)
		}
	})
}
