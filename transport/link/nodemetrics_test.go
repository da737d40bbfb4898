package link

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"

	pubsub "github.com/push-manager/push-manager/proto"
)

// TestEachNodeShowsHowLongItTakesToAcknowledge, a stream by the frame and a node without one by the call, what waits
// for it and what broke. Nothing is left of a node that is gone.
func TestEachNodeShowsHowLongItTakesToAcknowledge(t *testing.T) {
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
			if strings.Contains(b.String(), "node_id") != (len(want) > 0) {
				t.Errorf("want %q of\n%s", want, b.String())
			}
		}
		w := newWorld(t, Config{Shards: 1, Metrics: set})
		a := &fakeNode{id: "A"}
		var late time.Duration
		a.deliver = func(st deliverStream) error {
			if _, err := a.greet(st); err != nil {
				return err
			}
			for {
				f, err := st.Recv()
				if err != nil {
					return err
				}
				out := &pubsub.DeliverResponse{Heartbeat: f.GetHeartbeat()}
				if n := len(f.GetDeliveries()); n > 0 {
					time.Sleep(late)
					ones := make([]uint32, n)
					for i := range ones {
						ones[i] = 1
					}
					out.Acks = []*pubsub.AckRange{{First: f.GetFirstSeq(), Delivered: ones}}
				}
				if err := st.Send(out); err != nil {
					return err
				}
			}
		}
		w.start("a:1", a)
		b := unaryNode("B")
		b.message = func(*pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
			time.Sleep(200 * time.Millisecond)
			return &pubsub.PushMessageResponse{Success: true}, nil
		}
		w.start("b:1", b)
		w.register("A", "a:1", "B", "b:1")
		w.up(2)
		w.room("a", "A", "ua")
		w.room("b", "B", "ub")

		late = 30 * time.Millisecond
		w.begin(w.toUser("ua", "1"))
		w.begin(w.toUser("ub", "1"))
		time.Sleep(time.Second)
		shows(`push_manager_link_ack_seconds_bucket{node_id="A",le="0.025"} 0`, `push_manager_link_ack_seconds_bucket{node_id="A",le="0.05"} 1`,
			`push_manager_link_ack_seconds_bucket{node_id="B",le="0.1"} 0`, `push_manager_link_ack_seconds_bucket{node_id="B",le="0.25"} 1`,
			`push_manager_node_queue_bytes{node_id="A"} 0`, `push_manager_node_stalled_links{node_id="A"} 0`)

		// Longer than the ack timeout: the push is unknown by then, and the ack is timed all the same.
		late = 1800 * time.Millisecond
		w.begin(w.toUser("ua", "2"))
		time.Sleep(1500 * time.Millisecond)
		shows(`push_manager_node_stalled_links{node_id="A"} 1`, `push_manager_node_stalls_total{node_id="A"} 1`, `push_manager_link_ack_seconds_count{node_id="A"} 1`)
		time.Sleep(time.Second)
		shows(`push_manager_node_stalled_links{node_id="A"} 0`,
			`push_manager_link_ack_seconds_bucket{node_id="A",le="1"} 1`, `push_manager_link_ack_seconds_bucket{node_id="A",le="2.5"} 2`,
			`push_manager_node_stalls_total{node_id="A"} 1`, `push_manager_node_stalls_total{node_id="B"} 0`,
			`push_manager_node_breaks_total{node_id="A"} 0`)

		a.kill()
		time.Sleep(time.Second)
		shows(`push_manager_node_breaks_total{node_id="A"} 1`, `push_manager_node_connections{node_id="A"} 0`)
		w.register()
		time.Sleep(time.Second)
		shows()
	})
}
