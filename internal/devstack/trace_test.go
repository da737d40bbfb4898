package devstack_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lxzan/gws"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/push-manager/push-manager/internal/devstack"
	"github.com/push-manager/push-manager/internal/telemetry"
	pubsub "github.com/push-manager/push-manager/proto"
)

// receiver is an OTLP server that keeps the spans it gets.
type receiver struct {
	collector.UnimplementedTraceServiceServer

	mu    sync.Mutex
	spans []*tracepb.Span
}

func (r *receiver) Export(_ context.Context, req *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rs := range req.GetResourceSpans() {
		for _, ss := range rs.GetScopeSpans() {
			r.spans = append(r.spans, ss.GetSpans()...)
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// listener is a client that waits for frames.
type listener struct {
	gws.BuiltinEventHandler

	frames chan string
}

func (l *listener) OnMessage(_ *gws.Conn, m *gws.Message) {
	l.frames <- m.Data.String()
	_ = m.Close()
}

func connect(t *testing.T, address string) *listener {
	t.Helper()
	l := &listener{frames: make(chan string, 8)}
	conn, _, err := gws.NewClient(l, &gws.ClientOption{Addr: address})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn.ReadLoop()
	}()
	t.Cleanup(func() {
		_ = conn.NetConn().Close()
		<-done
	})
	return l
}

func (l *listener) want(t *testing.T, part string) {
	t.Helper()
	late := time.NewTimer(time.Minute)
	defer late.Stop()
	select {
	case frame := <-l.frames:
		if !strings.Contains(frame, part) {
			t.Errorf("frame %q lacks %q", frame, part)
		}
	case <-late.C:
		t.Errorf("no frame with %q", part)
	}
}

// TestPushToRoomIsOneTrace: the call below its caller, the look-up and one leg per node below the call, and below
// them what the Controller and the nodes did.
func TestPushToRoomIsOneTrace(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r, otlp := &receiver{}, grpc.NewServer()
	collector.RegisterTraceServiceServer(otlp, r)
	served := make(chan error, 1)
	go func() { served <- otlp.Serve(l) }()
	t.Cleanup(func() {
		otlp.Stop()
		<-served
	})
	s := startStack(t, devstack.Config{Nodes: 2, Tracing: telemetry.TracingConfig{Enabled: true, Endpoint: l.Addr().String()}})
	alice := connect(t, s.Nodes()[0].WebSocket()+"?user_id=alice&room_id=lobby")
	bob := connect(t, s.Nodes()[1].WebSocket()+"?user_id=bob&room_id=lobby")
	alice.want(t, "joined")
	bob.want(t, "joined")

	conn, err := grpc.NewClient(s.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	api := pubsub.NewPushManagerServiceClient(conn)
	push := &pubsub.PushToRoomRequest{RoomId: "lobby", Content: &pubsub.MessageContent{Data: []byte("secret payload")}}
	const traceID, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	sampled := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+traceID+"-"+caller+"-01")
	for _, ctx := range []context.Context{sampled, t.Context()} { // the second one is not sampled
		reply, err := api.PushToRoom(ctx, push)
		if err != nil || !reply.GetSuccess() || reply.GetDeliveredCount() != 2 {
			t.Errorf("push: %v %v", reply, err)
		}
		alice.want(t, "secret payload")
		bob.want(t, "secret payload")
	}
	stopStack(t, s) // sends what is queued

	byName := map[string]*tracepb.Span{}
	for _, span := range r.spans {
		byName[span.GetName()] = span
		if strings.Contains(span.String(), "secret") {
			t.Errorf("a payload in %v", span)
		}
	}
	root := byName["pubsub.PushManagerService/PushToRoom"]
	if root == nil || len(r.spans) != 7 {
		t.Fatalf("%d spans: %v", len(r.spans), byName)
	}
	if hex.EncodeToString(root.GetTraceId()) != traceID || hex.EncodeToString(root.GetParentSpanId()) != caller {
		t.Errorf("the call's parent: %v", root)
	}
	for _, name := range []string{"lookup room", "deliver connect-node-1", "deliver connect-node-2"} {
		span := byName[name]
		if span == nil || !bytes.Equal(span.GetParentSpanId(), root.GetSpanId()) || !bytes.Equal(span.GetTraceId(), root.GetTraceId()) {
			t.Errorf("%s: %v", name, span)
		}
	}
	children := map[string]string{}
	for _, span := range r.spans {
		children[span.GetName()+" of "+string(span.GetParentSpanId())] = span.GetName()
	}
	for name, parent := range map[string]string{
		"pubsub.ControllerService/GetRoomInfo": "lookup room", "hand over": "deliver connect-node-1", "hand over ": "deliver connect-node-2",
	} {
		if children[strings.TrimSpace(name)+" of "+string(byName[parent].GetSpanId())] == "" {
			t.Errorf("no %s below %s: %v", name, parent, r.spans)
		}
	}
}
