package arch

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestEachPackageSaysOnceWhatItIsFor: one package comment, in doc.go, in a command's main.go or in the only file.
func TestEachPackageSaysOnceWhatItIsFor(t *testing.T) {
	packages := map[string][]source{}
	for _, src := range sources(t) {
		if !src.test() {
			packages[src.dir] = append(packages[src.dir], src)
		}
	}
	for dir, all := range packages {
		var commented []string
		written := slices.DeleteFunc(slices.Clone(all), source.generated)
		for _, src := range all {
			if src.file.Doc == nil {
				continue
			}
			commented = append(commented, src.name)
			name := src.file.Name.Name
			if name != "main" && !strings.HasPrefix(src.file.Doc.Text(), "Package "+name+" ") {
				t.Errorf("%s: the package comment does not start with %q", src.path(), "Package "+name)
			}
			only := len(written) == 1 && written[0].name == src.name
			inMain := name == "main" && src.name == "main.go"
			if src.name != "doc.go" && !inMain && !only && !src.generated() {
				t.Errorf("%s: the package comment belongs into doc.go", src.path())
			}
		}
		if len(commented) != 1 {
			t.Errorf("%s: %d package comments %v, want one", dir, len(commented), commented)
		}
	}
}

// TestWhatIsNotForOthersSaysSo: a package that others can import is for them, or says that it is not.
func TestWhatIsNotForOthersSaysSo(t *testing.T) {
	const sentence = "It is for Push-Manager itself: its API changes without notice."
	public := []string{"client", "client/clienttest", "client/etcdresolver", "proto", "sdk/browser", "transport/node", "transport/node/membership"}
	for _, src := range sources(t) {
		if src.test() || src.file.Doc == nil || src.file.Name.Name == "main" || within("internal", src.dir) || within("benchmarks", src.dir) || src.dir == "examples" {
			continue
		}
		if says := strings.Contains(src.file.Doc.Text(), sentence); says == slices.Contains(public, src.dir) {
			t.Errorf("%s is public: %v, says that it is not: %v", src.dir, !says, says)
		}
	}
}

// TestEveryPackageIsOnTheMap: docs/architecture.md has a row for each, in which a stranger finds it.
func TestEveryPackageIsOnTheMap(t *testing.T) {
	text := read(t, "docs/architecture.md")
	seen := map[string]bool{}
	for _, src := range sources(t) {
		if src.test() || seen[src.dir] {
			continue
		}
		seen[src.dir] = true
		if !strings.Contains(text, "| `"+src.dir+"` |") {
			t.Errorf("%s has no row in docs/architecture.md", src.dir)
		}
	}
}

// TestNothingIsLeftForLater: what is to be done stands in the tracker, with an owner, not in the source.
func TestNothingIsLeftForLater(t *testing.T) {
	words := []string{"TO" + "DO", "FIX" + "ME", "XX" + "X"}
	marks := regexp.MustCompile(`\b(` + strings.Join(words, "|") + `)\b`)
	for _, name := range files(t) {
		switch path.Ext(name) {
		case ".go", ".proto", ".md", ".yml", ".yaml", ".js", ".css", ".html", ".sh":
		default:
			continue
		}
		text := read(t, name)
		if !slices.ContainsFunc(words, func(word string) bool { return strings.Contains(text, word) }) {
			continue // which is much cheaper to see than the words' ends
		}
		if at := marks.FindStringIndex(text); at != nil {
			t.Errorf("%s:%d: %s", name, 1+strings.Count(text[:at[0]], "\n"), text[at[0]:at[1]])
		}
	}
}

// TestDocumentLinksLeadSomewhere follows the relative links and pictures of all documents, headings included.
func TestDocumentLinksLeadSomewhere(t *testing.T) {
	all := files(t)
	link := regexp.MustCompile(`\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)"`)
	for _, name := range all {
		if path.Ext(name) != ".md" {
			continue
		}
		for _, found := range link.FindAllStringSubmatch(read(t, name), -1) {
			target := found[1] + found[2]
			if strings.Contains(target, "://") {
				continue
			}
			if err := follow(t, all, name, target); err != nil {
				t.Errorf("%s: link %s: %v", name, target, err)
			}
		}
	}
}

func follow(t *testing.T, all []string, from, target string) error {
	t.Helper()
	file, anchor, _ := strings.Cut(target, "#")
	to := from
	if file != "" {
		to = path.Join(path.Dir(from), file)
	}
	folder := func(name string) bool { return within(to, name) || to == "." }
	if !slices.Contains(all, to) {
		if anchor == "" && slices.ContainsFunc(all, folder) {
			return nil
		}
		return fmt.Errorf("no file %q", to)
	}
	if anchor != "" && !slices.Contains(anchors(read(t, to)), anchor) {
		return fmt.Errorf("no heading for #%s in %s", anchor, to)
	}
	return nil
}

// anchors lists the names that the headings of a document are linked by.
func anchors(text string) []string {
	var names []string
	drop := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	for line := range strings.SplitSeq(text, "\n") {
		heading := strings.TrimLeft(line, "#")
		if heading == line || !strings.HasPrefix(heading, " ") {
			continue
		}
		name := drop.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	return names
}
