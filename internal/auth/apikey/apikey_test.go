package apikey

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
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
		if got, err := s.Verify(changed); !errors.Is(err, Malformed) || got != (Key{}) {
			r.Fatalf("changed at %d: %+v, %v", at, got, err)
		}
	})
}

func TestKeysOfTheFileAreVerified(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	first, firstLine := newKey(t, time.Time{})
	second, secondLine := newKey(t, time.Now().Add(time.Hour)) // a caller may have two
	old, oldLine := newKey(t, time.Now().Add(-time.Second))
	short, shortLine := newKey(t, time.Time{})
	shortLine = shortLine[:idLen+2] + shortLine[strings.Index(shortLine, hashPrefix):strings.Index(shortLine, `", name`)] // id: sha256:<hex>
	unknown, _ := newKey(t, time.Time{})
	write(t, path, "# comment", firstLine, secondLine, "", oldLine, shortLine)
	s := open(t, Config{File: path})
	foreign := first[:len(Prefix)+idLen+1] + second[len(Prefix)+idLen+1:len(first)-sumLen-1] // the secret of another key
	sum := checksum([]byte(foreign))
	foreign += "_" + string(sum[:])
	for name, tc := range map[string]struct {
		key  string
		want error
	}{
		"first":                {first, nil},
		"second":               {second, nil},
		"line of the hash":     {short, nil},
		"not in the file":      {unknown, Unknown},
		"secret of another":    {foreign, Unknown},
		"ended":                {old, Expired},
		"empty":                {"", Malformed},
		"prefix":               {Prefix, Malformed},
		"cut off":              {first[:len(first)-1], Malformed},
		"one more":             {first + "0", Malformed},
		"line break":           {first + "\n", Malformed},
		"in capitals":          {strings.ToUpper(first), Malformed},
		"with Bearer":          {"Bearer " + first, Malformed},
		"another prefix":       {"pmx_" + first[4:], Malformed},
		"a megabyte":           {strings.Repeat(first, 16_000), Malformed},
		"hash in place of key": {firstLine, Malformed},
	} {
		t.Run(name, func(t *testing.T) {
			if key, err := s.Verify(tc.key); !errors.Is(err, tc.want) || (err == nil) != (key.ID != "") {
				t.Errorf("%+v, %v, want %v", key, err, tc.want)
			}
		})
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = s.Verify(first) }); n > 1 {
		t.Errorf("%v allocations", n)
	}
}

func TestChecksumIsThatOfTheDocument(t *testing.T) {
	// Computed apart from this package: CRC-32 of "123456789" is cbf43926 (the check value of its catalogue).
	if got := checksum([]byte("123456789")); string(got[:]) != "3jZRME" {
		t.Errorf("%s", got)
	}
	if got := checksum(nil); string(got[:]) != "000000" {
		t.Errorf("%s", got)
	}
}

// TestFileIsTakenOverAsAWhole each interval and with Reload: keys that are gone are refused, a bad file changes nothing.
func TestFileIsTakenOverAsAWhole(t *testing.T) {
	a, aLine := newKey(t, time.Time{})
	b, bLine := newKey(t, time.Time{})
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "keys")
		write(t, path, aLine)
		var log bytes.Buffer
		s, err := Open(Config{File: path, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		wants := func(key string, want error) {
			t.Helper()
			if _, err := s.Verify(key); !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
		}
		wants(a, nil)
		wants(b, Unknown)

		write(t, path, aLine, bLine)
		time.Sleep(DefaultReloadInterval + time.Second)
		wants(a, nil)
		wants(b, nil)
		both := s.Generation()
		if both == 0 {
			t.Error("verdicts from before stay")
		}

		write(t, path, bLine, "half of a li")
		time.Sleep(10 * DefaultReloadInterval)
		synctest.Wait() // then nobody writes to the log
		wants(a, nil)
		if n := strings.Count(log.String(), "level=ERROR"); n != 1 || s.Generation() != both {
			t.Errorf("said %d times, generation %d", n, s.Generation())
		}

		write(t, path, bLine)
		s.Reload()
		synctest.Wait()
		wants(a, Unknown)
		wants(b, nil)
		if s.Generation() == both {
			t.Error("a key was withdrawn, and verdicts about it stay")
		}
		for _, nothing := range []string{"", "\n\n", "# no keys"} { // as while it is written
			write(t, path, nothing)
			s.Reload()
			synctest.Wait()
			wants(b, nil)
			if err := Check(path); err == nil || !strings.Contains(err.Error(), path+":1: ") {
				t.Errorf("%q at the start: %v", nothing, err)
			}
		}
		write(t, path, "{}")
		s.Reload()
		synctest.Wait()
		wants(b, Unknown)
		if err := Append(path, aLine); err != nil {
			t.Error(err)
		}
		s.Reload()
		synctest.Wait()
		wants(a, nil)
		if text := log.String(); strings.Contains(text, hashPrefix) {
			t.Errorf("hashes in the log: %s", text)
		}
	})
}

func TestKeyEndsWhenItSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key, line := newKey(t, time.Now().Add(time.Minute))
		list, err := parse([]byte(line))
		if err != nil {
			t.Fatal(err)
		}
		s := &Store{}
		s.current.Store(list)
		time.Sleep(time.Minute - time.Nanosecond)
		if _, err := s.Verify(key); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Nanosecond)
		if _, err := s.Verify(key); !errors.Is(err, Expired) {
			t.Error(err)
		}
	})
}

// TestBadFileIsRefusedByLineAndId, without a word of a hash.
func TestBadFileIsRefusedByLineAndId(t *testing.T) {
	_, line := newKey(t, time.Time{})
	id, hash := line[:idLen], line[strings.Index(line, hashPrefix):strings.Index(line, `", name`)]
	for text, want := range map[string]string{
		line + "\n" + line:                                         "2: key " + id + " is there twice",
		"short: " + hash:                                           "1: the id of a key has 8 letters",
		"a/b/c/d/: " + hash:                                        "1: the id of a key has 8 letters",
		id + ": " + hash[:len(hash)-1]:                             "must be sha256: and 64 hexadecimal digits",
		id + ": " + hash + "0":                                     "must be sha256: and 64 hexadecimal digits",
		id + ": " + strings.TrimPrefix(hash, hashPrefix):           "must be sha256: and 64 hexadecimal digits",
		id + ": {name: x}":                                         "hash: missing",
		id + ": {hash: " + hash + ", notafter: 2027-01-01}":        "has a field that is none of hash",
		id + ": {hash: " + hash + ", not_after: soon}":             "not_after: must be a time such as",
		id + ": {hash: " + hash + ", not_after: }":                 "not_after: must be a time such as",
		id + ": {hash: " + hash + ", hash: " + hash + "}":          "a field is set twice",
		id + ": {hash: [" + hash + "]}":                            "a field must be a text",
		id + ": [" + hash + "]":                                    "must be a hash, or a section with one",
		"- " + line:                                                "1: must hold lines such as",
		line + "\n---\n" + line:                                    "must be one YAML document",
		"{" + hash:                                                 "is no YAML",
		id + ": {hash: " + hash + ", name: \"a\\nb\"}":             "name: must be valid UTF-8 without control characters",
		id + ": &a {hash: " + hash + "}\nabcdefgh: *a":             "key abcdefgh: must be a hash",
		id + ": {hash: " + hash + ", <<: {not_after: 2027-01-01}}": "a field must be a text",
	} {
		_, err := parse([]byte(text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), hash[len(hashPrefix):len(hashPrefix)+16]) {
			t.Errorf("shows a hash: %v", err)
		}
	}
}

func TestFileThatOthersCanReadIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	_, line := newKey(t, time.Time{})
	write(t, path, line)
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o640: true, 0o440: true, 0o644: false, 0o604: false, 0o602: false, 0o601: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := Check(path); (err == nil) != ok {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	if err := Check("/dev/zero"); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Error(err)
	}
}

// FuzzFile gives any text as a file of keys. What is taken has ids that keys can have, and errors begin with a line.
func FuzzFile(f *testing.F) {
	_, line := newKey(f, time.Now())
	for _, text := range []string{line, line[:idLen] + ": " + hashPrefix, "", "#", "abcdefgh: {}", "abcdefgh: &a [*a]", "? []\n: 1", "a: !!binary x", "{abcdefgh: {hash: x, not_after: 2027-01-01}}", "\xff", "---\n---\n"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := parse(text)
		if (list == nil) == (err == nil) {
			t.Fatalf("%+v, %v", list, err)
		}
		if err != nil {
			if at, _, ok := strings.Cut(err.Error(), ":"); !ok || strings.Trim(at, "0123456789") != "" || strings.Contains(err.Error(), "\n") {
				t.Errorf("says %q", err)
			}
			return
		}
		for id, e := range list.byID {
			if id != e.ID || !IsID(id) {
				t.Errorf("took %+v", e)
			}
		}
	})
}

// FuzzVerify gives any text as a key: none is good but the one that is.
func FuzzVerify(f *testing.F) {
	path := filepath.Join(f.TempDir(), "keys")
	key, line := newKey(f, time.Time{})
	write(f, path, line)
	s := open(f, Config{File: path})
	other, _ := newKey(f, time.Time{})
	for _, text := range []string{key, other, "", Prefix, strings.Repeat("_", len(key)), key[:20] + "\xff" + key[21:]} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if got, err := s.Verify(text); (err == nil) != (text == key) {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	path := filepath.Join(b.TempDir(), "keys")
	key, line := newKey(b, time.Time{})
	unknown, _ := newKey(b, time.Time{})
	write(b, path, line)
	s := open(b, Config{File: path})
	for name, raw := range map[string]string{"known": key, "unknown": unknown} {
		b.Run("key="+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, _ = s.Verify(raw)
			}
		})
	}
}
