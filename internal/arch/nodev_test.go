package arch

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestNoEtcdServerWithoutTheDevelopmentStack: -tags nodev leaves it out of images and releases.
func TestNoEtcdServerWithoutTheDevelopmentStack(t *testing.T) {
	deps := func(tags string) []string {
		list := exec.CommandContext(t.Context(), "go", "list", "-deps", "-tags", tags, "./cmd/push-manager")
		list.Dir = root
		out, err := list.Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(out))
	}
	server := func(pkg string) bool {
		return within("go.etcd.io/etcd/server/v3", pkg) || within(module+"/internal/devstack", pkg)
	}
	if !slices.ContainsFunc(deps(""), server) {
		t.Error("the development stack has no etcd server: this test looks for the wrong packages")
	}
	for _, pkg := range deps("nodev") {
		if server(pkg) {
			t.Errorf("a build without the development stack has %s", pkg)
		}
	}
}
