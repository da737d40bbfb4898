package ingress

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

func TestUnaryReplies(t *testing.T) {
	w := newWorld(t, nil)
	ctx, c := w.context(), content("x")

	room, err := w.client.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "r", Content: c, ExcludeUserIds: []string{"b"}})
	ok(t, err)
	want := &pubsub.PushToRoomResponse{Success: true, DeliveredCount: 1, Message: "delivered to 1 of 2 users: 1 offline",
		Summary: &pubsub.DeliverySummary{Targets: 2, Delivered: 1, Offline: 1}}
	if !proto.Equal(room, want) {
		t.Errorf("room: %v, want %v", room, want)
	}
	room, err = w.client.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "x", Content: c})
	ok(t, err)
	if room.Success || room.Message != `room "x" not found` || room.Summary == nil {
		t.Errorf("unknown room: %v", room)
	}
	room, err = w.client.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "empty", Content: c})
	ok(t, err)
	if !room.Success || room.DeliveredCount != 0 || room.Summary == nil {
		t.Errorf("empty room: %v", room)
	}
	user, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "x", Content: c})
	ok(t, err)
	if user.Success || user.Message != `user "x" is offline` || user.Summary.Targets != 1 || user.Summary.Offline != 1 {
		t.Errorf("offline user: %v", user)
	}
	w.network.nodes[1].refuse = engine.DropQueueFull
	users, err := w.client.PushToUsers(ctx, &pubsub.PushToUsersRequest{UserIds: []string{"a", "b", "a"}, Content: c})
	ok(t, err)
	if users.Success || users.DeliveredCount != 1 || users.Message != "delivered to 1 of 2 users: 1 failed" ||
		users.Summary.Targets != 2 || users.Summary.NodeFailures[0].NodeId != "n2" {
		t.Errorf("users: %v", users)
	}
	w.network.nodes = nil
	all, err := w.client.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: c})
	ok(t, err)
	if all.Success || all.Message != "no connect-node is available" || all.Summary == nil {
		t.Errorf("broadcast: %v", all)
	}
}

func TestUnaryDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.network.nodes[0].setKeep(true) // queued: nothing is written
		for name, test := range map[string]struct {
			timeout, want time.Duration
		}{
			"given":   {300 * time.Millisecond, 300 * time.Millisecond},
			"default": {0, 5 * time.Second},
		} {
			ctx := context.Background()
			if test.timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, test.timeout)
				defer cancel()
			} else {
				go func() { // a link drops what expires
					time.Sleep(5 * time.Second)
					for _, d := range w.network.nodes[0].take() {
						d.Drop(engine.DropExpired)
					}
				}()
			}
			began := time.Now()
			_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
			if code := codes.DeadlineExceeded; status.Code(err) != code {
				t.Errorf("%s: %v, want %v", name, err, code)
			}
			if took := time.Since(began); took > test.want+50*time.Millisecond {
				t.Errorf("%s: took %v", name, took)
			}
			synctest.Wait()
		}
		if n := w.metric(`push_manager_api_requests_total{api="PushToUser",status="error"}`); n != "2" {
			t.Errorf("%s errors counted", n)
		}
	})
}

func TestUnaryPanicIsInternalForThatCall(t *testing.T) {
	var log syncBuffer
	calls := 0
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		c.Trace = func(context.Context, string) (engine.Trace, func(engine.Result, error)) {
			if calls++; calls == 1 {
				panic("trace")
			}
			return nil, nil
		}
	})
	push := func() error {
		_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("secret")})
		return err
	}
	wantError(t, push(), codes.Internal, "INTERNAL", "")
	ok(t, push())
	w.network.panic = true
	wantError(t, push(), codes.Internal, "INTERNAL", "") // the engine says that nothing was sent, and counts it
	w.network.panic = false
	ok(t, push())
	if n := w.metric(`push_manager_panics_total{part="ingress"}`); n != "1" {
		t.Errorf("%s panics counted", n)
	}
	if s := log.String(); strings.Count(s, "level=ERROR") != 1 || !strings.Contains(s, "unary.go") || strings.Contains(s, "secret") {
		t.Errorf("log: %s", s)
	}
}

func TestMetricsMoveAsTheContractSays(t *testing.T) {
	w := newWorld(t, nil)
	ctx, c := w.context(), content("x")
	room := func(id string) {
		_, _ = w.client.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: id, Content: c})
	}
	room("r")       // success: 2 delivered, 1 offline
	room("unknown") // failed: no target
	room("")        // error
	w.network.nodes[1].refuse = engine.DropQueueFull
	room("r")                                                                             // partial: 1 delivered, 1 failed, 1 offline
	_, err := w.client.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: c}) // partial: 3 delivered
	ok(t, err)
	st := w.stream(ctx)
	ok(t, st.Send(userPush(1, "a", "x"))) // success: 1 delivered
	recv(t, st)
	ok(t, st.CloseSend())
	wantEnd(t, st, codes.OK, "", "")
	w.network.nodes[0].lose = true
	_, err = w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "d", Content: c}) // failed: 1 unknown
	ok(t, err)
	for series, want := range map[string]string{
		`push_manager_api_requests_total{api="PushToRoom",status="success"}`:       "1",
		`push_manager_api_requests_total{api="PushToRoom",status="partial"}`:       "1",
		`push_manager_api_requests_total{api="PushToRoom",status="failed"}`:        "1",
		`push_manager_api_requests_total{api="PushToRoom",status="error"}`:         "1",
		`push_manager_api_requests_total{api="BroadcastMessage",status="partial"}`: "1",
		`push_manager_api_requests_total{api="PushToUser",status="success"}`:       "1",
		`push_manager_api_requests_total{api="PushToUser",status="failed"}`:        "1",
		`push_manager_api_requests_total{api="PushToUsers",status="success"}`:      "0",
		`push_manager_api_duration_seconds_count{api="PushToRoom"}`:                "4",
		`push_manager_api_latency_seconds_count{api="PushToRoom"}`:                 "4",
		`push_manager_api_latency_seconds_bucket{api="PushToRoom",le="+Inf"}`:      "4",
		"push_manager_push_total":         "11",
		"push_manager_push_success_total": "7",
		"push_manager_push_failed_total":  "1",
		"push_manager_push_unknown_total": "1",
		"push_manager_push_offline_total": "2",
		"push_manager_api_inflight":       "0",
		"push_manager_api_streams":        "0",
	} {
		if got := w.metric(series); got != want {
			t.Errorf("%s = %s, want %s", series, got, want)
		}
	}
	for _, q := range []string{"0.5", "0.9", "0.99", "0.999"} {
		if w.metric(`push_manager_api_duration_seconds{api="PushToRoom",quantile="`+q+`"}`) == "" {
			t.Errorf("no quantile %s", q)
		}
	}
}

func TestHealthSaysNotServingBeforeTheServerGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.network.nodes[0].setKeep(true)
		client := healthpb.NewHealthClient(w.conn)
		for _, service := range []string{"", "pubsub.PushManagerService"} {
			r, err := client.Check(w.context(), &healthpb.HealthCheckRequest{Service: service})
			ok(t, err)
			if r.Status != healthpb.HealthCheckResponse_SERVING {
				t.Errorf("%q is %v", service, r.Status)
			}
		}
		watch, err := client.Watch(w.context(), &healthpb.HealthCheckRequest{})
		ok(t, err)
		first, err := watch.Recv()
		ok(t, err)
		st := w.stream(w.context())
		ok(t, st.Send(userPush(1, "d", "x")))
		synctest.Wait()
		drained := make(chan error, 1)
		go func() { drained <- w.server.Drain(w.context()) }()
		second, err := watch.Recv()
		ok(t, err)
		if first.Status != healthpb.HealthCheckResponse_SERVING || second.Status != healthpb.HealthCheckResponse_NOT_SERVING {
			t.Errorf("watched %v, then %v", first.Status, second.Status)
		}
		r, err := client.Check(w.context(), &healthpb.HealthCheckRequest{Service: "pubsub.PushManagerService"})
		ok(t, err)
		if r.Status != healthpb.HealthCheckResponse_NOT_SERVING {
			t.Errorf("draining is %v", r.Status)
		}
		w.network.ackAll()
		ok(t, <-drained)
		_, err = watch.Recv()
		wantError(t, err, codes.Unavailable, "DRAINING", "")
	})
}

func TestNothingIsPushedUntilTheServerServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.server.SetServing(false)
		st := w.stream(w.context())
		health := healthpb.NewHealthClient(w.conn)
		watch, err := health.Watch(w.context(), &healthpb.HealthCheckRequest{Service: "pubsub.PushManagerService"})
		ok(t, err)
		for _, serving := range []bool{false, true, false} {
			w.server.SetServing(serving)
			want, code, reason := healthpb.HealthCheckResponse_NOT_SERVING, codes.Unavailable, "NOT_READY"
			if serving {
				want, code, reason = healthpb.HealthCheckResponse_SERVING, codes.OK, ""
			}
			told, err := watch.Recv()
			ok(t, err)
			whole, err := health.Check(w.context(), &healthpb.HealthCheckRequest{})
			ok(t, err)
			if told.Status != want || whole.Status != want || w.server.Serving() != serving {
				t.Errorf("serving %v: health %v and %v", serving, told.Status, whole.Status)
			}
			_, err = w.client.PushToRoom(w.context(), &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x")})
			wantError(t, err, code, reason, "")
			var trailer metadata.MD
			_, err = w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")}, grpc.Trailer(&trailer))
			wantError(t, err, code, reason, "")
			if later := len(trailer.Get("grpc-retry-pushback-ms")) == 1; later == serving {
				t.Errorf("serving %v: the trailer says %v", serving, trailer)
			}
			_, err = w.client.PushToUsers(w.context(), &pubsub.PushToUsersRequest{UserIds: []string{"d"}, Content: content("x")})
			wantError(t, err, code, reason, "")
			_, err = w.client.BroadcastMessage(w.context(), &pubsub.BroadcastMessageRequest{Content: content("x")})
			wantError(t, err, code, reason, "")
			ok(t, st.Send(userPush(1, "d", "x")))
			wantStatus(t, status.FromProto(recv(t, st).Error), code, reason, "")
		}
		if got := len(w.network.nodes[0].payloads()); got != 5 {
			t.Errorf("a node got %d pushes, want the five of the time in between", got)
		}
		ok(t, st.CloseSend())
		wantEnd(t, st, codes.OK, "", "")
		ok(t, w.server.Drain(w.context()))
		w.server.SetServing(true)
		if r, err := w.server.health.Check(w.context(), &healthpb.HealthCheckRequest{}); err != nil || r.Status != healthpb.HealthCheckResponse_NOT_SERVING {
			t.Errorf("drained: health %v, %v", r.GetStatus(), err)
		}
	})
}

// TestPushesAreAnsweredWhileHealthSaysNotServing: health is advice for balancers. A
// push that comes all the same is told what becomes of it.
func TestPushesAreAnsweredWhileHealthSaysNotServing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		watch, err := healthpb.NewHealthClient(w.conn).Watch(w.context(), &healthpb.HealthCheckRequest{Service: "pubsub.PushManagerService"})
		ok(t, err)
		told := func(want healthpb.HealthCheckResponse_ServingStatus) {
			t.Helper()
			if r, err := watch.Recv(); err != nil || r.Status != want {
				t.Errorf("health %v, %v, want %v", r.GetStatus(), err, want)
			}
		}
		told(healthpb.HealthCheckResponse_SERVING)
		w.server.SetHealthy(false)
		told(healthpb.HealthCheckResponse_NOT_SERVING)
		r, err := w.client.PushToRoom(w.context(), &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x")})
		if err != nil || !r.Success {
			t.Errorf("a push while not healthy: %v %v", r, err)
		}
		w.server.SetServing(false)
		w.server.SetHealthy(true) // one of the two is not enough
		w.server.SetServing(true)
		told(healthpb.HealthCheckResponse_SERVING)
	})
}

func TestWatcherIsToldEvenWhenNothingIsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		watch, err := healthpb.NewHealthClient(w.conn).Watch(w.context(), &healthpb.HealthCheckRequest{})
		ok(t, err)
		_, err = watch.Recv()
		ok(t, err)
		ok(t, w.server.Drain(w.context()))
		r, err := watch.Recv()
		ok(t, err)
		if r.Status != healthpb.HealthCheckResponse_NOT_SERVING {
			t.Errorf("watched %v", r.Status)
		}
	})
}

// What grpcurl does: descriptors by reflection, JSON in, JSON out.
func TestReflectionAndJSON(t *testing.T) {
	w := newWorld(t, nil)
	service := reflected(t, w, "pubsub.PushManagerService")
	method := service.Methods().ByName("PushToRoom")
	in, out := dynamicpb.NewMessage(method.Input()), dynamicpb.NewMessage(method.Output())
	ok(t, protojson.Unmarshal([]byte(`{"room_id":"r","content":{"type":"TEXT","data":"aGk=","metadata":{"a":"b"}},"exclude_user_ids":["b"]}`), in))
	ok(t, w.conn.Invoke(w.context(), methodRoom, in, out))
	reply := new(pubsub.PushToRoomResponse)
	json, err := protojson.Marshal(out)
	ok(t, err)
	ok(t, protojson.Unmarshal(json, reply))
	if !reply.Success || reply.DeliveredCount != 1 {
		t.Errorf("reply %s", json)
	}
	if service.Methods().Len() != 10 {
		t.Errorf("%d methods", service.Methods().Len())
	}
}

// Many tools have not come to v1 yet.
func TestReflectionIsServedAsV1AlphaToo(t *testing.T) {
	w := newWorld(t, nil)
	st, err := reflectalphapb.NewServerReflectionClient(w.conn).ServerReflectionInfo(w.context())
	ok(t, err)
	ok(t, st.Send(&reflectalphapb.ServerReflectionRequest{MessageRequest: &reflectalphapb.ServerReflectionRequest_ListServices{}})) //nolint:staticcheck // See above.
	r, err := st.Recv()
	ok(t, err)
	if !strings.Contains(r.String(), serviceName) {
		t.Errorf("services: %v", r)
	}
	ok(t, st.CloseSend())
}

func reflected(t *testing.T, w *world, service string) protoreflect.ServiceDescriptor {
	t.Helper()
	st, err := reflectpb.NewServerReflectionClient(w.conn).ServerReflectionInfo(w.context())
	ok(t, err)
	ask := func(q *reflectpb.ServerReflectionRequest) *reflectpb.ServerReflectionResponse {
		ok(t, st.Send(q))
		r, err := st.Recv()
		ok(t, err)
		return r
	}
	listed := ask(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_ListServices{}})
	if !strings.Contains(listed.String(), service) {
		t.Fatalf("services: %v", listed)
	}
	files := new(descriptorpb.FileDescriptorSet)
	r := ask(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service}})
	for _, b := range r.GetFileDescriptorResponse().GetFileDescriptorProto() {
		f := new(descriptorpb.FileDescriptorProto)
		ok(t, proto.Unmarshal(b, f))
		files.File = append(files.File, f)
	}
	ok(t, st.CloseSend())
	registry, err := protodesc.NewFiles(files)
	ok(t, err)
	d, err := registry.FindDescriptorByName(protoreflect.FullName(service))
	ok(t, err)
	return d.(protoreflect.ServiceDescriptor)
}

func TestReflectionCanBeSwitchedOff(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.DisableReflection = true })
	st, err := reflectpb.NewServerReflectionClient(w.conn).ServerReflectionInfo(w.context())
	ok(t, err)
	_, err = st.Recv()
	wantError(t, err, codes.Unimplemented, "", "")
}

// A reflection client that just stays must not hold up the way down.
func TestDrainEndsStreamsOfOtherServices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		st, err := reflectpb.NewServerReflectionClient(w.conn).ServerReflectionInfo(w.context())
		ok(t, err)
		synctest.Wait()
		began := time.Now()
		ok(t, w.server.Drain(w.context()))
		if took := time.Since(began); took > time.Second {
			t.Errorf("took %v", took)
		}
		_, err = st.Recv()
		wantError(t, err, codes.Unavailable, "DRAINING", "")
	})
}

func TestTraceIsAskedOnceForEachPush(t *testing.T) {
	var mu sync.Mutex
	var apis []string
	var ends []string
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Trace = func(_ context.Context, api string) (engine.Trace, func(engine.Result, error)) {
			mu.Lock()
			defer mu.Unlock()
			apis = append(apis, api)
			if len(apis)%2 == 0 { // not sampled
				return nil, nil
			}
			return nil, func(r engine.Result, err error) {
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					ends = append(ends, err.Error())
				} else {
					ends = append(ends, strings.Repeat("+", r.Delivered))
				}
			}
		}
	})
	_, err := w.client.PushToRoom(w.context(), &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x")})
	ok(t, err)
	_, err = w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
	ok(t, err)
	st := w.stream(w.context())
	ok(t, st.Send(userPush(1, "", "x")))
	recv(t, st)
	ok(t, st.CloseSend())
	wantEnd(t, st, codes.OK, "", "")
	mu.Lock()
	defer mu.Unlock()
	if got := strings.Join(apis, " "); got != "PushToRoom PushToUser PushToUser" {
		t.Errorf("asked for %s", got)
	}
	if got := strings.Join(ends, " "); got != "++ user_id: must not be empty" {
		t.Errorf("ended with %s", got)
	}
}

func TestRefusalsAreLoggedOnceASecondAndWithoutPayload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		w := newWorld(t, func(c *Config, _ *engine.Config) {
			c.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		})
		for range 20 {
			_, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{Content: content("secret")})
			wantError(t, err, codes.InvalidArgument, "REQUIRED", "user_id")
		}
		if s := log.String(); strings.Count(s, "\n") != 1 || strings.Contains(s, "secret") {
			t.Errorf("log: %s", s)
		}
	})
}

func TestConfigValidate(t *testing.T) {
	err := Config{MaxRecvBytes: -1, StreamInflight: -1, ConnectionTimeout: -1}.Validate()
	for _, name := range []string{"Engine", "MaxRecvBytes", "StreamInflight", "ConnectionTimeout"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error %v does not name %s", err, name)
		}
	}
	if _, err := New(Config{}); err == nil {
		t.Error("a Server without an engine")
	}
}

func TestSecondServeAfterCloseFails(t *testing.T) {
	w := newWorld(t, nil)
	ok(t, w.server.Close())
	ok(t, w.server.Close())
	if err := w.server.Drain(context.Background()); err != nil {
		t.Errorf("Drain after Close: %v", err)
	}
	if _, err := w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")}); status.Code(err) != codes.Unavailable {
		t.Errorf("after Close: %v", err)
	}
}

// syncBuffer is a buffer that loggers may share.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestConnectionThatSaysNothingIsClosed(t *testing.T) {
	for name, said := range map[string]string{"no bytes": "", "half a preface": "PRI * HTTP/2.0\r\n"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, nil)
				conn, err := w.dial(w.context(), "")
				ok(t, err)
				defer conn.Close()
				_, err = conn.Write([]byte(said))
				ok(t, err)
				began := time.Now()
				_, _ = io.Copy(io.Discard, conn) // until the server closes
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("open for %v", took)
				}
			})
		})
	}
}

// hello says what a client says first.
func hello(t *testing.T, conn net.Conn) *http2.Framer {
	t.Helper()
	_, err := conn.Write([]byte(http2.ClientPreface))
	ok(t, err)
	framer := http2.NewFramer(conn, conn)
	ok(t, framer.WriteSettings())
	return framer
}

func TestConnectionsWithoutHandshakeAreBoundedByAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *engine.Config) { c.Handshakes = 3 })
		const gauge, counter = "push_manager_api_handshakes", "push_manager_api_handshakes_evicted_total"
		expect := func(when, handshakes, evicted string) {
			t.Helper()
			synctest.Wait()
			if h, e := w.metric(gauge), w.metric(counter); h != handshakes || e != evicted {
				t.Errorf("%s: %s without a handshake and %s evicted, want %s and %s", when, h, e, handshakes, evicted)
			}
		}
		dial := func() net.Conn {
			t.Helper()
			conn, err := w.dial(w.context(), "")
			ok(t, err)
			t.Cleanup(func() { _ = conn.Close() })
			synctest.Wait() // the order of the handshakes is that of the calls
			return conn
		}
		began := time.Now()
		mute, half, speaks := dial(), dial(), dial()
		_, err := half.Write([]byte(http2.ClientPreface + "\x00\x00\x06\x04\x00\x00\x00\x00\x00")) // all but the settings
		ok(t, err)
		expect("three that have not said all", "3", "0")
		_, err = w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
		ok(t, err)
		expect("one that calls", "2", "1")
		_, _ = io.Copy(io.Discard, mute) // the oldest is closed
		last := dial()
		expect("one more", "3", "1")
		hello(t, speaks)
		expect("one has said hello", "2", "1")
		ok(t, last.Close())
		expect("one has gone", "1", "1")
		if took := time.Since(began); took != 0 {
			t.Errorf("all of this waited for %v", took)
		}
		dial()
		dial()
		expect("two more", "3", "1")
		time.Sleep(5 * time.Second)
		expect("their time is over", "0", "1")
	})
}

func TestLimitsAreAnnounced(t *testing.T) {
	w := newWorld(t, nil)
	conn, err := w.dial(w.context(), "")
	ok(t, err)
	defer conn.Close()
	f, err := hello(t, conn).ReadFrame()
	ok(t, err)
	settings := f.(*http2.SettingsFrame)
	for id, want := range map[http2.SettingID]uint32{
		http2.SettingMaxConcurrentStreams: 256,
		http2.SettingMaxHeaderListSize:    16 << 10,
	} {
		if got, _ := settings.Value(id); got != want {
			t.Errorf("%v = %d, want %d", id, got, want)
		}
	}
}

func TestClientsWithKeepaliveStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		var dials atomic.Int32
		conn, err := grpc.NewClient("passthrough:///memory",
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second, PermitWithoutStream: true}),
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
				dials.Add(1)
				return w.dial(ctx, addr)
			}))
		ok(t, err)
		defer conn.Close()
		conn.Connect()
		time.Sleep(5 * time.Minute)
		if n := dials.Load(); n != 1 {
			t.Errorf("%d connections in five minutes, want 1", n)
		}
	})
}

func TestCloseDoesNotWaitForEverForAHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck := make(chan struct{})
		w := newWorld(t, func(c *Config, _ *engine.Config) {
			c.Trace = func(context.Context, string) (engine.Trace, func(engine.Result, error)) {
				<-stuck
				return nil, nil
			}
		})
		go func() {
			_, _ = w.client.PushToUser(w.context(), &pubsub.PushToUserRequest{UserId: "a", Content: content("x")})
		}()
		synctest.Wait()
		began := time.Now()
		if err := w.server.Close(); !errors.Is(err, ErrStuck) || time.Since(began) > closeBound {
			t.Errorf("Close returned %v after %v", err, time.Since(began))
		}
		close(stuck)
	})
}
