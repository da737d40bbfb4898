package pushmanager

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/net/http2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/node"
)

// oldController has the two methods that every Controller has.
type oldController struct {
	pubsub.UnimplementedControllerServiceServer
}

func (oldController) GetRoomInfo(_ context.Context, r *pubsub.GetRoomInfoRequest) (*pubsub.GetRoomInfoResponse, error) {
	if r.GetRoomId() != "lobby" {
		return &pubsub.GetRoomInfoResponse{}, nil
	}
	return &pubsub.GetRoomInfoResponse{RoomInfo: &pubsub.RoomInfo{RoomId: "lobby", Users: []*pubsub.UserInfo{{UserId: "alice", NodeId: "n1"}}}}, nil
}

func (oldController) GetUserNode(_ context.Context, r *pubsub.GetUserNodeRequest) (*pubsub.GetUserNodeResponse, error) {
	return &pubsub.GetUserNodeResponse{NodeId: "n1", Found: r.GetUserId() == "alice"}, nil
}

// counter is a gateway with one user who takes everything, unless it is stuck.
type counter struct {
	delivered atomic.Int64
	stuck     chan struct{}
}

func (c *counter) Deliver(user string, _ *node.Message) node.Outcome {
	if c.stuck != nil {
		<-c.stuck
	}
	if user != "alice" {
		return node.NotHere
	}
	c.delivered.Add(1)
	return node.Delivered
}

func (c *counter) Broadcast(m *node.Message) (delivered, failed int) { return 1, 0 }
func (c *counter) Online() int                                       { return 1 }

// serveGRPC runs a gRPC server on addr until the test ends.
func serveGRPC(t *testing.T, addr string, s *grpc.Server) string {
	t.Helper()
	l, err := net.Listen("tcp", addr)
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

// listenAgain listens at an address that may just have been given up.
func listenAgain(t *testing.T, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	eventually(t, "listen at "+addr, func() bool {
		var err error
		l, err = net.Listen("tcp", addr)
		return err == nil
	})
	return l
}

// serveController runs a Controller at addr until it is stopped or the test ends.
func serveController(t *testing.T, addr string) (stop func()) {
	t.Helper()
	s, l, done := controllerServer(), listenAgain(t, addr), make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			s.Stop()
			<-done
		})
	}
	t.Cleanup(stop)
	return stop
}

// registerNode writes the entry of the node n1, for good.
func registerNode(t *testing.T, etcd *clientv3.Client, addr string) {
	t.Helper()
	if _, err := etcd.Put(t.Context(), "/services/connect-node/n1", `{"Op":0,"Addr":"`+addr+`","Metadata":{"node_id":"n1"}}`); err != nil {
		t.Fatal(err)
	}
}

func startNode(t *testing.T, etcd *clientv3.Client, gateway *counter) {
	t.Helper()
	n, err := node.New(node.Config{NodeID: "n1", Sessions: gateway})
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer(node.ServerOptions()...)
	n.Attach(gs)
	addr := serveGRPC(t, "127.0.0.1:0", gs)
	if err := n.Register(etcd, addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = n.Deregister(ctx) // etcd may have been stopped
		n.Close()
	})
}

func startPushManager(t *testing.T, env map[string]string) *PushManager {
	t.Helper()
	return startLogging(t, env, slog.DiscardHandler)
}

func startLogging(t *testing.T, env map[string]string, log slog.Handler) *PushManager {
	t.Helper()
	// The timeouts are such that a push which is to succeed does, however busy the machine is.
	all := map[string]string{
		"GRPC_PORT": "0", "HTTP_PORT": "0", "METRICS_PORT": "0", "SHARDS": "2", "LOOKUP_TIMEOUT": "5s", "LINK_ACK_TIMEOUT": "20s", "LINK_QUEUE_AGE": "20s",
		"LINK_SILENCE": "30s", "PUSH_TIMEOUT": "30s",
	}
	maps.Copy(all, env)
	c, err := load(t, nil, all, "")
	if err != nil {
		t.Fatal(err)
	}
	m, err := Start(t.Context(), *c, slog.New(log))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func drain(t *testing.T, m *PushManager, within time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if err := m.Drain(ctx); err != nil {
		t.Error(err)
	}
}

func client(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// eventually polls until ok or fails after a minute.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 1m: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func readyz(t *testing.T, m *PushManager) (int, string) {
	t.Helper()
	return get(t, "http://"+m.HTTPAddr()+"/readyz")
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func hello() *pubsub.MessageContent { return &pubsub.MessageContent{Data: []byte("hello")} }

func TestStartsWithoutPeersAndIsReadyOnceTheyAreThere(t *testing.T) {
	etcd := etcdtest.Reserve(t)
	controller := freeport.Addr(t)
	m := startPushManager(t, map[string]string{"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": controller, "MANAGER_ID": "pm-7"})
	defer drain(t, m, 8*time.Second)
	conn := client(t, m.GRPCAddr())
	api := pubsub.NewPushManagerServiceClient(conn)

	if code, body := readyz(t, m); code != 503 || !strings.Contains(body, "discovery: nodes not known yet") || !strings.Contains(body, "etcd") ||
		!strings.Contains(body, "controller: has not answered yet") {
		t.Errorf("readyz %d %q", code, body)
	}
	serveGRPC(t, controller, controllerServer())
	eventually(t, "the controller is healthy", func() bool { return len(m.NotReady()) == 1 })

	// The Controller knows the room; where its node is nobody can say yet.
	health, err := grpc_health_v1.NewHealthClient(conn).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	wantHealth(t, health, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	wantNotReady(t, api)

	etcd.Restart()
	back := time.Now()
	gateway := &counter{}
	startNode(t, etcd.Client(), gateway)
	eventually(t, "ready", func() bool { return len(m.NotReady()) == 0 })
	if took := time.Since(back); took > 10*time.Second { // a node was started and registered, too
		t.Errorf("ready %v after etcd was back", took)
	}
	wantHealth(t, health, grpc_health_v1.HealthCheckResponse_SERVING)
	eventually(t, "the node is reached", func() bool { return m.Reachable() == 1 })
	r, err := api.PushToRoom(t.Context(), &pubsub.PushToRoomRequest{RoomId: "lobby", Content: hello()})
	if err != nil || !r.GetSuccess() || r.GetDeliveredCount() != 1 || gateway.delivered.Load() != 1 {
		t.Errorf("push: %v %v, the node has %d", r, err, gateway.delivered.Load())
	}

	_, text := get(t, "http://"+m.HTTPAddr()+"/metrics")
	for _, want := range []string{
		`push_manager_api_requests_total{api="PushToRoom",status="success"} 1`, "push_manager_nodes 1", "push_manager_push_success_total 1",
		"push_manager_route_lookups_total 1", `push_manager_deliveries_total{reason="sent"} 1`, `push_manager_panics_total{part="engine"} 0`, "push_manager_pool_limit{shard=\"1\"} 256",
		"push_manager_registration_up 1", "go_goroutines",
	} {
		if !strings.Contains(text, want+"\n") && !strings.Contains(text, want+" ") {
			t.Errorf("metrics lack %q", want)
		}
	}
	got, err := etcd.Client().Get(t.Context(), "/services/push-manager/pm-7")
	if err != nil || len(got.Kvs) != 1 || !strings.Contains(string(got.Kvs[0].Value), m.GRPCAddr()) {
		t.Errorf("our entry in etcd: %v %v", got, err)
	}
}

func controllerServer() *grpc.Server {
	s := grpc.NewServer()
	pubsub.RegisterControllerServiceServer(s, oldController{})
	return s
}

// wantNotReady makes a push of each kind, none of which can be routed yet.
func wantNotReady(t *testing.T, api pubsub.PushManagerServiceClient) {
	t.Helper()
	_, toRoom := api.PushToRoom(t.Context(), &pubsub.PushToRoomRequest{RoomId: "lobby", Content: hello()})
	_, toUser := api.PushToUser(t.Context(), &pubsub.PushToUserRequest{UserId: "alice", Content: hello()})
	_, toUsers := api.PushToUsers(t.Context(), &pubsub.PushToUsersRequest{UserIds: []string{"alice"}, Content: hello()})
	_, broadcast := api.BroadcastMessage(t.Context(), &pubsub.BroadcastMessageRequest{Content: hello()})
	stream, err := api.PushStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pubsub.PushStreamRequest{Push: &pubsub.PushStreamRequest_Broadcast{
		Broadcast: &pubsub.BroadcastMessageRequest{Content: hello()},
	}}); err != nil {
		t.Fatal(err)
	}
	reply, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for kind, err := range map[string]error{
		"room": toRoom, "user": toUser, "users": toUsers, "broadcast": broadcast, "stream": status.ErrorProto(reply.GetError()),
	} {
		s := status.Convert(err)
		notReady, retry := false, false
		for _, detail := range s.Details() {
			switch d := detail.(type) {
			case *errdetails.ErrorInfo:
				notReady = d.GetReason() == "NOT_READY" && d.GetDomain() == "push-manager"
			case *errdetails.RetryInfo:
				retry = d.GetRetryDelay().AsDuration() > 0
			}
		}
		if s.Code() != codes.Unavailable || !notReady || !retry {
			t.Errorf("%s while etcd is away: %v %v", kind, s, s.Details())
		}
	}
}

func TestDrainFinishesWhatIsInFlightAndLeavesEtcd(t *testing.T) {
	etcd := etcdtest.Start(t)
	gateway := &counter{stuck: make(chan struct{})}
	startNode(t, etcd.Client(), gateway)
	m := startPushManager(t, map[string]string{
		"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": serveGRPC(t, "127.0.0.1:0", controllerServer()),
		"LINK_ACK_TIMEOUT": "1m", "LINK_SILENCE": "1m", "PUSH_TIMEOUT": "1m",
	})
	conn := client(t, m.GRPCAddr())
	eventually(t, "ready", func() bool { return len(m.NotReady()) == 0 && m.Reachable() == 1 })
	answered := make(chan string, 1)
	go func() {
		r, err := pubsub.NewPushManagerServiceClient(conn).PushToUser(context.Background(), &pubsub.PushToUserRequest{UserId: "alice", Content: hello()})
		answered <- fmt.Sprint(r.GetSuccess(), err)
	}()
	eventually(t, "the push is in flight", func() bool {
		_, text := get(t, "http://"+m.HTTPAddr()+"/metrics")
		return strings.Contains(text, "push_manager_pushes_in_flight 1\n")
	})
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		drain(t, m, time.Minute)
	}()
	eventually(t, "not ready, out of etcd", func() bool {
		code, body := readyz(t, m)
		got, err := etcd.Client().Get(t.Context(), "/services/push-manager/", clientv3.WithPrefix())
		return code == 503 && strings.Contains(body, "draining") && err == nil && len(got.Kvs) == 0
	})
	eventually(t, "new pushes are refused", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // one that is still taken waits for the node
		defer cancel()
		_, err := pubsub.NewPushManagerServiceClient(conn).PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "alice", Content: hello()})
		return status.Code(err) == codes.Unavailable
	})
	close(gateway.stuck)
	if got := <-answered; got != "true <nil>" {
		t.Errorf("the push in flight: %s", got)
	}
	<-drained
}

// book is a log that many may write to.
type book struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *book) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *book) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// TestPayloadsAndForgedLinesAppearNowhere: whatever becomes of a push, nothing that this
// process shows or logs has its payload in it, and no id makes a line of its own.
func TestPayloadsAndForgedLinesAppearNowhere(t *testing.T) {
	etcd := etcdtest.Start(t)
	gateway := &counter{}
	startNode(t, etcd.Client(), gateway)
	var log book
	m := startLogging(t, map[string]string{
		"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": serveGRPC(t, "127.0.0.1:0", controllerServer()),
	}, slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	eventually(t, "ready", func() bool { return len(m.NotReady()) == 0 && m.Reachable() == 1 })
	conn := client(t, m.GRPCAddr())
	api, ctx := pubsub.NewPushManagerServiceClient(conn), t.Context()

	const secret = "what-nobody-shall-read"
	content := func(repeat int) *pubsub.MessageContent {
		return &pubsub.MessageContent{Data: bytes.Repeat([]byte(secret), repeat), Metadata: map[string]string{secret: secret}}
	}
	pushed := 0
	for _, user := range []string{"alice", "bob", "", "eve\nlevel=ERROR msg=forged", "eve\x1b[31m"} {
		for _, repeat := range []int{1, 20_000} { // the latter is too large
			if _, err := api.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: user, Content: content(repeat)}); err == nil {
				pushed++
			}
		}
		_, _ = api.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: user, Content: content(1), ExcludeUserIds: []string{user}})
		_, _ = api.PushToUsers(ctx, &pubsub.PushToUsersRequest{UserIds: []string{user, "alice"}, Content: content(1)})
	}
	_, err := api.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "lobby", Content: content(1)})
	if err != nil || pushed != 2 || gateway.delivered.Load() == 0 {
		t.Fatalf("%d pushes to users were taken, the room: %v", pushed, err)
	}
	if _, err := api.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: content(1)}); err != nil {
		t.Fatal(err)
	}
	stream, err := api.PushStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pubsub.PushStreamRequest{Push: &pubsub.PushStreamRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: content(20_000)}}}); err != nil {
		t.Fatal(err)
	}
	if r, err := stream.Recv(); err != nil || r.GetError() == nil {
		t.Fatal(r, err)
	}
	for _, path := range []string{"/", "/metrics", "/healthz", "/readyz", "/debug/pprof/", "/debug/pprof/goroutine?debug=2", "/debug/pprof/heap?debug=1"} {
		code, text := get(t, "http://"+m.HTTPAddr()+path)
		if code != http.StatusOK || strings.Contains(text, secret) || strings.Contains(text, "forged") {
			t.Errorf("%s answers %d, with the payload or a forged line: %v", path, code, strings.Contains(text, secret))
		}
	}
	drain(t, m, 8*time.Second)
	text := log.String()
	if strings.Contains(text, secret) || !strings.Contains(text, "push-manager runs") {
		t.Errorf("the log has the payload, or nothing:\n%s", text)
	}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "time=") || strings.Contains(line, "\x1b") {
			t.Errorf("a line that is none of ours: %q", line)
		}
	}
}

func TestCompressionIsWiredToTheLinks(t *testing.T) {
	etcd := etcdtest.Start(t)
	gateway := &counter{}
	startNode(t, etcd.Client(), gateway)
	m := startPushManager(t, map[string]string{
		"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": serveGRPC(t, "127.0.0.1:0", controllerServer()),
		"LINK_COMPRESSION": "zstd,s2", "LINK_COMPRESSION_MIN_BYTES": "3000",
	})
	defer drain(t, m, 8*time.Second)
	metrics := func() string {
		_, text := get(t, "http://"+m.HTTPAddr()+"/metrics")
		return text
	}
	eventually(t, "both shards have a codec", func() bool {
		return len(m.NotReady()) == 0 && strings.Contains(metrics(), "push_manager_link_compressing 2\n")
	})
	api := pubsub.NewPushManagerServiceClient(client(t, m.GRPCAddr()))
	for _, n := range []int{2000, 4000} {
		text := &pubsub.MessageContent{Data: bytes.Repeat([]byte("x"), n)}
		if r, err := api.PushToUser(t.Context(), &pubsub.PushToUserRequest{UserId: "alice", Content: text}); !r.GetSuccess() {
			t.Fatalf("%v, %v", r, err)
		}
	}
	if text := metrics(); !strings.Contains(text, "push_manager_link_compressed_frames_total 1\n") {
		t.Errorf("not one of two frames was compressed:\n%s", text)
	}
}

func TestDrainEndsInTimeWithAStuckNode(t *testing.T) {
	etcd := etcdtest.Start(t)
	gateway := &counter{stuck: make(chan struct{})}
	startNode(t, etcd.Client(), gateway)
	t.Cleanup(func() { close(gateway.stuck) }) // before the node's own cleanup
	m := startPushManager(t, map[string]string{
		"ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": serveGRPC(t, "127.0.0.1:0", controllerServer()),
		"LINK_ACK_TIMEOUT": "1m", "PUSH_TIMEOUT": "1m",
	})
	eventually(t, "ready", func() bool { return len(m.NotReady()) == 0 && m.Reachable() == 1 })
	api := pubsub.NewPushManagerServiceClient(client(t, m.GRPCAddr()))
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		_, _ = api.PushToUser(context.Background(), &pubsub.PushToUserRequest{UserId: "alice", Content: hello()})
	}()
	eventually(t, "the push is in flight", func() bool {
		_, text := get(t, "http://"+m.HTTPAddr()+"/metrics")
		return strings.Contains(text, "push_manager_pushes_in_flight 1\n")
	})
	begin := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	if err := m.Drain(ctx); err == nil {
		t.Error("drain says that everything was finished")
	}
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("drain with a bound of 0.5 s took %v", took)
	}
	<-answered
}

// TestDrainEndsWithAHandlerThatIsStuck: a call that does not end although it was cut off
// costs its own time, and the other parts are stopped all the same.
func TestDrainEndsWithAHandlerThatIsStuck(t *testing.T) {
	etcd := etcdtest.Start(t)
	c, err := load(t, nil, map[string]string{"GRPC_PORT": "0", "HTTP_PORT": "0", "METRICS_PORT": "0", "ETCD_ENDPOINTS": etcd.Endpoint(), "CONTROLLER_ADDRESS": freeport.Addr(t)}, "")
	if err != nil {
		t.Fatal(err)
	}
	stuck, entered := make(chan struct{}), make(chan struct{}, 1)
	c.Ingress.Options = append(c.Ingress.Options, grpc.ChainUnaryInterceptor(
		func(context.Context, any, *grpc.UnaryServerInfo, grpc.UnaryHandler) (any, error) {
			entered <- struct{}{}
			<-stuck
			return nil, status.Error(codes.Internal, "stuck")
		}))
	m, err := Start(t.Context(), *c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer m.serving.Wait()
	defer close(stuck)
	health := grpc_health_v1.NewHealthClient(client(t, m.GRPCAddr()))
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		_, _ = health.Check(context.Background(), &grpc_health_v1.HealthCheckRequest{}) // pushes pass by interceptors
	}()
	<-entered
	drained := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		drained <- m.Drain(ctx)
	}()
	patient, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	select {
	case err := <-drained:
		if !errors.Is(err, ingress.ErrStuck) {
			t.Errorf("drain: %v", err)
		}
	case <-patient.Done():
		t.Fatal("drain does not end")
	}
	<-answered
	if err := m.ops.Close(); !errors.Is(err, net.ErrClosed) { // the last part to be stopped
		t.Errorf("metrics and health are still served: %v", err)
	}
}

// TestStartThatFailsHasServedNobody: so there is nobody who would have to be told that it
// stops, whatever the notice.
func TestStartThatFailsHasServedNobody(t *testing.T) {
	addr := freeport.Addr(t)
	_, port, _ := net.SplitHostPort(addr)
	c, err := load(t, nil, map[string]string{
		"GRPC_PORT": port, "HTTP_PORT": "0", "METRICS_PORT": "0", "ETCD_ENDPOINTS": freeport.Addr(t), "CONTROLLER_ADDRESS": freeport.Addr(t),
		"DRAIN_NOTICE": "4s",
	}, "")
	if err != nil {
		t.Fatal(err)
	}
	c.AdvertiseAddress = "169.254.0.1:50053" // no setting may be that; registration refuses it, as one of the last parts
	done, greeted := make(chan struct{}), make(chan bool, 1)
	go func() { greeted <- isGreeted(addr, done) }()
	_, err = Start(t.Context(), *c, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "link-local") {
		t.Errorf("start: %v", err)
	}
	close(done)
	if <-greeted {
		t.Error("a client was served")
	}
}

// isGreeted connects again and again until it is done, and tells whether a server of
// HTTP/2 has ever answered.
func isGreeted(addr string, done <-chan struct{}) bool {
	for {
		select {
		case <-done:
			return false
		default:
		}
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			time.Sleep(time.Millisecond)
			continue
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = conn.Write([]byte(http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00")) // and empty SETTINGS
		n, _ := conn.Read(make([]byte, 1))
		_ = conn.Close()
		if n > 0 {
			return true
		}
	}
}

func TestPortInUseStopsTheStartAndLeavesNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	c, err := load(t, nil, map[string]string{"GRPC_PORT": "0", "HTTP_PORT": "0", "METRICS_PORT": port}, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Start(t.Context(), *c, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "METRICS_PORT") {
		t.Errorf("start: %v", err)
	}
}

func TestProfilesAreForOthersOnlyWhereTheSettingSaysSo(t *testing.T) {
	for setting, want := range map[string]int{"true": http.StatusOK, "false": http.StatusForbidden} {
		m := startPushManager(t, map[string]string{"PPROF_REMOTE": setting, "ETCD_ENDPOINTS": "127.0.0.1:1", "CONTROLLER_ADDRESS": "127.0.0.1:1"})
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+m.HTTPAddr()+"/debug/pprof/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Forwarded-For", "10.0.0.1")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("PPROF_REMOTE=%s: %s, want %d", setting, resp.Status, want)
		}
		http.DefaultClient.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
		_ = m.Drain(ctx) // etcd cannot be told
		cancel()
	}
}
