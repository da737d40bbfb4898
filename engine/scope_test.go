package engine

import (
	"errors"
	"strings"
	"testing"
)

func scoped(p *Push) *Push {
	p.Scope = "shop/"
	return p
}

func TestLimitsAreForWhatStandsBehindTheScope(t *testing.T) {
	longest := strings.Repeat("x", 256)
	limits := Limits{}.withDefaults()
	for name, test := range map[string]struct {
		push        *Push
		field, code string
	}{
		"room":                       {push: toRoom("shop/" + longest)},
		"room too long":              {toRoom("shop/" + longest + "x"), "room_id", CodeIDTooLong},
		"room empty":                 {toRoom("shop/"), "room_id", CodeRequired},
		"user":                       {push: toUser("shop/" + longest)},
		"user too long":              {toUser("shop/" + longest + "x"), "user_id", CodeIDTooLong},
		"user empty":                 {toUser("shop/"), "user_id", CodeRequired},
		"users":                      {push: toUsers("shop/"+longest, "shop/a")},
		"a user of a list too long":  {toUsers("shop/a", "shop/"+longest+"x"), "user_ids[1]", CodeIDTooLong},
		"excluded":                   {push: toRoom("shop/r", "shop/"+longest)},
		"excluded empty":             {toRoom("shop/r", "shop/a", "shop/"), "exclude_user_ids[1]", CodeRequired},
		"a control character behind": {toUser("shop/a\x00"), "user_id", CodeIDMalformed},
	} {
		err := limits.Check(&scoped(test.push).Request)
		var invalid *InvalidError
		switch {
		case test.code == "":
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case !errors.As(err, &invalid) || invalid.Field != test.field || invalid.Code != test.code:
			t.Errorf("%s: %v, want %s of %s", name, err, test.code, test.field)
		case strings.Contains(err.Error(), "shop") || strings.Contains(err.Error(), "262"):
			t.Errorf("%s: the caller is told of what stands before its id: %v", name, err)
		}
	}
}

// Without a scope a prefix is a part of the id like any other.
func TestLimitsWithoutAScopeAreForTheWholeID(t *testing.T) {
	if err := (Limits{}).withDefaults().Check(&toUser("shop/" + strings.Repeat("x", 252)).Request); err == nil {
		t.Error("257 bytes are taken")
	}
}

func TestBroadcastOfAScopeIsRefusedWhileANodeCannotTellScopesApart(t *testing.T) {
	w := newWorld()
	e := w.engine(t)
	all := func() *Push { return push(&Push{Request: Request{Kind: ToAll}}) }
	if r := do(t, e, scoped(all())); len(r.NodeFailures) > 0 {
		t.Fatalf("all nodes can: %+v", r)
	}
	for id, n := range w.nodes {
		if len(n.got) != 1 || n.got[0].Scope() != "shop/" {
			t.Errorf("node %s got %d deliveries, want one for the scope", id, len(n.got))
		}
	}
	w.nodes["B"].unscoped = true
	if _, err := e.Do(t.Context(), scoped(all())); !errors.Is(err, ErrUnscoped) {
		t.Errorf("one node cannot: %v", err)
	}
	for id, n := range w.nodes {
		if len(n.got) != 1 {
			t.Errorf("node %s has got a broadcast that was refused", id)
		}
	}
	if e.InFlight() != 0 {
		t.Errorf("%d pushes in flight", e.InFlight())
	}
	do(t, e, all()) // to everybody needs nothing of the nodes
	w.users["shop/a"] = []string{"B"}
	if r := do(t, e, scoped(toUser("shop/a"))); r.Delivered != 1 {
		t.Errorf("a user is named, so the node need not know of scopes: %+v", r)
	}
}
