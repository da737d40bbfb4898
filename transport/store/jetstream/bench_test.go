package jetstream

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/transport/store"
)

// CPU of a process counts everything: the store, its client and the benchmark.
//
//	go test -run=^$ -bench=. -benchtime=200000x ./transport/store/jetstream

// opened is an embedded store with its Spool.
func opened(b *testing.B, sync bool, partitions int) (*Store, *store.Spool) {
	b.Helper()
	s, err := Open(b.Context(), Config{Dir: b.TempDir(), SyncAlways: sync, Partitions: partitions})
	if err != nil {
		b.Fatal(err)
	}
	spool, err := store.NewSpool(b.Context(), store.SpoolConfig{Store: s, Usage: s.Usage, Lanes: s.Partitions(), Lane: s.Partition, Logs: s, LogUsage: s.LogUsage})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := spool.Close(context.Background()); err != nil {
			b.Error(err)
		}
		if err := s.Close(context.Background()); err != nil {
			b.Error(err)
		}
	})
	return s, spool
}

// cpu is what the process has used.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// report adds the CPU of an operation, and how many are done in a second.
func report(b *testing.B, before time.Duration) {
	b.Helper()
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N), "cpu-us/op")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "op/s")
}

func BenchmarkSpoolAppend(b *testing.B) {
	for _, partitions := range []int{1, 4} {
		b.Run(fmt.Sprintf("partitions=%d", partitions), func(b *testing.B) {
			_, spool := opened(b, false, partitions)
			payload := []byte(strings.Repeat("x", 128))
			room := make(chan struct{}, 20_000) // under way
			var wg sync.WaitGroup
			b.ReportAllocs()
			before := cpu(b)
			b.ResetTimer()
			for i := range b.N {
				room <- struct{}{}
				wg.Add(1)
				spool.Append(&engine.Stored{MessageID: "message", Payload: payload}, []string{fmt.Sprintf("user %d", i%100_000)}, time.Now().Add(time.Minute), func(r []engine.Spooled) {
					if r[0].Err != nil {
						b.Error(r[0].Err)
					}
					<-room
					wg.Done()
				})
			}
			wg.Wait()
			report(b, before)
		})
	}
}

// filled has 10 messages for each of so many users, stored round by round.
func filled(b *testing.B, users, partitions int) *Store {
	b.Helper()
	s, _ := opened(b, false, partitions)
	payload := []byte(strings.Repeat("x", 128))
	for range 10 {
		for from := 0; from < users; from += 2000 {
			entries := make([]store.Entry, 0, 2000)
			for u := from; u < min(from+2000, users); u++ {
				entries = append(entries, store.Entry{User: fmt.Sprintf("user %d", u), Message: &engine.Stored{MessageID: "message", Payload: payload}, Expires: time.Now().Add(time.Hour)})
			}
			for _, err := range s.Append(b.Context(), entries) {
				if err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	return s
}

func BenchmarkRead10AtRandom(b *testing.B) {
	const users = 20_000
	for _, partitions := range []int{1, 4} {
		b.Run(fmt.Sprintf("partitions=%d", partitions), func(b *testing.B) {
			s := filled(b, users, partitions)
			before := cpu(b)
			b.ResetTimer()
			for b.Loop() {
				page, _, err := s.Read(b.Context(), fmt.Sprintf("user %d", rand.IntN(users)), 0, 100, 256<<10)
				if err != nil || len(page) != 10 {
					b.Fatal(len(page), err)
				}
			}
			report(b, before)
		})
	}
}

func BenchmarkAny(b *testing.B) {
	s := filled(b, 5000, 1)
	for _, name := range []string{"nobody", "everybody"} {
		b.Run("has="+name, func(b *testing.B) {
			users := make([]string, 1000)
			for i := range users {
				users[i] = fmt.Sprintf("user %d", i)
				if name == "nobody" {
					users[i] = "not a " + users[i]
				}
			}
			before := cpu(b)
			for b.Loop() {
				got, err := s.Any(b.Context(), users)
				if err != nil || got[0] != (name == "everybody") {
					b.Fatal(got[0], err)
				}
			}
			report(b, before)
		})
	}
}

func BenchmarkReadNothing(b *testing.B) {
	s := filled(b, 5000, 1)
	before := cpu(b)
	for b.Loop() {
		if page, _, err := s.Read(b.Context(), "nobody", 0, 100, 256<<10); err != nil || len(page) != 0 {
			b.Fatal(len(page), err)
		}
	}
	report(b, before)
}

func BenchmarkSpoolAppendLog(b *testing.B) {
	for _, underWay := range []int{1, 20_000} {
		b.Run(fmt.Sprintf("under-way=%d", underWay), func(b *testing.B) {
			_, spool := opened(b, false, 1)
			payload := []byte(strings.Repeat("x", 128))
			room := make(chan struct{}, underWay)
			var wg sync.WaitGroup
			before := cpu(b)
			b.ResetTimer()
			for i := range b.N {
				room <- struct{}{}
				wg.Add(1)
				spool.AppendLog(&engine.Stored{MessageID: "message", Room: fmt.Sprintf("room %d", i%2000), Payload: payload}, time.Now().Add(time.Minute), func(_ engine.Place, err error) {
					if err != nil {
						b.Error(err)
					}
					<-room
					wg.Done()
				})
			}
			wg.Wait()
			report(b, before)
		})
	}
}

// BenchmarkLogs is about a log of 2,000 rooms with 100 messages each, in turn.
func BenchmarkLogs(b *testing.B) {
	s, _ := opened(b, false, 1)
	payload := []byte(strings.Repeat("x", 128))
	for range 100 {
		entries := make([]store.LogEntry, 2000)
		for i := range entries {
			entries[i] = store.LogEntry{Message: &engine.Stored{MessageID: "message", Room: fmt.Sprintf("room %d", i), Payload: payload}, Expires: time.Now().Add(time.Hour)}
		}
		for _, err := range s.AppendLog(b.Context(), entries) {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
	_, heads, err := s.Heads(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	for _, bench := range []struct {
		name  string
		after uint64
		n     int
	}{{"nothing", heads[0], 0}, {"last-10", heads[0] - 20_000, 10}, {"first-100", 0, 100}} {
		b.Run("read="+bench.name, func(b *testing.B) {
			before := cpu(b)
			for b.Loop() {
				page, err := s.ReadLog(b.Context(), fmt.Sprintf("room %d", rand.IntN(2000)), bench.after, 100, 256<<10)
				if err != nil || len(page.Entries) != bench.n || page.Gap {
					b.Fatal(len(page.Entries), page.Gap, err)
				}
			}
			report(b, before)
		})
	}
	b.Run("heads", func(b *testing.B) {
		before := cpu(b)
		for b.Loop() {
			if _, _, err := s.Heads(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		report(b, before)
	})
	b.Run("follow=200000", func(b *testing.B) {
		before := cpu(b)
		for b.Loop() {
			told := 0
			if err := s.Follow(b.Context(), 0, 0, func(store.LogEntry) bool { told++; return told < int(heads[0]) }, func(uint64) {}); err != nil {
				b.Fatal(err)
			}
		}
		report(b, before)
	})
}
