package pushctl

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/programs"
)

// TestAShellIsToldHowALineMayGoOn asks the program as a shell does.
func TestAShellIsToldHowALineMayGoOn(t *testing.T) {
	home(t)
	for _, name := range []string{"prod", "stage"} {
		if code, _, errOut := pushctl(t, "", "context", "add", name); code != exitOK {
			t.Fatal(errOut)
		}
	}
	self := programs.Path(t, "pushctl")
	ask := func(line string) []string {
		t.Helper()
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "COMP_LINE="+line)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(out))
	}
	for line, want := range map[string][]string{
		"pushctl ro":                  {"room", "rooms"},
		"pushctl context s":           {"select"},
		"pushctl context select ":     {"prod", "stage"},
		"pushctl room r x --context ": {"prod", "stage"},
		"pushctl room r x --collap":   {"--collapse"},
		"pushctl room r x --ack ":     {"client", "node"},
		"pushctl nodes --output ":     {"json", "table", "wide", "yaml"},
		"pushctl explain b":           {"broadcast"},
	} {
		got := ask(line)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

func TestTheScriptOfEachShellCallsThisProgram(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for shell, want := range map[string]string{"bash": "complete -C ", "zsh": "bashcompinit", "fish": "commandline -cp"} {
		code, out, errOut := pushctl(t, "", "completion", shell)
		if code != exitOK || !strings.Contains(out, want) || !strings.Contains(out, filepath.Base(self)) {
			t.Errorf("%s: exit %d, %q, %q", shell, code, out, errOut)
		}
		path, err := exec.LookPath(shell)
		if err != nil {
			continue // only its words are tried
		}
		cmd := exec.Command(path, "-n") // reads, and runs nothing
		cmd.Stdin = strings.NewReader(out)
		if said, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", shell, err, said)
		}
	}
	if code, _, errOut := pushctl(t, "", "completion", "cmd"); code != exitUsage || !strings.Contains(errOut, "fish") {
		t.Errorf("exit %d, %q", code, errOut)
	}
}
