package cli

import (
	"bytes"
	"log/slog"
	"math"
	"os"
	"path"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
)

const (
	// heapUsual is what the heap may grow to before garbage is collected, however little
	// of it is in use: collections are then rare, and the process is not large yet.
	heapUsual = 160 << 20
	// headroomLeast is what may always be allocated between two collections.
	headroomLeast = 64 << 20
	// headroomShare bounds what collections of a large heap cost: they come after a
	// half of it has been allocated anew. At Go's own share, all of it, the garbage would
	// be as large as what is of use; a collection takes about 0.7 ms of CPU for a MiB.
	headroomShare = 2
	// heapLeast is below what no heap counts for the runtime.
	heapLeast = 4 << 20
	// limitedPercent is for somebody who has said how much memory there is: it may be
	// used to save collections.
	limitedPercent = 400
	// sharedLeast is the GOGC below which a program that makes little garbage is not set, unless its heap is so large
	// that others are. Its collections are rare with this, too.
	sharedLeast = 50
	// limitShare of a container's memory is left to the heap; the rest is for
	// stacks, buffers of the kernel, and the moment between two collections.
	limitShare = 0.9
)

// TuneMemory sets the garbage collector for a process that serves. It lets the heap grow
// to 160 MiB before a collection, or else by 64 MiB or half of what is in use, if that is
// more, and keeps it below 90 % of its container's memory. GOGC and GOMEMLIMIT, where
// they are set, are obeyed instead: with GOGC nothing follows the heap, with GOMEMLIMIT
// alone four times of what is in use may be allocated, within the limit. It is for main
// functions.
func TuneMemory(logger *slog.Logger) { TuneMemoryShare(logger, 1) }

// TuneMemoryShare is TuneMemory that leaves one part in so many of the room to garbage, and half of what
// is in use at least: for programs that make little of it.
func TuneMemoryShare(logger *slog.Logger, share int) {
	limited, fixed := os.Getenv("GOMEMLIMIT") != "", os.Getenv("GOGC") != ""
	if limit := containerLimit(os.ReadFile); limit > 0 && !limited {
		share := int64(float64(limit) * limitShare)
		debug.SetMemoryLimit(share)
		logger.Debug("memory limit from the container", "bytes", share)
	}
	switch {
	case fixed:
	case limited:
		debug.SetGCPercent(limitedPercent)
	default:
		t := newTuner()
		t.share = share
		t.adjust()
		t.follow()
	}
}

// tuner sets GOGC after each collection, so that the headroom is what it should be for
// the heap that the collection has found to be in use.
type tuner struct {
	share   int
	percent int
	samples []metrics.Sample // live heap, stacks, globals
}

func newTuner() *tuner {
	return &tuner{share: 1, samples: []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"},
	}}
}

// follow calls adjust after each collection from now on: what it leaves behind is
// garbage, and the collector says so.
func (t *tuner) follow() {
	type mark struct{ of *tuner }
	runtime.SetFinalizer(&mark{t}, func(m *mark) {
		m.of.adjust()
		m.of.follow()
	})
}

func (t *tuner) adjust() {
	metrics.Read(t.samples)
	live, base := t.samples[0].Value.Uint64(), uint64(0)
	for _, s := range t.samples {
		base += s.Value.Uint64()
	}
	percent := gcPercent(live, base)
	if percent = max(percent/t.share, min(percent, sharedLeast)); percent != t.percent {
		t.percent = percent
		debug.SetGCPercent(percent)
	}
}

// gcPercent is the GOGC that gives a heap its headroom. The runtime takes it of base,
// which is the live heap with stacks and globals, and of heapLeast at least.
func gcPercent(live, base uint64) int {
	headroom := max(headroomLeast, heapUsual-min(live, heapUsual), live/headroomShare)
	return int(headroom * 100 / max(base, heapLeast))
}

// containerLimit is the memory limit of the process's cgroup or one above it, 0
// for none.
func containerLimit(readFile func(string) ([]byte, error)) int64 {
	limit := int64(math.MaxInt64)
	lower := func(file string) {
		text, err := readFile(file)
		if err != nil {
			return
		}
		// "max" (version 2) and a number near 2^63 (version 1) mean no limit.
		n, err := strconv.ParseInt(string(bytes.TrimSpace(text)), 10, 64)
		if err == nil && n > 0 && n < 1<<60 {
			limit = min(limit, n)
		}
	}
	groups, err := readFile("/proc/self/cgroup")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(groups)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, group, _ := strings.Cut(rest, ":")
		root, file := "/sys/fs/cgroup", "memory.max"
		if controllers != "" {
			if !strings.Contains(controllers, "memory") {
				continue
			}
			root, file = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
		}
		for dir := path.Join("/", group); ; dir = path.Dir(dir) {
			lower(path.Join(root, dir, file))
			if dir == "/" {
				break
			}
		}
	}
	if limit == math.MaxInt64 {
		return 0
	}
	return limit
}
