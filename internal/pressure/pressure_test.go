package pressure

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/push-manager/push-manager/engine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) } // a library has goroutines from its init on

func TestMemoryIsShedAtItsWatermarks(t *testing.T) {
	last := 0
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
		if last = shed(step.used, last); last != step.want {
			t.Errorf("step %d, %v of memory: %d priorities are refused, want %d", i, step.used, last, step.want)
		}
	}
}

// told keeps what a Monitor said last.
type told struct{ last atomic.Int64 }

func newTold() *told {
	s := new(told)
	s.last.Store(-1)
	return s
}

func (s *told) set(priorities int) { s.last.Store(int64(priorities)) }

func (s *told) until(t *testing.T, what string, ok func(priorities int) bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if now := int(s.last.Load()); now >= 0 && ok(now) {
			return
		}
	}
	t.Fatalf("%s: %d priorities are refused", what, s.last.Load())
}

func none(priorities int) bool { return priorities == 0 }

// The limit of this process is set so low that what is in use is above its marks.
func TestMonitorSeesTheMemoryLimit(t *testing.T) {
	s := newTold()
	m, err := Start(Config{Shed: s.set, Interval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	ballast := make([]byte, 64<<20)
	runtime.GC() // from here on the ballast counts as alive
	was := debug.SetMemoryLimit(64 << 20)
	s.until(t, "above the limit", func(n int) bool { return n == engine.Critical.Rank() })
	debug.SetMemoryLimit(was)
	s.until(t, "without a limit", none)
	debug.SetMemoryLimit(1 << 30)
	runtime.KeepAlive(ballast)
	time.Sleep(20 * time.Millisecond)
	if now := s.last.Load(); now != 0 {
		t.Errorf("far below the limit: %d priorities are refused", now)
	}
	debug.SetMemoryLimit(was)
}

// What was in use is garbage from one moment on, and nobody allocates anything: the collector
// has to be asked.
func TestMonitorSeesThatMemoryIsFreeAgain(t *testing.T) {
	s := newTold()
	m, err := Start(Config{Shed: s.set, Interval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	ballast := make([]byte, 256<<20)
	runtime.GC()
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(256 << 20))
	s.until(t, "above the limit", func(n int) bool { return n > 0 })
	runtime.KeepAlive(ballast) // for the last time
	s.until(t, "what was in use is garbage", none)
}

func TestConfigIsChecked(t *testing.T) {
	for i, c := range []Config{
		{},
		{Shed: func(int) {}, Interval: -1},
	} {
		if _, err := Start(c); err == nil {
			t.Error(fmt.Sprint(i), "is taken")
		}
	}
}
