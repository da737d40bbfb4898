package pushmanager

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// collected is an OTLP receiver that keeps what it gets as text.
type collected struct {
	collector.UnimplementedTraceServiceServer
	book
}

func (c *collected) Export(ctx context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	_, _ = fmt.Fprintln(c, r, md)
	return &collector.ExportTraceServiceResponse{}, nil
}

// secrets are by name what must be seen nowhere. Parts of a secret are as bad as the whole.
type secrets map[string]string

// check fails for each secret that is in a text, in whole or in part.
func (s secrets) check(t *testing.T, where, text string) {
	t.Helper()
	for name, secret := range s {
		for begin := 0; begin+16 <= len(secret); begin += 8 {
			if strings.Contains(text, secret[begin:begin+16]) {
				t.Errorf("%s shows a part of %s", where, name)
				break
			}
		}
	}
}

// TestNoSecretIsShownAnywhere plants secrets in a running Push-Manager, uses them well and badly, and looks for them in all
// that it says.
func TestNoSecretIsShownAnywhere(t *testing.T) {
	const password, hsSecret = "etcd-PASSWORD-8c1f0b7d2e", "hs-SECRET-4d7a9be01c55f2038e6611aa97"
	etcd := etcdtest.Start(t)
	n, err := node.New(node.Config{NodeID: "n1", Sessions: &counter{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	gs := grpc.NewServer(node.ServerOptions()...)
	n.Attach(gs)
	registerNode(t, etcd.Client(), serveGRPC(t, "127.0.0.1:0", gs))
	etcd.EnableAuth("pm", password, "/")

	files := authtest.New(t, "")
	if err := os.WriteFile(files.Secret, []byte(hsSecret), 0o600); err != nil {
		t.Fatal(err)
	}
	key, keyID := files.NewKey(time.Time{})
	_, expiredID := files.NewKey(time.Now().Add(-time.Hour))
	policy := func(rate int) string {
		return fmt.Sprintf(`
version: 1
tenants: {shop: {rate: 10000, daily_pushes: 1000}}
callers:
  - {name: by-key, tenant: shop, match: [{key: %s}, {key: %s}], rate: %d, allow: [{methods: ["*"], users: ["*"], rooms: ["*"]}]}
  - {name: by-token, tenant: shop, match: [{jwt: {issuer: %q, subject: biz}}], allow: [{methods: [PushToUser], users: ["alice"]}]}
`, keyID, expiredID, rate, authtest.Issuer)
	}
	files.WritePolicy(policy(1000))
	token, expired := files.Token("biz", time.Hour), files.Token("biz", -time.Hour)
	ca := etcdtest.NewCA(t)
	certFile, keyFile := ca.Issue("127.0.0.1")
	pemText, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	planted := secrets{
		"the API key": key[len("pmk_")+len(keyID)+1:], "the token": token[strings.LastIndex(token, ".")+1:], "the expired token": expired[strings.LastIndex(expired, ".")+1:],
		"the password of etcd": password, "the secret of the issuer": hsSecret, "the private key": strings.Split(string(pemText), "\n")[1],
	}

	traces := &collected{}
	receiver := grpc.NewServer()
	collector.RegisterTraceServiceServer(receiver, traces)
	auditFile, configFile := filepath.Join(t.TempDir(), "audit.log"), filepath.Join(t.TempDir(), "config.yaml")
	yaml := fmt.Sprintf(`
auth:
  mode: required
  policy_file: %s
  api_keys_file: %s
  jwt: [{issuer: %q, audience: %q, hs_secret_file: %s}]
`, files.Policy, files.Keys, authtest.Issuer, authtest.Audience, files.Secret)
	if err := os.WriteFile(configFile, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{
		"GRPC_PORT": "0", "HTTP_PORT": "0", "METRICS_PORT": "0", "SHARDS": "2", "TLS_RELOAD_INTERVAL": "20ms", "LOG_LEVEL": "debug",
		"ETCD_ENDPOINTS": etcd.Endpoint(), "ETCD_USERNAME": "pm", "ETCD_PASSWORD": password,
		"CONTROLLER_ADDRESS": serveGRPC(t, "127.0.0.1:0", controllerServer()),
		"TLS_CERT_FILE":      certFile, "TLS_KEY_FILE": keyFile, "TLS_CLIENT_CA_FILE": ca.File,
		"TRACING_ENABLED": "true", "TRACING_ENDPOINT": "http://" + serveGRPC(t, "127.0.0.1:0", receiver),
		"AUDIT_FILE": auditFile, "AUDIT_ALLOWED_SAMPLE": "1", "QUOTA_ON_ERROR": "deny",
	}
	var c Config
	set := config.New()
	c.Bind(set)
	lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	if err := set.Load(config.Options{File: configFile, LookupEnv: lookup}); err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(set, lookup); err != nil {
		t.Fatal(err)
	}
	var printed bytes.Buffer
	if err := set.Write(&printed, false); err != nil {
		t.Fatal(err)
	}
	planted.check(t, "--print-config", printed.String())
	if !strings.Contains(printed.String(), "ETCD_PASSWORD") && !strings.Contains(printed.String(), "password") {
		t.Error("--print-config does not even name the password")
	}

	var log book
	m, err := Start(t.Context(), c, slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "ready", func() bool { return len(m.NotReady()) == 0 && m.Reachable() == 1 })
	conn, err := grpc.NewClient(m.GRPCAddr(), grpc.WithTransportCredentials(trust(t, ca.File, "", "")))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	api := pubsub.NewPushManagerServiceClient(conn)
	push := func(want codes.Code, headers ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), headers...), time.Minute)
		defer cancel()
		_, err := api.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "alice", Content: hello()})
		if status.Code(err) != want {
			t.Errorf("%v, want %v", err, want)
		}
		planted.check(t, "an error", fmt.Sprint(err, status.Convert(err).Details()))
	}

	// Well.
	const authorization = "authorization"
	push(codes.OK, authorization, "Bearer "+key)
	push(codes.OK, authorization, "Bearer "+token)
	// Badly.
	for _, header := range []string{
		key, "Basic " + key, "Bearer  " + key, "Bearer " + key + "x", "Bearer " + key[:len(key)-1], "Bearer pmk_" + expiredID + key[len("pmk_")+len(expiredID):],
		"Bearer " + strings.ToUpper(key), token, "Bearer " + token + "x", "Bearer " + expired, "Bearer " + hsSecret, "Bearer " + password, "Bearer " + token + "." + token,
	} {
		push(codes.Unauthenticated, authorization, header)
	}
	push(codes.Unauthenticated, authorization, "Bearer "+key, authorization, "Bearer "+token)
	push(codes.Unauthenticated, "x-api-key", key)
	push(codes.InvalidArgument, authorization, "Bearer "+key, "x-priority", key)
	if _, err := api.BroadcastMessage(metadata.AppendToOutgoingContext(t.Context(), authorization, "Bearer "+token), &pubsub.BroadcastMessageRequest{Content: hello()}); status.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
	// Files that are not taken over, and are then.
	for name, text := range map[string]string{files.Policy: "callers: [" + key, files.Secret: password[:9], files.Keys: key, certFile: string(pemText)} {
		before, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, content := range [][]byte{[]byte(text), before} {
			if err := os.WriteFile(name, content, 0o600); err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond) // some readings
		}
	}
	if err := os.Rename(auditFile, auditFile+".1"); err != nil { // logrotate does, and sends SIGHUP
		t.Fatal(err)
	}
	files.WritePolicy(policy(999))
	m.Reload()
	eventually(t, "the policy is read again", func() bool { return strings.Contains(log.String(), "policy taken over") })
	push(codes.OK, authorization, "Bearer "+key)

	for _, path := range []string{
		"/", "/metrics", "/healthz", "/readyz", "/debug/pprof/", "/debug/pprof/goroutine?debug=2", "/debug/pprof/goroutine?debug=1", "/debug/pprof/heap?debug=1",
		"/debug/pprof/allocs?debug=1", "/debug/pprof/heap", "/debug/pprof/profile?seconds=1", "/debug/pprof/trace?seconds=1", "/debug/pprof/symbol", "/nothing?key=" + key,
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+m.HTTPAddr()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(authorization, "Bearer "+key)
		resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || len(body) == 0 {
			t.Errorf("%s: %d bytes, %v", path, len(body), err)
		}
		if unzipped, err := gzip.NewReader(bytes.NewReader(body)); err == nil { // profiles are compressed
			if body, err = io.ReadAll(unzipped); err != nil {
				t.Error(err)
			}
		}
		planted.check(t, path, string(body))
	}
	if code, _ := get(t, "http://"+m.HTTPAddr()+"/debug/pprof/cmdline"); code != http.StatusNotFound {
		t.Errorf("the command line is served: %d", code)
	}
	_, shown := get(t, "http://"+m.HTTPAddr()+"/metrics")
	etcd.Stop() // what is said of that
	eventually(t, "pushes are denied while the quota cannot be checked", func() bool {
		_, err := api.PushToUser(metadata.AppendToOutgoingContext(t.Context(), authorization, "Bearer "+key), &pubsub.PushToUserRequest{UserId: "alice", Content: hello()})
		return strings.Contains(fmt.Sprint(status.Convert(err).Details()), "QUOTA_UNAVAILABLE")
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_ = m.Drain(ctx) // it cannot leave etcd in good order
	var audited []byte
	for _, file := range []string{auditFile + ".1", auditFile} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		audited = append(audited, text...)
	}
	for where, text := range map[string]string{"the log": log.String(), "the audit log": string(audited), "the traces": traces.String()} {
		planted.check(t, where, text)
	}
	// All of these had something to tell.
	for what, there := range map[string]bool{
		"denied pushes in the audit log":       strings.Contains(string(audited), `"event":"push.denied","caller":"by-token"`),
		"bad credentials in the audit log":     strings.Contains(string(audited), `"event":"auth.denied"`),
		"the id of the key in the audit log":   strings.Contains(string(audited), `"event":"key.used_first"`) && strings.Contains(string(audited), keyID),
		"the policy in the audit log":          strings.Contains(string(audited), `"event":"config.reloaded","target_kind":"policy","outcome":"failed"`) && strings.Contains(string(audited), `"target_kind":"policy","outcome":"ok"`),
		"the certificates in the audit log":    strings.Contains(string(audited), `"event":"tls.reloaded"`),
		"pushes in the audit log with a trace": strings.Contains(string(audited), `"trace_id"`),
		"pushes in the traces":                 strings.Contains(traces.String(), "PushToUser"),
		"quota in the metrics":                 strings.Contains(shown, `push_manager_quota_limit{tenant="shop"} 1000`),
		"refusals in the log":                  strings.Contains(log.String(), "push refused"),
	} {
		if !there {
			t.Errorf("no %s", what)
		}
	}
	if t.Failed() {
		t.Logf("%s\n%s", audited, log.String())
	}
}
