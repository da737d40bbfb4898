package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// module is the import path of the repository's root.
const module = "github.com/push-manager/push-manager"

// root is the repository's root as seen from this folder, where go test runs the tests.
const root = "../.."

// source is one Go file.
type source struct {
	dir  string // slash-separated, relative to the root
	name string // without the folder
	file *ast.File
}

func (s source) path() string    { return path.Join(s.dir, s.name) }
func (s source) test() bool      { return strings.HasSuffix(s.name, "_test.go") }
func (s source) generated() bool { return strings.HasSuffix(s.name, ".pb.go") }

// imports lists the import paths of the file.
func (s source) imports() []string {
	paths := make([]string, 0, len(s.file.Imports))
	for _, spec := range s.file.Imports {
		paths = append(paths, strings.Trim(spec.Path.Value, `"`))
	}
	return paths
}

// sources are all Go files of the module, whatever machine they are for.
func sources(t *testing.T) []source {
	t.Helper()
	all, err := parsed()
	if err != nil {
		t.Fatalf("parse the repository: %v", err)
	}
	if len(all) == 0 {
		t.Fatal("found no Go files: is the test run in its own folder?")
	}
	return all
}

// files are all files of the repository, slash-separated and relative to its root, but for those in hidden folders,
// in testdata, in modules of their own (tools), and in what a build, a run or npm leaves behind.
func files(t *testing.T) []string {
	t.Helper()
	all, err := walked()
	if err != nil {
		t.Fatalf("walk the repository: %v", err)
	}
	return all
}

// Nearly every test here reads the whole repository, which is read once for all of them.
var (
	parsed = sync.OnceValues(func() (all []source, err error) {
		names, err := walked()
		if err != nil {
			return nil, err
		}
		fset := token.NewFileSet()
		for _, name := range names {
			if path.Ext(name) != ".go" {
				continue
			}
			file, err := parser.ParseFile(fset, filepath.Join(root, name), nil, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				return nil, err
			}
			all = append(all, source{dir: path.Dir(name), name: path.Base(name), file: file})
		}
		return all, nil
	})
	walked = sync.OnceValues(func() (all []string, err error) {
		err = filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(root, name)
			if err != nil {
				return err
			}
			if entry.IsDir() && rel != "." && !belongs(name, entry.Name()) {
				return filepath.SkipDir
			}
			if !entry.IsDir() {
				all = append(all, filepath.ToSlash(rel))
			}
			return nil
		})
		return all, err
	})
)

// belongs tells whether a folder holds sources of this module.
func belongs(dir, base string) bool {
	if strings.HasPrefix(base, ".") || base == "testdata" || base == "node_modules" || base == "bin" || base == "push-manager-data" {
		return false
	}
	_, err := os.Stat(filepath.Join(dir, "go.mod"))
	return err != nil
}

// read returns a file's text.
func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
	if err != nil {
		t.Fatalf("read %s: %v", name, err)
	}
	return string(text)
}
