package devstack

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/cli"
)

// contents are the texts of all files in a directory by their paths in it.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	texts := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		texts[name] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return texts
}

// TestFilesAreKeptAndCertificatesRenewed opens a directory over the years.
func TestFilesAreKeptAndCertificatesRenewed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secure")
	begin := time.Now()
	open := func(nodes int, at time.Time) *secured {
		t.Helper()
		f, err := openSecured(dir, nodes, at)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{controllerName, managerName, callerName, "node-" + nodeID(nodes-1)} {
			if err := f.Check(name, at.AddDate(0, 6, -1)); err != nil {
				t.Errorf("%s half a year after a start at %v: %v", name, at, err)
			}
		}
		return f
	}
	open(1, begin)
	first := contents(t, dir)
	if err := os.WriteFile(filepath.Join(dir, policyFile), []byte("version: 1\ncallers: []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	open(2, begin.AddDate(0, 5, 0))
	second := contents(t, dir)
	for name, text := range first {
		if changed := second[name] != text; changed != (name == "alice.token" || name == policyFile) {
			t.Errorf("%s: changed %v", name, changed)
		}
	}
	if len(second) != len(first)+2 || second[policyFile] != "version: 1\ncallers: []\n" {
		t.Errorf("with a second node there are %d files, before there were %d; the policy is %q", len(second), len(first), second[policyFile])
	}
	open(2, begin.AddDate(0, 7, 0))
	for name, text := range contents(t, dir) {
		renewed := text != second[name]
		old := strings.Contains(name, "-") && !strings.HasPrefix(name, "api-") && !strings.HasPrefix(name, "node-"+nodeID(1)) // authorities last longer
		if old != renewed && name != "alice.token" {
			t.Errorf("%s: renewed %v", name, renewed)
		}
	}
	open(2, begin.AddDate(11, 0, 0)) // its authority has ended
}

func TestHalfOfTheCallersFilesIsAnError(t *testing.T) {
	for _, name := range []string{policyFile, keysFile, keyFile} {
		dir := filepath.Join(t.TempDir(), "secure")
		if _, err := openSecured(dir, 1, time.Now()); err != nil {
			t.Fatal(err)
		}
		before := contents(t, dir)
		delete(before, name)
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := openSecured(dir, 1, time.Now()); err == nil || !strings.Contains(err.Error(), "remove it") {
			t.Errorf("without %s: %v", name, err)
		}
		after := contents(t, dir)
		for _, kept := range []string{policyFile, keysFile, keyFile} {
			if text, ok := before[kept]; ok && after[kept] != text {
				t.Errorf("without %s: %s is overwritten", name, kept)
			}
		}
	}
}

// TestDirectoryOfOthersIsNotTrusted: whoever may write there could be the authority.
func TestDirectoryOfOthersIsNotTrusted(t *testing.T) {
	for mode, good := range map[os.FileMode]bool{0o700: true, 0o755: true, 0o775: false, 0o1777: false} {
		dir := filepath.Join(t.TempDir(), "secure")
		if err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, mode)); err != nil {
			t.Fatal(err)
		}
		_, err := openSecured(dir, 1, time.Now())
		if (err == nil) != good || err != nil && !strings.Contains(err.Error(), dir+": others may write there") {
			t.Errorf("%o: %v", mode, err)
		}
		if info, err := os.Stat(dir); err != nil || good && info.Mode().Perm() != 0o700 {
			t.Errorf("%o: then %v, %v", mode, info.Mode(), err)
		}
		if files := contents(t, dir); !good && len(files) > 0 {
			t.Errorf("%o: %d files are written", mode, len(files))
		}
	}
}

// TestSettingsOfASecureStackAreGoodWhereOthersReachIt: nothing that the startup rule asks for is missing.
func TestSettingsOfASecureStackAreGoodWhereOthersReachIt(t *testing.T) {
	f, err := openSecured(filepath.Join(t.TempDir(), "secure"), 1, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	plain := func() map[string]string {
		return map[string]string{"LISTEN_ADDRESS": "0.0.0.0", "ETCD_ENDPOINTS": "192.0.2.1:2379"}
	}
	for name, fill := range map[string]func(values map[string]string) error{
		"controller":   func(v map[string]string) error { return cli.Fill(&controller.Config{}, v) },
		"push-manager": func(v map[string]string) error { return cli.Fill(&pushmanager.Config{}, v) },
		"connect-node": func(v map[string]string) error { return cli.Fill(&connectnode.Config{}, v) },
	} {
		secure := map[string]map[string]string{
			"controller": f.controller(plain()), "push-manager": f.pushManager(plain()), "connect-node": f.node(nodeID(0), plain()),
		}[name]
		if err := fill(secure); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if fill(plain()) == nil {
			t.Errorf("%s starts without", name)
		}
	}
}
