package ingress

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// pending is how many bytes of a socket have come and are not read.
func pending(socket syscall.RawConn) (n int) {
	_ = socket.Control(func(fd uintptr) { // closed: there are none
		n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
	})
	return n
}
