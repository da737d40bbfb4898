package link

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	pubsub "github.com/push-manager/push-manager/proto"
)

// scopingNode tells tenants apart.
func scopingNode(id string) *fakeNode {
	return &fakeNode{id: id, hello: &pubsub.HelloReply{ProtocolVersion: 1, NodeId: id, BootId: "b", MaxAudienceMembers: 1000, OnlineUsers: 3,
		Features: []pubsub.Feature{99, pubsub.Feature_FEATURE_SCOPE}}}
}

func (w *world) toScope(scope, text string) *engine.Push {
	p := w.toAll(text)
	p.Scope = scope
	return p
}

func TestBroadcastOfAScopeGoesToNodesThatCanTellScopesApart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		a, b := w.start("a:1", scopingNode("A")), w.start("b:1", scopingNode("B"))
		w.register("A", "a:1", "B", "b:1")
		w.up(2)
		if r := w.do(w.toScope("shop/", "one")); r.Delivered != 2 || !r.Success() {
			t.Errorf("%+v", r)
		}
		if r := w.do(w.toAll("two")); r.Delivered != 2 {
			t.Errorf("%+v", r)
		}
		for _, n := range []*fakeNode{a, b} {
			if got := n.received(t); !slices.Equal(got, []string{"shop/* one", "* two"}) {
				t.Errorf("%s got %q", n.id, got)
			}
		}
		if n := w.set.Stats().Unscoped; n != 0 {
			t.Errorf("%d nodes cannot", n)
		}
	})
}

func TestBroadcastOfAScopeIsRefusedWhileANodeCannot(t *testing.T) {
	for name, lacking := range map[string]*fakeNode{"a node of before": {id: "B"}, "a node without Deliver": unaryNode("B")} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				a := w.start("a:1", scopingNode("A"))
				w.start("b:1", lacking)
				w.register("A", "a:1", "B", "b:1")
				w.up(2)
				if _, err := w.engine.Do(t.Context(), w.toScope("shop/", "x")); !errors.Is(err, engine.ErrUnscoped) {
					t.Errorf("refused with %v", err)
				}
				if got := append(a.received(t), lacking.received(t)...); len(got) > 0 {
					t.Errorf("arrived: %q", got)
				}
				if n := w.set.Stats().Unscoped; n != 1 {
					t.Errorf("%d nodes cannot", n)
				}
				// It has gone: nothing is in the way any more.
				w.register("A", "a:1")
				if r := w.do(w.toScope("shop/", "y")); r.Delivered != 1 {
					t.Errorf("%+v", r)
				}
			})
		})
	}
}

// A node that nobody has reached yet refuses no broadcast. What was queued for it meanwhile is
// dropped when it says that it cannot, and never sent to everybody.
func TestBroadcastOfAScopeIsNeverWidened(t *testing.T) {
	for name, lacking := range map[string]*fakeNode{"a node of before": {id: "B"}, "a node without Deliver": unaryNode("B")} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				lacking.gate = make(chan struct{})
				a := w.start("a:1", scopingNode("A"))
				w.start("b:1", lacking)
				w.register("A", "a:1", "B", "b:1")
				w.up(1)
				f := w.begin(w.toScope("shop/", "x"))
				time.AfterFunc(100*time.Millisecond, func() { close(lacking.gate) })
				r := w.end(f)
				if r.Success() || r.Delivered != 1 || len(r.NodeFailures) != 1 || !strings.Contains(reasons(r), engine.DropUnscoped.String()) {
					t.Errorf("%+v", r)
				}
				if got := lacking.received(t); len(got) > 0 {
					t.Errorf("the node that cannot got %q", got)
				}
				if got := a.received(t); len(got) != 1 {
					t.Errorf("the node that can got %q", got)
				}
			})
		})
	}
}

// A node that is started anew, as one that can or as one that cannot, is taken for what it is now.
func TestScopesAreThoseOfTheLastHello(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.start("a:1", scopingNode("A"))
		w.register("A", "a:1")
		w.up(1)
		for _, can := range []bool{false, true} {
			w.nodes["a:1"].kill()
			n := &fakeNode{id: "A"}
			if can {
				n = scopingNode("A")
			}
			w.start("a:1", n)
			time.Sleep(5 * time.Second)
			_, err := w.engine.Do(context.Background(), w.toScope("shop/", "x"))
			if errors.Is(err, engine.ErrUnscoped) == can {
				t.Errorf("a node that can (%v): %v", can, err)
			}
		}
	})
}
