package ingress

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/audit"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/auth/authtest"
	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/internal/quota"
	pubsub "github.com/push-manager/push-manager/proto"
)

// enters has n pushes paid for, and tells how many of them were refused, and the last refusal.
func enters(a *account, n int) (refused int, last error) {
	for range n {
		if err := a.enter(); err != nil {
			refused, last = refused+1, err
		}
	}
	return refused, last
}

func TestRatesOfACallerAndOfItsTenant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, err := newCallers(&Config{})
		ok(t, err)
		shop := auth.TenantLimits{Limits: auth.Limits{Rate: 15}}
		a := table.of(&auth.Caller{Name: "a", Tenant: "shop", Limits: auth.Limits{Rate: 10}, TenantLimits: shop})
		b := table.of(&auth.Caller{Name: "b", Tenant: "shop", TenantLimits: shop})
		other := table.of(&auth.Caller{Name: "other", Tenant: "news", TenantLimits: auth.TenantLimits{Limits: auth.Limits{Rate: 1}}})

		var over *rateError
		if refused, err := enters(a, 12); refused != 2 || !errors.As(err, &over) || over.tenant {
			t.Errorf("%d of 12 refused, want 2 for the caller's own rate: %v", refused, err)
		}
		if refused, err := enters(b, 7); refused != 2 || !errors.As(err, &over) || !over.tenant {
			t.Errorf("%d of 7 refused, want 2 for what is left of the tenant's rate: %v", refused, err)
		}
		if refused, _ := enters(other, 1); refused != 0 {
			t.Error("another tenant pays for it")
		}
		time.Sleep(time.Second)
		ok(t, b.enter())
		if got := b.tenantBudget.tokens; got != 14 {
			t.Errorf("the tenant has %v left, want 14", got)
		}
		a.Charge(3) // of a push to three nodes
		if a.budget.tokens != 0 && a.budget.tokens > -3 && a.tenantBudget.tokens != 11 {
			t.Errorf("the deliveries cost nothing: caller %v, tenant %v", a.budget.tokens, a.tenantBudget.tokens)
		}
	})
}

func TestAPushIsPaidForByBothOrByNeither(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, err := newCallers(&Config{})
		ok(t, err)
		who := &auth.Caller{Name: "a", Tenant: "shop", Limits: auth.Limits{Rate: 100}, TenantLimits: auth.TenantLimits{Limits: auth.Limits{Rate: 5}}}
		a := table.of(who)
		if refused, _ := enters(a, 50); refused != 45 || a.budget.tokens != 95 {
			t.Errorf("%d refused for the tenant, and the caller has %v of 100 left, want 45 and 95", refused, a.budget.tokens)
		}
	})
}

func TestAnotherPolicyFillsNoBucket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, err := newCallers(&Config{})
		ok(t, err)
		with := func(rate, tenantRate int) *account {
			return table.of(&auth.Caller{Name: "a", Tenant: "shop", Limits: auth.Limits{Rate: rate}, TenantLimits: auth.TenantLimits{Limits: auth.Limits{Rate: tenantRate}}})
		}
		if refused, _ := enters(with(10, 100), 10); refused != 0 {
			t.Fatalf("%d refused", refused)
		}
		if refused, _ := enters(with(1000, 1000), 5); refused != 5 {
			t.Errorf("another rate has filled the bucket: %d of 5 refused", refused)
		}
		time.Sleep(100 * time.Millisecond)
		if refused, _ := enters(with(1000, 1000), 200); refused != 100 {
			t.Errorf("%d of 200 refused after 0.1 s, want 100", refused)
		}
		if with(0, 0) != nil {
			t.Error("there is an account without limits")
		}
	})
}

// TestACallFromBeforeAReloadBringsNoOldLimitsBack: it was let in under the policy before, and asks for its account when others
// have theirs by the next one.
func TestACallFromBeforeAReloadBringsNoOldLimitsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		policy := func(rate, most int, callers string) string {
			return fmt.Sprintf("version: 1\ntenants: {shop: {rate: %d, max_in_flight: %d}}\ncallers:\n", rate, most) + callers
		}
		one := func(name string, rate int) string {
			return caller(name, "{methods: [PushToUser], users: [d]}", fmt.Sprintf(", tenant: shop, rate: %d", rate))
		}
		a := newAccess(t, authtest.New(t, policy(100, 100, one("a", 50)+one("b", 50)+one("gone", 50))))
		table, err := newCallers(&Config{Auth: a.auth})
		ok(t, err)
		before := a.policies.Current()
		table.of(before.Caller("gone"))
		a.WritePolicy(policy(10, 10, one("a", 5)+one("b", 5)))
		a.reload()
		now := table.of(a.policies.Current().Caller("b"))
		for _, late := range []string{"a", "b", "gone"} {
			table.of(before.Caller(late))
			if most, rate := now.tenant.most.Load(), now.tenantBudget.rate; most != 10 || rate != 10 {
				t.Errorf("after a late call of %s the tenant may have %d pushes in flight and %v a second, want 10", late, most, rate)
			}
		}
		if rate := now.budget.rate; rate != 5 {
			t.Errorf("the caller has a rate of %v, want 5", rate)
		}
		if table.of(before.Caller("a")) != table.of(a.policies.Current().Caller("a")) {
			t.Error("a late call has an account of its own")
		}
	})
}

func TestAnAccountCostsNoAllocation(t *testing.T) {
	table, err := newCallers(&Config{})
	ok(t, err)
	limits := auth.Limits{Rate: 1 << 20}
	who := &auth.Caller{Name: "a", Tenant: "shop", Limits: limits, TenantLimits: auth.TenantLimits{Limits: limits, MaxInFlight: 10}}
	if n := testing.AllocsPerRun(1000, func() {
		a := table.of(who)
		ok(t, a.enter())
		a.Charge(1)
		a.leave(false)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestPushesInFlightOfATenant(t *testing.T) {
	table, err := newCallers(&Config{})
	ok(t, err)
	limits := auth.TenantLimits{MaxInFlight: 3}
	a := table.of(&auth.Caller{Name: "a", Tenant: "shop", TenantLimits: limits})
	b := table.of(&auth.Caller{Name: "b", Tenant: "shop", TenantLimits: limits})
	if refused, _ := enters(a, 2); refused != 0 {
		t.Fatal("refused")
	}
	if refused, err := enters(b, 3); refused != 2 || !errors.Is(err, errTenantInFlight) {
		t.Errorf("%d of 3 refused, want 2: %v", refused, err)
	}
	a.leave(false)
	ok(t, b.enter())
}

// keyed is a world whose callers have API keys.
type keyed struct {
	policy string            // file
	keys   map[string]string // by the name of a caller
	ids    map[string]string
}

func newKeyed(t *testing.T, names ...string) *keyed {
	t.Helper()
	k := &keyed{policy: filepath.Join(t.TempDir(), "policy.yaml"), keys: map[string]string{}, ids: map[string]string{}}
	for _, name := range names {
		key, line, err := apikey.New(name, time.Time{}, "")
		ok(t, err)
		k.keys[name], k.ids[name] = key, line
	}
	return k
}

// write writes the policy: NAME: stands for the match of a caller.
func (k *keyed) write(t *testing.T, text string) {
	t.Helper()
	for name, line := range k.ids {
		id, _, _ := strings.Cut(line, ":")
		text = strings.ReplaceAll(text, "KEY-"+name, id)
	}
	ok(t, os.WriteFile(k.policy, []byte(text), 0o600))
}

// open makes an Authenticator that gives quotas the limits of the policy.
func (k *keyed) open(t *testing.T, quotas *quota.Set) (*auth.Authenticator, *auth.Policies) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "keys")
	var lines strings.Builder
	for _, line := range k.ids {
		lines.WriteString(line + "\n")
	}
	ok(t, os.WriteFile(file, []byte(lines.String()), 0o600))
	store, err := apikey.Open(apikey.Config{File: file})
	ok(t, err)
	t.Cleanup(store.Close)
	limit := func(p *auth.Policy) {
		if quotas != nil {
			tenants, callers := p.DailyPushes()
			quotas.Update(quota.Limits{Tenants: tenants, Callers: callers})
		}
	}
	policies, err := auth.OpenPolicies(auth.PoliciesConfig{File: k.policy, ReloadInterval: 10 * time.Millisecond, OnReload: func(next *auth.Policy, _ error) {
		if next != nil {
			limit(next)
		}
	}})
	ok(t, err)
	t.Cleanup(policies.Close)
	limit(policies.Current())
	a, err := auth.New(auth.Config{Policies: policies, Keys: store})
	ok(t, err)
	return a, policies
}

func (k *keyed) as(ctx context.Context, name string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+k.keys[name])
}

func quotasAt(t *testing.T, etcd *etcdtest.Server) *quota.Set {
	t.Helper()
	q := quota.New(quota.Config{Client: etcd.Client()})
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		q.Close(ctx)
	})
	return q
}

const everything = `allow: [{methods: ["*"], users: ["*"], rooms: ["*"]}]`

func TestLimitsOfThePolicyRefusePushesAndSayWhich(t *testing.T) {
	k := newKeyed(t, "slow", "small", "peer", "waits")
	policy := `
version: 1
tenants:
  free: {}
  rated: {rate: 3}
  spent: {daily_pushes: 2}
  held: {max_in_flight: 1}
callers:
  - {name: slow, tenant: rated, match: [{key: KEY-slow}], ` + everything + `}
  - {name: small, tenant: free, match: [{key: KEY-small}], daily_pushes: 2, ` + everything + `}
  - {name: peer, tenant: spent, match: [{key: KEY-peer}], ` + everything + `}
  - {name: waits, tenant: held, match: [{key: KEY-waits}], ` + everything + `}
`
	k.write(t, policy)
	quotas := quotasAt(t, etcdtest.Start(t))
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Quotas = quotas
		c.Auth, _ = k.open(t, quotas)
	})
	w.source.users["held/d"] = []string{"n1"}
	left := func(caller string) *pubsub.ExplainedCaller {
		t.Helper()
		x, err := w.client.Explain(k.as(w.context(), caller), explainUsers("nobody"))
		for end := time.Now().Add(time.Minute); err != nil && time.Now().Before(end); x, err = w.client.Explain(k.as(w.context(), caller), explainUsers("nobody")) {
			time.Sleep(time.Millisecond) // a slice is on its way
		}
		ok(t, err)
		return x.GetCaller()
	}
	for range 5 { // an explanation is not of the day's pushes
		if c := left("small"); c.QuotaLeft == nil || c.GetQuotaLeft() > 2 || c.RateLeft != nil {
			t.Errorf("explained to small: %v", c)
		}
	}
	if c := left("waits"); c.QuotaLeft != nil || c.GetTenant() != "held" {
		t.Errorf("explained to waits: %v", c)
	}
	unary := func(name string, trailer *metadata.MD) error {
		_, err := w.client.PushToUser(k.as(w.context(), name), &pubsub.PushToUserRequest{UserId: "nobody", Content: content("x")}, grpc.Trailer(trailer))
		return err
	}
	// until has pushes made until one is refused otherwise than for a slice that is on its way.
	until := func(name, reason string, push func() error) (passed int) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
			err := push()
			if err == nil {
				passed++
				continue
			}
			if strings.Contains(fmt.Sprint(status.Convert(err).Details()), "QUOTA_PENDING") {
				time.Sleep(time.Millisecond)
				continue
			}
			wantError(t, err, codes.ResourceExhausted, reason, "")
			return passed
		}
		t.Fatal("nothing is refused")
		return 0
	}
	var trailer metadata.MD
	for _, row := range []struct{ caller, reason, metric string }{
		{"slow", "TENANT_RATE_LIMITED", "tenant_rate"},
		{"small", "QUOTA_EXCEEDED", "quota"},
		{"peer", "TENANT_QUOTA_EXCEEDED", "tenant_quota"},
	} {
		passed := until(row.caller, row.reason, func() error { return unary(row.caller, &trailer) })
		if row.caller != "slow" && passed != 2 {
			t.Errorf("%s: %d pushes passed, want 2", row.caller, passed)
		}
		if n := w.metric(`push_manager_refused_total{priority="normal",reason="` + row.metric + `"}`); n == "0" || n == "" {
			t.Errorf("%s: the refusal is counted %s times", row.caller, n)
		}
	}
	err := unary("small", &trailer)
	untilReset := quota.UntilReset()
	for _, d := range status.Convert(err).Details() {
		if info, is := d.(*errdetails.RetryInfo); is {
			if wait := info.RetryDelay.AsDuration(); wait < untilReset-time.Minute || wait > untilReset+time.Minute {
				t.Errorf("come again in %v, want midnight, in %v", wait, untilReset)
			}
		}
	}
	if got := trailer.Get(pushbackKey); untilReset > time.Minute && (len(got) != 1 || got[0] != "-1") {
		t.Errorf("the pushback is %v: a client with a retry policy would hold its call until its deadline", got)
	}

	// The same on a PushStream, message by message.
	st, err := w.client.PushStream(k.as(w.context(), "small"))
	ok(t, err)
	ok(t, st.Send(userPush(1, "nobody", "x")))
	wantStatus(t, status.FromProto(recv(t, st).GetError()), codes.ResourceExhausted, "QUOTA_EXCEEDED", "")
	ok(t, st.CloseSend())

	// In flight until it is answered.
	for _, n := range w.network.nodes {
		n.setKeep(true)
	}
	first := make(chan error, 1)
	go func() {
		_, err := w.client.PushToUser(k.as(w.context(), "waits"), &pubsub.PushToUserRequest{UserId: "d", Content: content("x")})
		first <- err
	}()
	for deadline := time.Now().Add(time.Minute); w.network.nodes[0].len() == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	wantError(t, unary("waits", &trailer), codes.ResourceExhausted, "TENANT_IN_FLIGHT", "")
	for _, n := range w.network.nodes {
		n.setKeep(false)
	}
	w.network.ackAll()
	ok(t, <-first)
	ok(t, unary("waits", &trailer))

	// Another policy.
	k.write(t, strings.ReplaceAll(policy, "daily_pushes: 2", "daily_pushes: 4"))
	for deadline := time.Now().Add(time.Minute); unary("small", &trailer) != nil && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if more := until("small", "QUOTA_EXCEEDED", func() error { return unary("small", &trailer) }); more != 1 {
		t.Errorf("%d more pushes passed, want 1", more)
	}
}

// What is refused later, for what it asks for, does not count.
func TestAPushThatIsRefusedLaterCostsNoQuota(t *testing.T) {
	k := newKeyed(t, "small")
	k.write(t, `
version: 1
callers:
  - {name: small, match: [{key: KEY-small}], daily_pushes: 1000, allow: [{methods: [PushToUser], users: ["nob*"]}]}
`)
	quotas := quotasAt(t, etcdtest.Start(t))
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Quotas = quotas
		c.Auth, _ = k.open(t, quotas)
	})
	ctx := k.as(w.context(), "small")
	used := func() int64 { n, _ := quotas.Usage(quotas.Caller("small")); return n }
	push := func(user string) error {
		_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: user, Content: content("x")})
		return err
	}
	ok(t, push("nobody"))
	for range 20 {
		wantError(t, push("a"), codes.PermissionDenied, "PERMISSION_DENIED", "")
		if err := push("nob\x01"); status.Code(err) != codes.InvalidArgument {
			t.Fatal(err)
		}
	}
	st, err := w.client.PushStream(ctx)
	ok(t, err)
	for i := range uint64(20) {
		ok(t, st.Send(userPush(i, "a", "x")))
		wantStatus(t, status.FromProto(recv(t, st).GetError()), codes.PermissionDenied, "PERMISSION_DENIED", "")
	}
	ok(t, st.Send(userPush(21, "nobody", "x")))
	recv(t, st)
	ok(t, st.CloseSend())
	_, _ = st.Recv()
	if n := used(); n != 2 {
		t.Errorf("%d pushes count, want 2", n)
	}
}

func TestThreeServersStopWithinAPercentOfAQuota(t *testing.T) {
	const limit = 2_000
	etcd := etcdtest.Start(t)
	k := newKeyed(t, "a", "b")
	k.write(t, fmt.Sprintf(`
version: 1
tenants: {shop: {daily_pushes: %d}}
callers:
  - {name: a, tenant: shop, match: [{key: KEY-a}], %s}
  - {name: b, tenant: shop, match: [{key: KEY-b}], %s}
`, limit, everything, everything))
	var passed atomic.Int64
	var all sync.WaitGroup
	for i := range 3 {
		quotas := quotasAt(t, etcd)
		w := newWorld(t, func(c *Config, _ *engine.Config) {
			c.Quotas = quotas
			c.Auth, _ = k.open(t, quotas)
		})
		ctx := k.as(t.Context(), []string{"a", "b"}[i%2])
		for range 4 {
			all.Go(func() {
				for passed.Load() < 2*limit { // or nothing stops them
					_, err := w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: "nobody", Content: content("x")})
					switch details := fmt.Sprint(status.Convert(err).Details()); {
					case err == nil:
						passed.Add(1)
					case strings.Contains(details, "QUOTA_PENDING"):
						time.Sleep(time.Millisecond)
					case strings.Contains(details, "TENANT_QUOTA_EXCEEDED"):
						return
					default:
						t.Error(err)
						return
					}
				}
			})
		}
	}
	all.Wait()
	if n := passed.Load(); n > limit+limit/100 || n < limit-limit/100 {
		t.Errorf("%d pushes passed, want %d within a percent", n, limit)
	}
}

func TestTheAuditLogHasRefusalsBroadcastsAndASample(t *testing.T) {
	k := newKeyed(t, "clerk", "chief")
	k.write(t, `
version: 1
tenants: {shop: {}}
callers:
  - {name: clerk, tenant: shop, match: [{key: KEY-clerk}], allow: [{methods: [PushToUser], users: ["nob*"]}], rate: 1000}
  - {name: chief, match: [{key: KEY-chief}], tenant: "*", `+everything+`}
`)
	file := filepath.Join(t.TempDir(), "audit.log")
	log, err := audit.Open(audit.Config{File: file, AllowedSample: 1})
	ok(t, err)
	w := newWorld(t, func(c *Config, _ *engine.Config) {
		c.Audit = log
		c.Auth, _ = k.open(t, nil)
	})
	const trace = "0af7651916cd43dd8448eb211c80319c"
	ctx := metadata.AppendToOutgoingContext(w.context(), traceKey, "00-"+trace+"-b7ad6b7169203331-01")
	clerk := k.as(ctx, "clerk")
	push := func(ctx context.Context, user string) {
		_, _ = w.client.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: user, Content: content("x")})
	}
	push(clerk, "nobody")
	push(clerk, "a")
	push(ctx, "a")
	push(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+k.keys["clerk"][:60]+"x"), "a")
	_, err = w.client.PushToRoom(clerk, &pubsub.PushToRoomRequest{RoomId: "r", Content: content("x")})
	wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
	_, err = w.client.BroadcastMessage(k.as(ctx, "chief"), &pubsub.BroadcastMessageRequest{Content: content("x")})
	ok(t, err)
	st, err := w.client.PushStream(clerk)
	ok(t, err)
	ok(t, st.Send(userPush(1, "a", "x")))
	recv(t, st)
	ok(t, st.Send(userPush(2, "nobody", "x")))
	recv(t, st)
	ok(t, st.CloseSend())
	_, _ = st.Recv()
	stranger, err := w.client.PushStream(ctx)
	ok(t, err)
	_, err = stranger.Recv()
	wantError(t, err, codes.Unauthenticated, "UNAUTHENTICATED", "")
	ok(t, log.Close(w.context()))

	text, err := os.ReadFile(file)
	ok(t, err)
	found := map[string]int{}
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		var line struct {
			Event, Caller, Tenant, Credential, Peer, Method, Target, Outcome, Reason string
			Kind                                                                     string `json:"target_kind"`
			Trace                                                                    string `json:"trace_id"`
			Count                                                                    int
		}
		ok(t, json.Unmarshal(s.Bytes(), &line))
		if line.Caller == "clerk" && line.Credential != "key "+k.keys["clerk"][len(apikey.Prefix):len(apikey.Prefix)+8] || line.Peer == "" {
			t.Errorf("who is it? %s", s.Text())
		}
		if line.Event != audit.KeyUsedFirst && line.Trace != trace {
			t.Errorf("no trace: %s", s.Text())
		}
		found[strings.Join([]string{line.Event, line.Caller, line.Tenant, line.Kind, line.Outcome, line.Reason}, " ")] += max(line.Count, 1)
	}
	for what, want := range map[string]int{
		"push clerk shop user failed ":                   2, // nobody is offline
		"push.denied clerk shop user  PERMISSION_DENIED": 3, // to a user twice, to a room: the line has the first one's target
		"broadcast chief  everybody success ":            1,
		"auth.denied     no_credential":                  2,
		"auth.denied     malformed":                      1,
		"key.used_first clerk shop   ":                   1,
		"key.used_first chief    ":                       1,
	} {
		if found[what] != want {
			t.Errorf("%q stands there %d times, want %d", what, found[what], want)
		}
	}
	if t.Failed() {
		t.Logf("%s", text)
	}
}
