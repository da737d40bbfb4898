package apikey

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newKey is a key for billing and its line.
func newKey(t testing.TB, notAfter time.Time) (key, line string) {
	t.Helper()
	key, line, err := New("billing", notAfter, "")
	if err != nil {
		t.Fatal(err)
	}
	return key, line
}

func write(t testing.TB, path string, lines ...string) {
	t.Helper()
	// As everything that is read while it changes: a rename, or readers see the half of it.
	if err := os.WriteFile(path+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, cfg Config) *Store {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// TestKeyIsGoodForItsLineAlone: what New makes is verified by its line, and one character that is another makes it none.
func TestKeyIsGoodForItsLineAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	rapid.Check(t, func(r *rapid.T) {
		name := rapid.StringMatching(`[^\pC]{1,40}`).Draw(r, "name")
		comment := rapid.StringMatching(`[^\pC]{0,40}`).Draw(r, "comment")
		var notAfter time.Time
		if rapid.Bool().Draw(r, "ends") {
			notAfter = time.Now().Add(time.Hour).UTC().Truncate(time.Second)
		}
		key, line, err := New(name, notAfter, comment)
		if err != nil {
			r.Fatal(err)
		}
		_, other := newKey(t, time.Time{})
		write(t, path, other, line)
		list, err := read(path)
		if err != nil {
			r.Fatalf("%v\n%s", err, line)
		}
		s := &Store{}
		s.current.Store(list)
		want := Key{ID: key[4:12], Name: name, Comment: comment, NotAfter: notAfter}
		if got, err := s.Verify(key); err != nil || got != want {
			r.Fatalf("%+v, %v, want %+v", got, err, want)
		}
		at := rapid.IntRange(0, len(key)-1).Draw(r, "at")
		with := rapid.Byte().Filter(func(b byte) bool { return b != key[at] }).Draw(r, "with")
		changed := key[:at] + string([]byte{with}) + key[at+1:]
		if got, err := s.Verify(changed); err != Malformed || got != (Key{}) {
			r.Fatalf("changed at %d: %+v, %v", at, got, err)
		}
	})
}
