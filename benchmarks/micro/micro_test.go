package micro

import (
	"context"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
)

func kinds() map[string]engine.Kind {
	return map[string]engine.Kind{"user": engine.ToUser, "room": engine.ToRoom, "broadcast": engine.ToAll}
}

func newRig(tb testing.TB) *Rig {
	tb.Helper()
	r, err := New()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := r.Close(ctx); err != nil {
			tb.Error(err)
		}
	})
	return r
}

func TestPushesAreDelivered(t *testing.T) {
	r := newRig(t)
	for name, kind := range kinds() {
		all := r.Pushes(kind, 10)
		for i := range all {
			if err := r.Push(&all[i]); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if n, err := r.Allocations(kind, 1000); err != nil || n > 0.5 {
			t.Errorf("%s: %v allocations, %v", name, n, err)
		}
	}
}

// BenchmarkShard is the way from a key to its shard.
func BenchmarkShard(b *testing.B) {
	r := newRig(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		r.shards.For(r.users[i%users])
	}
}

// BenchmarkRoute is a hit in the cache.
func BenchmarkRoute(b *testing.B) {
	r := newRig(b)
	b.Run("key=user", func(b *testing.B) {
		b.ReportAllocs()
		now := time.Now()
		for i := 0; b.Loop(); i++ {
			user := r.users[i%users]
			r.directory.Users.Cached(r.shards.For(user).Index(), user, now)
		}
	})
	b.Run("key=room", func(b *testing.B) {
		b.ReportAllocs()
		now, shard := time.Now(), r.shards.For(roomID).Index()
		for b.Loop() {
			r.directory.Rooms.Cached(shard, roomID, now)
		}
	})
}

// BenchmarkEngine is a push from validation to its outcome, the deliveries included.
// Its allocations are those of the warm path after decoding.
func BenchmarkEngine(b *testing.B) {
	r := newRig(b)
	for name, kind := range kinds() {
		b.Run("push="+name, func(b *testing.B) {
			d := new(done)
			var p engine.Push
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				r.fill(&p, kind, i)
				if err := r.Start(&p, d); err != nil {
					b.Fatal(err)
				}
				p.Reset()
			}
			d.wg.Wait()
		})
	}
}
