package app_test

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
)

// program starts a program, and drains it at the end of the test.
func program(t *testing.T, settings cli.Settings, env map[string]string) cli.Program {
	t.Helper()
	return loggingProgram(t, slog.DiscardHandler, settings, env)
}

func loggingProgram(t *testing.T, log slog.Handler, settings cli.Settings, env map[string]string) cli.Program {
	t.Helper()
	if err := cli.Fill(settings, env); err != nil {
		t.Fatal(err)
	}
	p, err := settings.Start(t.Context(), slog.New(log))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
		defer cancel()
		_ = p.Drain(ctx) // the Controller is away
	})
	return p
}

// secured is Push-Manager and the nodes n1 and n2, which are registered at each other's addresses if swapped.
func secured(t *testing.T, ca *etcdtest.CA, swapped bool) (*pushmanager.PushManager, []string) {
	t.Helper()
	etcd := etcdtest.Start(t)
	files := func(section, caKey, name string) map[string]string {
		cert, key := ca.Issue(name)
		return map[string]string{
			"TRUST_DOMAIN": "test", section + "_CERT_FILE": cert, section + "_KEY_FILE": key, section + "_" + caKey: ca.File,
			"ETCD_ENDPOINTS": etcd.Endpoint(), "METRICS_PORT": "0", "CONTROLLER_ADDRESS": "127.0.0.1:1",
		}
	}
	addrs := []string{freeport.Addr(t), freeport.Addr(t)}
	for i, id := range []string{"n1", "n2"} {
		env := files("NODE_TLS", "CLIENT_CA_FILE", "spiffe://test/connect-node/"+id)
		_, port, err := net.SplitHostPort(addrs[i])
		if err != nil {
			t.Fatal(err)
		}
		advertised := addrs[i]
		if swapped {
			advertised = addrs[1-i]
		}
		maps.Copy(env, map[string]string{"NODE_ID": id, "GRPC_PORT": port, "HTTP_PORT": "0", "ADVERTISE_ADDRESS": advertised, "DRAIN_TIMEOUT": "2s"})
		program(t, &connectnode.Config{}, env)
	}
	env := files("LINK_TLS", "CA_FILE", "spiffe://test/push-manager/pm")
	maps.Copy(env, map[string]string{"GRPC_PORT": "0", "HTTP_PORT": "0", "SHARDS": "1"})
	return program(t, &pushmanager.Config{}, env).(*pushmanager.PushManager), addrs
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func metricsOf(t *testing.T, m *pushmanager.PushManager) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+m.HTTPAddr()+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestNodesAndPushManagerKnowEachOtherByTheirCertificates(t *testing.T) {
	ca, other := etcdtest.NewCA(t), etcdtest.NewCA(t)
	m, nodes := secured(t, ca, false)
	eventually(t, "both nodes are reached", func() bool { return m.Reachable() == 2 })

	ask := func(creds credentials.TransportCredentials) error {
		conn, err := grpc.NewClient(nodes[0], grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err
	}
	as := func(by *etcdtest.CA, name string) credentials.TransportCredentials {
		cert, key := by.Issue(name)
		source, err := certs.Open(certs.Config{Files: certs.Files{Cert: cert, Key: key, CA: ca.File}, Role: "test"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(source.Close)
		return source.Client(certs.Side{Check: certs.Node("test", "n1")})
	}
	if err := ask(as(ca, "spiffe://test/push-manager/pm-2")); err != nil {
		t.Errorf("another Push-Manager: %v", err)
	}
	for name, creds := range map[string]credentials.TransportCredentials{
		"plain text": insecure.NewCredentials(), "a node": as(ca, "spiffe://test/connect-node/n2"), "a caller": as(ca, "billing"),
		"a stranger": as(other, "spiffe://test/push-manager/pm"),
	} {
		if ask(creds) == nil {
			t.Errorf("%s is let in by a node", name)
		}
	}
}

func TestSwappedAddressesInEtcdReachNobody(t *testing.T) {
	m, _ := secured(t, etcdtest.NewCA(t), true)
	eventually(t, "both are found to be the other", func() bool {
		text := metricsOf(t, m)
		return strings.Contains(text, `push_manager_link_wrong_node_total{node_id="n1",found="n2"}`) && strings.Contains(text, `push_manager_link_wrong_node_total{node_id="n2",found="n1"}`)
	})
	if text := metricsOf(t, m); m.Reachable() != 0 || !strings.Contains(text, "push_manager_link_frames_total 0\n") {
		t.Errorf("%d nodes are reached", m.Reachable())
	}
}
