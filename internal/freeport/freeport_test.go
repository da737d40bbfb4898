package freeport

import (
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

func number(t *testing.T, port string) int {
	t.Helper()
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// The kernel picks the ports of outgoing connections as it picks those of ":0".
func TestPortsAreNeverThoseThatTheKernelPicks(t *testing.T) {
	from, to := picked()
	if first := blocks(from, to)[0]; first <= to && first+blockSize > from {
		t.Skipf("the kernel picks from all ports, %d to %d", from, to)
	}
	for _, port := range Take(t, 200) {
		if n := number(t, port); from <= n && n <= to {
			t.Errorf("%s is among what the kernel picks, %d to %d", port, from, to)
		}
	}
}

func TestRowIsOfOneBlockAndOfNoOtherTest(t *testing.T) {
	first := Row(t, 16)
	others := Take(t, 300)
	for port := first; port < first+16; port++ {
		if inUse(port) || slices.Contains(others, strconv.Itoa(port)) {
			t.Errorf("%d is somebody else's", port)
		}
	}
	if again := Row(t, 16); again/blockSize == first/blockSize {
		t.Errorf("rows from %d and from %d", first, again)
	}
}

func TestBlocksAreOutsideOfTheRange(t *testing.T) {
	for _, test := range []struct{ from, to, first, last, n int }{
		{32768, 60999, 10000, 65400, 227 + 45},
		{49152, 65535, 10000, 49000, 391},
		{1024, 32767, 32800, 65400, 327},
		{10099, 65500, 10000, 65400, 555}, // the last port of the first is the kernel's, so none is left
		{10100, 65499, 10000, 10000, 1},
		{1024, 65535, 10000, 65400, 555}, // nothing is better than these
	} {
		list := blocks(test.from, test.to)
		if len(list) != test.n || list[0] != test.first || list[len(list)-1] != test.last {
			t.Errorf("%d to %d: %d blocks from %d to %d", test.from, test.to, len(list), list[0], list[len(list)-1])
		}
	}
}

func TestPortsBelongToOneTestUntilItEnds(t *testing.T) {
	ports := Take(t, 150) // more than a block
	t.Run("while it runs", func(t *testing.T) {
		for _, port := range Take(t, 150) {
			if slices.Contains(ports, port) {
				t.Errorf("%s was given twice", port)
			}
		}
	})
	before := len(taken.locks)
	for range 10 {
		t.Run("each gives its own back", func(t *testing.T) { Take(t, 150) })
	}
	if n := len(taken.locks); n != before {
		t.Errorf("%d blocks more", n-before)
	}
}

func TestPortOfSomebodyElseIsLeftAlone(t *testing.T) {
	Take(t, 1)
	next := taken.free[0]
	l, err := listen(next)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if port := Take(t, 1)[0]; port == strconv.Itoa(next) {
		t.Errorf("%s is in use", port)
	}
}

// Tests that run in parallel start processes while others look for ports.
func TestPortIsFreeThoughProcessesStart(t *testing.T) {
	stop := make(chan struct{})
	var starting sync.WaitGroup
	defer starting.Wait()
	defer close(stop)
	program := t.TempDir() // a directory: the process starts, cannot run it, and is gone
	for range 4 {
		starting.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := exec.Command(program).Run(); err == nil {
					t.Error("a directory can be run")
					return
				}
			}
		})
	}
	for range 300 {
		port := number(t, Take(t, 1)[0])
		if inUse(port) {
			t.Fatalf("%d is in use", port)
		}
	}
}

// TestProcessesHaveDifferentPorts: the packages of a test run are processes of their own.
func TestProcessesHaveDifferentPorts(t *testing.T) {
	const child = "FREEPORT_CHILD"
	if os.Getenv(child) != "" {
		if _, err := os.Stdout.WriteString(strings.Join(Take(t, 150), " ") + "\n"); err != nil {
			t.Fatal(err)
		}
		_, _ = os.Stdin.Read(make([]byte, 1)) // until the parent ends it
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	owner := map[string]int{}
	for i := range 5 {
		cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), child+"=1")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cmd.StdinPipe(); err != nil { // what the child waits at
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Wait() }) // the context of the test has ended it
		line := make([]byte, 0, 2000)
		for !strings.HasSuffix(string(line), "\n") {
			n, err := out.Read(line[len(line):cap(line)])
			if err != nil {
				t.Fatalf("child %d: %v after %q", i, err, line)
			}
			line = line[:len(line)+n]
		}
		ports := strings.Fields(string(line))
		if len(ports) != 150 {
			t.Fatalf("child %d: %q", i, line)
		}
		for _, port := range ports {
			if other, taken := owner[port]; taken {
				t.Errorf("%s belongs to %d and to %d", port, other, i)
			}
			owner[port] = i
			if n := number(t, port); !inUse(n - n%blockSize) {
				t.Errorf("the block of %s is not locked", port)
			}
		}
	}
}
