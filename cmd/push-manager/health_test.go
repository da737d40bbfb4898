package main

import (
	"context"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// standIn is a real node that can be killed and comes back at its address.
type standIn struct {
	t       *testing.T
	addr    string
	gateway *counter
	stop    func()
}

func (s *standIn) start() {
	s.t.Helper()
	n, err := node.New(node.Config{NodeID: "n1", Sessions: s.gateway})
	if err != nil {
		s.t.Fatal(err)
	}
	gs := grpc.NewServer(node.ServerOptions()...)
	n.Attach(gs)
	l := listenAgain(s.t, s.addr)
	s.addr = l.Addr().String()
	done := make(chan error, 1)
	go func() { done <- gs.Serve(l) }()
	s.stop = func() {
		gs.Stop()
		<-done
		n.Close()
		s.stop = func() {}
	}
}

// ops is the HTTP side of a process.
type ops string

// until waits until readiness answers as it must, and checks that the process is alive.
func (o ops) until(t *testing.T, status int, text string) string {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		body := answers(t, string(o)+"/readyz", status)
		if strings.Contains(body, text) {
			answers(t, string(o)+"/healthz", http.StatusOK)
			return body
		}
		if time.Now().After(deadline) {
			t.Fatalf("readyz says %q, want %q", body, text)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestReadinessTellsWhetherPushesCanBeDelivered takes the program through each reason
// and back, over HTTP and over gRPC health. Liveness stays green, and whoever pushes all
// the same gets the true answer.
func TestReadinessTellsWhetherPushesCanBeDelivered(t *testing.T) {
	etcd := etcdtest.Reserve(t)
	ports := freeport.Take(t, 3)
	controller := "127.0.0.1:" + ports[2]
	p := execute(t, []string{
		"GRPC_PORT=" + ports[0], "METRICS_PORT=" + ports[1], "ETCD_ENDPOINTS=" + etcd.Endpoint(), "CONTROLLER_ADDRESS=" + controller,
		"ROUTE_STALE_TTL=2s", "NOT_READY_AFTER=2s", "LOOKUP_TIMEOUT=5s",
	}, "push-manager")
	o := ops("http://127.0.0.1:" + ports[1])
	conn := client(t, "127.0.0.1:"+ports[0])
	api := pubsub.NewPushManagerServiceClient(conn)

	o.until(t, 503, "controller: has not answered yet: ")
	first := o.until(t, 503, "connection refused")
	if !strings.Contains(first, "discovery: nodes not known yet") || strings.Contains(first, "no reachable node") {
		t.Errorf("alone in the world: %q", first)
	}
	watched, leave := context.WithTimeout(t.Context(), 3*time.Minute)
	defer leave()
	watch, err := grpc_health_v1.NewHealthClient(conn).Watch(watched, &grpc_health_v1.HealthCheckRequest{Service: "pubsub.PushManagerService"})
	if err != nil {
		t.Fatal(err)
	}
	wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	etcd.Restart()
	o.until(t, 503, "no reachable node: 0 registered, 0 reachable\n")
	n := &standIn{t: t, addr: freeport.Addr(t), gateway: &counter{}}
	n.start()
	t.Cleanup(func() { n.stop() })
	registerNode(t, etcd.Client(), n.addr)
	stop := serveController(t, controller)
	o.until(t, 200, "ok\n")
	wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_SERVING)
	room := func() (*pubsub.PushToRoomResponse, error) {
		return api.PushToRoom(t.Context(), &pubsub.PushToRoomRequest{RoomId: "lobby", Content: hello()})
	}
	if r, err := room(); err != nil || !r.GetSuccess() {
		t.Fatalf("push: %v %v", r, err)
	}
	wantMetrics(t, o, "push_manager_ready 1", `push_manager_not_ready{reason="nodes"} 0`)

	n.stop()
	o.until(t, 503, "no reachable node: 1 registered, 0 reachable\n")
	wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	wantMetrics(t, o, "push_manager_ready 0", `push_manager_not_ready{reason="nodes"} 1`, `push_manager_not_ready{reason="controller"} 0`)
	if r, err := room(); err != nil || r.GetSuccess() || r.GetSummary().GetFailed() != 1 {
		t.Errorf("with all nodes down: %v %v, want the answer that it failed", r, err)
	}
	n.start()
	o.until(t, 200, "ok\n")
	wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_SERVING)

	stop()
	o.until(t, 503, "controller: away for ")
	o.until(t, 503, "connection refused")
	wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	wantMetrics(t, o, "push_manager_ready 0", `push_manager_not_ready{reason="nodes"} 0`, `push_manager_not_ready{reason="controller"} 1`)
	serveController(t, controller)
	o.until(t, 200, "ok\n")
	wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_SERVING)

	etcd.Stop() // the nodes known stay: pushes can be delivered
	time.Sleep(3 * time.Second)
	o.until(t, 200, "ok\n")
	p.signal(syscall.SIGTERM)
	p.ends(20*time.Second, 0)
	// A machine that lets nobody run for as long as readiness is patient adds a change or two.
	if strings.Count(p.stderr.String(), "not ready: pushes cannot be delivered") > 4 {
		t.Errorf("logged again and again for two changes:\n%s", p.stderr)
	}
}

// wantMetrics waits for lines of the metrics.
func wantMetrics(t *testing.T, o ops, lines ...string) {
	t.Helper()
	for _, line := range lines {
		eventually(t, line, func() bool {
			_, text := get(t, string(o)+"/metrics")
			return strings.Contains(text, line+"\n")
		})
	}
}
