// Package keycmd is the command push-manager keys: API keys for callers of the push API.
package keycmd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/alecthomas/kong"

	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/cmdline"
)

type grammar struct {
	New newCmd `cmd:"" help:"Make a key. It is printed once, alone on standard output; what the file needs is its hash."`
}

type newCmd struct {
	Name     string `required:"" placeholder:"NAME" help:"Name of the caller, for people. What it may do stands in the policy file, by the key's id."`
	File     string `placeholder:"FILE" help:"File of the keys (AUTH_API_KEYS_FILE). The key's line is added to it; a new one is for its owner alone. Without it the line is printed."`
	NotAfter string `placeholder:"TIME" help:"When the key ends, such as 2027-01-31 or 2027-01-31T12:00:00Z. Without it: never."`
	Comment  string `placeholder:"TEXT" help:"For people, in the file."`
}

// Command is push-manager keys.
func Command() cli.Command {
	return cli.Command{Name: "keys", Help: "Make API keys for callers of the push API.", Main: func(args []string) int {
		return run(args, os.Stdout, os.Stderr)
	}}
}

// run executes one command line and returns its exit code.
func run(args []string, out, errOut io.Writer) int {
	var g grammar
	fail := func(err error, code int) int {
		_, _ = fmt.Fprintf(errOut, "push-manager keys: %v\n", err)
		return code
	}
	_, helped, err := cmdline.Parse(&g, args, out, errOut, kong.Name("push-manager keys"), kong.Description("Makes API keys for callers of the push API."))
	switch {
	case helped:
		return cli.ExitStopped
	case err != nil:
		return fail(fmt.Errorf("%w (push-manager keys --help shows how)", err), cli.ExitUsage)
	}
	var notAfter time.Time
	if g.New.NotAfter != "" {
		if notAfter, err = apikey.ParseTime(g.New.NotAfter); err == nil && !notAfter.After(time.Now()) {
			err = errors.New("is over")
		}
		if err != nil {
			return fail(fmt.Errorf("--not-after: %w", err), cli.ExitUsage)
		}
	}
	key, line, err := apikey.New(g.New.Name, notAfter, g.New.Comment)
	if err != nil {
		return fail(fmt.Errorf("--%w", err), cli.ExitUsage)
	}
	if g.New.File != "" {
		err = apikey.Append(g.New.File, line)
	}
	if err != nil {
		return fail(err, cli.ExitFailed)
	}
	if _, err := fmt.Fprintln(out, key); err != nil {
		return fail(err, cli.ExitFailed)
	}
	note := "Added to " + g.New.File
	if g.New.File == "" {
		note = "Line for the file of keys:\n" + line
	}
	_, _ = fmt.Fprintln(errOut, note+"\nThe key is not shown again.") // nobody reads what is lost
	return cli.ExitStopped
}
