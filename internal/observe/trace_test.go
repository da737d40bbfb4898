package observe

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	pubsub "github.com/push-manager/push-manager/proto"
)

// receiver is an OTLP server that keeps the spans it gets, a line each.
type receiver struct {
	collector.UnimplementedTraceServiceServer

	address string

	mu    sync.Mutex
	spans map[string][]span // by trace id
}

type span struct{ service, name, id, parent string }

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r, s := &receiver{address: l.Addr().String(), spans: map[string][]span{}}, grpc.NewServer()
	collector.RegisterTraceServiceServer(s, r)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		<-served
	})
	return r
}

func (r *receiver) Export(_ context.Context, req *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rs := range req.GetResourceSpans() {
		service := ""
		for _, a := range rs.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				service = a.GetValue().GetStringValue()
			}
		}
		for _, ss := range rs.GetScopeSpans() {
			for _, one := range ss.GetSpans() {
				id := hex.EncodeToString(one.GetTraceId())
				r.spans[id] = append(r.spans[id], span{service, one.GetName(), hex.EncodeToString(one.GetSpanId()), hex.EncodeToString(one.GetParentSpanId())})
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// fourPrograms pushes as a Biz-Server that traces, to a room that is in no cache, and reads the trace: one tree, from the
// caller over Push-Manager to the Controller and the Connect-Nodes.
func (r *receiver) fourPrograms(c *city, api pubsub.PushManagerServiceClient) {
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(r.address), otlptracegrpc.WithInsecure())
	if err != nil {
		c.t.Fatal(err)
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter), sdktrace.WithResource(resource.NewSchemaless(attribute.String("service.name", "biz-server"))))
	defer provider.Shutdown(ctx)
	c.joinRoom("traced")
	conn, err := grpc.NewClient(c.lookups, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close()
	c.until("the Controller knows all who have joined", func() error {
		room, err := pubsub.NewControllerServiceClient(conn).GetRoomInfo(ctx, &pubsub.GetRoomInfoRequest{RoomId: of("traced")})
		if n := len(room.GetRoomInfo().GetUsers()); err != nil || n != len(c.http) {
			return fmt.Errorf("%d users, %w", n, err)
		}
		return nil
	})
	ctx, root := provider.Tracer("observe").Start(ctx, "announce")
	sc := root.SpanContext()
	reply, err := api.PushToRoom(metadata.AppendToOutgoingContext(ctx, "traceparent", fmt.Sprintf("00-%s-%s-01", sc.TraceID(), sc.SpanID())),
		&pubsub.PushToRoomRequest{RoomId: "traced", Content: text("hello")})
	root.End()
	if err != nil || !reply.GetSuccess() {
		c.t.Errorf("traced push: %v %v", reply, err)
	}
	want := []string{"biz-server", "connect-node", "controller", "push-manager"}
	var got []span
	var services []string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && !slices.Equal(services, want); time.Sleep(200 * time.Millisecond) {
		r.mu.Lock()
		got = slices.Clone(r.spans[sc.TraceID().String()])
		r.mu.Unlock()
		services = nil
		for _, s := range got {
			services = append(services, s.service)
		}
		slices.Sort(services)
		services = slices.Compact(services)
	}
	if !slices.Equal(services, want) {
		c.t.Errorf("the trace names %v, want %v", services, want)
	}
	var show func(parent string, depth int)
	var lines strings.Builder
	shown := 0
	show = func(parent string, depth int) {
		for _, s := range got {
			if s.parent == parent {
				shown++
				fmt.Fprintf(&lines, "\n%s%-13s %s", strings.Repeat("  ", depth+1), s.service, s.name)
				show(s.id, depth+1)
			}
		}
	}
	show("", 0)
	c.t.Logf("one trace:%s", lines.String())
	if shown != len(got) {
		c.t.Errorf("%d of %d spans hang together: %v", shown, len(got), got)
	}
}
