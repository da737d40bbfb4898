package ids

import (
	"errors"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// FuzzCheck holds the loop over bytes against the rule as the standard library has it.
func FuzzCheck(f *testing.F) {
	for _, id := range []string{
		"u", "", strings.Repeat("x", 256), strings.Repeat("x", 257), "a\x00b", "\x1b[31m", "\x7f", "\u0085", "é", "\xff", "\xc3", "a\xffb", "\ufffd", "\U0010ffff",
	} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, id string) {
		var want error
		switch {
		case id == "":
			want = ErrEmpty
		case len(id) > MaxBytes:
			want = ErrTooLong
		case !utf8.ValidString(id) || strings.ContainsFunc(id, unicode.IsControl):
			want = ErrMalformed
		}
		if err := Check(id, MaxBytes); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", id, err, want)
		}
		if err := Check([]byte(id), MaxBytes); !errors.Is(err, want) {
			t.Errorf("%q as bytes: %v, want %v", id, err, want)
		}
	})
}

func TestCheckAllocatesNothing(t *testing.T) {
	id := []byte("пользователь-用户-1")
	if n := testing.AllocsPerRun(100, func() { _ = Check(id, MaxBytes) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
