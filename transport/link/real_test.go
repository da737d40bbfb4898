package link

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
	connectnode "github.com/push-manager/push-manager/transport/node"
)

// gatewayThat is a gateway whose answers are a test's. It notes who got what, in order.
type gatewayThat struct {
	deliver   func(user, text string) connectnode.Outcome
	broadcast func() (delivered, failed int)
	online    int

	mu  sync.Mutex
	got []string
}

func (g *gatewayThat) Deliver(user string, m *connectnode.Message) connectnode.Outcome {
	o := g.deliver(user, string(m.Data))
	if o == connectnode.Delivered {
		g.mu.Lock()
		g.got = append(g.got, user+" "+string(m.Data))
		g.mu.Unlock()
	}
	return o
}

func (g *gatewayThat) Broadcast(*connectnode.Message) (delivered, failed int) { return g.broadcast() }
func (g *gatewayThat) Online() int                                            { return g.online }

func (g *gatewayThat) received() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.got)
}

// A gateway hangs in the middle of a frame for so long that its stream is given up, which
// leaves the rest of the frame at the node. What callers have been told is unknown must not
// come after what they push next.
func TestReplacedStreamKeepsTheOrderOfAUser(t *testing.T) {
	for name, hang := range map[string]time.Duration{"for a while": 3200 * time.Millisecond, "for long": 20 * time.Second} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				let := make(chan struct{})
				g := &gatewayThat{deliver: func(_, text string) connectnode.Outcome {
					if text == "slow" {
						<-let
					}
					return connectnode.Delivered
				}}
				w.startReal("a:1", connectnode.Config{NodeID: "A", Sessions: g})
				w.register("A", "a:1")
				w.up(1)
				w.room("r", "A", "u", "x")
				w.do(w.toUser("u", "warm"))
				w.do(w.toUser("x", "warm"))
				synctest.Wait() // both routes are cached, so that what comes is in one frame, in this order
				slow, first := w.begin(w.toUser("x", "slow")), w.begin(w.toUser("u", "first"))
				time.AfterFunc(hang, func() { close(let) })
				if s, f := w.end(slow), w.end(first); s.Unknown != 1 || f.Unknown != 1 {
					t.Fatalf("what the gateway hangs in: %+v; behind it: %+v", s, f)
				}
				began, tries := time.Now(), 0
				for w.do(w.toUser("u", "second")).Delivered == 0 {
					if tries++; tries > 1000 {
						t.Fatal("the node never comes back")
					}
					time.Sleep(50 * time.Millisecond)
				}
				if took := time.Since(began); took < hang-2*time.Second || took > hang+time.Second {
					t.Errorf("pushes arrive again %v after the answer, the gateway hung for %v", took, hang)
				}
				synctest.Wait()
				if got := strings.Join(g.received(), ", "); got != "u warm, x warm, x slow, u second" {
					t.Errorf("arrived: %s", got)
				}
			})
		})
	}
}

// The same node, once with Deliver and once without: callers see the same.
func TestBothWaysToANodeHaveTheSameResults(t *testing.T) {
	type outcome struct {
		engine.Result
		Success bool
	}
	outcomes := func(unaryOnly bool) (all map[string]outcome) {
		all = map[string]outcome{}
		bubble(t, func(t *testing.T) {
			w := newWorld(t, Config{Shards: 2})
			here := 3
			home := func(user, _ string) connectnode.Outcome {
				switch {
				case strings.HasPrefix(user, "gone"), strings.HasPrefix(user, "moved"):
					return connectnode.NotHere
				case strings.HasPrefix(user, "full"):
					return connectnode.Failed
				case strings.HasPrefix(user, "boom"):
					panic("a bug of the gateway")
				}
				return connectnode.Delivered
			}
			var failing int
			g := &gatewayThat{deliver: home, online: 9, broadcast: func() (int, int) {
				if failing < 0 {
					panic("a bug of the gateway")
				}
				return here, failing
			}}
			w.startReal("a:1", connectnode.Config{NodeID: "A", Sessions: g, UnaryOnly: unaryOnly})
			w.start("b:1", &fakeNode{id: "B"})
			w.register("A", "a:1")
			w.up(2)
			for room, users := range map[string][]string{
				"all here": {"a1", "u1", "u2"}, "all gone": {"gone1", "gone2"}, "all full": {"full1", "full2"},
				"of all kinds": {"u1", "full1", "gone1", "u2"}, "boom": {"boom1", "boom2"},
				"one": {"u1"}, "one full": {"full1"}, "one gone": {"gone1"}, "one boom": {"boom1"},
			} {
				w.room(room, "A", users...)
				all["room "+room] = outcome{Result: w.do(w.toRoom(room, "x"))}
				all["room without its first "+room] = outcome{Result: w.do(w.toRoom(room, "x", users[0]))}
			}
			for _, user := range []string{"u1", "gone1", "full1", "boom1"} {
				all["user "+user] = outcome{Result: w.do(w.toUser(user, "x"))}
				all["users with "+user] = outcome{Result: w.do(w.push(&engine.Push{Request: engine.Request{Kind: engine.ToUsers, Users: []string{"a1", user}}}, "x"))}
			}
			all["broadcast"] = outcome{Result: w.do(w.toAll("x"))}
			failing = 2
			all["broadcast that does not reach all"] = outcome{Result: w.do(w.toAll("x"))}
			here = 0
			all["broadcast that reaches nobody"] = outcome{Result: w.do(w.toAll("x"))}
			failing = 0
			all["broadcast to nobody"] = outcome{Result: w.do(w.toAll("x"))}
			failing = -1
			all["broadcast that panics"] = outcome{Result: w.do(w.toAll("x"))}
			// Routes that are old: the node says so, and the user is found elsewhere.
			w.room("moving", "A", "u1", "moved1")
			w.do(w.toUser("u1", "x"))
			w.register("A", "a:1", "B", "b:1")
			w.up(4)
			w.mu.Lock()
			w.users["moved1"], w.rooms["moving"]["moved1"] = "B", "B"
			w.mu.Unlock()
			all["user that has moved"] = outcome{Result: w.do(w.toUser("moved1", "x"))}
			all["room of which one has moved"] = outcome{Result: w.do(w.toRoom("moving", "x"))}
		})
		for what, o := range all {
			o.Success = o.Result.Success()
			all[what] = o
		}
		return all
	}
	streamed, called := outcomes(false), outcomes(true)
	for what, want := range streamed {
		if diff := cmp.Diff(want, called[what]); diff != "" {
			t.Errorf("%s: over Deliver (-) and over the unary methods (+):\n%s", what, diff)
		}
	}
	if o := streamed["user full1"]; o.Failed != 1 || o.Success {
		t.Errorf("a user who is there and is not reached: %+v", o)
	}
}

// Others that are registered at a node's address cost its streams nothing.
func TestWrongRegistrationsDoNotSupersedeStreams(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		set := metrics.NewSet()
		w.startReal("a:1", connectnode.Config{NodeID: "A", Metrics: set})
		w.register("A", "a:1")
		w.up(2)
		w.register(append(many(20, at("a:1")), "A", "a:1")...)
		time.Sleep(time.Minute)
		if n := w.set.meters.reconnects.Get(); n != 0 {
			t.Errorf("the node's own links have reconnected %d times", n)
		}
		if n := set.GetOrCreateCounter("connect_node_deliver_streams_superseded_total").Get(); n != 0 {
			t.Errorf("%d streams were superseded", n)
		}
	})
}

// Streams of one process have one instance id, their hellos rising numbers; each names the
// node that it looks for and offers the codecs.
func TestHelloNamesTheStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2, Compression: []string{"zstd", "s2"}})
		hellos := make(chan *pubsub.Hello, 64)
		w.start("a:1", &fakeNode{id: "A", deliver: func(st deliverStream) error {
			f, err := st.Recv()
			if err == nil {
				hellos <- f.GetHello()
			}
			return errors.New("no")
		}})
		w.register("A", "a:1")
		time.Sleep(5 * time.Second)
		w.set.Close()
		close(hellos)
		shards, last, instance := map[uint32]uint64{}, uint64(0), ""
		for h := range hellos {
			if instance == "" {
				instance = h.GetInstanceId()
			}
			if h.GetInstanceId() != instance || len(instance) < 16 || len(instance) > 64 {
				t.Errorf("instance %q after %q", h.GetInstanceId(), instance)
			}
			if h.GetAttempt() <= shards[h.GetShard()] {
				t.Errorf("attempt %d of shard %d after %d", h.GetAttempt(), h.GetShard(), shards[h.GetShard()])
			}
			shards[h.GetShard()], last = h.GetAttempt(), max(last, h.GetAttempt())
			want := &pubsub.Hello{
				ProtocolVersion: 1, ManagerId: "pm", Shard: h.GetShard(), Shards: 2, NodeId: "A",
				InstanceId: instance, Attempt: h.GetAttempt(), Codecs: []pubsub.Codec{pubsub.Codec_ZSTD, pubsub.Codec_S2}, Features: []pubsub.Feature{
					pubsub.Feature_FEATURE_SCOPE, pubsub.Feature_FEATURE_DEDUPE, pubsub.Feature_FEATURE_CLIENT_ACK,
					pubsub.Feature_FEATURE_EXPIRY, pubsub.Feature_FEATURE_COLLAPSE, pubsub.Feature_FEATURE_ROOMS, pubsub.Feature_FEATURE_FILTER,
					pubsub.Feature_FEATURE_DISCONNECT,
				},
			}
			if !proto.Equal(h, want) {
				t.Errorf("hello %v, want %v", h, want)
			}
		}
		if len(shards) != 2 || last < 4 {
			t.Errorf("%d shards said hello, %d times", len(shards), last)
		}
		other, err := New(Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if other.instance == instance {
			t.Error("two processes have the same instance id")
		}
	})
}
