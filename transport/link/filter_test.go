package link

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
	connectnode "github.com/push-manager/push-manager/transport/node"
)

// device is a connection with a platform, in every room.
type device struct {
	platform string
	is       connectnode.Attributes

	mu  sync.Mutex
	got []string // Guarded by mu.
}

func newDevice(t testing.TB, platform string) *device {
	t.Helper()
	given := map[string]string{}
	if platform != "" {
		given["platform"] = platform
	}
	a, err := connectnode.NewAttributes(given)
	if err != nil {
		t.Fatal(err)
	}
	return &device{platform: platform, is: a}
}

func (d *device) Attributes() connectnode.Attributes { return d.is }
func (d *device) IsFor(*connectnode.Message) bool    { return true }
func (d *device) Deliver(m *connectnode.Message) connectnode.Outcome {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.got = append(d.got, string(m.Data))
	return connectnode.Delivered
}

func (d *device) count(text string) (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, got := range d.got {
		if got == text {
			n++
		}
	}
	return n
}

func onlyOn(p *engine.Push, platforms ...string) *engine.Push {
	p.Options = &engine.Options{Filter: []engine.Match{{Key: "platform", Values: platforms}}}
	return p
}

// Users with several devices on several real nodes: for each push, each device that matches gets it once, no other gets it, and each user counts
// as what a model says.
func TestAFilterIsRightOnEveryNode(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		ids := []string{"A", "B", "C"}
		nodes := map[string]*connectnode.Users[*device]{}
		var addresses []string
		for _, id := range ids {
			nodes[id] = connectnode.NewUsers[*device]()
			w.serveReal(id+":1", connectnode.Config{NodeID: id, Sessions: nodes[id]})
			addresses = append(addresses, id, id+":1")
		}
		w.register(addresses...)
		w.up(6)
		platforms := []string{"ios", "android", "web", ""}
		devices := map[string]map[string][]*device{} // user, node
		places := map[string]string{}
		for i := range 60 {
			user := fmt.Sprint("u", i)
			devices[user] = map[string][]*device{}
			for _, at := range random.Perm(3)[:1+random.IntN(3)] {
				for range 1 + random.IntN(2) {
					d := newDevice(t, platforms[random.IntN(4)])
					devices[user][ids[at]] = append(devices[user][ids[at]], d)
					nodes[ids[at]].Add(user, d)
				}
			}
			places[user] = strings.Join(slices.Sorted(maps.Keys(devices[user])), ",")
		}
		w.mu.Lock()
		w.rooms["r"] = places
		maps.Copy(w.users, places)
		w.mu.Unlock()
		w.dir.Invalidate([]string{"r"}, slices.Collect(maps.Keys(places)))
		for round := range 120 {
			text := fmt.Sprint("m", round)
			values := []string{platforms[random.IntN(3)], "tv"}
			match := engine.Match{Key: "platform", Values: values, Not: random.IntN(2) == 0}
			users := slices.Sorted(maps.Keys(places))
			var p *engine.Push
			switch random.IntN(4) {
			case 0:
				out := users[random.IntN(len(users))]
				p = w.toRoom("r", text, out)
				users = slices.DeleteFunc(users, func(user string) bool { return user == out })
			case 1:
				users = users[:1+random.IntN(len(users))]
				p = w.push(&engine.Push{Request: engine.Request{Kind: engine.ToUsers, Users: users}}, text)
			case 2:
				users = users[:1]
				p = w.toUser(users[0], text)
			default:
				p = w.toAll(text)
			}
			p.Options = &engine.Options{Filter: []engine.Match{match}}
			r := w.do(p)

			delivered, filtered := 0, 0
			for _, user := range users {
				reached := map[string]bool{}
				for id, list := range devices[user] {
					for _, d := range list {
						gets := slices.Contains(values, d.platform) != match.Not
						reached[id] = reached[id] || gets
						if n := d.count(text); n > 1 || (n == 1) != gets {
							t.Fatalf("round %d, %v: a device of %s with %q got it %d times", round, match, user, d.platform, n)
						}
					}
				}
				if p.Kind == engine.ToAll { // users of each node, summed
					for _, yes := range reached {
						if yes {
							delivered++
						} else {
							filtered++
						}
					}
					continue
				}
				if slices.Contains(slices.Collect(maps.Values(reached)), true) {
					delivered++
				} else {
					filtered++
				}
			}
			if r.Delivered != delivered || r.Filtered != filtered || r.Offline != filtered || r.Targets != delivered+filtered || len(r.NodeFailures) > 0 {
				t.Fatalf("round %d, kind %d, %v: %+v, want %d delivered and %d filtered", round, p.Kind, match, r, delivered, filtered)
			}
		}
		if n := w.set.meters.strikes.Get(); n > 0 {
			t.Errorf("%d strikes", n)
		}
	})
}

// A node of before, and one without Deliver, get nothing that has a filter. Whoever else there is gets it.
func TestANodeThatCannotFilterGetsNothing(t *testing.T) {
	for name, old := range map[string]*fakeNode{"a node of before": {id: "B"}, "a node without Deliver": unaryNode("B")} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				users := connectnode.NewUsers[*device]()
				d := newDevice(t, "ios")
				users.Add("u1", d)
				w.serveReal("a:1", connectnode.Config{NodeID: "A", Sessions: users})
				w.start("b:1", old)
				w.register("A", "a:1", "B", "b:1")
				w.up(2)
				w.mu.Lock()
				w.rooms["r"] = map[string]string{"u1": "A", "u2": "B", "u3": "B"}
				w.mu.Unlock()
				r := w.do(onlyOn(w.toRoom("r", "x"), "ios"))
				want := []engine.NodeFailure{{Node: "B", Reason: "failed: node cannot filter", Users: 2}}
				if r.Delivered != 1 || r.Failed != 2 || !slices.Equal(r.NodeFailures, want) {
					t.Errorf("%+v", r)
				}
				r = w.do(onlyOn(w.toAll("y"), "ios"))
				want = []engine.NodeFailure{{Node: "B", Reason: "failed: node cannot filter"}}
				if r.Delivered != 1 || !slices.Equal(r.NodeFailures, want) {
					t.Errorf("%+v", r)
				}
				if got := old.received(t); len(got) > 0 {
					t.Errorf("arrived: %q", got)
				}
				x, err := w.engine.Explain(t.Context(), onlyOn(w.toRoom("r", "x"), "ios"), false)
				if err != nil || len(x.Planned) != 2 || x.Planned[0].Link.Verdict != engine.Sent || x.Planned[1].Link.Verdict != engine.DropNoFilter {
					t.Errorf("explained as %+v, %v", x, err)
				}
				if r := w.do(w.toRoom("r", "z")); r.Delivered != 3 {
					t.Errorf("without a filter: %+v", r)
				}
			})
		})
	}
}

// A message that waits is worth nothing any more once a newer one with its collapse key has come for the same connections, and only then.
func TestACollapseKeyIsOfOneFilter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		n := &fakeNode{id: "A", hello: &pubsub.HelloReply{
			ProtocolVersion: 1, NodeId: "A", BootId: "b", MaxAudienceMembers: 1000, OnlineUsers: 3,
			Features: []pubsub.Feature{pubsub.Feature_FEATURE_FILTER, pubsub.Feature_FEATURE_COLLAPSE},
		}}
		n.gate = make(chan struct{}) // all of them wait in the queue
		w.start("a:1", n)
		w.register("A", "a:1")
		w.room("r", "A", "u1")
		var pushes []*pending
		for i, platform := range []string{"ios", "ios", "web", "ios"} {
			p := onlyOn(w.toUser("u1", fmt.Sprint(i)), platform)
			p.Options.CollapseKey = "k"
			pushes = append(pushes, w.begin(p))
		}
		time.AfterFunc(100*time.Millisecond, func() { close(n.gate) })
		var replaced []bool
		for _, f := range pushes {
			r := w.end(f)
			replaced = append(replaced, strings.Contains(reasons(r), engine.DropReplaced.String()))
		}
		// The last one finds the web's, which is for others: what is behind it is not looked for.
		if !slices.Equal(replaced, []bool{true, false, false, false}) {
			t.Errorf("replaced: %v", replaced)
		}
	})
}
