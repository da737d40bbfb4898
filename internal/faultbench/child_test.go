package faultbench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/transport/node"
)

// childEnv makes the test binary a Connect-Node: its id, the address to listen on,
// etcd's endpoint, empty where the test registers it, and the users who are connected
// from the beginning.
const childEnv = "FAULTBENCH_NODE"

// serveChild is a Connect-Node built on transport/node, as any gateway would be. Its
// parent talks to it in lines: "+user" and "-user" say who is connected, "sync" is
// answered behind everything that has arrived. It answers "got ID USER" for each push,
// before the push is acknowledged.
func serveChild(spec string) int {
	part := strings.Split(spec, ",")
	id, addr, endpoint := part[0], part[1], part[2]
	var mu sync.Mutex
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		_, _ = fmt.Fprintf(os.Stdout, format+"\n", args...) // a parent that is gone kills us
	}
	users := newClients(id, func(id, user, _, _ string) { say("got %s %s", id, user) }, strings.Fields(part[3])...)
	srv, err := node.New(node.Config{NodeID: id, Sessions: users})
	if err != nil {
		return complain(err)
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return complain(err)
	}
	gs := grpc.NewServer(node.ServerOptions()...)
	srv.Attach(gs)
	go func() { _ = gs.Serve(listener) }()
	if endpoint != "" {
		etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
		if err != nil {
			return complain(err)
		}
		if err := srv.Register(etcd, listener.Addr().String()); err != nil {
			return complain(err)
		}
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() { listen(users, say); stop <- syscall.SIGKILL }() // the parent is gone
	say("listens %s", listener.Addr())
	<-stop
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_ = srv.Deregister(ctx)
	if err := srv.Drain(ctx); err != nil {
		return complain(err)
	}
	gs.Stop()
	srv.Close()
	return 0
}

func complain(err error) int {
	_, _ = fmt.Fprintln(os.Stderr, err)
	return 1
}

func listen(users *clients, say func(string, ...any)) {
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		switch line := in.Text(); line[:1] {
		case "+":
			users.connect(line[1:])
		case "-":
			users.leave(line[1:])
		}
		say("done %s", in.Text())
	}
}

// child is a Connect-Node in a process of its own.
type child struct {
	*process
	id, address string
	commands    io.WriteCloser
	read        chan struct{} // closed when all that it said has been read

	mu   sync.Mutex // one command at a time
	said chan string
}

// newChild starts a Connect-Node at addr. It registers itself if endpoint names etcd.
// Through prefix it runs in a network namespace.
func newChild(t testing.TB, l *ledger, id, addr, endpoint string, prefix ...string) *child {
	t.Helper()
	return newChildWith(t, l, id, addr, endpoint, nil, prefix...)
}

// newChildWith is newChild with users who are there before it listens, as those are
// who wait for their gateway to come back.
func newChildWith(t testing.TB, l *ledger, id, addr, endpoint string, users []string, prefix ...string) *child {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	argv := append(prefix, self)
	cmd := exec.Command(argv[0], argv[1:]...)
	commands, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	// Not StdoutPipe: Wait would close it before all is read.
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = in
	c := &child{id: id, commands: commands, read: make(chan struct{}), said: make(chan string, 16)}
	c.process = run(t, "node "+id, cmd, []string{childEnv + "=" + strings.Join([]string{id, addr, endpoint, strings.Join(users, " ")}, ",")})
	_ = in.Close() // the child has it
	go func() {
		defer close(c.read)
		defer func() { _ = out.Close() }()
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if push, user, ok := strings.Cut(strings.TrimPrefix(lines.Text(), "got "), " "); ok && strings.HasPrefix(lines.Text(), "got ") {
				l.arrive(push, user, user, id)
				continue
			}
			c.said <- lines.Text()
		}
		close(c.said)
	}()
	t.Cleanup(func() { c.kill(); <-c.read })
	line := <-c.said
	var ok bool
	if c.address, ok = strings.CutPrefix(line, "listens "); !ok {
		t.Fatalf("node %s: %q", id, line)
	}
	return c
}

// tell gives a command and waits until it is done, or the child is gone.
func (c *child) tell(command string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := io.WriteString(c.commands, command+"\n"); err != nil {
		return
	}
	for line := range c.said {
		if line == "done "+command {
			return
		}
	}
}

func (c *child) connect(users ...string) {
	for _, user := range users {
		c.tell("+" + user)
	}
}

func (c *child) leave(user string) { c.tell("-" + user) }

// flush waits until all that has arrived so far stands in the ledger.
func (c *child) flush() { c.tell("sync") }

// kill ends it at once; what had arrived before stands in the ledger.
func (c *child) kill() {
	c.process.kill()
	<-c.read
}
