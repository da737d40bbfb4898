package web

import (
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/VictoriaMetrics/metrics"
)

func TestOnlyPagesOfListedOriginsAndOursMayCall(t *testing.T) {
	list, err := newOrigins([]string{"https://chat.example", "http://127.0.0.1:3000"})
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{origins: list, errors: newErrorWriter(), metrics: newInstruments(metrics.NewSet())}
	for name, tc := range map[string]struct {
		origin, host string
		tls          bool
		may, told    bool
	}{
		"no page":                    {"", "push.example", false, true, false},
		"listed":                     {"https://chat.example", "push.example", true, true, true},
		"with another port":          {"https://chat.example:8443", "push.example", true, false, false},
		"with another scheme":        {"http://chat.example", "push.example", true, false, false},
		"below it":                   {"https://a.chat.example", "push.example", true, false, false},
		"ours, over TLS":             {"https://push.example", "push.example", true, true, false},
		"ours, by address":           {"http://192.0.2.1:8053", "192.0.2.1:8053", false, true, false},
		"ours, by address of IPv6":   {"http://[::1]:8053", "[::1]:8053", false, true, false},
		"ours, as localhost":         {"http://localhost:8053", "localhost:8053", false, true, false},
		"a name that points to us":   {"http://evil.example:8053", "evil.example:8053", false, false, false},
		"another port of ours":       {"http://localhost:8080", "localhost:8053", false, false, false},
		"none, as a sandbox has":     {"null", "localhost:8053", false, false, false},
		"ours, but said to be plain": {"http://push.example", "push.example", true, false, false},
	} {
		for _, method := range []string{http.MethodPost, http.MethodOptions} {
			r := httptest.NewRequest(method, "/v1/broadcasts", nil)
			r.Host = tc.host
			if tc.tls {
				r.TLS = &tls.ConnectionState{}
			}
			if tc.origin != "" {
				r.Header.Set("Origin", tc.origin)
			}
			if method == http.MethodOptions {
				r.Header.Set("Access-Control-Request-Method", http.MethodPost)
			}
			w := httptest.NewRecorder()
			goesOn := s.admitOrigin(&response{ResponseWriter: w}, r)
			preflight := method == http.MethodOptions && tc.told
			if goesOn != (tc.may && !preflight) || preflight && w.Code != http.StatusNoContent || !tc.may && w.Code != http.StatusForbidden {
				t.Errorf("%s, %s: goes on: %v, %d", name, method, goesOn, w.Code)
			}
			if told := w.Header().Get("Access-Control-Allow-Origin"); (told == tc.origin && told != "") != tc.told || w.Header().Get("Access-Control-Allow-Credentials") != "" {
				t.Errorf("%s, %s: %v", name, method, w.Header())
			}
		}
	}
}
