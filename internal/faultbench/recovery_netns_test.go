package faultbench

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// routerEnv is the network namespace between the one that a test runs in and the
// node's, whose name is in netnsEnv.
const routerEnv = "FAULTBENCH_ROUTER"

const (
	ourFarHost  = "10.98.1.2"
	nodeFarHost = "10.98.2.2"
)

// TestRecoveryFromBlackHole makes three network namespaces in a row and runs
// TestRecoveryInNamespace in the first, with a node in the last. The one between them
// forwards, or swallows what it should forward without a word to anybody.
func TestRecoveryFromBlackHole(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("network namespaces need root")
	}
	name := func(part string) string { return fmt.Sprintf("hole-%d-%s", os.Getpid(), part) }
	ours, router, theirs := name("a"), name("r"), name("b")
	for _, ns := range []string{ours, router, theirs} {
		if err := ip("netns", "add", ns); err != nil {
			t.Skip(err)
		}
		t.Cleanup(func() {
			if err := ip("netns", "del", ns); err != nil {
				t.Error(err)
			}
		})
	}
	for _, args := range []string{
		"-n " + ours + " link set lo up",
		"-n " + theirs + " link set lo up",
		"-n " + ours + " link add va type veth peer name ra netns " + router,
		"-n " + theirs + " link add vb type veth peer name rb netns " + router,
		"-n " + ours + " addr add " + ourFarHost + "/24 dev va",
		"-n " + router + " addr add 10.98.1.1/24 dev ra",
		"-n " + router + " addr add 10.98.2.1/24 dev rb",
		"-n " + theirs + " addr add " + nodeFarHost + "/24 dev vb",
		"-n " + ours + " link set va up",
		"-n " + router + " link set ra up",
		"-n " + router + " link set rb up",
		"-n " + theirs + " link set vb up",
		"-n " + ours + " route add default via 10.98.1.1",
		"-n " + theirs + " route add default via 10.98.2.1",
		"netns exec " + router + " sysctl -qw net.ipv4.ip_forward=1",
	} {
		if err := ip(strings.Fields(args)...); err != nil {
			t.Skip(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	inside := exec.Command("ip", "netns", "exec", ours, self, "-test.run=^TestRecoveryInNamespace$", "-test.v", "-test.timeout=30m")
	inside.Env = append(os.Environ(), netnsEnv+"="+theirs, routerEnv+"="+router, binaryEnv+"="+pushManager(t))
	out, err := inside.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestRecoveryInNamespace") {
		t.Errorf("in the namespace: %v\n%s", err, out)
		return
	}
	t.Logf("%s", out)
}

// TestRecoveryInNamespace lets everything between Push-Manager and a node vanish, for
// shorter and for longer than it takes until the streams are closed.
func TestRecoveryInNamespace(t *testing.T) {
	router, theirs := os.Getenv(routerEnv), os.Getenv(netnsEnv)
	if router == "" {
		t.Skip("runs inside of TestRecoveryFromBlackHole")
	}
	s := aloneInStreet(t)
	bad := newChildWith(t, s.ledger, "bad", nodeFarHost+":0", "", s.bad, "ip", "netns", "exec", theirs)
	s.children = append(s.children, bad)
	s.register("bad", bad.address)
	s.world.place("bad", s.bad...)
	s.child("good", s.good...)
	routes := func(what string) {
		for _, host := range []string{nodeFarHost, ourFarHost} { // requests first, then acks
			if err := ip("-n", router, "route", what, "blackhole", host+"/32"); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.newRecovery().repeat(outage{
		name: "node black-holed", settled: settledAfterSilence, least: 1500 * time.Millisecond, spread: 3500 * time.Millisecond,
		begin: func() { routes("add") },
		end: func() time.Duration {
			at := s.ledger.now()
			routes("del")
			return at
		},
	})
}
