package pushmanager

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
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

// ops is the HTTP side of a Push-Manager.
type ops string

// until waits until readiness answers as it must, and checks that the process is alive.
func (o ops) until(t *testing.T, status int, text string) (body string) {
	t.Helper()
	eventually(t, fmt.Sprintf("readiness says %d and %q", status, text), func() bool {
		var got int
		got, body = get(t, string(o)+"/readyz")
		return got == status && strings.Contains(body, text)
	})
	if code, _ := get(t, string(o)+"/healthz"); code != http.StatusOK {
		t.Errorf("liveness says %d", code)
	}
	return body
}

// TestReadinessTellsWhetherPushesCanBeDelivered takes the program through each reason
// and back, over HTTP and over gRPC health. Liveness stays green, and whoever pushes all
// the same gets the true answer.
func TestReadinessTellsWhetherPushesCanBeDelivered(t *testing.T) {
	etcd := etcdtest.Reserve(t)
	controller := freeport.Addr(t)
	var log book
	m := startLogging(t, map[string]string{
		"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": controller,
		"ROUTE_STALE_TTL": "2s", "NOT_READY_AFTER": "2s", "LINK_SILENCE": "3s", "LINK_ACK_TIMEOUT": "1s",
	}, slog.NewTextHandler(&log, nil))
	o := ops("http://" + m.HTTPAddr())
	conn := client(t, m.GRPCAddr())
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
	if code, body := get(t, string(o)+"/readyz?exclude=controller,nodes"); code != http.StatusOK {
		t.Errorf("without the reason that is left out: %d %q", code, body)
	}
	o.until(t, 503, "connection refused")
	wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	wantMetrics(t, o, "push_manager_ready 0", `push_manager_not_ready{reason="nodes"} 0`, `push_manager_not_ready{reason="controller"} 1`)
	serveController(t, controller)
	o.until(t, 200, "ok\n")
	wantHealth(t, watch, grpc_health_v1.HealthCheckResponse_SERVING)

	etcd.Stop() // the nodes known stay: pushes can be delivered
	time.Sleep(3 * time.Second)
	o.until(t, 200, "ok\n")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := m.Drain(ctx); err == nil || !strings.Contains(err.Error(), "stop registration") {
		t.Errorf("drain without etcd: %v", err)
	}
	// A machine that lets nobody run for as long as readiness is patient adds a change or two.
	if strings.Count(log.String(), "not ready: pushes cannot be delivered") > 4 {
		t.Errorf("logged again and again for two changes:\n%s", &log)
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
