package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/programs"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// binaries is where the commands are.
var binaries string

func TestMain(m *testing.M) {
	var err error
	if binaries, err = programs.Build("push-manager", "controller", "connect-node", "pushctl", "pushload"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m,
		// The pool library keeps two goroutines of a pool of its own from the start on,
		goleak.IgnoreCurrent(),
		// and the metrics library one for each window of its summaries.
		goleak.IgnoreAnyFunction("github.com/VictoriaMetrics/metrics.summariesSwapCron"),
		goleak.Cleanup(func(code int) {
			_ = programs.Remove() // what is left is temporary
			os.Exit(code)
		}))
}

// process is a command that runs.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout *bufio.Scanner
	stderr *bytes.Buffer
	done   chan struct{}
	code   int
}

// execute runs a command with an environment of its own and no other.
func execute(t *testing.T, env []string, name string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(filepath.Join(binaries, name), args...), stderr: &bytes.Buffer{}, done: make(chan struct{})}
	p.cmd.Dir = t.TempDir()
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + p.cmd.Dir, "TMPDIR=" + p.cmd.Dir}, env...)
	p.cmd.Stderr = p.stderr
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout = w
	p.stdout = bufio.NewScanner(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // the exit code says it
		p.code = p.cmd.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // mostly it has ended
		<-p.done
		_ = out.Close()
	})
	return p
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// ends waits for the end and checks its exit code.
func (p *process) ends(within time.Duration, code int) {
	p.t.Helper()
	late := time.NewTimer(within)
	defer late.Stop()
	select {
	case <-p.done:
		if p.code != code {
			p.t.Errorf("exit code %d, want %d\n%s", p.code, code, p.stderr)
		}
	case <-late.C:
		p.t.Fatalf("still runs after %v", within)
	}
}

// answers polls an address of HTTP until it gives the status.
func answers(t *testing.T, url string, status int) string {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Second}
	for {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err == nil {
			body, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode == status {
				return string(body)
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not answer %d: %v", url, status, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// stuck takes connections and never says a word.
func stuck(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns = append(conns, c)
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
		for _, c := range conns {
			_ = c.Close()
		}
	})
	return l.Addr().String()
}

// server is a program as the tests start it.
type server struct {
	env    []string
	name   string
	grpc   string // where its API listens
	health string // its /healthz
}

// servers are the three programs, alone in the world but for stuck peers.
func servers(t *testing.T) map[string]server {
	t.Helper()
	peer, all := stuck(t), map[string]server{}
	for _, name := range []string{"push-manager", "controller", "connect-node"} {
		p := freeport.Take(t, 3)
		all[name] = server{
			env: []string{
				"ETCD_ENDPOINTS=" + peer, "CONTROLLER_ADDRESS=" + peer, "GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1], "HTTP_PORT=" + p[2],
			},
			name: name, grpc: "127.0.0.1:" + p[0], health: "http://127.0.0.1:" + p[1] + "/healthz",
		}
	}
	return all
}

func TestSIGTERMDrainsAndExitsWith0WithStuckPeers(t *testing.T) {
	for name, prog := range servers(t) {
		for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
			t.Run(name+" "+sig.String(), func(t *testing.T) {
				p := execute(t, prog.env, prog.name)
				answers(t, prog.health, http.StatusOK)
				p.signal(sig)
				p.ends(10*time.Second, 0)
			})
		}
	}
}

func TestSubcommandsAreTheSamePrograms(t *testing.T) {
	for name, prog := range servers(t) {
		if name == "push-manager" {
			name = "serve"
		}
		t.Run(name, func(t *testing.T) {
			p := execute(t, prog.env, "push-manager", name)
			answers(t, prog.health, http.StatusOK)
			p.signal(syscall.SIGTERM)
			p.ends(10*time.Second, 0)
		})
	}
}

// blocked is a Controller that takes look-ups and never answers.
type blocked struct {
	pubsub.UnimplementedControllerServiceServer

	end chan struct{}
}

func (b *blocked) GetRoomInfo(context.Context, *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
	<-b.end
	return &pubsub.GetRoomInfoResponse{}, nil
}

// nobody is a gateway without clients.
type nobody struct{}

func (nobody) Deliver(string, *node.Message) node.Outcome      { return node.NotHere }
func (nobody) Broadcast(*node.Message) (delivered, failed int) { return 0, 0 }
func (nobody) Online() int                                     { return 0 }

// serveGRPC runs a gRPC server until the test ends.
func serveGRPC(t *testing.T, s *grpc.Server) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return l.Addr().String()
}

// busy is a Push-Manager with a push that will not finish: its look-up hangs.
func busy(t *testing.T, env ...string) (p *process, ops string) {
	t.Helper()
	etcd := etcdtest.Start(t)
	n, err := node.New(node.Config{NodeID: "n1", Sessions: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer(node.ServerOptions()...)
	n.Attach(gs)
	if err := n.Register(etcd.Client(), serveGRPC(t, gs)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = n.Deregister(context.Background())
		n.Close()
	})
	controller, b := grpc.NewServer(), &blocked{end: make(chan struct{})}
	pubsub.RegisterControllerServiceServer(controller, b)
	at := serveGRPC(t, controller)
	t.Cleanup(func() { close(b.end) }) // before the server stops
	ports := freeport.Take(t, 2)
	p = execute(t, append(env,
		"GRPC_PORT="+ports[0], "HTTP_PORT=0", "METRICS_PORT="+ports[1], "ETCD_ENDPOINTS="+etcd.Endpoint(), "CONTROLLER_ADDRESS="+at,
		"LOOKUP_TIMEOUT=1m", "PUSH_TIMEOUT=1m",
	), "push-manager")
	ops = "http://127.0.0.1:" + ports[1]
	answers(t, ops+"/readyz", http.StatusOK)
	conn, err := grpc.NewClient("127.0.0.1:"+ports[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	pushed := make(chan struct{})
	go func() {
		defer close(pushed)
		_, _ = pubsub.NewPushManagerServiceClient(conn).PushToRoom(context.Background(),
			&pubsub.PushToRoomRequest{RoomId: "r", Content: &pubsub.MessageContent{}})
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-pushed
	})
	for !strings.Contains(answers(t, ops+"/metrics", http.StatusOK), "push_manager_pushes_in_flight 1\n") {
		time.Sleep(5 * time.Millisecond)
	}
	return p, ops
}

func TestDrainEndsByItsBoundAndExitsWith0(t *testing.T) {
	p, _ := busy(t, "DRAIN_TIMEOUT=500ms")
	begin := time.Now()
	p.signal(syscall.SIGTERM)
	p.ends(7*time.Second, 0) // the default is 8 s, and the push takes a minute
	if took := time.Since(begin); took < 400*time.Millisecond {
		t.Errorf("it did not wait for the push: ended after %v", took)
	}
}

func TestSecondSIGTERMEndsAtOnce(t *testing.T) {
	p, ops := busy(t, "DRAIN_TIMEOUT=1m")
	p.signal(syscall.SIGTERM)
	if body := answers(t, ops+"/readyz", http.StatusServiceUnavailable); !strings.Contains(body, "draining") {
		t.Errorf("readyz %q", body)
	}
	p.signal(syscall.SIGTERM)
	p.ends(15*time.Second, 1) // a drain that ends by its bound takes a minute, and exits with 0
}

// TestSecondSIGTERMEndsReferenceProgramsAtOnce: a caller that never ends its call
// keeps each of them draining.
func TestSecondSIGTERMEndsReferenceProgramsAtOnce(t *testing.T) {
	hold := map[string]func(context.Context, *grpc.ClientConn) error{
		"controller": func(ctx context.Context, conn *grpc.ClientConn) error {
			// The headers of a call whose request never comes.
			_, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, pubsub.ControllerService_GetRoomInfo_FullMethodName)
			return err
		},
		"connect-node": func(ctx context.Context, conn *grpc.ClientConn) error {
			stream, err := pubsub.NewConnectNodeServiceClient(conn).Deliver(ctx)
			if err != nil {
				return err
			}
			if err := stream.Send(&pubsub.DeliverRequest{Hello: &pubsub.Hello{ProtocolVersion: 1, ManagerId: "m", Shards: 1}}); err != nil {
				return err
			}
			_, err = stream.Recv()
			return err
		},
	}
	all := servers(t)
	for name, hold := range hold {
		t.Run(name, func(t *testing.T) {
			prog := all[name]
			p := execute(t, append(prog.env, "DRAIN_TIMEOUT=1m"), prog.name)
			answers(t, prog.health, http.StatusOK)
			conn, err := grpc.NewClient(prog.grpc, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			if err := hold(t.Context(), conn); err != nil {
				t.Fatal(err)
			}
			watch, err := grpc_health_v1.NewHealthClient(conn).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
			if err != nil {
				t.Fatal(err)
			}
			wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_SERVING)
			p.signal(syscall.SIGTERM)
			wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
			p.signal(syscall.SIGTERM)
			p.ends(15*time.Second, 1) // a drain that ends by its bound takes a minute, and exits with 0
		})
	}
}

// wantHealth waits until it is told. A word more before that is none against whoever tells:
// on a loaded machine the parts may be away for a moment.
func wantHealth(t *testing.T, watch grpc_health_v1.Health_WatchClient, want grpc_health_v1.HealthCheckResponse_ServingStatus) {
	t.Helper()
	for {
		r, err := watch.Recv()
		if err != nil {
			t.Fatalf("health: %v, want %v", err, want)
		}
		if r.GetStatus() == want {
			return
		}
	}
}

func TestDevSaysWhatRunsWhereAndStops(t *testing.T) {
	p := execute(t, nil, "push-manager", "dev", "--base-port=0", "--nodes=2")
	var text strings.Builder
	for p.stdout.Scan() {
		text.WriteString(p.stdout.Text() + "\n")
		if strings.Contains(p.stdout.Text(), "Ctrl-C") {
			break
		}
	}
	for _, want := range []string{"Push-Manager", "Controller", "connect-node-1", "connect-node-2", "etcd", "Ready", "pushctl listen", "pushctl room lobby", "pushctl user alice"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("it does not say %q:\n%s\n%s", want, text.String(), p.stderr)
		}
	}
	if strings.Contains(text.String(), "connect-node-3") {
		t.Error("three nodes run")
	}
	p.signal(syscall.SIGINT)
	p.ends(10*time.Second, 0)
	if left, err := os.ReadDir(p.cmd.Dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestBadUsageExitsWith2AndOneLine(t *testing.T) {
	for name, tc := range map[string]struct {
		env  []string
		cmd  string
		args []string
		want string
	}{
		"unknown flag":       {nil, "push-manager", []string{"--nope"}, "--nope"},
		"unknown command":    {nil, "push-manager", []string{"server"}, "server"},
		"port":               {[]string{"GRPC_PORT=99999"}, "push-manager", nil, "GRPC_PORT"},
		"duration":           {nil, "push-manager", []string{"--etcd-dial-timeout=soon"}, "--etcd-dial-timeout"},
		"no shards":          {[]string{"SHARDS=0"}, "push-manager", nil, "SHARDS"},
		"open to others":     {[]string{"LISTEN_ADDRESS=0.0.0.0"}, "push-manager", nil, "ALLOW_INSECURE"},
		"file not there":     {[]string{"CONFIG_FILE=nowhere.yaml"}, "push-manager", nil, "nowhere.yaml"},
		"dev nodes":          {nil, "push-manager", []string{"dev", "--nodes=0"}, "--nodes"},
		"controller":         {[]string{"GRPC_PORT=x"}, "controller", nil, "GRPC_PORT"},
		"connect-node":       {[]string{"NODE_ID=a/b"}, "connect-node", nil, "NODE_ID"},
		"connect-node, open": {[]string{"LISTEN_ADDRESS=::"}, "connect-node", nil, "ALLOW_INSECURE"},
		"its own name":       {nil, "connect-node", []string{"connect-node"}, "connect-node"},
		"controller command": {[]string{"METRICS_PORT=-1"}, "push-manager", []string{"controller"}, "METRICS_PORT"},
	} {
		t.Run(name, func(t *testing.T) {
			p := execute(t, tc.env, tc.cmd, tc.args...)
			p.ends(5*time.Second, 2)
			text := strings.TrimSpace(p.stderr.String())
			if !strings.Contains(text, tc.want) || strings.Contains(text, "\n") {
				t.Errorf("says %q, want one line with %s", text, tc.want)
			}
		})
	}
}

func TestHelpListsTheKeysOfAProgram(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want []string
	}{
		"controller":   {[]string{"--help"}, []string{"Usage: controller [flags]", "--grpc-port=50051", "--metrics-port"}},
		"connect-node": {[]string{"--help"}, []string{"Usage: connect-node [flags]", "--node-id=connect-node-1", "$ADVERTISE_ADDRESS"}},
		"push-manager": {[]string{"serve", "--help"}, []string{"Usage: push-manager serve [flags]", "--manager-id", "$METRICS_PORT", "--config-file"}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			out, err := exec.CommandContext(ctx, filepath.Join(binaries, name), tc.args...).Output()
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range tc.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("lacks %q in:\n%s", want, out)
				}
			}
		})
	}
}

func TestPortInUseExitsWith1AndNamesIt(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for program, keys := range map[string][]string{
		"push-manager": {"GRPC_PORT", "HTTP_PORT", "METRICS_PORT"},
		"controller":   {"GRPC_PORT", "METRICS_PORT"},
		"connect-node": {"GRPC_PORT", "HTTP_PORT", "METRICS_PORT"},
	} {
		for _, key := range keys {
			env := []string{key + "=" + port}
			for _, other := range keys {
				if other != key {
					env = append(env, other+"=0")
				}
			}
			p := execute(t, env, program)
			p.ends(5*time.Second, 1)
			if said := p.stderr.String(); !strings.Contains(said, key+": listen tcp") || !strings.Contains(said, "in use") {
				t.Errorf("%s: says %q", key, said)
			}
		}
	}
}

func TestPrintedConfigurationNamesSources(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(binaries, "push-manager"), "--print-config", "--manager-id=a")
	cmd.Dir = t.TempDir()
	cmd.Env = []string{"SHARDS=3", "ETCD_USERNAME=u", "ETCD_PASSWORD=hidden"}
	if err := os.WriteFile(filepath.Join(cmd.Dir, "config.yaml"), []byte("log_level: debug\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		t.Fatalf("%v: %s", err, exit.Stderr)
	}
	for _, want := range []string{
		"manager_id: a # flag --manager-id", "shards: 3 # environment variable SHARDS", "log_level: debug # config.yaml:1", "grpc_port: 50053 # default",
	} {
		if !strings.Contains(string(out), want+"\n") {
			t.Errorf("lacks %q in:\n%s", want, out)
		}
	}
	if strings.Contains(string(out), "hidden") {
		t.Error("shows the password")
	}
}
