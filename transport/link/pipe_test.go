package link

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// TestAbortedWireThrowsAwayWhatHasNotArrived: what the kernel still holds must not
// reach the node when the callers have been told that it is unknown.
func TestAbortedWireThrowsAwayWhatHasNotArrived(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	w := &rawConn{}
	if err := w.connect(t.Context(), l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	ours, err := w.take(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.take(t.Context(), ""); err == nil {
		t.Error("gRPC may connect a second time, without its turn")
	}
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = theirs.Close() }()
	written := 0
	for piece := make([]byte, 1<<20); ; { // until all buffers are full
		_ = ours.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := ours.Write(piece)
		written += n
		if err != nil && written > 1<<20 { // else we were late, and the buffers may have room
			break
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	}
	w.abort()
	if _, err := ours.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("it was not closed: %v", err)
	}
	_ = theirs.SetReadDeadline(time.Now().Add(10 * time.Second))
	read, err := io.Copy(io.Discard, theirs)
	if !errors.Is(err, syscall.ECONNRESET) || read >= int64(written) {
		t.Errorf("%d of %d bytes arrived after all, and then %v", read, written, err)
	}
	w.abort() // of a connection that is closed already
}
