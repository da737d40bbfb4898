package invoke

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
)

// The path of this module.
const module = "github.com/push-manager/push-manager"

// As is how the command called name (pushctl, say) runs here: the program of that
// name beside this one or in the path, else from the source that this one was built
// of.
func As(name string) string {
	self, err := os.Executable()
	if err != nil {
		return name
	}
	_, file, _, _ := runtime.Caller(0)
	version := ""
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Path == module {
		version = info.Main.Version
	}
	return as(name, self, filepath.Dir(filepath.Dir(filepath.Dir(file))), version)
}

// as is As for a program at the path self, built of the source in root or of a
// version of the module.
func as(name, self, root, version string) string {
	inPath, err := exec.LookPath(name)
	if err != nil {
		inPath = ""
	}
	beside := filepath.Join(filepath.Dir(self), name)
	switch {
	case isFile(beside) && beside == inPath:
		return name
	case isFile(beside):
		return Quote(beside)
	case inPath != "" && !strings.Contains(self, "go-build"): // where go run puts it
		return name
	case isFile(filepath.Join(root, "cmd", name, "main.go")):
		return "go run -C " + Quote(root) + " ./cmd/" + name
	case inPath == "" && version != "" && version != "(devel)":
		return "go run " + module + "/cmd/" + name + "@" + version
	}
	return name
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// Quote makes a path one word of a shell.
func Quote(path string) string {
	plain := func(r rune) bool {
		return r == '/' || r == '.' || r == '-' || r == '_' || r == '+' || r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || r > 0x7f
	}
	if strings.IndexFunc(path, func(r rune) bool { return !plain(r) }) < 0 {
		return path
	}
	return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
}
