package acceptance

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/certs"
	pubsub "github.com/push-manager/push-manager/proto"
)

// tool finds a program that is not ours, in PATH or where `make interop-tools` puts what it builds. Where it is
// missing the test is skipped, but not in CI.
func tool(t *testing.T, name, from string) string {
	t.Helper()
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	path, err := filepath.Abs("../../.tmp/bin/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		missing(t, fmt.Sprintf("there is no %s (%s)", name, from))
	}
	return path
}

// missing skips a test, but not in CI.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// secured is what Push-Managers with TLS need: an etcd, a Controller, a node with the user alice, and certificates.
// They are X.crt and X.key in dir:
//
//	ca                 the authority of all but the last one
//	manager-pm         Push-Manager
//	client-billing     a caller
//	front              a balancer, as callers see it
//	client-balancer    a balancer, as Push-Manager sees it
//	stranger           a caller, by another authority
type secured struct {
	etcd, controller string
	dir              string
	users            *clients
}

func startSecured(t *testing.T) *secured {
	t.Helper()
	s := &secured{etcd: startEtcd(t), users: newClients("alice"), dir: filepath.Join(t.TempDir(), "certs")}
	registry, err := clientv3.New(clientv3.Config{Endpoints: []string{s.etcd}, DialTimeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = registry.Close() })
	serveStreaming(t, registry, "n1", s.users)
	world := &oldController{rooms: map[string][]*pubsub.UserInfo{}, users: map[string]string{}}
	world.place("alice", "n1")
	s.controller = serveController(t, world)

	for _, args := range [][]string{{"ca"}, {"manager", "pm"}, {"client", "billing"}, {"client", "balancer"}} {
		command := exec.Command(binary(t, "push-manager"), append([]string{"certs", "--dir=" + s.dir, "--trust-domain=test"}, args...)...)
		if out, err := command.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	until := time.Now().Add(time.Hour)
	ca, err := certs.LoadAuthority(certs.Pair{Cert: s.read(t, "ca.crt"), Key: s.read(t, "ca.key")})
	if err != nil {
		t.Fatal(err)
	}
	others, _, err := certs.NewAuthority("Others", until)
	if err != nil {
		t.Fatal(err)
	}
	s.issue(t, "front", ca, certs.Request{Hosts: []string{"localhost", "127.0.0.1"}, Server: true, NotAfter: until})
	s.issue(t, "stranger", others, certs.Request{URI: "spiffe://test/client/billing", Client: true, NotAfter: until})
	return s
}

func (s *secured) file(name string) string { return filepath.Join(s.dir, name) }

func (s *secured) read(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(s.file(name))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (s *secured) issue(t *testing.T, name string, by *certs.Authority, r certs.Request) {
	t.Helper()
	pair, err := by.Issue(r)
	if err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string][]byte{name + ".crt": pair.Cert, name + ".key": pair.Key} {
		if err := os.WriteFile(s.file(file), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// launch starts a Push-Manager that lets in callers with a certificate of the authority.
func (s *secured) launch(t *testing.T, env ...string) *manager {
	t.Helper()
	return s.launchPlain(t, append([]string{"TLS_CERT_FILE=" + s.file("manager-pm.crt"), "TLS_KEY_FILE=" + s.file("manager-pm.key"),
		"TLS_CLIENT_CA_FILE=" + s.file("ca.crt"), "TLS_CLIENT_AUTH=require"}, env...)...)
}

// launchPlain starts a Push-Manager that lets in anybody.
func (s *secured) launchPlain(t *testing.T, env ...string) *manager {
	t.Helper()
	return startManager(t, s.etcd, s.controller, 1, env...)
}

// connect is a caller with a certificate, or without one if it is empty.
func (s *secured) connect(t *testing.T, addr, cert string) pubsub.PushManagerServiceClient {
	t.Helper()
	c := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS13}
	c.RootCAs.AppendCertsFromPEM(s.read(t, "ca.crt"))
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(s.file(cert+".crt"), s.file(cert+".key"))
		if err != nil {
			t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(c)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return pubsub.NewPushManagerServiceClient(conn)
}

// toAlice is a push of some bytes.
func toAlice(data []byte) *pubsub.PushToUserRequest {
	return &pubsub.PushToUserRequest{UserId: "alice", Content: &pubsub.MessageContent{Data: data}}
}

// nothingSent is the reason in an error's ErrorInfo, which says that nothing was sent. Empty: it does not say so.
func nothingSent(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == "push-manager" {
			return info.GetReason()
		}
	}
	return ""
}
