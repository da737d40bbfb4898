package program

import (
	"bytes"
	"log/slog"
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
)

const (
	// gcPercent trades memory for CPU: an eighth of a push costs, as measured.
	gcPercent = 400
	// limitShare of a container's memory is left to the heap; the rest is for
	// stacks, buffers of the kernel, and the moment between two collections.
	limitShare = 0.9
)

// TuneMemory sets the garbage collector for a process that serves: GOGC=400
// unless GOGC is set, and a memory limit of 90 % of the container's unless
// GOMEMLIMIT is set. It is for main functions.
func TuneMemory(logger *slog.Logger) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	if limit := containerLimit(os.ReadFile); limit > 0 {
		share := int64(float64(limit) * limitShare)
		debug.SetMemoryLimit(share)
		logger.Debug("memory limit from the container", "bytes", share)
	}
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
