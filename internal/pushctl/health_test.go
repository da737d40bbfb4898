package pushctl

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestHealthExitsWithWhatAProgramSaysOfItself(t *testing.T) {
	held := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = w.Write([]byte("etcd: \x1b[31mno answer\nnodes: none\n" + strings.Repeat("x", 1<<20)))
	})
	mux.HandleFunc("/hangs", func(http.ResponseWriter, *http.Request) { <-held })
	server := httptest.NewServer(mux)
	t.Cleanup(func() { close(held); server.Close() })
	for line, want := range map[string]struct {
		code int
		text string
	}{
		"URL/healthz":                     {exitOK, "200 ok\n"},
		"-o json URL/healthz":             {exitOK, `{"status":200,"text":"ok"}` + "\n"},
		"URL/readyz":                      {exitError, "503 etcd: "},
		"-o json URL/readyz":              {exitError, `{"status":503,"text":"etcd: `},
		"URL/nowhere":                     {exitError, "404 "},
		"--timeout 50ms URL/hangs":        {exitError, "no answer: "},
		"http://127.0.0.1:1/healthz":      {exitError, "connection refused"},
		"https://127.0.0.1:1/healthz":     {exitUsage, "url: "},
		"localhost:9093":                  {exitUsage, "url: "},
		"http://":                         {exitUsage, "url: "},
		"--timeout 0s URL/healthz":        {exitUsage, "--timeout"},
		"URL/healthz http://127.0.0.1:1/": {exitUsage, "unexpected argument"},
	} {
		began := time.Now()
		code, out, errOut := pushctl(t, "", append([]string{"health"}, strings.Fields(strings.ReplaceAll(line, "URL", server.URL))...)...)
		if code != want.code || !strings.Contains(out+errOut, want.text) || code == 0 && out != want.text {
			t.Errorf("%s: exit %d after %v, %.200q, %.200q", line, code, time.Since(began), out, errOut)
		}
		if len(out) > 3*maxHealth || strings.Contains(out, "\x1b") || strings.Count(out, "\n") > 1 {
			t.Errorf("%s: what a program says of itself is not one plain line: %.200q", line, out)
		}
	}
}
