package arch

import (
	"go/ast"
	"regexp"
	"testing"
)

// faultTable is where each fault stands with the tests that show what happens then.
const faultTable = "docs/reliability.md"

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
