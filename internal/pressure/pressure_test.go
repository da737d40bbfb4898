package pressure

import (
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/push-manager/push-manager/engine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) } // a library has goroutines from its init on

func TestMemoryIsShedAtItsWatermarks(t *testing.T) {
	var c control
	for i, step := range []struct {
		used float64
		want int
	}{
		{0.5, 0},
		{0.849, 0},
		{0.85, 1}, // low
		{0.949, 1},
		{0.95, 3}, // all but critical
		{2, 3},
		{0.93, 3}, // not yet well below
		{0.91, 1},
		{0.83, 1},
		{0.81, 0},
		{0.84, 0}, // from below it is no mark
	} {
		if got := c.next(reading{memory: step.used}); got.Memory != step.want || got.Busy != 0 {
			t.Errorf("step %d, %v of memory: %+v, want %d priorities", i, step.used, got, step.want)
		}
	}
}

func TestWaitIsShedStepByStepAndNeverCritical(t *testing.T) {
	c := control{wait: 50 * time.Millisecond, few: 100}
	slow := reading{wait: 51 * time.Millisecond, inFlight: 100}
	for i, step := range []struct {
		now  reading
		want int
	}{
		{slow, 0}, {slow, 0},
		{reading{wait: 50 * time.Millisecond, inFlight: 100}, 0},
		{slow, 0}, {slow, 0}, {slow, worse}, {slow, 2 * worse},
		{reading{wait: time.Second, inFlight: 99}, 2*worse - better}, // few
		{reading{inFlight: 1000}, 2*worse - 2*better},
		{slow, 2*worse - 2*better}, {slow, 2*worse - 2*better}, {slow, 3*worse - 2*better},
	} {
		if got := c.next(step.now); got.Busy != step.want || got.Memory != 0 {
			t.Errorf("step %d: %+v, want %d", i, got, step.want)
		}
	}
	for range 1000 {
		c.next(slow)
	}
	s := c.next(slow)
	if share(s, engine.Critical) != 0 || share(s, engine.High) != 1 {
		t.Errorf("at its worst: %+v", s)
	}
	const second = 10 // readings
	n := 0
	for ; c.next(reading{}).Busy > 0; n++ {
	}
	if n > 6*second {
		t.Errorf("it takes %d readings to be back to normal", n)
	}
	off := control{}
	for range 100 {
		if got := off.next(reading{wait: time.Minute, inFlight: 1 << 20}); got.Busy != 0 {
			t.Fatalf("switched off: %+v", got)
		}
	}
}

// A higher priority is never refused more than a lower one.
func TestSharesFollowThePriorities(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := control{wait: time.Millisecond, few: 1}
		for range rapid.IntRange(0, 100).Draw(t, "readings") {
			s := c.next(reading{
				memory:   rapid.Float64Range(0, 1.2).Draw(t, "memory"),
				wait:     time.Duration(rapid.IntRange(0, 2).Draw(t, "wait")) * time.Millisecond,
				inFlight: rapid.Int64Range(0, 2).Draw(t, "in flight"),
			})
			last := 1.0
			for _, p := range engine.Priorities() {
				now := share(s, p)
				if now > last || now < 0 {
					t.Fatalf("%+v refuses %v of %v, and %v of the one below", s, now, p, last)
				}
				last = now
			}
			if last != 0 {
				t.Fatalf("%+v refuses critical", s)
			}
		}
	})
}

func TestMedianOfAHistogram(t *testing.T) {
	buckets := []float64{math.Inf(-1), 0, 1, 2, math.Inf(1)}
	for name, test := range map[string]struct {
		counts []uint64
		want   time.Duration
	}{
		"nothing": {[]uint64{0, 0, 0, 0}, 0},
		"first":   {[]uint64{5, 1, 0, 0}, 0},
		"middle":  {[]uint64{1, 1, 3, 0}, time.Second},
		"last":    {[]uint64{1, 1, 1, 9}, 2 * time.Second},
	} {
		all := uint64(0)
		for _, n := range test.counts {
			all += n
		}
		if got := median(test.counts, all, buckets); got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

// shed keeps what a Monitor said last.
type shed struct {
	last atomic.Pointer[engine.Shedding]
}

func (s *shed) set(now engine.Shedding) { s.last.Store(&now) }

func (s *shed) until(t *testing.T, what string, ok func(engine.Shedding) bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if now := s.last.Load(); now != nil && ok(*now) {
			return
		}
	}
	t.Fatalf("%s: %+v", what, s.last.Load())
}

func none(s engine.Shedding) bool { return s == engine.Shedding{} }

// The limit of this process is set so low that what is in use is above its marks.
func TestMonitorSeesTheMemoryLimit(t *testing.T) {
	var s shed
	m, err := Start(Config{Shed: s.set, InFlight: func() int64 { return 0 }, Interval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	ballast := make([]byte, 64<<20)
	runtime.GC() // from here on the ballast counts as alive
	was := debug.SetMemoryLimit(64 << 20)
	s.until(t, "above the limit", func(s engine.Shedding) bool { return s.Memory == engine.Critical.Rank() })
	debug.SetMemoryLimit(was)
	s.until(t, "without a limit", none)
	debug.SetMemoryLimit(1 << 30)
	runtime.KeepAlive(ballast)
	time.Sleep(20 * time.Millisecond)
	if now := s.last.Load(); now.Memory != 0 {
		t.Errorf("far below the limit: %+v", now)
	}
	debug.SetMemoryLimit(was)
}

// What was in use is garbage from one moment on, and nobody allocates anything: the collector
// has to be asked.
func TestMonitorSeesThatMemoryIsFreeAgain(t *testing.T) {
	var s shed
	m, err := Start(Config{Shed: s.set, InFlight: func() int64 { return 0 }, Interval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	ballast := make([]byte, 256<<20)
	runtime.GC()
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(256 << 20))
	s.until(t, "above the limit", func(s engine.Shedding) bool { return s.Memory > 0 })
	runtime.KeepAlive(ballast) // for the last time
	s.until(t, "what was in use is garbage", none)
}

// There are more goroutines than cores, and all of them always want one.
func TestMonitorSeesThatGoroutinesWait(t *testing.T) {
	var s shed
	var few atomic.Bool
	m, err := Start(Config{Shed: s.set, Wait: time.Microsecond, Few: 10, Interval: time.Millisecond, InFlight: func() int64 {
		if few.Load() {
			return 1
		}
		return 100
	}})
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var spinners sync.WaitGroup
	for range 20 * runtime.GOMAXPROCS(0) {
		spinners.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					runtime.Gosched()
				}
			}
		})
	}
	s.until(t, "no core is free", func(s engine.Shedding) bool { return s.Busy > engine.BusyParts })
	few.Store(true)
	s.until(t, "few are in flight", none)
	few.Store(false)
	s.until(t, "no core is free again", func(s engine.Shedding) bool { return s.Busy > 0 })
	m.Close()
	if now := s.last.Load(); !none(*now) {
		t.Errorf("closed, and still %+v", now)
	}
	m.Close() // again
	close(stop)
	spinners.Wait()
}

func TestConfigIsChecked(t *testing.T) {
	for i, c := range []Config{
		{},
		{Shed: func(engine.Shedding) {}},
		{Shed: func(engine.Shedding) {}, InFlight: func() int64 { return 0 }, Wait: -1},
	} {
		if _, err := Start(c); err == nil {
			t.Error(fmt.Sprint(i), "is taken")
		}
	}
}
