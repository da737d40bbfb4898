package examples_test

import (
	"bufio"
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/devstack"
	"github.com/push-manager/push-manager/internal/freeport"
)

// TestExamplesPushToEachOther: what Biz-Server pushes arrives at a client of the Connect-Node, beside a whole
// deployment.
func TestExamplesPushToEachOther(t *testing.T) {
	bin := t.TempDir() + "/"
	if out, err := exec.Command("go", "build", "-o", bin, "./connect-node", "./biz-server").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stack, err := devstack.Start(ctx, devstack.Config{Nodes: 1, BasePort: freeport.Row(t, 16)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
		defer cancel()
		if err := stack.Drain(ctx); err != nil {
			t.Error(err)
		}
	})
	web := freeport.Addr(t)
	connectNode := exec.CommandContext(ctx, filepath.Join(bin, "connect-node"))
	connectNode.Env = []string{"GRPC_ADDRESS=127.0.0.1:0", "HTTP_ADDRESS=" + web, "CONTROLLER_ADDRESS=" + stack.ControllerAddress(), "ETCD_ENDPOINTS=" + stack.EtcdEndpoint()}
	connectNode.Stderr = os.Stderr
	connectNode.Cancel = func() error { return connectNode.Process.Signal(syscall.SIGTERM) }
	if err := connectNode.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = connectNode.Process.Signal(syscall.SIGTERM)
		if err := connectNode.Wait(); err != nil {
			t.Errorf("connect-node: %v", err)
		}
	}()

	var events *http.Response
	for events == nil {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+web+"/?user=carol&room=lobby", nil)
		if err != nil {
			t.Fatal(err)
		}
		if events, err = http.DefaultClient.Do(r); err != nil {
			if ctx.Err() != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	defer func() { _ = events.Body.Close() }()
	lines := bufio.NewScanner(events.Body)
	until := func(want string) {
		t.Helper()
		for lines.Scan() {
			if lines.Text() == want {
				return
			}
		}
		t.Fatalf("no %q: %v", want, lines.Err())
	}
	until("data: joined lobby")
	for {
		bizServer := exec.CommandContext(ctx, filepath.Join(bin, "biz-server"), "lobby", "Hello")
		bizServer.Env = []string{"PUSH_MANAGER_ADDRESS=" + stack.Address()}
		out, err := bizServer.CombinedOutput()
		if err != nil {
			t.Fatalf("biz-server: %v\n%s", err, out)
		}
		if strings.Contains(string(out), "delivered 1 offline 0 failed 0 unknown 0") {
			break
		}
		// Push-Manager may find the new node in etcd a moment later than the Controller the user.
		if !strings.Contains(string(out), "failed 1") {
			t.Fatalf("biz-server says %q", out)
		}
		time.Sleep(50 * time.Millisecond)
	}
	until("data: Hello")
}

// TestExamplesStayShort counts lines of code behind the imports: README names the figures.
func TestExamplesStayShort(t *testing.T) {
	for name, most := range map[string]int{"connect-node": 60, "biz-server": 15} {
		src, err := os.ReadFile(filepath.Join(name, "main.go"))
		if err != nil {
			t.Fatal(err)
		}
		_, code, _ := strings.Cut(string(src), "\n)\n")
		lines := 0
		for line := range strings.Lines(code) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "//") {
				lines++
			}
		}
		if lines == 0 || lines > most {
			t.Errorf("%s: %d lines, want 1 to %d", name, lines, most)
		}
	}
}
