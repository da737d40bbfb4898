package devstack_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/push-manager/push-manager/internal/devstack"
	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

func startStack(t *testing.T, cfg devstack.Config) *devstack.Stack {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cfg.BasePort = freeport.Row(t, 16) // etcd listens later than a port 0 is resolved
	s, err := devstack.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.WaitReady(ctx); err != nil {
		t.Error(err)
	}
	return s
}

func stopStack(t *testing.T, s *devstack.Stack) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	if err := s.Drain(ctx); err != nil {
		t.Error(err)
	}
}

func TestEverythingStartsFindsEachOtherAndStopsWithoutALeak(t *testing.T) {
	told := make(chan string, 10)
	receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		select {
		case told <- string(b):
		default: // they are told again if it took too long
		}
	}))
	defer receiver.Close()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"secret":     "0123456789abcdef",
		"hooks.yaml": "version: 1\nhooks:\n  - {name: try, url: \"" + receiver.URL + "\", secret_file: " + dir + "/secret, events: [connect]}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := startStack(t, devstack.Config{Nodes: 2, HooksFile: filepath.Join(dir, "hooks.yaml")})
	if n := s.Nodes(); len(n) != 2 || n[0].ID != "connect-node-1" || !strings.HasPrefix(n[1].WebSocket(), "ws://localhost:") {
		t.Errorf("nodes %v", n)
	}
	conn, err := grpc.NewClient(s.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	r, err := pubsub.NewPushManagerServiceClient(conn).BroadcastMessage(t.Context(), &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{}})
	if err != nil || !r.GetSuccess() {
		t.Errorf("broadcast to two nodes without clients: %v %v", r, err)
	}
	for i, user := range []string{"alice", "bob"} { // one on each node
		client, _, _, err := ws.Dial(t.Context(), s.Nodes()[i].WebSocket()+"?user_id="+user)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Close() }()
		select {
		case event := <-told:
			if !strings.Contains(event, `"`+user+`"`) {
				t.Errorf("told %s, want %s", event, user)
			}
		case <-time.NewTimer(20 * time.Second).C:
			t.Errorf("nobody is told that %s connects", user)
		}
	}
	stopStack(t, s)
}

// TestEtcdOfASecureStackLetsInItsOwnClientsAlone: a caller of the push API who could write there would decide where users are.
func TestEtcdOfASecureStackLetsInItsOwnClientsAlone(t *testing.T) {
	dir := t.TempDir()
	s := startStack(t, devstack.Config{Nodes: 1, DataDir: dir, Secure: true})
	defer stopStack(t, s)
	ca, err := os.ReadFile(filepath.Join(dir, "secure", "etcd", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"etcd/client-programs": true, "client-app": false, "node-connect-node-1": false, "": false} {
		cfg := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
		cfg.RootCAs.AppendCertsFromPEM(ca)
		if name != "" {
			pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "secure", name+".crt"), filepath.Join(dir, "secure", name+".key"))
			if err != nil {
				t.Fatal(err)
			}
			cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil } // whoever is asked for
		}
		client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}}
		resp, err := client.Get("https://" + s.EtcdEndpoint() + "/version")
		if err == nil {
			_ = resp.Body.Close()
		}
		if (err == nil) != want {
			t.Errorf("with the certificate %q: %v", name, err)
		}
	}
}

func TestTemporaryDataIsRemovedAndANamedDirectoryIsKept(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	stopStack(t, startStack(t, devstack.Config{Nodes: 1, Secure: true}))
	if left, err := os.ReadDir(temp); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	kept := t.TempDir()
	stopStack(t, startStack(t, devstack.Config{Nodes: 1, DataDir: kept}))
	stopStack(t, startStack(t, devstack.Config{Nodes: 1, DataDir: kept})) // on what the first one left
	stopStack(t, startStack(t, devstack.Config{Nodes: 1, DataDir: kept, Secure: true}))
	stopStack(t, startStack(t, devstack.Config{Nodes: 1, DataDir: kept, Secure: true}))
	if left, err := os.ReadDir(kept); err != nil || len(left) == 0 {
		t.Errorf("not kept: %v %v", left, err)
	}
}

func TestStartThatFailsLeavesNothing(t *testing.T) {
	s := startStack(t, devstack.Config{Nodes: 1})
	defer stopStack(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, cfg := range []devstack.Config{{Nodes: -1}, {Nodes: 1000}, {DataDir: "/dev/null/x"}, {DataDir: "/dev/null/x", Secure: true}} {
		if s, err := devstack.Start(ctx, cfg); err == nil {
			stopStack(t, s)
			t.Errorf("%+v: no error", cfg)
		}
	}
}
