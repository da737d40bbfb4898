package telemetry

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unicode"

	"github.com/VictoriaMetrics/metrics"
	"github.com/go-logr/logr"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/push-manager/push-manager/internal/config"
)

// The sampling rules, in the words of OTEL_TRACES_SAMPLER.
const (
	samplerAlwaysOn    = "always_on"
	samplerAlwaysOff   = "always_off"
	samplerRatio       = "traceidratio"
	samplerParentOn    = "parentbased_always_on"
	samplerParentOff   = "parentbased_always_off"
	samplerParentRatio = "parentbased_traceidratio"
)

// defaultEndpoint is where a collector listens by convention.
const defaultEndpoint = "http://localhost:4317"

// TracingConfig says what is traced and where it goes. The zero value traces
// nothing.
type TracingConfig struct {
	Enabled    bool
	Endpoint   string  // URL or HOST:PORT (plain) of an OTLP gRPC receiver; "": what the OTEL_* variables say, or localhost:4317
	SampleRate float64 // share of calls without a parent that are traced
	Sampler    string  // a word of OTEL_TRACES_SAMPLER; "": parentbased_traceidratio

	// Service and Instance name the process unless the OTEL_* variables do.
	Service  string
	Instance string
	Metrics  *metrics.Set
	Logger   *slog.Logger

	set                              *config.Set
	enabledKey, endpointKey, rateKey *config.Key
}

// Bind adds the section tracing. Validate must follow Load.
func (c *TracingConfig) Bind(s *config.Set) {
	c.set = s
	c.enabledKey = s.Bool(&c.Enabled, "tracing.enabled", false,
		"Trace pushes with OpenTelemetry. Also on when OTEL_EXPORTER_OTLP_ENDPOINT is set and this is not.")
	c.endpointKey = s.Text(&c.Endpoint, "tracing.endpoint", "",
		"OTLP gRPC receiver, as http://HOST:PORT, https://HOST:PORT or HOST:PORT (plain). Empty: OTEL_EXPORTER_OTLP_ENDPOINT or localhost:4317.")
	c.rateKey = s.Float(&c.SampleRate, "tracing.sample_rate", 1, 0, 1,
		"Share of the calls that are traced when the caller has not decided. OTEL_TRACES_SAMPLER overrides the file.")
}

// BindServed is Bind for a program that only continues the traces of those who call it: no rate of its own.
func (c *TracingConfig) BindServed(s *config.Set) {
	c.set = s
	c.enabledKey = s.Bool(&c.Enabled, "tracing.enabled", false,
		"Add to the traces of sampled pushes, with OpenTelemetry. Also on when OTEL_EXPORTER_OTLP_ENDPOINT is set and this is not.")
	c.endpointKey = s.Text(&c.Endpoint, "tracing.endpoint", "",
		"OTLP gRPC receiver, as http://HOST:PORT, https://HOST:PORT or HOST:PORT (plain). Empty: OTEL_EXPORTER_OTLP_ENDPOINT or localhost:4317.")
}

// Validate applies the standard OTEL_* variables that are not read by the
// exporter itself. Like all of the environment they come before the file and
// after flags; OTEL_SDK_DISABLED and OTEL_TRACES_EXPORTER=none turn everything off.
func (c *TracingConfig) Validate(lookupEnv func(string) (string, bool)) error {
	env := func(name string) string {
		v, _ := lookupEnv(name)
		return strings.TrimSpace(v)
	}
	variable := "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
	if env(variable) == "" {
		variable = "OTEL_EXPORTER_OTLP_ENDPOINT"
	}
	endpoint := env(variable)
	if err := checkEndpoint(endpoint); err != nil {
		return config.Usage(fmt.Errorf("%s: %w", variable, err))
	}
	if err := checkEndpoint(c.Endpoint); err != nil {
		return c.set.Errorf("tracing.endpoint", "%v", err)
	}
	if u, err := url.Parse(c.Endpoint); err == nil && u.User != nil {
		return c.set.Errorf("tracing.endpoint", "has a user in it, who would be shown with the settings: the exporter sends none")
	}
	exporter := env("OTEL_TRACES_EXPORTER")
	if !c.enabledKey.IsSet() {
		c.Enabled = c.Enabled || endpoint != "" || exporter == "otlp"
	}
	switch {
	case exporter == "none" || strings.EqualFold(env("OTEL_SDK_DISABLED"), "true"):
		c.Enabled = false
	case exporter != "" && exporter != "otlp" && c.Enabled:
		return config.Usage(fmt.Errorf("OTEL_TRACES_EXPORTER: %q is neither otlp nor none", exporter))
	}
	switch {
	case endpoint != "" && !c.endpointKey.Overridden():
		c.Endpoint = endpointOf(endpoint, env)
	case c.Endpoint == "" && c.Enabled:
		c.Endpoint = defaultEndpoint
	}
	if c.rateKey != nil && !c.rateKey.Overridden() {
		return c.applySampler(env("OTEL_TRACES_SAMPLER"), env("OTEL_TRACES_SAMPLER_ARG"))
	}
	return nil
}

// checkEndpoint tells what is wrong with a receiver: the exporter would log it in its own way,
// and send to its default.
func checkEndpoint(endpoint string) error {
	scheme, address, isURL := strings.Cut(endpoint, "://")
	switch {
	case endpoint == "":
		return nil
	case !isURL:
		return config.CheckAddress(endpoint)
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Hostname() == "" || scheme != "http" && scheme != "https" {
		return fmt.Errorf("%q is no http or https URL", endpoint)
	}
	if strings.ContainsFunc(address, unicode.IsSpace) {
		return fmt.Errorf("%q holds a space", endpoint)
	}
	return nil
}

// endpointOf leaves URLs, which carry the choice of TLS, to the exporter. A bare
// HOST:PORT, which the standard does not know, is plain unless asked otherwise.
func endpointOf(endpoint string, env func(string) string) string {
	if strings.Contains(endpoint, "://") {
		return ""
	}
	insecure := env("OTEL_EXPORTER_OTLP_TRACES_INSECURE")
	if insecure == "" {
		insecure = env("OTEL_EXPORTER_OTLP_INSECURE")
	}
	if strings.EqualFold(insecure, "false") {
		return "https://" + endpoint
	}
	return "http://" + endpoint
}

func (c *TracingConfig) applySampler(sampler, arg string) error {
	switch sampler {
	case "":
		return nil
	case samplerAlwaysOn, samplerAlwaysOff, samplerParentOn, samplerParentOff:
	case samplerRatio, samplerParentRatio:
		c.SampleRate = 1
		if arg != "" {
			rate, err := strconv.ParseFloat(arg, 64)
			if err != nil || !(rate >= 0 && rate <= 1) {
				return config.Usage(fmt.Errorf("OTEL_TRACES_SAMPLER_ARG: %q is not a number from 0 to 1", arg))
			}
			c.SampleRate = rate
		}
	default:
		return config.Usage(fmt.Errorf("OTEL_TRACES_SAMPLER: %q is not known", sampler))
	}
	c.Sampler = sampler
	return nil
}

// sampler decides from ids alone.
type sampler struct {
	parentBased bool
	bound       uint64 // a root is sampled when 63 bits of its trace id are below
}

func newSampler(word string, rate float64) sampler {
	const all = 1 << 63
	switch word {
	case samplerAlwaysOn:
		return sampler{bound: all}
	case samplerAlwaysOff:
		return sampler{}
	case samplerParentOn:
		return sampler{parentBased: true, bound: all}
	case samplerParentOff:
		return sampler{parentBased: true}
	}
	bound := uint64(all)
	if rate < 1 {
		bound = uint64(math.Max(rate, 0) * all)
	}
	return sampler{parentBased: word != samplerRatio, bound: bound}
}

func (s sampler) sample(parent trace.SpanContext, id trace.TraceID) bool {
	if s.parentBased && parent.IsValid() {
		return parent.IsSampled()
	}
	// The bits and the bound are those of OpenTelemetry's TraceIDRatioBased, so
	// that all services keep the same traces.
	return binary.BigEndian.Uint64(id[8:16])>>1 < s.bound
}

// Tracer makes the spans of pushes. A nil Tracer traces nothing.
type Tracer struct {
	// Static after NewTracer.
	sampler  sampler
	provider *sdktrace.TracerProvider
	exporter *exporter
	tracer   trace.Tracer
	spans    *metrics.Counter
}

// NewTracer starts exporting in the background until Close. It returns nil when
// tracing is off. A receiver that is away does not keep it from starting.
func NewTracer(ctx context.Context, cfg TracingConfig) (*Tracer, error) {
	if !cfg.Enabled {
		return nil, nil //nolint:nilnil // A nil Tracer is one that traces nothing.
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	if cfg.Service == "" {
		cfg.Service = "push-manager"
	}
	// What OpenTelemetry has to say would go to standard error, whatever the log's format.
	otel.SetLogger(logr.FromSlogHandler(cfg.Logger.Handler()))
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { cfg.Logger.Warn("tracing", "error", err) }))
	otlp, err := otlptracegrpc.New(ctx, endpointOptions(cfg.Endpoint)...)
	if err != nil {
		return nil, fmt.Errorf("start the trace exporter: %w", err)
	}
	out := newExporter(otlp, &cfg)
	limits := sdktrace.NewSpanLimits()
	if limits.AttributeValueLengthLimit < 0 || limits.AttributeValueLengthLimit > maxAttribute {
		limits.AttributeValueLengthLimit = maxAttribute
	}
	provider := sdktrace.NewTracerProvider(
		// Begin has decided already: whatever reaches the provider is sampled.
		sdktrace.WithSampler(sdktrace.AlwaysSample()),
		sdktrace.WithIDGenerator(idGenerator{}),
		sdktrace.WithRawSpanLimits(limits),
		sdktrace.WithResource(newResource(ctx, &cfg)),
		sdktrace.WithSpanProcessor(sdktrace.NewBatchSpanProcessor(out)),
	)
	return &Tracer{
		sampler:  newSampler(cfg.Sampler, cfg.SampleRate),
		provider: provider,
		exporter: out,
		tracer:   provider.Tracer("github.com/push-manager/push-manager"),
		spans:    cfg.Metrics.NewCounter("push_manager_trace_spans_total"),
	}, nil
}

// Close sends what is queued and stops, at the latest when ctx ends.
func (t *Tracer) Close(ctx context.Context) error {
	if t == nil {
		return nil
	}
	// What is still being sent when ctx ends is given up, so that nothing is left running. The SDK stops nothing for a context that has ended
	// before.
	defer context.AfterFunc(ctx, t.exporter.abort)()
	err := t.provider.Shutdown(context.WithoutCancel(ctx))
	<-t.exporter.closed
	if err = cmp.Or(err, ctx.Err()); err != nil {
		return fmt.Errorf("send the last traces: %w", err)
	}
	return nil
}

func endpointOptions(endpoint string) []otlptracegrpc.Option {
	switch {
	case endpoint == "":
		return nil // the exporter reads OTEL_EXPORTER_OTLP_*
	case strings.Contains(endpoint, "://"):
		return []otlptracegrpc.Option{otlptracegrpc.WithEndpointURL(endpoint)}
	}
	return []otlptracegrpc.Option{otlptracegrpc.WithEndpoint(endpoint), otlptracegrpc.WithInsecure()}
}

// newResource describes the process. OTEL_SERVICE_NAME and
// OTEL_RESOURCE_ATTRIBUTES come last and win.
func newResource(ctx context.Context, cfg *TracingConfig) *resource.Resource {
	res, err := resource.New(ctx,
		resource.WithTelemetrySDK(),
		resource.WithAttributes(
			attribute.String("service.name", cfg.Service),
			attribute.String("service.instance.id", cfg.Instance),
		),
		resource.WithFromEnv(),
	)
	if err != nil {
		cfg.Logger.Warn("a part of OTEL_RESOURCE_ATTRIBUTES is not understood", "error", err)
	}
	return res
}

// exporter counts what goes out and tells the log once when it begins and ends
// to fail.
type exporter struct {
	sdktrace.SpanExporter

	logger   *slog.Logger
	exported *metrics.Counter
	lost     *metrics.Counter
	failing  atomic.Bool
	once     sync.Once
	aborted  chan struct{} // closed when nothing is to be sent any more
	closed   chan struct{} // closed by Shutdown, after the last ExportSpans
}

func newExporter(next *otlptrace.Exporter, cfg *TracingConfig) *exporter {
	return &exporter{
		SpanExporter: next, logger: cfg.Logger,
		exported: cfg.Metrics.NewCounter("push_manager_trace_spans_exported_total"),
		lost:     cfg.Metrics.NewCounter("push_manager_trace_spans_lost_total"),
		aborted:  make(chan struct{}),
		closed:   make(chan struct{}),
	}
}

// abort ends the sending under way and lets all that follows fail.
func (e *exporter) abort() { e.once.Do(func() { close(e.aborted) }) }

// Shutdown is called by the SDK once, after the last batch.
func (e *exporter) Shutdown(ctx context.Context) error {
	defer close(e.closed)
	return e.SpanExporter.Shutdown(ctx)
}

// ExportSpans sends a batch. It never returns an error: the SDK would print it.
func (e *exporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := e.send(ctx, spans)
	if err == nil {
		e.exported.Add(len(spans))
		if e.failing.CompareAndSwap(true, false) {
			e.logger.Info("traces are received again")
		}
		return nil
	}
	e.lost.Add(len(spans))
	if e.failing.CompareAndSwap(false, true) && !errors.Is(err, context.Canceled) {
		e.logger.Warn("traces are not received", "error", err)
	}
	return nil
}

func (e *exporter) send(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		select {
		case <-e.aborted:
			cancel()
		case <-ctx.Done():
		}
	})
	return e.SpanExporter.ExportSpans(ctx, spans)
}

// idGenerator gives a root the trace id for which sampling was decided.
type idGenerator struct{}

type traceIDKey struct{}

// NewIDs implements sdktrace.IDGenerator.
func (g idGenerator) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	id, ok := ctx.Value(traceIDKey{}).(trace.TraceID)
	if !ok {
		id = newTraceID()
	}
	return id, g.NewSpanID(ctx, id)
}

// NewSpanID implements sdktrace.IDGenerator.
func (idGenerator) NewSpanID(context.Context, trace.TraceID) (id trace.SpanID) {
	for !id.IsValid() {
		binary.BigEndian.PutUint64(id[:], rand.Uint64())
	}
	return id
}

func newTraceID() (id trace.TraceID) {
	for !id.IsValid() {
		binary.BigEndian.PutUint64(id[:8], rand.Uint64())
		binary.BigEndian.PutUint64(id[8:], rand.Uint64())
	}
	return id
}
