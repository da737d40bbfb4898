package client

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/metadata"
)

// trace begins the span of a push and puts its context into the metadata of the call. end is called once.
func (c *Client) trace(ctx context.Context, name string) (_ context.Context, end func(*Result, error)) {
	ctx, span := c.cfg.tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindClient)) //nolint:spancheck // by end
	return propagate(ctx), func(r *Result, err error) { endSpan(span, r, err) }          //nolint:spancheck // by end
}

// propagate adds the W3C context of ctx's span, which is what Push-Manager reads.
func propagate(ctx context.Context) context.Context {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return ctx
	}
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get("traceparent")) > 0 {
		return ctx // the caller has seen to it
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	var pairs []string
	for key, value := range carrier {
		pairs = append(pairs, key, value)
	}
	return metadata.AppendToOutgoingContext(ctx, pairs...)
}

func endSpan(span trace.Span, r *Result, err error) {
	defer span.End()
	if !span.IsRecording() {
		return
	}
	if err != nil {
		span.RecordError(err)
		span.SetStatus(otelcodes.Error, err.Error())
		return
	}
	span.SetAttributes(
		attribute.String("push.outcome", r.Outcome().String()),
		attribute.Int("push.targets", r.Targets),
		attribute.Int("push.delivered", r.Delivered),
	)
	if o := r.Outcome(); o == Failed || o == Unknown {
		span.SetStatus(otelcodes.Error, r.Message)
	}
}
