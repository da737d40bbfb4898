package acceptance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/programs"
	pubsub "github.com/push-manager/push-manager/proto"
)

// patience is how long a test waits for what must happen. It is long: only a
// failure takes it.
const patience = 2 * time.Minute

func TestMain(m *testing.M) {
	if dir := os.Getenv(etcdEnv); dir != "" {
		os.Exit(serveEtcd(dir))
	}
	// Lasting goroutines: ants keeps those of its default pool, from its
	// initialisation on.
	ignore := goleak.IgnoreCurrent()
	code := m.Run()
	if err := programs.Remove(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if code == 0 {
		if err := goleak.Find(ignore); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// binary returns the path of a command of this module.
func binary(t *testing.T, name string) string {
	t.Helper()
	if _, err := programs.Build("push-manager", "controller", "connect-node", "pushctl", "pushload"); err != nil { // all at once
		t.Fatal(err)
	}
	return programs.Path(t, name)
}

// process is a program under test. It is killed at the end of the test if it still
// runs.
type process struct {
	t    *testing.T
	name string
	cmd  *exec.Cmd
	out  output
	done chan struct{} // closed when it has ended
	err  error         // of Wait, after done
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

// start runs a program with nothing in its environment but env.
func start(t *testing.T, name string, env []string, args ...string) *process {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = t.TempDir() // no config.yaml of ours
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "GORACE=halt_on_error=1"}, env...)
	p := &process{t: t, name: filepath.Base(name) + " " + strings.Join(args, " "), cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("%s printed:\n%s", p.name, tail(p.out.String(), 60))
		}
	})
	return p
}

func tail(s string, lines int) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
}

// exit waits for the process to end and returns its exit code.
func (p *process) exit(within time.Duration) int {
	p.t.Helper()
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
		p.t.Fatalf("%s still runs after %s", p.name, within)
	}
	if exit, ok := errors.AsType[*exec.ExitError](p.err); ok {
		return exit.ExitCode()
	}
	if p.err != nil {
		p.t.Fatalf("%s: %v", p.name, p.err)
	}
	return 0
}

// eventually waits for ok, which says what is missing while it is not true.
func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-tick.C
	}
}

var httpClient = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// get fetches a page of a program's HTTP side.
func get(url string) (int, string, error) {
	resp, err := httpClient.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	_, err = body.ReadFrom(resp.Body)
	return resp.StatusCode, body.String(), err
}

// ready waits until a program says that it is.
func ready(t *testing.T, metricsPort string) {
	t.Helper()
	eventually(t, "readyz", func() error {
		code, body, err := get("http://127.0.0.1:" + metricsPort + "/readyz")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
}

// manager is a Push-Manager process and a Biz-Server's connection to it.
type manager struct {
	*process
	pubsub.PushManagerServiceClient
	api     string
	metrics string
}

// startManager starts push-manager and waits until it is ready and has links to the
// nodes.
func startManager(t *testing.T, etcd, controller string, nodes int, env ...string) *manager {
	t.Helper()
	return startManagerAt(t, freeport.Addr(t), etcd, controller, nodes, env...)
}

// startManagerAt is startManager with the address of its API. Where that is not 127.0.0.1, env says where it listens.
func startManagerAt(t *testing.T, api, etcd, controller string, nodes int, env ...string) *manager {
	t.Helper()
	_, port, err := net.SplitHostPort(api)
	if err != nil {
		t.Fatal(err)
	}
	metrics := freeport.Take(t, 1)[0]
	// What these tests promise is not how fast a machine is, so no push may run out of time on a busy one.
	env = append([]string{"MANAGER_ID=pm-under-test", "LOOKUP_TIMEOUT=5s", "LINK_ACK_TIMEOUT=20s", "LINK_QUEUE_AGE=20s", "LINK_SILENCE=30s", "PUSH_TIMEOUT=30s"}, env...)
	env = append(append([]string{"HTTP_PORT=0"}, env...), "GRPC_PORT="+port, "METRICS_PORT="+metrics,
		"CONTROLLER_ADDRESS="+controller, "ETCD_ENDPOINTS="+etcd, "LOG_LEVEL=debug")
	m := &manager{process: start(t, binary(t, "push-manager"), env), api: api, metrics: "http://127.0.0.1:" + metrics}
	m.PushManagerServiceClient = pubsub.NewPushManagerServiceClient(dial(t, m.api))
	ready(t, metrics)
	if nodes > 0 {
		m.reaches(nodes)
	}
	return m
}

// reaches waits until the manager is connected to n nodes on all its shards.
func (m *manager) reaches(n int) {
	m.t.Helper()
	eventually(m.t, "links to the nodes", func() error {
		values, err := m.readMetrics()
		if err != nil {
			return err
		}
		up := 0
		for name, v := range values {
			if strings.HasPrefix(name, "push_manager_node_connections{") && v >= values["push_manager_shards"] && v > 0 {
				up++
			}
		}
		if up != n {
			return fmt.Errorf("%d of %d nodes are connected", up, n)
		}
		return nil
	})
}

// readMetrics reads the manager's metrics by name with labels.
func (m *manager) readMetrics() (map[string]float64, error) {
	_, body, err := get(m.metrics + "/metrics")
	if err != nil {
		return nil, err
	}
	values := make(map[string]float64)
	for line := range strings.Lines(body) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if v, err := strconv.ParseFloat(value, 64); ok && err == nil && !strings.HasPrefix(line, "#") {
			values[name] = v
		}
	}
	return values, nil
}

// dial connects to a gRPC server. The connection is closed at the end of the test.
func dial(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// within bounds one call.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func text(s string) *pubsub.MessageContent {
	return &pubsub.MessageContent{Data: []byte(s)}
}
