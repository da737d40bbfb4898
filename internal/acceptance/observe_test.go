package acceptance

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	pubsub "github.com/push-manager/push-manager/proto"
)

// spans is an OTLP server that keeps what it gets, by name.
type spans struct {
	collector.UnimplementedTraceServiceServer

	mu  sync.Mutex
	got []*trace.Span
}

func (s *spans) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, resource := range r.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			s.got = append(s.got, scope.GetSpans()...)
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// of returns the spans of one trace whose names begin with prefix.
func (s *spans) of(traceID, prefix string) []*trace.Span {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []*trace.Span
	for _, span := range s.got {
		if hex.EncodeToString(span.GetTraceId()) == traceID && strings.HasPrefix(span.GetName(), prefix) {
			list = append(list, span)
		}
	}
	return list
}

// TestTraceOfARoomPushShowsCallLookupAndLegs follows one sampled push from its
// caller's span to the spans that an OTLP server receives.
func TestTraceOfARoomPushShowsCallLookupAndLegs(t *testing.T) {
	var received spans
	s := grpc.NewServer()
	collector.RegisterTraceServiceServer(s, &received)
	c := startCity(t, "OTEL_EXPORTER_OTLP_ENDPOINT=http://"+serve(t, s), "OTEL_BSP_SCHEDULE_DELAY=50")
	c.connect("new", "a", "b")
	c.connect("old", "c")
	c.controller.join("r", "a", "b", "c")

	const traceID, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	push := func(flags string) {
		t.Helper()
		ctx := metadata.AppendToOutgoingContext(within(t, patience), "traceparent", "00-"+traceID+"-"+caller+"-"+flags)
		if r, err := c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "r", Content: text("secret")}); err != nil || !r.GetSuccess() {
			t.Fatalf("%v, %v", r, err)
		}
	}
	push("01")
	var call, lookup []*trace.Span
	var legs []*trace.Span
	eventually(t, "spans", func() error {
		call, lookup, legs = received.of(traceID, "pubsub.PushManagerService/PushToRoom"), received.of(traceID, "lookup"), received.of(traceID, "deliver")
		if len(call) != 1 || len(lookup) != 1 || len(legs) != 2 {
			return fmt.Errorf("%d calls, %d look-ups, %d legs", len(call), len(lookup), len(legs))
		}
		return nil
	})
	if parent := hex.EncodeToString(call[0].GetParentSpanId()); parent != caller {
		t.Errorf("the call's parent is %s, not the caller's span", parent)
	}
	for _, span := range append(lookup, legs...) {
		if string(span.GetParentSpanId()) != string(call[0].GetSpanId()) {
			t.Errorf("%s does not have the call as its parent", span.GetName())
		}
		if strings.Contains(span.String(), "secret") {
			t.Errorf("%s contains the payload", span.GetName())
		}
	}
	if legs[0].GetName() == legs[1].GetName() {
		t.Errorf("two legs to one node: %s", legs[0].GetName())
	}
	// The streaming node got the context of its leg, the Controller that of the look-up.
	c.nodes["new"].mu.Lock()
	got := c.nodes["new"].traceparent
	c.nodes["new"].mu.Unlock()
	found := false
	for _, leg := range legs {
		found = found || got == "00-"+traceID+"-"+hex.EncodeToString(leg.GetSpanId())+"-01"
	}
	if !found {
		t.Errorf("the node got traceparent %q", got)
	}

	push("00") // the caller has decided against it
	push("01")
	eventually(t, "the second sampled call", func() error {
		if n := len(received.of(traceID, "pubsub.PushManagerService/PushToRoom")); n != 2 {
			return fmt.Errorf("%d calls", n)
		}
		return nil
	})
}

// TestMetricsMoveAsTheContractSays reads the metrics before and after one push of
// each outcome.
func TestMetricsMoveAsTheContractSays(t *testing.T) {
	c := startCity(t)
	c.connect("new", "a", "b")
	c.connect("old", "c")
	c.controller.join("r", "a", "b", "c")
	c.controller.place("ghost", "new")
	c.controller.place("lost", "no such node")
	c.controller.join("partly", "a", "lost")
	before, err := c.readMetrics()
	if err != nil {
		t.Fatal(err)
	}
	ctx := within(t, patience)
	for range 3 {
		_, err = c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "r", Content: text("x")}) // 3 delivered
		must(t, err)
	}
	_, err = c.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "partly", Content: text("x")}) // 1 delivered, 1 failed
	must(t, err)
	_, err = c.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "ghost", Content: text("x")}) // 1 offline
	must(t, err)
	_, err = c.PushToUsers(ctx, &pubsub.PushToUsersRequest{UserIds: []string{"a", "c"}, Content: text("x")}) // 2 delivered
	must(t, err)
	_, err = c.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: text("x")}) // 3 delivered
	must(t, err)
	if _, err = c.PushToUser(ctx, &pubsub.PushToUserRequest{Content: text("x")}); err == nil {
		t.Error("no user, no error")
	}
	after, err := c.readMetrics()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]float64{
		`push_manager_api_requests_total{api="PushToRoom",status="success"}`:       3,
		`push_manager_api_requests_total{api="PushToRoom",status="partial"}`:       1,
		`push_manager_api_requests_total{api="PushToUser",status="failed"}`:        1,
		`push_manager_api_requests_total{api="PushToUser",status="error"}`:         1,
		`push_manager_api_requests_total{api="PushToUsers",status="success"}`:      1,
		`push_manager_api_requests_total{api="BroadcastMessage",status="success"}`: 1,
		`push_manager_api_duration_seconds_count{api="PushToRoom"}`:                4,
		`push_manager_api_latency_seconds_count{api="PushToRoom"}`:                 4,
		`push_manager_api_latency_seconds_bucket{api="PushToRoom",le="+Inf"}`:      4,
		`push_manager_push_total`:         17,
		`push_manager_push_success_total`: 15,
		`push_manager_push_failed_total`:  1,
		`push_manager_push_offline_total`: 1,
		`push_manager_push_unknown_total`: 0,
	} {
		if got := after[name] - before[name]; got != want {
			t.Errorf("%s moved by %g, want %g", name, got, want)
		}
	}
	for _, name := range []string{
		`push_manager_api_duration_seconds{api="PushToRoom",quantile="0.5"}`, `push_manager_api_duration_seconds{api="PushToRoom",quantile="0.9"}`,
		`push_manager_api_duration_seconds{api="PushToRoom",quantile="0.99"}`, `push_manager_api_duration_seconds{api="PushToRoom",quantile="0.999"}`,
		`push_manager_api_duration_seconds_sum{api="PushToRoom"}`, `push_manager_api_latency_seconds_sum{api="PushToRoom"}`,
		`push_manager_node_connections{node_id="new"}`, `push_manager_node_connections{node_id="old"}`, `push_manager_nodes`,
		`go_goroutines`, `process_open_fds`,
	} {
		if v := after[name]; v <= 0 {
			t.Errorf("%s is %g", name, v)
		}
	}
	if n := after["push_manager_nodes"]; n != 2 {
		t.Errorf("push_manager_nodes is %g", n)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
