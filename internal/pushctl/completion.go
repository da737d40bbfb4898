package pushctl

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/alecthomas/kong"
	"github.com/posener/complete"
	"github.com/willabides/kongplete"

	"github.com/push-manager/push-manager/internal/invoke"
)

type completionCmd struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
}

// Run prints what a shell reads at its start: source <(pushctl completion bash).
func (c *completionCmd) Run(t *terminal) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find pushctl itself: %w", err)
	}
	self = invoke.Quote(self)
	script := "complete -C " + self + " pushctl"
	switch c.Shell {
	case "zsh":
		script = "autoload -U +X bashcompinit && bashcompinit\ncomplete -o nospace -C " + self + " pushctl"
	case "fish":
		script = `function __complete_pushctl
  set -lx COMP_LINE (commandline -cp)
  test -z (commandline -ct)
  and set COMP_LINE "$COMP_LINE "
  ` + self + `
end
complete -f -c pushctl -a "(__complete_pushctl)"`
	}
	return t.answer(struct {
		Shell  string `json:"shell"`
		Script string `json:"script"`
	}{c.Shell, script}, script)
}

// completes answers a shell that asks how a command line may go on, with one word a line: it has put the line into COMP_LINE.
func completes(out io.Writer) (asked bool) {
	if os.Getenv("COMP_LINE") == "" {
		return false
	}
	parser, err := kong.New(&grammar{}, kong.Name("pushctl"), kong.Writers(out, io.Discard), kong.Exit(func(int) {}))
	if err != nil {
		return true // a shell shows nothing, and a test holds the grammar
	}
	kongplete.Complete(parser, kongplete.WithExitFunc(func(int) {}), kongplete.WithErrorHandler(func(error) {}),
		kongplete.WithPredictor("file", complete.PredictFiles("*")),
		kongplete.WithPredictor("context", complete.PredictFunc(func(complete.Args) []string {
			_, b, err := readContexts()
			if err != nil {
				return nil
			}
			return slices.Sorted(maps.Keys(b.Contexts))
		})))
	return true
}
