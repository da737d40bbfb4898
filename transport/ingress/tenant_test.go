package ingress

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// tenantCall is a call of a tenant's caller, decoded.
func tenantCall(t testing.TB, c *call, a api, wire []byte) {
	t.Helper()
	c.push.Request = engine.Request{}
	c.api, c.tenant = a, "shop"
	_, err := newDecoder(testLimits).decode(a, roomy(wire), &c.push)
	ok(t, err)
	c.enterTenant()
}

func TestAllIDsOfAPushGetTheTenant(t *testing.T) {
	room, err := (&pubsub.PushToRoomRequest{RoomId: "r", ExcludeUserIds: []string{"a", ""}, Content: &pubsub.MessageContent{}}).MarshalVT()
	ok(t, err)
	user, err := (&pubsub.PushToUserRequest{UserId: "bank/u", Content: &pubsub.MessageContent{}}).MarshalVT()
	ok(t, err)
	users, err := (&pubsub.PushToUsersRequest{UserIds: []string{"a", "b"}, Content: &pubsub.MessageContent{}}).MarshalVT()
	ok(t, err)
	all, err := (&pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{}}).MarshalVT()
	ok(t, err)
	c := new(call)
	for _, test := range []struct {
		api  api
		wire []byte
		want string
	}{
		{toRoom, room, "shop/: shop/r  [] [shop/a shop/]"},
		{toUser, user, "shop/:  shop/bank/u [] []"},
		{toUsers, users, "shop/:   [shop/a shop/b] []"},
		{toAll, all, "shop/:   [] []"},
	} {
		tenantCall(t, c, test.api, test.wire)
		p := &c.push
		if got := fmt.Sprintf("%s: %s %s %s %s", p.Scope, p.Room, p.User, p.Users, p.Exclude); got != test.want {
			t.Errorf("%s: %q, want %q", test.api, got, test.want)
		}
	}
	c.tenant = ""
	_, err = newDecoder(testLimits).decode(toUser, roomy(user), &c.push)
	ok(t, err)
	c.push.Scope = ""
	if c.enterTenant(); c.push.User != "bank/u" || c.push.Scope != "" {
		t.Errorf("without a tenant: %q in %q", c.push.User, c.push.Scope)
	}
}

// The memory of a long list is not kept, and that of a short one is.
func TestIDsOfATenantCostNoAllocation(t *testing.T) {
	wire, err := (&pubsub.PushToUserRequest{UserId: strings.Repeat("u", 200), Content: &pubsub.MessageContent{Timestamp: 1}}).MarshalVT()
	ok(t, err)
	wire = roomy(wire)
	d, c := newDecoder(testLimits), &call{api: toUser, tenant: "shop"}
	if n := testing.AllocsPerRun(100, func() {
		_, _ = d.decode(toUser, wire, &c.push)
		c.enterTenant()
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
	c.push.Request = engine.Request{Kind: engine.ToUsers, Users: slices.Repeat([]string{"user"}, 1000)}
	if c.enterTenant(); cap(c.scoped) != 0 || c.push.Users[999] != "shop/user" {
		t.Errorf("%d bytes are kept", cap(c.scoped))
	}
}

func TestRepliesHaveNoScope(t *testing.T) {
	failed := &engine.Result{Found: true, Targets: 1, Failed: 1, NodeFailures: []engine.NodeFailure{{Node: "n", Users: 1,
		Reason: `failed: user "shop/alice" of shop/lobby: queue of work-shop/x and workshop/y is full`}}}
	for name, test := range map[string]struct {
		push engine.Request
		api  api
		res  *engine.Result
		want string
	}{
		"room":   {engine.Request{Scope: "shop/", Room: "shop/r"}, toRoom, &engine.Result{}, `room "r" not found`},
		"user":   {engine.Request{Scope: "shop/", User: "shop/u"}, toUser, &engine.Result{}, `user "u" is offline`},
		"plain":  {engine.Request{User: "shop/u"}, toUser, &engine.Result{}, `user "shop/u" is offline`},
		"reason": {engine.Request{Scope: "shop/", User: "shop/u"}, toUser, failed, `not delivered: failed: user "alice" of lobby: queue of work-shop/x and workshop/y is full`},
	} {
		p := &engine.Push{Request: test.push}
		var r pubsub.PushToUserResponse
		var text string
		if test.api == toRoom {
			var r pubsub.PushToRoomResponse
			ok(t, r.UnmarshalVT(newReply(test.api, p, test.res).buffer))
			text = r.GetMessage()
		} else {
			ok(t, r.UnmarshalVT(newReply(test.api, p, test.res).buffer))
			text = r.GetMessage()
			for _, f := range r.GetSummary().GetNodeFailures() {
				if strings.Contains(f.GetReason(), `"shop/`) {
					t.Errorf("%s: %v", name, f)
				}
			}
		}
		if text != test.want {
			t.Errorf("%s: %q, want %q", name, text, test.want)
		}
	}
}
