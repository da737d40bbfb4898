//go:build unix

package refgateway

import "syscall"

// writeNow writes as much as the socket takes at once, which may be nothing.
func writeNow(fd uintptr, b []byte) (int, error) {
	for {
		n, err := syscall.Write(int(fd), b)
		switch err {
		case syscall.EINTR:
		case syscall.EAGAIN:
			return 0, nil
		default:
			return max(n, 0), err //nolint:wrapcheck // it ends the connection
		}
	}
}
