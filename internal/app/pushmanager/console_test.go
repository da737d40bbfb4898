package pushmanager

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
)

// fetch sends a GET.
func fetch(t *testing.T, url string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
		if header[i] == "Host" {
			req.Host = header[i+1]
		}
	}
	resp, err := webClient(t, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// consoleData are the paths that need the right.
var consoleData = []string{"snapshot", "settings", "warnings"}

// TestTheConsoleShowsThePartsOfTheProgram: a part that is not connected to it would be missing in what it shows.
func TestTheConsoleShowsThePartsOfTheProgram(t *testing.T) {
	m, url := webAt(t, map[string]string{"MANAGER_ID": "pm-of-the-console", "MAX_IN_FLIGHT": "777"})
	defer drain(t, m, 8*time.Second)
	if resp, body := postTo(t, webClient(t, false), url+"/v1/users/nobody/messages"); resp.StatusCode != http.StatusOK {
		t.Fatalf("%d %s", resp.StatusCode, body)
	}
	m.log.Warn("said to the log", "by", "the test")
	if resp, body := fetch(t, url+"/console/"); resp.StatusCode != http.StatusOK || !strings.Contains(body, "Push-Manager console") || resp.Header.Get("Content-Security-Policy") == "" {
		t.Errorf("%d %v %s", resp.StatusCode, resp.Header, body)
	}
	if resp, _ := fetch(t, url+"/console"); resp.Request.URL.Path != "/console/" || resp.StatusCode != http.StatusOK {
		t.Errorf("/console: %d at %s", resp.StatusCode, resp.Request.URL)
	}
	if resp, body := fetch(t, url+"/console/nothing.js"); resp.StatusCode != http.StatusNotFound || !strings.Contains(body, `"NOT_FOUND"`) && !strings.Contains(body, "not_found") {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	var s struct {
		About struct{ ID, GRPC string }
		State struct {
			Controller string
			EtcdSynced bool `json:"etcd_synced"`
		}
		Nodes     struct{ Rows [][]any }
		Metrics   map[string]float64
		Counts    map[string][]uint64 `json:"latency_counts"`
		Warnings  int
		Instances []struct{ ID, Address, URL string }
	}
	eventually(t, "the console knows of this instance", func() bool {
		_, body := fetch(t, url+"/console/snapshot")
		if err := json.Unmarshal([]byte(body), &s); err != nil {
			t.Fatal(err)
		}
		return len(s.Instances) == 1
	})
	if i := s.Instances[0]; i.ID != "pm-of-the-console" || i.URL != url || i.Address != m.GRPCAddr() {
		t.Errorf("%+v", i)
	}
	counted := 0
	for _, n := range s.Counts["PushToUser"] {
		counted += int(n)
	}
	if s.About.ID != "pm-of-the-console" || s.About.GRPC != m.GRPCAddr() || !s.State.EtcdSynced || s.State.Controller == "" || s.Warnings < 1 || counted != 1 ||
		s.Metrics["push_offline_total"] != 1 || s.Metrics["push_total"] != 1 {
		t.Errorf("%+v", s)
	}
	for _, name := range []string{"pushes_in_flight", "api_connections", "registration_up", "route_lookups_total", "api_space_limit_bytes", `api_requests_total{api="PushToUser",status="failed"}`} {
		if _, ok := s.Metrics[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
	if _, body := fetch(t, url+"/console/warnings"); !strings.Contains(body, `"message":"said to the log"`) || !strings.Contains(body, `["by","the test"]`) {
		t.Error(body)
	}
	if _, body := fetch(t, url+"/console/settings"); !strings.Contains(body, `["max_in_flight","777","environment variable MAX_IN_FLIGHT"]`) || !strings.Contains(body, `["route_cache_ttl","1s","default"]`) {
		t.Error(body)
	}
}

// TestAForeignHostSeesNoConsole: somebody may have pointed a name at this machine, for a page of theirs.
func TestAForeignHostSeesNoConsole(t *testing.T) {
	m, url := webAt(t, map[string]string{"HTTP_ALLOWED_ORIGINS": "https://pm.example"})
	defer drain(t, m, 8*time.Second)
	for host, want := range map[string]int{
		"evil.example": http.StatusForbidden, "evil.example:8053": http.StatusForbidden, "pm.example": http.StatusOK, "localhost:8053": http.StatusOK, "127.0.0.1": http.StatusOK, "[::1]:8053": http.StatusOK,
	} {
		for _, name := range consoleData {
			if resp, body := fetch(t, url+"/console/"+name, "Host", host); resp.StatusCode != want || want != http.StatusOK && !strings.Contains(body, "FOREIGN_ORIGIN") {
				t.Errorf("%s at %s: %d, want %d: %.200s", name, host, resp.StatusCode, want, body)
			}
		}
	}
	for _, origin := range []string{"https://evil.example", "https://pm.example"} { // one that may push, too
		if resp, _ := fetch(t, url+"/console/snapshot", "Origin", origin); resp.StatusCode != http.StatusForbidden {
			t.Errorf("%d for a page of %s", resp.StatusCode, origin)
		}
	}
}

// TestTheConsoleNeedsARightOfItsOwn, which a caller of a tenant never has.
func TestTheConsoleNeedsARightOfItsOwn(t *testing.T) {
	files := authtest.New(t, "")
	keys, lines := map[string]string{}, ""
	for name, rights := range map[string]string{
		"console": `tenant: "*", allow: [{methods: [Console]}]`, "all": `tenant: "*", ` + allRights, "pushes": `tenant: "*", allow: [{methods: [PushToUser, Explain], users: ["*"]}]`,
		"tenant": `tenant: acme, ` + allRights,
	} {
		key, id := files.NewKey(time.Time{})
		keys[name] = key
		lines += fmt.Sprintf("- {name: %s, match: [{key: %s}], %s}\n", name, id, rights)
	}
	files.WritePolicy("version: 1\ntenants: {acme: {rate: 1000}}\ncallers:\n" + lines)
	m, url := webAt(t, map[string]string{"AUTH_MODE": "required", "AUTH_POLICY_FILE": files.Policy, "AUTH_API_KEYS_FILE": files.Keys})
	defer drain(t, m, 8*time.Second)
	if resp, _ := fetch(t, url+"/console/"); resp.StatusCode != http.StatusOK {
		t.Errorf("%d for the page, which knows nothing", resp.StatusCode)
	}
	for name, want := range map[string]int{
		"": http.StatusUnauthorized, "wrong": http.StatusUnauthorized, "pushes": http.StatusForbidden, "tenant": http.StatusForbidden, "console": http.StatusOK, "all": http.StatusOK,
	} {
		var header []string
		if name != "" {
			header = []string{"Authorization", "Bearer " + keys[name]}
		}
		for _, path := range consoleData {
			resp, body := fetch(t, url+"/console/"+path, header...)
			leaks := strings.Contains(body, "push-manager-1") || strings.Contains(body, "grpc_port")
			if resp.StatusCode != want || want != http.StatusOK && leaks || want == http.StatusForbidden && !strings.Contains(body, "Console: method: the console is not allowed to you") {
				t.Errorf("%s of %q: %d, want %d: %.200s", path, name, resp.StatusCode, want, body)
			}
			if want == http.StatusUnauthorized && resp.Header.Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("%s of %q: %v", path, name, resp.Header)
			}
		}
	}
	_, text := get(t, "http://"+m.HTTPAddr()+"/metrics")
	for _, line := range []string{`push_manager_auth_failures_total{reason="permission"} 6`, `push_manager_auth_failures_total{reason="no_credential"} 3`} {
		if !strings.Contains(text, line) {
			t.Errorf("the metrics have no %s", line)
		}
	}
	// A caller that has pushed is among the callers.
	if resp, body := postTo(t, webClient(t, false), url+"/v1/users/nobody/messages", "Authorization", "Bearer "+keys["tenant"]); resp.StatusCode != http.StatusOK {
		t.Fatalf("%d %s", resp.StatusCode, body)
	}
	time.Sleep(1100 * time.Millisecond) // until there is another snapshot
	if _, body := fetch(t, url+"/console/snapshot", "Authorization", "Bearer "+keys["console"]); !strings.Contains(body, `["tenant","acme",0,0,0,0,1000,`) {
		t.Errorf("%s", body)
	}

}

// TestSecretsAreMaskedInTheConsole as with --print-config.
func TestSecretsAreMaskedInTheConsole(t *testing.T) {
	var c Config
	const secret = "not to be shown"
	if err := cli.Fill(&c, map[string]string{"ETCD_USERNAME": "u", "ETCD_PASSWORD": secret, "STORE": "nats://localhost:4222", "STORE_USERNAME": "v", "STORE_PASSWORD": secret}); err != nil {
		t.Fatal(err)
	}
	values := c.settings.Values()
	if text := fmt.Sprint(values); strings.Contains(text, secret) {
		t.Errorf("a secret is shown: %s", text)
	}
	for _, want := range []config.Value{
		{Name: "etcd.password", Value: "********", Source: "environment variable ETCD_PASSWORD"}, {Name: "store_password", Value: "********", Source: "environment variable STORE_PASSWORD"},
		{Name: "etcd.username", Value: "u", Source: "environment variable ETCD_USERNAME"},
	} {
		if !slices.Contains(values, want) {
			t.Errorf("%v is not there", want)
		}
	}
}
