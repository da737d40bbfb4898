package engine

import (
	"errors"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// FuzzLimits asks for pushes of all kinds with any ids. What is let through is within
// the limits, and what is not names its field and a code.
func FuzzLimits(f *testing.F) {
	for _, id := range []string{
		"u", "", strings.Repeat("x", 256), strings.Repeat("x", 257), "a\x00b", "a\nb", "\x1b[31m", "\x7f", "\u0085", "é", "\xff", "\xc3", "a\xffb", "/", "..", "аdmin", "\ufffd", "\U0010ffff",
	} {
		for kind := range uint8(6) {
			f.Add(kind, id, "other", 1, int64(0), 1, 1)
			f.Add(kind, "other", id, 0, int64(-1), 33, 8<<10)
		}
	}
	limits := Limits{}.withDefaults()
	f.Fuzz(func(t *testing.T, kind uint8, one, two string, size int, timestamp int64, entries, metadata int) {
		p := &Push{Request: Request{
			Kind: Kind(kind % 6), Room: one, User: one, Users: []string{one, two}, Exclude: []string{two},
			Content: Content{Present: true, DataLen: size, Timestamp: timestamp, MetadataEntries: entries, MetadataBytes: metadata},
		}}
		err := limits.Check(&p.Request)
		var invalid *InvalidError
		switch {
		case err != nil && !errors.As(err, &invalid):
			t.Fatalf("%v is no InvalidError", err)
		case err != nil && (invalid.Field == "" || invalid.Code == "" || !utf8.ValidString(invalid.Error())):
			t.Fatalf("%+v says too little", invalid)
		case err != nil:
			return
		}
		ids := map[Kind][]string{ToRoom: {one, two}, ToUser: {one}, ToUsers: {one, two}, ToAll: nil}
		named, ok := ids[p.Kind]
		if !ok {
			t.Fatalf("kind %d was taken", p.Kind)
		}
		for _, id := range named {
			if id == "" || len(id) > limits.IDBytes || !utf8.ValidString(id) || strings.ContainsFunc(id, unicode.IsControl) {
				t.Fatalf("the id %q was taken", id)
			}
		}
		if size > limits.DataBytes || timestamp < 0 || entries > limits.MetadataEntries || metadata > limits.MetadataBytes {
			t.Fatalf("%+v was taken", p.Content)
		}
	})
}
