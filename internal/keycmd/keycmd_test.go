package keycmd

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/cli"
)

func command(args ...string) (code int, out, errOut string) {
	var o, e bytes.Buffer
	code = run(args, &o, &e)
	return code, o.String(), e.String()
}

// TestKeyIsPrintedAloneAndGoodByItsFile, whether the line is added to the file or copied.
func TestKeyIsPrintedAloneAndGoodByItsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys.yaml")
	verify := func(key string, want apikey.Key) {
		t.Helper()
		store, err := apikey.Open(apikey.Config{File: file})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		want.ID = key[4:12]
		if got, err := store.Verify(key); err != nil || got.ID != want.ID || got.Name != want.Name || got.Comment != want.Comment || got.NotAfter.IsZero() != want.NotAfter.IsZero() {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	code, out, errOut := command("new", "--name=billing", "--file="+file)
	first := strings.TrimSpace(out)
	if code != 0 || !strings.HasPrefix(first, apikey.Prefix) || strings.Contains(errOut, first) || !strings.Contains(errOut, file) {
		t.Fatalf("exit %d, %q, %q", code, out, errOut)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	code, out, errOut = command("new", "--name=billing", "--comment=rack \"4\"", "--not-after=2999-01-31", "--file="+file)
	second := strings.TrimSpace(out)
	if code != 0 {
		t.Fatalf("exit %d, %q", code, errOut)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	code, out, errOut = command("new", "--name=crm")
	third := strings.TrimSpace(out)
	_, line, _ := strings.Cut(errOut, "\n")
	line, _, _ = strings.Cut(line, "\n")
	if code != 0 || strings.Contains(errOut, third) {
		t.Fatalf("exit %d, %q", code, errOut)
	}
	if err := apikey.Append(file, line); err != nil {
		t.Fatal(err)
	}
	verify(first, apikey.Key{Name: "billing"})
	end, err := apikey.ParseTime("2999-01-31")
	if err != nil {
		t.Fatal(err)
	}
	verify(second, apikey.Key{Name: "billing", Comment: `rack "4"`, NotAfter: end})
	verify(third, apikey.Key{Name: "crm"})
	if entries, err := os.ReadDir(filepath.Dir(file)); err != nil || len(entries) != 1 {
		t.Errorf("%d files are left, %v", len(entries), err)
	}
}

func TestWhatKeysCannotDoIsOneLineAndNoKey(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	bad, open, locked := file("bad", "nonsense", 0o600), file("open", "", 0o644), file("locked", "", 0o600)
	lock := file("locked.new", "", 0o600)
	for name, tc := range map[string]struct {
		args []string
		code int
		text string
	}{
		"nothing":           {nil, cli.ExitUsage, "new"},
		"no name":           {[]string{"new"}, cli.ExitUsage, "--name"},
		"empty name":        {[]string{"new", "--name="}, cli.ExitUsage, "--name must not be empty"},
		"name of two":       {[]string{"new", "--name=a\nb"}, cli.ExitUsage, "--name must be"},
		"comment":           {[]string{"new", "--name=a", "--comment=a\nb"}, cli.ExitUsage, "--comment must be"},
		"no time":           {[]string{"new", "--name=a", "--not-after=soon"}, cli.ExitUsage, "--not-after: must be a time"},
		"time that is over": {[]string{"new", "--name=a", "--not-after=2020-01-01"}, cli.ExitUsage, "--not-after: is over"},
		"bad file":          {[]string{"new", "--name=a", "--file=" + bad}, cli.ExitFailed, bad + ":1:"},
		"file for others":   {[]string{"new", "--name=a", "--file=" + open}, cli.ExitFailed, "has mode 0644"},
		"a folder":          {[]string{"new", "--name=a", "--file=" + dir}, cli.ExitFailed, "is no regular file"},
		"no folder":         {[]string{"new", "--name=a", "--file=" + dir + "/no/keys"}, cli.ExitFailed, "no such file"},
		"another at work":   {[]string{"new", "--name=a", "--file=" + locked}, cli.ExitFailed, "another one is adding a key"},
		"unknown flag":      {[]string{"new", "--nope"}, cli.ExitUsage, "--nope"},
	} {
		code, out, text := command(tc.args...)
		if code != tc.code || out != "" || !strings.Contains(text, tc.text) || strings.Count(text, "\n") != 1 {
			t.Errorf("%s: exit %d, %q, %q", name, code, out, text)
		}
	}
	for path, want := range map[string]string{bad: "nonsense", open: "", locked: "", lock: ""} {
		if text, err := os.ReadFile(path); err != nil || string(text) != want {
			t.Errorf("%s holds %q, %v", path, text, err)
		}
	}
	if _, err := os.Stat(dir + ".new"); err == nil {
		t.Error("a lock is left")
	}
	if code, out, _ := command("--help"); code != 0 || !strings.Contains(out, "new") {
		t.Errorf("--help: exit %d, %q", code, out)
	}
}
