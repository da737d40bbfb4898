// Package programs has the commands of this module built for tests that run them as processes.
//
// A link of Push-Manager takes many seconds of a processor. So each command is built once for a test binary, and where the
// environment names a folder with all of them (PROGRAMS, as `make test` does), not at all. They are as people run them:
// what they do is under the race detector in the tests of their packages, and five times slower with it. RACE_PROGRAMS has
// them built with it.
package programs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// The environment that tests heed.
const (
	dirEnv  = "PROGRAMS"      // a folder with all commands, of the same source
	raceEnv = "RACE_PROGRAMS" // not empty: build them, with the race detector
)

// built are the commands of this process.
var built struct { //nolint:gochecknoglobals // All tests of a binary share them.
	mu  sync.Mutex
	dir string
}

// Path is where the command cmd/name is. It fails the test if it does not build.
func Path(tb testing.TB, name string) string {
	tb.Helper()
	dir, err := Build(name)
	if err != nil {
		tb.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// Build builds commands by their names, if nobody has, and returns the folder that they are in. Remove removes it.
func Build(names ...string) (dir string, err error) {
	if dir = os.Getenv(dirEnv); dir != "" && !Race() {
		return dir, nil
	}
	built.mu.Lock()
	defer built.mu.Unlock()
	if built.dir == "" {
		if built.dir, err = os.MkdirTemp("", "push-manager-programs-"); err != nil {
			return "", fmt.Errorf("make a folder for programs: %w", err)
		}
	}
	args := []string{"build", "-o", built.dir + "/"}
	if Race() {
		args = append(args, "-race")
	}
	missing := false
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(built.dir, name)); err != nil {
			missing = true
			args = append(args, "github.com/push-manager/push-manager/cmd/"+name)
		}
	}
	if !missing {
		return built.dir, nil
	}
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %v: %w\n%s", names, err, out)
	}
	return built.dir, nil
}

// Race tells whether the commands are built with the race detector.
func Race() bool { return os.Getenv(raceEnv) != "" }

// Remove removes what this process has built. It is for TestMain.
func Remove() error {
	built.mu.Lock()
	defer built.mu.Unlock()
	dir := built.dir
	built.dir = ""
	if dir == "" {
		return nil
	}
	return os.RemoveAll(dir)
}
