package pushctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/push-manager/push-manager/internal/cmdline"
	_ "github.com/push-manager/push-manager/internal/stdlog" // libraries do not write to standard error
)

// The exit codes.
const (
	exitOK      = 0
	exitError   = 1
	exitUsage   = 2
	exitOffline = 3 // nobody was there, and not all are stored
	exitFailed  = 4
	exitUnknown = 5 // it may have been delivered
)

// outcome ends a push that did not succeed with its exit code. Without a text, what
// became of it has been printed.
type outcome struct {
	code int
	text string
}

func (o *outcome) Error() string { return o.text }

// usageError is a mistake on the command line that kong cannot see.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

type grammar struct {
	Room      roomCmd      `cmd:"" help:"Push to the members of a room."`
	User      userCmd      `cmd:"" help:"Push to a user."`
	Users     usersCmd     `cmd:"" help:"Push to several users."`
	Broadcast broadcastCmd `cmd:"" help:"Push to everybody."`
	Explain   explainCmd   `cmd:"" help:"Say what would become of a push, and send nothing."`
	Jobs      jobsCmd      `cmd:"" help:"Broadcast jobs: one message to many users, at a speed."`
	Nodes     nodesCmd     `cmd:"" help:"List the Connect-Nodes and Push-Managers registered in etcd."`
	Listen    listenCmd    `cmd:"" help:"Connect to a Connect-Node as a user and print the pushes that arrive."`

	Receipts receiptsCmd `cmd:"" help:"Print what clients say of pushes with --receipt=async, until interrupted."`
	Forget   forgetCmd   `cmd:"" help:"Erase what is stored for a user."`
	Replay   replayCmd   `cmd:"" help:"Send a user what is stored for them, to their connections on one Connect-Node."`

	Token tokenCmd `cmd:"" help:"Make a token for a WebSocket client, signed with a shared secret: for development and tests."`
	CanI  canICmd  `cmd:"" name:"can-i" help:"Tell whether the policy file allows a caller a push: yes, with exit code 0, or no, with 1."`

	Conformance conformanceCmd `cmd:"" help:"Try a Connect-Node of your own: play Push-Manager, and tell what the node does otherwise than its protocol says."`

	Health  healthCmd  `cmd:"" help:"Ask a program whether it is ready or alive, for health checks of containers: exit code 0 if it is, 1 if not."`
	Version versionCmd `cmd:"" help:"Print the version; with --json all that is known of the build."`

	Output string `short:"o" default:"table" enum:"table,json" help:"How to print: table, for people, or json, one object a line."`
	JSON   bool   `name:"json" help:"The same as -o json."`
}

// terminal is where a command reads and writes.
type terminal struct {
	in       io.Reader
	out, err io.Writer
	json     bool
	colour   bool
}

// Main executes the command line of the process and returns its exit code.
func Main() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	t := &terminal{in: in, out: out, err: errOut, colour: isTerminal(out)}
	var cli grammar
	parsed, helped, err := cmdline.Parse(&cli, args, out, errOut, kong.Name("pushctl"), kong.Description("A person's client of Push-Manager."),
		kong.BindTo(ctx, (*context.Context)(nil)), kong.Bind(t), kong.UsageOnError())
	switch {
	case helped:
		return exitOK
	case err != nil:
		return t.fail(fmt.Errorf("%w (pushctl --help shows how)", err), exitUsage)
	}
	t.json = cli.JSON || cli.Output == "json"
	err = parsed.Run()
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

// fail prints the one line that says why, and returns code.
func (t *terminal) fail(err error, code int) int {
	_, _ = fmt.Fprintf(t.err, "pushctl: %v\n", err)
	return code
}

// isTerminal tells whether colours are wanted at w.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// paint puts a text in one of the terminal's colours, where there are any.
func (t *terminal) paint(colour, text string) string {
	if !t.colour {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// The colours in use.
const (
	green  = "32"
	red    = "31"
	yellow = "33"
	grey   = "90"
)

// maxTimeout bounds --timeout.
const maxTimeout = time.Hour
