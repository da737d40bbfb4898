package plain_test

import (
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/push-manager/push-manager/internal/plain"
)

func TestLine(t *testing.T) {
	for text, want := range map[string]string{
		"":                          "",
		"queue is full":             "queue is full",
		"two\nlines\tand a \x1b[1m": "two lines and a  [1m",
		"not \xff UTF-8":            "not   UTF-8",
		"zażółć, \u200djoined":      "zażółć,  joined",
		"12345678901234567890":      "1234567890123456",
		"12345678901234ż89":         "12345678901234ż",
		"123456789012345ż9":         "123456789012345",
	} {
		if len(want) > 16 {
			if got := plain.Line(text, 100); got != want {
				t.Errorf("%q: %q, want %q", text, got, want)
			}
		} else if got := plain.Line(text, 16); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func FuzzLine(f *testing.F) {
	f.Add("a\nb\xffc\u2028d", 3)
	f.Fuzz(func(t *testing.T, text string, most int) {
		most &= 0xfff
		got := plain.Line(text, most)
		if len(got) > most || !utf8.ValidString(got) {
			t.Fatalf("%q of %q", got, text)
		}
		for _, r := range got {
			if !unicode.IsPrint(r) {
				t.Fatalf("%q of %q", got, text)
			}
		}
	})
}
