package ingress

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

func explainRoom(room string, exclude ...string) *pubsub.ExplainRequest {
	return &pubsub.ExplainRequest{Push: &pubsub.ExplainRequest_ToRoom{ToRoom: &pubsub.PushToRoomRequest{RoomId: room, Content: content("x"), ExcludeUserIds: exclude}}}
}

func explainUsers(users ...string) *pubsub.ExplainRequest {
	return &pubsub.ExplainRequest{Push: &pubsub.ExplainRequest_ToUsers{ToUsers: &pubsub.PushToUsersRequest{UserIds: users, Content: content("x")}}}
}

// noDelivery fails if a node has got anything.
func (w *world) noDelivery(t *testing.T) {
	t.Helper()
	for _, n := range w.network.nodes {
		if sent := n.payloads(); len(sent) > 0 {
			t.Errorf("node %s got %d deliveries", n.id, len(sent))
		}
	}
}

func TestExplainSaysWhereAPushGoesAndSendsNothing(t *testing.T) {
	w := newWorld(t, nil)
	w.source.rooms["r"] = []member{{"a", "n1"}, {"b", "n2"}, {"c", ""}, {"e", "n1"}, {"f", "n3"}}
	x, err := w.client.Explain(w.context(), explainRoom("r", "e", "stranger"))
	ok(t, err)
	if !x.GetFound() || x.GetTargets() != 4 || x.GetOffline() != 1 || x.GetExcluded() != 1 || x.GetContentBytes() == 0 ||
		!slices.Equal(x.GetOfflineUserIds(), []string{"c"}) || !slices.Equal(x.GetExcludedUserIds(), []string{"e"}) {
		t.Errorf("%v", x)
	}
	var lines []string
	for _, d := range x.GetDeliveries() {
		lines = append(lines, d.GetNodeId()+" "+strings.Join(d.GetUserIds(), ",")+" "+d.GetVerdict())
	}
	if want := []string{"n1 a queued", "n2 b queued", "n3 f node not registered"}; !slices.Equal(lines, want) {
		t.Errorf("deliveries %q, want %q", lines, want)
	}
	if r := x.GetRoute(); r.GetCached() != 0 || r.GetLookedUp() != 1 || r.GetStale() || r.GetError() != "" {
		t.Errorf("route %v", r)
	}
	if p := x.GetCaller().GetPriority(); p != pubsub.Priority_PRIORITY_NORMAL {
		t.Errorf("priority %v", p)
	}
	w.noDelivery(t)
	if n := w.metric(`push_manager_api_requests_total{api="Explain",status="success"}`); n != "1" {
		t.Errorf("%q explanations counted", n)
	}
	if n := w.engine.InFlight(); n != 0 {
		t.Errorf("%d in flight", n)
	}
}

func TestExplainNamesSoManyIDsAsAreAskedFor(t *testing.T) {
	w := newWorld(t, nil)
	var users []string
	for c := 'A'; c <= 'Z'; c++ {
		users = append(users, "nobody-"+string(c))
	}
	for sample, want := range map[int32]int{0: sampleDefault, 3: 3, sampleMost: len(users)} {
		r := explainUsers(users...)
		r.Sample = sample
		x, err := w.client.Explain(w.context(), r)
		ok(t, err)
		if x.GetOffline() != int32(len(users)) || len(x.GetOfflineUserIds()) != want || x.GetFound() {
			t.Errorf("sample %d: %d of %d ids", sample, len(x.GetOfflineUserIds()), x.GetOffline())
		}
	}
}

func TestExplainNamesTenThousandIDsAtMost(t *testing.T) {
	w := newWorld(t, nil)
	for node := range 13 {
		for i := range sampleMost {
			w.source.rooms["large"] = append(w.source.rooms["large"], member{fmt.Sprintf("%d-%d", node, i), fmt.Sprint("node-", node)})
		}
	}
	r := explainRoom("large")
	r.Sample = sampleMost
	x, err := w.client.Explain(w.context(), r)
	ok(t, err)
	users, named := int32(0), 0
	for _, d := range x.GetDeliveries() {
		users += d.GetUsers()
		named += len(d.GetUserIds())
	}
	if users != 13*sampleMost || x.GetTargets() != users || named != namesMost {
		t.Errorf("%d users of %d, %d named", users, x.GetTargets(), named)
	}
}

func TestExplainWithoutTheControllerNamesWhomItCannotLocate(t *testing.T) {
	w := newWorld(t, nil)
	w.source.down = true
	x, err := w.client.Explain(w.context(), explainUsers("a", "b"))
	ok(t, err)
	if x.GetUnlocated() != 2 || !slices.Equal(x.GetUnlocatedUserIds(), []string{"a", "b"}) || x.GetRoute().GetError() == "" || len(x.GetDeliveries()) != 0 {
		t.Errorf("%v", x)
	}
}

func TestExplainRefusesWhatThePushWouldBeRefusedFor(t *testing.T) {
	w := newWorld(t, nil)
	many := explainRoom("r")
	many.Sample = sampleMost + 1
	for name, err := range map[string]error{
		"REQUIRED push":            must2(w.client.Explain(w.context(), &pubsub.ExplainRequest{})),
		"REQUIRED room_id":         must2(w.client.Explain(w.context(), explainRoom(""))),
		"OUT_OF_RANGE sample":      must2(w.client.Explain(w.context(), many)),
		"REQUIRED user_ids":        must2(w.client.Explain(w.context(), explainUsers())),
		"ID_MALFORMED user_ids[0]": must2(w.client.Explain(w.context(), explainUsers("a\x00"))),
		"MALFORMED request":        must2(w.raw("/pubsub.PushManagerService/Explain", []byte{0x0a, 9})),
	} {
		reason, field, _ := strings.Cut(name, " ")
		wantError(t, err, codes.InvalidArgument, reason, field)
	}
	w.server.Announce()
	w.server.startDraining()
	_, err := w.client.Explain(w.context(), explainRoom("r"))
	wantError(t, err, codes.Unavailable, "DRAINING", "")
	w.nothingSent()
}

func TestExplainIsPaidForByTheRateAndSaysWhatIsLeft(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Rate, c.RateBurst, c.Caller = 1, 3, func(context.Context) string { return "me" }
	})
	for left := int32(2); left >= 0; left-- {
		x, err := w.client.Explain(w.context(), explainRoom("r"))
		ok(t, err)
		if got := x.GetCaller().RateLeft; got == nil || *got < left {
			t.Errorf("left of the rate: %v, want %d", got, left)
		}
	}
}

// FuzzExplain sends bytes as the request.
func FuzzExplain(f *testing.F) {
	for _, r := range []*pubsub.ExplainRequest{explainRoom("r", "a"), explainUsers("a", "b"), {Sample: 5, Refresh: true}} {
		b, err := r.MarshalVT()
		ok(f, err)
		f.Add(b)
	}
	w := newWorld(f, nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		reply, err := w.raw("/pubsub.PushManagerService/Explain", b)
		switch status.Code(err) {
		case codes.OK:
			ok(t, new(pubsub.ExplainResponse).UnmarshalVT(reply))
		case codes.InvalidArgument:
		default:
			t.Fatal(err)
		}
		w.noDelivery(t)
	})
}

func TestExplainNeedsARightOfItsOwnBesideThatToThePush(t *testing.T) {
	a := newAccess(t, authtest.New(t, "version: 1\ntenants: {shop: {}}\ncallers:\n"+
		caller("both", `{methods: [Explain, PushToRoom], rooms: ["r-*"]}`, ", tenant: shop")+
		caller("pusher", `{methods: [PushToRoom], rooms: ["*"]}`, ", tenant: shop")+caller("looker", `{methods: [Explain]}`, ", tenant: shop")))
	w := newWorld(t, func(c *Config, _ *engine.Config) { c.Auth = a.auth })
	w.source.rooms["shop/r-1"] = []member{{"shop/a", "n1"}, {"shop/b", ""}}
	ask := func(name, room string) (*pubsub.ExplainResponse, error) {
		return w.client.Explain(w.as(a.Token(name, time.Hour)), explainRoom(room))
	}
	x, err := ask("both", "r-1")
	ok(t, err)
	if c := x.GetCaller(); c.GetName() != "both" || c.GetTenant() != "shop" || !strings.Contains(c.GetRule(), "PushToRoom r-*") {
		t.Errorf("caller %v", c)
	}
	if len(x.GetDeliveries()) != 1 || !slices.Equal(x.GetDeliveries()[0].GetUserIds(), []string{"a"}) || !slices.Equal(x.GetOfflineUserIds(), []string{"b"}) {
		t.Errorf("ids are not the caller's: %v", x)
	}
	_, err = ask("both", "s-1")
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	_, err = ask("pusher", "r-1")
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	_, err = ask("looker", "r-1")
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	_, err = w.client.Explain(w.context(), explainRoom("r-1"))
	wantError(t, err, codes.Unauthenticated, "UNAUTHENTICATED", "")
	// A push that is to tell its stages needs that right, too.
	traced := func(name string) (*pubsub.PushToRoomResponse, error) {
		return w.client.PushToRoom(w.as(a.Token(name, time.Hour)), &pubsub.PushToRoomRequest{RoomId: "r-1", Content: content("x"), Options: &pubsub.PushOptions{Trace: true}})
	}
	_, err = traced("pusher")
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	w.noDelivery(t)
	r, err := traced("both")
	ok(t, err)
	if d := r.GetSummary().GetTrace().GetDeliveries(); len(d) != 1 || d[0].GetNodeId() != "n1" || d[0].GetOutcome() != "delivered" {
		t.Errorf("%v", r)
	}
}
