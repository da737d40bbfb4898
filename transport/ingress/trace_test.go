package ingress

import (
	"bytes"
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// heard is a trace that notes what it is told.
type heard struct{ told []string }

func (h *heard) Lookup(ctx context.Context, what string) (context.Context, func(error)) {
	return ctx, func(error) { h.told = append(h.told, what) }
}

func (h *heard) Delivery(string, int) engine.DeliveryTrace { return h }
func (h *heard) Traceparent() string                       { return "parent" }
func (h *heard) Taken()                                    { h.told = append(h.told, "taken") }
func (h *heard) Written()                                  { h.told = append(h.told, "written") }
func (h *heard) End(outcome string)                        { h.told = append(h.told, outcome) }

func TestEachStageOfAPushHasItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pass := func(ms int) { time.Sleep(time.Duration(ms) * time.Millisecond) }
		to, arrived := new(heard), time.Now()
		pass(1)
		s := newStages(to, arrived)
		pass(2)
		for _, ms := range []int{3, 5, 4} {
			_, end := s.Lookup(t.Context(), "room")
			pass(ms)
			end(nil)
		}
		usual, fast, waits := s.Delivery("usual", 2), s.Delivery("fast", 1), s.Delivery("waits", 1)
		pass(10)
		usual.Taken()
		fast.Taken()
		pass(20)
		usual.Written()
		pass(40)
		usual.End("delivered")
		fast.End("delivered")
		waits.End("failed: expired")
		pass(80)
		fast.Written() // its answer was faster than this
		if got := usual.Traceparent(); got != "parent" {
			t.Errorf("%q is passed on", got)
		}
		b := s.encoded()
		pass(1)
		if !bytes.Equal(b, s.encoded()) {
			t.Error("another time it is another one")
		}
		var got pubsub.PushTrace
		ok(t, got.UnmarshalVT(b))
		want := &pubsub.PushTrace{
			DecodeUs: 1000, RouteUs: 14_000, TotalUs: 165_000, Lookups: 3, LookupUs: 5000,
			Deliveries: []*pubsub.TracedDelivery{
				{NodeId: "usual", Users: 2, Outcome: "delivered", BeginUs: 15_000, QueueUs: 10_000, WireUs: 20_000, AckUs: 40_000},
				{NodeId: "fast", Users: 1, Outcome: "delivered", BeginUs: 15_000, QueueUs: 10_000, AckUs: 60_000},
				{NodeId: "waits", Users: 1, Outcome: "failed: expired", BeginUs: 15_000, QueueUs: 70_000},
			},
		}
		if !proto.Equal(want, &got) {
			t.Errorf("%v, want %v", &got, want)
		}
		if all := []string{"room", "room", "room", "taken", "taken", "written", "delivered", "delivered", "failed: expired", "written"}; !slices.Equal(to.told, all) {
			t.Errorf("a trace beside it was told %q", to.told)
		}
	})
}

func TestATraceHasSoManyDeliveries(t *testing.T) {
	s := newStages(nil, time.Now())
	for range tracedMost + 1 {
		s.Delivery("n", 1).End("delivered")
	}
	var got pubsub.PushTrace
	ok(t, got.UnmarshalVT(s.encoded()))
	if n := len(got.GetDeliveries()); n != tracedMost {
		t.Errorf("%d", n)
	}
}
