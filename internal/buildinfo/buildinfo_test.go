package buildinfo

import (
	"bytes"
	"encoding/json"
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
