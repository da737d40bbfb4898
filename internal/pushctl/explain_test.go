package pushctl

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Explain knows a room over three nodes, of which one does not acknowledge.
func (s *server) Explain(_ context.Context, r *pubsub.ExplainRequest) (*pubsub.ExplainResponse, error) {
	if r.GetBroadcast() != nil {
		return &pubsub.ExplainResponse{Found: true, Deliveries: []*pubsub.ExplainedDelivery{{NodeId: "n1", Verdict: "queued", LinkState: "up"}}, Caller: &pubsub.ExplainedCaller{}}, s.keep(r)
	}
	return &pubsub.ExplainResponse{
		Found: true, Targets: 5, Offline: 1, OfflineUserIds: []string{"carol"}, Excluded: 1, ExcludedUserIds: []string{"dave\x1b[31m"}, ContentBytes: 20,
		Route: &pubsub.ExplainedRoute{Cached: 1, AgeMs: 300},
		Deliveries: []*pubsub.ExplainedDelivery{
			{NodeId: "n1", Users: 3, UserIds: []string{"alice"}, Verdict: "queued", LinkState: "up", Unacked: 3, Window: 64, UnackedMs: 12},
			{NodeId: "n2", Users: 1, UserIds: []string{"bob"}, Verdict: "node does not acknowledge", LinkState: "up", Queued: 7, QueuedMs: 900},
		},
		Caller: &pubsub.ExplainedCaller{Name: "billing", Tenant: "shop", Priority: pubsub.Priority_PRIORITY_HIGH, Rule: "line 17: PushToRoom order-*", RateLeft: proto.Int32(12), QuotaLeft: proto.Int64(0)},
	}, s.keep(r)
}

func TestExplainPrintsWhereAPushWouldGoAndWhyNot(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want []string
	}{
		"room": {[]string{"explain", "room", "order-7", "--exclude=dave"}, []string{
			`room "order-7": 5 users; 20 bytes of content; nothing was sent`,
			"route   1 from memory, 0 asked of the Controller, true 300ms ago",
			"caller  billing, tenant shop, priority high, policy line 17: PushToRoom order-*, 12 left of the rate, 0 left of the day here",
			"NODE  USERS  VERDICT", "n1    3      queued", "3 of 64, 12ms", "alice and 2 more", "node does not acknowledge", "7, 900ms",
			"offline: 1  carol", `excluded: 1  dave\x1b[31m`,
		}},
		"rooms":            {[]string{"explain", "rooms", "a, b"}, []string{`rooms "a, b": 5 users`}},
		"broadcast":        {[]string{"explain", "broadcast"}, []string{"broadcast: would go to 1 node", "n1    all    queued"}},
		"JSON":             {[]string{"explain", "users", "a, b", "-o", "json"}, []string{`"link_state"`, `"node does not acknowledge"`}},
		"user, asked anew": {[]string{"explain", "user", "a", "--refresh", "--sample=7"}, []string{`user "a"`}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{success: true, summary: &pubsub.DeliverySummary{}}
			code, out, errOut := pushctl(t, "", append(tc.args, "--address", serve(t, s))...)
			if code != exitOK || errOut != "" {
				t.Errorf("exit %d, %q", code, errOut)
			}
			if r, _ := s.got.(*pubsub.ExplainRequest); name == "user, asked anew" && (r.GetToUser().GetUserId() != "a" || !r.GetRefresh() || r.GetSample() != 7) {
				t.Errorf("asked %v", r)
			}
			for _, want := range tc.want {
				if !strings.Contains(out, want) {
					t.Errorf("%q is not in\n%s", want, out)
				}
			}
		})
	}
}
