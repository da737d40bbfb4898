package telemetry_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/internal/telemetry"
)

func TestMain(m *testing.M) {
	// The pool library keeps two goroutines of a pool of its own from the start on.
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent())
}

func startHTTP(t *testing.T, cfg telemetry.HTTPConfig) (get func(path string, header ...string) (int, string)) {
	t.Helper()
	if cfg.Address == "" {
		cfg.Address = "127.0.0.1:0"
	}
	h, err := telemetry.StartHTTP(cfg)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		if err := h.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return func(path string, header ...string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+h.Addr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i+1 < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
}

func TestMetricsShowOursAndThoseOfGoAndTheProcess(t *testing.T) {
	set := metrics.NewSet()
	depth := set.NewGauge("push_manager_test_depth", nil)
	get := startHTTP(t, telemetry.HTTPConfig{Metrics: set, Collect: func() { depth.Set(7) }})
	status, body := get("/metrics")
	if status != http.StatusOK {
		t.Fatal(status)
	}
	for _, want := range []string{"push_manager_test_depth 7\n", "go_goroutines ", "process_resident_memory_bytes ", "process_start_time_seconds "} {
		if !strings.Contains(body, want) {
			t.Errorf("lacks %q", want)
		}
	}
}

func TestMetricsAreCompressedForClientsThatAcceptGzip(t *testing.T) {
	set := metrics.NewSet()
	for i := range 1000 {
		set.NewCounter(`push_manager_test_total{n="` + strconv.Itoa(i) + `"}`).Set(uint64(i))
	}
	h, err := telemetry.StartHTTP(telemetry.HTTPConfig{Address: "127.0.0.1:0", Metrics: set})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Close(context.Background()) }()
	// Without this the client of net/http asks for gzip by itself, and unpacks.
	client := &http.Client{Transport: &http.Transport{DisableCompression: true, DisableKeepAlives: true}}
	scrape := func(accept, encoding string) (text string, size int) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+h.Addr().String()+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept-Encoding", accept)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		if got := resp.Header.Get("Content-Encoding"); got != encoding || resp.Header.Get("Content-Type") != "text/plain; version=0.0.4; charset=utf-8" {
			t.Errorf("a client that accepts %q gets %q, %v", accept, got, resp.Header)
		}
		raw, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		plain := raw
		if encoding == "gzip" {
			r, err := gzip.NewReader(bytes.NewReader(raw))
			if err != nil {
				t.Fatal(err)
			}
			if plain, err = io.ReadAll(r); err != nil {
				t.Fatal(err)
			}
		}
		// What goes before ours changes from one reading to the next.
		_, text, _ = strings.Cut(string(plain), "push_manager_test_total")
		return text, len(raw)
	}
	plain, full := scrape("identity", "")
	packed, small := scrape("gzip", "gzip")
	if strings.Count(plain, "\n") != 1000 || packed != plain {
		t.Errorf("%d lines plain, and compressed the same: %v", strings.Count(plain, "\n"), packed == plain)
	}
	if small > full/4 {
		t.Errorf("%d bytes of %d", small, full)
	}
	if both, _ := scrape("zstd, gzip;q=0.5", "gzip"); both != plain {
		t.Error("a client that accepts zstd, too, gets another text")
	}
}

func TestReadinessNamesItsReasonsWhileHealthStaysGreen(t *testing.T) {
	var reasons []string
	get := startHTTP(t, telemetry.HTTPConfig{NotReady: func(...string) []string { return reasons }})
	for _, tc := range []struct {
		reasons []string
		status  int
		body    string
	}{
		{[]string{"etcd has not answered", "draining"}, 503, "etcd has not answered\ndraining\n"},
		{nil, 200, "ok\n"},
	} {
		reasons = tc.reasons
		if status, body := get("/readyz"); status != tc.status || body != tc.body {
			t.Errorf("readyz %d %q, want %d %q", status, body, tc.status, tc.body)
		}
		if status, _ := get("/healthz"); status != 200 {
			t.Errorf("healthz %d", status)
		}
	}
}

func TestReadinessLeavesOutTheChecksThatAreNamed(t *testing.T) {
	get := startHTTP(t, telemetry.HTTPConfig{Checks: []string{"nodes", "controller"}, NotReady: func(exclude ...string) []string { return exclude }})
	for query, want := range map[string]struct {
		status int
		body   string
	}{
		"":                                   {200, "ok\n"},
		"?exclude=":                          {200, "ok\n"},
		"?exclude=controller,nodes":          {503, "controller\nnodes\n"},
		"?exclude=nodes&exclude=controller,": {503, "nodes\ncontroller\n"},
		"?exclude=nodes,draining":            {400, "exclude: there is no such check. There are: nodes,controller\n"},
		"?exclude=Nodes":                     {400, "exclude: there is no such check. There are: nodes,controller\n"},
	} {
		if status, body := get("/readyz" + query); status != want.status || body != want.body {
			t.Errorf("readyz%s: %d %q, want %d %q", query, status, body, want.status, want.body)
		}
	}
}

func TestProfilesAreForThisMachineOnly(t *testing.T) {
	local, remote := startHTTP(t, telemetry.HTTPConfig{}), startHTTP(t, telemetry.HTTPConfig{PprofRemote: true})
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/goroutine?debug=1", "/debug/pprof/symbol"} {
		if status, _ := local(path); status != http.StatusOK {
			t.Errorf("%s from here: %d", path, status)
		}
		if status, _ := local(path, "X-Forwarded-For", "10.0.0.1"); status != http.StatusForbidden {
			t.Errorf("%s through a proxy: %d", path, status)
		}
		if status, _ := remote(path, "X-Forwarded-For", "10.0.0.1"); status != http.StatusOK {
			t.Errorf("%s with PprofRemote: %d", path, status)
		}
	}
	// The command line may hold what was meant for this process alone.
	if status, body := local("/debug/pprof/cmdline"); status != http.StatusNotFound || strings.Contains(body, os.Args[0]) {
		t.Errorf("the command line: %d %q", status, body)
	}
	if address := outsideAddress(t); address != "" {
		get := startHTTP(t, telemetry.HTTPConfig{Address: address})
		if status, body := get("/debug/pprof/"); status != http.StatusForbidden || !strings.Contains(body, "PPROF_REMOTE") {
			t.Errorf("from %s: %d %q", address, status, body)
		}
	}
}

// outsideAddress is an address of this machine that is not loopback, "" if it has
// none.
func outsideAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() && ip.IP.To4() != nil {
			return net.JoinHostPort(ip.IP.String(), "0")
		}
	}
	return ""
}

func TestNothingElseIsServed(t *testing.T) {
	other := "/default-mux/" + strconv.FormatUint(rand.Uint64(), 10)    // the default mux outlives a run
	http.HandleFunc(other, func(http.ResponseWriter, *http.Request) {}) //nolint:forbidigo // What must not be served.
	get := startHTTP(t, telemetry.HTTPConfig{})
	for path, want := range map[string]int{other: 404, "/nope": 404, "/": 200} {
		if status, _ := get(path); status != want {
			t.Errorf("%s: %d, want %d", path, status, want)
		}
	}
	if status, body := get("/healthz", "X-Large", strings.Repeat("x", 64<<10)); status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("64 KiB of headers: %d %q", status, body)
	}
}

func TestCloseDoesNotWaitForASlowReader(t *testing.T) {
	block := make(chan struct{})
	defer close(block)
	entered := make(chan struct{})
	h, err := telemetry.StartHTTP(telemetry.HTTPConfig{Address: "127.0.0.1:0", NotReady: func(...string) []string {
		close(entered)
		<-block
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", h.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-entered
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if err := h.Close(ctx); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("close took %v", took)
	}
}

func TestAddressInUseIsAnError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if _, err := telemetry.StartHTTP(telemetry.HTTPConfig{Address: l.Addr().String()}); err == nil {
		t.Error("no error")
	}
}
