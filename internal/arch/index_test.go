package arch

import (
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestEveryFileIsInTheIndex: docs/architecture.md says of each file once what is decided there, and of none that is gone.
// Left out is what the map of packages says enough of: commands, examples, the documents.
func TestEveryFileIsInTheIndex(t *testing.T) {
	all := files(t)
	listed := map[string]int{}
	for _, entry := range index(t) {
		for _, name := range entry.names {
			listed[name]++
		}
		for _, name := range slices.Concat(entry.names, entry.mentions) {
			if !slices.Contains(all, name) {
				t.Errorf("docs/architecture.md, where to look: no file %s:\n%s", name, entry.line)
			}
		}
	}
	for _, name := range all {
		first, _, _ := strings.Cut(name, "/")
		switch ext := path.Ext(name); {
		case slices.Contains([]string{"cmd", "examples", "docs"}, first), within("proto/third_party", name):
			continue
		case ext == ".go" && (strings.HasSuffix(name, ".pb.go") || strings.HasSuffix(name, "_test.go") || path.Base(name) == "doc.go"):
			continue
		case ext != ".go" && ext != ".mk" && ext != ".proto" && path.Base(name) != "page.html":
			continue
		}
		if n := listed[name]; n != 1 {
			t.Errorf("%s stands %d times in docs/architecture.md, where to look; want once, with what is decided there", name, n)
		}
	}
}

// indexEntry is a line of the index. Its names are from the repository's root.
type indexEntry struct {
	line     string
	names    []string // the files that the line is about
	mentions []string // other files
}

// index reads the index: a line that begins with a bold folder, or with several, and below it a list of files. A file is
// relative to the only folder above it, in a table to that of the file before it, or to the root.
func index(t *testing.T) (entries []indexEntry) {
	t.Helper()
	_, text, found := strings.Cut(read(t, "docs/architecture.md"), "\n## Where to look\n")
	if !found {
		t.Fatal("docs/architecture.md has no section Where to look")
	}
	text, _, _ = strings.Cut(text, "\n## ")
	all, file := files(t), regexp.MustCompile("`([^` ]+\\.(?:go|mk|proto|html))`")
	dir := ""
	for line := range strings.SplitSeq(text, "\n") {
		if rest, ok := strings.CutPrefix(line, "**"); ok {
			bold, _, _ := strings.Cut(rest, "**")
			dir = strings.Trim(bold, "`")
			if strings.Contains(dir, "`") {
				dir = "" // several
			}
			continue
		}
		item, isItem := strings.CutPrefix(line, "- ")
		own, _, says := strings.Cut(item, ": ")
		if isItem && (!says || !file.MatchString(own)) {
			t.Errorf("docs/architecture.md, where to look: want - `FILE`: what is decided there:\n%s", line)
		}
		entry, here := indexEntry{line: line}, dir
		for i, at := range file.FindAllStringSubmatchIndex(line, -1) {
			name := line[at[2]:at[3]]
			if strings.Contains(name, "*") || !isItem && here == "" && !strings.Contains(name, "/") {
				continue // of several packages
			}
			if inside := path.Join(here, name); !strings.Contains(name, "/") || slices.Contains(all, inside) {
				name = inside
			}
			if !isItem {
				here = path.Dir(name)
			}
			if isItem && (i == 0 || at[1] <= len("- ")+len(own)) {
				entry.names = append(entry.names, name)
			} else {
				entry.mentions = append(entry.mentions, name)
			}
		}
		entries = append(entries, entry)
	}
	return entries
}
