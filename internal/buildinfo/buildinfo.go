// Package buildinfo tells what a program was built from.
package buildinfo

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
)

// What the linker sets (-X) where Go finds no repository, as in the build of a container image. It comes before what Go knows.
//
//nolint:gochecknoglobals // the linker can set nothing else
var version, commit, created string

// Info is what is known of a build. It is the object that `version --json` prints: fields are added, never changed.
type Info struct {
	Name     string `json:"name"`
	Version  string `json:"version"`            // of the module, or the commit; devel: neither is known
	Commit   string `json:"commit,omitempty"`   // empty: not built in a repository
	Time     string `json:"time,omitempty"`     // of the commit
	Modified bool   `json:"modified,omitempty"` // there were changes that are in no commit
	Tags     string `json:"tags,omitempty"`
	Go       string `json:"go"`
	OS       string `json:"os"`
	Arch     string `json:"arch"`
}

// Read returns what is known of this process.
func Read(name string) Info {
	i := Info{Name: name, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	if build, ok := debug.ReadBuildInfo(); ok {
		i.fill(build)
	}
	i.Commit, i.Time = cmp.Or(commit, i.Commit), cmp.Or(created, i.Time)
	i.Version = cmp.Or(version, i.Version, i.Commit, "devel")
	return i
}

func (i *Info) fill(build *debug.BuildInfo) {
	if v := build.Main.Version; v != "(devel)" {
		i.Version = v
	}
	for _, s := range build.Settings {
		switch s.Key {
		case "vcs.revision":
			i.Commit = s.Value
		case "vcs.time":
			i.Time = s.Value
		case "vcs.modified":
			i.Modified = s.Value == "true"
		case "-tags":
			i.Tags = s.Value
		}
	}
}

// Version is the version of this process.
func Version() string { return Read("").Version }

// Write prints one line: name and version, or all as JSON.
func Write(w io.Writer, name string, asJSON bool) error {
	i := Read(name)
	if !asJSON {
		_, err := fmt.Fprintln(w, i.Name, i.Version)
		return err
	}
	return json.NewEncoder(w).Encode(i)
}
