package telemetry

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/shard"
)

// lastingWorld is a Controller that has everybody on one node, and the node, whose clients take their time.
type lastingWorld struct{ awaited []*engine.Delivery }

func (w *lastingWorld) Room(context.Context, string, func(user, node []byte)) (bool, uint64, error) {
	return false, 0, nil
}

func (w *lastingWorld) Users(_ context.Context, users []string, nodes [][]string) error {
	for i := range users {
		nodes[i] = []string{"A"}
	}
	return nil
}

func (w *lastingWorld) Link(int, string) engine.Link              { return w }
func (w *lastingWorld) Links(int) []engine.Link                   { return []engine.Link{w} }
func (w *lastingWorld) Node() string                              { return "A" }
func (w *lastingWorld) Scopes() bool                              { return true }
func (*lastingWorld) Describe(*engine.Delivery) engine.LinkState  { return engine.LinkState{} }
func (w *lastingWorld) Nudge(_ string, _ uint64, done func(bool)) { done(true) }
func (w *lastingWorld) Send(d *engine.Delivery) engine.Reason {
	d.TrySend()
	_, _ = d.Ack(engine.Ack{Delivered: 1, Pending: 1})
	w.awaited = append(w.awaited, d)
	return engine.Sent
}

func TestPushesThatWaitForClientsAreShown(t *testing.T) {
	shards, err := shard.New(shard.Config{Count: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = shards.Close(context.Background()) }()
	w := &lastingWorld{}
	directory, err := route.New(route.Config{
		Source: w, Shards: 1, Shard: func(string) int { return 0 },
		Go: func(home int, task func()) error { return shards.At(home).Go(task) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer directory.Close()
	e, err := engine.New(engine.Config{Shards: shards, Directory: directory, Network: w})
	if err != nil {
		t.Fatal(err)
	}
	set := metrics.NewSet()
	m := NewEngineMetrics(e, set)
	if _, err := e.Do(t.Context(), &engine.Push{Request: engine.Request{
		Kind: engine.ToUser, User: "u", Payload: []byte{}, Content: engine.Content{Present: true},
		Options: &engine.Options{MessageID: "m", ClientAck: true, Async: true},
	}}); err != nil {
		t.Fatal(err)
	}
	has := func(want map[string]int) {
		t.Helper()
		m.Collect()
		var b strings.Builder
		set.WritePrometheus(&b)
		for name, n := range want {
			if line := fmt.Sprintf("%s %d\n", name, n); !strings.Contains(b.String(), line) {
				t.Errorf("no %q in\n%s", line, b.String())
			}
		}
	}
	has(map[string]int{
		"push_manager_push_async_open": 1, "push_manager_receipts_awaited": 1,
	})
	_ = w.awaited[0].Receipt(1, nil, true)
	if err := e.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	has(map[string]int{"push_manager_push_async_open": 0, "push_manager_receipts_awaited": 0})
}
