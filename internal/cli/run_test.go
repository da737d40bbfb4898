package cli

import (
	"context"
	"log/slog"
	"sync"
	"syscall"
	"testing"
	"time"
)

// reloading is a Program that takes SIGHUP.
type reloading struct {
	once    sync.Once
	waiting chan struct{} // closed when Run waits for signals
	reloads chan struct{}
}

func (*reloading) Drain(context.Context) error { return nil }
func (r *reloading) Reload()                   { r.reloads <- struct{}{} }
func (r *reloading) Failed() <-chan error {
	r.once.Do(func() { close(r.waiting) })
	return nil
}

func TestSIGHUPReloadsAndEndsNothing(t *testing.T) {
	p := &reloading{waiting: make(chan struct{}), reloads: make(chan struct{}, 3)}
	code := make(chan int)
	go func() {
		code <- Run(slog.New(slog.DiscardHandler), time.Second, func() {}, func(context.Context) (Program, error) { return p, nil })
	}()
	<-p.waiting
	for range 3 {
		if err := syscall.Kill(syscall.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		<-p.reloads
	}
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := <-code; got != ExitStopped {
		t.Errorf("exit code %d", got)
	}
}
