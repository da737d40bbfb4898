package pushctl

import (
	"strings"
	"testing"

	pubsub "github.com/push-manager/push-manager/proto"
)

func TestATraceIsShownForEachNode(t *testing.T) {
	s := &server{success: true, summary: &pubsub.DeliverySummary{Targets: 3, Delivered: 3, Trace: &pubsub.PushTrace{
		DecodeUs: 20, RouteUs: 1500, Lookups: 1, LookupUs: 1400, TotalUs: 4000,
		Deliveries: []*pubsub.TracedDelivery{{NodeId: "n\x1b1", Users: 2, Outcome: "delivered", BeginUs: 1520, QueueUs: 30, WireUs: 40, AckUs: 2000}, {NodeId: "n2", Outcome: "failed: queue is full"}},
	}}}
	code, out, errOut := pushctl(t, "", "room", "r", "x", "--trace", "--address", serve(t, s))
	if code != exitOK || errOut != "" {
		t.Errorf("exit %d, %q", code, errOut)
	}
	for _, want := range []string{"took 4ms: decode 20µs, route 1.5ms with 1 look-up of 1.4ms at most", `n\x1b1  2      1.52ms`, "30µs   40µs  2ms  delivered", "n2      all", "failed: queue is full"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	if r, _ := s.got.(*pubsub.PushToRoomRequest); !r.GetOptions().GetTrace() {
		t.Errorf("asked for %v", r)
	}
}
