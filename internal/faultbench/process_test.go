package faultbench

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// process is a program under test. It is killed at the end of the test if it still
// runs.
type process struct {
	t    testing.TB
	name string
	cmd  *exec.Cmd
	out  output
	done chan struct{} // closed when it has ended
}

// output is what a process has printed so far.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// run starts a command that prepare has had a look at, with nothing in its
// environment but env.
func run(t testing.TB, name string, cmd *exec.Cmd, env []string) *process {
	t.Helper()
	cmd.Dir = t.TempDir() // no config.yaml of ours
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "GORACE=halt_on_error=1"}, env...)
	p := &process{t: t, name: name, cmd: cmd, done: make(chan struct{})}
	cmd.Stderr = &p.out
	if cmd.Stdout == nil {
		cmd.Stdout = &p.out
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait() // how it ended is told by what it printed
		close(p.done)
	}()
	t.Cleanup(func() {
		p.kill()
		printed := p.out.String()
		if strings.Contains(printed, "DATA RACE") || strings.Contains(printed, "panic:") {
			t.Errorf("%s has a data race or a panic", name)
		}
		if t.Failed() {
			t.Logf("%s printed:\n%s", name, tail(printed, 60))
		}
	})
	return p
}

func tail(s string, lines int) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// signal sends a signal; a process that has ended does not mind.
func (p *process) signal(s os.Signal) { _ = p.cmd.Process.Signal(s) }

func (p *process) stop() { p.signal(syscall.SIGSTOP) }
func (p *process) cont() { p.signal(syscall.SIGCONT) }

// kill ends it at once and waits for its end.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}
