package link

import (
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// canaries checks what the metrics of a set show of the canaries.
func canaries(t *testing.T, set *metrics.Set, want ...string) string {
	t.Helper()
	var b strings.Builder
	set.WritePrometheus(&b)
	for _, line := range want {
		if !strings.Contains(b.String(), line+"\n") {
			t.Errorf("no %q in\n%s", line, b.String())
		}
	}
	return b.String()
}

// lateNode answers heartbeats after a while; what it does is set between frames.
type lateNode struct {
	*fakeNode
	after atomic.Int64
}

func (n *lateNode) serve(st deliverStream) error {
	if _, err := n.greet(st); err != nil {
		return err
	}
	for {
		f, err := st.Recv()
		if err != nil {
			return err
		}
		time.Sleep(time.Duration(n.after.Load()))
		if err := st.Send(&pubsub.DeliverResponse{Heartbeat: f.GetHeartbeat(), OnlineUsers: 3}); err != nil {
			return err
		}
	}
}

func TestCanaryMeasuresTheWayToANodeAndBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		set := metrics.NewSet()
		w := newWorld(t, Config{Shards: 2, Metrics: set, Canary: 10 * time.Second})
		n := &lateNode{fakeNode: &fakeNode{id: "A"}}
		n.after.Store(int64(30 * time.Millisecond))
		n.deliver = n.serve
		w.start("a:1", n.fakeNode)
		w.register("A", "a:1")
		w.up(2)
		time.Sleep(65 * time.Second)
		synctest.Wait()
		// On each of two streams the first goes at once, and then one each 10 s.
		text := canaries(t, set, `push_manager_link_canary_up{node_id="A"} 1`, `push_manager_link_canary_seconds_count{node_id="A"} 14`,
			`push_manager_link_canary_seconds_bucket{node_id="A",le="0.025"} 0`, `push_manager_link_canary_seconds_bucket{node_id="A",le="0.05"} 14`)
		if strings.Count(text, "push_manager_link_canary_up") != 1 {
			t.Errorf("one node has one gauge:\n%s", text)
		}
	})
}

// TestCanaryGoesDownBeforeTheLinkDoes: the heartbeat that is not answered shows after
// the ack timeout, while the stream lives until the silence has lasted.
func TestCanaryGoesDownBeforeTheLinkDoes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		set := metrics.NewSet()
		w := newWorld(t, Config{Metrics: set, Canary: 500 * time.Millisecond, Silence: time.Minute})
		n := &lateNode{fakeNode: &fakeNode{id: "A"}}
		n.deliver = n.serve
		w.start("a:1", n.fakeNode)
		w.register("A", "a:1")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		canaries(t, set, `push_manager_link_canary_up{node_id="A"} 1`)
		n.after.Store(int64(20 * time.Second))
		time.Sleep(2 * time.Second)
		canaries(t, set, `push_manager_link_canary_up{node_id="A"} 0`, `push_manager_node_connections{node_id="A"} 1`)
		n.after.Store(0)
		time.Sleep(40 * time.Second) // the late one comes, and then one after the other
		synctest.Wait()
		canaries(t, set, `push_manager_link_canary_up{node_id="A"} 1`, `push_manager_node_connections{node_id="A"} 1`)
	})
}

// TestCanaryShowsOnlyNodesWithAStream: a node without Deliver has no heartbeat, one that
// was never reached has none yet, and one that is gone shows no more.
func TestCanaryShowsOnlyNodesWithAStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		set := metrics.NewSet()
		w := newWorld(t, Config{Metrics: set, Canary: time.Second})
		a := w.start("a:1", &fakeNode{id: "A"})
		b := w.start("b:1", unaryNode("B"))
		w.register("A", "a:1", "B", "b:1", "C", "c:1")
		w.up(2)
		time.Sleep(3 * time.Second)
		text := canaries(t, set, `push_manager_link_canary_up{node_id="A"} 1`)
		if strings.Count(text, "push_manager_link_canary_up") != 1 {
			t.Errorf("nodes without a stream have a canary:\n%s", text)
		}
		if got := b.received(t); len(got) > 0 {
			t.Errorf("a node without Deliver got %q", got)
		}
		a.kill()
		time.Sleep(2 * time.Second)
		canaries(t, set, `push_manager_link_canary_up{node_id="A"} 0`)
		w.start("a:2", &fakeNode{id: "A"})
		w.register("A", "a:2")
		time.Sleep(2 * time.Second)
		canaries(t, set, `push_manager_link_canary_up{node_id="A"} 1`)
		w.register("B", "b:1")
		time.Sleep(2 * time.Second)
		if text := canaries(t, set); strings.Contains(text, "canary") {
			t.Errorf("a node that is gone has a canary:\n%s", text)
		}
	})
}

// TestCanaryGoesWithDeliver: a node that comes back without Deliver has nothing to measure
// any more, and a gauge at 0 would say that something is wrong with it. When it has
// Deliver again, it is measured anew.
func TestCanaryGoesWithDeliver(t *testing.T) {
	bubble(t, func(t *testing.T) {
		set := metrics.NewSet()
		w := newWorld(t, Config{Shards: 3, Metrics: set, Canary: time.Second})
		streaming := func() *fakeNode {
			n := &lateNode{fakeNode: &fakeNode{id: "A"}}
			n.deliver = n.serve
			return n.fakeNode
		}
		swap := func(old, next *fakeNode, without int) {
			t.Helper()
			w.start("a:1", next)
			old.kill()
			w.until("all links are live on the new node", func() bool {
				s := w.set.Stats()
				return s.Live == 3 && s.Unary == without
			})
			time.Sleep(5500 * time.Millisecond)
			synctest.Wait()
		}
		n := w.start("a:1", streaming())
		w.register("A", "a:1")
		w.up(3)
		time.Sleep(time.Minute)
		canaries(t, set, `push_manager_link_canary_up{node_id="A"} 1`)

		old := unaryNode("A")
		swap(n, old, 3)
		if text := canaries(t, set, `push_manager_node_connections{node_id="A"} 3`); strings.Contains(text, "canary") {
			t.Errorf("a node without Deliver has a canary:\n%s", text)
		}
		swap(old, streaming(), 0)
		canaries(t, set, `push_manager_link_canary_up{node_id="A"} 1`, `push_manager_link_canary_seconds_count{node_id="A"} 18`)
	})
}

// TestCanaryStaysWhileAShardHasAStream: one shard is told that there is no Deliver while
// the others measure on.
func TestCanaryStaysWhileAShardHasAStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		set := metrics.NewSet()
		w := newWorld(t, Config{Shards: 2, Metrics: set, Canary: time.Second})
		n := &lateNode{fakeNode: &fakeNode{id: "A"}}
		var streams atomic.Int32
		n.deliver = func(st deliverStream) error {
			if streams.Add(1) > 1 {
				return status.Error(codes.Unimplemented, "unknown method Deliver")
			}
			return n.serve(st)
		}
		w.start("a:1", n.fakeNode)
		w.register("A", "a:1")
		w.up(2)
		time.Sleep(5500 * time.Millisecond)
		synctest.Wait()
		if s := w.set.Stats(); s.Unary != 1 {
			t.Fatalf("%+v", s)
		}
		canaries(t, set, `push_manager_link_canary_seconds_count{node_id="A"} 6`)
	})
}

func TestWithoutCanaryNothingIsMeasured(t *testing.T) {
	bubble(t, func(t *testing.T) {
		set := metrics.NewSet()
		w := newWorld(t, Config{Metrics: set})
		n := w.start("a:1", &fakeNode{id: "A"})
		w.register("A", "a:1")
		time.Sleep(time.Minute)
		if text := canaries(t, set); strings.Contains(text, "canary") || len(n.all()) > 61 {
			t.Errorf("%d heartbeats in a minute, and:\n%s", len(n.all()), text)
		}
	})
}

// TestAbleCountsNodesThatTakeDeliveries: a stream that lives is not enough.
func TestAbleCountsNodesThatTakeDeliveries(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{Shards: 2})
		n := &fakeNode{id: "A"}
		n.answer = func(uint64, []string, string, *pubsub.DeliverResponse) {} // never acks
		w.start("a:1", n)
		w.start("b:1", unaryNode("B"))
		leaving := w.start("c:1", leavingNode(time.Minute))
		able := func(reachable, want int) {
			t.Helper()
			synctest.Wait()
			if s := w.set.Stats(); s.Reachable != reachable || s.Able != want {
				t.Errorf("%d nodes are reachable and %d able, want %d and %d", s.Reachable, s.Able, reachable, want)
			}
		}
		able(0, 0)
		w.register("A", "a:1", "D", "d:1")
		w.up(2)
		able(1, 1)
		push := func(prefix, node string) { // on both shards
			users := names(prefix, 40)
			w.room(prefix, node, users...)
			for _, user := range users {
				w.begin(w.toUser(user, "x"))
			}
		}
		push("u", "A")
		time.Sleep(1500 * time.Millisecond)
		able(1, 0)
		w.register("A", "a:1", "B", "b:1")
		w.up(4)
		able(2, 1)
		w.register(leaving.id, "c:1")
		time.Sleep(time.Second)
		able(1, 1)
		push("v", leaving.id)
		able(1, 0)
	})
}
