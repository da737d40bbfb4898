package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPushManagerUnderTheNameOfPushctlIsPushctl: as in the container image.
func TestPushManagerUnderTheNameOfPushctlIsPushctl(t *testing.T) {
	link := filepath.Join(t.TempDir(), "pushctl")
	if err := os.Symlink(filepath.Join(binaries, "push-manager"), link); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), link, "version").CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "pushctl ") {
		t.Errorf("%v: %q", err, out)
	}
}
