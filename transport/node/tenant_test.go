package node

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	pubsub "github.com/push-manager/push-manager/proto"
)

// house is a gateway that can tell tenants apart.
type house struct {
	*gateway
	users *Users[*device]
}

func (h house) BroadcastScope(scope string, m *Message) (delivered, failed int) {
	return h.users.BroadcastScope(scope, m)
}

func TestTenantsIDs(t *testing.T) {
	for _, test := range []struct {
		tenant     Tenant
		plain, id  string
		foreign    string
		allowsLike bool
	}{
		{"", "alice", "alice", "shop/alice", true},
		{"shop", "alice", "shop/alice", "bank/alice", true},
		{"shop", "shop/alice", "shop/shop/alice", "shopper/alice", true},
		{"shop", "bank/alice", "shop/bank/alice", "shop", true},
		{"shop", "../bank/x", "shop/../bank/x", "", true},
		{"", "shop/alice", "shop/alice", "bank/alice", false},
		{"", "Shop/alice", "Shop/alice", "/alice", true},
	} {
		if got := test.tenant.ID(test.plain); got != test.id {
			t.Errorf("%q of %q is %q, want %q", test.plain, test.tenant, got, test.id)
		}
		if got := test.tenant.Plain(test.id); got != test.plain {
			t.Errorf("%q is shown to %q as %q, want %q", test.id, test.tenant, got, test.plain)
		}
		if got := test.tenant.Plain(test.foreign); got != test.foreign {
			t.Errorf("somebody else's %q is shown to %q as %q", test.foreign, test.tenant, got)
		}
		if got := test.tenant.Allows(test.plain); got != test.allowsLike {
			t.Errorf("%q may be named by %q: %v", test.plain, test.tenant, got)
		}
	}
	for name, good := range map[Tenant]bool{"": true, "a": true, "shop-1": true, "-": false, "Shop": false, "a/b": false, Tenant(strings.Repeat("a", 32)): false} {
		if got := name.Check() == nil; got != good {
			t.Errorf("tenant %q: %v", name, got)
		}
	}
}

func TestBroadcastOfAScopeReachesItsUsersOnly(t *testing.T) {
	h := house{newGateway(), NewUsers[*device]()}
	devices := map[string]*device{}
	for _, user := range []string{"shop/alice", "shop/bob", "shopper/alice", "shop", "sho/p/alice", "bank/shop/alice", "alice"} {
		devices[user] = &device{space: 9}
		h.users.Add(user, devices[user])
	}
	h.users.Add("shop/full", &device{})
	m := serve(t, Config{Sessions: h}).mustOpen(t)
	if got := m.reply.GetFeatures(); len(got) != 1 || got[0] != pubsub.Feature_FEATURE_SCOPE {
		t.Errorf("features %v", got)
	}
	m.deliver(&pubsub.Delivery{Content: text("all of the shop"), Scope: "shop/"})
	counts, misses, _ := m.answers(1)
	if counts[1] != 2 || misses[1].GetFailedUsers() != 1 {
		t.Errorf("counts %v, misses %v; want 2 and a user that failed", counts, misses)
	}
	for user, d := range devices {
		if want := strings.HasPrefix(user, "shop/"); (d.got == 1) != want {
			t.Errorf("%s got %d", user, d.got)
		}
	}
	if len(h.got) > 0 {
		t.Errorf("a broadcast of a scope came as one to everybody, or to users: %v", h.got)
	}
}

func TestScopesThatBreakTheStream(t *testing.T) {
	h := house{newGateway(), NewUsers[*device]()}
	for name, test := range map[string]struct {
		sessions Sessions
		d        *pubsub.Delivery
	}{
		"node that did not offer it": {newGateway(), &pubsub.Delivery{Scope: "shop/"}},
		"scope and everybody":        {h, &pubsub.Delivery{Scope: "shop/", Everybody: true}},
		"scope and users":            {h, &pubsub.Delivery{Scope: "shop/", UserIds: []string{"shop/a"}}},
		"scope without its end":      {h, &pubsub.Delivery{Scope: "shop"}},
		"scope of no tenant":         {h, &pubsub.Delivery{Scope: "/"}},
		"scope of two":               {h, &pubsub.Delivery{Scope: "shop/a/"}},
		"scope in capitals":          {h, &pubsub.Delivery{Scope: "SHOP/"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := serve(t, Config{Sessions: test.sessions}).mustOpen(t)
			if _, ok := test.sessions.(Scoped); !ok && len(m.reply.GetFeatures()) > 0 {
				t.Errorf("features %v of a node that has none", m.reply.GetFeatures())
			}
			test.d.Content = text("x")
			m.deliver(test.d)
			_ = m.wantEnd(codes.FailedPrecondition)
		})
	}
	if len(h.got) > 0 {
		t.Error("somebody got something")
	}
}
