package link

import (
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"

	pubsub "github.com/push-manager/push-manager/proto"
)

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

// TestHeartbeatsMeasureTheWayToANodeAndBack, from the moment when they are written, and a node
// that is gone shows no more.
func TestHeartbeatsMeasureTheWayToANodeAndBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		set := metrics.NewSet()
		shows := func(want ...string) {
			t.Helper()
			synctest.Wait()
			var b strings.Builder
			set.WritePrometheus(&b)
			for _, line := range want {
				if !strings.Contains(b.String(), line+"\n") {
					t.Errorf("no %q in\n%s", line, b.String())
				}
			}
			if strings.Contains(b.String(), "heartbeat_seconds") != (len(want) > 0) {
				t.Errorf("want %q of\n%s", want, b.String())
			}
		}
		w := newWorld(t, Config{Shards: 2, Metrics: set})
		n := &lateNode{fakeNode: &fakeNode{id: "A"}}
		n.after.Store(int64(30 * time.Millisecond))
		n.deliver = n.serve
		w.start("a:1", n.fakeNode)
		w.start("b:1", unaryNode("B"))
		w.register("A", "a:1", "B", "b:1")
		w.up(4)
		time.Sleep(10500 * time.Millisecond)
		shows(`push_manager_link_heartbeat_seconds_count{node_id="A"} 20`,
			`push_manager_link_heartbeat_seconds_bucket{node_id="A",le="0.01"} 0`, `push_manager_link_heartbeat_seconds_bucket{node_id="A",le="0.05"} 20`)
		// While one is not answered the next are not measured: it is the one that is late.
		n.after.Store(int64(1500 * time.Millisecond))
		time.Sleep(10 * time.Second)
		shows(`push_manager_link_heartbeat_seconds_bucket{node_id="A",le="1"} 20`)
		w.register("B", "b:1")
		time.Sleep(5 * time.Second)
		w.register()
		shows()
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
