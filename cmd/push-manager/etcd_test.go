package main

import (
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

// TestProgramsStartWithoutEtcdAndSayWhy: whatever keeps them from etcd, they run, /readyz and the log name it, and they
// are ready when it is mended.
func TestProgramsStartWithoutEtcdAndSayWhy(t *testing.T) {
	etcd := etcdtest.Reserve(t)
	ca, other := etcdtest.NewCA(t), etcdtest.NewCA(t)
	cert, key := ca.Issue("127.0.0.1")
	secure := etcdtest.Start(t, etcdtest.WithTLS(cert, key, ""))

	// Nodes must reach a Controller that waits for etcd: it is ready, and says what it lacks.
	waiting := func(name string) int {
		if name == "controller" {
			return http.StatusOK
		}
		return http.StatusServiceUnavailable
	}

	started := map[string]*process{}
	programs := servers(t)
	for name, prog := range programs {
		started[name] = execute(t, append(prog.env, "ETCD_ENDPOINTS="+etcd.Endpoint(), "ETCD_USERNAME=pm", "ETCD_PASSWORD=secret"), prog.name)
	}
	for name, prog := range programs {
		ready := strings.Replace(prog.health, "healthz", "readyz", 1)
		until(t, name+": the reason in /readyz", func() bool {
			return strings.Contains(answers(t, ready, waiting(name)), "connection refused")
		})
	}
	etcd.Restart()
	etcd.EnableAuth("pm", "secret", "/services/")
	for name, prog := range programs {
		ready := strings.Replace(prog.health, "healthz", "readyz", 1)
		until(t, name+": etcd is no reason any more", func() bool {
			if name == "controller" {
				return answers(t, ready, http.StatusOK) == "ok\n"
			}
			return !strings.Contains(answers(t, ready, http.StatusServiceUnavailable), "etcd") // their Controller is stuck
		})
		p := started[name]
		p.signal(syscall.SIGTERM)
		p.ends(10*time.Second, 0)
		if n := refusals(p.stderr.String(), etcd.Endpoint()); n == 0 || n > 2 {
			t.Errorf("%s: the cause is logged %d times, once by each part that needs etcd is right:\n%s", name, n, p.stderr)
		}
	}

	for name, prog := range servers(t) {
		execute(t, append(prog.env, "ETCD_ENDPOINTS="+secure.Endpoint(), "ETCD_TLS_CA_FILE="+other.File), prog.name)
		ready := strings.Replace(prog.health, "healthz", "readyz", 1)
		until(t, name+": the certificate in /readyz", func() bool {
			return strings.Contains(answers(t, ready, waiting(name)), "certificate signed by unknown authority")
		})
	}
}

// refusals counts the lines of a log in which a connection to address is refused. The programs see each other in etcd,
// and lose each other when they are stopped: that is another matter.
func refusals(log, address string) (n int) {
	for line := range strings.Lines(log) {
		if strings.Contains(line, address+": connect: connection refused") {
			n++
		}
	}
	return n
}

func TestANodeThatRefusesIsNoRefusalOfEtcd(t *testing.T) {
	log := `msg="discovery is interrupted, the nodes known stay" err="dial tcp 127.0.0.1:2379: connect: connection refused"` + "\n" +
		`msg="node not reachable" node=connect-node-1 addr=127.0.0.1:23790 error="dial tcp 127.0.0.1:23790: connect: connection refused"` + "\n"
	if n := refusals(log, "127.0.0.1:2379"); n != 1 {
		t.Errorf("%d lines are counted, want 1", n)
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}
