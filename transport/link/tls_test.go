package link

import (
	"bytes"
	"crypto/tls"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/etcdtest"
	connectnode "github.com/push-manager/push-manager/transport/node"
)

// logged is a log that a test reads.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// tlsWorld is two nodes, A at a:1 and B at b:1, that speak TLS with managers only.
type tlsWorld struct {
	*world
	ca   *etcdtest.CA
	log  *logged
	set  *metrics.Set
	a, b *crowd
}

// identified is a source with a certificate for a name.
func identified(t *testing.T, ca *etcdtest.CA, trusted *etcdtest.CA, name string) *certs.Source {
	t.Helper()
	cert, key := ca.Issue(name)
	source, err := certs.Open(certs.Config{Files: certs.Files{Cert: cert, Key: key, CA: trusted.File}, Role: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(source.Close)
	return source
}

func newTLSWorld(t *testing.T, check func(id string) certs.Check, asWhom string, change ...func(*Config)) *tlsWorld {
	t.Helper()
	w := &tlsWorld{ca: etcdtest.NewCA(t), log: &logged{}, set: metrics.NewSet()}
	mine := identified(t, w.ca, w.ca, asWhom)
	cfg := Config{
		Logger: slog.New(slog.NewTextHandler(w.log, nil)), Metrics: w.set,
		Credentials: func(id string) credentials.TransportCredentials { return mine.Client(certs.Side{Check: check(id)}) },
	}
	for _, f := range change {
		f(&cfg)
	}
	w.world = newWorld(t, cfg)
	managers, err := certs.Allowed("test", []string{"push-manager/*"})
	if err != nil {
		t.Fatal(err)
	}
	start := func(id, addr string) *crowd {
		theirs := identified(t, w.ca, w.ca, "spiffe://test/connect-node/"+id)
		return w.startReal(addr, connectnode.Config{NodeID: id}, grpc.Creds(theirs.Server(certs.Side{ClientAuth: tls.RequireAndVerifyClientCert, Check: managers})))
	}
	w.a, w.b = start("A", "a:1"), start("B", "b:1")
	w.mu.Lock()
	w.users["alice"], w.users["bob"] = "A", "B"
	w.mu.Unlock()
	return w
}

func byID(id string) certs.Check { return certs.Node("test", id) }

func (w *tlsWorld) metrics() string {
	var text bytes.Buffer
	w.set.WritePrometheus(&text)
	return text.String()
}

func TestNodesAreReachedOverTLS(t *testing.T) {
	w := newTLSWorld(t, byID, "spiffe://test/push-manager/pm")
	w.register("A", "a:1", "B", "b:1")
	w.up(2)
	for _, user := range []string{"alice", "bob"} {
		if r := w.do(w.toUser(user, "hello")); r.Delivered != 1 {
			t.Errorf("%s: %+v", user, r)
		}
	}
}

func TestNothingReachesTheWrongNodeWhenAddressesAreSwapped(t *testing.T) {
	w := newTLSWorld(t, byID, "spiffe://test/push-manager/pm")
	w.register("A", "b:1", "B", "a:1")
	w.until("both links have found the other node", func() bool {
		text := w.metrics()
		return strings.Contains(text, `push_manager_link_wrong_node_total{node_id="A",found="B"}`) && strings.Contains(text, `push_manager_link_wrong_node_total{node_id="B",found="A"}`)
	})
	for _, user := range []string{"alice", "bob"} {
		if r := w.do(w.toUser(user, "hello")); r.Failed != 1 || r.Delivered != 0 {
			t.Errorf("%s: %+v, want one failed", user, r)
		}
	}
	if r := w.do(w.toAll("hello")); r.Delivered != 0 {
		t.Errorf("broadcast: %+v", r)
	}
	for name, c := range map[string]*crowd{"A": w.a, "B": w.b} {
		c.mu.Lock()
		if len(c.got) > 0 {
			t.Errorf("node %s got %v", name, c.got)
		}
		c.mu.Unlock()
	}
	if !strings.Contains(w.metrics(), "push_manager_link_frames_total 0") {
		t.Error("frames were sent")
	}
	w.until("the log names both nodes", func() bool { // it is written after what counts
		text := w.log.String()
		return strings.Contains(text, "node=A") && strings.Contains(text, `says that it is \"B\"`)
	})

	// Once the addresses are right again, both are reached, and what counted the mistake goes with the node.
	w.register("A", "a:1", "B", "b:1")
	w.up(2)
	for _, user := range []string{"alice", "bob"} {
		if r := w.do(w.toUser(user, "hello")); r.Delivered != 1 {
			t.Errorf("%s: %+v", user, r)
		}
	}
	w.register("B", "b:1")
	if strings.Contains(w.metrics(), `wrong_node_total{node_id="A"`) {
		t.Error("the counter of a node that is gone is still there")
	}
}

func TestWhoIsNoPushManagerGetsNothingFromANode(t *testing.T) {
	for name, who := range map[string]string{"a node": "spiffe://test/connect-node/B", "a caller": "spiffe://test/billing", "of another domain": "spiffe://evil/push-manager/pm"} {
		w := newTLSWorld(t, byID, who)
		w.register("A", "a:1")
		w.until("an attempt has failed", func() bool { return !strings.Contains(w.metrics(), "push_manager_link_dial_failures_total 0") })
		if r := w.do(w.toUser("alice", "hello")); r.Delivered != 0 {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func TestPlainNodeIsRefusedWhereTLSIsAskedFor(t *testing.T) {
	w := newTLSWorld(t, byID, "spiffe://test/push-manager/pm")
	c := w.startReal("c:1", connectnode.Config{NodeID: "C"})
	w.mu.Lock()
	w.users["carol"] = "C"
	w.mu.Unlock()
	w.register("C", "c:1")
	w.until("an attempt has failed", func() bool { return !strings.Contains(w.metrics(), "push_manager_link_dial_failures_total 0") })
	if r := w.do(w.toUser("carol", "hello")); r.Delivered != 0 || len(c.texts("carol")) > 0 {
		t.Errorf("%+v", r)
	}
	w.until("the log says why", func() bool { return strings.Contains(w.log.String(), "handshake") })
}

func TestPlainNodesAreReachedDuringAMigrationAlone(t *testing.T) {
	w := newTLSWorld(t, byID, "spiffe://test/push-manager/pm", func(c *Config) { c.Migrate = true })
	c, d := w.startReal("c:1", connectnode.Config{NodeID: "C"}), w.startReal("d:1", connectnode.Config{NodeID: "D", UnaryOnly: true})
	w.mu.Lock()
	w.users["carol"], w.users["dan"] = "C", "D"
	w.mu.Unlock()
	w.register("A", "a:1", "B", "b:1", "C", "c:1", "D", "d:1")
	w.until("all are reached", func() bool { return w.world.set.Reachable() == 4 })
	for _, user := range []string{"alice", "carol", "dan"} {
		if r := w.do(w.toUser(user, "hello")); r.Delivered != 1 {
			t.Errorf("%s: %+v", user, r)
		}
	}
	if len(c.texts("carol")) != 1 || len(d.texts("dan")) != 1 {
		t.Error("carol or dan got nothing")
	}
	if text := w.metrics(); !strings.Contains(text, "push_manager_link_plain_nodes 2\n") {
		t.Error("two nodes are not counted as plain")
	}
	if text := w.log.String(); strings.Count(text, "does not know TLS") != 2 {
		t.Errorf("not one line for each plain node:\n%s", text)
	}

	// A node that knows TLS is never spoken to in plain text, whoever it is.
	w.register("A", "b:1", "B", "b:1", "C", "c:1")
	w.until("A is found to be B", func() bool { return strings.Contains(w.metrics(), `wrong_node_total{node_id="A",found="B"}`) })
	if r := w.do(w.toUser("alice", "hello")); r.Failed != 1 {
		t.Errorf("%+v", r)
	}
	w.until("D is not counted any more", func() bool { return strings.Contains(w.metrics(), "push_manager_link_plain_nodes 1\n") })
}

func TestWithoutIDsARoleIsEnough(t *testing.T) {
	role, err := certs.Allowed("test", []string{"connect-node/*"})
	if err != nil {
		t.Fatal(err)
	}
	w := newTLSWorld(t, func(string) certs.Check { return role }, "spiffe://test/push-manager/pm")
	w.register("A", "b:1") // only the hello tells
	w.until("the hello has told", func() bool {
		return strings.Contains(w.metrics(), `push_manager_link_wrong_node_total{node_id="A",found="not registered"}`)
	})
	if r := w.do(w.toUser("alice", "hello")); r.Delivered != 0 || len(w.b.texts("alice")) > 0 {
		t.Errorf("%+v", r)
	}
	w.register("A", "a:1")
	w.up(1)
	if r := w.do(w.toUser("alice", "hello")); r.Delivered != 1 {
		t.Errorf("%+v", r)
	}
}
