package refcontroller

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/discovery"
)

func TestMain(m *testing.M) {
	// The metrics library keeps one goroutine for each length of summary.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/VictoriaMetrics/metrics.summariesSwapCron"))
}

// bench is a Server and a client of it.
type bench struct {
	pubsub.ControllerServiceClient
	t      *testing.T
	server *Server
	conn   *grpc.ClientConn
	served chan error
}

func start(t *testing.T, cfg Config) *bench {
	t.Helper()
	server, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	lis := bufconn.Listen(1 << 16)
	b := &bench{t: t, server: server, served: make(chan error, 1)}
	go func() { b.served <- server.Serve(lis) }()
	b.conn, err = grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	b.ControllerServiceClient = pubsub.NewControllerServiceClient(b.conn)
	t.Cleanup(b.stop)
	return b
}

func (b *bench) stop() {
	if b.served == nil {
		return
	}
	_ = b.conn.Close()
	b.server.Close()
	if err := <-b.served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		b.t.Errorf("serve: %v", err)
	}
	b.served = nil
}

func (b *bench) join(user, room, node string) *pubsub.JoinRoomResponse {
	b.t.Helper()
	out, err := b.JoinRoom(b.t.Context(), &pubsub.JoinRoomRequest{UserId: user, RoomId: room, NodeId: node, UserName: "name of " + user})
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

func (b *bench) leave(user, room, node string) *pubsub.LeaveRoomResponse {
	b.t.Helper()
	out, err := b.LeaveRoom(b.t.Context(), &pubsub.LeaveRoomRequest{UserId: user, RoomId: room, NodeId: node})
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

// room is the members of a room as user@node, "unknown" when there is none.
func (b *bench) room(id string) string {
	b.t.Helper()
	out, err := b.GetRoomInfo(b.t.Context(), &pubsub.GetRoomInfoRequest{RoomId: id})
	if err != nil {
		b.t.Fatal(err)
	}
	if out.GetRoomInfo() == nil {
		return "unknown"
	}
	var members []string
	for _, u := range out.GetRoomInfo().GetUsers() {
		members = append(members, u.GetUserId()+"@"+u.GetNodeId())
	}
	slices.Sort(members)
	return strings.Join(members, " ")
}

// user is the nodes of a user, "offline" when there is none.
func (b *bench) user(id string) string {
	b.t.Helper()
	out, err := b.GetUserNode(b.t.Context(), &pubsub.GetUserNodeRequest{UserId: id})
	if err != nil {
		b.t.Fatal(err)
	}
	if !out.GetFound() {
		return "offline"
	}
	if out.GetNodeId() != out.GetNodeIds()[0] {
		b.t.Errorf("node_id is %q, node_ids %q", out.GetNodeId(), out.GetNodeIds())
	}
	return strings.Join(out.GetNodeIds(), " ") + " in " + out.GetRoomId()
}

func (b *bench) want(what, got, want string) {
	b.t.Helper()
	if got != want {
		b.t.Fatalf("%s: got %q, want %q", what, got, want)
	}
}

func TestMemberships(t *testing.T) {
	b := start(t, Config{})
	b.want("nobody", b.room("r"), "unknown")
	b.want("nobody", b.user("u"), "offline")

	out := b.join("u", "r", "n1")
	if !out.GetSuccess() || len(out.GetRoomInfo().GetUsers()) != 1 || out.GetRoomInfo().GetUsers()[0].GetUserName() != "name of u" {
		t.Fatalf("got %v", out)
	}
	b.join("u", "r", "n2")
	b.join("v", "r", "n1")
	b.join("u", "s", "n1")
	b.want("two nodes", b.room("r"), "u@n1 u@n2 v@n1")
	b.want("latest first", b.user("u"), "n1 n2 in s")
	b.join("u", "r", "n2")
	b.want("joined again", b.user("u"), "n2 n1 in r")
	b.want("joined again", b.room("r"), "u@n1 u@n2 v@n1")

	stats, err := b.GetRoomStats(t.Context(), &pubsub.GetRoomStatsRequest{})
	if err != nil || stats.GetTotalRooms() != 2 || stats.GetTotalUsers() != 2 || stats.GetRooms()[0].GetUserCount() != 2 {
		t.Fatalf("got %v, %v", stats, err)
	}
	users, err := b.GetUserNodes(t.Context(), &pubsub.GetUserNodesRequest{UserIds: []string{"v", "x", "u"}})
	if err != nil || len(users.GetUsers()) != 3 || users.GetUsers()[0].GetNodeId() != "n1" || users.GetUsers()[1].GetFound() ||
		!slices.Equal(users.GetUsers()[2].GetNodeIds(), []string{"n2", "n1"}) {
		t.Fatalf("got %v, %v", users, err)
	}

	if out := b.leave("u", "r", "n3"); out.GetSuccess() || out.GetMessage() != `user "u" is not in room "r"` {
		t.Fatalf("got %v", out)
	}
	b.leave("u", "r", "n2")
	b.want("left one node", b.room("r"), "u@n1 v@n1")
	b.join("u", "r", "n2")
	b.leave("u", "r", "")
	b.want("left all nodes", b.room("r"), "v@n1")
	b.want("elsewhere still", b.user("u"), "n1 in s")
	b.leave("u", "s", "")
	b.want("empty rooms vanish", b.room("s"), "unknown")
	b.want("left everything", b.user("u"), "offline")
}

func TestNodeForgetsItsPredecessor(t *testing.T) {
	b := start(t, Config{})
	b.join("u", "r", "n1")
	b.join("v", "r", "n1")
	b.join("v", "r", "n2")
	if out := b.leave("", "", "n1"); !out.GetSuccess() || out.GetMessage() != `2 memberships of node "n1" ended` {
		t.Fatalf("got %v", out)
	}
	b.want("room", b.room("r"), "v@n2")
}

func TestRoomAtItsLimit(t *testing.T) {
	b := start(t, Config{MaxUsers: 2})
	b.join("u", "r", "n1")
	b.join("v", "r", "n1")
	out := b.join("w", "r", "n1")
	if out.GetSuccess() || out.GetMessage() != `room "r" is full` || out.GetRoomInfo().GetMetadata().GetMaxUsers() != 2 {
		t.Fatalf("got %v", out)
	}
	if !b.join("u", "r", "n2").GetSuccess() {
		t.Fatal("a member could not join from a second node")
	}
	b.want("room", b.room("r"), "u@n1 u@n2 v@n1")
	b.want("refused", b.user("w"), "offline")
}

func TestJoinListsOnlyFewMembers(t *testing.T) {
	b := start(t, Config{})
	for i := range listMax {
		_, _ = b.server.svc.store.(*Memory).Join(t.Context(), Join{Reporter: Reporter{Node: "n"}, User: fmt.Sprint(i), Room: "r"})
	}
	if out := b.join("one more", "r", "n"); !out.GetSuccess() || len(out.GetRoomInfo().GetUsers()) != 0 {
		t.Fatalf("%d users listed", len(out.GetRoomInfo().GetUsers()))
	}
}

func TestInvalidRequests(t *testing.T) {
	b := start(t, Config{})
	ctx := t.Context()
	long := strings.Repeat("x", 289)
	join := func(change func(*pubsub.JoinRoomRequest)) func() error {
		return func() error {
			in := &pubsub.JoinRoomRequest{UserId: "u", RoomId: "r", NodeId: "n"}
			change(in)
			_, err := b.JoinRoom(ctx, in)
			return err
		}
	}
	manyEntries := map[string]string{}
	for i := range 33 {
		manyEntries[fmt.Sprint(i)] = ""
	}
	for name, tc := range map[string]struct {
		field string
		call  func() error
	}{
		"no user":          {"user_id", join(func(in *pubsub.JoinRoomRequest) { in.UserId = "" })},
		"no room":          {"room_id", join(func(in *pubsub.JoinRoomRequest) { in.RoomId = "" })},
		"no node":          {"node_id", join(func(in *pubsub.JoinRoomRequest) { in.NodeId = "" })},
		"long user":        {"user_id", join(func(in *pubsub.JoinRoomRequest) { in.UserId = long })},
		"newline":          {"room_id", join(func(in *pubsub.JoinRoomRequest) { in.RoomId = "a\nb" })},
		"escape":           {"node_id", join(func(in *pubsub.JoinRoomRequest) { in.NodeId = "\x1b[31m" })},
		"long name":        {"user_name", join(func(in *pubsub.JoinRoomRequest) { in.UserName = long })},
		"metadata entries": {"metadata", join(func(in *pubsub.JoinRoomRequest) { in.Metadata = manyEntries })},
		"metadata bytes":   {"metadata", join(func(in *pubsub.JoinRoomRequest) { in.Metadata = map[string]string{"k": strings.Repeat("x", 8<<10)} })},
		"leave no user": {"user_id", func() error {
			_, err := b.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{RoomId: "r", NodeId: "n"})
			return err
		}},
		"leave nothing": {"user_id", func() error {
			_, err := b.LeaveRoom(ctx, &pubsub.LeaveRoomRequest{})
			return err
		}},
		"get no room": {"room_id", func() error {
			_, err := b.GetRoomInfo(ctx, &pubsub.GetRoomInfoRequest{})
			return err
		}},
		"get no user": {"user_id", func() error {
			_, err := b.GetUserNode(ctx, &pubsub.GetUserNodeRequest{})
			return err
		}},
		"too many users": {"user_ids", func() error {
			_, err := b.GetUserNodes(ctx, &pubsub.GetUserNodesRequest{UserIds: make([]string, 10_001)})
			return err
		}},
		"a bad user": {"user_ids", func() error {
			_, err := b.GetUserNodes(ctx, &pubsub.GetUserNodesRequest{UserIds: []string{"u", ""}})
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			st := status.Convert(tc.call())
			if st.Code() != codes.InvalidArgument || len(st.Details()) != 1 {
				t.Fatalf("got %v", st)
			}
			bad, ok := st.Details()[0].(*errdetails.BadRequest)
			if !ok || bad.GetFieldViolations()[0].GetField() != tc.field {
				t.Fatalf("got %v", st.Details())
			}
		})
	}
	if c := b.server.svc.store.Counts(); c != (Counts{}) {
		t.Fatalf("stored all the same: %v", c)
	}
}

func TestLargestBatchIsTaken(t *testing.T) {
	b := start(t, Config{})
	ids := make([]string, maxBatch)
	for i := range ids {
		ids[i] = fmt.Sprintf("%0256d", i)
	}
	out, err := b.GetUserNodes(t.Context(), &pubsub.GetUserNodesRequest{UserIds: ids})
	if err != nil || len(out.GetUsers()) != maxBatch {
		t.Fatal(len(out.GetUsers()), err)
	}
}

func (b *bench) watch() pubsub.ControllerService_WatchRoutesClient {
	b.t.Helper()
	stream, err := b.WatchRoutes(b.t.Context(), &pubsub.WatchRoutesRequest{})
	if err != nil {
		b.t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || !first.GetSynced() {
		b.t.Fatalf("got %v, %v", first, err)
	}
	return stream
}

func TestWatchNamesWhatChanges(t *testing.T) {
	b := start(t, Config{})
	b.join("before", "r", "n")
	stream := b.watch()
	b.join("u", "r", "n1")
	msg, err := stream.Recv()
	if err != nil || !slices.Equal(msg.GetRoomIds(), []string{"r"}) || !slices.Equal(msg.GetUserIds(), []string{"u"}) {
		t.Fatalf("got %v, %v", msg, err)
	}
	b.want("visible when named", b.user("u"), "n1 in r")
	b.join("u", "r", "n1") // changes nothing
	b.leave("before", "r", "n")
	msg, err = stream.Recv()
	if err != nil || !slices.Equal(msg.GetUserIds(), []string{"before"}) || msg.GetSynced() {
		t.Fatalf("got %v, %v", msg, err)
	}
}

// A watcher that does not read costs a bounded set and holds nobody up.
func TestWatcherThatDoesNotReadHoldsNobodyUp(t *testing.T) {
	b := start(t, Config{WatchPending: 100})
	stream := b.watch()
	store := b.server.svc.store
	room := strings.Repeat("r", 200)
	for i := range 5000 { // far beyond the stream's window
		if _, err := store.Join(t.Context(), Join{Reporter: Reporter{Node: "n"}, User: fmt.Sprintf("%0250d", i), Room: fmt.Sprint(room, i)}); err != nil {
			t.Fatal(err)
		}
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if msg.GetAll() {
			break
		}
	}
}

func TestDrainEndsChangeStreamsAndRefusesCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := start(t, Config{})
		stream := b.watch()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		if err := b.server.Drain(ctx); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("drained in %v", took)
		}
		if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("the stream ended with %v", err)
		}
		b.stop()
	})
}

func TestDrainIsBoundedByAPeerThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := start(t, Config{Store: &stuck{Memory: NewMemory(0)}})
		done := make(chan error, 1)
		go func() {
			_, err := b.GetRoomStats(t.Context(), &pubsub.GetRoomStatsRequest{})
			done <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := b.server.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if err := <-done; err == nil {
			t.Error("the call that hung succeeded")
		}
		b.stop()
	})
}

// stuck is a store that does not answer one of its calls, and panics in another.
type stuck struct{ *Memory }

func (s *stuck) Rooms(ctx context.Context) ([]*pubsub.RoomStats, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (s *stuck) Room(context.Context, string) (*pubsub.RoomInfo, Revision, error) { panic("test") }

func TestPanicAndStoreErrorsEndOneCall(t *testing.T) {
	b := start(t, Config{Store: &stuck{Memory: NewMemory(0)}})
	if _, err := b.GetRoomInfo(t.Context(), &pubsub.GetRoomInfoRequest{RoomId: "r"}); status.Code(err) != codes.Internal {
		t.Fatal(err)
	}
	b.join("u", "r", "n")
	if n := b.server.m["/pubsub.ControllerService/GetRoomInfo"][resultError].Get(); n != 1 {
		t.Fatalf("%d errors counted", n)
	}
}

func TestHealthAndReflection(t *testing.T) {
	b := start(t, Config{})
	out, err := grpc_health_v1.NewHealthClient(b.conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "pubsub.ControllerService"})
	if err != nil || out.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Fatal(out, err)
	}
	if _, ok := b.server.grpc.GetServiceInfo()["grpc.reflection.v1.ServerReflection"]; !ok {
		t.Error("no reflection")
	}
}

func TestMembershipsOfADeadNodeEnd(t *testing.T) {
	client := etcdtest.Start(t).Client()
	b := start(t, Config{Client: client, NodeGrace: time.Second})
	register := func(id string) *discovery.Registration {
		r, err := discovery.Register(t.Context(), discovery.RegistrationConfig{Client: client, ID: id, Addr: "10.0.0.1:1"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = r.Close(context.Background()) })
		return r
	}
	register("lives")
	dies := register("dies")
	eventually(t, "both known", func() bool {
		known := b.server.roster.registered.Load()
		return known != nil && len(*known) == 2
	})
	b.join("u", "r", "lives")
	b.join("u", "r", "dies")
	b.join("v", "r", "dies")
	out, err := b.GetUserNode(t.Context(), &pubsub.GetUserNodeRequest{UserId: "v"})
	if err != nil || out.GetNodeAddress() != "10.0.0.1:1" {
		t.Fatal(out, err)
	}
	stream := b.watch()
	if err := dies.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its memberships are gone", func() bool { return b.room("r") == "u@lives" })
	b.want("offline", b.user("v"), "offline")
	msg, err := stream.Recv()
	if err != nil || len(msg.GetUserIds()) != 2 || !slices.Equal(msg.GetRoomIds(), []string{"r"}) {
		t.Fatalf("got %v, %v", msg, err)
	}
}

func TestSilentEtcdEndsNoMemberships(t *testing.T) {
	server := etcdtest.Start(t)
	b := start(t, Config{Client: server.Client(), NodeGrace: time.Second})
	r := b.server.roster
	eventually(t, "etcd listed", func() bool { return r.registered.Load() != nil })
	server.Stop()
	eventually(t, "etcd noticed to be away", func() bool { return r.watcher.Stale() > 0 })
	b.join("u", "r", "unseen")
	began := time.Now()
	eventually(t, "time passes", func() bool { return time.Since(began) > 3*time.Second })
	b.want("still there", b.room("r"), "u@unseen")
}

func TestCloseWithoutServe(t *testing.T) {
	s, err := New(Config{Client: etcdtest.NewClient(t, "127.0.0.1:1")})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := s.Serve(bufconn.Listen(1)); !errors.Is(err, grpc.ErrServerStopped) {
		t.Fatal(err)
	}
}

func TestConfigNamesWhatIsWrong(t *testing.T) {
	_, err := New(Config{MaxUsers: -1, NodeGrace: -1, WatchPending: -1})
	for _, want := range []string{"MaxUsers", "NodeGrace", "WatchPending"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within 15s: %s", what)
		}
		time.Sleep(5 * time.Millisecond) // polling real sockets
	}
}
