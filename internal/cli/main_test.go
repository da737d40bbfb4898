package cli

import (
	"io"
	"os"
	"strings"
	"testing"
)

func TestProgramThatThisBuildLacksExitsWith2AndOneLine(t *testing.T) {
	for _, args := range [][]string{{"dev"}, {"dev", "--nodes=3"}, {"dev", "--help"}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		was := os.Stderr
		os.Stderr = w
		code := Main(CommandLine{Name: "p", Commands: []Command{{Name: "serve"}, {Name: "dev", Missing: "not in this build"}}}, args)
		os.Stderr = was
		_ = w.Close()
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = r.Close()
		if code != ExitUsage || strings.TrimSpace(string(text)) != "p: dev: not in this build" {
			t.Errorf("%v: exit code %d, says %q", args, code, text)
		}
	}
}
