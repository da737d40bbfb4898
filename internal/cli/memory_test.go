package cli

import (
	"errors"
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"
)

func TestContainerLimitIsTheLowestOnTheWayUp(t *testing.T) {
	for name, tc := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"no cgroups": {nil, 0},
		"version 2": {map[string]string{
			"/proc/self/cgroup":             "0::/a/b\n",
			"/sys/fs/cgroup/a/b/memory.max": "max\n",
			"/sys/fs/cgroup/a/memory.max":   "268435456\n",
		}, 256 << 20},
		"lowest at the bottom": {map[string]string{
			"/proc/self/cgroup":             "0::/a/b\n",
			"/sys/fs/cgroup/a/b/memory.max": "1000\n",
			"/sys/fs/cgroup/a/memory.max":   "3000\n",
			"/sys/fs/cgroup/memory.max":     "2000\n",
		}, 1000},
		"lowest in the middle": {map[string]string{
			"/proc/self/cgroup":             "0::/a/b\n",
			"/sys/fs/cgroup/a/b/memory.max": "3000\n",
			"/sys/fs/cgroup/a/memory.max":   "1000\n",
			"/sys/fs/cgroup/memory.max":     "2000\n",
		}, 1000},
		"lowest at the top": {map[string]string{
			"/proc/self/cgroup":             "0::/a/b\n",
			"/sys/fs/cgroup/a/b/memory.max": "3000\n",
			"/sys/fs/cgroup/memory.max":     "1000\n",
		}, 1000},
		"both versions": {map[string]string{
			"/proc/self/cgroup":                             "4:memory:/x\n0::/a\n",
			"/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1000\n",
			"/sys/fs/cgroup/a/memory.max":                   "2000\n",
		}, 1000},
		"version 2 in a container": {map[string]string{
			"/proc/self/cgroup":         "0::/\n",
			"/sys/fs/cgroup/memory.max": "1000\n",
		}, 1000},
		"version 1": {map[string]string{
			"/proc/self/cgroup":                             "5:cpu:/x\n4:memory:/x\n",
			"/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2000\n",
			"/sys/fs/cgroup/memory/memory.limit_in_bytes":   "9223372036854771712\n",
		}, 2000},
		"no limit": {map[string]string{
			"/proc/self/cgroup":         "0::/\n",
			"/sys/fs/cgroup/memory.max": "max\n",
		}, 0},
	} {
		got := containerLimit(func(file string) ([]byte, error) {
			if text, ok := tc.files[file]; ok {
				return []byte(text), nil
			}
			return nil, errors.New("no such file")
		})
		if got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
}

func TestHeadroomOfTheHeap(t *testing.T) {
	const mib = 1 << 20
	for _, tc := range []struct{ live, others, want uint64 }{
		{0, 0, 160 * mib}, // before the first collection
		{2 * mib, mib, 158 * mib},
		{3 * mib, mib, 157 * mib},
		{20 * mib, 10 * mib, 140 * mib},
		{100 * mib, 12 * mib, 64 * mib},
		{128 * mib, 0, 64 * mib},
		{500 * mib, 50 * mib, 250 * mib},
		{8 << 30, 100 * mib, 4 << 30},
		{1 << 40, 0, 1 << 39},
	} {
		base := tc.live + tc.others
		percent := gcPercent(tc.live, base)
		// As the runtime has it, to a percent.
		base = max(base, heapLeast)
		got := base * uint64(percent) / 100
		if off := math.Abs(float64(got) - float64(tc.want)); off > float64(base)/100 {
			t.Errorf("%d MiB in use: %d %%, which is %d MiB, want %d", tc.live/mib, percent, got/mib, tc.want/mib)
		}
	}
}

func TestTunerFollowsTheHeap(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	percent := func() uint64 {
		s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	newTuner().follow()
	wait := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: GOGC is %d", what, percent())
			}
			runtime.GC()
		}
	}
	wait("a small heap", func() bool { return percent() > 200 })
	block := make([]byte, 200<<20)
	wait("a large one", func() bool { return percent() <= 50 })
	runtime.KeepAlive(block)
	block = nil
	wait("a small one again", func() bool { return percent() > 200 })
	_ = block
}

// TestGarbageShareLeavesHalfOfWhatIsInUse: a quarter of the room, and never less than half of what is in use.
func TestGarbageShareLeavesHalfOfWhatIsInUse(t *testing.T) {
	for _, share := range []int{1, 4, 1000} {
		tuner := newTuner()
		tuner.share = share
		defer debug.SetGCPercent(debug.SetGCPercent(100))
		tuner.adjust()
		all := gcPercent(tuner.samples[0].Value.Uint64(), tuner.samples[0].Value.Uint64()+tuner.samples[1].Value.Uint64()+tuner.samples[2].Value.Uint64())
		if want := max(all/share, min(all, 50)); tuner.percent != want {
			t.Errorf("share %d: GOGC %d, want %d", share, tuner.percent, want)
		}
	}
}
