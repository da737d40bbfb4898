//go:build unix

package refgateway

import (
	"bytes"
	"fmt"
	"net"
	"runtime"
	"syscall"
	"testing"
)

// TestMemoryOfAConnection bounds what a client takes of the gateway's heap and stacks, idle and after pushes. What
// the small Controller of these tests keeps of it in this process counts, too; the kernel's part does not.
func TestMemoryOfAConnection(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector's own memory is in all figures")
	}
	const clients, pushes = 1000, 20
	const most = 10 << 10
	g, node := start(t, newController(t), nil)
	before := inUse()
	users := make([]string, clients)
	for i := range users {
		users[i] = fmt.Sprintf("user-%07d", i)
		dialQuietly(t, g, users[i])
	}
	idle := inUse()
	for range pushes {
		pushTo(t, node, "room", "hello", users...)
	}
	eventually(t, "all is written", func() bool { return g.writers.Load() == 0 })
	active := inUse()
	t.Logf("bytes of a connection: %d of heap and %d of stacks idle, %d and %d after pushes", (idle.heap-before.heap)/clients,
		(idle.stacks-before.stacks)/clients, (active.heap-before.heap)/clients, (active.stacks-before.stacks)/clients)
	if got := (active.heap + active.stacks - before.heap - before.stacks) / clients; got > most {
		t.Errorf("%d bytes a connection, more than %d", got, most)
	}
}

type memory struct{ heap, stacks int }

// inUse is what is left after a collection. The second one takes what the first one has only marked: finalizers and pools.
func inUse() memory {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return memory{int(m.HeapAlloc), int(m.StackInuse)}
}

// dialQuietly opens a connection past package net, so that the client takes no memory of this process.
func dialQuietly(t *testing.T, g *Gateway, user string) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := syscall.Connect(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: g.HTTPAddr().(*net.TCPAddr).Port}); err != nil {
		t.Fatal(err)
	}
	hello := "GET /ws?room_id=room&user_id=" + user + " HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	if _, err := syscall.Write(fd, []byte(hello)); err != nil {
		t.Fatal(err)
	}
	var got [1024]byte
	for n := 0; !bytes.Contains(got[:n], []byte(`"joined"`)); {
		more, err := syscall.Read(fd, got[n:])
		if err != nil || more == 0 {
			t.Fatalf("%v after %q", err, got[:n])
		}
		n += more
	}
}
