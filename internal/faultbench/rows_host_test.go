package faultbench

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// Faults of the machine that Push-Manager runs on, by their ids in docs/faults.md.

// calm checks that, since rest, the nodes were thought to be there all the time: no stream
// was closed for silence or opened again, and readiness has stayed.
func (m *manager) calm() {
	m.b.t.Helper()
	for _, name := range []string{"link_reconnects_total", "link_heartbeat_timeouts_total", "link_dials_total", "nodes", "ready"} {
		if got, want := m.metric(name), m.baseline["push_manager_"+name]; got != want {
			m.b.t.Errorf("%s is %v and was %v", name, got, want)
		}
	}
}

// someone makes a push for anybody, patiently.
func (s *street) someone(r *rand.Rand) request {
	return patiently(some(r, append(s.bad, s.good...), "mixed"))
}

// everywhere is run with traffic to both nodes. Its callers are connected when it returns.
func (s *street) everywhere(env ...string) *whole {
	s.t.Helper()
	w := s.runFor(s.someone, env...)
	w.all.more(1)
	return w
}

// undisturbed checks that no push noticed, and no stream was touched, since the rest
// before.
func (w *whole) undisturbed() {
	w.t.Helper()
	w.all.more(volume / 10)
	w.all.end()
	all := w.ledger.tally(w.since, w.ledger.now(), nil)
	w.t.Log(all)
	if all.success != all.pushes {
		w.t.Errorf("pushes were harmed: %v", all)
	}
	w.m.calm()
	w.m.atRest()
}

// P7: others take the CPU, or all of it for a while. A process that did not run has
// not heard its nodes, and that is no sign that they were silent.
func TestStolenCPUDeclaresNoNodeDown(t *testing.T) {
	slow(t)
	s := newStreet(t)
	s.wire("bad", s.bad...)
	s.wire("good", s.good...)
	// The margins are for our own nodes and callers, which a loaded machine may not let run.
	const silence = 5 * time.Second
	m := s.manage(2, "PUSH_TIMEOUT=30s", "LINK_ACK_TIMEOUT=4s", "LINK_QUEUE_AGE=4s", fmt.Sprint("LINK_SILENCE=", silence), "LOOKUP_TIMEOUT=10s")
	s.watch(time.Second)
	m.good(room("mixed"))
	m.rest()
	since := s.ledger.now()
	slow := s.someone
	callers := m.callers(4, slow)
	for range 3 {
		callers.more(volume / 5)
		s.ledger.note("Push-Manager is stopped for longer than nodes may be silent")
		m.stop()
		wait(silence + 500*time.Millisecond)
		m.cont()
	}
	callers.more(volume / 5)
	callers.end()
	// Nodes that could not run either were silent, and are rightly thought to be.
	calm := func() {
		t.Helper()
		if !s.ledger.calm(since, s.ledger.now()) {
			t.Log("the machine let our nodes not run: whether they were thought to be down says nothing")
			return
		}
		m.calm()
	}
	calm()
	if quota(t, m.process, 0.25) {
		s.ledger.note("a quarter of a core is left")
		few := rand.New(rand.NewPCG(s.seed, 0))
		for end := time.Now().Add(6 * time.Second); time.Now().Before(end); wait(100 * time.Millisecond) {
			m.push(slow(few))
		}
		calm()
	}
	all := s.ledger.tally(since, s.ledger.now(), func(p *push) bool { return !s.ledger.nearFreezeLocked(p, silence) })
	t.Logf("%v stalls; %v", m.metric("link_stalls_total"), all)
	s.noErrors(all)
	if all.success != all.pushes {
		t.Errorf("slower, and no more than that: %v", all)
	}
}

// quota leaves a process a share of one core. False: this machine does not let us.
func quota(t *testing.T, p *process, share float64) bool {
	t.Helper()
	const period = 100_000 // in microseconds
	return confine(t, p, "cpu", map[string]int{"cpu.cfs_period_us": period, "cpu.cfs_quota_us": int(share * period)})
}

// confine gives a process a control group of its own (version 1 of them). False: this machine
// does not let us.
func confine(t *testing.T, p *process, controller string, settings map[string]int) bool {
	t.Helper()
	dir := filepath.Join("/sys/fs/cgroup", controller, fmt.Sprintf("faults-%d", p.cmd.Process.Pid))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Logf("the process is not confined: %v", err)
		return false
	}
	t.Cleanup(func() {
		p.kill() // a group with a process in it stays
		eventually(t, "the group goes", func() error { return os.Remove(dir) })
	})
	for name, value := range settings {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(strconv.Itoa(value)), 0o644); err != nil {
			t.Logf("the process is not confined: %v", err)
			return false
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(p.cmd.Process.Pid)), 0o644); err != nil {
		t.Logf("the process is not confined: %v", err)
		return false
	}
	return true
}

// P9: no more descriptors. What is connected works on, and what is not gets in when
// there is room again.
func TestNoDescriptorsLeftHarmsNoCallUnderWay(t *testing.T) {
	w := newStreet(t).everywhere("API_HANDSHAKE_TIMEOUT=5m") // or the crowd is gone again soon
	const spare = 20
	pid := strconv.Itoa(w.m.cmd.Process.Pid)
	limit := fmt.Sprint(int(w.m.baseline["process_open_fds"]) + spare)
	if out, err := exec.Command("prlimit", "--pid", pid, "--nofile="+limit+":"+limit).CombinedOutput(); err != nil {
		t.Skipf("prlimit: %v %s", err, out)
	}
	w.ledger.note("%s descriptors and no more", limit)
	var crowd []net.Conn
	for range 10 * spare {
		c, err := net.Dial("tcp", w.m.api) // the kernel takes it, for as long as its queue has room
		if err != nil {
			t.Fatal(err)
		}
		crowd = append(crowd, c)
	}
	t.Cleanup(func() {
		for _, c := range crowd {
			_ = c.Close()
		}
	})
	eventually(t, "the descriptors are used up", func() error {
		files, err := os.ReadDir("/proc/" + pid + "/fd")
		if err == nil && len(files) < int(w.m.baseline["process_open_fds"])+spare {
			err = fmt.Errorf("%d of %s are in use", len(files), limit)
		}
		return err
	})
	w.all.more(volume / 5)
	w.m.good(patiently(room("mixed"))) // on the connection that is there
	for _, c := range crowd {
		_ = c.Close()
	}
	fresh := w.m.dial()
	took := eventually(t, "a new connection gets in", func() error {
		if p := w.m.ask(t.Context(), fresh, patiently(user("good1"))); !p.success {
			return fmt.Errorf("%v", p)
		}
		return nil
	})
	t.Logf("a new connection got in after %v", took.Round(time.Millisecond))
	w.undisturbed()
}
