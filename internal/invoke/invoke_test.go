package invoke

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestTheLineRunsInAnyFolder(t *testing.T) {
	bin, path, root, alone := t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	beside := write(t, filepath.Join(bin, "pushctl"))
	write(t, filepath.Join(root, "cmd", "pushctl", "main.go"))
	odd := filepath.Join(t.TempDir(), "it's a folder")
	write(t, filepath.Join(odd, "cmd", "pushctl", "main.go"))
	for name, tc := range map[string]struct {
		path, self, root, version, want string
	}{
		"beside":                          {"", filepath.Join(bin, "push-manager"), root, "", beside},
		"beside, in the path":             {bin, filepath.Join(bin, "push-manager"), root, "", "pushctl"},
		"in the path":                     {bin, filepath.Join(alone, "push-manager"), root, "", "pushctl"},
		"go run":                          {path, filepath.Join(alone, "go-build1", "b001", "exe", "push-manager"), root, "(devel)", "go run -C " + root + " ./cmd/pushctl"},
		"go run, another one in the path": {bin, filepath.Join(alone, "go-build1", "exe", "push-manager"), root, "", "go run -C " + root + " ./cmd/pushctl"},
		"go run of a version":             {"", filepath.Join(alone, "go-build1", "exe", "push-manager"), alone, "v1.2.3", "go run " + module + "/cmd/pushctl@v1.2.3"},
		"built alone":                     {"", filepath.Join(alone, "push-manager"), root, "", "go run -C " + root + " ./cmd/pushctl"},
		"odd folder":                      {"", filepath.Join(alone, "push-manager"), odd, "", `go run -C '` + strings.ReplaceAll(odd, "'", `'\''`) + `' ./cmd/pushctl`},
		"nothing is known":                {"", filepath.Join(alone, "push-manager"), alone, "(devel)", "pushctl"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("PATH", tc.path)
			if got := as("pushctl", tc.self, tc.root, tc.version); got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}

func TestTheSourceOfThisBuildIsFound(t *testing.T) {
	t.Setenv("PATH", "")
	if got := As("pushctl"); !strings.HasPrefix(got, "go run -C ") || !strings.HasSuffix(got, " ./cmd/pushctl") {
		t.Errorf("%q", got)
	}
}
