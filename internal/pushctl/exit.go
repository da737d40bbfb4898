package pushctl

import (
	"errors"

	"github.com/push-manager/push-manager/client"
)

// The exit codes. Those of a push are what became of it, the worst first.
const (
	exitOK      = 0 // delivered, or stored for all who were not there; of other commands: done
	exitError   = 1
	exitUsage   = 2 // a wrong command line, or a setting that cannot be
	exitOffline = 3 // nobody was there, and not all are stored
	exitFailed  = 4
	exitUnknown = 5 // it may have been delivered
)

// exitOf is the exit code for what became of a push.
func exitOf(o client.Outcome) int {
	switch o {
	case client.Delivered, client.Stored:
		return exitOK
	case client.Offline:
		return exitOffline
	case client.Failed:
		return exitFailed
	case client.Unknown:
	}
	return exitUnknown
}

// outcome ends a command with an exit code. Without a text, all has been printed.
type outcome struct {
	code int
	text string
}

func (o *outcome) Error() string { return o.text }

// usageError is a mistake on the command line, or in a context, that kong cannot see.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

// exit prints the one line that says why, unless all has been printed, and returns the exit code.
func (t *terminal) exit(err error) int {
	var usage *usageError
	var ended *outcome
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &ended) && ended.text == "":
		return ended.code
	case errors.As(err, &ended):
		return t.fail(err, ended.code)
	case errors.As(err, &usage):
		return t.fail(err, exitUsage)
	}
	return t.fail(err, exitError)
}
