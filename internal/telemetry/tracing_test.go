package telemetry

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.opentelemetry.io/otel/trace"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/config"
)

const (
	traceID    = "4bf92f3577b34da6a3ce929d0e0e4736"
	parentSpan = "00f067aa0ba902b7"
)

// receiver is an OTLP server that keeps what it gets.
type receiver struct {
	collector.UnimplementedTraceServiceServer
	addr string

	mu      sync.Mutex
	got     []*tracepb.ResourceSpans
	headers metadata.MD
}

func (r *receiver) Export(ctx context.Context, req *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, req.GetResourceSpans()...)
	r.headers, _ = metadata.FromIncomingContext(ctx)
	return &collector.ExportTraceServiceResponse{}, nil
}

func startReceiver(t *testing.T) *receiver {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r, s := &receiver{addr: l.Addr().String()}, grpc.NewServer()
	collector.RegisterTraceServiceServer(s, r)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return r
}

// spans waits for nothing: the tracer has been closed.
func (r *receiver) spans() map[string]*tracepb.Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	spans := map[string]*tracepb.Span{}
	for _, rs := range r.got {
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				spans[s.GetName()] = s
			}
		}
	}
	return spans
}

func newTracer(t *testing.T, cfg TracingConfig) *Tracer {
	t.Helper()
	tracer, err := NewTracer(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return tracer
}

func closeTracer(t *testing.T, tracer *Tracer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := tracer.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

func incoming(kv ...string) context.Context {
	return metadata.NewIncomingContext(context.Background(), metadata.Pairs(kv...))
}

func TestOnePushIsOneTraceFromTheCallerToTheNodes(t *testing.T) {
	r := startReceiver(t)
	set := metrics.NewSet()
	tracer := newTracer(t, TracingConfig{Enabled: true, Endpoint: r.addr, SampleRate: 0, Instance: "pm-1", Metrics: set})
	call := tracer.Begin(incoming("traceparent", "00-"+traceID+"-"+parentSpan+"-01", "tracestate", "a=1,b=2"), "PushToRoom")
	if call == nil {
		t.Fatal("a sampled parent was not followed")
	}
	ctx, end := call.Lookup(context.Background(), "room")
	lookup := trace.SpanContextFromContext(ctx)
	end(errors.New("controller\nis away"))
	leg := call.Delivery("node-1", 3)
	toNode := leg.Traceparent()
	leg.End("delivered")
	other := call.Delivery("node-2\x1b[31m", 1)
	other.End("failed: queue full")
	call.End(engine.Result{Found: true, Targets: 4, Delivered: 3, Failed: 1}, nil)
	closeTracer(t, tracer)

	spans := r.spans()
	root := spans["pubsub.PushManagerService/PushToRoom"]
	if root == nil || len(spans) != 4 {
		t.Fatalf("spans %v", spans)
	}
	if root.GetKind() != tracepb.Span_SPAN_KIND_SERVER || hex(root.GetParentSpanId()) != parentSpan || root.GetTraceState() != "a=1,b=2" {
		t.Errorf("root %v", root)
	}
	for _, name := range []string{"lookup room", "deliver node-1", `deliver node-2\x1b[31m`} {
		s := spans[name]
		if s == nil {
			t.Fatalf("no span %q in %v", name, spans)
		}
		if !bytes.Equal(s.GetParentSpanId(), root.GetSpanId()) || hex(s.GetTraceId()) != traceID || s.GetKind() != tracepb.Span_SPAN_KIND_CLIENT {
			t.Errorf("%s: %v", name, s)
		}
	}
	if want := "00-" + traceID + "-" + hex(spans["deliver node-1"].GetSpanId()) + "-01"; toNode != want {
		t.Errorf("traceparent for the node %q, want %q", toNode, want)
	}
	if id := lookup.SpanID(); !lookup.IsSampled() || !bytes.Equal(id[:], spans["lookup room"].GetSpanId()) {
		t.Errorf("the look-up's context carries %v", lookup)
	}
	if status := spans["lookup room"].GetStatus(); status.GetCode() != tracepb.Status_STATUS_CODE_ERROR || status.GetMessage() != `controller\nis away` {
		t.Errorf("look-up status %v", status)
	}
	if got := attr(spans[`deliver node-2\x1b[31m`], "push.outcome"); got != "failed: queue full" {
		t.Errorf("outcome %q", got)
	}
	var text strings.Builder
	set.WritePrometheus(writer{&text})
	for _, want := range []string{"push_manager_trace_spans_total 4", "push_manager_trace_spans_exported_total 4", "push_manager_trace_spans_lost_total 0"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("metrics lack %q:\n%s", want, text.String())
		}
	}
}

type writer struct{ *strings.Builder }

func hex(id []byte) string {
	var b strings.Builder
	for _, c := range id {
		b.WriteString(string("0123456789abcdef"[c>>4]) + string("0123456789abcdef"[c&15]))
	}
	return b.String()
}

func attr(s *tracepb.Span, key string) string {
	for _, kv := range s.GetAttributes() {
		if kv.GetKey() == key {
			return kv.GetValue().GetStringValue()
		}
	}
	return ""
}

func TestStandardVariablesAreHonoured(t *testing.T) {
	r := startReceiver(t)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"+r.addr)
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")
	t.Setenv("OTEL_SERVICE_NAME", "mine")
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test,service.name=not-mine")
	c := settle(t, nil, "", nil)
	c.Service, c.Instance = "push-manager", "pm-9"
	tracer := newTracer(t, c)
	call := tracer.Begin(context.Background(), "PushToUser")
	if call == nil {
		t.Fatal("not sampled")
	}
	call.End(engine.Result{}, errors.New("no"))
	closeTracer(t, tracer)
	if len(r.got) != 1 {
		t.Fatalf("got %v", r.got)
	}
	res := map[string]string{}
	for _, kv := range r.got[0].GetResource().GetAttributes() {
		res[kv.GetKey()] = kv.GetValue().GetStringValue()
	}
	if res["service.name"] != "mine" || res["deployment.environment"] != "test" || res["service.instance.id"] != "pm-9" {
		t.Errorf("resource %v", res)
	}
	if got := r.headers.Get("x-key"); !slices.Equal(got, []string{"secret"}) {
		t.Errorf("headers %v", got)
	}
}

// settle runs the section tracing through all sources.
func settle(t *testing.T, flags map[string]string, yaml string, env map[string]string) TracingConfig {
	t.Helper()
	c, err := trySettle(t, flags, yaml, env)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func trySettle(t *testing.T, flags map[string]string, yaml string, env map[string]string) (TracingConfig, error) {
	t.Helper()
	var c TracingConfig
	s := config.New()
	c.Bind(s)
	o := config.Options{Flags: flags, NoFile: yaml == "", File: yamlFile(t, yaml)}
	lookup := lookupEnv(env)
	o.LookupEnv = lookup
	if err := s.Load(o); err != nil {
		return c, err
	}
	return c, c.Validate(lookup)
}

func TestWhatSwitchesTracingOn(t *testing.T) {
	const on, off = "tracing:\n  enabled: true\n", "tracing:\n  enabled: false\n"
	for name, tc := range map[string]struct {
		flags    map[string]string
		yaml     string
		env      map[string]string
		enabled  bool
		endpoint string
	}{
		"nothing":                    {},
		"file":                       {yaml: on, enabled: true, endpoint: "http://localhost:4317"},
		"file with an endpoint":      {yaml: on + "  endpoint: a:1\n", enabled: true, endpoint: "a:1"},
		"standard endpoint":          {env: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1"}, enabled: true},
		"standard exporter":          {env: map[string]string{"OTEL_TRACES_EXPORTER": "otlp"}, enabled: true, endpoint: "http://localhost:4317"},
		"file says no":               {yaml: off, env: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1"}},
		"SDK disabled":               {yaml: on, env: map[string]string{"OTEL_SDK_DISABLED": "TRUE"}},
		"exporter none":              {yaml: on, env: map[string]string{"OTEL_TRACES_EXPORTER": "none"}},
		"standard endpoint, no URL":  {env: map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "a:1"}, enabled: true, endpoint: "http://a:1"},
		"the same with TLS":          {env: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "a:1", "OTEL_EXPORTER_OTLP_INSECURE": "false"}, enabled: true, endpoint: "https://a:1"},
		"standard beats file":        {yaml: on + "  endpoint: a:1\n", env: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "b:1"}, enabled: true, endpoint: "http://b:1"},
		"our variable beats it":      {yaml: on, env: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "b:1", "TRACING_ENDPOINT": "c:1"}, enabled: true, endpoint: "c:1"},
		"flag beats everything else": {flags: map[string]string{"tracing-endpoint": "d:1", "tracing-enabled": "true"}, env: map[string]string{"TRACING_ENDPOINT": "c:1"}, enabled: true, endpoint: "d:1"},
	} {
		t.Run(name, func(t *testing.T) {
			c := settle(t, tc.flags, tc.yaml, tc.env)
			if c.Enabled != tc.enabled || c.Endpoint != tc.endpoint {
				t.Errorf("enabled %v, endpoint %q", c.Enabled, c.Endpoint)
			}
		})
	}
}

func TestSamplingFollowsParentAndRule(t *testing.T) {
	yes := parseTraceparent("00-" + traceID + "-" + parentSpan + "-01")
	no := parseTraceparent("00-" + traceID + "-" + parentSpan + "-00")
	for name, tc := range map[string]struct {
		flags, env    map[string]string
		yaml          string
		yes, no, root bool
	}{
		"default":                     {yes: true, root: true},
		"rate 0 in the file":          {yaml: "tracing:\n  sample_rate: 0\n", yes: true},
		"rate 0 by flag":              {flags: map[string]string{"tracing-sample-rate": "0"}, env: map[string]string{"OTEL_TRACES_SAMPLER": "always_on"}, yes: true},
		"always_on":                   {env: map[string]string{"OTEL_TRACES_SAMPLER": "always_on"}, yaml: "tracing:\n  sample_rate: 0\n", yes: true, no: true, root: true},
		"always_off":                  {env: map[string]string{"OTEL_TRACES_SAMPLER": "always_off"}},
		"parentbased_always_on":       {env: map[string]string{"OTEL_TRACES_SAMPLER": "parentbased_always_on"}, yes: true, root: true},
		"parentbased_always_off":      {env: map[string]string{"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, yes: true},
		"traceidratio of 0":           {env: map[string]string{"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}},
		"traceidratio":                {env: map[string]string{"OTEL_TRACES_SAMPLER": "traceidratio"}, yes: true, no: true, root: true},
		"parentbased_traceidratio, 0": {env: map[string]string{"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.0"}, yes: true},
	} {
		t.Run(name, func(t *testing.T) {
			c := settle(t, tc.flags, tc.yaml, tc.env)
			s := newSampler(c.Sampler, c.SampleRate)
			for i, p := range []struct {
				parent trace.SpanContext
				want   bool
			}{{yes, tc.yes}, {no, tc.no}, {trace.SpanContext{}, tc.root}} {
				id := p.parent.TraceID()
				if !id.IsValid() {
					id = newTraceID()
				}
				if got := s.sample(p.parent, id); got != p.want {
					t.Errorf("parent %d: %v", i, got)
				}
			}
		})
	}
	s, n := newSampler("", 0.25), 0
	for range 10_000 {
		if s.sample(trace.SpanContext{}, newTraceID()) {
			n++
		}
	}
	if n < 2200 || n > 2800 {
		t.Errorf("%d of 10000 at a rate of 0.25", n)
	}
}

func TestBadStandardVariableIsNamed(t *testing.T) {
	for name, env := range map[string]map[string]string{
		"OTEL_TRACES_SAMPLER":     {"OTEL_TRACES_SAMPLER": "jaeger"},
		"OTEL_TRACES_SAMPLER_ARG": {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"},
		"OTEL_TRACES_EXPORTER":    {"OTEL_TRACES_EXPORTER": "zipkin", "TRACING_ENABLED": "true"},
	} {
		_, err := trySettle(t, nil, "", env)
		if err == nil || !strings.Contains(err.Error(), name) || !errors.Is(err, config.ErrUsage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAReceiverHasNoPassword, which would be shown with the settings in force.
func TestAReceiverHasNoPassword(t *testing.T) {
	_, err := trySettle(t, nil, "tracing:\n  endpoint: https://u:hidden@a:1\n", nil)
	if err == nil || !strings.Contains(err.Error(), "tracing.endpoint") || strings.Contains(err.Error(), "hidden") {
		t.Error(err)
	}
}

func TestMalformedTraceContextIsNone(t *testing.T) {
	good := "00-" + traceID + "-" + parentSpan + "-01"
	for text, want := range map[string]bool{
		good: true,
		"01-" + traceID + "-" + parentSpan + "-01-what-comes-later": true,
		good + "-x": false,
		"01-" + traceID + "-" + parentSpan + "-01x":                false,
		"ff-" + traceID + "-" + parentSpan + "-01":                 false,
		strings.ToUpper(good):                                      false,
		"00-" + strings.Repeat("0", 32) + "-" + parentSpan + "-01": false,
		"00-" + traceID + "-" + strings.Repeat("0", 16) + "-01":    false,
		"00-" + traceID + "-" + parentSpan + "-0":                  false,
		"00-" + traceID + "-" + parentSpan + "-zz":                 false,
		"":                                   false,
		"garbage":                            false,
		"00-" + strings.Repeat("x", 100_000): false,
	} {
		if got := parseTraceparent(text).IsValid(); got != want {
			t.Errorf("%.80q: %v", text, got)
		}
	}
	if parentOf(incoming("traceparent", good, "traceparent", good)).IsValid() {
		t.Error("two contexts were taken for one")
	}
	for _, state := range []string{"", "=", "a=1,a=2", strings.Repeat("a", 600), "\x00"} {
		if got := tracestateOf(incoming("tracestate", state)); got.Len() != 0 {
			t.Errorf("%.20q: %v", state, got)
		}
	}
}

func TestCallThatIsNotSampledCostsNothing(t *testing.T) {
	var off *Tracer
	ctx := incoming("traceparent", "00-"+traceID+"-"+parentSpan+"-01")
	if n := testing.AllocsPerRun(100, func() {
		if tr, end := off.Trace(ctx, "PushToRoom"); tr != nil || end != nil {
			t.Error("sampled")
		}
	}); n != 0 {
		t.Errorf("tracing off: %v allocations", n)
	}
	on := newTracer(t, TracingConfig{Enabled: true, Endpoint: "127.0.0.1:1", SampleRate: 0})
	defer closeTracer(t, on)
	if n := testing.AllocsPerRun(100, func() {
		if on.Begin(context.Background(), "PushToRoom") != nil {
			t.Error("sampled")
		}
	}); n != 0 {
		t.Errorf("not sampled: %v allocations", n)
	}
	unsampled := incoming("traceparent", "00-"+traceID+"-"+parentSpan+"-00")
	if n := testing.AllocsPerRun(100, func() {
		if on.Begin(unsampled, "PushToRoom") != nil {
			t.Error("sampled")
		}
	}); n > 1 {
		t.Errorf("parent not sampled: %v allocations", n)
	}
}

func TestReceiverThatIsAwayNeitherStopsNorBlocks(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }() // takes connections and never answers
	var log bytes.Buffer
	tracer := newTracer(t, TracingConfig{
		Enabled: true, Endpoint: l.Addr().String(), SampleRate: 1, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	for range 10_000 {
		call := tracer.Begin(context.Background(), "PushToRoom")
		call.End(engine.Result{}, nil)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if err := tracer.Close(ctx); err == nil {
		t.Error("closing says that everything was sent")
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestServedContinuesSampledTracesOnly: a program that is called adds to its caller's trace, and begins none.
func TestServedContinuesSampledTracesOnly(t *testing.T) {
	set := metrics.NewSet()
	tracer, err := NewTracer(t.Context(), TracingConfig{Enabled: true, Endpoint: "127.0.0.1:1", Metrics: set})
	if err != nil {
		t.Fatal(err)
	}
	for _, parent := range []string{"", "nonsense", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"} {
		tracer.Served(parent, "work")(nil)
	}
	spans := set.GetOrCreateCounter("push_manager_trace_spans_total")
	if n := spans.Get(); n != 0 {
		t.Errorf("%d spans that nobody asked for", n)
	}
	tracer.Served("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "work")(nil)
	if n := spans.Get(); n != 1 {
		t.Errorf("%d spans, want 1", n)
	}
	(*Tracer)(nil).Served("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "work")(nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // nobody receives
	_ = tracer.Close(ctx)
}
