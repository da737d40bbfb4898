package cli

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// The exit codes.
const (
	ExitStopped = 0
	ExitFailed  = 1
	ExitUsage   = 2
)

// hardStop is when a process that was asked to stop is gone, whatever happens:
// its supervisor kills it after ten seconds.
const hardStop = 9500 * time.Millisecond

// Program is something that runs until it is drained.
type Program interface {
	// Drain stops it in order, by the end of ctx at the latest.
	Drain(ctx context.Context) error
	// Failed gets an error when it cannot go on. A Program that also has Reload() gets SIGHUP by it, after Run's again.
	Failed() <-chan error
}

// Run starts a program and runs it until a signal or its failure. On SIGHUP it calls again. It returns the
// exit code.
func Run(logger *slog.Logger, drainTimeout time.Duration, again func(), start func(context.Context) (Program, error)) int {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)

	p, err := starting(signals, start)
	switch {
	case errors.Is(err, errInterrupted):
		return ExitStopped
	case errors.Is(err, errImpatient):
		logger.Warn("stopping at once")
		return ExitFailed
	case err != nil:
		logger.Error("start failed", "error", err)
		return ExitFailed
	}

	hangups := make(chan os.Signal, 1)
	reloader, reloads := p.(interface{ Reload() })
	if reloads { // it ends any other program
		signal.Notify(hangups, syscall.SIGHUP)
		defer signal.Stop(hangups)
	}
	notifySystemd(logger, "READY=1")
	code := ExitStopped
	for running := true; running; {
		select {
		case <-hangups:
			again()
			reloader.Reload()
			continue
		case s := <-signals:
			logger.Info("stopping", "signal", s.String(), "timeout", drainTimeout)
		case err := <-p.Failed():
			logger.Error("failed, stopping", "error", err)
			code = ExitFailed
		}
		running = false
	}
	notifySystemd(logger, "STOPPING=1")
	return drain(logger, signals, drainTimeout, p, code)
}

var (
	errInterrupted = errors.New("interrupted while starting")
	errImpatient   = errors.New("interrupted twice while starting")
)

// starting runs start and gives it up on a signal; on a second one at once.
func starting(signals <-chan os.Signal, start func(context.Context) (Program, error)) (Program, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	type result struct {
		program Program
		err     error
	}
	done := make(chan result, 1)
	go func() {
		p, err := start(ctx)
		done <- result{p, err}
	}()
	interrupted := false
	for {
		select {
		case r := <-done:
			if r.err != nil && interrupted {
				return nil, errInterrupted
			}
			if interrupted { // it was faster: stop it as if it had run
				ctx, cancel := context.WithTimeout(context.Background(), hardStop)
				defer cancel()
				return nil, errors.Join(errInterrupted, r.program.Drain(ctx))
			}
			return r.program, r.err
		case <-signals:
			if interrupted {
				return nil, errImpatient
			}
			interrupted = true
			cancel()
		}
	}
}

// drain stops the program within its bounds.
func drain(logger *slog.Logger, signals <-chan os.Signal, timeout time.Duration, p Program, code int) int {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	begin := time.Now()
	done := make(chan error, 1)
	go func() { done <- p.Drain(ctx) }()
	hard := time.NewTimer(max(hardStop, timeout+hardStop/6))
	defer hard.Stop()
	select {
	case err := <-done:
		took := time.Since(begin).Round(time.Millisecond)
		if err != nil {
			// The rest was cut off, as asked: that is still a stop.
			logger.Warn("stopped, not everything was finished", "took", took, "error", err)
		} else {
			logger.Info("stopped", "took", took)
		}
		return code
	case s := <-signals:
		logger.Warn("stopping at once", "signal", s.String())
		return ExitFailed
	case <-hard.C:
		logger.Warn("stopping did not end in time: the rest is cut off")
		return code
	}
}
