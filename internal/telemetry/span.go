package telemetry

import (
	"context"
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/metadata"

	"github.com/push-manager/push-manager/engine"
)

// maxAttribute bounds a text in a span, maxTracestate what is passed on of a
// caller's tracestate (the standard asks for 512).
const (
	maxAttribute  = 300
	maxTracestate = 512
)

const service = "pubsub.PushManagerService"

// PushSpan is the span of one sampled push. It implements engine.Trace.
type PushSpan struct {
	// Static after Begin.
	tracer *Tracer
	ctx    context.Context //nolint:containedctx // It carries the span as parent and nothing of the call's life.
	span   trace.Span
}

var (
	_ engine.Trace         = (*PushSpan)(nil)
	_ engine.DeliveryTrace = (*DeliverySpan)(nil)
)

// Trace is Begin in the words of the push API: nil, nil for a call that is not
// traced.
func (t *Tracer) Trace(ctx context.Context, api string) (engine.Trace, func(engine.Result, error)) {
	p := t.Begin(ctx, api)
	if p == nil {
		return nil, nil
	}
	return p, p.End
}

// TraceFunc is Trace for those who want to know whether it traces at all: nil of a
// Tracer that is nil.
func (t *Tracer) TraceFunc() func(context.Context, string) (engine.Trace, func(engine.Result, error)) {
	if t == nil {
		return nil
	}
	return t.Trace
}

// TraceID is the id of the trace, as W3C Trace Context writes it.
func (p *PushSpan) TraceID() string { return p.span.SpanContext().TraceID().String() }

// Begin decides whether the call that ctx belongs to is traced and starts its
// span. It returns nil for a call that is not, at the cost of reading one header.
func (t *Tracer) Begin(ctx context.Context, method string) *PushSpan {
	if t == nil {
		return nil
	}
	parent := parentOf(ctx)
	id := parent.TraceID()
	if !id.IsValid() {
		id = newTraceID()
	}
	if !t.sampler.sample(parent, id) {
		return nil
	}
	return t.start(ctx, method, parent, id)
}

func (t *Tracer) start(call context.Context, method string, parent trace.SpanContext, id trace.TraceID) *PushSpan {
	// The span outlives neither the push nor the call's values, so it gets a
	// context of its own: legs may end after the call has returned.
	ctx := context.Background()
	if parent.IsValid() {
		ctx = trace.ContextWithRemoteSpanContext(ctx, parent.WithTraceState(tracestateOf(call)))
	} else {
		ctx = context.WithValue(ctx, traceIDKey{}, id)
	}
	ctx, span := t.tracer.Start(ctx, service+"/"+method,
		trace.WithSpanKind(trace.SpanKindServer),
		trace.WithAttributes(
			attribute.String("rpc.system", "grpc"),
			attribute.String("rpc.service", service),
			attribute.String("rpc.method", method),
		))
	t.spans.Inc()
	return &PushSpan{tracer: t, ctx: ctx, span: span}
}

// End closes the span with the account of the push, or with the error of one of
// which nothing was sent.
func (p *PushSpan) End(r engine.Result, err error) {
	if err != nil {
		p.span.SetStatus(codes.Error, safe(err.Error()))
		p.span.End()
		return
	}
	p.span.SetAttributes(
		attribute.Int("push.targets", r.Targets),
		attribute.Int("push.delivered", r.Delivered),
		attribute.Int("push.offline", r.Offline),
		attribute.Int("push.failed", r.Failed),
		attribute.Int("push.unknown", r.Unknown),
		attribute.Int("push.node_failures", len(r.NodeFailures)),
		attribute.Bool("push.found", r.Found),
	)
	// A user who is offline and a room that is unknown are answers, not errors.
	if r.Failed+r.Unknown+len(r.NodeFailures) > 0 {
		p.span.SetStatus(codes.Error, "not delivered to everybody")
	}
	p.span.End()
}

// Lookup starts the span of one look-up at the Controller. The context carries
// it, for whoever calls the Controller to hand on; the function ends it.
func (p *PushSpan) Lookup(ctx context.Context, what string) (context.Context, func(error)) {
	_, span := p.tracer.tracer.Start(p.ctx, "lookup "+what, trace.WithSpanKind(trace.SpanKindClient))
	p.tracer.spans.Inc()
	return trace.ContextWithSpan(ctx, span), func(err error) {
		if err != nil {
			span.SetStatus(codes.Error, safe(err.Error()))
		}
		span.End()
	}
}

// Delivery starts the span of the delivery to one node.
func (p *PushSpan) Delivery(node string, users int) engine.DeliveryTrace {
	node = safe(node)
	_, span := p.tracer.tracer.Start(p.ctx, "deliver "+node,
		trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(attribute.String("node.id", node), attribute.Int("push.users", users)))
	p.tracer.spans.Inc()
	return &DeliverySpan{span: span}
}

// DeliverySpan is the span of the delivery to one node. It implements engine.DeliveryTrace.
type DeliverySpan struct {
	span trace.Span
}

// Traceparent is the W3C trace context for the node.
func (d *DeliverySpan) Traceparent() string { return traceparent(d.span.SpanContext()) }

// Taken and Written implement engine.DeliveryTrace.
func (d *DeliverySpan) Taken() { d.span.AddEvent("taken from the queue") }

// Written implements engine.DeliveryTrace.
func (d *DeliverySpan) Written() { d.span.AddEvent("written") }

// End closes the span. Users that are not on the node are no error: they are
// looked up again.
func (d *DeliverySpan) End(outcome string) {
	outcome = safe(outcome)
	d.span.SetAttributes(attribute.String("push.outcome", outcome))
	if outcome != "delivered" && outcome != "not here" {
		d.span.SetStatus(codes.Error, outcome)
	}
	d.span.End()
}

// Served begins the span of work that another program has asked for: a part of its trace, or none where traceparent is
// empty, malformed or not sampled. The function ends the span.
func (t *Tracer) Served(traceparent, name string) func(error) {
	if t == nil || traceparent == "" {
		return func(error) {}
	}
	parent := parseTraceparent(traceparent)
	if !parent.IsSampled() {
		return func(error) {}
	}
	_, span := t.tracer.Start(trace.ContextWithRemoteSpanContext(context.Background(), parent), name, trace.WithSpanKind(trace.SpanKindServer))
	t.spans.Inc()
	return func(err error) {
		if err != nil {
			span.SetStatus(codes.Error, safe(err.Error()))
		}
		span.End()
	}
}

// safe makes a text from outside harmless for whoever shows it: cut, and
// without control characters, escapes and invalid UTF-8.
func safe(text string) string {
	if len(text) > maxAttribute {
		text = text[:maxAttribute]
	}
	quoted := strconv.Quote(text)
	return quoted[1 : len(quoted)-1]
}

// traceparent writes a W3C trace context.
func traceparent(sc trace.SpanContext) string {
	return "00-" + sc.TraceID().String() + "-" + sc.SpanID().String() + "-" + sc.TraceFlags().String()
}

// parentOf reads the caller's W3C trace context. What is malformed or comes twice
// is no context.
func parentOf(ctx context.Context) trace.SpanContext {
	values := metadata.ValueFromIncomingContext(ctx, "traceparent")
	if len(values) != 1 {
		return trace.SpanContext{}
	}
	return parseTraceparent(values[0])
}

// parseTraceparent reads VV-TRACEID-SPANID-FF. Versions above 00 may go on after
// a dash.
func parseTraceparent(text string) trace.SpanContext {
	const size = 55
	if len(text) < size || len(text) > maxTracestate || text[2] != '-' || text[35] != '-' || text[52] != '-' {
		return trace.SpanContext{}
	}
	version, ok := hexByte(text[:2])
	flags, ok2 := hexByte(text[53:55])
	if !ok || !ok2 || version == 0xff || version == 0 && len(text) != size || len(text) > size && text[size] != '-' {
		return trace.SpanContext{}
	}
	traceID, err := trace.TraceIDFromHex(text[3:35])
	if err != nil {
		return trace.SpanContext{}
	}
	spanID, err := trace.SpanIDFromHex(text[36:52])
	if err != nil {
		return trace.SpanContext{}
	}
	return trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: traceID, SpanID: spanID, TraceFlags: trace.TraceFlags(flags) & trace.FlagsSampled, Remote: true,
	})
}

// hexByte reads two lower-case hexadecimal digits.
func hexByte(text string) (b byte, ok bool) {
	for i := range 2 {
		switch c := text[i]; {
		case c >= '0' && c <= '9':
			b = b<<4 | (c - '0')
		case c >= 'a' && c <= 'f':
			b = b<<4 | (c - 'a' + 10)
		default:
			return 0, false
		}
	}
	return b, true
}

// tracestateOf reads what vendors add to the context; what is malformed is left
// out.
func tracestateOf(ctx context.Context) trace.TraceState {
	values := metadata.ValueFromIncomingContext(ctx, "tracestate")
	if len(values) != 1 || len(values[0]) > maxTracestate {
		return trace.TraceState{}
	}
	state, err := trace.ParseTraceState(values[0])
	if err != nil {
		return trace.TraceState{}
	}
	return state
}
