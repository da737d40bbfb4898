package refgateway

import (
	"testing"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

// Two clients with the same ids, of two tenants, are two users in two rooms, and neither of them is
// shown whose they are.
func TestClientsOfTenantsSeeTheirOwnIDs(t *testing.T) {
	c := newController(t)
	g, p := startWithTokens(t, c, nil)
	of := map[string]*device{}
	for _, tenant := range []string{"shop", "bank"} {
		of[tenant] = admitted(t, g, "room_id=lobby", p.token("alice", map[string]any{"tenant": tenant, "rooms": []string{"lobby", "bank/*"}}))
	}
	d := of["shop"]
	d.say(`{"type":"join","room_id":"bank/lobby"}`) // a room of the shop that is called so
	d.want(`{"type":"joined","room_id":"bank/lobby"}`)
	s := sessions{g.users}
	message := func(room, text string) *node.Message {
		return &node.Message{Type: pubsub.MessageType_TEXT, RoomID: room, Data: []byte(text)}
	}
	frame := func(room, text, more string) string {
		return `{"type":"text","room_id":"` + room + `","user_id":"alice","timestamp":0,"data":{"content":"` + text + `"},"metadata":{}` + more + `}`
	}
	for _, test := range []struct {
		user, room string
		want       node.Outcome
	}{
		{"shop/alice", "shop/lobby", node.Delivered},
		{"shop/alice", "shop/bank/lobby", node.Delivered},
		{"shop/alice", "bank/lobby", node.NotHere},
		{"shop/alice", "lobby", node.NotHere},
		{"alice", "shop/lobby", node.NotHere},
		{"alice", "", node.NotHere},
		{"shop/alice", "@node:node-1", node.NotHere}, // to everybody is a right of its own
		{"bank/alice", "bank/lobby", node.Delivered},
		{"bank/alice", "", node.Delivered},
	} {
		if got := s.Deliver(test.user, message(test.room, test.user+" in "+test.room)); got != test.want {
			t.Errorf("%q in %q: %v, want %v", test.user, test.room, got, test.want)
		}
	}
	if delivered, failed := s.BroadcastScope("shop/", message("", "all of the shop")); delivered != 1 || failed != 0 {
		t.Errorf("broadcast of the shop: %d and %d", delivered, failed)
	}
	if delivered, _ := s.BroadcastScope("sho/", message("", "nobody")); delivered != 0 {
		t.Errorf("broadcast of nobody's: %d", delivered)
	}
	of["shop"].want(frame("lobby", "shop/alice in shop/lobby", ""))
	of["shop"].want(frame("bank/lobby", "shop/alice in shop/bank/lobby", ""))
	of["shop"].want(frame("", "all of the shop", `,"broadcast":true`))
	of["bank"].want(frame("lobby", "bank/alice in bank/lobby", ""))
	of["bank"].want(frame("", "bank/alice in ", ""))
	d.say(`{"type":"leave","room_id":"lobby"}`)
	d.want(`{"type":"left","room_id":"lobby"}`)
	d.say(`{"type":"join","room_id":"bank"}`) // not in the token
	d.wantClose(closeForbidden)
}

// Who belongs to no tenant can neither be nor hear one, whatever its token says, unless there are none.
func TestClientWithoutATenantIsKeptFromThoseOfTenants(t *testing.T) {
	for name, test := range map[string]struct {
		noTenants         bool
		claims            map[string]any
		user, query, join string
		code              uint16
	}{
		"a user like a tenant's":         {user: "shop/alice", code: closeToken},
		"a room at the start":            {user: "alice", query: "room_id=shop/lobby", code: closeForbidden},
		"a room later":                   {user: "alice", join: "shop/lobby", code: closeForbidden},
		"a room that its token names":    {user: "alice", claims: map[string]any{"rooms": []string{"shop/lobby"}}, join: "shop/lobby", code: closeForbidden},
		"other rooms":                    {user: "alice", join: "Shop/lobby"},
		"where there are none":           {noTenants: true, user: "shop/alice", join: "shop/lobby"},
		"a tenant where there are none":  {noTenants: true, user: "alice", claims: map[string]any{"tenant": "shop"}, code: closeToken},
		"a user of a tenant, with slash": {user: "bank/alice", claims: map[string]any{"tenant": "shop"}, join: "bank/lobby"},
	} {
		t.Run(name, func(t *testing.T) {
			g, p := startWithTokens(t, newController(t), func(cfg *Config) { cfg.NoTenants = test.noTenants })
			d, _ := dial(t, g, test.query, nil)
			d.say(showing(p.token(test.user, test.claims)))
			if test.join != "" {
				d.want(`{"type":"ready","user_id":"` + test.user + `","node_id":"node-1"}`)
				d.say(`{"type":"join","room_id":"` + test.join + `"}`)
			}
			switch {
			case test.code != 0:
				d.wantClose(test.code)
			default:
				d.want(`{"type":"joined","room_id":"` + test.join + `"}`)
			}
		})
	}
}
