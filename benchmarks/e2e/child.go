package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// endTimeout is how long a child may take to end by itself.
const endTimeout = 3 * time.Second

// stderrKept is how much of what a child says is kept for the error message.
const stderrKept = 16 << 10

// child is a process that this one has started.
type child struct {
	name   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stderr *tail
	exited chan struct{}

	mu    sync.Mutex // one request at a time
	enc   *json.Encoder
	lines *bufio.Scanner
}

// spawner starts processes from one thread that lives as long as it does: the
// kernel kills a child when the thread that started it is gone.
type spawner struct {
	jobs chan func()
	done chan struct{}
}

func newSpawner() *spawner {
	s := &spawner{jobs: make(chan func()), done: make(chan struct{})}
	go func() { // ends with close
		defer close(s.done)
		runtime.LockOSThread()
		for job := range s.jobs {
			job()
		}
	}()
	return s
}

func (s *spawner) start(cmd *exec.Cmd) (err error) {
	started := make(chan struct{})
	s.jobs <- func() {
		defer close(started)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
		err = cmd.Start()
	}
	<-started
	return err
}

func (s *spawner) close() {
	close(s.jobs)
	<-s.done
}

// startRole starts this program again, as one of the parts. dir is where it runs.
func (s *spawner) startRole(role, dir string, arg any, env ...string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	raw, err := json.Marshal(arg)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	return s.startChild(role, self, dir, append(env, roleKey+"="+role, argKey+"="+string(raw)))
}

// startChild starts a program with an environment of its own.
func (s *spawner) startChild(name, program, dir string, env []string, args ...string) (*child, error) {
	cmd := exec.Command(program, args...) //nolint:noctx,gosec // our own programs, which end with their standard input or by kill
	cmd.Dir = dir
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + dir}, env...)
	c := &child{name: name, cmd: cmd, stderr: newTail(), exited: make(chan struct{})}
	cmd.Stderr = c.stderr
	var err error
	if c.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	out, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	cmd.Stdout = w
	c.enc = json.NewEncoder(c.stdin)
	c.lines = bufio.NewScanner(out)
	c.lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	err = s.start(cmd)
	_ = w.Close() // the child's now
	if err != nil {
		_ = out.Close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() { // ends with the process
		_ = cmd.Wait() // how it ended is seen by whoever waits for an answer
		_ = out.Close()
		close(c.exited)
	}()
	return c, nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// call asks the child and waits for its answer. A child that does not answer until
// ctx ends is killed: it would answer the next question with this one's reply.
func (c *child) call(ctx context.Context, op string, arg, reply any) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { _ = c.cmd.Process.Kill() })
	defer stop()
	if err := c.exchange(op, arg, reply); err != nil {
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		return fmt.Errorf("%s: %s: %w%s", c.name, op, err, c.stderr)
	}
	return nil
}

func (c *child) exchange(op string, arg, reply any) error {
	raw, err := json.Marshal(arg)
	if err != nil {
		return err
	}
	if err := c.enc.Encode(request{Op: op, Arg: raw}); err != nil {
		return err
	}
	if !c.lines.Scan() {
		return errors.Join(io.ErrUnexpectedEOF, c.lines.Err())
	}
	var r response
	if err := json.Unmarshal(c.lines.Bytes(), &r); err != nil {
		return err
	}
	if r.Error != "" {
		return errors.New(r.Error)
	}
	if reply == nil {
		return nil
	}
	return json.Unmarshal(r.Reply, reply)
}

// end asks the child to end, and sees to it that it does.
func (c *child) end() {
	_ = c.stdin.Close()
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // for programs that do not look at their standard input
	late := time.NewTimer(endTimeout)
	defer late.Stop()
	select {
	case <-c.exited:
		return
	case <-late.C:
	}
	_ = c.cmd.Process.Kill()
	<-c.exited
}

// tail keeps the end of what a child says, and tells when a line of it matches.
type tail struct {
	mu    sync.Mutex
	buf   []byte
	lines chan []byte // complete lines, dropped while nobody reads
	rest  []byte
}

func newTail() *tail { return &tail{lines: make(chan []byte, 64)} }

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - stderrKept; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	t.rest = append(t.rest, p...)
	for {
		line, rest, found := bytes.Cut(t.rest, []byte("\n"))
		if !found {
			return len(p), nil
		}
		select {
		case t.lines <- bytes.Clone(line):
		default:
		}
		t.rest = rest
	}
}

// String is empty or begins on a new line.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.buf) == 0 {
		return ""
	}
	return "\n" + string(t.buf)
}
