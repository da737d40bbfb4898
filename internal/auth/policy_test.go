package auth

import (
	"fmt"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

const example = `
version: 1
tenants:
  shop: {rate: 20000, daily_pushes: 50000000, max_in_flight: 8192}
  news:
callers:
  - name: billing
    tenant: shop
    match:
      - san: spiffe://prod.example/ns/pay/sa/billing
      - san: billing.internal
      - jwt: {issuer: https://idp.example, subject: billing}
      - key: 4fZ1q9aB
    allow:
      - methods: [PushToUser, PushToUsers]
        users: ["*"]
      - methods: [PushToRoom]
        rooms: ["order-*", lobby]
    priority_max: high
    rate: 5000
    daily_pushes: 10000000
  - name: platform
    tenant: "*"
    match: [{san: spiffe://prod.example/platform/ops}]
    allow: [{methods: ["*"], users: ["*"], rooms: ["*"]}]
`

// parsed is the policy of a text that must be right.
func parsed(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := ParsePolicy([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestAPolicyIsWhatItsFileSays(t *testing.T) {
	p := parsed(t, example)
	billing, platform := p.Caller("billing"), p.Caller("platform")
	if billing.Name != "billing" || billing.Tenant != "shop" || billing.PriorityMax != engine.High ||
		billing.Limits != (Limits{Rate: 5000, DailyPushes: 10_000_000}) ||
		billing.TenantLimits != (TenantLimits{Limits: Limits{Rate: 20_000, DailyPushes: 50_000_000}, MaxInFlight: 8192}) {
		t.Errorf("billing is %+v", billing)
	}
	if platform.Tenant != "" || platform.PriorityMax != engine.Critical || platform.Limits != (Limits{}) || !p.Tenants() {
		t.Errorf("platform is %+v", platform)
	}
	for name, of := range map[string]*Caller{
		"spiffe://prod.example/ns/pay/sa/billing": billing, "billing.internal": billing, "spiffe://prod.example/platform/ops": platform,
		"spiffe://prod.example/ns/pay/sa/Billing": nil, "billing": nil, "": nil,
	} {
		if got, _ := p.OfNames([]string{"nobody.internal", name}); got != of {
			t.Errorf("the certificate of %q belongs to %+v", name, got)
		}
	}
	if c, _ := p.OfNames([]string{"billing.internal", "spiffe://prod.example/platform/ops"}); c != nil {
		t.Errorf("a certificate with the names of two callers belongs to %s", c.Name)
	}
	if c, by := p.OfNames([]string{"x.y", "billing.internal", "spiffe://prod.example/ns/pay/sa/billing"}); c != billing || by != "billing.internal" {
		t.Errorf("a certificate with two names of one caller belongs to %v by %q", c, by)
	}
	if p.OfKey("4fZ1q9aB") != billing || p.OfKey("4fZ1q9ab") != nil || p.OfKey("") != nil {
		t.Error("the key is not that of billing alone")
	}
	if p.OfToken("https://idp.example", "billing") != billing || p.OfToken("https://idp.example", "Billing") != nil || p.OfToken("billing", "https://idp.example") != nil {
		t.Error("the token is not that of billing alone")
	}
}

func TestRightsAreExact(t *testing.T) {
	billing := parsed(t, example).Caller("billing")
	for _, test := range []struct {
		method Method
		id     string
		want   bool
	}{
		{PushToRoom, "order-1", true},
		{PushToRoom, "order-", true},
		{PushToRoom, "order-" + strings.Repeat("x", 250), true},
		{PushToRoom, "order", false},
		{PushToRoom, "Order-1", false},
		{PushToRoom, "оrder-1", false}, // a Cyrillic o
		{PushToRoom, "order\u20101", false},
		{PushToRoom, " order-1", false},
		{PushToRoom, "xorder-1", false},
		{PushToRoom, "order-*", true}, // the name of a room that begins so
		{PushToRoom, "order*", false},
		{PushToRoom, "*", false},
		{PushToRoom, "", false},
		{PushToRoom, "lobby", true},
		{PushToRoom, "lobby\u0000", false},
		{PushToRoom, "lobby2", false},
		{PushToRoom, "lobb", false},
		{PushToUser, "anybody", true},
		{PushToUsers, "", true},
		{BroadcastMessage, "", false},
		{BroadcastMessage, "*", false},
	} {
		if got := billing.Allows(test.method, test.id); got != test.want {
			t.Errorf("%v of %q: %v", test.method, test.id, got)
		}
	}
	if line, pattern, ok := billing.Explain(PushToRoom, "order-7"); !ok || line != 17 || pattern != "order-*" {
		t.Errorf("line %d, pattern %q, %v", line, pattern, ok)
	}
	if billing.May(BroadcastMessage) || !billing.May(PushToRoom) || billing.MayAny(PushToRoom) || !billing.MayAny(PushToUser) {
		t.Error("the methods are not those of the rules")
	}
}

// Console is allowed by its name and by the star in methods, and never to a caller of a tenant: it shows what is of all tenants.
func TestConsoleIsForNoCallerOfATenant(t *testing.T) {
	policy := func(tenant, methods string) (*Policy, error) {
		return ParsePolicy([]byte(`{version: 1, tenants: {acme: {}}, callers: [{name: a, tenant: ` + tenant + `, match: [{san: a.b}], allow: [{methods: [` + methods + `], users: ["*"], rooms: ["*"]}]}]}`))
	}
	for _, c := range []struct {
		tenant, methods string
		allowed         bool
	}{
		{`"*"`, `"*"`, true}, {`"*"`, "Console, PushToUser, PushToRoom", true}, {`"*"`, "PushToUser, PushToRoom", false}, {"acme", `"*"`, false},
	} {
		p, err := policy(c.tenant, c.methods)
		if err != nil {
			t.Fatal(err)
		}
		a := p.Caller("a")
		_, _, explained := a.Explain(Console, "")
		if a.May(Console) != c.allowed || a.Allows(Console, "") != c.allowed || explained != c.allowed {
			t.Errorf("%s of tenant %s: %v, want %v", c.methods, c.tenant, a.May(Console), c.allowed)
		}
		if !a.May(PushToUser) {
			t.Errorf("%s of tenant %s: no pushes", c.methods, c.tenant)
		}
	}
	if _, err := policy("acme", "Console"); err == nil || !strings.Contains(err.Error(), "Console is not for callers of a tenant") {
		t.Errorf("by its name: %v", err)
	}
}

// BroadcastMessage is allowed by its name and by the star in methods, and by nothing else.
func TestABroadcastIsARightOfItsOwn(t *testing.T) {
	for allow, want := range map[string]bool{
		`{methods: [PushToUser, PushToUsers, PushToRoom], users: ["*"], rooms: ["*"]}`: false,
		`{methods: [BroadcastMessage]}`: true,
		`{methods: ["*"]}`:              true,
		`{methods: ["*"], users: [x]}`:  true,
	} {
		c := parsed(t, "{version: 1, callers: [{name: a, match: [{san: a.b}], allow: ["+allow+"]}]}").Caller("a")
		if got := c.Allows(BroadcastMessage, ""); got != want || c.May(BroadcastMessage) != want {
			t.Errorf("%s: %v", allow, got)
		}
		if strings.Contains(allow, `"*"]}`) && !strings.Contains(allow, "users") && c.Allows(PushToUser, "x") {
			t.Errorf("%s allows users", allow)
		}
	}
}

func TestABadPolicyIsRefusedWhole(t *testing.T) {
	caller := func(text string) string {
		return "version: 1\ntenants: {shop: {}}\ncallers:\n- " + strings.ReplaceAll(text, "\n", "\n  ")
	}
	good := "name: a\ntenant: shop\nmatch: [{san: a.b}]\nallow: [{methods: [BroadcastMessage]}]"
	parsed(t, caller(good))
	with := func(old, replacement string) string {
		if !strings.Contains(good, old) {
			panic(old)
		}
		return caller(strings.Replace(good, old, replacement, 1))
	}
	rule := func(text string) string { return with("{methods: [BroadcastMessage]}", text) }
	many := func(n int, item string) string {
		return "[" + strings.TrimSuffix(strings.Repeat(item+", ", n), ", ") + "]"
	}
	for text, want := range map[string]string{
		"":                       "holds nothing",
		"\x00":                   "control characters",
		"{":                      "line 1",
		"[]":                     "line 1: must have keys and values",
		"version: 1":             "line 1: callers is missing",
		"callers: []":            "version is missing",
		"version: 2\ncallers:":   "line 1: version: must be 1",
		"version: 1\ncallers:":   "line 2: callers: must be a list",
		"version: 1\nusers: 1":   `line 2: unknown key "users"`,
		"version: 1\nversion: 1": `line 2: "version" stands here twice`,
		"version: 1\ncallers: []\n---\nversion: 1":                                  "more than one YAML document",
		"version: 1\ncallers: &a []":                                                "line 2: callers: YAML anchors",
		"version: 1\ncallers: !!seq []":                                             "YAML tags",
		"version: 1\ntenants: {Shop: {}}\ncallers: []":                              `"Shop" is no tenant`,
		"version: 1\ntenants: {a/b: {}}\ncallers: []":                               `"a/b" is no tenant`,
		"version: 1\ntenants: {-a: {}}\ncallers: []":                                `"-a" is no tenant`,
		"version: 1\ntenants: {a: {rate: -1}}\ncallers: []":                         `line 2: tenants.a.rate: "-1" is no whole number`,
		"version: 1\ntenants: {a: {rate: 1e3}}\ncallers: []":                        `"1e3" is no whole number`,
		"version: 1\ntenants: {a: {speed: 1}}\ncallers: []":                         `unknown key "speed"`,
		with("name: a", "named: a"):                                                 `line 4: callers[0]: unknown key "named"`,
		with("name: a\n", ""):                                                       "name is missing",
		with("name: a", "name: a b"):                                                "letters, digits",
		with("name: a", `name: "a\nb"`):                                             "letters, digits",
		with("name: a", "name: "+strings.Repeat("a", 65)):                           "65 bytes",
		with("tenant: shop", "tenant: news"):                                        `line 5: callers[0].tenant: there is no tenant "news"`,
		with("tenant: shop\n", ""):                                                  `caller "a" has no tenant`,
		with("{san: a.b}", ""):                                                      "line 6: callers[0].match: must not be empty",
		with("match: [{san: a.b}]\n", ""):                                           "match is missing",
		with("{san: a.b}", "{}"):                                                    "must have one of san, jwt and key",
		with("{san: a.b}", "{san: a.b, key: 4fZ1q9aB}"):                             "must have one of san, jwt and key",
		with("{san: a.b}", "{san: a.b}, {san: a.b}"):                                `line 6: callers[0].match[1].san: this credential of "a" is one of "a" already`,
		with("{san: a.b}", `{san: "spiffe://prod.example/*"}`):                      "is no URI",
		with("{san: a.b}", "{san: spiffe://prod.example/a/../b}"):                   "is no URI",
		with("{san: a.b}", "{san: spiffe://prod.example//b}"):                       "is no URI",
		with("{san: a.b}", "{san: spiffe:///b}"):                                    "is no URI",
		with("{san: a.b}", "{san: spiffe://u@prod.example/b}"):                      "is no URI",
		with("{san: a.b}", "{san: 'spiffe://prod.example/b?c'}"):                    "is no URI",
		with("{san: a.b}", "{san: ns/pay}"):                                         "is no URI",
		with("{san: a.b}", `{san: "CN=admin,O=x"}`):                                 "is no DNS name",
		with("{san: a.b}", "{key: pmk_4fZ1q9aB_secret_abc}"):                        "must be the id of an API key",
		with("{san: a.b}", "{key: 4fZ1q9a_}"):                                       "must be the id of an API key",
		with("{san: a.b}", "{jwt: {issuer: x}}"):                                    "subject is missing",
		with("{san: a.b}", "{jwt: {subject: x}}"):                                   "issuer is missing",
		with("{san: a.b}", "{jwt: {issuer: x, sub: y}}"):                            `unknown key "sub"`,
		with("{san: a.b}", strings.Trim(many(65, "{san: a.b}"), "[]")):              "65 entries",
		with("allow", "deny"):                                                       `unknown key "deny"`,
		with("{methods: [BroadcastMessage]}", ""):                                   "line 7: callers[0].allow: must not be empty",
		rule("{methods: []}"):                                                       "callers[0].allow[0].methods: must not be empty",
		rule("{users: [a]}"):                                                        "methods is missing",
		rule("{methods: [Push]}"):                                                   `"Push" is no method`,
		rule("{methods: ['PushTo*']}"):                                              `"PushTo*" is no method`,
		rule("{methods: [pushtouser], users: [a]}"):                                 `"pushtouser" is no method`,
		rule("{methods: [PushToUser]}"):                                             "users is missing",
		rule("{methods: [PushToRoom], users: [a]}"):                                 "none of the methods takes users",
		rule("{methods: [BroadcastMessage], rooms: [a]}"):                           "none of the methods takes rooms",
		rule("{methods: [PushToRoom], rooms: ['a*b']}"):                             `callers[0].allow[0].rooms[0]: "a*b" has a star that is not its end`,
		rule("{methods: [PushToRoom], rooms: ['**']}"):                              `"**" has a star that is not its end`,
		rule("{methods: [PushToRoom], rooms: ['*a']}"):                              `"*a" has a star that is not its end`,
		rule("{methods: [PushToRoom], rooms: ['']}"):                                "must not be empty",
		rule("{methods: [PushToRoom], rooms: [[a]]}"):                               "must be a text",
		rule("{methods: [PushToRoom], rooms: a}"):                                   "must be a list",
		rule("{methods: [PushToRoom], rooms: [*a]}"):                                "unknown anchor",
		rule("{methods: [PushToRoom], rooms: [" + strings.Repeat("a", 4097) + "]}"): "4097 bytes",
		rule("{methods: [PushToRoom], rooms: " + many(1001, "a") + "}"):             "1001 entries",
		with("{methods: [BroadcastMessage]}", strings.Trim(many(65, "{methods: [BroadcastMessage]}"), "[]")): "65 entries",
		caller(good + "\npriority_max: urgent"):                        `"urgent" is none of low`,
		caller(good + "\nrate: many"):                                  `"many" is no whole number`,
		caller(good + "\ndaily_pushes: -1"):                            `"-1" is no whole number`,
		caller(good) + "\n- " + strings.ReplaceAll(good, "\n", "\n  "): `line 8: callers[1].name: "a" is the name of another caller`,
		caller(good) + "\n- " + strings.ReplaceAll(strings.Replace(good, "name: a", "name: b", 1), "\n", "\n  "): `line 10: callers[1].match[0].san: this credential of "b" is one of "a" already`,
		strings.Repeat("#", maxPolicyFile+1): "more than 1048576",
	} {
		p, err := ParsePolicy([]byte(text))
		switch {
		case err == nil || p != nil:
			t.Errorf("%.200q is taken", text)
		case !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 400:
			t.Errorf("%.200q: %v, want %q", text, err, want)
		case strings.Contains(err.Error(), "_secret_"):
			t.Errorf("%.200q: %v shows the secret", text, err)
		}
	}
	// Without tenants nobody needs one.
	parsed(t, strings.Replace(with("tenant: shop\n", ""), "tenants: {shop: {}}\n", "", 1))
}

// TestRightsMatchANaiveModel compares what Caller says with a walk over the rules as they are written.
func TestRightsMatchANaiveModel(t *testing.T) {
	type written struct{ methods, users, rooms []string }
	letter := rapid.SampledFrom([]string{"a", "b", "A", "-", "é", "*"})
	id := rapid.Custom(func(t *rapid.T) string { return strings.Join(rapid.SliceOfN(letter, 0, 4).Draw(t, "letters"), "") })
	pattern := rapid.Custom(func(t *rapid.T) string {
		return strings.ReplaceAll(id.Draw(t, "head"), "*", "") + rapid.SampledFrom([]string{"*", "x", "a"}).Draw(t, "end")
	})
	list := rapid.SliceOfN(pattern, 1, 6)
	quoted := func(texts []string) string { return fmt.Sprintf("%q", texts) }
	rapid.Check(t, func(t *rapid.T) {
		var rules []written
		var allow []string
		for range rapid.IntRange(1, 4).Draw(t, "rules") {
			var w written
			var text string
			if rapid.IntRange(0, 4).Draw(t, "star") == 0 {
				w = written{methods: []string{"*"}, users: list.Draw(t, "users"), rooms: list.Draw(t, "rooms")}
				text = fmt.Sprintf("users: %s, rooms: %s", quoted(w.users), quoted(w.rooms))
			} else {
				w.methods = rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"PushToUser", "PushToUsers", "ForgetUser", "BroadcastMessage", "WatchReceipts"}), 1, 3, rapid.ID[string]).Draw(t, "methods")
				if strings.Contains(strings.Join(w.methods, ""), "User") {
					w.users = list.Draw(t, "users")
					text = "users: " + quoted(w.users)
				} else {
					w.methods, w.rooms = append(w.methods, "PushToRoom"), list.Draw(t, "rooms")
					text = "rooms: " + quoted(w.rooms)
				}
			}
			rules = append(rules, w)
			allow = append(allow, fmt.Sprintf("{methods: %s, %s}", quoted(w.methods), text))
		}
		text := strings.NewReplacer(`" "`, `", "`).Replace("{version: 1, callers: [{name: a, match: [{san: a.b}], allow: [" + strings.Join(allow, ", ") + "]}]}")
		p, err := ParsePolicy([]byte(text))
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		naive := func(method, id string) bool {
			for _, w := range rules {
				named := false
				for _, m := range w.methods {
					named = named || m == method || m == "*"
				}
				patterns := w.users
				m, _ := MethodOf(method)
				if m.Target() == "room" {
					patterns = w.rooms
				}
				if named && m.Target() == "" {
					return true
				}
				for _, p := range patterns {
					if named && (p == id || strings.HasSuffix(p, "*") && strings.HasPrefix(id, p[:len(p)-1])) {
						return true
					}
				}
			}
			return false
		}
		c := p.Caller("a")
		for m := range methods {
			m := Method(m)
			once := false
			for range 10 {
				id := id.Draw(t, "id")
				want := naive(m.String(), id)
				once = once || want
				_, _, explained := c.Explain(m, id)
				if got := c.Allows(m, id); got != want || explained != want {
					t.Fatalf("%v of %q: %v, explained %v, want %v\n%s", m, id, got, explained, want, text)
				}
				if c.MayAny(m) && !want {
					t.Fatalf("%v is allowed for all but %q\n%s", m, id, text)
				}
			}
			if once && !c.May(m) {
				t.Fatalf("%v is allowed and not\n%s", m, text)
			}
		}
	})
}

func FuzzPolicy(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte("{version: 1, callers: [{name: a, match: [{san: a.b}], allow: [{methods: ['*']}]}]}"))
	f.Add([]byte("version: 1\ncallers: &a [*a]"))
	f.Add([]byte("version: 1\n? [a]\n: b"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := ParsePolicy(text)
		if err != nil {
			if p != nil || strings.ContainsAny(err.Error(), "\n\x00") {
				t.Fatalf("%v, %q", p, err)
			}
			return
		}
		if len(p.callers) == 0 {
			t.Fatal("a policy without callers is taken")
		}
		for name, c := range p.callers {
			if c.Name != name || c.may == 0 || len(c.rules) == 0 || p.Tenants() && c.Tenant != "" && CheckTenant(c.Tenant) != nil {
				t.Fatalf("%q is %+v", name, c)
			}
			for m := range methods {
				c.Allows(Method(m), "x")
				c.Explain(Method(m), string(text))
			}
		}
	})
}
