package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cpuTime is the CPU time of all threads of a process, user and system, as the
// operating system accounts for it, to the nanosecond.
func cpuTime(pid int) (time.Duration, error) {
	// CPUCLOCK_SCHED of a process, as in <linux/posix-timers.h>.
	var ts unix.Timespec
	if err := unix.ClockGettime(^int32(pid)<<3|2, &ts); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// written is how often and how much a process has written, sockets included.
func written(pid int) (calls, bytes float64, err error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/io")
	if err != nil {
		return 0, 0, fmt.Errorf("writes of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch name {
		case "syscw":
			calls, err = strconv.ParseFloat(value, 64)
		case "wchar":
			bytes, err = strconv.ParseFloat(value, 64)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("writes of process %d: %w", pid, err)
		}
	}
	return calls, bytes, nil
}

// resident is the memory that a process has now, in bytes.
func resident(pid int) (float64, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0, fmt.Errorf("memory of process %d: %w", pid, err)
	}
	fields := bytes.Fields(text)
	if len(fields) < 2 {
		return 0, errors.New("statm makes no sense")
	}
	pages, err := strconv.ParseFloat(string(fields[1]), 64)
	return pages * float64(os.Getpagesize()), err
}

// scrape reads all samples at an address, by name with labels.
func scrape(ctx context.Context, client *http.Client, ops string) (map[string]float64, error) {
	samples := map[string]float64{}
	body, err := get(ctx, client, "http://"+ops+"/metrics")
	if err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(bytes.NewReader(body))
	for lines.Scan() {
		at := strings.LastIndexByte(lines.Text(), ' ')
		if at < 0 || strings.HasPrefix(lines.Text(), "#") {
			continue
		}
		if v, err := strconv.ParseFloat(lines.Text()[at+1:], 64); err == nil {
			samples[lines.Text()[:at]] = v
		}
	}
	return samples, lines.Err()
}

// get reads what an HTTP address answers.
func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", url, resp.Status, bytes.TrimSpace(body))
	}
	return body, nil
}

// alone gives the server the first core, and those who make it work the others. With one core
// there is nothing to give.
func (s *Server) alone() error {
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("cores: %w", err)
	}
	if all.Count() < 2 {
		return nil
	}
	var first unix.CPUSet
	for cpu := 0; first.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			first.Set(cpu)
			all.Clear(cpu)
		}
	}
	return errors.Join(confine(s.child.pid(), &first), confine(s.bench.load.pid(), &all), confine(s.world.nodesPart.pid(), &all))
}

// confine keeps the threads of a process on some cores. Those that it starts later are where
// the one is that starts them.
func confine(pid int, cpus *unix.CPUSet) error {
	confined := map[string]bool{}
	for again := true; again; {
		again = false
		threads, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/task")
		if err != nil {
			return fmt.Errorf("threads of process %d: %w", pid, err)
		}
		for _, thread := range threads {
			if confined[thread.Name()] {
				continue
			}
			tid, err := strconv.Atoi(thread.Name())
			if err == nil {
				err = unix.SchedSetaffinity(tid, cpus)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) { // it has ended
				return fmt.Errorf("cores of process %d: %w", pid, err)
			}
			confined[thread.Name()], again = true, true
		}
	}
	return nil
}
