package cli

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestSystemdIsToldOfStartAndStop: through a socket with a name, and through one without a file.
func TestSystemdIsToldOfStartAndStop(t *testing.T) {
	for name, socket := range map[string]string{"a file": filepath.Join(t.TempDir(), "n"), "abstract": "@push-manager-" + filepath.Base(t.TempDir()) + time.Now().Format(".150405.000000000")} {
		t.Run(name, func(t *testing.T) {
			l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			t.Setenv("NOTIFY_SOCKET", socket)
			p := &reloading{waiting: make(chan struct{}), reloads: make(chan struct{}, 1)}
			code := make(chan int, 1)
			go func() {
				code <- Run(slog.New(slog.DiscardHandler), time.Second, func() {}, func(context.Context) (Program, error) { return p, nil })
			}()
			hears := func(want string) {
				t.Helper()
				b := make([]byte, 64)
				n, err := l.Read(b)
				if err != nil || string(b[:n]) != want {
					t.Errorf("%q %v, want %q", b[:n], err, want)
				}
			}
			hears("READY=1")
			<-p.waiting
			if err := syscall.Kill(syscall.Getpid(), syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			hears("STOPPING=1")
			if got := <-code; got != ExitStopped {
				t.Errorf("exit code %d", got)
			}
		})
	}
}
