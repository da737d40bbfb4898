package ingress

import (
	"context"
	"math"
	"sync"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/plain"
	pubsub "github.com/push-manager/push-manager/proto"
)

// tracedMost is how many deliveries a reply tells the stages of.
const tracedMost = 1000

// stages notes when each stage of a push begins, for its reply, and passes on what it is told to a trace of the push, if it has
// one. It implements engine.Trace.
type stages struct {
	// Static.
	to      engine.Trace // nil: none
	arrived time.Time
	decoded time.Time

	mu sync.Mutex
	// Guarded by mu.
	routed     time.Time // when the first delivery was made
	lookups    int
	longest    time.Duration
	deliveries []*deliveryStages
	wire       []byte // nil until the reply is made
}

func newStages(to engine.Trace, arrived time.Time) *stages {
	return &stages{to: to, arrived: arrived, decoded: time.Now()}
}

// TraceID is that of the trace that it passes on to, "" for none.
func (s *stages) TraceID() string {
	if t, ok := s.to.(interface{ TraceID() string }); ok {
		return t.TraceID()
	}
	return ""
}

// Lookup implements engine.Trace.
func (s *stages) Lookup(ctx context.Context, what string) (context.Context, func(error)) {
	end := func(error) {}
	if s.to != nil {
		ctx, end = s.to.Lookup(ctx, what)
	}
	began := time.Now()
	return ctx, func(err error) {
		s.mu.Lock()
		s.lookups++
		s.longest = max(s.longest, time.Since(began))
		s.mu.Unlock()
		end(err)
	}
}

// Delivery implements engine.Trace.
func (s *stages) Delivery(node string, users int) engine.DeliveryTrace {
	d := &deliveryStages{of: s, node: node, users: users, began: time.Now()}
	if s.to != nil {
		d.to = s.to.Delivery(node, users)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.routed.IsZero() {
		s.routed = d.began
	}
	if len(s.deliveries) < tracedMost {
		s.deliveries = append(s.deliveries, d)
	}
	return d
}

// deliveryStages is one delivery of them. It implements engine.DeliveryTrace.
type deliveryStages struct {
	// Static.
	of    *stages
	to    engine.DeliveryTrace // nil: none
	node  string
	users int
	began time.Time

	// Guarded by of.mu.
	taken, written, ended time.Time
	outcome               string
}

// Traceparent implements engine.DeliveryTrace.
func (d *deliveryStages) Traceparent() string {
	if d.to == nil {
		return ""
	}
	return d.to.Traceparent()
}

// Taken implements engine.DeliveryTrace.
func (d *deliveryStages) Taken() {
	d.of.mu.Lock()
	d.taken = time.Now()
	d.of.mu.Unlock()
	if d.to != nil {
		d.to.Taken()
	}
}

// Written implements engine.DeliveryTrace. The acknowledgement may have been faster.
func (d *deliveryStages) Written() {
	d.of.mu.Lock()
	d.written = time.Now()
	d.of.mu.Unlock()
	if d.to != nil {
		d.to.Written()
	}
}

// End implements engine.DeliveryTrace.
func (d *deliveryStages) End(outcome string) {
	d.of.mu.Lock()
	d.ended, d.outcome = time.Now(), outcome
	d.of.mu.Unlock()
	if d.to != nil {
		d.to.End(outcome)
	}
}

// encoded is the PushTrace of a push that is over. It is made once, so that it has one size.
func (s *stages) encoded() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wire != nil {
		return s.wire
	}
	t := &pubsub.PushTrace{
		DecodeUs: micros(s.arrived, s.decoded), RouteUs: micros(s.decoded, s.routed), TotalUs: micros(s.arrived, time.Now()),
		Lookups: uint32(s.lookups), LookupUs: uint32(min(s.longest.Microseconds(), math.MaxUint32)),
	}
	for _, d := range s.deliveries {
		one := &pubsub.TracedDelivery{NodeId: plain.Line(d.node, maxReason), Users: count(d.users), Outcome: plain.Line(d.outcome, maxReason), BeginUs: micros(s.arrived, d.began)}
		if one.QueueUs = micros(d.began, d.taken); d.taken.IsZero() {
			one.QueueUs = micros(d.began, d.ended)
		} else {
			handed := d.written
			if handed.IsZero() || handed.After(d.ended) { // a call of a unary method, or an answer that was fast
				handed = d.taken
			}
			one.WireUs, one.AckUs = micros(d.taken, handed), micros(handed, d.ended)
		}
		t.Deliveries = append(t.Deliveries, one)
	}
	b, err := t.MarshalVT()
	if err != nil { // it has valid texts only
		b = []byte{}
	}
	s.wire = b
	return b
}

// micros is the time between two moments, 0 where one of them has not come.
func micros(from, to time.Time) uint32 {
	if from.IsZero() || to.Before(from) {
		return 0
	}
	return uint32(min(to.Sub(from).Microseconds(), math.MaxUint32))
}
