// Package freeport gives tests ports for servers that must know theirs before they listen,
// or that listen again at the same one: child processes, etcd, whatever is restarted.
//
// A port that the kernel picked (":0") and that was closed again is no such port: the kernel
// gives it to the next outgoing connection that asks. These ports come from outside of the
// range that the kernel picks from, and no two processes that use this package have the same
// ones at a time, as the packages of one test run would otherwise: a process listens on the
// first port of each block that it has taken, for as long as it runs.
package freeport

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"testing"
)

const (
	lowest    = 10000 // well-known servers are mostly below
	highest   = 65535
	blockSize = 100
	// The range that Linux picks from unless it is told otherwise, which other systems'
	// ranges are within:
	// https://docs.kernel.org/networking/ip-sysctl.html, ip_local_port_range.
	pickedFrom, pickedTo = 32768, 60999
)

// taken is what this process has taken.
var taken struct { //nolint:gochecknoglobals // Ports belong to the process: its tests share them.
	mu    sync.Mutex
	locks []net.Listener // one for each block
	free  []int          // of those blocks, that of no test
}

// Take returns n ports of 127.0.0.1 that nobody listens on, in decimal. They belong to the
// test until it ends.
func Take(tb testing.TB, n int) []string {
	tb.Helper()
	taken.mu.Lock()
	defer taken.mu.Unlock()
	var ports []int
	for len(ports) < n {
		if len(taken.free) == 0 {
			if err := takeBlock(); err != nil {
				tb.Fatal(err)
			}
		}
		port := taken.free[0]
		taken.free = taken.free[1:]
		if l, err := listen(port); err == nil { // otherwise a stranger has it, and is welcome to it
			_ = l.Close()
			ports = append(ports, port)
		}
	}
	tb.Cleanup(func() {
		taken.mu.Lock()
		defer taken.mu.Unlock()
		taken.free = append(taken.free, ports...)
	})
	list := make([]string, n)
	for i, port := range ports {
		list[i] = strconv.Itoa(port)
	}
	return list
}

// Addr returns host:port of one such port.
func Addr(tb testing.TB) string {
	tb.Helper()
	return net.JoinHostPort("127.0.0.1", Take(tb, 1)[0])
}

// takeBlock adds the ports of a block that no other process has to the free ones.
func takeBlock() error {
	from, to := pickedFrom, pickedTo
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		_, _ = fmt.Sscan(string(text), &from, &to)
	}
	list := blocks(from, to)
	for _, at := range rand.Perm(len(list)) {
		first := list[at]
		lock, err := listen(first)
		if err != nil {
			continue
		}
		taken.locks = append(taken.locks, lock)
		for port := first + 1; port < first+blockSize; port++ {
			taken.free = append(taken.free, port)
		}
		return nil
	}
	return fmt.Errorf("all %d blocks of ports are taken", len(list))
}

// blocks are the first ports of all blocks outside of the range that the kernel picks from.
// Where it picks from all, they are all blocks: it then takes a port of ours now and then.
func blocks(from, to int) []int {
	var all, outside []int
	for first := lowest; first+blockSize-1 <= highest; first += blockSize {
		all = append(all, first)
		if first > to || first+blockSize <= from {
			outside = append(outside, first)
		}
	}
	if len(outside) == 0 {
		return all
	}
	return outside
}

func listen(port int) (net.Listener, error) {
	return net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}
