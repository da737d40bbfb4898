package link

import (
	"testing"
	"testing/synctest"

	"github.com/push-manager/push-manager/engine"
)

// pushSize is what a push of one byte to "u1" counts in a queue.
const pushSize = 3 + 2 + 3 + 64

// TestQueueIsSharedByPriority: of a node that takes nothing more the queue fills up; low
// priority finds it full first, and the highest is let in up to the cap.
func TestQueueIsSharedByPriority(t *testing.T) {
	for name, cfg := range map[string]Config{
		"length": {Window: 1, QueueLen: 16},
		"bytes":  {Window: 1, QueueBytes: 16 * pushSize},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, cfg)
				n := &fakeNode{id: "A"}
				n.deliver = func(st deliverStream) error {
					if _, err := n.greet(st); err != nil {
						return err
					}
					<-st.Context().Done()
					return nil
				}
				w.start("a:1", n)
				w.register("A", "a:1")
				w.up(1)
				w.room("r", "A", "u1")
				var started []*pending
				push := func(priority engine.Priority) (queued bool) {
					p := w.toUser("u1", "x")
					p.Priority = priority
					f := w.begin(p)
					synctest.Wait()
					started = append(started, f)
					return f.at.IsZero()
				}
				push(engine.Low) // which is in the window, so that all others are queued
				for i, step := range []struct {
					priority engine.Priority
					most     int
				}{{engine.Low, 8}, {engine.Normal, 14}, {engine.High, 15}, {engine.Critical, 16}} {
					for push(step.priority) {
					}
					if got := w.set.Stats().Queued; got != step.most {
						t.Errorf("%v: %d are queued, want %d", step.priority, got, step.most)
					}
					for _, lower := range []engine.Priority{engine.Low, engine.Normal, engine.High}[:min(i, 3)] {
						if push(lower) {
							t.Errorf("%v is queued where %v is not", lower, step.priority)
						}
					}
				}
				full, expired := 0, 0
				for _, f := range started {
					r := w.end(f)
					w.balanced(r)
					if r.Delivered > 0 {
						t.Errorf("delivered: %+v", r)
					}
					switch reasons(r) {
					case "failed: queue full":
						full++
					default:
						expired++
					}
				}
				if expired != 17 || full != len(started)-17 {
					t.Errorf("%d of %d found the queue full", full, len(started))
				}
			})
		})
	}
}
