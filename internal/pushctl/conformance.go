package pushctl

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/conformance"
)

type conformanceCmd struct {
	Node   string        `arg:"" optional:"" placeholder:"HOST:PORT" help:"The node's gRPC port."`
	NodeID string        `name:"node-id" placeholder:"ID" help:"Id under which the node is registered. Default: any is right."`
	User   []string      `help:"User who is connected to the node and in the room, may be repeated; two or more let every check run that needs no --client. Default with --client: three of our own."`
	Room   string        `default:"conformance" help:"Room of these users."`
	Absent string        `default:"conformance-absent" help:"User who is not connected."`
	Client string        `placeholder:"COMMAND" help:"Shell command that connects the user $USER_ID, joins the room $ROOM_ID and prints whatever arrives, a line each, until it is ended. Run once for each user."`
	Drain  string        `placeholder:"COMMAND" help:"Shell command that asks the node to leave, such as: kill -TERM 1234. Run last."`
	Within time.Duration `default:"1s" help:"Longest time for an answer of the node. Push-Manager grants a second."`
	Only   []string      `placeholder:"CHECK" help:"Run these checks only, by name or group, may be repeated."`
	Skip   []string      `placeholder:"CHECK" help:"Leave these checks out, may be repeated."`
	List   bool          `help:"Print the checks and run none. HOST:PORT may be left out."`
}

// Run tries a Connect-Node.
func (c *conformanceCmd) Run(ctx context.Context, t *terminal) error {
	if c.Within <= 0 || c.Within > maxTimeout {
		return &usageError{fmt.Sprintf("--within: %v must be above zero and at most %v", c.Within, maxTimeout)}
	}
	cfg := conformance.Config{
		Address: c.Node, NodeID: c.NodeID, Users: c.User, Room: c.Room, Absent: c.Absent, Within: c.Within, Only: c.Only, Skip: c.Skip,
	}
	if c.Client != "" {
		cfg.Client = c.client()
		if len(cfg.Users) == 0 {
			cfg.Users = []string{"conformance-1", "conformance-2", "conformance-3"}
		}
	}
	if c.Drain != "" {
		cfg.Drain = func(ctx context.Context) error { return shell(ctx, c.Drain).Run() }
	}
	var printed error
	report := func(r conformance.Result) {
		if err := t.result(r); printed == nil {
			printed = err
		}
	}
	if c.List {
		for _, r := range conformance.Checks() {
			report(r)
		}
		return printed
	}
	if err := cfg.Validate(); err != nil {
		return &usageError{err.Error()}
	}
	failed, err := conformance.Run(ctx, cfg, report)
	switch {
	case err != nil:
		return err
	case printed != nil:
		return printed
	case failed > 0:
		return fmt.Errorf("the node fails %s", plural(int32(failed), "check"))
	}
	return nil
}

// result is a check as one line, and what went otherwise below it.
func (t *terminal) result(r conformance.Result) error {
	colour := map[conformance.Outcome]string{conformance.OK: green, conformance.Fail: red, conformance.Skip: grey}[r.Outcome]
	line := fmt.Sprintf("%-4s", r.Outcome)
	line = t.paint(colour, line)
	line = fmt.Sprintf("%s  %-22s %s", line, r.Check, r.Expect)
	if r.Got != "" {
		line += fmt.Sprintf("\n      %-22s %s", "", t.paint(colour, clean(r.Got)))
	}
	return t.answer(r, line)
}

// client runs the command that connects a user.
func (c *conformanceCmd) client() conformance.Client {
	return func(ctx context.Context, user string, got func(string)) error {
		cmd := shell(ctx, c.Client, "USER_ID="+user, "ROOM_ID="+c.Room)
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		var last tail
		cmd.Stderr = &last
		if err := cmd.Start(); err != nil {
			return err
		}
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, maxFrame)
		for lines.Scan() {
			got(lines.Text())
		}
		_, _ = io.Copy(io.Discard, out) // after a line that is too long
		err = cmd.Wait()
		if err == nil {
			err = errors.New("its command has ended")
		}
		if said := strings.TrimSpace(string(last)); said != "" {
			err = fmt.Errorf("%w: %s", err, said)
		}
		return err
	}
}

// tail is the end of what a command has complained about.
type tail []byte

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	all := append(*t, p...)
	*t = all[max(0, len(all)-256):]
	return len(p), nil
}

// shell is a command of whoever calls us.
func shell(ctx context.Context, line string, env ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "sh", "-c", line) //nolint:gosec // It is theirs, to be run.
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 5 * time.Second
	endWithAll(cmd)
	return cmd
}
