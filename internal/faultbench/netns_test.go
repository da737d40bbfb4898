package faultbench

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// netnsEnv is set where a test runs inside of a network namespace: the name of the one
// in which the node is, and where push-manager is.
const (
	netnsEnv  = "FAULTBENCH_NETNS"
	binaryEnv = "FAULTBENCH_BINARY"
	nodeHost  = "10.99.0.2"
)

// ip runs one ip(8) command.
func ip(args ...string) error {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// TestHalfOpenLinks makes two network namespaces with a cable between them and runs
// TestInNamespace in one of them, with a node in the other. Nothing outside of them is
// touched.
func TestHalfOpenLinks(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("network namespaces need root")
	}
	ours, theirs := fmt.Sprintf("faults-%d-a", os.Getpid()), fmt.Sprintf("faults-%d-b", os.Getpid())
	for _, name := range []string{ours, theirs} {
		if err := ip("netns", "add", name); err != nil {
			t.Skip(err)
		}
		t.Cleanup(func() {
			if err := ip("netns", "del", name); err != nil {
				t.Error(err)
			}
		})
	}
	for _, args := range []string{
		"-n " + ours + " link set lo up",
		"-n " + theirs + " link set lo up",
		"-n " + ours + " link add va type veth peer name vb netns " + theirs,
		"-n " + ours + " addr add 10.99.0.1/24 dev va",
		"-n " + theirs + " addr add " + nodeHost + "/24 dev vb",
		"-n " + ours + " link set va up",
		"-n " + theirs + " link set vb up",
	} {
		if err := ip(strings.Fields(args)...); err != nil {
			t.Skip(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	inside := exec.Command("ip", "netns", "exec", ours, self, "-test.run=^TestInNamespace$", "-test.v", "-test.timeout=30m")
	inside.Env = append(os.Environ(), netnsEnv+"="+theirs, binaryEnv+"="+pushManager(t))
	out, err := inside.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestInNamespace") {
		t.Errorf("in the namespace: %v\n%s", err, out)
		return
	}
	t.Logf("%s", out)
}

// TestInNamespace pulls the cable to a node: no FIN, no RST, no answer (L2).
func TestInNamespace(t *testing.T) {
	theirs := os.Getenv(netnsEnv)
	if theirs == "" {
		t.Skip("runs inside of TestHalfOpenLinks")
	}
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy=%v", busy), func(t *testing.T) { pullCable(t, theirs, busy) })
	}
}

func pullCable(t *testing.T, theirs string, busy bool) {
	s := aloneInStreet(t)
	bad := newChild(t, s.ledger, "bad", nodeHost+":0", "", "ip", "netns", "exec", theirs)
	s.children = append(s.children, bad)
	s.register("bad", bad.address)
	bad.connect(s.bad...)
	s.world.place("bad", s.bad...)
	s.child("good", s.good...)
	m := s.manage(2, prompt()...)
	m.good(room("mixed"))
	m.rest()
	others := m.callers(4, s.someGood)
	var victims *load
	if busy {
		victims = m.callers(16, s.someBad)
		victims.more(volume / 5)
	}
	s.ledger.note("the cable is pulled")
	since := s.ledger.now()
	if err := ip("-n", theirs, "link", "set", "vb", "down"); err != nil {
		t.Fatal(err)
	}
	if !busy {
		first := m.push(user("bad1"))
		t.Logf("the first push: %v", first)
		if first.summary.GetUnknown() != 1 || first.took() > 4*time.Second+slackForCI {
			t.Errorf("unknown at the ack deadline: %v", first)
		}
		victims = m.callers(16, s.someBad)
	}
	eventually(t, "the streams are closed", func() error {
		if m.connections("bad") != 0 {
			return errStill
		}
		return nil
	})
	closed := s.ledger.now() - since
	t.Logf("closed after %v", closed.Round(time.Millisecond))
	if closed > 8*time.Second+slackForCI {
		t.Error("that is too late")
	}
	victims.more(volume / 2)
	victims.end()
	others.more(volume / 2)
	others.end()
	all := s.tallyBad(since)
	s.noErrors(all)
	if all.unknown == 0 || all.failed == 0 || all.delivered > 0 && !busy {
		t.Errorf("unknown first, then failed: %v", all)
	}
	s.unharmed(since)
	if err := ip("-n", theirs, "link", "set", "vb", "up"); err != nil {
		t.Fatal(err)
	}
	back := s.ledger.now()
	s.ledger.note("the cable is back")
	took := m.reaches(2)
	t.Logf("connected %v after the cable was back", took.Round(time.Millisecond))
	m.good(room("mixed"))
	victims = m.callers(4, func(r *rand.Rand) request { return some(r, s.bad, "bad room") })
	victims.more(volume / 5)
	victims.end()
	t.Logf("%v later: %v", s.ledger.now()-back, s.tallyBad(back))
	m.atRest()
}
