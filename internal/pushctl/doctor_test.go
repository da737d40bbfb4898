package pushctl

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/discovery"
)

// patient is a Push-Manager as doctor sees it.
type patient struct {
	pubsub.UnimplementedPushManagerServiceServer

	status  healthpb.HealthCheckResponse_ServingStatus
	explain func(*pubsub.ExplainRequest) (*pubsub.ExplainResponse, error)
}

func (p *patient) Explain(_ context.Context, r *pubsub.ExplainRequest) (*pubsub.ExplainResponse, error) {
	if p.explain == nil {
		return &pubsub.ExplainResponse{Found: true, Caller: &pubsub.ExplainedCaller{}, Route: &pubsub.ExplainedRoute{}}, nil
	}
	return p.explain(r)
}

func (p *patient) serve(t *testing.T, options ...grpc.ServerOption) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(options...)
	pubsub.RegisterPushManagerServiceServer(g, p)
	h := health.NewServer()
	h.SetServingStatus(pubsub.PushManagerService_ServiceDesc.ServiceName, p.status)
	healthpb.RegisterHealthServer(g, h)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return l.Addr().String()
}

// nowhere are addresses of this machine at which nothing listens, for what a test is not about.
var nowhere = []string{"--metrics=127.0.0.1:1", "--controller=127.0.0.1:1", "--etcd-endpoints=127.0.0.1:1", "--timeout=2s"}

// examine runs doctor, and returns what it says of each check, the last of that name.
func examine(t *testing.T, args ...string) (code int, found map[string]finding, order []string, all string) {
	t.Helper()
	code, out, errOut := pushctl(t, "", append([]string{"doctor", "-o", "json"}, args...)...)
	found = map[string]finding{}
	for line := range strings.Lines(out) {
		var f finding
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		found[f.Check] = f
		order = append(order, f.Check)
	}
	return code, found, order, out + errOut
}

func TestDoctorFindsNothingWrongWhereAllIsWell(t *testing.T) {
	home(t)
	address, _, _ := dev(t)
	args := []string{"--address", address["Push-Manager"], "--metrics", address["metrics"], "--controller", address["Controller"], "--etcd-endpoints", address["etcd"]}
	code, found, order, all := examine(t, args...)
	if want := "settings token dns tcp health caller routes readiness version etcd controller node node"; code != exitOK || strings.Join(order, " ") != want {
		t.Errorf("exit %d, checks %q, want %q\n%s", code, order, want, all)
	}
	for name, f := range found {
		if f.Verdict != checkOK && name != "token" {
			t.Errorf("%+v", f)
		}
	}
	for check, want := range map[string]string{
		"settings": "(command line)", "caller": "does not ask who calls", "routes": "the Controller answers", "readiness": "is ready", "etcd": "2 connect-nodes registered, and 1 push-manager",
		"node": "connect-node-2: the link is up",
	} {
		if !strings.Contains(found[check].Seen, want) {
			t.Errorf("%+v lacks %q", found[check], want)
		}
	}
	// The same for people.
	code, out, errOut := pushctl(t, "", append([]string{"doctor", "-o", "wide"}, args...)...)
	if code != exitOK || errOut != "" || !strings.Contains(out, "12 ok, 0 warn, 0 fail, 1 skip") {
		t.Errorf("exit %d, %s%s", code, out, errOut)
	}
}

func TestDoctorTellsWhatIsWrongOnTheWayToPushManager(t *testing.T) {
	home(t)
	ca, other := etcdtest.NewCA(t), etcdtest.NewCA(t)
	authority, authorityPair, err := certs.NewAuthority("ours", time.Now().AddDate(1, 0, 0), "localhost", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ourCA := write("our-ca.crt", string(authorityPair.Cert))
	secured := func(cert, key string, auth tls.ClientAuthType) string {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		cfg := &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: auth, NextProtos: []string{"h2"}}
		return (&patient{status: healthpb.HealthCheckResponse_SERVING}).serve(t, grpc.Creds(credentials.NewTLS(cfg)))
	}
	issued := func(r certs.Request) (cert, key string) {
		pair, err := authority.Issue(r)
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("%p", &pair)
		return write(name+".crt", string(pair.Cert)), write(name+".key", string(pair.Key))
	}
	cert, key := ca.Issue("127.0.0.1")
	good := secured(cert, key, tls.NoClientCert)
	longCert, longKey := issued(certs.Request{Hosts: []string{"127.0.0.1"}, Server: true, NotAfter: time.Now().AddDate(0, 0, 90)})
	nameCert, nameKey := ca.Issue("elsewhere.example")
	endedCert, endedKey := issued(certs.Request{Hosts: []string{"127.0.0.1"}, Server: true, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour)})
	soonCert, soonKey := issued(certs.Request{Hosts: []string{"127.0.0.1"}, Server: true, NotAfter: time.Now().Add(50 * time.Minute)})
	plain := (&patient{status: healthpb.HealthCheckResponse_SERVING}).serve(t)
	web := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(web.Close)
	jwt := func(claims string) string {
		return "e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".c2ln"
	}
	for name, tc := range map[string]struct {
		args    []string
		check   string
		verdict string
		seen    string
		do      string
	}{
		"no such name":        {[]string{"--address=nobody.invalid:50053"}, "dns", checkFail, "nobody.invalid", "the name in --address"},
		"nobody there":        {[]string{"--address=127.0.0.1:1"}, "tcp", checkFail, "refused", "Push-Manager runs there"},
		"all well, with TLS":  {[]string{"--address", secured(longCert, longKey, tls.NoClientCert), "--ca", ourCA}, "tls", checkOK, "TLS 1.3; the certificate is for 127.0.0.1", ""},
		"unknown authority":   {[]string{"--address", good, "--ca", other.File}, "tls", checkFail, "an authority that is not known here; the certificate is for 127.0.0.1", "--ca"},
		"another name":        {[]string{"--address", secured(nameCert, nameKey, tls.NoClientCert), "--ca", ca.File}, "tls", checkFail, "for another name than 127.0.0.1; the certificate is for elsewhere.example", "--address"},
		"ended":               {[]string{"--address", secured(endedCert, endedKey, tls.NoClientCert), "--ca", ourCA}, "tls", checkFail, "is not valid now", "renew it"},
		"ends soon":           {[]string{"--address", secured(soonCert, soonKey, tls.NoClientCert), "--ca", ourCA}, "tls", checkWarn, "ends in 4", "renew the server's certificate"},
		"wants a certificate": {[]string{"--address", secured(cert, key, tls.RequireAnyClientCert), "--ca", ca.File}, "tls", checkFail, "does not take our certificate", "--cert and --key"},
		"plain text":          {[]string{"--address", strings.TrimPrefix(web.URL, "http://"), "--tls"}, "tls", checkFail, "does not speak TLS", "--tls"},
		"TLS unasked":         {[]string{"--address", good}, "health", checkFail, "the port speaks TLS, and we did not", "--tls"},
		"HTTP/1":              {[]string{"--address", strings.TrimPrefix(web.URL, "http://")}, "health", checkFail, "answers no call", "GRPC_PORT"},
		"not ready":           {[]string{"--address", (&patient{status: healthpb.HealthCheckResponse_NOT_SERVING}).serve(t)}, "health", checkFail, "cannot deliver", "/readyz"},
		"no key":              {[]string{"--address", good, "--cert", cert}, "files", checkFail, "--key: missing", "belong together"},
		"no token":            {[]string{"--address", plain, "--token-file=/nowhere"}, "token", checkFail, "--token-file: ", "one API key or token"},
		"an empty token":      {[]string{"--address", plain, "--token-file", write("empty", "\n")}, "token", checkFail, "holds nothing", "one API key or token"},
		"a token that ended":  {[]string{"--address", plain, "--token-file", write("ended", jwt(`{"exp":1}`))}, "token", checkFail, "a token that ended", "a new one"},
		"a token":             {[]string{"--address", plain, "--token-file", write("good", jwt(fmt.Sprintf(`{"exp":%d}`, time.Now().Add(time.Hour).Unix())))}, "token", checkOK, "a token that ends in 59m", ""},
		"no token at all":     {[]string{"--address", plain, "--token-file", write("odd", "secret")}, "token", checkWarn, "neither", "policy"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // most of it is waiting for an etcd
			code, found, _, all := examine(t, append(tc.args, nowhere...)...)
			f := found[tc.check]
			if f.Verdict != tc.verdict || !strings.Contains(f.Seen, tc.seen) || !strings.Contains(f.Do, tc.do) {
				t.Errorf("%+v, want %s, %q, %q\n%s", f, tc.verdict, tc.seen, tc.do, all)
			}
			if code != exitError { // for the addresses of nowhere, at least
				t.Errorf("exit %d", code)
			}
		})
	}
}

// TestDoctorKeepsTheTokenToItself, whoever repeats it.
func TestDoctorKeepsTheTokenToItself(t *testing.T) {
	home(t)
	const secret = "pmk_12345678_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQ_123456"
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(secret), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		err     error
		verdict string
		seen    string
	}{
		"unknown":     {status.Error(codes.Unauthenticated, "no such key: "+secret), checkFail, "does not know us: no such key: (the token)"},
		"not allowed": {status.Error(codes.PermissionDenied, secret), checkWarn, "does not let us ask"},
		"too old":     {status.Error(codes.Unimplemented, secret), checkWarn, "too old"},
		"busy":        {status.Error(codes.ResourceExhausted, secret), checkWarn, "overloaded: (the token)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // most of it is waiting for an etcd
			p := &patient{status: healthpb.HealthCheckResponse_SERVING, explain: func(*pubsub.ExplainRequest) (*pubsub.ExplainResponse, error) { return nil, tc.err }}
			_, found, _, all := examine(t, append([]string{"--address", p.serve(t), "--token-file", file}, nowhere...)...)
			if f := found["caller"]; f.Verdict != tc.verdict || !strings.Contains(f.Seen, tc.seen) {
				t.Errorf("%+v, want %s, %q", f, tc.verdict, tc.seen)
			}
			if f := found["token file"]; f.Verdict != checkWarn || !strings.Contains(f.Do, "chmod 600") {
				t.Errorf("%+v", f)
			}
			if strings.Contains(all, secret) || strings.Contains(all, secret[13:30]) {
				t.Errorf("it tells the token: %s", all)
			}
		})
	}
}

// TestDoctorComparesWhatEtcdAndPushManagerSayOfEachNode, and what it finds itself.
func TestDoctorComparesWhatEtcdAndPushManagerSayOfEachNode(t *testing.T) {
	home(t)
	etcd := etcdtest.Start(t)
	there, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = there.Close() }()
	for id, address := range map[string]string{"n-up": there.Addr().String(), "n-down": "127.0.0.1:1", "n-unknown": there.Addr().String()} {
		value := fmt.Sprintf(`{"Op":0,"Addr":%q,"Metadata":{"node_id":%q}}`, address, id)
		if _, err := etcd.Client().Put(t.Context(), discovery.ConnectNodePrefix+id, value); err != nil {
			t.Fatal(err)
		}
	}
	p := &patient{status: healthpb.HealthCheckResponse_SERVING, explain: func(r *pubsub.ExplainRequest) (*pubsub.ExplainResponse, error) {
		if r.GetToUser() != nil {
			return &pubsub.ExplainResponse{Route: &pubsub.ExplainedRoute{Error: "the Controller is \x1b[31maway"}}, nil
		}
		return &pubsub.ExplainResponse{Found: true, Caller: &pubsub.ExplainedCaller{Name: "billing"}, Deliveries: []*pubsub.ExplainedDelivery{
			{NodeId: "n-up", Verdict: "queued", LinkState: "up"}, {NodeId: "n-down", Verdict: "node is not reachable", LinkState: "connecting"}, {NodeId: "n-gone", Verdict: "queued", LinkState: "up"},
		}}, nil
	}}
	ready := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/readyz" {
			http.Error(w, "controller: away\nnodes: none", http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, `push_manager_build_info{version="v9.9.9",go="go1"} 1`)
	}))
	defer ready.Close()
	code, out, errOut := pushctl(t, "", "doctor", "--address", p.serve(t), "--etcd-endpoints", etcd.Endpoint(), "--controller", there.Addr().String(), "--metrics", ready.URL)
	if code != exitError || errOut != "" {
		t.Errorf("exit %d, %q", code, errOut)
	}
	for _, want := range []string{
		`ok    caller       Push-Manager takes us for "billing"`,
		"fail  routes       Push-Manager cannot ask the Controller: the Controller is  [31maway",
		"is not ready: controller: away; nodes: none",
		"has v9.9.9; this is pushctl ",
		"warn  etcd         3 connect-nodes registered, and 0 push-managers",
		"ok    controller   " + there.Addr().String() + " takes connections",
		"ok    node         n-up: the link is up; " + there.Addr().String() + " takes connections from here",
		"fail  node         n-down: the link is connecting: node is not reachable; from here: dial tcp 127.0.0.1:1",
		"fail  node         n-unknown is registered, and Push-Manager does not know it",
		"warn  node         n-gone: the link is up, and it is not registered in this etcd",
		"-> see that the node runs, and that ADVERTISE_ADDRESS",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

// TestDoctorAsksElsewhereOnlyWhatItIsGiven: another machine's etcd is not the one of this machine.
func TestDoctorAsksElsewhereOnlyWhatItIsGiven(t *testing.T) {
	home(t)
	_, found, _, all := examine(t, "--address=nobody.invalid:1", "--timeout=1s")
	for _, check := range []string{"readiness", "etcd", "controller"} {
		if found[check].Verdict != checkSkip || found[check].Do == "" {
			t.Errorf("%+v\n%s", found[check], all)
		}
	}
}
