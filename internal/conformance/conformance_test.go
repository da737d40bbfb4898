package conformance

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/node"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) }

// patience is how long a sound node may take: a busy machine is no fault of it.
const patience = 20 * time.Second

// try runs all checks and tells what failed and what was skipped, with what was got.
func try(t *testing.T, cfg Config) (failed, skips map[string]string) {
	t.Helper()
	failed, skips = map[string]string{}, map[string]string{}
	n, err := Run(t.Context(), cfg, func(r Result) {
		switch r.Outcome {
		case Fail:
			failed[r.Check] = r.Got
		case Skip:
			skips[r.Check] = r.Got
		case OK:
		}
	})
	if err != nil {
		t.Error(err)
	}
	if n != len(failed) {
		t.Errorf("says that %d failed, reported %d", n, len(failed))
	}
	return failed, skips
}

// gateway is what a node of transport/node asks for.
type gateway struct {
	mu    sync.Mutex
	users map[string]func(string)
}

func (g *gateway) client(ctx context.Context, user string, got func(string)) error {
	g.mu.Lock()
	g.users[user] = got
	g.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (g *gateway) Deliver(user string, m *node.Message) node.Outcome {
	g.mu.Lock()
	defer g.mu.Unlock()
	got, here := g.users[user]
	if !here {
		return node.NotHere
	}
	got(string(m.Data))
	return node.Delivered
}

func (g *gateway) Broadcast(m *node.Message) (delivered, failed int) { return g.BroadcastScope("", m) }

func (g *gateway) BroadcastScope(scope string, m *node.Message) (delivered, failed int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for user, got := range g.users {
		if strings.HasPrefix(user, scope) {
			got(string(m.Data))
			delivered++
		}
	}
	return delivered, 0
}

func (g *gateway) Online() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.users)
}

// lastingConn is a connection of a node that takes part in lasting delivery. What is queued is written at once.
type lastingConn struct {
	got func(string)

	mu    sync.Mutex
	inbox node.Inbox[string] // Guarded by mu.
}

func (c *lastingConn) Attributes() node.Attributes { return node.Attributes{} }
func (c *lastingConn) IsFor(*node.Message) bool    { return true }

func (c *lastingConn) Deliver(m *node.Message) node.Outcome { return c.DeliverLasting(m, nil) }

func (c *lastingConn) DeliverLasting(m *node.Message, confirm *node.Confirmation) node.Outcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if m.Rooms != nil {
		if _, in := m.Rooms.Place("conformance"); !in {
			return node.NotHere
		}
	}
	if out, settled := c.inbox.Check(m, confirm, len(m.Data), now); settled {
		return out
	}
	e, queue, out := c.inbox.Take(m, confirm, string(m.Data), len(m.Data), now)
	if queue {
		c.write(e, now)
	}
	return out
}

func (c *lastingConn) write(e node.Entry[string], now time.Time) {
	if c.inbox.Write(&e, now) {
		c.got(e.Frame)
		if e.Ack > 0 {
			_ = c.inbox.Ack(e.Ack)
		}
	}
}

func (c *lastingConn) Opened() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for {
		e, ok := c.inbox.Pop(now)
		if !ok {
			return
		}
		c.write(e, now)
	}
}

// closing are users who are gone once they are disconnected. Nobody has named a device, and no room is asked for.
type closing struct{ *node.Users[*lastingConn] }

func (u closing) Disconnect(d *node.Disconnect) (connections int) {
	if d.Device != "" {
		return 0
	}
	for _, c := range u.Of(d.User) {
		u.Remove(d.User, c)
		connections++
	}
	return connections
}

func TestOurNodeConforms(t *testing.T) {
	for name, unaryOnly := range map[string]bool{"deliver": false, "unary": true, "lasting": false, "lasting without acks": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lasting := strings.HasPrefix(name, "lasting")
			g := &gateway{users: make(map[string]func(string))}
			cfg, client := node.Config{NodeID: "ours", Sessions: g, UnaryOnly: unaryOnly}, g.client
			var srv *node.Server
			if lasting {
				users := node.NewLastingUsers[*lastingConn](append(slices.Clone(every), pubsub.Feature_FEATURE_ROOMS)...)
				cfg.Sessions = closing{users}
				client = func(ctx context.Context, user string, got func(string)) error {
					c := &lastingConn{got: got}
					c.inbox.Acks = name == "lasting"
					gate := srv.Gate(user, c, 100)
					c.inbox.Gate = gate
					users.Add(user, c)
					gate.Ready()
					<-ctx.Done()
					gate.Leave()
					users.Remove(user, c)
					return ctx.Err()
				}
			}
			var err error
			srv, err = node.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(srv.Close)
			addr := serve(t, true, srv.Attach, node.ServerOptions()...)
			var drained sync.WaitGroup
			defer drained.Wait()
			failed, skips := try(t, Config{
				Address: addr, NodeID: "ours", Users: []string{"alice", "bob", "carol"}, Client: client, Within: patience,
				Drain: func(context.Context) error {
					drained.Go(func() { _ = srv.Drain(context.Background()) }) // until the managers have gone
					return nil
				},
			})
			for check, got := range failed {
				t.Errorf("%s: %s", check, got)
			}
			for check, why := range skips {
				if (!unaryOnly || why != "the node has no Deliver stream") && (lasting || !strings.HasPrefix(why, "the node does not do it")) {
					t.Errorf("%s was skipped: %s", check, why)
				}
			}
		})
	}
}

// TestWrongUsersAreAsNone: what needs no users is tried all the same.
func TestWrongUsersAreAsNone(t *testing.T) {
	for name, set := range map[string]func(*plain){
		"deliver and unary": func(*plain) {},
		"unary":             func(p *plain) { p.unaryOnly = true },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tryWith := func(users []string, within time.Duration) (failed, skips map[string]string) {
				p := newPlain("")
				set(p)
				cfg := p.config(t, within)
				cfg.Users, cfg.Client, cfg.Drain = users, nil, nil
				return try(t, cfg)
			}
			failed, without := tryWith(nil, patience)
			if len(failed) > 0 || without["users"] != "needs a connected user" {
				t.Errorf("without users: failed %v, skipped %v", failed, without)
			}
			failed, with := tryWith([]string{"nobody-1", "nobody-2"}, 3*time.Second)
			if got := failed["users"]; !strings.Contains(got, `"nobody-1" is not connected`) || !strings.Contains(got, "as without users") {
				t.Errorf("failed %v", failed)
			}
			delete(without, "users")
			for check, why := range without {
				if got, ok := with[check]; !ok || !strings.HasPrefix(got, why) {
					t.Errorf("%s: %q, and without users %q", check, got, why)
				}
			}
			for check, why := range with {
				if _, ok := without[check]; !ok {
					t.Errorf("%s is skipped for wrong users only: %s", check, why)
				}
			}
		})
	}
}

func TestANodeWrittenAfterTheDocumentAloneConforms(t *testing.T) {
	for name, set := range map[string]func(*plain){
		"deliver and unary": func(*plain) {},
		"unary":             func(p *plain) { p.unaryOnly = true },
		"bare deliver":      func(p *plain) { p.bare = true },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlain("")
			set(p)
			failed, skips := try(t, p.config(t, patience))
			for check, got := range failed {
				t.Errorf("%s: %s", check, got)
			}
			if name == "deliver and unary" && len(skips) > 0 {
				t.Errorf("skipped %v", skips)
			}
		})
	}
}

// config is a run against p with everything that a check can ask for.
func (p *plain) config(t *testing.T, within time.Duration) Config {
	t.Helper()
	attach := func(gs grpc.ServiceRegistrar) { pubsub.RegisterConnectNodeServiceServer(gs, p) }
	limit := grpc.MaxRecvMsgSize(16 << 20)
	if p.fault == "frames of 4 MiB" {
		limit = grpc.MaxRecvMsgSize(4 << 20)
	}
	return Config{
		Address: serve(t, p.fault == "too_many_pings", attach, limit), NodeID: "plain", Users: []string{"alice", "bob"},
		Client: p.client, Drain: p.drain, Within: within, PingEvery: 10 * time.Millisecond,
	}
}

// TestEachCheckCanFail runs the checks against nodes with one fault each. Which checks
// must notice it stands beside it; others may, too.
func TestEachCheckCanFail(t *testing.T) {
	faults := map[string][]string{
		"another id":                         {"hello/reply"},
		"a boot id for each stream":          {"hello/reply"},
		"a codec unasked":                    {"hello/reply"},
		"hello takes long":                   {"connect"},
		"any version will do":                {"hello/version"},
		"any first frame will do":            {"hello/first"},
		"unknown fields are an error":        {"hello/unknown-fields"},
		"shows nothing":                      {"users"},
		"absent users count as delivered":    {"users"},
		"absent users are not named":         {"users"},
		"acks of absent users are left out":  {"users"},
		"not_here in another frame":          {"users"},
		"hands over twice":                   {"deliver/order", "unary/order"},
		"the last comes first":               {"deliver/order", "unary/order"},
		"a delivery is for one":              {"deliver/users"},
		"one of many is named":               {"deliver/nobody-here"},
		"a batch names nobody":               {"unary/batch"},
		"acks come twice":                    {"deliver/acks"},
		"everybody is nobody":                {"deliver/everybody", "unary/broadcast"},
		"online_users is 0":                  {"deliver/everybody", "deliver/heartbeat"},
		"an empty list is everybody":         {"deliver/no-target", "unary/empty"},
		"a scope is everybody":               {"deliver/scope"},
		"the first target counts":            {"deliver/two-targets"},
		"a gap is accepted":                  {"deliver/gap"},
		"what was handed over is lost":       {"deliver/no-target", "deliver/two-targets"},
		"heartbeats are not answered":        {"deliver/heartbeat"},
		"heartbeats are counted":             {"deliver/heartbeat"},
		"drain is an error":                  {"deliver/drain"},
		"drain is ignored":                   {"deliver/drain"},
		"nobody ever leaves":                 {"audience/life"},
		"nobody is excepted":                 {"audience/life", "audience/except"},
		"nothing is forgotten":               {"audience/disagreement"},
		"audiences are not checked":          {"audience/disagreement"},
		"one state for all streams":          {"stream/shards", "stream/anew"},
		"streams live side by side":          {"stream/superseded"},
		"late hellos supersede":              {"stream/superseded"},
		"streams are known by their manager": {"stream/beside"},
		"reads after it has written":         {"stream/reads-on"},
		"frames of 4 MiB":                    {"size/16-MiB"},
		"frames of any size":                 {"size/misses"},
		"few acks at a time":                 {"size/max-unacked"},
		"lengths are not checked":            {"size/compression"},
		"duplicates unnamed":                 {"lasting/unnamed"},
		"ids are not remembered":             {"lasting/dedupe"},
		"no receipt is final":                {"lasting/receipts"},
		"everything expires":                 {"lasting/expiry"},
		"the first of a key stays":           {"lasting/collapse"},
		"live ones overtake":                 {"lasting/replay"},
		"nudges are not answered":            {"lasting/nudge"},
		"asks once":                          {"lasting/replay-fails"},
		"room_ids are ignored":               {"rooms/several"},
		"shows it for each of the rooms":     {"rooms/once"},
		"room_ids are not checked":           {"rooms/disagreement"},
		"filters are ignored":                {"filter/everybody", "filter/audience"},
		"who is left out is not here":        {"filter/users", "filter/named"},
		"who is left out is named unasked":   {"filter/users"},
		"filters are not checked":            {"filter/malformed"},
		"disconnects are not answered":       {"disconnect/answers"},
		"a refusal is for all":               {"disconnect/lifted"},
		"any disconnect will do":             {"disconnect/invalid"},
		"disconnects without the feature":    {"disconnect/unnamed"},
		"disconnects nobody":                 {"disconnect/user"},
		"disconnects fail":                   {"disconnect/answers"},
		"absent users are an error":          {"unary/user"},
		"nobody is an unknown error":         {"unary/empty"},
		"users are listed as they come":      {"listing/turns"},
		"users are listed twice":             {"listing/turns"},
		"who has left is listed":             {"listing/turns"},
		"a list is not whole":                {"listing/turns", "listing/pages"},
		"lists have no limit":                {"listing/pages"},
		"a list ends where it is cut":        {"listing/pages"},
		"tenants see each other's users":     {"listing/scope"},
		"connections are nobody's":           {"listing/connections"},
		"connections come in any order":      {"listing/connections"},
		"connections share an id":            {"listing/connections"},
		"too_many_pings":                     {"keepalive"},
		"leaves without a word":              {"leaving"},
		"delivers while it leaves":           {"leaving"},
	}
	noticed := map[string]bool{}
	var tries sync.WaitGroup
	atOnce := make(chan struct{}, 8) // they wait more than they do
	for fault, want := range faults {
		for _, check := range want {
			noticed[check] = true
		}
		tries.Go(func() {
			atOnce <- struct{}{}
			defer func() { <-atOnce }()
			cfg := newPlain(fault).config(t, time.Second)
			cfg.Only = want
			failed, _ := try(t, cfg)
			for _, check := range want {
				if failed[check] == "" {
					t.Errorf("a node where %s: %s has not noticed; what has: %v", fault, check, failed)
				}
			}
		})
	}
	tries.Wait()
	for _, c := range Checks() {
		if !noticed[c.Check] {
			t.Errorf("no fault is there for %s", c.Check)
		}
	}
}
