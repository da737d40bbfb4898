package telemetry_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/telemetry"
	"github.com/push-manager/push-manager/shard"
)

// broken is a network whose use is a fault of our own.
type broken struct{ engine.Network }

// nobody is a Controller that knows nobody.
type nobody struct{ route.Source }

func TestPanicsOfTheEngineAreCounted(t *testing.T) {
	shards, err := shard.New(shard.Config{Count: 1})
	if err != nil {
		t.Fatal(err)
	}
	directory, err := route.New(route.Config{
		Source: nobody{}, Shards: 1, Shard: func(string) int { return 0 }, Go: func(_ int, task func()) error { return shards.At(0).Go(task) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := shards.Close(ctx); err != nil {
			t.Error(err)
		}
		directory.Close()
	}()
	e, err := engine.New(engine.Config{Shards: shards, Directory: directory, Network: broken{}})
	if err != nil {
		t.Fatal(err)
	}
	set := metrics.NewSet()
	collector := telemetry.NewEngineMetrics(e, set)
	want := func(n string) {
		t.Helper()
		collector.Collect()
		var b strings.Builder
		set.WritePrometheus(&b)
		if line := `push_manager_panics_total{part="engine"} ` + n + "\n"; !strings.Contains(b.String(), line) {
			t.Errorf("lacks %q in:\n%s", line, b.String())
		}
	}
	want("0")
	r, _ := e.Do(t.Context(), &engine.Push{Request: engine.Request{Kind: engine.ToAll, Payload: []byte{}, Content: engine.Content{Present: true}}})
	if r.Success() {
		t.Errorf("push: %+v", r)
	}
	want("1")
}
