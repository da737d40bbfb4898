package buildinfo

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
)

func TestVersionIsOneLineForPeopleAndOneObjectForPrograms(t *testing.T) {
	var people, programs bytes.Buffer
	if err := Write(&people, "p", false); err != nil {
		t.Fatal(err)
	}
	if err := Write(&programs, "p", true); err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(programs.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got["name"] != "p" || got["go"] != runtime.Version() || got["os"] != runtime.GOOS || got["arch"] != runtime.GOARCH || got["version"] == "" {
		t.Errorf("%v", got)
	}
	if want := "p " + Version() + "\n"; people.String() != want || strings.Count(programs.String(), "\n") != 1 {
		t.Errorf("%q and %q, want %q and one line", &people, &programs, want)
	}
}

func TestVersionIsTheModulesElseTheCommit(t *testing.T) {
	commit := []debug.BuildSetting{{Key: "vcs.revision", Value: "abc"}, {Key: "vcs.modified", Value: "true"}, {Key: "-tags", Value: "nodev"}}
	for version, want := range map[string]string{"v1.2.3": "v1.2.3", "(devel)": ""} {
		var i Info
		i.fill(&debug.BuildInfo{Main: debug.Module{Version: version}, Settings: commit})
		if i.Version != want || i.Commit != "abc" || !i.Modified || i.Tags != "nodev" {
			t.Errorf("%s: %+v", version, i)
		}
	}
}

// TestTheLinkerSetsTheVersion: under the names that deploy/docker/Dockerfile uses, which the linker would ignore if they were wrong.
func TestTheLinkerSetsTheVersion(t *testing.T) {
	const pkg = "github.com/push-manager/push-manager/internal/buildinfo."
	dockerfile, err := os.ReadFile("../../deploy/docker/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	flags := "-X " + pkg + "version=v9.8.7 -X " + pkg + "commit=abc -X " + pkg + "created=2026-01-02T03:04:05Z"
	for _, variable := range []string{"version=${VERSION}", "commit=${REVISION}", "created=${CREATED}"} {
		if !strings.Contains(string(dockerfile), "-X "+pkg+variable) {
			t.Errorf("the Dockerfile does not set %s", variable)
		}
	}
	exe := filepath.Join(t.TempDir(), "test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-ldflags", flags, "-o", exe, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	run := exec.CommandContext(t.Context(), exe, "-test.run=^TestVersionOfALinkedBuild$", "-test.v")
	run.Env = append(os.Environ(), "LINKED=true")
	if out, err := run.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestVersionOfALinkedBuild") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestVersionOfALinkedBuild runs in the process that TestTheLinkerSetsTheVersion starts.
func TestVersionOfALinkedBuild(t *testing.T) {
	if os.Getenv("LINKED") == "" {
		t.Skip("is run by TestTheLinkerSetsTheVersion")
	}
	if i := Read("p"); i.Version != "v9.8.7" || i.Commit != "abc" || i.Time != "2026-01-02T03:04:05Z" {
		t.Errorf("%+v", i)
	}
}
