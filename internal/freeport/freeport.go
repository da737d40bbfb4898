// Package freeport gives tests ports for servers that must know theirs before they listen,
// or that listen again at the same one: child processes, etcd, whatever is restarted.
//
// A port that the kernel picked (":0") and that was closed again is no such port: the kernel
// may give it to the next socket that asks for any. These ports come from outside of the
// range that the kernel picks from, and no two processes that use this package have the same
// ones at a time, as the packages of one test run would otherwise: a process listens on the
// first port of each block that it has taken, for as long as it runs.
package freeport

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
)

const (
	lowest    = 10000 // well-known servers are mostly below
	highest   = 65535
	blockSize = 100
	// Where Linux does not say what it picks from: from where it does unless it is told
	// otherwise, to the end, as other systems pick from there, too.
	// https://docs.kernel.org/networking/ip-sysctl.html, ip_local_port_range.
	pickedFrom, pickedTo = 32768, highest
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
			block, err := takeBlock()
			if err != nil {
				tb.Fatal(err)
			}
			taken.free = append(taken.free, block...)
		}
		port := taken.free[0]
		taken.free = taken.free[1:]
		if !inUse(port) { // otherwise a stranger has it, and is welcome to it
			ports = append(ports, port)
		}
	}
	giveBack(tb, ports)
	list := make([]string, n)
	for i, port := range ports {
		list[i] = strconv.Itoa(port)
	}
	return list
}

// Row returns the first of n such ports in a row, at most 99.
func Row(tb testing.TB, n int) int {
	tb.Helper()
	taken.mu.Lock()
	defer taken.mu.Unlock()
	for {
		block, err := takeBlock()
		if err != nil {
			tb.Fatal(err)
		}
		row, rest := block[:n], block[n:]
		taken.free = append(taken.free, rest...)
		if !slices.ContainsFunc(row, inUse) {
			giveBack(tb, row)
			return row[0]
		}
	}
}

func giveBack(tb testing.TB, ports []int) {
	tb.Helper()
	tb.Cleanup(func() {
		taken.mu.Lock()
		defer taken.mu.Unlock()
		taken.free = append(taken.free, ports...)
	})
}

// Addr returns host:port of one such port.
func Addr(tb testing.TB) string {
	tb.Helper()
	return net.JoinHostPort("127.0.0.1", Take(tb, 1)[0])
}

// picked is the range that the kernel picks from.
func picked() (from, to int) {
	from, to = pickedFrom, pickedTo
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		_, _ = fmt.Sscan(string(text), &from, &to)
	}
	return from, to
}

// takeBlock returns the ports of a block that no other process has.
func takeBlock() ([]int, error) {
	list := blocks(picked())
	for _, at := range rand.Perm(len(list)) {
		first := list[at]
		lock, err := listen(first)
		if err != nil {
			continue
		}
		taken.locks = append(taken.locks, lock)
		ports := make([]int, blockSize-1)
		for i := range ports {
			ports[i] = first + 1 + i
		}
		return ports, nil
	}
	return nil, fmt.Errorf("all %d blocks of ports are taken", len(list))
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

// inUse listens and closes again. A process that starts meanwhile would have a copy of the
// listener until it runs its own program, and the port would be in use for as long.
func inUse(port int) bool {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	l, err := listen(port)
	if err == nil {
		_ = l.Close()
	}
	return err != nil
}

func listen(port int) (net.Listener, error) {
	return net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}
