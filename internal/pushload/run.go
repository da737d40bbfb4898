package pushload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/push-manager/push-manager/internal/buildinfo"
	"github.com/push-manager/push-manager/internal/cmdline"
	"github.com/push-manager/push-manager/internal/load"
	_ "github.com/push-manager/push-manager/internal/stdlog" // libraries do not write to standard error
)

// The exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// usageError is a mistake on the command line that kong cannot see.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

// Main executes the command line of the process and returns its exit code.
func Main() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// The first signal ends the run with its results, the second one at once.
	context.AfterFunc(ctx, stop)
	return run(ctx, os.Args[1:], os.Stdout, os.Stderr)
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	if len(args) > 0 && args[0] == "version" {
		if err := buildinfo.Write(out, "pushload", slices.Contains(args[1:], "--json")); err != nil {
			return fail(errOut, err, exitFailed)
		}
		return exitOK
	}
	var f flags
	_, helped, err := cmdline.Parse(&f, args, out, errOut, kong.Name("pushload"),
		kong.Description("Pushes to a Push-Manager at a rate and measures what becomes of the pushes."))
	switch {
	case helped:
		return exitOK
	case err != nil:
		return fail(errOut, fmt.Errorf("%w (pushload --help shows how)", err), exitUsage)
	}
	cfg, done, err := f.config()
	var usage *usageError
	switch {
	case errors.As(err, &usage):
		return fail(errOut, err, exitUsage)
	case err != nil:
		return fail(errOut, err, exitFailed)
	}
	defer done()
	return f.measure(ctx, cfg, out, errOut)
}

// measure does the run and writes its results.
func (f *flags) measure(ctx context.Context, cfg load.Config, out, errOut io.Writer) int {
	file, err := f.create()
	if err != nil {
		return fail(errOut, err, exitFailed)
	}
	defer file.abandon()
	live := newLive(errOut, f.Quiet, cfg)
	cfg.OnProgress = live.show
	res, err := load.Run(ctx, cfg)
	live.clear()
	switch {
	case errors.Is(err, load.ErrUnreachable):
		return fail(errOut, fmt.Errorf("%w; start everything on this machine with: push-manager dev", err), exitFailed)
	case err != nil:
		return fail(errOut, err, exitFailed)
	}
	rep := newReport(res, f.MaxErrors)
	if !f.Quiet && f.JSON != "-" {
		if err := rep.text(newPen(out)); err != nil {
			return fail(errOut, fmt.Errorf("print the results: %w", err), exitFailed)
		}
	} else {
		rep.complain(newPen(errOut))
	}
	switch {
	case f.JSON == "-":
		err = rep.json(out)
	case file != nil:
		err = file.save(rep)
	}
	if err != nil {
		return fail(errOut, fmt.Errorf("write JSON: %w", err), exitFailed)
	}
	if len(rep.Short) > 0 {
		return exitFailed
	}
	return exitOK
}

// fail prints the one line that says why, and returns code.
func fail(w io.Writer, err error, code int) int {
	_, _ = fmt.Fprintf(w, "pushload: %v\n", err)
	return code
}
