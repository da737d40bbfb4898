package cli

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/plain"
)

// Report writes one line for each check of a command that checks. Owned by one goroutine.
type Report struct {
	out    io.Writer
	failed bool
}

// maxReportLine bounds a line: errors may quote what others said.
const maxReportLine = 512

// OK says that a check found nothing wrong.
func (r *Report) OK(check, format string, args ...any) { r.line("ok", check, format, args...) }

// Warn says what an operator should look at before going on.
func (r *Report) Warn(check, format string, args ...any) { r.line("warning", check, format, args...) }

// Fail says why the program would not work. The command exits with 1.
func (r *Report) Fail(check string, err error) {
	r.failed = true
	r.line("failed", check, "%v", err)
}

func (r *Report) line(verdict, check, format string, args ...any) {
	_, _ = fmt.Fprintf(r.out, "%-8s %-14s %s\n", verdict, check, plain.Line(fmt.Sprintf(format, args...), maxReportLine)) // nobody reads what is lost
}

// runCheck reads the settings as the program would, and has the command check them.
func runCheck(cmd Command, settings Settings, set *config.Set, o config.Options) int {
	r := &Report{out: os.Stdout}
	err := set.Load(o)
	if err == nil {
		err = settings.Validate(set, os.LookupEnv)
	}
	if err != nil {
		r.Fail("configuration", err)
		return ExitFailed
	}
	r.OK("configuration", "all keys, and the files that they name")
	cmd.Check(context.Background(), settings, r)
	if r.failed {
		return ExitFailed
	}
	return ExitStopped
}
