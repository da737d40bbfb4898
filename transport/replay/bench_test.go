package replay

import (
	"fmt"
	"sync/atomic"
	"testing"
)

// counting is an asker that only counts.
type counting struct{ ends atomic.Int64 }

func (c *counting) Node() string              { return "n" }
func (c *counting) End(_, _ uint64, _ string) { c.ends.Add(1) }

// BenchmarkStorm is 100,000 users without messages who connect at once, all of Push-Manager's side but the stream.
func BenchmarkStorm(b *testing.B) {
	const users = 100_000
	names := make([]string, users)
	for i := range names {
		names[i] = fmt.Sprint("user-", i)
	}
	w := newWorld(b, Config{})
	b.ReportAllocs()
	for b.Loop() {
		c := &counting{}
		for i, user := range names {
			w.service.Catchup(c, uint64(i+1), user, 0)
		}
		for c.ends.Load() < users {
			w.service.mu.Lock()
			idle := w.service.workers == 0
			w.service.mu.Unlock()
			if idle && c.ends.Load() < users {
				b.Fatal("nobody works")
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/users, "ns/catchup")
}
