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

type grammar struct {
	Room      roomCmd      `cmd:"" help:"Push to the members of a room."`
	Rooms     roomsCmd     `cmd:"" help:"Push to the members of several rooms, each user once."`
	User      userCmd      `cmd:"" help:"Push to a user."`
	Users     usersCmd     `cmd:"" help:"Push to several users."`
	Broadcast broadcastCmd `cmd:"" help:"Push to everybody."`
	Explain   explainCmd   `cmd:"" help:"Say what would become of a push, and send nothing."`
	Jobs      jobsCmd      `cmd:"" help:"Broadcast jobs: one message to many users, at a speed."`
	Nodes     nodesCmd     `cmd:"" help:"List the Connect-Nodes and Push-Managers registered in etcd."`
	Listen    listenCmd    `cmd:"" help:"Connect to a Connect-Node as a user and print the pushes that arrive."`

	Members  membersCmd  `cmd:"" help:"List the members of a room."`
	Where    whereCmd    `cmd:"" help:"Say whether users are online: on which nodes, in which rooms, with which devices."`
	Presence presenceCmd `cmd:"" help:"Watch a room or a user: who comes and goes, until interrupted."`
	Kick     kickCmd     `cmd:"" help:"Close the connections of a user, of a device or in a room, and keep them away for a time if asked to."`

	Receipts receiptsCmd `cmd:"" help:"Print what clients say of pushes with --receipt=async, until interrupted."`
	Forget   forgetCmd   `cmd:"" help:"Erase what is stored for a user."`
	Replay   replayCmd   `cmd:"" help:"Send a user what is stored for them, to their connections on one Connect-Node."`

	Token tokenCmd `cmd:"" help:"Make a token for a WebSocket client, signed with a shared secret: for development and tests."`
	CanI  canICmd  `cmd:"" name:"can-i" help:"Tell whether the policy file allows a caller a push: yes, with exit code 0, or no, with 1."`

	Conformance conformanceCmd `cmd:"" help:"Try a Connect-Node of your own: play Push-Manager, and tell what the node does otherwise than its protocol says."`

	Context contextCmd `cmd:"" help:"Keep the addresses and files of each deployment under a name."`
	Doctor  doctorCmd  `cmd:"" help:"Say what is wrong between here, Push-Manager, etcd, the Controller and the Connect-Nodes."`
	Top     topCmd     `cmd:"" help:"Show the instances, their rates and the Connect-Nodes, live."`
	Watch   watchCmd   `cmd:"" help:"Print a line every second: what became of pushes, and how long they took."`

	Health  healthCmd  `cmd:"" help:"Ask a program whether it is ready or alive, for health checks of containers: exit code 0 if it is, 1 if not."`
	Version versionCmd `cmd:"" help:"Print the version; with --json all that is known of the build."`

	Completion completionCmd `cmd:"" help:"Print what makes a shell complete the command line of pushctl."`

	Use    string `name:"context" placeholder:"NAME" env:"PUSHCTL_CONTEXT" predictor:"context" help:"Context with the addresses and files to use (pushctl context). Default: the one that is selected."`
	Output string `short:"o" default:"table" enum:"table,wide,json,yaml" help:"How to print: table, for people; wide, with more columns; json, one object a line; yaml."`
	JSON   bool   `name:"json" help:"The same as -o json."`
}

// Main executes the command line of the process and returns its exit code.
func Main() int {
	if completes(os.Stdout) {
		return exitOK
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	live := isTerminal(out)
	t := &terminal{in: in, out: out, err: errOut, live: live, colour: live && os.Getenv("NO_COLOR") == ""}
	var cli grammar
	contexts := &contexts{}
	parsed, helped, err := cmdline.Parse(&cli, args, out, errOut, kong.Name("pushctl"), kong.Description("A person's client of Push-Manager."),
		kong.BindTo(ctx, (*context.Context)(nil)), kong.Bind(t), kong.Bind(contexts), kong.Resolvers(kong.ResolverFunc(contexts.resolve)), kong.UsageOnError())
	if err == nil && !helped {
		err = contexts.checkTokens(parsed)
	}
	var usage *usageError
	switch {
	case helped:
		return exitOK
	case errors.As(err, &usage):
		return t.exit(usage)
	case err != nil:
		return t.fail(fmt.Errorf("%w (pushctl --help shows how)", err), exitUsage)
	}
	if t.format = cli.Output; cli.JSON {
		t.format = formatJSON
	}
	return t.exit(parsed.Run())
}

// maxTimeout bounds --timeout.
const maxTimeout = time.Hour
