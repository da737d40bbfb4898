package arch

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestUnitsOfSystemdAreValidAndConfined: systemd itself reads them, and finds them exposed to 2.0 of 10 at most.
func TestUnitsOfSystemdAreValidAndConfined(t *testing.T) {
	program, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("there is no systemd-analyze (Debian: package systemd)")
	}
	dir := t.TempDir()
	exe := filepath.Join(dir, "push-manager")
	if err := os.WriteFile(exe, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, file := range files(t) {
		if !strings.HasPrefix(file, "deploy/systemd/") {
			continue
		}
		found++
		text := read(t, file)
		if !strings.Contains(text, "ExecStart=/usr/bin/push-manager ") {
			t.Errorf("%s does not start push-manager", file)
		}
		unit := filepath.Join(dir, filepath.Base(file))
		if err := os.WriteFile(unit, []byte(strings.ReplaceAll(text, "/usr/bin/push-manager", exe)), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"verify", unit}, {"security", "--offline=yes", "--threshold=20", "--no-pager", unit}} {
			out, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput()
			if err != nil || args[0] == "verify" && regexp.MustCompile(`(?m)^.*`+filepath.Base(file)+`.*:`).Match(out) {
				t.Errorf("%s: systemd-analyze %s: %v\n%s", file, args[0], err, out)
			}
		}
	}
	if found != 3 {
		t.Errorf("%d units, and there are three programs", found)
	}
}
