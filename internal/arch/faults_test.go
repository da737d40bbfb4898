package arch

import (
	"go/ast"
	"regexp"
	"strings"
	"testing"
)

// faultTable is where each fault stands with the tests that show what happens then.
const faultTable = "docs/faults.md"

// TestFaultTableNamesTestsThatExist: a test that is renamed or gone is still promised there.
func TestFaultTableNamesTestsThatExist(t *testing.T) {
	declared := map[string]bool{}
	for _, src := range sources(t) {
		for _, d := range src.file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && src.test() {
				declared[f.Name.Name] = true
			}
		}
	}
	named := regexp.MustCompile("`((?:Test|Fuzz)[A-Z][A-Za-z0-9]*)`").FindAllStringSubmatch(read(t, faultTable), -1)
	if len(named) < 50 {
		t.Errorf("%s names only %d tests", faultTable, len(named))
	}
	for _, name := range named {
		if !declared[name[1]] {
			t.Errorf("%s names %s, which does not exist", faultTable, name[1])
		}
	}
}

// TestFaultsHaveTheirIDs: the tests of single faults begin with the id of what they show,
// and there, in a table where no id stands twice, they are named.
func TestFaultsHaveTheirIDs(t *testing.T) {
	table := map[string]string{}
	for _, row := range regexp.MustCompile(`(?m)^\| ([A-Z]\d+) \|.*$`).FindAllStringSubmatch(read(t, faultTable), -1) {
		if table[row[1]] != "" {
			t.Errorf("%s has %s twice", faultTable, row[1])
		}
		table[row[1]] = row[0]
	}
	if len(table) < 50 {
		t.Errorf("%s has only %d faults", faultTable, len(table))
	}
	begins, id := regexp.MustCompile(`^[A-Z]\d+(( and |, )[A-Z]\d+)*[.,;:]? `), regexp.MustCompile(`[A-Z]\d+`)
	for _, src := range sources(t) {
		if src.dir != "internal/faultbench" || !strings.HasPrefix(src.name, "rows_") {
			continue
		}
		for _, d := range src.file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || !strings.HasPrefix(f.Name.Name, "Test") {
				continue
			}
			ids := id.FindAllString(begins.FindString(strings.ReplaceAll(f.Doc.Text(), "\n", " ")), -1)
			if len(ids) == 0 {
				t.Errorf("%s does not begin with an id of %s", f.Name.Name, faultTable)
			}
			for _, name := range ids {
				if !strings.Contains(table[name], "`"+f.Name.Name+"`") {
					t.Errorf("%s says that it is about %s, where it is not named", f.Name.Name, name)
				}
			}
		}
	}
}
