package pushmanager

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/transport/node"
)

// checked runs push-manager check, and returns its exit code and the first words of its lines: verdict and check.
func checked(t *testing.T, env map[string]string) (code int, verdicts []string, text string) {
	t.Helper()
	for name, value := range env {
		t.Setenv(name, value)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	was := os.Stdout
	os.Stdout = out
	code = cli.Main(cli.CommandLine{Name: "push-manager", Commands: []cli.Command{Command(), CheckCommand()}}, []string{"check"})
	os.Stdout = was
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		verdict, rest, _ := strings.Cut(line, " ")
		check, _, _ := strings.Cut(strings.TrimSpace(rest), "  ")
		verdicts = append(verdicts, verdict+" "+strings.Fields(check)[0])
	}
	return code, verdicts, string(raw)
}

// serveNode serves a node at a new address.
func serveNode(t *testing.T, creds credentials.TransportCredentials) (addr string) {
	t.Helper()
	n, err := node.New(node.Config{NodeID: "n1", Sessions: &counter{}})
	if err != nil {
		t.Fatal(err)
	}
	opts := node.ServerOptions()
	if creds != nil {
		opts = append(opts, grpc.Creds(creds))
	}
	gs := grpc.NewServer(opts...)
	n.Attach(gs)
	t.Cleanup(n.Close)
	return serveGRPC(t, "127.0.0.1:0", gs)
}

// startNATS runs a server, with JetStream or without.
func startNATS(t *testing.T, jetStream bool) (url string) {
	t.Helper()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: jetStream, StoreDir: t.TempDir(), NoLog: true, NoSigs: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	eventually(t, "NATS listens", func() bool { return s.Addr() != nil })
	return s.ClientURL()
}

func TestCheckNamesEachPeerThatCannotBeReached(t *testing.T) {
	t.Chdir(t.TempDir())
	etcd, controller := etcdtest.Start(t), freeport.Addr(t)
	serveController(t, controller)
	registerNode(t, etcd.Client(), serveNode(t, nil))
	good := map[string]string{"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": controller, "STORE": startNATS(t, true)}
	nobody := freeport.Addr(t)
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost")
	for _, tc := range []struct {
		name string
		env  map[string]string
		code int
		want string
		text string
	}{
		{"everything answers", nil, 0, "ok configuration, ok etcd, ok controller, ok nodes, ok store", "1 of 1 answer"},
		{"no store", map[string]string{"STORE": "off"}, 0, "ok configuration, ok etcd, ok controller, ok nodes, ok store", "off"},
		{"a store in a directory", map[string]string{"STORE": "embedded", "STORE_DIR": t.TempDir()}, 0, "ok configuration, ok etcd, ok controller, ok nodes, ok store", "embedded in"},
		{"a store in a file", map[string]string{"STORE": "embedded", "STORE_DIR": cert}, 1, "ok configuration, ok etcd, ok controller, ok nodes, failed store", "not a directory"},
		{"a store below a file", map[string]string{"STORE": "embedded", "STORE_DIR": cert + "/new/store"}, 1, "ok configuration, ok etcd, ok controller, ok nodes, failed store", "not a directory"},
		{"a store where nothing can be made", map[string]string{"STORE": "embedded", "STORE_DIR": "/proc/new/store"}, 1, "ok configuration, ok etcd, ok controller, ok nodes, failed store", "/proc/check-"},
		{"a certificate", map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}, 0, "ok configuration, warning tls, ok etcd, ok controller, ok nodes, ok store", "expires at"},
		{"a certificate that is not there", map[string]string{"TLS_CERT_FILE": "/nowhere", "TLS_KEY_FILE": key}, 1, "failed configuration", "TLS_CERT_FILE"},
		{"a policy that is not there", map[string]string{"AUTH_MODE": "required", "AUTH_POLICY_FILE": "/nowhere", "AUTH_API_KEYS_FILE": "/nowhere"}, 1, "failed configuration", "AUTH_POLICY_FILE"},
		{"a key that does not parse", map[string]string{"PUSH_TIMEOUT": "soon"}, 1, "failed configuration", "PUSH_TIMEOUT"},
		{"no etcd", map[string]string{"ETCD_ENDPOINTS": nobody}, 1, "ok configuration, failed etcd, ok controller, warning nodes, ok store", "refused"},
		{"no Controller", map[string]string{"CONTROLLER_ADDRESS": nobody}, 1, "ok configuration, ok etcd, failed controller, ok nodes, ok store", "refused"},
		{"one of two Controllers", map[string]string{"CONTROLLER_ADDRESS": controller + ", " + nobody}, 0, "ok configuration, ok etcd, warning controller, ok nodes, ok store", "1 of 2 answer: " + nobody},
		{"two Controllers, and a comma too many", map[string]string{"CONTROLLER_ADDRESS": controller + "," + controller + ","}, 0, "ok configuration, ok etcd, ok controller, ok nodes, ok store", "2 of 2 answer"},
		{"none of two Controllers", map[string]string{"CONTROLLER_ADDRESS": nobody + "," + nobody}, 1, "ok configuration, ok etcd, failed controller, ok nodes, ok store", "0 of 2 answer"},
		{"no NATS", map[string]string{"STORE": "nats://" + nobody}, 1, "ok configuration, ok etcd, ok controller, ok nodes, failed store", "none of its servers answers"},
		{"NATS without JetStream", map[string]string{"STORE": startNATS(t, false)}, 1, "ok configuration, ok etcd, ok controller, ok nodes, failed store", "not enabled"},
		{"nodes without TLS", map[string]string{"LINK_TLS_CA_FILE": ca.File}, 1, "ok configuration, warning tls, ok etcd, ok controller, failed nodes, ok store", "0 of 1 answer"},
		{"nodes without TLS yet", map[string]string{"LINK_TLS_CA_FILE": ca.File, "LINK_TLS_MIGRATE": "true", "ALLOW_INSECURE": "true"}, 0, "ok configuration, warning tls, warning insecure, ok etcd, ok controller, ok nodes, ok store", "plain text"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env := maps.Clone(good)
			maps.Copy(env, tc.env)
			code, verdicts, text := checked(t, env)
			if got := strings.Join(verdicts, ", "); code != tc.code || got != tc.want || !strings.Contains(text, tc.text) {
				t.Errorf("exit code %d, want %d; %s, want %s; %q in\n%s", code, tc.code, got, tc.want, tc.text, text)
			}
		})
	}
}

// TestCheckLeavesNothingBehind: it may run beside a Push-Manager of the same id.
func TestCheckLeavesNothingBehind(t *testing.T) {
	t.Chdir(t.TempDir())
	etcd, controller := etcdtest.Start(t), freeport.Addr(t)
	serveController(t, controller)
	n1 := serveNode(t, nil)
	registerNode(t, etcd.Client(), n1)
	before, err := etcd.Client().Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "store")
	env := map[string]string{"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": controller, "STORE": "embedded", "STORE_DIR": dir}
	if code, _, text := checked(t, env); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, text)
	}
	after, err := etcd.Client().Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if before.Header.GetRevision() != after.Header.GetRevision() {
		t.Error("etcd has changed")
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the store's directory: %v", err)
	}
}

// TestCheckKnowsNodesByTheirCertificates: as links do, and a node that is another one does not count.
func TestCheckKnowsNodesByTheirCertificates(t *testing.T) {
	t.Chdir(t.TempDir())
	etcd, controller, ca := etcdtest.Start(t), freeport.Addr(t), etcdtest.NewCA(t)
	serveController(t, controller)
	node := func(names ...string) string {
		cert, key := ca.Issue(names...)
		creds, err := credentials.NewServerTLSFromFile(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return serveNode(t, creds)
	}
	env := map[string]string{"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": controller, "LINK_TLS_CA_FILE": ca.File}
	for _, tc := range []struct {
		node, cert, want string
	}{
		{"n1", "n1", "ok       nodes          1 of 1 answer"},
		{"n2", "n7", "warning  nodes          1 of 2 answer: n2: "},
		{"n1", "n8", "failed   nodes          0 of 2 answer: n1: "},
	} {
		if _, err := etcd.Client().Put(context.Background(), "/services/connect-node/"+tc.node, fmt.Sprintf(`{"Op":0,"Addr":%q,"Metadata":{"node_id":%q}}`, node(tc.cert), tc.node)); err != nil {
			t.Fatal(err)
		}
		if _, _, text := checked(t, env); !strings.Contains(text, tc.want) {
			t.Errorf("a node %s with the certificate of %s: want %q in\n%s", tc.node, tc.cert, tc.want, text)
		}
	}
}
